// What the two products with dz on Hopper are given, by the group that copies: for dE a row tile's records
// and the rows of c of its listed columns, for dC the records of a block of columns and the rows of e of the
// row tiles that keep any of them.
#pragma once

#include "copies.cuh"
#include "items.cuh"
#include "passed.cuh"
#include "queue.cuh"

namespace cce {

static_assert(kSpread == kGroupThreads / 32, "a box for each warp that copies");

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
  const int d = item.begin + word * kWordElements;
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
  const bool whole_part = item.begin + kWidth <= dim;
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
          if (item.begin + part * kTileK >= dim) break;
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
  const int d = item.begin + word * kWordElements;
  // What stands past the end of D matters to nobody.
  const int boxes = min((dim - item.begin + kTileK - 1) / kTileK, kSpread);
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
        copy_box(shared_address(stage.e[part]), e_map, item.begin + part * kTileK,
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
          row[i] = call.e.data + item.begin + at * kWordElements;
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

}  // namespace cce
