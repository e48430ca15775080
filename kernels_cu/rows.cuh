// The mapping from compact rows, the tokens that count, to where they stand. `rows` in tokens.cu
// makes it.
#pragma once

#include "columns.cuh"

namespace cce {

struct RowMap {
  const int64* source;    // row of the flattened e
  const int64* position;  // place in the flattened targets
  const int64* target;    // -1: out of range, whose loss and gradients are NaN
  const int64* count;     // one number: how many there are
  const uint64* seed;     // one number: of the unbiased filter
};

// An array of shape (rows, D) whose rows are contiguous and `stride` elements apart.
struct Matrix {
  const Storage* data;
  int64 stride;
  int aligned;  // rows are whole groups of four elements, each aligned to its size

  __device__ __forceinline__ const Storage* row(int64 i) const { return data + i * stride; }
};

}  // namespace cce
