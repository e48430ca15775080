// The backward for logits with bias, scale or softcap, and for label smoothing.

#include "chunks.cuh"

using namespace cce;

CCE_BACKWARD(backward_options, false)
