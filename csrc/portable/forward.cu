// One instance of the forward kernel; the build compiles this file once for every (dtype, head dim, value dim).
#include "forward.cuh"
#include "instances.h"

namespace tree_attn::portable {
template cudaError_t launch_forward<TA_ELEMENT, TA_HEAD_DIM, TA_VALUE_DIM>(const Forward&, cudaStream_t);
}
