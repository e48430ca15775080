// dz on Hopper: logits of listed columns once more, 256 of a row tile at a time, columns as rows of the
// product, so that a record of dz holds the rows of a tile next to each other.
#pragma once

#include "background.cuh"
#include "copies.cuh"
#include "functions.cuh"
#include "lists.cuh"
#include "queue.cuh"

namespace cce {

constexpr int kBlocksM = kPairs / kConsumers / 64;  // of one matrix instruction, for each group
constexpr int kLogits = kRowTile / 2;               // a thread's of one block
constexpr int kCopies = 8;  // whose addresses are held at once

// 256 pairs of a row tile, as one number.
struct LogitItem {
  int tile;
  int number;  // of the tile's items

  __device__ __forceinline__ explicit LogitItem(int item)
      : tile(item % kMostRowTiles), number(item / kMostRowTiles) {}
};

// Look up what the rows of an item's tile bring, of which those past the last bring nothing, and its
// columns. Those who copy.
__device__ __forceinline__ void share_facts(Shared& shared, const BackwardArguments& call,
                                            const SweepTile& rows, int tile, int start, int first_pair,
                                            RingPlace<kFactSlots>& facts) {
  const int thread = threadIdx.x;
  wait_for(shared.facts_ring.empty[facts.stage], facts.parity ^ 1);
  LogitFacts& to = shared.facts[facts.stage];
  HeldColumn column[kPairs / kGroupThreads];
#pragma unroll
  for (int i = 0; i < kPairs / kGroupThreads; ++i) {
    const int at = first_pair + thread + i * kGroupThreads;
    column[i].entry = at < shared.pairs[tile] ? call.list[start + at] : kNobody;
  }
  const bool there = thread < rows.number;
  const int64 row = rows.top + thread;
  if (thread == 0) to.first = start + first_pair;
  TileFactors& factors = to.factors;
  factors.lse[thread] = there ? call.row_lse[row] * kLog2E : static_cast<float>(infinity());
  factors.softmax[thread] = there ? call.factors.softmax[row] : 0.0f;
  factors.onehot[thread] = there ? call.factors.onehot[row] : 0.0f;
  factors.smoothing[thread] = there ? call.factors.smoothing[row] : 0.0f;
  factors.target[thread] = there ? static_cast<int>(call.map.target[row]) : -1;
#pragma unroll
  for (int i = 0; i < kPairs / kGroupThreads; ++i) {
    const int own = column[i].entry & ~kRemoved;
    column[i].slot = call.order.whole() || column[i].entry == kNobody
                         ? -1
                         : start + call.order.natural_rank(tile, own) - shared.natural[tile];
    to.column[thread + i * kGroupThreads] = column[i];
  }
  mbarrier_arrive(shared_address(&shared.facts_ring.full[facts.stage]), 1);
  facts.next();
}

__device__ __forceinline__ void copy_logits(Shared& shared, const TensorMap& e_map,
                                            const BackwardArguments& call, const Chunk& chunk,
                                            int row_tiles, int64 count, ZeroRows& zeros,
                                            Queue& queue, RingPlace<kStages>& place,
                                            RingPlace<kFactSlots>& facts) {
  constexpr int kColumnsOfThread = kPairs / kRowStep, kRowsOfThread = kRowTile / kRowStep;
  const int thread = threadIdx.x, dim = static_cast<int>(call.dim);
  const int steps = (dim + kTileK - 1) / kTileK;
  // Facts are looked up where the stages are full, and the products are at the end of the item before.
  const int steps_before = min(steps, kStages);
  const int word = thread % kWordsOfRow, first = thread / kWordsOfRow;
  const uint32 in_tile = word_place(first, word);
  KeptAddresses kept;
  const int limit = shared.items;
  auto item_of = [&](int at) { return call.item[at]; };
  queue.start(limit, item_of);
  for (int at; (at = queue.publish(shared, limit, item_of)) != Queue::kNoItem;) {
    zeros.store(shared, call, shared.rows_of_item);
    const LogitItem item(at);
    const SweepTile rows(shared, call, count, item.tile);
    const int start = list_start(shared, call, chunk, item.tile), first_pair = item.number * kPairs;
    const int* list = call.list + start + first_pair;
    const int last = shared.pairs[item.tile] - first_pair - 1;
    // Words of this thread, one of eight in each row; numbers of 32 bits, as many as registers hold. Of
    // removed entries, and past the end of the list, products do not matter.
    uint32 word_of_column[kColumnsOfThread], word_of_row[kRowsOfThread] = {};
#pragma unroll
    for (int i = 0; i < kColumnsOfThread; ++i) {
      const int column = list[min(first + i * kRowStep, last)] & ~kRemoved;
      word_of_column[i] = static_cast<uint32>(column * (call.c.stride / kWordElements)) + word;
    }
    if (!rows.follow)
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const int64 row = call.map.source[rows.top + min(first + i * kRowStep, rows.number - 1)];
        word_of_row[i] = static_cast<uint32>(row * (call.e.stride / kWordElements)) + word;
      }
    auto copy = [&](uint32 to, const Storage* of_step, const uint32* words, uint32 bytes,
                    bool some_rows) {
      const Storage* start_of_step = as_address(of_step);
      const Storage* from[kCopies];
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        from[i] = start_of_step + static_cast<uint64>(words[i]) * kWordElements;
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        copy_word(to + i * kRowStep * kTileK * sizeof(Storage), from[i],
                  some_rows && first + i * kRowStep >= rows.number ? 0 : bytes);
      kept.keep(from);
    };
    auto copy_step = [&](int step) {
      LogitStage& stage = shared.stage[place.stage].logits;
      wait_for(shared.ring.empty[place.stage], place.parity ^ 1);
      const uint32 full = shared_address(&shared.ring.full[place.stage]);
      const int d = step * kTileK + word * kWordElements;
      const uint32 bytes = d < dim ? kWordBytes : 0;
      if (thread == 0) mbarrier_expect_bytes(full, rows.follow ? sizeof(stage.e) : 0);
      // A box for each of two warps: one that asked for both would keep the others waiting.
      if (rows.follow && thread % 32 == 0 && thread < kRowTile / 2) {
        const int half = thread / 32;
        copy_box(shared_address(stage.e + half * kTileK * kTileK), e_map, step * kTileK,
                 rows.source + half * kTileK, full, kEvictLast);
      }
      const uint32 c = shared_address(stage.c) + in_tile;
#pragma unroll
      for (int i = 0; i < kColumnsOfThread; i += kCopies)
        copy(c + i * kRowStep * kTileK * sizeof(Storage), call.c.data + step * kTileK,
             word_of_column + i, bytes, false);
      if (!rows.follow)
        copy(shared_address(stage.e) + in_tile, call.e.data + step * kTileK, word_of_row, bytes,
             true);
      arrive_after_words(full);
      place.next();
    };
    int step = 0;
    for (; step < steps_before; ++step) copy_step(step);
    share_facts(shared, call, rows, item.tile, start, first_pair, facts);
    for (; step < steps; ++step) copy_step(step);
  }
  kept.finish();
  queue.finish(limit);
}

// Start the products of a stage: a group's half of the columns with all rows.
__device__ __forceinline__ void start_logits(float (&z)[kBlocksM][kLogits], const LogitStage& stage,
                                             int consumer, bool first) {
  const uint64 c = along_depth(stage.c + consumer * kBlocksM * 64 * kTileK);
  const uint64 e = along_depth(stage.e);
#pragma unroll
  for (int step = 0; step < kTileK / 16; ++step) {
    constexpr uint64 kBlock = 64 * kTileK * sizeof(Storage) >> 4;
#pragma unroll
    for (int m = 0; m < kBlocksM; ++m)
      product_64x128x16(z[m], c + m * kBlock + step * kAdvanceAlong, e + step * kAdvanceAlong,
                        !first || step > 0);
  }
  product_commit();
}

// What a listed column means to those who form its dz.
struct OwnColumn {
  int column;    // -1: none
  bool removed;
  float bias;

  __device__ __forceinline__ OwnColumn(const BackwardArguments& call, int entry)
      : column(entry == kNobody ? -1 : entry & ~kRemoved), removed(entry < 0) {
    bias = call.bias == nullptr || column < 0 ? 0.0f : widen(call.bias[column]);
  }
};

constexpr int kSpans = kRowTile / 8;
// A half of a thread's sums of a block: those of one column, or of another one eight further on.
template <int kHalf>
__device__ __forceinline__ constexpr int sum_index(int span, int side) {
  return 4 * span + 2 * kHalf + side;
}

// Logits in place, but for removed entries. The same numbers as the forward's make_logits, whose registers
// overflow when it shares a function for them.
template <int kHalf>
__device__ __forceinline__ void make_logits(float (&z)[kLogits], const BackwardArguments& call,
                                            const OwnColumn& own) {
  const float lowest = -static_cast<float>(infinity());
  const float scale = static_cast<float>(call.options.scale);
  const float cap = static_cast<float>(call.options.softcap), inverse = 1.0f / cap;
#pragma unroll
  for (int j = 0; j < kSpans; ++j)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float& logit = z[sum_index<kHalf>(j, side)];
      logit = fmaf(logit, scale, own.bias);
      if (logit == lowest) logit = static_cast<float>(not_a_number());
    }
  if (cap <= 0.0f) return;
#pragma unroll
  for (int j = 0; j < kSpans; j += 2) {
    float tangent[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) tangent[k] = z[sum_index<kHalf>(j + k / 2, k % 2)] * inverse;
    fast_tangents(tangent);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float& logit = z[sum_index<kHalf>(j + k / 2, k % 2)];
      // z * 0 is NaN for an infinity, which tanh would turn into a number.
      logit = fmaf(logit, 0.0f, cap * tangent[k]);
    }
  }
}

// The weight of a column by the exact test; comparisons are written so that a NaN is kept.
__device__ __forceinline__ float column_weight(const Filter& filter, uint64 seed, int64 tile,
                                               int column, float largest) {
  const float eps = static_cast<float>(filter.eps);
  if (!(largest < eps)) return 1.0f;
  if (!filter.unbiased) return 0.0f;
  const float u = uniform(seed, tile, column / kColumnChunk);
  return largest < eps * u ? 0.0f : eps / largest;
}

// What is the same for all elements.
struct LogitForm {
  bool capped;
  float inverse_cap;
  float scale;  // of records

  __device__ __forceinline__ explicit LogitForm(const BackwardArguments& call)
      : capped(call.options.softcap > 0.0),
        inverse_cap(capped ? 1.0f / static_cast<float>(call.options.softcap) : 0.0f),
        scale(record_scale(call.largest)) {}
};

// Probabilities in place, or beside the logits if there is a softcap; return the largest of the column, as
// an integer, and whether the column is any row's target.
template <bool kPlain, int kHalf>
__device__ __forceinline__ uint32 find_probabilities(float (&z)[kLogits],
                                                     const TileFactors& factors,
                                                     const OwnColumn& own, bool capped, int q,
                                                     bool& target_of_any) {
  uint32 largest = 0;
  bool found = false;
#pragma unroll
  for (int j = 0; j < kSpans; ++j) {
    const int row = 8 * j + 2 * q;
    const float2 lse = *reinterpret_cast<const float2*>(&factors.lse[row]);
    const int2 target = *reinterpret_cast<const int2*>(&factors.target[row]);
    found = found || own.column == target.x || own.column == target.y;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float& held = z[sum_index<kHalf>(j, side)];
      float p = power_of_two(fmaf(held, kLog2E, -(side == 0 ? lse.x : lse.y)));
      if (!kPlain && own.removed) p = 0.0f;
      largest = max(largest, __float_as_uint(p));
      if (!capped) held = p;
    }
  }
  target_of_any = found;
  return largest;
}

// Write a record from pairs of its numbers: pair(j) holds the first two of eight rows.
template <typename Pair>
__device__ __forceinline__ void store_record(uint4* record, const OwnColumn& own, int q, Pair pair) {
#pragma unroll
  for (int j = 0; j < kSpans; j += 4) {
    const uint4 words =
        transpose_quad(make_uint4(pair(j), pair(j + 1), pair(j + 2), pair(j + 3)), q);
    // Past the end of a list the next one's records are.
    if (own.column >= 0) record[j] = words;
  }
}

// From products to records of dz: of 32 columns in a group's registers, a half of its sums of a block.
// Return how many of the warp's eight have passed. Plain logits are the products as they are.
template <bool kPlain, int kHalf>
__device__ __forceinline__ uint32 finish_logits(float (&z)[kLogits], const Shared& shared,
                                              const TileFactors& factors,
                                              const BackwardArguments& call, int64 tile,
                                              int64 own_pair, const HeldColumn& held_column,
                                              const LogitForm& form, int lane) {
  const int q = lane % 4;
  const bool filtered = call.filter.eps > 0.0;
  const OwnColumn own(call, held_column.entry);
  if constexpr (!kPlain) make_logits<kHalf>(z, call, own);
  const bool capped = !kPlain && form.capped;
  bool target_of_any;
  uint32 largest = find_probabilities<kPlain, kHalf>(z, factors, own, capped, q, target_of_any);
  float weight = own.column < 0 ? 0.0f : 1.0f;
  if (filtered) {
    // A target counts as 1.
    largest = quad_largest(target_of_any ? max(largest, __float_as_uint(1.0f)) : largest);
    if (own.column >= 0)
      weight = column_weight(call.filter, shared.seed, tile, own.column, __uint_as_float(largest));
  }
  const bool passes = weight != 0.0f;
  if (q == 0 && held_column.slot >= 0)
    call.slot[held_column.slot] = passes ? static_cast<int>(own_pair) : -1;
  const bool smooths = !kPlain && call.smoothing != nullptr;
  const float smoothing = smooths && own.column >= 0 ? call.smoothing[own.column] : 0.0f;
  const float scaled = weight * form.scale;
  float sum = 0.0f;
  uint4* record = reinterpret_cast<uint4*>(call.dz + own_pair * kRowTile) + q;
  if (capped || smooths || __any_sync(~0u, target_of_any)) {
    store_record(record, own, q, [&](int j) {
      const int row = 8 * j + 2 * q;
      auto dz = [&](int side) {
        const float held = z[sum_index<kHalf>(j, side)];
        float p = held;
        if (capped)
          p = own.removed ? 0.0f : power_of_two(fmaf(held, kLog2E, -factors.lse[row + side]));
        float x = p * scaled * factors.softmax[row + side];
        if (own.column == factors.target[row + side]) x -= factors.onehot[row + side] * form.scale;
        if (smooths)
          x -= factors.smoothing[row + side] * smoothing * form.scale;
        if (capped) {
          const float t = held * form.inverse_cap;
          x = own.removed ? 0.0f : x * (1.0f - t * t);
        }
        return x;
      };
      const float first = dz(0), second = dz(1);
      if constexpr (!kPlain) sum += first + second;
      float* const rest = call.target_rest + tile * kRowTile + row;
      if (own.column >= 0 && own.column == factors.target[row]) rest[0] = rounded_off(first);
      if (own.column >= 0 && own.column == factors.target[row + 1]) rest[1] = rounded_off(second);
      return narrow_pair(first, second);
    });
  } else {
    store_record(record, own, q, [&](int j) {
      const float2 softmax = *reinterpret_cast<const float2*>(&factors.softmax[8 * j + 2 * q]);
      const float first = z[sum_index<kHalf>(j, 0)] * scaled * softmax.x;
      const float second = z[sum_index<kHalf>(j, 1)] * scaled * softmax.y;
      if constexpr (!kPlain) sum += first + second;
      return narrow_pair(first, second);
    });
  }
  if (!kPlain && call.dz_sum != nullptr) {
    sum = quad_sum(sum);
    if (q == 0 && own.column >= 0) call.dz_sum[own_pair] = sum;
  }
  return __popc(__ballot_sync(~0u, q == 0 && passes));
}

// The end of an item: a group's half of its columns. Return how many of the warp's have passed.
template <bool kPlain>
__device__ __forceinline__ uint32 finish_item(float (&z)[kBlocksM][kLogits], const Shared& shared,
                                              const LogitFacts& known, const BackwardArguments& call,
                                              int64 tile, const LogitForm& form, int own) {
  static_assert(kBlocksM == 2, "the second follows the first");
  // A thread's columns of a round: both of a block, or one where there are options, whose code takes too long to
  // compile twice.
  constexpr int kColumns = kPlain ? 2 : 1, kRounds = 2 * kBlocksM / kColumns;
  const int lane = threadIdx.x % 32;
  uint32 passed = 0;
  // A loop: twice the code would not stay where instructions are fetched from.
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    passed += finish_logits<kPlain, 0>(z[0], shared, known.factors, call, tile, known.first + own,
                                       known.column[own], form, lane);
    if constexpr (kColumns == 2) {
      passed += finish_logits<kPlain, 1>(z[0], shared, known.factors, call, tile,
                                         known.first + own + 8, known.column[own + 8], form, lane);
      own += 64;
#pragma unroll
      for (int i = 0; i < kLogits; ++i) z[0][i] = z[1][i];
    } else {
      own += round % 2 == 0 ? 8 : 64 - 8;
#pragma unroll
      for (int span = 0; span < kSpans; ++span)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int first = sum_index<0>(span, side), second = sum_index<1>(span, side);
          z[0][first] = z[0][second];
          z[0][second] = z[1][first];
          z[1][first] = z[1][second];
        }
    }
  }
  return passed;
}

template <bool kPlain>
__device__ __forceinline__ void form_dlogits(Shared& shared, const BackwardArguments& call,
                                             Queue& queue, RingPlace<kStages>& place,
                                             RingPlace<kFactSlots>& facts) {
  const int consumer = threadIdx.x / kGroupThreads - 1, thread = threadIdx.x % kGroupThreads;
  const int steps = (static_cast<int>(call.dim) + kTileK - 1) / kTileK;
  const int limit = shared.items;
  const LogitForm form(call);
  // Defined here: else it would be held from the chunk before.
  float z[kBlocksM][kLogits] = {};
  for (int at; (at = queue.receive(shared)) != Queue::kNoItem; facts.next()) {
    int done = 0;
    for (int step = 0; step < steps; ++step) {
      wait_for(shared.ring.full[place.stage], place.parity);
      // What words came as is written in the ordinary way, and read by the matrix unit.
      fence_async_proxy();
      product_fence();
      start_logits(z, shared.stage[place.stage].logits, consumer, step == 0);
      if (step > 0) {
        product_wait<1>();
        release(shared.ring.empty[done]);
      }
      done = place.stage;
      place.next();
    }
    product_wait<0>();
    release(shared.ring.empty[done]);
    const LogitItem item(at);
    const int64 tile = call.first_tile + item.tile;
    const int own = consumer * kBlocksM * 64 + thread / 32 * 16 + thread % 32 / 4;
    wait_for(shared.facts_ring.full[facts.stage], facts.parity);
    const LogitFacts& known = shared.facts[facts.stage];
    const uint32 passed = finish_item<kPlain>(z, shared, known, call, tile, form, own);
    __syncwarp();
    release(shared.facts_ring.empty[facts.stage]);
    if (call.passed != nullptr && thread % 32 == 0)
      atomicAdd(call.passed, static_cast<unsigned long long>(passed));
  }
  queue.finish(limit);
}

}  // namespace cce
