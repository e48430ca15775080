// What the parts of the backward on Hopper share: its arguments, its shared memory, the rows of a tile, and
// how stages are given back and words exchanged.
#pragma once

#include "functions.cuh"
#include "grid.cuh"
#include "operand.cuh"
#include "order.cuh"
#include "pipeline.cuh"

namespace cce {

constexpr int kStages = 4;
constexpr int kConsumers = 2;   // warp groups that multiply; another copies
constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
constexpr int kWidth = 256;     // elements of D whose gradients are formed at once
constexpr int kSpread = kWidth / kTileK;
constexpr int kWordBytes = 16;
constexpr int kWordElements = kWordBytes / sizeof(Storage);
constexpr int kWordsOfRow = kTileK / kWordElements;
constexpr int kRowStep = kGroupThreads / kWordsOfRow;  // rows that the threads copy a word of at once
constexpr int kItemSlots = 8;
constexpr int kFactSlots = 2;
constexpr int kCopyRegisters = 104;  // with those of the others what the launch has, no more
constexpr int kSumRegisters = 200;
constexpr int kZeroBytes = 4096;
constexpr int kRemoved = 1 << 31;  // in a list: the row of c counts as zeros
constexpr int kNobody = -1;        // for what a list holds: past its end

constexpr int kEverybody = 1;  // named barriers; 0 is __syncthreads
constexpr int kCopiers = 2;

static_assert(kRowStep % 8 == 0, "a thread's rows have one swizzle");

struct LogitStage {
  Storage c[kPairs * kTileK];
  Storage e[kRowTile * kTileK];
};
struct EmbeddingStage {
  Storage dz[kRowTile / kTileK][kTileK * kTileK];  // (halves of the rows, pairs, rows)
  Storage c[kSpread][kTileK * kTileK];
};
struct ClassifierStage {
  Storage dz[kOrderBlock * kTileK];  // (columns, rows)
  Storage e[kSpread][kTileK * kTileK];
};
union alignas(1024) Stage {
  LogitStage logits;
  EmbeddingStage embedding;
  ClassifierStage classifier;
};

struct TileFactors {
  float lse[kRowTile];  // in powers of two
  float softmax[kRowTile];
  float onehot[kRowTile];
  float smoothing[kRowTile];
  int target[kRowTile];
};

// A listed column of an item of dz.
struct alignas(8) HeldColumn {
  int entry;  // of the list
  int slot;   // where to say whether it passed; -1 for nowhere
};
// What is needed once an item's products are done. Those who copy look it up, since they have time to wait.
struct alignas(kWordBytes) LogitFacts {
  TileFactors factors;
  HeldColumn column[kPairs];
  int first;  // of its pairs
};

struct Shared {
  Stage stage[kStages];
  RingBarriers<kStages> ring;
  RingBarriers<kFactSlots> facts_ring;
  uint64 item_ready[kItemSlots];
  int item[kItemSlots];
  LogitFacts facts[kFactSlots];
  int start[kMostRowTiles];   // of each row tile: where its pairs start, as if it kept none before
  int pairs[kMostRowTiles];
  int natural[kMostRowTiles];  // columns that each keeps before the chunk, in the vocabulary's order
  int source[kMostRowTiles];  // its first row in e, where one copy of a box brings them all; or -1
  int items;  // of dz
  int copier_sum[kGroupThreads / 32];
  int rows_of_item;  // rows of zeros that a block stores along with an item of dz
  uint64 seed;
  alignas(kWordBytes) unsigned char zeros[kZeroBytes];
};

// What the host must give a launch; a stage may have to move up to where its alignment is.
static_assert(sizeof(Shared) + alignof(Stage) == 228352, "_BACKWARD_SHARED_BYTES of compiler.py");

struct BackwardArguments {
  Matrix e;
  Matrix c;
  RowMap map;
  const Storage* bias;
  const float* smoothing;  // of each class: where it is not of rank one
  int64 dim;
  LogitOptions options;
  Filter filter;
  int64 first_tile;  // of the sweep
  int64 tiles;
  const int* taken;    // 1 once an attempt has taken on both gradients, as the order's kernel says
  int64 attempt;       // 1 in it, 0 in passes that work if there was none or it did not
  ColumnOrder order;
  const float* row_lse;
  RowFactors factors;
  const uint32* largest;  // of the rows' factors, as an integer
  float* target_rest;     // of each row: what rounding takes from the record of its target
  int* list;              // column of each pair, those of a row tile after each other
  int* item;              // items of dz in the order in which they are taken; see LogitItem
  int* slot;              // by rank in the vocabulary's order: the pair, if it passed, or -1
  int* passing;           // the pairs that passed
  Storage* dz;            // (pairs, kRowTile), and behind them what is carried from chunk to chunk
  int carry;              // where that starts
  int* passed_pairs;      // (tiles): what a chunk brings to dE
  int* carried;           // (tiles): what is carried on to the next
  int* ready;             // (tiles): chunks whose passed pairs are known; zeros before
  float* dz_sum;          // of each pair over its rows; or null
  unsigned short* low;    // (rows of the sweep, D): low halves of unfinished sums, unless rows of dC have
                          // room for them; the high ones wait in de
  const float* smoothing_class;     // the same where it is of rank one: of each class, or null
  const float* smoothing_classifier;  // sum over the classes of their smoothing times c
  const float* smoothing_embedding;   // sum over the rows of their smoothing times e
  const double* smoothing_rows;       // sum over the rows
  Storage* de;     // or null, as those behind it
  Storage* dc;
  Storage* dbias;
  unsigned long long* passed;
  int* queue;      // zeros before
  int* arrived;
  int64 dense_rows;  // if as many rows count the gradients are there: dense_gradients.cu formed them
};

// The rows of a tile.
struct SweepTile {
  int64 top;
  int number;
  int source;
  bool follow;  // one copy of a box brings them all, and nothing else

  __device__ __forceinline__ SweepTile(const Shared& shared, const BackwardArguments& call,
                                       int64 count, int tile) {
    top = (call.first_tile + tile) * kRowTile;
    number = static_cast<int>(min(count - top, static_cast<int64>(kRowTile)));
    source = shared.source[tile];
    follow = source >= 0;
  }
};

// Find the rows of each tile. All threads.
__device__ __forceinline__ void find_sources(Shared& shared, const BackwardArguments& call,
                                             int64 count, int row_tiles) {
  for (int tile = threadIdx.x; tile < row_tiles; tile += kThreads) {
    const int64 top = (call.first_tile + tile) * kRowTile, last = top + kRowTile - 1;
    int source = -1;
    // Rows past the last must be zeros: what stands there in e may not even be a number.
    if (last < count && call.map.source[last] - call.map.source[top] == kRowTile - 1)
      source = static_cast<int>(call.map.source[top]);
    shared.source[tile] = source;
  }
}

// Where a 16-byte word of a row lies in a tile of rows of 128 bytes.
__device__ __forceinline__ uint32 word_place(int row, int word) {
  return (row * kWordsOfRow + (word ^ row % 8)) * kWordBytes;
}

// Give a stage back to those who fill it. One thread of each warp: where a group leaves products out
// its warps do not wait for each other, and one that fell behind by a round would wait for ever.
__device__ __forceinline__ void release(const uint64& empty) {
  if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&empty), 1);
}
constexpr int kReleases = kConsumers * kGroupThreads / 32;

}  // namespace cce
