"""The demo: what it writes, and that its verdict says what its numbers say."""

import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from hf_imitate import demo
from hf_imitate.audits.distinguishability import Judgement
from hf_imitate.bounds import Interval
from hf_imitate.demo_report import Measured, System, table, verdict
from hf_imitate.rendering import Answer


def measured(name, accuracy, half, bits):
    judgement = Judgement(
        "ngram", accuracy, Interval(accuracy - half, accuracy + half), 0.1, Interval(0, 0.2), 500, 0, ()
    )
    return Measured(
        System(name, None, 1.0), bits, (bits - 2, bits + 2), 1.0, {"ngram": judgement}, [Answer("a", True)]
    )


@pytest.mark.parametrize(
    ("ours", "word"), [(0.55, "is harder to tell"), (0.75, "is easier to tell"), (0.64, "cannot be ranked")]
)
def test_the_verdict_claims_a_rank_only_where_intervals_part(ours, word):
    rivals = [measured("SFT, T=0.7", 0.9, 0.02, 80.0), measured("SFT, T=1", 0.65, 0.02, 60.0)]
    text = verdict([measured("base", 0.99, 0.01, 90.0), *rivals, measured("imitator", ours, 0.02, 61.5)])
    assert word in text
    assert "'SFT, T=1' (0.650)" in text
    assert "61.5 bits; under 'SFT, T=1' they cost 60.0" in text


def test_the_verdict_compares_with_the_best_rival_not_with_the_base():
    text = verdict(
        [
            measured("base", 0.5, 0.01, 10.0),
            measured("SFT, T=1", 0.6, 0.02, 60.0),
            measured("imitator", 0.6, 0.02, 61.0),
        ]
    )
    assert "base" not in text


def test_the_table_shows_every_system_with_its_interval():
    lines = table([measured("base", 0.9, 0.05, 80.0), measured("imitator", 0.6, 0.02, 61.5)])
    assert len(lines) == 4
    assert "0.600 [0.580, 0.620]" in lines[3]
    assert "61.5 ± 2.0" in lines[3]
    assert len({len(line) for line in lines}) == 1


def test_a_quick_demo_trains_judges_and_saves_what_loads(tiny_model_dir, tmp_path, capsys):
    out = tmp_path / "demo"
    assert demo.main(["--model", str(tiny_model_dir), "--output_dir", str(out), "--speed_up", "60"]) == 0
    printed = capsys.readouterr().out
    assert "Done in" in printed
    systems = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert [s["system"] for s in systems][-2:] == ["SFT, as many more steps", "imitator"]
    assert len(systems) == 6
    for system in systems:
        assert 0 <= system["judges"]["ngram"]["accuracy"] <= 1
        assert np.isfinite(system["bits_per_answer"])
    assert (out / "frontier.png").stat().st_size > 10_000
    assert (out / "table.md").read_text(encoding="utf-8").strip() in printed
    assert AutoModelForCausalLM.from_pretrained(str(out)).num_parameters() > 0
    assert (out / "distinguisher" / "checks.json").exists()
    assert not (out / "training_args.bin").exists()
