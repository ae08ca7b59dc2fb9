// Forward on mma.sync: one block computes kRows packed rows of one key/value head, over the key tiles its rows see.
//
//   for each needed key tile:  S = Q K^T;  mask it if it is partial;  online softmax;  O += P V
//
// K of the next tile travels while P V runs, V of this one while S is computed. Full tiles run no mask code.
#pragma once

#include "../shared_memory.h"
#include "tiles.cuh"

namespace tree_attn::portable {

template <typename T_, int kDim_, int kValueDim_>
struct ForwardTiles {
  using T = T_;
  static constexpr int kDim = kDim_, kValueDim = kValueDim_;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  // 32 rows a warp halve the shared-memory reads of K and V; beyond value dim 128 their accumulators would spill.
  static constexpr int kRowTiles = kValueDim <= 128 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = 64;
  static constexpr int kMinBlocks = 2;

  using Tiles = KeyTiles<kKeys, kThreads>;
  static constexpr int kQBytes = kRows * kDim * 2, kKBytes = kKeys * kDim * 2, kVBytes = kKeys * kValueDim * 2;
  static constexpr int kSmem = kQBytes + kKBytes + kVBytes + sizeof(typename Tiles::Storage);
  static_assert(kValueDim <= kDim, "the output is staged where Q was");
};

struct ForwardArguments {
  Forward call;
  PackedRows rows;
  Scaling scaling;

  explicit ForwardArguments(const Forward& call) : call(call), rows(call.sizes), scaling(call.scale, call.softcap) {
    // The running maximum is of unscaled scores, so a scale that is not positive is applied to the scores themselves.
    if (scaling.log2_scale > 0.f) return;
    scaling.inner_scale = Scaling::not_zero(scaling.log2_scale);
    scaling.log2_scale = 1.f;
  }
};

// What fits the registers at head dim 128 beside O and S.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kScoreUnroll = 4;
#else
constexpr int kScoreUnroll = 2;
#endif

// Scores of pairs that the mask hides become -inf. `row` is the first of this thread's rows; rows beyond the end repeat
// the last, and are not stored.
template <typename Tiles>
__device__ __forceinline__ void mask_scores(float (&s)[Tiles::kRowTiles][Tiles::kKeys / 8][4], const Mask& mask,
                                            const PackedRows& rows, int row, int k0, int n_keys) {
  const int lane = threadIdx.x % kWarp;
  int tokens[Tiles::kRowTiles][2];
#pragma unroll
  for (int m = 0; m < Tiles::kRowTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) tokens[m][h] = rows.token(min(row + m * 16 + h * 8, rows.count - 1));
#pragma unroll
  for (int n = 0; n < Tiles::kKeys / 8; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int key = k0 + n * 8 + (lane % 4) * 2 + c;
      const int2 seen = key < n_keys ? rows_of_key(mask, key) : int2{0, 0};
#pragma unroll
      for (int m = 0; m < Tiles::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (tokens[m][h] < seen.x || tokens[m][h] >= seen.y) s[m][n][2 * h + c] = negative_infinity();
    }
  if (mask.window == 0) return;
#pragma unroll
  for (int n = 0; n < Tiles::kKeys / 8; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int key = k0 + n * 8 + (lane % 4) * 2 + c;
      const int oldest = key < n_keys ? __ldg(mask.k_depth + key) + mask.window : 0;
#pragma unroll
      for (int m = 0; m < Tiles::kRowTiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (__ldg(mask.q_depth + tokens[m][h]) >= oldest) s[m][n][2 * h + c] = negative_infinity();
    }
}

template <typename Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kMinBlocks)
    forward_kernel(const __grid_constant__ ForwardArguments args) {
  using T = typename Tiles::T;
  constexpr int kRowTiles = Tiles::kRowTiles, kKeyTiles = Tiles::kKeys / 8, kValueTiles = Tiles::kValueDim / 8;
  const Forward& call = args.call;
  const Sizes& sizes = call.sizes;

  // Later rows see more keys, so they go first; the row tiles of one head stay together, for its K and V to stay in L2.
  const int kv_head = blockIdx.y;
  const auto first_row = [] { return static_cast<int>(gridDim.x - 1 - rederive(blockIdx.x)) * Tiles::kRows; };
  const int first = first_row();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  extern __shared__ __align__(1024) char smem[];
  const uint32_t q_smem = smem_address(smem), k_smem = q_smem + Tiles::kQBytes, v_smem = k_smem + Tiles::kKBytes;
  auto& storage = *reinterpret_cast<typename Tiles::Tiles::Storage*>(smem + Tiles::kQBytes + Tiles::kKBytes + Tiles::kVBytes);

  using CopyQ = TileCopy<T, Tiles::kDim, Tiles::kRows, Tiles::kThreads>;
  using CopyK = TileCopy<T, Tiles::kDim, Tiles::kKeys, Tiles::kThreads>;
  using CopyV = TileCopy<T, Tiles::kValueDim, Tiles::kKeys, Tiles::kThreads>;
  CopyQ::load_rows(q_smem, call.q, args.rows, first, kv_head, sizes.head_dim);  // Q gmem -> smem

  const int last = min(first + Tiles::kRows, args.rows.count) - 1;
  typename Tiles::Tiles tiles(call.mask, storage,
                              row_span(call.mask, args.rows.token(first), args.rows.token(last) + 1), sizes.keys);

  // The first of this thread's rows; the others are 8, 16, 24 below.
  const auto my_first_row = [&] { return first_row() + warp * Tiles::kWarpRows + lane / 4; };

  float o[kRowTiles][kValueTiles][4];
  float row_max[kRowTiles][2], row_sum[kRowTiles][2];  // the sum is this thread's share
  clear(o);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) row_max[m][h] = negative_infinity(), row_sum[m][h] = 0.f;
  const float log2_scale = args.scaling.log2_scale;

  int tile = tiles.next();
  if (tile >= 0) CopyK::load_keys(k_smem, call.k, tile * Tiles::kKeys, sizes.keys, kv_head, sizes.head_dim);
  copy_async_commit();

  while (tile >= 0) {
    const int k0 = tile * Tiles::kKeys;
    const bool full = tiles.is_full;
    tile = tiles.next();  // here, where the scores hold no registers
    copy_async_wait<0>();
    __syncthreads();  // K is here, and nobody reads the V before
    CopyV::load_keys(v_smem, call.v, k0, sizes.keys, kv_head, sizes.value_dim);
    copy_async_commit();

    float s[kRowTiles][kKeyTiles][4];
    clear(s);
    product_transposed<T, Tiles::kDim, kScoreUnroll>(s, q_smem, warp * Tiles::kWarpRows, k_smem, 0);

    if (args.scaling.inner_scale != 0.f) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            s[m][n][e] = args.scaling.capped ? tanh_accurate(args.scaling.inner_scale * s[m][n][e])
                                             : args.scaling.inner_scale * s[m][n][e];
    }
    if (!full) mask_scores<Tiles>(s, call.mask, args.rows, my_first_row(), k0, sizes.keys);

    copy_async_wait<0>();
    __syncthreads();  // V is here, and nobody reads this K any more
    if (tile >= 0) CopyK::load_keys(k_smem, call.k, tile * Tiles::kKeys, sizes.keys, kv_head, sizes.head_dim);
    copy_async_commit();

#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float peak = row_max[m][h];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) peak = fmaxf(peak, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
        // A row that has seen nothing yet keeps -inf; subtracting 0 instead keeps its exponentials at 0.
        const float shift = peak == negative_infinity() ? 0.f : peak * log2_scale;
        const float correction = exp2_approx(row_max[m][h] * log2_scale - shift);
        row_max[m][h] = peak;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            s[m][n][2 * h + c] = exp2_approx(s[m][n][2 * h + c] * log2_scale - shift);
            sum += s[m][n][2 * h + c];
          }
        row_sum[m][h] = row_sum[m][h] * correction + sum;
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n) o[m][n][2 * h] *= correction, o[m][n][2 * h + 1] *= correction;
      }

    uint32_t p[kRowTiles][kKeyTiles / 2][4];
    to_operand<T>(p, s);
    product_registers<T, Tiles::kValueDim>(o, p, v_smem, 0);
  }

  const int group = args.rows.group.divisor;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = my_first_row() + m * 16 + h * 8, token = args.rows.token(min(row, args.rows.count - 1));
      const int head = kv_head * group + (min(row, args.rows.count - 1) - token * group);
      float sum = row_sum[m][h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float peak = row_max[m][h] * log2_scale;  // log2
      const bool empty = row_max[m][h] == negative_infinity();
      float denominator = sum;
      if (call.sinks != nullptr && !empty) denominator += exp2_approx(call.sinks[head] * kLog2e - peak);
      const float inverse = empty ? 0.f : 1.f / denominator;
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n) o[m][n][2 * h] *= inverse, o[m][n][2 * h + 1] *= inverse;
      if (lane % 4 == 0 && row < args.rows.count)
        call.lse[static_cast<int64_t>(head) * sizes.rows + token] =
            empty ? negative_infinity() : (peak + log2f(sum)) * kLn2;
    }

  // O registers -> smem -> gmem; the staging area is where Q was, whose layout may be wider.
  __syncthreads();
  store_accumulators<T, Tiles::kValueDim>(smem, warp * Tiles::kWarpRows, 0, o);
  __syncthreads();
  using CopyO = TileCopy<T, Tiles::kValueDim, Tiles::kRows, Tiles::kThreads>;
  CopyO::store_rows(smem, call.out, args.rows, first_row(), kv_head, sizes.value_dim);
}

template <typename T, int kDim, int kValueDim>
cudaError_t launch_forward(const Forward& call, cudaStream_t stream) {
  using Tiles = ForwardTiles<T, kDim, kValueDim>;
  const ForwardArguments args(call);
  const cudaError_t error = allow_shared_memory<forward_kernel<Tiles>>(Tiles::kSmem);
  if (error != cudaSuccess) return error;
  const dim3 grid((args.rows.count + Tiles::kRows - 1) / Tiles::kRows, call.sizes.kv_heads);
  forward_kernel<Tiles><<<grid, Tiles::kThreads, Tiles::kSmem, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace tree_attn::portable
