// The tables of a mask from depth-first index arrays: TreeMask.from_dfs in two launches, where torch takes thirty.
//
//   subtrees_kernel: one thread a token: its subtree's end by binary search, the bounds of 32 ends; counts ends
//   depths_kernel:   one block: depth = tokens that began before - subtrees that have ended, as a running sum
//
// What a user got wrong is counted on the way (MaskFacts); no input makes a thread leave its arrays.
#include "params.h"

#include "portable/primitives.cuh"

namespace tree_attn {

constexpr int kDepthThreads = 1024, kPerThread = 4, kDepthTile = kDepthThreads * kPerThread;
constexpr int kGranuleThreads = kWarp / kPerThread;  // 32 tokens an entry of the bounds
constexpr long long kIndexLimit = 1ll << 31;         // as INDEX_LIMIT in tree_attn/_diagnose.py

// The first place in the ascending array[low, high) that holds more than `value`.
template <typename T, typename Value>
__device__ __forceinline__ int upper_bound(const T* array, int low, int high, Value value) {
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (static_cast<Value>(array[middle]) <= value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <typename Index, typename Offset>
__global__ void subtrees_kernel(const Index* start, const Index* end, const Offset* offsets, int offset_count, int n,
                                int* subtree_end, int2* end_bounds, int* ended, MaskFacts* facts) {
  const int token = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % kWarp;
  bool wrong = false;
  for (int i = token; i < offset_count; i += gridDim.x * blockDim.x) {
    const long long previous = i ? static_cast<long long>(offsets[i - 1]) : 0, offset = offsets[i];
    wrong |= offset < previous || (i == 0 && offset != 0) || (i == offset_count - 1 && offset != n);
  }
  int beyond = -1;
  if (token < n) {
    int first = 0, stop = n;  // the token's sequence
    if (offset_count > 2) {
      const int sequence = min(max(upper_bound(offsets, 0, offset_count, static_cast<long long>(token)) - 1, 0),
                               offset_count - 2);
      const auto inside = [&](Offset x) { return static_cast<int>(min(max(static_cast<long long>(x), 0ll),
                                                                      static_cast<long long>(n))); };
      first = inside(offsets[sequence]), stop = inside(offsets[sequence + 1]);
    }
    const long long own = start[token], last = end[token];
    beyond = upper_bound(start, first, max(first, stop), last);
    wrong |= own <= -kIndexLimit || own >= kIndexLimit || beyond <= token;
    wrong |= token > first && static_cast<long long>(start[token - 1]) > own;
    subtree_end[token] = beyond;
  }
  if (__any_sync(~0u, wrong) && lane == 0) facts->wrong = 1;

  // The tokens of a node end together: one addition for each run of equal ends in the warp.
  const int before = __shfl_up_sync(~0u, beyond, 1);
  const uint32_t heads = __ballot_sync(~0u, lane == 0 || before != beyond);
  const uint32_t later = lane == kWarp - 1 ? 0u : heads & (~0u << (lane + 1));
  if (token < n && (heads >> lane & 1)) atomicAdd(ended + beyond, (later ? __ffs(later) - 1 : kWarp) - lane);
  const int low = __reduce_min_sync(~0u, token < n ? beyond : 0x7fffffff), high = __reduce_max_sync(~0u, beyond);
  if (lane == 0 && token < n) end_bounds[token / kWarp] = {low, high};
}

// depth[k] = sum over j <= k of (1 - ended[j]), minus 1. One block, so that the running sum stays in it: of many tokens
// the attention takes far longer.
__global__ void __launch_bounds__(kDepthThreads) depths_kernel(const int* ended, const int* subtree_end, int n, int* depth,
                                                               int2* depth_bounds, MaskFacts* facts) {
  __shared__ int warp_sums[kDepthThreads / kWarp];
  __shared__ long long warp_excess[kDepthThreads / kWarp];
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  int carry = -1;
  long long excess = 0;
  for (int base = 0; base < n; base += kDepthTile) {
    const int first = base + thread * kPerThread;
    int value[kPerThread], sum = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      sum += first + i < n ? 1 - ended[first + i] : 0;
      value[i] = sum;
    }
    int scan = sum;  // of the warp's threads up to this one
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(~0u, scan, step);
      if (lane >= step) scan += other;
    }
    if (lane == kWarp - 1) warp_sums[warp] = scan;
    __syncthreads();
    int others = warp_sums[lane];  // as many warps as lanes
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(~0u, others, step);
      if (lane >= step) others += other;
    }
    const int total = __shfl_sync(~0u, others, kWarp - 1), before = __shfl_sync(~0u, others, max(warp - 1, 0));
    const int offset = carry + (warp ? before : 0) + scan - sum;
    int low = 0x7fffffff, high = -0x7fffffff;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int token = first + i, own = offset + value[i];
      if (token >= n) break;
      depth[token] = own;
      low = min(low, own), high = max(high, own);
      // Twice the pairs of subtrees that hold a token, counted both ways, as _nesting in tree_attn/mask.py explains.
      excess += static_cast<long long>(own) * (own + 1 - 2ll * (subtree_end[token] - token));
    }
#pragma unroll
    for (int step = 1; step < kGranuleThreads; step *= 2) {
      low = min(low, __shfl_xor_sync(~0u, low, step));
      high = max(high, __shfl_xor_sync(~0u, high, step));
    }
    if (thread % kGranuleThreads == 0 && first < n) depth_bounds[first / kWarp] = {low, high};
    carry += total;
    __syncthreads();  // before the next tile's sums
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) excess += __shfl_xor_sync(~0u, excess, step);
  if (lane == 0) warp_excess[warp] = excess;
  __syncthreads();
  if (thread == 0) {
    for (int i = 1; i < kDepthThreads / kWarp; ++i) excess += warp_excess[i];
    facts->excess = excess;
  }
}

template <typename Index, typename Offset>
cudaError_t launch(const MaskTables& call, cudaStream_t stream) {
  const size_t counted = sizeof(MaskFacts) + (static_cast<size_t>(call.tokens) + 1) * sizeof(int);
  cudaError_t error = cudaMemsetAsync(call.facts, 0, counted, stream);
  if (error != cudaSuccess) return error;
  int* const ended = reinterpret_cast<int*>(call.facts + 1);
  constexpr int kThreads = 256;
  const int blocks = call.tokens / kThreads + 1;
  subtrees_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const Index*>(call.start), static_cast<const Index*>(call.end),
                                                   static_cast<const Offset*>(call.offsets), call.offset_count,
                                                   call.tokens, call.subtree_end, call.end_bounds, ended, call.facts);
  depths_kernel<<<1, kDepthThreads, 0, stream>>>(ended, call.subtree_end, call.tokens, call.depth, call.depth_bounds,
                                                 call.facts);
  return cudaGetLastError();
}

cudaError_t mask_tables(const MaskTables& call, cudaStream_t stream) {
  const auto with_offset = [&](auto index) {
    using Index = decltype(index);
    return call.wide_offsets ? launch<Index, long long>(call, stream) : launch<Index, int>(call, stream);
  };
  return call.wide_indices ? with_offset(0ll) : with_offset(0);
}

}  // namespace tree_attn
