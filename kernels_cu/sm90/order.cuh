// The order in which the backward on Hopper takes the columns, and where each row tile's lie in it.
#pragma once

#include "../rows.cuh"

namespace cce {

constexpr int kOrderBlock = 128;                           // columns whose gradients are formed at once
constexpr int kWordsOfBlock = kOrderBlock / kColumnChunk;  // of kept bits
constexpr int kHalves = 2;         // halves of a block may leave out row tiles that none of them keeps
constexpr int kPairs = 256;        // kept columns of a row tile that are recomputed at once
constexpr int kMostRowTiles = 1024;

// Columns that the same row tiles keep stand together, so that few row tiles matter to a block of them;
// columns that nobody keeps come last. Row tiles count from the first of the sweep. Without bits every
// row tile keeps every column, and nothing but `blocks` is read.
struct ColumnOrder {
  int* column;    // by place in the order
  uint32* word;   // (tiles, blocks, kWordsOfBlock): kept bits in the order
  int* before;    // (tiles, blocks + 1): kept columns before each block
  uint32* tiles;  // (blocks, kHalves, tile_words): row tiles that keep any column of a half
  int* block;     // of each chunk, those of most row tiles first
  int* chunk;     // how many there are, the first block of each, and the end of the last
  int64 vocab;
  int blocks;        // of the whole vocabulary
  int tile_words;
  int chunk_blocks;  // of a chunk, where every column is kept

  __device__ __forceinline__ bool whole() const { return chunk_blocks > 0; }
  __device__ __forceinline__ int chunks() const {
    return whole() ? (blocks + chunk_blocks - 1) / chunk_blocks : chunk[0];
  }
  // The first block of a chunk; that of the one after the last is the end.
  __device__ __forceinline__ int first_block(int number) const {
    return whole() ? min(number * chunk_blocks, blocks) : chunk[1 + number];
  }
  __device__ __forceinline__ int column_at(int64 place) const {
    if (place >= vocab) return -1;
    return whole() ? static_cast<int>(place) : column[place];
  }
  __device__ __forceinline__ int kept_before(int tile, int at) const {
    if (whole()) return static_cast<int>(min(static_cast<int64>(at) * kOrderBlock, vocab));
    return before[static_cast<int64>(tile) * (blocks + 1) + at];
  }
  // The kept bits of 32 columns of a block.
  __device__ __forceinline__ uint32 kept_word(int tile, int at, int number) const {
    if (!whole()) return word[(static_cast<int64>(tile) * blocks + at) * kWordsOfBlock + number];
    const int64 columns = vocab - static_cast<int64>(at) * kOrderBlock - number * kColumnChunk;
    return columns >= kColumnChunk ? ~0u : columns > 0 ? (1u << columns) - 1u : 0u;
  }
  // Those of all of it.
  __device__ __forceinline__ void read_words(uint32 (&kept)[kWordsOfBlock], int tile, int at) const {
    if (whole()) {
#pragma unroll
      for (int i = 0; i < kWordsOfBlock; ++i) kept[i] = kept_word(tile, at, i);
      return;
    }
    const uint4 words =
        reinterpret_cast<const uint4*>(word)[static_cast<int64>(tile) * blocks + at];
    kept[0] = words.x, kept[1] = words.y, kept[2] = words.z, kept[3] = words.w;
  }
  // 32 of the row tiles that keep any column of a half block.
  __device__ __forceinline__ uint32 tiles_of(int at, int half, int number, int row_tiles) const {
    if (whole()) {
      const int64 left = static_cast<int64>(at) * kOrderBlock + half * (kOrderBlock / kHalves);
      const int rest = row_tiles - 32 * number;
      return left >= vocab ? 0u : rest >= 32 ? ~0u : (1u << rest) - 1u;
    }
    return tiles[(static_cast<int64>(at) * kHalves + half) * tile_words + number];
  }
  __device__ __forceinline__ int block_at(int place) const {
    return whole() ? place : block[place];
  }
};

// The row tiles of a sweep that have any rows.
__device__ __forceinline__ int count_row_tiles(int64 count, int64 first_tile, int tiles) {
  const int64 rest = (count + kRowTile - 1) / kRowTile - first_tile;
  return static_cast<int>(max(min(rest, static_cast<int64>(tiles)), int64(0)));
}

}  // namespace cce
