// The two products with dz on Hopper: dE with a row tile in registers and its listed columns as depth, dC
// with a block of columns in registers and the row tiles that keep any of them as depth.
#pragma once

#include "items.cuh"
#include "passed.cuh"
#include "queue.cuh"

namespace cce {

template <bool kPlain, int kColumns>
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
    take_kept_sums(sums, item.begin, dim, row, low, q);
    if (last && waiting > 0) clear_low<kSumsOf<kColumns>>(item.begin, dim, row, low, q);
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
    keep_sums(sums, item.begin, dim, row, low, q);
    return;
  }
  float smoothing[2] = {};
  int64 at[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    at[half] = (call.first_tile + item.place) * kRowTile + consumer * 64 + thread / 32 * 16 +
               thread % 32 / 4 + 8 * half;
    if (!kPlain && call.smoothing_classifier != nullptr && at[half] < count)
      smoothing[half] = call.factors.smoothing[at[half]];
  }
  add_target_rests(sums, call.c, call.map.target, call.target_rest, at, count, item.begin, dim, q);
  finish_rows<kPlain>(sums, call, item.begin, call.smoothing_classifier, smoothing, row, q);
}

template <bool kPlain, int kColumns>
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
  const int q = thread % 4;
  Storage* row[2];
  float smoothing[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = block * kOrderBlock + consumer * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
    const int column = call.order.column_at(at);
    row[half] = column >= 0 ? call.dc + column * call.dim : nullptr;
    if (!kPlain && call.smoothing_embedding != nullptr && column >= 0)
      smoothing[half] = call.smoothing_class[column];
  }
  finish_rows<kPlain>(sums, call, item.begin, call.smoothing_embedding, smoothing, row, q);
}

template <bool kPlain>
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
    if (dim - item.begin > kNarrow) {
      form_embedding<kPlain, kWidth>(shared, call, chunk, item, count, first, last, place);
    } else {
      form_embedding<kPlain, kNarrow>(shared, call, chunk, item, count, first, last, place);
    }
  }
  for (; at != Queue::kNoItem; at = queue.receive(shared)) {
    const GradientItem item(call, row_tiles, parts, at);
    if (dim - item.begin > kNarrow) {
      form_classifier<kPlain, kWidth>(shared, call, chunk, item, row_tiles, place);
    } else {
      form_classifier<kPlain, kNarrow>(shared, call, chunk, item, row_tiles, place);
    }
  }
  queue.finish(limit);
}

}  // namespace cce
