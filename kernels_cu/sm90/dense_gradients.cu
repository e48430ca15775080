// dE and dC on Hopper where every column is kept and every token counts: products of dz, a matrix (rows,
// columns of a chunk), with the chunk's rows of c, and of its transpose with e. Two blocks share what both
// multiply with.

#include "gradients.cuh"

namespace cce {

constexpr int kCluster = 2;
constexpr int kWideSpread = kWide / kTileK;
constexpr int kDenseCopyRegisters = 40;
constexpr int kDenseSumRegisters = 232;

struct DenseGradientArguments {
  const int64* count;
  int64 tokens;   // nothing is done unless all of them count
  int64 dim;
  int parts;      // of D: of kWidth each,
  int wide;       // but the first of them of kWide, and the last of what is left
  int64 first;    // column of the chunk
  int64 columns;  // of the chunk
  int64 vocab;
  double scale;           // of the logits
  Matrix c;
  const int64* target;
  const float* target_rest;  // of each row: what rounding took from its target's dz
  const uint32* largest;  // of the rows' factors, as an integer
  // Low halves of unfinished sums, (tokens, D): those of the first rows wait in rows of dC that come last,
  // the others in the workspace; the high ones in de.
  unsigned short* waiting;
  int64 waiting_rows;
  unsigned short* low;
  Storage* de;            // or null, as dc
  Storage* dc;
};

struct DenseStage {
  Storage dz[2][kTileK * kTileK];  // rows along the depth, 64 rows each; or across, 64 columns each
  Storage other[kWideSpread][kTileK * kTileK];
};
struct alignas(1024) DenseShared {
  DenseStage stage[kStages];
  RingBarriers<kStages> ring;
};
static_assert(sizeof(DenseShared) + alignof(DenseShared) <= 231424, "_HOPPER_SHARED_BYTES of compiler.py");

// The work: a part of D for two row tiles, then a part of D for two blocks of columns; what shares its rows of
// dz goes together.
struct DenseItem {
  bool embedding;
  int begin;    // of its part of D
  int width;    // for how much products are formed
  int place;    // of this block's 128 rows, or columns
  int steps;

  // The item of a pair of blocks in each round. Pairs change their places from round to round: else the one
  // would always have what is narrow, where its number and that of the parts have a common divisor.
  __device__ __forceinline__ static int in_round(int round) {
    const int pairs = gridDim.x / kCluster, place = blockIdx.x / kCluster + round % pairs;
    return round * pairs + (place < pairs ? place : place - pairs);
  }

  __device__ __forceinline__ DenseItem(const DenseGradientArguments& call, int at, uint32 rank) {
    const int embeddings = count_embeddings(call);
    embedding = at < embeddings;
    const int own = embedding ? at : at - embeddings, part = own % call.parts;
    begin = part * kWidth + min(part, call.wide) * (kWide - kWidth);
    width = part < call.wide ? kWide : call.dim - begin > kNarrow ? kWidth : kNarrow;
    place = (own / call.parts * kCluster + static_cast<int>(rank)) * kRowTile;
    steps = static_cast<int>(((embedding ? call.columns : call.tokens) + kTileK - 1) / kTileK);
  }
  __device__ __forceinline__ static int pairs(int64 length) {
    constexpr int kBoth = kCluster * kRowTile;
    return static_cast<int>((length + kBoth - 1) / kBoth);
  }
  __device__ __forceinline__ static int count_embeddings(const DenseGradientArguments& call) {
    return call.de == nullptr ? 0 : pairs(call.tokens) * call.parts;
  }
  __device__ __forceinline__ static int count(const DenseGradientArguments& call) {
    const int classifiers = call.dc == nullptr ? 0 : pairs(call.columns) * call.parts;
    return count_embeddings(call) + classifiers;
  }
};

struct DenseMaps {
  TensorMap dz;
  TensorMap e;
  TensorMap c;  // of the chunk's rows
};

// One thread of each block asks for boxes: its own of dz, and every other one of the others for both.
__device__ __forceinline__ void copy_boxes(DenseShared& shared, const DenseMaps& maps,
                                           const DenseGradientArguments& call, uint32 rank) {
  const int items = DenseItem::count(call);
  RingPlace<kStages> place;
  prefetch_map(maps.dz);
  prefetch_map(maps.e);
  prefetch_map(maps.c);
  for (int round = 0, at; (at = DenseItem::in_round(round)) < items; ++round) {
    const DenseItem item(call, at, rank);
    const TensorMap& other = item.embedding ? maps.c : maps.e;
    const int boxes = item.width / kTileK;
    for (int step = 0; step < item.steps; ++step, place.next()) {
      DenseStage& stage = shared.stage[place.stage];
      wait_for(shared.ring.empty[place.stage], place.parity ^ 1);
      const uint32 full = shared_address(&shared.ring.full[place.stage]);
      mbarrier_expect_bytes(full, sizeof(stage.dz) + boxes * sizeof(stage.other[0]));
      const int depth = step * kTileK;
      for (int half = 0; half < 2; ++half) {
        const int along = item.place + half * kTileK;
        copy_box(shared_address(stage.dz[half]), maps.dz, item.embedding ? depth : along,
                 item.embedding ? along : depth, full, kEvictFirst);
      }
      // Of an odd number the one block has one more; from step to step it is the other.
      for (int i = (rank + step) % kCluster; i < boxes; i += kCluster)
        copy_box_to_blocks(shared_address(stage.other[i]), other, item.begin + i * kTileK, depth, full,
                           (1 << kCluster) - 1, kEvictLast);
    }
  }
}

// Hand a stage back, in both blocks: once for each group that multiplies.
__device__ __forceinline__ void release_to_all(const uint64& empty) {
  const int thread = threadIdx.x % kGroupThreads;
  if (thread < kCluster) mbarrier_arrive_mapped(map_to_block(shared_address(&empty), thread));
}

// Add the products of an item, whose rows of dz lie across the depth where kAcross is 1.
template <int kAcross, int kSums>
__device__ __forceinline__ void multiply(float (&sums)[kSums], DenseShared& shared, int consumer,
                                         int steps, RingPlace<kStages>& place) {
  int done = 0;
  for (int step = 0; step < steps; ++step) {
    wait_for(shared.ring.full[place.stage], place.parity);
    const DenseStage& stage = shared.stage[place.stage];
    product_fence();
    start_gradients<kAcross>(sums, stage.dz[consumer], stage.other);
    if (step > 0) {
      product_wait<1>();
      release_to_all(shared.ring.empty[done]);
    }
    done = place.stage;
    place.next();
  }
  product_wait<0>();
  settle(sums);
  release_to_all(shared.ring.empty[done]);
}

// What sums are multiplied by in the end.
__device__ __forceinline__ float dense_scale(const DenseGradientArguments& call) {
  return static_cast<float>(call.scale) / record_scale(call.largest);
}

// A thread's first row, or column, of an item: the other one is eight further on.
__device__ __forceinline__ int own_place(const DenseItem& item, int consumer) {
  const int thread = threadIdx.x % kGroupThreads;
  return item.place + consumer * 64 + thread / 32 * 16 + thread % 32 / 4;
}

template <int kColumns>
__device__ __forceinline__ void form_embedding(DenseShared& shared, const DenseGradientArguments& call,
                                               const DenseItem& item, int consumer,
                                               RingPlace<kStages>& place) {
  const int q = threadIdx.x % 4, dim = static_cast<int>(call.dim), own = own_place(item, consumer);
  Storage* row[2];
  unsigned short* low[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64 number = own + 8 * half;
    row[half] = number < call.tokens ? call.de + number * call.dim : nullptr;
    low[half] = number < call.waiting_rows ? call.waiting + number * call.dim
                                           : call.low + (number - call.waiting_rows) * call.dim;
  }
  // Sums go on from where the chunk before left them. Without a branch: what only one side of it defines would be
  // in two registers.
  Storage* const kept[2] = {call.first > 0 ? row[0] : nullptr, call.first > 0 ? row[1] : nullptr};
  float sums[kSumsOf<kColumns>];
  take_kept_sums(sums, item.begin, dim, kept, low, q);
  settle(sums);
  multiply<0>(sums, shared, consumer, item.steps, place);
  if (call.first + call.columns >= call.vocab) {
    const int64 at[2] = {own, own + 8};
    add_target_rests(sums, call.c, call.target, call.target_rest, at, call.tokens, item.begin, dim, q);
    store_rows(sums, item.begin, dim, dense_scale(call), row, q);
  } else {
    keep_sums(sums, item.begin, dim, row, low, q);
  }
}

template <int kColumns>
__device__ __forceinline__ void form_classifier(DenseShared& shared, const DenseGradientArguments& call,
                                                const DenseItem& item, int consumer,
                                                RingPlace<kStages>& place) {
  float sums[kSumsOf<kColumns>] = {};
  settle(sums);
  multiply<1>(sums, shared, consumer, item.steps, place);
  const int own = own_place(item, consumer), dim = static_cast<int>(call.dim), q = threadIdx.x % 4;
  Storage* row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64 number = own + 8 * half;
    row[half] = number < call.columns ? call.dc + (call.first + number) * call.dim : nullptr;
  }
  store_rows(sums, item.begin, dim, dense_scale(call), row, q);
}

__device__ __forceinline__ void form_items(DenseShared& shared, const DenseGradientArguments& call,
                                           uint32 rank) {
  const int consumer = threadIdx.x / kGroupThreads - 1;
  const int items = DenseItem::count(call), embeddings = DenseItem::count_embeddings(call);
  RingPlace<kStages> place;
  int round = 0, at;
  // All of one kind come first: in one loop the sums of both would be one.
  for (; (at = DenseItem::in_round(round)) < min(items, embeddings); ++round) {
    const DenseItem item(call, at, rank);
    if (item.width == kWide) {
      form_embedding<kWide>(shared, call, item, consumer, place);
    } else if (item.width == kNarrow) {
      form_embedding<kNarrow>(shared, call, item, consumer, place);
    } else {
      form_embedding<kWidth>(shared, call, item, consumer, place);
    }
  }
  for (; (at = DenseItem::in_round(round)) < items; ++round) {
    const DenseItem item(call, at, rank);
    if (item.width == kWide) {
      form_classifier<kWide>(shared, call, item, consumer, place);
    } else if (item.width == kNarrow) {
      form_classifier<kNarrow>(shared, call, item, consumer, place);
    } else {
      form_classifier<kWidth>(shared, call, item, consumer, place);
    }
  }
}

}  // namespace cce

using namespace cce;

// Grid: as many clusters as fit on the device.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    dense_gradients(const __grid_constant__ DenseMaps maps,
                    const __grid_constant__ DenseGradientArguments call) {
  if (*call.count != call.tokens) return;
  extern __shared__ unsigned char memory[];
  DenseShared& shared = *reinterpret_cast<DenseShared*>(
      memory +
      (alignof(DenseShared) - shared_address(memory) % alignof(DenseShared)) % alignof(DenseShared));
  const uint32 rank = rank_in_cluster();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(shared_address(&shared.ring.full[i]), 1);
      mbarrier_init(shared_address(&shared.ring.empty[i]), kCluster * kConsumers);
    }
    fence_barrier_init();
    fence_async_proxy();
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < kGroupThreads) {
    give_registers<kDenseCopyRegisters>();
    if (threadIdx.x == 0) copy_boxes(shared, maps, call, rank);
  } else {
    take_registers<kDenseSumRegisters>();
    form_items(shared, call, rank);
  }
  // No block may leave while another still copies to it or hands stages back to it.
  cluster_arrive();
  cluster_wait();
}
