// Whether this library holds code that the current device can run.
#pragma once

#include <cuda_runtime_api.h>

namespace tree_attn {

// cudaSuccess, or the error a launch would meet. Compiled for the same architectures as the portable kernels.
cudaError_t probe();

}  // namespace tree_attn
