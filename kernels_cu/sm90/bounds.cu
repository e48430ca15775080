// A first lower bound of each row's lse on Hopper, from the logits of its row tile's targets: neighbours mean
// much the same, and what the sweep marks before it has seen much of the vocabulary is tested against it.

#include "state.cuh"

namespace cce {

constexpr int kBoundThreads = 256;
constexpr int kBoundRows = 32;  // of a block
constexpr int kRowWarps = kBoundRows / 16;
constexpr int kShares = kBoundThreads / 32 / kRowWarps;  // of the tile's targets, one for each of a row's warps
constexpr int kShare = kRowTile / kShares;
constexpr int kWords = 2;  // of a row that a lane loads at a time
constexpr int kWordElements = 16 / sizeof(Storage);

// A word of a row; zeros past its end. The load has no condition: behind branches each would be waited for.
__device__ __forceinline__ uint4 word_of(const Storage* row, int word, int words) {
  const uint4 found = reinterpret_cast<const uint4*>(row)[min(word, words - 1)];
  const bool there = word < words;
  return make_uint4(there ? found.x : 0, there ? found.y : 0, there ? found.z : 0,
                    there ? found.w : 0);
}

}  // namespace cce

using namespace cce;

// Raises what target_logits left. Grid: a block for each kBoundRows.
extern "C" __global__ void __launch_bounds__(kBoundThreads, 2)
    first_bound(Matrix e, Matrix c, const Storage* bias, int64 dim, LogitOptions options, RowMap map,
                int* bound) {
  __shared__ int target[kRowTile];
  __shared__ float most[kShares][kBoundRows], sum[kShares][kBoundRows];
  const int64 first = blockIdx.x * static_cast<int64>(kBoundRows), count = *map.count;
  if (first >= count) return;
  const int64 top = first / kRowTile * kRowTile;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, q = lane % 4;
  const int place = warp % kRowWarps * 16 + lane / 4, share = warp / kRowWarps;
  if (thread < kRowTile)
    target[thread] = top + thread < count ? static_cast<int>(map.target[top + thread]) : -1;
  __syncthreads();
  bool again = false;
#pragma unroll 8
  for (int i = 0; i < thread && thread < kRowTile; ++i) again |= target[i] == target[thread];
  __syncthreads();
  // A class counts once.
  if (again) target[thread] = -1;
  __syncthreads();
  // Rows past the last have no bound to raise.
  const Storage* row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half)
    row[half] = e.row(map.source[min(first + place + 8 * half, count - 1)]);
  const Storage* of_target[kShare / 8];
#pragma unroll
  for (int n = 0; n < kShare / 8; ++n) {
    const int own = target[share * kShare + 8 * n + lane / 4];
    // What stands in for one that is not there counts for nothing.
    of_target[n] = own < 0 ? row[0] : c.row(own);
  }
  float z[kShare / 8][4] = {};
  const int words = static_cast<int>(dim / kWordElements);
  for (int first_word = 0; first_word < words; first_word += 4 * kWords) {
    uint4 a[kWords], below[kWords], b[kWords][kShare / 8];
    // All loads first.
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const int word = first_word + 4 * k + q;
      a[k] = word_of(row[0], word, words);
      below[k] = word_of(row[1], word, words);
#pragma unroll
      for (int n = 0; n < kShare / 8; ++n) b[k][n] = word_of(of_target[n], word, words);
    }
    // A sum does not mind in which order a lane's elements come, if it is the same one on both sides.
#pragma unroll
    for (int k = 0; k < kWords; ++k)
#pragma unroll
      for (int n = 0; n < kShare / 8; ++n) {
        product_16x8x16(z[n], a[k].x, below[k].x, a[k].y, below[k].y, b[k][n].x, b[k][n].y);
        product_16x8x16(z[n], a[k].z, below[k].z, a[k].w, below[k].w, b[k][n].z, b[k][n].w);
      }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = kLowest, total = 0;
#pragma unroll
    for (int n = 0; n < kShare / 8; ++n)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int own = target[share * kShare + 8 * n + 2 * q + side];
        float& logit = z[n][2 * half + side];
        logit = own < 0 ? kMasked : make_logit(logit, bias, own, options) * kLog2E;
        largest = fmaxf(largest, logit);
      }
    largest = quad_largest(largest);
#pragma unroll
    for (int n = 0; n < kShare / 8; ++n)
#pragma unroll
      for (int side = 0; side < 2; ++side) total += power_of_two(z[n][2 * half + side] - largest);
    total = quad_sum(total);
    if (q != 0) continue;
    most[share][place + 8 * half] = largest;
    sum[share][place + 8 * half] = total;
  }
  __syncthreads();
  if (thread >= kBoundRows || first + thread >= count) return;
  float largest = kLowest, total = 0;
#pragma unroll
  for (int i = 0; i < kShares; ++i) largest = fmaxf(largest, most[i][thread]);
#pragma unroll
  for (int i = 0; i < kShares; ++i)
    total += sum[i][thread] * power_of_two(most[i][thread] - largest);
  // Of a sum that is not a number, or of none, nothing follows.
  if (total > 0 && total < kHighest) {
    const int found = ordered(largest + logarithm_to_two(total));
    if (found > bound[first + thread]) bound[first + thread] = found;
  }
}
