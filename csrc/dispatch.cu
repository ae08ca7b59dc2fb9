// Picks the kernels of a call: the path for the device, the compiled class for the head dimensions.
#include "params.h"

#include <algorithm>

#include "hopper/instances.h"
#include "hopper/rows.h"
#include "portable/backward_plan.cuh"
#include "portable/instances.h"

namespace tree_attn {
namespace {

// NAME(sizes, run) calls run(dim, value_dim), as integral constants, with the smallest class of a list that holds the
// dimensions; where none does it returns the default, such as false.
#define TREE_ATTN_TRY(D, DV)                \
  if (s.head_dim <= D && s.value_dim <= DV) \
    return run(std::integral_constant<int, D>{}, std::integral_constant<int, DV>{});
#define TREE_ATTN_WITH(NAME, CLASSES)                                                                        \
  template <typename Run>                                                                                    \
  auto NAME(const Sizes& s, Run run) {                                                                       \
    CLASSES(TREE_ATTN_TRY)                                                                                   \
    return decltype(run(std::integral_constant<int, 64>{}, std::integral_constant<int, 64>{})){};            \
  }
TREE_ATTN_WITH(with_class, TREE_ATTN_CLASSES)
TREE_ATTN_WITH(with_hopper_forward, TREE_ATTN_HOPPER_FORWARD_CLASSES)
TREE_ATTN_WITH(with_hopper_backward, TREE_ATTN_HOPPER_BACKWARD_CLASSES)
#undef TREE_ATTN_WITH
#undef TREE_ATTN_TRY

// Does the library hold the Hopper forward, and the device run it? A tile holds whole tokens, so a group has at most 128
// heads; a scale that is not positive is left to the portable kernels.
bool on_hopper(const Sizes& s, float scale, float softcap, const Config& config) {
#if TREE_ATTN_HOPPER
  int device = 0, major = 0, minor = 0;
  if (config.path == Path::kPortable || s.heads / s.kv_heads > 128 || !(scale > 0.f || softcap != 0.f)) return false;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return false;
  return major == 9 && minor == 0 && with_hopper_forward(s, [](auto, auto) { return true; });
#else
  return false;
#endif
}

// The Hopper backward as well? It has fewer classes.
bool on_hopper_backward(const Sizes& s, float scale, float softcap, const Config& config) {
#if TREE_ATTN_HOPPER
  const int group = s.heads / s.kv_heads;
  return group <= hopper::kMaxGroup && int64_t{s.rows} * group < int64_t{1} << 30 &&
         with_hopper_backward(s, [](auto, auto) { return true; }) && on_hopper(s, scale, softcap, config);
#else
  return false;
#endif
}

#if TREE_ATTN_HOPPER
// TMA describes no tensor that repeats rows (a stride of 0, from expand()).
template <typename... Tensors>
bool repeats_rows(const Tensors&... tensors) {
  return ((tensors.token_stride <= 0 || tensors.head_stride <= 0) || ...);
}
#endif

bool supported(const Sizes& s) {
  return s.head_dim >= 8 && s.head_dim <= 256 && s.head_dim % 8 == 0 && s.value_dim >= 8 && s.value_dim <= 256 &&
         s.value_dim % 8 == 0 && s.kv_heads > 0 && s.heads % s.kv_heads == 0 && s.rows > 0 && s.keys > 0 &&
         int64_t{s.rows} * (s.heads / s.kv_heads) < (int64_t{1} << 31) - 128;
}

// Bytes of shared memory a block may use: the device's limit, or a lower one that a test forces.
cudaError_t shared_memory_limit(const Config& config, int* bytes) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (config.max_smem > 0) *bytes = std::min(*bytes, config.max_smem);
  return error;
}

template <typename T>
cudaError_t portable_backward(const Backward& call, int max_smem, cudaStream_t stream) {
  return with_class(call.sizes, [&](auto dim, auto value_dim) {
    const cudaError_t error = portable::launch_backward<T, dim(), value_dim()>(call, max_smem, stream);
    if (error != cudaSuccess || !call.deterministic) return error;
    return portable::launch_backward_dq<T, dim(), value_dim()>(call, stream);
  });
}

}  // namespace

cudaError_t forward(const Forward& call, const Config& config, cudaStream_t stream) {
  if (!supported(call.sizes)) return cudaErrorInvalidValue;
#if TREE_ATTN_HOPPER
  if (on_hopper(call.sizes, call.scale, call.softcap, config) && !repeats_rows(call.q, call.k, call.v)) {
    return with_hopper_forward(call.sizes, [&](auto dim, auto value_dim) {
      return call.dtype == DType::kFloat16 ? hopper::launch_forward<__half, dim(), value_dim()>(call, stream)
                                           : hopper::launch_forward<__nv_bfloat16, dim(), value_dim()>(call, stream);
    });
  }
#endif
  return with_class(call.sizes, [&](auto dim, auto value_dim) {
    return call.dtype == DType::kFloat16 ? portable::launch_forward<__half, dim(), value_dim()>(call, stream)
                                         : portable::launch_forward<__nv_bfloat16, dim(), value_dim()>(call, stream);
  });
}

cudaError_t backward(const Backward& call, const Config& config, cudaStream_t stream) {
  if (!supported(call.sizes)) return cudaErrorInvalidValue;
#if TREE_ATTN_HOPPER
  if (on_hopper_backward(call.sizes, call.scale, call.softcap, config) &&
      !repeats_rows(call.q, call.k, call.v, call.grad_out)) {
    return with_hopper_backward(call.sizes, [&](auto dim, auto value_dim) {
      return call.dtype == DType::kFloat16 ? hopper::launch_backward<__half, dim(), value_dim()>(call, stream)
                                           : hopper::launch_backward<__nv_bfloat16, dim(), value_dim()>(call, stream);
    });
  }
#endif
  int max_smem = 0;
  const cudaError_t error = shared_memory_limit(config, &max_smem);
  if (error != cudaSuccess) return error;
  return call.dtype == DType::kFloat16 ? portable_backward<__half>(call, max_smem, stream)
                                       : portable_backward<__nv_bfloat16>(call, max_smem, stream);
}

int64_t backward_workspace(const Sizes& sizes, bool deterministic, const Config& config) {
  if (!supported(sizes)) return 0;
  const int64_t portable_bytes = with_class(sizes, [&](auto dim, auto value_dim) {
    return portable::Workspace(nullptr, sizes, portable::PackedRows(sizes).count, deterministic, dim(), value_dim(),
                               portable::smallest_keys(dim()), false).bytes;
  });
#if TREE_ATTN_HOPPER
  if (on_hopper_backward(sizes, 1.f, 0.f, config)) {
    return std::max(portable_bytes, with_hopper_backward(sizes, [&](auto dim, auto value_dim) {
      const hopper::TiledRows rows(sizes, hopper::row_tile(dim()));
      return portable::Workspace(nullptr, sizes, rows.count, false, dim(), value_dim(), portable::smallest_keys(dim()),
                                 deterministic).bytes;
    }));
  }
#endif
  return portable_bytes;
}

const char* path_name(const Sizes& sizes, const Config& config) {
  if (!on_hopper(sizes, 1.f, 0.f, config)) return "portable";
  return on_hopper_backward(sizes, 1.f, 0.f, config) ? "hopper" : "hopper forward and portable backward";
}

}  // namespace tree_attn
