// Copies of gathered words, one after the other without a wait in between.
#pragma once

#include "ptx.cuh"

namespace cce {

// Copies that follow one another get one pair of registers for their addresses from the assembler, and each
// waits until the one before has read it: 30 to 60 cycles instead of ten. Addresses that are needed behind
// the copies keep pairs of their own; so their low halves go into a number that decides nothing.
struct KeptAddresses {
  uint32 mixed = 0;

  // Behind copies from these addresses.
  template <int kNumber>
  __device__ __forceinline__ void keep(const Storage* const (&from)[kNumber]) {
    static_assert(kNumber % 2 == 0, "the last is mixed first, with pairs of the others");
    auto low = [&](int i) { return static_cast<uint32>(reinterpret_cast<uint64>(from[i])); };
    uint32 found = low(kNumber - 1);
#pragma unroll
    for (int i = 0; i + 2 < kNumber; i += 2) found = xor_of_three(found, low(i), low(i + 1));
    mixed = xor_of_three(found, low(kNumber - 2), mixed);
  }
  // At the end: addresses of words are multiples of 16.
  __device__ __forceinline__ void finish() const { trap_if_one(mixed); }
};

// What the compiler may not take apart: else it holds what an address is made of, and makes it anew for
// each copy.
template <typename Pointer>
__device__ __forceinline__ Pointer as_address(Pointer pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

}  // namespace cce
