// The work of the two products with dz on Hopper, and which row tiles matter to a block of columns.
#pragma once

#include "gradients.cuh"
#include "lists.cuh"

namespace cce {

__device__ __forceinline__ int count_parts(const BackwardArguments& call) {
  return static_cast<int>((call.dim + kWidth - 1) / kWidth);
}
__device__ __forceinline__ int count_embeddings(const BackwardArguments& call, int row_tiles) {
  return call.de == nullptr ? 0 : row_tiles * count_parts(call);
}

// The work of a phase: all of dE, then all of dC. Parts of D that read the same records of dz follow one
// another, so that these come from memory once.
struct GradientItem {
  bool embedding;
  int begin;  // of its part of D
  int place;  // a row tile, or the place of a block in its chunk

  __device__ __forceinline__ GradientItem(const BackwardArguments& call, int row_tiles, int parts,
                                          int at) {
    const int embeddings = count_embeddings(call, row_tiles);
    embedding = at < embeddings;
    const int number = embedding ? at : at - embeddings;
    place = number / parts;
    begin = (number - place * parts) * kWidth;
  }
};

__device__ __forceinline__ int count_gradients(const BackwardArguments& call, const Chunk& chunk,
                                               int row_tiles) {
  const int blocks = call.dc == nullptr ? 0 : chunk.last - chunk.first;
  return count_embeddings(call, row_tiles) + blocks * count_parts(call);
}

// The row tiles that keep any column of a block, ascending, and whether a half of it matters to each.
struct KeepingTiles {
  const ColumnOrder& order;
  int block;
  int row_tiles;
  int number = -1;  // of the word at hand
  uint32 rest = 0;
  uint32 halves[kHalves] = {};

  __device__ __forceinline__ KeepingTiles(const ColumnOrder& order, int block, int row_tiles)
      : order(order), block(block), row_tiles(row_tiles) {}

  // The next tile, or -1.
  __device__ __forceinline__ int next() {
    while (rest == 0) {
      if (++number * 32 >= row_tiles) return -1;
      halves[0] = order.tiles_of(block, 0, number, row_tiles);
      halves[1] = order.tiles_of(block, 1, number, row_tiles);
      rest = halves[0] | halves[1];
    }
    const int bit = __ffs(rest) - 1;
    rest &= rest - 1;
    return number * 32 + bit;
  }
  __device__ __forceinline__ bool keeps(int half, int tile) const {
    return (half == 0 ? halves[0] : halves[1]) >> (tile % 32) & 1;
  }
};

}  // namespace cce
