// How the backward on Hopper packs the query heads of one key/value head into rows.
#pragma once

#include "../params.h"
#include "../portable/primitives.cuh"

namespace tree_attn::hopper {

// Rows of a tile for a compiled head dim.
constexpr int row_tile(int dim) { return dim <= 64 ? 128 : 64; }

constexpr int kMaxGroup = 64;  // query heads of one key/value head: a row tile holds a whole token

// Packed rows in tiles of whole tokens, as TMA brings them: `size` rows a tile, of which the last few may be none.
struct TiledRows {
  FastDivisor group, tokens;  // tokens: in a tile
  int size, sequence;         // sequence: all tokens
  int count;                  // rows of all tiles

  TiledRows(const Sizes& s, int size)
      : group(s.heads / s.kv_heads), tokens(size / (s.heads / s.kv_heads)), size(size), sequence(s.rows) {
    count = static_cast<int>((int64_t{s.rows} + tokens.divisor - 1) / tokens.divisor * size);
  }
  __device__ __forceinline__ int in_tile(int row) const { return group.divide(row & (size - 1)); }  // tokens
  __device__ __forceinline__ int first_token(int row) const { return row / size * tokens.divisor; }  // of the tile
  __device__ __forceinline__ int token(int row) const { return min(first_token(row) + in_tile(row), sequence - 1); }
  __device__ __forceinline__ int head(int row, int kv_head) const {
    return kv_head * group.divisor + (row & (size - 1)) - in_tile(row) * group.divisor;
  }
  __device__ __forceinline__ bool valid(int row) const {
    return row < count && in_tile(row) < tokens.divisor && first_token(row) + in_tile(row) < sequence;
  }
  __device__ __forceinline__ int first_row(int token) const {
    const int tile = tokens.divide(token);
    return tile * size + (token - tile * tokens.divisor) * group.divisor;
  }
  __device__ __forceinline__ int64_t offset(const Tensor3& x, int row, int kv_head) const {
    return token(row) * x.token_stride + head(row, kv_head) * x.head_stride;
  }
};

}  // namespace tree_attn::hopper
