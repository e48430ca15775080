// The backward on Hopper: one launch that goes through the chunks of the columns, in each forming dz of
// all row tiles, then what it brings to dE and all of its columns' dC.
#pragma once

#include "bias.cuh"
#include "dlogits.cuh"
#include "gathers.cuh"
#include "products.cuh"

namespace cce {

// Plain logits are the products as they are, without label smoothing.
template <bool kPlain>
__device__ __forceinline__ void form_all_gradients(const TensorMap& e_map,
                                                   const BackwardArguments& call) {
  if (*call.map.count == call.dense_rows || *call.taken != call.attempt) return;
  extern __shared__ unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(
      memory + (alignof(Stage) - shared_address(memory) % alignof(Stage)) % alignof(Stage));
  if (threadIdx.x == 0) {
    shared.seed = *call.map.seed;
    for (int i = 0; i < kStages; ++i) {
      // One for the bytes that are expected, one for each thread that copies words.
      mbarrier_init(shared_address(&shared.ring.full[i]), 1 + kGroupThreads);
      mbarrier_init(shared_address(&shared.ring.empty[i]), kReleases);
    }
    for (int i = 0; i < kFactSlots; ++i) {
      mbarrier_init(shared_address(&shared.facts_ring.full[i]), kGroupThreads);
      mbarrier_init(shared_address(&shared.facts_ring.empty[i]), kReleases);
    }
    for (int i = 0; i < kItemSlots; ++i) mbarrier_init(shared_address(&shared.item_ready[i]), 1);
    fence_barrier_init();
    fence_async_proxy();
  }
  for (int i = threadIdx.x; i < kZeroBytes / kWordBytes; i += kThreads)
    reinterpret_cast<uint4*>(shared.zeros)[i] = make_uint4(0, 0, 0, 0);
  fence_async_proxy();
  __syncthreads();
  const int64 count = *call.map.count;
  const int row_tiles = count_row_tiles(count, call.first_tile, static_cast<int>(call.tiles));
  const int64 thread = blockIdx.x * static_cast<int64>(kThreads) + threadIdx.x;
  const int64 threads = gridDim.x * static_cast<int64>(kThreads);
  // Without rows every gradient is what nobody keeps.
  const int chunks = row_tiles == 0 ? 0 : call.order.chunks();
  GridBarrier<kEverybody, kThreads, true> barrier{call.arrived};
  Queue queue{call.queue};
  RingPlace<kStages> place;
  RingPlace<kFactSlots> facts;
  const int unkept = row_tiles == 0 ? 0 : call.order.first_block(chunks);
  if (!kPlain) fill_background(call, unkept, thread, threads);
  find_sources(shared, call, count, row_tiles);

  // What all threads do before dz of a chunk.
  auto prepare = [&](const Chunk& chunk) {
    if (threadIdx.x / 32 == 0) place_lists(shared, call.order, chunk, row_tiles);
    named_sync_of_branches<kEverybody, kThreads>();
    list_items(call, chunk, row_tiles, static_cast<int>(thread / 32), static_cast<int>(threads / 32));
    fill_lists(shared, call, chunk, row_tiles, thread, threads);
    barrier.wait();
  };
  if (threadIdx.x < kGroupThreads) {
    give_registers<kCopyRegisters>();
    ZeroRows zeros(call, unkept);
    if (threadIdx.x < 32) share_zero_rows(shared, call, zeros, unkept, row_tiles);
    for (int k = 0; k < chunks; ++k) {
      const Chunk chunk(call.order, k);
      prepare(chunk);
      copy_logits(shared, e_map, call, chunk, row_tiles, count, zeros, queue, place,
                  facts);
      barrier.wait();
      copy_gradients(shared, e_map, call, chunk, row_tiles, count, k == chunks - 1, queue, place);
      barrier.wait();
    }
    zeros.store(shared, call, zeros.last);
    wait_for_bulk();
  } else {
    take_registers<kSumRegisters>();
    for (int k = 0; k < chunks; ++k) {
      const Chunk chunk(call.order, k);
      prepare(chunk);
      form_dlogits<kPlain>(shared, call, queue, place, facts);
      barrier.wait();
      if (!kPlain && call.dbias != nullptr) form_bias(shared, call, chunk, row_tiles);
      form_gradients<kPlain>(shared, call, chunk, row_tiles, count, k == 0, k == chunks - 1, queue, place);
      barrier.wait();
    }
  }
}

}  // namespace cce

// A cooperative launch of one block for each multiprocessor.
#define CCE_BACKWARD(name, plain)                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)                          \
      name(const __grid_constant__ TensorMap e_map,                                  \
           const __grid_constant__ BackwardArguments call) {                         \
    form_all_gradients<plain>(e_map, call);                                          \
  }
