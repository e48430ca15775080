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

// u in (0, 1] of a row tile and a chunk of columns: a multiple of 2^-24, exact in float32. A lattice that a
// seed shifts: each alone is uniform, and what row tiles have next to each other, or chunks, is spread evenly.
constexpr uint32 kTileStep = 0xC13FA9A9u;   // 1 / g of 2^32, where g^3 = g + 1
constexpr uint32 kChunkStep = 0x91E10DA5u;  // and 1 / g^2
__device__ __forceinline__ float uniform(uint64 seed, int64 tile, int64 chunk) {
  uint32 shift = mix(static_cast<uint32>(seed >> 32));
  shift = mix(shift ^ static_cast<uint32>(seed));
  const uint32 place = shift + static_cast<uint32>(tile) * kTileStep +
                       static_cast<uint32>(chunk) * kChunkStep;
  return (static_cast<float>(place >> 8) + 1.0f) * 0x1p-24f;
}

}  // namespace cce
