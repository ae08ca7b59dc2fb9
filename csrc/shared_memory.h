// Asks once, for every kernel and device, for more shared memory than 48 KB: the question itself costs microseconds.
#pragma once

#include <atomic>
#include <cstdint>

#include <cuda_runtime.h>

namespace tree_attn {

// Lets blocks of kKernel have `bytes` of dynamic shared memory on the current device; `bytes` never varies for a kernel.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> allowed{0};  // one bit a device; a device past the 64th is asked every time
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

}  // namespace tree_attn
