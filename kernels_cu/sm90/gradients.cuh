// A thread's sums of dE or dC on Hopper, 64 rows and some elements of D for each group: their products, and
// how they are stored, or kept for the next chunk.
#pragma once

#include "backward.cuh"

namespace cce {

// Elements of D whose gradients are formed at once, besides kWidth.
constexpr int kNarrow = kWidth / 2;       // where no more are left: products take half the time
constexpr int kWide = kWidth + kTileK;  // of dense products, where fewer parts do then

// A thread's sums of 64 rows.
template <int kColumns>
constexpr int kSumsOf = kColumns / 2;

// Some sums of a thread, those from kFirst on.
template <int kFirst, int kNumber, int kSums>
__device__ __forceinline__ float (&sums_from(float (&sums)[kSums]))[kNumber] {
  static_assert(kFirst + kNumber <= kSums);
  return reinterpret_cast<float(&)[kNumber]>(sums[kFirst]);
}

// Start the products of a stage with `dz`, whose rows lie across the depth where kAcross is 1.
template <int kAcross, int kSums, int kBoxes>
__device__ __forceinline__ void start_gradients(float (&sums)[kSums], const Storage* dz,
                                                const Storage (&other)[kBoxes][kTileK * kTileK]) {
  const uint64 a = kAcross ? across_depth<kTileK>(dz) : along_depth(dz);
  const uint64 b = across_depth<kTileK>(other[0]);
#pragma unroll
  for (int step = 0; step < kTileK / 16; ++step) {
    const uint64 a_step = a + step * (kAcross ? kAdvanceAcross : kAdvanceAlong);
    const uint64 b_step = b + step * kAdvanceAcross;
    if constexpr (kSums == kSumsOf<kWide>) {
      constexpr uint64 kBoxes192 = 192 / kTileK * sizeof(other[0]) >> 4;
      product_64x192x16<kAcross, 1>(sums_from<0, 96>(sums), a_step, b_step);
      product_64x128x16<kAcross, 1>(sums_from<96, 64>(sums), a_step, b_step + kBoxes192, 1);
    } else if constexpr (kSums == kSumsOf<kWidth>) {
      product_64x256x16<kAcross>(sums, a_step, b_step, 1);
    } else {
      product_64x128x16<kAcross, 1>(sums, a_step, b_step, 1);
    }
  }
  product_commit();
}

// Where a thread's sums lie in its group's 64 rows, eight columns a span.
__device__ __forceinline__ constexpr int gradient_index(int span, int half, int side) {
  return 4 * span + 2 * half + side;
}

// Call f(half, words) for every 16 bytes of a row that a thread writes: `words` holds pairs of sums,
// `at` is the first element of D.
template <int kSums, typename Finish>
__device__ __forceinline__ void each_word(int begin, int dim, int q, Finish f) {
#pragma unroll
  for (int spans = 0; spans < kSums / 4; spans += 4) {
    const int at = begin + spans * 8 + q * kWordElements;
#pragma unroll
    for (int half = 0; half < 2; ++half) f(spans, half, at, at < dim);
  }
}

// The element of D of a sum.
__device__ __forceinline__ int element_of(int begin, int span, int side, int q) {
  return begin + 8 * span + 2 * q + side;
}

// Loads behind it stay there.
__device__ __forceinline__ void no_loads_across() { asm volatile("" ::: "memory"); }

// Add what the records of the rows' targets have lost to rounding, half of the error of dE: a row of c for
// each. `at` are the rows among those that count; beyond `count` there is none.
template <int kSums>
__device__ __forceinline__ void add_target_rests(float (&sums)[kSums], const Matrix& c,
                                                 const int64* target, const float* rest,
                                                 const int64 (&at)[2], int64 count, int begin, int dim,
                                                 int q) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64 column = at[half] < count ? target[at[half]] : -1;
    const float by = column >= 0 ? __ldcg(rest + at[half]) : 0.0f;
    // Nothing times infinity would not be a number.
    if (by == 0.0f) continue;
    const Storage* const from = c.row(column);
#pragma unroll
    for (int span = 0; span < kSums / 4; ++span) {
      const int d = element_of(begin, span, 0, q);
      // Some words at a time: there are no registers for more.
      if (span % 4 == 0) no_loads_across();
      if (d >= dim) continue;
      const float2 pair = widen_pair(*reinterpret_cast<const uint32*>(from + d));
      float* own = &sums[gradient_index(span, half, 0)];
      own[0] = fmaf(by, pair.x, own[0]);
      own[1] = fmaf(by, pair.y, own[1]);
    }
  }
}

// Store rounded sums times `scale`.
template <int kSums>
__device__ __forceinline__ void store_rows(const float (&sums)[kSums], int begin, int dim, float scale,
                                           Storage* const (&row)[2], int q) {
  each_word<kSums>(begin, dim, q, [&](int spans, int half, int at, bool there) {
    auto pair = [&](int k) {
      return narrow_pair(sums[gradient_index(spans + k, half, 0)] * scale,
                         sums[gradient_index(spans + k, half, 1)] * scale);
    };
    const uint4 words = transpose_quad(make_uint4(pair(0), pair(1), pair(2), pair(3)), q);
    if (there && row[half] != nullptr) *reinterpret_cast<uint4*>(row[half] + at) = words;
  });
}

// Finished sums: of dz's records, less what the rows' factors bring of `background`, where there is any.
template <bool kPlain, int kSums>
__device__ __forceinline__ void finish_rows(float (&sums)[kSums], const BackwardArguments& call, int begin,
                                            const float* background, const float (&factor)[2],
                                            Storage* const (&row)[2], int q) {
  const int dim = static_cast<int>(call.dim);
  float scale = static_cast<float>(call.options.scale) / record_scale(call.largest);
  if constexpr (!kPlain) {
    if (background != nullptr) {
#pragma unroll
      for (int span = 0; span < kSums / 4; ++span) {
        const int d = element_of(begin, span, 0, q);
        if (d >= dim) continue;
        const float2 brought = *reinterpret_cast<const float2*>(background + d);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float by = factor[half] * static_cast<float>(call.options.scale);
          float* own = &sums[gradient_index(span, half, 0)];
          own[0] = own[0] * scale - by * brought.x;
          own[1] = own[1] * scale - by * brought.y;
        }
      }
      scale = 1.0f;
    }
  }
  store_rows(sums, begin, dim, scale, row, q);
}

constexpr uint32 kUpperHalves = 0x7632, kLowerHalves = 0x5410;  // of two words, selected into one

// Unfinished sums wait as they are, their high halves where the gradient will be, the low ones beside it.
template <int kSums>
__device__ __forceinline__ void keep_sums(const float (&sums)[kSums], int begin, int dim,
                                          Storage* const (&row)[2],
                                          unsigned short* const (&low)[2], int q) {
  each_word<kSums>(begin, dim, q, [&](int spans, int half, int at, bool there) {
    auto halves = [&](int k, uint32 selector) {
      return __byte_perm(__float_as_uint(sums[gradient_index(spans + k, half, 0)]),
                         __float_as_uint(sums[gradient_index(spans + k, half, 1)]), selector);
    };
    auto words = [&](uint32 selector) {
      return transpose_quad(make_uint4(halves(0, selector), halves(1, selector), halves(2, selector),
                                       halves(3, selector)),
                            q);
    };
    const uint4 upper = words(kUpperHalves), lower = words(kLowerHalves);
    if (!there || row[half] == nullptr) return;
    *reinterpret_cast<uint4*>(row[half] + at) = upper;
    *reinterpret_cast<uint4*>(low[half] + at) = lower;
  });
}

// Zeros where the low halves were.
template <int kSums>
__device__ __forceinline__ void clear_low(int begin, int dim, Storage* const (&row)[2],
                                          unsigned short* const (&low)[2], int q) {
  each_word<kSums>(begin, dim, q, [&](int spans, int half, int at, bool there) {
    if (there && row[half] != nullptr)
      *reinterpret_cast<uint4*>(low[half] + at) = make_uint4(0, 0, 0, 0);
  });
}

// Zeros where there is no row.
template <int kSums>
__device__ __forceinline__ void take_kept_sums(float (&sums)[kSums], int begin, int dim,
                                              Storage* const (&row)[2],
                                              unsigned short* const (&low)[2], int q) {
  each_word<kSums>(begin, dim, q, [&](int spans, int half, int at, bool there) {
    uint4 upper = {}, lower = {};
    if (there && row[half] != nullptr) {
      upper = *reinterpret_cast<const uint4*>(row[half] + at);
      lower = *reinterpret_cast<const uint4*>(low[half] + at);
    }
    upper = transpose_quad(upper, q);
    lower = transpose_quad(lower, q);
    auto add = [&](int k, uint32 high, uint32 low) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float& sum = sums[gradient_index(spans + k, half, side)];
        sum = __uint_as_float(__byte_perm(low, high, side == 0 ? kLowerHalves : kUpperHalves));
      }
    };
    add(0, upper.x, lower.x);
    add(1, upper.y, lower.y);
    add(2, upper.z, lower.z);
    add(3, upper.w, lower.w);
  });
}

}  // namespace cce
