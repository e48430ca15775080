// What becomes of a tile of logits on Hopper: into its rows' sums, the kept-column bits, and what else
// is asked for. Each function works on a block of 64 rows in a warp group's registers.
#pragma once

#include "marks.cuh"
#include "options.cuh"

namespace cce {

// What few tiles need: take the targets' logits out of a block, since their sums go apart, so that a
// loss is never negative; and find a reference for rows whose target is far from likely.
template <bool kPlain>
__device__ __forceinline__ void take_targets(Block z, Shared& shared, int m,
                                             const ForwardArguments& call, int row, int left,
                                             uint32* words, int lane) {
  int ahead[2];
  bool hit = false, far = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int target = __float_as_int(shared.target.at(m, half));
    ahead[half] = target >= left && target < left + kTileN ? target - left : -1;
    hit |= ahead[half] >= 0;
    far |= shared.reference.at(m, half) <= kLowest;
  }
  if (__builtin_expect(!__any_sync(~0u, hit || far), 1)) return;
  float taken[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // One of the quad's four has the column.
    const bool own = ahead[half] >= 0 && ahead[half] % 8 / 2 == lane % 4;
    find_owners(own, ahead[half] / 8, ahead[half] % 2, [&](int span, int own_side) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float& logit = z[SumPlace::index(span, half, side)];
        one_by_one(logit);
        if (side == own_side) {
          taken[half] = logit;
          logit = kMasked;
        }
      }
    });
  }
  if (__any_sync(~0u, far)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Such a row starts from the largest logit that it meets first: exponents are rounded, and relative
      // to a target far away few of the others' digits would be left.
      float most = kMasked;
#pragma unroll
      for (int k = 0; k < 2 * kSpans; ++k) {
        one_by_one(z[SumPlace::index(k / 2, half, k % 2)]);
        most = fmaxf(most, z[SumPlace::index(k / 2, half, k % 2)]);
      }
      most = quad_largest(most);
      if (shared.reference.at(m, half) <= kLowest && most > kCounts) {
        shared.reference.at(m, half) = most * kLog2E;
        shared.inverse.at(m, half) = 1.0f;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // One of the quad's four has the column.
    const int x = ahead[half];
    if (x < 0 || x % 8 / 2 != lane % 4) continue;
    // Only a removed entry's is -inf.
    const float lowest = -static_cast<float>(infinity());
    float logit = taken[half] == lowest ? static_cast<float>(not_a_number()) : taken[half];
    if (!kPlain && logit <= kCounts) logit = lowest;
    call.target_logit[row + 8 * half] = logit;
    if (words == nullptr) continue;
    atomicOr(words + x / kColumnChunk, 1u << (x % kColumnChunk));
  }
}

// Add a block's exponentials to the rows' sums, and find the columns to keep. Leaves the exponents, in
// powers of two, relative to the rows' references. `meanwhile` is called early on.
template <typename Meanwhile>
__device__ __forceinline__ void add_block(Block z, RowSums& sums, float chunk_threshold,
                                          bool finds, Dropped& dropped, int lane,
                                          Meanwhile meanwhile) {
  const float lowest = -static_cast<float>(infinity());
#pragma unroll
  for (int i = 0; i < kSums; ++i) z[i] = fmaf(z[i], kLog2E, -sums.reference[i / 2 % 2]);
  meanwhile();
  float total[2] = {sums.rest[0], sums.rest[1]};
  // As an unsigned integer -inf is larger than all that is finite. Several, that do not wait for each
  // other.
  uint32 infinite[kSpansInChunk] = {}, dull = 0;
#pragma unroll
  for (int w = 0; w < kChunks; ++w) {
    float chunk[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float pair[kSpansInChunk];
#pragma unroll
      for (int k = 0; k < kSpansInChunk; ++k) {
        const int j = kSpansInChunk * w + k;
        const float a = z[SumPlace::index(j, half, 0)], b = z[SumPlace::index(j, half, 1)];
        pair[k] = power_of_two(a) + power_of_two(b);
        infinite[k] = largest_of_three(infinite[k], __float_as_uint(a), __float_as_uint(b));
      }
      // A short chain of sums that wait for each other.
      chunk[half] = (pair[0] + pair[1]) + (pair[2] + pair[3]);
      total[half] += chunk[half];
    }
    // A chunk's sum is no less than its largest: one that fails has none that passes.
    const float least = __shfl_sync(~0u, chunk_threshold, w);
    const float over = fmaxf(fmaf(chunk[0], sums.inverse[0], -least),
                             fmaf(chunk[1], sums.inverse[1], -least));
    dull = __funnelshift_l(__float_as_uint(over), dull, 1);
  }
  // By signs, which unlike comparisons need none of the few predicates. The first chunk's is the
  // highest.
  uint32 candidates = ~dull & ((1u << kChunks) - 1);
  static_assert(kSpansInChunk == 4, "pairs of a chunk");
  infinite[0] = largest_of_three(infinite[0], infinite[1], infinite[2]);
  if (infinite[0] >= __float_as_uint(lowest) || infinite[3] >= __float_as_uint(lowest)) {
    // From an infinite input, whose row must come out as NaN.
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      one_by_one(z[i]);
      if (z[i] == lowest) total[i / 2 % 2] = static_cast<float>(not_a_number());
    }
  }
  constexpr uint32 kTooLarge = 1u << 31;
  const bool fits = total[0] < kHighest && total[1] < kHighest;
  candidates = __reduce_or_sync(~0u, fits ? candidates : kTooLarge);
  if (__builtin_expect(candidates >= kTooLarge, 0)) {
    // Again, relative to the largest so far: the rows whose sum is too large.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = 0;
#pragma unroll
      for (int j = 0; j < kSpans; ++j)
        most = fmaxf(most, fmaxf(z[SumPlace::index(j, half, 0)], z[SumPlace::index(j, half, 1)]));
      // All four threads of a row, or none of them; the warp's other rows keep every bit.
      most = quad_largest(most);
      const bool moves =
          quad_largest(total[half] == total[half] ? total[half] : kHighest) >= kHighest;
      if (moves) {
        float sum = sums.rest[half] * power_of_two(-most);
        if (total[half] != total[half]) sum = total[half];
#pragma unroll
        for (int j = 0; j < kSpans; ++j)
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            one_by_one(z[SumPlace::index(j, half, side)]);
            z[SumPlace::index(j, half, side)] -= most;
            sum += power_of_two(z[SumPlace::index(j, half, side)]);
          }
        total[half] = sum;
        sums.reference[half] += most;
      }
      const float whole = quad_sum(total[half]);
      const float inverse = __fdividef(1.0f, whole);
      sums.inverse[half] = moves ? inverse : fminf(sums.inverse[half], inverse);
    }
    candidates = ~0u;
  }
  sums.rest[0] = total[0];
  sums.rest[1] = total[1];
  if (finds && candidates != 0)
    find_columns(z, candidates, sums.inverse, chunk_threshold, dropped, lane);
}

// A tile of logits: into the rows' sums, the bits, and what else is asked for. Only the first block's
// products need be done; `finish_products` waits for the others'.
template <bool kPlain, bool kStatistics, typename FinishProducts>
__device__ __forceinline__ void finish_tile(float (&z)[kBlocksM][kSums], Shared& shared,
                                            const ForwardArguments& call, int count, int left,
                                            FinishProducts finish_products) {
  const int row_tile = shared.row_tile[this_thread()], part = shared.part[this_thread()];
  const bool first = shared.first[this_thread()];
  shared.first[this_thread()] = false;
  const int64 slot = part * call.capacity;
  const int lane = this_thread() % 32;
  const int columns = min(static_cast<int>(call.vocab) - left, kTileN);
  uint32* words = nullptr;
  float chunk_threshold = static_cast<float>(call.filter.eps * call.filter.slack);
  if (!kStatistics && call.bits != nullptr && row_tile * kTileM < count) {
    words = call.bits + row_tile * call.words + left / kColumnChunk;
    if (call.filter.unbiased)
      chunk_threshold *= uniform(shared.seed, row_tile, left / kColumnChunk + lane % kChunks);
  }
  Dropped dropped;
  // What is asked for besides has branches, beside which no products may be under way.
  if (!kPlain) finish_products();
#pragma unroll
  for (int m = 0; m < kBlocksM; ++m) {
    const int row = first_row(row_tile) + 64 * m;
    if (!kPlain) make_logits(z[m], call, left, columns, lane);
    if (__builtin_expect(columns < kTileN, 0)) {
#pragma unroll
      for (int j = 0; j < kSpans; ++j)
#pragma unroll
        for (int side = 0; side < 2; ++side)
          if (SumPlace::column(lane, j, side) >= columns)
            z[m][SumPlace::index(j, 0, side)] = z[m][SumPlace::index(j, 1, side)] = kMasked;
    }
    if (!kPlain) take_all<kStatistics>(z[m], call, row, count, left, columns, slot, first, lane);
    take_targets<kPlain>(z[m], shared, m, call, row, left, words, lane);
    RowSums sums(shared, m);
    add_block(z[m], sums, chunk_threshold, words != nullptr, dropped, lane, [&] {
      if (!kPlain || m > 0) return;
      finish_products();
      for (int other = 1; other < kBlocksM; ++other) settle(z[other]);
    });
    if (kStatistics) add_weighted(z[m], sums, shared, m, call, row, count, slot, first, lane);
    sums.keep(shared, m);
  }
  if (words != nullptr) mark_columns(dropped, words, lane);
}

}  // namespace cce
