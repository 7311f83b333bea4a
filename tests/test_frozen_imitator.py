"""`freeze_imitator=True`: only the distinguisher learns; what is saved is a residual imitator of what was there."""

import copy
from collections import Counter

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_runs import (
    Watched,
    distinguisher_weights,
    load,
    logged,
    lora,
    make,
    rows,
    run,
    same,
    settings,
    spied,
    train,
    weights,
)

from hf_imitate import AdversarialConfig, Imitator


def everything(model):
    """Every number of a model, by name; a distinguisher's adapter on it is its own."""
    return {name: value for name, value in weights(model.state_dict().items()).items() if "distinguisher" not in name}


def frozen_adapter(tmp_path, tiny_model_dir):
    """A PEFT model as `from_pretrained` gives it: nothing of it is trainable."""
    model = get_peft_model(load(tiny_model_dir), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05
    model.save_pretrained(str(tmp_path / "adapter"))
    return PeftModel.from_pretrained(load(tiny_model_dir), str(tmp_path / "adapter"))


@pytest.mark.parametrize("kind", ["adapter", "frozen adapter", "all weights", "frozen weights"])
def test_a_frozen_imitator_keeps_every_bit_and_only_the_distinguisher_moves(tmp_path, tiny_model_dir, kind):
    model = load(tiny_model_dir) if "weights" in kind else tiny_model_dir
    if kind == "frozen adapter":
        model = frozen_adapter(tmp_path, tiny_model_dir)
    if kind == "frozen weights":
        model.requires_grad_(False)
    arguments = {"peft_config": None} if kind == "frozen adapter" else {}
    trainer = make(
        tmp_path,
        model,
        full=kind != "adapter",
        arguments=arguments,
        freeze_imitator=True,
        imitator_warmup_steps="auto",
        distinguisher_warmup_steps=2,
    )
    before, of_distinguisher = everything(trainer.model), distinguisher_weights(trainer)
    train(trainer)
    assert same(before, everything(trainer.model))
    assert not same(of_distinguisher, distinguisher_weights(trainer))
    # One more entry comes at the end, with what the kept weights are worth.
    assert logged(trainer, "phase") == ["distinguisher_warmup"] * 2 + ["game"] * 3
    assert logged(trainer, "learning_rate") == [0.0] * 4


def test_no_gradient_reaches_a_frozen_imitator_and_no_optimizer_holds_it(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, freeze_imitator=True, distinguisher_warmup_steps=1)
    own = {id(p) for p in trainer.game.learner.parameters}
    rest = [p for p in trainer.model.parameters() if id(p) not in own]
    grads = []
    for parameter in rest:
        parameter.register_hook(grads.append) if parameter.requires_grad else None
    with spied(trainer, "_get_per_token_logps_and_entropies") as policy:
        train(trainer)
    assert policy == []  # TRL's policy forward
    assert grads == []
    assert all(p.grad is None and not p.requires_grad for p in rest)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held.isdisjoint(map(id, trainer.model.parameters()))


def test_the_distinguisher_of_a_frozen_imitator_meets_a_human_per_row_in_every_step(tmp_path, tiny_model_dir):
    trainer = run(
        tmp_path,
        tiny_model_dir,
        kind=Watched,
        freeze_imitator=True,
        distinguisher_warmup_steps=1,
        max_steps=3,
        heldout_fraction=0.25,
    )
    asked = Counter(row for batch in trainer.batches for row in batch["row"].tolist())
    assert len(trainer.batches) == 4
    assert sum(asked.values()) == 32
    assert max(asked.values()) <= 2  # 24 training rows in passes; a game would have asked each four times
    assert all(len(set(batch["row"].tolist())) == 8 for batch in trainer.batches)


def test_the_distinguishers_rate_follows_the_schedule_in_the_steps_of_the_game(tmp_path, tiny_model_dir):
    trainer = make(
        tmp_path,
        tiny_model_dir,
        freeze_imitator=True,
        distinguisher_warmup_steps=1,
        lr_scheduler_type="linear",
        max_steps=4,
    )
    with spied(trainer.game.learner, "step") as calls:
        train(trainer)
    assert [args[1] for args, _ in calls] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imitator_warmup_steps": 3}, r"`imitator_warmup_steps`=3 would move the imitator"),
        ({"retrodictive_coef": 1.0}, r"`retrodictive_coef`=1.0 weighs a likelihood term"),
        ({"retrodictive_budget": 1.0}, r"`retrodictive_budget`=1.0 holds the imitator"),
        ({"num_iterations": 2}, r"`num_iterations`=2 lets the imitator learn"),
    ],
)
def test_settings_that_would_move_a_frozen_imitator_are_errors(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message + r".*`freeze_imitator=True`"):
        settings(tmp_path, freeze_imitator=True, **changes)


def test_freezing_means_no_imitator_warmup_where_none_was_asked_for(tmp_path):
    assert AdversarialConfig(str(tmp_path), freeze_imitator=True).imitator_warmup_steps == 0
    assert AdversarialConfig(str(tmp_path)).imitator_warmup_steps == "auto"


def test_rewards_and_optimizers_have_nobody_to_move_and_are_errors_before_a_model_loads(tmp_path, tiny_model_dir):
    def paid(completions, **columns):
        return [0.0] * len(completions)

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for name, given in (("reward_funcs", paid), ("optimizers", (optimizer, None))):
        with pytest.raises(ValueError, match=f"`{name}` is given, and `freeze_imitator=True`"):
            make(tmp_path, "no/model", arguments={name: given}, freeze_imitator=True)


@pytest.mark.parametrize("full", [False, True])
def test_a_frozen_run_saves_a_residual_imitator(tmp_path, tiny_model_dir, full):
    trainer = run(
        tmp_path,
        tiny_model_dir,
        full=full,
        arguments={"distinguisher": str(tiny_model_dir)},
        freeze_imitator=True,
        distinguisher_lm_warmup_steps=1,
        distinguisher_warmup_steps=2,
    )
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    imitator = Imitator.from_pretrained(folder)
    questions = rows()["prompt"][:3]
    plain = Imitator(load(tiny_model_dir), trainer._tokenizer, max_new_tokens=6)
    assert imitator.answer(questions, num_answers=2, seed=3) == plain.answer(questions, num_answers=2, seed=3)
    kept = imitator.answer(questions, num_answers=2, seed=3, resample=4)
    assert [len(own) for own in kept] == [2, 2, 2]
    texts = ["abc", "de", "x"]
    from_run = Imitator(trainer.model, trainer._tokenizer, distinguisher=trainer.distinguisher, max_new_tokens=6)
    torch.testing.assert_close(
        imitator.human_logit(questions, texts), from_run.human_logit(questions, texts), atol=1e-5, rtol=0
    )


def test_a_frozen_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, tiny_model_dir):
    def build(folder, **changes):
        return make(
            folder,
            tiny_model_dir,
            freeze_imitator=True,
            distinguisher_warmup_steps=2,
            max_steps=3,
            lr_scheduler_type="linear",
            **changes,
        )

    whole = build(tmp_path / "whole", save_strategy="steps", save_steps=1)
    train(whole)
    for step in (1, 3, 5):
        torch.manual_seed(1234)
        again = build(tmp_path / "again")
        train(again, resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert same(distinguisher_weights(again), distinguisher_weights(whole)), step
        assert copy.deepcopy(again.game.state()) == whole.game.state(), step


def test_evaluation_of_a_frozen_imitator_states_its_bits(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, freeze_imitator=True, max_steps=1)
    plain = make(tmp_path, tiny_model_dir)
    found = [one.evaluate(rows(8))["eval_retrodiction/bits_per_answer"] for one in (trainer, plain)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
