"""Held-out answers in two halves: one chooses the distinguisher's weights, the other says what they are worth."""

import json
import logging

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from scipy.stats import binomtest
from tiny_runs import distinguisher_weights, load, logged, make, rows, same, train
from transformers import AutoTokenizer

from hf_imitate.distinguisher import Distinguisher
from hf_imitate.human_rows import HumanRows
from hf_imitate.losses import bradley_terry_loss
from hf_imitate.pairs import Learner
from hf_imitate.rendering import Answer, Renderer
from hf_imitate.replay import Entry
from hf_imitate.trainers.adversarial_heldout import NO_SIGNAL, Heldout, Signal, halves

WORDS = ("the list", "a name", "it", "items")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(str(tiny_model_dir))


def human_rows(tokenizer, prompts, heldout=0.5, seed=0):
    answers = [WORDS[i % 4] + " xx" for i in range(len(prompts))]  # humans end with a mark of their own
    dataset = Dataset.from_dict({"prompt": prompts, "completion": answers})
    return HumanRows(dataset, Renderer(tokenizer, [tokenizer.eos_token_id], 32), heldout, seed)


def answered(rows):
    """What an imitator answered to the questions of these rows."""
    return [Entry(row, Answer(WORDS[(row + 1) % 4] + " yy", True)) for row in rows]


def heldout_of(tokenizer, tiny_model_dir, prompts, metrics=None):
    torch.manual_seed(0)
    learner = Learner(Distinguisher.from_causal_lm(load(tiny_model_dir), tokenizer), 1e-3)
    taken = [] if metrics is None else metrics
    note = lambda name, total, count: taken.append((name, total / count))  # noqa: E731
    return Heldout(human_rows(tokenizer, prompts), prompts, learner, Accelerator(cpu=True), note)


def set_head(heldout, scale):
    """Weights of one's own: the head's direction decides who is human."""
    with torch.no_grad():
        heldout.learner.distinguisher.head.weight.copy_(scale)


def by_hand(heldout, entries):
    """Loss and accuracy, pair by pair."""
    d = heldout.learner.distinguisher
    losses, wins = [], []
    for pair in (entry.pair(heldout.prompts, heldout.human_rows) for entry in entries):
        human, imitator = d.score([pair.prompt] * 2, [pair.human, pair.imitator[0]])
        losses.append(bradley_terry_loss(human, imitator).item())
        wins.append(0.5 if torch.isclose(human, imitator, atol=1e-6) else float(human > imitator))
    return sum(losses) / len(losses), sum(wins) / len(wins)


# --- the halves


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_halves_share_no_question_and_hold_every_held_out_row_once(tokenizer, seed):
    prompts = [f"q{i % 17}" for i in range(120)]
    humans = human_rows(tokenizer, prompts, seed=seed)
    stopping, testing = halves(humans, prompts)
    assert sorted(stopping + testing) == humans.heldout.tolist()
    assert {prompts[i] for i in stopping}.isdisjoint(prompts[i] for i in testing)
    largest = max(sum(prompts[i] == q for i in humans.heldout) for q in prompts)
    assert abs(len(stopping) - len(testing)) <= largest
    assert (stopping, testing) == halves(humans, prompts)


def test_a_single_held_out_question_says_when_to_stop(tokenizer):
    prompts = ["q0", "q1"]
    stopping, testing = halves(human_rows(tokenizer, prompts), prompts)
    assert (len(stopping), testing) == (1, [])


# --- what is kept


def test_the_weights_that_are_right_most_often_are_kept_also_when_pairs_come_later(tokenizer, tiny_model_dir):
    """An early reading on a few easy pairs must not win against a later one on all: both are asked about all."""
    prompts = [f"q{i}" for i in range(150)]
    heldout = heldout_of(tokenizer, tiny_model_dir, prompts)
    first = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    set_head(heldout, first)
    entries = answered(heldout.stopping)
    wins = [by_hand(heldout, [entry])[1] for entry in entries]
    easy = [entry for entry, win in zip(entries, wins, strict=True) if win == 1][:4]
    hard = [entry for entry, win in zip(entries, wins, strict=True) if win == 0][:8]
    assert (len(easy), len(hard)) == (4, 8)
    for entry in easy:
        heldout.add(entry)
    assert heldout.reading(keep=True).accuracy == 1.0
    for entry in hard:
        heldout.add(entry)
    set_head(heldout, -first)  # right where the other is wrong
    before = distinguisher_state(heldout)
    assert heldout.reading(keep=True).accuracy == pytest.approx(8 / 12)
    assert all(torch.equal(one, two) for one, two in zip(before, distinguisher_state(heldout), strict=True))
    set_head(heldout, torch.zeros(1, 32))  # all ties
    assert heldout.reading(keep=True).accuracy == 0.5
    heldout.restore()
    assert torch.equal(heldout.learner.distinguisher.head.weight, -first)


def distinguisher_state(heldout):
    return [parameter.detach().clone() for parameter in heldout.learner.parameters]


def test_of_equally_right_weights_the_surer_ones_are_kept(tokenizer, tiny_model_dir):
    prompts = [f"q{i}" for i in range(20)]
    heldout = heldout_of(tokenizer, tiny_model_dir, prompts)
    for entry in answered(heldout.stopping):
        heldout.add(entry)
    torch.manual_seed(1)
    head = torch.randn(1, 32)
    for scale in (1e-2, 1e-3):
        set_head(heldout, scale * head)
        if by_hand(heldout, heldout.entries)[1] < 0.5:
            head = -head
    losses = {}
    for scale in (2e-3, 1e-2, 4e-3):
        set_head(heldout, scale * head)
        losses[scale] = heldout.reading(keep=True).loss
    heldout.restore()
    best = min(losses, key=losses.get)
    torch.testing.assert_close(heldout.learner.distinguisher.head.weight.detach(), best * head)


def test_a_reading_is_the_mean_loss_and_accuracy_on_the_first_half_alone(tokenizer, tiny_model_dir):
    prompts = [f"q{i}" for i in range(40)]
    noted = []
    heldout = heldout_of(tokenizer, tiny_model_dir, prompts, noted)
    stopping, testing = answered(heldout.stopping[:5]), answered(heldout.testing[:5])
    for entry in [*testing, *stopping]:
        heldout.add(entry)
    assert heldout.entries == stopping
    assert list(heldout.tested.values()) == testing
    set_head(heldout, torch.randn(1, 32, generator=torch.Generator().manual_seed(5)))
    assert heldout.reading() == pytest.approx(by_hand(heldout, stopping), rel=1e-5)
    assert noted == [("distinguisher/accuracy_stopping", pytest.approx(by_hand(heldout, stopping)[1]))]
    assert heldout.best is None


def test_without_held_out_pairs_nothing_is_kept_and_nothing_is_said(tokenizer, tiny_model_dir):
    heldout = heldout_of(tokenizer, tiny_model_dir, ["q0", "q1"])
    before = distinguisher_state(heldout)
    heldout.restore()
    assert all(torch.equal(one, two) for one, two in zip(before, distinguisher_state(heldout), strict=True))
    signal = heldout.signal()
    assert signal.num == 0
    assert signal.upper == 1.0
    assert signal.metrics() == {}


def test_what_was_kept_goes_through_a_checkpoint(tokenizer, tiny_model_dir):
    prompts = [f"q{i}" for i in range(40)]
    one, two = (heldout_of(tokenizer, tiny_model_dir, prompts) for _ in range(2))
    for entry in answered([*one.stopping[:6], *one.testing[:6]]):
        one.add(entry)
    set_head(one, torch.ones(1, 32))
    one.reading(keep=True)
    set_head(two, torch.ones(1, 32))
    two.load_state(json.loads(json.dumps(one.state())), one.tensors())
    assert two.state() == one.state()
    assert [torch.equal(a, b) for a, b in zip(one.best, two.best, strict=True)] == [True] * len(one.best)
    assert two.signal() == one.signal()


# --- whether there is a signal


def test_the_limit_is_clopper_pearsons_of_one_pair_to_a_question(tokenizer, tiny_model_dir):
    prompts = [f"q{i // 2}" for i in range(120)]
    heldout = heldout_of(tokenizer, tiny_model_dir, prompts)
    first = {}
    for entry in answered(heldout.testing):
        heldout.add(entry)
        heldout.add(entry._replace(answer=Answer("met again", True)))
        first.setdefault(prompts[entry.row], entry)
    set_head(heldout, torch.randn(1, 32, generator=torch.Generator().manual_seed(2)))
    _, accuracy = by_hand(heldout, first.values())
    signal = heldout.signal()
    assert accuracy != 0.5
    assert signal.num == len(first)
    assert signal.accuracy == pytest.approx(accuracy)
    wins = round(accuracy * len(first))
    assert accuracy * len(first) == pytest.approx(wins)
    expected = binomtest(wins, len(first), alternative="less").proportion_ci(0.95, "exact").high
    assert signal.upper == pytest.approx(expected, abs=1e-9)
    assert set(signal.metrics()) == {
        *("distinguisher/accuracy_tested", "distinguisher/accuracy_tested_upper", "distinguisher/pairs_tested")
    }


def test_the_warning_says_what_was_found_why_and_what_to_do():
    text = Signal(0.47, 0.553, 140).describe(is_frozen=False)
    for words in ("no adversarial signal", "140 held-out questions", "47%", "55%", "does not show a human-like"):
        assert words in text
    assert "larger causal LM as `distinguisher`" in text
    assert "the game can gain" in text
    assert "choosing among answers" in Signal(0.47, 0.553, 140).describe(is_frozen=True)


def test_too_few_questions_are_called_too_few():
    text = Signal(0.5, 0.7, 20).describe_doubt()
    for words in ("cannot be told", "20 held-out questions", "50%", "70%", "`distinguisher_warmup_steps`"):
        assert words in text


@pytest.mark.parametrize(
    ("kind", "frozen"),
    [("nothing to see", False), ("nothing to see", True), ("a difference", True), ("few rows", False)],
)
def test_a_distinguisher_that_finds_nothing_is_called_so_and_one_that_does_or_too_few_rows_are_not(
    tmp_path, tiny_model_dir, caplog, kind, frozen
):
    human = "xyxyx" if kind == "a difference" else "ab"
    trainer = make(
        tmp_path,
        tiny_model_dir,
        rows(60 if kind == "few rows" else 520, answers=(human,)),
        freeze_imitator=frozen,
        heldout_fraction=0.5,
        distinguisher_warmup_steps=5 if kind == "few rows" else 33,
        per_device_train_batch_size=64,
        distinguisher_learning_rate=3e-3,
        max_steps=1,
    )
    ids = trainer._tokenizer("ab")["input_ids"] + [trainer._tokenizer.eos_token_id]
    trainer._generate_single_turn = lambda prompts, *_, **__: ([ids for _ in prompts], None)
    with caplog.at_level(logging.WARNING):
        train(trainer)
    warned = [r.getMessage() for r in caplog.records if "no adversarial signal" in r.getMessage()]
    assert len(warned) == (kind == "nothing to see")
    assert ("cannot be told" in caplog.text) == (kind == "few rows")
    (upper,) = logged(trainer, "distinguisher/accuracy_tested_upper")
    (accuracy,) = logged(trainer, "distinguisher/accuracy_tested")
    assert (upper < NO_SIGNAL) == (kind == "nothing to see")
    assert accuracy == (1.0 if kind == "a difference" else 0.5)


# --- in a run


def test_an_automatic_warmup_hands_its_best_weights_to_the_game(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, distinguisher_warmup_steps="auto", max_steps=1, learning_rate=1e-4)
    trainer.game.learner.learning_rates = [0.3 for _ in trainer.game.learner.learning_rates]  # it gets worse for sure
    ask, at_end = trainer.game.ask_for_a_signal, {}

    def asked():
        at_end.update(distinguisher_weights(trainer))
        return ask()

    best = {}

    def forget(heldout=trainer.game.heldout, real=trainer.game.heldout.forget):
        best.update({str(i): tensor for i, tensor in enumerate(heldout.best)})
        real()

    trainer.game.ask_for_a_signal, trainer.game.heldout.forget = asked, forget
    train(trainer)
    assert same(at_end, best)
    # The imitator moves from now on: what it answered before says nothing of the next warm-up.
    assert (trainer.game.heldout.entries, trainer.game.heldout.tested, trainer.game.heldout.best) == ([], {}, None)


def test_a_warmup_of_given_length_is_left_where_it_ends(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, distinguisher_warmup_steps=12, max_steps=1)
    train(trainer)
    assert trainer.game.heldout.best is None


def test_a_frozen_run_ends_with_the_best_weights_of_warmup_and_game(tmp_path, tiny_model_dir):
    trainer = make(
        tmp_path,
        tiny_model_dir,
        freeze_imitator=True,
        distinguisher_warmup_steps=11,
        distinguisher_learning_rate=0.3,
        max_steps=11,
        lr_scheduler_type="constant",
    )
    train(trainer)
    heldout = trainer.game.heldout
    assert same(distinguisher_weights(trainer), {str(i): tensor for i, tensor in enumerate(heldout.best)})
    assert len(logged(trainer, "distinguisher/accuracy_stopping")) >= 2
