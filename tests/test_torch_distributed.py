"""Several processes over gloo: DistributedDataParallel, FSDP2, DTensor classifiers.

Each rank holds tokens of its own; the expected gradient is the mean, or the sum, of the ranks'
gradients, which one process computes from the logits.
"""

import os
import sys
import traceback
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

import cce_cupy  # noqa: E402
from cce_cupy.torch import LinearCrossEntropyLoss  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)
RANKS, DIM, VOCAB = 2, 8, 50


class Model(torch.nn.Module):
    """An embedding, a layer, and the loss with a classifier of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCAB, DIM, dtype=torch.float64)
        self.layer = torch.nn.Linear(DIM, DIM, dtype=torch.float64)
        self.loss = LinearCrossEntropyLoss(DIM, VOCAB, bias=True, dtype=torch.float64, shift=1)

    def forward(self, tokens, targets):
        return self.loss(torch.tanh(self.layer(self.embed(tokens))), targets)


def batch(rank):
    """Tokens and targets of a rank; the last rank's count for nothing."""
    tokens = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(rank))
    return tokens, tokens if rank < RANKS - 1 else torch.full_like(tokens, -100)


def dense(model, tokens, targets):
    hidden = torch.tanh(model.layer(model.embed(tokens)))[:, :-1]
    logits = model.loss.linear(hidden).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, targets[:, 1:].flatten(), reduction="sum")
    return loss / max(int((targets[:, 1:] != -100).sum()), 1)


def expected(divisor):
    """The ranks' gradients, summed up over all ranks and divided."""
    model = Model()
    for rank in range(RANKS):
        (dense(model, *batch(rank)) / divisor).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(model, wanted):
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(whole(found[name]), gradient)


def data_parallel(rank):
    model = torch.nn.parallel.DistributedDataParallel(Model())
    model(*batch(rank)).backward()
    check(model, expected(divisor=RANKS))


def data_parallel_compiled(rank):
    model = torch.nn.parallel.DistributedDataParallel(Model())
    torch.compile(model, backend="aot_eager")(*batch(rank)).backward()
    check(model, expected(divisor=RANKS))


def fully_sharded(rank):
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard(model.layer)
    fully_shard(model.loss)
    fully_shard(model)
    assert hasattr(model.loss.linear.weight, "full_tensor")
    for _ in range(2):
        model.zero_grad()
        model(*batch(rank)).backward()
        check(model, expected(divisor=RANKS))


def sharded_classifier():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    value = torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(7))
    return value, torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))


def dtensor_refused(rank):
    _, c = sharded_classifier()
    e, targets = torch.randn(4, DIM), torch.arange(4)
    for function in (
        cce_cupy.linear_cross_entropy,
        cce_cupy.linear_cross_entropy_value_and_grad,
        cce_cupy.token_statistics,
    ):
        with pytest.raises(TypeError, match=r"c is a DTensor \(.*Shard.*c\.full_tensor"):
            function(e, c, targets)


def dtensor_gathered(rank):
    """What the refusal proposes: tokens of each rank's own, and the same tokens everywhere."""
    from torch.distributed.tensor import Partial

    value, c = sharded_classifier()
    inputs = [torch.randn(6, DIM, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    targets = torch.arange(6)

    def gradient(*each):
        plain = value.clone().requires_grad_()
        for e in each:
            torch.nn.functional.cross_entropy(e @ plain.T, targets).backward()
        return plain.grad

    gathered = c.full_tensor(grad_placements=[Partial()])
    cce_cupy.linear_cross_entropy(inputs[rank], gathered, targets).backward()
    torch.testing.assert_close(c.grad.full_tensor(), gradient(*inputs))
    c.grad = None
    cce_cupy.linear_cross_entropy(inputs[0], c.full_tensor(), targets).backward()
    torch.testing.assert_close(c.grad.full_tensor(), gradient(inputs[0]))


def fully_sharded_transformer(rank):
    """A head sharded by itself, which the patched model reads by calling it."""
    transformers = pytest.importorskip("transformers")
    from torch.distributed.fsdp import fully_shard

    from cce_cupy.transformers import patch_transformers

    def make():
        sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 16)
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, num_hidden_layers=1, num_attention_heads=2, **sizes
        )
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)

    def inputs(rank):
        tokens, labels = batch(rank)
        return {"input_ids": tokens, "labels": labels}

    plain, model = make(), make()
    patch_transformers(plain)
    for other in range(RANKS):
        (plain(**inputs(other)).loss / RANKS).backward()
    patch_transformers(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)
    fully_shard(model)
    for _ in range(2):
        model.zero_grad()
        model(**inputs(rank)).loss.backward()
        check(model, {name: p.grad for name, p in plain.named_parameters()})


JOBS = [
    data_parallel,
    data_parallel_compiled,
    fully_sharded,
    fully_sharded_transformer,
    dtensor_refused,
    dtensor_gathered,
]


def run_rank(rank, folder):
    """Run every job in one process of the group, and write down how each ended."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        for job in JOBS:
            try:
                job(rank)
                outcome = "passed"
            except pytest.skip.Exception as missing:
                outcome = f"skipped: {missing}"
            except Exception:
                outcome = traceback.format_exc()
            Path(folder, f"{job.__name__}.{rank}").write_text(outcome)
            # A rank that failed within a collective would leave the others waiting in it.
            dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    path = [str(Path(__file__).parent), str(Path(cce_cupy.__file__).parents[1]), *sys.path]
    os.environ.setdefault("PYTHONPATH", os.pathsep.join(path))
    context = mp.get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=150)
        process.kill()
    return folder


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_ranks(outcomes, job):
    for rank in range(RANKS):
        outcome = outcomes / f"{job.__name__}.{rank}"
        assert outcome.exists(), f"rank {rank} did not come to the end"
        if outcome.read_text().startswith("skipped"):
            pytest.skip(outcome.read_text())
        assert outcome.read_text() == "passed", f"rank {rank}"
