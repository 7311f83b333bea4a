"""When the game goes wrong, when a warm-up ends, what a budget keeps, what the format gives away."""

import itertools
import logging
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    AtEveryStep,
    Watched,
    ending_model,
    logged,
    make,
    nats_of,
    rows,
    run,
    same,
    train,
    weights,
)

from hf_imitate.trainers import adversarial_plan

TESTS = Path(__file__).parent


def longer_is_better(completion_ids, **kwargs):
    """Pays for never ending."""
    return [float(len(ids)) for ids in completion_ids]


def runaway(tmp_path, tiny_model_dir, **changes):
    model, tokenizer = ending_model(tiny_model_dir)
    return make(
        tmp_path,
        model,
        full=True,
        kind=Watched,
        arguments={"processing_class": tokenizer, "reward_funcs": longer_is_better},
        **{
            **{"max_completion_length": 16, "per_device_train_batch_size": 8, "learning_rate": 3e-2},
            **{"max_steps": 200, "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 3},
            **changes,
        },
    )


def test_an_imitator_that_stops_ending_is_named_held_still_and_stopped(tmp_path, tiny_model_dir, caplog):
    trainer = runaway(tmp_path, tiny_model_dir, retrodictive_coef=0.0)
    seen = []
    trainer.add_callback(
        AtEveryStep(lambda: seen.append((trainer.game.pause, weights(trainer.model.named_parameters()))))
    )
    with caplog.at_level(logging.WARNING):
        train(trainer)
    first = next(i for i, (pause, _) in enumerate(seen) if pause)
    paused = [pause for pause, _ in seen[first:]]
    assert first > 0
    assert all(paused)
    assert len(paused) == 50
    assert trainer.state.global_step == first + 50 < 200
    assert all(same(seen[first - 1][1], held) for _, held in seen[first:])
    assert not same(seen[0][1], seen[first - 1][1])
    assert all((batch["advantages"] == 0).all() for batch in trainer.batches[first:])
    said = [record.getMessage() for record in caplog.records if "stops ending" in record.getMessage()]
    assert len(said) == 2  # when it began, and at the end
    last_good = 3 * (first // 3)
    assert last_good > 0
    assert f"since step {first}," in said[1]
    assert f"checkpoint-{last_good}." in said[1]
    assert logged(trainer, "learning_rate")[first:] == [0.0] * 50


def test_what_is_usual_for_the_imitator_is_measured_while_it_stands_still(tmp_path, tiny_model_dir):
    trainer = runaway(tmp_path, tiny_model_dir, distinguisher_warmup_steps=12, max_steps=3, save_strategy="no")
    train(trainer)
    phases, cut = logged(trainer, "phase"), logged(trainer, "answers/truncated")
    before = [share for phase, share in zip(phases, cut, strict=True) if phase == "distinguisher_warmup"]
    assert len(before) == 12
    assert 0 < trainer.game.guard.truncated_at_start == pytest.approx(sum(before) / 12)
    assert trainer.game.guard.num_at_start == 12 * 8  # of each answer to its own question


def test_questions_nobody_answered_leave_the_usual_share_to_the_game(tmp_path, tiny_model_dir):
    """The warm-up does not ask them, and their answers may be longer."""
    trainer = runaway(
        tmp_path,
        tiny_model_dir,
        distinguisher_warmup_steps=3,
        max_steps=1,
        save_strategy="no",
        allow_unlabelled=True,
    )
    train(trainer)
    assert trainer.game.guard.num_at_start == 8


def test_answers_known_by_heart_are_counted_by_human_answer_and_never_in_an_evaluation(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, kind=Watched, distinguisher_warmup_steps=1, max_steps=1)
    memory, human_rows = trainer.game.memory, trainer.game.human_rows
    assert (memory.num_rows, memory.num_heldout_rows) == (len(human_rows.train), len(human_rows.heldout)) == (24, 8)
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for decay, batch in zip((0.99, 1.0), trainer.batches, strict=True):
        wins = (batch["human"] > batch["imitator"]).float()
        for heldout, side in sums.items():
            mine = torch.tensor([(row in human_rows.is_heldout) == heldout for row in batch["row"].tolist()])
            num = len(set(batch["row"][mine].tolist()))
            side[0] += decay * num * (wins[mine].mean().item() if num else 0.0)
            side[1] += decay * num
    assert [memory.wins, memory.num] == pytest.approx(sums[False])
    assert [memory.wins_heldout, memory.num_heldout] == pytest.approx(sums[True])
    before = memory.state()
    trainer.evaluate(rows(8))
    assert memory.state() == before
    trainer.game.load_state({**trainer.game.state(), "memory": {**before, "is_said": True}}, {})
    assert trainer.game.memory.is_said


def test_during_a_pause_the_likelihood_goes_on(tmp_path, tiny_model_dir):
    trainer = runaway(tmp_path, tiny_model_dir, max_steps=4, save_strategy="no", learning_rate=1e-3)
    plain = runaway(tmp_path, tiny_model_dir, max_steps=4, save_strategy="no", learning_rate=1e-3)
    guard = trainer.game.guard
    guard.truncated, guard.truncated_at_start, guard.num_at_start = 1.0, 0.0, 64
    human, seen = trainer.likelihood.rows.train, []
    nats = trainer.likelihood.mean_nats(trainer.model, human)
    trainer.add_callback(AtEveryStep(lambda: seen.append(weights(trainer.model.named_parameters()))))
    train(trainer)
    train(plain)
    assert trainer.game.pause
    assert all((batch["advantages"] == 0).all() for batch in trainer.batches)
    assert any((batch["advantages"] != 0).any() for batch in plain.batches)
    assert all(not same(one, two) for one, two in itertools.pairwise(seen))
    assert logged(trainer, "learning_rate") == [1e-3] * 4
    assert trainer.likelihood.mean_nats(trainer.model, human) < nats - 0.1


def test_a_budget_keeps_the_likelihood_of_humans_where_the_game_would_spend_it(tmp_path, tiny_model_dir):
    def unlike_humans(completions, **kwargs):
        return [sum(c not in "abcde" for c in text) / 2 for text in completions]

    nats = {}
    for budget in (None, 2.0):
        limit = {"retrodictive_coef": 0.0} if budget is None else {"retrodictive_budget": budget}
        trainer = run(
            tmp_path,
            tiny_model_dir,
            full=True,
            arguments={"reward_funcs": unlike_humans},
            imitator_warmup_steps=40,
            imitator_warmup_learning_rate=3e-3,
            learning_rate=1e-3,  # at three times as much the game outruns the moving average on some seeds
            max_steps=60,
            max_completion_length=5,
            **limit,
        )
        plain = trainer.model
        human = [row.rendered for row in trainer.likelihood.rows.batch(trainer.likelihood.rows.train)]
        with torch.no_grad():
            nats[budget] = sum(nats_of(plain, row).item() for row in human) / len(human)
    start = trainer.likelihood.nats_at_start
    assert nats[2.0] - start < 2.5
    assert nats[None] - start > 5


@pytest.mark.parametrize("who", ["imitator", "distinguisher"])
def test_an_automatic_warmup_ends_when_it_stops_helping_and_the_run_is_so_much_shorter(
    tmp_path, tiny_model_dir, monkeypatch, who
):
    monkeypatch.setattr(adversarial_plan, "READING_EVERY", 2)
    # A rate at which nothing moves: no reading is better than the first, and the third of those ends it.
    trainer = make(
        tmp_path,
        tiny_model_dir,
        **{f"{who}_warmup_steps": "auto"},
        imitator_warmup_learning_rate=1e-30,
        distinguisher_learning_rate=1e-30,
        per_device_train_batch_size=16,
    )
    cap = trainer.phases.total
    train(trainer)
    assert cap == {"imitator": 20, "distinguisher": 200}[who]
    steps = logged(trainer, "phase").count(f"{who}_warmup")
    assert 6 < steps < cap
    assert trainer.state.global_step == trainer.state.max_steps == steps + 2
    assert logged(trainer, "phase")[steps:] == ["game", "game"]
    assert logged(trainer, "learning_rate")[steps:] == [1e-3, 1e-3]


def test_without_held_out_rows_an_automatic_warmup_takes_its_most_steps_and_says_so(tmp_path, tiny_model_dir, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = run(tmp_path, tiny_model_dir, imitator_warmup_steps="auto", heldout_fraction=0.0)
    assert any("takes its most steps" in record.getMessage() for record in caplog.records)
    assert logged(trainer, "phase") == ["imitator_warmup"] * 20 + ["game"] * 2


def test_a_difference_in_format_is_said_once_before_the_game_and_other_differences_are_no_warning(
    tmp_path, tiny_model_dir, caplog
):
    warned = {}
    for answers in (("a\tb",), ("abcdef",)):
        trainer = make(
            tmp_path,
            tiny_model_dir,
            rows(answers=answers),
            distinguisher_warmup_steps=4,
            max_completion_length=8,
            full=True,
        )
        # What the imitator says: "ab", with its end, whatever it is asked.
        ids = trainer._tokenizer("ab")["input_ids"] + [trainer._tokenizer.eos_token_id]
        trainer._generate_single_turn = lambda prompts, *_, ids=ids, **__: ([ids for _ in prompts], None)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train(trainer)
        warned[answers[0]] = [r.getMessage() for r in caplog.records if "differences in format" in r.getMessage()]
    assert len(warned["a\tb"]) == 1
    assert "`tabs`" in warned["a\tb"][0]
    assert warned["abcdef"] == []  # longer, and that is for the game to teach
