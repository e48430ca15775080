// What few calls ask of the logits on Hopper: bias, scale and softcap, label smoothing, and statistics.
// Each function works on a block of 64 rows in a warp group's registers.
#pragma once

#include "state.cuh"

namespace cce {

// Keep the larger logit, the earlier one of equals, and a NaN above all.
__device__ __forceinline__ void take_best(float& best, int& argmax, float other, int other_at) {
  const bool nan = best != best, other_nan = other != other, earlier = other_at < argmax;
  if (other_nan ? !nan || earlier : !nan && (other > best || (other == best && earlier))) {
    best = other;
    argmax = other_at;
  }
}

// Scale, bias and softcap in place. Only a removed entry becomes -inf.
__device__ __forceinline__ void make_logits(Block z, const ForwardArguments& call, int left,
                                            int columns, int lane) {
  const float lowest = -static_cast<float>(infinity());
  const float scale = static_cast<float>(call.options.scale);
  // A softcap alone, as models have it, spares a pass over the logits.
  const bool affine = call.bias != nullptr || scale != 1.0f || call.options.softcap <= 0.0;
  if (affine) {
#pragma unroll
    for (int j = 0; j < kSpans; ++j)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        one_by_one(z[SumPlace::index(j, 0, side)]);
        const int x = SumPlace::column(lane, j, side);
        const float bias =
            call.bias == nullptr || x >= columns ? 0.0f : widen(call.bias[left + x]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& logit = z[SumPlace::index(j, half, side)];
          logit = fmaf(logit, scale, bias);
          if (logit == lowest) logit = static_cast<float>(not_a_number());
          if (bias == lowest) logit = lowest;
        }
      }
  }
  if (call.options.softcap <= 0.0) return;
  const float cap = static_cast<float>(call.options.softcap), inverse = 1.0f / cap;
  const float removed = affine ? lowest : static_cast<float>(not_a_number());  // equal to none
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    one_by_one(z[i]);
    // z * 0 is NaN for an infinity, which tanh would turn into a number.
    const float capped = fmaf(z[i], 0.0f, cap * fast_tangent(z[i] * inverse));
    z[i] = z[i] == removed ? lowest : capped;
  }
}

// What label smoothing and the statistics want of the logits, the target's included. These sums wait
// in device memory for the next tile: in registers there is no room for what few calls ask for.
template <bool kStatistics>
__device__ __forceinline__ void take_all(Block z, const ForwardArguments& call, int row, int count,
                                         int left, int columns, int64 slot, bool first, int lane) {
  const float lowest = -static_cast<float>(infinity());
  if (call.smoothing != nullptr) {
    float sum[2] = {};
#pragma unroll
    for (int j = 0; j < kSpans; ++j)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        one_by_one(z[SumPlace::index(j, 0, side)]);
        const int x = SumPlace::column(lane, j, side);
        const float weight = x < columns ? call.smoothing[left + x] : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float logit = z[SumPlace::index(j, half, side)];
          if (logit != lowest) sum[half] = fmaf(weight, logit, sum[half]);
        }
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = quad_sum(sum[half]);
      float* to = call.out.smoothed + slot + row + 8 * half;
      if (lane % 4 == 0 && row + 8 * half < count) *to = first ? sum[half] : *to + sum[half];
    }
  }
  if constexpr (kStatistics) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float best = kMasked, poison = 0;
      int argmax = 0;
#pragma unroll
      for (int j = 0; j < kSpans; ++j)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          one_by_one(z[SumPlace::index(j, half, side)]);
          const float logit = z[SumPlace::index(j, half, side)];
          poison += logit;
          if (logit > best) {
            best = logit;
            argmax = 2 * j + side;
          }
        }
      if (poison != poison) {
#pragma unroll
        for (int k = 2 * kSpans - 1; k >= 0; --k) {
          one_by_one(z[SumPlace::index(k / 2, half, k % 2)]);
          const float logit = z[SumPlace::index(k / 2, half, k % 2)];
          if (logit != logit) {
            best = logit;
            argmax = k;
          }
        }
      }
      argmax = left + SumPlace::column(lane, argmax / 2, argmax % 2);
#pragma unroll
      for (int step = 1; step < 4; step *= 2)
        take_best(best, argmax, __shfl_xor_sync(~0u, best, step), __shfl_xor_sync(~0u, argmax, step));
      if (lane % 4 == 0 && row + 8 * half < count) {
        const int64 at = slot + row + 8 * half;
        if (!first) take_best(best, argmax, call.out.best[at], call.out.argmax[at]);
        call.out.best[at] = best;
        call.out.argmax[at] = argmax;
      }
    }
  }
}

// Add up what entropy needs, relative to the reference that the rows have now; `shared` still holds
// the one before this block.
__device__ __forceinline__ void add_weighted(Block z, const RowSums& sums, Shared& shared, int m,
                                             const ForwardArguments& call, int row, int count,
                                             int64 slot, bool first, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float reference = sums.reference[half];
    float weighted = 0;
#pragma unroll
    for (int j = 0; j < kSpans; ++j)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        one_by_one(z[SumPlace::index(j, half, side)]);
        const float centred = z[SumPlace::index(j, half, side)];
        const float s = power_of_two(centred);
        // 0 times -inf is not a number.
        if (s != 0.0f) weighted = fmaf(s, centred, weighted);
      }
    weighted = quad_sum(weighted);
    const float before = quad_sum(shared.rest.at(m, half));
    if (lane % 4 == 0 && row + 8 * half < count) {
      float* to = call.out.weighted + slot + row + 8 * half;
      const float shift = shared.reference.at(m, half) - reference;
      if (!first)
        weighted += shift == 0.0f ? *to : (*to + shift * before) * power_of_two(shift);
      *to = weighted;
    }
  }
}

}  // namespace cce
