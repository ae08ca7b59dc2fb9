// What the build compiles: TA_DTYPE, TA_HEAD_DIM and TA_VALUE_DIM come from its table (the classes below).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../params.h"

#ifdef TA_DTYPE
#if TA_DTYPE == 0
#define TA_ELEMENT __half
#else
#define TA_ELEMENT __nv_bfloat16
#endif
#endif

// X(head dim, value dim): the compiled classes, smallest first; a call takes the first that holds it.
#define TREE_ATTN_CLASSES(X) X(32, 32) X(64, 64) X(96, 96) X(128, 128) X(192, 128) X(192, 192) X(256, 256)

namespace tree_attn::portable {

template <typename T, int kDim, int kValueDim>
cudaError_t launch_forward(const Forward& call, cudaStream_t stream);

// `max_smem`: bytes of shared memory a block may use.
template <typename T, int kDim, int kValueDim>
cudaError_t launch_backward(const Backward& call, int max_smem, cudaStream_t stream);

// The gradient of q in a pass of its own, for deterministic results.
template <typename T, int kDim, int kValueDim>
cudaError_t launch_backward_dq(const Backward& call, cudaStream_t stream);

}  // namespace tree_attn::portable
