// Backward on Hopper for head dims above 128: a block takes 64 keys of one key/value head and walks the rows that see
// them.
//
// dK and dV of 64 keys x 256 columns fill the registers of two warpgroups, one each, so consumers share the work by
// product:
//
//   producer:   as in backward.cuh, with barriers of their own for Q, dO, K and V
//   consumer 0: S' = K Q^T;   P' = exp(S' - lse), in float32 to consumer 1;  dV += P' dO;  dQ[first columns] += dS K
//   consumer 1: D' = V dO^T;  dS' = P' (D' - delta), to shared memory;       dK += dS' Q;  dQ[other columns] += dS K
//
// Thus nothing is computed twice, and P' and dS' are operands of dV and dK as they lie in registers. KB of shared memory
// written and read for 64 rows by 64 keys, head dim 256: Q and dO arrive 64, S' and D' 128, dV and dK 64, dQ 48, P' in
// float32 32, dS' 8, dQ through its staging 128: 472, which take 3 776 clocks, where the products take 2 560. If both
// consumers took half of the rows of S' and D' and half of the columns of dV and dK, it would be 544.
//
// dQ leaves through staging as in backward.cuh. There is room for 64 of a consumer's 128 columns: the others stay in
// registers until the next dV or dK is under way, about half a row tile later.
//
// Nobody waits in a circle. Let row tiles t count over all items. The consumers meet in P'(t), for which consumer 0 needs
// nothing of consumer 1 after dS'(t - 1), and in dS'(t), for which consumer 1 needs P'(t). Both need what the producer
// sends, for an item's first row tile Q(t), V, dO(t), K in this order, for others Q(t), dO(t). For these it waits until
// Q(t - 2), dO(t - kOStages), and V and K of the item before are released, with row tiles before t.
//
// What makes further barriers unnecessary:
//   P'(t + 1) may overwrite P'(t): consumer 0 has waited for dS'(t), and each warp sends it after it has read P'(t).
//   dS'(t + 2) may overwrite dS'(t): a warp of consumer 1 that has seen all of dS'(t + 1) knows that the other warps have
//     gone on to tile t + 1 and had P'(t + 1) from all of consumer 0, whose warps send it after their dQ(t).
#pragma once

#include "backward.cuh"

namespace tree_attn::hopper {

template <typename T_, int kDim_, int kValueDim_>
struct WideBackwardTiles {
  using T = T_;
  static constexpr int kDim = kDim_, kValueDim = kValueDim_, kKeys = 64, kRows = row_tile(kDim_);
  static constexpr int kQStages = 2, kOStages = kDim > 192 ? 1 : 2;  // buffers of Q and of dO
  static constexpr int kGroupThreads = 128, kThreads = 3 * kGroupThreads, kGroupWarps = kGroupThreads / kWarp;
  static constexpr int kReleases = 2 * kGroupWarps;  // warps of both consumers
  static constexpr int kRowFactors = 2 * kQStages;   // of row tiles: dQ needs them when Q may be another already
  static constexpr int kSlabs = kDim / 64, kValueSlabs = kValueDim / 64;  // of 64 columns
  static constexpr int kSlab = 64 * 128;                                  // bytes: 64 rows or keys
  static constexpr int kKBytes = kSlabs * kSlab, kVBytes = kValueSlabs * kSlab;
  static constexpr int kQBytes = kSlabs * kSlab, kOBytes = kValueSlabs * kSlab;
  static constexpr int kFirstDqSlabs = kSlabs / 2;  // of consumer 0; the others are of consumer 1
  // Is dQ issued while dV or dK runs? Beside 256 columns of these and their operand there are no registers for it.
  static constexpr bool kDqBeside = kDim <= 192 && kValueDim <= 192;
  static_assert(kRows == 64 && kDim % 64 == 0 && kValueDim % 64 == 0 && kSlabs - kFirstDqSlabs <= 2);

  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // a thread; together at most 3 * 168
  static constexpr bool kClearsLater = false;  // sums of dQ are clear before this kernel

  // Floats of a warp in global memory: 64 columns of anything, all of dK, all of dV.
  static constexpr int kSlabFloats = 16 * 64, kDkFloats = 16 * kDim, kDvFloats = 16 * kValueDim;

  // At head dim 256: 32 KB each for K, V, dO and two of Q; 16 for P'; 16 for dS'; 32 for staging; 1.2 for the rest.
  struct Smem {
    alignas(1024) char k[kKBytes];
    char v[kVBytes];
    char q[kQStages][kQBytes];
    char grad_out[kOStages][kOBytes];
    char ds[2][kSlab];                                         // keys x rows
    float4 p[kGroupWarps][8 * kWarp];                          // each lane's 32 registers of P', 4 beside each other
    char staging[2 * kGroupWarps][kSlabFloats * sizeof(float)];  // of each warp: dQ; later its dV or dK
    float log2_sums[kQStages][kRows], deltas[kOStages][kRows], row_factors[kRowFactors][kRows];
    uint64_t k_full, k_empty, v_full, v_empty, q_full[kQStages], q_empty[kQStages], o_full[kOStages], o_empty[kOStages];
    uint64_t p_full[kGroupWarps], ds_full;
    int4 item[2];             // key tile or -1 for the end; key/value head; 0 if the tile has no others; 1 for no rows
    int2 row_tile[kQStages];  // first row + kPartial + kLast; number among all heads' tiles
  };
  static constexpr int kSmem = sizeof(Smem);
  static_assert(kSmem <= 227 * 1024);
};

template <typename Tiles, bool kFixedPoint>
__device__ __forceinline__ void produce_wide(const BackwardArguments& args, const BackwardMaps& maps,
                                             typename Tiles::Smem& smem) {
  constexpr int kRows = Tiles::kRows, kKeys = Tiles::kKeys;
  const Backward& call = args.call;
  const Sizes& sizes = call.sizes;
  const Workspace& work = args.work;
  const int group = args.rows.group.divisor;
  const auto at = [](auto& x) { return smem_address(&x); };
  unsigned step = 0;                // row tiles sent
  int item_parity = 0, values = 0;  // of the items, and of those with rows

  const auto take = [&] { return atomicAdd(&work.plan->taken, 1); };
  int next = take();
  for (bool ends = false; !ends;) {
    const portable::HeadItem taken = portable::item_taken(work, sizes, next);
    const int4 item = taken.item;
    const int kv_head = taken.kv_head;
    ends = !taken.exists;
    const int tile = ends ? -1 : item.x, k0 = max(tile, 0) * kKeys, row_tiles = (item.z - item.y + kRows - 1) / kRows;
    bool first = true;

    // A fresh barrier counts as one whose phase before is over, so all places are free at first. `message` is -1 for an
    // item without rows.
    const auto send = [&](int message) {
      const int row0 = message & ~(kPartial | kLast), token = args.rows.first_token(row0), head = kv_head * group;
      const int row_tile = kv_head * (work.padded_rows / kRows) + row0 / kRows;
      const int column_bytes = args.rows.tokens.divisor * group * 2;
      const Ring<Tiles::kOStages> grads{step};
      if (message >= 0) {
        const Ring<Tiles::kQStages> queries{step};
        const int stage = queries.place();
        const uint32_t full = at(smem.q_full[stage]);
        barrier_wait(at(smem.q_empty[stage]), queries.parity() ^ 1);
        smem.row_tile[stage] = {message, row_tile};
        barrier_arrive_expect(full, column_bytes * Tiles::kDim + (kFixedPoint ? 2 : 1) * kRows * 4);
#pragma unroll
        for (int slab = 0; slab < Tiles::kSlabs; ++slab)
          tma_load(at(smem.q[stage]) + slab * Tiles::kSlab, &maps.q, full, slab * 64, head, token);
        bulk_load(at(smem.log2_sums[stage]), work.log2_sum + int64_t{row_tile} * kRows, kRows * 4, full);
        if (kFixedPoint)
          bulk_load(at(smem.row_factors[step % Tiles::kRowFactors]), work.row_factor + int64_t{row_tile} * kRows, kRows * 4,
                    full);
      }
      if (message >= 0 && first) {
        const uint32_t full = at(smem.v_full);
        barrier_wait(at(smem.v_empty), values ^ 1);
        barrier_arrive_expect(full, Tiles::kVBytes);
#pragma unroll
        for (int slab = 0; slab < Tiles::kValueSlabs; ++slab)
          tma_load(at(smem.v) + slab * Tiles::kSlab, &maps.v, full, slab * 64, kv_head, k0);
        values ^= 1;
      }
      if (message >= 0) {
        const int place = grads.place();
        const uint32_t full = at(smem.o_full[place]);
        barrier_wait(at(smem.o_empty[place]), grads.parity() ^ 1);
        barrier_arrive_expect(full, column_bytes * Tiles::kValueDim + kRows * 4);
#pragma unroll
        for (int slab = 0; slab < Tiles::kValueSlabs; ++slab)
          tma_load(at(smem.grad_out[place]) + slab * Tiles::kSlab, &maps.grad_out, full, slab * 64, head, token);
        bulk_load(at(smem.deltas[place]), work.delta + int64_t{row_tile} * kRows, kRows * 4, full);
        ++step;
      }
      if (first) {
        const uint32_t full = at(smem.k_full);
        barrier_wait(at(smem.k_empty), item_parity ^ 1);
        smem.item[item_parity] = {tile, kv_head, item.w, message < 0};
        if (message < 0) {
          barrier_arrive(full);
        } else {
          barrier_arrive_expect(full, Tiles::kKBytes);
#pragma unroll
          for (int slab = 0; slab < Tiles::kSlabs; ++slab)
            tma_load(at(smem.k) + slab * Tiles::kSlab, &maps.k, full, slab * 64, kv_head, k0);
        }
        item_parity ^= 1;
        first = false;
      }
    };

    const KeySpan keys = KeySpan::load<kKeys>(call.mask, k0, sizes.keys);
    const int full_from = args.rows.first_row(min(keys.begin.high, sizes.rows));
    const int full_to = k0 + kKeys <= sizes.keys ? args.rows.first_row(min(keys.end.low, sizes.rows)) : 0;
    // Blocks side by side start at different rows of their band, so that they do not add to the same dQ at once.
    int row0 = item.y + (row_tiles > 0 ? tile % row_tiles * kRows : 0);
    int held = -1;  // the message before goes out when it is known whether it is the last
    for (int left = row_tiles; left >= 0; --left, row0 = row0 + kRows < item.z ? row0 + kRows : item.y) {
      // The next item is taken late, to leave it to others for as long as possible, and yet before it is needed.
      if (left == min(row_tiles, 2)) next = take();
      bool full = row0 >= full_from && row0 + kRows <= full_to;
      if (left > 0 && call.mask.window) {
        const Bounds depth = depths_of_row_tile(args, row0);
        if (depth.low - keys.depth.high >= call.mask.window) continue;
        full = full && depth.high - keys.depth.low < call.mask.window;
      }
      if (held >= 0 || left == 0) send(held >= 0 && left == 0 ? held + kLast : held);
      held = row0 + (full ? 0 : kPartial);
    }
  }
}

// By every warp, once all its lanes are finished with what the barrier guards.
__device__ __forceinline__ void release(uint64_t& barrier) {
  warp_arrive(smem_address(&barrier), threadIdx.x % kWarp);
}

// S' or D' (keys x rows) is on its way: two tiles of `kCols` columns, the product runs along these.
template <typename Tiles, int kCols>
__device__ __forceinline__ void start_scores(float (&s)[8][4], uint32_t keys, uint32_t rows) {
  const uint64_t a = descriptor_k_major(keys), b = descriptor_k_major(rows);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kCols / 16; ++step) {
    const int bytes = step / 4 * Tiles::kSlab + step % 4 * 32;
    Wgmma<typename Tiles::T, 64>::ss(s, descriptor_at(a, bytes), descriptor_at(b, bytes), step > 0);
  }
  wgmma_commit();
}

// dV or dK: `w` (keys x rows) times a tile of rows.
template <typename Tiles, int kCols>
__device__ __forceinline__ void start_grad(float (&c)[kCols / 8][4], const uint32_t (&w)[4][4], uint32_t rows) {
  const uint64_t b = descriptor_mn_major(rows, Tiles::kSlab);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Tiles::kRows / 16; ++step)
    Wgmma<typename Tiles::T, kCols>::template rs<true>(c, w[step], descriptor_at(b, step * 16 * 128), true);
  wgmma_commit();
}

// Where 64 columns of a warp's dQ, already scaled or as integers, are added up: `tile` counts the row tiles of all heads.
template <typename Tiles>
__device__ __forceinline__ float* wide_grad_q_of(const Workspace& work, int tile, int slab, int warp) {
  return work.grad_q + int64_t{tile} * (Tiles::kRows * Tiles::kDim) +
         (slab * Tiles::kGroupWarps + warp) * Tiles::kSlabFloats;
}

// The same for a key tile: dK, then dV of all warps.
template <typename Tiles>
__device__ __forceinline__ float* wide_grad_kv_of(const BackwardArguments& args, int kv_head, int tile) {
  const int64_t key = kv_head * Workspace::padded_keys(args.call.sizes) + int64_t{tile} * Tiles::kKeys;
  return args.work.grad_kv + key * (Tiles::kDim + Tiles::kValueDim);
}

// A consumer's columns of dQ: kCount slabs from slab kFirst on.
template <typename Tiles, bool kFixedPoint, int kFirst, int kCount>
struct DqColumns {
  using Factors = float[Tiles::kRowFactors][Tiles::kRows];
  const Workspace& work;
  char* const staging;
  const Factors& row_factors;
  const float scale;
  float rest[8][4];    // the second slab, if it is still to be sent
  int rest_tile = -1;  // then of which row tile

  __device__ __forceinline__ DqColumns(const Workspace& work, char* staging, const Factors& row_factors, float scale)
      : work(work), staging(staging), row_factors(row_factors), scale(scale) {}

  static __device__ __forceinline__ void start(float (&dq)[kCount * 8][4], uint32_t ds, uint32_t k) {
    const uint64_t a = descriptor_mn_major(ds, Tiles::kSlab);
    const uint64_t b = descriptor_mn_major(k + kFirst * Tiles::kSlab, Tiles::kSlab);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tiles::kKeys / 16; ++step)
      Wgmma<typename Tiles::T, kCount * 64>::template ss<true, true>(dq, descriptor_at(a, step * 16 * 128),
                                                                     descriptor_at(b, step * 16 * 128), step > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ void wait_for_staging() const {
    if (threadIdx.x % kWarp == 0) bulk_wait_read();
    __syncwarp();
  }

  // 64 columns, registers -> smem -> added to gmem.
  __device__ __forceinline__ void add(const float (&dq)[8][4], int tile, int slab) const {
    const int lane = recomputed(threadIdx.x) % kWarp, warp = threadIdx.x / kWarp % 4;
    wait_for_staging();
#pragma unroll
    for (int i = 0; i < 8; ++i)
      reinterpret_cast<float4*>(staging)[i * kWarp + lane] = {dq[i][0], dq[i][1], dq[i][2], dq[i][3]};
    proxy_fence();
    __syncwarp();
    if (lane == 0)
      bulk_add<kFixedPoint>(wide_grad_q_of<Tiles>(work, tile, kFirst + slab, warp), smem_address(staging),
               Tiles::kSlabFloats * sizeof(float));
  }

  // The factor is here since ptxas takes a mere copy of a product's registers, used beside the next product, for a use of
  // the product itself, and then waits after every single wgmma (C7517, C7518).
  __device__ __forceinline__ void send(float (&dq)[kCount * 8][4], int tile, unsigned step) {
    float now[8][4];
    if constexpr (kFixedPoint) {
      const int thread = recomputed(threadIdx.x), row = thread / kWarp % 4 * 16 + thread % kWarp / 4;
      const float* const factors = row_factors[step % Tiles::kRowFactors] + row;
      portable::to_integers(dq, {factors[0], factors[8]}, work.row_factor + int64_t{tile} * Tiles::kRows + row);
    } else {
#pragma unroll
      for (int i = 0; i < kCount * 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) dq[i][e] *= scale;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) now[i][e] = dq[i][e];
    if constexpr (kCount > 1) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) rest[i][e] = dq[8 + i][e];
      rest_tile = tile;
    }
    add(now, tile, 0);
  }
  __device__ __forceinline__ void send_rest() {
    if (rest_tile >= 0) add(rest, rest_tile, 1);
    rest_tile = -1;
  }
};

// dK or dV of a warp's 16 keys from `key` on, times `scale`, registers -> smem (4 KB) -> gmem, 64 columns at a time.
template <typename T, int kCols>
__device__ __forceinline__ void store_wide_keys(char* staging, const Tensor3& x, int key, int keys, int kv_head, int cols,
                                                float scale, float (&c)[kCols / 8][4]) {
  using Slab = float[8][4];
  const int lane = recomputed(threadIdx.x) % kWarp, row = lane / 8, chunk = lane % 8;
  T* const to = static_cast<T*>(x.data) + (key + row) * x.token_stride + kv_head * x.head_stride + chunk * 8;
#pragma unroll
  for (int slab = 0; slab < kCols / 64; ++slab) {
    char* const part = staging + slab % 2 * (16 * 128);  // what was here was read before the last __syncwarp
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[slab * 8 + n][e] *= scale;
    uint32_t w[4][4];
    to_operand<T>(w, reinterpret_cast<const Slab&>(c[slab * 8]));
    const uint32_t mine = smem_address(part) + SmemTile<64>::offset(lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store_matrix_x4(SmemTile<64>::advance(mine, i * 2), w[i][0], w[i][1], w[i][2], w[i][3]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; i += 4)
      if (key + row + i < keys && slab * 64 + chunk * 8 < cols)
        *reinterpret_cast<int4*>(to + i * x.token_stride + slab * 64) =
            *reinterpret_cast<const int4*>(part + SmemTile<64>::offset(row + i, chunk));
  }
}

// Where row tile `step` is in the rings.
template <typename Tiles>
struct Places {
  Ring<Tiles::kQStages> queries;
  Ring<Tiles::kOStages> grads;
  Ring<2> scores;
  Ring<1> tiles;  // P' and the barrier of dS', of one phase a row tile
  __device__ __forceinline__ explicit Places(unsigned step) : queries{step}, grads{step}, scores{step}, tiles{step} {}
};

// Consumer 0.
template <typename Tiles, bool kCapped, bool kFixedPoint>
__device__ __forceinline__ void consume_scores(const BackwardArguments& args, typename Tiles::Smem& smem) {
  using T = typename Tiles::T;
  constexpr int kRows = Tiles::kRows, kValueDim = Tiles::kValueDim;
  const Sizes& sizes = args.call.sizes;
  const auto at = [](auto& x) { return smem_address(&x); };
  const int warp = threadIdx.x / kWarp % 4;
  DqColumns<Tiles, kFixedPoint, 0, Tiles::kFirstDqSlabs> columns(args.work, smem.staging[warp], smem.row_factors,
                                                                 args.scaling.scale);

  unsigned step = 0;  // row tiles so far
  for (Ring<1> items;; ++items.steps) {
    barrier_wait(at(smem.k_full), items.parity());
    const int4& item = smem.item[items.steps % 2];  // left there, since registers are short
    if (item.x < 0) break;

    const SeenRows seen(args, item.x * Tiles::kKeys);
    float dv[kValueDim / 8][4];
#pragma unroll
    for (int n = 0; n < kValueDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dv[n][e] = 0.f;

    for (int message = item.w ? kLast : 0; !(message & kLast);) {
      const Places<Tiles> at_step(step);
      const int stage = at_step.queries.place(), place = at_step.grads.place();
      const int lane = recomputed(threadIdx.x) % kWarp;  // what follows from it is not kept through the loop
      barrier_wait(at(smem.q_full[stage]), at_step.queries.parity());
      const int2 row_tile = smem.row_tile[stage];
      message = row_tile.x;

      float s[kRows / 8][4];
      start_scores<Tiles, Tiles::kDim>(s, at(smem.k), at(smem.q[stage]));
      // Read before the wait: shared memory is slow to answer while products run.
      float2 sums[kRows / 8];
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
        sums[n] = *reinterpret_cast<const float2*>(smem.log2_sums[stage] + n * 8 + (lane % 4) * 2);
        compute_now(sums[n].x), compute_now(sums[n].y);
      }
      wgmma_wait<0>();
      release(smem.q_empty[stage]);
      if constexpr (kCapped) {
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[n][e] = tanh_accurate(args.scaling.inner_scale * s[n][e]);
      }
      if (message & kPartial) seen.hide<kRows>(args, item.x * Tiles::kKeys, message & ~(kPartial | kLast), s);
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
        float slope[4];  // of the cap, which goes into dS'
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          slope[e] = 1.f - s[n][e] * s[n][e];
          s[n][e] = exp2_approx(s[n][e] * args.scaling.log2_scale - (e % 2 ? sums[n].y : sums[n].x));
          slope[e] = kCapped && s[n][e] != 0.f ? s[n][e] * slope[e] : s[n][e];
        }
        smem.p[warp][n * kWarp + lane] = {slope[0], slope[1], slope[2], slope[3]};
      }
      release(smem.p_full[warp]);
      uint32_t p[kRows / 16][4];
      to_operand<T>(p, s);

      barrier_wait(at(smem.o_full[place]), at_step.grads.parity());
      start_grad<Tiles, kValueDim>(dv, p, at(smem.grad_out[place]));
      columns.send_rest();
      constexpr bool kBeside = Tiles::kDqBeside;
      if (!kBeside) wgmma_wait<0>(), release(smem.o_empty[place]);
      barrier_wait(at(smem.ds_full), at_step.tiles.parity());
      float dq[Tiles::kFirstDqSlabs * 8][4];
      columns.start(dq, at(smem.ds[at_step.scores.place()]), at(smem.k));
      if (kBeside) wgmma_wait<1>(), release(smem.o_empty[place]);
      wgmma_wait<0>();
      if (message & kLast) release(smem.k_empty);
      columns.send(dq, row_tile.y, step);
      ++step;
    }
    if (item.w) release(smem.k_empty);

    if (!item.z) {
      columns.wait_for_staging();
      store_wide_keys<T, kValueDim>(columns.staging, args.call.grad_v, item.x * Tiles::kKeys + warp * 16, sizes.keys,
                                    item.y, sizes.value_dim, 1.f, dv);
    } else {
      if constexpr (kFixedPoint) wait_for_turn(0);
      float* const to = wide_grad_kv_of<Tiles>(args, item.y, item.x) + 4 * Tiles::kDkFloats + warp * Tiles::kDvFloats;
      if (!item.w) portable::add_registers<kValueDim / 2>(to, &dv[0][0]);
      if constexpr (kFixedPoint) end_turn(0);
    }
  }
  columns.send_rest();
  if (threadIdx.x % kWarp == 0) bulk_wait();
}

// Consumer 1.
template <typename Tiles, bool kFixedPoint>
__device__ __forceinline__ void consume_grads(const BackwardArguments& args, typename Tiles::Smem& smem) {
  using T = typename Tiles::T;
  constexpr int kRows = Tiles::kRows, kDim = Tiles::kDim, kDqSlabs = Tiles::kSlabs - Tiles::kFirstDqSlabs;
  const Sizes& sizes = args.call.sizes;
  const auto at = [](auto& x) { return smem_address(&x); };
  const int warp = threadIdx.x / kWarp % 4;
  DqColumns<Tiles, kFixedPoint, Tiles::kFirstDqSlabs, kDqSlabs> columns(
      args.work, smem.staging[Tiles::kGroupWarps + warp], smem.row_factors, args.scaling.scale);

  unsigned step = 0;
  Ring<1> values;
  for (Ring<1> items;; ++items.steps) {
    barrier_wait(at(smem.k_full), items.parity());
    const int4& item = smem.item[items.steps % 2];
    if (item.x < 0) break;

    float dk[kDim / 8][4];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[n][e] = 0.f;

    for (int message = item.w ? kLast : 0; !(message & kLast);) {
      const Places<Tiles> at_step(step);
      const int stage = at_step.queries.place(), place = at_step.grads.place();
      const int lane = recomputed(threadIdx.x) % kWarp;  // what follows from it is not kept through the loop
      barrier_wait(at(smem.q_full[stage]), at_step.queries.parity());
      const int2 row_tile = smem.row_tile[stage];
      message = row_tile.x;

      float d[kRows / 8][4];
      barrier_wait(at(smem.v_full), values.parity());
      barrier_wait(at(smem.o_full[place]), at_step.grads.parity());
      start_scores<Tiles, Tiles::kValueDim>(d, at(smem.v), at(smem.grad_out[place]));
      float2 deltas[kRows / 8];
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
        deltas[n] = *reinterpret_cast<const float2*>(smem.deltas[place] + n * 8 + (lane % 4) * 2);
        compute_now(deltas[n].x), compute_now(deltas[n].y);
      }
      wgmma_wait<0>();
      release(smem.o_empty[place]);
      if (message & kLast) release(smem.v_empty);
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          d[n][e] -= e % 2 ? deltas[n].y : deltas[n].x;
          compute_now(d[n][e]);
        }

      barrier_wait(at(smem.p_full[warp]), at_step.tiles.parity());
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
        const float4 p = smem.p[warp][n * kWarp + lane];
        d[n][0] *= p.x, d[n][1] *= p.y, d[n][2] *= p.z, d[n][3] *= p.w;
        if (message & kPartial) {  // what a hidden pair has for D' need not be finite
          if (p.x == 0.f) d[n][0] = 0.f;
          if (p.y == 0.f) d[n][1] = 0.f;
          if (p.z == 0.f) d[n][2] = 0.f;
          if (p.w == 0.f) d[n][3] = 0.f;
        }
      }
      uint32_t w[kRows / 16][4];
      to_operand<T>(w, d);
      const uint32_t ds = at(smem.ds[at_step.scores.place()]);
      const uint32_t mine = ds + SmemTile<64>::offset(warp * 16 + lane % 16, lane / 16);
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
        store_matrix_x4(SmemTile<64>::advance(mine, i * 2), w[i][0], w[i][1], w[i][2], w[i][3]);
      proxy_fence();
      release(smem.ds_full);

      start_grad<Tiles, kDim>(dk, w, at(smem.q[stage]));
      columns.send_rest();
      constexpr bool kBeside = Tiles::kDqBeside;
      if (!kBeside) wgmma_wait<0>(), release(smem.q_empty[stage]);
      barrier_wait(at(smem.ds_full), at_step.tiles.parity());
      float dq[kDqSlabs * 8][4];
      columns.start(dq, ds, at(smem.k));
      if (kBeside) wgmma_wait<1>(), release(smem.q_empty[stage]);
      wgmma_wait<0>();
      if (message & kLast) release(smem.k_empty);
      columns.send(dq, row_tile.y, step);
      ++step;
    }
    if (item.w) release(smem.k_empty);
    else ++values.steps;

    if (!item.z) {
      columns.wait_for_staging();
      store_wide_keys<T, kDim>(columns.staging, args.call.grad_k, item.x * Tiles::kKeys + warp * 16, sizes.keys, item.y,
                               sizes.head_dim, args.scaling.scale, dk);
    } else {
      if constexpr (kFixedPoint) wait_for_turn(1);
      float* const to = wide_grad_kv_of<Tiles>(args, item.y, item.x) + warp * Tiles::kDkFloats;
      if (!item.w) portable::add_registers<kDim / 2>(to, &dk[0][0]);
      if constexpr (kFixedPoint) end_turn(1);
    }
  }
  columns.send_rest();
  if (threadIdx.x % kWarp == 0) bulk_wait();
}

template <typename Tiles, bool kCapped, bool kFixedPoint>
__global__ void __launch_bounds__(Tiles::kThreads, 1)
    wide_backward_kernel(const __grid_constant__ BackwardArguments args, const __grid_constant__ BackwardMaps maps) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<typename Tiles::Smem*>(raw);
  if (threadIdx.x == 0) {
    prefetch_maps(maps);
    const auto init = [](uint64_t& barrier, int arrivals) { barrier_init(smem_address(&barrier), arrivals); };
    constexpr int kOne = Tiles::kGroupWarps * kWarpArrivals, kBoth = 2 * kOne;  // warps of one consumer, of both
    init(smem.k_full, 1), init(smem.k_empty, kBoth + (kFixedPoint ? 2 * kWarpArrivals : 0));
    init(smem.v_full, 1), init(smem.v_empty, kOne);
    for (int i = 0; i < Tiles::kQStages; ++i) init(smem.q_full[i], 1), init(smem.q_empty[i], kBoth);
    for (int i = 0; i < Tiles::kOStages; ++i) init(smem.o_full[i], 1), init(smem.o_empty[i], kBoth);
    for (int i = 0; i < Tiles::kGroupWarps; ++i) init(smem.p_full[i], kWarpArrivals);
    init(smem.ds_full, kOne);
    barrier_init_fence();
  }
  clear_rows_that_are_none<Tiles>(args, smem.q, smem.grad_out);
  __syncthreads();
  // The same for all lanes, which the compiler cannot tell from threadIdx.x: now it keeps addresses in uniform registers,
  // and consumer 1 does not spill.
  const int role = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / Tiles::kGroupThreads, 0);
  if (role == 0) {
    registers_decrease<Tiles::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarp, 0);
    if (threadIdx.x == 0) produce_wide<Tiles, kFixedPoint>(args, maps, smem);
    else if (kFixedPoint && (warp == 1 || warp == 2))
      keep_turns<Tiles>(args, warp - 1, [&](unsigned i) {
        barrier_wait(smem_address(&smem.k_full), i & 1);
        const int4 item = smem.item[i % 2];
        release(smem.k_empty);
        return item;
      });
  } else {
    registers_increase<Tiles::kConsumerRegisters>();
    if (role == 1) consume_scores<Tiles, kCapped, kFixedPoint>(args, smem);
    else consume_grads<Tiles, kFixedPoint>(args, smem);
  }
}

// -- after: float32 sums to the type of the gradients -----------------------------------------------------------------------

// As finish_kernel: `row_tiles` blocks a head, then one a key tile.
template <typename Tiles>
__global__ void __launch_bounds__(kFinishThreads)
    wide_finish_kernel(const __grid_constant__ BackwardArguments args, int row_tiles) {
  using T = typename Tiles::T;
  constexpr int kDim = Tiles::kDim;
  static_assert(kFinishThreads / kWarp == 8);
  __shared__ __align__(1024) char staging[8 * 4096];
  static_assert(sizeof(staging) >= Tiles::kQBytes);
  const Sizes& sizes = args.call.sizes;
  const int kv_head = blockIdx.y, warp = threadIdx.x / kWarp % 4, half = threadIdx.x / kWarp / 4;
  if (blockIdx.x < row_tiles) {  // dQ
    const int first = blockIdx.x * Tiles::kRows, tile = kv_head * (args.work.padded_rows / Tiles::kRows) + blockIdx.x;
#pragma unroll
    for (int slab = half; slab < Tiles::kSlabs; slab += 2) {
      float dq[1][8][4];
      portable::read_registers<32>(&dq[0][0][0], wide_grad_q_of<Tiles>(args.work, tile, slab, warp));
      if (args.fixed_point) {  // which are not scaled yet
        to_floats(args, dq[0], int64_t{tile} * Tiles::kRows + warp * 16 + threadIdx.x % kWarp / 4);
#pragma unroll
        for (int i = 0; i < 32; ++i) (&dq[0][0][0])[i] *= args.scaling.scale;
      }
      portable::store_accumulators<T, kDim>(staging, warp * 16, slab * 8, dq);
    }
    __syncthreads();
    portable::TileCopy<T, kDim, Tiles::kRows, kFinishThreads>::store_rows(staging, args.call.grad_q, args.rows, first,
                                                                          kv_head, sizes.head_dim);
  } else {  // of a key tile in several bands: dK by the first four warps, dV by the others
    const int tile = blockIdx.x - row_tiles, key = tile * Tiles::kKeys + warp * 16;
    if (portable::bands_of(args.work.tile_rows[tile], args.work.plan->band_rows) < 2) return;
    const float* const sums = wide_grad_kv_of<Tiles>(args, kv_head, tile);
    char* const own = staging + threadIdx.x / kWarp * 4096;
    const auto finish = [&](Tensor3 x, const float* own_sums, int slabs, int cols, float scale) {
      for (int slab = 0; slab < slabs; ++slab, cols -= 64, x.data = static_cast<T*>(x.data) + 64) {
        float c[8][4];
        portable::read_registers<32>(&c[0][0], own_sums + slab * Tiles::kSlabFloats);
        store_wide_keys<T, 64>(own, x, key, sizes.keys, kv_head, cols, scale, c);
        __syncwarp();
      }
    };
    if (half == 0)
      finish(args.call.grad_k, sums + warp * Tiles::kDkFloats, Tiles::kSlabs, sizes.head_dim, args.scaling.scale);
    else
      finish(args.call.grad_v, sums + 4 * Tiles::kDkFloats + warp * Tiles::kDvFloats, Tiles::kValueSlabs,
             sizes.value_dim, 1.f);
  }
}

}  // namespace tree_attn::hopper
