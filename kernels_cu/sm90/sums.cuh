// What becomes of a tile of logits on Hopper: into its rows' sums, the kept-column bits, and what else
// is asked for. Each function works on a block of 64 rows in a warp group's registers.
#pragma once

#include "../columns.cuh"
#include "../logits.cuh"
#include "tile.cuh"

namespace cce {

constexpr int kConsumers = 2;  // warp groups that multiply and sum

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLowest = -1e30f;   // reference of a row that has none yet: its target's is too far
constexpr float kFar = -128.0f;     // below what is likely to be near the largest, in powers of two
constexpr float kHighest = 1e30f;   // that of a row that is not there; sums beyond it are too large
constexpr float kMasked = -2e38f;   // a logit that counts for nothing; finite in powers of two too
constexpr int kChunks = kTileN / kColumnChunk;
constexpr int kSpansInChunk = kColumnChunk / 8;

// What each thread of the consumers holds of its rows from tile to tile. Not in registers: those are
// the products'.
struct RowState {
  float value[kBlocksM][2][kConsumers * kGroupThreads];

  __device__ __forceinline__ float& at(int m, int half) {
    return value[m][half][threadIdx.x - kGroupThreads];
  }
};

struct Shared {
  Stage stage[kStages];
  RingBarriers<kStages> ring;
  RowState reference;          // exponents that the sums are relative to, in powers of two
  RowState rest;               // sums of this thread's columns
  RowState inverse;            // of lower bounds of the rows' whole sums
  RowState target;             // columns, as integers; -1 for none
  uint64 seed;                 // of the filter
  int unit[kConsumers * kGroupThreads];      // the one at hand, as each thread knows it,
  int last[kConsumers * kGroupThreads];      // where its column tiles end,
  int row_tile[kConsumers * kGroupThreads];  // its rows,
  int part[kConsumers * kGroupThreads];      // where its sums go,
  bool first[kConsumers * kGroupThreads];    // and whether it has none yet
};

// What the host must give a launch; a stage may have to move up to where its alignment is.
static_assert(sizeof(Shared) + alignof(Stage) == 227328, "_HOPPER_SHARED_BYTES of compiler.py");

// Partial sums of units: arrays of (2 * units across, capacity); null where not asked for.
// Exponents count in powers of two.
struct UnitSums {
  float* reference;  // exponent that the sums are relative to
  float* rest;       // sum of 2^(z - reference), the target's left out
  float* smoothed;   // sum of smoothing[v] z[v]
  float* weighted;   // sum of 2^(z - reference) (z - reference), the target's left out
  float* best;       // largest logit
  int* argmax;
};

struct ForwardArguments {
  Matrix e;
  RowMap map;
  const Storage* bias;
  const float* smoothing;
  int64 dim;
  int64 vocab;
  LogitOptions options;
  Filter filter;
  int unit_tiles;
  int group;
  const float* own;  // of each row: what its sums are relative to
  int* bound;        // lower bounds of lse in powers of two, ordered; raised on the way
  float* target_logit;
  UnitSums out;
  int64 capacity;
  uint32* bits;  // zeros before; or null
  int64 words;
};

// Floats as integers of the same order.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits >= 0 ? bits : bits ^ 0x7FFFFFFF;
}
__device__ __forceinline__ float from_ordered(int x) {
  return __int_as_float(x >= 0 ? x : x ^ 0x7FFFFFFF);
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_largest(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Keep the larger logit, the earlier one of equals, and a NaN above all.
__device__ __forceinline__ void take_best(float& best, int& argmax, float other, int other_at) {
  const bool nan = best != best, other_nan = other != other, earlier = other_at < argmax;
  if (other_nan ? !nan || earlier : !nan && (other > best || (other == best && earlier))) {
    best = other;
    argmax = other_at;
  }
}

// tanh within 4e-7 of itself, without a branch.
__device__ __forceinline__ float fast_tangent(float x) {
  const float square = x * x;
  float series = fmaf(square, 62.0f / 2835.0f, -17.0f / 315.0f);
  series = fmaf(series, square, 2.0f / 15.0f);
  series = fmaf(series, square, -1.0f / 3.0f);
  series = fmaf(series * square, x, x);
  const float shrunk = power_of_two(-2.0f * kLog2E * fabsf(x));
  const float quotient = copysignf(__fdividef(1.0f - shrunk, 1.0f + shrunk), x);
  return fabsf(x) < 0.25f ? series : quotient;
}

// A thread's two rows of a block of 64: their exponent, the sums of this thread's columns, and the
// inverse of lower bounds of their whole sums.
struct RowSums {
  float reference[2];
  float rest[2];
  float inverse[2];

  __device__ __forceinline__ RowSums(Shared& shared, int m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      reference[half] = shared.reference.at(m, half);
      rest[half] = shared.rest.at(m, half);
      inverse[half] = shared.inverse.at(m, half);
    }
  }
  __device__ __forceinline__ void keep(Shared& shared, int m) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shared.reference.at(m, half) = reference[half];
      shared.rest.at(m, half) = rest[half];
      // Where the reference has moved so has what is relative to it.
      shared.inverse.at(m, half) = inverse[half];
    }
  }
};

// The number of this thread, read anew: what follows from it is computed again instead of being held
// in registers across the products.
__device__ __forceinline__ int this_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread - kGroupThreads;
}
__device__ __forceinline__ int first_row(int row_tile) {
  const int thread = this_thread() % kGroupThreads;
  return row_tile * kTileM + thread / 32 * 16 + thread % 32 / 4;
}

using Block = float (&)[kSums];

// The compiler works on as many elements side by side as it likes; what rare paths then hold for each
// takes registers that are not there. Past this it has finished with those before.
__device__ __forceinline__ void one_by_one(float& x) { asm volatile("" : "+f"(x)::"memory"); }

// Whether logits are the products as they are.
__device__ __forceinline__ bool is_plain(const ForwardArguments& call) {
  return call.bias == nullptr && call.options.scale == 1.0 && call.options.softcap <= 0.0;
}

// Scale, bias and softcap in place. Only a removed entry becomes -inf.
__device__ __forceinline__ void make_logits(Block z, const ForwardArguments& call, int left,
                                            int columns, int lane) {
  const float lowest = -static_cast<float>(infinity());
  const float scale = static_cast<float>(call.options.scale);
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
  if (call.options.softcap <= 0.0) return;
  const float cap = static_cast<float>(call.options.softcap), inverse = 1.0f / cap;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    one_by_one(z[i]);
    // z * 0 is NaN for an infinity, which tanh would turn into a number.
    const float capped = fmaf(z[i], 0.0f, cap * fast_tangent(z[i] * inverse));
    z[i] = z[i] == lowest ? lowest : capped;
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

// What few tiles need: take the targets' logits out of a block, since their sums go apart, so that a
// loss is never negative; and find a reference for rows whose target is far from likely.
__device__ __forceinline__ void take_targets(Block z, Shared& shared, int m,
                                             const ForwardArguments& call, int row, int left,
                                             uint32* words, int lane) {
  int ahead[2];
  bool rare = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int target = __float_as_int(shared.target.at(m, half));
    ahead[half] = target >= left && target < left + kTileN ? target - left : -1;
    rare |= ahead[half] >= 0 || shared.reference.at(m, half) <= kLowest;
  }
  if (__builtin_expect(!__any_sync(~0u, rare), 1)) return;
  float* const to = call.target_logit + row;
#pragma unroll
  for (int j = 0; j < kSpans; ++j)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int x = SumPlace::column(lane, j, side);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& logit = z[SumPlace::index(j, half, side)];
        one_by_one(logit);
        if (x == ahead[half]) {
          to[8 * half] = logit;
          logit = kMasked;
        }
      }
    }
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
    if (shared.reference.at(m, half) <= kLowest && most > kMasked) {
      shared.reference.at(m, half) = most * kLog2E;
      shared.inverse.at(m, half) = 1.0f;
    }
  }
  if (words == nullptr) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // One of the quad's four has the column.
    const int x = ahead[half];
    if (x < 0 || x % 8 / 2 != lane % 4) continue;
    atomicOr(words + x / kColumnChunk, 1u << (x % kColumnChunk));
  }
}

// The bits of a byte, two by two, at the start of each byte of a word.
__device__ __forceinline__ uint32 spread(uint32 byte) {
  const uint32 halves = (byte | byte << 12) & 0x000F000Fu;
  return (halves | halves << 6) & 0x03030303u;
}

// A byte for each chunk, of this thread's eight columns: whether all rows' logits are too small.
struct Dropped {
  uint32 byte[2] = {~0u, ~0u};
};
static_assert(kSpansInChunk == 4 && kChunks <= 8, "a byte for each chunk");

// Find the columns of the given chunks, the first the highest bit, that hold an exponential of at
// least a part of its row's sum.
__device__ __forceinline__ void find_columns(Block exponents, uint32 chunks,
                                             const float (&inverse)[2], float chunk_threshold,
                                             Dropped& dropped, int lane) {
  const float base[2] = {logarithm_to_two(inverse[0]), logarithm_to_two(inverse[1])};
  const float own = logarithm_to_two(chunk_threshold);
#pragma unroll
  for (int w = 0; w < kChunks; ++w) {
    const float least = __shfl_sync(~0u, own, w);
    if (!(chunks >> (kChunks - 1 - w) & 1)) continue;
    const float lowest[2] = {least - base[0], least - base[1]};
    // By signs, which unlike comparisons need none of the few predicates.
    uint32 signs = 0;
#pragma unroll
    for (int k = 2 * kSpansInChunk - 1; k >= 0; --k) {
      const int j = kSpansInChunk * w + k / 2, side = k % 2;
      const float over = fmaxf(exponents[SumPlace::index(j, 0, side)] - lowest[0],
                               exponents[SumPlace::index(j, 1, side)] - lowest[1]);
      signs = __funnelshift_l(__float_as_uint(over), signs, 1);
    }
    const uint32 place = 8 * (w % 4);
    dropped.byte[w / 4] &= signs << place | ~(0xFFu << place);
  }
}

// Mark columns that are not dropped: over the lanes that hold the same columns of other rows, then by
// a lane for each chunk and each four of its columns' pairs.
__device__ __forceinline__ void mark_columns(Dropped& dropped, uint32* words, int lane) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2)
#pragma unroll
    for (int i = 0; i < 2; ++i) dropped.byte[i] &= __shfl_xor_sync(~0u, dropped.byte[i], step);
  const int w = lane / 4;
  const uint32 byte = ~(w < 4 ? dropped.byte[0] : dropped.byte[1]) >> 8 * (w % 4) & 0xFF;
  if (w < kChunks && byte != 0) atomicOr(words + w, spread(byte) << 2 * (lane % 4));
}

// Add a block's exponentials to the rows' sums, and find the columns to keep. Leaves the exponents, in
// powers of two, relative to the rows' references.
__device__ __forceinline__ void add_block(Block z, RowSums& sums, float chunk_threshold,
                                          bool plain, bool finds, Dropped& dropped, int lane) {
  const float lowest = -static_cast<float>(infinity());
#pragma unroll
  for (int i = 0; i < kSums; ++i) z[i] = fmaf(z[i], kLog2E, -sums.reference[i / 2 % 2]);
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
  if (plain && (infinite[0] >= __float_as_uint(lowest) || infinite[3] >= __float_as_uint(lowest))) {
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

// A tile of logits: into the rows' sums, the bits, and what else is asked for.
template <bool kPlain, bool kStatistics>
__device__ __forceinline__ void finish_tile(float (&z)[kBlocksM][kSums], Shared& shared,
                                            const ForwardArguments& call, int count, int left) {
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
#pragma unroll
  for (int m = 0; m < kBlocksM; ++m) {
    const int row = first_row(row_tile) + 64 * m;
    const bool plain = kPlain || is_plain(call);
    if (!plain) make_logits(z[m], call, left, columns, lane);
    if (__builtin_expect(columns < kTileN, 0)) {
#pragma unroll
      for (int j = 0; j < kSpans; ++j)
#pragma unroll
        for (int side = 0; side < 2; ++side)
          if (SumPlace::column(lane, j, side) >= columns)
            z[m][SumPlace::index(j, 0, side)] = z[m][SumPlace::index(j, 1, side)] = kMasked;
    }
    if (!kPlain) take_all<kStatistics>(z[m], call, row, count, left, columns, slot, first, lane);
    take_targets(z[m], shared, m, call, row, left, words, lane);
    RowSums sums(shared, m);
    add_block(z[m], sums, chunk_threshold, plain, words != nullptr, dropped, lane);
    if (kStatistics) add_weighted(z[m], sums, shared, m, call, row, count, slot, first, lane);
    sums.keep(shared, m);
  }
  if (words != nullptr) mark_columns(dropped, words, lane);
}

}  // namespace cce
