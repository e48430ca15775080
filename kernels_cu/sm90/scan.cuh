// Sums over the threads before each.
#pragma once

#include "ptx.cuh"

namespace cce {

// Over a warp's lanes up to this one, its own included.
__device__ __forceinline__ int sum_of_lanes(int own) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, own, step);
    if (lane >= step) own += other;
  }
  return own;
}

// Over a block's first kThreads threads, this one's left out; kBarrier names a barrier of theirs.
template <int kBarrier, int kThreads>
__device__ __forceinline__ int sum_before(int (&scratch)[kThreads / 32], int own, int* all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int upto = sum_of_lanes(own);
  named_sync<kBarrier, kThreads>();
  if (lane == 31) scratch[warp] = upto;
  named_sync<kBarrier, kThreads>();
  int before = 0, sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) before += scratch[i];
    sum += scratch[i];
  }
  *all = sum;
  return before + upto - own;
}

}  // namespace cce
