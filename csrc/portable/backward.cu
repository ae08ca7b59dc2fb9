// One instance of the backward kernels; the build compiles this file once for every (dtype, head dim, value dim).
#include "backward.cuh"
#include "instances.h"

namespace tree_attn::portable {

template <typename T, int kDim, int kValueDim>
cudaError_t launch_backward(const Backward& call, int max_smem, cudaStream_t stream) {
  // The largest tiles that fit the shared memory of a block: 227 KB on 9.0, 163 KB on 8.0, 99 KB on 8.6 and 8.9.
  if constexpr (kDim <= 64) {
    return launch_backward_tiles<BackwardTiles<T, kDim, kValueDim, 128, 64, 2>>(call, stream);
  } else if constexpr (kDim <= 128) {
    using Large = BackwardTiles<T, kDim, kValueDim, 128, 64, 2>;
    using Small = BackwardTiles<T, kDim, kValueDim, 64, 32, 2>;
    return Large::kSmem <= max_smem ? launch_backward_tiles<Large>(call, stream)
                                    : launch_backward_tiles<Small>(call, stream);
  } else {
    using Large = BackwardTiles<T, kDim, kValueDim, 64, 64, kDim == 192 ? 2 : 1>;
    using Small = BackwardTiles<T, kDim, kValueDim, kDim == 192 ? 64 : 32, 32, 1>;
    static_assert(Small::kSmem <= 99 * 1024);
    return Large::kSmem <= max_smem ? launch_backward_tiles<Large>(call, stream)
                                    : launch_backward_tiles<Small>(call, stream);
  }
}

template cudaError_t launch_backward<TA_ELEMENT, TA_HEAD_DIM, TA_VALUE_DIM>(const Backward&, int, cudaStream_t);

}  // namespace tree_attn::portable
