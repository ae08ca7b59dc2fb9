// What the backward kernels on Hopper share: arguments, and the element mask of transposed scores (keys x rows).
#pragma once

#include "../portable/backward_plan.cuh"
#include "primitives.cuh"
#include "rows.h"

namespace tree_attn::hopper {

struct BackwardArguments : portable::BackwardArgumentsOf<TiledRows> {
  BackwardArguments(const Backward& call, TiledRows rows, int dim, int value_dim, int keys_per_tile)
      : BackwardArgumentsOf(in_one_kernel(call), rows, dim, value_dim, keys_per_tile, call.deterministic) {}

 private:
  // To the portable code `deterministic` means a kernel of its own for dQ.
  static Backward in_one_kernel(Backward call) {
    call.deterministic = false;
    return call;
  }
};

using portable::Workspace;

struct BackwardMaps {
  CUtensorMap q, grad_out;  // boxes of a row tile
  CUtensorMap k, v;         // and of a key tile
};
__device__ __forceinline__ void prefetch_maps(const BackwardMaps& maps) {
  prefetch_map(&maps.q), prefetch_map(&maps.grad_out), prefetch_map(&maps.k), prefetch_map(&maps.v);
}

// Where the rows of a group do not fill a row tile, some are never loaded into these buffers: zeros there, times the
// probability 0, stay out of every sum. By all threads of the block.
template <typename Tiles, typename... Buffers>
__device__ __forceinline__ void clear_rows_that_are_none(const BackwardArguments& args, Buffers&... buffers) {
  if (args.rows.tokens.divisor * args.rows.group.divisor == Tiles::kRows) return;
  const auto clear = [](auto& buffer) {
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(buffer) / sizeof(int4)); i += Tiles::kThreads)
      reinterpret_cast<int4*>(&buffer)[i] = {0, 0, 0, 0};
  };
  (clear(buffers), ...);
  proxy_fence();
}

__device__ __forceinline__ Bounds depths_of_row_tile(const BackwardArguments& args, int row0) {
  const int first = args.rows.first_token(row0), sequence = args.call.sizes.rows;
  return bounds_of(args.call.mask.q_depth_bounds, min(first, sequence - 1),
                   min(first + args.rows.tokens.divisor, sequence));
}

// The packed rows that see the two keys of which this thread has scores, of a warpgroup's 64 from `key0` on.
struct SeenRows {
  int first[2], end[2];

  __device__ __forceinline__ SeenRows(const BackwardArguments& args, int key0) {
    const Sizes& sizes = args.call.sizes;
    const int thread = recomputed(threadIdx.x);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = key0 + thread / kWarp % 4 * 16 + h * 8 + thread % kWarp / 4;
      const int2 tokens = key < sizes.keys ? rows_of_key(args.call.mask, key) : int2{0, 0};
      first[h] = args.rows.first_row(min(tokens.x, sizes.rows));
      end[h] = args.rows.first_row(min(tokens.y, sizes.rows));
    }
  }

  // Hidden scores of kRows rows from `row0` on become -inf.
  template <int kRows>
  __device__ __forceinline__ void hide(const BackwardArguments& args, int key0, int row0,
                                       float (&s)[kRows / 8][4]) const {
    const Mask& mask = args.call.mask;
    const int thread = recomputed(threadIdx.x), warp = thread / kWarp % 4, lane = thread % kWarp;
    const int row = row0 + (lane % 4) * 2;  // of this thread's first score; the others are counted from it
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int from = first[h] - row, to = end[h] - row;
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (n * 8 + e < from || n * 8 + e >= to) s[n][2 * h + e] = negative_infinity();
    }
    if (mask.window) {
      int depths[kRows / kWarp], key_depth[2];  // of the rows: each lane brings some
#pragma unroll
      for (int h = 0; h < 2; ++h)
        key_depth[h] = __ldg(mask.k_depth + min(key0 + warp * 16 + h * 8 + lane / 4, args.call.sizes.keys - 1));
#pragma unroll
      for (int i = 0; i < kRows / kWarp; ++i)
        depths[i] = __ldg(mask.q_depth + args.rows.token(row0 + i * kWarp + lane));
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int depth = __shfl_sync(~0u, depths[n / 4], n % 4 * 8 + (lane % 4) * 2 + e);
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (depth - key_depth[h] >= mask.window) s[n][2 * h + e] = negative_infinity();
        }
    }
  }
};

}  // namespace tree_attn::hopper
