// The kept-column bits on Hopper.
#pragma once

#include "state.cuh"

namespace cce {

// The bits of a byte, two by two, at the start of each byte of a word.
__device__ __forceinline__ uint32 spread(uint32 byte) {
  const uint32 halves = (byte | byte << 12) & 0x000F000Fu;
  return (halves | halves << 6) & 0x03030303u;
}

// A byte for each chunk, of this thread's eight columns: whether all rows' logits are too small.
struct Dropped {
  uint32 byte[2] = {~0u, ~0u};
};
static_assert(kSpansInChunk == 4 && kChunks <= 8, "a byte for each chunk");

// Find the columns of the given chunks, the first the highest bit, that hold an exponential of at
// least a part of its row's sum.
__device__ __forceinline__ void find_columns(Block exponents, uint32 chunks,
                                             const float (&inverse)[2], float chunk_threshold,
                                             Dropped& dropped, int lane) {
  const float base[2] = {logarithm_to_two(inverse[0]), logarithm_to_two(inverse[1])};
  const float own = logarithm_to_two(chunk_threshold);
  // All at once: each would be waited for.
  float least[kChunks];
#pragma unroll
  for (int w = 0; w < kChunks; ++w) least[w] = __shfl_sync(~0u, own, w);
#pragma unroll
  for (int w = 0; w < kChunks; ++w) {
    if (!(chunks >> (kChunks - 1 - w) & 1)) continue;
    const float lowest[2] = {least[w] - base[0], least[w] - base[1]};
    // By signs, which unlike comparisons need none of the few predicates.
    uint32 signs = 0;
#pragma unroll
    for (int k = 2 * kSpansInChunk - 1; k >= 0; --k) {
      const int j = kSpansInChunk * w + k / 2, side = k % 2;
      const float over = fmaxf(exponents[SumPlace::index(j, 0, side)] - lowest[0],
                               exponents[SumPlace::index(j, 1, side)] - lowest[1]);
      signs = __funnelshift_l(__float_as_uint(over), signs, 1);
    }
    const uint32 place = 8 * (w % 4);
    dropped.byte[w / 4] &= signs << place | ~(0xFFu << place);
  }
}

// Mark columns that are not dropped: over the lanes that hold the same columns of other rows, then by
// a lane for each chunk and each four of its columns' pairs.
__device__ __forceinline__ void mark_columns(Dropped& dropped, uint32* words, int lane) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2)
#pragma unroll
    for (int i = 0; i < 2; ++i) dropped.byte[i] &= __shfl_xor_sync(~0u, dropped.byte[i], step);
  const int w = lane / 4;
  const uint32 byte = ~(w < 4 ? dropped.byte[0] : dropped.byte[1]) >> 8 * (w % 4) & 0xFF;
  if (w < kChunks && byte != 0) atomicOr(words + w, spread(byte) << 2 * (lane % 4));
}

}  // namespace cce
