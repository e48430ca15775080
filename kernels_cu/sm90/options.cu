// The forward for logits with bias, scale or softcap, for label smoothing, and for statistics.

#include "forward.cuh"

using namespace cce;

CCE_FORWARD(forward_options, 2, false, false)
CCE_FORWARD(forward_statistics, 2, false, true)
