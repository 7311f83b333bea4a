"""What AdversarialTrainer does with weights, gradients and metrics, on models small enough to check by hand."""

import copy
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from tiny_runs import (
    AtEveryStep,
    Watched,
    distinguisher_weights,
    imitator_weights,
    load,
    logged,
    make,
    nats_of,
    rows,
    run,
    same,
    train,
    weights,
)
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_imitate.losses import leave_one_out

TESTS = Path(__file__).parent


# --- who moves when


@pytest.mark.parametrize("kind", ["shared base", "full fine-tuning", "a model of its own"])
def test_imitator_and_distinguisher_move_in_their_phases_and_only_there(tmp_path, tiny_model_dir, kind):
    trainer = make(
        tmp_path,
        tiny_model_dir,
        full=kind == "full fine-tuning",
        arguments={"distinguisher": load(tiny_model_dir)} if kind == "a model of its own" else {},
        imitator_warmup_steps=2,
        distinguisher_warmup_steps=2,
    )
    trained = {id(p) for p in trainer.game.learner.parameters}
    trained |= {id(p) for p in trainer.model.parameters() if p.requires_grad}
    everything = [*trainer.model.parameters(), *trainer.distinguisher.model.parameters()]
    frozen = [p for p in everything if id(p) not in trained]
    frozen_before = [p.detach().clone() for p in frozen]
    seen = [(imitator_weights(trainer), distinguisher_weights(trainer))]
    note = AtEveryStep(lambda: seen.append((imitator_weights(trainer), distinguisher_weights(trainer))))
    trainer.add_callback(note)
    train(trainer)
    moved = [
        tuple(not same(before[side], after[side]) for side in (0, 1)) for before, after in itertools.pairwise(seen)
    ]
    assert moved == [(True, False)] * 2 + [(False, True)] * 2 + [(True, True)] * 2
    assert all(torch.equal(p, before) for p, before in zip(frozen, frozen_before, strict=True))


# --- the loss


def game_batch(num_answers=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, 290, (num_answers, 9), generator=generator)
    lengths = torch.tensor([5, 3, 2, 4])[:num_answers]
    return {
        "prompt_ids": ids[:, :4],
        "prompt_mask": torch.ones(num_answers, 4, dtype=torch.long),
        "completion_ids": ids[:, 4:],
        "completion_mask": (torch.arange(5) < lengths[:, None]).long(),
        "advantages": torch.tensor([0.5, -0.5, -1.25, 1.25])[:num_answers],
    }


def test_a_reference_with_the_same_weights_differs_by_nothing_where_questions_are_padded(tmp_path, tiny_model_dir):
    """GPT-2 learns positions, so padding before a question must not count for one side alone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.save_pretrained(tmp_path / "gpt2")
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.5}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(tmp_path / "gpt2")
    asked = rows(prompt=[f"Item {'of many words ' * (i % 3)}{i}:" for i in range(32)])
    settings = {"beta": 0.1, "max_steps": 1, "steps_per_generation": 2, "generation_batch_size": None}
    own = {"distinguisher": load(tiny_model_dir)}
    trainer = run(tmp_path, tmp_path / "gpt2", asked, full=True, arguments=own, **settings)
    assert abs(logged(trainer, "kl")[0]) < 1e-5


def test_the_loss_of_a_batch_is_the_policy_term_plus_the_likelihood_under_one_normaliser(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, full=True, retrodictive_coef=0.7)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 3
    batch = game_batch()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}

    plain = load(tiny_model_dir)
    policy = torch.zeros(())
    for i in range(4):
        length = int(batch["completion_mask"][i].sum())
        ids = torch.cat([batch["prompt_ids"][i], batch["completion_ids"][i]])[None]
        log_p = plain(input_ids=ids).logits[0, 3:-1].log_softmax(dim=1)
        log_p = log_p.gather(1, batch["completion_ids"][i][:, None])[:length, 0]
        # On the answers it has just sampled, PPO's ratio is 1 and its gradient that of log p.
        policy = policy - batch["advantages"][i] * (log_p - log_p.detach() + 1).sum() / 4
    human = [row.rendered for row in trainer.likelihood.draw(0)]
    likelihood = torch.stack([nats_of(plain, row) for row in human]).mean()
    expected = (policy + 0.7 * likelihood) / (6 * 3)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-6, rtol=1e-5)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=2e-6, rtol=1e-4)


def test_the_policy_gradient_climbs_the_expected_logit_of_an_enumerable_law(tmp_path, tiny_model_dir):
    """All answers of one token: the mean over all pairs of samples is the gradient of the mean logit, exactly."""
    trainer = make(tmp_path, tiny_model_dir, full=True, retrodictive_coef=0.0, max_completion_length=1)
    vocabulary = trainer.model.config.vocab_size
    prompt = torch.tensor([[40, 41, 42]])
    logit = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))

    plain = load(tiny_model_dir)
    p = plain(input_ids=prompt).logits[0, -1].softmax(dim=0)
    (p * logit).sum().backward()

    p = p.detach()
    first, second = torch.meshgrid(torch.arange(vocabulary), torch.arange(vocabulary), indexing="ij")
    pairs = torch.stack([first.flatten(), second.flatten()], dim=1)
    # Two samples to a question: each pair of answers comes with its probability and with its centred rewards.
    weighted = leave_one_out(logit[pairs]) * p[pairs].prod(dim=1, keepdim=True) / 2
    advantages = torch.zeros(vocabulary).index_add_(0, pairs.flatten(), weighted.flatten())
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = {
        "prompt_ids": prompt.expand(vocabulary, -1),
        "prompt_mask": torch.ones(vocabulary, 3, dtype=torch.long),
        "completion_ids": torch.arange(vocabulary)[:, None],
        "completion_mask": torch.ones(vocabulary, 1, dtype=torch.long),
        "advantages": vocabulary * advantages,
    }
    trainer.compute_loss(trainer.model, batch).backward()
    for (name, got), expected in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, -expected.grad, atol=1e-6, rtol=1e-3, msg=name)


def gradients_of_first_step(tmp_path, model, dataset=None, **changes):
    found = {}
    trainer = make(tmp_path, model, dataset, full=True, max_grad_norm=0.0, **changes)
    note = AtEveryStep(
        before=lambda: found.setdefault("grad", weights((n, p.grad) for n, p in trainer.model.named_parameters()))
    )
    trainer.add_callback(note)
    train(trainer)
    return trainer, found["grad"]


def test_the_likelihood_is_summed_nats_over_the_longest_answer_however_the_batch_is_split(tmp_path, tiny_model_dir):
    dataset = rows(weight=[float(1 + i % 5) for i in range(32)])
    common = {"imitator_warmup_steps": 1, "max_steps": 1, "retrodictive_coef": 0.0}
    whole_run, whole = gradients_of_first_step(tmp_path, tiny_model_dir, dataset, **common)
    split_run, split = gradients_of_first_step(
        tmp_path, tiny_model_dir, dataset, **common, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    plain = load(tiny_model_dir)
    human_rows = whole_run.likelihood.rows
    drawn = human_rows.batch(human_rows.draw(0, 8))
    mean_weight = sum(human_rows.rows[i].weight for i in human_rows.train.tolist()) / len(human_rows.train)
    assert len({row.weight for row in drawn}) > 1
    loss = sum(row.weight * nats_of(plain, row.rendered) for row in drawn) / (8 * mean_weight) / 6
    loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(split[name], whole[name], atol=2e-6, rtol=1e-4)
    bits = [logged(trainer, "retrodiction/bits_per_answer")[0] for trainer in (whole_run, split_run)]
    total = sum(row.weight * nats_of(plain, row.rendered).item() for row in drawn) / sum(row.weight for row in drawn)
    assert bits == pytest.approx([total / math.log(2)] * 2, rel=1e-5)


def test_checkpointed_activations_leave_the_gradients_of_both_adapters_as_they_are(tmp_path, tiny_model_dir):
    found = []
    for is_on in (False, True):
        trainer = make(tmp_path, tiny_model_dir, max_steps=1, max_grad_norm=0.0, activation_checkpointing=is_on)
        # A zero B matrix hides the gradient of A.
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        grads = {}
        imitator = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.add_callback(
            AtEveryStep(before=lambda g=grads, i=imitator: g.update(weights((n, p.grad) for n, p in i.items())))
        )
        trainer.game.learner.max_grad_norm = math.inf
        trainer.game.learner.optimizer.register_step_pre_hook(
            lambda *_, g=grads, t=trainer: g.update(
                weights((f"d{k}", p.grad) for k, p in enumerate(t.game.learner.parameters))
            )
        )
        train(trainer)
        assert trainer.model.get_base_model().is_activation_checkpointing is is_on
        found.append(grads)
    off, on = found
    assert off.keys() == on.keys()
    assert {name for name in off if off[name].abs().max() > 1e-4} > {"d0"}
    for name, grad in off.items():
        torch.testing.assert_close(on[name], grad, atol=1e-6, rtol=0)


# --- evaluation


def everything(trainer):
    """All that training depends on, as text or tensors."""
    moments = [trainer.optimizer.state_dict(), trainer.game.learner.optimizer.state_dict()]
    return {
        "weights": [p.detach().clone() for p in [*trainer.model.parameters(), *trainer.game.learner.parameters]],
        "flags": [(p.requires_grad, p.grad is None) for p in trainer.model.parameters()],
        "optimizers": copy.deepcopy(moments),
        "game": json.dumps(trainer.game.state()),
        "likelihood": json.dumps(trainer.likelihood.state()),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "tally": json.dumps(trainer._tally._sums["train"]),
        "metrics": json.dumps(trainer._metrics["train"]),
        "place": (trainer._step, trainer.phases.state(), trainer._entered_phase, trainer.model.active_adapter),
        "buffer": trainer._buffered_inputs,
    }


def assert_equal(first, second):
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def test_evaluation_changes_nothing(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, distinguisher_warmup_steps=2, retrodictive_budget=1.0)
    before = everything(trainer)
    metrics = trainer.evaluate(rows(8))
    after = everything(trainer)
    assert metrics["eval_retrodiction/bits_per_answer"] > 0
    assert_equal(before, after)


def test_a_run_that_evaluates_is_the_run_that_does_not(tmp_path, tiny_model_dir):
    common = {"imitator_warmup_steps": 1, "distinguisher_warmup_steps": 1}
    plain = run(tmp_path, tiny_model_dir, **common)
    evaluated = run(
        tmp_path,
        tiny_model_dir,
        arguments={"eval_dataset": rows(8)},
        eval_strategy="steps",
        eval_steps=1,
        **common,
    )
    assert len(logged(evaluated, "eval_loss")) == 4
    assert same(imitator_weights(plain), imitator_weights(evaluated))
    assert same(distinguisher_weights(plain), distinguisher_weights(evaluated))


def test_an_evaluation_in_the_middle_of_a_pause_does_not_end_it(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir)
    trainer.game.pause = "a reason"
    trainer.evaluate(rows(8))
    assert trainer.game.pause == "a reason"


def test_each_of_several_evaluation_sets_has_its_own_metrics(tmp_path, tiny_model_dir):
    sets = DatasetDict(short=rows(8, answers=("a",)), long=rows(8, answers=("abcdefgh",)))
    trainer = run(tmp_path, tiny_model_dir, arguments={"eval_dataset": sets}, max_steps=1)
    metrics = trainer.evaluate()
    short, long = (metrics[f"eval_{name}_retrodiction/bits_per_answer"] for name in ("short", "long"))
    assert 0 < short < long


def test_evaluation_counts_answered_questions_alone(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, full=True)
    mixed = rows(8).remove_columns("completion").add_column("completion", ["abc", None, None, "de"] * 2)
    metrics = trainer.evaluate(mixed)
    human = trainer.renderer.human([mixed[i]["prompt"] for i in (0, 3, 4, 7)], ["abc", "de", "abc", "de"])
    plain = load(tiny_model_dir)
    nats = sum(nats_of(plain, row).item() for row in human) / 4
    assert metrics["eval_retrodiction/bits_per_answer"] == pytest.approx(nats / math.log(2), rel=1e-5)


# --- metrics


def test_each_phase_logs_its_metrics_under_the_contracts_names(tmp_path, tiny_model_dir):
    def is_short(completions, **columns):
        return [len(text) < 4 for text in completions]

    trainer = run(
        tmp_path,
        tiny_model_dir,
        arguments={"checks": [is_short]},
        imitator_warmup_steps=1,
        distinguisher_warmup_steps=2,
        retrodictive_budget=1.0,
        max_steps=4,
    )
    of_game = {
        *("distinguisher/accuracy_fresh", "distinguisher/margin", "distinguisher/loss"),
        *("answers/length_ratio", "answers/truncated", "checks/is_short/human", "checks/is_short/imitator"),
        "checks/is_short/weight",
    }
    likelihood = {"retrodiction/bits_per_answer", "retrodiction/bits_per_byte"}
    tested = {*("distinguisher/accuracy_tested", "distinguisher/accuracy_tested_upper", "distinguisher/pairs_tested")}
    expected = {
        "imitator_warmup": likelihood,
        "distinguisher_warmup": of_game | {"distinguisher/accuracy_heldout"},
        "game": of_game | likelihood | tested | {"retrodiction/multiplier", "distinguisher/accuracy_heldout"},
    }
    ours = ("distinguisher/", "answers/", "checks/", "retrodiction/")
    found: dict[str, set[str]] = {}
    for entry in trainer.state.log_history:
        if "phase" in entry:
            found.setdefault(entry["phase"], set()).update(name for name in entry if name.startswith(ours))
    assert found == expected
    assert set(logged(trainer, "checks/is_short/human")) == {1.0}


def test_length_ratio_margin_and_accuracy_are_what_their_names_say(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, kind=Watched, max_steps=1, heldout_fraction=0.0)
    batch = trainer.batches[0]
    wins = (batch["human"] > batch["imitator"]).float() + 0.5 * (batch["human"] == batch["imitator"]).float()
    assert logged(trainer, "distinguisher/accuracy_fresh") == [pytest.approx(wins.mean().item())]
    margin = (batch["human"] - batch["imitator"]).mean().item()
    assert logged(trainer, "distinguisher/margin") == [pytest.approx(margin, rel=1e-4)]
    # Every answer of so raw a model runs into the limit of six tokens; "abc" has four with its end, "de" three.
    human = [4 if row % 2 == 0 else 3 for row in batch["row"].tolist()]
    assert batch["cut"].all()
    assert logged(trainer, "answers/length_ratio") == [pytest.approx(6 * 8 / sum(human))]
    assert logged(trainer, "answers/truncated") == [1.0]


def test_completions_are_logged_where_the_user_asks_for_it(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, log_completions=True, max_steps=1)
    assert list((Path(trainer.args.output_dir) / "completions").glob("*.parquet"))
