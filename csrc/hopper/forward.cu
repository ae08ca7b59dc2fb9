// One instance of the Hopper forward; the build compiles this file once for every (dtype, head dim, value dim).
#include <algorithm>

#include "forward.cuh"
#include "instances.h"
#include "maps.h"

namespace tree_attn::hopper {
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
      !make_map<T>(&k_map, call.k, s.keys, s.kv_heads, s.head_dim, 1, Tiles::kBlockKeys) ||
      !make_map<T>(&v_map, call.v, s.keys, s.kv_heads, s.value_dim, 1, Tiles::kBlockKeys))
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
