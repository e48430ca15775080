// The two products with dz on Hopper: dE with a row tile in registers and its listed columns as depth, dC
// with a block of columns in registers and the row tiles that keep any of them as depth.
#pragma once

#include "copies.cuh"
#include "gradients.cuh"
#include "passed.cuh"
#include "queue.cuh"

namespace cce {

static_assert(kSpread == kGroupThreads / 32, "a box for each warp that copies");

__device__ __forceinline__ int count_parts(const BackwardArguments& call) {
  return static_cast<int>((call.dim + kWidth - 1) / kWidth);
}
__device__ __forceinline__ int count_embeddings(const BackwardArguments& call, int row_tiles) {
  return call.de == nullptr ? 0 : row_tiles * count_parts(call);
}

// The work of a phase: all of dE, then all of dC. Parts of D that read the same records of dz follow one
// another, so that these come from memory once.
struct GradientItem {
  bool embedding;
  int part;   // of D
  int place;  // a row tile, or the place of a block in its chunk

  __device__ __forceinline__ GradientItem(const BackwardArguments& call, int row_tiles, int parts,
                                          int at) {
    const int embeddings = count_embeddings(call, row_tiles);
    embedding = at < embeddings;
    const int number = embedding ? at : at - embeddings;
    place = number / parts;
    part = number - place * parts;
  }
};

__device__ __forceinline__ int count_gradients(const BackwardArguments& call, const Chunk& chunk,
                                               int row_tiles) {
  const int blocks = call.dc == nullptr ? 0 : chunk.last - chunk.first;
  return count_embeddings(call, row_tiles) + blocks * count_parts(call);
}

// The row tiles that keep any column of a block, ascending, and whether a half of it matters to each.
struct KeepingTiles {
  const ColumnOrder& order;
  int block;
  int row_tiles;
  int number = -1;  // of the word at hand
  uint32 rest = 0;
  uint32 halves[kHalves] = {};

  __device__ __forceinline__ KeepingTiles(const ColumnOrder& order, int block, int row_tiles)
      : order(order), block(block), row_tiles(row_tiles) {}

  // The next tile, or -1.
  __device__ __forceinline__ int next() {
    while (rest == 0) {
      if (++number * 32 >= row_tiles) return -1;
      halves[0] = order.tiles_of(block, 0, number, row_tiles);
      halves[1] = order.tiles_of(block, 1, number, row_tiles);
      rest = halves[0] | halves[1];
    }
    const int bit = __ffs(rest) - 1;
    rest &= rest - 1;
    return number * 32 + bit;
  }
  __device__ __forceinline__ bool keeps(int half, int tile) const {
    return (half == 0 ? halves[0] : halves[1]) >> (tile % 32) & 1;
  }
};

// A thread's words of a row of 256 elements of D to a stage.
__device__ __forceinline__ void copy_whole_row(Storage (&to)[kSpread][kTileK * kTileK],
                                               const Storage* from, uint32 place) {
#pragma unroll
  for (int part = 0; part < kSpread; ++part)
    copy_whole_word(shared_address(to[part]) + place, from + part * kTileK);
}
// The same with zeros past the end of D, `d` the first of the thread's elements, and for a row that is not
// there.
__device__ __forceinline__ void copy_row(Storage (&to)[kSpread][kTileK * kTileK], const Storage* from,
                                         bool there, int d, int dim, uint32 place) {
#pragma unroll
  for (int part = 0; part < kSpread; ++part)
    copy_word(shared_address(to[part]) + place, from + part * kTileK,
              there && d + part * kTileK < dim ? kWordBytes : 0);
}

__device__ __forceinline__ void copy_embedding(Shared& shared, const BackwardArguments& call,
                                               const Chunk& chunk, const GradientItem& item,
                                               RingPlace<kStages>& place, KeptAddresses& kept) {
  constexpr int kRowsOfThread = kTileK / kRowStep;
  const int thread = threadIdx.x, dim = static_cast<int>(call.dim);
  const int word = thread % kWordsOfRow, first = thread / kWordsOfRow;
  const uint32 in_tile = word_place(first, word);
  const int d = item.part * kWidth + word * kWordElements;
  const bool whole = call.order.whole();
  const int pairs = count_passed(shared, call, chunk, item.place);
  const int start = whole ? list_start(shared, call, chunk, item.place)
                          : passed_start(shared, call, chunk, item.place);
  // A stage of zeros at least, so that whoever multiplies need not ask whether there is one.
  const int steps = max((pairs + kTileK - 1) / kTileK, 1);
  // Threads with the same rows of a stage, one for each word, look up one of them each: whoever waited for
  // what is looked up would be what the products wait for.
  const int own_row = first + word % kRowsOfThread * kRowStep;
  const uint32 own_lanes = thread % 32 / kWordsOfRow * kWordsOfRow;
  auto pair_at = [&](int step) {
    const int at = step * kTileK + own_row;
    return at >= pairs ? -1 : whole ? start + at : call.passing[start + at];
  };
  auto column_of = [&](int pair) { return pair < 0 ? kNobody : call.list[pair]; };
  struct Ahead {  // of every second step
    int pair;
    int column;
    int next_pair;
  };
  const Storage* records = as_address(call.dz + word * kWordElements);
  const Storage* columns = as_address(call.c.data + d);
  const uint32 words_of_row = call.c.stride / kWordElements;
  const bool whole_part = item.part * kWidth + kWidth <= dim;
  auto copy_step = [&](const Ahead& own) {
    EmbeddingStage& stage = shared.stage[place.stage].embedding;
    wait_for(shared.ring.empty[place.stage], place.parity ^ 1);
    const uint32 full = shared_address(&shared.ring.full[place.stage]);
    if (thread == 0) mbarrier_arrive(full, 1);
    const Storage* from[2 * kRowsOfThread];
    // Numbers of words have 32 bits, as those of dz.
    const uint32 own_word = static_cast<uint32>(max(own.column, 0)) * words_of_row;
    const uint32 own_pair = max(own.pair, 0);
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const uint32 pair_of_row = __shfl_sync(~0u, own_pair, i, kWordsOfRow);
      const uint32 word_of_row = __shfl_sync(~0u, own_word, i, kWordsOfRow);
      from[i] = records + static_cast<uint64>(pair_of_row) * kRowTile;
      from[kRowsOfThread + i] = columns + static_cast<uint64>(word_of_row) * kWordElements;
    }
    const uint32 there = __ballot_sync(~0u, own.column >= 0);
    // Most steps are whole: each copy spared a condition is an instruction less, and those who copy are what
    // this phase waits for. What stands past the end of D matters to nobody.
    if (there == ~0u) {
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const uint32 to = in_tile + i * kRowStep * kTileK * sizeof(Storage);
#pragma unroll
        for (int half = 0; half < kRowTile / kTileK; ++half)
          copy_whole_word(shared_address(stage.dz[half]) + to, from[i] + half * kTileK);
        if (whole_part) copy_whole_row(stage.c, from[kRowsOfThread + i], to);
      }
      if (!whole_part) {
#pragma unroll
        for (int part = 0; part < kSpread; ++part) {
          if (item.part * kWidth + part * kTileK >= dim) break;
#pragma unroll
          for (int i = 0; i < kRowsOfThread; ++i)
            copy_word_if(shared_address(stage.c[part]) + in_tile +
                             i * kRowStep * kTileK * sizeof(Storage),
                         from[kRowsOfThread + i] + part * kTileK, d + part * kTileK < dim);
        }
      }
    } else {
      const uint32 records_there = __ballot_sync(~0u, own.pair >= 0) >> own_lanes;
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const uint32 to = in_tile + i * kRowStep * kTileK * sizeof(Storage);
#pragma unroll
        for (int half = 0; half < kRowTile / kTileK; ++half)
          copy_word_if(shared_address(stage.dz[half]) + to, from[i] + half * kTileK,
                       records_there & (1u << i));
        copy_row(stage.c, from[kRowsOfThread + i], there >> own_lanes >> i & 1, d, dim, to);
      }
    }
    kept.keep(from);
    arrive_after_words(full);
    place.next();
  };
  // Two steps in turn: what is loaded can then stay in its register until it is needed. The rounds end a
  // step behind the last load, since that is where values change registers, and wait.
  auto look = [&](Ahead& own, int step) {
    own.pair = own.next_pair;
    own.column = column_of(own.pair);
    own.next_pair = pair_at(step + 2);
  };
  Ahead even = {-1, kNobody, pair_at(0)}, odd = {-1, kNobody, pair_at(1)};
  look(even, 0);
  for (int step = 0; step < steps; step += 2) {
    look(odd, step + 1);
    copy_step(even);
    look(even, step + 2);
    if (step + 1 >= steps) break;
    copy_step(odd);
  }
}

template <bool kWhole>
__device__ __forceinline__ void copy_classifier(Shared& shared, const TensorMap& e_map,
                                                const BackwardArguments& call, const Chunk& chunk,
                                                const GradientItem& item, int row_tiles, int64 count,
                                                RingPlace<kStages>& place, KeptAddresses& kept) {
  constexpr int kRowsOfThread = kTileK / kRowStep, kColumnsOfThread = kOrderBlock / kRowStep;
  constexpr int kRowsOfWord = kColumnChunk / kRowStep;
  const int thread = threadIdx.x, dim = static_cast<int>(call.dim);
  const int word = thread % kWordsOfRow, first = thread / kWordsOfRow;
  const uint32 in_tile = word_place(first, word);
  const int d = item.part * kWidth + word * kWordElements;
  // What stands past the end of D matters to nobody.
  const int boxes = min((dim - item.part * kWidth + kTileK - 1) / kTileK, kSpread);
  const int block = call.order.block_at(chunk.first + item.place);
  KeepingTiles tiles(call.order, block, row_tiles);
  // What the next tile keeps is on its way while this one's words are copied.
  int tile = tiles.next(), before = 0;
  uint32 words[kWordsOfBlock];
  // Behind the last one the first is looked up, for nothing: a value that a branch may leave as it was has
  // to be waited for.
  const uint4* words_of_block = as_address(reinterpret_cast<const uint4*>(call.order.word) + block);
  const int* before_block = as_address(call.order.before + block);
  auto look = [&] {
    if constexpr (kWhole) {
      call.order.read_words(words, 0, block);
      before = call.order.kept_before(0, block);
    } else {
      const uint32 at = max(tile, 0), blocks = call.order.blocks;
      const uint4 read = __ldg(words_of_block + static_cast<uint64>(at) * blocks);
      words[0] = read.x, words[1] = read.y, words[2] = read.z, words[3] = read.w;
      before = __ldg(before_block + static_cast<uint64>(at) * (blocks + 1));
    }
  };
  look();
  // Threads with the same columns, one for each word of a record, look up one of them each.
  static_assert(kColumnsOfThread == kWordsOfRow);
  const int own_word = word / kRowsOfWord, own_bit = first + word % kRowsOfWord * kRowStep;
  const uint32 own_lanes = threadIdx.x % 32 / kWordsOfRow * kWordsOfRow;
  const Storage* records = as_address(call.dz + word * kWordElements);
  while (tile >= 0) {
    int rank = shared.start[tile] + before;
    uint32 kept_words = words[0];
#pragma unroll
    for (int k = 1; k < kWordsOfBlock; ++k)
      if (own_word >= k) rank += __popc(words[k - 1]), kept_words = words[k];
    const bool kept_own = kept_words >> own_bit & 1;
    const int own = kept_own ? rank + __popc(kept_words & ((1u << own_bit) - 1u)) : 0;
    const Storage* record[kColumnsOfThread];
#pragma unroll
    for (int i = 0; i < kColumnsOfThread; ++i) {
      const uint32 pair = __shfl_sync(~0u, own, i, kWordsOfRow);
      record[i] = as_address(records + static_cast<uint64>(pair) * kRowTile);
    }
    const SweepTile rows(shared, call, count, tile);
    uint32 word_of_row[2 * kRowsOfThread] = {};
    if (!rows.follow)
#pragma unroll
      for (int i = 0; i < 2 * kRowsOfThread; ++i) {
        const int64 row = call.map.source[rows.top + min(first + i * kRowStep, rows.number - 1)];
        word_of_row[i] = static_cast<uint32>(row * (call.e.stride / kWordElements)) + word;
      }
    tile = tiles.next();
    look();
    for (int half = 0; half < 2; ++half, place.next()) {
      ClassifierStage& stage = shared.stage[place.stage].classifier;
      wait_for(shared.ring.empty[place.stage], place.parity ^ 1);
      const uint32 full = shared_address(&shared.ring.full[place.stage]);
      if (thread == 0) mbarrier_expect_bytes(full, rows.follow ? boxes * sizeof(stage.e[0]) : 0);
      // A box for each warp: one that asked for all would keep the others waiting.
      if (rows.follow && thread % 32 == 0 && thread / 32 < boxes) {
        const int part = thread / 32;
        copy_box(shared_address(stage.e[part]), e_map, item.part * kWidth + part * kTileK,
                 rows.source + half * kTileK, full, kEvictLast);
      }
      const uint32 dz = shared_address(stage.dz) + in_tile;
      // Asked for twice: eight conditions would not be held from one half to the other.
      const uint32 kept_here = __ballot_sync(~0u, kept_own) >> own_lanes;
#pragma unroll
      for (int i = 0; i < kColumnsOfThread; ++i)
        copy_word_if(dz + i * kRowStep * kTileK * sizeof(Storage), record[i] + half * kTileK,
                     kept_here & (1u << i));
      if (!rows.follow) {
        const Storage* row[kRowsOfThread];
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
          const uint64 at = word_of_row[half * kRowsOfThread + i];
          row[i] = call.e.data + item.part * kWidth + at * kWordElements;
          copy_row(stage.e, row[i], half * kTileK + first + i * kRowStep < rows.number, d, dim,
                   in_tile + i * kRowStep * kTileK * sizeof(Storage));
        }
        kept.keep(row);
      }
      arrive_after_words(full);
    }
    kept.keep(record);
  }
}

__device__ __forceinline__ void copy_gradients(Shared& shared, const TensorMap& e_map,
                                               const BackwardArguments& call, const Chunk& chunk,
                                               int row_tiles, int64 count, bool last, Queue& queue,
                                               RingPlace<kStages>& place) {
  const int limit = count_gradients(call, chunk, row_tiles), parts = count_parts(call);
  if (call.de != nullptr && !call.order.whole())
    list_passed(shared, call, chunk, row_tiles, last);
  auto item_of = [](int at) { return at; };
  KeptAddresses kept;
  queue.start(limit, item_of);
  for (int at; (at = queue.publish(shared, limit, item_of)) != Queue::kNoItem;) {
    const GradientItem item(call, row_tiles, parts, at);
    if (item.embedding) {
      copy_embedding(shared, call, chunk, item, place, kept);
    } else if (call.order.whole()) {
      copy_classifier<true>(shared, e_map, call, chunk, item, row_tiles, count, place, kept);
    } else {
      copy_classifier<false>(shared, e_map, call, chunk, item, row_tiles, count, place, kept);
    }
  }
  kept.finish();
  queue.finish(limit);
}

template <int kColumns>
__device__ __forceinline__ void form_embedding(Shared& shared, const BackwardArguments& call,
                                               const Chunk& chunk, const GradientItem& item,
                                               int64 count, bool first, bool last,
                                               RingPlace<kStages>& place) {
  const int consumer = threadIdx.x / kGroupThreads - 1, thread = threadIdx.x % kGroupThreads;
  const int q = thread % 4, dim = static_cast<int>(call.dim);
  Storage* row[2];
  unsigned short* low[2];
  const int waiting = call.order.waiting_place();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64 in_sweep = static_cast<int64>(item.place) * kRowTile + consumer * 64 +
                           thread / 32 * 16 + thread % 32 / 4 + 8 * half;
    const int64 at = call.first_tile * kRowTile + in_sweep;
    row[half] = at < count ? call.de + call.map.source[at] * call.dim : nullptr;
    low[half] = call.low + in_sweep * call.dim;
    if (waiting > 0 && at < count)
      low[half] = reinterpret_cast<unsigned short*>(
          call.dc + call.order.column_at(waiting + static_cast<int>(in_sweep)) * call.dim);
  }
  const int pairs = count_passed(shared, call, chunk, item.place);
  const int steps = max((pairs + kTileK - 1) / kTileK, 1);
  float sums[kSumsOf<kColumns>] = {};
  // Sums go on from where the chunk before left them.
  if (!first) {
    take_kept_sums(sums, item.part, dim, row, low, q);
    if (last && waiting > 0) clear_low<kSumsOf<kColumns>>(item.part, dim, row, low, q);
  }
  settle(sums);
  int done = 0;
  for (int step = 0; step < steps; ++step) {
    wait_for(shared.ring.full[place.stage], place.parity);
    fence_async_proxy();
    const EmbeddingStage& stage = shared.stage[place.stage].embedding;
    product_fence();
    start_gradients<1>(sums, stage.dz[consumer], stage.c);
    if (step > 0) {
      product_wait<1>();
      release(shared.ring.empty[done]);
    }
    done = place.stage;
    place.next();
  }
  product_wait<0>();
  settle(sums);
  release(shared.ring.empty[done]);
  if (!last) {
    keep_sums(sums, item.part, dim, row, low, q);
    return;
  }
  float smoothing[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64 at = (call.first_tile + item.place) * kRowTile + consumer * 64 + thread / 32 * 16 +
                     thread % 32 / 4 + 8 * half;
    if (call.smoothing_classifier != nullptr && at < count)
      smoothing[half] = call.factors.smoothing[at];
  }
  const float scale = static_cast<float>(call.options.scale);
  store_rows(sums, item.part, dim, scale / record_scale(call.largest), call.smoothing_classifier,
             smoothing, scale, row, q);
}

template <int kColumns>
__device__ __forceinline__ void form_classifier(Shared& shared, const BackwardArguments& call, const Chunk& chunk,
                                                const GradientItem& item, int row_tiles,
                                                RingPlace<kStages>& place) {
  const int consumer = threadIdx.x / kGroupThreads - 1, thread = threadIdx.x % kGroupThreads;
  const int block = call.order.block_at(chunk.first + item.place);
  KeepingTiles tiles(call.order, block, row_tiles);
  float sums[kSumsOf<kColumns>] = {};
  int held = -1;     // a stage that products may still read
  for (int tile; (tile = tiles.next()) >= 0;) {
    // Columns of this half that no row of the tile keeps are zeros there.
    const bool keeps = tiles.keeps(consumer, tile);
    for (int half = 0; half < 2; ++half) {
      wait_for(shared.ring.full[place.stage], place.parity);
      fence_async_proxy();
      if (keeps) {
        const ClassifierStage& stage = shared.stage[place.stage].classifier;
        product_fence();
        start_gradients<0>(sums, stage.dz + consumer * 64 * kTileK, stage.e);
      }
      if (held >= 0) {
        if (!keeps) product_wait<0>();
        product_wait<1>();
        release(shared.ring.empty[held]);
      }
      held = place.stage;
      place.next();
    }
  }
  product_wait<0>();
  settle(sums);
  if (held >= 0) release(shared.ring.empty[held]);
  const int q = thread % 4, dim = static_cast<int>(call.dim);
  Storage* row[2];
  float smoothing[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = block * kOrderBlock + consumer * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
    const int column = call.order.column_at(at);
    row[half] = column >= 0 ? call.dc + column * call.dim : nullptr;
    if (call.smoothing_embedding != nullptr && column >= 0)
      smoothing[half] = call.smoothing_class[column];
  }
  const float scale = static_cast<float>(call.options.scale);
  store_rows(sums, item.part, dim, scale / record_scale(call.largest), call.smoothing_embedding,
             smoothing, scale, row, q);
}

__device__ __forceinline__ void form_gradients(Shared& shared, const BackwardArguments& call,
                                               const Chunk& chunk, int row_tiles, int64 count,
                                               bool first, bool last, Queue& queue,
                                               RingPlace<kStages>& place) {
  const int limit = count_gradients(call, chunk, row_tiles), parts = count_parts(call);
  const int embeddings = count_embeddings(call, row_tiles);
  const int dim = static_cast<int>(call.dim);
  int at = queue.receive(shared);
  // All of one kind come first: in one loop the sums of both would be one.
  for (; at != Queue::kNoItem && at < embeddings; at = queue.receive(shared)) {
    const GradientItem item(call, row_tiles, parts, at);
    if (dim - item.part * kWidth > kNarrow) {
      form_embedding<kWidth>(shared, call, chunk, item, count, first, last, place);
    } else {
      form_embedding<kNarrow>(shared, call, chunk, item, count, first, last, place);
    }
  }
  for (; at != Queue::kNoItem; at = queue.receive(shared)) {
    const GradientItem item(call, row_tiles, parts, at);
    if (dim - item.part * kWidth > kNarrow) {
      form_classifier<kWidth>(shared, call, chunk, item, row_tiles, place);
    } else {
      form_classifier<kNarrow>(shared, call, chunk, item, row_tiles, place);
    }
  }
  queue.finish(limit);
}

}  // namespace cce
