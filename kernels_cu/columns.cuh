// The kept-column bitmask and the random thresholds of the unbiased filter.
// Twin of cce_cupy/cpu/columns.py: the same integers everywhere.
#pragma once

#include "number.cuh"

namespace cce {

constexpr int kRowTile = 128;      // tokens that share one list of kept columns
constexpr int kColumnChunk = 32;   // columns that share a threshold, and a word of the bitmask

struct Filter {
  double eps;       // 0: no filter
  double slack;     // exp(-margin): the forward keeps a little more than the exact test
  int unbiased;
};

__device__ __forceinline__ uint32 mix(uint32 x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// u in (0, 1] of a row tile and a chunk of columns: a multiple of 2^-24, exact in float32.
__device__ __forceinline__ float uniform(uint64 seed, int64 tile, int64 chunk) {
  uint32 key = mix(static_cast<uint32>(seed >> 32));
  key = mix(key ^ static_cast<uint32>(seed));
  const uint32 row = mix(key ^ static_cast<uint32>(tile));
  const uint32 counter = static_cast<uint32>(chunk) * 0x9E3779B9u;
  const uint32 hashed = mix(mix(counter + row) ^ mix(row + 1u));
  return (static_cast<float>(hashed >> 8) + 1.0f) * 0x1p-24f;
}

}  // namespace cce
