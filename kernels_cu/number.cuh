// The dtype of a compilation: CCE_DTYPE is 0 float64, 1 float32, 2 float16, 3 bfloat16.
#pragma once

#if CCE_DTYPE == 2
#include <cuda_fp16.h>
#elif CCE_DTYPE == 3
#include <cuda_bf16.h>
#endif

namespace cce {

using int64 = long long;
using uint32 = unsigned int;
using uint64 = unsigned long long;

#if CCE_DTYPE == 0
using Storage = double;  // of e, c, bias and their gradients
using Sum = double;      // of logits and of the sums in products
#elif CCE_DTYPE == 1
using Storage = float;
using Sum = float;
#elif CCE_DTYPE == 2
using Storage = __half;
using Sum = float;
#else
using Storage = __nv_bfloat16;
using Sum = float;
#endif

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
#if CCE_DTYPE == 2
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
#elif CCE_DTYPE == 3
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
#endif

#if CCE_DTYPE == 2
__device__ __forceinline__ Storage narrow(Sum x) { return __float2half_rn(x); }
#elif CCE_DTYPE == 3
__device__ __forceinline__ Storage narrow(Sum x) { return __float2bfloat16_rn(x); }
#else
__device__ __forceinline__ Storage narrow(Sum x) { return x; }
#endif

// Overloads, so that float code never calls a double function. Those of double are calls: copied to
// each of a thread's 64 sums they made a source compile for twice as long.
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __noinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __noinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float tangent(float x) { return tanhf(x); }
__device__ __noinline__ double tangent(double x) { return tanh(x); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

__device__ __forceinline__ double infinity() { return __longlong_as_double(0x7ff0000000000000LL); }
__device__ __forceinline__ double not_a_number() { return __longlong_as_double(0x7ff8000000000000LL); }

}  // namespace cce
