// Forward on Hopper, what its two kinds of warps share and the two that produce: the planner and the loader (forward.cuh says
// what they do).
#pragma once

#include "../params.h"
#include "../scores.cuh"
#include "../tile_mask.cuh"
#include "primitives.cuh"

namespace tree_attn::hopper {

template <typename T_, int kDim_, int kValueDim_, int kKeys_, int kQBuffers_, int kConsumers_>
struct ForwardTiles {
  using T = T_;
  static constexpr int kDim = kDim_, kValueDim = kValueDim_, kKeys = kKeys_;
  static constexpr int kBlock = 32, kBlocks = kKeys / kBlock;
  static constexpr int kConsumers = kConsumers_, kGroupThreads = 128, kThreads = kGroupThreads * (kConsumers + 1);
  static constexpr int kGroupRows = 64, kRows = kGroupRows * kConsumers, kQBuffers = kQBuffers_;
  static constexpr bool kStagedInQ = kQBuffers > 1;  // O, on its way out
  static constexpr int kStages = 2;  // of keys, and of values
  static constexpr int kSlabs = (kDim + 63) / 64, kValueSlabs = (kValueDim + 63) / 64;  // of 64 columns
  static constexpr int kQSlab = kRows * 128, kKSlab = kKeys * 128;
  static constexpr int kQBytes = kSlabs * kQSlab, kKBytes = kSlabs * kKSlab, kVBytes = kValueSlabs * kKSlab;
  static constexpr int kRounds = 4, kWords = 8;  // of the planner; a round is kWords times 32 blocks
  // Registers a thread. The shares must not add up to more than the launch gave all warpgroups, or they wait for each other
  // for ever: 40 + 2 * 232 = 3 * 168, 32 + 3 * 160 = 4 * 128.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32, kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * (65536 / kThreads / 8 * 8));
  static_assert(!kStagedInQ || kValueSlabs <= kSlabs, "O takes the place of Q");
  static_assert(kKeys % kBlock == 0 && kKSlab % 1024 == 0);

  struct Tile {
    int item;
    int flags;                // as below
    int first_key[kBlocks];
  };
  struct Round {
    uint32_t needed[kWords], full[kWords];  // one bit a block
    int item;                               // past the last: the end
    int first_block;
    int last;  // is it the last of its item?
  };
  struct Smem {
    alignas(1024) char q[kQBuffers][kQBytes];
    char k[kStages][kKBytes];
    char v[kStages][kVBytes];
    char out[kStagedInQ ? 1 : kQSlab];
    alignas(8) int row_end[kStages][kKeys];  // of partial blocks: one past the last row that sees each key
    Tile tiles[kStages];
    Round rounds[kRounds];
    uint64_t q_full[kQBuffers], q_empty[kQBuffers], k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    uint64_t round_full[kRounds], round_empty[kRounds];
  };
  static constexpr int kSmem = sizeof(Smem);
  static_assert(kSmem <= 227 * 1024);
};

struct ForwardArguments {
  Forward call;
  FastDivisor group;
  int tile_tokens;  // tokens of a row tile; tile_tokens * group <= kRows
  int row_tiles;
  FastDivisor section_heads;  // key/value heads whose items are taken in turn; a divisor of their number
  FastDivisor section_items;  // and how many items these have
  int items;                  // row tiles of all key/value heads
  int* counter;  // of the items taken after each block's first
  Scaling scaling;
  float slack;  // of scores: what makes 8 of their base-2 logarithms
};

struct ForwardMaps {
  CUtensorMap q, k, v;         // boxes of a row tile, and of a block of keys
  CUtensorMap k_tile, v_tile;  // and of a tile of keys
};

// Flags of a tile: the last of its item; the end of all work; from kPartial on one bit a block that needs a mask.
constexpr int kLast = 1, kEnd = 2, kPartial = 4;

struct RowTile {
  int kv_head, first_token;
};
__device__ __forceinline__ RowTile row_tile_of(const ForwardArguments& args, int item) {
  // Later rows see more keys, so they go first: those of few heads, whose K and V stay in L2, then those of the next.
  const int section = args.section_items.divide(item), in_section = item - section * args.section_items.divisor;
  const int tile = args.section_heads.divide(in_section), head = in_section - tile * args.section_heads.divisor;
  return {section * args.section_heads.divisor + head, (args.row_tiles - 1 - tile) * args.tile_tokens};
}

template <typename Tiles>
__device__ __forceinline__ void plan(const ForwardArguments& args, typename Tiles::Smem& smem) {
  const Mask& mask = args.call.mask;
  const Sizes& sizes = args.call.sizes;
  const int lane = threadIdx.x % kWarp;
  auto round = Ring<Tiles::kRounds>::of_producer();

  for (int item = blockIdx.x;;) {
    const bool end = item >= args.items;
    const int first_token = row_tile_of(args, min(item, args.items - 1)).first_token;
    const RowSpan span = row_span(mask, first_token, min(first_token + args.tile_tokens, sizes.rows));
    const int keys = mask.row_begin == nullptr ? min(sizes.keys, span.q1) : sizes.keys;
    const int blocks = end ? 1 : (keys + Tiles::kBlock - 1) / Tiles::kBlock;
    for (int base = 0; base < blocks; base += Tiles::kWords * kWarp) {
      uint32_t needed = 0, full = 0, any = 0;  // lane w: word w; all words
#pragma unroll
      for (int w = 0; w < Tiles::kWords; ++w) {
        const int block = base + w * kWarp + lane, k0 = block * Tiles::kBlock;
        bool is_needed = false, is_full = false;
        if (block < blocks) {
          const KeySpan key_span = KeySpan::load<Tiles::kBlock>(mask, k0, sizes.keys);
          is_needed = key_span.needed(mask, span);
          is_full = k0 + Tiles::kBlock <= sizes.keys && key_span.full(mask, span);
        }
        const uint32_t all_needed = __ballot_sync(~0u, is_needed), all_full = __ballot_sync(~0u, is_full);
        if (lane == w) needed = all_needed, full = all_full;
        any |= all_needed;
      }
      const bool last = base + Tiles::kWords * kWarp >= blocks;
      if (!any && !last) continue;
      barrier_wait(smem_address(&smem.round_empty[round.place()]), round.parity());
      auto& to = smem.rounds[round.place()];
      if (lane < Tiles::kWords) to.needed[lane] = needed, to.full[lane] = full;
      if (lane == 0) to.item = item, to.first_block = base, to.last = last;
      warp_arrive(smem_address(&smem.round_full[round.place()]), lane);
      ++round.steps;
    }
    if (end) return;
    item = args.items;
    if (args.items > gridDim.x) {  // else every block has had its item, and the counter is not even cleared
      if (lane == 0) item = gridDim.x + atomicAdd(args.counter, 1);
      item = __shfl_sync(~0u, item, 0);
    }
  }
}

template <typename Tiles>
__device__ __forceinline__ void load(const ForwardArguments& args, const ForwardMaps& maps,
                                     typename Tiles::Smem& smem) {
  const Mask& mask = args.call.mask;
  const Sizes& sizes = args.call.sizes;
  const int lane = threadIdx.x % kWarp;
  const auto at = [](auto& x) { return smem_address(&x); };
  auto stage = Ring<Tiles::kStages>::of_producer(), value_stage = stage;
  auto buffer = Ring<Tiles::kQBuffers>::of_producer();
  Ring<Tiles::kRounds> round;

  // `count` blocks from gmem to a tile: at once where they lie side by side.
  const auto load_blocks = [&](char* to, const CUtensorMap& block_map, const CUtensorMap& tile_map, uint64_t& full,
                               int slabs, int kv_head, int block) {
    const int first = __shfl_sync(~0u, block, 0);
    if (__all_sync(~0u, lane >= Tiles::kBlocks || block == first + lane)) {
      if (lane == 0) {
        for (int slab = 0; slab < slabs; ++slab)
          tma_load(at(*to) + slab * Tiles::kKSlab, &tile_map, at(full), slab * 64, kv_head, first * Tiles::kBlock);
      }
      return;
    }
#pragma unroll
    for (int b = 0; b < Tiles::kBlocks; ++b) {
      const int key = __shfl_sync(~0u, block, b) * Tiles::kBlock;
      if (lane == 0) {
        for (int slab = 0; slab < slabs; ++slab)
          tma_load(at(*to) + slab * Tiles::kKSlab + b * Tiles::kBlock * 128, &block_map, at(full), slab * 64, kv_head, key);
      }
    }
  };

  // Values go behind the keys of the next tile, as they are needed.
  int value_block = 0, value_head = -1;
  const auto send_values = [&] {
    if (value_head < 0) return;
    auto& full = smem.v_full[value_stage.place()];
    if (lane == 0) {
      barrier_wait(at(smem.v_empty[value_stage.place()]), value_stage.parity());
      barrier_arrive_expect(at(full), Tiles::kVBytes);
    }
    load_blocks(smem.v[value_stage.place()], maps.v, maps.v_tile, full, Tiles::kValueSlabs, value_head, value_block);
    ++value_stage.steps;
  };

  int block = 0;           // lane i: block i of the tile that is being gathered
  int count = 0;           // blocks of it so far
  uint32_t partial = 0;    // those that need a mask
  bool first = true;
  const auto send = [&](int item, int flags) {
    const RowTile rows = row_tile_of(args, recomputed(item));  // parts of it kept through the loop would spill
    // What a tile has no block for is hidden; it repeats another block, so that no stale numbers enter the products.
    const int repeated = __shfl_sync(~0u, block, max(count - 1, 0));
    if (lane >= count) block = count ? repeated : 0;
    partial |= ~0u << count;
    barrier_wait(at(smem.k_empty[stage.place()]), stage.parity());
#pragma unroll
    for (int b = 0; b < Tiles::kBlocks; ++b) {
      const int key = __shfl_sync(~0u, block, b) * Tiles::kBlock + lane;
      const bool exists = b < count && key < sizes.keys;
      int& end = smem.row_end[stage.place()][b * Tiles::kBlock + recomputed(lane)];  // likewise
      if (partial >> b & 1) copy_async_4(at(end), mask.row_end + (exists ? key : 0), exists);
    }
    copy_async_arrive(at(smem.k_full[stage.place()]));
    auto& tile = smem.tiles[stage.place()];
    if (lane < Tiles::kBlocks) tile.first_key[lane] = block * Tiles::kBlock;
    if (lane == 0) {
      constexpr int kMasks = (1 << Tiles::kBlocks) - 1;
      tile.item = item, tile.flags = flags | (partial & kMasks) * kPartial;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive_expect(at(smem.k_full[stage.place()]), Tiles::kKBytes);
    load_blocks(smem.k[stage.place()], maps.k, maps.k_tile, smem.k_full[stage.place()], Tiles::kSlabs, rows.kv_head, block);
    if (Tiles::kQBuffers == 1) send_values();  // the place of these is free before that of Q
    if (first) {  // Q goes behind K, which need not wait for the consumers to finish an item before
      if (lane == 0) {
        barrier_wait(at(smem.q_empty[buffer.place()]), buffer.parity());
        barrier_arrive_expect(at(smem.q_full[buffer.place()]),
                              args.tile_tokens * args.group.divisor * Tiles::kSlabs * 128);
        for (int slab = 0; slab < Tiles::kSlabs; ++slab)
          tma_load(at(smem.q[buffer.place()]) + slab * Tiles::kQSlab, &maps.q, at(smem.q_full[buffer.place()]), slab * 64,
                   rows.kv_head * args.group.divisor, rows.first_token);
      }
      ++buffer.steps;
    }
    if (Tiles::kQBuffers > 1) send_values();
    value_block = block, value_head = rows.kv_head;
    ++stage.steps;
    count = 0, partial = 0, first = flags & kLast;
  };

  for (;;) {
    barrier_wait(at(smem.round_full[round.place()]), round.parity());
    const auto& found = smem.rounds[round.place()];
    const int item = found.item;
    if (item >= args.items) break;
    for (int w = 0; w < Tiles::kWords; ++w) {
      const uint32_t full = found.full[w];
      for (uint32_t todo = found.needed[w]; todo; todo &= todo - 1) {
        const int bit = __ffs(todo) - 1;
        if (count == Tiles::kBlocks) send(item, 0);  // not before it is known that it is not the last
        if (lane == count) block = found.first_block + w * kWarp + bit;
        partial |= (~full >> bit & 1) << count++;
      }
    }
    if (found.last) send(item, kLast);
    warp_arrive(at(smem.round_empty[round.place()]), lane);
    ++round.steps;
  }
  send_values();
  barrier_wait(at(smem.k_empty[stage.place()]), stage.parity());
  copy_async_arrive(at(smem.k_full[stage.place()]));
  if (lane == 0) {
    smem.tiles[stage.place()].flags = kEnd;
    barrier_arrive(at(smem.k_full[stage.place()]));
  }
}

}  // namespace tree_attn::hopper
