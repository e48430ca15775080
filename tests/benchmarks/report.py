"""From records to documents.

    python tests/benchmarks/report.py take FOLDER
    python tests/benchmarks/report.py fill

The first puts what a run left in a folder into results/; the second writes the documents' tables
and pictures from there. Records of several runs of gpu.py become one: cases are joined by their
sizes, rows by their names. Those of peers alone are kept apart, and stay when our kernels change.
In the documents, what stands between ``<!-- begin: NAME -->`` and
``<!-- end: NAME -->`` is replaced; a part whose record is not there is empty.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax_tables
import picture
import tables
import training
from records import read_record, write_record
from runs import OURS

Record = dict[str, Any]

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[2] / "docs"

PARTS = {
    "harness": "performance.md",
    "growth": "performance.md",
    "torch-overhead": "pytorch.md",
    "jax-overhead": "jax.md",
    "torch-training": "training.md",
    "jax-training": "training.md",
}
"""What is filled, and in which document."""

COPIED = ("torch_overhead.json", "jax_overhead.json", "jax_training.json")


def join(records: Iterable[Record]) -> Record:
    """Join records of gpu.py, all of one device and, unless all are of peers, of the same kernels.

    Parameters
    ----------
    records : iterable of dict
        Later rows of the same name replace earlier ones.

    Raises
    ------
    ValueError
        Where they are of different devices or kernels.
    """
    first, *rest = records
    joined = first | {"cases": []}
    cases: dict[tuple[Any, ...], Record] = {}
    protocols: dict[str, None] = {}
    shared = ["device"] if all(map(_is_of_peers, (first, *rest))) else ["device", "kernels"]
    for record in (first, *rest):
        for key in shared:
            if record.get(key) != first.get(key):
                raise ValueError(
                    f"records of different {key}: {first.get(key)} and {record.get(key)}"
                )
        protocols[record["protocol"]] = None
        joined["versions"] = joined["versions"] | record["versions"]
        for case in record["cases"]:
            key = tuple(case[k] for k in ("case", "tokens", "dim", "vocab", "dtype", "sweep"))
            _join_case(cases.setdefault(key, case | {"rows": [], "seeds": [], "absent": {}}), case)
    joined["protocol"] = " ".join(protocols)
    joined["cases"] = list(cases.values())
    return joined


def _is_of_peers(record: Record) -> bool:
    cases = record["cases"]
    ours = any(row["run"].startswith(OURS) for case in cases for row in case["rows"])
    return not ours and not any(case["seeds"] for case in cases)


def _join_case(whole: Record, case: Record) -> None:
    rows = {(row["run"], row["base"]): row for row in (*whole["rows"], *case["rows"])}
    whole["rows"] = list(rows.values())
    whole["seeds"] = case["seeds"] or whole["seeds"]
    whole["absent"] = whole["absent"] | case["absent"]


def take(folder: Path, results: Path) -> None:
    """Put what a run left in a folder, and in those below it, where results are kept."""
    found = [(path, read_record(path)) for path in sorted(folder.rglob("*.json"))]
    kinds: dict[str, list[Record]] = {"harness.json": [], "peers.json": [], "sweeps.json": []}
    for _, record in found:
        if not (isinstance(record, dict) and record.get("cases")):
            continue
        if record["cases"][0]["sweep"] is not None:
            kinds["sweeps.json"].append(record)
        else:
            kinds["peers.json" if _is_of_peers(record) else "harness.json"].append(record)
    for name, some in kinds.items():
        if some:
            write_record(results / name, join(some))
    for path, record in found:
        if path.name in COPIED:
            shutil.copyfile(path, results / path.name)
        elif isinstance(record, dict) and ("arm" in record or "speed" in record):
            (results / "training").mkdir(exist_ok=True)
            shutil.copyfile(path, results / "training" / path.name)


def fill(results: Path, docs: Path) -> list[str]:
    """Fill all parts of the documents, draw their pictures, and return the names of the filled."""
    filled = []
    for part, document in PARTS.items():
        text = _MAKERS[part](results, docs / "figures")
        path = docs / document
        path.write_text(replace(path.read_text(encoding="utf-8"), part, text), encoding="utf-8")
        if text:
            filled.append(part)
    return filled


def replace(document: str, part: str, text: str) -> str:
    """Return the document with what stands between a part's marks replaced."""
    begin, end = f"<!-- begin: {part} -->", f"<!-- end: {part} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(document)) != 1:
        raise ValueError(f"the document must have {begin} and {end} once")
    inner = f"\n\n{text}\n\n" if text else "\n"
    return pattern.sub(lambda _: f"{begin}{inner}{end}", document)


def _harness(results: Path, figures: Path) -> str:
    record = _read(results / "harness.json")
    if record is None:
        return ""
    peers = _read(results / "peers.json")
    whole = record if peers is None else _with_peers(record, peers)
    cases = whole["cases"]
    compared = [case for case in cases if not all(r["run"].startswith(OURS) for r in case["rows"])]
    blocks = ["## All cases", tables.machine(record), record["protocol"]]
    if any("forward" in row["run"] for case in cases for row in case["rows"]):
        picture.draw_forward(whole, figures / "harness_forward.svg")
        alt = "Times of forwards as a part of the vendor's logits product, for each case"
        blocks += ["### Forward", _image("harness_forward.svg", alt), tables.forward_table(record)]
    if any("gradients" in row["run"] for case in cases for row in case["rows"]):
        picture.draw_gradients(whole, figures / "harness_gradients.svg")
        alt = "Times of loss and gradients as a part of the vendor's logits product"
        blocks += ["### Loss and gradients", _image("harness_gradients.svg", alt)]
        blocks.append(tables.gradients_table(record))
    if variants := tables.variants_table(record):
        blocks += [
            "### Options and ignored tokens",
            "Parts of our own time without.",
            variants,
        ]
    if peers is not None:
        blocks += ["### Against others", f"The others: {tables.machine(peers)}"]
        if any(row.get("de_error") is not None for case in compared for row in case["rows"]):
            picture.draw_accuracy(whole, figures / "harness_accuracy.svg")
            alt = "Errors of the gradients over times, for ours and others"
            blocks.append(_image("harness_accuracy.svg", alt))
        for case in compared:
            title = f"{case['case']}: N {case['tokens']}, D {case['dim']}, V {case['vocab']}"
            blocks += [title, tables.methods_table(case)]
            if case["absent"]:
                blocks.append(f"Not measured: {'; '.join(tables.absent_lines(case))}.")
    if seeds := tables.seeds_table(record):
        number = max(figures["seeds"] for case in cases for figures in case["seeds"])
        blocks += ["### The mean over seeds", f"Relative errors, {number} seeds.", seeds]
    return "\n\n".join(filter(None, blocks))


def _with_peers(record: Record, peers: Record) -> Record:
    """Return a record whose cases have the rows of peers too."""
    cases = {_sizes(case): case for case in record["cases"]}
    for case in peers["cases"]:
        whole = dict(cases.get(_sizes(case), case | {"rows": [], "absent": {}}))
        _join_case(whole, case)
        cases[_sizes(case)] = whole
    return record | {"cases": list(cases.values())}


def _sizes(case: Record) -> tuple[Any, ...]:
    return tuple(case[key] for key in ("case", "tokens", "dim", "vocab", "dtype"))


def _growth(results: Path, figures: Path) -> str:
    record = _read(results / "sweeps.json")
    if record is None:
        return ""
    picture.draw_growth(record, figures / "growth.svg")
    blocks = ["## How it grows", tables.machine(record), record["protocol"]]
    blocks += [_image("growth.svg", "Times as N and as V grow"), tables.few_table(record)]
    blocks += [tables.growth_table(record, sweep) for sweep in ("tokens", "vocab")]
    return "\n\n".join(filter(None, blocks))


def _torch_overhead(results: Path, figures: Path) -> str:
    record = _read(results / "torch_overhead.json")
    if record is None:
        return ""
    sizes = f"N {record['tokens']}, D {record['dim']}, V {record['vocab']}, bfloat16."
    return "\n\n".join((f"{tables.machine(record)} {sizes}", tables.torch_overhead_table(record)))


def _jax_overhead(results: Path, figures: Path) -> str:
    record = _read(results / "jax_overhead.json")
    if record is None:
        return ""
    sizes = f"N {record['tokens']}, D {record['dim']}, V {record['vocab']}, bfloat16."
    return "\n\n".join((f"{tables.machine(record)} {sizes}", tables.jax_overhead_table(record)))


def _torch_training(results: Path, figures: Path) -> str:
    found = [read_record(path) for path in sorted((results / "training").glob("*.json"))]
    runs = training.finished(found)
    if not runs:
        return ""
    training.draw(found, figures / "training.svg")
    first = runs[0]
    setting, text = first["setting"], first["text"]
    said = (
        f"{first['device']}, {first['date']}, torch {first['torch']}: "
        f"{first['parameters'] / 1e6:.1f} M parameters, V {setting['vocab']}, D {setting['dim']}, "
        f"{setting['batch'] * setting['length']} tokens a step, {setting['steps']} steps; "
        f"{text['training']} tokens to train on (sha256 {text['sha256'][:12]})."
    )
    image = _image("training.svg", "Validation losses, and their differences from the plain loss")
    return "\n\n".join((said, image, training.table(found), training.curves_table(found)))


def _jax_training(results: Path, figures: Path) -> str:
    record = _read(results / "jax_training.json")
    if record is None or record["comparison"] is None:
        return ""
    jax_tables.draw(record, figures / "jax_training.svg")
    sizes = record["sizes"]
    said = (
        f"{record['device']}, {record['date']}, JAX {record['jax']}, optax {record['optax']}: "
        f"V {sizes['vocab']}, D {sizes['dim']}, {sizes['layers']} layers, "
        f"{sizes['batch'] * sizes['length']} tokens a step, {sizes['steps']} steps."
    )
    image = _image("jax_training.svg", "Training losses, and differences of the held-out ones")
    return "\n\n".join((said, image, jax_tables.table(record)))


_MAKERS: dict[str, Callable[[Path, Path], str]] = {
    "harness": _harness,
    "growth": _growth,
    "torch-overhead": _torch_overhead,
    "jax-overhead": _jax_overhead,
    "torch-training": _torch_training,
    "jax-training": _jax_training,
}


def _read(path: Path) -> Record | None:
    return read_record(path) if path.exists() else None


def _image(name: str, alt: str) -> str:
    return f"```{{image}} figures/{name}\n:alt: {alt}\n```"


def main(arguments: list[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    taking = commands.add_parser("take", help="put a run's records where results are kept")
    taking.add_argument("folder", type=Path)
    filling = commands.add_parser("fill", help="fill the documents from the results")
    for command in (taking, filling):
        command.add_argument("--results", type=Path, default=RESULTS)
    filling.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    if options.command == "take":
        take(options.folder, options.results)
        print(*sorted(path.name for path in options.results.rglob("*.json")))
    else:
        print("filled:", *fill(options.results, options.docs))


if __name__ == "__main__":
    main()
