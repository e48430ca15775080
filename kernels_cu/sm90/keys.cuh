// What columns are sorted by: which row tiles keep them.
#pragma once

#include "ptx.cuh"

namespace cce {

constexpr int kSlots = 32;  // into which row tiles are folded for the key

// Every second bit, packed.
__device__ __forceinline__ uint32 pack_even_bits(uint32 x) {
  x = (x | x >> 1) & 0x33333333u;
  x = (x | x >> 2) & 0x0F0F0F0Fu;
  x = (x | x >> 4) & 0x00FF00FFu;
  return (x | x >> 8) & 0x0000FFFFu;
}
// Whether either of two neighbours is set.
__device__ __forceinline__ uint32 fold_pairs(uint32 x) {
  return pack_even_bits((x | x >> 1) & 0x55555555u);
}

// The rank of a word in a Gray code: neighbours in rank differ in one bit.
__device__ __forceinline__ uint32 gray_rank(uint32 x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x ^= x >> step;
  return x;
}

// Ascending keys: first by the eighths of the row tiles that keep a column, then by sixteenths, then by
// some of the finest slots. A column that nobody keeps has the largest.
__device__ __forceinline__ uint32 sort_key(uint32 slots) {
  const uint32 sixteenths = fold_pairs(slots), eighths = fold_pairs(sixteenths);
  return ~(gray_rank(eighths) << 24 | gray_rank(sixteenths) << 8 | gray_rank(slots) >> 24);
}

// The bit of each lane's column in a word of 32 row tiles, of which each lane holds one's 32 columns.
__device__ __forceinline__ uint32 transpose_bits(uint32 word, int lane) {
  uint32 mine = 0;
#pragma unroll
  for (int column = 0; column < 32; ++column) {
    const uint32 tiles = __ballot_sync(~0u, word >> column & 1);
    if (lane == column) mine = tiles;
  }
  return mine;
}

}  // namespace cce
