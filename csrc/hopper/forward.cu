// One instance of the Hopper forward; the build compiles this file once for every (dtype, head dim, value dim).
#include <algorithm>

#include "../shared_memory.h"
#include "forward.cuh"
#include "instances.h"
#include "maps.h"

namespace tree_attn::hopper {

struct ForwardShape {
  int keys, q_buffers, consumers;
};
// The most keys that leave two stages of K and V in shared memory and spill no registers, and a second buffer of Q where it
// fits beside them. At head dim 64 exponentials take as long as products, which two consumers cannot overlap perfectly:
// there are three, and the 160 registers that are left for each hold the scores, probabilities and sums of 128 keys.
constexpr ForwardShape forward_shape(int dim, int value_dim) {
  return dim <= 64          ? ForwardShape{128, 2, 3}
         : dim <= 128       ? ForwardShape{160, 2, 2}
         : value_dim <= 128 ? ForwardShape{128, 1, 2}
         : dim <= 192       ? ForwardShape{96, 1, 2}
                            : ForwardShape{64, 1, 2};
}

// How many key/value heads take turns, a divisor of their number: as many as have their K and V in a third of L2. One at a
// time, short sequences would end with the longest row tiles of the last head, begun when other blocks have nothing left.
inline int section_heads(const Sizes& s) {
  constexpr int64_t kBytes = 16 << 20;
  int heads = s.kv_heads;
  while (s.kv_heads % heads || (heads > 1 && heads * 2ll * s.keys * (s.head_dim + s.value_dim) > kBytes)) --heads;
  return heads;
}

template <typename T, int kDim, int kValueDim>
cudaError_t launch_forward(const Forward& call, cudaStream_t stream) {
  constexpr ForwardShape kShape = forward_shape(kDim, kValueDim);
  using Tiles = ForwardTiles<T, kDim, kValueDim, kShape.keys, kShape.q_buffers, kShape.consumers>;
  const Sizes& s = call.sizes;
  const int group = s.heads / s.kv_heads, tile_tokens = std::min(Tiles::kRows / group, s.rows);
  const int row_tiles = (s.rows + tile_tokens - 1) / tile_tokens, heads = section_heads(s);
  const Scaling scaling(call.scale, call.softcap);
  const ForwardArguments args{call, FastDivisor(group), tile_tokens, row_tiles, FastDivisor(heads),
                              FastDivisor(row_tiles * heads), row_tiles * s.kv_heads, call.scratch, scaling,
                              8.f / scaling.log2_scale};

  ForwardMaps maps;
  if (!make_map<T>(&maps.q, call.q, s.rows, s.heads, s.head_dim, group, tile_tokens) ||
      !make_map<T>(&maps.k, call.k, s.keys, s.kv_heads, s.head_dim, 1, Tiles::kBlock) ||
      !make_map<T>(&maps.v, call.v, s.keys, s.kv_heads, s.value_dim, 1, Tiles::kBlock) ||
      !make_map<T>(&maps.k_tile, call.k, s.keys, s.kv_heads, s.head_dim, 1, Tiles::kKeys) ||
      !make_map<T>(&maps.v_tile, call.v, s.keys, s.kv_heads, s.value_dim, 1, Tiles::kKeys))
    return cudaErrorInvalidValue;

  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = allow_shared_memory<forward_kernel<Tiles>>(Tiles::kSmem);
  if (error == cudaSuccess && args.items > processors) error = cudaMemsetAsync(call.scratch, 0, sizeof(int), stream);
  if (error != cudaSuccess) return error;
  forward_kernel<Tiles>
      <<<std::min(processors, args.items), Tiles::kThreads, Tiles::kSmem, stream>>>(args, maps);
  return cudaGetLastError();
}

template cudaError_t launch_forward<TA_ELEMENT, TA_HEAD_DIM, TA_VALUE_DIM>(const Forward&, cudaStream_t);

}  // namespace tree_attn::hopper
