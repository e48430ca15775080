// The chunk of columns at hand of the backward on Hopper: the lists of its row tiles, and the items of dz.
#pragma once

#include "backward.cuh"
#include "scan.cuh"

namespace cce {

// The blocks of the order that are worked on at a time.
struct Chunk {
  int number;
  int first;
  int last;

  __device__ __forceinline__ Chunk(const ColumnOrder& order, int number)
      : number(number), first(order.first_block(number)), last(order.first_block(number + 1)) {}
};

// One warp.
__device__ __forceinline__ void place_lists(Shared& shared, const ColumnOrder& order,
                                            const Chunk& chunk, int row_tiles) {
  const int lane = threadIdx.x % 32;
  int end = 0, all_items = 0;
  for (int first = 0; first < row_tiles; first += 32) {
    const int tile = first + lane;
    int before = 0, pairs = 0;
    if (tile < row_tiles) {
      before = order.kept_before(tile, chunk.first);
      pairs = order.kept_before(tile, chunk.last) - before;
    }
    const int length = (pairs + kListUnit - 1) / kListUnit * kListUnit;
    const int upto = sum_of_lanes(length);
    if (tile < row_tiles) {
      shared.start[tile] = end + upto - length - before;
      shared.pairs[tile] = pairs;
      if (!order.whole()) shared.natural[tile] = order.natural_before(tile, chunk.number);
    }
    end += __shfl_sync(~0u, upto, 31);
    all_items += static_cast<int>(__reduce_add_sync(~0u, (pairs + kPairs - 1) / kPairs));
  }
  if (lane == 0) shared.items = all_items;
}

// Where the list of a row tile starts.
__device__ __forceinline__ int list_start(const Shared& shared, const BackwardArguments& call,
                                          const Chunk& chunk, int tile) {
  return shared.start[tile] + call.order.kept_before(tile, chunk.first);
}

// List the items of dz by where in the order of the columns each starts: blocks that take them one after
// the other then meet the same rows of c in the L2. A warp for each block of columns.
__device__ __forceinline__ void list_items(const BackwardArguments& call, const Chunk& chunk,
                                           int row_tiles, int warp, int warps) {
  const ColumnOrder& order = call.order;
  const int lane = threadIdx.x % 32;
  for (int block = chunk.first + warp; block < chunk.last; block += warps) {
    int before = 0;  // items that start in blocks before this one
    auto items_before = [&](int tile, int at) {
      if (tile >= row_tiles) return 0;
      return (order.kept_before(tile, at) - order.kept_before(tile, chunk.first) + kPairs - 1) / kPairs;
    };
    for (int first = 0; first < row_tiles; first += 32)
      before += static_cast<int>(__reduce_add_sync(~0u, items_before(first + lane, block)));
    for (int first = 0; first < row_tiles; first += 32) {
      const int own = items_before(first + lane, block);
      // A block holds fewer columns than an item: at most one starts in it.
      const bool starts = items_before(first + lane, block + 1) > own;
      const uint32 starting = __ballot_sync(~0u, starts);
      if (starts)
        call.item[before + __popc(starting & ((1u << lane) - 1u))] =
            own * kMostRowTiles + first + lane;
      before += __popc(starting);
    }
  }
}

// Write the lists of a chunk.
__device__ __forceinline__ void fill_lists(const Shared& shared, const BackwardArguments& call,
                                           const Chunk& chunk, int row_tiles, int64 thread,
                                           int64 threads) {
  const ColumnOrder& order = call.order;
  const int words = (chunk.last - chunk.first) * kWordsOfBlock;
  const float lowest = -static_cast<float>(infinity());
  for (int64 i = thread; i < static_cast<int64>(row_tiles) * words; i += threads) {
    const int tile = static_cast<int>(i / words), at = static_cast<int>(i % words);
    const int block = chunk.first + at / kWordsOfBlock, number = at % kWordsOfBlock;
    uint32 kept[kWordsOfBlock];
    order.read_words(kept, tile, block);
    int* to = call.list + shared.start[tile] + order.kept_before(tile, block);
    uint32 rest = 0;
#pragma unroll
    for (int k = 0; k < kWordsOfBlock; ++k) {
      if (k < number) to += __popc(kept[k]);
      if (k == number) rest = kept[k];
    }
    const int left = block * kOrderBlock + number * kColumnChunk;
    for (; rest != 0; rest &= rest - 1, ++to) {
      const int column = order.column_at(left + __ffs(rest) - 1);
      const bool removed = call.bias != nullptr && widen(call.bias[column]) == lowest;
      *to = removed ? column | kRemoved : column;
    }
  }
}

}  // namespace cce
