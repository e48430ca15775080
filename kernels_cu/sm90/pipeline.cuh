// A ring of stages in shared memory between the warp group that copies and those that multiply.
#pragma once

#include "ptx.cuh"

namespace cce {

// Whose turn a stage is: full once its copies are there, empty once its products are done.
template <int kStages>
struct RingBarriers {
  uint64 full[kStages];
  uint64 empty[kStages];
};

// A place in the ring, and the parity of its barriers in the round at hand.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32 parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }

  // Leave out stages that are another's.
  __device__ __forceinline__ void skip(int steps) {
    const int reached = stage + steps;
    parity ^= reached / kStages & 1;
    stage = reached % kStages;
  }
};

__device__ __forceinline__ void wait_for(const uint64& barrier, uint32 parity) {
  while (!mbarrier_try_wait(shared_address(&barrier), parity)) {
  }
}

}  // namespace cce
