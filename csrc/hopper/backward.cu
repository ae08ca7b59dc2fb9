// One instance of the Hopper backward; the build compiles this file once for every (dtype, head dim, value dim).
#include <algorithm>
#include <type_traits>

#include "../shared_memory.h"
#include "backward_wide.cuh"
#include "instances.h"
#include "maps.h"

namespace tree_attn::hopper {

constexpr int kMaxNarrowDim = 128;

template <typename Tiles, bool kCapped, bool kFixedPoint>
constexpr auto main_kernel() {
  if constexpr (Tiles::kDim > kMaxNarrowDim) return &wide_backward_kernel<Tiles, kCapped, kFixedPoint>;
  else return &hopper::backward_kernel<Tiles, kCapped, kFixedPoint>;
}

template <typename T, int kDim, int kValueDim>
cudaError_t launch_backward(const Backward& call, cudaStream_t stream) {
  constexpr bool kWide = kDim > kMaxNarrowDim;
  static_assert(kWide || kDim == kValueDim);
  using Tiles = std::conditional_t<kWide, WideBackwardTiles<T, kDim, kValueDim>, BackwardTiles<T, kDim>>;
  static_assert(Tiles::kKeys >= portable::smallest_keys(kDim), "the workspace is sized for so many");
  const BackwardArguments args(call, TiledRows(call.sizes, Tiles::kRows), kDim, kValueDim, Tiles::kKeys);
  const Sizes& s = call.sizes;
  const int group = args.rows.group.divisor, tile_tokens = args.rows.tokens.divisor;
  const unsigned key_tiles = (s.keys + Tiles::kKeys - 1) / Tiles::kKeys, kv_heads = s.kv_heads;

  BackwardMaps maps;
  if (!make_map<T>(&maps.q, call.q, s.rows, s.heads, s.head_dim, group, tile_tokens) ||
      !make_map<T>(&maps.grad_out, call.grad_out, s.rows, s.heads, s.value_dim, group, tile_tokens) ||
      !make_map<T>(&maps.k, call.k, s.keys, s.kv_heads, s.head_dim, 1, Tiles::kKeys) ||
      !make_map<T>(&maps.v, call.v, s.keys, s.kv_heads, s.value_dim, 1, Tiles::kKeys))
    return cudaErrorInvalidValue;

  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  if (args.fixed_point)
    portable::key_bounds_kernel<T, kDim, kValueDim>
        <<<dim3(portable::kBoundParts, kv_heads), portable::kBoundThreads, 0, stream>>>(call.k, call.v, s,
                                                                                        args.work.key_bounds);
  const auto before = portable::PrepareBlocks::of<Tiles>(args);
  hopper::prepare_kernel<Tiles>
      <<<dim3(before.count(), kv_heads), portable::kPrepareWarps * kWarp, 0, stream>>>(args, before);
  const unsigned grid = std::min(static_cast<unsigned>(processors), args.work.max_items * kv_heads);
  const auto run = [&](auto capped, auto fixed_point) {
    constexpr auto kKernel = main_kernel<Tiles, decltype(capped)::value, decltype(fixed_point)::value>();
    error = allow_shared_memory<kKernel>(Tiles::kSmem);
    if (error == cudaSuccess)
      kKernel<<<grid, Tiles::kThreads, Tiles::kSmem, stream>>>(args, maps);
  };
  const auto run_capped = [&](auto fixed_point) {
    args.scaling.capped ? run(std::true_type{}, fixed_point) : run(std::false_type{}, fixed_point);
  };
  call.deterministic ? run_capped(std::true_type{}) : run_capped(std::false_type{});
  if (error != cudaSuccess) return error;

  const int row_tiles = args.work.padded_rows / Tiles::kRows;
  const auto finish = [] {
    if constexpr (kWide) return &wide_finish_kernel<Tiles>;
    else return &hopper::finish_kernel<Tiles>;
  }();
  finish<<<dim3(row_tiles + key_tiles, kv_heads), kFinishThreads, 0, stream>>>(args, row_tiles);
  return cudaGetLastError();
}

template cudaError_t launch_backward<TA_ELEMENT, TA_HEAD_DIM, TA_VALUE_DIM>(const Backward&, cudaStream_t);

}  // namespace tree_attn::hopper
