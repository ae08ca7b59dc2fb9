// Which tiles a mask needs and which need no element mask: the tile algebra of docs/design.md, shared by all kernels.
//
// Rows here are packed: the query heads of one key/value head lie beside each other, row = token * group + head. A key's
// rows stay one contiguous range, tiles get finer in tokens, and keys and values are read once a group.
#pragma once

#include "params.h"
#include "portable/primitives.cuh"

namespace tree_attn {

constexpr int kGranule = 32;  // keys an entry of the bounds tables stands for; as GRANULE in tree_attn/mask.py

struct Bounds {
  int low, high;  // min and max
};

// (min, max) of the entries that cover [first, last). A superset where the ends are no multiple of the granule, which
// only makes tiles "needed" more often and "full" less often.
__device__ __forceinline__ Bounds bounds_of(const int2* table, int first, int last) {
  Bounds b{0x7fffffff, -0x7fffffff};
  for (int g = first / kGranule; g <= (last - 1) / kGranule; ++g) {
    const int2 entry = __ldg(table + g);
    b.low = min(b.low, entry.x);
    b.high = max(b.high, entry.y);
  }
  return b;
}

// The same for a tile of kCount keys that starts at a multiple of the granule: all entries are read at once.
template <int kCount>
__device__ __forceinline__ Bounds bounds_of_tile(const int2* table, int first, int n) {
  static_assert(kCount % kGranule == 0);
  Bounds b{0x7fffffff, -0x7fffffff};
#pragma unroll
  for (int i = 0; i < kCount / kGranule; ++i) {
    const int at = min(first / kGranule + i, (n - 1) / kGranule);
    const int2 entry = __ldg(table + at);
    b.low = min(b.low, entry.x);
    b.high = max(b.high, entry.y);
  }
  return b;
}

// The rows [q0, q1) of a tile, in tokens, and their depths when there is a window.
struct RowSpan {
  int q0, q1;
  Bounds depth;
};

// The keys [k0, k1) of a tile: first and last row that see one of them, and all of them.
struct KeySpan {
  Bounds begin, end, depth;

  // Of the kCount keys from k0 on, as far as there are n_keys.
  template <int kCount>
  static __device__ __forceinline__ KeySpan load(const Mask& mask, int k0, int n_keys) {
    KeySpan s;
    s.begin = mask.row_begin == nullptr ? Bounds{k0, min(k0 + kCount, n_keys) - 1}
                                        : bounds_of_tile<kCount>(mask.begin_bounds, k0, n_keys);
    s.end = bounds_of_tile<kCount>(mask.end_bounds, k0, n_keys);
    s.depth = mask.window ? bounds_of_tile<kCount>(mask.k_depth_bounds, k0, n_keys) : Bounds{0, 0};
    return s;
  }
  __device__ __forceinline__ bool needed(const Mask& mask, const RowSpan& rows) const {
    const bool by_rows = end.high > rows.q0 && begin.low < rows.q1;
    return by_rows && (mask.window == 0 || rows.depth.low - depth.high < mask.window);
  }
  __device__ __forceinline__ bool full(const Mask& mask, const RowSpan& rows) const {
    const bool by_rows = begin.high <= rows.q0 && end.low >= rows.q1;
    return by_rows && (mask.window == 0 || rows.depth.high - depth.low < mask.window);
  }
};

__device__ __forceinline__ RowSpan row_span(const Mask& mask, int q0, int q1) {
  return {q0, q1, mask.window ? bounds_of(mask.q_depth_bounds, q0, q1) : Bounds{0, 0}};
}

// The rows [x, y) that see a key, for the elements of partial tiles.
__device__ __forceinline__ int2 rows_of_key(const Mask& mask, int key) {
  return {mask.row_begin == nullptr ? key : __ldg(mask.row_begin + key), __ldg(mask.row_end + key)};
}

// Walks the key tiles that a row tile needs, in ascending order. All threads of the block call every method together;
// the block classifies kThreads * kPerThread tiles at once into two bit sets in shared memory.
template <int kKeys, int kThreads>
struct KeyTiles {
  static constexpr int kPerThread = 4;
  static constexpr int kTiles = kThreads * kPerThread;  // classified at once
  static constexpr int kWords = kTiles / kWarp;

  struct Storage {
    uint32_t needed[kWords];
    uint32_t full[kWords];
    RowSpan rows;
    int limit;  // tiles from here on are not needed by any row
  };

  const Mask& mask;
  Storage& storage;
  const int n_keys;
  int word = 0;  // of all words, 32 tiles each; the shared ones are those of word / kWords
  uint32_t bits;
  bool is_full = false;

  __device__ KeyTiles(const Mask& mask, Storage& storage, RowSpan rows, int n_keys)
      : mask(mask), storage(storage), n_keys(n_keys) {
    // Without stored row_begin no key at or after the last row is seen.
    const int keys = mask.row_begin == nullptr ? min(n_keys, rows.q1) : n_keys;
    const int limit = (keys + kKeys - 1) / kKeys;
    if (threadIdx.x == 0) storage.rows = rows, storage.limit = limit;
    classify<kPerThread>(rows, 0, limit);
    bits = storage.needed[0];
  }

  // The next needed tile, or -1; sets is_full.
  __device__ int next() {
    while (bits == 0) {
      ++word;
      const int limit = storage.limit;
      if (word * kWarp >= limit) return -1;
      if (word % kWords == 0) {
        const RowSpan rows = storage.rows;
        __syncthreads();  // everybody has read the old words
        classify<1>(rows, word * kWarp, limit);  // rare, and at a place where registers are short
      }
      bits = storage.needed[word % kWords];
    }
    const int bit = __ffs(bits) - 1;
    bits &= bits - 1;
    is_full = (storage.full[word % kWords] >> bit) & 1;
    return word * kWarp + bit;
  }

 private:
  template <int kUnroll>
  __device__ void classify(const RowSpan& rows, int base, int limit) {
#pragma unroll kUnroll
    for (int i = 0; i < kPerThread; ++i) {
      const int local = i * kThreads + threadIdx.x;
      const int k0 = (base + local) * kKeys;
      bool needed = false, full = false;
      if (base + local < limit) {
        const KeySpan keys = KeySpan::load<kKeys>(mask, k0, n_keys);
        needed = keys.needed(mask, rows);
        full = needed && k0 + kKeys <= n_keys && keys.full(mask, rows);
      }
      const uint32_t needed_word = __ballot_sync(~0u, needed), full_word = __ballot_sync(~0u, full);
      if (threadIdx.x % kWarp == 0) {
        storage.needed[local / kWarp] = needed_word;
        storage.full[local / kWarp] = full_word;
      }
    }
    __syncthreads();
  }
};

}  // namespace tree_attn
