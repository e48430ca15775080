// What few calls ask of the logits on Hopper: bias, scale and softcap, label smoothing, and statistics.
// Each function works on a block of 64 rows in a warp group's registers.
#pragma once

#include "places.cuh"
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

// tanh(x / cap) cap / x - 1 from the square of x: a series for a softcap within 3e-7 of itself relatively, where x
// is no larger than kSeriesReach of the cap. Its terms hold the cap's powers.
constexpr float kSeriesReach = 0.9f;
struct SoftcapSeries {
  float term[5];
  uint32 reach;  // the largest square; bits, which order as the numbers do, a NaN behind them

  __device__ __forceinline__ explicit SoftcapSeries(float cap) {
    const float inverse = 1.0f / (cap * cap);
    term[0] = -0.33332056f * inverse;
    term[1] = 0.13310325f * inverse * inverse;
    term[2] = -0.052591145f * inverse * inverse * inverse;
    term[3] = 0.018116346f * (inverse * inverse) * (inverse * inverse);
    term[4] = -0.003735375f * (inverse * inverse) * (inverse * inverse) * inverse;
    // Where powers are no numbers, and to squares that are none, there is no series.
    const float most = fminf(kSeriesReach * cap * (kSeriesReach * cap), 1e37f);
    reach = cap > 1e-3f ? __float_as_uint(most) : 0;
  }
  __device__ __forceinline__ float at(float square) const {
    float p = fmaf(square, term[4], term[3]);
    p = fmaf(square, p, term[2]);
    p = fmaf(square, p, term[1]);
    p = fmaf(square, p, term[0]);
    return square * p;
  }
};

// A softcap of logits some of which may be beyond the reach of its series.
__device__ __forceinline__ void cap_far_logits(float (&z)[4], float cap) {
  const float inverse = 1.0f / cap;
  float tangent[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) tangent[k] = z[k] * inverse;
  fast_tangents(tangent);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    // What counts for nothing still does: without a comparison, of whose results the assembler would hold
    // all at once. z * 0 is NaN for an infinity, which tanh would turn into a number.
    const float capped = fminf(cap * tangent[k], z[k] - kMasked / 2);
    z[k] = fmaf(z[k], 0.0f, capped);
  }
}

// A softcap in place: a series, which takes a fourth of the instructions, for all but the few logits beyond its
// reach and what a warp has beside them.
__device__ __forceinline__ void cap_logits(Block z, float cap) {
  constexpr int kBeside = 8;  // logits of a thread that are tested together
  constexpr int kFours = kSums / 4;
  const SoftcapSeries series(cap);
  uint32 far = 0;  // fours of a thread's logits
#pragma unroll
  for (int first = 0; first < kSums; first += kBeside) {
    float square[kBeside];
    uint32 largest = 0;
#pragma unroll
    for (int k = 0; k < kBeside; ++k) square[k] = z[first + k] * z[first + k];
#pragma unroll
    for (int k = 0; k < kBeside; k += 2)
      largest = largest_of_three(largest, __float_as_uint(square[k]), __float_as_uint(square[k + 1]));
    if (__all_sync(~0u, largest <= series.reach)) {
#pragma unroll
      for (int k = 0; k < kBeside; ++k) z[first + k] = fmaf(z[first + k], series.at(square[k]), z[first + k]);
    } else {
      far |= ((1u << kBeside / 4) - 1) << first / 4;
    }
  }
  // The same code for all: code of their own, hardly ever executed, would scatter what is.
#pragma unroll 1
  for (; far != 0; far &= far - 1) {
    const int at = __ffs(far) - 1;
    float held[4] = {};
    at_place<0, kFours>(at, [&](int four) {
#pragma unroll
      for (int k = 0; k < 4; ++k) one_by_one(held[k] = z[4 * four + k]);
    });
    cap_far_logits(held, cap);
    at_place<0, kFours>(at, [&](int four) {
#pragma unroll
      for (int k = 0; k < 4; ++k) one_by_one(z[4 * four + k] = held[k]);
    });
  }
}

// Scale, bias and softcap in place. Removed entries count for nothing afterwards; -inf is only what infinite
// inputs make of a logit.
__device__ __forceinline__ void make_logits(Block z, const ForwardArguments& call, int left,
                                            int columns, int lane) {
  const float scale = static_cast<float>(call.options.scale);
  if (call.bias != nullptr) {
    const float lowest = -static_cast<float>(infinity());
    const int vocab = static_cast<int>(call.vocab);
#pragma unroll
    for (int j = 0; j < kSpans; ++j)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        one_by_one(z[SumPlace::index(j, 0, side)]);
        const int v = left + SumPlace::column(lane, j, side);
        const float bias = v < vocab ? widen(call.bias[v]) : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& logit = z[SumPlace::index(j, half, side)];
          logit = fmaf(logit, scale, bias);
          // Whatever its row of c holds.
          if (bias == lowest) logit = kMasked;
        }
      }
  } else if (scale != 1.0f) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) z[i] *= scale;
  }
  if (call.options.softcap <= 0.0) return;
  const float cap = static_cast<float>(call.options.softcap);
  cap_logits(z, cap);
}

// What label smoothing and the statistics want of the logits, the target's included. These sums wait
// in device memory for the next tile: in registers there is no room for what few calls ask for.
template <bool kStatistics>
__device__ __forceinline__ void take_all(Block z, const ForwardArguments& call, int row, int count,
                                         int left, int columns, int64 slot, bool first, int lane) {
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
          if (logit > kCounts) sum[half] = fmaf(weight, logit, sum[half]);
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
      float best = kCounts, poison = 0;
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
