// How operands of the matrix unit lie in shared memory, where the threads of a warp group stand, and how its
// sums are kept apart from other work.
#pragma once

#include "ptx.cuh"

namespace cce {

constexpr int kGroupThreads = 128;  // threads of a warp group
constexpr int kTileK = 64;          // elements of 128 bytes: the width of the swizzle

// Rows of 128 bytes whose 16-byte words are swizzled: word w of row r lies at w ^ (r % 8). Groups of
// eight rows are 1024 bytes apart; where there are more columns than a row of 128 bytes has, `apart`
// bytes lie between one 64 of them and the next.
__device__ __forceinline__ uint64 swizzled(const Storage* tile, uint32 apart) {
  return static_cast<uint64>((shared_address(tile) & 0x3FFFF) >> 4) | uint64(apart >> 4) << 16 |
         uint64(1024 >> 4) << 32 | uint64(1) << 62;
}

// Rows along the depth, 64 elements of it in each.
__device__ __forceinline__ uint64 along_depth(const Storage* tile) { return swizzled(tile, 16); }
constexpr uint64 kAdvanceAlong = 16 * sizeof(Storage) >> 4;  // 16 elements further along the depth

// Rows across the depth: one for each element of it.
template <int kRows>
__device__ __forceinline__ uint64 across_depth(const Storage* tile) {
  return swizzled(tile, kRows * kTileK * sizeof(Storage));
}
constexpr uint64 kAdvanceAcross = 16 * kTileK * sizeof(Storage) >> 4;

// Nothing that reads or writes the sums may move to where products are under way.
template <int kSums>
__device__ __forceinline__ void settle(float (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

}  // namespace cce
