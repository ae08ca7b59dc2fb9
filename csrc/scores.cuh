// From scores to probabilities: scale and soft cap, and the layout in which probabilities enter the next product. Shared
// by all kernels.
#pragma once

#include "portable/primitives.cuh"

namespace tree_attn {

// Scores in base 2: exp(scale * s) = exp2(log2_scale * s). With a soft cap s is first replaced by tanh(inner_scale * s),
// and log2_scale carries the cap instead.
struct Scaling {
  bool capped;
  float inner_scale;  // 0 for none
  float log2_scale;
  float scale;

  Scaling(float scale, float softcap)
      : capped(softcap != 0.f),
        inner_scale(capped ? not_zero(scale / softcap) : 0.f),
        log2_scale((capped ? softcap : scale) * kLog2e),
        scale(scale) {}

  // An inner scale of 0 means that there is none; one so small does to every score what 0 would.
  static float not_zero(float x) { return x == 0.f ? 1e-30f : x; }
};

// tanh to about 1e-7 absolute; tanh.approx would be off by 5e-4, which a cap of 50 turns into 2 % of a probability.
__device__ __forceinline__ float tanh_accurate(float x) {
  return 1.f - __fdividef(2.f, 1.f + exp2_approx(2.f * kLog2e * x));
}

// Accumulators of a product as the A operand of the next: the two layouts agree in pairs of column tiles.
template <typename T, int kColTiles>
__device__ __forceinline__ void to_operand(uint32_t (&w)[kColTiles / 2][4], const float (&c)[kColTiles][4]) {
#pragma unroll
  for (int s = 0; s < kColTiles / 2; ++s) {
    w[s][0] = Element<T>::pack(c[2 * s][0], c[2 * s][1]);
    w[s][1] = Element<T>::pack(c[2 * s][2], c[2 * s][3]);
    w[s][2] = Element<T>::pack(c[2 * s + 1][0], c[2 * s + 1][1]);
    w[s][3] = Element<T>::pack(c[2 * s + 1][2], c[2 * s + 1][3]);
  }
}

template <typename T, int kRowTiles, int kColTiles>
__device__ __forceinline__ void to_operand(uint32_t (&w)[kRowTiles][kColTiles / 2][4],
                                           const float (&c)[kRowTiles][kColTiles][4]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) to_operand<T>(w[m], c[m]);
}

}  // namespace tree_attn
