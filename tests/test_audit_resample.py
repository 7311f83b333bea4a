"""Audits of answers that a distinguisher keeps, in the world of 13 answers of test_residual_imitator.py."""

import dataclasses
import itertools
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_residual_imitator import (
    CHECK_WEIGHT,
    exact_law,
    make_distinguisher,
    make_imitator,
    read,
    says_wanted,
    thinking,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf_imitate.audits.audit_plan import fingerprint
from hf_imitate.audits.evidence import collect_evidence
from hf_imitate.audits.evidence_cache import EvidenceCache
from hf_imitate.audits.hidden_deviation import audit_hidden_deviation
from hf_imitate.audits.judge_family import audit_distinguishability
from hf_imitate.audits.named_judges import make_judge, named_judges
from hf_imitate.audits.report import AuditReport
from hf_imitate.audits.resampled_law import ResampledLaw
from hf_imitate.audits.retrodiction import audit_retrodiction
from hf_imitate.audits.run import audit
from hf_imitate.audits.sampler import audit_sampler
from hf_imitate.audits.splits import split_questions
from hf_imitate.processed_law import ProcessedLaw

QUIET = {"judges": ["surface"], "output_dir": None, "progress": False}


def questions(num):
    words = itertools.chain.from_iterable(itertools.product("abc", repeat=n) for n in range(1, 8))
    return [" ".join(word) for word in itertools.islice(words, num)]


def rows(num=40, **columns):
    answers = ["a", "b", "c", "a b"]
    return Dataset.from_dict({"prompt": questions(num), "completion": (answers * num)[:num], **columns})


def same_question(question, answer, num):
    return Dataset.from_dict({"prompt": [question] * num, "completion": [answer] * num})


def collected(imitator, dataset, num_candidates, seed=0, law=None, checks=None, num_estimates=8):
    law = law or ProcessedLaw()
    resampled = ResampledLaw(imitator, law, num_candidates, checks, num_estimates)
    return collect_evidence(imitator, dataset, law=law, seed=seed, batch_size=1024, resampled=resampled), resampled


def by_name(findings):
    return {finding.name: finding for finding in findings}


@pytest.fixture(scope="module")
def imitator():
    return make_imitator(distinguisher=make_distinguisher())


@pytest.fixture(scope="module")
def checked():
    return make_imitator(distinguisher=make_distinguisher([says_wanted]))


@pytest.fixture(scope="module")
def audited(imitator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    return audit(
        imitator, rows(), judges=["surface", "likelihood"], resample=4, output_dir=folder, progress=False
    ), folder


def test_the_answers_audited_are_the_ones_that_people_get(imitator):
    repeated = Dataset.from_list([*rows(30), *rows(10)])
    evidence, _ = collected(imitator, repeated, 4, seed=3)

    assert evidence.sampled_texts[:30] == [own[0] for own in imitator.answer(questions(30), seed=3, resample=4)]
    second = imitator.answer(questions(10), seed=3, first_draw=1, resample=4)
    assert evidence.sampled_texts[30:] == [own[0] for own in second]


def test_the_scores_are_unbiased_and_their_logs_as_low_as_is_said(imitator):
    """600 rows of one question and answer, against the law summed over all 13^3 sets of candidates."""
    truth = exact_law(imitator, "a b", 3)[[read(imitator, ids).text for ids in _outcomes()].index("b")]

    evidence, _ = collected(imitator, same_question("a b", "b", 600), 3, num_estimates=4)

    estimates = np.exp(evidence.human.nats)
    error = estimates.std() / math.sqrt(600)
    assert abs(estimates.mean() - truth.item()) < 4 * error
    assert error < 0.03 * truth
    bias = evidence.human.nats.mean() - math.log(estimates.mean())  # against the mean itself: less noise
    assert bias < -0.02
    assert evidence.human.log_bias.mean() == pytest.approx(bias, rel=0.3)
    np.testing.assert_allclose(evidence.human.lower_bound, evidence.human.nats - math.log(20))


def _outcomes():
    from test_residual_imitator import OUTCOMES

    return OUTCOMES


def test_one_rows_answers_share_companions_and_no_two_rows_do(imitator):
    evidence, resampled = collected(imitator, same_question("c", "a b", 60), 3)
    equal = [n for n, answer in enumerate(evidence.imitator_answers) if answer.text == "a b"]
    assert len(equal) > 3
    np.testing.assert_allclose(evidence.human.nats[equal], evidence.imitator.nats[equal], atol=1e-5)
    assert len(np.unique(evidence.human.nats.round(6))) > 50
    # Companions are nobody's candidates: the choice of an answer says nothing about what it is held against.
    logits = resampled.companions(["c"], [0], {}, seed=0, batch_size=64)["logits"]
    candidates = resampled.residual.answer(["c"], num_answers=1)[0][0].logits
    assert set(logits.flatten().round(4)) != set(candidates.numpy().round(4))
    assert logits.shape == (1, 8, 2)


def test_companions_are_drawn_once_also_where_nothing_is_stored(imitator, monkeypatch):
    real, asked = ResampledLaw.companions, []

    def counted(self, prompts, *arguments, **settings):
        asked.append(len(prompts))
        return real(self, prompts, *arguments, **settings)

    monkeypatch.setattr(ResampledLaw, "companions", counted)
    collected(imitator, same_question("c", "a b", 60), 3)
    assert asked == [60]


def test_humans_who_are_the_resampled_law_are_not_told_from_it_and_the_plain_law_is():
    """Human answers are draws of p_4 under another seed. The seeds were fixed before the first run."""
    imitator = make_imitator(distinguisher=make_distinguisher())
    imitator.renderer.end_token_ids.append(2)  # a "c" ends an answer, too: most do then
    asked = Dataset.from_dict({"prompt": questions(600), "completion": ["a"] * 600})
    own, other = (collected(imitator, asked, 4, seed=seed)[0] for seed in (0, 1234))
    evidence = dataclasses.replace(own, human_answers=other.imitator_answers, human=other.imitator)
    plain = collect_evidence(imitator, asked)
    told = dataclasses.replace(plain, human_answers=other.imitator_answers)
    p_values = {}
    for name, seen in (("resampled", evidence), ("plain", told)):
        judges = {
            judge: make_judge(judge, imitator, None, seen, None, ProcessedLaw(), EvidenceCache(None))
            for judge in named_judges(["surface", "likelihood"])
        }
        p_values[name] = audit_distinguishability(seen, judges, split_questions(seen.prompts)).p_values
    assert min(p["p_holm"] for p in p_values["resampled"].values()) > 0.01
    assert min(p["p"] for p in p_values["plain"].values()) < 1e-3
    gap = by_name(audit_retrodiction(evidence, 0.999))["calibration_gap"]
    assert gap.interval[0] <= 0 <= gap.interval[1]
    assert "Both sides' bits are estimates" in gap.detail


def test_every_number_is_of_the_resampled_law_or_missing_with_its_reason(audited):
    report, _ = audited
    assert report.decoding["resample"] == 4
    assert report["sampler_match"].value == 1.0
    assert "all 4 candidates of each answer, and the choice" in report["sampler_match"].detail
    assert report["sampler_match"].n > 4 * 40
    assert report["sampler_conformance"].value is None
    assert "resampling" in report["sampler_conformance"].detail
    assert report["outside_support"].value == 0.0
    bits = report["bits_per_answer"]
    assert "the log of the mean of 8 unbiased estimates" in bits.detail
    assert "kept out of 4" in bits.detail
    assert report["mean_log_prob_lower"].certified
    assert "lower" in report["mean_log_prob_lower"].detail
    assert any("stand 28 candidates" in note for note in report.notes)  # 4 + 8 x 3
    assert all(report.cost[finding.name] >= 0 for finding in report.findings)


def test_bits_and_bounds_are_those_of_the_law_summed_by_hand(audited, imitator):
    report, _ = audited
    texts = [read(imitator, ids).text for ids in _outcomes()]
    whole = [(row["prompt"], row["completion"]) for row in rows() if " " not in row["completion"]]
    exact = [exact_law(imitator, question, 4)[texts.index(answer)].log().item() for question, answer in whole]
    bits = -np.mean(exact) / math.log(2)
    assert abs(report["bits_per_answer"].value - bits) < 0.15
    plain = imitator.log_prob(*map(list, zip(*whole, strict=True))).nats
    assert abs(-plain.mean().item() / math.log(2) - bits) > 0.3  # p itself would not pass
    assert report["mean_log_prob_lower"].value < np.mean(exact)


def test_a_certificate_for_unique_answers_lies_above_the_truth(imitator):
    """Every human says "b": total variation is 1 - p_4(b), summed by hand over the very questions."""
    dataset = Dataset.from_dict({"prompt": questions(60), "completion": ["b"] * 60})
    evidence, _ = collected(imitator, dataset, 4)
    texts = [read(imitator, ids).text for ids in _outcomes()]
    truth = np.mean([1 - exact_law(imitator, question, 4)[texts.index("b")].item() for question in questions(60)])
    (found,) = audit_hidden_deviation(evidence, entropy="unique")
    assert found.certified
    assert truth < found.value < truth + 0.4
    assert "estimates" in found.detail


def test_a_swapped_answer_or_another_seed_is_seen_by_re_execution(imitator):
    evidence, resampled = collected(imitator, rows(60), 4)
    sampled = [
        answer._replace(text=text)
        for answer, text in zip(evidence.imitator_answers, evidence.sampled_texts, strict=True)
    ]
    evidence = dataclasses.replace(evidence, imitator_answers=sampled)
    assert audit_sampler(imitator, evidence, resampled=resampled)[0].value == 1.0
    plain = collect_evidence(imitator, rows(60))
    swapped = dataclasses.replace(evidence, imitator_answers=plain.imitator_answers)
    assert audit_sampler(imitator, swapped, resampled=resampled)[0].value < 1.0
    assert audit_sampler(imitator, evidence, seed=5, resampled=resampled)[0].value < 1.0


def test_checks_reach_the_choice_with_the_columns_of_their_own_row(checked):
    """One question in 300 rows that want different words, and a check that the distinguisher does not know."""
    wanted = ["c", "a"] * 150
    dataset = same_question("a b", "b", 300).add_column("wanted", wanted)
    evidence, resampled = collected(checked, dataset, 3, checks=[is_short, says_wanted])
    texts = [read(checked, ids).text for ids in _outcomes()]
    for want in ("c", "a"):
        law = exact_law(checked, "a b", 3, lambda text, want=want: CHECK_WEIGHT * ((want in text.split()) - 0.5))
        chosen = np.flatnonzero(np.array(wanted) == want)
        share = np.mean([want in evidence.sampled_texts[n].split() for n in chosen])
        truth = sum(law[i].item() for i, text in enumerate(texts) if want in text.split())
        assert abs(share - truth) < 4 * math.sqrt(truth * (1 - truth) / len(chosen))
        estimates = np.exp(evidence.human.nats[chosen])
        error = estimates.std() / math.sqrt(len(chosen))
        assert abs(estimates.mean() - law[texts.index("b")].item()) < 4 * error
    assert audit_sampler(checked, evidence, resampled=resampled)[0].value == 1.0


def is_short(prompts, completions, completion_ids=None, **columns):
    return [len(text) < 3 for text in completions]


def test_one_candidate_is_the_plain_audit(imitator):
    plain, one = audit(imitator, rows(), **QUIET), audit(imitator, rows(), resample=1, **QUIET)
    assert one.findings == plain.findings
    assert one.plan_hash == plain.plan_hash
    assert set(one.ledger) == {"confidence", "certified", "judges"}
    assert "resample" not in one.decoding


def test_plan_cache_and_ledger_know_how_many_candidates_and_who_chose(audited, imitator, tmp_path):
    report, folder = audited
    told = {"resample": 4, "num_estimates": 8, "distinguisher": fingerprint(imitator.distinguisher)[:32]}
    assert report.ledger["resampling"] == told
    assert AuditReport.load(folder).ledger == report.ledger
    assert told["distinguisher"] in (folder / "audit.md").read_text(encoding="utf-8")
    assert json.loads((folder / "plan.json").read_text())["decoding"]["resample"] == 4
    other = make_imitator(distinguisher=make_distinguisher(scale=29.0))
    settings = {**QUIET, "output_dir": tmp_path}
    hashes = {
        audit(one, rows(), resample=k, **settings).plan_hash for one, k in ((imitator, 2), (imitator, 3), (other, 2))
    }
    assert len(hashes) == 3
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {one[:16] for one in hashes}


def test_a_fingerprint_sees_every_part_of_a_distinguisher(checked):
    same, other = (make_distinguisher([says_wanted]) for _ in range(2))
    assert fingerprint(same) == fingerprint(other) == fingerprint(checked.distinguisher)
    changes = [
        lambda d: d.check_weights.data.add_(1e-6),
        lambda d: d.head.weight.data.mul_(1.001),
        lambda d: setattr(d, "check_names", ("says_other",)),
        lambda d: setattr(d, "members", [{"weights": np.arange(3.0)}]),
        lambda d: setattr(d.renderer, "max_answer_tokens", 3),
    ]
    seen = {fingerprint(same)}
    for change in changes:
        distinguisher = make_distinguisher([says_wanted])
        change(distinguisher)
        seen.add(fingerprint(distinguisher))
    assert len(seen) == 1 + len(changes)
    ab, ba = (WordLevel({word: i for i, word in enumerate(words)}, unk_token="a") for words in ("ab", "ba"))
    ours, theirs = (PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)) for words in (ab, ba))
    assert fingerprint(ours) != fingerprint(theirs)  # of one size
    loop = {"x": torch.ones(2)}
    loop["self"] = loop
    assert fingerprint(loop) == fingerprint(loop)


def test_without_a_distinguisher_nothing_is_drawn_and_nothing_written(tmp_path, monkeypatch):
    plain = make_imitator()
    monkeypatch.setattr(plain.model, "forward", None)
    with pytest.raises(FileNotFoundError, match=r"distinguisher/"):
        audit(plain, rows(), resample=4, output_dir=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_checks_of_the_distinguisher_that_are_not_given_are_named(checked, tmp_path):
    with pytest.raises(ValueError, match=r"trained with the checks \['says_wanted'\]; got \[\]"):
        audit(checked, rows(), checks=[is_short], resample=4, output_dir=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_truncated_law_is_resampled_scored_and_its_zeros_are_exact(imitator):
    """Two tokens at each place: what a candidate never is, is never kept."""
    law = ProcessedLaw({"top_k": 2})
    evidence, resampled = collected(imitator, rows(60), 3, law=law)
    plain = collect_evidence(imitator, rows(60), law=law)
    assert np.isneginf(evidence.human.nats).tolist() == np.isneginf(plain.human.nats).tolist()
    assert np.isneginf(evidence.human.nats).any()
    assert not np.isneginf(evidence.imitator.nats).any()
    found = by_name(audit_retrodiction(evidence))
    assert found["outside_support"].value == by_name(audit_retrodiction(plain))["outside_support"].value > 0
    assert found["bits_per_answer"].value == math.inf
    match = audit_sampler(imitator, evidence, resampled=resampled)[0]
    assert match.value is None
    assert "truncated" in match.detail


def test_an_imitator_that_thinks_first_is_resampled_too():
    imitator = thinking()
    dataset = Dataset.from_dict({"prompt": questions(30) * 2, "completion": ["", "b c"] * 30})
    evidence, resampled = collected(imitator, dataset, 2, num_estimates=4)
    assert not evidence.has_exact_zeros
    cut = evidence.human.is_cut
    assert cut.tolist() == [False, True] * 30
    assert np.isneginf(evidence.human.nats[cut]).all()
    assert np.isfinite(evidence.human.nats[~cut]).all()
    found = by_name(audit_retrodiction(evidence))
    assert found["outside_support"].value is None
    assert audit_sampler(imitator, evidence, resampled=resampled)[0].value == 1.0


def test_another_imitator_is_compared_by_its_single_draws(imitator):
    plain = make_imitator()
    report = audit(imitator, rows(60), resample=4, against=plain, **QUIET)
    alone = audit(plain, rows(60), **QUIET)
    difference = report["bits_per_answer_difference"]
    assert difference.value == pytest.approx(
        report["bits_per_answer"].value - alone["bits_per_answer"].value, abs=1e-6
    )
    assert "Of the first imitator: scores are estimates" in difference.detail
    assert "Of the other" not in difference.detail


RUN = """
import os, signal, sys
from hf_imitate.audits import resampled_law, scorer
import test_audit_resample as world
scorer.CHUNK = 16
calls = []
if sys.argv[2] != "never":
    real = getattr(resampled_law.ResampledLaw, sys.argv[2])
    def dying(self, *arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments, **settings)
    setattr(resampled_law.ResampledLaw, sys.argv[2], dying)
world.full_audit(sys.argv[1])
"""


def full_audit(folder):
    imitator = make_imitator(distinguisher=make_distinguisher())
    return audit(imitator, rows(), judges=["surface", "likelihood"], resample=4, output_dir=folder, progress=False)


@pytest.mark.parametrize("where", ["draw", "companions", "score"])
def test_an_audit_that_is_killed_finds_the_same_when_it_is_run_again(where, tmp_path, monkeypatch):
    """SIGKILL in the second chunk: the first is not computed again, and no finding differs from a whole audit's."""
    command = [sys.executable, "-c", RUN, str(tmp_path / "killed"), where]
    killed = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "audit.json").exists()

    monkeypatch.setattr("hf_imitate.audits.scorer.CHUNK", 16)
    real, starts = getattr(ResampledLaw, where), []

    def counted(self, prompts, *arguments, **settings):
        starts.append(prompts[0])
        return real(self, prompts, *arguments, **settings)

    monkeypatch.setattr(ResampledLaw, where, counted)
    again = full_audit(tmp_path / "killed")
    num_calls = len(starts)
    starts.clear()
    unbroken = full_audit(tmp_path / "whole")
    assert again.findings == unbroken.findings
    assert again.plan_hash == unbroken.plan_hash
    assert num_calls == len(starts) - 1
