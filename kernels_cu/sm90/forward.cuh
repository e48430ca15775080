// The forward on Hopper: every logit once, at the speed of the bare product. One warp group copies
// tiles of e and c into a ring of stages; two take turns at whole tiles of logits, so that one sums
// up while the other multiplies. Leaves partial sums of units, which rows.cu merges.
#pragma once

#include "copies.cuh"
#include "sums.cuh"

namespace cce {

constexpr int kThreads = kGroupThreads * (1 + kConsumers);
constexpr int kCopyRegisters = 40;
constexpr int kSumRegisters = 232;
constexpr int kTurn = 1;  // the first of the named barriers by which the consumers take turns
constexpr int kCopiers = 3;  // and that of the copying warp group

// Bounds are shared at every tile whose products take longer than that, and at every fourth of a warp
// group's otherwise.
constexpr int kLongTile = 24;
constexpr int kShareEvery = 4;

// The order of work: units of one row block and some column tiles. Row blocks of a group go first,
// so that their rows of e and the unit's columns of c stay in the L2.
struct Order {
  int row_blocks;
  int column_tiles;
  int unit_tiles;
  int group;

  __device__ __forceinline__ int across() const {
    return (column_tiles + unit_tiles - 1) / unit_tiles;
  }
};

struct Unit {
  int row_block;
  int across;
  int first;  // column tiles
  int last;

  __device__ __forceinline__ Unit(const Order& order, int number) {
    const int each = order.group * order.across();
    const int group = number / each, rest = number - group * each;
    const int rows = min(order.row_blocks - group * order.group, order.group);
    across = rest / rows;
    row_block = group * order.group + (rest - across * rows);
    first = across * order.unit_tiles;
    last = min(first + order.unit_tiles, order.column_tiles);
  }
};

// Hand a stage back to those who fill it, in every block of the cluster.
template <int kCluster>
__device__ __forceinline__ void release(const uint64& empty) {
  const uint32 barrier = shared_address(&empty);
  const int thread = threadIdx.x % kGroupThreads;
  if (kCluster == 1) {
    if (thread == 0) mbarrier_arrive(barrier, 1);
  } else if (thread < kCluster) {
    mbarrier_arrive_mapped(map_to_block(barrier, thread));
  }
}

// Fill stages, unit by unit. Boxes of c, and of e where its rows follow each other, are asked for by
// one thread. Around ignored tokens boxes come from the packed rows; where there was no room for those all
// threads copy e word by word, and warps take turns at asking. kAllFollow says that no token is ignored.
template <int kCluster, bool kAllFollow, typename Memory, typename Arguments>
__device__ __forceinline__ void copy_tiles(Memory& shared, const TensorMap& e_map,
                                           const TensorMap& packed_map, const TensorMap& c_map,
                                           const Arguments& call, int count, const Order& order,
                                           uint32 rank) {
  constexpr int kShare = kTileN / kCluster;  // a block's share of the columns it copies for all
  constexpr int kWordBytes = 16, kWordElements = kWordBytes / sizeof(Storage);
  constexpr int kWordsOfRow = kTileK / kWordElements;
  constexpr int kRowStep = kGroupThreads / kWordsOfRow;
  constexpr int kRowsOfThread = kTileM / kRowStep;
  constexpr int kWarps = kGroupThreads / 32;
  constexpr int kCopies = 2;  // whose addresses are held at once: registers are few here
  static_assert(kRowStep % 8 == 0, "a thread's rows have one swizzle");
  const int thread = threadIdx.x, dim = static_cast<int>(call.dim);
  const int steps = (dim + kTileK - 1) / kTileK;
  const int units = order.row_blocks * order.across();
  RingPlace<kStages> place;
  if (thread == 0) {
    prefetch_map(e_map);
    prefetch_map(c_map);
  }
  auto ask_for_columns = [&](Stage& stage, int tile, int step, uint32 full) {
    // Read anew: a number less to hold.
    const int share_before = kCluster == 1 ? 0 : static_cast<int>(rank_in_cluster()) * kShare;
    const int left = tile * kTileN + share_before;
    Storage* share = stage.c + share_before * kTileK;
    if (kCluster == 1) {
      copy_box(shared_address(share), c_map, step * kTileK, left, full, kEvictFirst);
    } else {
      copy_box_to_blocks(shared_address(share), c_map, step * kTileK, left, full,
                         (1 << kCluster) - 1, kEvictFirst);
    }
  };
  auto copy_boxes = [&](const Unit& unit, const TensorMap& map, int top) {
    if (thread != 0) {
      place.skip((unit.last - unit.first) * steps);
      return;
    }
    for (int tile = unit.first; tile < unit.last; ++tile)
      for (int step = 0; step < steps; ++step, place.next()) {
        Stage& stage = shared.stage[place.stage];
        wait_for(shared.ring.empty[place.stage], place.parity ^ 1);
        const uint32 full = shared_address(&shared.ring.full[place.stage]);
        mbarrier_expect_bytes(full, sizeof(stage.c) + sizeof(stage.e));
        ask_for_columns(stage, tile, step, full);
        copy_box(shared_address(stage.e), map, step * kTileK, top, full, kEvictLast);
        mbarrier_arrive(full, kGroupThreads);
      }
  };
  auto copy_words = [&](const Unit& unit, const TileRows& rows) {
    // The others may come to it no earlier than the one who copied all before.
    named_sync<kCopiers, kGroupThreads>();
    // Read anew, so that boxes are copied without what follows from it.
    const int number = this_thread() + kGroupThreads;
    const int word = number % kWordsOfRow, first = number / kWordsOfRow;
    const uint32 place_in_stage = (first * kWordsOfRow + (word ^ first % 8)) * kWordBytes;
    // Of this thread's words: one of eight in each of eight rows, sixteen rows apart.
    uint32 word_of_row[kRowsOfThread];
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      // Rows past the last count for nothing, whatever they hold.
      const int row = min(first + i * kRowStep, rows.number - 1);
      const int64 at = call.map.source[rows.top + row] * call.e.stride + word * kWordElements;
      word_of_row[i] = static_cast<uint32>(at / kWordElements);
    }
    for (int tile = unit.first; tile < unit.last; ++tile)
      for (int step = 0; step < steps; ++step, place.next()) {
        Stage& stage = shared.stage[place.stage];
        wait_for(shared.ring.empty[place.stage], place.parity ^ 1);
        const uint32 full = shared_address(&shared.ring.full[place.stage]);
        if (thread == step % kWarps * 32) {
          mbarrier_expect_bytes(full, sizeof(stage.c));
          ask_for_columns(stage, tile, step, full);
        }
        const uint32 to = shared_address(stage.e) + place_in_stage;
        const Storage* from = call.e.data + step * kTileK;
        const uint32 bytes = step * kTileK + word * kWordElements < dim ? kWordBytes : 0;
        KeptAddresses kept;
#pragma unroll
        for (int i = 0; i < kRowsOfThread; i += kCopies) {
          const Storage* of_row[kCopies];
#pragma unroll
          for (int k = 0; k < kCopies; ++k)
            of_row[k] = from + static_cast<uint64>(word_of_row[i + k]) * kWordElements;
#pragma unroll
          for (int k = 0; k < kCopies; ++k)
            copy_word(to + (i + k) * kRowStep * kTileK * sizeof(Storage), of_row[k], bytes);
          kept.keep(of_row);
        }
        kept.finish();
        arrive_after_words(full);
      }
  };
  for (int number = blockIdx.x / kCluster; number < units; number += gridDim.x / kCluster) {
    const Unit unit(order, number);
    TileRows rows(call.map, count, unit.row_block * kCluster + rank);
    // Of one row tile all rows are packed: those past the last take the copy engine longer where there is no
    // memory behind them.
    if constexpr (!kAllFollow && kCluster == 1) rows.follow &= call.packed == nullptr;
    // Barriers take whole warps, of which some threads may have had less to do.
    __syncwarp();
    if constexpr (kAllFollow) {
      copy_boxes(unit, e_map, rows.source);
    } else if (rows.follow || call.packed != nullptr) {
      copy_boxes(unit, rows.follow ? e_map : packed_map, rows.follow ? rows.source : rows.top);
    } else {
      copy_words(unit, rows);
    }
  }
}

// Numbers of barriers are constants to the compiler, which else reserves all of them.
__device__ __forceinline__ void take_turn(int consumer) {
  if (consumer == 0) {
    named_sync<kTurn, kConsumers * kGroupThreads>();
  } else {
    named_sync<kTurn + 1, kConsumers * kGroupThreads>();
  }
}
__device__ __forceinline__ void give_turn(int consumer) {
  if (consumer == 0) {
    named_arrive<kTurn, kConsumers * kGroupThreads>();
  } else {
    named_arrive<kTurn + 1, kConsumers * kGroupThreads>();
  }
}

// Multiply the stages of a tile; those of the last are under way still, and the stage is returned. In some
// launches rows of e may come as words.
template <int kCluster, typename Memory>
__device__ __forceinline__ int multiply_tile(float (&z)[kBlocksM][kSums], Memory& shared,
                                             RingPlace<kStages>& place, int steps, bool boxes_only) {
  auto receive = [&]() -> const Stage& {
    wait_for(shared.ring.full[place.stage], place.parity);
    // What words came as is written in the ordinary way, and read by the matrix unit.
    if (!boxes_only) fence_async_proxy();
    product_fence();
    return shared.stage[place.stage];
  };
  start_products<true>(z, receive());
  int done = place.stage;
  place.next();
  for (int step = 1; step < steps; ++step) {
    start_products<false>(z, receive());
    product_wait<kBlocksM>();
    release<kCluster>(shared.ring.empty[done]);
    done = place.stage;
    place.next();
  }
  return done;
}

__device__ __forceinline__ void raise_bound(int* bound, float reference, float sum) {
  // Of a sum that is not a number, or of none, nothing follows.
  if (sum > 0) atomicMax(bound, ordered(reference + logarithm_to_two(sum)));
}

// Bring the bounds that columns are tested against up to date: by this warp group's own sums, and by
// those of all blocks that work on these rows, as far as they have come.
__device__ __forceinline__ void share_bounds(Shared& shared, const ForwardArguments& call,
                                             int count) {
  const int thread = this_thread(), row = first_row(shared.row_tile[thread]);
  float known[kBlocksM][2], finished[kBlocksM][2], seen[kBlocksM][2];
  // All loads first.
#pragma unroll
  for (int m = 0; m < kBlocksM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = min(row + 64 * m + 8 * half, count - 1);
      known[m][half] = from_ordered(__ldcg(call.bound + at));
      finished[m][half] = __ldcg(call.finished + at);
    }
#pragma unroll
  for (int m = 0; m < kBlocksM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) seen[m][half] = quad_sum(shared.rest.at(m, half));
#pragma unroll
  for (int m = 0; m < kBlocksM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 64 * m + 8 * half;
      const float told = known[m][half] - shared.reference.at(m, half);
      // This unit's columns are none of those that have been worked on. A reference that has moved
      // away from the target's has no part in those.
      const bool alike = shared.reference.at(m, half) == shared.base.at(m, half);
      const float sum = seen[m][half] + (alike ? finished[m][half] : 0.0f);
      // Finite both ways: zero would keep nothing, and infinity times zero is not a number.
      const float inverse = fmaxf(fminf(__fdividef(1.0f, sum), power_of_two(-told)),
                                  1.0f / kHighest);
      // A row that is not there keeps nothing.
      shared.inverse.at(m, half) = at < count ? inverse : 0.0f;
      if (thread % 4 == 0 && at < count && seen[m][half] > 1.002f * power_of_two(told))
        raise_bound(call.bound + at, shared.reference.at(m, half), seen[m][half]);
    }
}

template <int kCluster, bool kPlain, bool kStatistics>
__device__ __forceinline__ void sum_tiles(Shared& shared, const ForwardArguments& call, int count,
                                          const Order& order) {
  const int steps = (static_cast<int>(call.dim) + kTileK - 1) / kTileK;
  const int units = order.row_blocks * order.across();
  RingPlace<kStages> place;
  bool mine = this_thread() < kGroupThreads;  // whether the next tile is this group's
  float z[kBlocksM][kSums];
  if (!mine) give_turn(0);
  for (int number = blockIdx.x / kCluster; number < units;
       number = shared.unit[this_thread()] + gridDim.x / kCluster) {
    shared.unit[this_thread()] = number;
    const Unit unit(order, number);
    const int rank = kCluster == 1 ? 0 : static_cast<int>(rank_in_cluster());
    const int row_tile = unit.row_block * kCluster + rank;
    shared.last[this_thread()] = unit.last;
    shared.row_tile[this_thread()] = row_tile;
    shared.part[this_thread()] = kConsumers * unit.across + this_thread() / kGroupThreads;
    for (int m = 0; m < kBlocksM; ++m)
      for (int half = 0; half < 2; ++half) {
        const int row = first_row(row_tile) + 64 * m + 8 * half;
        const float reference = row < count ? call.own[row] * kLog2E : kHighest;
        shared.reference.at(m, half) = reference < kFar ? kLowest : reference;
        shared.base.at(m, half) = reference;
        shared.rest.at(m, half) = 0;
        shared.target.at(m, half) =
            __int_as_float(row < count ? static_cast<int>(call.map.target[row]) : -1);
      }
    shared.first[this_thread()] = true;
    for (int tile = unit.first; tile < shared.last[this_thread()]; ++tile) {
      mine = !mine;
      if (mine) {
        place.skip(steps);
        continue;
      }
      take_turn(this_thread() / kGroupThreads);
      const int done = multiply_tile<kCluster>(z, shared, place, steps, call.packed != nullptr);
      // The other's products may queue behind these.
      give_turn(1 - this_thread() / kGroupThreads);
      const bool shares = !kStatistics && call.bits != nullptr &&
                          (steps >= kLongTile || (tile - unit.first) / kConsumers % kShareEvery == 0);
      if (shares) {
        // This takes longer than the products that are left.
        share_bounds(shared, call, count);
        product_wait<0>();
        release<kCluster>(shared.ring.empty[done]);
      }
      // The first block of rows is summed up from where its products are done, beside the last of the others.
      product_wait<kBlocksM - 1>();
      finish_tile<kPlain, kStatistics>(z, shared, call, count, tile * kTileN, [&] {
        product_wait<0>();
        if (!shares) release<kCluster>(shared.ring.empty[done]);
      });
    }
    for (int m = 0; m < kBlocksM; ++m)
      for (int half = 0; half < 2; ++half) {
        const int row = first_row(shared.row_tile[this_thread()]) + 64 * m + 8 * half;
        const float rest = quad_sum(shared.rest.at(m, half));
        if (this_thread() % 4 != 0 || row >= count) continue;
        if (call.bits != nullptr && shared.reference.at(m, half) == shared.base.at(m, half)) {
          // The order of these additions has no say in the results: bounds only choose what else the
          // backward looks at. A sum that is not a number bounds nothing.
          if (rest > 0) atomicAdd(call.finished + row, fminf(rest, kHighest));
        } else if (call.bits != nullptr) {
          raise_bound(call.bound + row, shared.reference.at(m, half), rest);
        }
        const int64 slot = shared.part[this_thread()] * call.capacity;
        call.out.reference[slot + row] = shared.reference.at(m, half);
        call.out.rest[slot + row] = rest;
        // A unit of one tile leaves one of the two without any.
        const bool first = shared.first[this_thread()];
        if (!kPlain && first && call.smoothing != nullptr) call.out.smoothed[slot + row] = 0;
        if (first && kStatistics) {
          call.out.weighted[slot + row] = 0;
          call.out.best[slot + row] = -static_cast<float>(infinity());
          call.out.argmax[slot + row] = 0;
        }
      }
  }
}

template <int kCluster, bool kPlain, bool kStatistics>
__device__ __forceinline__ void run(const TensorMap& e_map, const TensorMap& packed_map,
                                    const TensorMap& c_map, const ForwardArguments& given) {
  extern __shared__ unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(
      memory + (alignof(Stage) - shared_address(memory) % alignof(Stage)) % alignof(Stage));
  const uint32 rank = kCluster == 1 ? 0 : rank_in_cluster();
  if (threadIdx.x == 0) {
    shared.seed = *given.map.seed;
    for (int i = 0; i < kStages; ++i) {
      // One for the bytes that are expected, one for each thread that may copy words.
      mbarrier_init(shared_address(&shared.ring.full[i]), 1 + kGroupThreads);
      mbarrier_init(shared_address(&shared.ring.empty[i]), kCluster);
    }
    fence_barrier_init();
    fence_async_proxy();
  }
  if (kCluster == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
  const int count = static_cast<int>(*given.map.count);
  Order order;
  order.row_blocks = static_cast<int>((count + kTileM * kCluster - 1) / (kTileM * kCluster));
  order.column_tiles = static_cast<int>((given.vocab + kTileN - 1) / kTileN);
  order.unit_tiles = given.unit_tiles;
  order.group = given.group;
  if (threadIdx.x < kGroupThreads) {
    give_registers<kCopyRegisters>();
    copy_tiles<kCluster, false>(shared, e_map, packed_map, c_map, given, count, order, rank);
  } else {
    take_registers<kSumRegisters>();
    sum_tiles<kCluster, kPlain, kStatistics>(shared, given, count, order);
  }
  // No block may leave while another still copies to it or hands stages back to it.
  if (kCluster > 1) {
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace cce

// A kernel. Grid: as many clusters as fit on the device.
#define CCE_FORWARD(name, cluster, plain, statistics)                                        \
  extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(kThreads, 1)  \
      name(const __grid_constant__ TensorMap e_map,                                          \
           const __grid_constant__ TensorMap packed_map,                                     \
           const __grid_constant__ TensorMap c_map,                                          \
           const __grid_constant__ ForwardArguments given) {                                 \
    run<cluster, plain, statistics>(e_map, packed_map, c_map, given);                        \
  }
