"""The demo: what it writes, and that its verdict says what its numbers say."""

import json
import math

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from hf_imitate import Imitator, demo
from hf_imitate.audits.report import AuditReport, Finding
from hf_imitate.demo_report import (
    Measured,
    Resampled,
    System,
    differences,
    read_scores,
    table,
    verdict,
    verdict_on_resampling,
)

JUDGE, NUM_QUESTIONS = "ngram", 400


def measured(name, accuracy=0.6, bits=60.0, seed=0, luck=0.0, tv_lower=0.0):
    """A system audited on 400 questions; a judge is right about each where a shared number is below `accuracy`.

    `luck` is the share of a question's bits and of the judge's choice that is the system's own.
    """
    shared, own = np.random.default_rng(1), np.random.default_rng([2, seed])
    hardness = np.where(own.random(NUM_QUESTIONS) < luck, own.random(NUM_QUESTIONS), shared.random(NUM_QUESTIONS))
    nats = -math.log(2) * (bits + 20 * shared.standard_normal(NUM_QUESTIONS) + 20 * luck * own.standard_normal())
    scores = {
        "question": np.arange(NUM_QUESTIONS),
        "part": np.where(np.arange(NUM_QUESTIONS) % 2, "test", "train"),
        "human_nats": nats,
        "human_is_cut": np.zeros(NUM_QUESTIONS, bool),
        f"judge_{JUDGE}_human": (hardness < accuracy).astype(float),
        f"judge_{JUDGE}_imitator": np.full(NUM_QUESTIONS, 0.5),
    }
    findings = (
        Finding(
            f"paired_accuracy/{JUDGE}",
            accuracy,
            "probability",
            (accuracy - 0.05, min(accuracy + 0.05, 1.0)),
            0.95,
            200,
        ),
        Finding(f"tv_lower/{JUDGE}", tv_lower, "probability", (tv_lower, 1.0), 0.99, 200, True),
        Finding("bits_per_answer", bits, "bits", (bits - 2, bits + 2), 0.95, NUM_QUESTIONS),
        Finding("length_ratio", 1.0, "ratio", (0.9, 1.1), 0.95, NUM_QUESTIONS),
    )
    report = AuditReport(findings, name, None, "rows", "hash", 0, {}, NUM_QUESTIONS, {})
    return Measured(System(name, None, 1.0), report, scores)


@pytest.mark.parametrize(
    ("ours", "word"), [(0.5, "is harder to tell"), (0.8, "is easier to tell"), (0.64, "cannot be ranked")]
)
def test_the_verdict_claims_a_rank_only_where_the_difference_parts_from_zero(ours, word):
    rivals = [measured("SFT, T=0.7", 0.9, seed=1), measured("SFT, more", 0.65, seed=2, luck=0.3)]
    text = verdict([measured("base", 0.99), *rivals, measured("imitator", ours, seed=3, luck=0.3)])
    judged = text.splitlines()[0]
    assert word in judged
    assert "'SFT, more'" in judged
    assert judged.startswith(f"To the ngram judge, the imitator ({ours:.3f})")


def test_to_beat_one_rival_is_not_to_beat_all():
    rivals = [measured("SFT, T=0.7", 0.9, seed=1), measured("SFT, more", 0.6, seed=2)]
    judged = verdict([measured("base"), *rivals, measured("imitator", 0.6, seed=3)]).splitlines()[0]
    assert "cannot be ranked against 'SFT, more' (difference" in judged
    assert "T=0.7" not in judged


def test_fewer_bits_are_said_to_be_fewer_and_more_to_be_more():
    base, rival = measured("base", bits=90.0), measured("SFT", bits=60.0)
    fewer, more, equal = (verdict([base, rival, measured("imitator", bits=bits)]) for bits in (57.0, 63.0, 60.0))
    assert "57.0 bits: they surprise it less than 'SFT' (difference -3.0 [-3.0, -3.0])" in fewer
    assert "63.0 bits: they surprise it more than 'SFT' (difference +3.0 [+3.0, +3.0])" in more
    assert "they cannot be ranked against 'SFT'" in equal


def test_the_verdict_does_not_speak_of_the_base():
    text = verdict([measured("base", 0.5, 10.0), measured("SFT", 0.6), measured("imitator", 0.6)])
    assert "base" not in text


def test_the_verdict_shares_its_error_among_all_comparisons():
    """Two rivals, one judge and bits: four intervals, each at 1 - 0.05 / 4."""
    rivals = [measured("SFT, T=0.7", 0.9, luck=0.5, seed=1), measured("SFT, more", 0.65, luck=0.5, seed=2)]
    ours = measured("imitator", 0.64, luck=0.5, seed=3)
    low, high = differences(ours, rivals[1], 1 - 0.05 / 4)[JUDGE].interval
    assert f"[{low:+.3f}, {high:+.3f}]" in verdict([measured("base"), *rivals, ours])


def test_a_difference_is_that_of_the_test_questions_alone():
    """By hand: right about all of one system's test answers and half of the other's, whatever stands elsewhere."""
    ours, theirs = measured("imitator"), measured("SFT")
    tested = np.flatnonzero(ours.scores["part"] == "test")
    ours.scores[f"judge_{JUDGE}_human"] = np.where(ours.scores["part"] == "test", 1.0, np.nan)
    theirs.scores[f"judge_{JUDGE}_human"] = np.where(np.isin(np.arange(NUM_QUESTIONS), tested[:100]), 1.0, 0.0)
    found = differences(ours, theirs, 0.95)[JUDGE]
    assert found.value == pytest.approx(0.5)
    assert found.num_clusters == 200


def test_an_answer_that_was_cut_in_either_audit_counts_in_neither():
    ours, theirs = measured("imitator"), measured("SFT")
    ours.scores["human_nats"][0], ours.scores["human_is_cut"][0] = -1e9, True
    assert differences(ours, theirs, 0.95)["bits"].value == pytest.approx(0.0)
    assert differences(ours, theirs, 0.95)["bits"].num_clusters == NUM_QUESTIONS - 1


def test_audits_of_different_questions_are_not_compared():
    ours, theirs = measured("imitator"), measured("SFT")
    theirs.scores["part"] = theirs.scores["part"][::-1]
    with pytest.raises(ValueError, match="'imitator' and 'SFT' asked different questions"):
        differences(ours, theirs, 0.95)


def test_the_table_shows_every_system_with_its_interval():
    lines = table([measured("base", 0.9, 80.0, tv_lower=0.25), measured("imitator", 0.6, 61.5)])
    assert len(lines) == 4
    assert "0.600 [0.550, 0.650]" in lines[3]
    assert "61.5 ± 2.0" in lines[3]
    assert "0.25" in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_what_was_not_measured_is_said_not_to_be():
    lost = measured("imitator")
    findings = tuple(Finding(f.name, None, f.unit, detail="Not measured.") for f in lost.report.findings)
    lost = lost._replace(report=AuditReport(findings, "x", None, "rows", "hash", 0, {}, 1, {}))
    assert table([measured("base"), lost])[3].count("not measured") == 4
    text = verdict([measured("base"), measured("SFT"), lost])
    assert "The ngram judge could not be measured." in text
    assert "Human answers cost it" not in text


def test_what_resampling_changed_is_said_only_where_the_interval_parts_from_zero():
    single = measured("imitator", 0.7, 60.0)
    better = verdict_on_resampling(Resampled(measured("kept", 0.55, 57.0), single))
    assert "* the ngram judge is right: -0.140 [-0.196, -0.084], less often." in better
    assert "* bits of a human answer: -3.00 [-3.00, -3.00], fewer." in better
    worse = verdict_on_resampling(Resampled(measured("kept", 0.85, 63.0), single))
    assert (worse.count(", more often."), worse.count(", more.")) == (1, 1)
    same = verdict_on_resampling(Resampled(measured("kept", 0.7, 60.0), single))
    assert same.count("which way is not certain") == 2


def test_a_quick_demo_trains_audits_and_saves_what_loads(tiny_model_dir, tmp_path, capsys):
    out = tmp_path / "demo"
    assert demo.main(["--model", str(tiny_model_dir), "--output_dir", str(out), "--speed_up", "60"]) == 0
    printed = capsys.readouterr().out
    assert "Done in" in printed
    systems = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert [s["system"] for s in systems][-3:] == ["SFT, as many more steps", "imitator", "imitator, resample 8"]
    assert len(systems) == 5
    assert (systems[-1]["resample"], systems[-1]["num_rows"]) == (8, demo.FEWEST_AUDITED)
    kept = AuditReport.load(out / "_rivals" / "resampled")
    assert kept["sampler_match"].value == 1.0
    assert kept.decoding["resample"] == 8
    assert json.loads(json.dumps(kept["bits_per_answer"].to_dict())) in systems[-1]["findings"]
    assert "Where the distinguisher keeps one of 8 answers, on 60 of the questions" in printed
    report = AuditReport.load(out / "audit")
    assert report["paired_accuracy/ngram"].value is not None
    assert json.loads(json.dumps(report["paired_accuracy/ngram"].to_dict())) in systems[-2]["findings"]
    assert len(read_scores(out / "audit" / "scores.parquet")["question"]) == demo.FEWEST_AUDITED
    assert (out / "frontier.png").stat().st_size > 10_000
    assert (out / "audit" / "losses.png").exists()
    assert (out / "table.md").read_text(encoding="utf-8").strip() in printed
    assert AutoModelForCausalLM.from_pretrained(str(out)).num_parameters() > 0
    assert (out / "distinguisher" / "checks.json").exists()
    assert not (out / "training_args.bin").exists()
    assert "A latent task" in printed
    assert "thinks, at most" in printed
    assert Imitator.from_pretrained(out / "_thinking").latent is not None


def test_a_demo_that_runs_out_of_time_in_the_warm_up_still_has_a_model_to_compare():
    """On a machine at load 10 the deadline came at step 33 of 56, and there were no weights of the warm-up's end."""
    import types

    import torch
    from transformers import TrainerControl

    model = torch.nn.Linear(2, 2)
    trainer = types.SimpleNamespace(model=model, phases=types.SimpleNamespace(imitator_warmup=56))
    keeper, control = demo._Keeper(trainer, deadline=-1.0), TrainerControl()
    state = types.SimpleNamespace(global_step=33)
    keeper.on_step_begin(None, state, control)
    assert not keeper.after_warmup
    keeper.on_step_end(None, state, control)
    assert control.should_training_stop
    keeper.on_train_end(None, state, control)
    assert torch.equal(keeper.after_warmup["weight"], model.weight)
