// Backward on Hopper: a block takes 128 keys of one key/value head, 64 a consumer, and walks the rows that see them.
//
//   producer:  takes items (a key tile against a band of rows, listed by the portable kernels) from a counter; sends K and
//              V of each, then Q, dO and the statistics of one row tile after another through a ring of kStages
//   consumer:  S' = K Q^T;  D' = V dO^T;  P' = exp(S' - lse);  dS' = P' (D' - delta)
//              dV += P' dO;  dQ[row tile] += dS K;  dK += dS' Q
//
// Scores are computed transposed, keys x rows, so that P' and dS' are operands of dV and dK as they lie in registers. For
// dQ the dS' of both consumers meet in shared memory, two buffers in turn; each consumer computes 64 x 64 of dQ and adds
// them up in float32 in global memory, in the order of the registers, while its dK runs. K and V of the next item come
// while one is computed.
#pragma once

#include "../portable/backward.cuh"
#include "primitives.cuh"
#include "rows.h"

namespace tree_attn::hopper {

using portable::Workspace;

using BackwardArguments = portable::BackwardArgumentsOf<TiledRows>;

template <typename T_, int kDim_>
struct BackwardTiles {
  using T = T_;
  static constexpr int kDim = kDim_, kKeys = 128, kRows = row_tile(kDim_);
  static constexpr int kStages = 2, kItems = 2;  // of row tiles, and of key tiles
  static constexpr int kConsumers = 2, kGroupThreads = 128, kThreads = kGroupThreads * (kConsumers + 1);
  static constexpr int kGroupKeys = kKeys / kConsumers, kReleases = kConsumers * kGroupThreads / kWarp;
  static constexpr int kKBytes = kKeys * kDim * 2, kQBytes = kRows * kDim * 2, kSBytes = kKeys * kRows * 2;
  static constexpr int kKSlab = kKeys * 128, kQSlab = kRows * 128, kSSlab = kKeys * 128;  // 64 columns of a tile
  // dQ is 128 x 64 or 64 x 128: a consumer takes half of the rows, or of the columns.
  static constexpr bool kDqByRows = kRows == 128;
  static_assert((kRows == 128 && kDim == 64) || (kRows == 64 && kDim == 128));

  // Registers of one thread that are added up in global memory.
  static constexpr int kDqRegisters = 32, kDkRegisters = kGroupKeys * kDim / kGroupThreads;

  struct Stage {
    alignas(1024) char q[kQBytes];
    char grad_out[kQBytes];
  };
  struct Item {
    alignas(1024) char k[kKBytes];
    char v[kKBytes];
  };
  struct Smem {
    Item items[kItems];
    Stage stages[kStages];
    char ds[2][kSBytes];
    float log2_sums[kStages][kRows], deltas[kStages][kRows];
    uint64_t item_full[kItems], item_empty[kItems], full[kStages], empty[kStages];
    int4 item[kItems];      // key tile or -1 for the end, key/value head, 1 if the tile has other items
    int row_tile[kStages];  // first row + kPartial + kLast, or -1 for an item without any
  };
  static constexpr int kSmem = sizeof(Smem);
  static_assert(kSmem <= 227 * 1024);
};

constexpr int kPartial = 2, kLast = 1;  // row tiles begin at multiples of 64

template <typename Tiles>
__device__ __forceinline__ void produce(const BackwardArguments& args, const CUtensorMap* q_map, const CUtensorMap* o_map,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map,
                                        typename Tiles::Smem& smem) {
  constexpr int kRows = Tiles::kRows, kKeys = Tiles::kKeys, kSlabs = Tiles::kDim / 64;
  const Backward& call = args.call;
  const Sizes& sizes = call.sizes;
  const Workspace& work = args.work;
  const int group = args.rows.group.divisor, items = work.counters[1];
  const auto at = [](auto& x) { return smem_address(&x); };
  int stage = 0, parity = 1, slot = 0, item_parity = 1;  // a fresh barrier counts as one whose phase before has completed

  for (;;) {
    const int taken = atomicAdd(work.counters, 1), kv_head = taken / items;
    const uint32_t item_full = at(smem.item_full[slot]);
    barrier_wait(at(smem.item_empty[slot]), item_parity);
    if (kv_head >= sizes.kv_heads) {
      smem.item[slot] = {-1, 0, 0, 0};
      barrier_arrive(item_full);
      return;
    }
    const int4 item = work.items[taken - kv_head * items];
    const int tile = item.x, k0 = tile * kKeys, row_tiles = (item.z - item.y + kRows - 1) / kRows;
    smem.item[slot] = {tile, kv_head, item.w, 0};
    barrier_arrive_expect(item_full, 2 * Tiles::kKBytes);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      tma_load(at(smem.items[slot].k) + slab * Tiles::kKSlab, k_map, item_full, slab * 64, kv_head, k0);
      tma_load(at(smem.items[slot].v) + slab * Tiles::kKSlab, v_map, item_full, slab * 64, kv_head, k0);
    }
    if (++slot == Tiles::kItems) slot = 0, item_parity ^= 1;

    const auto send = [&](int message) {
      barrier_wait(at(smem.empty[stage]), parity);
      smem.row_tile[stage] = message;
      if (message < 0) {
        barrier_arrive(at(smem.full[stage]));
      } else {
        const int row0 = message & ~(kPartial | kLast), token = args.rows.first_token(row0);
        const uint32_t full = at(smem.full[stage]);
        const int bytes = args.rows.tokens.divisor * group * Tiles::kDim * 2;
        barrier_arrive_expect(full, 2 * bytes + 2 * kRows * 4);
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab) {
          tma_load(at(smem.stages[stage].q) + slab * Tiles::kQSlab, q_map, full, slab * 64, kv_head * group, token);
          tma_load(at(smem.stages[stage].grad_out) + slab * Tiles::kQSlab, o_map, full, slab * 64, kv_head * group, token);
        }
        const int64_t from = static_cast<int64_t>(kv_head) * work.padded_rows + row0;
        bulk_load(at(smem.log2_sums[stage]), work.log2_sum + from, kRows * 4, full);
        bulk_load(at(smem.deltas[stage]), work.delta + from, kRows * 4, full);
      }
      if (++stage == Tiles::kStages) stage = 0, parity ^= 1;
    };

    const KeySpan keys = KeySpan::load<kKeys>(call.mask, k0, sizes.keys);
    const int full_from = args.rows.first_row(min(keys.begin.high, sizes.rows));
    const int full_to = k0 + kKeys <= sizes.keys ? args.rows.first_row(min(keys.end.low, sizes.rows)) : 0;
    int held = -1;  // the message before goes out when it is known whether it is the last
    for (int i = 0; i < row_tiles; ++i) {
      // Blocks side by side start at different rows of their band, so that they do not add to the same dQ at once.
      const int row0 = item.y + (i + tile) % row_tiles * kRows;
      bool needed = true, full = row0 >= full_from && row0 + kRows <= full_to;
      if (call.mask.window) {
        const int first = args.rows.first_token(row0);
        const RowSpan rows = row_span(call.mask, first, min(first + args.rows.tokens.divisor, sizes.rows));
        needed = keys.needed(call.mask, rows);
        full = full && keys.full(call.mask, rows);
      }
      if (!needed) continue;
      if (held >= 0) send(held);
      held = row0 + (full ? 0 : kPartial);
    }
    send(held >= 0 ? held + kLast : -1);
  }
}

// dK and dV registers -> smem -> gmem, by the two consumers' threads, from kFirstThread of the block on.
template <typename Tiles, int kFirstThread, typename Sync>
__device__ __forceinline__ void store_grad_kv(const BackwardArguments& args, char* k_tile, char* v_tile, int kv_head,
                                              int k0, float (&dk)[Tiles::kDim / 8][4], float (&dv)[Tiles::kDim / 8][4],
                                              Sync sync) {
  using T = typename Tiles::T;
  using Copy = portable::TileCopy<T, Tiles::kDim, Tiles::kKeys, Tiles::kConsumers * Tiles::kGroupThreads, kFirstThread>;
  const Sizes& sizes = args.call.sizes;
  const int first_key = (threadIdx.x - kFirstThread) / kWarp * 16;
#pragma unroll
  for (int i = 0; i < Tiles::kDkRegisters; ++i) (&dk[0][0])[i] *= args.scaling.scale;
  using Rows = float[1][Tiles::kDim / 8][4];
  portable::store_accumulators<T, Tiles::kDim>(k_tile, first_key, 0, reinterpret_cast<Rows&>(dk));
  portable::store_accumulators<T, Tiles::kDim>(v_tile, first_key, 0, reinterpret_cast<Rows&>(dv));
  sync();
  Copy::store_keys(k_tile, args.call.grad_k, k0, sizes.keys, kv_head, sizes.head_dim);
  Copy::store_keys(v_tile, args.call.grad_v, k0, sizes.keys, kv_head, sizes.value_dim);
}

// Where a warp's registers of dQ, and of dK and dV, are added up.
template <typename Tiles>
__device__ __forceinline__ float* grad_q_of(const Workspace& work, int kv_head, int first_row, int warp) {
  return work.grad_q + (static_cast<int64_t>(kv_head) * work.padded_rows + first_row) * Tiles::kDim +
         warp * (Tiles::kDqRegisters * kWarp);
}
template <typename Tiles>
__device__ __forceinline__ float* grad_kv_of(const BackwardArguments& args, int kv_head, int tile, int warp) {
  const int64_t padded = (int64_t{args.call.sizes.keys} + Workspace::kKeyPadding - 1) / Workspace::kKeyPadding *
                         Workspace::kKeyPadding;
  return args.work.grad_kv + (kv_head * padded + int64_t{tile} * Tiles::kKeys) * (2 * Tiles::kDim) +
         warp * (2 * Tiles::kDkRegisters * kWarp);
}

template <typename Tiles>
__device__ __forceinline__ void consume(const BackwardArguments& args, typename Tiles::Smem& smem) {
  using T = typename Tiles::T;
  constexpr int kRows = Tiles::kRows, kRowTiles = kRows / 8, kDim = Tiles::kDim, kConsumerThreads = 2 * 128;
  const Backward& call = args.call;
  const Sizes& sizes = call.sizes;
  const Mask& mask = call.mask;
  const auto at = [](auto& x) { return smem_address(&x); };
  const int consumer = threadIdx.x / Tiles::kGroupThreads - 1, warp = threadIdx.x / kWarp - 4;  // of all consumers
  const int lane = threadIdx.x % kWarp;
  const uint32_t own_rows = consumer * Tiles::kGroupKeys * 128;  // of this consumer's keys in a slab of K or V
  const auto sync = [] { named_sync(1, kConsumerThreads); };
  const auto release = [&](uint64_t& barrier) {  // by every warp, once all its lanes are finished
    __syncwarp();
    if (lane == 0) barrier_arrive(at(barrier));
  };

  int stage = 0, parity = 0, slot = 0, item_parity = 0, buffer = 0;
  for (;;) {
    barrier_wait(at(smem.item_full[slot]), item_parity);
    const int4 item = smem.item[slot];
    if (item.x < 0) return;
    const int k0 = item.x * Tiles::kKeys, kv_head = item.y;

    float dk[kDim / 8][4], dv[kDim / 8][4];
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dk[n][e] = dv[n][e] = 0.f;

    int message;
    do {
      barrier_wait(at(smem.full[stage]), parity);
      message = smem.row_tile[stage];
      if (message >= 0) {
        const int row0 = message & ~(kPartial | kLast);
        const uint32_t q = at(smem.stages[stage].q), grad_out = at(smem.stages[stage].grad_out);
        const uint32_t k = at(smem.items[slot].k), v = at(smem.items[slot].v), ds = at(smem.ds[buffer]);
        float s[kRowTiles][4], d[kRowTiles][4];

        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step)
          Wgmma<T, kRows>::ss(s, descriptor_k_major(k + own_rows + step / 4 * Tiles::kKSlab + step % 4 * 32),
                              descriptor_k_major(q + step / 4 * Tiles::kQSlab + step % 4 * 32), step > 0);
        wgmma_commit();
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step)
          Wgmma<T, kRows>::ss(d, descriptor_k_major(v + own_rows + step / 4 * Tiles::kKSlab + step % 4 * 32),
                              descriptor_k_major(grad_out + step / 4 * Tiles::kQSlab + step % 4 * 32), step > 0);
        wgmma_commit();

        const bool capped = args.scaling.capped;
        const auto exponentials = [&](int n, float (&x)[4]) {
          const float2 sums = *reinterpret_cast<const float2*>(smem.log2_sums[stage] + n * 8 + (lane % 4) * 2);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            x[e] = exp2_approx(x[e] * args.scaling.log2_scale - (e % 2 ? sums.y : sums.x));
        };
        wgmma_wait<1>();
        if (capped) {
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] = tanh_accurate(args.scaling.inner_scale * s[n][e]);
        }
        uint32_t hidden[kRowTiles / 8] = {};  // one bit for each score of this thread
        if (message & kPartial) {
          int2 seen[2];  // the packed rows that see this thread's keys
          int key_depth[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int key = k0 + warp * 16 + h * 8 + lane / 4;
            const int2 tokens = key < sizes.keys ? rows_of_key(mask, key) : int2{0, 0};
            seen[h] = {args.rows.first_row(min(tokens.x, sizes.rows)), args.rows.first_row(min(tokens.y, sizes.rows))};
            key_depth[h] = mask.window && key < sizes.keys ? __ldg(mask.k_depth + key) : 0;
          }
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int row = row0 + n * 8 + (lane % 4) * 2 + e % 2;
              bool visible = row >= seen[e / 2].x && row < seen[e / 2].y;
              if (mask.window && visible)
                visible = __ldg(mask.q_depth + args.rows.token(row)) - key_depth[e / 2] < mask.window;
              if (!visible) s[n][e] = negative_infinity(), hidden[n / 8] |= 1u << (n % 8 * 4 + e);
            }
        }
        if (!capped) {
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n) exponentials(n, s[n]);
        }

        uint32_t p[kRowTiles / 2][4], w[kRowTiles / 2][4];  // P' and dS'
        wgmma_wait<0>();
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          const float2 deltas = *reinterpret_cast<const float2*>(smem.deltas[stage] + n * 8 + (lane % 4) * 2);
#pragma unroll
          for (int e = 0; e < 4; ++e) d[n][e] -= e % 2 ? deltas.y : deltas.x;
          if (capped) {  // S' still holds what the cap made; its derivative goes into dS'
#pragma unroll
            for (int e = 0; e < 4; ++e) d[n][e] *= 1.f - s[n][e] * s[n][e];
            exponentials(n, s[n]);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) d[n][e] *= s[n][e];
        }
        if (message & kPartial) {  // what a hidden pair has for D' need not be finite
#pragma unroll
          for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (hidden[n / 8] >> (n % 8 * 4 + e) & 1) d[n][e] = 0.f;
        }
        to_operand<T>(p, s);
        to_operand<T>(w, d);

        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kRows / 16; ++step)
          Wgmma<T, kDim>::template rs<true>(dv, p[step], descriptor_mn_major(grad_out + step * 16 * 128, Tiles::kQSlab),
                                            true);
        wgmma_commit();

        char* const mine = smem.ds[buffer];
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            *reinterpret_cast<uint32_t*>(mine + n / 8 * Tiles::kSSlab +
                                         SmemTile<64>::offset(warp * 16 + h * 8 + lane / 4, n % 8) + (lane % 4) * 4) =
                w[n / 2][n % 2 * 2 + h];
        proxy_fence();
        sync();
        float dq[8][4];
        const uint32_t a = ds + (Tiles::kDqByRows ? consumer * Tiles::kSSlab : 0);
        const uint32_t b = k + (Tiles::kDqByRows ? 0 : consumer * Tiles::kKSlab);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < Tiles::kKeys / 16; ++step)
          Wgmma<T, 64>::template ss<true, true>(dq, descriptor_mn_major(a + step * 16 * 128, Tiles::kSSlab),
                                                descriptor_mn_major(b + step * 16 * 128, Tiles::kKSlab), step > 0);
        wgmma_commit();
        buffer ^= 1;
#pragma unroll
        for (int step = 0; step < kRows / 16; ++step)
          Wgmma<T, kDim>::template rs<true>(dk, w[step], descriptor_mn_major(q + step * 16 * 128, Tiles::kQSlab), true);
        wgmma_commit();
        wgmma_wait<1>();
        portable::add_registers<Tiles::kDqRegisters>(grad_q_of<Tiles>(args.work, kv_head, row0, warp), &dq[0][0]);
        wgmma_wait<0>();
      }
      release(smem.empty[stage]);
      if (++stage == Tiles::kStages) stage = 0, parity ^= 1;
    } while (message >= 0 && !(message & kLast));

    if (item.z) {
      float* to = grad_kv_of<Tiles>(args, kv_head, item.x, warp);
      portable::add_registers<Tiles::kDkRegisters>(to, &dk[0][0]);
      portable::add_registers<Tiles::kDkRegisters>(to + Tiles::kDkRegisters * kWarp, &dv[0][0]);
    } else {
      sync();  // both consumers have read K and V; their place takes dK and dV
      store_grad_kv<Tiles, Tiles::kGroupThreads>(args, smem.items[slot].k, smem.items[slot].v, kv_head, k0, dk, dv, sync);
      proxy_fence();
    }
    release(smem.item_empty[slot]);
    if (++slot == Tiles::kItems) slot = 0, item_parity ^= 1;
  }
}

template <typename Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardArguments args, const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap o_map, const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<typename Tiles::Smem*>(raw);
  if (threadIdx.x == 0) {
    prefetch_map(&q_map), prefetch_map(&o_map), prefetch_map(&k_map), prefetch_map(&v_map);
    for (int i = 0; i < Tiles::kItems; ++i) {
      barrier_init(smem_address(&smem.item_full[i]), 1);
      barrier_init(smem_address(&smem.item_empty[i]), Tiles::kReleases);
    }
    for (int i = 0; i < Tiles::kStages; ++i) {
      barrier_init(smem_address(&smem.full[i]), 1);
      barrier_init(smem_address(&smem.empty[i]), Tiles::kReleases);
    }
    barrier_init_fence();
  }
  if (args.rows.tokens.divisor * args.rows.group.divisor < Tiles::kRows) {
    // Rows that are none are never loaded: zeros there, times the probability 0, stay out of every sum.
    int4* const stages = reinterpret_cast<int4*>(smem.stages);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(smem.stages) / sizeof(int4)); i += Tiles::kThreads)
      stages[i] = {0, 0, 0, 0};
    proxy_fence();
  }
  __syncthreads();
  if (threadIdx.x < Tiles::kGroupThreads) {
    // 56 + 2 * 224 = 3 * 168, what the launch gives three warpgroups; with more they would wait for ever.
    registers_decrease<56>();
    if (threadIdx.x == 0) produce<Tiles>(args, &q_map, &o_map, &k_map, &v_map, smem);
  } else {
    registers_increase<224>();
    consume<Tiles>(args, smem);
  }
}

// -- after: float32 sums to the type of the gradients -----------------------------------------------------------------------

constexpr int kFinishThreads = 256;  // as many as consumers: a thread reads what one of them has added

template <typename Tiles>
__global__ void __launch_bounds__(kFinishThreads) finish_q_kernel(const __grid_constant__ BackwardArguments args) {
  using T = typename Tiles::T;
  __shared__ __align__(1024) char tile[Tiles::kQBytes];
  const int first = blockIdx.x * Tiles::kRows, kv_head = blockIdx.y, warp = threadIdx.x / kWarp;
  float dq[1][8][4];
  portable::read_registers<Tiles::kDqRegisters>(&dq[0][0][0], grad_q_of<Tiles>(args.work, kv_head, first, warp));
#pragma unroll
  for (int i = 0; i < Tiles::kDqRegisters; ++i) (&dq[0][0][0])[i] *= args.scaling.scale;
  const int consumer = warp / 4;
  portable::store_accumulators<T, Tiles::kDim>(tile, warp % 4 * 16 + (Tiles::kDqByRows ? consumer * 64 : 0),
                                               Tiles::kDqByRows ? 0 : consumer * 8, dq);
  __syncthreads();
  portable::TileCopy<T, Tiles::kDim, Tiles::kRows, kFinishThreads>::store_rows(tile, args.call.grad_q, args.rows, first,
                                                                               kv_head, args.call.sizes.head_dim);
}

// For key tiles in several bands: kFinish false clears their float32 sums before, true converts them after.
template <typename Tiles, bool kFinish>
__global__ void __launch_bounds__(kFinishThreads) split_tiles_kernel(const __grid_constant__ BackwardArguments args) {
  const int tile = blockIdx.x, kv_head = blockIdx.y, warp = threadIdx.x / kWarp;
  if (!portable::in_several_bands(args.work.tile_rows[tile])) return;
  float* const sums = grad_kv_of<Tiles>(args, kv_head, tile, warp);
  if constexpr (!kFinish) {
#pragma unroll
    for (int i = 0; i < 2 * Tiles::kDkRegisters / 4; ++i)
      reinterpret_cast<float4*>(sums)[i * kWarp + threadIdx.x % kWarp] = {0.f, 0.f, 0.f, 0.f};
  } else {
    extern __shared__ __align__(1024) char smem[];
    float dk[Tiles::kDim / 8][4], dv[Tiles::kDim / 8][4];
    portable::read_registers<Tiles::kDkRegisters>(&dk[0][0], sums);
    portable::read_registers<Tiles::kDkRegisters>(&dv[0][0], sums + Tiles::kDkRegisters * kWarp);
    store_grad_kv<Tiles, 0>(args, smem, smem + Tiles::kKBytes, kv_head, tile * Tiles::kKeys, dk, dv,
                            [] { __syncthreads(); });
  }
}

}  // namespace tree_attn::hopper
