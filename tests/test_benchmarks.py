"""The data of the GPU benchmarks, and what is measured of it, at small sizes on the CPU."""

from pathlib import Path

import numpy as np
import pytest

import cce_cupy

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))


def test_profile():
    """Against its definition, on all logits at once."""
    import calibrated

    e, c, targets = calibrated.make_inputs(300, 64, 1000, dtype=torch.float32, device="cpu")
    targets[5] = -100
    found = calibrated.measure_profile(e, c, targets)
    logits, counted = (e.double() @ c.double().T), targets >= 0
    p = torch.softmax(logits, dim=1)[counted]
    one_hot = torch.nn.functional.one_hot(targets[counted], 1000).double()
    tiles = [p[n : n + 128] for n in (0, 128, 256)]
    largest = torch.stack([tile.amax(0) for tile in tiles])
    marked = torch.stack([torch.maximum(p, one_hot)[n : n + 128].amax(0) for n in (0, 128, 256)])
    for n, fraction in found.threshold.items():
        assert fraction == pytest.approx((marked >= 2.0**-n).double().mean().item(), abs=1e-3)
    unbiased = (marked * 2**14).clamp(max=1).mean().item()
    assert found.unbiased == pytest.approx(unbiased, rel=1e-4)
    padded = torch.nn.functional.pad(largest, (0, 24)).view(3, 8, 128).amax(2)
    assert found.tiles == (padded >= 2.0**-12).double().mean().item()
    assert 0 < found.one < found.union
    exact = float(torch.nn.functional.cross_entropy(logits, targets))
    assert found.loss == pytest.approx(exact, rel=1e-5)
    assert calibrated.reference_loss(e, c, targets) == pytest.approx(exact, rel=1e-6)


def test_candidates_get_their_logits():
    """And the first element of each row stays what the law of popularity needs it to be."""
    import calibrated

    generator = torch.Generator().manual_seed(0)
    e, c = (torch.randn(n, 256, generator=generator) for n in (8, 500))
    e[:, 0] = 1
    ids = torch.stack([torch.randperm(500, generator=generator)[:6] for _ in range(8)])
    wanted = torch.randn(8, 6, generator=generator) + 10
    calibrated._raise_candidates(e, c, ids, wanted)
    assert torch.equal(e[:, 0], torch.ones(8))
    torch.testing.assert_close((e @ c.T).gather(1, ids), wanted, atol=0.1, rtol=0)


def test_data_is_peaked_as_the_model():
    """At a quarter of the vocabulary each p is four times as large; eps with it."""
    import calibrated

    inputs = calibrated.make_inputs(256, 512, 65536, device="cpu")
    found, wanted = calibrated.measure_profile(*inputs), calibrated.GEMMA3
    for n in (16, 18):
        assert found.threshold[n - 2] == pytest.approx(wanted.threshold[n], rel=0.35)
    assert found.default == pytest.approx(wanted.default, rel=0.35)
    loss = cce_cupy.linear_cross_entropy(*inputs)
    assert found.loss == pytest.approx(float(loss), rel=1e-5)


def test_half_of_the_tokens_are_ignored():
    import gpu

    for tokens in (2, 8192):
        for mask in gpu._ignored(tokens).values():
            assert (len(mask), int(mask.sum())) == (tokens, tokens // 2)
    runs = gpu._ignored(8192)["in runs"]
    assert 50 < 8192 / int((np.diff(runs.numpy().astype(int)) != 0).sum() + 1) < 200


@pytest.mark.parametrize("sweep", [False, True])
def test_picture(sweep, tmp_path):
    pytest.importorskip("matplotlib")
    import picture

    rows = [
        {"run": "ours, forward alone", "base": "vendor GEMM", "ratio": 0.95},
        {"run": "ours, with bias", "base": "ours, forward alone", "ratio": 1.01},
    ]
    cases = [
        {"case": name, "tokens": tokens, "dim": 8, "vocab": 9, "rows": rows,
         "profile": {"default": 0.05}}
        for name, tokens in ([("a", 1), ("a", 2)] if sweep else [("a", 1), ("b", 2)])
    ]  # fmt: skip
    record = {"device": "a GPU", "date": "2026-11-24", "cases": cases}
    picture.draw(record, tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()


def test_training(tmp_path, capsys):
    """From text to table at toy size; the arms see the same batches from the same weights."""
    import json

    import training

    from cce_cupy.commands.corpus import learn_corpus

    pytest.importorskip("tokenizers")
    pytest.importorskip("matplotlib")
    tokens = tmp_path / "tokens.npz"
    words = [f"{a} {b} is a {b} of the {a}" for a in ["red", "green", "blue"] for b in "abcdefghij"]
    documents = [" ".join(words[k:] + words[:k]) for k in range(len(words))]
    training.write_tokens(tokens, documents, 280, learn_corpus)
    options = "--dim 16 --layers 1 --heads 2 --length 24 --batch 4 --steps 30 --device cpu"
    small = options.split()
    small += ["--validation-batches", "1", "--learning-rate", "0.01"]
    results = []
    for arm in training.ARMS:
        for seed in (0, 1):
            path = tmp_path / f"{arm}{seed}.json"
            given = ["run", str(tokens), str(path), "--arm", arm, "--seed", str(seed), *small]
            training.main(given)
            results.append(path)
    found = {path.stem: json.loads(path.read_text()) for path in results}
    starts = {(r["seed"], r["validation"][0][1], r["training"][0]) for r in found.values()}
    # bfloat16 logits and float32 sums: the same within the rounding of logits near 0.
    assert len({(seed, validation) for seed, validation, _ in starts}) == 2
    for seed in "01":
        first = [found[arm + seed]["training"][0] for arm in training.ARMS]
        assert first == pytest.approx([first[0]] * 4, abs=1e-2)
    assert all(r["validation"][-1][1] < r["validation"][0][1] - 0.5 for r in found.values())
    assert found["plain0"]["training"] != found["plain1"]["training"]
    training.main(["draw", str(tmp_path / "picture.svg"), *map(str, results)])
    assert (tmp_path / "picture.svg").stat().st_size > 1000
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows if "| 2 |" in row] == list(training.ARMS)


def test_training_setting_is_as_large_as_it_says():
    import training

    with torch.device("meta"):
        model = training.Gpt(training.Setting(32768))
    assert sum(p.numel() for p in model.parameters()) > 30e6
    assert training.Setting(32768).steps >= 1000
