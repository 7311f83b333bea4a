"""Several continuations of one text in one row have the values and the gradients they have alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_prefill import gpt2, llama, qwen, windowed
from trl.trainer.utils import add_fused_lm_head

from hf_imitate.side_by_side import lay_side_by_side, reads_side_by_side, rows_side_by_side, sharing_pays
from hf_imitate.trainers.questions_read_once import QuestionsReadOnce

BEFORE = [[0, 1, 2, 0, 1], [2, 2], [0, 1, 2, 0, 1], [0, 1, 2, 0, 1], [2, 2], [1]]
AFTER = [[1, 1, 0], [0], [2], [0, 1, 2, 2], [1, 2], [2, 0]]


def eager():
    model = qwen()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("make", [qwen, llama, gpt2, eager])
def test_states_are_those_of_each_continuation_alone(make):
    model = make()
    rows = rows_side_by_side(BEFORE, AFTER, width=16, most=8)
    laid, order = lay_side_by_side(rows, BEFORE, AFTER, 3, "cpu")
    assert sorted(order) == list(range(6))
    assert len(rows) == 3
    with torch.no_grad():
        states = laid.of_continuations(model.base_model(**laid.inputs(model)).last_hidden_state)
        for number, i in enumerate(order):
            alone = model.base_model(torch.tensor([BEFORE[i] + AFTER[i]])).last_hidden_state[0, len(BEFORE[i]) :]
            torch.testing.assert_close(states[number, : len(AFTER[i])], alone, atol=1e-5, rtol=0)


def test_a_row_ends_where_another_would_cost_less():
    """Width 1: n tokens cost n + n^2 / 6. A fifth answer would add 2 + 5/6; a row of its own costs 2 + 2/3."""
    before, after = [[0]] * 6, [[1]] * 6
    assert [len(row) for row in rows_side_by_side(before, after, width=1, most=8)] == [4, 2]
    assert [len(row) for row in rows_side_by_side(before, after, width=1000, most=8)] == [6]
    assert [len(row) for row in rows_side_by_side(before, after, width=1000, most=4)] == [4, 2]


def test_sharing_pays_where_questions_repeat_and_are_not_short():
    assert sharing_pays([[0] * 10] * 4, [[1]] * 4)
    assert not sharing_pays([[n] * 10 for n in range(4)], [[1]] * 4)
    assert not sharing_pays([[0]] * 4, [[1] * 10] * 4)


def test_a_model_that_forgets_reads_each_answer_alone():
    assert reads_side_by_side(qwen())
    assert not reads_side_by_side(windowed())


def batch():
    """Two questions with three answers each, as TRL lays them: padded in front and at the end; one answer is empty."""
    asked, answers = [[0, 1, 2, 0, 1, 1], [2, 2, 1, 0]], [[1, 1, 0], [2], [0, 1], [2, 2, 1], [0], []]
    ids, mask = torch.full((6, 9), 3), torch.zeros(6, 9, dtype=torch.long)
    labels = torch.full((6, 9), -100)
    for row, answer in enumerate(answers):
        question = asked[row // 3]
        start = 6 - len(question)
        ids[row, start : 6 + len(answer)] = torch.tensor(question + answer)
        mask[row, start : 6 + len(answer)] = 1
        labels[row, 6 : 6 + len(answer)] = torch.tensor(answer, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_trls_log_probs_entropies_and_gradients_stay_where_questions_are_read_once(is_checkpointed):
    causal_lm = qwen()
    add_fused_lm_head(causal_lm, outputs=("log_probs", "entropy"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(causal_lm, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if is_checkpointed:
        causal_lm.train().gradient_checkpointing_enable({"use_reentrant": False})
        causal_lm.enable_input_require_grads()
    shapes, found = [], []
    causal_lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    weights = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    for one in (model, QuestionsReadOnce(model, causal_lm, 3)):
        outputs = one(**batch(), fused_lm_head=True)
        # An answer's scores stand where TRL reads them; what it writes elsewhere, it masks.
        is_answer = batch()["labels"][:, 1:] != -100
        values = [torch.where(is_answer, getattr(outputs, name), 0.0) for name in ("log_probs", "entropy")]
        model.zero_grad()
        (weights * values[0]).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([value.detach() for value in values] + gradients)
    for plain, shared in zip(*found, strict=True):
        torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-4)
    assert shapes[0] == (6, 9)
    assert shapes[-1][0] == 2


def test_a_model_asked_for_more_than_text_is_asked_as_it_is():
    seen = []
    asking = QuestionsReadOnce(lambda **inputs: seen.append(inputs), qwen(), 3)
    asking(**batch(), fused_lm_head=True, pixel_values=torch.zeros(1))
    assert seen[0]["input_ids"].shape == (6, 9)
