// Sums of dQ in fixed point, for deterministic calls: integers add up to the same in any order, so nobody waits for a turn.
//
// What is added to a row of dQ is first multiplied with a factor of that row and rounded to 32-bit integers. The whole sum
// must fit; what is added on the way may wrap around. The factor follows from a bound of the sum. With dS = P (D - delta),
// D = dO V^T, delta = dO . O, and probabilities that add up to 1 at most, the Cauchy-Schwarz inequality gives for a row
//
//     |dQ_c| <= sum_k |dS_k| |K_kc| <= (|dO| (max_k |V_k| + |O|) + |grad_lse|) max_kc |K_kc|
//
// before it is multiplied with the scale of the scores; a soft cap only makes dS smaller. The maxima are over all keys of a
// head. A sum is off by half an integer for each key tile at most, so by 2^-32 of the bound for each.
#pragma once

#include "../params.h"
#include "primitives.cuh"

namespace tree_attn::portable {

constexpr int kBoundParts = 2 * kWarp;  // of the keys of a head, each with a block of its own
constexpr int kBoundThreads = 256;

// Of nonnegative floats, whose order is that of their bits.
__device__ __forceinline__ float warp_max(float x) {
  return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));
}

// bounds[kv_head][part]: the largest |K_kc| of a part of the keys, and the largest |V_k|^2. NaNs are left out: a row that sees
// one has a NaN for delta, or gets one from to_integers. Grid: kBoundParts, key/value heads.
template <typename T, int kDim, int kValueDim>
__global__ void __launch_bounds__(kBoundThreads)
    key_bounds_kernel(const Tensor3 k, const Tensor3 v, const Sizes sizes, float2* bounds) {
  constexpr int kWidth = kDim > kValueDim ? kDim : kValueDim;
  constexpr int kLanes = kWidth <= 64 ? 8 : kWidth <= 128 ? 16 : 32;  // lanes a key, each with 8 columns
  constexpr int kPasses = 4, kPerPass = kWarp / kLanes, kWarps = kBoundThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, col = lane % kLanes * 8, kv_head = blockIdx.y;

  float high = 0.f, norm = 0.f;
  const int first = (blockIdx.x * kWarps + warp) * kPasses * kPerPass;
  for (int base = first; base < sizes.keys; base += kBoundParts * kWarps * kPasses * kPerPass) {
    int4 of_k[kPasses], of_v[kPasses];  // all loads are in flight at once
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int key = base + i * kPerPass + lane / kLanes;
      const auto load = [&](const Tensor3& x, int cols) {
        if (key >= sizes.keys || col >= cols) return int4{0, 0, 0, 0};
        return *reinterpret_cast<const int4*>(static_cast<const T*>(x.data) + key * x.token_stride +
                                              kv_head * x.head_stride + col);
      };
      of_k[i] = load(k, sizes.head_dim), of_v[i] = load(v, sizes.value_dim);
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint32_t x[4] = {uint32_t(of_k[i].x), uint32_t(of_k[i].y), uint32_t(of_k[i].z), uint32_t(of_k[i].w)};
      const uint32_t y[4] = {uint32_t(of_v[i].x), uint32_t(of_v[i].y), uint32_t(of_v[i].z), uint32_t(of_v[i].w)};
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 key = Element<T>::unpack(x[j]), value = Element<T>::unpack(y[j]);
        high = fmaxf(high, fmaxf(fabsf(key.x), fabsf(key.y)));
        sum += value.x * value.x + value.y * value.y;
      }
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      norm = fmaxf(norm, sum);
    }
  }
  __shared__ float2 of_warps[kWarps];
  high = warp_max(high), norm = warp_max(norm);
  if (lane == 0) of_warps[warp] = {high, norm};
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarps; ++i) high = fmaxf(high, of_warps[i].x), norm = fmaxf(norm, of_warps[i].y);
  bounds[kv_head * kBoundParts + blockIdx.x] = {high, norm};
}

// Euclidean norm from a sum of squares; not below what it is where squares are too small for a float.
__device__ __forceinline__ float norm_of(float squares) { return sqrtf(squares) + 1e-18f; }

// The largest |K_kc| and |V_k| of a head, by a whole warp.
struct KeyBounds {
  float key = 0.f, value = 0.f;

  KeyBounds() = default;
  __device__ __forceinline__ KeyBounds(const float2* bounds, int kv_head) {
    const float2* const own = bounds + kv_head * kBoundParts + threadIdx.x % kWarp;
    const float2 a = own[0], b = own[kWarp];
    key = warp_max(fmaxf(a.x, b.x)), value = norm_of(warp_max(fmaxf(a.y, b.y)));
  }

  // The factor of a row. 4 % are left for rounding in the products and in the bound itself. Where the bound is not finite it is
  // NaN, and so is then what becomes of the row's sums.
  __device__ __forceinline__ float factor(float grad_squares, float out_squares, float delta, float grad_lse) const {
    const float bound = (norm_of(grad_squares) * (value + norm_of(out_squares)) + fabsf(grad_lse)) * key;
    return fabsf(delta) < INFINITY && bound < INFINITY ? 0.96f * 2147483648.f / fmaxf(bound, 1e-28f) : NAN;
  }
};

// The larger one of two numbers' magnitudes, or NaN if one of them is.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float high;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(high) : "f"(fabsf(x)), "f"(fabsf(y)));
  return high;
}

// Accumulators of two rows, 8 apart, become integers: x * factor, rounded. Added to 1.5 * 2^23 a number leaves its integer in
// the low bits of the float, if that is below 2^22 as it nearly always is; instructions that convert take 8 times as long. What
// is no number or does not fit makes the whole row NaN, by way of its factor in global memory.
template <int kTiles>
__device__ __forceinline__ void to_integers(float (&x)[kTiles][4], const float (&factors)[2], float* row_factors) {
  constexpr float kShift = 12582912.f, kSmall = 4194304.f;
  bool small = true;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float even = 0.f, odd = 0.f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) even = max_or_nan(even, x[n][2 * h]), odd = max_or_nan(odd, x[n][2 * h + 1]);
    small = small && max_or_nan(even, odd) * factors[h] < kSmall;
  }
  if (__all_sync(~0u, small)) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        x[n][e] = __int_as_float(__float_as_int(fmaf(x[n][e], factors[e / 2], kShift)) - __float_as_int(kShift));
  } else {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float scaled = x[n][e] * factors[e / 2];
        if (!(fabsf(scaled) < 2147483648.f)) row_factors[e / 2 * 8] = NAN;
        x[n][e] = __int_as_float(__float2int_rn(scaled));
      }
  }
}

}  // namespace tree_attn::portable
