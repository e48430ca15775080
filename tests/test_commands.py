"""The command line: demo, loss, info and bench, by way of `cce_cupy.__main__.main`."""

import contextlib
import ctypes
import ctypes.util
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

import cce_cupy
from cce_cupy.__main__ import BENCH_CASES, main
from cce_cupy.commands import bench, demo, info, loss
from cce_cupy.commands.agreement import compare_curves
from cce_cupy.commands.arrays import read_arrays, write_arrays
from cce_cupy.commands.corpus import Corpus, learn_corpus, read_documents
from cce_cupy.commands.errors import CommandError
from cce_cupy.commands.language_model import Model, Sizes
from cce_cupy.commands.loss_heads import (
    Floats,
    HeadResult,
    Ids,
    LossHead,
    cut_cross_entropy,
    full_softmax,
)
from cce_cupy.commands.progress import WorkProgress
from cce_cupy.commands.training import Adagrad, Schedule, Training

ROOT = Path(cce_cupy.__file__).parent.parent

SMALL = Sizes(vocab=2048, dim=32, hidden=32)
SMALL_SCHEDULE = Schedule(tokens=256)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail for a reason of the user's; return its one line."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"cce-cupy {arguments[0]}: ")
    return lines[0]


def words(vocab: int = SMALL.vocab, tokens: int = 20_000) -> Ids:
    """Return tokens with frequencies like those of words, each hinting at its successor."""
    rng = np.random.default_rng(5)
    drawn = np.minimum(rng.zipf(1.3, tokens) - 1, vocab - 1)
    drawn[1::2] = (drawn[::2] * 7 + 1) % vocab
    return drawn.astype(np.int32)


def wrong(head: LossHead, argument: str, factor: float) -> LossHead:
    """Return the head with one of its gradients multiplied."""

    def spoilt(e: Floats, c: Floats, targets: Ids, bias: Floats) -> HeadResult:
        result = head(e, c, targets, bias)
        scaled = getattr(result, argument) * np.float32(factor)
        return result._replace(**{argument: scaled})

    return spoilt


def reordered(e: Floats, c: Floats, targets: Ids, bias: Floats) -> HeadResult:
    """Full softmax with the vocabulary in another order: other sums, the same numbers."""
    order = np.random.default_rng(9).permutation(len(c))
    place = np.argsort(order)
    result = full_softmax(e, c[order], place[targets].astype(np.int32), bias[order])
    return HeadResult(result.loss, result.e, result.c[place], result.bias[place])


def curve(head: LossHead, steps: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    training = Training(words(), SMALL, head, 3, SMALL_SCHEDULE)
    return np.array([training.step() for _ in range(steps)])


# The demo


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing, with few steps."""
    picture = tmp_path / "curves.png"
    assert main(["demo", "--steps", "3", "--seed", "7", "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    captured = capsys.readouterr()
    assert "Training both models: 3/3" in captured.err
    assert "3 steps of 1,024 tokens, vocabulary 16,384, D = 64, float32" in captured.out
    plain, cut = (line for line in captured.out.splitlines() if "MiB │" in line)
    cells = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in (plain, cut)]
    assert [row[0] for row in cells] == ["full softmax", "CCE"]
    losses, speeds, peaks = (
        [float(row[column].removesuffix(" MiB").replace(",", "")) for row in cells]
        for column in (1, 2, 3)
    )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert 8 < losses[0] < np.log(16384)
    assert min(speeds) > 0
    # The matrix of logits alone is 64 MiB.
    assert peaks[0] > 64
    assert peaks[1] < peaks[0] / 3
    assert "agree within float32 rounding" in captured.out
    assert str(picture) in captured.out.replace("\n", "")


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on a small made-up text."""
    text = Corpus(words(), SMALL.vocab, characters=1, documents=1)
    monkeypatch.setattr(demo, "read_documents", lambda report: report(1, 1) or [])
    monkeypatch.setattr(demo, "learn_corpus", lambda documents, vocab: text)


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("argument", ["e", "c", "bias"])
def test_demo_notices_a_wrong_gradient(
    argument: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "cut_cross_entropy", wrong(cut_cross_entropy, argument, 1.001))
    out = tmp_path / "demo.png"
    assert main(["demo", "--steps", "12", "--out", str(out)]) == 1
    assert "FAILED: the curves differ by more than float32 rounding" in capsys.readouterr().out
    assert out.exists()  # the picture shows where


@pytest.mark.parametrize("head", [cut_cross_entropy, reordered])
def test_rounding_is_within_the_tolerance(head: LossHead) -> None:
    one, other = curve(full_softmax, 12), curve(head, 12)
    agreement = compare_curves(one, other, SMALL_SCHEDULE.tokens, SMALL.dim, SMALL.vocab)
    assert agreement.agree
    assert agreement.difference.max() > 0  # else the comparison would be with itself
    assert one[-1] < one[0] - 0.5


def test_agreement_of_broken_curves() -> None:
    fine = np.array([9.0, 8.0, 7.0])
    sizes = {"tokens": 1024, "dim": 64, "vocab": 16384}
    assert compare_curves(fine, fine, **sizes).agree
    assert compare_curves(fine, fine + 5e-6, **sizes).agree
    off = compare_curves(fine, fine + np.array([0, 3e-5, 1e-6]), **sizes)
    assert (off.agree, off.worst) == (False, 1)
    for value in (np.nan, np.inf):
        broken = np.array([9.0, 8.0, value])
        assert not compare_curves(fine, broken, **sizes).agree
        assert not compare_curves(broken, broken, **sizes).agree


def test_a_picture_of_broken_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_demo: None
) -> None:
    """Losses that are not numbers are drawn as gaps, not as a crash."""

    def broken(e: Floats, c: Floats, targets: Ids, bias: Floats) -> HeadResult:
        return full_softmax(e, c, targets, bias)._replace(loss=float("nan"))

    monkeypatch.setattr(demo, "cut_cross_entropy", broken)
    assert main(["demo", "--steps", "3", "--out", str(tmp_path / "demo.png")]) == 1


def test_full_softmax_is_the_loss() -> None:
    """The demo's baseline against the library in float64, which the oracle checks elsewhere."""
    rng = np.random.default_rng(0)
    e, c = rng.standard_normal((30, 16)), rng.standard_normal((500, 16))
    bias, targets = rng.standard_normal(500), rng.integers(0, 500, 30).astype(np.int32)
    expected, gradients = cce_cupy.linear_cross_entropy_value_and_grad(e, c, targets, bias)
    result = full_softmax(*(np.float32(a) for a in (e, c)), targets, np.float32(bias))
    assert result.loss == pytest.approx(float(expected), rel=1e-6)
    for given, wanted in zip(result[1:], gradients, strict=True):
        np.testing.assert_allclose(given, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "parameter", ["embedding", "hidden", "hidden_bias", "output", "classifier", "bias"]
)
def test_gradients_of_the_model(parameter: str) -> None:
    """A central difference along the gradient, whose slope is the gradient's length."""
    model = Model(Sizes(vocab=60, dim=8, hidden=10), np.random.default_rng(1))
    model.classifier *= np.float32(20)  # far from the start, where few gradients are large
    text = words(60, 200)
    contexts = np.stack([text[3 - lag : 150 - lag] for lag in range(4)], axis=1)
    targets = text[4:151]

    _, gradients = model.loss_and_gradients(contexts, targets, full_softmax)
    gradient = getattr(gradients, parameter)
    if parameter == "embedding":
        gradient = np.zeros_like(model.embedding)
        gradient[gradients.embedding_rows] = gradients.embedding
    length = float(np.linalg.norm(gradient))
    step = 0.02 * gradient / np.float32(length)
    ends = []
    for end in (step, -2 * step):
        getattr(model, parameter)[...] += end
        ends.append(model.loss_and_gradients(contexts, targets, full_softmax)[0])
    assert (ends[0] - ends[1]) / 0.04 == pytest.approx(length, rel=2e-3)


def test_adagrad() -> None:
    """Blocks and rows give what the formula says."""
    rng = np.random.default_rng(2)
    value = rng.standard_normal((3000, 64)).astype(np.float32)
    gradients = rng.standard_normal((2, 3000, 64)).astype(np.float32)
    gradients[:, ::3] = 0
    expected, squares = value.astype(np.float64), np.full(value.shape, Adagrad.INITIAL_SUM)
    for gradient, warmth in zip(gradients, (0.5, 1.0), strict=True):
        squares += gradient.astype(np.float64) ** 2
        expected -= 0.1 * warmth * gradient / np.sqrt(squares)
    everything, some = value.copy(), value.copy()
    rows = np.flatnonzero(np.arange(3000) % 3)
    whole, part = Adagrad(everything, 0.1), Adagrad(some, 0.1)
    for gradient, warmth in zip(gradients, (0.5, 1.0), strict=True):
        whole.step(gradient, warmth)
        part.step_rows(rows, gradient[rows], warmth)
    np.testing.assert_allclose(everything, expected, atol=1e-6)
    np.testing.assert_array_equal(some, everything)


def test_the_seed_decides() -> None:
    """The same seed gives the same bits, another seed other losses."""
    one, same, other = (
        Training(words(), SMALL, full_softmax, seed, SMALL_SCHEDULE) for seed in (0, 0, 1)
    )
    losses = [[training.step() for _ in range(3)] for training in (one, same, other)]
    assert losses[0] == losses[1]
    assert not set(losses[0]) & set(losses[2])
    np.testing.assert_array_equal(one.model.classifier, same.model.classifier)


def test_head_memory_trains_nothing() -> None:
    training = Training(words(), SMALL, full_softmax, 0, SMALL_SCHEDULE)
    before = training.model.classifier.copy()
    peak = training.head_memory()
    assert not tracemalloc.is_tracing()
    np.testing.assert_array_equal(training.model.classifier, before)
    logits = 4 * SMALL_SCHEDULE.tokens * SMALL.vocab
    assert logits < peak < 1.5 * logits


def test_the_text_wraps_around() -> None:
    """More steps than the text has places: it is read again."""
    training = Training(words(tokens=700), SMALL, full_softmax, 0, SMALL_SCHEDULE)
    losses = [training.step() for _ in range(6)]
    assert np.isfinite(losses).all()


def test_read_documents(tmp_path: Path) -> None:
    """Docstrings in the order of the files, from sources that are parsed and never run."""
    files = {
        "b.py": '"""Module b."""\nraise SystemExit(1)\n',
        "a/__init__.py": "",
        "a/code.py": (
            'class A:\n    """Class A."""\n    def f(self):\n        """Method\n        f."""\n'
            'if True:\n    async def g():\n        """Module b."""\n'
            'try:\n    pass\nexcept OSError:\n    def h():\n        """Handler."""\n'
            'x = """no docstring"""\n'
        ),
        "broken.py": '"""Lost."""\nprint "old"\n',
        "escape.py": '"""Escape."""\nx = "\\d"\n',
        "latin.py": b'# coding: latin-1\n"""Caf\xe9."""\n',
        "site-packages/p.py": '"""A package."""',
        "a/test/t.py": '"""A test."""',
        "pydoc_data/topics.py": 'topics = {"assert": "The " "statement", "with": """A topic"""}\n',
        "notes.txt": '"""Not Python."""',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    reports: list[tuple[int, int]] = []
    documents = read_documents(lambda done, total: reports.append((done, total)), tmp_path)
    assert documents == [
        "The statement",
        "A topic",
        "Class A.",
        "Method\nf.",
        "Module b.",
        "Handler.",
        "Escape.",
        "Café.",
    ]
    assert reports == [(n, 7) for n in range(1, 8)]


def test_no_sources(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"found no docstrings in .*sources"):
        read_documents(lambda done, total: None, tmp_path)


def test_learn_corpus() -> None:
    documents = ["the cat sat on the mat", "the bat sat on the hat"]
    corpus = learn_corpus(documents, 270)
    assert corpus.vocab == 270
    assert (corpus.documents, corpus.characters) == (2, 44)
    assert (corpus.ids == corpus.ids[-1]).sum() == 2  # the end of each document
    assert 0 < corpus.unigram_entropy < np.log(270)
    np.testing.assert_array_equal(corpus.ids, learn_corpus(documents, 270).ids)
    with pytest.raises(CommandError, match=r"yields \d+ byte-pair tokens, fewer than --vocab 400"):
        learn_corpus(documents, 400)


@pytest.mark.parametrize("package", ["tokenizers", "matplotlib"])
def test_demo_without_its_libraries(
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.figure", None)
    assert complaint(capsys, "demo", "--out", tmp_path / "demo.png") == (
        f"cce-cupy demo: the demo needs {package}: pip install 'cce-cupy[demo]'"
    )


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("demo.doc", "must end in .png, .svg or .pdf"),
        ("nowhere/demo.png", "there is no folder"),
        ("folder.png", "cannot be written"),
    ],
)
def test_demo_checks_out_first(
    out: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    assert expected in complaint(capsys, "demo", "--out", tmp_path / out)


# The loss of a file

SUFFIXES = [".npz", ".safetensors"]
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def example(dtype: Any = np.float32, bias: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng(11)
    arrays = {
        "e": rng.standard_normal((2, 20, 24)).astype(dtype),
        "c": rng.standard_normal((300, 24)).astype(dtype),
        "targets": rng.integers(0, 300, (2, 20)),
    }
    arrays["targets"][0, :5] = -100
    if bias:
        arrays["bias"] = rng.standard_normal(300).astype(dtype)
    return arrays


def read_back(path: Path) -> dict[str, Any]:
    names = ("loss", "lse", "grad_e", "grad_c", "grad_bias")
    arrays, others = read_arrays(path, names)
    assert others == []
    return arrays


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("bias", [False, True])
def test_loss(
    suffix: str, dtype: Any, bias: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = example(dtype, bias)
    file = tmp_path / f"data{suffix}"
    write_arrays(file, arrays)
    content = file.read_bytes()
    assert main(["loss", str(file)]) == 0

    (expected, lse), gradients = cce_cupy.linear_cross_entropy_value_and_grad(
        **arrays, return_lse=True
    )
    written = read_back(tmp_path / f"data.grad{suffix}")
    wanted = {"loss": expected, "lse": lse, "grad_e": gradients.e, "grad_c": gradients.c}
    if bias:
        wanted["grad_bias"] = gradients.bias
    assert written.keys() == wanted.keys()
    for name, array in wanted.items():
        assert written[name].dtype == array.dtype
        np.testing.assert_array_equal(written[name], array, strict=True)
    assert file.read_bytes() == content

    captured = capsys.readouterr()
    report = dict(line.split(maxsplit=1) for line in captured.out.splitlines())
    assert report["loss"] == f"{float(expected):.9g} (mean)"
    assert report["tokens"] == "40"
    assert report["ignored"] == "5"
    assert f"300, 24), {np.dtype(dtype).name}" in report["e,"]
    assert "written to         " + str(tmp_path / f"data.grad{suffix}") in captured.out
    assert "peak extra memory  " in captured.out
    assert "forward: 1/1" in captured.err
    assert "backward: 1/1" in captured.err


def test_bfloat16_in_npz_is_two_bytes_without_a_name(tmp_path: Path) -> None:
    """What the documentation says about files of others, and for others."""
    file = tmp_path / "data.npz"
    np.savez(file, **example(ml_dtypes.bfloat16))
    assert main(["loss", str(file)]) == 0
    with np.load(tmp_path / "data.grad.npz") as written:
        assert written["grad_c"].dtype == np.dtype("V2")
        restored = written["grad_c"].view(ml_dtypes.bfloat16)
    gradients = cce_cupy.linear_cross_entropy_value_and_grad(**example(ml_dtypes.bfloat16))[1]
    np.testing.assert_array_equal(restored, gradients.c, strict=True)


def test_bfloat16_of_torch_safetensors(tmp_path: Path) -> None:
    """A file that torch wrote is read, and ours is read by torch."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    arrays = {
        "e": torch.randn(9, 16, generator=generator).bfloat16(),
        "c": torch.randn(100, 16, generator=generator).bfloat16(),
        "targets": torch.arange(9),
    }
    file, out = tmp_path / "data.safetensors", tmp_path / "out.safetensors"
    save_file(arrays, file)
    assert main(["loss", str(file), "--out", str(out)]) == 0
    _, gradients = cce_cupy.linear_cross_entropy_value_and_grad(**arrays)
    written = load_file(out)
    assert written["grad_e"].dtype == torch.bfloat16
    assert torch.equal(written["grad_e"], gradients.e)
    assert torch.equal(written["grad_c"], gradients.c)


def test_safetensors_of_strided_arrays(tmp_path: Path) -> None:
    """The format's own writer takes bytes as they lie, in whatever order."""
    file = tmp_path / "x.safetensors"
    array = np.arange(12.0).reshape(3, 4)
    write_arrays(file, {"a": array.T, "b": array[:, ::2], "c": np.float32(3)})
    arrays, _ = read_arrays(file, ("a", "b", "c"))
    np.testing.assert_array_equal(arrays["a"], array.T)
    np.testing.assert_array_equal(arrays["b"], array[:, ::2])
    assert arrays["c"].shape == ()


OPTIONS: list[tuple[list[str], dict[str, Any]]] = [
    (["--reduction", "sum"], {"reduction": "sum"}),
    (["--reduction", "none"], {"reduction": "none"}),
    (["--ignore-index", "7"], {"ignore_index": 7}),
    (["--softcap", "3.5"], {"softcap": 3.5}),
    (["--shift", "1"], {"shift": 1}),
    (["--filter", "threshold", "--filter-eps", "0.01"],
     {"gradient_filter": "threshold", "filter_eps": 0.01}),
    (["--filter-eps", "0.05", "--seed", "3"], {"filter_eps": 0.05, "seed": 3}),
    (["--filter", "none"], {"gradient_filter": None}),
    (["--logit-scale", "0.5"], {"logit_scale": 0.5}),
    (["--label-smoothing", "0.1"], {"label_smoothing": 0.1}),
    (["--z-loss", "1e-3"], {"z_loss": 1e-3}),
    (["--workspace-bytes", "100000000"], {"workspace_bytes": 100_000_000}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options_reach_the_library(
    arguments: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    arrays = example(ml_dtypes.bfloat16)
    if "ignore_index" in options:
        arrays["targets"][arrays["targets"] < 0] = options["ignore_index"]
    file = tmp_path / "data.npz"
    write_arrays(file, arrays)
    assert main(["loss", str(file), *arguments]) == 0
    written = read_back(tmp_path / "data.grad.npz")
    expected, gradients = cce_cupy.linear_cross_entropy_value_and_grad(**arrays, **options)
    np.testing.assert_array_equal(written["loss"], expected, strict=True)
    np.testing.assert_array_equal(written["grad_e"], gradients.e, strict=True)
    np.testing.assert_array_equal(written["grad_c"], gradients.c, strict=True)


def test_weights_come_from_the_file(tmp_path: Path) -> None:
    arrays = example()
    arrays["class_weight"] = np.linspace(0, 2, 300)
    arrays["token_weight"] = np.arange(40, dtype=np.int16).reshape(2, 20)
    file = tmp_path / "data.safetensors"
    write_arrays(file, arrays)
    assert main(["loss", str(file), "--out", str(tmp_path / "out.npz")]) == 0
    expected = cce_cupy.linear_cross_entropy(**arrays)
    np.testing.assert_array_equal(read_back(tmp_path / "out.npz")["loss"], expected)


def test_no_grad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data.npz"
    write_arrays(file, example())
    assert main(["loss", str(file), "--no-grad", "--reduction", "none", "--shift", "3"]) == 0
    written = read_back(tmp_path / "data.grad.npz")
    assert written.keys() == {"loss", "lse"}
    assert written["loss"].shape == (2, 20)
    output = capsys.readouterr().out
    assert f"their sum is {written['loss'].sum(dtype=np.float64):.9g}" in output
    assert "ignored            8\n" in output  # 3 of each row unpaired, and 2 of -100 after them


def test_arrays_not_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data.npz"
    write_arrays(file, {**example(), "biass": np.zeros(300)})
    assert main(["loss", str(file)]) == 0
    assert "not used           biass\n" in capsys.readouterr().out


def test_memory_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Peak memory is far below the logits (128 MiB here), and is what is reported."""
    rng = np.random.default_rng(0)
    file = tmp_path / "data.npz"
    write_arrays(
        file,
        {
            "e": rng.standard_normal((1024, 8), np.float32),
            "c": rng.standard_normal((32768, 8), np.float32),
            "targets": rng.integers(0, 32768, 1024),
        },
    )
    assert main(["loss", str(file)]) == 0
    output = capsys.readouterr().out
    peak = float(output.split("peak extra memory")[1].split()[0])
    assert 1 < peak < 40


def file_with(path: Path, **changes: Any) -> Path:
    arrays = {**example(), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


BAD_FILES: list[tuple[Callable[[Path], Any], str, list[str], str]] = [
    (lambda at: None, "data.npz", [], "data.npz: no such file"),
    (lambda at: at.mkdir(), "data.npz", [], "no such file"),
    (lambda at: at.write_bytes(b""), "data.npz", [], "not a valid .npz file"),
    (lambda at: at.write_bytes(b"text, not arrays"), "data.npz", [], "not a .npz file"),
    (lambda at: at.write_bytes(b"PK\3\4 cut off"), "data.npz", [], "not a valid .npz file"),
    (one_array, "data.npz", [], "one array without a name"),
    (lambda at: at.write_bytes(b"text, not arrays"), "data.safetensors", [],
     "not a valid .safetensors file"),
    (lambda at: at.write_bytes(b""), "data.safetensors", [], "not a valid .safetensors file"),
    (lambda at: at.write_bytes(b""), "data.pt", [], "must end in .npz or .safetensors"),
    (lambda at: file_with(at, c=None), "data.npz", [], "has no array named c;"),
    (lambda at: file_with(at, e=None, E=np.zeros(3)), "data.npz", [], "its other arrays: E"),
    (lambda at: file_with(at, e=np.array([None])), "data.npz", [], "object arrays"),
    (lambda at: file_with(at, e=np.zeros((2, 20, 25), np.float32)), "data.npz", [],
     "c must have shape (V, D) with D = 25"),
    (lambda at: file_with(at, e=np.zeros((2, 20, 24))), "data.npz", [],
     "c must have the dtype of e, float64, got float32"),
    (lambda at: file_with(at, e=np.zeros((2, 20, 24), "V3")), "data.npz", [],
     "e must have a dtype of float64, float32, float16 or bfloat16"),
    (lambda at: file_with(at, targets=np.full((2, 20), 300)), "data.npz", [],
     "targets must lie in [0, 300)"),
    (lambda at: file_with(at, token_weight=np.full((2, 20), -1.0)), "data.npz", [],
     "token_weight must be non-negative"),
    (file_with, "data.npz", ["--softcap", "-1"], "softcap must be a positive finite number"),
    (file_with, "data.npz", ["--filter-eps", "1.5"], "filter_eps must be"),
    (file_with, "data.npz", ["--shift", "20"], "shift must be smaller than the sequence length"),
    (file_with, "data.npz", ["--workspace-bytes", "1"], "workspace_bytes must be at least"),
    (file_with, "data.npz", ["--out", "data.npz"], "that is the input file"),
    (file_with, "data.npz", ["--out", "./nowhere/../data.npz"], "that is the input file"),
    (file_with, "data.npz", ["--out", "missing/x.npz"], "there is no folder missing"),
    (file_with, "data.npz", ["--out", "x.txt"], "must end in .npz or .safetensors"),
    (file_with, "data.npz", ["--out", "folder.npz"], "cannot be written"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "name", "arguments", "expected"), BAD_FILES)
def test_complaints_about_files(
    make: Callable[[Path], Any],
    name: str,
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.npz").mkdir()
    Path("nowhere").mkdir()
    make(Path(name))
    before = sorted(Path().iterdir())
    assert expected in complaint(capsys, "loss", name, *arguments)
    assert sorted(Path().iterdir()) == before


def test_bfloat16_of_an_old_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Releases that know BF16 but not what NumPy calls it fail in a way of their own."""
    import safetensors

    class File:
        def __enter__(self) -> "File":
            return self

        def __exit__(self, *error: object) -> None: ...

        def keys(self) -> list[str]:
            return ["e", "c", "targets"]

        def get_slice(self, name: str) -> "File":
            return self

        def get_dtype(self) -> str:
            return "BF16"

        def get_tensor(self, name: str) -> None:
            raise AttributeError("module 'numpy' has no attribute 'bfloat16'")

    monkeypatch.setattr(safetensors, "safe_open", lambda path, framework: File())
    file = tmp_path / "data.safetensors"
    file.touch()
    assert "e has dtype BF16" in complaint(capsys, "loss", file)


# What is installed


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert f"cce_cupy  │ {cce_cupy.__version__}" in output
    assert np.__version__ in output
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        assert f"│ {dtype:<8} │ cpu │ portable │" in output


def test_info_imports_no_framework() -> None:
    code = (
        "import sys; from cce_cupy.__main__ import main; main(['info']);"
        "sys.exit(bool({'torch', 'jax', 'cupy', 'matplotlib'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


class FakeDriver:
    """The few calls of libcuda that `info` makes, each writing through its first argument."""

    def __init__(
        self,
        version: int = 13000,
        devices: int = 2,
        initialised: int = 0,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        self._version, self._devices, self.cuInit = version, devices, lambda flags: initialised
        self._capability = capability

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self._version
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._devices
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = f"GPU number {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = dict(zip((75, 76), self._capability, strict=True))[attribute]
        return 0


def shown_by_info(
    driver: Any,
    packages: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Run `info` where this is the driver and pip has installed these packages alone."""

    def load(name: str) -> Any:
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(info, "_version", packages.get)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    for variable in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    assert main(["info"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (FakeDriver(), ["cuda:1", "GPU number 1, compute capability 9.0", "CUDA 13.0",
                        "- CuPy is not installed: pip install 'cce-cupy[cuda13x]'.",
                        "- NVRTC, which compiles the kernels, was not found",
                        "pip install 'cupy-cuda13x[ctk]'"]),
        (FakeDriver(12040), ["CUDA 12.4", "pip install 'cce-cupy[cuda12x]'.",
                             "pip install 'cupy-cuda12x[ctk]'"]),
        (FakeDriver(capability=(7, 0)), [
            "- cuda:0 is of compute capability 7.0: the kernels need 7.5 or newer.",
            "- cuda:1 is of compute capability 7.0",
        ]),
        (FakeDriver(initialised=100), ["- An NVIDIA driver is installed but shows no GPU."]),
        (OSError("libcuda.so.1: cannot open shared object file"), [
            "- No NVIDIA driver found.",
            "- CuPy is not installed: pip install 'cce-cupy[cuda13x]' (cuda12x for a driver",
        ]),
        (object(), ["- No NVIDIA driver found."]),  # a library without the functions
    ],
)  # fmt: skip
def test_info_about_gpus(
    driver: Any,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = shown_by_info(driver, {}, monkeypatch, capsys)
    for text in ["Missing for arrays on a GPU:\n", *expected]:
        assert text in output


WITH_CUPY = {"cupy-cuda13x": "14.2.0", "nvidia-cuda-nvrtc": "13.0.88"}


@pytest.mark.parametrize(
    ("version", "packages", "expected"),
    [
        (13000, {"cupy-cuda13x": "14.2.0"}, ["NVRTC of CUDA 13, which", "'cupy-cuda13x[ctk]'"]),
        (13000, {"cupy-cuda13x": "14.2.0", "nvidia-cuda-nvrtc-cu12": "12.9.86"},
         ["NVRTC of CUDA 13, which"]),
        (13000, WITH_CUPY | {"cupy-cuda13x": "13.6.0"},
         ["CuPy 13.6.0 is older than 14.2: pip install 'cupy-cuda13x>=14.2'."]),
        (12090, WITH_CUPY, ["cupy-cuda13x needs a driver of CUDA 13, this one is of CUDA 12.9",
                            "pip install 'cce-cupy[cuda12x]'"]),
    ],
)  # fmt: skip
def test_info_about_what_does_not_fit(
    version: int,
    packages: dict[str, str],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = shown_by_info(FakeDriver(version), packages, monkeypatch, capsys)
    lines = output.partition("Missing for arrays on a GPU:\n")[2].splitlines()
    assert len(lines) == 1
    for text in expected:
        assert text in lines[0]


@pytest.mark.parametrize(
    "packages",
    [
        WITH_CUPY,
        {"cupy-cuda12x": "14.2.0", "nvidia-cuda-nvrtc-cu12": "12.9.86"},
        {"cupy": "15.0.0rc1", "nvidia-cuda-nvrtc-cu12": "12.9.86"},
    ],
)
def test_info_where_nothing_is_missing(
    packages: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shown_by_info(FakeDriver(), packages, monkeypatch, capsys)
    for package, version in packages.items():
        assert f"{version} ({package})" in output
    assert "Nothing is missing for arrays on a GPU." in output
    assert "Missing for" not in output


def test_info_finds_the_compiler_of_a_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib64").mkdir()
    for name in ("libnvrtc-builtins.so.13.0", "libnvrtc.so", "libnvrtc.so.13"):
        (tmp_path / "lib64" / name).touch()
    monkeypatch.setattr(info, "_version", lambda package: None)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: "libnvrtc.so.12")
    for variable in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    assert info.find_nvrtc(13) is None
    assert info.find_nvrtc(12) == info.find_nvrtc(None) == "libnvrtc.so.12"
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    assert info.find_nvrtc(13) == str(tmp_path / "lib64" / "libnvrtc.so.13")


# Times on a GPU


@pytest.mark.parametrize("devices", [None, 0, "no CUDA-capable device is detected"])
def test_bench_without_a_gpu(
    devices: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, before any work."""

    class CUDARuntimeError(RuntimeError): ...

    def count() -> int:
        if isinstance(devices, str):
            raise CUDARuntimeError(devices)
        return devices

    runtime = SimpleNamespace(getDeviceCount=count, CUDARuntimeError=CUDARuntimeError)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", None if devices is None else cupy)
    line = complaint(capsys, "bench", "--case", "wide")
    assert ("need CuPy" if devices is None else "finds no GPU") in line
    assert str(devices or "") in line


def test_bench_cases() -> None:
    assert tuple(bench.CASES) == BENCH_CASES


def test_bench_data() -> None:
    """The data is peaked, and the printed fraction is what the definition says."""
    inputs = bench.make_inputs(np, (200, 64, 8192), np.dtype(ml_dtypes.bfloat16))
    logits = inputs.e.astype(np.float64) @ inputs.c.astype(np.float64).T
    p = np.exp(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    p[np.arange(200), inputs.targets] = 1
    kept = [np.minimum(tile.max(axis=0) / (16 / 8192), 1) for tile in (p[:128], p[128:])]
    found = bench.kept_fraction(np, inputs)
    assert found == pytest.approx(np.mean(kept), rel=1e-4)
    assert 0.01 < found < 0.2


def test_bench_counts_what_a_call_takes_and_not_what_is_left_of_others() -> None:
    """Room that an earlier call left in CuPy's pool would hide what this one needs."""

    class Pool:
        def __init__(self) -> None:
            self.free = self.total = 0

        def malloc(self, size: int) -> None:
            if size > self.free:
                self.total += size
            else:
                self.free -= size

        def total_bytes(self) -> int:
            return self.total

    common = Pool()
    common.free = 2**30
    allocator = common.malloc

    @contextlib.contextmanager
    def using_allocator(given: Any) -> Iterator[None]:
        nonlocal allocator
        before, allocator = allocator, given
        yield
        allocator = before

    cupy: Any = SimpleNamespace(
        cuda=SimpleNamespace(MemoryPool=Pool, using_allocator=using_allocator)
    )
    for _ in range(2):
        assert bench._extra_memory(cupy, lambda: (allocator(3 * 2**20), allocator(2**20))) == 2**22
    assert allocator == common.malloc


# The front


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--steps", "0"], "--steps: must be at least 1, got 0"),
        (["demo", "--steps", "many"], "--steps: invalid integer of at least 1 value: 'many'"),
        (["demo", "--vocab", "1000"], "--vocab: must be at least 16384, got 1000"),
        (["bench"], "required: --case"),
        (["bench", "--case", "huge"], "invalid choice: 'huge'"),
        (["loss"], "required: FILE"),
        (["loss", "x.npz", "--filter", "best"], "invalid choice: 'best'"),
        (["loss", "x.npz", "--filter-eps", "some"], "invalid 'auto' or number value: 'some'"),
    ],
)
def test_wrong_usage(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["loss", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: cce-cupy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError("Unable to allocate 9 TiB"), 2, "out of memory: Unable to allocate 9 TiB"),
    ],
)
def test_interruptions(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*arguments: object) -> int:
        raise error

    monkeypatch.setattr(loss, "run", interrupt)
    assert main(["loss", "data.npz"]) == status
    assert capsys.readouterr().err == f"cce-cupy loss: {line}\n"


def test_as_a_module(tmp_path: Path) -> None:
    """No traceback reaches a user, and the status reaches the shell."""
    done = subprocess.run(
        [sys.executable, "-m", "cce_cupy", "loss", "absent.npz"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "cce-cupy loss: absent.npz: no such file\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal: bool, tmp_path: Path) -> None:
    """A bar where it can be redrawn, else lines; a second pass of a stage starts anew."""
    with (tmp_path / "output").open("w+", encoding="utf-8") as file:
        console = Console(file=file, force_terminal=terminal, width=120)
        with WorkProgress(console) as progress:
            for done in (1, 2, 1, 2):
                progress.callback("backward", done, 2)
            progress.start("none", 0)
            progress.update(0, "[no] markup")
        file.seek(0)
        shown = file.read()
    if terminal:
        assert "━" in shown
        assert "2/2" in shown
    else:
        lines = [line for line in shown.splitlines() if line]
        assert lines[:2] == ["backward: 0/2", "backward: 2/2"]
        assert lines.count("backward: 2/2") == 2
        assert "\x1b" not in shown
