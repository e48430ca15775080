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
constexpr int kBlockN = sizeof(Sum) == 8 ? 64 : 128;
constexpr int kBlockK = sizeof(Sum) == 8 ? 8 : 16;
constexpr int kThreadM = kBlockM / kSideM;
constexpr int kThreadN = kBlockN / kSideN;
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

// Place of a thread's i-th row or column: words of neighbours lie side by side, so that a warp
// reads shared memory without conflicts.
__device__ __forceinline__ int row_place(int i) {
  return (i / kVector) * (kSideM * kVector) + threadIdx.x / kSideN * kVector + i % kVector;
}
__device__ __forceinline__ int column_place(int j) {
  return (j / kVector) * (kSideN * kVector) + threadIdx.x % kSideN * kVector + j % kVector;
}

template <typename T>
struct alignas(sizeof(T) * kGroup) Group {
  T value[kGroup];
};

// Read the elements from `at` on of which `left` exist; the others are zeros. Aligned: in one load
// where a whole group exists.
template <typename T>
__device__ __forceinline__ void read_group(const T* at, int left, bool aligned,
                                           Sum (&out)[kGroup]) {
  if (aligned && left >= kGroup) {
    const Group<T> group = *reinterpret_cast<const Group<T>*>(at);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) out[i] = widen(group.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) out[i] = i < left ? widen(at[i]) : Sum(0);
  }
}

// An operand whose rows, one for each place x, are contiguous along the depth.
template <typename T, int kX>
struct AlongDepth {
  static constexpr int kGroups = kX * kBlockK / kGroup;
  static constexpr int kEach = (kGroups + kThreads - 1) / kThreads;
  const T* row[kEach];  // of this thread's groups, at their first element; nullptr: zeros
  int depth;
  Sum held[kEach][kGroup];

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

  __device__ __forceinline__ void fetch(int k, bool aligned) {
    // All groups of a thread stand at the same depth.
    static_assert(kThreads % (kBlockK / kGroup) == 0, "");
    const int at = k + threadIdx.x % (kBlockK / kGroup) * kGroup;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      read_group(row[i] + at, row[i] == nullptr ? 0 : depth - at, aligned, held[i]);
  }

  __device__ __forceinline__ void put(Tile<kX>& tile) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int group = threadIdx.x + i * kThreads;
      if (group >= kGroups) continue;
      const int x = group / (kBlockK / kGroup);
      const int k = group % (kBlockK / kGroup) * kGroup;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) tile.value[k + j][x] = held[i][j];
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
  Sum held[kEach][kGroup];

  __device__ __forceinline__ void fetch(int k, bool aligned) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int group = threadIdx.x + i * kThreads;
      const int at = k + group / (kX / kGroup);
      const int x = group % (kX / kGroup) * kGroup;
      const T* row = group < kGroups && at < depth ? rows(at) : nullptr;
      read_group(row + x, row == nullptr ? 0 : width - x, aligned, held[i]);
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
        for (int l = 0; l < kVector; ++l) word.value[l] = held[i][j + l];
        *reinterpret_cast<Word*>(&tile.value[k][x + j]) = word;
      }
    }
  }
};

// sums += a b over the whole depth. Every thread of the block calls it; it ends with all of them
// done with the stages. Aligned: both operands may be read in groups of four elements.
template <typename A, typename B>
__device__ __forceinline__ void multiply(ProductStages& stages, A& a, B& b, int depth, bool aligned,
                                         Sum (&sums)[kThreadM][kThreadN]) {
  if (depth <= 0) return;
  a.fetch(0, aligned);
  b.fetch(0, aligned);
  a.put(stages.a[0]);
  b.put(stages.b[0]);
  __syncthreads();
  int stage = 0;
  for (int k = 0; k < depth; k += kBlockK) {
    const bool more = k + kBlockK < depth;
    if (more) {
      a.fetch(k + kBlockK, aligned);
      b.fetch(k + kBlockK, aligned);
    }
#pragma unroll
    for (int step = 0; step < kBlockK; ++step) {
      Sum left[kThreadM], right[kThreadN];
#pragma unroll
      for (int i = 0; i < kThreadM; i += kVector) {
        const Word word = *reinterpret_cast<const Word*>(&stages.a[stage].value[step][row_place(i)]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) left[i + j] = word.value[j];
      }
#pragma unroll
      for (int i = 0; i < kThreadN; i += kVector) {
        const Word word =
            *reinterpret_cast<const Word*>(&stages.b[stage].value[step][column_place(i)]);
#pragma unroll
        for (int j = 0; j < kVector; ++j) right[i + j] = word.value[j];
      }
#pragma unroll
      for (int i = 0; i < kThreadM; ++i)
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) sums[i][j] += left[i] * right[j];
    }
    if (more) {
      stage ^= 1;
      a.put(stages.a[stage]);
      b.put(stages.b[stage]);
    }
    __syncthreads();
  }
}

}  // namespace cce
