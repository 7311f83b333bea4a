"""The body of a separate distinguisher learns human answers by likelihood before it classifies; nothing else moves."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny_runs import distinguisher_weights, load, logged, make, nats_of, rows, run, same, train
from transformers import AutoTokenizer

from hf_imitate.classifier import classifier_around
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.distinguisher_body import BodyLearner, HumanAnswer
from hf_imitate.plateau import Plateau
from hf_imitate.rendering import Answer
from hf_imitate.trainers import adversarial_plan

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
HUMANS = [
    HumanAnswer("Item 1:", Answer("abc", True), 1.0),
    HumanAnswer("Item 2, which is longer:", Answer("de", True), 3.0),
    HumanAnswer("q", Answer("cut off", False), 0.5),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(str(tiny_model_dir))


def judge(tiny_model_dir, tokenizer, peft_config=None, given="model"):
    model = load(tiny_model_dir) if given == "model" else str(tiny_model_dir)
    settings = {"peft_config": peft_config, "keep_language_model": True}
    return Distinguisher.from_causal_lm(model, tokenizer, **settings)


def nats_by_hand(model, distinguisher, humans=HUMANS):
    rendered = distinguisher.encode([human.prompt for human in humans], [human.answer for human in humans])
    return [nats_of(model, row) for row in rendered]


@pytest.mark.parametrize("given", ["model", "path"])
@pytest.mark.parametrize("max_rows", [64, 1])
def test_a_step_follows_the_gradient_of_the_weighted_mean_of_summed_nats(tiny_model_dir, tokenizer, given, max_rows):
    distinguisher = judge(tiny_model_dir, tokenizer, given=given)
    learner = BodyLearner(distinguisher, 1e-3, max_rows=max_rows, max_grad_norm=math.inf)
    grads = {}
    learner.optimizer.register_step_pre_hook(
        lambda *_: grads.update((n, p.grad.clone()) for n, p in distinguisher.language_model.named_parameters())
    )
    found = learner.step(HUMANS)
    plain = load(tiny_model_dir)
    each = nats_by_hand(plain, distinguisher)
    total = sum(human.weight * nats for human, nats in zip(HUMANS, each, strict=True))
    (total / 4.5).backward()
    assert found.nats == pytest.approx(total.item(), rel=1e-5)
    assert found.weight == 4.5
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_classifier_reads_the_very_body_that_learned_and_its_head_stays(tiny_model_dir, tokenizer):
    for config in (None, LORA):
        distinguisher = judge(tiny_model_dir, tokenizer, config)
        prompts, answers = ["Item 1:", "Item 2:"], [Answer("abc", True), Answer("x", True)]
        head = distinguisher.head.state_dict()
        head = {name: value.clone() for name, value in head.items()}
        scored = distinguisher.score(prompts, answers)
        learner = BodyLearner(distinguisher, 1e-2)
        before = learner.likelihood(HUMANS)
        for _ in range(10):
            learner.step(HUMANS)
        assert learner.likelihood(HUMANS).nats < 0.95 * before.nats
        assert (distinguisher.score(prompts, answers) - scored).abs().min() > 1e-6
        assert all(torch.equal(head[name], value) for name, value in distinguisher.head.state_dict().items())


def test_with_an_adapter_the_base_stays_and_the_given_model_is_left_alone(tiny_model_dir, tokenizer):
    given = load(tiny_model_dir)
    distinguisher = Distinguisher.from_causal_lm(given, tokenizer, peft_config=LORA, keep_language_model=True)
    frozen = {n: p.clone() for n, p in distinguisher.model.named_parameters() if "lora_" not in n and "score" not in n}
    BodyLearner(distinguisher, 1e-2).step(HUMANS)
    assert all(torch.equal(frozen[n], p) for n, p in distinguisher.model.named_parameters() if n in frozen)
    fresh = dict(load(tiny_model_dir).named_parameters())
    assert all(torch.equal(p, fresh[n]) and p.grad is None for n, p in given.named_parameters())
    learned = BodyLearner(distinguisher, 1e-2).parameters
    assert {id(p) for p in learned} == {id(p) for n, p in distinguisher.model.named_parameters() if "lora_" in n}


def test_an_untied_head_of_the_language_model_is_what_it_is_scored_with_and_does_not_learn(tiny_model_dir, tokenizer):
    given = load(tiny_model_dir)
    given.config.tie_word_embeddings = False
    given.lm_head.weight = torch.nn.Parameter(given.lm_head.weight.detach() + 0.05)
    distinguisher = Distinguisher.from_causal_lm(given, tokenizer, keep_language_model=True)
    learner = BodyLearner(distinguisher, 1e-2)
    expected = sum(h.weight * n.item() for h, n in zip(HUMANS, nats_by_hand(given, distinguisher), strict=True))
    assert learner.step(HUMANS).nats == pytest.approx(expected, rel=1e-5)
    assert torch.equal(distinguisher.language_model.lm_head.weight, given.lm_head.weight)
    assert learner.likelihood(HUMANS).nats < expected


def test_processes_that_share_the_rows_make_the_step_of_one_that_has_them_all(tiny_model_dir, tokenizer):
    """The weight of all rows is the first thing that processes add up; gradients are added by hand here."""
    whole, other, split = (
        BodyLearner(judge(tiny_model_dir, tokenizer), 1e-2, max_grad_norm=math.inf) for _ in range(3)
    )
    grads = {}
    for name, learner, own in (("other", other, HUMANS[:1]), ("split", split, HUMANS[1:])):
        learner.optimizer.register_step_pre_hook(
            lambda *_, n=name, k=learner: grads.update({n: [p.grad.clone() for p in k.parameters]})
        )
        weight_of_all = iter([torch.tensor([4.5])])
        learner.reduce = lambda tensor, known=weight_of_all: next(known, tensor)
        learner.step(own)
    whole.optimizer.register_step_pre_hook(lambda *_: grads.update(whole=[p.grad.clone() for p in whole.parameters]))
    whole.step(HUMANS)
    for one, two, both in zip(grads["other"], grads["split"], grads["whole"], strict=True):
        torch.testing.assert_close(one + two, both, atol=1e-6, rtol=1e-4)


def test_a_process_without_rows_takes_part(tiny_model_dir, tokenizer):
    calls = []
    learner = BodyLearner(judge(tiny_model_dir, tokenizer), 1e-2, reduce=lambda tensor: calls.append(1) or tensor)
    learner.step([])
    alone = len(calls)
    learner.step(HUMANS)
    assert len(calls) == 2 * alone


def test_a_classifier_or_one_that_let_go_of_its_head_is_an_error_that_says_so(tiny_model_dir, tokenizer):
    classifier = Distinguisher(classifier_around(load(tiny_model_dir)), tokenizer)
    with pytest.raises(ValueError, match="no language model's head"):
        BodyLearner(classifier, 1e-3)


def test_a_likelihood_that_is_not_finite_is_an_error_and_moves_nothing(tiny_model_dir, tokenizer):
    distinguisher = judge(tiny_model_dir, tokenizer)
    learner = BodyLearner(distinguisher, 1e-3)
    with torch.no_grad():
        distinguisher.language_model.model.norm.weight.fill_(math.nan)
    before = [p.clone() for p in learner.parameters]
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        learner.step(HUMANS)
    assert all(torch.equal(one, p) or one.isnan().any() for one, p in zip(before, learner.parameters, strict=True))


# --- in a run


def separate(folder, model, **changes):
    settings = {"distinguisher_lm_warmup_steps": 3, "distinguisher_warmup_steps": 1, "max_steps": 1, **changes}
    arguments = {"distinguisher": str(model), **settings.pop("arguments", {})}
    return make(folder, model, arguments=arguments, **settings)


def test_the_phases_come_in_order_and_the_bits_fall(tmp_path, tiny_model_dir):
    trainer = separate(
        tmp_path,
        tiny_model_dir,
        imitator_warmup_steps=1,
        distinguisher_lm_warmup_steps=20,
        imitator_warmup_learning_rate=2e-2,
    )
    train(trainer)
    phases = ["imitator_warmup"] + ["distinguisher_lm_warmup"] * 20 + ["distinguisher_warmup", "game"]
    assert logged(trainer, "phase") == phases
    bits = logged(trainer, "distinguisher/bits_per_answer")
    assert len(bits) == 20
    assert bits[-1] < 0.9 * bits[0]
    assert trainer.distinguisher.language_model is None  # nobody needs its head any more


def test_the_bits_are_those_of_the_first_batch_of_training_rows(tmp_path, tiny_model_dir):
    trainer = separate(tmp_path, tiny_model_dir, heldout_fraction=0.25, gradient_accumulation_steps=2)
    drawn = trainer.likelihood.rows.draw(0, 16, stream=5)
    assert trainer.likelihood.rows.is_heldout.isdisjoint(drawn)
    plain = load(tiny_model_dir)
    human = trainer.renderer.human(*(rows()[name] for name in ("prompt", "completion")))
    expected = sum(nats_of(plain, human[i]).item() for i in drawn) / 16 / math.log(2)
    train(trainer)
    assert logged(trainer, "distinguisher/bits_per_answer")[0] == pytest.approx(expected, rel=1e-5)


def test_an_automatic_warmup_of_the_body_ends_when_held_out_nats_stop_falling(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(adversarial_plan, "READING_EVERY", 2)
    trainer = separate(
        tmp_path, tiny_model_dir, distinguisher_lm_warmup_steps="auto", imitator_warmup_learning_rate=1e-30
    )
    train(trainer)
    assert logged(trainer, "phase").count("distinguisher_lm_warmup") == 8  # the first reading at 2, three no better
    assert len(logged(trainer, "distinguisher/bits_per_answer_heldout")) == 4
    assert logged(trainer, "phase")[8:] == ["distinguisher_warmup", "game"]


@pytest.mark.parametrize("given", ["nothing", "Distinguisher", "classifier", "ngram"])
def test_without_a_body_of_its_own_to_fit_auto_is_no_step_and_a_number_is_an_error(tmp_path, tiny_model_dir, given):
    distinguisher = {
        "nothing": lambda: None,
        "Distinguisher": lambda: Distinguisher.from_causal_lm(str(tiny_model_dir)),
        "classifier": lambda: classifier_around(load(tiny_model_dir)),
        "ngram": lambda: "ngram",
    }[given]
    arguments = {"distinguisher": distinguisher()}
    trainer = make(tmp_path, tiny_model_dir, arguments=arguments, distinguisher_lm_warmup_steps="auto")
    assert trainer.phases.distinguisher_lm_warmup == 0
    arguments = {"distinguisher": distinguisher()}
    with pytest.raises(ValueError, match="no body of its own with a language model's head"):
        make(tmp_path, tiny_model_dir, arguments=arguments, distinguisher_lm_warmup_steps=2)


def test_a_copy_of_the_imitators_base_is_fitted_only_where_that_was_asked_for(tmp_path, tiny_model_dir):
    auto, asked = (
        make(tmp_path, tiny_model_dir, full=True, distinguisher_lm_warmup_steps=steps) for steps in ("auto", 2)
    )
    assert auto.phases.distinguisher_lm_warmup == 0
    assert asked.phases.distinguisher_lm_warmup == 2


def test_a_run_goes_on_from_the_middle_of_the_bodys_warmup_to_the_same_bits(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(adversarial_plan, "READING_EVERY", 1)
    monkeypatch.setattr(adversarial_plan, "Plateau", lambda: Plateau(patience=1, min_delta=100.0))
    changes = {"distinguisher_lm_warmup_steps": "auto", "distinguisher_warmup_steps": 2, "freeze_imitator": True}
    whole = separate(tmp_path / "whole", tiny_model_dir, save_strategy="steps", save_steps=1, **changes)
    train(whole)
    folder = Path(whole.args.output_dir)
    assert whole.phases.state()["distinguisher_lm_warmup"] == 2
    entered = [
        json.loads((folder / f"checkpoint-{step}" / "adversarial_state_0.json").read_text())["entered_phase"]
        for step in (1, 3)
    ]
    assert entered == ["distinguisher_lm_warmup", "distinguisher_warmup"]
    for step in (1, 3):
        torch.manual_seed(99)
        again = separate(tmp_path / "again", tiny_model_dir, **changes)
        train(again, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert same(distinguisher_weights(again), distinguisher_weights(whole)), step
        assert logged(again, "distinguisher/bits_per_answer") == logged(whole, "distinguisher/bits_per_answer")


def test_fitting_the_body_first_is_what_a_separate_distinguisher_gets_by_default(tmp_path, tiny_model_dir):
    trainer = run(
        tmp_path,
        tiny_model_dir,
        arguments={"distinguisher": load(tiny_model_dir)},
        distinguisher_lm_warmup_steps="auto",
        max_steps=1,
        heldout_fraction=0.0,
    )
    assert logged(trainer, "phase") == ["distinguisher_lm_warmup"] * 20 + ["game"]
