// From products to logits and back: scale, bias, softcap, and the slope of the softcap.
#pragma once

#include "number.cuh"

namespace cce {

// What turns <e, c> into a logit, by value in a kernel's arguments.
struct LogitOptions {
  double scale;
  double softcap;  // 0: none
};

// A removed entry, one with a bias of -inf, has a logit of -inf whatever its row of c holds; no
// other logit is -inf.
__device__ __forceinline__ Sum make_logit(Sum product, const Storage* bias, int64 column,
                                          const LogitOptions& options) {
  Sum x = product * static_cast<Sum>(options.scale);
  if (bias != nullptr) {
    const Sum b = widen(bias[column]);
    if (b == -static_cast<Sum>(infinity())) return b;
    x += b;
  }
  if (options.softcap > 0.0) {
    const Sum cap = static_cast<Sum>(options.softcap);
    // x * 0 is NaN for an infinity, which tanh would turn into a number.
    x = cap * tangent(x / cap) + x * Sum(0);
  }
  // Only a removed entry may be -inf: from an infinite input it must come out as NaN.
  if (x == -static_cast<Sum>(infinity())) x = static_cast<Sum>(not_a_number());
  return x;
}

// dz/dx at a logit.
__device__ __forceinline__ Sum slope(Sum logit, const LogitOptions& options) {
  if (options.softcap <= 0.0) return Sum(1);
  const Sum t = logit / static_cast<Sum>(options.softcap);
  return Sum(1) - t * t;
}

}  // namespace cce
