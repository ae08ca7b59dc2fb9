// The gradient of q in a pass of its own, for deterministic results: one block owns kRows packed rows and adds over the
// key tiles in ascending order, as the forward does.
//
//   for each needed key tile:  S = Q K^T;  P = exp(S - lse);  D = dO V^T;  dQ += P (D - delta) K
#pragma once

#include "../shared_memory.h"
#include "backward_plan.cuh"
#include "forward.cuh"

namespace tree_attn::portable {

template <typename T_, int kDim_, int kValueDim_>
struct BackwardDqTiles {
  using T = T_;
  static constexpr int kDim = kDim_, kValueDim = kValueDim_;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRowTiles = 1;
  static constexpr int kRows = kWarps * 16, kKeys = kDim > 192 ? 32 : 64;
  using Tiles = KeyTiles<kKeys, kThreads>;
  static constexpr int kQBytes = kRows * kDim * 2, kOBytes = kRows * kValueDim * 2;
  static constexpr int kKBytes = kKeys * kDim * 2, kVBytes = kKeys * kValueDim * 2;
  static constexpr int kSmem = kQBytes + kOBytes + kKBytes + kVBytes + sizeof(typename Tiles::Storage);
  static_assert(kSmem <= 99 * 1024);
};

template <typename Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, 2) backward_dq_kernel(const __grid_constant__ BackwardArguments args) {
  using T = typename Tiles::T;
  constexpr int kDim = Tiles::kDim, kValueDim = Tiles::kValueDim, kKeyTiles = Tiles::kKeys / 8;
  const Backward& call = args.call;
  const Sizes& sizes = call.sizes;
  const int kv_head = blockIdx.y, first = (gridDim.x - 1 - blockIdx.x) * Tiles::kRows;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  extern __shared__ __align__(1024) char smem[];
  const uint32_t q_smem = smem_address(smem), o_smem = q_smem + Tiles::kQBytes;
  const uint32_t k_smem = o_smem + Tiles::kOBytes, v_smem = k_smem + Tiles::kKBytes;
  auto& storage = *reinterpret_cast<typename Tiles::Tiles::Storage*>(smem + Tiles::kSmem - sizeof(typename Tiles::Tiles::Storage));

  using CopyK = TileCopy<T, kDim, Tiles::kKeys, Tiles::kThreads>;
  using CopyV = TileCopy<T, kValueDim, Tiles::kKeys, Tiles::kThreads>;
  using CopyQ = TileCopy<T, kDim, Tiles::kRows, Tiles::kThreads>;
  using CopyO = TileCopy<T, kValueDim, Tiles::kRows, Tiles::kThreads>;
  CopyQ::load_rows(q_smem, call.q, args.rows, first, kv_head, sizes.head_dim);
  CopyO::load_rows(o_smem, call.grad_out, args.rows, first, kv_head, sizes.value_dim);
  copy_async_commit();

  const int last = min(first + Tiles::kRows, args.rows.count) - 1;
  typename Tiles::Tiles tiles(call.mask, storage,
                              row_span(call.mask, args.rows.token(first), args.rows.token(last) + 1), sizes.keys);

  const int my_row = first + warp * 16 + lane / 4;  // and the one 8 below
  float log2_sum[2], delta[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t at = static_cast<int64_t>(kv_head) * args.work.padded_rows + my_row + h * 8;
    log2_sum[h] = args.work.log2_sum[at];
    delta[h] = args.work.delta[at];
  }

  float dq[1][kDim / 8][4];
  clear(dq);
  for (int tile = tiles.next(); tile >= 0;) {
    const int k0 = tile * Tiles::kKeys;
    const bool full = tiles.is_full;
    __syncthreads();  // nobody reads the K and V before
    CopyK::load_keys(k_smem, call.k, k0, sizes.keys, kv_head, sizes.head_dim);
    copy_async_commit();
    CopyV::load_keys(v_smem, call.v, k0, sizes.keys, kv_head, sizes.value_dim);
    copy_async_commit();
    tile = tiles.next();

    float s[1][kKeyTiles][4], d[1][kKeyTiles][4];
    clear(s);
    clear(d);
    copy_async_wait<1>();
    __syncthreads();  // K is here
    product_transposed<T, kDim>(s, q_smem, warp * 16, k_smem, 0);
    copy_async_wait<0>();
    __syncthreads();  // V is here
    product_transposed<T, kValueDim>(d, o_smem, warp * 16, v_smem, 0);

    float slope[kKeyTiles][4];
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        slope[n][e] = 1.f;
        if (args.scaling.capped) {
          s[0][n][e] = tanh_accurate(args.scaling.inner_scale * s[0][n][e]);
          slope[n][e] = 1.f - s[0][n][e] * s[0][n][e];
        }
      }
    if (!full) mask_scores<Tiles>(s, call.mask, args.rows, my_row, k0, sizes.keys);
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool hidden = !full && s[0][n][e] == negative_infinity();
        const float p = exp2_approx(s[0][n][e] * args.scaling.log2_scale - log2_sum[e / 2]);
        d[0][n][e] = hidden ? 0.f : p * (d[0][n][e] - delta[e / 2]) * slope[n][e];
      }
    uint32_t ds[1][kKeyTiles / 2][4];
    to_operand<T>(ds, d);
    product_registers<T, kDim>(dq, ds, k_smem, 0);
  }

#pragma unroll
  for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) dq[0][n][e] *= args.scaling.scale;
  copy_async_wait<0>();
  __syncthreads();
  store_accumulators<T, kDim>(smem, warp * 16, 0, dq);
  __syncthreads();
  CopyQ::store_rows(smem, call.grad_q, args.rows, first, kv_head, sizes.head_dim);
}

template <typename T, int kDim, int kValueDim>
cudaError_t launch_backward_dq(const Backward& call, cudaStream_t stream) {
  using Tiles = BackwardDqTiles<T, kDim, kValueDim>;
  const BackwardArguments args(call, PackedRows(call.sizes), kDim, kValueDim, smallest_keys(kDim));
  const cudaError_t error = allow_shared_memory<backward_dq_kernel<Tiles>>(Tiles::kSmem);
  if (error != cudaSuccess) return error;
  const dim3 grid((args.rows.count + Tiles::kRows - 1) / Tiles::kRows, call.sizes.kv_heads);
  backward_dq_kernel<Tiles><<<grid, Tiles::kThreads, Tiles::kSmem, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace tree_attn::portable
