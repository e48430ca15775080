// dbias of a chunk on Hopper.
#pragma once

#include "lists.cuh"

namespace cce {

// A column of a block for each thread of a group. In double: there may be millions of
// rows.
__device__ __forceinline__ void form_bias(const Shared& shared, const BackwardArguments& call,
                                          const Chunk& chunk, int row_tiles) {
  const int group = blockIdx.x * kConsumers + threadIdx.x / kGroupThreads - 1;
  const int groups = gridDim.x * kConsumers, column = threadIdx.x % kGroupThreads;
  const int bit = column % kColumnChunk;
  const float scale = record_scale(call.largest);
  for (int block = chunk.first + group; block < chunk.last; block += groups) {
    const int at = call.order.column_at(block * kOrderBlock + column);
    double sum = 0;
    for (int tile = 0; tile < row_tiles; ++tile) {
      int rank = shared.start[tile] + call.order.kept_before(tile, block);
      for (int k = 0; k < column / kColumnChunk; ++k)
        rank += __popc(call.order.kept_word(tile, block, k));
      const uint32 own = call.order.kept_word(tile, block, column / kColumnChunk);
      if (own >> bit & 1) sum += call.dz_sum[rank + __popc(own & ((1u << bit) - 1u))];
    }
    if (at < 0) continue;
    float whole = static_cast<float>(sum / scale);
    if (call.smoothing_class != nullptr)
      whole -= static_cast<float>(call.smoothing_class[at] * *call.smoothing_rows);
    call.dbias[at] = narrow(whole);
  }
}

}  // namespace cce
