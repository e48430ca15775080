// The backward for plain logits: products as they are, without label smoothing. What else there can be is so
// much code that it delays those who do not need it; see backward_options.cu.

#include "chunks.cuh"

using namespace cce;

CCE_BACKWARD(backward, true)
