"""Every setting of AdversarialConfig changes what it says and nothing else; bad ones fail before a model loads."""

import ast
import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import (
    AtEveryStep,
    Watched,
    distinguisher_weights,
    ending_model,
    imitator_weights,
    logged,
    make,
    rows,
    run,
    same,
    settings,
    spied,
    train,
    weights,
)
from trl import GRPOConfig

from hf_imitate import AdversarialConfig

OWN = tuple(f for f in dataclasses.fields(AdversarialConfig) if f.name in AdversarialConfig.__annotations__)
CHANGED = ("learning_rate", "scale_rewards", "loss_type", "disable_dropout", "hub_private_repo")
MACHINE = ("gradient_checkpointing", "activation_checkpointing")
TESTED: set[str] = set()


def shows(*names: str) -> Callable:
    """Register a test as the one of these settings."""

    def register(function: Callable) -> Callable:
        TESTED.update(names)
        return function

    return register


def test_every_setting_has_a_test():
    assert {field.name for field in OWN} == TESTED


def test_the_docstring_states_every_setting_with_its_default():
    documented = re.findall(
        r"^        (\w+) \((`[^)]*)\):$", AdversarialConfig.__doc__.split("Parameters:")[1], flags=re.MULTILINE
    )
    fields = {field.name: field for field in OWN if field.name not in (*CHANGED, *MACHINE)}
    assert [name for name, _ in documented] == list(fields)
    for name, kind in documented:
        stated = re.search(r"defaults to `(.*)`$", kind)
        assert "*optional*" in kind, name
        assert (None if stated is None else ast.literal_eval(stated[1])) == fields[name].default, name


def test_the_docstring_states_every_default_that_differs_from_trl():
    note = " ".join(AdversarialConfig.__doc__.split("Parameters:")[0].replace(">", " ").split())
    for name in CHANGED:
        ours, theirs = (kind.__dataclass_fields__[name].default for kind in (AdversarialConfig, GRPOConfig))
        assert ours != theirs, name
        stated = f"{ours:g}".replace("e-05", "e-5") if isinstance(ours, float) else repr(ours).replace("'", '"')
        assert f"`{name}={stated}`" in note, name
    changed = {f.name for f in dataclasses.fields(GRPOConfig) if f.name in AdversarialConfig.__annotations__}
    assert changed == {*CHANGED, *MACHINE}


# --- what each setting does


def by_question(batch, name):
    return batch[name].view(-1, 4)


def centred(scores):
    """Leave-one-out by a plain loop."""
    result = torch.empty_like(scores)
    for i in range(scores.shape[1]):
        others = torch.cat([scores[:, :i], scores[:, i + 1 :]], dim=1)
        result[:, i] = scores[:, i] - others.mean(dim=1)
    return result


def comparisons(trainer, num_generations):
    """Logits of the comparisons that the first update was made on: the first generations of each trained question."""
    batch = trainer.batches[0]
    rows_asked = by_question(batch, "row")[:, 0]
    trained = torch.tensor([row.item() not in trainer.likelihood.rows.is_heldout for row in rows_asked])
    human, imitator = (by_question(batch, side)[trained, :num_generations] for side in ("human", "imitator"))
    assert human.numel() > 0
    return human, imitator


@shows("distinguisher_loss")
def test_the_distinguisher_learns_by_the_loss_it_is_given_and_pays_the_same_before_it(tmp_path, tiny_model_dir):
    expected = {
        "bradley_terry": lambda h, i: -F.logsigmoid(h - i) + 0.01 * (h + i) ** 2,
        "bce": lambda h, i: 0.5 * (F.softplus(-h) + F.softplus(i)),
    }
    runs = {}
    for loss, formula in expected.items():
        runs[loss] = run(tmp_path, tiny_model_dir, kind=Watched, distinguisher_loss=loss, max_steps=1)
        value = formula(*comparisons(runs[loss], 2)).mean().item()
        assert logged(runs[loss], "distinguisher/loss")[0] == pytest.approx(value, rel=1e-5)
    first, second = runs.values()
    assert torch.equal(first.batches[0]["rewards"], second.batches[0]["rewards"])
    assert same(imitator_weights(first), imitator_weights(second))
    assert not same(distinguisher_weights(first), distinguisher_weights(second))


@shows("imitator_reward")
@pytest.mark.parametrize("reward", ["logit", "pair", "gail"])
def test_the_imitator_is_paid_by_the_reward_it_is_given(tmp_path, tiny_model_dir, reward):
    plain = run(tmp_path, tiny_model_dir, kind=Watched, distinguisher_loss="bce", max_steps=1)
    other = run(tmp_path, tiny_model_dir, kind=Watched, distinguisher_loss="bce", imitator_reward=reward, max_steps=1)
    batch = other.batches[0]
    imitator, human = by_question(batch, "imitator"), by_question(batch, "human")
    raw = {"logit": imitator, "pair": 1 / (1 + torch.exp(human - imitator)), "gail": torch.log1p(imitator.exp())}
    torch.testing.assert_close(by_question(batch, "rewards"), centred(raw[reward]), atol=1e-6, rtol=0)
    assert same(distinguisher_weights(plain), distinguisher_weights(other))


def gradients(trainer, inputs):
    """Gradients of the imitator for one micro-batch of the game."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, inputs).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def fixed_batch():
    """Two questions with two answers each, by hand."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 290, (4, 9), generator=generator)
    return {
        "prompt_ids": ids[:, :4],
        "prompt_mask": torch.ones(4, 4, dtype=torch.long),
        "completion_ids": ids[:, 4:],
        "completion_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]),
        "advantages": torch.tensor([0.5, -0.5, -1.25, 1.25]),
    }


@shows("retrodictive_coef")
def test_the_coefficient_scales_the_likelihood_gradient_alone(tmp_path, tiny_model_dir):
    by_coef = {}
    for coef in (0.0, 1.0, 2.5):
        trainer = make(tmp_path, tiny_model_dir, full=True, retrodictive_coef=coef)
        by_coef[coef] = gradients(trainer, fixed_batch())
    default = gradients(make(tmp_path, tiny_model_dir, full=True), fixed_batch())
    for name, policy in by_coef[0.0].items():
        likelihood = by_coef[1.0][name] - policy
        torch.testing.assert_close(by_coef[2.5][name], policy + 2.5 * likelihood, atol=1e-6, rtol=1e-4)
        assert torch.equal(default[name], by_coef[1.0][name])
    assert any((by_coef[1.0][name] - policy).abs().max() > 1e-3 for name, policy in by_coef[0.0].items())


@shows("retrodictive_budget")
@pytest.mark.parametrize("parts", [1, 2])
def test_the_budget_moves_the_multiplier_once_a_step_by_the_nats_it_is_short_of(tmp_path, tiny_model_dir, parts):
    split = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    free, tight = (
        run(tmp_path, tiny_model_dir, retrodictive_budget=budget, max_steps=1, learning_rate=1e-6, **split)
        for budget in (3.0, 0.0)
    )
    for trainer in (free, tight):
        nats = logged(trainer, "retrodiction/bits_per_answer")[0] * math.log(2)
        start = trainer.likelihood.nats_at_start
        moved = 0.95 * start + 0.05 * nats
        expected = math.exp(0.05 * (moved - start - trainer.args.retrodictive_budget))
        assert logged(trainer, "retrodiction/multiplier") == [pytest.approx(expected, rel=1e-6)]
    assert logged(free, "retrodiction/multiplier")[0] < logged(tight, "retrodiction/multiplier")[0]
    assert same(imitator_weights(free), imitator_weights(tight))  # the first step still has the multiplier 1


@shows("imitator_warmup_steps")
def test_the_imitator_warms_up_for_as_many_steps_and_the_game_keeps_its_own(tmp_path, tiny_model_dir):
    for steps in (0, 3):
        trainer = run(tmp_path, tiny_model_dir, imitator_warmup_steps=steps)
        assert logged(trainer, "phase") == ["imitator_warmup"] * steps + ["game"] * 2


@shows("imitator_warmup_learning_rate")
def test_the_warmup_learning_rate_holds_in_the_warmup_alone(tmp_path, tiny_model_dir):
    slow, fast = (
        run(tmp_path, tiny_model_dir, imitator_warmup_steps=3, imitator_warmup_learning_rate=rate)
        for rate in (1e-3, 4e-3)
    )
    rates = [logged(trainer, "learning_rate") for trainer in (slow, fast)]
    assert rates[1][:3] == pytest.approx([4 * rate for rate in rates[0][:3]])
    assert rates[0][3:] == rates[1][3:] == [1e-3, 1e-3]


@shows("distinguisher_lm_warmup_steps")
def test_the_body_of_a_separate_distinguisher_is_fitted_for_as_many_steps_while_everything_else_stands_still(
    tmp_path, tiny_model_dir
):
    trainer = make(
        tmp_path,
        tiny_model_dir,
        arguments={"distinguisher": str(tiny_model_dir)},
        distinguisher_lm_warmup_steps=3,
        max_steps=1,
    )
    head = trainer.distinguisher.head
    seen = []

    def note():
        seen.append((imitator_weights(trainer), weights(head.named_parameters()), distinguisher_weights(trainer)))

    note()
    trainer.add_callback(AtEveryStep(note))
    train(trainer)
    assert logged(trainer, "phase") == ["distinguisher_lm_warmup"] * 3 + ["game"]
    moved = [[not same(*sides) for sides in zip(*pair, strict=True)] for pair in itertools.pairwise(seen)]
    assert moved == [[False, False, True]] * 3 + [[True, True, True]]
    assert len(logged(trainer, "distinguisher/bits_per_answer")) == 3


@shows("freeze_imitator")
def test_a_frozen_imitator_stays_while_the_distinguisher_learns(tmp_path, tiny_model_dir):
    for is_frozen in (False, True):
        trainer = make(tmp_path, tiny_model_dir, freeze_imitator=is_frozen)
        lora = {name: p for name, p in trainer.model.named_parameters() if ".default." in name}
        before, of_distinguisher = weights(lora.items()), distinguisher_weights(trainer)
        train(trainer)
        assert same(before, weights(lora.items())) == is_frozen
        assert not same(of_distinguisher, distinguisher_weights(trainer))


@shows("distinguisher_warmup_steps")
def test_the_distinguisher_warms_up_for_as_many_steps_while_the_imitator_stands_still(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, distinguisher_warmup_steps=3, max_steps=1, learning_rate=1e-9)
    before = imitator_weights(trainer)
    train(trainer)
    assert logged(trainer, "phase") == ["distinguisher_warmup"] * 3 + ["game"]
    assert logged(trainer, "learning_rate") == [0.0, 0.0, 0.0, 1e-9]
    after = imitator_weights(trainer)
    assert max((after[name] - before[name]).abs().max().item() for name in before) < 1e-8
    assert trainer.game.learner.optimizer.state_dict()["state"][0]["step"] == 4


@shows("distinguisher_learning_rate")
def test_the_distinguisher_steps_as_far_as_its_rate_says_and_by_default_three_times_the_imitators(
    tmp_path, tiny_model_dir
):
    start = distinguisher_weights(make(tmp_path, tiny_model_dir))
    slow, fast, default = (
        run(tmp_path, tiny_model_dir, kind=Watched, max_steps=1, distinguisher_learning_rate=rate)
        for rate in (1e-3, 2e-3, None)
    )
    head = max(start, key=int)
    moved = [distinguisher_weights(trainer)[head] - start[head] for trainer in (slow, fast, default)]
    torch.testing.assert_close(moved[1], 2 * moved[0], atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(moved[2], 3 * moved[0], atol=1e-6, rtol=1e-3)
    assert torch.equal(slow.batches[0]["rewards"], fast.batches[0]["rewards"])
    assert same(imitator_weights(slow), imitator_weights(fast))


@shows("distinguisher_steps")
def test_a_generation_batch_is_good_for_as_many_updates_and_is_paid_before_the_first(tmp_path, tiny_model_dir):
    once, thrice = (
        run(tmp_path, tiny_model_dir, kind=Watched, max_steps=1, distinguisher_steps=steps) for steps in (1, 3)
    )
    counts = [trainer.game.learner.optimizer.state_dict()["state"][0]["step"] for trainer in (once, thrice)]
    assert counts == [1, 3]
    assert torch.equal(once.batches[0]["rewards"], thrice.batches[0]["rewards"])
    assert same(imitator_weights(once), imitator_weights(thrice))


@shows("distinguisher_generations")
@pytest.mark.parametrize("number", [1, 3])
def test_the_distinguisher_learns_from_so_many_generations_of_a_question_and_all_are_paid(
    tmp_path, tiny_model_dir, number
):
    trainer = run(tmp_path, tiny_model_dir, kind=Watched, max_steps=1, distinguisher_generations=number)
    human, imitator = comparisons(trainer, number)
    value = (-F.logsigmoid(human - imitator) + 0.01 * (human + imitator) ** 2).mean().item()
    assert logged(trainer, "distinguisher/loss")[0] == pytest.approx(value, rel=1e-5)
    assert (trainer.batches[0]["rewards"] != 0).all()


@shows("replay_ratio")
def test_replay_mixes_old_answers_into_the_distinguishers_batches_alone(tmp_path, tiny_model_dir):
    trainers, sizes = {}, {}
    for ratio in (0.0, 0.5, 0.75):
        trainers[ratio] = make(tmp_path, tiny_model_dir, kind=Watched, replay_ratio=ratio, heldout_fraction=0.0)
        with spied(trainers[ratio].game.learner, "step") as calls:
            train(trainers[ratio])
        sizes[ratio] = [sum(len(pair.imitator) for pair in args[0]) for args, _ in calls]
    # Two questions with two generations each are new; of the eight answers of the first batch as many, or thrice.
    assert sizes == {0.0: [4, 4], 0.5: [4, 8], 0.75: [4, 12]}
    none, half, _ = trainers.values()
    # The second batch is read beside the old answers, in larger forwards: equal up to rounding.
    assert torch.equal(none.batches[0]["rewards"], half.batches[0]["rewards"])
    torch.testing.assert_close(none.batches[1]["rewards"], half.batches[1]["rewards"], atol=1e-6, rtol=0)
    assert not same(distinguisher_weights(none), distinguisher_weights(half))


@shows("heldout_fraction")
def test_the_held_out_fraction_says_who_is_held_out_and_none_is_allowed(tmp_path, tiny_model_dir):
    trainers = {share: run(tmp_path, tiny_model_dir, heldout_fraction=share) for share in (0.0, 0.25, 0.5)}
    for share, trainer in trainers.items():
        human_rows = trainer.likelihood.rows
        assert len(human_rows.heldout) == share * 32
        assert sorted([*human_rows.heldout.tolist(), *human_rows.train.tolist()]) == list(range(32))
    assert logged(trainers[0.0], "distinguisher/accuracy_heldout") == []
    assert set(trainers[0.25].likelihood.rows.heldout) < set(trainers[0.5].likelihood.rows.heldout)


@shows("truncated_answers")
@pytest.mark.parametrize("kind", ["score", "drop", "penalty"])
def test_truncated_answers_are_scored_dropped_or_given_the_lowest_reward_of_their_group(
    tmp_path, tiny_model_dir, kind
):
    model, tokenizer = ending_model(tiny_model_dir)

    def longer(completions, **kwargs):
        return [float(len(text)) for text in completions]

    trainer = run(
        tmp_path,
        model,
        kind=Watched,
        arguments={"processing_class": tokenizer, "reward_funcs": longer},
        truncated_answers=kind,
        max_completion_length=16,
        per_device_train_batch_size=32,
        max_steps=1,
    )
    batch = trainer.batches[0]
    scores, cut = by_question(batch, "imitator"), by_question(batch, "cut")
    # `rewards` are what TRL sees: the distinguisher's, and those of the user's function.
    paid, length = batch["rewards"][:, 0].view(-1, 4), batch["rewards"][:, 1].view(-1, 4)
    advantages = by_question(batch, "advantages")
    assert cut.any()
    assert (~cut).any()
    for q in range(8):
        for i in range(4):
            if kind == "drop" and cut[q, i]:
                assert torch.isnan(paid[q, i])
                assert advantages[q, i] == 0
                continue
            values = scores[q].clone()
            if kind == "penalty":
                values[cut[q]] = scores[q].min()
                assert not cut[q, i] or length[q, i] == length[q].min()
            others = [values[j] for j in range(4) if j != i and not (kind == "drop" and cut[q, j])]
            expected = values[i] - sum(others) / len(others) if others else torch.tensor(0.0)
            torch.testing.assert_close(paid[q, i], expected, atol=1e-5, rtol=0)
            group = [length[q, j] for j in range(4) if not (kind == "drop" and cut[q, j])]
            expected = expected + length[q, i] - sum(group) / len(group)
            torch.testing.assert_close(advantages[q, i], expected, atol=1e-4, rtol=0)


@shows("allow_unlabelled")
def test_questions_without_an_answer_are_an_error_unless_they_are_allowed(tmp_path, tiny_model_dir):
    answers = ["abc", None] * 16
    with pytest.raises(ValueError, match="16 of 32 rows"):
        make(tmp_path, tiny_model_dir, rows().remove_columns("completion").add_column("completion", answers))
    trainer = run(
        tmp_path,
        tiny_model_dir,
        rows().remove_columns("completion").add_column("completion", answers),
        allow_unlabelled=True,
        heldout_fraction=0.0,
    )
    assert sorted(trainer.likelihood.rows.rows) == list(range(0, 32, 2))
    assert logged(trainer, "phase") == ["game", "game"]


@shows("learning_rate")
def test_the_learning_rate_is_that_of_the_imitator_in_the_game(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, learning_rate=5e-4, imitator_warmup_steps=1)
    assert logged(trainer, "learning_rate")[1:] == [5e-4, 5e-4]
    assert AdversarialConfig(str(tmp_path)).learning_rate == 2e-5


@shows("scale_rewards")
def test_rewards_keep_their_scale_unless_asked_otherwise(tmp_path, tiny_model_dir):
    plain, scaled = (
        run(tmp_path, tiny_model_dir, kind=Watched, max_steps=1, scale_rewards=kind) for kind in ("none", "group")
    )
    paid = by_question(plain.batches[0], "rewards")
    torch.testing.assert_close(by_question(plain.batches[0], "advantages"), paid, atol=1e-6, rtol=0)
    expected = paid / (paid.std(dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(by_question(scaled.batches[0], "advantages"), expected, atol=1e-5, rtol=0)


@shows("loss_type")
def test_a_normaliser_that_depends_on_the_answers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`loss_type` is 'dapo'; need one of \['dr_grpo'\]"):
        settings(tmp_path, loss_type="dapo")


@shows("disable_dropout")
def test_dropout_is_off_unless_asked_otherwise(tmp_path, tiny_model_dir):
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)
    for disable, rate in ((True, 0.0), (False, 0.3)):
        trainer = make(tmp_path, tiny_model_dir, arguments={"peft_config": config}, disable_dropout=disable)
        rates = {
            module.p
            for name, module in trainer.model.named_modules()
            if isinstance(module, torch.nn.Dropout) and name.endswith("default")
        }
        assert rates == {rate}


@shows(*MACHINE)
def test_activations_are_checkpointed_where_memory_is_scarce_and_without_a_word(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settings(tmp_path, use_cpu=True).gradient_checkpointing is False
        assert settings(tmp_path, activation_checkpointing=True).gradient_checkpointing is True
        assert settings(tmp_path, activation_checkpointing=False).gradient_checkpointing is False
    with pytest.warns(FutureWarning, match="`gradient_checkpointing` is deprecated"):
        assert settings(tmp_path, gradient_checkpointing=True).activation_checkpointing is True


@shows("hub_private_repo")
def test_only_an_explicit_false_makes_pushes_public(tmp_path):
    assert settings(tmp_path).hub_private_repo is True
    assert settings(tmp_path, hub_private_repo=None).hub_private_repo is True
    assert settings(tmp_path, hub_private_repo=False).hub_private_repo is False


# --- bad values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distinguisher_loss": "hinge"}, r"`distinguisher_loss` is 'hinge'; need one of"),
        ({"imitator_reward": "score"}, r"`imitator_reward` is 'score'; need one of"),
        ({"truncated_answers": "keep"}, r"`truncated_answers` is 'keep'; need one of"),
        ({"imitator_reward": "gail"}, r"needs `distinguisher_loss='bce'`"),
        ({"imitator_reward": "pair", "allow_unlabelled": True}, r"labelled questions only"),
        ({"retrodictive_coef": 1.0, "retrodictive_budget": 2.0}, r"Both `retrodictive_coef`=1.0 and"),
        ({"retrodictive_coef": -1.0}, r"`retrodictive_coef` is -1.0; need a finite number, 0 or more"),
        ({"retrodictive_coef": float("nan")}, r"`retrodictive_coef` is nan"),
        ({"retrodictive_budget": -0.5}, r"`retrodictive_budget` is -0.5"),
        ({"imitator_warmup_steps": -1}, r"`imitator_warmup_steps` is -1; need 'auto' or a whole number"),
        ({"imitator_warmup_steps": "many"}, r"`imitator_warmup_steps` is 'many'"),
        ({"distinguisher_warmup_steps": 1.5}, r"`distinguisher_warmup_steps` is 1.5"),
        ({"imitator_warmup_learning_rate": 0.0}, r"`imitator_warmup_learning_rate` is 0.0; need a positive"),
        ({"distinguisher_learning_rate": -1e-4}, r"`distinguisher_learning_rate` is -0.0001"),
        ({"learning_rate": 0.0}, r"`learning_rate` is 0.0"),
        ({"distinguisher_steps": 0}, r"`distinguisher_steps` is 0; need a whole number, at least 1"),
        ({"distinguisher_generations": 0}, r"`distinguisher_generations` is 0; need a whole number, at least 1"),
        ({"distinguisher_generations": 5}, r"has only `num_generations`=4"),
        ({"replay_ratio": 1.0}, r"`replay_ratio` is 1.0; need a share in \[0, 1\)"),
        ({"heldout_fraction": -0.1}, r"`heldout_fraction` is -0.1"),
        ({"max_completion_length": None}, r"`max_completion_length` is None"),
        ({"max_completion_length": 0}, r"`max_completion_length` is 0; need a whole number, at least 1"),
        ({"temperature": 0.7}, r"`temperature` is 0.7; an imitator's law is that of temperature 1"),
        ({"top_p": 0.9}, r"`top_p` is 0.9"),
        ({"top_k": 50}, r"`top_k` is 50"),
        ({"min_p": 0.1}, r"`min_p` is 0.1"),
        ({"repetition_penalty": 1.1}, r"`repetition_penalty` is 1.1"),
        ({"generation_kwargs": {"top_k": 5}}, r"`top_k` is 5"),
        ({"generation_kwargs": {"do_sample": False}}, r"`do_sample` is False"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, r"`generation_kwargs` has \['no_repeat_ngram_size'\]"),
        ({"generation_kwargs": {"eos_token_id": 3, "typical_p": 0.9}}, r"has \['eos_token_id', 'typical_p'\]"),
        ({"mask_truncated_completions": True}, r"`mask_truncated_completions` is True.*`truncated_answers='drop'`"),
        ({"importance_sampling_level": "sequence"}, r"`importance_sampling_level` is 'sequence'.*Leave it at 'token'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, r"`multi_objective_aggregation` is 'normalize_then_"),
        ({"top_entropy_quantile": 0.2}, r"`top_entropy_quantile` is 0.2"),
        ({"off_policy_mask_threshold": 0.5}, r"`off_policy_mask_threshold` is 0.5"),
        ({"generation_kwargs": '{"temperature": 0.5}'}, r"`temperature` is 0.5"),
        ({"use_vllm": True, "vllm_importance_sampling_correction": False}, r"by its own numbers would count as the"),
        (
            {"use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"},
            r"one of \['sequence_mask'",
        ),
        ({"use_vllm": True, "vllm_structured_outputs_regex": "[a-z]+"}, r"from another law than the imitator's"),
        ({"use_vllm": True, "temperature": 0.7}, r"`temperature` is 0.7; an imitator's law is that of temperature 1"),
        ({"remove_unused_columns": True}, r"`remove_unused_columns` is True"),
        (
            {"push_to_hub": True, "hub_private_repo": False, "hub_strategy": "all_checkpoints"},
            r"`hub_strategy` is 'all_checkpoints' and `hub_private_repo` is False",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, r"depends on the loss"),
        (
            {"per_device_train_batch_size": 6},
            r"generation_batch_size \(6\) must be divisible by num_generations \(4\)",
        ),
    ],
)
def test_a_bad_setting_is_named_with_its_value_before_a_model_loads(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_generation_settings_that_leave_the_law_alone_are_free(tmp_path):
    neutral = {"use_cache": False, "pad_token_id": 0, "do_sample": True, "top_k": 0}
    assert settings(tmp_path, generation_kwargs=neutral).generation_kwargs == neutral


def test_steps_from_a_command_line_are_numbers(tmp_path):
    config = settings(tmp_path, imitator_warmup_steps="12", distinguisher_warmup_steps="auto")
    assert (config.imitator_warmup_steps, config.distinguisher_warmup_steps) == (12, "auto")


def test_the_best_checkpoint_is_by_default_the_one_with_the_fewest_bits(tmp_path):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 500}
    config = settings(tmp_path, **best)
    assert (config.metric_for_best_model, config.greater_is_better) == ("eval_retrodiction/bits_per_answer", False)
    assert settings(tmp_path, **best, metric_for_best_model="eval_loss").metric_for_best_model == "eval_loss"
    other = settings(tmp_path, **best, metric_for_best_model="eval_short_retrodiction/bits_per_answer")
    assert other.greater_is_better is False
    assert settings(tmp_path).metric_for_best_model is None


def test_a_dataset_of_other_columns_needs_no_setting(tmp_path, tiny_model_dir):
    """A column that only the user's rewards read reaches them, whatever its type."""
    seen = []

    def reads(completions, level, **kwargs):
        seen.append((level, sorted(kwargs)))
        return [0.0] * len(completions)

    dataset: Dataset = rows(level=[{"a": [i]} for i in range(32)])
    run(tmp_path, tiny_model_dir, dataset, arguments={"reward_funcs": reads}, max_steps=1)
    assert all(level["a"][0] in range(32) for level in seen[0][0])
    assert not {"completion", "_hf_imitate_row"} & set(seen[0][1])


@shows("force_resume")
def test_a_run_goes_on_under_another_setting_only_where_that_is_forced(tmp_path, tiny_model_dir):
    run(tmp_path, tiny_model_dir, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"`learning_rate` was .* Give what was saved"):
        make(tmp_path, tiny_model_dir, max_steps=2, learning_rate=2e-3).train(resume_from_checkpoint=True)
    forced = make(tmp_path, tiny_model_dir, max_steps=2, learning_rate=2e-3, force_resume=True)
    train(forced, resume_from_checkpoint=True)
    assert forced.state.global_step == 2
