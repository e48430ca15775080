// What a launch on Hopper is given, and what the threads that sum hold from tile to tile.
#pragma once

#include "../columns.cuh"
#include "../logits.cuh"
#include "functions.cuh"
#include "tile.cuh"

namespace cce {

constexpr int kConsumers = 2;  // warp groups that multiply and sum

constexpr float kLowest = -1e30f;   // reference of a row that has none yet: its target's is too far
constexpr float kFar = -128.0f;     // below what is likely to be near the largest, in powers of two
constexpr float kHighest = 1e30f;   // that of a row that is not there; sums beyond it are too large
constexpr float kMasked = -2e38f;   // a logit that counts for nothing; finite in powers of two too
constexpr float kCounts = kMasked / 4;  // what is not above that counts for nothing
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
  RowState base;               // what 'finished' is relative to
  RowState target;             // columns, as integers; -1 for none
  uint64 seed;                 // of the filter
  int unit[kConsumers * kGroupThreads];      // the one at hand, as each thread knows it,
  int last[kConsumers * kGroupThreads];      // where its column tiles end,
  int row_tile[kConsumers * kGroupThreads];  // its rows,
  int part[kConsumers * kGroupThreads];      // where its sums go,
  bool first[kConsumers * kGroupThreads];    // and whether it has none yet
};

// What the host must give a launch; a stage may have to move up to where its alignment is.
static_assert(sizeof(Shared) + alignof(Stage) == 231424, "_HOPPER_SHARED_BYTES of compiler.py");

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
  const Storage* packed;  // rows of e, in the order of those that count, where they lie apart; or null
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
  float* finished;   // sums over the units that have been worked on, relative to own, and the target's
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

}  // namespace cce
