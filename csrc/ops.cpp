// The library's face to PyTorch: operators registered against the stable ABI of torch 2.9, and a few C functions that
// Python calls through ctypes for what has no tensor argument. Checks what it is given and fills params.h from it.
//
// Nothing here depends on the version of Python or of torch (2.9 and newer), nor on the CUDA runtime that torch brings:
// the runtime is linked in, so the driver alone decides what runs.

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "build_info.h"  // written by build.py
#include "params.h"
#include "probe.h"

#ifndef TREE_ATTN_OP_NAMESPACE
#define TREE_ATTN_OP_NAMESPACE tree_attn_cuda
#endif
#define TREE_ATTN_EXPORT extern "C" __attribute__((visibility("default")))

// In torch's libtorch_cuda alone: weak, so that the library loads where torch has no CUDA. The loader refuses a library
// that found no such function under a torch with CUDA, because without it every launch would go to the wrong stream.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                  void** ret_stream);

namespace tree_attn {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// -- checks ---------------------------------------------------------------------------------------------------------
// Python has validated what users pass; these stop a direct caller of the operators from reading out of bounds.

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("tree_attn kernels: " + what); }

std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

void check_place(const char* name, const Tensor& t, int32_t dtype, int32_t device) {
  if (!t.is_cuda() || t.get_device_index() != device) {
    fail(std::string(name) + " is not on cuda:" + std::to_string(device) + ", where q is; put all tensors on one GPU");
  }
  if (dtype_of(t) != dtype) fail(std::string(name) + " has the wrong dtype");
}

// A (tokens, heads, dim) tensor whose rows the kernels can read in 16-byte pieces.
Tensor3 tensor3(const char* name, const Tensor& t, int64_t tokens, int64_t heads, int64_t dim, int32_t dtype,
                int32_t device) {
  check_place(name, t, dtype, device);
  if (t.dim() != 3 || t.size(0) != tokens || t.size(1) != heads || t.size(2) != dim) {
    fail(std::string(name) + " has shape " + shape_of(t) + ", expected (" + std::to_string(tokens) + ", " +
         std::to_string(heads) + ", " + std::to_string(dim) + ")");
  }
  const Tensor3 view{t.data_ptr(), t.stride(0), t.stride(1)};
  if (t.stride(2) != 1 || view.token_stride % 8 || view.head_stride % 8 ||
      reinterpret_cast<uintptr_t>(view.data) % 16) {
    fail(std::string(name) + " needs a contiguous last dimension, strides that are multiples of 8 elements and a "
         "16-byte aligned pointer; pass a contiguous copy");
  }
  return view;
}

// A contiguous array of `numel` entries.
template <typename T>
T* array(const char* name, const Tensor& t, int64_t numel, int32_t dtype, int32_t device) {
  check_place(name, t, dtype, device);
  if (t.numel() != numel || !t.is_contiguous()) {
    fail(std::string(name) + " has shape " + shape_of(t) + ", expected " + std::to_string(numel) +
         " contiguous entries");
  }
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
T* array(const char* name, const OptionalTensor& t, int64_t numel, int32_t dtype, int32_t device) {
  return t ? array<T>(name, *t, numel, dtype, device) : nullptr;
}

int narrow(const char* name, int64_t value) {
  if (value < 0 || value > INT32_MAX) fail(std::string(name) + " is " + std::to_string(value) + ", out of range");
  return static_cast<int>(value);
}

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear it, so that the next CUDA call of the process does not report it again
  fail(std::string(what) + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

int32_t device_of(const char* name, const Tensor& t) {
  if (!t.is_cuda()) fail(std::string(name) + " is not on a GPU");
  return t.get_device_index();
}

// Torch's current stream on the device, which is made the current one of this library's runtime: that follows torch's
// only by way of the driver.
cudaStream_t current_stream(int32_t device) {
  check_cuda(cudaSetDevice(device), "selecting the device");
  if (aoti_torch_get_current_cuda_stream == nullptr) fail("this torch has no CUDA stream to run on");
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  return static_cast<cudaStream_t>(current);
}

// A new contiguous tensor, its memory from torch's allocator; here and not in Python, where each costs a microsecond more.
template <size_t kDims>
Tensor empty(const std::array<int64_t, kDims>& sizes, int32_t dtype, int32_t device) {
  std::array<int64_t, kDims> strides;
  int64_t stride = 1;
  for (size_t i = kDims; i-- > 0; stride *= sizes[i]) strides[i] = stride;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(kDims, sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

// -- one call -------------------------------------------------------------------------------------------------------

// The mask tensors of one call, in the order of the schema. Depths are given for windows alone.
struct MaskTensors {
  const OptionalTensor& row_begin;
  const Tensor& row_end;
  const OptionalTensor& q_depth;
  const OptionalTensor& k_depth;
  const OptionalTensor& begin_bounds;
  const Tensor& end_bounds;
  const OptionalTensor& q_depth_bounds;
  const OptionalTensor& k_depth_bounds;
};

// What forward and backward share: sizes, dtype, options, device and stream.
struct Call {
  torch::stable::accelerator::DeviceGuard guard;
  int32_t device;
  int32_t dtype;
  Sizes sizes;
  Mask mask;
  Config config;
  cudaStream_t stream;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const MaskTensors& m, int64_t window, int64_t path,
       int64_t max_smem)
      : guard(device_of("q", q)), device(device_of("q", q)), dtype(dtype_of(q)) {
    if (q.dim() != 3 || k.dim() != 3 || v.dim() != 3) fail("q, k and v are (tokens, heads, dim) tensors");
    sizes = {narrow("rows", q.size(0)),      narrow("keys", k.size(0)),       narrow("heads", q.size(1)),
             narrow("kv_heads", k.size(1)), narrow("head_dim", q.size(2)), narrow("value_dim", v.size(2))};
    if (sizes.rows == 0 || sizes.keys == 0) fail("no rows or no keys; the caller handles empty inputs");
    if (sizes.kv_heads == 0 || sizes.heads == 0 || sizes.heads % sizes.kv_heads) {
      fail("heads (" + std::to_string(sizes.heads) + ") is no positive multiple of kv_heads (" +
           std::to_string(sizes.kv_heads) + ")");
    }
    for (const int dim : {sizes.head_dim, sizes.value_dim}) {
      if (dim < 8 || dim > 256 || dim % 8) fail("head dim " + std::to_string(dim) + " is no multiple of 8 up to 256");
    }
    if (dtype != aoti_torch_dtype_float16() && dtype != aoti_torch_dtype_bfloat16()) {
      fail("q is neither float16 nor bfloat16");
    }
    fill_mask(m, window);
    config = {static_cast<Path>(path), narrow("max_smem", max_smem)};
    if (path < 0 || path > 2) fail("path is " + std::to_string(path) + ", expected 0 (auto), 1 (portable), 2 (hopper)");
    stream = current_stream(device);
  }

  DType kernel_dtype() const { return dtype == aoti_torch_dtype_float16() ? DType::kFloat16 : DType::kBFloat16; }

  // Views of tensors with as many tokens and heads as q, or as k.
  Tensor3 rows(const char* name, const Tensor& t, int dim) const {
    return tensor3(name, t, sizes.rows, sizes.heads, dim, dtype, device);
  }
  Tensor3 keys(const char* name, const Tensor& t, int dim) const {
    return tensor3(name, t, sizes.keys, sizes.kv_heads, dim, dtype, device);
  }
  // New ones, contiguous.
  Tensor new_rows(int dim) const { return empty<3>({sizes.rows, sizes.heads, dim}, dtype, device); }
  Tensor new_keys(int dim) const { return empty<3>({sizes.keys, sizes.kv_heads, dim}, dtype, device); }
  Tensor new_per_row() const { return empty<2>({sizes.heads, sizes.rows}, aoti_torch_dtype_float32(), device); }
  // A float32 (heads, rows) array.
  template <typename T>
  float* per_row(const char* name, const T& t) const {
    return array<float>(name, t, int64_t{sizes.heads} * sizes.rows, aoti_torch_dtype_float32(), device);
  }
  const float* per_head(const char* name, const OptionalTensor& t) const {
    return array<float>(name, t, sizes.heads, aoti_torch_dtype_float32(), device);
  }

 private:
  void fill_mask(const MaskTensors& m, int64_t window) {
    const int32_t i32 = aoti_torch_dtype_int32();
    const auto bounds = [&](const char* name, const auto& t, int n) {
      return reinterpret_cast<const int2*>(array<int>(name, t, 2 * ((int64_t{n} + 31) / 32), i32, device));
    };
    if (m.row_begin.has_value() != m.begin_bounds.has_value()) fail("row_begin and begin_bounds come together");
    mask.window = narrow("window", window);
    if (mask.window && !(m.q_depth && m.k_depth && m.q_depth_bounds && m.k_depth_bounds)) {
      fail("a window needs the depths and their bounds");
    }
    mask.row_begin = array<int>("row_begin", m.row_begin, sizes.keys, i32, device);
    mask.row_end = array<int>("row_end", m.row_end, sizes.keys, i32, device);
    mask.q_depth = array<int>("q_depth", m.q_depth, sizes.rows, i32, device);
    mask.k_depth = array<int>("k_depth", m.k_depth, sizes.keys, i32, device);
    mask.begin_bounds = bounds("begin_bounds", m.begin_bounds, sizes.keys);
    mask.end_bounds = bounds("end_bounds", m.end_bounds, sizes.keys);
    mask.q_depth_bounds = bounds("q_depth_bounds", m.q_depth_bounds, sizes.rows);
    mask.k_depth_bounds = bounds("k_depth_bounds", m.k_depth_bounds, sizes.keys);
    for (const int2* table : {mask.begin_bounds, mask.end_bounds, mask.q_depth_bounds, mask.k_depth_bounds}) {
      if (reinterpret_cast<uintptr_t>(table) % sizeof(int2)) fail("the bounds are not 8-byte aligned");
    }
  }
};

// -- operators ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> forward_op(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& sinks,
                                      const OptionalTensor& row_begin, const Tensor& row_end,
                                      const OptionalTensor& q_depth, const OptionalTensor& k_depth,
                                      const OptionalTensor& begin_bounds, const Tensor& end_bounds,
                                      const OptionalTensor& q_depth_bounds, const OptionalTensor& k_depth_bounds,
                                      double scale, double softcap, int64_t window, int64_t path, int64_t max_smem) {
  const MaskTensors tensors{row_begin,    row_end,    q_depth,        k_depth,
                            begin_bounds, end_bounds, q_depth_bounds, k_depth_bounds};
  const Call call(q, k, v, tensors, window, path, max_smem);
  const Tensor out = call.new_rows(call.sizes.value_dim), lse = call.new_per_row();
  const Tensor scratch = empty<1>({1}, aoti_torch_dtype_int32(), call.device);
  Forward f;
  f.q = call.rows("q", q, call.sizes.head_dim);
  f.k = call.keys("k", k, call.sizes.head_dim);
  f.v = call.keys("v", v, call.sizes.value_dim);
  f.out = call.rows("out", out, call.sizes.value_dim);
  f.lse = call.per_row("lse", lse);
  f.scratch = static_cast<int*>(scratch.data_ptr());
  f.sinks = call.per_head("sinks", sinks);
  f.mask = call.mask;
  f.sizes = call.sizes;
  f.dtype = call.kernel_dtype();
  f.scale = static_cast<float>(scale);
  f.softcap = static_cast<float>(softcap);
  check_cuda(forward(f, call.config, call.stream), "the forward kernel");
  return {out, lse};
}

// The gradients of q, k and v, and rowsum(grad_out * out) as (heads, rows).
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptionalTensor& sinks, const Tensor& out, const Tensor& lse, const OptionalTensor& row_begin,
    const Tensor& row_end, const OptionalTensor& q_depth, const OptionalTensor& k_depth,
    const OptionalTensor& begin_bounds, const Tensor& end_bounds, const OptionalTensor& q_depth_bounds,
    const OptionalTensor& k_depth_bounds, double scale, double softcap, int64_t window, int64_t path, int64_t max_smem,
    bool deterministic) {
  const MaskTensors tensors{row_begin,    row_end,    q_depth,        k_depth,
                            begin_bounds, end_bounds, q_depth_bounds, k_depth_bounds};
  const Call call(q, k, v, tensors, window, path, max_smem);
  const Tensor grad_q = call.new_rows(call.sizes.head_dim), grad_k = call.new_keys(call.sizes.head_dim);
  const Tensor grad_v = call.new_keys(call.sizes.value_dim), delta = call.new_per_row();
  const Tensor workspace = empty<1>({backward_workspace(call.sizes, deterministic, call.config)},
                                    aoti_torch_dtype_uint8(), call.device);
  Backward b;
  b.q = call.rows("q", q, call.sizes.head_dim);
  b.k = call.keys("k", k, call.sizes.head_dim);
  b.v = call.keys("v", v, call.sizes.value_dim);
  b.out = call.rows("out", out, call.sizes.value_dim);
  b.grad_out = call.rows("grad_out", grad_out, call.sizes.value_dim);
  b.grad_q = call.rows("grad_q", grad_q, call.sizes.head_dim);
  b.grad_k = call.keys("grad_k", grad_k, call.sizes.head_dim);
  b.grad_v = call.keys("grad_v", grad_v, call.sizes.value_dim);
  b.lse = call.per_row("lse", lse);
  b.grad_lse = call.per_row("grad_lse", grad_lse);
  b.delta = call.per_row("delta", delta);
  b.sinks = call.per_head("sinks", sinks);
  b.mask = call.mask;
  b.sizes = call.sizes;
  b.dtype = call.kernel_dtype();
  b.scale = static_cast<float>(scale);
  b.softcap = static_cast<float>(softcap);
  b.deterministic = deterministic;
  b.workspace = workspace.data_ptr();
  if (reinterpret_cast<uintptr_t>(b.workspace) % 256) fail("the allocator's memory is not 256-byte aligned");
  check_cuda(backward(b, call.config, call.stream), "the backward kernels");
  return {grad_q, grad_k, grad_v, delta};
}

// An array of int32 or int64; says which.
const void* integers(const char* name, const Tensor& t, int64_t numel, int32_t device, bool* wide) {
  *wide = dtype_of(t) == aoti_torch_dtype_int64();
  return *wide ? static_cast<const void*>(array<int64_t>(name, t, numel, aoti_torch_dtype_int64(), device))
               : array<int>(name, t, numel, aoti_torch_dtype_int32(), device);
}

void mask_from_dfs_op(const Tensor& start, const Tensor& end, const OptionalTensor& offsets, const Tensor& subtree_end,
                      const Tensor& depth, const Tensor& end_bounds, const Tensor& depth_bounds,
                      const Tensor& scratch) {
  const int32_t device = device_of("start", start), i32 = aoti_torch_dtype_int32();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int tokens = narrow("tokens", start.numel());
  if (tokens == 0) fail("no tokens; the caller handles empty inputs");
  const int64_t granules = 2 * ((int64_t{tokens} + 31) / 32);
  MaskTables m;
  m.tokens = tokens;
  m.start = integers("start", start, tokens, device, &m.wide_indices);
  bool wide_end;
  m.end = integers("end", end, tokens, device, &wide_end);
  if (wide_end != m.wide_indices) fail("start and end differ in dtype");
  if (offsets) {
    m.offset_count = narrow("offsets", offsets->numel());
    m.offsets = integers("offsets", *offsets, m.offset_count, device, &m.wide_offsets);
  }
  m.subtree_end = array<int>("subtree_end", subtree_end, tokens, i32, device);
  m.depth = array<int>("depth", depth, tokens, i32, device);
  m.end_bounds = reinterpret_cast<int2*>(array<int>("end_bounds", end_bounds, granules, i32, device));
  m.depth_bounds = reinterpret_cast<int2*>(array<int>("depth_bounds", depth_bounds, granules, i32, device));
  const int64_t ints = sizeof(MaskFacts) / sizeof(int) + int64_t{tokens} + 1;
  m.facts = reinterpret_cast<MaskFacts*>(array<int>("scratch", scratch, ints, i32, device));
  for (const void* p : {static_cast<const void*>(m.end_bounds), static_cast<const void*>(m.depth_bounds),
                        static_cast<const void*>(m.facts)}) {
    if (reinterpret_cast<uintptr_t>(p) % 8) fail("the bounds and scratch are not 8-byte aligned");
  }
  check_cuda(mask_tables(m, current_stream(device)), "the mask's kernels");
}

#define TREE_ATTN_MASK_SCHEMA                                                                          \
  "Tensor? row_begin, Tensor row_end, Tensor? q_depth, Tensor? k_depth, Tensor? begin_bounds, "        \
  "Tensor end_bounds, Tensor? q_depth_bounds, Tensor? k_depth_bounds, float scale, float softcap, "    \
  "int window, int path, int max_smem"

// The registration macros paste the namespace's name, so it is expanded one level above them.
#define TREE_ATTN_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define TREE_ATTN_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

TREE_ATTN_LIBRARY(TREE_ATTN_OP_NAMESPACE, m) {
  m.def("forward(Tensor q, Tensor k, Tensor v, Tensor? sinks, " TREE_ATTN_MASK_SCHEMA ") -> (Tensor out, Tensor lse)");
  m.def(
      "backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, "
      "Tensor lse, " TREE_ATTN_MASK_SCHEMA
      ", bool deterministic) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor delta)");
  m.def(
      "mask_from_dfs(Tensor start, Tensor end, Tensor? offsets, Tensor(a!) subtree_end, Tensor(b!) depth, "
      "Tensor(c!) end_bounds, Tensor(d!) depth_bounds, Tensor(e!) scratch) -> ()");
}

TREE_ATTN_LIBRARY_IMPL(TREE_ATTN_OP_NAMESPACE, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward_op));
  m.impl("backward", TORCH_BOX(&backward_op));
  m.impl("mask_from_dfs", TORCH_BOX(&mask_from_dfs_op));
}

}  // namespace
}  // namespace tree_attn

// -- for ctypes -----------------------------------------------------------------------------------------------------
// Those that take a device make it the current one; the caller restores its own.

// Can launches reach torch's streams?
TREE_ATTN_EXPORT int tree_attn_has_stream() { return aoti_torch_get_current_cuda_stream != nullptr; }

// JSON: toolkit, archs, commit.
TREE_ATTN_EXPORT const char* tree_attn_build_info() { return TREE_ATTN_BUILD_INFO; }

// What decides whether the kernels can run on a device; tree_attn/_kernels.py makes words of it. CUDA errors are
// cudaError_t, versions 1000 * major + 10 * minor, 0 for no driver.
struct TreeAttnDeviceFacts {
  int driver, runtime;
  int count, count_error;  // of devices
  int major, minor;        // compute capability
  int probe_error;         // of finding code for the device
};

TREE_ATTN_EXPORT void tree_attn_device_facts(int device, TreeAttnDeviceFacts* facts) {
  *facts = {};
  cudaDriverGetVersion(&facts->driver);
  cudaRuntimeGetVersion(&facts->runtime);
  facts->count_error = cudaGetDeviceCount(&facts->count);
  if (facts->count_error == cudaSuccess && device < facts->count) {
    cudaDeviceGetAttribute(&facts->major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&facts->minor, cudaDevAttrComputeCapabilityMinor, device);
    facts->probe_error = cudaSetDevice(device);
    if (facts->probe_error == cudaSuccess) facts->probe_error = tree_attn::probe();
  }
  cudaGetLastError();  // what failed here is told here
}

TREE_ATTN_EXPORT const char* tree_attn_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// The kernels that run these sizes under `path` (0 auto, 1 portable, 2 hopper), as path_name() of params.h.
TREE_ATTN_EXPORT const char* tree_attn_path_name(int device, int heads, int kv_heads, int head_dim, int value_dim,
                                                 int path, int max_smem) {
  cudaSetDevice(device);
  const tree_attn::Sizes sizes{1, 1, heads, kv_heads, head_dim, value_dim};
  return tree_attn::path_name(sizes, {static_cast<tree_attn::Path>(path), max_smem});
}
