// The forward on Hopper: every logit once, at the speed of the bare product. One warp group copies
// tiles of e and c into a ring of stages; two take turns at whole tiles of logits, so that one sums
// up while the other multiplies. Leaves what portable/forward.cu leaves.

#include "../columns.cuh"
#include "../logits.cuh"
#include "tile.cuh"

namespace cce {

constexpr int kConsumers = 2;
constexpr int kThreads = kGroupThreads * (1 + kConsumers);
constexpr int kCopyRegisters = 40;
constexpr int kSumRegisters = 232;
constexpr int kTurn = 1;  // the first of the named barriers by which the consumers take turns
constexpr int kCopiers = 3;  // and that of the copying warp group

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLowest = -1e30f;   // reference of a row whose target has no finite logit
constexpr float kHighest = 1e30f;   // that of a row that is not there; sums beyond it are too large
constexpr float kMasked = -3e38f;   // a logit that counts for nothing
// Bounds that others raise are looked up at every tile whose products take longer than that, and at
// every fourth of a warp group's otherwise.
constexpr int kLongTile = 24;
constexpr int kShareEvery = 4;
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
  RowState level;              // lower bounds of the rows' whole sums
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

// The order of work: units of one row block and some column tiles. Row blocks of a group go first,
// so that their rows of e and the unit's columns of c stay in the L2.
struct Order {
  int row_blocks;
  int column_tiles;
  int unit_tiles;
  int group;

  __device__ __forceinline__ int across() const {
    return (column_tiles + unit_tiles - 1) / unit_tiles;
  }
};

struct Unit {
  int row_block;
  int across;
  int first;  // column tiles
  int last;

  __device__ __forceinline__ Unit(const Order& order, int number) {
    const int each = order.group * order.across();
    const int group = number / each, rest = number - group * each;
    const int rows = min(order.row_blocks - group * order.group, order.group);
    across = rest / rows;
    row_block = group * order.group + (rest - across * rows);
    first = across * order.unit_tiles;
    last = min(first + order.unit_tiles, order.column_tiles);
  }
};

// The rows of a row tile: where they start, how many there are, and whether those of e follow each
// other, which one copy needs.
struct TileRows {
  int top;
  int number;
  int source;
  bool follow;

  __device__ __forceinline__ TileRows(const RowMap& map, int count, int tile) {
    top = tile * kTileM;
    number = max(min(count - top, kTileM), 0);
    source = number > 0 ? static_cast<int>(map.source[top]) : 0;
    follow = number == 0 || map.source[top + number - 1] - source == number - 1;
  }
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

// A thread's two rows of a block of 64: their exponent, the sums of this thread's columns, and lower
// bounds of their whole sums.
struct RowSums {
  float reference[2];
  float rest[2];
  float level[2];

  __device__ __forceinline__ RowSums(Shared& shared, int m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      reference[half] = shared.reference.at(m, half);
      rest[half] = shared.rest.at(m, half);
      level[half] = shared.level.at(m, half);
    }
  }
  __device__ __forceinline__ void keep(Shared& shared, int m) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shared.reference.at(m, half) = reference[half];
      shared.rest.at(m, half) = rest[half];
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

// Take the targets' logits out of a block: their sums go apart, so that a loss is never negative.
__device__ __forceinline__ void take_targets(Block z, Shared& shared, int m,
                                             const ForwardArguments& call, int row, int left,
                                             uint32* words, int lane) {
  int ahead[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int target = __float_as_int(shared.target.at(m, half));
    ahead[half] = target >= left && target < left + kTileN ? target - left : -1;
  }
  if (__builtin_expect(!__any_sync(~0u, ahead[0] >= 0 || ahead[1] >= 0), 1)) return;
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
  if (words == nullptr) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // One of the quad's four has the column.
    const int x = ahead[half];
    if (x < 0 || x % 8 / 2 != lane % 4) continue;
    atomicOr(words + x / kColumnChunk, 1u << (x % kColumnChunk));
  }
}

// Mark the columns of the given chunks that hold a logit of at least a part of its row's sum.
__device__ __forceinline__ void mark_columns(Block z, uint32 chunks, const float (&reference)[2],
                                             const float (&level)[2], float chunk_threshold,
                                             uint32* words, int lane) {
  const float base[2] = {reference[0] + logarithm_to_two(level[0]),
                         reference[1] + logarithm_to_two(level[1])};
  const float own = logarithm_to_two(chunk_threshold);
#pragma unroll
  for (int w = 0; w < kChunks; ++w) {
    if (!(chunks >> w & 1)) continue;
    const float least = __shfl_sync(~0u, own, w);
    const float lowest[2] = {(base[0] + least) * (1.0f / kLog2E),
                             (base[1] + least) * (1.0f / kLog2E)};
    uint32 kept = 0;
#pragma unroll
    for (int j = 0; j < kSpansInChunk; ++j)
#pragma unroll
      for (int side = 0; side < 2; ++side)
        if (z[SumPlace::index(kSpansInChunk * w + j, 0, side)] >= lowest[0] ||
            z[SumPlace::index(kSpansInChunk * w + j, 1, side)] >= lowest[1])
          kept |= 1u << (8 * j + side);
    kept = __reduce_or_sync(~0u, kept << 2 * (lane % 4));
    if (lane == 0 && kept != 0) atomicOr(words + w, kept);
  }
}

// Add a block's exponentials to the rows' sums, and mark the columns to keep. Levels are lower bounds
// of the rows' whole sums.
__device__ __forceinline__ void add_block(Block z, RowSums& sums, float chunk_threshold,
                                          bool plain, uint32* words, int lane) {
  float total[2] = {sums.rest[0], sums.rest[1]}, least_logit = 0;
  uint32 candidates = 0;
#pragma unroll
  for (int w = 0; w < kChunks; ++w) {
    float chunk[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0;
#pragma unroll
      for (int j = kSpansInChunk * w; j < kSpansInChunk * (w + 1); ++j) {
        const float a = z[SumPlace::index(j, half, 0)], b = z[SumPlace::index(j, half, 1)];
        // Pairs first: a shorter chain of sums that wait for each other.
        sum += power_of_two(fmaf(a, kLog2E, -sums.reference[half])) +
               power_of_two(fmaf(b, kLog2E, -sums.reference[half]));
        least_logit = fminf(least_logit, fminf(a, b));
      }
      chunk[half] = sum;
      total[half] += sum;
    }
    // A chunk's sum is no less than its largest: one that fails has none that passes.
    const float least = __shfl_sync(~0u, chunk_threshold, w);
    if (chunk[0] >= least * sums.level[0] || chunk[1] >= least * sums.level[1])
      candidates |= 1u << w;
  }
  if (plain && least_logit == -static_cast<float>(infinity())) {
    // From an infinite input, whose row must come out as NaN.
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      one_by_one(z[i]);
      if (z[i] == -static_cast<float>(infinity()))
        total[i / 2 % 2] = static_cast<float>(not_a_number());
    }
  }
  constexpr uint32 kTooLarge = 1u << 31;
  const bool fits = total[0] < kHighest && total[1] < kHighest;
  candidates = __reduce_or_sync(~0u, fits ? candidates : kTooLarge);
  if (__builtin_expect(candidates >= kTooLarge, 0)) {
    // Again, relative to the largest so far.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = kLowest;
#pragma unroll
      for (int j = 0; j < kSpans; ++j)
        most = fmaxf(most, fmaxf(z[SumPlace::index(j, half, 0)], z[SumPlace::index(j, half, 1)]));
      const float old = sums.reference[half];
      const float reference = fmaxf(old, quad_largest(most) * kLog2E);
      float sum = sums.rest[half] * power_of_two(old - reference);
      if (total[half] != total[half]) sum = total[half];
#pragma unroll
      for (int j = 0; j < kSpans; ++j)
#pragma unroll
        for (int side = 0; side < 2; ++side)
          sum += power_of_two(fmaf(z[SumPlace::index(j, half, side)], kLog2E, -reference));
      total[half] = sum;
      sums.reference[half] = reference;
      sums.level[half] = quad_sum(sum);
    }
    candidates = ~0u;
  }
  sums.rest[0] = total[0];
  sums.rest[1] = total[1];
  if (words != nullptr && candidates != 0)
    mark_columns(z, candidates, sums.reference, sums.level, chunk_threshold, words, lane);
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
        const float centred = fmaf(z[SumPlace::index(j, half, side)], kLog2E, -reference);
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

// Hand a stage back to those who fill it, in every block of the cluster.
template <int kCluster>
__device__ __forceinline__ void release(const uint64& empty) {
  const uint32 barrier = shared_address(&empty);
  const int thread = threadIdx.x % kGroupThreads;
  if (kCluster == 1) {
    if (thread == 0) mbarrier_arrive(barrier, 1);
  } else if (thread < kCluster) {
    mbarrier_arrive_mapped(map_to_block(barrier, thread));
  }
}

// Fill stages, unit by unit. Rows of e that follow each other come in one copy; others, around
// ignored tokens, word by word.
template <int kCluster>
__device__ __forceinline__ void copy_tiles(Shared& shared, const TensorMap& e_map,
                                           const TensorMap& c_map,
                                           const ForwardArguments& call, int count,
                                           const Order& order, uint32 rank) {
  constexpr int kShare = kTileN / kCluster;  // a block's share of the columns it copies for all
  constexpr int kWordBytes = 16, kWordElements = kWordBytes / sizeof(Storage);
  constexpr int kWordsOfRow = kTileK / kWordElements;
  constexpr int kRowStep = kGroupThreads / kWordsOfRow;
  constexpr int kRowsOfThread = kTileM / kRowStep;
  static_assert(kRowStep % 8 == 0, "a thread's rows have one swizzle");
  const Matrix& e = call.e;
  const RowMap& map = call.map;
  const int thread = threadIdx.x, dim = static_cast<int>(call.dim);
  const int steps = (dim + kTileK - 1) / kTileK;
  const int units = order.row_blocks * order.across();
  RingPlace<kStages> place;
  if (thread == 0) {
    prefetch_map(e_map);
    prefetch_map(c_map);
  }
  for (int number = blockIdx.x / kCluster; number < units; number += gridDim.x / kCluster) {
    const Unit unit(order, number);
    const TileRows rows(map, count, unit.row_block * kCluster + rank);
    // Of this thread's words: one of eight in each of eight rows, sixteen rows apart.
    uint32 word_of_row[kRowsOfThread];
    if (!rows.follow) {
      // The others may come to it no earlier than the one who copied all before.
      named_sync<kCopiers, kGroupThreads>();
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        // Rows past the last count for nothing, whatever they hold.
        const int row = min(thread / kWordsOfRow + i * kRowStep, rows.number - 1);
        const int64 at = map.source[rows.top + row] * e.stride + thread % kWordsOfRow * kWordElements;
        word_of_row[i] = static_cast<uint32>(at / kWordElements);
      }
    } else if (thread != 0) {
      place.skip((unit.last - unit.first) * steps);
      continue;
    }
    for (int tile = unit.first; tile < unit.last; ++tile)
      for (int step = 0; step < steps; ++step, place.next()) {
        Stage& stage = shared.stage[place.stage];
        wait_for(shared.ring.empty[place.stage], place.parity ^ 1);
        const uint32 full = shared_address(&shared.ring.full[place.stage]);
        if (thread == 0) {
          mbarrier_expect_bytes(full, sizeof(stage.c) + (rows.follow ? sizeof(stage.e) : 0));
          const int left = tile * kTileN + static_cast<int>(rank) * kShare;
          Storage* share = stage.c + rank * kShare * kTileK;
          if (kCluster == 1) {
            copy_box(shared_address(share), c_map, step * kTileK, left, full, kEvictFirst);
          } else {
            copy_box_to_blocks(shared_address(share), c_map, step * kTileK, left, full,
                               (1 << kCluster) - 1, kEvictFirst);
          }
          if (rows.follow) {
            copy_box(shared_address(stage.e), e_map, step * kTileK,
                     rows.source, full, kEvictLast);
            mbarrier_arrive(full, kGroupThreads);
          }
        }
        if (!rows.follow) {
          const int word = thread % kWordsOfRow, row = thread / kWordsOfRow;
          const uint32 to =
              shared_address(stage.e) + (row * kWordsOfRow + (word ^ row % 8)) * kWordBytes;
          const Storage* from = e.data + step * kTileK;
          const uint32 bytes = step * kTileK + word * kWordElements < dim ? kWordBytes : 0;
#pragma unroll
          for (int i = 0; i < kRowsOfThread; ++i)
            copy_word(to + i * kRowStep * kTileK * sizeof(Storage),
                      from + static_cast<uint64>(word_of_row[i]) * kWordElements, bytes);
          arrive_after_words(full);
        }
      }
  }
}

// Numbers of barriers are constants to the compiler, which else reserves all of them.
__device__ __forceinline__ void take_turn(int consumer) {
  if (consumer == 0) {
    named_sync<kTurn, kConsumers * kGroupThreads>();
  } else {
    named_sync<kTurn + 1, kConsumers * kGroupThreads>();
  }
}
__device__ __forceinline__ void give_turn(int consumer) {
  if (consumer == 0) {
    named_arrive<kTurn, kConsumers * kGroupThreads>();
  } else {
    named_arrive<kTurn + 1, kConsumers * kGroupThreads>();
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
    add_block(z[m], sums, chunk_threshold, plain, words, lane);
    if (kStatistics) add_weighted(z[m], sums, shared, m, call, row, count, slot, first, lane);
    sums.keep(shared, m);
    if (words != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float seen = quad_sum(sums.rest[half]);
        // Also because the reference that it is relative to may have moved.
        shared.level.at(m, half) = fmaxf(sums.level[half], seen);
        if (lane % 4 == 0 && row + 8 * half < count && seen > 1.002f * sums.level[half])
          atomicMax(call.bound + row + 8 * half,
                    ordered(sums.reference[half] + logarithm_to_two(seen)));
      }
    }
  }
}

template <int kCluster, bool kPlain, bool kStatistics>
__device__ __forceinline__ void sum_tiles(Shared& shared, const ForwardArguments& call, int count,
                                          const Order& order) {
  const int steps = (static_cast<int>(call.dim) + kTileK - 1) / kTileK;
  const int units = order.row_blocks * order.across();
  RingPlace<kStages> place;
  bool mine = this_thread() < kGroupThreads;  // whether the next tile is this group's
  float z[kBlocksM][kSums];
  if (!mine) give_turn(0);
  for (int number = blockIdx.x / kCluster; number < units;
       number = shared.unit[this_thread()] + gridDim.x / kCluster) {
    shared.unit[this_thread()] = number;
    const Unit unit(order, number);
    const int rank = kCluster == 1 ? 0 : static_cast<int>(rank_in_cluster());
    const int row_tile = unit.row_block * kCluster + rank;
    const bool follow = TileRows(call.map, count, row_tile).follow;
    shared.last[this_thread()] = unit.last;
    shared.row_tile[this_thread()] = row_tile;
    shared.part[this_thread()] = kConsumers * unit.across + this_thread() / kGroupThreads;
    for (int m = 0; m < kBlocksM; ++m)
      for (int half = 0; half < 2; ++half) {
        const int row = first_row(row_tile) + 64 * m + 8 * half;
        const float reference = row < count ? call.own[row] * kLog2E : kHighest;
        shared.reference.at(m, half) = reference < kLowest ? kLowest : reference;
        shared.rest.at(m, half) = 0;
        shared.target.at(m, half) =
            __int_as_float(row < count ? static_cast<int>(call.map.target[row]) : -1);
      }
    shared.first[this_thread()] = true;
    for (int tile = unit.first; tile < shared.last[this_thread()]; ++tile) {
      mine = !mine;
      if (mine) {
        place.skip(steps);
        continue;
      }
      if (!kStatistics && call.bits != nullptr &&
          (steps >= kLongTile || (tile - unit.first) / kConsumers % kShareEvery == 0)) {
        // Those of all blocks that work on these rows, as far as they have come. All loads first.
        const int row = first_row(shared.row_tile[this_thread()]);
        float known[kBlocksM][2];
#pragma unroll
        for (int m = 0; m < kBlocksM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = min(row + 64 * m + 8 * half, count - 1);
            known[m][half] = from_ordered(__ldcg(call.bound + at));
          }
#pragma unroll
        for (int m = 0; m < kBlocksM; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float seen = quad_sum(shared.rest.at(m, half));
            // Finite, as half of infinity would be too much.
            const float told = fminf(
                power_of_two(known[m][half] - shared.reference.at(m, half)), -kMasked);
            // A row that is not there keeps nothing.
            shared.level.at(m, half) =
                row + 64 * m + 8 * half < count ? fmaxf(seen, told) : kHighest;
          }
      }
      take_turn(this_thread() / kGroupThreads);
      int done = 0;
      for (int step = 0; step < steps; ++step) {
        wait_for(shared.ring.full[place.stage], place.parity);
        if (!follow) fence_async_proxy();
        product_fence();
        start_products(z, shared.stage[place.stage], step == 0);
        if (step > 0) {
          product_wait<1>();
          release<kCluster>(shared.ring.empty[done]);
        }
        done = place.stage;
        place.next();
      }
      // The other's products may queue behind these.
      give_turn(1 - this_thread() / kGroupThreads);
      product_wait<0>();
      release<kCluster>(shared.ring.empty[done]);
      finish_tile<kPlain, kStatistics>(z, shared, call, count, tile * kTileN);
    }
    for (int m = 0; m < kBlocksM; ++m)
      for (int half = 0; half < 2; ++half) {
        const int row = first_row(shared.row_tile[this_thread()]) + 64 * m + 8 * half;
        const float rest = quad_sum(shared.rest.at(m, half));
        if (this_thread() % 4 != 0 || row >= count) continue;
        const int64 slot = shared.part[this_thread()] * call.capacity;
        call.out.reference[slot + row] = shared.reference.at(m, half);
        call.out.rest[slot + row] = rest;
        // A unit of one tile leaves one of the two without any.
        const bool first = shared.first[this_thread()];
        if (!kPlain && first && call.smoothing != nullptr) call.out.smoothed[slot + row] = 0;
        if (first && kStatistics) {
          call.out.weighted[slot + row] = 0;
          call.out.best[slot + row] = -static_cast<float>(infinity());
          call.out.argmax[slot + row] = 0;
        }
      }
  }
}

template <int kCluster, bool kPlain, bool kStatistics>
__device__ __forceinline__ void run(const TensorMap& e_map, const TensorMap& c_map,
                                    const ForwardArguments& given) {
  extern __shared__ unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(
      memory + (alignof(Stage) - shared_address(memory) % alignof(Stage)) % alignof(Stage));
  const uint32 rank = kCluster == 1 ? 0 : rank_in_cluster();
  if (threadIdx.x == 0) {
    shared.seed = *given.map.seed;
    for (int i = 0; i < kStages; ++i) {
      // One for the bytes that are expected, one for each thread that may copy words.
      mbarrier_init(shared_address(&shared.ring.full[i]), 1 + kGroupThreads);
      mbarrier_init(shared_address(&shared.ring.empty[i]), kCluster);
    }
    fence_barrier_init();
    fence_async_proxy();
  }
  if (kCluster == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
  const int count = static_cast<int>(*given.map.count);
  Order order;
  order.row_blocks = static_cast<int>((count + kTileM * kCluster - 1) / (kTileM * kCluster));
  order.column_tiles = static_cast<int>((given.vocab + kTileN - 1) / kTileN);
  order.unit_tiles = given.unit_tiles;
  order.group = given.group;
  if (threadIdx.x < kGroupThreads) {
    give_registers<kCopyRegisters>();
    copy_tiles<kCluster>(shared, e_map, c_map, given, count, order, rank);
  } else {
    take_registers<kSumRegisters>();
    sum_tiles<kCluster, kPlain, kStatistics>(shared, given, count, order);
  }
  // No block may leave while another still copies to it or hands stages back to it.
  if (kCluster > 1) {
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace cce

using namespace cce;

#define CCE_FORWARD(name, cluster, plain, statistics)                                        \
  extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(kThreads, 1)  \
      name(const __grid_constant__ TensorMap e_map, const __grid_constant__ TensorMap c_map, \
           const __grid_constant__ ForwardArguments given) {                                 \
    run<cluster, plain, statistics>(e_map, c_map, given);                                    \
  }

// Grid: as many clusters as fit on the device. Pairs of blocks share the columns they copy. Plain:
// logits are the products as they are, and nothing but their sums is asked for; what else there can
// be is so much code that it delays those who do not need it.
CCE_FORWARD(forward_pairs, 2, true, false)
// For up to one row tile: nobody to share with.
CCE_FORWARD(forward_single, 1, true, false)
CCE_FORWARD(forward_options, 2, false, false)
CCE_FORWARD(forward_statistics, 2, false, true)

// The logit of each row's target from a product of its own: what the row's sums are relative to, and
// a first lower bound of its lse. One warp a row.
extern "C" __global__ void __launch_bounds__(256)
    target_logits(Matrix e, Matrix c, const Storage* bias, int64 dim, LogitOptions options,
                  RowMap map, float* own, int* bound, float* target_logit) {
  const int64 row = (blockIdx.x * static_cast<int64>(blockDim.x) + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= *map.count) return;
  const float lowest = -static_cast<float>(infinity());
  const int64 target = map.target[row];
  float sum = 0;
  if (target >= 0) {
    struct alignas(16) Word {
      Storage value[8];
    };
    const Word* left = reinterpret_cast<const Word*>(e.row(map.source[row]));
    const Word* right = reinterpret_cast<const Word*>(c.row(target));
    for (int64 i = lane; i < dim / 8; i += 32) {
      const Word a = left[i], b = right[i];
#pragma unroll
      for (int k = 0; k < 8; ++k) sum = fmaf(widen(a.value[k]), widen(b.value[k]), sum);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane != 0) return;
  const float logit = target < 0 ? lowest : make_logit(sum, bias, target, options);
  own[row] = logit;
  bound[row] = ordered(logit > kLowest ? logit * kLog2E : kLowest);
  target_logit[row] = lowest;
}

// What units left, merged: the sums of one segment as tokens.cu takes them. Block: (32, 16), a row
// for each x.
extern "C" __global__ void __launch_bounds__(512)
    merge_units(RowMap map, UnitSums parts, int64 number, int64 capacity, const float* target_logit,
                float* reference, double* rest, double* smoothed, double* total, double* weighted,
                float* best, int64* argmax) {
  constexpr int kWalkers = 16;
  __shared__ double shared[5][kWalkers][33];
  __shared__ int64 place[kWalkers][33];
  const int x = threadIdx.x, y = threadIdx.y;
  const int64 row = blockIdx.x * 32ll + x, count = *map.count;
  // In powers of two.
  double most = kLowest, sum = 0, smooth = 0, weight = 0, largest = -infinity();
  int64 at_largest = 0;
  auto add = [&](double reference, double rest, double smoothed, double weighted, double best,
                 int64 argmax) {
    const double joint = fmax(most, reference);
    const double mine = most == joint ? 1.0 : exp2(most - joint);
    const double theirs = reference == joint ? 1.0 : exp2(reference - joint);
    weight = (weight + (sum > 0 ? (most - joint) * sum : 0.0)) * mine +
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
  if (row < count)
    for (int64 i = y; i < number; i += kWalkers) {
      const int64 at = i * capacity + row;
      const bool all = parts.best != nullptr;
      add(parts.reference[at], parts.rest[at], parts.smoothed == nullptr ? 0.0 : parts.smoothed[at],
          all ? parts.weighted[at] : 0.0, all ? parts.best[at] : -infinity(),
          all ? parts.argmax[at] : 0);
    }
  shared[0][y][x] = most;
  shared[1][y][x] = sum;
  shared[2][y][x] = smooth;
  shared[3][y][x] = weight;
  shared[4][y][x] = largest;
  place[y][x] = at_largest;
  __syncthreads();
  if (y != 0 || row >= count) return;
  for (int i = 1; i < kWalkers; ++i)
    add(shared[0][i][x], shared[1][i][x], shared[2][i][x], shared[3][i][x], shared[4][i][x],
        place[i][x]);
  // From powers of two to those of e, and to a reference that a float holds.
  const double unit = static_cast<double>(kLog2E);
  const float natural = static_cast<float>(most / unit);
  const double moved = most - natural * unit;
  const double scale = exp2(moved);
  reference[row] = natural;
  rest[row] = sum * scale;
  smoothed[row] = smooth;
  if (total == nullptr) return;
  const double own = exp((target_logit[row] - static_cast<double>(natural)));
  total[row] = sum * scale + own;
  const double others = (weight + moved * sum) * scale / unit;
  weighted[row] = others + (own > 0 ? own * (target_logit[row] - static_cast<double>(natural)) : 0.0);
  best[row] = static_cast<float>(largest);
  argmax[row] = at_largest;
}
