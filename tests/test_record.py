"""What makes all records of a GPU, with scripts that need none."""

import json
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, time
how, path = sys.argv[1], sys.argv[-1]
with open(path, "w") as file:
    json.dump({"how": how}, file)
if how == "fails":
    sys.exit(2)
if how == "endless":
    time.sleep(600)
"""


@pytest.fixture
def record(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    import record

    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "stand_in.py").write_text(SCRIPT)
    monkeypatch.setattr(record, "HERE", tmp_path / "scripts")
    return record


def make(record, folder, *how, seconds=60):
    listed = [record.Run("stand_in.py", [name, "--json"], f"{name}.json") for name in how]
    return dict(record.make_records(listed, folder, seconds))


def test_what_is_there_is_not_made_again(record, tmp_path):
    (tmp_path / "first.json").write_text("{}")
    found = make(record, tmp_path, "first", "second")
    assert found["first.json"] == "there already"
    assert found["second.json"].endswith(" s")
    assert json.loads((tmp_path / "first.json").read_text()) == {}
    assert json.loads((tmp_path / "second.json").read_text()) == {"how": "second"}


def test_no_record_is_left_of_what_did_not_end_well(record, tmp_path):
    found = make(record, tmp_path, "fails", "endless", "later", seconds=3)
    assert found == {"fails.json": "status 2", "endless.json": "cut off", "later.json": "no time"}
    assert not list(tmp_path.glob("*.json"))


def test_every_record_has_a_name_that_report_takes(record, tmp_path):
    arrays, tokens = tmp_path / "arrays.safetensors", tmp_path / "tokens.npz"
    listed = list(record.runs(record.KINDS, arrays, tokens))
    names = [run.record for run in listed]
    assert len(set(names)) == len(names)
    import report

    assert set(report.COPIED) <= set(names)
    assert {f"{arm}-{seed}.json" for arm in record.ARMS for seed in record.SEEDS} <= set(names)
    # The text comes before those that read it.
    assert names.index(str(tokens)) < names.index("plain-0.json")
    without = [run.record for run in record.runs(record.KINDS, None, tokens)]
    assert set(names) - set(without) == {"case-smollm2.json"}


def test_arguments_are_those_that_the_scripts_know(record, tmp_path, monkeypatch):
    import gpu
    import training

    parser = gpu._parser()
    for run in record.runs(record.KINDS, tmp_path / "arrays", tmp_path / "tokens.npz"):
        if run.script == "gpu.py":
            given = parser.parse_args([*run.arguments, str(tmp_path / "record.json")])
            assert given.json.name == "record.json"
            assert given.case[0] in gpu.CASES
            seeded = "case" in run.record and given.case[0] in record.SEEDED
            assert (given.seeds > 0) == seeded
    assert set(record.ARMS) == set(training.ARMS)
