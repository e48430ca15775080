// Functions that the forward and the backward on Hopper must compute alike, and sums over a quad.
#pragma once

#include "../logits.cuh"
#include "ptx.cuh"

namespace cce {

constexpr float kLog2E = 1.4426950408889634f;

// tanh within 4e-7 of itself, without a branch.
__device__ __forceinline__ float fast_tangent(float x) {
  const float square = x * x;
  float series = fmaf(square, 62.0f / 2835.0f, -17.0f / 315.0f);
  series = fmaf(series, square, 2.0f / 15.0f);
  series = fmaf(series, square, -1.0f / 3.0f);
  series = fmaf(series * square, x, x);
  const float shrunk = power_of_two(-2.0f * kLog2E * fabsf(x));
  const float quotient = copysignf(__fdividef(1.0f - shrunk, 1.0f + shrunk), x);
  return fabsf(x) < 0.25f ? series : quotient;
}

// Whether logits are the products as they are.
__device__ __forceinline__ bool is_plain(const Storage* bias, const LogitOptions& options) {
  return bias == nullptr && options.scale == 1.0 && options.softcap <= 0.0;
}

// Over the four lanes that share rows of a product.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_largest(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ uint32 quad_largest(uint32 x) {
  x = max(x, __shfl_xor_sync(~0u, x, 1));
  return max(x, __shfl_xor_sync(~0u, x, 2));
}

}  // namespace cce
