// From the kept-column bits to the order of the columns: cut into chunks whose records fit into the
// workspace, and in each sorted by which row tiles keep them.

#include "grid.cuh"
#include "order.cuh"

namespace cce {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kDigits = 256;
constexpr int kDigitBits = 8;
constexpr int kKeyPasses = 32 / kDigitBits;
constexpr int kSlots = 32;  // into which row tiles are folded for the key
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
};

struct OrderShared {
  int histogram[kWarps][kDigits];  // of a pass
  int part[2][kParts][kDigits];
  int start[kDigits];
  int warp_sum[kWarps];
};

using Barrier = GridBarrier<1, kThreads>;

// Every second bit, packed.
__device__ __forceinline__ uint32 pack_even_bits(uint32 x) {
  x = (x | x >> 1) & 0x33333333u;
  x = (x | x >> 2) & 0x0F0F0F0Fu;
  x = (x | x >> 4) & 0x00FF00FFu;
  return (x | x >> 8) & 0x0000FFFFu;
}
// Whether either of two neighbours is set.
__device__ __forceinline__ uint32 fold_pairs(uint32 x) {
  return pack_even_bits((x | x >> 1) & 0x55555555u);
}

// The rank of a word in a Gray code: neighbours in rank differ in one bit.
__device__ __forceinline__ uint32 gray_rank(uint32 x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x ^= x >> step;
  return x;
}

// Ascending keys: first by the eighths of the row tiles that keep a column, then by sixteenths, then by
// some of the finest slots. A column that nobody keeps has the largest.
__device__ __forceinline__ uint32 sort_key(uint32 slots) {
  const uint32 sixteenths = fold_pairs(slots), eighths = fold_pairs(sixteenths);
  return ~(gray_rank(eighths) << 24 | gray_rank(sixteenths) << 8 | gray_rank(slots) >> 24);
}

// The bit of each lane's column in a word of 32 row tiles, of which each lane holds one's 32 columns.
__device__ __forceinline__ uint32 transpose_bits(uint32 word, int lane) {
  uint32 mine = 0;
#pragma unroll
  for (int column = 0; column < 32; ++column) {
    const uint32 tiles = __ballot_sync(~0u, word >> column & 1);
    if (lane == column) mine = tiles;
  }
  return mine;
}

// The sum over the threads before this one.
__device__ __forceinline__ int sum_before(OrderShared& shared, int own, int* all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int upto = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, upto, step);
    if (lane >= step) upto += other;
  }
  __syncthreads();
  if (lane == 31) shared.warp_sum[warp] = upto;
  __syncthreads();
  int before = 0, sum = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += shared.warp_sum[i];
    sum += shared.warp_sum[i];
  }
  *all = sum;
  return before + upto - own;
}

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
    int at = sum_before(shared, own, &all);
    int* row = before + static_cast<int64>(tile) * stride;
    for (int block = first; block < last; ++block) {
      row[block] = at;
      at += count(tile, block);
    }
    if (threadIdx.x == 0) row[blocks] = all;
  }
}

// The chunk of a block of the vocabulary.
__device__ __forceinline__ int chunk_of(const ColumnOrder& order, int block) {
  int low = 0, high = order.chunk[0];
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (order.range[middle] <= block ? low : high) = middle;
  }
  return low;
}

// Keys of all columns, the row tiles that keep each, and their chunks.
__device__ __forceinline__ void make_keys(const ColumnOrder& order, const OrderScratch& scratch,
                                          int row_tiles, int shift, int warp, int warps, int lane) {
  const int chunks = order.chunk[0];
  for (int word = warp; word < order.kept.words; word += warps) {
    const int64 column = static_cast<int64>(word) * kColumnChunk + lane;
    const bool there = column < order.kept.vocab;
    uint32 slots = 0;
    for (int number = 0; number < order.tile_words; ++number) {
      const int tile = number * 32 + lane;
      uint32 tiles = transpose_bits(tile < row_tiles ? order.kept.word(tile, word) : 0u, lane);
      if (there) scratch.kept[column * order.tile_words + number] = tiles;
      int number_of_slots = 32;
      for (int fold = 0; fold < shift && number_of_slots > 1; ++fold, number_of_slots /= 2)
        tiles = fold_pairs(tiles);
      slots |= tiles << (32 * number >> shift);
    }
    const int chunk = chunk_of(order, word / kWordsOfBlock);
    const int active = __popc(__ballot_sync(~0u, slots != 0));
    if (lane == 0 && active > 0) atomicAdd(scratch.active + chunk, active);
    if (!there) continue;
    scratch.key[column] = sort_key(slots);
    scratch.chunk[column] = slots != 0 ? chunk : chunks;
  }
}

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
      upto = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += other;
      }
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
  order.chunk[1] = block * kOrderBlock + static_cast<int>(order.kept.vocab) - active;
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

// Cut the vocabulary into chunks of at most `capacity` pairs, lists as whole units; one chunk if
// `capacity_in_one` holds all, as it does where the two are equal. One warp.
__device__ __forceinline__ void cut_chunks(const ColumnOrder& order, const OrderScratch& scratch,
                                           int row_tiles, int capacity, int capacity_in_one,
                                           int lane) {
  const int* before = scratch.pairs_before;
  const int all = order.natural_blocks, padding = row_tiles * (kListUnit - 1);
  int chunks = 0, first = 0;
  const bool in_one = capacity == capacity_in_one || before[all] + padding <= capacity_in_one;
  while (first < all) {
    if (lane == 0) order.range[chunks] = first;
    ++chunks;
    const int limit = before[first] + capacity - padding;
    // A block at least; the capacity holds one.
    first = in_one ? all
                   : first_where(first + 1, all, lane,
                                 [&](int at) { return before[at + 1] > limit; });
  }
  if (lane == 0) {
    order.range[chunks] = all;
    order.chunk[0] = chunks;
  }
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

// A cooperative launch; `arrived` and scratch.active are zeros.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    order_columns(const int64* count, int64 first_tile, int tiles, int capacity,
                  int capacity_in_one, ColumnOrder order, OrderScratch scratch, int* arrived) {
  __shared__ OrderShared shared;
  const int lane = threadIdx.x % 32, warp = blockIdx.x * kWarps + threadIdx.x / 32;
  const int warps = gridDim.x * kWarps;
  const int row_tiles = count_row_tiles(*count, first_tile, tiles);
  int shift = 0;
  while (kSlots << shift < row_tiles) ++shift;
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
  count_pairs(order, scratch, row_tiles);
  barrier.wait();
  if (warp == 0) cut_chunks(order, scratch, row_tiles, capacity, capacity_in_one, lane);
  barrier.wait();
  make_keys(order, scratch, row_tiles, shift, warp, warps, lane);
  barrier.wait();
  const int chunks = order.chunk[0];
  if (warp == 0 && lane == 0) place_chunks(order, scratch);
  int passes = 0;
  for (; passes < kKeyPasses; ++passes) sort_by_digit(shared, order, scratch, passes, barrier);
  if (chunks > 1)
    for (int rest = chunks; rest > 0; rest >>= kDigitBits)
      sort_by_digit(shared, order, scratch, passes++, barrier);
  const int* sorted = scratch.place + passes % 2 * order.kept.vocab;
  permute(order, scratch, sorted, row_tiles, warp, warps, lane);
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
