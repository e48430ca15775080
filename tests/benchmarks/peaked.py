"""Synthetic inputs whose softmax is peaked like a trained model's.

Random inputs flatter a filter: every probability is about 1 / V and nearly all is dropped. Here
a direction of E carries a Zipf law over the vocabulary, every token has candidates of its own
and some that it shares with its neighbours, and the target is drawn from the softmax itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Peaked(NamedTuple):
    e: npt.NDArray[np.float32]
    c: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int64]


def peaked(
    tokens: int,
    dim: int,
    vocab: int,
    *,
    seed: int = 0,
    zipf: float = 1.4,
    noise: float = 1.5,
    candidates: int = 24,
    strength: float = 12.0,
) -> Peaked:
    """Make embeddings, classifier and targets.

    Parameters
    ----------
    tokens, dim, vocab : int
    seed : int
    zipf : float
        Exponent of the law that the logits follow along the common direction.
    noise : float
        Standard deviation of the logits of unrelated entries around that law.
    candidates : int
        Entries that each token, together with its neighbours, favours.
    strength : float
        How much the logit of the first candidate is raised at most, in the most certain token;
        the k-th gets 1 / sqrt(k) of it.
    """
    rng = np.random.default_rng(seed)
    c = rng.standard_normal((vocab, dim), dtype=np.float32) / np.float32(np.sqrt(dim))
    rank = rng.permutation(vocab) + 1
    c[:, 0] = -np.log(rank)
    e = rng.standard_normal((tokens, dim), dtype=np.float32) * np.float32(noise)
    e[:, 0] = zipf

    # Half of the candidates are shared by 16 neighbours, as words of one passage are.
    own = _zipf_entries(rng, rank, (tokens, candidates // 2))
    passage = _zipf_entries(rng, rank, (-(-tokens // 16), candidates - candidates // 2))
    shared = np.repeat(passage, 16, axis=0)[:tokens]
    both = rng.permuted(np.concatenate([own, shared], axis=1), axis=1)
    # Some tokens are all but certain, others open.
    certainty = np.float32(strength) * rng.uniform(0.2, 1.0, (tokens, 1)).astype(np.float32)
    for place in range(candidates):
        direction = c[both[:, place], 1:]
        direction = direction / (direction**2).sum(axis=1, keepdims=True)
        e[:, 1:] += certainty / np.float32(np.sqrt(place + 1)) * direction

    return Peaked(e, c, _sample(rng, e, c))


def _sample(
    rng: np.random.Generator, e: npt.NDArray[np.float32], c: npt.NDArray[np.float32]
) -> npt.NDArray[np.int64]:
    """Draw each token's target from its own softmax, so that the mean loss is the mean entropy."""
    best = np.full(len(e), -np.inf, np.float32)
    targets = np.zeros(len(e), np.int64)
    for first in range(0, len(c), 4096):
        # The largest logit after adding Gumbel noise is a sample of the softmax.
        score = e @ c[first : first + 4096].T
        score -= np.log(rng.standard_exponential(score.shape, dtype=np.float32) + np.float32(1e-30))
        place = score.argmax(axis=1)
        value = score[np.arange(len(e)), place]
        targets = np.where(value > best, first + place, targets)
        best = np.maximum(best, value)
    return targets


def _zipf_entries(
    rng: np.random.Generator, rank: npt.NDArray[Any], shape: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """Draw vocabulary entries with probability about 1 / rank."""
    by_rank = np.argsort(rank)
    drawn = np.exp(rng.random(shape) * np.log(len(rank))).astype(np.int64) - 1
    return by_rank[np.minimum(drawn, len(rank) - 1)]
