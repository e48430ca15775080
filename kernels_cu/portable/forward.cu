// The forward: every logit once. Leaves for each row and vocabulary segment its running sums, and
// for each row tile and column the bit that says whether the backward will touch it.

#include "../columns.cuh"
#include "../logits.cuh"
#include "product.cuh"
#include "../rows.cuh"

namespace cce {

// What a segment leaves for each row; arrays of (segments, rows), those of statistics may be null.
struct SegmentSums {
  Sum* reference;       // exponent that the sums are relative to
  double* rest;         // sum of exp(z - reference), the target's left out
  Sum* target_logit;    // -inf where the target is in another segment
  double* smoothed;     // sum of smoothing[v] z[v]
  double* total;        // sum of exp(z - reference), target included
  double* weighted;     // sum of exp(z - reference) (z - reference)
  Sum* best;            // largest logit
  int64* argmax;
};

struct ForwardShared {
  ProductStages stages;
  int64 target[kRowTile];
  Sum bound[kRowTile];
  Sum reference[kRowTile];
  Sum target_logit[kRowTile];
  double rest[kRowTile];
  double smoothed[kRowTile];
  uint32 largest[kBlockN];              // of each column, as the bits of a float >= 0
  uint32 targets[kBlockN / kColumnChunk];  // columns that are some row's target
};

// Room for the sums that only statistics need.
struct StatisticsShared {
  double total[kRowTile];
  double weighted[kRowTile];
  Sum best[kRowTile];
  int64 argmax[kRowTile];
};

// The largest value of the kSideN threads that share a row; drops NaN.
__device__ __forceinline__ Sum row_largest(Sum x) {
#pragma unroll
  for (int step = kSideN / 2; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ Sum row_sum(Sum x) {
#pragma unroll
  for (int step = kSideN / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

}  // namespace cce

using namespace cce;

// A lower bound of each row's lse from the logits of its row tile's targets, and the logit of the
// row's own: what a row's sums are relative to may not depend on its neighbours. Grid: row tiles.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    first_bound(Matrix e, Matrix c, const Storage* bias, int64 dim, LogitOptions options,
                RowMap map, Sum* bound, Sum* own) {
  const int64 top = blockIdx.x * static_cast<int64>(kRowTile);
  const int64 count = *map.count;
  if (top >= count) return;
  __shared__ ProductStages stages;
  __shared__ int64 target[kRowTile];
  __shared__ bool distinct[kRowTile];
  const int rows = static_cast<int>(min(static_cast<int64>(kRowTile), count - top));
  if (threadIdx.x < kRowTile)
    target[threadIdx.x] = threadIdx.x < rows ? map.target[top + threadIdx.x] : -1;
  __syncthreads();
  if (threadIdx.x < kRowTile) {
    // A target that several rows share may count once only: the bound is a sum over columns.
    bool first = target[threadIdx.x] >= 0;
    for (int i = 0; i < threadIdx.x; ++i) first = first && target[i] != target[threadIdx.x];
    distinct[threadIdx.x] = first;
    if (threadIdx.x < rows && target[threadIdx.x] < 0)
      own[top + threadIdx.x] = -static_cast<Sum>(infinity());
  }
  __syncthreads();

  auto embedding = [&](int row) { return row < rows ? e.row(map.source[top + row]) : nullptr; };
  static_assert(kBlockN >= kRowTile, "a row tile has as many targets");
  auto classifier = [&](int at) {
    return at < rows && distinct[at] ? c.row(target[at]) : nullptr;
  };
  AlongDepth<Storage, kBlockM> a(embedding, dim);
  AlongDepth<Storage, kBlockN> b(classifier, dim);
  Sum z[kThreadM][kThreadN] = {};
  multiply(stages, a, b, static_cast<int>(dim), e.aligned && c.aligned, z);

  const Sum lowest = -static_cast<Sum>(infinity());
  const Places places;
#pragma unroll
  for (int i = 0; i < kThreadM; ++i) {
    const int row = places.row(i);
    Sum most = lowest;
#pragma unroll
    for (int j = 0; j < kThreadN; ++j) {
      const int at = places.column(j);
      const bool counts = at < rows && distinct[at];
      z[i][j] = counts ? make_logit(z[i][j], bias, target[at], options) : lowest;
      if (counts && target[at] == target[row]) own[top + row] = z[i][j];
      most = larger(most, z[i][j]);
    }
    most = row_largest(most);
    // Where all are -inf any finite reference will do.
    const Sum reference = most == lowest ? Sum(0) : most;
    Sum sum = 0;
#pragma unroll
    for (int j = 0; j < kThreadN; ++j) sum += exponential(z[i][j] - reference);
    sum = row_sum(sum);
    if (threadIdx.x % kSideN == 0 && row < rows)
      bound[top + row] = most == lowest ? lowest : most + logarithm(sum);
  }
}

template <bool kStatistics>
__device__ __forceinline__ void
    visit_segment(Matrix e, Matrix c, const Storage* bias, const Sum* smoothing, int64 dim, int64 vocab,
            int64 segment_columns, int64 capacity, LogitOptions options, Filter filter, RowMap map,
            const Sum* first, const Sum* own, SegmentSums out, uint32* bits, int64 words) {
  const int64 tile = blockIdx.x, top = tile * kRowTile, count = *map.count;
  if (top >= count) return;
  __shared__ ForwardShared shared;
  __shared__ StatisticsShared stats;
  const int rows = static_cast<int>(min(static_cast<int64>(kRowTile), count - top));
  const Sum lowest = -static_cast<Sum>(infinity());
  if (threadIdx.x < kRowTile) {
    const int row = threadIdx.x;
    const bool counts = row < rows;
    shared.target[row] = counts ? map.target[top + row] : -1;
    const Sum bound = counts ? first[top + row] : lowest;
    shared.bound[row] = bound;
    shared.reference[row] = counts ? own[top + row] : lowest;
    shared.target_logit[row] = lowest;
    shared.rest[row] = 0;
    shared.smoothed[row] = 0;
    if (kStatistics) {
      stats.total[row] = stats.weighted[row] = 0;
      stats.best[row] = lowest;
      stats.argmax[row] = 0;
    }
  }
  if (threadIdx.x < kBlockN) shared.largest[threadIdx.x] = 0;
  if (threadIdx.x < kBlockN / kColumnChunk) shared.targets[threadIdx.x] = 0;
  __syncthreads();

  auto embedding = [&](int row) { return row < rows ? e.row(map.source[top + row]) : nullptr; };
  const int64 begin = blockIdx.y * segment_columns;
  const int64 end = min(begin + segment_columns, vocab);
  for (int64 left = begin; left < end; left += kBlockN) {
    auto classifier = [&](int column) {
      return left + column < end ? c.row(left + column) : nullptr;
    };
    AlongDepth<Storage, kBlockM> a(embedding, dim);
    AlongDepth<Storage, kBlockN> b(classifier, dim);
    Sum z[kThreadM][kThreadN] = {};
    multiply(shared.stages, a, b, static_cast<int>(dim), e.aligned && c.aligned, z);
    const Places places;

    // Column by column, so that what belongs to a column is held for one at a time. The branches of
    // the options are taken once, not for each logit.
    const int columns = static_cast<int>(min(end - left, static_cast<int64>(kBlockN)));
    if (bias == nullptr && options.softcap <= 0.0) {
      const LogitOptions scale_alone = {options.scale, 0.0};
#pragma unroll
      for (int j = 0; j < kThreadN; ++j)
#pragma unroll
        for (int i = 0; i < kThreadM; ++i) z[i][j] = make_logit(z[i][j], nullptr, 0, scale_alone);
    } else {
#pragma unroll
      for (int j = 0; j < kThreadN; ++j) {
        const int column = min(places.column(j), columns - 1);
#pragma unroll
        for (int i = 0; i < kThreadM; ++i)
          z[i][j] = make_logit(z[i][j], bias, left + column, options);
      }
    }
    if (columns < kBlockN) {
#pragma unroll
      for (int j = 0; j < kThreadN; ++j)
        if (places.column(j) >= columns) {
#pragma unroll
          for (int i = 0; i < kThreadM; ++i) z[i][j] = lowest;
        }
    }
    uint32 largest[kThreadN] = {};
#pragma unroll
    for (int i = 0; i < kThreadM; ++i) {
      const int row = places.row(i);
      const int64 ahead = shared.target[row] - left;
      const int target = ahead >= 0 && ahead < columns ? static_cast<int>(ahead) : -1;
      Sum highest = lowest, smoothed = 0;
      int at_highest = 0;
#pragma unroll
      for (int j = 0; j < kThreadN; ++j) {
        const Sum logit = z[i][j];
        if (kStatistics) {
          if (logit > highest || (logit != logit && highest == highest)) {
            highest = logit;
            at_highest = places.column(j);
          }
        } else {
          highest = larger(highest, logit);
        }
        if (target == places.column(j)) shared.target_logit[row] = logit;
      }
      if (smoothing != nullptr) {
#pragma unroll
        for (int j = 0; j < kThreadN; ++j)
          if (z[i][j] != lowest) smoothed += smoothing[left + places.column(j)] * z[i][j];
      }
      // A reference that is kept keeps its sums as they are; it moves before they overflow.
      const Sum most = row_largest(highest);
      const Sum old = shared.reference[row];
      Sum reference = most - old > Sum(60) ? most : old;
      // Where everything so far is -inf any finite reference will do.
      if (reference == lowest) reference = Sum(0);
      // The bits take exp(z - bound) as a product. Its second factor in two: where the bound is far
      // ahead it would underflow, and the product need not.
      const Sum weight = exponential((reference - shared.bound[row]) / 2);
      Sum rest = 0, total = 0, weighted = 0;
#pragma unroll
      for (int j = 0; j < kThreadN; ++j) {
        const Sum centred = z[i][j] - reference;
        const Sum s = exponential(centred);
        if (target != places.column(j)) rest += s;
        if (kStatistics) {
          total += s;
          weighted += s == Sum(0) ? Sum(0) : s * centred;
        }
        z[i][j] = s;
      }
      if (bits != nullptr && row < rows) {
        // The bits of floats that are not negative are ordered like them, with NaN on top.
#pragma unroll
        for (int j = 0; j < kThreadN; ++j)
          largest[j] = max(largest[j], __float_as_uint(static_cast<float>(z[i][j] * weight * weight)));
      }
      rest = row_sum(rest);
      if (smoothing != nullptr) smoothed = row_sum(smoothed);
      if (kStatistics) {
        total = row_sum(total);
        weighted = row_sum(weighted);
#pragma unroll
        for (int step = kSideN / 2; step > 0; step /= 2) {
          const Sum other = __shfl_xor_sync(~0u, highest, step);
          const int other_at = __shfl_xor_sync(~0u, at_highest, step);
          const bool nan = highest != highest, other_nan = other != other;
          const bool better = other_nan ? !nan || other_at < at_highest
                                        : !nan && (other > highest || (other == highest && other_at < at_highest));
          if (better) {
            highest = other;
            at_highest = other_at;
          }
        }
      }
      __syncwarp();
      if (threadIdx.x % kSideN == 0) {
        const double shrink = reference == old ? 1.0 : exp(static_cast<double>(old - reference));
        if (kStatistics) {
          const double before = stats.total[row];
          const double carried =
              before > 0 ? stats.weighted[row] + (old - reference) * before : stats.weighted[row];
          stats.weighted[row] = carried * shrink + weighted;
          stats.total[row] = before * shrink + total;
          const bool nan = stats.best[row] != stats.best[row];
          if (!nan && (highest > stats.best[row] || highest != highest)) {
            stats.best[row] = highest;
            stats.argmax[row] = left + at_highest;
          }
        }
        shared.rest[row] = shared.rest[row] * shrink + rest;
        shared.smoothed[row] += smoothed;
        shared.reference[row] = reference;
        const Sum seen = reference + logarithm(static_cast<Sum>(shared.rest[row]));
        shared.bound[row] = larger(shared.bound[row], seen);
      }
      if (bits != nullptr && target >= 0 && threadIdx.x % kSideN == 0)
        atomicOr(&shared.targets[target / kColumnChunk], 1u << (target % kColumnChunk));
    }
    if (bits != nullptr) {
#pragma unroll
      for (int j = 0; j < kThreadN; ++j)
        atomicMax(&shared.largest[places.column(j)], largest[j]);
      __syncthreads();
      if (threadIdx.x < kBlockN) {
        const int64 column = left + threadIdx.x, chunk = column / kColumnChunk;
        float threshold = static_cast<float>(filter.eps * filter.slack);
        if (filter.unbiased) threshold *= uniform(*map.seed, tile, chunk);
        const float found = __uint_as_float(shared.largest[threadIdx.x]);
        // Not (found >= threshold): a NaN must be kept, so that it reaches the gradients.
        const uint32 word = __ballot_sync(~0u, column < end && !(found < threshold));
        if (threadIdx.x % kColumnChunk == 0 && column < end) {
          const int part = threadIdx.x / kColumnChunk;
          bits[tile * words + chunk] = word | shared.targets[part];
          shared.targets[part] = 0;
        }
        shared.largest[threadIdx.x] = 0;
      }
    }
    __syncthreads();
  }

  if (threadIdx.x < rows) {
    const int row = threadIdx.x;
    const int64 at = blockIdx.y * capacity + top + row;
    out.reference[at] = shared.reference[row];
    out.rest[at] = shared.rest[row];
    out.target_logit[at] = shared.target_logit[row];
    out.smoothed[at] = shared.smoothed[row];
    if (kStatistics) {
      out.total[at] = stats.total[row];
      out.weighted[at] = stats.weighted[row];
      out.best[at] = stats.best[row];
      out.argmax[at] = stats.argmax[row];
    }
  }
}

#define CCE_FORWARD_ARGUMENTS                                                                    \
  Matrix e, Matrix c, const Storage *bias, const Sum *smoothing, int64 dim, int64 vocab,         \
      int64 segment_columns, int64 capacity, LogitOptions options, Filter filter, RowMap map,    \
      const Sum *first, const Sum *own, SegmentSums out, uint32 *bits, int64 words

// Grid: (row tiles, segments of whole column blocks).
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) forward(CCE_FORWARD_ARGUMENTS) {
  visit_segment<false>(e, c, bias, smoothing, dim, vocab, segment_columns, capacity, options,
                       filter, map, first, own, out, bits, words);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) forward_statistics(CCE_FORWARD_ARGUMENTS) {
  visit_segment<true>(e, c, bias, smoothing, dim, vocab, segment_columns, capacity, options,
                      filter, map, first, own, out, bits, words);
}
