// A block product on plain cores: shared-memory tiles, a block of sums in each thread's registers,
// the next tiles on their way from device memory while these are multiplied.
#pragma once

#include "../number.cuh"

namespace cce {

constexpr int kThreads = 256;
constexpr int kSideM = 16;  // threads along each side of the block of sums
constexpr int kSideN = kThreads / kSideM;
constexpr int kVector = 16 / sizeof(Sum);  // sums in a 16-byte word of shared memory
constexpr int kBlockM = 128;
constexpr int kBlockN = 128;
constexpr int kBlockK = 8;
// Blocks that share a multiprocessor: the barriers of one hide behind the products of the other. One
// where the registers of half a multiprocessor do not suffice and the compiler would spill.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000 && CCE_DTYPE == 1
constexpr int kBlocks = 2;
#else
constexpr int kBlocks = 1;
#endif
constexpr int kThreadM = kBlockM / kSideM;
constexpr int kThreadN = kBlockN / kSideN;
// Steps of the depth side by side: with all of them the compiler reads further ahead in doubles than
// there are registers for.
constexpr int kUnroll = sizeof(Sum) == 8 ? 4 : kBlockK;
constexpr int kGroup = 4;  // elements that one load takes along the contiguous axis

struct alignas(16) Word {
  Sum value[kVector];
};

// A tile with depth as its leading axis. A row's padding keeps 16-byte words aligned.
template <int kX>
struct Tile {
  Sum value[kBlockK][kX + kVector];
};

struct ProductStages {
  Tile<kBlockM> a[2];
  Tile<kBlockN> b[2];
};

// Where a thread's part of the block of sums lies. Words of neighbours lie side by side, so that a
// warp reads shared memory without conflicts.
struct Places {
  int thread;

  // The compiler takes the thread's number for a new one: places are computed again after a product
  // instead of being held in registers, or spilled, across it.
  __device__ __forceinline__ Places() {
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  }

  __device__ __forceinline__ int row(int i) const {
    return (i / kVector) * (kSideM * kVector) + thread / kSideN * kVector + i % kVector;
  }
  __device__ __forceinline__ int column(int j) const {
    return (j / kVector) * (kSideN * kVector) + thread % kSideN * kVector + j % kVector;
  }
};

template <typename T>
struct alignas(sizeof(T) * kGroup) Group {
  T value[kGroup];
};

// Read the elements from `at` on of which `left` exist; the others are zeros. Aligned: they exist
// in whole groups, and one load takes a group.
template <bool kAligned, typename T>
__device__ __forceinline__ Group<T> read_group(const T* at, int left) {
  Group<T> group;
  if (kAligned) {
    if (left > 0) return *reinterpret_cast<const Group<T>*>(at);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group.value[i] = T(0.0f);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group.value[i] = i < left ? at[i] : T(0.0f);
  }
  return group;
}

// An operand whose rows, one for each place x, are contiguous along the depth.
template <typename T, int kX>
struct AlongDepth {
  static constexpr int kGroups = kX * kBlockK / kGroup;
  static constexpr int kEach = (kGroups + kThreads - 1) / kThreads;
  const T* row[kEach];  // of this thread's groups, at their first element; nullptr: zeros
  int depth;
  Group<T> held[kEach];

  // Rows: int -> const T*, or nullptr for a row of zeros.
  template <typename Rows>
  __device__ __forceinline__ AlongDepth(Rows rows, int64 depth)
      : depth(static_cast<int>(depth)) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int group = threadIdx.x + i * kThreads;
      row[i] = group < kGroups ? rows(group / (kBlockK / kGroup)) : nullptr;
    }
  }

  template <bool kAligned>
  __device__ __forceinline__ void fetch(int k) {
    // All groups of a thread stand at the same depth.
    static_assert(kThreads % (kBlockK / kGroup) == 0, "");
    const int at = k + threadIdx.x % (kBlockK / kGroup) * kGroup;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      held[i] = read_group<kAligned>(row[i] + at, row[i] == nullptr ? 0 : depth - at);
  }

  __device__ __forceinline__ void put(Tile<kX>& tile) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int group = threadIdx.x + i * kThreads;
      if (group >= kGroups) continue;
      const int x = group / (kBlockK / kGroup);
      const int k = group % (kBlockK / kGroup) * kGroup;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) tile.value[k + j][x] = widen(held[i].value[j]);
    }
  }
};

// An operand whose rows, one for each step of the depth, are contiguous along x.
// Rows: int -> const T*, or nullptr; `width` elements exist in each.
template <typename T, int kX, typename Rows>
struct AcrossDepth {
  static constexpr int kGroups = kX * kBlockK / kGroup;
  static constexpr int kEach = (kGroups + kThreads - 1) / kThreads;
  Rows rows;
  int depth;
  int width;
  Group<T> held[kEach];

  template <bool kAligned>
  __device__ __forceinline__ void fetch(int k) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int group = threadIdx.x + i * kThreads;
      const int at = k + group / (kX / kGroup);
      const int x = group % (kX / kGroup) * kGroup;
      const T* row = group < kGroups && at < depth ? rows(at) : nullptr;
      held[i] = read_group<kAligned>(row + x, row == nullptr ? 0 : width - x);
    }
  }

  __device__ __forceinline__ void put(Tile<kX>& tile) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int group = threadIdx.x + i * kThreads;
      if (group >= kGroups) continue;
      const int k = group / (kX / kGroup);
      const int x = group % (kX / kGroup) * kGroup;
#pragma unroll
      for (int j = 0; j < kGroup; j += kVector) {
        Word word;
#pragma unroll
        for (int l = 0; l < kVector; ++l) word.value[l] = widen(held[i].value[j + l]);
        *reinterpret_cast<Word*>(&tile.value[k][x + j]) = word;
      }
    }
  }
};

template <bool kAligned, typename A, typename B>
__device__ __forceinline__ void multiply_loop(ProductStages& stages, A& a, B& b, int depth,
                                              Sum (&sums)[kThreadM][kThreadN]) {
  const Places places;
  a.template fetch<kAligned>(0);
  b.template fetch<kAligned>(0);
  a.put(stages.a[0]);
  b.put(stages.b[0]);
  __syncthreads();
  int stage = 0;
  for (int k = 0; k < depth; k += kBlockK) {
    // Past the end these are zeros that nobody multiplies: without a branch around them the compiler
    // has no block of stores to move the loads to, and may not move them past the barrier for it.
    a.template fetch<kAligned>(k + kBlockK);
    b.template fetch<kAligned>(k + kBlockK);
    // Element by element they would take registers that are not there.
    if (kAligned) asm volatile("" ::: "memory");
#pragma unroll kUnroll
    for (int step = 0; step < kBlockK; ++step) {
      Sum left[kThreadM], right[kThreadN];
#pragma unroll
      for (int i = 0; i < kThreadM; i += kVector) {
        const Word word = *reinterpret_cast<const Word*>(&stages.a[stage].value[step][places.row(i)]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) left[i + j] = word.value[j];
      }
#pragma unroll
      for (int i = 0; i < kThreadN; i += kVector) {
        const Word word =
            *reinterpret_cast<const Word*>(&stages.b[stage].value[step][places.column(i)]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) right[i + j] = word.value[j];
      }
#pragma unroll
      for (int i = 0; i < kThreadM; ++i)
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) sums[i][j] += left[i] * right[j];
    }
    stage ^= 1;
    a.put(stages.a[stage]);
    b.put(stages.b[stage]);
    __syncthreads();
  }
}

// sums += a b over the whole depth. Every thread of the block calls it; it ends with all of them
// done with the stages. Aligned: both operands may be read in groups of four elements.
template <typename A, typename B>
__device__ __forceinline__ void multiply(ProductStages& stages, A& a, B& b, int depth, bool aligned,
                                         Sum (&sums)[kThreadM][kThreadN]) {
  if (depth <= 0) return;
  if (aligned) {
    multiply_loop<true>(stages, a, b, depth, sums);
  } else {
    multiply_loop<false>(stages, a, b, depth, sums);
  }
}

}  // namespace cce
