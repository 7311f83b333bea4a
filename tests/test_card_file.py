"""A card is written again from the repository's own files: the same to the letter, whoever wrote the files."""

import dataclasses
import errno
import json
import math
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from exact_runs import ANSWERS, make, run
from huggingface_hub import ModelCard
from test_model_card import HOSTILE, MEGABYTE, facts, filled, report
from tiny_runs import make as make_game
from tiny_runs import rows, train

from hf_imitate.hub_cards.card_file import (
    EARLIER_AUDIT,
    FACTS_FILE,
    MAX_POINTS,
    facts_to_json,
    read_facts,
    write_card,
    write_facts,
)
from hf_imitate.hub_cards.facts import CardMetric, Sample
from hf_imitate.hub_cards.model_card import render_card
from hf_imitate.hub_cards.push import published_files


def store(folder, given, **changes):
    """The files of a repository whose card says what is given."""
    counts = {"num_rows": given.num_rows, "num_labelled": given.num_labelled}
    stored = {
        "objective": "adversarial",
        "base_revision": given.base_revision,
        "dataset": counts,
        "settings": dict(given.settings),
        "versions": dict(given.versions),
        "card": facts_to_json(given),
    }
    folder.mkdir(exist_ok=True)
    write_facts(folder, {**stored, **changes})
    if given.is_adapter:
        (folder / "adapter_config.json").write_text("{}")
    if given.has_distinguisher:
        (folder / "distinguisher").mkdir(exist_ok=True)
    if given.audit is not None:
        (folder / "audit").mkdir(exist_ok=True)
        given.audit.save(folder / "audit")
    return folder


def test_a_full_disk_leaves_the_facts_as_they_were(tmp_path, monkeypatch):
    """Cut off in the middle, `imitation.json` took the law of the imitator with it, and nobody could load it."""
    folder = store(tmp_path / "repo", facts())
    before, write = (folder / FACTS_FILE).read_text(), Path.write_text

    def full(path, text, **settings):
        write(path, text[:20], **settings)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_card(folder, license="mit")
    assert (folder / FACTS_FILE).read_text() == before
    assert not [path for path in folder.iterdir() if path.name.startswith("_")]


def test_what_was_stored_reads_back_to_the_same_card(tmp_path):
    given = facts(
        audit=report(),
        curves={"loss": [(1, 3.0), (2, math.inf)]},
        samples=(Sample("q", "a"),),
        answered_by="a club",
        has_distinguisher=True,
        check_names=("is_short",),
        metrics={"x": CardMetric(math.inf, "bits", (0.1, math.inf)), "y": CardMetric(None)},
    )
    folder = store(tmp_path / "repo", given)
    assert str(render_card(read_facts(folder))) == str(render_card(given))
    write_card(folder)
    assert (folder / "README.md").read_text() == str(render_card(given))


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_words_survive_the_way_there_and_back_as_words(text, tmp_path):
    given = dataclasses.replace(filled(text), audit=None)
    folder = store(tmp_path / "repo", given)
    again = read_facts(folder)
    for name in (
        "model_name",
        "objective",
        "repo_id",
        "license",
        "limits",
        "samples",
        "papers",
        "settings",
        "metrics",
    ):
        assert getattr(again, name) == getattr(given, name), name


def test_of_local_folders_only_the_last_name_is_stored_and_is_not_taken_for_an_id(tmp_path):
    given = facts(base_model="/data/secret/base", dataset_name="C:\\secret\\answers")
    folder = store(tmp_path / "repo", given)
    assert "secret" not in (folder / FACTS_FILE).read_text()
    card = render_card(read_facts(folder))
    assert card.data.base_model is None
    assert "| `base`, a local model |" in card.text
    assert "`answers`" in card.text


def test_a_name_that_no_file_can_have_is_a_name(tmp_path):
    """The system's "file name too long", with all of the name, was what there was of a card."""
    folder = store(tmp_path / "repo", facts(dataset_name=MEGABYTE))
    assert read_facts(folder).dataset_name == MEGABYTE


def test_a_curve_of_many_points_is_thinned_and_keeps_its_ends():
    points = [(step, float(step)) for step in range(1000)]
    kept = facts_to_json(facts(curves={"loss": points}))["curves"]["loss"]
    assert len(kept) == MAX_POINTS
    assert (kept[0], kept[-1]) == ([0, 0.0], [999, 999.0])


def test_facts_of_before_there_were_cards_still_make_one(tmp_path):
    folder = store(tmp_path / "repo", facts(is_adapter=False))
    stored = json.loads((folder / FACTS_FILE).read_text())
    del stored["card"]
    write_facts(folder, {**stored, "objective": "latent", "base_model": "tiny", "base_is_local": True})
    again = read_facts(folder)
    assert (again.model_name, again.objective, again.thinks_first) == ("repo", "latent", True)
    assert again.hub_base_model is None


BROKEN = [
    ({"card": {"metrics": {"x": [1]}}}, "metrics"),
    ({"card": {"metrics": {"x": ["1", "", None]}}}, "metrics"),
    ({"card": {"metrics": {"x": [10**400, "", None]}}}, "metrics"),
    ({"card": {"curves": {"x": [[1, 2]] * (MAX_POINTS + 1)}}}, "curve"),
    ({"card": {"curves": {"x": [[1.5, 2]]}}}, "curves"),
    ({"card": {"papers": [{"title": 1}]}}, "papers"),
    ({"card": {"model_name": None}}, "model_name"),
    ({"card": {"thinks_first": 1}}, "thinks_first"),
    ({"card": {"tags": "x"}}, "tags"),
    ({"card": {"samples": [["q"]]}}, "samples"),
    ({"card": []}, "card"),
    ({"dataset": {"num_rows": -1}}, "num_rows"),
    ({"dataset": {"num_rows": 10**30}}, "num_rows"),
    ({"settings": []}, "settings"),
]


@pytest.mark.parametrize(("changes", "field"), BROKEN, ids=range(len(BROKEN)))
def test_a_field_of_the_wrong_form_is_named(changes, field, tmp_path):
    folder = store(tmp_path / "repo", facts(), **changes)
    with pytest.raises(ValueError, match=rf"`{FACTS_FILE}`.*{field}"):
        read_facts(folder)


def test_an_audit_of_anybodys_and_its_figures_are_checked_before_they_are_shown(tmp_path):
    folder = store(tmp_path / "repo", facts(audit=report()))
    for name in ("losses.png", "a b.png", "x](http:evil).png"):
        (folder / "audit" / name).write_bytes(b"")
    (folder / "audit" / "link.png").symlink_to("/etc/hostname")
    assert read_facts(folder).figures == ("audit/losses.png",)
    (folder / "audit" / "audit.json").write_text('{"findings": "many"}')
    with pytest.raises(ValueError, match="report"):
        read_facts(folder)
    assert read_facts(folder, with_audit=False).audit is None


def test_before_the_weights_are_there_the_card_says_what_is_to_come(tmp_path):
    folder = store(tmp_path / "repo", facts(is_adapter=True, has_distinguisher=True))
    (folder / "adapter_config.json").unlink()
    (folder / "distinguisher").rmdir()
    assert (read_facts(folder).is_adapter, read_facts(folder).has_distinguisher) == (True, True)
    (folder / "config.json").write_text("{}")
    assert (read_facts(folder).is_adapter, read_facts(folder).has_distinguisher) == (False, False)


def test_without_its_facts_there_is_no_card(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no `imitation\.json`"):
        read_facts(tmp_path)


# --- what a trainer writes


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_dir):
    trainer = run(tmp_path_factory.mktemp("trained"), tiny_model_dir, max_steps=3)
    trainer.evaluate(rows(8, ANSWERS))
    trainer.create_model_card(model_name="me", dataset_name="me/answers", tags="mine")
    trainer.save_model()
    return trainer


def test_a_trainers_card_is_rendered_again_to_the_letter(trained, tmp_path):
    folder = shutil.copytree(trained.args.output_dir, tmp_path / "run")
    before = (folder / "README.md").read_text()
    for expected in ("# me\n", "- me/answers", "- mine", "| `retrodiction/bits_per_answer` | 1 to 3 |"):
        assert expected in before
    write_card(folder)
    assert (folder / "README.md").read_text() == before


def test_an_audit_of_these_weights_is_shown_and_one_of_earlier_weights_stays_away(tmp_path, tiny_model_dir):
    """Neither shown nor pushed: by the run, by `hf-imitate card`, in a new process or from a copy."""
    trainer = make(tmp_path, tiny_model_dir)
    folder = tmp_path / "run"
    train(trainer)
    trainer.save_model()
    (folder / "audit").mkdir(parents=True)
    report().save(folder / "audit")
    trainer.save_model()
    assert says_audit(folder) == (True, False)
    assert "audit/audit.json" in published_files(folder)
    train(trainer)
    trainer.save_model()
    assert says_audit(folder) == (False, True)
    assert not [name for name in published_files(folder) if name.startswith("audit/")]

    write_card(folder, license="mit")
    assert says_audit(folder) == (False, True)
    copied = shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copyfile)
    write_card(copied, license="mit")
    assert says_audit(copied) == (False, True)
    later = make(tmp_path, folder)  # as a new process would
    later.save_model()
    assert says_audit(folder) == (False, True)

    dataclasses.replace(report(), plan_hash="a new one").save(folder / "audit")
    write_card(folder)
    assert says_audit(folder) == (True, False)
    later.save_model()
    assert says_audit(folder) == (True, False)
    with torch.no_grad():
        next(later.model.parameters()).add_(0.01)
    later.save_model()
    assert says_audit(folder) == (False, True)


def says_audit(folder) -> tuple[bool, bool]:
    """Whether the card shows an audit's findings, and whether it speaks of an earlier one."""
    card = (folder / "README.md").read_text()
    assert ("model-index" in card) == ("`paired_accuracy/ngram`" in card)
    return "model-index" in card, EARLIER_AUDIT in " ".join(card.split())


def test_an_audit_of_a_model_before_its_training_is_not_shown_beside_what_was_trained(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir)
    (tmp_path / "run" / "audit").mkdir(parents=True)
    report().save(tmp_path / "run" / "audit")
    train(trainer)
    trainer.save_model()
    assert says_audit(tmp_path / "run") == (False, True)


def test_an_audit_of_weights_that_a_training_left_as_they_were_stays(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, learning_rate=1e-60)  # too small for any weight to change
    trainer.save_model()
    (tmp_path / "run" / "audit").mkdir()
    report().save(tmp_path / "run" / "audit")
    train(trainer)
    trainer.create_model_card()
    assert says_audit(tmp_path / "run") == (False, True)
    trainer.save_model()
    assert says_audit(tmp_path / "run") == (True, False)


def test_the_word_of_an_earlier_audit_is_not_kept_among_the_limits(tmp_path):
    folder = store(tmp_path / "repo", facts(limits=("mine", EARLIER_AUDIT)))
    assert read_facts(folder).limits == ("mine",)


@pytest.mark.parametrize("given", [None, True, False])
def test_a_repo_is_private_unless_that_is_refused(tmp_path, tiny_model_dir, monkeypatch, given):
    seen = []
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, token, private: seen.append(private))
    monkeypatch.setattr(
        "hf_imitate.trainers.imitator_saving.push_folder", lambda *a, private, **k: seen.append(private)
    )
    trainer = make(tmp_path, tiny_model_dir)
    trainer.args.hub_private_repo = given
    trainer.push_to_hub()
    trainer.init_hf_repo()
    assert seen == [given is not False] * 3


def test_nothing_is_rewritten_while_a_push_in_the_background_reads_it(tmp_path, tiny_model_dir, monkeypatch):
    pushed: Future = Future()
    monkeypatch.setattr("hf_imitate.trainers.imitator_saving.push_folder", lambda *args, **kwargs: pushed)
    trainer = make(tmp_path, tiny_model_dir)
    trainer.hub_model_id = "me/x"
    assert trainer.push_to_hub(blocking=False) is pushed
    assert trainer.push_in_progress.jobs == [pushed]
    card = tmp_path / "run" / "README.md"
    for change in (trainer.create_model_card, trainer.save_model):
        card.write_text("being read")
        trainer._push_of_output = pushed = Future()
        running = threading.Thread(target=change)
        running.start()
        running.join(0.3)
        assert (running.is_alive(), card.read_text()) == (True, "being read")
        pushed.set_result(None)
        running.join()
        assert card.read_text() != "being read"


def test_an_audit_that_cannot_be_read_costs_the_card_its_audit_and_nothing_else(tmp_path, tiny_model_dir, caplog):
    trainer = make(tmp_path, tiny_model_dir)
    (tmp_path / "run" / "audit").mkdir(parents=True)
    (tmp_path / "run" / "audit" / "audit.json").write_text("{")
    trainer.save_model()
    assert "The card says nothing of the audit" in caplog.text
    assert "There is no audit" in (tmp_path / "run" / "README.md").read_text()


def test_an_adapter_on_a_local_base_cannot_be_trained_towards_a_public_push(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, adapter=True)
    trainer.args.push_to_hub, trainer.args.hub_private_repo = True, False
    with pytest.raises(ValueError, match=r"its base is a local folder that nobody else has.*or train all weights"):
        trainer.train()


@pytest.mark.parametrize(("full", "cure"), [(True, "delete the second model's folder"), (False, "--merge NEW")])
def test_a_second_model_on_a_local_base_is_refused_before_training_too(tmp_path, tiny_model_dir, full, cure):
    trainer = make_game(tmp_path, tiny_model_dir, full=full)
    trainer.args.push_to_hub, trainer.args.hub_private_repo = True, False
    with pytest.raises(ValueError, match=f"its base is a local folder that nobody else has.*{cure}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_licence_that_the_hub_does_not_know_is_another_with_a_name_and_other_alone_is_none(tmp_path, caplog):
    write_facts(tmp_path, {"objective": "retrodictive"})
    expected = {"MIT": ("mit", None), "Apache-2.0": ("apache-2.0", None), "apache2": ("other", "apache2")}
    expected["x" * 10**6] = ("other", "x" * 100)
    expected["Our Club's Own, v1.0"] = ("other", "our-club-s-own-v1.0")
    for given, (license_id, name) in expected.items():
        caplog.clear()
        data = ModelCard.load(write_card(tmp_path, license=given)).data
        assert (data.license, data.license_name) == (license_id, name)
        assert ("The Hub has no licence id" in caplog.text) is (name is not None)
        assert ("'apache-2.0'" in caplog.text) is (given == "apache2")
        assert len(caplog.text) < 1000
    before = (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match=r"`license` is 'other', which names none"):
        write_card(tmp_path, license="other")
    assert (tmp_path / "README.md").read_text() == before
    assert "Our Club" in before
