// What a token loses, from the sums of its row, and the sum of all losses.
// Twin of cce_cupy/cpu/tokens.py.
#pragma once

#include "rows.cuh"

namespace cce {

struct LossOptions {
  double label_smoothing;
  double z_loss;
};

struct Weights {
  const Sum* of_class;  // by target, or null
  const Sum* of_token;  // by position, or null
  const double* smoothing_total;  // or null

  __device__ __forceinline__ double target(int64 target) const {
    return of_class == nullptr || target < 0 ? 1.0 : static_cast<double>(of_class[target]);
  }
  __device__ __forceinline__ double token(int64 position) const {
    return of_token == nullptr ? 1.0 : static_cast<double>(of_token[position]);
  }
};

// The sums of a row over the whole vocabulary, relative to exp(reference); the target's exponential
// is left out of `rest`, but not of `total` and `weighted`, which are the statistics'.
struct RowTotals {
  double reference = -infinity();
  double rest = 0;
  double target_logit = -infinity();
  double smoothed = 0;
  double total = 0;
  double weighted = 0;
  Sum best = -static_cast<Sum>(infinity());
  int64 argmax = 0;
};

// Where results go: row_lse by row, the others by position; null where not asked for.
struct RowOutputs {
  Sum* row_lse;
  Sum* loss;
  Sum* lse;
  Sum* log_prob;
  Sum* entropy;
  int64* argmax;
  int* unbounded;  // of each row tile, or null
};

// The sum of the losses and what it is multiplied by.
struct LossSum {
  double* parts;  // two for each block of the grid
  int* done;      // blocks that have left theirs; 0 before
  int mean;
  double* normalizer;
  Sum* loss;  // or null
};

__device__ __forceinline__ double log_add(double a, double b) {
  const double most = fmax(a, b), least = fmin(a, b);
  // fmax and fmin drop a NaN.
  if (a != a || b != b) return a + b;
  return most == -infinity() || most == infinity() ? most : most + log1p(exp(least - most));
}

// The sum over a block, in each of its threads.
template <int kThreads>
__device__ __forceinline__ double block_sum(double x, double* scratch) {
  const int thread = threadIdx.x + blockDim.x * threadIdx.y;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  __syncthreads();
  if (thread % 32 == 0) scratch[thread / 32] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kThreads / 32; ++i) total += scratch[i];
  return total;
}

// Place what depends on a row's token; return its loss.
__device__ __forceinline__ double finish_row(const RowMap& map, int64 row, const RowTotals& all,
                                             const LossOptions& options, const Weights& weights,
                                             const RowOutputs& out) {
  const int64 target = map.target[row], position = map.position[row];
  // The loss is softplus of the other entries' log-sum-exp minus the target logit: never negative,
  // exactly 0 where there are no others, and exact where it is tiny.
  const double others = all.reference + log(all.rest);
  double nll = log_add(0.0, others - all.target_logit);
  // Also where nothing but removed entries is left: -inf minus -inf is not a number.
  if (all.target_logit == -infinity() && others == others) nll = infinity();
  double sum = log_add(others, all.target_logit);
  if (target < 0) nll = sum = not_a_number();
  double value = weights.target(target) * nll;
  if (weights.smoothing_total != nullptr)
    value = (1.0 - options.label_smoothing) * value + (*weights.smoothing_total * sum - all.smoothed);
  if (options.z_loss > 0) value += options.z_loss * weights.target(target) * sum * sum;
  value *= weights.token(position);

  out.row_lse[row] = static_cast<Sum>(sum);
  if (out.loss != nullptr) out.loss[position] = static_cast<Sum>(value);
  if (out.lse != nullptr) out.lse[position] = static_cast<Sum>(sum);
  if (out.log_prob != nullptr) out.log_prob[position] = static_cast<Sum>(0.0 - nll);
  if (out.entropy != nullptr) {
    const double h = log(all.total) - all.weighted / all.total;
    out.entropy[position] = static_cast<Sum>(h < 0 ? 0.0 : h);
  }
  if (out.argmax != nullptr) out.argmax[position] = all.argmax;
  // A row that is not finite makes every column of the gradients so.
  if (out.unbounded != nullptr && !isfinite(static_cast<Sum>(sum)))
    atomicOr(&out.unbounded[row / kRowTile], 1);
  return value;
}

// Add up a loss and a weight from every thread of the grid; the block that comes last does it, always
// in the same order.
template <int kThreads>
__device__ __forceinline__ void sum_losses(const LossSum& losses, double loss, double weight) {
  __shared__ double scratch[kThreads / 32];
  __shared__ bool last;
  const int thread = threadIdx.x + blockDim.x * threadIdx.y;
  loss = block_sum<kThreads>(loss, scratch);
  weight = block_sum<kThreads>(weight, scratch);
  if (thread == 0) {
    losses.parts[2 * static_cast<int64>(blockIdx.x)] = loss;
    losses.parts[2 * static_cast<int64>(blockIdx.x) + 1] = weight;
    __threadfence();
    last = atomicAdd(losses.done, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  loss = weight = 0;
  for (int64 i = thread; i < gridDim.x; i += kThreads) {
    loss += __ldcg(losses.parts + 2 * i);
    weight += __ldcg(losses.parts + 2 * i + 1);
  }
  loss = block_sum<kThreads>(loss, scratch);
  weight = block_sum<kThreads>(weight, scratch);
  if (thread == 0) {
    *losses.normalizer = !losses.mean ? 1.0 : weight > 0 ? 1.0 / weight : 0.0;
    if (losses.loss != nullptr) *losses.loss = static_cast<Sum>(loss * *losses.normalizer);
  }
}

}  // namespace cce
