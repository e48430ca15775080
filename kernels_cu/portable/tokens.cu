// Which tokens count, what each of them loses, and the factors of its row in the backward.
// Twin of cce_cupy/cpu/tokens.py. All of it is O(N + V); one block walks where order matters.

#include "../loss.cuh"

namespace cce {

constexpr int kWalkers = 1024;  // threads of the kernels that run as one block
constexpr int kWarps = kWalkers / 32;
constexpr int kRowThreads = 256;  // those of kernels with a thread for each row
static_assert(kWarps == 32, "one lane for each warp");

// Tokens of a round, 32 of a warp's next to each other at a time.
constexpr int kTurns = 8;
constexpr int kWarpTokens = 32 * kTurns;
constexpr int kRound = kWarps * kWarpTokens;

// Targets as they come: any integer dtype.
struct Targets {
  const void* data;
  int bytes;
  int is_signed;

  // A thread's of a round, from `first` on. Those of uint64 above what int64 holds become negative.
  __device__ __forceinline__ void read(int64 first, int64 tokens, int64 (&value)[kTurns]) const {
    switch (bytes) {
      case 1:
        return is_signed ? read_as<signed char>(first, tokens, value)
                         : read_as<unsigned char>(first, tokens, value);
      case 2:
        return is_signed ? read_as<short>(first, tokens, value)
                         : read_as<unsigned short>(first, tokens, value);
      case 4:
        return is_signed ? read_as<int>(first, tokens, value)
                         : read_as<unsigned int>(first, tokens, value);
      default:
        return read_as<int64>(first, tokens, value);
    }
  }
  template <typename Integer>
  __device__ __forceinline__ void read_as(int64 first, int64 tokens, int64 (&value)[kTurns]) const {
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      const int64 i = first + 32 * k;
      value[k] = i < tokens ? static_cast<int64>(static_cast<const Integer*>(data)[i]) : 0;
    }
  }
  __device__ __forceinline__ bool too_large(int64 value) const {
    return bytes == 8 && !is_signed && value < 0;
  }
};

// Over a warp's lanes, on devices without an instruction for it too.
__device__ __forceinline__ uint32 warp_sum(uint32 own) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) own += __shfl_xor_sync(~0u, own, step);
  return own;
}

}  // namespace cce

using namespace cce;

// Map the tokens that are paired and not ignored to compact rows, in order, and clear what later
// kernels add to: the marks of row tiles, and a count of blocks. One block; each warp has tokens next to
// each other, so that one barrier a round tells it how many come before.
extern "C" __global__ void __launch_bounds__(kWalkers)
    map_rows(Targets targets, int64 tokens, int64 length, int64 shift, int64 ignore_index,
             int ignore_above, int64 vocab, int has_seed, uint64 given_seed, int64* source, int64* position,
             int64* target, int64* count, uint64* seed, int64* first_wrong, int* unbounded, int* done) {
  __shared__ int of_warp[2][kWarps];
  __shared__ uint32 hash_low, hash_high;
  if (threadIdx.x == 0) {
    hash_low = hash_high = 0;
    *first_wrong = tokens;
    *done = 0;
  }
  for (int64 i = threadIdx.x; i < (tokens + kRowTile - 1) / kRowTile; i += kWalkers) unbounded[i] = 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64 before = 0;
  uint32 low = 0, high = 0;
  int round = 0;
  for (int64 start = 0; start < tokens; start += kRound, round ^= 1) {
    const int64 first = start + warp * kWarpTokens + lane;
    int64 value[kTurns];
    uint32 counting[kTurns];  // of the warp's lanes
    targets.read(first, tokens, value);
    int own = 0;
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      const int64 i = first + 32 * k;
      const bool too_large = targets.too_large(value[k]);
      // ignore_above: 1 where only a uint64 holds ignore_index, 2 where no dtype does.
      const bool ignored = too_large == (ignore_above != 0) && ignore_above != 2 &&
                           value[k] == ignore_index;
      // A division of 64 bits takes as long as a read.
      const bool counts = i < tokens && !ignored && (shift == 0 || i % length >= shift);
      // What int64 does not hold is no class.
      if (too_large) value[k] = -1;
      counting[k] = __ballot_sync(~0u, counts);
      own += __popc(counting[k]);
    }
    if (lane == 0) of_warp[round][warp] = own;
    // The other buffer's readers have come here too before it is written again.
    __syncthreads();
    int sum = of_warp[round][lane];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int lower = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += lower;
    }
    const int upto = __shfl_sync(~0u, sum, warp), all = __shfl_sync(~0u, sum, kWarps - 1);
    int64 next = before + upto - own;
    before += all;
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      if (counting[k] >> lane & 1u) {
        const int64 i = first + 32 * k, row = next + __popc(counting[k] & ((1u << lane) - 1u));
        const bool wrong = value[k] < 0 || value[k] >= vocab;
        source[row] = i - shift;
        position[row] = i;
        target[row] = wrong ? -1 : value[k];
        if (wrong) atomicMin(first_wrong, i);
        const uint32 counter = static_cast<uint32>(row) * 0x9E3779B9u;
        const uint32 hashed = mix(mix(counter ^ static_cast<uint32>(value[k] >> 32)) ^
                                  static_cast<uint32>(value[k]));
        high += hashed;
        low += mix(hashed ^ 0x85EBCA6Bu);
      }
      next += __popc(counting[k]);
    }
  }
  high = warp_sum(high);
  low = warp_sum(low);
  // Behind the zeros.
  __syncthreads();
  if (lane == 0) {
    // Sums of integers: the same in any order.
    atomicAdd(&hash_high, high);
    atomicAdd(&hash_low, low);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    *count = before;
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
  present = block_sum<kWalkers>(present, scratch);
  const Sum each = static_cast<Sum>(alpha / (present > 0 ? present : 1.0));
  double sum = 0;
  for (int64 v = threadIdx.x; v < vocab; v += kWalkers) {
    const bool counts = bias == nullptr || widen(bias[v]) != removed;
    const Sum weight = class_weight == nullptr ? Sum(1) : class_weight[v];
    smoothing[v] = counts ? weight * each : Sum(0);
    sum += smoothing[v];
  }
  sum = block_sum<kWalkers>(sum, scratch);
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

}  // namespace cce

// Merge the segments of each row, place what depends on tokens, and sum the losses. One thread a row.
extern "C" __global__ void __launch_bounds__(kRowThreads)
    finish_rows(RowMap map, Segments parts, LossOptions options, Weights weights, RowOutputs outputs,
                LossSum losses) {
  const int64 row = blockIdx.x * static_cast<int64>(kRowThreads) + threadIdx.x;
  RowTotals all;
  double loss = 0, weight = 0;
  if (row < *map.count) {
    for (int64 i = 0; i < parts.number; ++i) {
      const int64 at = i * parts.capacity + row;
      const double theirs = parts.reference[at];
      const double joint = fmax(all.reference, theirs);
      const double shrink = exp(all.reference - joint), grow = exp(theirs - joint);
      all.rest = all.rest * shrink + parts.rest[at] * grow;
      const double logit = parts.target_logit[at];
      all.target_logit = logit != logit ? logit : fmax(all.target_logit, logit);
      all.smoothed += parts.smoothed[at];
      if (parts.total != nullptr) {
        const double mine =
            all.total > 0 ? all.weighted + (all.reference - joint) * all.total : all.weighted;
        const double added = parts.total[at] > 0
                                 ? parts.weighted[at] + (theirs - joint) * parts.total[at]
                                 : parts.weighted[at];
        all.weighted = mine * shrink + added * grow;
        all.total = all.total * shrink + parts.total[at] * grow;
        const Sum value = parts.best[at];
        if (all.best == all.best && (value > all.best || value != value)) {
          all.best = value;
          all.argmax = parts.argmax[at];
        }
      }
      all.reference = joint;
    }
    loss = finish_row(map, row, all, options, weights, outputs);
    weight = weights.target(map.target[row]) * weights.token(map.position[row]);
  }
  sum_losses<kRowThreads>(losses, loss, weight);
}

// Factors of each row in dz = softmax p - onehot [v == target] - smoothing s_v, and zeros for what later
// kernels count. One thread a row.
extern "C" __global__ void row_factors(RowMap map, LossOptions options, Weights weights,
                                       const Storage* bias, const double* normalizer,
                                       const Sum* row_lse, const Sum* dloss, int dloss_by_token,
                                       const Sum* dlse, Sum* softmax, Sum* onehot, Sum* smoothing,
                                       int64* counters, int64 words) {
  const int64 row = blockIdx.x * static_cast<int64>(blockDim.x) + threadIdx.x;
  const int64 threads = gridDim.x * static_cast<int64>(blockDim.x);
  for (int64 i = row; i < words; i += threads) counters[i] = 0;
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
