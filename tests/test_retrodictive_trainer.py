"""The exact trainer: its loss is log p of whole answers, its bits are those of the law it trains."""

import inspect
import math

import pytest
import torch
from datasets import Dataset
from exact_runs import ANSWERS, END, make, nats_by_hand, run, sft
from launch import TESTS, in_two_processes
from tiny_runs import AtEveryStep, chat_rows, imitator_weights, load, logged, rows, train, weights
from transformers import AutoTokenizer, Trainer
from trl import SFTTrainer

from hf_imitate import RetrodictiveTrainer
from hf_imitate.trainers.atomic_saving import AtomicSaving
from hf_imitate.trainers.finite import FiniteSteps
from hf_imitate.trainers.imitator_saving import ImitatorSaving
from hf_imitate.trainers.retrodictive_saving import RetrodictiveSaving
from hf_imitate.trainers.retrodictive_trainer import Weighing

THREE_STEPS = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(str(tiny_model_dir))


# --- the loss


def test_the_loss_is_the_mean_over_answers_of_summed_nats_with_the_end_token(tmp_path, tiny_model_dir, tokenizer):
    dataset = rows(8, ANSWERS)
    nats = nats_by_hand(load(tiny_model_dir), tokenizer, dataset)
    (loss,) = logged(run(tmp_path, tiny_model_dir, dataset), "loss")
    assert loss == pytest.approx(sum(nats) / 8, rel=1e-6)
    without_ends = nats_by_hand(load(tiny_model_dir), tokenizer, dataset, ends=False)
    assert sum(nats) / 8 - sum(without_ends) / 8 > 3


def test_a_step_goes_down_the_gradient_of_that_mean(tmp_path, tiny_model_dir, tokenizer):
    trainer, model = run(tmp_path, tiny_model_dir), load(tiny_model_dir)
    total = torch.zeros(())
    for row in rows(8, ANSWERS):
        question = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([question + tokenizer(row["completion"])["input_ids"] + [END]])
        logits = model(input_ids=ids).logits[0, len(question) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, len(question) :], reduction="sum")
    (total / 8).backward()
    for name, after in imitator_weights(trainer).items():
        parameter = model.get_parameter(name)
        torch.testing.assert_close(after, parameter.data - 0.1 * parameter.grad, atol=1e-6, rtol=1e-5)


def test_token_reduction_is_trls_trainer_on_plain_text(tmp_path, tiny_model_dir):
    ours = run(tmp_path, tiny_model_dir, loss_reduction="token", **THREE_STEPS)
    theirs = sft(tmp_path, tiny_model_dir, rows(8, ANSWERS), **THREE_STEPS)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-5)
    for name, value in imitator_weights(theirs).items():
        torch.testing.assert_close(imitator_weights(ours)[name], value, atol=1e-6, rtol=0)
    assert logged(ours, "loss") != pytest.approx(logged(run(tmp_path, tiny_model_dir, **THREE_STEPS), "loss"), rel=0.5)


def test_token_reduction_is_trls_trainer_on_conversations_without_what_follows_the_end(tmp_path, tiny_chat_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_chat_model_dir))
    end, trimmed = tokenizer.eos_token_id, []
    for row in chat_rows(8):
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        question = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        start = len(question["input_ids"])
        stop = ids.index(end, start) + 1
        assert len(ids) > stop
        trimmed.append({"input_ids": ids[:stop], "labels": [-100] * start + ids[start:stop]})
    ours = run(tmp_path, tiny_chat_model_dir, chat_rows(8), loss_reduction="token", **THREE_STEPS)
    theirs = sft(tmp_path, tiny_chat_model_dir, Dataset.from_list(trimmed), **THREE_STEPS)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-5)
    untrimmed = sft(tmp_path, tiny_chat_model_dir, chat_rows(8), **THREE_STEPS)
    assert logged(ours, "loss") != pytest.approx(logged(untrimmed, "loss"), abs=1e-3)


@pytest.mark.parametrize("reduction", ["answer", "token"])
def test_how_a_step_is_cut_into_batches_changes_nothing(tmp_path, tiny_model_dir, reduction):
    weight = [1.0, 3.0, 0.5, 2.0, 1.0, 1.0, 0.25, 1.0]
    found = []
    for size, parts in ((8, 1), (4, 2), (1, 8)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        dataset = rows(8, ANSWERS, weight=weight)
        found.append(run(tmp_path, tiny_model_dir, dataset, loss_reduction=reduction, max_steps=2, **split))
    for other in found[1:]:
        assert logged(other, "loss") == pytest.approx(logged(found[0], "loss"), rel=1e-6)
        bits = "retrodiction/bits_per_answer"
        assert logged(other, bits) == pytest.approx(logged(found[0], bits), rel=1e-6)
        for name, value in imitator_weights(found[0]).items():
            torch.testing.assert_close(imitator_weights(other)[name], value, atol=1e-6, rtol=0)


def test_a_rows_weight_multiplies_its_term_under_the_mean_weight(tmp_path, tiny_model_dir, tokenizer):
    weight = [1.0, 3.0, 0.5, 2.0, 1.0, 1.0, 0.0, 1.5]
    dataset = rows(8, ANSWERS, weight=weight)
    nats = nats_by_hand(load(tiny_model_dir), tokenizer, dataset)
    trainer = run(tmp_path, tiny_model_dir, dataset, per_device_train_batch_size=7)
    expected = sum(w * n for w, n in zip(weight, nats, strict=True)) / sum(weight)
    assert logged(trainer, "loss") == [pytest.approx(expected, rel=1e-6)]
    assert logged(trainer, "retrodiction/bits_per_answer") == [pytest.approx(expected / math.log(2), rel=1e-6)]
    size = sum(w * len(row["completion"].encode()) for w, row in zip(weight, dataset, strict=True)) / sum(weight)
    assert logged(trainer, "retrodiction/bits_per_byte") == [pytest.approx(expected / size / math.log(2), rel=1e-6)]
    assert len(trainer.train_dataset) == 7


@pytest.mark.parametrize("adapter", [False, True])
def test_packed_answers_have_the_loss_and_the_bits_they_have_alone(tmp_path, tiny_model_dir, adapter):
    weight = {"weight": [1.0, 3.0, 0.5, 2.0, 1.0, 1.0, 0.25, 1.0]}
    plain = run(tmp_path, tiny_model_dir, rows(8, ANSWERS, **weight), adapter)
    packed = run(tmp_path, tiny_model_dir, rows(8, ANSWERS, **weight), adapter, packing=True, max_length=40)
    assert 1 < len(packed.train_dataset) < 8
    for name in ("loss", "retrodiction/bits_per_answer", "retrodiction/bits_per_byte"):
        assert logged(packed, name) == pytest.approx(logged(plain, name), rel=1e-5)
    for name, value in imitator_weights(plain).items():
        torch.testing.assert_close(imitator_weights(packed)[name], value, atol=1e-5, rtol=0)


def test_rows_in_one_line_without_padding_have_the_same_loss(tmp_path, tiny_model_dir):
    plain = run(tmp_path, tiny_model_dir, max_length=None)
    flat = run(tmp_path, tiny_model_dir, max_length=None, padding_free=True)
    assert logged(flat, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)


def test_trls_old_name_of_its_chunked_loss_is_the_same_loss(tmp_path, tiny_model_dir):
    with pytest.warns(FutureWarning, match="chunked_nll"):
        chunked = run(tmp_path, tiny_model_dir, loss_type="chunked_nll")
    assert logged(chunked, "loss") == logged(run(tmp_path, tiny_model_dir), "loss")


def test_log_p_of_a_bf16_model_is_summed_in_fp32(tmp_path, tiny_model_dir):
    """A sum in bf16 would be off by whole nats."""
    dataset = rows(2, ("abc de " * 40, "fgh " * 50))
    model = load(tiny_model_dir).to(torch.bfloat16)
    trainer = make(tmp_path, model, dataset, max_steps=1, per_device_train_batch_size=2)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    weighing = Weighing(trainer.model, batch["answer_weight"])
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        weighing(**plain, fused_lm_head=True)
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert (logits.dtype, weighing.log_p.dtype) == (torch.bfloat16, torch.float32)
    labels = batch["labels"][:, 1:]
    scores = {kind: logits[:, :-1].to(kind).log_softmax(dim=-1) for kind in (torch.float64, torch.bfloat16)}
    exact, coarse = (
        torch.where(labels != -100, s.gather(2, labels.clamp(min=0)[..., None])[..., 0].double(), 0.0).sum(dim=1)
        for s in scores.values()
    )
    torch.testing.assert_close(weighing.log_p.double().sum(dim=1), exact, atol=1e-2, rtol=0)
    assert (coarse - exact).abs().max() > 0.3


def test_prompt_tuning_scores_the_answer_and_not_its_own_tokens(tmp_path, tiny_model_dir):
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make(tmp_path, tiny_model_dir, arguments={"peft_config": config})
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 3:]
    log_p = logits[:, :-1].double().log_softmax(dim=-1)
    labels = batch["labels"][:, 1:]
    chosen = torch.where(labels != -100, log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0], 0.0)
    assert loss.item() == pytest.approx(-chosen.sum().item() / 8, rel=1e-5)


# --- two processes

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_retrodictive_trainer import found_by

trainer, found = found_by(Path({folder!r}), Path({model!r}), 2)
torch.save(found, Path({folder!r}) / f"rank{{trainer.accelerator.process_index}}.pt")
"""


def spread():
    """Eight rows of very different lengths and weights: no two processes have the same share."""
    return rows(8, ("a", "bcd efg hij klm", "no", "p q r"), weight=[1.0, 3.0, 0.5, 2.0, 1.0, 1.0, 0.25, 1.0])


def found_by(folder, model, per_device):
    """What one process and two are compared by; nine rows of evaluation do not come out even."""
    steps = {"max_steps": 2, "per_device_train_batch_size": per_device, "gradient_accumulation_steps": 2}
    arguments = {"eval_dataset": rows(9, ANSWERS)}
    seen = []
    trainer = make(folder, model, spread(), arguments=arguments, **steps, per_device_eval_batch_size=2)
    trainer.add_callback(AtEveryStep(after=lambda: seen.append(weights(trainer.model.named_parameters()))))
    train(trainer)
    names = ("loss", "retrodiction/bits_per_answer", "retrodiction/bits_per_byte")
    metrics = trainer.evaluate()
    bits = {name: value for name, value in metrics.items() if "bits" in name}
    return trainer, {"weights": seen, "logged": [logged(trainer, name) for name in names], "bits": bits}


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, tiny_model_dir):
    in_two_processes(PROGRAM.format(tests=str(TESTS), folder=str(tmp_path), model=str(tiny_model_dir)), tmp_path)
    _, one = found_by(tmp_path, tiny_model_dir, 4)
    for rank in (0, 1):
        two = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert two["logged"] == [pytest.approx(values, rel=1e-5) for values in one["logged"]]
        assert two["bits"] == pytest.approx(one["bits"], rel=1e-5)
        for ours, theirs in zip(two["weights"], one["weights"], strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(ours[name.removeprefix("module.")], value, atol=1e-6, rtol=0)


# --- what we lean on in TRL and transformers

OVERRIDES = {
    "_prepare_dataset": SFTTrainer,
    "_set_signature_columns_if_needed": SFTTrainer,
    "compute_loss": SFTTrainer,
    "log": SFTTrainer,
    "create_model_card": SFTTrainer,
    "_get_num_items_in_batch": Trainer,
    "_load_best_model": Trainer,
    "_load_from_checkpoint": Trainer,
    "_load_rng_state": Trainer,
    "_load_optimizer_and_scheduler": Trainer,
    "_save_optimizer_and_scheduler": Trainer,
    "_save_checkpoint": SFTTrainer,
    "_get_output_dir": Trainer,
    "_push_from_checkpoint": Trainer,
    "train": Trainer,
    "_get_grad_norm": Trainer,
    "save_model": Trainer,
    "push_to_hub": Trainer,
    "init_hf_repo": Trainer,
    "get_batch_samples": Trainer,
}


def test_an_override_has_the_signature_of_what_it_overrides_and_is_on_the_list():
    own = {}
    for kind in (FiniteSteps, AtomicSaving, ImitatorSaving, RetrodictiveSaving, RetrodictiveTrainer):
        own |= {name: value for name, value in vars(kind).items() if inspect.isfunction(value)}
    assert {name for name in own if hasattr(SFTTrainer, name) and name != "__init__"} == set(OVERRIDES)
    for name, kind in OVERRIDES.items():
        ours, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
            for function in (own[name], getattr(kind, name))
        )
        assert ours == theirs, name


def test_the_constructors_arguments_are_trls():
    theirs, ours = (list(inspect.signature(kind).parameters) for kind in (SFTTrainer, RetrodictiveTrainer))
    assert [name for name in theirs if name in ours] == ours


def test_an_imitator_without_settings_gets_a_folder_of_its_own_name(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = RetrodictiveTrainer(str(tiny_model_dir), train_dataset=rows(8, ANSWERS))
    assert trainer.args.output_dir == f"{tiny_model_dir.name}-imitator"
