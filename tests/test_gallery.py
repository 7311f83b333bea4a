"""The examples that make no claim of their own (for those, see test_claims.py), each in its small form."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from examples import (
    counting,
    distinguisher_as_reward,
    docstrings,
    own_dataset,
    population,
    thinking,
)
from hf_imitate import AuditReport, Imitator, demo_thinking, load_docstrings
from hf_imitate.train_cli import make_parser

ROOT = Path(__file__).resolve().parent.parent
FEW = ["json", "email", "logging"]


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def few_docstrings(monkeypatch):
    """Of three packages, so that parsing takes a moment."""
    for example in (docstrings, own_dataset, distinguisher_as_reward):
        monkeypatch.setattr(example, "load_docstrings", lambda *packages: load_docstrings(FEW))


@pytest.mark.parametrize("objective", docstrings.OBJECTIVES)
def test_docstrings_are_imitated_by_each_objective(
    objective, few_docstrings, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    """Likelihood from a base that is named, by an adapter; the others from the base that is trained where none is."""
    monkeypatch.setattr(docstrings, "tiny_base", lambda: tiny_model_dir)
    options = ["--smoke", "--objective", objective, "--output_dir", str(tmp_path)]
    found = docstrings.main([*([str(tiny_model_dir)] if objective == "retrodictive" else []), *options])

    assert found["before"] != found["after"]
    assert f"{found['before']:.1f} before" in capsys.readouterr().out
    assert is_picture(tmp_path / "docstrings.png")
    assert (Imitator.from_pretrained(tmp_path).latent is not None) == (objective == "latent")


@pytest.mark.parametrize("is_named", [True, False])
def test_a_file_of_ones_own_becomes_an_imitator_with_an_audit_and_a_card(
    is_named, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    """A file whose columns have other names, with other columns beside them, and rows without question or answer."""
    file, folder = tmp_path / "answers.jsonl", tmp_path / "imitator"
    rows = [{"q": f"What is {i // 2} plus {i % 7}?", "a": f"{i // 2 + i % 7}.", "who": i} for i in range(240)]
    rows += [{"q": "What is 1 plus 1?", "a": None}, {"q": " ", "a": "2."}, {"q": "What is 2 plus 2?", "a": ""}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(own_dataset, "tiny_base", lambda: tiny_model_dir)
    options = ["--question", "q", "--answer", "a", "--answered_by", "a class of pupils", "--output_dir", str(folder)]
    options += ["--model", str(tiny_model_dir)] if is_named else []
    report = own_dataset.main([str(file), *options, "--smoke"])

    assert (folder / "adapter_config.json").is_file() == is_named  # of the tiny base all weights are trained

    assert "3 of 243 rows left out" in capsys.readouterr().out
    assert report["bits_per_answer"].value > 1
    assert AuditReport.load(folder / "audit" / "audit.json").findings == report.findings
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "a class of pupils" in card
    assert "bits_per_answer" in card
    assert Imitator.from_pretrained(folder).answer(["What is 1 plus 1?"], max_new_tokens=4)


def test_a_frozen_distinguisher_is_a_reward_of_plain_trl(few_docstrings, tiny_model_dir, tmp_path, capsys):
    rewards, reports = distinguisher_as_reward.main([str(tiny_model_dir), "--smoke", "--output_dir", str(tmp_path)])

    assert len(rewards) == 2
    assert all(map(math.isfinite, rewards))
    bits = [report["bits_per_answer"].value for report in reports.values()]
    assert bits[0] != bits[1]  # plain TRL moved the weights
    assert all(
        0 <= reports["after"][f"paired_accuracy/{judge}"].value <= 1 for judge in distinguisher_as_reward.JUDGES
    )
    assert f"before, {bits[1]:.1f}" in capsys.readouterr().out
    assert is_picture(tmp_path / "distinguisher_as_reward.png")


def test_the_known_population_is_nearer_at_temperature_1_than_near_0(tmp_path, capsys):
    exact = population.main(["--smoke", "--output_dir", str(tmp_path)])

    assert exact["temperature 1"] < exact["temperature 0.3"]
    law = population.human_law(0)
    assert len(law) == 80
    assert all(shares.sum() == pytest.approx(1) for shares in law.values())
    for folder in ("temperature-1", "temperature-0.3"):
        report = AuditReport.load(tmp_path / folder / "audit.json")
        assert report["answer_distribution_tv/group=old"].value is not None
        assert report["human_ceiling/group=young"].interval is not None
    assert is_picture(tmp_path / "population.png")


def test_total_variation_of_a_known_population_is_half_the_sum_of_differences():
    law = {"a": population.np.array([0.5, 0.5, 0.0]), "b": population.np.array([1.0, 0.0, 0.0])}
    other = {"a": population.np.array([0.0, 0.5, 0.5]), "b": law["b"]}
    assert population.total_variation(law, other) == pytest.approx(0.25)
    assert population.total_variation(law, law) == 0


def test_thinking_shows_who_thinks_and_what_is_certain_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_thinking, "NUM_TEST", 30)
    found = thinking.main(["--smoke", "--output_dir", str(tmp_path)])

    assert found.bound > found.latent
    printed = capsys.readouterr().out
    assert f"thinks, at most      {found.bound:.3f}, certified" in printed
    assert is_picture(tmp_path / "thinking.png")


def test_rules_that_leave_fewer_grids_cost_fewer_bits(tmp_path, capsys):
    pytest.importorskip("pyganak", reason="needs the solvers of `pip install 'hf-imitate[counting]'`")
    found = counting.main(["--smoke", "--figure", str(tmp_path / "counting.png")])

    assert found == pytest.approx({"rows, columns, boxes": math.log2(3), "rows, columns": math.log2(8)})
    assert is_picture(tmp_path / "counting.png")


def test_the_shell_script_gives_options_that_the_commands_take(tmp_path):
    """`accelerate` and `hf-imitate` are played by a script that writes down what it was given."""
    fake = tmp_path / "hf-imitate"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/given\necho -- >> {tmp_path}/given\n')
    fake.chmod(0o755)
    script = ROOT / "examples" / "multi_gpu.sh"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(script), "a/model", "--num_processes", "4"], cwd=ROOT, env=environment, check=True)

    calls = [call.split("\n") for call in (tmp_path / "given").read_text().strip("-\n").split("\n--\n")]
    assert [call[0] for call in calls] == ["retrodictive", "adversarial"]
    for (name, *words), started_from in zip(calls, ("a/model", "docstring-likelihood"), strict=True):
        *_, model, _, from_file, from_line = make_parser(name).parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
        assert model.model_name_or_path == started_from
        assert from_file == []
        assert from_line[::2] == ["--accelerate_config", "--num_processes"]
