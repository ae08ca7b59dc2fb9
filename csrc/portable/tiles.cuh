// What the portable kernels share: the arguments they are launched with, moving row tiles between global and shared
// memory, and the products of one warp.
#pragma once

#include "../params.h"
#include "../scores.cuh"
#include "../tile_mask.cuh"

namespace tree_attn::portable {

// Row `row` of packed rows is token row / group, query head kv_head * group + row % group.
struct PackedRows {
  FastDivisor group;
  int count;  // tokens * group

  PackedRows(const Sizes& s) : group(s.heads / s.kv_heads), count(s.rows * (s.heads / s.kv_heads)) {}
  __device__ __forceinline__ bool valid(int row) const { return row < count; }
  __device__ __forceinline__ int first_row(int token) const { return token * group.divisor; }
  __device__ __forceinline__ int token(int row) const { return group.divide(row); }
  __device__ __forceinline__ int head(int row, int kv_head) const {
    return kv_head * group.divisor + (row - group.divide(row) * group.divisor);
  }
  __device__ __forceinline__ int64_t offset(const Tensor3& x, int row, int kv_head) const {
    const int t = group.divide(row);
    return t * x.token_stride + (kv_head * group.divisor + (row - t * group.divisor)) * x.head_stride;
  }
};

// Moves a tile of kRows rows between global and shared memory, 16 bytes a thread at a time. Threads are laid out so that
// from one copy to the next only immediates change in the shared-memory address. They are those of the block from
// kFirstThread on.
template <typename T, int kCols, int kRows, int kThreads, int kFirstThread = 0>
struct TileCopy {
  using Tile = SmemTile<kCols>;
  static constexpr int kLanes = Tile::kChunks % 8 == 0 ? 8 : 4;  // threads side by side on a row
  static constexpr int kStep = kThreads / kLanes;                // rows at a time
  static constexpr int kDown = kRows / kStep, kAcross = Tile::kChunks / kLanes;
  static_assert(kRows % kStep == 0 && kStep % 8 == 0, "whole copies, at the same place of the swizzle");

  // copy(smem offset, row of the tile, column) for each 16 bytes that this thread moves.
  template <typename Copy>
  static __device__ __forceinline__ void each(Copy copy) {
    const uint32_t thread = rederive(threadIdx.x - kFirstThread);
    const int row = thread / kLanes, chunk = thread % kLanes;
    const uint32_t offset = Tile::offset(row, chunk);
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
        copy(offset + i * kStep * Tile::kPitch + j * kLanes * 16, row + i * kStep, (chunk + j * kLanes) * 8);
  }

  // gmem -> smem of consecutive tokens of one key/value head; zeros beyond `tokens` and beyond column `cols`.
  static __device__ __forceinline__ void load_keys(uint32_t smem, const Tensor3& x, int first, int tokens, int head,
                                                   int cols) {
    const T* base = static_cast<const T*>(x.data) + first * x.token_stride + head * x.head_stride;
    each([&](uint32_t offset, int row, int col) {
      const bool valid = first + row < tokens && col < cols;
      copy_async_16(smem + offset, base + (valid ? row * x.token_stride + col : 0), valid);
    });
  }

  // gmem -> smem of packed rows of one key/value head.
  template <typename Rows>
  static __device__ __forceinline__ void load_rows(uint32_t smem, const Tensor3& x, const Rows& rows, int first,
                                                   int kv_head, int cols) {
    const T* base = static_cast<const T*>(x.data);
    each([&](uint32_t offset, int row, int col) {
      const bool valid = rows.valid(first + row) && col < cols;
      copy_async_16(smem + offset, base + (valid ? rows.offset(x, first + row, kv_head) + col : 0), valid);
    });
  }

  // smem -> gmem, the reverse of load_rows.
  template <typename Rows>
  static __device__ __forceinline__ void store_rows(const char* smem, const Tensor3& x, const Rows& rows, int first,
                                                    int kv_head, int cols) {
    T* base = static_cast<T*>(x.data);
    each([&](uint32_t offset, int row, int col) {
      if (rows.valid(first + row) && col < cols)
        *reinterpret_cast<int4*>(base + rows.offset(x, first + row, kv_head) + col) =
            *reinterpret_cast<const int4*>(smem + offset);
    });
  }

  // smem -> gmem, the reverse of load_keys.
  static __device__ __forceinline__ void store_keys(const char* smem, const Tensor3& x, int first, int tokens, int head,
                                                    int cols) {
    T* base = static_cast<T*>(x.data) + first * x.token_stride + head * x.head_stride;
    each([&](uint32_t offset, int row, int col) {
      if (first + row < tokens && col < cols)
        *reinterpret_cast<int4*>(base + row * x.token_stride + col) = *reinterpret_cast<const int4*>(smem + offset);
    });
  }
};

template <int kTiles, int kCols>
__device__ __forceinline__ void clear(float (&c)[kTiles][kCols][4]) {
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int n = 0; n < kCols; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = 0.f;
}

// C (16 kRowTiles x 8 kColTiles) += A B^T, both row-major in shared memory: A's rows from a_row, B's from b_row, over
// kDepth columns. Scores and their gradients. kUnroll steps are scheduled together: more overlap, more registers.
template <typename T, int kDepth, int kUnroll = 4, int kRowTiles, int kColTiles>
__device__ __forceinline__ void product_transposed(float (&c)[kRowTiles][kColTiles][4], uint32_t a, int a_row,
                                                   uint32_t b, int b_row) {
  using Tile = SmemTile<kDepth>;
  const int lane = threadIdx.x % kWarp;
  const uint32_t a_lane = rederive(a + Tile::offset(a_row + LaneRowMajor::row(lane), LaneRowMajor::chunk(lane)));
  const uint32_t b_lane = rederive(b + Tile::offset(b_row + LaneColMajor::row(lane), LaneColMajor::chunk(lane)));
#pragma unroll kUnroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t af[kRowTiles][4];
    const uint32_t a_at = Tile::advance(a_lane, step * 2), b_at = Tile::advance(b_lane, step * 2);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) load_matrix_x4(af[m], a_at + m * 16 * Tile::kPitch);
#pragma unroll
    for (int n = 0; n < kColTiles / 2; ++n) {
      uint32_t bf[4];
      load_matrix_x4(bf, b_at + n * 16 * Tile::kPitch);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        Element<T>::mma(c[m][2 * n], af[m], bf[0], bf[1]);
        Element<T>::mma(c[m][2 * n + 1], af[m], bf[2], bf[3]);
      }
    }
  }
}

// C (16 kRowTiles x 8 kColTiles) += A B, both row-major in shared memory: A's rows from a_row, over all its kDepth columns;
// B's rows from 0, its columns from chunk `first_chunk` (even). The gradients of keys and values.
template <typename T, int kDepth, int kBCols, int kRowTiles, int kColTiles>
__device__ __forceinline__ void product(float (&c)[kRowTiles][kColTiles][4], uint32_t a, int a_row, uint32_t b,
                                        int first_chunk) {
  using TileA = SmemTile<kDepth>;
  using TileB = SmemTile<kBCols>;
  const int lane = threadIdx.x % kWarp;
  const uint32_t a_lane = rederive(a + TileA::offset(a_row + LaneRowMajor::row(lane), LaneRowMajor::chunk(lane)));
  const uint32_t b_lane = rederive(b + TileB::offset(LaneRowMajor::row(lane), LaneRowMajor::chunk(lane)));
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    uint32_t af[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
      load_matrix_x4(af[m], TileA::advance(a_lane, step * 2) + m * 16 * TileA::kPitch);
#pragma unroll
    for (int n = 0; n < kColTiles / 2; ++n) {
      uint32_t bf[4];
      load_matrix_x4_transposed(bf, TileB::advance(b_lane, first_chunk + n * 2) + step * 16 * TileB::kPitch);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        Element<T>::mma(c[m][2 * n], af[m], bf[0], bf[1]);
        Element<T>::mma(c[m][2 * n + 1], af[m], bf[2], bf[3]);
      }
    }
  }
}

// C (16 kRowTiles x 8 kColTiles) += W B, W (16 kRowTiles x 16 kSteps) in registers, B row-major in shared memory: its rows
// from 0, its columns from chunk `first_chunk` (even). The product of probabilities with values, and its like.
template <typename T, int kBCols, int kRowTiles, int kColTiles, int kSteps>
__device__ __forceinline__ void product_registers(float (&c)[kRowTiles][kColTiles][4],
                                                  const uint32_t (&w)[kRowTiles][kSteps][4], uint32_t b,
                                                  int first_chunk) {
  using Tile = SmemTile<kBCols>;
  const int lane = threadIdx.x % kWarp;
  const uint32_t b_lane = rederive(b + Tile::offset(LaneRowMajor::row(lane), LaneRowMajor::chunk(lane)));
#pragma unroll
  for (int n = 0; n < kColTiles / 2; ++n) {
    const uint32_t at = Tile::advance(b_lane, first_chunk + n * 2);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t bf[4];
      load_matrix_x4_transposed(bf, at + step * 16 * Tile::kPitch);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        Element<T>::mma(c[m][2 * n], w[m][step], bf[0], bf[1]);
        Element<T>::mma(c[m][2 * n + 1], w[m][step], bf[2], bf[3]);
      }
    }
  }
}

// Accumulators -> a 16-bit tile in shared memory, rows from `row`, columns from chunk `chunk`.
template <typename T, int kCols, int kRowTiles, int kColTiles>
__device__ __forceinline__ void store_accumulators(char* smem, int row, int chunk,
                                                   const float (&c)[kRowTiles][kColTiles][4]) {
  using Tile = SmemTile<kCols>;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColTiles; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = row + m * 16 + h * 8 + lane / 4;
        *reinterpret_cast<uint32_t*>(smem + Tile::offset(r, chunk + n) + (lane % 4) * 4) =
            Element<T>::pack(c[m][n][2 * h], c[m][n][2 * h + 1]);
      }
}

}  // namespace tree_attn::portable
