// The forward with statistics, for any logits. A file of its own: with others it compiles for ten seconds.

#include "forward.cuh"

using namespace cce;

CCE_FORWARD(forward_statistics, 2, false, true)
