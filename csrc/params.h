// What the host passes to the kernels: pointers, strides and sizes of one attention call, and the functions that run it.
// Plain data, no torch: ops.cpp fills it from tensors, dispatch.cpp picks the kernels.
#pragma once

#include <cstdint>
#include <cuda_runtime_api.h>

namespace tree_attn {

enum class DType : int { kFloat16 = 0, kBFloat16 = 1 };

// A (tokens, heads, dim) tensor; strides in elements, the last dimension contiguous, every row 16-byte aligned.
struct Tensor3 {
  void* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

// The rectangular mask: key k is seen by rows [row_begin[k], row_end[k]); bounds are (min, max) of each 32 entries.
struct Mask {
  const int* row_begin = nullptr;      // (keys), or null for row_begin[k] = k
  const int* row_end = nullptr;        // (keys)
  const int* q_depth = nullptr;        // (rows), read with a window only
  const int* k_depth = nullptr;        // (keys), likewise
  const int2* begin_bounds = nullptr;  // null with row_begin
  const int2* end_bounds = nullptr;
  const int2* q_depth_bounds = nullptr;
  const int2* k_depth_bounds = nullptr;
  int window = 0;  // 0: none
};

struct Sizes {
  int rows = 0;  // query tokens
  int keys = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;   // a multiple of 8, at most 256
  int value_dim = 0;  // likewise
};

struct Forward {
  Tensor3 q, k, v, out;
  float* lse = nullptr;          // (heads, rows), natural logarithm, without the sink
  int* scratch = nullptr;        // one int, uninitialised: the counter of a schedule
  const float* sinks = nullptr;  // (heads) or null
  Mask mask;
  Sizes sizes;
  DType dtype = DType::kBFloat16;
  float scale = 1.f;
  float softcap = 0.f;  // 0: none
};

struct Backward {
  Tensor3 q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  const float* lse = nullptr;
  const float* grad_lse = nullptr;  // (heads, rows) or null
  const float* sinks = nullptr;
  float* delta = nullptr;           // (heads, rows) out: rowsum(grad_out * out), what the gradient of the sinks is made of
  void* workspace = nullptr;        // backward_workspace() bytes, 256-byte aligned, uninitialised
  Mask mask;
  Sizes sizes;
  DType dtype = DType::kBFloat16;
  float scale = 1.f;
  float softcap = 0.f;
  bool deterministic = false;
};

// The mask of depth-first index arrays. Arrays of `tokens` entries; int64 where wide, else int32.
struct MaskFacts {
  long long excess;  // 0 if the subtrees nest
  int wrong;         // 1 if an array or the offsets break a rule of their own
  int unused;
};
struct MaskTables {
  const void* start = nullptr;
  const void* end = nullptr;
  const void* offsets = nullptr;  // of sequences, or null
  int offset_count = 0;
  int tokens = 0;  // at least 1
  bool wide_indices = false, wide_offsets = false;
  int* subtree_end = nullptr;  // out, as all that follow
  int* depth = nullptr;
  int2* end_bounds = nullptr;
  int2* depth_bounds = nullptr;
  MaskFacts* facts = nullptr;  // followed by tokens + 1 ints of scratch
};

// Which kernels: the best for the device, or one path forced. `max_smem` (bytes a block may use, 0 for what the device
// allows) lets tests run the tiles of a smaller GPU.
enum class Path : int { kAuto = 0, kPortable = 1, kHopper = 2 };

struct Config {
  Path path = Path::kAuto;
  int max_smem = 0;
};

// All run on the current device and `stream`, allocate nothing and never synchronise. They return the first CUDA error.
cudaError_t forward(const Forward& call, const Config& config, cudaStream_t stream);
cudaError_t backward(const Backward& call, const Config& config, cudaStream_t stream);
cudaError_t mask_tables(const MaskTables& call, cudaStream_t stream);
int64_t backward_workspace(const Sizes& sizes, bool deterministic, const Config& config);

// "hopper", "portable" or "hopper forward and portable backward": what runs for these sizes on the current device.
const char* path_name(const Sizes& sizes, const Config& config);

}  // namespace tree_attn
