// Tiles of logits on Hopper: what lies in a stage, and the product of a row tile with some columns.
#pragma once

#include "../rows.cuh"
#include "operand.cuh"
#include "pipeline.cuh"

namespace cce {

constexpr int kTileM = kRowTile;
constexpr int kTileN = 192;
constexpr int kStages = 5;
constexpr int kBlocksM = kTileM / 64;  // blocks of rows of one matrix instruction
constexpr int kSums = kTileN / 2;  // a thread's of one block

static_assert(kTileN % kColumnChunk == 0, "a word of the bitmask has one writer");

// Rows of 128 bytes whose 16-byte words are swizzled: word w of row r lies at w ^ (r % 8).
struct alignas(1024) Stage {
  Storage e[kTileM * kTileK];
  Storage c[kTileN * kTileK];
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

// Where a thread's sums of a block lie: those of i stand in row(i) and column(i).
struct SumPlace {
  __device__ __forceinline__ static int row(int lane, int half) { return lane / 4 + 8 * half; }
  __device__ __forceinline__ static int column(int lane, int j, int side) {
    return 8 * j + 2 * (lane % 4) + side;
  }
  // Sums run over eight columns at a time, within them over the rows' halves, then the sides.
  __device__ __forceinline__ static constexpr int index(int j, int half, int side) {
    return 4 * j + 2 * half + side;
  }
};
constexpr int kSpans = kTileN / 8;  // of eight columns

// Start the products of a stage, which begin or continue the sums; those of each block of rows are done when
// the group that they are committed to is, the first block's before the others'.
template <bool kBegin>
__device__ __forceinline__ void start_products(float (&sums)[kBlocksM][kSums], const Stage& stage) {
  const uint64 e = along_depth(stage.e), c = along_depth(stage.c);
  constexpr uint64 kBlock = 64 * kTileK * sizeof(Storage) >> 4;
#pragma unroll
  for (int m = 0; m < kBlocksM; ++m) {
#pragma unroll
    for (int step = 0; step < kTileK / 16; ++step) {
      const uint64 e_step = e + m * kBlock + step * kAdvanceAlong, c_step = c + step * kAdvanceAlong;
      if (kBegin && step == 0) {
        begin_product_64x192x16(sums[m], e_step, c_step);
      } else {
        product_64x192x16(sums[m], e_step, c_step);
      }
    }
    product_commit();
  }
}

}  // namespace cce
