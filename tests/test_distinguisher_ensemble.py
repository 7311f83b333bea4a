"""Several distinguishers, one logit: texts add up, checks count once, and all of it comes back from disk."""

import json
from pathlib import Path

import pytest
import torch
from distinguishers import LORA, imitator_model, is_short, is_wanted, marked_pairs, trained
from launch import in_two_processes
from tiny_runs import distinguisher_weights, load, make, rows, same, train
from transformers import AutoTokenizer

from hf_imitate import Distinguisher, Imitator
from hf_imitate.distinguisher_ensemble import DistinguisherEnsemble
from hf_imitate.ngram_distinguisher import NgramDistinguisher
from hf_imitate.pairs import Learner
from hf_imitate.rendering import Answer

TESTS = Path(__file__).parent
PROMPTS = ["Return the number", "list", "Set the name of the file and return it, please"]
ANSWERS = [Answer("of items", True), Answer("of items", False), Answer("caf\u00e9", True)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(str(tiny_model_dir))


def members(tiny_model_dir, tokenizer, **of_first):
    ngram = NgramDistinguisher(tokenizer, [tokenizer.eos_token_id])
    adapter = Distinguisher.from_causal_lm(str(tiny_model_dir), tokenizer, peft_config=LORA, **of_first)
    shared = Distinguisher.on_shared_base(imitator_model(tiny_model_dir), tokenizer, LORA)
    return [trained(ngram), trained(adapter), trained(shared)]


def test_logits_of_texts_add_and_the_order_and_batch_do_not_matter(tiny_model_dir, tokenizer):
    parts = members(tiny_model_dir, tokenizer)
    expected = sum(member.score(PROMPTS, ANSWERS) for member in parts)
    ensemble = DistinguisherEnsemble(parts)
    torch.testing.assert_close(ensemble.score(PROMPTS, ANSWERS, batch_size=1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(DistinguisherEnsemble(parts[::-1]).score(PROMPTS, ANSWERS), expected, atol=1e-5, rtol=0)


def test_a_check_counts_once_and_weights_that_members_bring_are_added_up(tiny_model_dir, tokenizer):
    one, two = (
        trained(Distinguisher.from_causal_lm(str(tiny_model_dir), tokenizer, checks=[is_short])) for _ in range(2)
    )
    outcomes = torch.tensor([[1.0], [0.0], [torch.nan]])
    expected = one.score(PROMPTS, ANSWERS, outcomes) + two.score(PROMPTS, ANSWERS, outcomes)
    ensemble = DistinguisherEnsemble([one, two])
    assert ensemble.check_names == ("is_short",)
    assert ensemble.check_weights.tolist() == [2.0]
    assert one.check_names == two.check_names == ()
    torch.testing.assert_close(ensemble.score(PROMPTS, ANSWERS, outcomes), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"trained with the checks \['is_short'\]"):
        ensemble.set_checks([is_wanted])


def test_one_member_is_no_ensemble(tiny_model_dir, tokenizer):
    with pytest.raises(ValueError, match="has 1 members; give two or more"):
        DistinguisherEnsemble(members(tiny_model_dir, tokenizer)[:1])


def test_an_ensemble_among_the_members_brings_its_own_and_they_come_back(tmp_path, tiny_model_dir, tokenizer):
    first, *others = members(tiny_model_dir, tokenizer)
    nested = DistinguisherEnsemble([DistinguisherEnsemble(others, checks=[is_short]), first])
    assert nested.members == [*others, first]
    assert nested.check_names == ("is_short",)
    nested.save_pretrained(tmp_path)
    again = Distinguisher.from_pretrained(tmp_path, checks=[is_short])
    outcomes = torch.tensor([[1.0], [0.0], [1.0]])
    expected = nested.score(PROMPTS, ANSWERS, outcomes)
    torch.testing.assert_close(again.score(PROMPTS, ANSWERS, outcomes), expected, atol=1e-5, rtol=0)


def test_all_members_learn_under_the_loss_of_the_sum(tiny_model_dir, tokenizer):
    ensemble = DistinguisherEnsemble(members(tiny_model_dir, tokenizer))
    learner = Learner(ensemble, 1e-3, max_grad_norm=float("inf"))
    grads = []
    learner.optimizer.register_step_pre_hook(lambda *_: grads.extend(p.grad.clone() for p in learner.parameters))
    pairs = marked_pairs(3)
    learner.step(pairs)

    fresh = DistinguisherEnsemble(members(tiny_model_dir, tokenizer))
    parameters = fresh.trainable_parameters()
    losses = []
    with fresh.active():
        for parameter in parameters:
            parameter.requires_grad_(True)
        for pair in pairs:
            rows_of = fresh.encode([pair.prompt] * 2, [pair.human, pair.imitator[0]])
            human, imitator = sum(
                member.text_logits([row[i] for row in rows_of]) for i, member in enumerate(fresh.members)
            )
            losses.append(torch.nn.functional.softplus(imitator - human) + 0.01 * (human + imitator) ** 2)
        torch.stack(losses).mean().backward()
    assert len(grads) == len(parameters)
    for found, parameter in zip(grads, parameters, strict=True):
        torch.testing.assert_close(found, parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_large_gradient_of_one_member_does_not_shorten_the_step_of_another(tiny_model_dir, tokenizer):
    moved = []
    for scale in (1.0, 1e4):
        parts = members(tiny_model_dir, tokenizer)[:2]
        with torch.no_grad():
            parts[0].model.weight.zero_()
        ensemble = DistinguisherEnsemble(parts)
        learner = Learner(ensemble, 1e-9)
        for parameter in parts[1].trainable_parameters():
            parameter.register_hook(lambda gradient, by=scale: by * gradient)
        learner.step(marked_pairs(2))
        moved.append(parts[0].model.weight.detach().clone())
    assert torch.equal(*moved)
    assert moved[0].abs().max() > 0


def check_kinds(folder, expected):
    stored = [json.loads((folder / str(i) / "checks.json").read_text()).get("kind") for i in range(len(expected))]
    assert stored == expected


def test_members_lie_in_numbered_folders_and_check_weights_in_one_place(tmp_path, tiny_model_dir, tokenizer):
    ensemble = DistinguisherEnsemble(members(tiny_model_dir, tokenizer), checks=[is_short])
    with torch.no_grad():
        ensemble.check_weights.fill_(1.5)
    ensemble.save_pretrained(tmp_path)
    check_kinds(tmp_path, ["ngram", None, None])
    stored = [json.loads(path.read_text())["checks"] for path in sorted(tmp_path.rglob("checks.json"))]
    assert sorted(map(str, stored)) == ["{'is_short': 1.5}", *["{}"] * 3]
    again = Distinguisher.from_pretrained(tmp_path, checks=[is_short])
    assert isinstance(again, DistinguisherEnsemble)
    outcomes = torch.tensor([[1.0], [0.0], [1.0]])
    expected = ensemble.score(PROMPTS, ANSWERS, outcomes)
    torch.testing.assert_close(again.score(PROMPTS, ANSWERS, outcomes), expected, atol=1e-5, rtol=0)
    one = Distinguisher.from_pretrained(tmp_path / "1")
    torch.testing.assert_close(
        one.score(PROMPTS, ANSWERS), ensemble.members[1].score(PROMPTS, ANSWERS), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_with_a_list_learns_saves_loads_and_resamples(tmp_path, tiny_model_dir, frozen):
    trainer = make(
        tmp_path,
        tiny_model_dir,
        arguments={"distinguisher": ["ngram", load(tiny_model_dir), None], "checks": [is_short]},
        distinguisher_lm_warmup_steps=1,
        distinguisher_warmup_steps=2,
        distinguisher_steps=2,
        freeze_imitator=frozen,
        max_steps=1,
    )
    before = distinguisher_weights(trainer)
    train(trainer)
    after = distinguisher_weights(trainer)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    check_kinds(folder / "distinguisher", ["ngram", None, None])
    assert {path.name for path in (folder / "distinguisher").iterdir()} == {"0", "1", "2", "checks.json"}
    imitator = Imitator.from_pretrained(folder)
    assert sum(member.model is imitator.model for member in imitator.distinguisher.members) == 1
    questions, texts = rows()["prompt"][:2], ["abc", "zzzzzz"]
    expected = trainer.distinguisher.score(questions, [Answer(text, True) for text in texts], torch.eye(2)[:, :1])
    found = imitator.human_logit(questions, texts, checks=[is_short])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert len(imitator.answer(questions, resample=3, checks=[is_short])) == 2
    answers = imitator.answer(questions, resample=2, checks=[is_short])
    assert imitator.verify(questions, answers, resample=2, checks=[is_short]).verified


def test_a_list_of_one_is_that_one(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, arguments={"distinguisher": ["ngram"]})
    assert isinstance(trainer.distinguisher, NgramDistinguisher)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "`distinguisher` is empty"),
        (["ngram", "ngram"], "has 'ngram' twice"),
        ([None, "ngram", None], "has None twice"),
        (["org/judge", "ngram", "org/judge"], "has 'org/judge' twice"),
    ],
)
def test_a_list_that_makes_no_sense_is_an_error_before_a_model_loads(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, "no/model", arguments={"distinguisher": given})


def test_a_run_with_a_list_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, tiny_model_dir):
    def build(folder, **changes):
        return make(
            folder,
            tiny_model_dir,
            arguments={"distinguisher": ["ngram", str(tiny_model_dir)]},
            distinguisher_lm_warmup_steps=2,
            distinguisher_warmup_steps=1,
            max_steps=2,
            **changes,
        )

    whole = build(tmp_path / "whole", save_strategy="steps", save_steps=1)
    train(whole)
    for step in (1, 3):
        again = build(tmp_path / "again")
        train(again, resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        assert same(distinguisher_weights(again), distinguisher_weights(whole)), step


PROGRAM = """
import sys
import torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from pathlib import Path
from tiny_runs import distinguisher_weights, make, rows, train

trainer = make(Path({folder!r}), Path({model!r}), rows(64), freeze_imitator=True, heldout_fraction=0.5,
               distinguisher_lm_warmup_steps=2, distinguisher_warmup_steps=3, per_device_train_batch_size=4,
               max_steps=2, use_cpu=True, arguments={{"distinguisher": ["ngram", {model!r}]}})
before = {{name: value.clone() for name, value in trainer.model.state_dict().items()}}
train(trainer)
rank = trainer.accelerator.process_index
after = trainer.model.state_dict()
metrics = [{{k: v for k, v in entry.items() if k.startswith("distinguisher/")}} for entry in trainer.state.log_history]
torch.save({{"distinguisher": distinguisher_weights(trainer), "metrics": metrics,
            "still": all(torch.equal(before[name], after[name]) for name in before),
            "best": trainer.game.heldout.best, "tested": len(trainer.game.heldout.tested)}},
           {folder!r} + f"/rank{{rank}}.pt")
"""


@pytest.mark.slow
def test_two_processes_fit_and_keep_one_ensemble_beside_a_frozen_imitator(tmp_path, tiny_model_dir):
    in_two_processes(PROGRAM.format(tests=str(TESTS), folder=str(tmp_path), model=str(tiny_model_dir)), tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(one["distinguisher"], two["distinguisher"])
    assert one["still"]
    assert two["still"]
    assert all(torch.equal(a, b) for a, b in zip(one["best"], two["best"], strict=True))
    assert one["metrics"] == two["metrics"]
    asked = {entry["distinguisher/pairs_tested"] for entry in one["metrics"] if "distinguisher/pairs_tested" in entry}
    assert max(one["tested"], two["tested"]) <= asked.pop() <= one["tested"] + two["tested"]
