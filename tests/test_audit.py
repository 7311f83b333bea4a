"""`audit` from end to end on a tiny model: every finding, bad input, resuming, and what it leaves on disk."""

import dataclasses
import json
import math
import shutil
from itertools import product

import latent_worlds as worlds
import numpy as np
import pytest
import torch
from audit_worlds import evidence_of_words
from datasets import Dataset, load_dataset
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from hf_imitate import causal_lm
from hf_imitate.audits import run
from hf_imitate.audits.audit_files import _write_scores
from hf_imitate.audits.audit_plan import make_plan, shares_of_error, source_of, weights_fingerprint
from hf_imitate.audits.evidence import check_dataset, collect_evidence, is_mojibake
from hf_imitate.audits.evidence_cache import EvidenceCache
from hf_imitate.audits.judge_family import JudgeFamily, audit_distinguishability
from hf_imitate.audits.named_judges import make_judge
from hf_imitate.audits.report import AuditReport
from hf_imitate.audits.retrodiction import audit_retrodiction
from hf_imitate.audits.run import audit
from hf_imitate.audits.splits import split_questions
from hf_imitate.imitator import Imitator
from hf_imitate.latent_imitator import LatentImitator
from hf_imitate.processed_law import ProcessedLaw
from hf_imitate.rendering import Renderer, canonical_text
from hf_imitate.retrodictor import Retrodictor, Thinkers
from hf_imitate.scoring import score_answers
from hf_imitate.thoughts import ThoughtLaw

_KINDS = ("paired_accuracy", "e_value", "tv_lower", "judge_bits", "null_control", "power_control")
CONTRACT = [
    *(f"{kind}/{judge}" for judge in ("surface", "ngram", "likelihood") for kind in _KINDS),
    *("check_pass/is_short/human", "check_pass/is_short/imitator", "check_tv_lower/is_short"),
    *("bits_per_answer", "bits_per_byte", "mean_log_prob_lower", "outside_support", "calibration_gap"),
    *("hidden_deviation", "sampler_match", "sampler_conformance", "answer_distribution_tv", "human_ceiling"),
    *("copying", "length_ratio", "consistency"),
]


def is_short(prompts, completions, completion_ids=None, **columns):
    return [len(text) < 20 for text in completions]


def rows(num: int, name: str = "question", offset: int = 0) -> Dataset:
    rng = np.random.default_rng(offset)
    words = ["return", "number", "items", "list", "name", "file", "set"]
    answers = [" ".join(rng.choice(words, 3)) + "." for _ in range(num)]
    return Dataset.from_dict({"prompt": [f"{name} {n + offset}:" for n in range(num)], "completion": answers})


def load(tiny_model_dir) -> Imitator:
    """A random model that ends about every third token: bytes outside ASCII, which no row holds, end its answers."""
    imitator = Imitator.from_pretrained(tiny_model_dir, device="cpu")
    imitator.max_new_tokens = 14
    names = map(imitator.tokenizer.decode, range(len(imitator.tokenizer)))
    imitator.renderer.end_token_ids += [n for n, name in enumerate(names) if "\ufffd" in name or "<|" in name]
    return imitator


@pytest.fixture(scope="module")
def audited(tiny_model_dir, tmp_path_factory):
    """One full audit, and where it was written."""
    folder = tmp_path_factory.mktemp("audit")
    report = audit(
        load(tiny_model_dir),
        rows(120),
        train_dataset=rows(60, offset=1000),
        checks=[is_short],
        output_dir=folder,
        progress=False,
    )
    return report, folder


def test_every_finding_of_the_contract_is_there_once(audited):
    report, _ = audited
    names = [finding.name for finding in report.findings]
    assert len(names) == len(set(names))
    assert set(CONTRACT) <= set(names)
    measured = {f.name for f in report.findings if f.value is not None}
    assert {"paired_accuracy/ngram", "bits_per_answer", "sampler_match", "copying", "length_ratio"} <= measured
    assert report["sampler_match"].value == 1.0
    assert all(report.cost[name] >= 0 for name in names)
    assert report.num_questions == 120
    assert report.decoding == {"law": "temperature 1, untruncated", "max_new_tokens": 14}


def test_certified_findings_share_one_error(audited):
    """Six statements: three judges, one check, the mean log-probability and the hidden deviation."""
    report, _ = audited
    assert report.ledger["certified"] == dict.fromkeys(
        ("tv_lower", "check_tv_lower", "mean_log_prob_lower", "hidden_deviation"), pytest.approx(0.05 / 6)
    )
    certified = [f for f in report.findings if f.certified]
    assert len(certified) >= 5
    assert sum(1 - f.confidence for f in certified) <= 0.05 + 1e-12
    assert shares_of_error(0.1, 0, 0) == dict.fromkeys(("mean_log_prob_lower", "hidden_deviation"), 0.05)


def test_what_it_leaves_on_disk(audited):
    report, folder = audited
    left = {path.name for path in folder.iterdir()}
    assert left == {
        *("audit.json", "audit.md", "plan.json", "scores.parquet", "cache"),
        *("paired_accuracy.png", "e_value.png", "losses.png"),
    }
    stored = AuditReport.load(folder)
    assert stored.findings == report.findings
    assert json.loads((folder / "plan.json").read_text())["plan_hash"] == report.plan_hash
    scores = load_dataset("parquet", data_files=str(folder / "scores.parquet"), split="train")
    assert len(scores) == 120
    assert set(scores["part"]) == {"train", "valid", "test"}
    nats, is_cut = np.array(scores["human_nats"]), np.array(scores["human_is_cut"])
    bits = -nats[~is_cut].mean() / math.log(2)
    assert report["bits_per_answer"].value == pytest.approx(bits)
    judged = ~np.isnan(np.array(scores["judge_ngram_human"], float))
    assert judged.sum() == report["paired_accuracy/ngram"].n
    # Nothing that a push sends holds an answer.
    answers = rows(120)["completion"]
    for name in ("audit.json", "audit.md", "plan.json", "scores.parquet"):
        content = (folder / name).read_bytes().decode("latin-1")
        assert not any(answer in content for answer in answers)


def test_two_audits_into_one_folder_at_once_both_end(tmp_path, monkeypatch):
    """The second one to end found that the first had renamed the file it was writing, hours after it began."""
    evidence = evidence_of_words(60, seed=0)
    arguments = (
        tmp_path / "scores.parquet",
        evidence,
        JudgeFamily([], {}, {}, {}, {}),
        split_questions(evidence.prompts),
    )
    write = Dataset.to_parquet

    def meanwhile(dataset, path):
        monkeypatch.setattr(Dataset, "to_parquet", write)
        write(dataset, path)
        with monkeypatch.context() as other_process:
            other_process.setattr("os.getpid", lambda: 1)
            _write_scores(*arguments)

    monkeypatch.setattr(Dataset, "to_parquet", meanwhile)
    _write_scores(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_a_killed_audit_goes_on_where_it_was(audited, tiny_model_dir, tmp_path, monkeypatch):
    """All that is left is the cache, one file of it broken off, another one missing; no answer is drawn again."""
    report, folder = audited
    shutil.copytree(folder / "cache", tmp_path / "cache")
    stored = next((tmp_path / "cache").iterdir())
    (stored / "judge-null-ngram.npz").write_bytes(b"PK\x03\x04 broken off")
    (stored / "scores-human-0000000.npz").unlink()
    drawn = []
    monkeypatch.setattr("hf_imitate.audits.scorer.draw_processed", lambda *a, **k: drawn.append(1))
    settings = {"train_dataset": rows(60, offset=1000), "checks": [is_short], "progress": False}
    again = audit(load(tiny_model_dir), rows(120), output_dir=tmp_path, **settings)
    assert not drawn
    assert again.findings == report.findings
    assert again.plan_hash == report.plan_hash


def test_another_seed_row_or_weight_is_another_plan(audited, tiny_model_dir):
    report, _ = audited
    imitator = load(tiny_model_dir)

    def plan_hash(dataset, seed=0, judges=("surface",), known=None):
        settings = {"base": None, "against": None, "checks": (), "law": ProcessedLaw(), "by": None, "confidence": 0.95}
        settings["known"] = known or {"human_entropy": None, "max_answer_bytes": None}
        named = run.named_judges(judges)
        return make_plan(imitator, imitator, dataset, None, judges=named, seed=seed, **settings).hash

    hashes = [plan_hash(rows(40)), plan_hash(rows(40), seed=1), plan_hash(rows(40, offset=7))]
    hashes.append(plan_hash(rows(40), judges=("ngram",)))
    hashes.append(plan_hash(rows(40), known={"human_entropy": "unique", "max_answer_bytes": 64}))
    assert hashes[0] == plan_hash(rows(40).select(range(40)))
    before = weights_fingerprint(imitator.model)
    with torch.no_grad():
        next(imitator.model.parameters())[3, 3] += 0.01
    assert weights_fingerprint(imitator.model) != before
    hashes.append(plan_hash(rows(40)))
    assert len({*hashes, report.plan_hash}) == 7


def test_a_judges_local_base_is_named_without_its_folders_and_two_of_one_name_are_two_plans(tiny_model_dir, tmp_path):
    imitator = load(tiny_model_dir)

    def plan(judge):
        settings = {"base": None, "against": None, "checks": (), "law": ProcessedLaw(), "by": None, "confidence": 0.95}
        settings |= {"known": {}, "seed": 0, "judges": run.named_judges([judge])}
        return make_plan(imitator, imitator, rows(40), None, **settings)

    (tmp_path / "secret" / "model").mkdir(parents=True)
    paths = [str(tmp_path / "secret" / "model"), "/gone/secret/model", "../secret/model", "C:\\secret\\model"]
    plans = [plan(f"lora:{path}") for path in paths]
    assert len({one.hash for one in plans}) == len(paths)
    for one in plans:
        assert one.values["judges"]["lora"].startswith("lora:model (a local folder, sha256 ")
        assert "secret" not in one.text
    for name in ("lora", "surface", "lora:me/judge"):
        assert list(plan(name).values["judges"].values()) == [name]


def test_an_audit_repeated_after_the_other_model_was_trained_further_reads_nothing_old(tiny_model_dir, tmp_path):
    """The plan knew a folder by its name alone, so that the difference to what had lain there before was shown."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "other")
    settings = {"judges": ["surface"], "against": str(folder), "progress": False}
    settings["generation_config"] = {"max_new_tokens": 32}
    before = audit(str(tiny_model_dir), rows(40), output_dir=tmp_path / "audit", **settings)
    assert before["bits_per_answer_difference"].value == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    model.save_pretrained(folder)
    after = audit(str(tiny_model_dir), rows(40), output_dir=tmp_path / "audit", **settings)
    assert after["bits_per_answer_difference"].value != 0
    assert after.plan_hash != before.plan_hash


def test_another_template_role_or_base_is_another_plan(tiny_chat_model_dir, tmp_path):
    imitator = Imitator.from_pretrained(tiny_chat_model_dir)
    folder = shutil.copytree(tiny_chat_model_dir, tmp_path / "base")

    def plan_hash():
        settings = {"against": None, "checks": (), "law": ProcessedLaw(), "by": None, "confidence": 0.95, "seed": 0}
        settings |= {"known": {}, "judges": run.named_judges([f"lora:{folder}"])}
        return make_plan(imitator, imitator, rows(40), None, base=str(folder), **settings).hash

    hashes = [plan_hash(), plan_hash()]
    imitator.tokenizer.chat_template += " "
    hashes.append(plan_hash())
    imitator.renderer.completion_role = "user"
    hashes.append(plan_hash())
    (folder / "generation_config.json").write_text("{}")
    hashes.append(plan_hash())
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


def test_a_push_to_a_repo_of_the_hub_that_is_compared_with_is_another_plan(tiny_model_dir, tmp_path, monkeypatch):
    """Also to the base of an adapter, wherever the adapter lies."""
    imitator = Imitator.from_pretrained(tiny_model_dir)
    commits = {"me/base": "a" * 40, "me/other": "b" * 40, "me/adapter": "d" * 40}

    def download(repo, allow_patterns):
        """What the Hub says now; it is asked, and for small files alone."""
        assert set(allow_patterns) == {"config.json", "adapter_config.json"}
        if repo not in commits:
            raise LocalEntryNotFoundError("neither on the Hub nor in the cache")
        folder = tmp_path / repo / commits[repo]
        folder.mkdir(parents=True, exist_ok=True)
        if repo == "me/adapter":
            (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
        return str(folder)

    monkeypatch.setattr(causal_lm, "snapshot_download", download)

    def plan(against="me/other"):
        settings = {"checks": (), "law": ProcessedLaw(), "by": None, "confidence": 0.95, "seed": 0, "known": {}}
        settings |= {"base": "me/base", "against": str(against), "judges": run.named_judges(["lora:me/other"])}
        return make_plan(imitator, imitator, rows(40), None, **settings)

    before, same = plan(), plan()
    assert before.hash == same.hash
    found = [before.values[f"{name}_revision"] for name in ("base", "against", "judge lora")]
    assert found == ["a" * 40, "b" * 40, "b" * 40]
    assert plan("me/gone").values["against_revision"] is None
    assert "against_revision" not in plan(tiny_model_dir).values

    adapted = [plan("me/adapter"), plan(tmp_path / "me" / "adapter" / commits["me/adapter"])]
    assert [one.values["against_base_revision"] for one in adapted] == ["a" * 40] * 2
    commits["me/base"] = "c" * 40
    after = [plan(), plan("me/adapter")]
    assert after[0].hash != before.hash
    assert after[1].values["against_revision"] == adapted[0].values["against_revision"]
    assert after[1].values["against_base_revision"] == "c" * 40


def test_a_check_of_one_name_and_other_lines_is_another_one_where_it_chooses():
    def passes(**columns):
        return [True]

    def fails(**columns):
        return [False]

    fails.__name__ = "passes"
    assert source_of(passes) == source_of(passes) != source_of(fails)


def test_the_plan_is_written_before_any_answer_is_read(tiny_model_dir, tmp_path, monkeypatch):
    def stop(*arguments, **settings):
        assert (tmp_path / "plan.json").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "collect_evidence", stop)
    with pytest.raises(KeyboardInterrupt):
        audit(load(tiny_model_dir), rows(40), output_dir=tmp_path, progress=False)


def test_a_folder_a_model_and_an_imitator_are_audited_alike(tiny_model_dir):
    settings = {"judges": ["surface"], "output_dir": None, "progress": False}
    settings["generation_config"] = {"max_new_tokens": 8}
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    imitator = Imitator.from_pretrained(tiny_model_dir, device="cpu")
    found = [audit(kind, rows(40), **settings) for kind in (str(tiny_model_dir), model, imitator)]
    assert found[0].findings == found[1].findings == found[2].findings
    assert found[0].model == tiny_model_dir.name  # not where it lies on this machine
    with pytest.raises(TypeError, match="Imitator"):
        audit(3, rows(40), **settings)


def test_a_truncated_law_is_both_sampled_and_scored(tiny_model_dir):
    report = audit(
        load(tiny_model_dir),
        rows(40),
        judges=["likelihood"],
        generation_config={"top_k": 5},
        output_dir=None,
        progress=False,
    )
    assert report.decoding["top_k"] == 5
    assert report["outside_support"].value > 0.9  # a random model's five tokens are not a human's
    assert report["bits_per_answer"].value == math.inf
    assert report["sampler_match"].value is None
    assert "infinite" in report.to_markdown()


def test_both_sides_go_through_one_code_path(tiny_model_dir):
    """The imitator's answers, given back as the humans', get the same scores: nothing but the author differs."""
    imitator = load(tiny_model_dir)
    first = collect_evidence(imitator, rows(50))
    ended = [answer.ended and bool(answer.text) for answer in first.imitator_answers]
    chosen = [n for n, is_fine in enumerate(ended) if is_fine]
    texts = [first.sampled_texts[n] for n in chosen]
    dataset = Dataset.from_dict({"prompt": [first.prompts[n] for n in chosen], "completion": texts})
    second = collect_evidence(imitator, dataset)
    np.testing.assert_allclose(second.human.nats, first.imitator.nats[chosen], atol=1e-4)
    assert [a.text for a in second.human_answers] == [first.imitator_answers[n].text for n in chosen]


@pytest.mark.parametrize(("num_long", "said"), [(4, "4 human answers are"), (1, "1 human answer is")])
def test_scores_are_exact_and_long_answers_are_cut_on_both_sides(num_long, said, tiny_model_dir):
    imitator = load(tiny_model_dir)
    dataset = rows(40).map(
        lambda row, n: {"completion": row["completion"] * (1 + 3 * (n < num_long))}, with_indices=True
    )
    evidence = collect_evidence(imitator, dataset)
    assert evidence.human.is_cut[:num_long].all()
    assert evidence.human.num_tokens.max() == 14
    rendered = imitator.renderer.human(dataset["prompt"], dataset["completion"])
    uncut = ~evidence.human.is_cut
    exact = score_answers(imitator.model, rendered, 1).numpy()
    np.testing.assert_allclose(evidence.human.nats[uncut], exact[uncut], atol=1e-4)
    assert any(note.startswith(f"{said} longer than the limit of 14") for note in evidence.notes)


def test_repeated_questions_get_different_draws_and_weightless_rows_none(tiny_model_dir):
    dataset = rows(40).add_column("weight", [0.0, *[1.0] * 39])
    dataset = Dataset.from_list([*dataset, *dataset.select(range(10, 20))])
    evidence = collect_evidence(load(tiny_model_dir), dataset)
    assert len(evidence.prompts) == 49
    assert evidence.row[0] == 1
    assert evidence.draw_number[-10:].tolist() == [1] * 10
    assert evidence.imitator_answers[9:19] != evidence.imitator_answers[-10:]
    draws = load(tiny_model_dir).answer([evidence.prompts[-1]], num_answers=2)[0]
    assert draws == [evidence.sampled_texts[18], evidence.sampled_texts[-1]]
    assert evidence.imitator_answers[-1].text == canonical_text(draws[1])


def test_a_human_who_answers_by_the_imitators_own_law_is_not_told_from_it(tiny_model_dir):
    """p = q exactly: the humans' answers are draws under another seed. The seeds were fixed before the first run."""
    imitator, dataset = load(tiny_model_dir), rows(400)
    own, other = (collect_evidence(imitator, dataset, seed=seed) for seed in (0, 1234))
    evidence = dataclasses.replace(own, human_answers=other.imitator_answers, human=other.imitator)
    judges = run.named_judges(["surface", "ngram", "likelihood"])
    made = {
        name: make_judge(judge, imitator, None, evidence, None, ProcessedLaw(), EvidenceCache(None))
        for name, judge in judges.items()
    }
    family = audit_distinguishability(evidence, made, split_questions(evidence.prompts))
    assert min(p["p_holm"] for p in family.p_values.values()) > 0.01
    assert max(f.value for f in family.findings if f.name.startswith("tv_lower")) == 0
    gap = next(f for f in audit_retrodiction(evidence, 0.999) if f.name == "calibration_gap")
    assert gap.interval[0] <= 0 <= gap.interval[1]
    # The same judge sees the same imitator cut down to ten tokens, so its silence says something.
    colder = collect_evidence(imitator, dataset, law=ProcessedLaw({"top_k": 10}), seed=1)
    told = dataclasses.replace(own, imitator_answers=colder.imitator_answers, imitator=colder.imitator)
    told = dataclasses.replace(told, human_answers=other.imitator_answers, human=other.imitator)
    seen = audit_distinguishability(told, {"ngram": made["ngram"]}, split_questions(told.prompts))
    assert seen.p_values["ngram"]["p"] < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.select(range(29)), "29 rows; an audit needs at least 30"),
        (lambda data: data.map(lambda row: {"completion": ""}), "empty or only whitespace"),
        (lambda data: data.map(lambda row: {"completion": "schÃ¶n"}), "decoded wrongly"),
        (lambda data: data.map(lambda row: {"completion": "a\ufffd"}), "decoded wrongly"),
        (lambda data: data.remove_columns("completion"), "no column `completion`"),
        (lambda data: data.to_list(), "must be a `datasets.Dataset`"),
        (lambda data: data.map(lambda row: {"choices": "yes|no"}), "`choices`: 40 of 40 rows .* hold str"),
    ],
)
def test_rows_that_cannot_be_audited_fail_before_a_model_loads(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        audit("no-such-model", change(rows(40)))


def test_questions_shared_with_training_fail_without_their_text():
    with pytest.raises(ValueError, match=r"10 of 40 rows of `dataset` \(row 30, 31") as caught:
        check_dataset(rows(40), rows(30, offset=30))
    assert "question 3" not in str(caught.value)


def test_a_little_mojibake_is_noted_and_plain_foreign_text_is_fine():
    data = rows(100).map(lambda row, n: {"completion": "schÃ¶n" if n == 5 else row["completion"]}, with_indices=True)
    assert check_dataset(data) == ("1 human answer looks wrongly decoded (mojibake).",)
    for text in ("schön", "«café» – déjà vu…", "«É»", "日本語", "naïve", "Ça", "plain"):
        assert not is_mojibake(text)
        broken = text.encode().decode("cp1252", "replace")
        assert is_mojibake(broken) or text in ("日本語", "plain")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resample": 0}, "`resample` is 0"),
        ({"resample": 2.5}, "`resample` is 2.5"),
        ({"confidence": 1.0}, "confidence"),
        ({"judges": ["oracle"]}, "no judge 'oracle'"),
        ({"judges": "ngram"}, "one string"),
        ({"judges": []}, "empty"),
        ({"judges": ["ngram", "ngram"]}, "Two judges"),
        ({"judges": [lambda *_: None]}, "name of its own"),
        ({"judges": [3]}, "name or a callable"),
        ({"by": "age"}, "column 'age'"),
        ({"by": "completion"}, "column 'completion'"),
        ({"generation_config": {"num_beams": 3}}, "num_beams"),
        ({"checks": [lambda **_: None]}, "name of its own"),
    ],
)
def test_wrong_settings_fail_before_a_model_loads(settings, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        audit("no-such-model", rows(40), output_dir=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_columns_that_cannot_be_used_fail_before_a_model_loads():
    """Both were found when all answers had been drawn and scored, and "raised ValueError" was all that was said."""
    people = rows(60).add_column("who", [f"person {n}" for n in range(60)])
    with pytest.raises(ValueError, match="60 different values"):
        audit("no-such-model", people, by="who")
    with pytest.raises(ValueError, match=r"column `prompts` .* Rename it"):
        audit("no-such-model", rows(40).add_column("prompts", ["x"] * 40), checks=[is_short])


def test_scores_that_are_nan_are_named_and_kept_out_of_every_number(tiny_model_dir):
    imitator = load(tiny_model_dir)
    with torch.no_grad():
        imitator.model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        audit(imitator, rows(40), output_dir=None, progress=False)


def test_a_crashing_check_or_judge_or_base_costs_its_own_findings_only(tiny_model_dir):
    def bad_judge(train, valid, seed):
        raise RuntimeError("private")

    def bad_check(prompts, completions, **columns):
        raise RuntimeError("private")

    report = audit(
        load(tiny_model_dir),
        rows(60),
        judges=["surface", bad_judge],
        checks=[bad_check],
        base="no-such-base",
        output_dir=None,
        progress=False,
    )
    assert report["paired_accuracy/surface"].value is not None
    assert "RuntimeError" in report["paired_accuracy/bad_judge"].detail
    assert report["check_pass/bad_check/imitator"].value is None
    assert report["power_control/surface"].value is None
    assert report["bits_per_answer"].value is not None
    assert "private" not in report.to_markdown()


def test_an_audit_that_raises_is_one_finding_without_value(tiny_model_dir, monkeypatch):
    def broken(*arguments, **settings):
        raise ZeroDivisionError("private")

    monkeypatch.setattr(run, "audit_copying", broken)
    report = audit(load(tiny_model_dir), rows(40), judges=["surface"], output_dir=None, progress=False)
    assert report["copying"].detail == "Not measured: this audit raised ZeroDivisionError."


def test_a_given_generation_config_leaves_the_imitator_as_it_was(tiny_model_dir):
    imitator = load(tiny_model_dir)
    settings = {"judges": ["surface"], "output_dir": None, "progress": False}
    report = audit(imitator, rows(40), generation_config={"max_new_tokens": 3}, **settings)
    assert report.decoding["max_new_tokens"] == 3
    assert imitator.max_new_tokens == 14


def test_two_imitators_are_compared_on_the_same_answers(tiny_model_dir):
    """The other one is the same model with weights disturbed; the difference is that of the two scores."""
    one, other = load(tiny_model_dir), load(tiny_model_dir)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    settings = {"judges": ["surface"], "output_dir": None, "progress": False}
    report = audit(one, rows(60), against=other, **settings)
    alone = audit(other, rows(60), **settings)
    difference = report["bits_per_answer_difference"]
    assert difference.value == pytest.approx(
        report["bits_per_answer"].value - alone["bits_per_answer"].value, abs=1e-6
    )
    assert difference.interval[1] < 0
    assert "bits fewer than under the other imitator" in report.to_markdown()


def test_chat_questions_are_audited(tiny_chat_model_dir):
    plain = rows(40)
    chat = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in plain["prompt"]],
            "completion": [[{"role": "assistant", "content": text}] for text in plain["completion"]],
        }
    )
    report = audit(
        load(tiny_chat_model_dir),
        chat,
        judges=["ngram"],
        checks=[first_message],
        output_dir=None,
        progress=False,
    )
    assert report["check_pass/first_message/human"].value == 1
    assert report["sampler_match"].value == 1


def first_message(prompts, completions, **columns):
    return [completion[0]["role"] == "assistant" for completion in completions]


def test_a_cache_writes_whole_files_and_survives_broken_ones(tmp_path):
    cache = EvidenceCache(tmp_path / "c")
    assert cache.json("a/../b", lambda: [1]) == [1]
    assert cache.json("a/../b", lambda: [2]) == [1]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["a_.._b.json"]
    (tmp_path / "c" / "a_.._b.json").write_text("[1")
    assert cache.json("a/../b", lambda: [3]) == [3]
    values = {"x": np.array([1.0, np.nan])}
    np.testing.assert_array_equal(cache.arrays("n", lambda: values)["x"], values["x"])
    np.save(tmp_path / "c" / "evil.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "c" / "evil.npy").rename(tmp_path / "c" / "n.npz")
    np.testing.assert_array_equal(cache.arrays("n", lambda: {"x": np.ones(1)})["x"], np.ones(1))

    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.json("new", fail)
    assert not list((tmp_path / "c").glob(".unfinished*"))
    assert EvidenceCache(None).json("x", lambda: 5) == 5


def test_an_imitator_that_thinks_first_is_audited_by_its_estimates(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("hf_imitate.audits.scorer.CHUNK", 20)
    model = get_peft_model(worlds.load_world(worlds.save_world(tmp_path_factory.mktemp("world"))), worlds.lora())
    law = ThoughtLaw((6,), worlds.LONGEST, torch.tensor([True] * 6 + [False] * 2))
    thinkers = Thinkers(model.eval(), law, Retrodictor.on_shared_base(model, worlds.lora()), [7], 7)
    imitator = Imitator(model, worlds.tokenizer(), max_new_tokens=4)
    imitator.renderer = Renderer(worlds.tokenizer(), [7])
    imitator.latent = LatentImitator(thinkers, imitator.renderer, max_answer_tokens=4)
    questions = [" ".join(word) for word in product("abcd", repeat=2)]
    # The same row twice, in two chunks: its estimates must not share their thoughts.
    dataset = Dataset.from_dict({"prompt": [*questions, *questions], "completion": ["c"] * 32})
    evidence = collect_evidence(imitator, dataset)
    assert not evidence.is_exact
    assert evidence.human.nats[8] != evidence.human.nats[24]
    np.testing.assert_allclose(evidence.human.lower_bound, evidence.human.nats - math.log(20))
    assert evidence.draw_number[-1] == 1
    drawn = [own[0].answer.text for own in imitator.latent.answer(questions, first_draw=1, max_new_tokens=4)]
    assert drawn == evidence.sampled_texts[16:]
    names = {f.name: f for f in audit_retrodiction(evidence)}
    assert "estimates" in names["outside_support"].detail or names["outside_support"].value is not None


def test_a_law_that_thinks_first_cannot_be_truncated(tiny_model_dir):
    imitator = load(tiny_model_dir)
    imitator.latent = object()
    with pytest.raises(ValueError, match="thinks before it answers"):
        collect_evidence(imitator, rows(40), law=ProcessedLaw({"top_k": 3}))


def test_evidence_is_frozen(tiny_model_dir):
    evidence = collect_evidence(load(tiny_model_dir), rows(30))
    with pytest.raises(dataclasses.FrozenInstanceError):
        evidence.seed = 3


def test_what_is_known_of_the_humans_makes_their_loss_an_absolute_statement(tiny_model_dir):
    settings = {"judges": ["surface"], "output_dir": None, "progress": False}
    unknown = audit(load(tiny_model_dir), rows(120), **settings)
    known = audit(load(tiny_model_dir), rows(120), human_entropy="unique", **settings)
    assert unknown["hidden_deviation"].value is None
    assert "human_entropy" in unknown["hidden_deviation"].detail
    assert known["hidden_deviation"].certified
    assert known["hidden_deviation"].value > 0.9  # an untrained model gives no human's answer

    loose, tight = (
        audit(load(tiny_model_dir), rows(120), max_answer_bytes=most, **settings)["mean_log_prob_lower"].value
        for most in (1024, 128)
    )
    assert tight > loose


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"human_entropy": "one"}, "`human_entropy` is 'one'"),
        ({"human_entropy": -1.0}, "`human_entropy` is -1.0"),
        ({"human_entropy": True}, "`human_entropy` is True"),
        ({"max_answer_bytes": 0}, "`max_answer_bytes` is 0"),
    ],
)
def test_what_nobody_can_know_of_humans_is_refused_before_anything_is_drawn(tiny_model_dir, setting, said):
    with pytest.raises(ValueError, match=said):
        audit(load(tiny_model_dir), rows(40), output_dir=None, **setting)
