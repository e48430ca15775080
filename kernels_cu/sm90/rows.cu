// Around the forward on Hopper, what is done for each row: before it the target's logit, after it the
// loss.

#include "../loss.cuh"
#include "state.cuh"

using namespace cce;

// The logit of each row's target from a product of its own: what the row's sums are relative to, and
// a first lower bound of its lse. One warp a row. Also packs the rows of e that do not follow each other in
// their row tile, and all of a single one, where there is room for `packed_rows`; and clears the bits, of
// `words` words.
extern "C" __global__ void __launch_bounds__(256)
    target_logits(Matrix e, Matrix c, const Storage* bias, int64 dim, LogitOptions options,
                  RowMap map, float* own, int* bound, float* finished, float* target_logit,
                  Storage* packed, int64 packed_rows, uint32* bits, int64 words) {
  const int64 thread = blockIdx.x * static_cast<int64>(blockDim.x) + threadIdx.x;
  for (int64 i = thread; i < words; i += static_cast<int64>(gridDim.x) * blockDim.x) bits[i] = 0;
  const int64 row = thread / 32;
  const int lane = threadIdx.x % 32, count = static_cast<int>(*map.count);
  struct alignas(16) Word {
    Storage value[8];
  };
  const bool packs = packed != nullptr && (packed_rows <= kTileM ||
                                           !TileRows(map, count, row / kTileM).follow);
  Word* to = reinterpret_cast<Word*>(packed + row * dim);
  if (row >= count) {
    // Sums of what happens to lie there could be too large, which takes time.
    for (int64 i = lane; packs && row < packed_rows && i < dim / 8; i += 32) to[i] = Word{};
    return;
  }
  const float lowest = -static_cast<float>(infinity());
  const int64 target = map.target[row];
  const Word* left = reinterpret_cast<const Word*>(e.row(map.source[row]));
  const Word* right = reinterpret_cast<const Word*>(c.row(max(target, int64(0))));
  float sum = 0;
  for (int64 i = lane; i < dim / 8; i += 32) {
    const Word a = left[i], b = right[i];
    if (packs) to[i] = a;
#pragma unroll
    for (int k = 0; k < 8; ++k) sum = fmaf(widen(a.value[k]), widen(b.value[k]), sum);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane != 0) return;
  const float logit = target < 0 ? lowest : make_logit(sum, bias, target, options);
  own[row] = logit;
  bound[row] = ordered(logit > kLowest ? logit * kLog2E : kLowest);
  finished[row] = 1.0f;
  target_logit[row] = lowest;
}

// What units left, merged, and then as finish_rows of portable/tokens.cu. Block: (32, 16), a row for
// each x.
constexpr int kMergers = 16;

extern "C" __global__ void __launch_bounds__(32 * kMergers)
    finish_rows(RowMap map, UnitSums parts, int64 number, int64 capacity, const float* target_logit,
                LossOptions options, Weights weights, RowOutputs outputs, LossSum losses) {
  __shared__ double shared[5][kMergers][33];
  __shared__ int64 place[kMergers][33];
  const int x = threadIdx.x, y = threadIdx.y;
  const int64 row = blockIdx.x * 32ll + x, count = *map.count;
  // In powers of two.
  double most = kLowest, sum = 0, smooth = 0, weighted_sum = 0, largest = -infinity();
  int64 at_largest = 0;
  auto add = [&](double reference, double rest, double smoothed, double weighted, double best,
                 int64 argmax) {
    const double joint = fmax(most, reference);
    const double mine = most == joint ? 1.0 : exp2(most - joint);
    const double theirs = reference == joint ? 1.0 : exp2(reference - joint);
    weighted_sum = (weighted_sum + (sum > 0 ? (most - joint) * sum : 0.0)) * mine +
                   (weighted + (rest > 0 ? (reference - joint) * rest : 0.0)) * theirs;
    sum = sum * mine + rest * theirs;
    smooth += smoothed;
    const bool nan = largest != largest, their_nan = best != best, earlier = argmax < at_largest;
    if (their_nan ? !nan || earlier : !nan && (best > largest || (best == largest && earlier))) {
      largest = best;
      at_largest = argmax;
    }
    // fmax drops a NaN.
    most = reference != reference ? reference : joint;
  };
  const bool all = parts.best != nullptr;
  if (row < count) {
#pragma unroll 4
    for (int64 i = y; i < number; i += kMergers) {
      const int64 at = i * capacity + row;
      add(parts.reference[at], parts.rest[at], parts.smoothed == nullptr ? 0.0 : parts.smoothed[at],
          all ? parts.weighted[at] : 0.0, all ? parts.best[at] : -infinity(),
          all ? parts.argmax[at] : 0);
    }
  }
  // Half of those that have anything hand it to the others.
  for (int left = kMergers / 2; left > 0; left /= 2) {
    if (y >= left && y < 2 * left) {
      shared[0][y][x] = most;
      shared[1][y][x] = sum;
      shared[2][y][x] = smooth;
      shared[3][y][x] = weighted_sum;
      shared[4][y][x] = largest;
      place[y][x] = at_largest;
    }
    __syncthreads();
    const int other = y + left;
    if (y < left && row < count)
      add(shared[0][other][x], shared[1][other][x], shared[2][other][x], shared[3][other][x],
          shared[4][other][x], place[other][x]);
  }
  double loss = 0, weight = 0;
  if (y == 0 && row < count) {
    // From powers of two to those of e.
    const double unit = static_cast<double>(kLog2E);
    RowTotals totals;
    totals.reference = most / unit;
    totals.rest = sum;
    totals.smoothed = smooth;
    totals.target_logit = target_logit[row];
    if (all) {
      const double own = exp(totals.target_logit - totals.reference);
      totals.total = sum + own;
      totals.weighted =
          weighted_sum / unit + (own > 0 ? own * (totals.target_logit - totals.reference) : 0.0);
      totals.best = static_cast<float>(largest);
      totals.argmax = at_largest;
    }
    loss = finish_row(map, row, totals, options, weights, outputs);
    weight = weights.target(map.target[row]) * weights.token(map.position[row]);
  }
  sum_losses<32 * kMergers>(losses, loss, weight);
}
