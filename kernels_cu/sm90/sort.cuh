// A stable sort of the columns by their keys, and by the chunks they are of; with it what the order of the
// columns is made from.
#pragma once

#include "grid.cuh"
#include "keys.cuh"
#include "order.cuh"
#include "scan.cuh"

namespace cce {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kDigits = 256;
constexpr int kDigitBits = 8;
constexpr int kKeyPasses = kKeyBits / kDigitBits;
constexpr int kParts = kThreads / kDigits;

// What is needed until the order is there.
struct OrderScratch {
  uint32* key;        // (2, vocab)
  int* place;         // (2, vocab): columns, sorted with their keys
  uint32* kept;       // (vocab, tile_words): row tiles that keep a column
  int* chunk;         // (vocab): of each column; one past the last for those that nobody keeps
  int* digits;        // (grid, kDigits): keys of each block with each digit
  int* pairs_before;  // (natural_blocks + 1): of all row tiles
  int* tile_count;    // (blocks): row tiles that keep any column
  int* active;        // (chunks + 1): columns of each chunk, zeros before
  int* any;           // columns that any row tile keeps, where it has to be known; zero before
};

struct OrderShared {
  int histogram[kWarps][kDigits];  // of a pass
  int part[2][kParts][kDigits];
  int start[kDigits];
  int warp_sum[kWarps];
};

using Barrier = GridBarrier<1, kThreads, false>;

// One pass of a stable sort by digits, least first. Each warp takes columns that follow each other.
__device__ __forceinline__ void sort_by_digit(OrderShared& shared, const ColumnOrder& order,
                                              const OrderScratch& scratch, int pass,
                                              Barrier& barrier) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64 vocab = order.kept.vocab;
  const int from = pass % 2;
  const bool by_chunk = pass >= kKeyPasses;
  const int shift = (by_chunk ? pass - kKeyPasses : pass) * kDigitBits;
  const uint32* key = scratch.key + from * vocab;
  uint32* next_key = scratch.key + (1 - from) * vocab;
  const int* place = scratch.place + from * vocab;
  int* next_place = scratch.place + (1 - from) * vocab;
  auto digit_of = [&](int64 at) {
    const uint32 own = by_chunk ? static_cast<uint32>(scratch.chunk[place[at]]) : key[at];
    return own >> shift & (kDigits - 1);
  };
  const int64 each =
      (vocab + gridDim.x * kThreads - 1) / (gridDim.x * static_cast<int64>(kThreads)) * 32;
  const int64 first = (blockIdx.x * static_cast<int64>(kWarps) + warp) * each;
  const int64 last = min(first + each, vocab);
  int* histogram = shared.histogram[warp];
  for (int i = thread; i < kWarps * kDigits; i += kThreads) (&shared.histogram[0][0])[i] = 0;
  __syncthreads();
  for (int64 at = first; at < last; at += 32) {
    const bool there = at + lane < last;
    const uint32 digit = there ? digit_of(at + lane) : kDigits;
    const uint32 equal = __match_any_sync(~0u, digit);
    if (there && lane == __ffs(equal) - 1) histogram[digit] += __popc(equal);
    __syncwarp();
  }
  __syncthreads();
  if (thread < kDigits) {
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int own = shared.histogram[w][thread];
      shared.histogram[w][thread] = sum;
      sum += own;
    }
    scratch.digits[blockIdx.x * kDigits + thread] = sum;
  }
  barrier.wait();
  {
    // Of each digit: how many there are in all blocks, and in those before this one.
    const int digit = thread % kDigits, part = thread / kDigits;
    int all = 0, before = 0;
    // A few loads at a time, that do not wait for each other.
#pragma unroll 6
    for (int block = part; block < static_cast<int>(gridDim.x); block += kParts) {
      const int number = __ldcg(scratch.digits + block * kDigits + digit);
      all += number;
      if (block < static_cast<int>(blockIdx.x)) before += number;
    }
    shared.part[0][part][digit] = all;
    shared.part[1][part][digit] = before;
    __syncthreads();
    int upto = 0, own = 0;
    if (thread < kDigits) {
      before = 0;
      for (int i = 0; i < kParts; ++i) {
        own += shared.part[0][i][thread];
        before += shared.part[1][i][thread];
      }
      upto = sum_of_lanes(own);
      if (lane == 31) shared.warp_sum[warp] = upto;
    }
    __syncthreads();
    if (thread < kDigits) {
      for (int i = 0; i < warp; ++i) upto += shared.warp_sum[i];
      shared.start[thread] = upto - own + before;
    }
    __syncthreads();
  }
  for (int64 at = first; at < last; at += 32) {
    const bool there = at + lane < last;
    const uint32 digit = there ? digit_of(at + lane) : kDigits;
    const uint32 equal = __match_any_sync(~0u, digit);
    if (there) {
      const int to = shared.start[digit] + histogram[digit] + __popc(equal & ((1u << lane) - 1u));
      next_key[to] = key[at + lane];
      next_place[to] = pass == 0 ? static_cast<int>(at + lane) : place[at + lane];
    }
    __syncwarp();
    if (there && lane == __ffs(equal) - 1) histogram[digit] += __popc(equal);
    __syncwarp();
  }
  barrier.wait();
}

}  // namespace cce
