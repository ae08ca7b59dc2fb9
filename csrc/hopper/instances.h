// What the build compiles for sm_90a: TA_DTYPE, TA_HEAD_DIM and TA_VALUE_DIM come from its tables (the classes below).
#pragma once

#include "../params.h"
#include "../portable/instances.h"

// X(head dim, value dim): the compiled classes, smallest first; a call takes the first that holds it.
#define TREE_ATTN_HOPPER_FORWARD_CLASSES(X) X(64, 64) X(96, 96) X(128, 128) X(192, 128) X(192, 192) X(256, 256)
#define TREE_ATTN_HOPPER_BACKWARD_CLASSES(X) X(64, 64) X(128, 128) X(192, 128) X(192, 192) X(256, 256)

namespace tree_attn::hopper {

template <typename T, int kDim, int kValueDim>
cudaError_t launch_forward(const Forward& call, cudaStream_t stream);

template <typename T, int kDim, int kValueDim>
cudaError_t launch_backward(const Backward& call, cudaStream_t stream);

}  // namespace tree_attn::hopper
