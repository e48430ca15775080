// Gradients on Hopper of the columns that nobody keeps: zeros, or what label smoothing alone brings.
#pragma once

#include "backward.cuh"

namespace cce {

// Whether rows of dC are zeros, which copies from shared memory store while dz is formed.
__device__ __forceinline__ bool zero_background(const BackwardArguments& call) {
  return call.dc != nullptr && call.smoothing_embedding == nullptr;
}

// A block's share of the rows of dC that are zeros.
struct ZeroRows {
  int next = 0;
  int last = 0;

  __device__ __forceinline__ ZeroRows(const BackwardArguments& call, int first_block) {
    if (!zero_background(call)) return;
    // Rows where sums of dE wait become zeros when these are done.
    const int waiting = call.order.waiting_place();
    const int places = waiting > 0 ? waiting : call.order.places();
    const int first = min(first_block * kOrderBlock, places);
    const int each = (places - first + gridDim.x - 1) / gridDim.x;
    next = min(first + static_cast<int>(blockIdx.x) * each, places);
    last = min(next + each, places);
  }
  // Store up to some rows. All threads of the group that copies.
  __device__ __forceinline__ void store(const Shared& shared, const BackwardArguments& call,
                                        int rows) {
    const int end = next + min(rows, last - next), bytes = static_cast<int>(call.dim * sizeof(Storage));
    for (int place = next + threadIdx.x; place < end; place += kGroupThreads) {
      char* row = reinterpret_cast<char*>(call.dc + call.order.column_at(place) * call.dim);
      for (int at = 0; at < bytes; at += kZeroBytes)
        store_bulk(row + at, shared_address(shared.zeros), min(bytes - at, kZeroBytes));
    }
    commit_bulk();
    next = end;
  }
};

// How many rows of zeros go with an item of dz, so that all have gone when dz is done. One warp.
__device__ __forceinline__ void share_zero_rows(Shared& shared, const BackwardArguments& call,
                                                const ZeroRows& zeros, int first_block,
                                                int row_tiles) {
  int64 pairs = 0;
  for (int tile = threadIdx.x % 32; tile < row_tiles; tile += 32)
    pairs += call.order.kept_before(tile, first_block);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) pairs += __shfl_xor_sync(~0u, pairs, step);
  const int64 items = max(pairs / kPairs / gridDim.x, int64(1));
  if (threadIdx.x % 32 == 0)
    shared.rows_of_item = static_cast<int>((zeros.last - zeros.next + items - 1) / items);
}

// What label smoothing brings, and dbias. All threads.
__device__ __forceinline__ void fill_background(const BackwardArguments& call, int first_block,
                                                int64 thread, int64 threads) {
  const int64 first = static_cast<int64>(first_block) * kOrderBlock, places = call.order.places();
  const float scale = static_cast<float>(call.options.scale);
  const int words = static_cast<int>(call.dim) / kWordElements;
  if (call.dc != nullptr && !zero_background(call))
    for (int64 i = first * words + thread; i < places * words; i += threads) {
      const int64 place = i / words;
      const int d = static_cast<int>(i - place * words) * kWordElements;
      const int column = call.order.column_at(static_cast<int>(place));
      const float factor = -call.smoothing_class[column] * scale;
      auto pair = [&](int k) {
        return narrow_pair(factor * call.smoothing_embedding[d + 2 * k],
                           factor * call.smoothing_embedding[d + 2 * k + 1]);
      };
      *reinterpret_cast<uint4*>(call.dc + column * call.dim + d) =
          make_uint4(pair(0), pair(1), pair(2), pair(3));
    }
  if (call.dbias != nullptr)
    for (int64 place = first + thread; place < places; place += threads) {
      const int column = call.order.column_at(static_cast<int>(place));
      const double whole = call.smoothing_class == nullptr
                               ? 0.0
                               : -call.smoothing_class[column] * *call.smoothing_rows;
      call.dbias[column] = narrow(static_cast<float>(whole));
    }
}

}  // namespace cce
