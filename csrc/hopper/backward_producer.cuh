// Backward on Hopper, the warps that do not compute: the producer, and the one that writes the zeros that sums of dQ begin with
// (backward.cuh says how they work together).
#pragma once

#include "backward_turns.cuh"

namespace tree_attn::hopper {

// A message to the consumers, of a row tile or of an item without any: its first row, a multiple of 64, and below that
// flags, the parity of the phase in which the item's values come, and how many row tiles were sent before, modulo 4. The
// consumers have no registers to count for themselves.
constexpr int kLast = 1, kPartial = 2, kNoRows = 4, kOddValues = 8, kSentUnit = 16, kFlags = 63;
__device__ __forceinline__ unsigned sent_before(int message) { return (message & kFlags) / kSentUnit; }

// -- the sums of dQ begin with zeros -------------------------------------------------------------------------------------------

constexpr int kClearedRows = Workspace::kRowPadding;  // at once

__device__ __forceinline__ void wait_for_clear_sums(const BackwardArguments& args, int kv_head) {
  while (load_acquire(args.work.cleared + kv_head) < args.work.padded_rows / kClearedRows) {}
  proxy_fence_global();
}

// A warp clears the sums of all heads but the first, in order, as far as no other block does.
template <typename Tiles>
__device__ __forceinline__ void clear_sums(const BackwardArguments& args) {
  const Workspace& work = args.work;
  const int lane = threadIdx.x % kWarp, parts = work.padded_rows / kClearedRows;
  for (;;) {
    int part = 0;
    if (lane == 0) part = parts + atomicAdd(&work.plan->parts_taken, 1);
    part = __shfl_sync(~0u, part, 0);
    if (part >= parts * args.call.sizes.kv_heads) return;
    constexpr int kVectors = kClearedRows * Tiles::kDim / 4;
    float4* const sums = reinterpret_cast<float4*>(work.grad_q) + int64_t{part} * kVectors + lane;
#pragma unroll 8
    for (int i = 0; i < kVectors; i += kWarp) sums[i] = {0.f, 0.f, 0.f, 0.f};
    proxy_fence_global();
    __threadfence();
    __syncwarp();
    if (lane == 0) add_release(work.cleared + part / parts, 1);
  }
}

// -- the producer -----------------------------------------------------------------------------------------------------------

template <typename Tiles, bool kFixedPoint>
__device__ __forceinline__ void produce(const BackwardArguments& args, const BackwardMaps& maps,
                                        typename Tiles::Smem& smem) {
  constexpr int kRows = Tiles::kRows, kKeys = Tiles::kKeys, kSlabs = Tiles::kDim / 64;
  const Backward& call = args.call;
  const Sizes& sizes = call.sizes;
  const Workspace& work = args.work;
  const int group = args.rows.group.divisor;
  const auto at = [](auto& x) { return smem_address(&x); };
  Ring<Tiles::kStages> stages;
  Ring<Tiles::kItems> slots;

  // A fresh barrier counts as one whose phase before is over, so all places are free at first.
  int k0 = 0;              // of the item
  bool values_due = false;
  int marks = kOddValues;  // what the last message had: the phase of the values, and how many row tiles were sent before
  const auto send = [&](int message, int kv_head) {  // its first row and flags
    const int stage = stages.place(), row0 = message & ~kFlags, head = kv_head * group;
    const int token = args.rows.first_token(row0), bytes = args.rows.tokens.divisor * group * Tiles::kDim * 2;
    const int64_t from = static_cast<int64_t>(kv_head) * work.padded_rows + row0;
    const bool some = !(message & kNoRows), with_values = some && values_due;
    const uint32_t full = at(smem.full[stage]), v_full = at(smem.v_full);
    barrier_wait(at(smem.empty[stage]), stages.parity() ^ 1);
    // The loads come first, what counts their bytes after: consumers wait for the arrival as well.
    if (some) {
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
        tma_load(at(smem.stages[stage].q) + slab * Tiles::kQSlab, &maps.q, full, slab * 64, head, token);
        tma_load(at(smem.stages[stage].grad_out) + slab * Tiles::kQSlab, &maps.grad_out, full, slab * 64, head, token);
      }
      bulk_load(at(smem.log2_sums[stage]), work.log2_sum + from, kRows * 4, full);
      bulk_load(at(smem.deltas[stage]), work.delta + from, kRows * 4, full);
      if (kFixedPoint)
        bulk_load(at(smem.row_factors[sent_before(marks)]), work.row_factor + from, kRows * 4, full);
    }
    if (with_values) marks ^= kOddValues;
    const int number = (kv_head * (work.padded_rows / 64) + row0 / 64) / (kRows / 64);
    smem.message[stage] = {message + marks, number};
    if (some) {
      marks = (marks & kOddValues) + (marks + kSentUnit & kFlags & -kSentUnit);
      barrier_arrive_expect(full, 2 * bytes + (kFixedPoint ? 3 : 2) * kRows * 4);
    } else {
      barrier_arrive(full);
    }
    if (with_values) {
      barrier_wait(at(smem.v_empty), marks & kOddValues ? 0 : 1);
      barrier_arrive_expect(v_full, Tiles::kKBytes);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab)
        tma_load(at(smem.v) + slab * Tiles::kKSlab, &maps.v, v_full, slab * 64, kv_head, k0);
      values_due = false;
    }
    ++stages.steps;
  };

  const auto take = [&] { return atomicAdd(&work.plan->taken, 1); };
  int next = take();
  for (bool ends = false; !ends; ++slots.steps) {
    const int slot = slots.place();
    const portable::HeadItem taken = portable::item_taken(work, sizes, next);
    const int4 item = taken.item;
    const int kv_head = taken.kv_head;
    ends = !taken.exists;
    if (!ends && kv_head != smem.item[slot ^ 1].y) wait_for_clear_sums(args, kv_head);  // another than of the last item
    const int tile = item.x, row_tiles = (item.z - item.y + kRows - 1) / kRows;
    const uint32_t item_full = at(smem.item_full[slot]);
    k0 = tile * kKeys, values_due = true;
    barrier_wait(at(smem.item_empty[slot]), slots.parity() ^ 1);
    smem.item[slot] = {ends ? -1 : tile, kv_head, item.w, 0};
    if (ends) {
      barrier_arrive(item_full);
    } else {
      barrier_arrive_expect(item_full, Tiles::kKBytes);
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab)
        tma_load(at(smem.k[slot]) + slab * Tiles::kKSlab, &maps.k, item_full, slab * 64, kv_head, k0);
    }

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
      if (held >= 0 || left == 0) send(held < 0 ? kNoRows : left == 0 ? held + kLast : held, kv_head);
      held = row0 + (full ? 0 : kPartial);
    }
  }
}

}  // namespace tree_attn::hopper
