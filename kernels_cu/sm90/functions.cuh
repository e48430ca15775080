// What the forward and the backward on Hopper must compute alike, what dz is formed from, and how lanes of a
// quad share sums and words.
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

// tanh within 4e-7 of itself, or some number for a NaN, of four numbers: a quotient of polynomials fitted to it
// up to 8, where it is 1 in all digits but the last two. Few steps wait for one before, of the special unit's
// none: the assembler forms one number after the other. They share a division.
__device__ __forceinline__ void fast_tangents(float (&x)[4]) {
  constexpr float kLast = 8.0f;
  float above[4], below[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // No NaN, which all four would share.
    const float within = fminf(fmaxf(x[i], -kLast), kLast), square = within * within;
    float p = fmaf(square, 1.5230388e-8f, 2.189464e-5f), q = fmaf(square, 8.522435e-7f, 3.41129e-4f);
    p = fmaf(square, p, 3.5715967e-3f);
    q = fmaf(square, q, 2.6164439e-2f);
    p = fmaf(square, p, 1.3444497e-1f);
    q = fmaf(square, q, 4.6777824e-1f);
    above[i] = within * fmaf(square, p, 1.0f);
    below[i] = fmaf(square, q, 1.0f);
  }
  const float first = below[0] * below[1], second = below[2] * below[3];
  const float inverse = __fdividef(1.0f, first * second);
  const float of_pair[2] = {inverse * second, inverse * first};
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = above[i] * (below[i ^ 1] * of_pair[i / 2]);
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

// What the rows of a tile bring to dz.
struct RowFactors {
  const float* softmax;
  const float* onehot;
  const float* smoothing;
};

// Records of float16 are scaled to where it has its digits: the rows' factors may be as small as one
// over the number of tokens. A power of two.
__device__ __forceinline__ float record_scale(const uint32* largest) {
#if CCE_DTYPE == 2
  const int exponent = static_cast<int>(*largest >> 23) - 127;
  // Nothing to scale, or nothing that scaling would help.
  if (exponent <= -127 || exponent >= 128) return 1.0f;
  return exp2f(static_cast<float>(min(13 - exponent, 126)));
#else
  return 1.0f;
#endif
}

// Lanes `step` apart exchange the one word for the other: each gets its own of both.
__device__ __forceinline__ void exchange(uint32& low, uint32& high, bool upper, int step) {
  const uint32 other = __shfl_xor_sync(~0u, upper ? low : high, step);
  // Values, not a choice of places: words would lie in memory for that.
  low = upper ? other : low;
  high = upper ? high : other;
}

// Exchange words over the four lanes of a quad: word i of lane q becomes word q of lane i. By value:
// arrays that loops fill do not always end up in registers.
__device__ __forceinline__ uint4 transpose_quad(uint4 word, int q) {
  exchange(word.x, word.y, q & 1, 1);
  exchange(word.z, word.w, q & 1, 1);
  exchange(word.x, word.z, q & 2, 2);
  exchange(word.y, word.w, q & 2, 2);
  return word;
}

// Two numbers, rounded, in one word; the first in its low half.
__device__ __forceinline__ uint32 narrow_pair(float first, float second) {
#if CCE_DTYPE == 2
  const __half2 pair = __floats2half2_rn(first, second);
#else
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
#endif
  return *reinterpret_cast<const uint32*>(&pair);
}

// The two numbers of such a word.
__device__ __forceinline__ float2 widen_pair(uint32 word) {
#if CCE_DTYPE == 2
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
#else
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
#endif
}

// What rounding takes from a number.
__device__ __forceinline__ float rounded_off(float x) { return x - widen(narrow(x)); }

}  // namespace cce
