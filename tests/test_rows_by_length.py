"""A padded batch read in parts says what it says when it is read at once."""

import math

import pytest
import torch
from test_prefill import gpt2, qwen
from trl.trainer.utils import add_fused_lm_head

from hf_imitate.trainers.rows_by_length import RowsByLength

LENGTHS = [3, 12, 4, 11, 2, 12, 3]


def batch(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 3, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = torch.where(mask.bool() & (torch.arange(max(lengths)) > 0), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


class Shapes:
    """A model, and how much it was given to read."""

    def __init__(self, model):
        self.model, self.read = model, []

    def __call__(self, **inputs):
        self.read.append(tuple(inputs["input_ids"].shape))
        return self.model(**inputs)


@pytest.mark.parametrize("make", [qwen, gpt2])
def test_values_and_gradients_are_those_of_one_forward(make):
    model = make()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    shapes, gradients = Shapes(model), []
    parts = RowsByLength(shapes, per_forward=4.0)(**batch(), fused_lm_head=True)
    whole = model(**batch(), fused_lm_head=True)

    assert shapes.read == [(4, 4), (3, 12)]
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-5, rtol=0)
    for outputs in (parts, whole):
        model.zero_grad()
        outputs.log_probs.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"position_ids": torch.arange(12).expand(7, 12)}, {"attention_mask": batch()["attention_mask"].flip(1)}],
    ids=["a forward is dear", "more than text", "padding in front"],
)
def test_else_it_is_the_model_itself(changes):
    model = qwen()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    shapes = Shapes(model)
    RowsByLength(shapes, 4.0 if changes else math.inf)(**batch() | changes, fused_lm_head=True)
    assert shapes.read == [(7, 12)]
