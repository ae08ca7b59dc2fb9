// One instance of the Hopper forward; the build compiles this file once for every (dtype, head dim, value dim).
#include <algorithm>

#include "forward.cuh"
#include "instances.h"

namespace tree_attn::hopper {
namespace {

// A (tokens, heads, dim) tensor for TMA: boxes of 64 columns, `heads` heads, `tokens` tokens, rows swizzled by 128 bytes.
template <typename T>
bool make_map(CUtensorMap* map, const Tensor3& x, int tokens, int heads, int dim, int box_heads, int box_tokens) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[3] = {cuuint64_t(dim), cuuint64_t(heads), cuuint64_t(tokens)};
  const cuuint64_t strides[2] = {cuuint64_t(x.head_stride) * 2, cuuint64_t(x.token_stride) * 2};  // bytes
  const cuuint32_t box[3] = {64, cuuint32_t(box_heads), cuuint32_t(box_tokens)}, steps[3] = {1, 1, 1};
  constexpr auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(map, type, 3, x.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

template <typename T, int kDim, int kValueDim>
cudaError_t launch_forward(const Forward& call, cudaStream_t stream) {
  using Tiles = ForwardTiles<T, kDim, kValueDim, 128>;
  const Sizes& s = call.sizes;
  const int group = s.heads / s.kv_heads, tile_tokens = std::min(Tiles::kRows / group, s.rows);
  const int row_tiles = (s.rows + tile_tokens - 1) / tile_tokens;
  const ForwardArguments args{call,         FastDivisor(group),     tile_tokens,
                              row_tiles,    row_tiles * s.kv_heads, call.scratch,
                              Scaling(call.scale, call.softcap)};

  CUtensorMap q_map, k_map, v_map;
  if (!make_map<T>(&q_map, call.q, s.rows, s.heads, s.head_dim, group, tile_tokens) ||
      !make_map<T>(&k_map, call.k, s.keys, s.kv_heads, s.head_dim, 1, Tiles::kKeys) ||
      !make_map<T>(&v_map, call.v, s.keys, s.kv_heads, s.value_dim, 1, Tiles::kKeys))
    return cudaErrorInvalidValue;

  auto* kernel = forward_kernel<Tiles>;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tiles::kSmem);
  if (error == cudaSuccess) error = cudaMemsetAsync(call.scratch, 0, sizeof(int), stream);
  if (error != cudaSuccess) return error;
  kernel<<<std::min(processors, args.items), Tiles::kThreads, Tiles::kSmem, stream>>>(args, q_map, k_map, v_map);
  return cudaGetLastError();
}

template cudaError_t launch_forward<TA_ELEMENT, TA_HEAD_DIM, TA_VALUE_DIM>(const Forward&, cudaStream_t);

}  // namespace tree_attn::hopper
