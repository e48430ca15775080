"""What runs everything on a GPU side by side, with processes that need none."""

import sys
from pathlib import Path

import pytest


@pytest.fixture
def side_by_side(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "gpu")
    import side_by_side

    return side_by_side


def python(name, code, **environment):
    return name, [sys.executable, "-c", code], environment


def test_how_jobs_end(side_by_side, tmp_path):
    jobs = [
        side_by_side.Job(*python("well done", "print('a'); print('fine'); print()")),
        side_by_side.Job(*python("wrong", "import sys; print('b'); sys.exit(3)")),
        side_by_side.Job(*python("told", "import os; print(os.environ['WHICH'])", WHICH="large")),
    ]
    found = list(side_by_side.run_side_by_side(jobs, tmp_path, 60, 2))
    assert [outcome.job for outcome in found] == jobs
    assert [(outcome.status, outcome.last) for outcome in found] == [
        (0, "fine"),
        (3, "b"),
        (0, "large"),
    ]
    assert (tmp_path / "well-done.txt").read_text() == "a\nfine\n\n"


def test_jobs_end_when_the_time_is_over(side_by_side, tmp_path):
    endless = python("endless", "import time; print('begun', flush=True); time.sleep(600)")
    jobs = [side_by_side.Job(*endless), side_by_side.Job(*python("after", "print(1)"))]
    found = list(side_by_side.run_side_by_side(jobs, tmp_path, 3, 1))
    assert [outcome.status for outcome in found] == [None, None]
    assert found[0].seconds < 60
    assert found[1].last == "not begun"


def test_every_part_of_the_sanitizer_is_listed_once(side_by_side):
    listed = list(side_by_side.jobs(side_by_side.KINDS, 4))
    names = [job.name for job in listed]
    assert names[:2] == ["suites", "large"]
    assert len(set(names)) == len(names) == 2 + 4 * 4 * 4
    source = (Path(side_by_side.__file__).parent / "sanitize.py").read_text()
    assert all(f'"{dtype}"' in source for dtype in side_by_side.DTYPES)
    filters = source.partition("FILTERS = [")[2].partition("\n]")[0]
    assert filters.count("gradient_filter") == len(side_by_side.FILTERS)


def test_jobs_are_spread_over_devices(side_by_side):
    listed = list(side_by_side.jobs(side_by_side.KINDS, 4))
    assert side_by_side.spread(listed, 1) == listed
    found = side_by_side.spread(listed, 2)
    assert [job.name for job in found] == [job.name for job in listed]
    devices = [job.environment.get("CUDA_VISIBLE_DEVICES") for job in found]
    assert devices[:3] == [None, "1", "0"]
    assert found[1].environment["HYPOTHESIS_PROFILE"] == "large"
    assert devices.count("0") == devices.count("1") - 1


def test_a_failure_is_the_status_of_all(side_by_side, tmp_path, monkeypatch, capsys):
    def listed(kinds, places):
        yield side_by_side.Job(*python("one", "print('2 passed')"))
        yield side_by_side.Job(*python("two", "raise SystemExit(1)"))

    monkeypatch.setattr(side_by_side, "jobs", listed)
    monkeypatch.setattr(side_by_side, "warm_up", lambda: print("compiled"))
    assert side_by_side.main([str(tmp_path / "logs"), "--places", "1"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("compiled\n")
    assert "one: status 0" in printed
    assert "2 passed" in printed
    assert printed.endswith("1 passed, 1 failed\n")
