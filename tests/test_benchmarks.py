"""The data of the GPU benchmarks, and what is measured of it, at small sizes on the CPU."""

import time
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


class ClockOfTheHost:
    """What timing.py asks of torch.cuda, answered without a GPU."""

    def __init__(self, enable_timing=False):
        self.seconds = 0.0

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later.seconds - self.seconds)

    @classmethod
    def stand_in(cls, monkeypatch):
        nothing = {"synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None}
        answers = {"memory_allocated": 0, "max_memory_allocated": 0, "is_available": True}
        for name, answer in (nothing | answers).items():
            monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "Event", cls)


@pytest.fixture(scope="module")
def folder_of_gpu(tmp_path_factory):
    """Records of gpu.py as it runs on the CPU, at sizes of nothing."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
        yield run_gpu(monkeypatch, tmp_path_factory.mktemp("gpu"))


def run_gpu(monkeypatch, folder):
    import gpu
    import records
    import timing

    ClockOfTheHost.stand_in(monkeypatch)
    monkeypatch.setattr(timing, "HOST_SECONDS", 0)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SEEDED", (("bfloat16", "auto"), ("float16", 2.0**-9)))
    monkeypatch.setattr(gpu, "SWEEPS", {"tokens": (1, 512, 1024), "vocab": (1000, 2000)})
    quick = "--burst 0 --block 0 --least 2 --dim 64 --commit 0123456789abcdef"
    for name, options in {
        "ours": "--tokens 256 --vocab 3000 --workspaces --options --ignored --accuracy --seeds 3",
        "peers": "--tokens 256 --vocab 3000 --peers-only --accuracy",
        "tokens": "--vocab 1000 --sweep tokens --no-unfiltered",
        "vocab": "--tokens 256 --sweep vocab",
    }.items():
        peers = ["--peers", "torch eager", "liger_kernel, Hopper"] if name == "peers" else []
        path = folder / f"{name}.json"
        gpu.main([*quick.split(), *options.split(), *peers, "--json", str(path)])
        records.write_record(path, records.read_record(path) | {"device": "a GPU"})
    return folder


@pytest.fixture
def records_of_gpu(folder_of_gpu):
    import records

    return {path.stem: records.read_record(path) for path in folder_of_gpu.glob("*.json")}


def test_records_of_gpu(records_of_gpu):
    import runs

    (ours,), (others,) = (records_of_gpu[name]["cases"] for name in ("ours", "peers"))
    assert not ours["absent"]
    rows = {row["run"]: row for row in ours["rows"]}
    assert len(rows) == len(ours["rows"]) == 6 + 2 * (4 + 2)
    assert rows[runs.UNFILTERED]["base"] == runs.FOUR_PRODUCTS
    assert all(row["same_bits"] for row in ours["rows"])
    for run in (runs.GRADIENTS, f"{runs.GRADIENTS}, 64 MiB", runs.UNFILTERED):
        # bfloat16 and, with the filter, its error, which is large in so small a vocabulary.
        assert rows[run]["loss_error"] < 1e-5
        assert 1e-4 < rows[run]["de_error"] < 2e-2
        assert 1e-4 < rows[run]["dc_error"] < 2e-2
    assert ours["filter"]["gradient_filter"] == "unbiased" and 0 < ours["filter"]["kept"] < 1
    assert [row["run"].rpartition(", ")[0] for row in others["rows"]] == 2 * ["torch eager"]
    assert len(others["absent"]) == 2
    for figures in ours["seeds"]:
        assert figures["dc"]["unfiltered"] < figures["dc"]["one"]
        assert figures["dc"]["mean_from_unfiltered"] < figures["dc"]["one_from_unfiltered"]
    assert [case["tokens"] for case in records_of_gpu["tokens"]["cases"]] == [1, 512, 1024]
    assert [case["vocab"] for case in records_of_gpu["vocab"]["cases"]] == [1000, 2000]


def test_failing_peer_is_recorded(monkeypatch, tmp_path):
    import gpu
    import records

    def broken():
        raise RuntimeError("no such\nthing")

    ClockOfTheHost.stand_in(monkeypatch)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setitem(gpu.PEERS, "torch.compile", broken)
    path = tmp_path / "peers.json"
    sizes = "--tokens 64 --dim 32 --vocab 500 --burst 0 --block 0 --least 1"
    peers = ["--peers-only", "--peers", "torch.compile", "torch eager"]
    gpu.main([*sizes.split(), *peers, "--json", str(path)])
    (case,) = records.read_record(path)["cases"]
    assert set(case["absent"].values()) == {"RuntimeError: no such"}
    assert len(case["rows"]) == 2


def test_report(folder_of_gpu, tmp_path):
    """From what runs left to documents; what has no record stays empty."""
    pytest.importorskip("matplotlib")
    import report

    results, docs = tmp_path / "kept", tmp_path / "docs"
    (docs / "figures").mkdir(parents=True)
    results.mkdir()
    marks = {part: f"<!-- begin: {part} -->\n<!-- end: {part} -->\n" for part in report.PARTS}
    for document in set(report.PARTS.values()):
        inner = [marks[part] for part, name in report.PARTS.items() if name == document]
        (docs / document).write_text("before\n" + "".join(inner) + "after\n")
    report.main(["take", str(folder_of_gpu), "--results", str(results)])
    assert report.fill(results, docs) == ["harness", "growth"]
    text = (docs / "performance.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| torch eager |" in text and "| ours, no filter |" in text
    assert "liger_kernel, Hopper, forward: no module" in text
    assert "exponent, N >= 512" in text
    for name in ("harness_forward", "harness_gradients", "harness_accuracy", "growth"):
        assert f"figures/{name}.svg" in text
        assert "<svg" in (docs / "figures" / f"{name}.svg").read_text()
    assert (docs / "jax.md").read_text() == f"before\n{marks['jax-overhead']}after\n"
    first = (docs / "figures/growth.svg").read_bytes()
    report.fill(results, docs)
    assert (docs / "performance.md").read_text() == text
    assert (docs / "figures/growth.svg").read_bytes() == first


def test_records_of_different_kernels_are_not_joined(records_of_gpu):
    import report

    others = {name: record | {"kernels": "others"} for name, record in records_of_gpu.items()}
    with pytest.raises(ValueError, match="different kernels"):
        report.join([records_of_gpu["tokens"], others["vocab"]])
    # Peers do not run them.
    joined = report.join([records_of_gpu["peers"], others["peers"]])
    assert joined["cases"] == records_of_gpu["peers"]["cases"]
    with pytest.raises(ValueError, match="different device"):
        report.join([records_of_gpu["peers"], others["peers"] | {"device": "another"}])


def test_records_of_peers_stay(records_of_gpu, tmp_path):
    """Where ours are taken anew, and no others."""
    import records
    import report

    (tmp_path / "both").mkdir()
    (tmp_path / "kept").mkdir()
    for name in ("ours", "peers"):
        records.write_record(tmp_path / "both" / f"{name}.json", records_of_gpu[name])
    report.take(tmp_path / "both", tmp_path / "kept")
    kept = (tmp_path / "kept/peers.json").read_bytes()
    (tmp_path / "both/peers.json").unlink()
    newer = records_of_gpu["ours"] | {"kernels": "newer"}
    records.write_record(tmp_path / "both/ours.json", newer)
    report.take(tmp_path / "both", tmp_path / "kept")
    assert (tmp_path / "kept/peers.json").read_bytes() == kept
    assert records.read_record(tmp_path / "kept/harness.json")["kernels"] == "newer"


def test_documents_hold_what_the_records_say(tmp_path):
    """The parts of the documents that report.py fills are those of the recorded results."""
    import shutil

    pytest.importorskip("matplotlib")
    import report

    shutil.copytree(report.DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("_build"))
    report.fill(report.RESULTS, tmp_path / "docs")
    for document in set(report.PARTS.values()):
        assert (tmp_path / "docs" / document).read_text() == (report.DOCS / document).read_text()


def test_exponent_of_growth():
    import tables

    assert tables.exponent([(n, 3 * n**1.5) for n in (512, 1024, 4096)]) == pytest.approx(1.5)


def test_torch_overhead(monkeypatch, tmp_path):
    import records
    import torch_overhead

    ClockOfTheHost.stand_in(monkeypatch)
    monkeypatch.setattr(torch_overhead, "DEVICE", "cpu")
    monkeypatch.setattr(torch_overhead, "CALLS", 2)
    monkeypatch.setattr(torch_overhead, "WARM_UPS", 1)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda *_: 1 / 0)
    path = tmp_path / "torch_overhead.json"
    torch_overhead.main(["--json", str(path), "--tokens=4", "--dim=8", "--vocab=50"])
    record = records.read_record(path)
    assert len(record["runs"]) == 10
    assert record["absent"] == {
        "compiled, forward + backward": "ZeroDivisionError: division by zero"
    }
    assert all(found["host_us"] > 0 for found in record["runs"].values())


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
    results = [tmp_path / "speed.json"]
    training.main(["speed", str(tokens), str(results[0]), "--timed-steps", "1", *small])
    for arm in training.ARMS:
        for seed in (0, 1):
            path = tmp_path / f"{arm}{seed}.json"
            given = ["run", str(tokens), str(path), "--arm", arm, "--seed", str(seed), *small]
            training.main(given)
            results.append(path)
    found = {path.stem: json.loads(path.read_text()) for path in results[1:]}
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
    speeds = [row.split("|")[4].strip() for row in rows if "| 2 |" in row]
    assert all(float(speed.replace(",", "")) > 0 for speed in speeds)
    assert any(row.startswith("| spread of plain's seeds |") for row in rows)


def test_training_that_was_stopped(tmp_path):
    """What a run had until then is kept and drawn, and does not count as a final loss."""
    pytest.importorskip("matplotlib")
    import training

    setting = training.Setting(64, 8, 1, 1, 8, 2, 200, 1e-3, 1)
    ids = torch.randint(64, (400,), generator=torch.Generator().manual_seed(0)).int()
    found = []

    def keep(record):
        found.append(record)
        if len(found) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train("plain", 0, {"training": ids, "validation": ids}, setting, "cpu", keep)
    assert [step for step, _ in found[-1]["validation"]] == [0, 1, 2]
    assert len(found[-1]["training"]) == 2
    assert training.finished(found) == [] and training.curves_table(found) == ""
    training.draw(found[-1:], tmp_path / "picture.svg")


def test_training_setting_is_as_large_as_it_says():
    import training

    with torch.device("meta"):
        model = training.Gpt(training.Setting(32768))
    assert sum(p.numel() for p in model.parameters()) > 30e6
    assert training.Setting(32768).steps >= 1000
