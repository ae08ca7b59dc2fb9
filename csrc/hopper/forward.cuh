// Forward on Hopper: wgmma fed by TMA, one warp producing, two warpgroups of 64 packed rows consuming.
//
//   producer:  for each row tile taken from a counter: which blocks of 64 keys are needed (ballots over their bounds);
//              Q, and K and V of any two such blocks as one tile, through a ring of kStages; with K of a partial tile, the
//              rows that see its keys
//   consumer:  S(next) = Q K^T issued; O += P V issued; while these run, softmax of S(next); then O is rescaled
//
// The two consumers take turns (named barriers): one does its softmax while the other's products run.
#pragma once

#include "../params.h"
#include "../scores.cuh"
#include "../tile_mask.cuh"
#include "primitives.cuh"

namespace tree_attn::hopper {

template <typename T_, int kDim_, int kValueDim_, int kKeys_>
struct ForwardTiles {
  using T = T_;
  static constexpr int kDim = kDim_, kValueDim = kValueDim_, kKeys = kKeys_;
  static constexpr int kConsumers = 2, kGroupThreads = 128, kThreads = kGroupThreads * (kConsumers + 1);
  static constexpr int kGroupRows = 64, kRows = kGroupRows * kConsumers, kStages = 2;
  static constexpr int kQBytes = kRows * kDim * 2, kOBytes = kRows * kValueDim * 2;
  static constexpr int kKBytes = kKeys * kDim * 2, kVBytes = kKeys * kValueDim * 2;
  static constexpr int kQSlab = kRows * 128, kKSlab = kKeys * 128;  // 64 columns of a tile
  static constexpr int kBlockKeys = kKeys / 2;

  struct Smem {
    alignas(1024) char q[kQBytes];
    char k[kStages][kKBytes];
    char v[kStages][kVBytes];
    char o[kOBytes];
    int2 seen_by[kStages][kKeys];  // of a partial tile: the rows [x, y) that see each key
    uint64_t q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    int row_tile;            // of the Q tile: index of the item, or past the last
    int4 key_tile[kStages];  // first keys of its two blocks; flags as below, or -1 for an item without any
  };
  static constexpr int kSmem = sizeof(Smem);
  static_assert(kSmem <= 227 * 1024);
};

struct ForwardArguments {
  Forward call;
  FastDivisor group;
  int tile_tokens;  // tokens of a row tile; tile_tokens * group <= kRows
  int row_tiles;
  int items;     // row tiles of all key/value heads
  int* counter;  // the next item
  Scaling scaling;
};

constexpr int kPartial = 2, kLast = 1;  // kPartial: of the first block, 2 * kPartial: of the second
constexpr int kAnyPartial = 3 * kPartial;

struct RowTile {
  int kv_head, first_token;
};
__device__ __forceinline__ RowTile row_tile_of(const ForwardArguments& args, int item) {
  // The row tiles of one head stay together, for its K and V to stay in L2; later rows see more keys, so they go first.
  const int kv_head = item / args.row_tiles;
  return {kv_head, (args.row_tiles - 1 - (item - kv_head * args.row_tiles)) * args.tile_tokens};
}

template <typename Tiles>
__device__ __forceinline__ void produce(const ForwardArguments& args, const CUtensorMap* q_map, const CUtensorMap* k_map,
                                        const CUtensorMap* v_map, typename Tiles::Smem& smem) {
  const Forward& call = args.call;
  const Sizes& sizes = call.sizes;
  const int lane = threadIdx.x % kWarp;
  constexpr int kBlock = Tiles::kBlockKeys;
  const auto at = [](auto& x) { return smem_address(&x); };
  int stage = 0, parity = 1, q_parity = 1;  // a fresh barrier counts as one whose phase before has completed

  for (;;) {
    int item = 0;
    if (lane == 0) item = atomicAdd(args.counter, 1);
    item = __shfl_sync(~0u, item, 0);
    const RowTile rows = row_tile_of(args, min(item, args.items - 1));

    const auto send_q = [&] {
      if (lane == 0) {
        barrier_wait(at(smem.q_empty), q_parity);
        smem.row_tile = item;
        if (item >= args.items) {
          barrier_arrive(at(smem.q_full));
        } else {
          barrier_arrive_expect(at(smem.q_full), args.tile_tokens * args.group.divisor * Tiles::kDim * 2);
#pragma unroll
          for (int slab = 0; slab < Tiles::kDim / 64; ++slab)
            tma_load(at(smem.q) + slab * Tiles::kQSlab, q_map, at(smem.q_full), slab * 64,
                     rows.kv_head * args.group.divisor, rows.first_token);
        }
      }
      q_parity ^= 1;
    };
    if (item >= args.items) {
      send_q();
      return;
    }

    // Q goes behind the first K, which need not wait for the consumers to finish the item before. `flags` of -1: no keys.
    // A tile of one block has the block twice, the second time hidden.
    bool q_sent = false;
    const auto send = [&](int2 blocks, int flags) {
      const bool single = blocks.y < 0;
      const int2 keys{blocks.x * kBlock, (single ? blocks.x : blocks.y) * kBlock};
      const auto load = [&](uint32_t to, const CUtensorMap* map, uint64_t& full, int slabs) {
        for (int slab = 0; slab < slabs; ++slab) {
          tma_load(to + slab * Tiles::kKSlab, map, at(full), slab * 64, rows.kv_head, keys.x);
          tma_load(to + slab * Tiles::kKSlab + kBlock * 128, map, at(full), slab * 64, rows.kv_head, keys.y);
        }
      };
      barrier_wait(at(smem.k_empty[stage]), parity);
      if (lane == 0) {
        smem.key_tile[stage] = {keys.x, keys.y, flags, 0};
        barrier_arrive_expect(at(smem.k_full[stage]), flags < 0 ? 0 : Tiles::kKBytes);
        if (flags >= 0) load(at(smem.k[stage]), k_map, smem.k_full[stage], Tiles::kDim / 64);
      }
      if (flags >= 0 && (flags & kAnyPartial)) {
#pragma unroll
        for (int i = 0; i < Tiles::kKeys / kWarp; ++i) {
          const bool second = i * kWarp >= kBlock;
          const int key = (second ? keys.y - kBlock : keys.x) + i * kWarp + lane;
          const bool hidden = key >= sizes.keys || (second && single);
          smem.seen_by[stage][i * kWarp + lane] = hidden ? int2{0, 0} : rows_of_key(call.mask, key);
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(at(smem.k_full[stage]));  // the second arrival: what ordinary stores have written
      if (!q_sent) send_q(), q_sent = true;
      if (lane == 0) {
        barrier_wait(at(smem.v_empty[stage]), parity);
        barrier_arrive_expect(at(smem.v_full[stage]), flags < 0 ? 0 : Tiles::kVBytes);
        if (flags >= 0) load(at(smem.v[stage]), v_map, smem.v_full[stage], Tiles::kValueDim / 64);
      }
      if (++stage == Tiles::kStages) stage = 0, parity ^= 1;
    };

    const RowSpan span = row_span(call.mask, rows.first_token, min(rows.first_token + args.tile_tokens, sizes.rows));
    const int keys = call.mask.row_begin == nullptr ? min(sizes.keys, span.q1) : sizes.keys;
    const int blocks = (keys + kBlock - 1) / kBlock;
    constexpr int kWords = 4;  // of 32 blocks, classified at once
    int2 held{-1, -1};         // the next tile goes out when it is known whether it is the last
    int held_flags = 0;
    for (int base = 0; base < blocks; base += kWords * kWarp) {
      uint32_t needed[kWords], full[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int block = base + w * kWarp + lane, k0 = block * kBlock;
        bool is_needed = false, is_full = false;
        if (block < blocks) {
          const KeySpan key_span = KeySpan::load<kBlock>(call.mask, k0, sizes.keys);
          is_needed = key_span.needed(call.mask, span);
          is_full = k0 + kBlock <= sizes.keys && key_span.full(call.mask, span);
        }
        needed[w] = __ballot_sync(~0u, is_needed);
        full[w] = __ballot_sync(~0u, is_full);
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        for (uint32_t todo = needed[w]; todo; todo &= todo - 1) {
          const int bit = __ffs(todo) - 1, block = base + w * kWarp + bit;
          const int partial = (full[w] >> bit & 1) ? 0 : kPartial;
          if (held.x >= 0 && held.y < 0) {
            held.y = block, held_flags |= 2 * partial;
          } else {
            if (held.x >= 0) send(held, held_flags);
            held = {block, -1}, held_flags = partial;
          }
        }
    }
    if (held.x >= 0)
      send(held, held_flags | kLast | (held.y < 0 ? 2 * kPartial : 0));
    else
      send({0, 0}, -1);
  }
}

// The softmax of one consumer's 64 rows. A thread holds two of them, 8 apart.
template <typename Tiles>
struct Softmax {
  static constexpr int kKeyTiles = Tiles::kKeys / 8;
  float peak[2], sum[2];

  // Scores become probabilities (not yet divided); returns what the sums so far must be multiplied with.
  __device__ __forceinline__ void update(float (&s)[kKeyTiles][4], float log2_scale, float (&correction)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float high = peak[h];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) high = fmaxf(high, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
      const float shift = high == negative_infinity() ? 0.f : high * log2_scale;
      correction[h] = exp2_approx(peak[h] * log2_scale - shift);
      peak[h] = high;
      float total = 0.f;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          s[n][2 * h + c] = exp2_approx(s[n][2 * h + c] * log2_scale - shift);
          total += s[n][2 * h + c];
        }
      sum[h] = sum[h] * correction[h] + total;
    }
  }
};

// Scores of pairs that the mask hides become -inf, in one block of a tile. `seen_by` holds the rows that see each of its
// keys, the first of which is `first_key`.
template <typename Tiles, int kBlock>
__device__ __forceinline__ void mask_scores(float (&s)[Tiles::kKeys / 8][4], const Mask& mask, const int2* seen_by,
                                            const int (&tokens)[2], int first_key, int n_keys) {
  constexpr int kColTiles = Tiles::kBlockKeys / 8;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kColTiles; ++i) {
    float(&own)[4] = s[kBlock * kColTiles + i];
    const int4 two = *reinterpret_cast<const int4*>(seen_by + i * 8 + (lane % 4) * 2);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (tokens[h] < two.x || tokens[h] >= two.y) own[2 * h] = negative_infinity();
      if (tokens[h] < two.z || tokens[h] >= two.w) own[2 * h + 1] = negative_infinity();
    }
  }
  if (mask.window == 0) return;
#pragma unroll
  for (int i = 0; i < kColTiles; ++i)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int key = first_key + i * 8 + (lane % 4) * 2 + c;
      const int oldest = key < n_keys ? __ldg(mask.k_depth + key) + mask.window : 0;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (__ldg(mask.q_depth + tokens[h]) >= oldest) s[kBlock * kColTiles + i][2 * h + c] = negative_infinity();
    }
}

template <typename Tiles>
__device__ __forceinline__ void consume(const ForwardArguments& args, typename Tiles::Smem& smem) {
  using T = typename Tiles::T;
  constexpr int kKeyTiles = Tiles::kKeys / 8, kValueTiles = Tiles::kValueDim / 8;
  const Forward& call = args.call;
  const Sizes& sizes = call.sizes;
  const auto at = [](auto& x) { return smem_address(&x); };
  const int consumer = threadIdx.x / Tiles::kGroupThreads - 1;
  const int thread = threadIdx.x % Tiles::kGroupThreads, warp = thread / kWarp, lane = thread % kWarp;
  const int group_rows = args.tile_tokens * args.group.divisor;

  // The turns: barrier 1 + c is consumer c's; it is opened by the other consumer, once before the start.
  const auto take_turn = [&] { named_sync(1 + consumer, 2 * Tiles::kGroupThreads); };
  const auto pass_turn = [&] { named_arrive(2 - consumer, 2 * Tiles::kGroupThreads); };
  if (consumer == 1) pass_turn();

  int stage = 0, parity = 0, q_parity = 0;
  const auto advance = [&] {
    if (++stage == Tiles::kStages) stage = 0, parity ^= 1;
  };

  for (;;) {
    barrier_wait(at(smem.q_full), q_parity);
    q_parity ^= 1;
    const int item = smem.row_tile;
    if (item >= args.items) break;
    const RowTile rows = row_tile_of(args, item);
    int tokens[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      tokens[h] = min(rows.first_token + args.group.divide(consumer * Tiles::kGroupRows + warp * 16 + h * 8 + lane / 4),
                      sizes.rows - 1);

    float o[kValueTiles][4], s[kKeyTiles][4], correction[2];
    uint32_t p[kKeyTiles / 2][4];
    Softmax<Tiles> softmax{{negative_infinity(), negative_infinity()}, {0.f, 0.f}};
#pragma unroll
    for (int n = 0; n < kValueTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[n][e] = 0.f;

    const auto issue_scores = [&](int from) {
      const uint32_t q = at(smem.q) + consumer * Tiles::kGroupRows * 128, k = at(smem.k[from]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Tiles::kDim / 16; ++step)
        Wgmma<T, Tiles::kKeys>::ss(s, descriptor_k_major(q + step / 4 * Tiles::kQSlab + step % 4 * 32),
                                   descriptor_k_major(k + step / 4 * Tiles::kKSlab + step % 4 * 32), step > 0);
      wgmma_commit();
    };
    const auto issue_values = [&](int from) {
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Tiles::kKeys / 16; ++step)
        Wgmma<T, Tiles::kValueDim>::template rs<true>(
            o, p[step], descriptor_mn_major(at(smem.v[from]) + step * 16 * 128, Tiles::kKSlab), true);
      wgmma_commit();
    };
    const auto release = [&](uint64_t& barrier) {  // by every warp, once all its lanes are finished
      __syncwarp();
      if (lane == 0) barrier_arrive(at(barrier));
    };
    const auto to_probabilities = [&](int message) {
      if (args.scaling.capped) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[n][e] = tanh_accurate(args.scaling.inner_scale * s[n][e]);
      }
      if (message & kPartial)
        mask_scores<Tiles, 0>(s, call.mask, smem.seen_by[stage], tokens, smem.key_tile[stage].x, sizes.keys);
      if (message & 2 * kPartial)
        mask_scores<Tiles, 1>(s, call.mask, smem.seen_by[stage] + Tiles::kBlockKeys, tokens, smem.key_tile[stage].y,
                              sizes.keys);
      release(smem.k_empty[stage]);
      softmax.update(s, args.scaling.log2_scale, correction);
    };

    barrier_wait(at(smem.k_full[stage]), parity);
    int message = smem.key_tile[stage].z;
    if (message >= 0) {
      take_turn();
      issue_scores(stage);
      pass_turn();
      wgmma_wait<0>();
      if (message & kLast) release(smem.q_empty);
      to_probabilities(message);
      to_operand<T>(p, s);

      while (!(message & kLast)) {
        const int before = stage, before_parity = parity;
        advance();
        barrier_wait(at(smem.k_full[stage]), parity);
        message = smem.key_tile[stage].z;
        take_turn();
        issue_scores(stage);
        barrier_wait(at(smem.v_full[before]), before_parity);
        issue_values(before);
        pass_turn();
        wgmma_wait<1>();
        if (message & kLast) release(smem.q_empty);
        to_probabilities(message);
        wgmma_wait<0>();
        release(smem.v_empty[before]);
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[n][e] *= correction[e / 2];
        to_operand<T>(p, s);
      }
      barrier_wait(at(smem.v_full[stage]), parity);
      issue_values(stage);
      wgmma_wait<0>();
      release(smem.v_empty[stage]);
    } else {
      barrier_wait(at(smem.v_full[stage]), parity);
      release(smem.k_empty[stage]);
      release(smem.v_empty[stage]);
      release(smem.q_empty);
    }
    advance();

    char* const staged = smem.o + consumer * Tiles::kGroupRows * Tiles::kValueDim * 2;
    using TileO = SmemTile<Tiles::kValueDim>;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int local = warp * 16 + h * 8 + lane / 4, row = consumer * Tiles::kGroupRows + local;
      const int in_tile = args.group.divide(row), token = rows.first_token + in_tile;
      const int head = rows.kv_head * args.group.divisor + row - in_tile * args.group.divisor;
      float sum = softmax.sum[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float peak = softmax.peak[h] * args.scaling.log2_scale;
      const bool empty = softmax.peak[h] == negative_infinity();
      const bool valid = row < group_rows && token < sizes.rows;
      float denominator = sum;
      if (call.sinks != nullptr && valid && !empty) denominator += exp2_approx(call.sinks[head] * kLog2e - peak);
      const float inverse = empty ? 0.f : 1.f / denominator;
      if (lane % 4 == 0 && valid)
        call.lse[static_cast<int64_t>(head) * sizes.rows + token] = empty ? negative_infinity() : (peak + log2f(sum)) * kLn2;
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n)
        *reinterpret_cast<uint32_t*>(staged + TileO::offset(local, n) + (lane % 4) * 4) =
            Element<T>::pack(o[n][2 * h] * inverse, o[n][2 * h + 1] * inverse);
    }
    named_sync(3 + consumer, Tiles::kGroupThreads);
    T* const out = static_cast<T*>(call.out.data);
#pragma unroll
    for (int i = 0; i < Tiles::kGroupRows * kValueTiles / Tiles::kGroupThreads; ++i) {
      const int index = i * Tiles::kGroupThreads + thread, local = index / kValueTiles, chunk = index % kValueTiles;
      const int row = consumer * Tiles::kGroupRows + local, in_tile = args.group.divide(row);
      const int token = rows.first_token + in_tile;
      const int head = rows.kv_head * args.group.divisor + row - in_tile * args.group.divisor;
      if (row < group_rows && token < sizes.rows && chunk * 8 < sizes.value_dim)
        *reinterpret_cast<int4*>(out + token * call.out.token_stride + head * call.out.head_stride + chunk * 8) =
            *reinterpret_cast<const int4*>(staged + TileO::offset(local, chunk));
    }
    named_sync(3 + consumer, Tiles::kGroupThreads);  // the staging area is free again
  }
  if (consumer == 0) take_turn();  // leave the barriers even
}

template <typename Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardArguments args, const __grid_constant__ CUtensorMap q_map,
                   const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ __align__(1024) char raw[];
  auto& smem = *reinterpret_cast<typename Tiles::Smem*>(raw);
  if (threadIdx.x == 0) {
    constexpr int kReleases = Tiles::kConsumers * Tiles::kGroupThreads / kWarp;
    prefetch_map(&q_map), prefetch_map(&k_map), prefetch_map(&v_map);
    barrier_init(smem_address(&smem.q_full), 1);
    barrier_init(smem_address(&smem.q_empty), kReleases);
    for (int i = 0; i < Tiles::kStages; ++i) {
      barrier_init(smem_address(&smem.k_full[i]), 2);
      barrier_init(smem_address(&smem.v_full[i]), 1);
      barrier_init(smem_address(&smem.k_empty[i]), kReleases);
      barrier_init(smem_address(&smem.v_empty[i]), kReleases);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < Tiles::kGroupThreads) {
    // The shares of three warpgroups must not add up to more than the 168 registers a thread of the launch, or they wait
    // for each other for ever: 56 + 2 * 224 = 3 * 168.
    registers_decrease<56>();
    if (threadIdx.x < kWarp) produce<Tiles>(args, &q_map, &k_map, &v_map, smem);
  } else {
    registers_increase<224>();
    consume<Tiles>(args, smem);
  }
}

}  // namespace tree_attn::hopper
