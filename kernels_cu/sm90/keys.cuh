// What columns are sorted by: which row tiles keep them.
#pragma once

#include "ptx.cuh"

namespace cce {

constexpr int kSlots = 64;     // into which row tiles are folded for the key
constexpr int kKeyBits = 16;

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
  for (int step = 1; step < kKeyBits; step *= 2) x ^= x >> step;
  return x;
}

// Ascending keys, by which row tiles keep a column: a string of bits, first which eighths, then which
// halves of the highest of these eighths, and so on down to single slots, as far as the bits go; two
// columns that few row tiles keep differ in fewer bits, and more of theirs fit. A column that nobody keeps
// has the largest.
__device__ __forceinline__ uint32 sort_key(uint64 slots) {
  constexpr uint32 kLargest = (1u << kKeyBits) - 1;
  if (slots == 0) return kLargest;
  const uint32 pairs = fold_pairs(static_cast<uint32>(slots)) |
                       fold_pairs(static_cast<uint32>(slots >> 32)) << 16;
  const uint32 fours = fold_pairs(pairs), eighths = fold_pairs(fours);
  uint32 key = eighths, left = eighths;
  uint64 halves = fours;
  int used = kSlots / 8, level = 0;
#pragma unroll 1
  for (; used < kKeyBits; used += 2) {
    if (left == 0) {
      if (level == 2) break;
      left = level == 0 ? fours : pairs;
      halves = level == 0 ? pairs : slots;
      ++level;
    }
    const int highest = 31 - __clz(left);
    left ^= 1u << highest;
    key = key << 2 | (static_cast<uint32>(halves >> 2 * highest) & 3u);
  }
  return kLargest - gray_rank(key << (kKeyBits - used));
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
