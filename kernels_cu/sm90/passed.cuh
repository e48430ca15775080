// Which pairs of a row tile enter dE on Hopper, and in which order: those that pass the exact test, in the
// order of the vocabulary. Neither the columns that the forward kept besides nor where chunks begin leaves
// a trace in the sums.
#pragma once

#include "lists.cuh"
#include "scan.cuh"

namespace cce {

constexpr int kStep = 16;      // pairs that enter a sum at once: what is left over waits for the next chunk
constexpr int kSlotsRead = 16;  // by a thread at once
static_assert(kListUnit % 4 == 0 && kSlotsRead % 4 == 0, "four slots are read at once");

// The list of a row tile's passed pairs has room for what was carried, too.
__device__ __forceinline__ int passed_start(const Shared& shared, const BackwardArguments& call,
                                            const Chunk& chunk, int tile) {
  return list_start(shared, call, chunk, tile) + tile * kStep;
}
__device__ __forceinline__ int carry_place(const BackwardArguments& call, int chunk, int tile) {
  return call.carry + (chunk % 2 * static_cast<int>(call.tiles) + tile) * kStep;
}

// List what passed of each row tile, tiles dealt out over the blocks.
__device__ __forceinline__ void list_passed(Shared& shared, const BackwardArguments& call,
                                            const Chunk& chunk, int row_tiles, bool last) {
  const int thread = threadIdx.x;
  for (int tile = blockIdx.x; tile < row_tiles; tile += gridDim.x) {
    const int pairs = shared.pairs[tile];
    const int* slot = call.slot + list_start(shared, call, chunk, tile);
    int* to = call.passing + passed_start(shared, call, chunk, tile);
    const int carried = chunk.number == 0 ? 0 : call.carried[tile];
    if (thread < carried) to[thread] = carry_place(call, chunk.number, tile) + thread;
    int total = carried;
    for (int first = 0; first < pairs; first += kSlotsRead * kGroupThreads) {
      int found[kSlotsRead];
      const int own = first + thread * kSlotsRead;
      int number = 0;
#pragma unroll
      for (int i = 0; i < kSlotsRead; i += 4) {
        int4 four = make_int4(-1, -1, -1, -1);
        if (own + i + 4 <= pairs) {
          four = *reinterpret_cast<const int4*>(slot + own + i);
        } else {  // those past the last are nobody's, and nobody has written them
          if (own + i < pairs) four.x = slot[own + i];
          if (own + i + 1 < pairs) four.y = slot[own + i + 1];
          if (own + i + 2 < pairs) four.z = slot[own + i + 2];
        }
        found[i] = four.x, found[i + 1] = four.y, found[i + 2] = four.z, found[i + 3] = four.w;
      }
#pragma unroll
      for (int i = 0; i < kSlotsRead; ++i) number += found[i] >= 0;
      int all;
      int at = total + sum_before<kCopiers, kGroupThreads>(shared.copier_sum, number, &all);
#pragma unroll
      for (int i = 0; i < kSlotsRead; ++i)
        if (found[i] >= 0) to[at++] = found[i];
      total += all;
    }
    const int taken = last ? total : total / kStep * kStep, rest = total - taken;
    // Its own writes, of this group.
    __threadfence_block();
    named_sync<kCopiers, kGroupThreads>();
    constexpr int kWords = kRowTile / kWordElements;
    const int next = carry_place(call, chunk.number + 1, tile);
    for (int i = thread; i < rest * kWords; i += kGroupThreads) {
      const int from = to[taken + i / kWords];
      reinterpret_cast<uint4*>(call.dz + static_cast<int64>(next) * kRowTile)[i] =
          reinterpret_cast<const uint4*>(call.dz + static_cast<int64>(from) * kRowTile)[i % kWords];
      if (i % kWords == 0) call.list[next + i / kWords] = call.list[from];
    }
    __threadfence();
    named_sync<kCopiers, kGroupThreads>();
    if (thread == 0) {
      call.passed_pairs[tile] = taken;
      call.carried[tile] = rest;
      __threadfence();
      atomicExch(call.ready + tile, chunk.number + 1);
    }
  }
}

// How many pairs of a row tile enter dE, once it is known.
__device__ __forceinline__ int count_passed(const Shared& shared, const BackwardArguments& call,
                                            const Chunk& chunk, int tile) {
  if (call.order.whole()) return shared.pairs[tile];
  while (load_acquire(call.ready + tile) <= chunk.number) {
  }
  return __ldcg(call.passed_pairs + tile);
}

}  // namespace cce
