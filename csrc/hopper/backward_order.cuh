// Sums in a fixed order, for deterministic calls: whose turn it is to add to dQ, dK and dV.
//
// An adder waits until the items before its own have been added to the row tile, and the producer, before it sends the last
// row tile, until dK and dV of the tile's items before have been added. Both wait for items alone that were taken before, so
// the first of those that are not finished waits for nobody. Rows come in ascending order and tiles that begin in a band in
// descending order, so that items reach a row tile about in the order of the sums; and blocks take items of some heads in
// turn, because those of one head follow each other through a band.
#pragma once

#include "backward_shared.cuh"

namespace tree_attn::hopper {

// The item that was taken as number `taken` of all, and its place in the list. The list has first the items that fill a band,
// then the others, both band by band; the others are taken from the last on. Heads take turns, a few at a time, whose sums
// stay in L2.
__device__ __forceinline__ portable::HeadItem item_in_order(const BackwardArguments& args, int taken, int& place) {
  constexpr int kHeads = 4;
  const Workspace& work = args.work;
  const int kv_heads = args.call.sizes.kv_heads, items = work.plan->items, filling = work.band_items[work.bands - 1];
  const int first_head = taken / (kHeads * items) * kHeads, heads = min(kHeads, kv_heads - first_head);
  if (taken >= kv_heads * items) return {false, 0, {}};
  const int turn = taken - first_head * items, i = turn / heads;
  place = i < filling ? i : filling + items - 1 - i;
  return {true, first_head + turn % heads, work.items[place]};
}

// What has been added to dK and dV of a key tile, in warps; and a wait until the tile's items before this one have been.
template <typename Tiles>
__device__ __forceinline__ int* key_parts_of(const BackwardArguments& args, int kv_head, int tile) {
  const int tiles = (args.call.sizes.keys + Tiles::kKeys - 1) / Tiles::kKeys;
  return args.work.key_parts + int64_t{kv_head} * tiles + tile;
}
template <typename Tiles>
__device__ __forceinline__ void wait_for_key_parts(const BackwardArguments& args, int kv_head, int place) {
  constexpr int kBand = portable::kBandRows;
  const int4 item = args.work.items[place];
  if (!item.w) return;
  const int2 rows = args.work.tile_rows[item.x];
  const int band = item.y / kBand, first = rows.x / kBand, last = (rows.y - 1) / kBand;
  const bool first_fills = rows.x % kBand == 0, last_fills = rows.y % kBand == 0;
  const int filling = last - first + 1 - !first_fills - !last_fills;
  const bool fills = (band > first || first_fills) && (band < last || last_fills);
  // As they are taken: those that fill their band; then the others, the last first.
  const int before = fills ? band - first - !first_fills : filling + (band == first && !last_fills);
  const int* const parts = key_parts_of<Tiles>(args, kv_head, item.x);
  while (load_acquire(parts) != Tiles::kReleases * before) {}
}

// How many of the items before the one at `place` add to each row tile of its band: lane l has those of row tiles l and l +
// 32 of the band.
template <typename Tiles>
struct RowTurns {
  static constexpr int kRows = Tiles::kRows, kTiles = portable::kBandRows / kRows, kPerLane = kTiles / kWarp;
  int place = -1, ranks[kPerLane];

  // Adds those of the items [from, to) of the list.
  __device__ __forceinline__ void count(const BackwardArguments& args, int from, int to, const int (&row0)[kPerLane],
                                        const int (&oldest)[kPerLane]) {
    const int lane = threadIdx.x % kWarp;
    for (int first = from; first < to; first += kWarp) {
      int4 item = {0, 0, 0, 0};
      int depth = 0;  // of the deepest key
      if (first + lane < to) {
        item = args.work.items[first + lane];
        if (args.call.mask.window)
          depth = KeySpan::load<Tiles::kKeys>(args.call.mask, item.x * Tiles::kKeys, args.call.sizes.keys).depth.high;
      }
      for (int i = 0; i < min(kWarp, to - first); ++i) {
        const int begin = __shfl_sync(~0u, item.y, i), end = __shfl_sync(~0u, item.z, i);
        const int deepest = __shfl_sync(~0u, depth, i);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j)
          ranks[j] += row0[j] >= begin && row0[j] < end && deepest > oldest[j];
      }
    }
  }

  __device__ __forceinline__ void of_item(const BackwardArguments& args, int at) {
    if (at == place) return;
    place = at;
    const Workspace& work = args.work;
    const int lane = threadIdx.x % kWarp, band = work.items[at].y / portable::kBandRows, filling = work.bands - 1;
    int row0[kPerLane], oldest[kPerLane];  // keys of this depth and above are too old
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      row0[j] = band * portable::kBandRows + (lane + j * kWarp) * kRows;
      oldest[j] = args.call.mask.window ? depths_of_row_tile(args, row0[j]).low - args.call.mask.window : -1;
      ranks[j] = 0;
    }
    const auto end_of = [&](int section) { return section < 0 ? 0 : work.band_items[section]; };
    if (at < end_of(filling)) {
      count(args, end_of(band - 1), at, row0, oldest);
    } else {
      count(args, end_of(band - 1), end_of(band), row0, oldest);
      count(args, at + 1, end_of(filling + 1 + band), row0, oldest);
    }
  }
  __device__ __forceinline__ int of_row_tile(int in_band) const {
    int rank = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int own = __shfl_sync(~0u, ranks[j], in_band % kWarp);
      if (in_band / kWarp == j) rank = own;
    }
    return rank;
  }
};

// One warp a consumer: adds its halves of dQ, each in its turn.
template <typename Tiles>
__device__ __forceinline__ void add_in_order(const BackwardArguments& args, typename Tiles::Smem& smem, int consumer) {
  constexpr int kHalf = Tiles::kRows * Tiles::kDim / 2;  // float32 sums
  const Workspace& work = args.work;
  const int lane = threadIdx.x % kWarp;
  RowTurns<Tiles> turns;
  int next = -1, seen = -1;  // of the row tile to come; the products added to it, read while the sums before it arrive
  for (unsigned step = 0;; ++step) {
    barrier_wait(smem_address(&smem.staging_full[consumer]), step & 1);
    const int2 announced = smem.announced[step % Tiles::kAnnounced];
    const int upcoming = smem.upcoming[consumer];
    __syncwarp();
    if (announced.x < 0) return;
    turns.of_item(args, announced.y);
    const int turn = turns.of_row_tile(announced.x % (work.padded_rows / Tiles::kRows) % RowTurns<Tiles>::kTiles);
    const int half = announced.x * 2 + consumer;
    int* const added = work.row_parts + half;
    if (lane == 0) {
      if (next != announced.x || seen != turn)
        while (load_acquire(added) != turn) {}
      bulk_add(work.grad_q + int64_t{half} * kHalf, smem_address(smem.staging[consumer * Tiles::kGroupReleases]), kHalf * 4);
      bulk_wait_read();
    }
    __syncwarp();
    named_arrive(1 + consumer, Tiles::kStagingThreads);  // the staging is free
    if (lane == 0) {
      next = upcoming;
      if (next >= 0) seen = load_acquire(work.row_parts + next * 2 + consumer);
      bulk_wait();
      store_release(added, turn + 1);
    }
    __syncwarp();
  }
}

}  // namespace tree_attn::hopper
