// A barrier of all blocks of a cooperative launch.
#pragma once

#include "ptx.cuh"

namespace cce {

// `arrived` counts up from 0 at the start of the launch. What threads of any block wrote before it,
// all threads see behind it; kNumber names the barrier of a block's kThreads threads that it takes.
template <int kNumber, int kThreads>
struct GridBarrier {
  int* arrived;
  int rounds = 0;

  __device__ __forceinline__ void wait() {
    ++rounds;
    named_sync<kNumber, kThreads>();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1);
      while (load_acquire(arrived) < rounds * static_cast<int>(gridDim.x)) {
      }
      __threadfence();
    }
    named_sync<kNumber, kThreads>();
  }
};

}  // namespace cce
