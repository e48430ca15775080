"""What the rows of a record are called: gpu.py writes these names, report.py reads them."""

VENDOR = "vendor GEMM"
FOUR_PRODUCTS = "four products"

OURS = "ours, "
FORWARD_BITS = f"{OURS}forward + kept bits"
FORWARD = f"{OURS}forward alone"
GRADIENTS = f"{OURS}loss + gradients"
UNFILTERED = f"{OURS}loss + gradients, no filter"
