// From the kept-column bits to the order of the columns: cut into chunks whose records fit into the
// workspace, and in each sorted by which row tiles keep them.

#include "sort.cuh"

namespace cce {

// Kept columns of each row tile before each block, in the order of the vocabulary or the new one. A
// block of threads for each row tile.
template <typename Count>
__device__ __forceinline__ void scan_blocks(OrderShared& shared, int* before, int stride, int blocks,
                                            int row_tiles, Count count) {
  const int each = (blocks + kThreads - 1) / kThreads;
  const int first = min(static_cast<int>(threadIdx.x) * each, blocks);
  const int last = min(first + each, blocks);
  for (int tile = blockIdx.x; tile < row_tiles; tile += gridDim.x) {
    int own = 0, all;
    for (int block = first; block < last; ++block) own += count(tile, block);
    int at = sum_before<0, kThreads>(shared.warp_sum, own, &all);
    int* row = before + static_cast<int64>(tile) * stride;
    for (int block = first; block < last; ++block) {
      row[block] = at;
      at += count(tile, block);
    }
    if (threadIdx.x == 0) row[blocks] = all;
  }
}

// Columns that any row tile keeps.
__device__ __forceinline__ void count_columns(const ColumnOrder& order, const OrderScratch& scratch,
                                              int row_tiles) {
  int found = 0;
  for (int word = blockIdx.x * kThreads + threadIdx.x; word < order.kept.words;
       word += gridDim.x * kThreads) {
    uint32 any = 0;
#pragma unroll 8
    for (int tile = 0; tile < row_tiles; ++tile) any |= order.kept.word(tile, word);
    found += __popc(any);
  }
  if (found > 0) atomicAdd(scratch.any, found);
}

// The chunk of a block of the vocabulary, of so many.
__device__ __forceinline__ int chunk_of(const ColumnOrder& order, int chunks, int block) {
  int low = 0, high = chunks;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (order.range[middle] <= block ? low : high) = middle;
  }
  return low;
}

// Keys of all columns, the row tiles that keep each, and their chunks.
__device__ __forceinline__ void make_keys(const ColumnOrder& order, const OrderScratch& scratch,
                                          int chunks, int row_tiles, int shift, int warp, int warps,
                                          int lane) {
  for (int word = warp; word < order.kept.words; word += warps) {
    const int64 column = static_cast<int64>(word) * kColumnChunk + lane;
    const bool there = column < order.kept.vocab;
    uint64 slots = 0;
    for (int number = 0; number < order.tile_words; ++number) {
      const int tile = number * 32 + lane;
      uint32 tiles = transpose_bits(tile < row_tiles ? order.kept.word(tile, word) : 0u, lane);
      if (there) scratch.kept[column * order.tile_words + number] = tiles;
      int number_of_slots = 32;
      for (int fold = 0; fold < shift && number_of_slots > 1; ++fold, number_of_slots /= 2)
        tiles = fold_pairs(tiles);
      slots |= static_cast<uint64>(tiles) << (32 * number >> shift);
    }
    const int chunk = chunk_of(order, chunks, word / kWordsOfBlock);
    const int active = __popc(__ballot_sync(~0u, slots != 0));
    if (lane == 0 && active > 0) atomicAdd(scratch.active + chunk, active);
    if (!there) continue;
    scratch.key[column] = sort_key(slots);
    scratch.chunk[column] = slots != 0 ? chunk : chunks;
  }
}

// The first block of each chunk, and the places in use. One thread.
__device__ __forceinline__ void place_chunks(const ColumnOrder& order, const OrderScratch& scratch) {
  const int chunks = order.chunk[0];
  int block = 0, active = 0;
  for (int k = 0; k < chunks; ++k) {
    const int own = scratch.active[k];
    order.chunk[ColumnOrder::kTable + k] = block;
    scratch.active[k] = active;
    block += (own + kOrderBlock - 1) / kOrderBlock;
    active += own;
  }
  order.chunk[ColumnOrder::kTable + chunks] = block;
  scratch.active[chunks] = active;
  const int places = block * kOrderBlock + static_cast<int>(order.kept.vocab) - active;
  order.chunk[1] = places;
  if (order.chunk[2] > 0) order.chunk[2] = places - order.chunk[2];
}

// Columns to their places, the kept bits in the order, and the row tiles of each half block.
__device__ __forceinline__ void permute(const ColumnOrder& order, const OrderScratch& scratch,
                                        const int* sorted, int row_tiles, int warp, int warps,
                                        int lane) {
  constexpr int kWordsOfHalf = kWordsOfBlock / kHalves, kHalfBlock = kOrderBlock / kHalves;
  const int64 row = static_cast<int64>(order.blocks) * kWordsOfBlock;
  const int chunks = order.chunk[0], used = order.first_block(chunks), places = order.chunk[1];
  int k = 0;
  for (int half = warp; half * kHalfBlock < places; half += warps) {
    const int block = half / kHalves;
    while (k < chunks && block >= order.first_block(k + 1)) ++k;
    const int start = scratch.active[k] - order.first_block(k) * kOrderBlock;
    const int end = k < chunks ? scratch.active[k + 1] : static_cast<int>(order.kept.vocab);
    int column[kWordsOfHalf];
#pragma unroll
    for (int i = 0; i < kWordsOfHalf; ++i) {
      const int at = (half * kWordsOfHalf + i) * kColumnChunk + lane;
      column[i] = start + at < end ? sorted[start + at] : -1;
      order.column[at] = column[i];
    }
    if (block >= used) continue;
    for (int number = 0; number < order.tile_words; ++number) {
      uint32 any = 0;
#pragma unroll
      for (int i = 0; i < kWordsOfHalf; ++i) {
        const uint32 kept =
            column[i] < 0
                ? 0u
                : scratch.kept[static_cast<int64>(column[i]) * order.tile_words + number];
        any |= kept;
        const uint32 columns = transpose_bits(kept, lane);
        const int tile = number * 32 + lane;
        if (tile < row_tiles) order.word[tile * row + half * kWordsOfHalf + i] = columns;
      }
      any = __reduce_or_sync(~0u, any);
      if (lane == 0) order.tiles[static_cast<int64>(half) * order.tile_words + number] = any;
    }
  }
}

// Pairs of all row tiles before each block of the vocabulary.
__device__ __forceinline__ void count_pairs(const ColumnOrder& order, const OrderScratch& scratch,
                                            int row_tiles) {
  const int step = gridDim.x * kThreads, stride = order.natural_blocks + 1;
  for (int block = blockIdx.x * kThreads + threadIdx.x; block < stride; block += step) {
    int pairs = 0;
#pragma unroll 16
    for (int tile = 0; tile < row_tiles; ++tile)
      pairs += order.kept_in[static_cast<int64>(tile) * stride + block];
    scratch.pairs_before[block] = pairs;
  }
}

// The row tiles of each block.
__device__ __forceinline__ void count_tiles(const ColumnOrder& order, const OrderScratch& scratch,
                                            int used, int row_tiles) {
  const int step = gridDim.x * kThreads;
  for (int block = blockIdx.x * kThreads + threadIdx.x; block < used; block += step) {
    int tiles = 0;
    for (int number = 0; number < order.tile_words; ++number)
      tiles += __popc(order.tiles_of(block, 0, number, row_tiles) |
                      order.tiles_of(block, 1, number, row_tiles));
    scratch.tile_count[block] = tiles;
  }
}

// The first number from `low` on for which `holds`, which it does from there on; `high` if below it it
// never does. One warp.
template <typename Holds>
__device__ __forceinline__ int first_where(int low, int high, int lane, Holds holds) {
  while (low < high) {
    const int each = (high - low + 31) / 32, at = low + lane * each;
    const uint32 yes = __ballot_sync(~0u, at >= high || holds(at));
    if (yes == ~0u) {
      high = low;
    } else {
      const int last_no = 31 - __clz(~yes);
      high = min(low + (last_no + 1) * each, high);
      low += last_no * each + 1;
    }
  }
  return low;
}

// Pairs of all row tiles. Every warp.
__device__ __forceinline__ int count_all_pairs(const ColumnOrder& order, int row_tiles, int lane) {
  int pairs = 0;
#pragma unroll 2
  for (int tile = lane; tile < row_tiles; tile += 32)
    pairs += order.kept_in[static_cast<int64>(tile) * (order.natural_blocks + 1) + order.natural_blocks];
  return static_cast<int>(__reduce_add_sync(~0u, pairs));
}

// One chunk. One thread.
__device__ __forceinline__ void leave_whole(const ColumnOrder& order) {
  order.range[0] = 0;
  order.range[1] = order.natural_blocks;
  order.chunk[0] = 1;
  order.chunk[2] = 0;
}

// Cut the vocabulary into chunks of at most `capacity` pairs, lists as whole units. Where `waiting_rows` columns
// are nobody's unfinished sums of dE wait in their rows of dC, and chunks may hold as many pairs as one would.
// Where these must be so many, nothing is cut if there are fewer; else return true. One warp.
__device__ __forceinline__ bool cut_chunks(const ColumnOrder& order, const OrderScratch& scratch,
                                           int row_tiles, int capacity, int capacity_in_one,
                                           int waiting_rows, bool must_wait, int lane) {
  const int* before = scratch.pairs_before;
  const int all = order.natural_blocks, padding = row_tiles * (kListUnit - 1);
  int chunks = 0, first = 0;
  const bool waits = waiting_rows > 0 && order.kept.vocab - *scratch.any >= waiting_rows;
  if (must_wait && !waits) return false;
  if (waits) capacity = capacity_in_one;
  while (first < all) {
    if (lane == 0) order.range[chunks] = first;
    ++chunks;
    const int limit = before[first] + capacity - padding;
    // A block at least; the capacity holds one.
    first = first_where(first + 1, all, lane, [&](int at) { return before[at + 1] > limit; });
  }
  if (lane == 0) {
    order.range[chunks] = all;
    order.chunk[0] = chunks;
    order.chunk[2] = waits ? waiting_rows : 0;
  }
  return true;
}

// The blocks of each chunk, those of most row tiles first: short ones fill the gaps at the end.
__device__ __forceinline__ void sort_blocks(OrderShared& shared, const ColumnOrder& order,
                                            const OrderScratch& scratch, int row_tiles) {
  constexpr int kRanks = 64;
  int* number = shared.start;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto rank = [&](int block) {
    return kRanks - 1 - (scratch.tile_count[block] - 1) * kRanks / max(row_tiles, 1);
  };
  const int chunks = order.chunk[0];
  for (int k = blockIdx.x; k < chunks; k += gridDim.x) {
    const int first = order.first_block(k), last = order.first_block(k + 1);
    __syncthreads();
    if (threadIdx.x < kRanks) number[threadIdx.x] = 0;
    __syncthreads();
    for (int block = first + threadIdx.x; block < last; block += kThreads)
      atomicAdd(&number[rank(block)], 1);
    __syncthreads();
    for (int mine = warp; mine < kRanks; mine += kWarps) {
      int to = first;
      for (int i = 0; i < mine; ++i) to += number[i];
      if (number[mine] == 0) continue;
      for (int block = first; block < last; block += 32) {
        const bool fits = block + lane < last && rank(block + lane) == mine;
        const uint32 fitting = __ballot_sync(~0u, fits);
        if (fits) order.block[to + __popc(fitting & ((1u << lane) - 1u))] = block + lane;
        to += __popc(fitting);
      }
    }
  }
}

}  // namespace cce

using namespace cce;

// A cooperative launch; `arrived` and scratch.active are zeros. An attempt is a pass over more row tiles than
// the workspace has room for unfinished sums of; if rows of dC have, it takes on the work of those that follow.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    order_columns(const int64* count, int64 first_tile, int tiles, int capacity,
                  int capacity_in_one, int may_wait_in_dc, ColumnOrder order, OrderScratch scratch,
                  int* arrived, int* taken, int attempt) {
  if (attempt == 0 && *taken != 0) return;
  __shared__ OrderShared shared;
  const int lane = threadIdx.x % 32, warp = blockIdx.x * kWarps + threadIdx.x / 32;
  const int row_tiles = count_row_tiles(*count, first_tile, tiles);
  Barrier barrier{arrived};
  scan_blocks(shared, order.kept_in, order.natural_blocks + 1, order.natural_blocks, row_tiles,
              [&](int tile, int block) {
                int sum = 0;
#pragma unroll
                for (int i = 0; i < kWordsOfBlock; ++i)
                  sum += __popc(order.kept.word(tile, static_cast<int64>(block) * kWordsOfBlock + i));
                return sum;
              });
  barrier.wait();
  // What all find alike need not be told: most calls are of one chunk. Where the two capacities are equal all
  // fits into one.
  const bool in_one = capacity == capacity_in_one || count_all_pairs(order, row_tiles, lane) +
                                                             row_tiles * (kListUnit - 1) <=
                                                         capacity_in_one;
  int known_chunks = 1;
  if (in_one) {
    if (warp == 0 && lane == 0) {
      leave_whole(order);
      if (attempt != 0) *taken = 1;
    }
  } else {
    if (may_wait_in_dc != 0) count_columns(order, scratch, row_tiles);
    count_pairs(order, scratch, row_tiles);
    barrier.wait();
    if (warp == 0) {
      int rows = 0;
      if (may_wait_in_dc != 0)
        rows = static_cast<int>(min(*count, (first_tile + tiles) * kRowTile) - first_tile * kRowTile);
      const bool cut = cut_chunks(order, scratch, row_tiles, capacity, capacity_in_one, rows,
                                  attempt != 0, lane);
      if (attempt != 0 && cut && lane == 0) *taken = 1;
    }
    barrier.wait();
    if (attempt != 0 && __ldcg(taken) == 0) return;
    known_chunks = order.chunk[0];
  }
  int shift = 0;
  while (kSlots << shift < row_tiles) ++shift;
  make_keys(order, scratch, known_chunks, row_tiles, shift, warp, gridDim.x * kWarps, lane);
  barrier.wait();
  const int chunks = order.chunk[0];
  if (warp == 0 && lane == 0) place_chunks(order, scratch);
  int passes = 0;
  for (; passes < kKeyPasses; ++passes) sort_by_digit(shared, order, scratch, passes, barrier);
  if (chunks > 1)
    for (int rest = chunks; rest > 0; rest >>= kDigitBits)
      sort_by_digit(shared, order, scratch, passes++, barrier);
  const int* sorted = scratch.place + passes % 2 * order.kept.vocab;
  permute(order, scratch, sorted, row_tiles, warp, gridDim.x * kWarps, lane);
  barrier.wait();
  const int used = order.first_block(chunks);
  scan_blocks(shared, order.before, order.blocks + 1, used, row_tiles, [&](int tile, int block) {
    uint32 kept[kWordsOfBlock];
    order.read_words(kept, tile, block);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kWordsOfBlock; ++i) sum += __popc(kept[i]);
    return sum;
  });
  count_tiles(order, scratch, used, row_tiles);
  barrier.wait();
  sort_blocks(shared, order, scratch, row_tiles);
}
