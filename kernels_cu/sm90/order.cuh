// The order in which the backward on Hopper takes the columns, and where each row tile's lie in it.
#pragma once

#include "../rows.cuh"

namespace cce {

constexpr int kOrderBlock = 128;                           // columns whose gradients are formed at once
constexpr int kWordsOfBlock = kOrderBlock / kColumnChunk;  // of kept bits
constexpr int kHalves = 2;         // halves of a block may leave out row tiles that none of them keeps
constexpr int kPairs = 256;        // kept columns of a row tile that are recomputed at once
constexpr int kListUnit = 16;      // the lists of row tiles start at multiples of it
constexpr int kMostRowTiles = 1024;

// What the forward has left, from the first row tile of the sweep on.
struct KeptColumns {
  const uint32* bits;    // (tiles, words); null where every row tile keeps every column
  int64 words;
  const int* unbounded;  // row tiles that keep every column
  int64 vocab;

  // The bits of 32 columns of a row tile.
  __device__ __forceinline__ uint32 word(int tile, int64 number) const {
    const int64 columns = vocab - number * kColumnChunk;
    if (columns <= 0) return 0u;
    const uint32 kept =
        bits == nullptr || unbounded[tile] != 0 ? ~0u : bits[tile * words + number];
    return columns >= kColumnChunk ? kept : kept & ((1u << columns) - 1u);
  }
};

// Chunks are ranges of the vocabulary, worked on one after the other. In each, columns that the same row
// tiles keep stand together, so that few row tiles matter to a block of them; a chunk starts a block.
// Columns that nobody keeps come after the last chunk. Row tiles count from the first of the sweep.
// Where every row tile keeps every column the order is that of the vocabulary, and nothing is read but
// the numbers at the end.
struct ColumnOrder {
  KeptColumns kept;
  int* column;          // by place in the order; -1 in the rest of a chunk's last block
  uint32* word;         // (tiles, blocks, kWordsOfBlock): kept bits in the order
  int* before;          // (tiles, blocks + 1): kept columns before each block
  int* kept_in;         // (tiles, natural_blocks + 1): the same in the vocabulary's own order
  uint32* tiles;        // (blocks, kHalves, tile_words): row tiles that keep any column of a half
  int* block;           // of each chunk, those of most row tiles first
  int* chunk;           // kTable numbers, then the first block of each chunk, and the end of the last
  int* range;           // the first block of each chunk in the vocabulary's own order, and the end
  int blocks;           // that there is room for
  int natural_blocks;   // of the vocabulary
  int tile_words;
  int chunk_blocks;     // of a chunk, where every column is kept

  // The number of chunks; places in use; the first place of a column whose row of dC holds unfinished sums
  // of dE, or 0.
  static constexpr int kTable = 3;

  __device__ __forceinline__ bool whole() const { return chunk_blocks > 0; }
  __device__ __forceinline__ int chunks() const {
    return whole() ? (natural_blocks + chunk_blocks - 1) / chunk_blocks : chunk[0];
  }
  __device__ __forceinline__ int places() const {
    return whole() ? static_cast<int>(kept.vocab) : chunk[1];
  }
  // The first of the places, one for each row of the sweep, whose rows of dC are nobody's, so that the low
  // halves of unfinished sums of dE can wait there; 0 where they wait in the workspace.
  __device__ __forceinline__ int waiting_place() const { return whole() ? 0 : chunk[2]; }
  // The first block of a chunk; that of the one after the last is the end.
  __device__ __forceinline__ int first_block(int number) const {
    return whole() ? min(number * chunk_blocks, natural_blocks) : chunk[kTable + number];
  }
  __device__ __forceinline__ int column_at(int place) const {
    if (whole()) return place < kept.vocab ? place : -1;
    return column[place];
  }
  __device__ __forceinline__ int kept_before(int tile, int at) const {
    if (whole()) return static_cast<int>(min(static_cast<int64>(at) * kOrderBlock, kept.vocab));
    return before[static_cast<int64>(tile) * (blocks + 1) + at];
  }
  // Those of 32 columns that are in the vocabulary, where every column is kept.
  __device__ __forceinline__ uint32 whole_word(int at, int number) const {
    const int64 rest = kept.vocab - static_cast<int64>(at) * kOrderBlock - number * kColumnChunk;
    return rest >= kColumnChunk ? ~0u : rest <= 0 ? 0u : (1u << rest) - 1u;
  }
  // The kept bits of 32 columns of a block.
  __device__ __forceinline__ uint32 kept_word(int tile, int at, int number) const {
    if (whole()) return whole_word(at, number);
    return word[(static_cast<int64>(tile) * blocks + at) * kWordsOfBlock + number];
  }
  // Those of all of it.
  __device__ __forceinline__ void read_words(uint32 (&to)[kWordsOfBlock], int tile, int at) const {
    if (whole()) {
#pragma unroll
      for (int i = 0; i < kWordsOfBlock; ++i) to[i] = whole_word(at, i);
      return;
    }
    const uint4 words =
        reinterpret_cast<const uint4*>(word)[static_cast<int64>(tile) * blocks + at];
    to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
  }
  // 32 of the row tiles that keep any column of a half block.
  __device__ __forceinline__ uint32 tiles_of(int at, int half, int number, int row_tiles) const {
    if (whole()) {
      const int64 left = static_cast<int64>(at) * kOrderBlock + half * (kOrderBlock / kHalves);
      const int rest = row_tiles - 32 * number;
      return left >= kept.vocab ? 0u : rest >= 32 ? ~0u : (1u << rest) - 1u;
    }
    return tiles[(static_cast<int64>(at) * kHalves + half) * tile_words + number];
  }
  __device__ __forceinline__ int block_at(int place) const {
    return whole() ? place : block[place];
  }
  // How many columns a row tile keeps before a chunk, in the vocabulary's order.
  __device__ __forceinline__ int natural_before(int tile, int number) const {
    return kept_in[static_cast<int64>(tile) * (natural_blocks + 1) + range[number]];
  }
  // And before a column.
  __device__ __forceinline__ int natural_rank(int tile, int own) const {
    const int at = own / kOrderBlock, number = own % kOrderBlock / kColumnChunk;
    int rank = kept_in[static_cast<int64>(tile) * (natural_blocks + 1) + at];
#pragma unroll
    for (int i = 0; i < kWordsOfBlock; ++i) {
      // All of the block are asked for at once.
      const uint32 word = kept.word(tile, static_cast<int64>(at) * kWordsOfBlock + i);
      const uint32 below = i < number ? ~0u : i == number ? (1u << own % kColumnChunk) - 1u : 0u;
      rank += __popc(word & below);
    }
    return rank;
  }
};

// The row tiles of a sweep that have any rows.
__device__ __forceinline__ int count_row_tiles(int64 count, int64 first_tile, int tiles) {
  const int64 rest = (count + kRowTile - 1) / kRowTile - first_tile;
  return static_cast<int>(max(min(rest, static_cast<int64>(tiles)), int64(0)));
}

}  // namespace cce
