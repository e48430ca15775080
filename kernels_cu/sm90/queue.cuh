// How the work of a phase of the backward on Hopper is handed out.
#pragma once

#include "backward.cuh"

namespace cce {

// Hands out the numbers 0, 1, ... of a phase to blocks as they come for them. The counter goes on from
// phase to phase: each block takes one number too many in each.
struct Queue {
  int* counter;
  int base = 0;   // of this phase
  int taken = 0;  // items that this block has seen, in all phases
  int next = 0;   // what the thread that takes them will publish: the next item, or kNoItem

  static constexpr int kNoItem = -1;

  // The item of the next number; `item_of` finds it.
  template <typename ItemOf>
  __device__ __forceinline__ int take(int limit, ItemOf item_of) {
    const int number = atomicAdd(counter, 1) - base;
    return number < limit ? item_of(number) : kNoItem;
  }
  template <typename ItemOf>
  __device__ __forceinline__ void start(int limit, ItemOf item_of) {
    if (threadIdx.x == 0) next = take(limit, item_of);
  }
  // One thread publishes the next item; all return it, kNoItem at the end.
  template <typename ItemOf>
  __device__ __forceinline__ int publish(Shared& shared, int limit, ItemOf item_of) {
    if (threadIdx.x == 0) {
      const int slot = taken % kItemSlots;
      shared.item[slot] = next;
      mbarrier_arrive(shared_address(&shared.item_ready[slot]), 1);
      // Another is on its way while this one is worked on.
      if (next != kNoItem) next = take(limit, item_of);
    }
    return receive(shared);
  }
  __device__ __forceinline__ int receive(Shared& shared) {
    const int slot = taken % kItemSlots;
    wait_for(shared.item_ready[slot], taken / kItemSlots & 1);
    ++taken;
    return shared.item[slot];
  }
  __device__ __forceinline__ void finish(int limit) { base += limit + static_cast<int>(gridDim.x); }
};

}  // namespace cce
