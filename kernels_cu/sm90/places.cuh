// Registers by number. The compiler only knows them by constants: a tree of branches, a few instructions long on
// the way down, finds the place, where code for each place in turn would take hundreds.
#pragma once

#include "tile.cuh"

namespace cce {

// Call `use` with `place`, one of those from kFirst on, as a constant. `use` must have what keeps the compiler
// from doing all of its work beforehand, such as `one_by_one`.
template <int kFirst, int kPast, typename Use>
__device__ __forceinline__ void at_place(int place, const Use& use) {
  if constexpr (kPast - kFirst == 1) {
    use(kFirst);
  } else {
    constexpr int kMiddle = (kFirst + kPast) / 2;
    if (place < kMiddle) {
      at_place<kFirst, kMiddle>(place, use);
    } else {
      at_place<kMiddle, kPast>(place, use);
    }
  }
}

// Call `use` for each lane that has one of the columns of a block, one after the other, all lanes at once: with the
// span of eight that it is in and, in the lane that has it, which of its two there; -1 in the others.
template <typename Use>
__device__ __forceinline__ void find_owners(bool own, int span, int side, const Use& use) {
#pragma unroll 1
  for (uint32 left = __ballot_sync(~0u, own); left != 0; left &= left - 1) {
    const int owner = __ffs(left) - 1;
    int own_side = threadIdx.x % 32 == owner ? side : -1;
    // Once, not at each place anew.
    asm volatile("" : "+r"(own_side));
    at_place<0, kSpans>(__shfl_sync(~0u, span, owner), [&](int at) { use(at, own_side); });
  }
}

}  // namespace cce
