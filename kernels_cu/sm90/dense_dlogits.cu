// dz on Hopper where every column is kept and every token counts: the logits of a chunk of columns once
// more, formed as in the forward, and dz as a matrix (rows, columns of the chunk).

#include "forward.cuh"

namespace cce {

constexpr int kCluster = 2;

struct DenseDlogitArguments {
  Matrix e;
  RowMap map;
  int64 tokens;   // nothing is done unless all of them count
  int64 dim;
  int64 first;    // column of the chunk
  int64 columns;  // of the chunk
  LogitOptions options;
  int unit_tiles;
  int group;
  const float* row_lse;
  RowFactors factors;
  float* target_rest;     // of each row: what rounding takes from its target's
  const uint32* largest;  // of the rows' factors, as an integer
  Storage* dz;
  int64 pitch;    // elements from row to row, a multiple of 8
};

struct DenseShared {
  Stage stage[kStages];
  RingBarriers<kStages> ring;
  RowState lse;      // in powers of two
  RowState softmax;  // the rows' factors, scaled as dz is
  RowState onehot;
  RowState target;   // columns of the chunk, as integers; any other number for none
  int unit[kConsumers * kGroupThreads];  // the one at hand, as each thread knows it,
  int last[kConsumers * kGroupThreads];  // where its column tiles end,
  int row[kConsumers * kGroupThreads];   // and the first of its rows
};
static_assert(sizeof(DenseShared) + alignof(Stage) <= 231424, "_HOPPER_SHARED_BYTES of compiler.py");

// What is the same for all rows.
struct DenseForm {
  float scale;
  float cap;
  float inverse_cap;

  __device__ __forceinline__ explicit DenseForm(const LogitOptions& options)
      : scale(static_cast<float>(options.scale)), cap(static_cast<float>(options.softcap)),
        inverse_cap(1.0f / cap) {}
};

// dz of a product: of a row's target where `onehot` is not 0.
template <bool kPlain>
__device__ __forceinline__ float dense_dlogit(float product, const DenseForm& form, float lse,
                                              float softmax, float onehot) {
  float slope = 1.0f;
  float logit = product;
  if (!kPlain) {
    logit *= form.scale;
    if (form.cap > 0.0f) {
      // z * 0 is NaN for an infinity, which tanh would turn into a number.
      const float t = fast_tangent(logit * form.inverse_cap);
      logit = fmaf(logit, 0.0f, form.cap * t);
      slope = 1.0f - t * t;
    }
  }
  const float x = fmaf(power_of_two(fmaf(logit, kLog2E, -lse)), softmax, -onehot);
  return kPlain ? x : x * slope;
}

// Write dz of a block of 64 rows.
template <bool kPlain>
__device__ __forceinline__ void store_dlogits(const float (&z)[kSums], DenseShared& shared,
                                              const DenseDlogitArguments& call, int m, int left) {
  const int q = threadIdx.x % 4;
  const DenseForm form(call.options);
  const int columns = static_cast<int>(call.columns) - left - 8 * q;  // from the thread's first word on
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float lse = shared.lse.at(m, half), softmax = shared.softmax.at(m, half);
    const int row = shared.row[this_thread()] + 64 * m + 8 * half;
    Storage* const to = call.dz + row * call.pitch + left + 8 * q;
    auto pair = [&](int span) {
      auto dz = [&](int side) {
        return dense_dlogit<kPlain>(z[SumPlace::index(span, half, side)], form, lse, softmax, 0.0f);
      };
      return narrow_pair(dz(0), dz(1));
    };
#pragma unroll
    for (int j = 0; j < kSpans; j += 4) {
      const uint4 words = transpose_quad(make_uint4(pair(j), pair(j + 1), pair(j + 2), pair(j + 3)), q);
      if (row < call.tokens && 8 * j < columns)
        *reinterpret_cast<uint4*>(to + 8 * j) = words;
    }
  }
}

// Few tiles hold a target: theirs are written once more, instead of every element's being compared. Behind
// the words, which other lanes of the warp may have written.
template <bool kPlain>
__device__ __forceinline__ void store_targets(float (&z)[kSums], DenseShared& shared,
                                              const DenseDlogitArguments& call, int m, int left) {
  const int q = threadIdx.x % 4;
  int own[2];  // which of the thread's sums is the target's; -1 for none
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int target = __float_as_int(shared.target.at(m, half)) - left;
    const bool there = target >= 0 && target < kTileN && target % 8 / 2 == q;
    own[half] = there ? target / 8 * 2 + target % 2 : -1;
  }
  if (__builtin_expect(!__any_sync(~0u, max(own[0], own[1]) >= 0), 1)) return;
  float product[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half)
    find_owners(own[half] >= 0, own[half] / 2, own[half] % 2, [&](int span, int own_side) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float& held = z[SumPlace::index(span, half, side)];
        one_by_one(held);
        if (side == own_side) product[half] = held;
      }
    });
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (own[half] < 0) continue;
    const int row = shared.row[this_thread()] + 64 * m + 8 * half;
    const int column = left + SumPlace::column(q, own[half] / 2, own[half] % 2);
    const float dz = dense_dlogit<kPlain>(product[half], DenseForm(call.options),
                                          shared.lse.at(m, half), shared.softmax.at(m, half),
                                          shared.onehot.at(m, half));
    call.dz[row * call.pitch + column] = narrow(dz);
    call.target_rest[row] = rounded_off(dz);
  }
}

template <bool kPlain>
__device__ __forceinline__ void store_tile(float (&z)[kBlocksM][kSums], DenseShared& shared,
                                           const DenseDlogitArguments& call, int left) {
#pragma unroll
  for (int m = 0; m < kBlocksM; ++m) {
    store_dlogits<kPlain>(z[m], shared, call, m, left);
    store_targets<kPlain>(z[m], shared, call, m, left);
  }
}

// What a thread's rows bring.
__device__ __forceinline__ void read_rows(DenseShared& shared, const DenseDlogitArguments& call,
                                          int row_tile) {
  const float scale = record_scale(call.largest);
  shared.row[this_thread()] = first_row(row_tile);
  for (int m = 0; m < kBlocksM; ++m)
    for (int half = 0; half < 2; ++half) {
      const int row = first_row(row_tile) + 64 * m + 8 * half;
      const bool there = row < call.tokens;
      shared.lse.at(m, half) = there ? call.row_lse[row] * kLog2E : static_cast<float>(infinity());
      shared.softmax.at(m, half) = there ? call.factors.softmax[row] * scale : 0.0f;
      shared.onehot.at(m, half) = there ? call.factors.onehot[row] * scale : 0.0f;
      const int64 target = there ? call.map.target[row] - call.first : -1;
      shared.target.at(m, half) =
          __int_as_float(target >= 0 && target < call.columns ? static_cast<int>(target) : -kTileN);
    }
}

__device__ __forceinline__ void form_tiles(DenseShared& shared, const DenseDlogitArguments& call,
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
    shared.last[this_thread()] = unit.last;
    read_rows(shared, call, unit.row_block * kCluster + static_cast<int>(rank_in_cluster()));
    for (int tile = unit.first; tile < shared.last[this_thread()]; ++tile) {
      mine = !mine;
      if (mine) {
        place.skip(steps);
        continue;
      }
      take_turn(this_thread() / kGroupThreads);
      const int done = multiply_tile<kCluster>(z, shared, place, steps, true);
      // The other's products may queue behind these.
      give_turn(1 - this_thread() / kGroupThreads);
      product_wait<0>();
      release<kCluster>(shared.ring.empty[done]);
      if (is_plain(nullptr, call.options)) {
        store_tile<true>(z, shared, call, tile * kTileN);
      } else {
        store_tile<false>(z, shared, call, tile * kTileN);
      }
    }
  }
}

}  // namespace cce

using namespace cce;

// Grid: as many clusters as fit on the device. The second map is of the chunk's rows of c.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    dense_dlogits(const __grid_constant__ TensorMap e_map, const __grid_constant__ TensorMap c_map,
                  const __grid_constant__ DenseDlogitArguments call) {
  if (*call.map.count != call.tokens) return;
  extern __shared__ unsigned char memory[];
  DenseShared& shared = *reinterpret_cast<DenseShared*>(
      memory + (alignof(Stage) - shared_address(memory) % alignof(Stage)) % alignof(Stage));
  const uint32 rank = rank_in_cluster();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(shared_address(&shared.ring.full[i]), 1 + kGroupThreads);
      mbarrier_init(shared_address(&shared.ring.empty[i]), kCluster);
    }
    fence_barrier_init();
    fence_async_proxy();
  }
  cluster_arrive();
  cluster_wait();
  Order order;
  order.row_blocks = static_cast<int>((call.tokens + kTileM * kCluster - 1) / (kTileM * kCluster));
  order.column_tiles = static_cast<int>((call.columns + kTileN - 1) / kTileN);
  order.unit_tiles = call.unit_tiles;
  order.group = call.group;
  if (threadIdx.x < kGroupThreads) {
    give_registers<kCopyRegisters>();
    copy_tiles<kCluster, true>(shared, e_map, e_map, c_map, call, static_cast<int>(call.tokens), order,
                               rank);
  } else {
    take_registers<kSumRegisters>();
    form_tiles(shared, call, order);
  }
  // No block may leave while another still copies to it or hands stages back to it.
  cluster_arrive();
  cluster_wait();
}
