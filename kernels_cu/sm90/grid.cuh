// A barrier of all blocks of a cooperative launch.
#pragma once

#include "ptx.cuh"

namespace cce {

// `arrived` counts up from 0 at the start of the launch. What threads of any block wrote before it,
// all threads see behind it; kNumber names the barrier of a block's kThreads threads that it takes,
// kBranches says that they come to it at different places of the code.
template <int kNumber, int kThreads, bool kBranches>
struct GridBarrier {
  int* arrived;
  int rounds = 0;

  __device__ __forceinline__ void sync_block() {
    if constexpr (kBranches)
      named_sync_of_branches<kNumber, kThreads>();
    else
      named_sync<kNumber, kThreads>();
  }
  __device__ __forceinline__ void wait() {
    ++rounds;
    sync_block();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1);
      while (load_acquire(arrived) < rounds * static_cast<int>(gridDim.x)) {
      }
      __threadfence();
    }
    sync_block();
  }
};

}  // namespace cce
