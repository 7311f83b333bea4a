import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import acceptance

TOY = """
import os, time
from pathlib import Path

HERE = Path(__file__).parent
CELLS = [{"seed": seed} for seed in range(4)]


def run_cell(cell):
    with (HERE / "ran.txt").open("a") as file:
        file.write(f"{cell['seed']}\\n")
    while cell["seed"] == 2 and (HERE / "hang").exists():
        time.sleep(0.02)
    return {"square": cell["seed"] ** 2}


def summarize(results):
    rows = [{"seed": r["cell"]["seed"], "square": r["result"]["square"]} for r in results]
    return rows, sum(row["square"] for row in rows) == 14
"""

RUN = "import sys; sys.path.insert(0, sys.argv[1]); import toy; from pathlib import Path; " + (
    "from benchmarks import acceptance; acceptance.run_entry(toy, Path(sys.argv[1]) / 'results')"
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A toy entry of four cells that notes which cells it really ran."""
    (tmp_path / "toy.py").write_text(TOY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    import toy

    yield toy
    sys.modules.pop("toy", None)


def cells_run(folder):
    path = folder / "ran.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def read_report(folder):
    (path,) = (folder / "results").glob("*-toy.json")
    return json.loads(path.read_text())


def test_a_killed_run_goes_on_with_the_cell_it_was_killed_in(tmp_path, toy):
    (tmp_path / "hang").touch()
    root = os.path.dirname(os.path.dirname(acceptance.__file__))
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], cwd=root, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while cells_run(tmp_path) != [0, 1, 2] and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert cells_run(tmp_path) == [0, 1, 2]
    (tmp_path / "hang").unlink()

    assert acceptance.run_entry(toy, tmp_path / "results")

    assert cells_run(tmp_path) == [0, 1, 2, 2, 3]
    assert [row["square"] for row in read_report(tmp_path)["summary"]] == [0, 1, 4, 9]


def test_an_edited_entry_is_measured_again(tmp_path, toy):
    acceptance.run_entry(toy, tmp_path / "results")
    before = acceptance.cell_key(toy, toy.CELLS[0])
    (tmp_path / "toy.py").write_text(TOY.replace("** 2}", "** 2 + 1}"), encoding="utf-8")
    sys.modules.pop("toy")
    import linecache

    import toy as edited

    linecache.checkcache()
    assert acceptance.cell_key(edited, edited.CELLS[0]) != before
    assert not acceptance.run_entry(edited, tmp_path / "results")
    assert cells_run(tmp_path) == [0, 1, 2, 3] * 2


def test_a_finished_run_measures_nothing_again(tmp_path, toy):
    assert acceptance.run_entry(toy, tmp_path / "results")
    assert acceptance.run_entry(toy, tmp_path / "results")
    assert cells_run(tmp_path) == [0, 1, 2, 3]


def test_two_equal_cells_in_one_entry_are_refused(tmp_path, toy):
    toy.CELLS = [{"seed": 0}, {"seed": 0}]
    with pytest.raises(ValueError, match="equal cells"):
        acceptance.run_entry(toy, tmp_path / "results")


def test_the_limit_stops_a_cell_and_keeps_the_finished_ones(tmp_path, toy):
    (tmp_path / "hang").touch()
    with pytest.raises(acceptance.OutOfTime, match="2 of 4 cells"):
        acceptance.run_entry(toy, tmp_path / "results", max_minutes=0.005)
    assert cells_run(tmp_path) == [0, 1, 2]
    assert len(list((tmp_path / "results" / "partial" / "toy").glob("*.json"))) == 2


def test_time_spent_before_a_kill_counts(tmp_path, toy):
    done = {"cell": toy.CELLS[0], "seconds": 61.0, "package_source": "", "result": {"square": 0}}
    partial = tmp_path / "results" / "partial" / "toy"
    acceptance.write_atomically(partial / f"{acceptance.cell_key(toy, toy.CELLS[0])}.json", done)
    with pytest.raises(acceptance.OutOfTime, match="1 of 4 cells"):
        acceptance.run_entry(toy, tmp_path / "results", max_minutes=1)
    assert cells_run(tmp_path) == []


def test_numbers_of_older_code_are_named(tmp_path, toy, monkeypatch, capsys):
    monkeypatch.setattr(acceptance, "package_source", lambda: "before")
    acceptance.run_entry(toy, tmp_path / "results")
    assert "measured before" not in capsys.readouterr().out
    monkeypatch.setattr(acceptance, "package_source", lambda: "after")
    acceptance.run_entry(toy, tmp_path / "results")
    assert "4 of 4 cells were measured before" in capsys.readouterr().out


def test_the_report_says_what_the_numbers_depend_on(tmp_path, toy, capsys):
    acceptance.run_entry(toy, tmp_path / "results")
    report = read_report(tmp_path)
    assert report["passed"] is True
    assert {"python", "torch", "trl"} <= set(report["versions"])
    assert [cell["cell"] for cell in report["cells"]] == toy.CELLS
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["seed  square", "----  ------"]
    assert printed[5].split() == ["3", "9"]


def test_a_number_that_json_cannot_hold_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        acceptance.write_atomically(tmp_path / "x.json", {"bits": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_entry_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match="no entry 'nonsense'"):
        acceptance.load_entry("nonsense")


def test_an_entry_without_its_parts_says_which(tmp_path, monkeypatch):
    (tmp_path / "half_pkg").mkdir()
    (tmp_path / "half_pkg" / "half.py").write_text("CELLS = []", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="run_cell"):
        acceptance.load_entry("half", package="half_pkg")


def test_the_table_is_aligned_and_says_what_is_missing():
    table = acceptance.format_table([{"seed": 0, "bits": 1.23456789}, {"seed": 10, "bits": None}])
    assert table.splitlines() == ["seed  bits", "----  ------------", "0     1.235", "10    not measured"]
