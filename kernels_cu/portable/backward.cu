// The backward on kept columns, one range of columns at a time: their lists, dz, and the products
// with it. Each sum has one writer and one order.

#include "../columns.cuh"
#include "../logits.cuh"
#include "product.cuh"
#include "../rows.cuh"

namespace cce {

// The columns of a range that each row tile of a part works on, ascending. Here and in the records
// row tiles count from the first of the part.
struct Lists {
  int* column;   // (tiles, width): offset of a listed column from the range's first
  int* before;   // (tiles, width / kBlockM + 1): listed columns before each block of kBlockM
  int width;     // columns of the range, rounded up to kBlockM
};

struct RowFactors {
  const Sum* softmax;
  const Sum* onehot;
  const Sum* smoothing;
};

// dz of a range: a record of kRowTile sums for each listed column, and each record's own sum.
struct Records {
  Sum* dz;      // (tiles, width, kRowTile)
  Sum* column;  // (tiles, width), or null
};

#if CCE_DTYPE == 0
using Bits = unsigned long long;
__device__ __forceinline__ Bits as_bits(double x) { return __double_as_longlong(x); }
__device__ __forceinline__ double from_bits(Bits x) { return __longlong_as_double(x); }
#else
using Bits = unsigned int;
__device__ __forceinline__ Bits as_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float from_bits(Bits x) { return __uint_as_float(x); }
#endif

// The sums of dz over a thread's rows take the room of the stages once the product is done.
union DlogitsShared {
  ProductStages stages;
  Sum column_sum[kSideM][kBlockN];
};

// Only a removed entry's logit is -inf, and its probability is 0 whatever the rest of the row is.
__device__ __forceinline__ Sum probability(Sum logit, Sum lse) {
  return logit == -static_cast<Sum>(infinity()) ? Sum(0) : exponential(logit - lse);
}

// A row of c; those of removed entries as zeros, since zero times NaN is NaN.
__device__ __forceinline__ const Storage* present_row(const Matrix& c, const Storage* bias,
                                                      int64 column) {
  const bool removed =
      bias != nullptr && widen(bias[column]) == -static_cast<Sum>(infinity());
  return removed ? nullptr : c.row(column);
}

// What a loop loads for each row stays in it: held in registers across the loop, as the compiler would
// have it, the rows' doubles leave too few for the sums.
__device__ __forceinline__ void keep_loads_here() {
  if (sizeof(Sum) == 8) asm volatile("" ::: "memory");
}

// Call f(i, j, offset) for those of a thread's sums that lie within `rows` x `width` of a matrix
// whose rows are `stride` apart.
template <typename Function>
__device__ __forceinline__ void each_sum(int64 stride, int rows, int width, Function f) {
  const Places places;
#pragma unroll
  for (int i = 0; i < kThreadM; ++i)
#pragma unroll
    for (int j = 0; j < kThreadN; ++j)
      if (places.row(i) < rows && places.column(j) < width)
        f(i, j, places.row(i) * stride + places.column(j));
}

}  // namespace cce

using namespace cce;

// List the kept columns of a range for each row tile; bits that are null keep all. Grid: row tiles.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    list_columns(RowMap map, const uint32* bits, int64 words, const int* unbounded,
                 int64 first_tile, int64 left, int64 right, Lists lists) {
  const int64 part = blockIdx.x, tile = first_tile + part;
  if (tile * kRowTile >= *map.count) return;
  const bool all = bits == nullptr || unbounded[tile] != 0;
  const int width = static_cast<int>(right - left);
  int* column = lists.column + part * lists.width;
  int* before = lists.before + part * (lists.width / kBlockM + 1);
  // One warp walks the words: a range has few of them.
  if (threadIdx.x >= 32) return;
  constexpr int kWordsInBlock = kBlockM / kColumnChunk;
  int listed = 0;
  for (int start = 0; start * kColumnChunk < lists.width; start += 32) {
    const int word = start + threadIdx.x, first = word * kColumnChunk;
    uint32 kept = 0;
    if (first < width) {
      kept = all ? ~0u : bits[tile * words + left / kColumnChunk + word];
      if (width - first < kColumnChunk) kept &= (1u << (width - first)) - 1u;
    }
    int upto = __popc(kept);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, upto, step);
      if (threadIdx.x >= step) upto += other;
    }
    int at = listed + upto - __popc(kept);
    if (word % kWordsInBlock == 0 && first < lists.width) before[word / kWordsInBlock] = at;
    for (uint32 rest = kept; rest != 0; rest &= rest - 1) column[at++] = first + __ffs(rest) - 1;
    listed += __shfl_sync(~0u, upto, 31);
  }
  if (threadIdx.x == 0) before[lists.width / kBlockM] = listed;
}

// Recompute the logits of listed columns and form their dz. Grid: (row tiles, column blocks).
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    dlogits(Matrix e, Matrix c, const Storage* bias, int64 dim, int64 first_tile, int64 left,
            LogitOptions options, Filter filter, RowMap map, Lists lists, const Sum* lse,
            RowFactors factors, const Sum* smoothing, Records records,
            unsigned long long* passed) {
  const int64 part = blockIdx.x, tile = first_tile + part;
  const int64 top = tile * kRowTile, count = *map.count;
  if (top >= count) return;
  const int listed = lists.before[part * (lists.width / kBlockM + 1) + lists.width / kBlockM];
  const int first = blockIdx.y * kBlockN;
  if (first >= listed) return;
  __shared__ DlogitsShared shared;
  __shared__ Bits largest[kBlockN];
  __shared__ Sum weight[kBlockN];
  const int* column = lists.column + part * lists.width;
  const int rows = static_cast<int>(min(static_cast<int64>(kRowTile), count - top));
  const int columns = min(kBlockN, listed - first);
  if (threadIdx.x < kBlockN) largest[threadIdx.x] = 0;
  // The product has barriers of its own only where D > 0.
  __syncthreads();

  AlongDepth<Storage, kBlockM> a(
      [&](int row) { return row < rows ? e.row(map.source[top + row]) : nullptr; }, dim);
  AlongDepth<Storage, kBlockN> b(
      [&](int x) {
        return x < columns ? present_row(c, bias, left + column[first + x]) : nullptr;
      },
      dim);
  Sum z[kThreadM][kThreadN] = {};
  multiply(shared.stages, a, b, static_cast<int>(dim), e.aligned && c.aligned, z);
  const Places places;

  // Logits; and of each column the largest probability, where a target counts as 1.
  int at[kThreadN];
#pragma unroll
  for (int j = 0; j < kThreadN; ++j) {
    const int x = places.column(j);
    at[j] = x < columns ? column[first + x] : -1;
  }
#pragma unroll
  for (int j = 0; j < kThreadN; ++j) {
    keep_loads_here();
    Bits most = 0;
#pragma unroll
    for (int i = 0; i < kThreadM; ++i) {
      const int row = places.row(i);
      if (row >= rows || at[j] < 0) continue;
      z[i][j] = make_logit(z[i][j], bias, left + at[j], options);
      if (filter.eps > 0.0) {
        const bool own = map.target[top + row] == left + at[j];
        most = max(most, as_bits(own ? Sum(1) : probability(z[i][j], lse[top + row])));
      }
    }
    if (filter.eps > 0.0) atomicMax(&largest[places.column(j)], most);
  }
  __syncthreads();
  if (threadIdx.x < kBlockN) {
    const int x = threadIdx.x;
    Sum w = x < columns ? Sum(1) : Sum(0);
    if (filter.eps > 0.0 && x < columns) {
      const Sum eps = static_cast<Sum>(filter.eps), found = from_bits(largest[x]);
      // Comparisons are written so that a NaN is kept, with weight 1.
      if (filter.unbiased) {
        const int64 chunk = (left + column[first + x]) / kColumnChunk;
        const Sum u = uniform(*map.seed, tile, chunk);
        if (found < eps) w = found < eps * u ? Sum(0) : eps / found;
      } else if (found < eps) {
        w = 0;
      }
    }
    weight[x] = w;
    const uint32 kept = __ballot_sync(~0u, w != Sum(0));
    if (passed != nullptr && x % 32 == 0)
      atomicAdd(passed, static_cast<unsigned long long>(__popc(kept)));
  }
  __syncthreads();

  const Sum lowest = -static_cast<Sum>(infinity());
  Sum* record = records.dz + (part * lists.width + first) * kRowTile;
#pragma unroll
  for (int j = 0; j < kThreadN; ++j) {
    keep_loads_here();
    const int x = places.column(j);
    const Sum w = weight[x];
    Sum sum = 0;
#pragma unroll
    for (int i = 0; i < kThreadM; ++i) {
      const int row = places.row(i);
      Sum dz = 0;
      if (row < rows && at[j] >= 0) {
        const Sum logit = z[i][j];
        dz = probability(logit, lse[top + row]) * w * factors.softmax[top + row];
        if (map.target[top + row] == left + at[j]) dz -= factors.onehot[top + row];
        if (smoothing != nullptr) dz -= factors.smoothing[top + row] * smoothing[left + at[j]];
        if (options.softcap > 0.0) dz = logit == lowest ? Sum(0) : dz * slope(logit, options);
      }
      z[i][j] = dz;
      sum += dz;
    }
    shared.column_sum[threadIdx.x / kSideN][x] = sum;
    if (at[j] < 0) continue;
#pragma unroll
    for (int i = 0; i < kThreadM; i += kVector) {
      Word word;
#pragma unroll
      for (int l = 0; l < kVector; ++l) word.value[l] = z[i + l][j];
      *reinterpret_cast<Word*>(&record[static_cast<int64>(x) * kRowTile + places.row(i)]) =
          word;
    }
  }
  if (records.column == nullptr) return;
  __syncthreads();
  if (threadIdx.x < columns) {
    Sum sum = 0;
    for (int i = 0; i < kSideM; ++i) sum += shared.column_sum[i][threadIdx.x];
    records.column[part * lists.width + first + threadIdx.x] = sum;
  }
}

// dE of a row tile: its share of this range, added to those of the ranges before. `sums` starts at
// the part's first row. Grid: (row tiles, blocks of D).
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    dembedding(Matrix c, const Storage* bias, int64 dim, int64 first_tile, int64 left, double scale,
               RowMap map, Lists lists, Records records, const Sum* row_smoothing,
               const double* smoothing_classifier, int parts, Sum* sums, int first, int last,
               Storage* out) {
  const int64 part = blockIdx.x, top = (first_tile + part) * kRowTile, count = *map.count;
  if (top >= count) return;
  __shared__ ProductStages stages;
  const int64 start = blockIdx.y * static_cast<int64>(kBlockN);
  const int* column = lists.column + part * lists.width;
  const int listed = lists.before[part * (lists.width / kBlockM + 1) + lists.width / kBlockM];
  const Sum* record = records.dz + part * lists.width * kRowTile;
  auto dz = [&](int k) { return record + static_cast<int64>(k) * kRowTile; };
  auto classifier = [&](int k) {
    const Storage* row = present_row(c, bias, left + column[k]);
    return row == nullptr ? nullptr : row + start;
  };
  const int width = static_cast<int>(min(dim - start, static_cast<int64>(kBlockN)));
  AcrossDepth<Sum, kBlockM, decltype(dz)> a{dz, listed, kRowTile};
  AcrossDepth<Storage, kBlockN, decltype(classifier)> b{classifier, listed, width};
  Sum product[kThreadM][kThreadN] = {};
  const int rows = static_cast<int>(min(static_cast<int64>(kRowTile), count - top));
  Sum* sum_at = sums + part * kRowTile * dim + start;
  auto add = [&](int i, int j, int64 at) { product[i][j] += sum_at[at]; };
  auto store = [&](int i, int j, int64 at) { sum_at[at] = product[i][j]; };
  // Before the product, which goes on where the range before ended.
  if (!first) each_sum(dim, rows, width, add);
  multiply(stages, a, b, listed, c.aligned != 0, product);
  if (!last) {
    each_sum(dim, rows, width, store);
    return;
  }
  const Places places;
#pragma unroll
  for (int i = 0; i < kThreadM; ++i) {
    const int64 row = top + places.row(i);
    if (row >= count) continue;
#pragma unroll
    for (int j = 0; j < kThreadN; ++j) {
      const int64 d = start + places.column(j);
      if (d >= dim) continue;
      Sum sum = product[i][j];
      if (smoothing_classifier != nullptr) {
        double whole = 0;
#pragma unroll 1
        for (int part = 0; part < parts; ++part) whole += smoothing_classifier[part * dim + d];
        sum -= row_smoothing[row] * static_cast<Sum>(whole);
      }
      out[map.source[row] * dim + d] = narrow(sum * static_cast<Sum>(scale));
    }
  }
}

// dC and dbias of a range, from every row tile of a part in turn, added to those of the parts
// before; tiles that list none of a block's columns are passed over. Grid: (column blocks of
// kBlockM, blocks of D).
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    dclassifier(Matrix e, int64 dim, int64 left, int64 right, double scale, RowMap map,
                Lists lists, Records records, int64 tile_begin, int64 tile_end,
                const Sum* smoothing, const double* smoothing_embedding, int parts,
                const double* row_smoothing_total, Sum* sums, double* bias_sums, int first, int last,
                Storage* out, Storage* bias_out) {
  __shared__ ProductStages stages;
  __shared__ int slot[kBlockM];
  const int block = blockIdx.x;
  const int64 start = blockIdx.y * static_cast<int64>(kBlockN);
  const int64 count = *map.count;
  const int columns = static_cast<int>(
      min(right - left - block * static_cast<int64>(kBlockM), static_cast<int64>(kBlockM)));
  const int width = static_cast<int>(min(dim - start, static_cast<int64>(kBlockN)));
  Sum* sum_at = sums + block * static_cast<int64>(kBlockM) * dim + start;
  Sum product[kThreadM][kThreadN] = {};
  // In double: there may be millions of rows, and a column has one thread.
  double bias_sum = 0;
  const int64 tiles = min(tile_end, (count + kRowTile - 1) / kRowTile);
  for (int64 tile = tile_begin; tile < tiles; ++tile) {
    const int64 part = tile - tile_begin;
    const int* before = lists.before + part * (lists.width / kBlockM + 1) + block;
    const int begin = before[0], end = before[1];
    if (begin == end) continue;
    __syncthreads();
    if (threadIdx.x < kBlockM) slot[threadIdx.x] = -1;
    __syncthreads();
    if (threadIdx.x < end - begin) {
      const int at = begin + threadIdx.x;
      slot[lists.column[part * lists.width + at] - block * kBlockM] = at;
    }
    __syncthreads();
    const int64 base = part * lists.width, top = tile * kRowTile;
    const int rows = static_cast<int>(min(static_cast<int64>(kRowTile), count - top));
    AlongDepth<Sum, kBlockM> a(
        [&](int x) {
          return slot[x] < 0 ? nullptr : records.dz + (base + slot[x]) * kRowTile;
        },
        kRowTile);
    auto embedding = [&](int k) { return e.row(map.source[top + k]) + start; };
    AcrossDepth<Storage, kBlockN, decltype(embedding)> b{embedding, rows, width};
    // Records are zeros where a tile has no more rows.
    multiply(stages, a, b, kRowTile, e.aligned != 0, product);
    if (records.column != nullptr && threadIdx.x < kBlockM && slot[threadIdx.x] >= 0)
      bias_sum += records.column[base + slot[threadIdx.x]];
  }
  const bool sums_bias = bias_out != nullptr && blockIdx.y == 0 && threadIdx.x < columns;
  const int64 bias_at = block * static_cast<int64>(kBlockM) + threadIdx.x;
  auto add = [&](int i, int j, int64 at) { product[i][j] += sum_at[at]; };
  auto store = [&](int i, int j, int64 at) { sum_at[at] = product[i][j]; };
  // After the products: a sum over millions of rows in one chain would lose what a row adds.
  if (!first) each_sum(dim, columns, width, add);
  if (sums_bias && !first) bias_sum += bias_sums[bias_at];
  if (!last) {
    each_sum(dim, columns, width, store);
    if (sums_bias) bias_sums[bias_at] = bias_sum;
    return;
  }
  const Places places;
#pragma unroll
  for (int i = 0; i < kThreadM; ++i) {
    const int64 column = left + block * static_cast<int64>(kBlockM) + places.row(i);
    if (column >= right) continue;
#pragma unroll
    for (int j = 0; j < kThreadN; ++j) {
      const int64 d = start + places.column(j);
      if (d >= dim) continue;
      Sum sum = product[i][j];
      if (smoothing_embedding != nullptr) {
        double whole = 0;
#pragma unroll 1
        for (int part = 0; part < parts; ++part) whole += smoothing_embedding[part * dim + d];
        sum -= smoothing[column] * static_cast<Sum>(whole);
      }
      out[column * dim + d] = narrow(sum * static_cast<Sum>(scale));
    }
  }
  if (!sums_bias) return;
  const int64 column = left + bias_at;
  if (row_smoothing_total != nullptr) bias_sum -= smoothing[column] * *row_smoothing_total;
  bias_out[column] = narrow(static_cast<Sum>(bias_sum));
}

// Parts of sum over rows of weight[row] * matrix[row]: out is (gridDim.y, dim), summed up where it
// is used. Rows are those of the map where it has any, else the first `rows` as they are; rows of
// removed entries and those of weight 0 are left out. Block: (32, 8). Grid: (blocks of 32, parts).
extern "C" __global__ void weighted_rows(Matrix matrix, int64 rows, int64 dim, RowMap map,
                                         const Sum* weight, double* out) {
  __shared__ double partial[8][32];
  const int64 d = blockIdx.x * 32ll + threadIdx.x;
  const int64 number = map.source == nullptr ? rows : *map.count;
  double sum = 0;
  if (d < dim)
    for (int64 i = blockIdx.y * 8ll + threadIdx.y; i < number; i += gridDim.y * 8ll) {
      const Sum w = weight[i];
      const int64 row = map.source == nullptr ? i : map.source[i];
      if (w != Sum(0)) sum += static_cast<double>(w) * static_cast<double>(widen(matrix.row(row)[d]));
    }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || d >= dim) return;
  for (int i = 1; i < 8; ++i) sum += partial[i][threadIdx.x];
  out[blockIdx.y * dim + d] = sum;
}

// The sum of the rows' factors of label smoothing. One block.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    sum_rows(RowMap map, const Sum* value, double* total) {
  __shared__ double partial[kThreads];
  double sum = 0;
  for (int64 i = threadIdx.x; i < *map.count; i += kThreads) sum += static_cast<double>(value[i]);
  partial[threadIdx.x] = sum;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) partial[threadIdx.x] += partial[threadIdx.x + step];
  }
  if (threadIdx.x == 0) *total = partial[0];
}
