// What the backward on Hopper is told before it starts: how large the rows' factors are, and the sums
// that label smoothing takes.

#include "../rows.cuh"

using namespace cce;

// The largest of the rows' factors as an integer, which orders them; `largest` is 0 before. One block.
extern "C" __global__ void __launch_bounds__(1024)
    largest_factor(const int64* count, const float* softmax, const float* onehot, uint32* largest) {
  uint32 most = 0;
  for (int64 row = threadIdx.x; row < *count; row += blockDim.x)
    most = max(most, max(__float_as_uint(fabsf(softmax[row])), __float_as_uint(fabsf(onehot[row]))));
  most = __reduce_max_sync(~0u, most);
  if (threadIdx.x % 32 == 0) atomicMax(largest, most);
}

// out[d] = the sum of `number` parts, each of D numbers.
extern "C" __global__ void __launch_bounds__(256)
    sum_parts(const double* parts, int number, int64 dim, float* out) {
  const int64 d = blockIdx.x * static_cast<int64>(blockDim.x) + threadIdx.x;
  if (d >= dim) return;
  double sum = 0;
  for (int part = 0; part < number; ++part) sum += parts[part * dim + d];
  out[d] = static_cast<float>(sum);
}
