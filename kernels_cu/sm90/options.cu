// The forward for logits with bias, scale or softcap, and for label smoothing.

#include "forward.cuh"

using namespace cce;

CCE_FORWARD(forward_options, 2, false, false)
