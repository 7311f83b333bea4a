"""What is held at once: never the scores of a batch's every token, and one base for everybody who reads or writes."""

import pytest
import torch
from datasets import Dataset
from tiny_runs import lora, make, rows, train
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_imitate import (
    Imitator,
    LatentRetrodictiveConfig,
    LatentRetrodictiveTrainer,
    RetrodictiveConfig,
    RetrodictiveTrainer,
    audit,
    scoring,
    sparing_head,
)
from hf_imitate.rendering import Answer
from hf_imitate.replay import Entry, ReplayBuffer

VOCABULARY = 150_000
ANSWER = "a long answer, as answers go"
QUIET = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none"}
QUIET |= {"disable_tqdm": True, "use_cpu": True}


class Largest(TorchDispatchMode):
    """The most rows of scores over the vocabulary that a tensor made inside holds."""

    def __init__(self):
        super().__init__()
        self.rows = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                # Of its memory: an expanded view holds none of its own.
                self.rows = max(self.rows, tensor.untyped_storage().nbytes() / (4 * VOCABULARY))
        return output


@pytest.fixture
def large(tiny_model_dir):
    """The tiny model with 150 000 words; its tokenizer has 300."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return model, AutoTokenizer.from_pretrained(tiny_model_dir)


def data(number=4):
    return Dataset.from_dict({"prompt": [f"Item {i}:" for i in range(number)], "completion": [ANSWER] * number})


def rows_held(trainer):
    with Largest() as seen:
        train(trainer)
    # Its width is 32, so a weight of the vocabulary's own, or its gradient, is 32 rows.
    assert seen.rows >= 32
    return seen.rows


def tokens_in(tokenizer, number):
    return number * len(tokenizer("Item 1:" + ANSWER)["input_ids"])


def test_an_adversarial_step_holds_no_scores_of_every_token(large, tmp_path, monkeypatch):
    model, tokenizer = large
    monkeypatch.setattr(sparing_head, "MAX_SCORES", 8 * VOCABULARY)
    changes = {"retrodictive_coef": 1.0, "max_completion_length": 8, "num_generations": 2, "max_steps": 1}
    changes |= {"per_device_train_batch_size": 4, "use_cpu": True}
    trainer = make(tmp_path, model, rows(16, (ANSWER,)), arguments={"processing_class": tokenizer}, **changes)
    assert rows_held(trainer) < 0.6 * tokens_in(tokenizer, 4)


def test_a_likelihood_step_holds_no_scores_of_every_token(large, tmp_path):
    model, tokenizer = large
    args = RetrodictiveConfig(str(tmp_path), **QUIET)
    trainer = RetrodictiveTrainer(model, args, data(), processing_class=tokenizer, peft_config=lora())
    assert rows_held(trainer) < 0.6 * tokens_in(tokenizer, 2)


def test_a_latent_step_holds_no_scores_of_every_token(large, tmp_path, monkeypatch):
    model, tokenizer = large
    monkeypatch.setattr(sparing_head, "MAX_SCORES", 8 * VOCABULARY)
    more = {"num_thoughts": 2, "max_thought_length": 2, "retrodictor_warmup_steps": 0}
    args = LatentRetrodictiveConfig(str(tmp_path), **QUIET, **more)
    trainer = LatentRetrodictiveTrainer(model, args, data(), processing_class=tokenizer, peft_config=lora())
    assert rows_held(trainer) < 0.6 * tokens_in(tokenizer, 4)


@pytest.mark.parametrize(
    "questions", [[f"Item {i}:" for i in range(6)], ["What is said of this item, and why? " * 2] * 6]
)
def test_scores_hold_a_bounded_number_of_scores(large, monkeypatch, questions):
    """Also where a question is read once for several answers."""
    model, tokenizer = large
    length = len(tokenizer(ANSWER)["input_ids"]) + 1
    monkeypatch.setattr(scoring, "MAX_LOGITS", 2 * length * VOCABULARY)  # two answers at once
    imitator = Imitator(model, tokenizer, max_new_tokens=4)
    with Largest() as seen:
        imitator.log_prob(questions, [ANSWER] * 6)
    assert length < seen.rows <= 2 * length


def test_an_audit_holds_a_bounded_number_of_scores(large, monkeypatch):
    model, tokenizer = large
    length = len(tokenizer(ANSWER)["input_ids"]) + 1
    monkeypatch.setattr(scoring, "MAX_LOGITS", 2 * length * VOCABULARY)  # two answers at once
    imitator = Imitator(model, tokenizer, max_new_tokens=2)
    with Largest() as seen:
        audit(imitator, data(32), judges=["surface"], output_dir=None, progress=False)
    # Draws hold the scores of the last token alone, in fp64, of 64 answers at once.
    assert 2 * length < seen.rows <= 2 * 64 < 0.15 * tokens_in(tokenizer, 32)


def parameters(*models):
    """Numbers of weights that lie in different places."""
    found = {p.untyped_storage().data_ptr(): p.numel() for model in models for p in model.parameters()}
    return sum(found.values())


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_imitator_distinguisher_and_reference_share_one_base(tiny_model_dir, tmp_path, beta):
    """A reference is the base without its adapters."""
    trainer = make(tmp_path, tiny_model_dir, beta=beta)
    base = parameters(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    adapters = sum(p.numel() for name, p in trainer.model.named_parameters() if "lora_" in name)
    everything = parameters(trainer.model, trainer.distinguisher.model, trainer.distinguisher.head)
    assert trainer.ref_model is None
    assert everything == base + adapters + trainer.distinguisher.head.weight.numel()


def test_imitator_and_retrodictor_share_one_base(tiny_model_dir, tmp_path):
    args = LatentRetrodictiveConfig(str(tmp_path), **QUIET)
    trainer = LatentRetrodictiveTrainer(str(tiny_model_dir), args, data(), peft_config=lora())
    base = parameters(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    adapters = sum(p.numel() for name, p in trainer.model.named_parameters() if "lora_" in name)
    assert parameters(trainer.model, trainer.retrodictor.model) == base + adapters


def test_replay_keeps_a_fixed_number_of_answers():
    replay = ReplayBuffer(capacity=3)
    for row in range(10):
        replay.add(Entry(row, Answer(f"answer {row}", True)))
    assert [entry.row for entry in replay.entries] == [7, 8, 9]
    assert ReplayBuffer().entries.maxlen == 2048
