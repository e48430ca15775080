"""The CPU backend: the column plan in NumPy and its BLAS, and the specification of the kernels.

The forward visits every logit once, block by block, and leaves each token's log-sum-exp and, for
each row tile, one bit a column that says whether the backward will touch it. The backward
recomputes the logits of those columns, gathered, and forms the gradients from them. Without a
filter it is the same with all columns kept.
"""
