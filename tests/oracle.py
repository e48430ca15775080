"""The oracle: the loss, its statistics and its gradients from the whole logit matrix, in float64.

It materialises every N x V matrix, knows no tiles, no filter and no running sums, and spells the
formulas out one by one. `test_oracle.py` compares it with PyTorch's cross_entropy and autograd.
"""

import numpy as np


class Oracle:
    """One call, evaluated densely. Takes the arguments of `linear_cross_entropy` that have a value.

    The matrices hold one row for each of the M *valid* tokens: those that are paired with an
    embedding (see shift) and not ignored, in the flattened order of the targets. At least one
    vocabulary entry must be present (bias above -inf) when M > 0.

    Attributes
    ----------
    e_rows, t_rows : (M,) int
        Flat positions of the valid tokens in the batch of e and in targets.
    e : (M, D), c : (V, D), bias : (V,)
    target : (M,) int
    present : (V,) bool
        Entries that a bias of -inf has not removed.
    x, z, slope, p : (M, V)
        Logits before and after softcap, dz/dx, softmax.
    lse, nll, token_loss : (M,)
    weight : (M,)
        Token weight times class weight of the target: what "mean" divides by the sum of.
    loss : () or targets' shape
    """

    def __init__(
        self,
        e,
        c,
        targets,
        bias=None,
        *,
        ignore_index=-100,
        softcap=None,
        reduction="mean",
        shift=0,
        logit_scale=1.0,
        label_smoothing=0.0,
        z_loss=0.0,
        class_weight=None,
        token_weight=None,
    ):
        self.e_shape, self.shape = e.shape, targets.shape
        self.has_bias = bias is not None
        self.reduction, self.softcap, self.logit_scale = reduction, softcap, logit_scale
        self.label_smoothing, self.z_loss = label_smoothing, z_loss

        # Pair e[..., i, :] with targets[..., i + shift] and leave the ignored tokens out.
        position = np.arange(targets.size).reshape(targets.shape)
        e_rows, t_rows = position, position
        if shift:
            e_rows, t_rows = position[..., :-shift], position[..., shift:]
        valid = (targets.ravel()[t_rows] != ignore_index).ravel()
        self.e_rows, self.t_rows = e_rows.ravel()[valid], t_rows.ravel()[valid]

        vocab, dim = c.shape
        self.c = c.astype(np.float64)
        self.e = e.astype(np.float64).reshape(targets.size, dim)[self.e_rows]
        self.target = targets.ravel()[self.t_rows].astype(np.int64)
        self.bias = bias.astype(np.float64) if self.has_bias else np.zeros(vocab)
        self.class_weight = (
            np.ones(vocab) if class_weight is None else class_weight.astype(np.float64)
        )
        self.token_weight = (
            np.ones(targets.size) if token_weight is None else token_weight.astype(np.float64)
        ).reshape(-1)[self.t_rows]
        self.present = self.bias != -np.inf

        self.x = logit_scale * (self.e @ self.c.T) + self.bias
        self.slope = np.ones_like(self.x)
        self.z = self.x
        if softcap is not None:
            tanh = np.tanh(self.x / softcap)
            self.z, self.slope = softcap * tanh, 1 - tanh**2
        self.z = np.where(self.present, self.z, -np.inf)

        if len(self.e_rows):
            largest = self.z.max(axis=1)
            self.lse = largest + np.log(np.exp(self.z - largest[:, None]).sum(axis=1))
        else:
            self.lse = np.zeros(0)
        self.p = np.exp(self.z - self.lse[:, None])

        self.nll = self.lse - self.z[np.arange(len(self.target)), self.target]
        self.target_weight = self.class_weight[self.target]
        # The weights of label smoothing: a / V' for each of the V' present entries.
        self.smooth = np.where(self.present, self.class_weight, 0.0) * (
            label_smoothing / max(self.present.sum(), 1)
        )
        below_lse = self.lse[:, None] - np.where(self.present, self.z, 0.0)
        self.token_loss = self.token_weight * (
            (1 - label_smoothing) * self.target_weight * self.nll
            + below_lse @ self.smooth
            + z_loss * self.target_weight * self.lse**2
        )
        self.weight = self.token_weight * self.target_weight
        self.denominator = self.weight.sum()
        if reduction == "none":
            self.loss = self.scatter(self.token_loss)
        elif reduction == "sum":
            self.loss = self.token_loss.sum()
        else:
            self.loss = self.token_loss.sum() / self.denominator if self.denominator else 0.0

    def scatter(self, values, fill=0):
        """Values of the valid tokens, at their targets' places; `fill` everywhere else."""
        out = np.full(self.shape, fill, dtype=values.dtype)
        out.reshape(-1)[self.t_rows] = values
        return out

    def gather(self, upstream):
        """The valid tokens' entries of an array in the targets' shape."""
        return np.asarray(upstream).astype(np.float64).reshape(-1)[self.t_rows]

    def upstream(self, dloss=1.0):
        """dloss / d(token loss) of each valid token."""
        if self.reduction == "none":
            return self.gather(np.broadcast_to(dloss, self.shape))
        scale = 1.0
        if self.reduction == "mean":
            scale = 1 / self.denominator if self.denominator else 0.0
        return np.full(len(self.target), float(dloss) * scale)

    def coefficient(self, dloss=1.0, dlse=None):
        """What multiplies p[i, :] in dz[i, :]: the gradient with respect to lse[i]."""
        by_lse = (
            (1 - self.label_smoothing) * self.target_weight
            + self.smooth.sum()
            + 2 * self.z_loss * self.target_weight * self.lse
        )
        result = self.upstream(dloss) * self.token_weight * by_lse
        return result if dlse is None else result + self.gather(dlse)

    def dlogits(self, dloss=1.0, dlse=None):
        """Gradient with respect to z, (M, V), as (softmax part, constant part).

        The softmax part holds coefficient * p and the target's own term; the constant part is that
        of label smoothing.
        """
        upstream = self.upstream(dloss) * self.token_weight
        softmax = self.coefficient(dloss, dlse)[:, None] * self.p
        softmax[np.arange(len(self.target)), self.target] -= (
            upstream
            * (1 - self.label_smoothing)
            * self.target_weight
            * self.present[self.target]  # the target's term of a removed entry is a constant
        )
        return softmax, -upstream[:, None] * self.smooth

    def products(self, dz):
        """Gradients with respect to e, c and bias from those with respect to z, (M, V)."""
        dx = np.where(self.present, dz * self.slope, 0.0)
        de = np.zeros((int(np.prod(self.shape)), self.c.shape[1]))
        de[self.e_rows] = self.logit_scale * (dx @ self.c)
        dc = self.logit_scale * (dx.T @ self.e)
        return de.reshape(self.e_shape), dc, dx.sum(axis=0) if self.has_bias else None

    def gradients(self, dloss=1.0, dlse=None):
        """(de, dc, dbias) of sum(dloss * loss) + sum(dlse * lse); dbias is None without a bias."""
        softmax, constant = self.dlogits(dloss, dlse)
        return self.products(softmax + constant)

    def statistics(self):
        """(log_prob, lse, entropy, argmax) in the targets' shape."""
        if not len(self.target):
            zeros = np.zeros(self.shape)
            return zeros, zeros, zeros, np.full(self.shape, -1)
        entropy = -(self.p * np.log(np.where(self.p > 0, self.p, 1.0))).sum(axis=1)
        return (
            self.scatter(-self.nll),
            self.scatter(self.lse),
            self.scatter(entropy),
            self.scatter(np.argmax(self.z, axis=1), fill=-1),
        )
