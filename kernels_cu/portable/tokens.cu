// Which tokens count, what each of them loses, and the factors of its row in the backward.
// Twin of cce_cupy/cpu/tokens.py. All of it is O(N + V); one block walks where order matters.

#include "../columns.cuh"
#include "../number.cuh"
#include "../rows.cuh"

namespace cce {

constexpr int kWalkers = 1024;  // threads of the kernels that run as one block
constexpr int kWarps = kWalkers / 32;

__device__ __forceinline__ double block_sum(double x, double* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += scratch[i];
  return total;
}

// Targets as they come: any integer dtype.
struct Targets {
  const void* data;
  int bytes;
  int is_signed;

  // The value, or -1 where it is above what int64 holds, which no class is.
  __device__ __forceinline__ int64 read(int64 i) const {
    switch (bytes) {
      case 1:
        return is_signed ? static_cast<const signed char*>(data)[i]
                         : static_cast<const unsigned char*>(data)[i];
      case 2:
        return is_signed ? static_cast<const short*>(data)[i]
                         : static_cast<const unsigned short*>(data)[i];
      case 4:
        return is_signed ? static_cast<const int*>(data)[i]
                         : static_cast<int64>(static_cast<const unsigned int*>(data)[i]);
      default:
        return static_cast<const int64*>(data)[i];
    }
  }
  __device__ __forceinline__ bool too_large(int64 value) const {
    return bytes == 8 && !is_signed && value < 0;
  }
};

}  // namespace cce

using namespace cce;

// Map the tokens that are paired and not ignored to compact rows, in order. One block.
extern "C" __global__ void __launch_bounds__(kWalkers)
    map_rows(Targets targets, int64 tokens, int64 length, int64 shift, int64 ignore_index,
             int ignore_above, int64 vocab, int has_seed, uint64 given_seed, int64* source, int64* position,
             int64* target, int64* count, uint64* seed, int64* first_wrong) {
  __shared__ int64 before[kWarps + 1];
  __shared__ uint32 hash_low, hash_high;
  if (threadIdx.x == 0) {
    hash_low = hash_high = 0;
    *first_wrong = tokens;
  }
  __syncthreads();
  int64 done = 0;
  uint32 low = 0, high = 0;
  for (int64 start = 0; start < tokens; start += kWalkers) {
    const int64 i = start + threadIdx.x;
    int64 value = 0;
    bool counts = false;
    if (i < tokens) {
      value = targets.read(i);
      const bool too_large = targets.too_large(value);
      // ignore_above: 1 where only a uint64 holds ignore_index, 2 where no dtype does.
      const bool ignored = too_large == (ignore_above != 0) && ignore_above != 2 &&
                           value == ignore_index;
      counts = !ignored && i % length >= shift;
      if (too_large) value = -1;
    }
    const uint32 ballot = __ballot_sync(~0u, counts);
    __syncthreads();
    if (threadIdx.x % 32 == 0) before[threadIdx.x / 32 + 1] = __popc(ballot);
    __syncthreads();
    if (threadIdx.x == 0) {
      before[0] = 0;
      for (int warp = 0; warp < kWarps; ++warp) before[warp + 1] += before[warp];
    }
    __syncthreads();
    if (counts) {
      const uint32 earlier = ballot & ((1u << threadIdx.x % 32) - 1u);
      const int64 row = done + before[threadIdx.x / 32] + __popc(earlier);
      const bool wrong = value < 0 || value >= vocab;
      source[row] = i - shift;
      position[row] = i;
      target[row] = wrong ? -1 : value;
      if (wrong) atomicMin(first_wrong, i);
      const uint32 counter = static_cast<uint32>(row) * 0x9E3779B9u;
      const uint32 hashed =
          mix(mix(counter ^ static_cast<uint32>(value >> 32)) ^ static_cast<uint32>(value));
      high += hashed;
      low += mix(hashed ^ 0x85EBCA6Bu);
    }
    done += before[kWarps];
  }
  // Sums of integers: the same in any order.
  atomicAdd(&hash_high, high);
  atomicAdd(&hash_low, low);
  __syncthreads();
  if (threadIdx.x == 0) {
    *count = done;
    *seed = has_seed ? given_seed : static_cast<uint64>(hash_high) << 32 | hash_low;
  }
}

// What each entry's log-probability weighs under label smoothing, and their total. One block.
extern "C" __global__ void __launch_bounds__(kWalkers)
    smoothing_weights(const Storage* bias, const Sum* class_weight, int64 vocab, double alpha,
                      Sum* smoothing, double* total) {
  __shared__ double scratch[kWarps];
  const Sum removed = -static_cast<Sum>(infinity());
  double present = 0;
  for (int64 v = threadIdx.x; v < vocab; v += kWalkers)
    present += bias == nullptr || widen(bias[v]) != removed;
  present = block_sum(present, scratch);
  const Sum each = static_cast<Sum>(alpha / (present > 0 ? present : 1.0));
  double sum = 0;
  for (int64 v = threadIdx.x; v < vocab; v += kWalkers) {
    const bool counts = bias == nullptr || widen(bias[v]) != removed;
    const Sum weight = class_weight == nullptr ? Sum(1) : class_weight[v];
    smoothing[v] = counts ? weight * each : Sum(0);
    sum += smoothing[v];
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) *total = sum;
}

namespace cce {

// What the segments left; see forward.cu.
struct Segments {
  const Sum* reference;
  const double* rest;
  const Sum* target_logit;
  const double* smoothed;
  const double* total;
  const double* weighted;
  const Sum* best;
  const int64* argmax;
  int64 number;
  int64 capacity;
};

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

__device__ __forceinline__ double log_add(double a, double b) {
  const double most = fmax(a, b), least = fmin(a, b);
  // fmax and fmin drop a NaN.
  if (a != a || b != b) return a + b;
  return most == -infinity() || most == infinity() ? most : most + log1p(exp(least - most));
}

}  // namespace cce

// Merge the segments of each row; place what depends on tokens. Outputs that are null are not asked
// for. One thread a row.
extern "C" __global__ void finish_rows(RowMap map, Segments parts, LossOptions options,
                                       Weights weights, double* row_loss, Sum* row_lse, Sum* loss,
                                       Sum* lse, Sum* log_prob, Sum* entropy, int64* argmax,
                                       int* unbounded) {
  const int64 row = blockIdx.x * static_cast<int64>(blockDim.x) + threadIdx.x;
  if (row >= *map.count) return;
  double reference = -infinity(), rest = 0, target_logit = -infinity(), smoothed = 0;
  double total = 0, weighted = 0;
  Sum best = -static_cast<Sum>(infinity());
  int64 at_best = 0;
  for (int64 i = 0; i < parts.number; ++i) {
    const int64 at = i * parts.capacity + row;
    const double theirs = parts.reference[at];
    const double joint = fmax(reference, theirs);
    const double shrink = exp(reference - joint), grow = exp(theirs - joint);
    rest = rest * shrink + parts.rest[at] * grow;
    const double logit = parts.target_logit[at];
    target_logit = logit != logit ? logit : fmax(target_logit, logit);
    smoothed += parts.smoothed[at];
    if (parts.total != nullptr) {
      const double mine = total > 0 ? weighted + (reference - joint) * total : weighted;
      const double added = parts.total[at] > 0
                               ? parts.weighted[at] + (theirs - joint) * parts.total[at]
                               : parts.weighted[at];
      weighted = mine * shrink + added * grow;
      total = total * shrink + parts.total[at] * grow;
      const Sum value = parts.best[at];
      if (best == best && (value > best || value != value)) {
        best = value;
        at_best = parts.argmax[at];
      }
    }
    reference = joint;
  }
  const int64 target = map.target[row], position = map.position[row];
  // The loss is softplus of the other entries' log-sum-exp minus the target logit: never negative,
  // exactly 0 where there are no others, and exact where it is tiny.
  const double others = reference + log(rest);
  double nll = log_add(0.0, others - target_logit);
  // Also where nothing but removed entries is left: -inf minus -inf is not a number.
  if (target_logit == -infinity() && others == others) nll = infinity();
  double sum = log_add(others, target_logit);
  if (target < 0) nll = sum = not_a_number();
  double value = weights.target(target) * nll;
  if (weights.smoothing_total != nullptr)
    value = (1.0 - options.label_smoothing) * value + (*weights.smoothing_total * sum - smoothed);
  if (options.z_loss > 0) value += options.z_loss * weights.target(target) * sum * sum;
  value *= weights.token(position);

  row_loss[row] = value;
  row_lse[row] = static_cast<Sum>(sum);
  if (loss != nullptr) loss[position] = static_cast<Sum>(value);
  if (lse != nullptr) lse[position] = static_cast<Sum>(sum);
  if (log_prob != nullptr) log_prob[position] = static_cast<Sum>(0.0 - nll);
  if (entropy != nullptr) {
    const double h = log(total) - weighted / total;
    entropy[position] = static_cast<Sum>(h < 0 ? 0.0 : h);
  }
  if (argmax != nullptr) argmax[position] = at_best;
  // A row that is not finite makes every column of the gradients so.
  if (unbounded != nullptr && !isfinite(static_cast<Sum>(sum)))
    atomicOr(&unbounded[row / kRowTile], 1);
}

// The sum of the losses, and what it is multiplied by. One block; always in the same order.
extern "C" __global__ void __launch_bounds__(kWalkers)
    reduce_loss(RowMap map, Weights weights, int mean, const double* row_loss, double* normalizer,
                Sum* loss) {
  __shared__ double scratch[kWarps];
  const int64 count = *map.count;
  double sum = 0, weight = 0;
  for (int64 row = threadIdx.x; row < count; row += kWalkers) {
    sum += row_loss[row];
    weight += weights.target(map.target[row]) * weights.token(map.position[row]);
  }
  sum = block_sum(sum, scratch);
  weight = block_sum(weight, scratch);
  if (threadIdx.x == 0) {
    *normalizer = !mean ? 1.0 : weight > 0 ? 1.0 / weight : 0.0;
    if (loss != nullptr) *loss = static_cast<Sum>(sum * *normalizer);
  }
}

// Factors of each row in dz = softmax p - onehot [v == target] - smoothing s_v. One thread a row.
extern "C" __global__ void row_factors(RowMap map, LossOptions options, Weights weights,
                                       const Storage* bias, const double* normalizer,
                                       const Sum* row_lse, const Sum* dloss, int dloss_by_token,
                                       const Sum* dlse, Sum* softmax, Sum* onehot, Sum* smoothing) {
  const int64 row = blockIdx.x * static_cast<int64>(blockDim.x) + threadIdx.x;
  if (row >= *map.count) return;
  const int64 target = map.target[row], position = map.position[row];
  const double upstream = dloss == nullptr ? 1.0 : static_cast<double>(dloss[dloss_by_token ? position : 0]);
  const double weight = upstream * *normalizer * weights.token(position);
  const double own = weight * weights.target(target);
  const double pull = own * (1.0 - options.label_smoothing);
  double factor = pull;
  if (weights.smoothing_total != nullptr) factor += weight * *weights.smoothing_total;
  if (options.z_loss > 0) factor += own * 2.0 * options.z_loss * row_lse[row];
  if (dlse != nullptr) factor += dlse[position];
  // The logit of a removed entry is -inf whatever e and c are.
  const bool removed = bias != nullptr && target >= 0 &&
                       widen(bias[target]) == -static_cast<Sum>(infinity());
  softmax[row] = static_cast<Sum>(factor);
  onehot[row] = removed ? Sum(0) : static_cast<Sum>(pull);
  smoothing[row] = static_cast<Sum>(weight);
}

// out[i] = value. Grid of any size.
extern "C" __global__ void fill_integers(int64* out, int64 size, int64 value) {
  const int64 step = static_cast<int64>(gridDim.x) * blockDim.x;
  for (int64 i = blockIdx.x * static_cast<int64>(blockDim.x) + threadIdx.x; i < size; i += step)
    out[i] = value;
}
