"""Every tolerance of the tests, derived from dtypes, reduction lengths and the data at hand.

The model is the usual one of rounding analysis (Higham, "Accuracy and Stability of Numerical
Algorithms", chapters 2 to 4): every operation returns its exact result times (1 + d), |d| <= u,
with u the unit roundoff of the dtype that accumulates: 2^-24 for float32 (all half-precision inputs
included), 2^-53 for float64. A sum of n terms then errs by at most (n - 1) u sum|terms| in any
order. Rounding errors of long sums cancel like a random walk, so for n > 36 the factor n is
replaced by 6 sqrt(n) (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis",
2019: a bound of lambda sqrt(n) u fails with a probability below 2 exp(-lambda^2 / 2); lambda = 6
makes that 3e-8 if errors were as large and as independent as the model has them; real sums are
blocked and stay far below).

Sums of absolute values come from the actual data (|E| |C|^T and the like, never the values of the
results, which may have cancelled), and errors are followed from the logits to the gradients:

    logits      a dot product over D, then scale, bias, softcap
    lse         the logits' errors weighted by p, a sum over V
    p           exp of two numbers with errors: a relative error of p
    dz          p's error times its factor, and the roundings of forming it
    dE          a product over V of dz and C, dC and dbias over N; where dz is kept in the inputs'
                dtype between, it is rounded to it (`Tolerances.rounds_dz`)

The oracle itself is float64: u_oracle = 2^-53 is added to u, which matters for float64 alone.
What comes back in the inputs' dtype is rounded once more, by half a unit of that dtype.
"""

import ml_dtypes
import numpy as np

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# exp, log and tanh of NumPy and of libm are within 4 units in the last place: 8 unit roundoffs.
FUNCTION = 8
LAMBDA = 6


def accumulator(dtype):
    """Name of the dtype of sums, of the loss and of lse."""
    return "float64" if dtype == "float64" else "float32"


def unit_roundoff(dtype):
    return float(ml_dtypes.finfo(DTYPES[dtype]).eps) / 2


def smallest(dtype):
    """Spacing of the subnormal numbers."""
    return float(ml_dtypes.finfo(DTYPES[dtype]).smallest_subnormal)


def terms(n):
    """Growth of the rounding error of a sum of n terms, in unit roundoffs."""
    return min(n, LAMBDA * np.sqrt(n))


def rounding(values, dtype):
    """Error of rounding exact values to a dtype."""
    return unit_roundoff(dtype) * np.abs(values) + smallest(dtype)


class Tolerances:
    """Bounds on the errors of an implementation, for one evaluated `oracle.Oracle`.

    Arrays that belong to valid tokens are scattered to the targets' shape by the methods, and are
    zero where the tests expect exact zeros.
    """

    rounds_dz = False
    """Whether dz of half precision is kept as such where rows of D come in words of 16 bytes."""

    def __init__(self, oracle, dtype):
        self.oracle, self.dtype, self.sums = oracle, dtype, accumulator(dtype)
        self.u = u = unit_roundoff(self.sums) + unit_roundoff("float64")
        n, v = oracle.z.shape
        d = oracle.c.shape[1]
        self.over_tokens, self.over_vocab = terms(n) * u, terms(v) * u

        # Logits. The magnitude is what the sums run over: |scale| |E| |C|^T + |bias|.
        present = oracle.present
        bias = np.abs(np.where(present, oracle.bias, 0.0))
        products = np.abs(oracle.logit_scale) * (np.abs(oracle.e) @ np.abs(oracle.c.T))
        self.magnitude = np.where(present, products + bias, 0.0)
        x = np.where(present, oracle.x, 0.0)
        z = np.where(present, oracle.z, 0.0)
        self.z = (terms(d) + 2) * u * products + u * self.magnitude
        if oracle.softcap is not None:
            # tanh contracts; x / cap is rounded, tanh is a function, the product is rounded.
            self.z = self.z + u * np.abs(x) * oracle.slope + (FUNCTION + 2) * u * np.abs(z)

        # lse = m + log sum exp(z - m), in any order and with any sequence of running maxima m: the
        # roundings of z - m add up to |z - max z|, their weights are p.
        below_max = np.where(present, z.max(axis=1, initial=-np.inf)[:, None] - z, 0.0)
        relative = self.z + u * below_max
        self.lse = (
            (oracle.p * relative).sum(axis=1)
            + 2 * self.over_vocab
            + (2 * FUNCTION + 2) * u
            + 2 * u * np.abs(oracle.lse)
        )

        # p = exp(z - lse), the difference possibly of numbers scaled by log2(e): hence |z|, |lse|.
        self.exponent = (
            self.z + self.lse[:, None] + 2 * u * (np.abs(z) + np.abs(oracle.lse)[:, None])
        )
        # Below the normal numbers a result may be flushed to zero: that of exp anywhere, that of
        # any operation on a GPU (docs/gpu.md).
        self.flushed = float(ml_dtypes.finfo(DTYPES[self.sums]).smallest_normal)
        self.p = oracle.p * np.expm1(self.exponent + FUNCTION * u) + self.flushed
        self.below_max = below_max

    def _of_target(self, matrix):
        return matrix[np.arange(len(self.oracle.target)), self.oracle.target]

    def nll(self):
        error = self.lse + self._of_target(self.z)
        return error + self.u * np.where(np.isfinite(self.oracle.nll), self.oracle.nll, 0.0)

    def token_loss(self):
        """Per valid token, with a few roundings for each product and sum of the definition."""
        o, u = self.oracle, self.u
        nll = np.where(np.isfinite(o.nll), o.nll, 0.0)
        plain = (1 - o.label_smoothing) * o.target_weight
        smooth_size = (np.abs(o.lse)[:, None] + self.magnitude) @ o.smooth
        smooth = (self.lse[:, None] + self.z) @ o.smooth + self.over_vocab * smooth_size
        z_loss = o.z_loss * o.target_weight * (2 * np.abs(o.lse) * self.lse + self.lse**2)
        size = plain * nll + smooth_size + o.z_loss * o.target_weight * o.lse**2
        return o.token_weight * (plain * self.nll() + smooth + z_loss + 6 * u * size)

    def loss(self):
        o = self.oracle
        error = self.token_loss()
        values = np.where(np.isfinite(o.token_loss), np.abs(o.token_loss), 0.0)
        if o.reduction == "none":
            return o.scatter(error + rounding(values, self.sums))
        total, size = error.sum() + self.over_tokens * values.sum(), values.sum()
        if o.reduction == "mean":
            # The denominator is a sum over N too, of positive terms.
            scale = 1 / o.denominator if o.denominator else 0.0
            total, size = (total + (self.over_tokens + 2 * self.u) * size) * scale, size * scale
        return total + rounding(size, self.sums)

    def scattered_lse(self):
        return self.oracle.scatter(self.lse + rounding(self.oracle.lse, self.sums))

    def gradients(self, dloss=1.0, dlse=None):
        """Bounds for (de, dc, dbias); dbias is None without a bias."""
        return self.products(*self.dlogits(dloss, dlse), self.oracle.gradients(dloss, dlse))

    def dlogits(self, dloss=1.0, dlse=None):
        """(error, magnitude) of dz, (M, V): the magnitude is the sum of its parts' absolutes."""
        o, u = self.oracle, self.u
        upstream = np.abs(o.upstream(dloss)) * o.token_weight
        if o.reduction == "mean":
            upstream = upstream * (1 + self.over_tokens)
        plain = (1 - o.label_smoothing) * o.target_weight
        by_lse = plain + o.smooth.sum() + 2 * o.z_loss * o.target_weight * np.abs(o.lse)
        size = upstream * by_lse
        if dlse is not None:
            size = size + np.abs(o.gather(dlse))
        error = (
            upstream * 2 * o.z_loss * o.target_weight * self.lse
            + upstream * self.over_vocab * o.smooth.sum()
            + 8 * u * size
        )
        if o.reduction == "mean":
            error = error + self.over_tokens * size
        magnitude = size[:, None] * o.p + upstream[:, None] * o.smooth
        magnitude[np.arange(len(o.target)), o.target] += upstream * plain
        rounded = 4 * u + (self.over_tokens if o.reduction == "mean" else 0.0)
        dz = (size + error)[:, None] * self.p + error[:, None] * o.p + rounded * magnitude
        return dz, magnitude

    def products(self, dz, magnitude, gradients):
        """Bounds for (de, dc, dbias) from error and magnitude of dz and the exact gradients."""
        o, u = self.oracle, self.u
        scale = np.abs(o.logit_scale)
        error, size = np.where(o.present, dz * o.slope, 0.0), magnitude * o.slope
        if o.softcap is not None:
            # slope = 1 - (z / cap)^2: its error is absolute.
            error = error + np.where(
                o.present, magnitude * (2 * self.z / o.softcap + (2 * FUNCTION + 4) * u), 0.0
            )
        # Three products and two differences make a dz; then each term of a sum may be flushed.
        error = error + np.where(o.present, 5 * self.flushed, 0.0)
        n, v = size.shape
        kept = 0.0
        if self.rounds_dz and self.dtype in ("bfloat16", "float16") and o.c.shape[1] % 8 == 0:
            kept = unit_roundoff(self.dtype) * size
        de_valid = scale * (error + kept + (self.over_vocab + 3 * u) * size) @ np.abs(o.c)
        de_valid += (v + 1) * self.flushed
        dc = scale * (error + kept + (self.over_tokens + 3 * u) * size).T @ np.abs(o.e)
        dc += np.where(o.present[:, None], (n + 1) * self.flushed, 0.0)
        dbias = (error + (self.over_tokens + 3 * u) * size).sum(axis=0)
        de = np.zeros((int(np.prod(o.shape)), o.c.shape[1]))
        de[o.e_rows] = de_valid + rounding(gradients[0].reshape(de.shape)[o.e_rows], self.dtype)
        return (
            de.reshape(o.e_shape),
            dc + rounding(gradients[1], self.dtype),
            dbias + rounding(gradients[2], self.dtype) if o.has_bias else None,
        )

    def statistics(self):
        """Bounds for (log_prob, lse, entropy); argmax has the bounds of z, see its test."""
        o = self.oracle
        log_prob = self.nll() + rounding(np.where(np.isfinite(o.nll), o.nll, 0.0), self.sums)
        # entropy = lse - sum p z, or with both measured from a running reference near lse or max z.
        distance = self.below_max + 1 + np.log(max(o.z.shape[1], 1))
        z_error = self.z + self.u * self.below_max
        entropy = self.lse + (
            self.p * distance + o.p * (z_error + (self.over_vocab + 4 * self.u) * distance)
        ).sum(axis=1)
        return (
            o.scatter(log_prob),
            self.scattered_lse(),
            o.scatter(entropy + rounding(o.lse, self.sums)),
        )


def excess(found, expected, allowed):
    """Largest |found - expected| / allowed; infinite where only one of them is finite.

    Where nothing is allowed the two must be equal.
    """
    found = np.asarray(found).astype(np.float64)
    expected, allowed = np.asarray(expected, np.float64), np.asarray(allowed, np.float64)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(same, 0.0, np.abs(found - expected) / allowed)
    return float(np.nan_to_num(ratio, nan=np.inf, posinf=np.inf).max(initial=0.0))


def assert_within(found, expected, allowed, what):
    """The test's verdict: every element within its own bound."""
    worst = excess(found, expected, allowed)
    assert worst <= 1, f"{what}: {worst:.3g} times the allowed error"
