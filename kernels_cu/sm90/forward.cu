// The forward for plain logits: products as they are, of which nothing but sums is asked for. What else
// there can be is so much code that it delays those who do not need it; see options.cu.

#include "forward.cuh"

using namespace cce;

// Pairs of blocks share the columns they copy.
CCE_FORWARD(forward_pairs, 2, true, false)
// For up to one row tile: nobody to share with.
CCE_FORWARD(forward_single, 1, true, false)
