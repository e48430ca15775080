"""Synthetic inputs with the softmax profile of a trained model, and the profile of any inputs.

The rows of C are random unit vectors but for their first element, which holds how popular an entry
is: a power law of its place in the vocabulary times a wide log-normal. A token's logits are that,
plus Gaussian noise of its own, plus noise that a document's tokens share, plus a few candidates
whose logits are set: half of them its own, half those of its 16 neighbours. Unit vectors of many
dimensions are all but orthogonal, so each part does to the logits what is asked of it, whatever D
and V are; what the candidates add by chance to all other logits is taken out of the token's noise.

`Peaks` was calibrated to Gemma 3 270M on English text (V = 262144, D = 640).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

ROW_TILE = 128
COLUMN_TILE = 128
COLUMN_CHUNK = 32
PASSAGE = 16
"""Neighbours that share candidates."""

ORDER = 1
"""Seed of the popularity's order."""

THRESHOLDS = (12, 14, 16, 18, 20)
"""Of the profile: eps = 2^-n."""

_CHUNK_ELEMENTS = 2**27
"""Logits that are held at a time."""


@dataclass(frozen=True)
class Peaks:
    """The law of the logits.

    Attributes
    ----------
    zipf, flat : float
        Popularity falls as (place / V + flat)^-zipf.
    spread : float
        Standard deviation of log popularity around that law.
    topic, own : float
        Standard deviation over the vocabulary of the logits' noise that a document shares, and of
        what is the token's.
    document : int
        Tokens of a document.
    candidates : int
        Entries that a token favours.
    power : float
        The k-th candidate's probability falls as k^-power.
    odds, odds_spread : float
        Mean and standard deviation over tokens of the log odds of the candidates, all together,
        against the rest of the vocabulary.
    """

    zipf: float = 2.32
    flat: float = 0.015
    spread: float = 3.45
    topic: float = 0.58
    own: float = 2.85
    document: int = 512
    candidates: int = 8
    power: float = 1.55
    odds: float = -1.49
    odds_spread: float = 2.0


class Inputs(NamedTuple):
    e: torch.Tensor
    c: torch.Tensor
    targets: torch.Tensor


def make_inputs(
    tokens: int,
    dim: int,
    vocab: int,
    peaks: Peaks | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    seed: int = 0,
) -> Inputs:
    """Make e (tokens, dim) and c (vocab, dim), and draw each target from its token's softmax."""
    peaks = peaks or Peaks()
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    popularity = _popularity(vocab, peaks).to(device)
    c = torch.empty(vocab, dim, dtype=dtype, device=device)
    for part in _parts(vocab, dim):
        c[part] = (normal(part.stop - part.start, dim) / math.sqrt(dim)).to(dtype)
    c[:, 0] = popularity.to(dtype)

    # What each candidate's logit shall be: its share of the odds against all other entries, the
    # mean of whose exponentials the noise raises.
    ids = _candidates(tokens, vocab, peaks.candidates, uniform)
    shares = -peaks.power * torch.arange(1, peaks.candidates + 1, device=device).log()
    odds = peaks.odds + peaks.odds_spread * normal(tokens, 1)
    rest = popularity.double().logsumexp(0).item() + (peaks.topic**2 + peaks.own**2) / 2
    wanted = rest + odds + shares.log_softmax(0)

    # Raising a logit by b along a unit vector adds noise of variance b^2 / D to all others.
    noise = peaks.topic**2 + peaks.own**2
    raised = ((wanted - popularity[ids]) ** 2 + noise).sum(1) / dim
    own = (peaks.own**2 - raised).clamp(min=0).sqrt()

    e = torch.empty(tokens, dim, dtype=dtype, device=device)
    topics = peaks.topic * normal(-(-tokens // peaks.document), dim)
    for part in _parts(tokens, 4 * dim):
        some = own[part, None] * normal(part.stop - part.start, dim)
        some += topics[torch.arange(part.start, part.stop, device=device) // peaks.document]
        some[:, 0] = 1
        _raise_candidates(some, c, ids[part], wanted[part])
        e[part] = some.to(dtype)
    return Inputs(e, c, _draw_targets(e, c, generator))


def _popularity(vocab: int, peaks: Peaks) -> torch.Tensor:
    place = (torch.arange(vocab) + 0.5) / vocab
    # A few entries hold much of the whole. Quantiles, in the order of a seed that is always the
    # same and on every device, keep the profile of one seed from differing from another's.
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(ORDER))
    law = -peaks.zipf * (place + peaks.flat).log()
    return law - law.mean() + peaks.spread * torch.special.ndtri(place)[order]


def _candidates(
    tokens: int, vocab: int, number: int, uniform: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Return entries (tokens, number), places drawn with probability about 1 / place."""

    def draw(rows: int, columns: int) -> torch.Tensor:
        return (uniform(rows, columns) * math.log(vocab)).exp().long().clamp(1, vocab) - 1

    passages = draw(-(-tokens // PASSAGE), number // 2).repeat_interleave(PASSAGE, dim=0)
    both = torch.cat([draw(tokens, number - number // 2), passages[:tokens]], dim=1)
    return both.gather(1, uniform(tokens, number).argsort(1))


def _raise_candidates(
    e: torch.Tensor, c: torch.Tensor, ids: torch.Tensor, wanted: torch.Tensor
) -> None:
    """Give the candidates the logits that are wanted, in place, leaving e[:, 0] as it is."""
    # Each step disturbs the other candidates a little; after three rounds nothing is left of it.
    for place in 3 * list(range(ids.shape[1])):
        row = c[ids[:, place]].float()
        missing = wanted[:, place] - (e * row).sum(1)
        row[:, 0] = 0
        e += (missing / (row * row).sum(1))[:, None] * row


def _draw_targets(e: torch.Tensor, c: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    best = torch.full((len(e),), -torch.inf, device=e.device)
    targets = torch.zeros(len(e), dtype=torch.int64, device=e.device)
    for first, logits in logit_chunks(e, c):
        # The largest logit after adding Gumbel noise is a sample of the softmax.
        gumbel = torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-30)
        value, place = logits.sub_(gumbel.log_()).max(dim=1)
        targets = torch.where(value > best, first + place, targets)
        best = torch.maximum(best, value)
    return targets


@dataclass(frozen=True)
class Profile:
    """What a softmax looks like to a filter. All but the loss are fractions.

    Attributes
    ----------
    loss : float
        Mean, in nats.
    threshold : dict of int to float
        (Row tile of 128, column) pairs in which any p >= 2^-n, or with a target; by n.
    unbiased : float
        Pairs that the unbiased filter keeps at 2^-14, on average over seeds.
    default : float
        The same at the eps that bfloat16 gets by default, 16 / V.
    tiles : float
        128 x 128 tiles in which any p >= 2^-12.
    union, one, half : float
        Of the vocabulary, at a draw of the unbiased filter at 2^-14: columns that any row tile
        keeps, one alone, and at least half of all.
    near, far : float
        How much the kept columns of a row tile and the next, and of tiles half of the text apart,
        have in common (intersection over union).
    """

    loss: float
    threshold: dict[int, float]
    unbiased: float
    default: float
    tiles: float
    union: float
    one: float
    half: float
    near: float
    far: float


GEMMA3 = Profile(
    loss=2.84,
    threshold={12: 0.014, 14: 0.029, 16: 0.054, 18: 0.093, 20: 0.149},
    unbiased=0.052,
    default=0.052,
    tiles=0.43,
    union=0.29,
    one=0.088,
    half=0.036,
    near=0.395,
    far=0.333,
)
"""Measured: Gemma 3 270M, 8192 tokens of English text, V = 262144, D = 640. near and far are of
the forward's bits, which are a few more."""


def measure_profile(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> Profile:
    """Return the profile of inputs, from float32 logits that are formed a chunk at a time.

    Ignored tokens, whose target is negative, are left out. Holds a few float32 for each (row tile,
    column) pair.
    """
    counted = targets >= 0
    if not counted.all():
        e, targets = e[counted], targets[counted]
    tokens, vocab = len(e), len(c)
    tiles, device = -(-tokens // ROW_TILE), e.device
    lse = torch.full((tokens,), -torch.inf, device=device)
    target_logit = torch.empty(tokens, device=device)
    for first, logits in logit_chunks(e, c):
        lse = torch.logaddexp(lse, logits.logsumexp(1))
        here = (targets >= first) & (targets < first + logits.shape[1])
        place = (targets - first).clamp(0, logits.shape[1] - 1)
        target_logit = torch.where(here, logits.gather(1, place[:, None])[:, 0], target_logit)

    whole = -(-vocab // COLUMN_TILE) * COLUMN_TILE
    largest = torch.zeros(tiles, whole, device=device)
    for first, logits in logit_chunks(e, c):
        p = logits.sub_(lse[:, None]).exp_()
        p = torch.nn.functional.pad(p, (0, 0, 0, tiles * ROW_TILE - tokens))
        columns = slice(first, first + p.shape[1])
        largest[:, columns] = p.view(tiles, ROW_TILE, -1).amax(1)
    in_tile = largest.view(tiles, -1, COLUMN_TILE).amax(2) >= 2.0**-12
    largest[torch.arange(tokens, device=device) // ROW_TILE, targets] = 1

    pairs = tiles * vocab
    generator = torch.Generator(device).manual_seed(0)
    draw = torch.rand(tiles, whole // COLUMN_CHUNK, generator=generator, device=device)
    draw = draw.repeat_interleave(COLUMN_CHUNK, dim=1)
    kept = largest >= 2.0**-14 * (1 - draw)
    keepers = kept.sum(0)
    return Profile(
        loss=(lse - target_logit).double().mean().item(),
        threshold={n: (largest >= 2.0**-n).sum().item() / pairs for n in THRESHOLDS},
        unbiased=(largest / 2.0**-14).clamp_(max=1).sum(dtype=torch.float64).item() / pairs,
        default=(largest / (16 / vocab)).clamp_(max=1).sum(dtype=torch.float64).item() / pairs,
        tiles=in_tile.double().mean().item(),
        union=(keepers > 0).sum().item() / vocab,
        one=(keepers == 1).sum().item() / vocab,
        half=(keepers >= max(tiles // 2, 1)).sum().item() / vocab,
        near=_overlap(kept, 1),
        far=_overlap(kept, max(tiles // 2, 1)),
    )


def _overlap(kept: torch.Tensor, distance: int) -> float:
    pairs = [(kept[t], kept[t + distance]) for t in range(len(kept) - distance)]
    parts = [((a & b).sum() / (a | b).sum()).item() for a, b in pairs]
    return sum(parts) / len(parts) if parts else 1.0


def reference_loss(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the mean loss in float64, over the tokens whose target is not negative."""
    counted = targets >= 0
    e, targets = e[counted].double(), targets[counted]
    lse = torch.full((len(e),), -torch.inf, dtype=torch.float64, device=e.device)
    for _, logits in logit_chunks(e, c):
        lse = torch.logaddexp(lse, logits.logsumexp(1))
    target_logit = torch.empty_like(lse)
    for part in _parts(len(e), e.shape[1]):
        target_logit[part] = (e[part] * c[targets[part]].double()).sum(1)
    return (lse - target_logit).mean().item()


def logit_chunks(e: torch.Tensor, c: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield first column and logits (N, some columns): float64 for float64 e, else float32."""
    wide = torch.float64 if e.dtype == torch.float64 else torch.float32
    rows = e.to(wide)
    for part in _parts(len(c), max(len(e), e.shape[1]), COLUMN_TILE):
        yield part.start, rows @ c[part].to(wide).T


def _parts(rows: int, width: int, unit: int = 1) -> Iterator[slice]:
    """Cut rows into parts of a bounded number of elements, of whole units."""
    step = max(_CHUNK_ELEMENTS // max(width, 1) // unit * unit, unit)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
