// Backward, what its kernels on both paths share: the workspace, and all that comes before the products: delta and the
// denominator of every row, and the list of items.
//
// A key tile's rows are one contiguous range of very different length (a shared prompt: all rows; a leaf: its own), so
// the rows are cut into bands, and an item of work is one key tile against one band. Blocks take items from a counter,
// band by band: those that run side by side then read the same Q and dO and add to the same dQ, which stays in L2. In the
// end long items come first, so that all blocks end together. Tiles that reach into several bands add up dK and dV in
// float32 like dQ.
#pragma once

#include <algorithm>

#include "fixed_point.cuh"
#include "tiles.cuh"

namespace tree_attn::portable {

// Keys that a tile has at least, for a compiled head dim.
constexpr int smallest_keys(int dim) { return dim <= 64 ? 128 : dim <= 192 ? 64 : 32; }

constexpr int kBandRows = 4096;  // packed rows; a multiple of every kRows
constexpr int kShortBandRows = 2048, kFewItems = 16;  // of bands that fewer key tiles see on average
static_assert(2 * kShortBandRows == kBandRows);

// What blocks are told, and tell each other.
struct Plan {
  int taken;           // items, of all heads
  int items;           // of one head
  int heads_in_turns;  // the last ones, whose items are taken in turn, the longest first
  int heads_side_by_side;  // of the others, whose items are taken in turn, band by band
  int band_rows;
  int parts_taken;     // parts of grad_q that some block clears or has cleared; Hopper
};

// The workspace of one call, cut into arrays. Rows are packed and padded to kRowPadding, keys to kKeyPadding.
struct Workspace {
  static constexpr int kRowPadding = 128, kKeyPadding = 128;
  float* log2_sum;  // (kv_heads, padded rows) log2 of the whole denominator; +inf where a row sees nothing
  float* delta;     // (kv_heads, padded rows) what is subtracted from D'
  float* grad_q;    // (kv_heads, padded rows, padded head dim), order of registers; not for deterministic calls. In fixed
                    // point: int
  float* grad_kv;   // (kv_heads, padded keys, padded head + value dim), likewise
  Plan* plan;
  int* band_items;  // (bands, 2) where the items of each band end: of tiles that fill it, and of the others behind them
  int2* tile_rows;  // (key tiles) the packed rows that see a key of the tile
  int4* items;      // band by band: (key tile, first row, end row, 0 if the tile has no others, else 1 + those before it)
  int4* items_by_size;  // the same, the longest first
  int* cleared;     // (kv_heads) parts of grad_q that are clear; Hopper
  float2* key_bounds;  // (kv_heads, kBoundParts), see fixed_point.cuh, as the next
  float* row_factor;   // (kv_heads, padded rows) of the integers in grad_q
  int* key_parts;      // (kv_heads, key tiles) warps that have added their dK and dV so far; with fixed point
  int padded_rows;
  int bands;      // of kBandRows
  int max_items;
  int64_t bytes;

  static __host__ __device__ int64_t padded_keys(const Sizes& s) {
    return (int64_t{s.keys} + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
  }

  // `rows`: packed rows of one key/value head.
  Workspace(void* base, const Sizes& s, int64_t rows, bool deterministic, int dim, int value_dim, int keys_per_tile,
            bool fixed_point) {
    padded_rows = static_cast<int>((rows + kRowPadding - 1) / kRowPadding * kRowPadding);
    const int64_t tiles = (s.keys + keys_per_tile - 1) / keys_per_tile;
    bands = deterministic ? 1 : static_cast<int>((rows + kBandRows - 1) / kBandRows);
    const int64_t max_bands = deterministic ? 1 : (rows + kShortBandRows - 1) / kShortBandRows;
    // With short bands a tile has at most twice as many items, and each at least one.
    max_items = static_cast<int>(std::max(tiles * bands, int64_t{2} * kFewItems * bands + tiles));
    bytes = 0;
    auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char*>(base) + bytes);
      bytes += (count * static_cast<int64_t>(sizeof(*pointer)) + 255) / 256 * 256;
    };
    take(plan, 1);
    take(log2_sum, s.kv_heads * int64_t{padded_rows});
    take(delta, s.kv_heads * int64_t{padded_rows});
    take(grad_q, deterministic ? 0 : s.kv_heads * int64_t{padded_rows} * dim);
    take(grad_kv, deterministic ? 0 : s.kv_heads * padded_keys(s) * (dim + value_dim));
    take(band_items, 2 * max_bands);
    take(cleared, s.kv_heads);
    take(key_bounds, fixed_point ? s.kv_heads * kBoundParts : 0);
    take(row_factor, fixed_point ? s.kv_heads * int64_t{padded_rows} : 0);
    take(tile_rows, tiles);  // from here on sizes depend on keys_per_tile
    take(items, max_items);
    take(items_by_size, max_items);
    take(key_parts, fixed_point ? s.kv_heads * tiles : 0);
  }
};

// `Rows`: how packed rows follow from tokens and heads, here PackedRows.
template <typename Rows>
struct BackwardArgumentsOf {
  Backward call;
  Rows rows;
  Scaling scaling;
  Workspace work;
  bool fixed_point;  // are sums of dQ integers, and those of dK and dV added in a fixed order?

  BackwardArgumentsOf(const Backward& call, Rows rows, int dim, int value_dim, int keys_per_tile, bool fixed_point = false)
      : call(call),
        rows(rows),
        scaling(call.scale, call.softcap),
        work(call.workspace, call.sizes, rows.count, call.deterministic, dim, value_dim, keys_per_tile, fixed_point),
        fixed_point(fixed_point) {}
};
using BackwardArguments = BackwardArgumentsOf<PackedRows>;

// -- float32 sums in global memory, in the order of the registers ---------------------------------------------------------

// Register i of lane l lies at (i / w * 32 + l) * w + i % w, w values a lane beside each other: one instruction of a warp
// adds to contiguous memory. Compute capability 9.0 adds four at once ("red" with .v4.f32).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kAddWidth = 4;
#else
constexpr int kAddWidth = 1;
#endif

template <int kCount>
__device__ __forceinline__ void add_registers(float* to, const float* values) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kCount; i += kAddWidth) {
    float* at = to + (i / kAddWidth * kWarp + lane) * kAddWidth;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};\n" ::"l"(at), "f"(values[i]), "f"(values[i + 1]),
                 "f"(values[i + 2]), "f"(values[i + 3])
                 : "memory");
#else
    atomicAdd(at, values[i]);
#endif
  }
}

template <int kCount>
__device__ __forceinline__ void read_registers(float* values, const float* from) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kCount; i += kAddWidth)
#pragma unroll
    for (int w = 0; w < kAddWidth; ++w) values[i + w] = from[(i / kAddWidth * kWarp + lane) * kAddWidth + w];
}

// -- before: delta and the denominator of every row, the list of items ----------------------------------------------------

// kPrepareWarps warps of a block share the work before the products; the roles of blocks are in prepare_kernel.
constexpr int kPrepareWarps = 8;

// Rows that a warp prepares: kLanes lanes a row, each with 8 columns of O and dO, kPasses loads of each in flight.
template <int kValueDim>
struct PreparedRows {
  static constexpr int kLanes = kValueDim <= 32 ? 4 : kValueDim <= 64 ? 8 : kValueDim <= 128 ? 16 : 32;
  static constexpr int kPasses = 4, kPerPass = kWarp / kLanes, kRows = kPasses * kPerPass;
  static_assert(Workspace::kRowPadding % kRows == 0);
};

// The statistics of the packed rows from `first` on: delta = sum(dO * O), and with a gradient of lse, sum over keys of
// softmax * grad_lse folded in. And zeros for their dQ, if `clears`.
template <typename Tiles, typename Rows>
__device__ __forceinline__ void prepare_rows(const BackwardArgumentsOf<Rows>& args, int first, int kv_head, bool clears) {
  using T = typename Tiles::T;
  using Part = PreparedRows<Tiles::kValueDim>;
  const Backward& call = args.call;
  const int lane = threadIdx.x % kWarp, col = lane % Part::kLanes * 8;
  const int64_t packed = static_cast<int64_t>(kv_head) * args.work.padded_rows;

  int4 out[Part::kPasses], grad[Part::kPasses];
  float lses[Part::kPasses];  // all loads are in flight at once
#pragma unroll
  for (int i = 0; i < Part::kPasses; ++i) {
    const int row = first + i * Part::kPerPass + lane / Part::kLanes;
    out[i] = grad[i] = {0, 0, 0, 0};
    lses[i] = 0.f;
    if (args.rows.valid(row)) {
      lses[i] = call.lse[static_cast<int64_t>(args.rows.head(row, kv_head)) * call.sizes.rows + args.rows.token(row)];
      if (col < call.sizes.value_dim) {
        const auto at = [&](const Tensor3& x) {
          return static_cast<const T*>(x.data) + args.rows.offset(x, row, kv_head) + col;
        };
        out[i] = *reinterpret_cast<const int4*>(at(call.out));
        grad[i] = *reinterpret_cast<const int4*>(at(call.grad_out));
      }
    }
  }
  if (clears) {
    float4* const dq = reinterpret_cast<float4*>(args.work.grad_q + (packed + first) * Tiles::kDim);
#pragma unroll
    for (int i = 0; i < Part::kRows * Tiles::kDim / 4 / kWarp; ++i) dq[i * kWarp + lane] = {0.f, 0.f, 0.f, 0.f};
  }
  const auto sum_of_lanes = [](float x) {
#pragma unroll
    for (int step = Part::kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
  };
  const KeyBounds keys = args.fixed_point ? KeyBounds(args.work.key_bounds, kv_head) : KeyBounds();
#pragma unroll
  for (int i = 0; i < Part::kPasses; ++i) {
    float delta = 0.f, out_squares = 0.f, grad_squares = 0.f;
    const uint32_t o[4] = {uint32_t(out[i].x), uint32_t(out[i].y), uint32_t(out[i].z), uint32_t(out[i].w)};
    const uint32_t g[4] = {uint32_t(grad[i].x), uint32_t(grad[i].y), uint32_t(grad[i].z), uint32_t(grad[i].w)};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 x = Element<T>::unpack(o[j]), y = Element<T>::unpack(g[j]);
      delta += x.x * y.x + x.y * y.y;
      if (args.fixed_point) out_squares += x.x * x.x + x.y * x.y, grad_squares += y.x * y.x + y.y * y.y;
    }
    delta = sum_of_lanes(delta);
    if (args.fixed_point) out_squares = sum_of_lanes(out_squares), grad_squares = sum_of_lanes(grad_squares);
    if (lane % Part::kLanes != 0) continue;

    const int row = first + i * Part::kPerPass + lane / Part::kLanes;
    float log2_sum = -negative_infinity(), factor = 1.f;  // of a row that is none, or sees nothing
    if (args.rows.valid(row)) {
      const int token = args.rows.token(row), head = args.rows.head(row, kv_head);
      const int64_t at = static_cast<int64_t>(head) * call.sizes.rows + token;
      const float lse = lses[i];
      call.delta[at] = delta;
      if (lse == negative_infinity()) {
        delta = 0.f;
      } else {
        float denominator = lse;  // logarithm of the whole denominator
        if (call.sinks != nullptr) {
          const float sink = call.sinks[head], high = fmaxf(lse, sink);
          denominator = high + log1pf(expf(fminf(lse, sink) - high));
        }
        // lse leaves the sink out: its gradient is worth exp(denominator - lse) as much. Beyond exp(80) the row's
        // probabilities have vanished in float32.
        const float grad_lse = call.grad_lse != nullptr ? call.grad_lse[at] : 0.f;
        if (call.grad_lse != nullptr) delta -= grad_lse * expf(fminf(denominator - lse, 80.f));
        if (args.fixed_point) factor = keys.factor(grad_squares, out_squares, delta, grad_lse);
        log2_sum = denominator * kLog2e;
      }
    }
    args.work.log2_sum[packed + row] = log2_sum;
    args.work.delta[packed + row] = delta;
    if (args.fixed_point) args.work.row_factor[packed + row] = factor;
  }
}

// The packed rows [low, high) that see a key of the tile, low rounded down to whole row tiles.
template <typename Rows>
__device__ __forceinline__ int2 rows_of_tile(const BackwardArgumentsOf<Rows>& args, const KeySpan& keys,
                                             int rows_per_tile) {
  const int low = args.rows.first_row(max(keys.begin.low, 0)) / rows_per_tile * rows_per_tile;
  return {low, args.rows.first_row(min(keys.end.high, args.call.sizes.rows))};
}

// How many bands the rows of a tile touch.
__device__ __forceinline__ int bands_of(int2 rows, int band_rows) {
  return rows.y > rows.x ? (rows.y - 1) / band_rows - rows.x / band_rows + 1 : 0;
}

// An item of a key/value head; none (`exists`) past the last.
struct HeadItem {
  bool exists;
  int kv_head;
  int4 item;
};

// What the block computes that took number `taken` of all. Heads come one after the other, or a few side by side, their items
// band by band, whose rows stay in L2 meanwhile. The last heads take turns, and their long items go first, so that all blocks
// end together.
__device__ __forceinline__ HeadItem item_taken(const Workspace& work, const Sizes& sizes, int taken) {
  const int items = work.plan->items, last_heads = work.plan->heads_in_turns, first_heads = sizes.kv_heads - last_heads;
  const bool by_size = taken >= first_heads * items;
  const int side_by_side = work.plan->heads_side_by_side;
  const int first_head = by_size ? first_heads : taken / (side_by_side * items) * side_by_side;
  const int heads = by_size ? last_heads : min(side_by_side, first_heads - first_head);
  if (taken >= sizes.kv_heads * items) return {false, sizes.kv_heads, {}};
  const int in_heads = taken - first_head * items, turn = in_heads / heads;
  return {true, first_head + in_heads % heads, (by_size ? work.items_by_size : work.items)[turn]};
}

// So many heads take turns that each block has a few of their items, as far as what they read and add to stays in L2.
__device__ __forceinline__ int heads_in_turns(const Sizes& sizes, int64_t rows, int items) {
  constexpr int64_t kItems = 512, kBytes = 48 << 20;
  const int64_t row_bytes = 6 * sizes.head_dim + 2 * sizes.value_dim;  // Q, dO and the float32 sums of dQ
  const int64_t heads = min((kItems + items - 1) / max(items, 1), kBytes / max(rows * row_bytes, int64_t{1}));
  return static_cast<int>(min(max(heads, int64_t{1}), int64_t{sizes.kv_heads}));
}

// Items of about one size: 0 of the longest, to 1 / kItemSizes of it, in rows.
constexpr int kItemSizes = 64;
__device__ __forceinline__ int item_size(int first, int end, int longest) {
  return kItemSizes - 1 - static_cast<int>((max(end - first, 1) - 1) * int64_t{kItemSizes} / longest);
}

// How many items of the same tile come before this one in the list by size, where those of a size are in the order of bands.
// All but the first and the last of a tile fill their bands, so they are of size 0.
__device__ __forceinline__ int items_before_by_size(const Workspace& work, int4 item, int band_rows, int longest) {
  const int2 rows = work.tile_rows[item.x];
  const int band = item.y / band_rows, first = rows.x / band_rows, last = (rows.y - 1) / band_rows;
  const int size = item_size(item.y, item.z, longest);
  const int filling = max((size > 0 ? last : band) - first - 1, 0);
  const bool after_first = band > first && item_size(rows.x, (first + 1) * band_rows, longest) <= size;
  const bool after_last = band < last && item_size(last * band_rows, rows.y, longest) < size;
  return filling + after_first + after_last;
}

// One warp: copies the list of items in descending order of their size.
__device__ __forceinline__ void sort_items(const Workspace& work, int count, int band_rows) {
  __shared__ int ends[kItemSizes + 1];  // of the places of each size; the last is for lanes without an item
  const int lane = threadIdx.x % kWarp, longest = min(band_rows, work.padded_rows);
  // visit(item, its place among those of its size): of all items, in the order of the list.
  const auto each = [&](auto&& visit) {
    for (int first = 0; first < count; first += kWarp) {
      const int4 item = work.items[min(first + lane, count - 1)];
      const int size = first + lane < count ? item_size(item.y, item.z, longest) : kItemSizes;
      const uint32_t same = __match_any_sync(~0u, size), before = same & ((1u << lane) - 1);
      const int place = ends[size] + __popc(before);
      __syncwarp();
      if (before == 0) ends[size] += __popc(same);
      __syncwarp();
      if (first + lane < count) visit(item, place);
    }
  };
  for (int i = lane; i <= kItemSizes; i += kWarp) ends[i] = 0;
  __syncwarp();
  each([](int4, int) {});
  if (lane == 0)
    for (int i = 0, sum = 0; i <= kItemSizes; ++i) {
      const int number = ends[i];
      ends[i] = sum;
      sum += number;
    }
  __syncwarp();
  each([&](int4 item, int place) {
    if (item.w) item.w = 1 + items_before_by_size(work, item, band_rows, longest);
    work.items_by_size[place] = item;
  });
}

// One block: how many rows a band has. Blocks compute the items of one band after another at the same time, and what they
// read and add to should stay in L2; but each item costs a start and an end, and longer bands make fewer of them.
template <typename Rows>
__device__ __forceinline__ int choose_band_rows(const BackwardArgumentsOf<Rows>& args, int tiles) {
  const Workspace& work = args.work;
  if (args.call.deterministic) return 0x7fffffff;
  __shared__ int items;
  if (threadIdx.x == 0) items = 0;
  __syncthreads();
  int own = 0;
  for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x) own += bands_of(work.tile_rows[tile], kBandRows);
  own = __reduce_add_sync(~0u, own);
  if (threadIdx.x % kWarp == 0) atomicAdd(&items, own);
  __syncthreads();
  return items < kFewItems * work.bands ? kShortBandRows : kBandRows;
}

// One block: lists the items, band by band, in each band those of tiles that fill it and then the others, in the order of key
// tiles: it does not change from run to run.
template <typename Tiles, typename Rows>
__device__ __forceinline__ void plan_items(const BackwardArgumentsOf<Rows>& args) {
  const Sizes& sizes = args.call.sizes;
  const Workspace& work = args.work;
  const int tiles = (sizes.keys + Tiles::kKeys - 1) / Tiles::kKeys;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
    const int k0 = tile * Tiles::kKeys;
    work.tile_rows[tile] =
        rows_of_tile(args, KeySpan::load<Tiles::kKeys>(args.call.mask, k0, sizes.keys), Tiles::kRows);
  }
  __syncthreads();
  const int band_rows = choose_band_rows(args, tiles), bands = (args.rows.count - 1) / band_rows + 1;

  // visit(band, tile, first, end, is an item, fills the band) for all tiles, one warp a band, lanes side by side on tiles.
  const auto each = [&](auto&& visit) {
    for (int band = warp; band < bands; band += warps) {
      const int low = band * band_rows, high = low + band_rows;
      for (int tile0 = 0; tile0 < tiles; tile0 += kWarp) {
        const int2 rows = tile0 + lane < tiles ? work.tile_rows[tile0 + lane] : int2{0, 0};
        const int first = max(rows.x, low), end = min(rows.y, high);
        // A tile that nobody sees still gets an item, which writes its zeros.
        const bool empty = tile0 + lane < tiles && rows.y <= rows.x && band == 0;
        visit(band, tile0, first, empty ? first : end, empty || first < end, first == low && end == high, rows);
      }
    }
    __syncthreads();
  };

  int* const ends = work.band_items;
  for (int i = threadIdx.x; i < 2 * bands; i += blockDim.x) ends[i] = 0;
  __syncthreads();
  each([&](int band, int, int, int, bool item, bool whole, int2) {
    const int wholes = __popc(__ballot_sync(~0u, item && whole)), parts = __popc(__ballot_sync(~0u, item && !whole));
    if (lane == 0) ends[2 * band] += wholes, ends[2 * band + 1] += parts;
  });
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < 2 * bands; ++i) {
      const int count = ends[i];
      ends[i] = sum;
      sum += count;
    }
    work.plan->taken = 0;
    work.plan->items = sum;
    const int last_heads = heads_in_turns(sizes, work.padded_rows, sum);
    work.plan->heads_in_turns = args.fixed_point && last_heads == 1 ? 0 : last_heads;
    work.plan->heads_side_by_side = args.fixed_point ? 4 : 1;
    work.plan->band_rows = band_rows;
  }
  __syncthreads();
  each([&](int band, int tile0, int first, int end, bool item, bool whole, int2 rows) {
    const uint32_t wholes = __ballot_sync(~0u, item && whole), parts = __ballot_sync(~0u, item && !whole);
    const int at = ends[2 * band + !whole] + __popc((whole ? wholes : parts) & ((1u << lane) - 1));
    if (item) {
      const int others = bands_of(rows, band_rows) > 1 ? 1 + band - rows.x / band_rows : 0;
      work.items[at] = {tile0 + lane, first, max(first, end), others};
    }
    __syncwarp();
    if (lane == 0) ends[2 * band] += __popc(wholes), ends[2 * band + 1] += __popc(parts);
    __syncwarp();
  });

  if (warp == 0) sort_items(work, work.plan->items, band_rows);
}

// The float32 sums of dK and dV of a key tile in several bands begin with zeros.
template <typename Tiles, typename Rows>
__device__ __forceinline__ void clear_tile(const BackwardArgumentsOf<Rows>& args, int tile, int kv_head) {
  const Sizes& sizes = args.call.sizes;
  const KeySpan keys = KeySpan::load<Tiles::kKeys>(args.call.mask, tile * Tiles::kKeys, sizes.keys);
  if (bands_of(rows_of_tile(args, keys, Tiles::kRows), kShortBandRows) < 2) return;  // or even only if bands are short
  constexpr int kWidth = Tiles::kDim + Tiles::kValueDim;
  const int64_t key = kv_head * Workspace::padded_keys(sizes) + int64_t{tile} * Tiles::kKeys;
  float4* const sums = reinterpret_cast<float4*>(args.work.grad_kv + key * kWidth);
  for (int i = threadIdx.x; i < Tiles::kKeys * kWidth / 4; i += blockDim.x) sums[i] = {0.f, 0.f, 0.f, 0.f};
}

// All that comes before the products, in one launch. Blocks of a head: one for the list of items, then those of the rows,
// then one a key tile.
template <typename Tiles>
constexpr int kPreparedByBlock = kPrepareWarps * PreparedRows<Tiles::kValueDim>::kRows;

struct PrepareBlocks {
  int rows, key_tiles;

  template <typename Tiles, typename Rows>
  static PrepareBlocks of(const BackwardArgumentsOf<Rows>& args) {
    return {(args.work.padded_rows + kPreparedByBlock<Tiles> - 1) / kPreparedByBlock<Tiles>,
            args.call.deterministic ? 0 : (args.call.sizes.keys + Tiles::kKeys - 1) / Tiles::kKeys};
  }
  __host__ __device__ int count() const { return 1 + rows + key_tiles; }
};

template <typename Tiles, typename Rows>
__device__ __forceinline__ void prepare(const BackwardArgumentsOf<Rows>& args, PrepareBlocks blocks, int block,
                                        int kv_head, bool clears) {
  if (block == 0) {
    if (kv_head == 0) plan_items<Tiles>(args);
  } else if (block <= blocks.rows) {
    const int first =
        (block - 1) * kPreparedByBlock<Tiles> + threadIdx.x / kWarp * PreparedRows<Tiles::kValueDim>::kRows;
    if (first < args.work.padded_rows) prepare_rows<Tiles>(args, first, kv_head, clears);
  } else {
    clear_tile<Tiles>(args, block - 1 - blocks.rows, kv_head);
  }
}

}  // namespace tree_attn::portable
