// Sums of dK and dV in a fixed order, for deterministic calls: an item of a key tile in several bands adds when those that were
// taken before it have. (dQ needs no order, see fixed_point.cuh.)
//
// A warp beside each consumer waits for the turn of an item while that is computed, and passes it on when the sums have
// arrived. The first of the items that are not finished waits for nobody, since it waits for items alone that were taken before.
#pragma once

#include "backward_shared.cuh"

namespace tree_attn::hopper {

// The consumers that have added their parts of a key tile, of all its items.
template <typename Tiles>
__device__ __forceinline__ int* key_parts_of(const BackwardArguments& args, int kv_head, int tile) {
  const int tiles = (args.call.sizes.keys + Tiles::kKeys - 1) / Tiles::kKeys;
  return args.work.key_parts + int64_t{kv_head} * tiles + tile;
}

constexpr int kTurnThreads = 128 + kWarp;  // of a consumer, and of the warp beside it

// By a consumer, before and after it adds its part of an item.
__device__ __forceinline__ void wait_for_turn(int consumer) { named_sync(1 + consumer, kTurnThreads); }
__device__ __forceinline__ void end_turn(int consumer) { named_arrive(3 + consumer, kTurnThreads); }

// By the warp beside it. `item_at(i)` waits for the block's item number i: (key tile or -1 for the end, key/value head, 0 or
// 1 + the items before it that add to the same sums).
template <typename Tiles, typename ItemAt>
__device__ __forceinline__ void keep_turns(const BackwardArguments& args, int consumer, ItemAt&& item_at) {
  const int lane = threadIdx.x % kWarp;
  for (unsigned i = 0;; ++i) {
    const int4 item = item_at(i);
    if (item.x < 0) return;
    if (item.z == 0) continue;
    int* const parts = key_parts_of<Tiles>(args, item.y, item.x);
    if (lane == 0)
      while (load_acquire(parts) < 2 * (item.z - 1)) {}
    wait_for_turn(consumer);
    named_sync(3 + consumer, kTurnThreads);
    if (lane == 0) {
      __threadfence();  // what the consumer has added comes first, too
      add_release(parts, 1);
    }
  }
}

}  // namespace tree_attn::hopper
