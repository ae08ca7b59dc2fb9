// One instance of the dQ pass; the build compiles this file once for every (dtype, head dim, value dim).
#include "backward_dq.cuh"
#include "instances.h"

namespace tree_attn::portable {
template cudaError_t launch_backward_dq<TA_ELEMENT, TA_HEAD_DIM, TA_VALUE_DIM>(const Backward&, cudaStream_t);
}
