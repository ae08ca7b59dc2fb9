// Backward on Hopper: a block takes 128 keys of one key/value head, 64 a consumer, and walks the rows that see them.
//
//   producer:  takes items (a key tile against a band of rows, listed by the portable kernels) from a counter; sends K
//              and V of each, then Q, dO and the statistics of one row tile after another through a ring of kStages
//   consumer:  S' = K Q^T;  D' = V dO^T;  P' = exp(S' - lse);  dS' = P' (D' - delta)
//              dV += P' dO;  dQ[row tile before] += dS K;  dK += dS' Q
//   clearer:   writes the zeros that the float32 sums of dQ begin with, for all heads but the first, while that is computed
//
// Scores are computed transposed, keys x rows, so that P' and dS' are operands of dV and dK as they lie in registers.
// For dQ the dS' of both consumers meet in shared memory, in kScores buffers in turn; each consumer computes 64 x 64 of
// dQ, and the copy engine adds them up in float32 in global memory, in the order of the registers: reductions by the
// threads would keep their load/store unit busy for a fourth of the time. K of the next item comes while one is computed,
// V once its last D' is there.
//
// dQ is computed one row tile late, across the ends of items. Then a consumer rarely waits for the other: they run
// about half a row tile apart, and one multiplies while the other has its exponentials. Nobody waits in a circle,
// because in the order "send row tile t; consumer 0 computes t; consumer 1 computes t; send t + 1; ..." every wait
// comes after what it waits for: dQ of t - 1 needs dS of t - 1; dS of t a buffer whose dQ was finished with row tile
// t - 1 or before; row tile t a stage that t - 2 has released; keys the place of those of the item before the last, which
// are released with the first message of the last item, of which every item has at least one; values those of the
// last item with row tiles, and they are sent behind the first row tile, which waits for none of these. Cleared sums come
// from warps that wait for nobody.
//
// In deterministic calls dQ is added up in integers (fixed_point.cuh), dK and dV in turns (backward_turns.cuh).
#pragma once

#include "backward_producer.cuh"

namespace tree_attn::hopper {

template <typename T_, int kDim_>
struct BackwardTiles {
  using T = T_;
  static constexpr int kDim = kDim_, kValueDim = kDim_, kKeys = 128, kRows = row_tile(kDim_);
  static constexpr int kStages = 2, kItems = 2, kScores = 2;  // buffers of row tiles, key tiles and dS'
  static constexpr int kConsumers = 2, kGroupThreads = 128, kThreads = kGroupThreads * (kConsumers + 1);
  static constexpr int kGroupKeys = kKeys / kConsumers, kReleases = kConsumers * kGroupThreads / kWarp;
  static constexpr int kGroupReleases = kGroupThreads / kWarp;
  static constexpr bool kClearsLater = true;  // sums of dQ, of all heads but the first
  // Of row tiles sent whose dQ is still to come; messages count row tiles modulo 4.
  static constexpr int kRowFactors = 4;
  static_assert(kRowFactors > kStages);
  static constexpr int kKBytes = kKeys * kDim * 2, kQBytes = kRows * kDim * 2, kSBytes = kKeys * kRows * 2;
  static constexpr int kKSlab = kKeys * 128, kQSlab = kRows * 128, kSSlab = kKeys * 128;  // 64 columns of a tile
  // dQ is 128 x 64 or 64 x 128: a consumer takes half of the rows, or of the columns.
  static constexpr bool kDqByRows = kRows == 128;
  static_assert((kRows == 128 && kDim == 64) || (kRows == 64 && kDim == 128));
  static_assert(kItems == 2 && kScores >= 2, "dQ comes late: the keys and dS' of the row tile before are still needed");

  // Registers of a thread. The shares of three warpgroups are at most 3 * 168, what the launch gives them; with more
  // they would wait for ever.
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

  // Registers of one thread that are added up in global memory.
  static constexpr int kDqRegisters = 32, kDkRegisters = kGroupKeys * kDim / kGroupThreads;

  struct Stage {
    alignas(1024) char q[kQBytes];
    char grad_out[kQBytes];
  };
  struct Smem {
    alignas(1024) char k[kItems][kKBytes];
    char v[kKBytes];
    Stage stages[kStages];
    char ds[kScores][kSBytes];
    char staging[kReleases][kDqRegisters * kWarp * 4];  // of each warp: registers of dQ; rows of dV, then dK
    static_assert(sizeof(staging) == kRows * kDim * 4);
    float log2_sums[kStages][kRows], deltas[kStages][kRows], row_factors[kRowFactors][kRows];
    uint64_t item_full[kItems], item_empty[kItems], v_full, v_empty, full[kStages], empty[kStages];
    uint64_t ds_full[kScores], ds_empty[kScores];
    int4 item[kItems];       // key tile or -1 for the end, key/value head, 0 if the tile has no other items
    int2 message[kStages];   // and the number of the row tile among those of all heads
  };
  static constexpr int kSmem = sizeof(Smem);
  static_assert(kSmem <= 227 * 1024);
};

// dK or dV of a warp's 16 keys, times `scale`, registers -> smem -> gmem, by this warp alone.
template <typename Tiles>
__device__ __forceinline__ void store_keys(char* staging, const Tensor3& x, int tile, int keys, int kv_head, int cols,
                                           int warp, float scale, float (&c)[Tiles::kDim / 8][4]) {
  using T = typename Tiles::T;
  using Slab = float[1][8][4];
  constexpr int kSlab = 16 * 128;
  const int lane = threadIdx.x % kWarp, row = lane / 8, key = tile * Tiles::kKeys + warp * 16 + row, chunk = lane % 8;
#pragma unroll
  for (int i = 0; i < Tiles::kDkRegisters; ++i) (&c[0][0])[i] *= scale;
#pragma unroll
  for (int slab = 0; slab < Tiles::kDim / 64; ++slab)
    portable::store_accumulators<T, 64>(staging + slab * kSlab, 0, 0, reinterpret_cast<const Slab&>(c[slab * 8]));
  __syncwarp();
  T* const to = static_cast<T*>(x.data) + key * x.token_stride + kv_head * x.head_stride + chunk * 8;
#pragma unroll
  for (int slab = 0; slab < Tiles::kDim / 64; ++slab)
#pragma unroll
    for (int i = 0; i < 16; i += 4)
      if (key + i < keys && slab * 64 + chunk * 8 < cols)
        *reinterpret_cast<int4*>(to + i * x.token_stride + slab * 64) =
            *reinterpret_cast<const int4*>(staging + slab * kSlab + SmemTile<64>::offset(row + i, chunk));
  __syncwarp();
}

// The row of dQ, in its row tile, of a lane's first two registers of four; the others are 8 rows on. Warps of all consumers.
template <typename Tiles>
__device__ __forceinline__ int dq_row(int warp, int lane) {
  return warp % 4 * 16 + lane / 4 + (Tiles::kDqByRows ? warp / 4 * 64 : 0);
}

// Where a warp's registers of dK and dV are added up.
template <typename Tiles>
__device__ __forceinline__ float* grad_kv_of(const BackwardArguments& args, int kv_head, int tile, int warp) {
  const int64_t key = kv_head * Workspace::padded_keys(args.call.sizes) + int64_t{tile} * Tiles::kKeys;
  return args.work.grad_kv + key * (2 * Tiles::kDim) +
         warp * (2 * Tiles::kDkRegisters * kWarp);
}

template <typename Tiles, bool kCapped, bool kFixedPoint>
__device__ __forceinline__ void consume(const BackwardArguments& args, typename Tiles::Smem& smem) {
  using T = typename Tiles::T;
  constexpr int kRows = Tiles::kRows, kRowTiles = kRows / 8, kDim = Tiles::kDim;
  const Backward& call = args.call;
  const Sizes& sizes = call.sizes;
  const auto at = [](auto& x) { return smem_address(&x); };
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0) - 4;  // of all consumers
  const int consumer = warp / Tiles::kGroupReleases;
  const int lane = threadIdx.x % kWarp;
  const uint32_t own_rows = consumer * Tiles::kGroupKeys * 128;  // of this consumer's keys in a slab of K or V
  char* const staging = smem.staging[warp];
  const auto release = [&](uint64_t& barrier) {  // by every warp, once all its lanes are finished
    warp_arrive(at(barrier), lane);
  };

  Ring<Tiles::kStages> stages;
  Ring<Tiles::kItems> slots;

  // The row tile before, whose dQ is to come: its number * kItems + where its keys are; negative for none. Its dS' are at
  // the place before in the ring.
  int late = -1;
  // dQ in this warp's staging is sent with the next fence: a fence of its own would wait for the stores.
  int staged = -1;  // none, or the number of the row tile among those of all heads
  const auto send_staged = [&] {
    if (staged < 0) return;
    if (recomputed(threadIdx.x) % kWarp == 0)  // kept from elsewhere it would make other registers spill
      bulk_add<kFixedPoint>(
          args.work.grad_q + int64_t{staged} * (kRows * kDim) + warp * (Tiles::kDqRegisters * kWarp), at(*staging),
          sizeof(smem.staging[0]));
    staged = -1;
  };
  const auto wait_for_staging = [&] {
    if (lane == 0) bulk_wait_read();
    __syncwarp();
  };
  const auto late_slot = [&] { return late & (Tiles::kItems - 1); };
  const auto late_product = [&](float (&dq)[8][4], Ring<Tiles::kScores> before) {
    barrier_wait(at(smem.ds_full[before.place()]), before.parity());
    const uint32_t ds = at(smem.ds[before.place()]) + (Tiles::kDqByRows ? consumer * Tiles::kSSlab : 0);
    const uint32_t k = at(smem.k[late_slot()]) + (Tiles::kDqByRows ? 0 : consumer * Tiles::kKSlab);
    const uint64_t a = descriptor_mn_major(ds, Tiles::kSSlab), b = descriptor_mn_major(k, Tiles::kKSlab);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tiles::kKeys / 16; ++step)
      Wgmma<T, 64>::template ss<true, true>(dq, descriptor_at(a, step * 16 * 128), descriptor_at(b, step * 16 * 128),
                                            step > 0);
    wgmma_commit();
  };
  const auto late_add = [&](float (&dq)[8][4], Ring<Tiles::kScores> before) {
    release(smem.ds_empty[before.place()]);
    if (late_slot() != slots.place()) release(smem.item_empty[late_slot()]);  // it was the last of its item
    if constexpr (kFixedPoint) {
      const int row = dq_row<Tiles>(recomputed(threadIdx.x) / kWarp - 4, lane);
      const float* const factors = smem.row_factors[before.steps % Tiles::kRowFactors] + row;
      portable::to_integers(dq, {factors[0], factors[8]}, args.work.row_factor + int64_t{late / Tiles::kItems} * kRows + row);
    }
    wait_for_staging();
#pragma unroll
    for (int i = 0; i < 8; ++i)
      reinterpret_cast<float4*>(staging)[i * kWarp + lane] = {dq[i][0], dq[i][1], dq[i][2], dq[i][3]};
    staged = late / Tiles::kItems;
  };

  for (;;) {
    const int slot = slots.place();
    barrier_wait(at(smem.item_full[slot]), slots.parity());
    const int4& item = smem.item[slot];  // left there, since registers are short

    float dk[kDim / 8][4], dv[kDim / 8][4];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[n][e] = dv[n][e] = 0.f;

    int message;
    do {
      const int stage = stages.place();
      barrier_wait(at(smem.full[stage]), stages.parity());
      const int2 sent = smem.message[stage];
      message = sent.x;
      // The places of this row tile's dS' and of the one before.
      const Ring<Tiles::kScores> scores{sent_before(message)}, before{scores.steps - 1};
      if (!(message & kNoRows)) {
        const int row0 = message & ~kFlags;
        const uint32_t q = at(smem.stages[stage].q), grad_out = at(smem.stages[stage].grad_out);
        // S' and D' run along the columns of all four, dV and dK along the rows of Q and dO.
        const uint64_t k_along = descriptor_k_major(at(smem.k[slot]) + own_rows);
        const uint64_t v_along = descriptor_k_major(at(smem.v) + own_rows);
        const uint64_t q_along = descriptor_k_major(q), grad_out_along = descriptor_k_major(grad_out);
        const uint64_t q_down = descriptor_mn_major(q, Tiles::kQSlab);
        const uint64_t grad_out_down = descriptor_mn_major(grad_out, Tiles::kQSlab);
        float s[kRowTiles][4], d[kRowTiles][4];

        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step)
          Wgmma<T, kRows>::ss(s, descriptor_at(k_along, step / 4 * Tiles::kKSlab + step % 4 * 32),
                              descriptor_at(q_along, step / 4 * Tiles::kQSlab + step % 4 * 32), step > 0);
        wgmma_commit();
        barrier_wait(at(smem.v_full), message & kOddValues ? 1 : 0);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step)
          Wgmma<T, kRows>::ss(d, descriptor_at(v_along, step / 4 * Tiles::kKSlab + step % 4 * 32),
                              descriptor_at(grad_out_along, step / 4 * Tiles::kQSlab + step % 4 * 32), step > 0);
        wgmma_commit();

        // What a thread needs of each row is read before the wait for a product, if there are registers: shared memory is
        // slow to answer while products run.
        constexpr bool kReadsEarly = kRowTiles == 8 && !kCapped;
        float2 of_rows[kReadsEarly ? kRowTiles : 1];
        const auto of_row = [&](const float (&from)[kRows], int n) {
          return *reinterpret_cast<const float2*>(from + n * 8 + (lane % 4) * 2);
        };
        const auto read = [&](const float (&from)[kRows]) {
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n) {
            of_rows[n] = of_row(from, n);
            compute_now(of_rows[n].x), compute_now(of_rows[n].y);
          }
        };
        const auto exponentials = [&](int n, float (&x)[4]) {
          const float2 sums = kReadsEarly ? of_rows[n] : of_row(smem.log2_sums[stage], n);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            x[e] = exp2_approx(x[e] * args.scaling.log2_scale - (e % 2 ? sums.y : sums.x));
        };
        const bool partial = message & kPartial;
        if (kReadsEarly && !partial) read(smem.log2_sums[stage]);
        wgmma_wait<1>();
        if constexpr (kCapped) {
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] = tanh_accurate(args.scaling.inner_scale * s[n][e]);
        }
        if (partial) {
          const int key0 = item.x * Tiles::kKeys + consumer * Tiles::kGroupKeys;
          SeenRows(args, key0).template hide<kRows>(args, key0, row0, s);
          if constexpr (kReadsEarly) read(smem.log2_sums[stage]);
        }
        if constexpr (!kCapped) {
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n) {
            exponentials(n, s[n]);
#pragma unroll
            for (int e = 0; e < 4; ++e) compute_now(s[n][e]);
          }
        }
        if constexpr (kReadsEarly) read(smem.deltas[stage]);
        uint32_t p[kRowTiles / 2][4], w[kRowTiles / 2][4];  // P' and dS'
        // The branches of this wait also keep the exponentials before the next: ptxas moves none across.
        barrier_wait(at(smem.ds_empty[scores.place()]), scores.parity() ^ 1);
        wgmma_wait<0>();
        if (message & kLast) release(smem.v_empty);
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          const float2 deltas = kReadsEarly ? of_rows[n] : of_row(smem.deltas[stage], n);
#pragma unroll
          for (int e = 0; e < 4; ++e) d[n][e] -= e % 2 ? deltas.y : deltas.x;
          if constexpr (kCapped) {  // S' still holds what the cap made; its derivative goes into dS'
#pragma unroll
            for (int e = 0; e < 4; ++e) d[n][e] *= 1.f - s[n][e] * s[n][e];
            exponentials(n, s[n]);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) d[n][e] *= s[n][e];
        }
        if (partial) {  // what a hidden pair has for D' need not be finite
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (s[n][e] == 0.f) d[n][e] = 0.f;
        }
        to_operand<T>(p, s);
        to_operand<T>(w, d);

        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kRows / 16; ++step)
          Wgmma<T, kDim>::template rs<true>(dv, p[step], descriptor_at(grad_out_down, step * 16 * 128), true);
        wgmma_commit();

        const uint32_t mine = at(smem.ds[scores.place()]) + SmemTile<64>::offset(warp * 16 + lane % 16, lane / 16);
#pragma unroll
        for (int i = 0; i < kRowTiles / 2; ++i)
          store_matrix_x4(SmemTile<64>::advance(mine, i % 4 * 2) + i / 4 * Tiles::kSSlab, w[i][0], w[i][1], w[i][2],
                          w[i][3]);
        proxy_fence();
        release(smem.ds_full[scores.place()]);
        send_staged();

        float dq[8][4];
        late_product(dq, before);  // of whatever is there when none is to come
#pragma unroll
        for (int step = 0; step < kRows / 16; ++step)
          Wgmma<T, kDim>::template rs<true>(dk, w[step], descriptor_at(q_down, step * 16 * 128), true);
        wgmma_commit();
        wgmma_wait<1>();
        if (late >= 0) late_add(dq, before);
        late = sent.y * Tiles::kItems + slot;
        wgmma_wait<0>();
      } else if (late >= 0) {  // its keys make room for the next item, and nothing may come after this one
        float dq[8][4];
        late_product(dq, before);
        wgmma_wait<0>();
        late_add(dq, before);
        late = -1;
      }
      release(smem.empty[stage]);
      ++stages.steps;
    } while (!(message & (kNoRows | kLast)));
    if (staged >= 0) {
      proxy_fence();
      __syncwarp();
      send_staged();
    }
    if (item.x < 0) break;

    if (item.z) {
      if constexpr (kFixedPoint) wait_for_turn(consumer);
      float* to = grad_kv_of<Tiles>(args, item.y, item.x, warp);
      portable::add_registers<Tiles::kDkRegisters>(to, &dk[0][0]);
      portable::add_registers<Tiles::kDkRegisters>(to + Tiles::kDkRegisters * kWarp, &dv[0][0]);
      if constexpr (kFixedPoint) end_turn(consumer);
    } else {
      wait_for_staging();
      store_keys<Tiles>(staging, call.grad_v, item.x, sizes.keys, item.y, sizes.value_dim, warp, 1.f, dv);
      store_keys<Tiles>(staging, call.grad_k, item.x, sizes.keys, item.y, sizes.head_dim, warp, args.scaling.scale, dk);
    }
    if (late < 0) release(smem.item_empty[slot]);  // no dQ that needs its keys
    ++slots.steps;
  }
  if (lane == 0) bulk_wait();
}

template <typename Tiles, bool kCapped, bool kFixedPoint>
__global__ void __launch_bounds__(Tiles::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments args, const __grid_constant__ BackwardMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<typename Tiles::Smem*>(raw);
  if (threadIdx.x == 0) {
    prefetch_maps(maps);
    for (int i = 0; i < Tiles::kItems; ++i) {
      barrier_init(smem_address(&smem.item_full[i]), 1);
      barrier_init(smem_address(&smem.item_empty[i]),
                   (Tiles::kReleases + (kFixedPoint ? Tiles::kConsumers : 0)) * kWarpArrivals);
    }
    barrier_init(smem_address(&smem.v_full), 1);
    barrier_init(smem_address(&smem.v_empty), Tiles::kReleases * kWarpArrivals);
    for (int i = 0; i < Tiles::kStages; ++i) {
      barrier_init(smem_address(&smem.full[i]), 1);
      barrier_init(smem_address(&smem.empty[i]), Tiles::kReleases * kWarpArrivals);
    }
    for (int i = 0; i < Tiles::kScores; ++i) {
      barrier_init(smem_address(&smem.ds_full[i]), Tiles::kReleases * kWarpArrivals);
      barrier_init(smem_address(&smem.ds_empty[i]), Tiles::kReleases * kWarpArrivals);
    }
    for (int i = 0; i < Tiles::kItems; ++i) smem.item[i].y = 0;  // the head whose sums of dQ are clear from the beginning
    barrier_init_fence();
  }
  clear_rows_that_are_none<Tiles>(args, smem.stages);
  __syncthreads();
  // The same for all lanes, which the compiler cannot tell from threadIdx.x: now it keeps addresses in uniform registers.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0);
  if (warp < Tiles::kGroupThreads / kWarp) {
    registers_decrease<Tiles::kProducerRegisters>();
    if (threadIdx.x == 0) produce<Tiles, kFixedPoint>(args, maps, smem);
    else if (warp == 3) clear_sums<Tiles>(args);
    else if (kFixedPoint && warp > 0)
      keep_turns<Tiles>(args, warp - 1, [&](unsigned i) {
        const Ring<Tiles::kItems> slots{i};
        barrier_wait(smem_address(&smem.item_full[slots.place()]), slots.parity());
        const int4 item = smem.item[slots.place()];
        warp_arrive(smem_address(&smem.item_empty[slots.place()]), threadIdx.x % kWarp);
        return item;
      });
  } else {
    registers_increase<Tiles::kConsumerRegisters>();
    consume<Tiles, kCapped, kFixedPoint>(args, smem);
  }
}

// -- before and after ---------------------------------------------------------------------------------------------------------

// All that comes before the products, in one launch.
template <typename Tiles>
__global__ void __launch_bounds__(portable::kPrepareWarps * kWarp, 4)
    prepare_kernel(const __grid_constant__ BackwardArguments args, portable::PrepareBlocks blocks) {
  const int block = blockIdx.x, kv_head = blockIdx.y;
  const bool clears = kv_head == 0 || !Tiles::kClearsLater;
  portable::prepare<Tiles>(args, blocks, block, kv_head, clears);
  if (block == 0) {
    if (threadIdx.x == 0) args.work.cleared[kv_head] = clears ? args.work.padded_rows / kClearedRows : 0;
    if (threadIdx.x == 0 && kv_head == 0) args.work.plan->parts_taken = 0;
  }
  const int tile = block - 1 - blocks.rows;
  if (args.fixed_point && tile >= 0 && threadIdx.x == 0) *key_parts_of<Tiles>(args, kv_head, tile) = 0;
}

// And after them: float32 sums to the type of the gradients. A thread reads what one of the consumers has added.
constexpr int kFinishThreads = 256;

// Integers of two rows of dQ, `row` among those of all heads and 8 on, to float32.
__device__ __forceinline__ void to_floats(const BackwardArguments& args, float (&dq)[8][4], int64_t row) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float step = 1.f / args.work.row_factor[row + h * 8];
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) dq[n][e] = static_cast<float>(__float_as_int(dq[n][e])) * step;
  }
}

// dQ of the row tile that begins with packed row `first`.
template <typename Tiles>
__device__ __forceinline__ void finish_rows(const BackwardArguments& args, char* staging, int first, int kv_head) {
  using T = typename Tiles::T;
  const int warp = threadIdx.x / kWarp, consumer = warp / 4;
  float dq[1][8][4];
  const int64_t row = static_cast<int64_t>(kv_head) * args.work.padded_rows + first;
  portable::read_registers<Tiles::kDqRegisters>(
      &dq[0][0][0], args.work.grad_q + row * Tiles::kDim + warp * (Tiles::kDqRegisters * kWarp));
  if (args.fixed_point) to_floats(args, dq[0], row + dq_row<Tiles>(warp, threadIdx.x % kWarp));
#pragma unroll
  for (int i = 0; i < Tiles::kDqRegisters; ++i) (&dq[0][0][0])[i] *= args.scaling.scale;
  portable::store_accumulators<T, Tiles::kDim>(staging, warp % 4 * 16 + (Tiles::kDqByRows ? consumer * 64 : 0),
                                               Tiles::kDqByRows ? 0 : consumer * 8, dq);
  __syncthreads();
  portable::TileCopy<T, Tiles::kDim, Tiles::kRows, kFinishThreads>::store_rows(
      staging, args.call.grad_q, args.rows, first, kv_head, args.call.sizes.head_dim);
}

// dK and dV of a key tile in several bands.
template <typename Tiles>
__device__ __forceinline__ void finish_keys(const BackwardArguments& args, char* staging, int tile, int kv_head) {
  if (portable::bands_of(args.work.tile_rows[tile], args.work.plan->band_rows) < 2) return;
  const Sizes& sizes = args.call.sizes;
  const int warp = threadIdx.x / kWarp;
  const float* const sums = grad_kv_of<Tiles>(args, kv_head, tile, warp);
  const auto finish = [&](const Tensor3& x, int part, int cols, float scale) {
    float c[Tiles::kDim / 8][4];
    portable::read_registers<Tiles::kDkRegisters>(&c[0][0], sums + part * Tiles::kDkRegisters * kWarp);
    store_keys<Tiles>(staging + warp * 16 * Tiles::kDim * 2, x, tile, sizes.keys, kv_head, cols, warp, scale, c);
  };
  finish(args.call.grad_k, 0, sizes.head_dim, args.scaling.scale);
  finish(args.call.grad_v, 1, sizes.value_dim, 1.f);
}

// All that comes after the products, in one launch: `row_tiles` blocks a head, then one a key tile.
template <typename Tiles>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ BackwardArguments args,
                                                                int row_tiles) {
  __shared__ __align__(1024) char staging[Tiles::kKBytes];
  static_assert(Tiles::kKBytes >= Tiles::kQBytes);
  const int block = blockIdx.x, kv_head = blockIdx.y;
  if (block < row_tiles) finish_rows<Tiles>(args, staging, block * Tiles::kRows, kv_head);
  else finish_keys<Tiles>(args, staging, block - row_tiles, kv_head);
}

}  // namespace tree_attn::hopper
