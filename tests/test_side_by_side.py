"""Several continuations of one text in one row have the values and the gradients they have alone."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_prefill import ENDS, SHAPE, gpt2, llama, qwen, seeded, windowed
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RobertaConfig,
    RobertaForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

import hf_imitate.side_by_side
from hf_imitate.rendering import Rendered
from hf_imitate.side_by_side import (
    lay_side_by_side,
    reads_side_by_side,
    rows_side_by_side,
    sharing_pays,
    side_by_side,
    without_padding,
)
from hf_imitate.sparing_head import SparingHead
from hf_imitate.trainers.questions_read_once import QuestionsReadOnce, causal_lm_of

BEFORE = [[0, 1, 2, 0, 1], [2, 2], [0, 1, 2, 0, 1], [0, 1, 2, 0, 1], [2, 2], [1]]
AFTER = [[1, 1, 0], [0], [2], [0, 1, 2, 2], [1, 2], [2, 0]]


def eager():
    model = qwen()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("make", [qwen, llama, gpt2, eager])
@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_states_are_those_of_each_continuation_alone(make, num_rows):
    model = make()
    rows = rows_side_by_side(BEFORE, AFTER, width=16, most=8)
    assert len(rows) == 3
    # Rows of several texts, too: none sees another's.
    rows = {1: [rows[0] + rows[1] + rows[2]], 2: [rows[0], rows[1] + rows[2]], 3: rows}[num_rows]
    laid, order = lay_side_by_side(rows, BEFORE, AFTER, 3, "cpu")
    assert sorted(order) == list(range(6))
    assert len(laid.input_ids) == num_rows
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


def test_rows_are_filled_up_where_padding_costs_more_than_length():
    rows, lengths = [[0], [1], [2, 3], [4]], [6, 3, 3, 2]
    # Six tokens a row hold all in three rows, seven or eight in two; a row of 14 would cost more by its square.
    assert without_padding(rows, lengths, width=1000) == [[0, 1, 2, 3, 4]]
    assert sorted(map(sorted, without_padding(rows, lengths, width=2))) == [[0], [1, 2, 3], [4]]
    assert without_padding(rows, [5, 5, 5, 5], width=1) == rows


def test_no_row_is_filled_up_beyond_the_longest_mask(monkeypatch):
    monkeypatch.setattr(hf_imitate.side_by_side, "MAX_ROW", 8)
    rows, lengths = [[0], [1], [2, 3], [4]], [6, 3, 3, 2]
    assert sorted(map(sorted, without_padding(rows, lengths, width=1000))) == [[0], [1, 2, 3], [4]]
    assert without_padding(rows[:2], [20, 19], width=1000) == [[0], [1]]


def test_texts_of_different_lengths_are_read_without_padding_on_a_cpu():
    before, after = [[0] * 9, [1], [2] * 2, [0]], [[1], [2, 1], [0], [1, 1]]
    assert not sharing_pays(before, after)
    laid, order = side_by_side(qwen(), before, after, pad_token_id=3)
    assert sorted(order) == [0, 1, 2, 3]
    assert laid.input_ids.shape == (2, 10)
    assert side_by_side(windowed(), before, after, pad_token_id=3) is None
    assert side_by_side(qwen(), [[0], [1]], [[1], [2]], pad_token_id=3) is None


@pytest.mark.parametrize("last", [[0, 3], []])
def test_a_sum_of_log_probs_is_that_of_each_answer_alone(last):
    """Rows come back in their order; an answer that was cut before its first token is certain."""
    model = qwen()
    head = SparingHead.of(model)
    rows = [
        Rendered([1], [2], False),
        Rendered([2, 2], [0, 1, 1, 3], True),
        Rendered([0, 1, 2, 0, 1, 2], [1, 3], True),
        Rendered([1], last, bool(last)),
    ]
    laid = head._laid(rows, 3)
    order = [0, 1, 2, 3] if laid is None else laid[1]
    # To sort and to unsort differ.
    assert laid is None if not last else [order[i] for i in order] != [0, 1, 2, 3]
    with torch.no_grad():
        together = head.answer_log_probs(model, rows, 3)
        alone = torch.cat([head.answer_log_probs(model, [row], 3) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_sharing_pays_where_questions_repeat_and_are_not_short():
    assert sharing_pays([[0] * 10] * 4, [[1]] * 4)
    assert not sharing_pays([[n] * 10 for n in range(4)], [[1]] * 4)
    assert not sharing_pays([[0]] * 4, [[1] * 10] * 4)


def test_a_model_that_forgets_reads_each_answer_alone():
    assert reads_side_by_side(qwen())
    assert not reads_side_by_side(windowed())


def bidirectional():
    model = qwen()
    model.config.is_causal = False
    return model


def mixture(is_balanced):
    config = MixtralConfig(**SHAPE, num_key_value_heads=1, num_local_experts=2, output_router_logits=is_balanced)
    return seeded(MixtralForCausalLM, config)


OTHERS = {
    "positions counted from the padding's id": lambda: seeded(
        RobertaForCausalLM, RobertaConfig(**SHAPE, is_decoder=True)
    ),
    "ALiBi": lambda: seeded(FalconForCausalLM, FalconConfig(**SHAPE, alibi=True)),
    "no cache": lambda: seeded(OpenAIGPTLMHeadModel, OpenAIGPTConfig(n_embd=16, n_layer=2, n_head=2, **ENDS)),
    "an encoder": lambda: seeded(BertForSequenceClassification, BertConfig(**SHAPE)),
    "made bidirectional": bidirectional,
    "experts balanced by the mask": lambda: mixture(True),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_see_or_count_otherwise_read_each_text_alone(kind):
    """RoBERTa's states were silently another text's, ALiBi's and the others' an error."""
    model = OTHERS[kind]()
    before, after = [[0, 1, 2, 0, 1, 2, 1], [1]], [[1, 2], [2]]
    assert side_by_side(model, before, after, 3) is None
    assert not reads_side_by_side(model.base_model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: seeded(FalconForCausalLM, FalconConfig(**SHAPE)),
        lambda: seeded(GPTNeoXForCausalLM, GPTNeoXConfig(**SHAPE)),
        lambda: mixture(False),
        lambda: LlamaForSequenceClassification(llama().config),
    ],
)
def test_their_relatives_are_read_side_by_side(make):
    assert reads_side_by_side(make())


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
    assert shapes[-1].numel() == 18  # 5 and 3 of the questions, 6 and 4 of the answers


@pytest.mark.parametrize("least", [0.0, 1.0])
def test_positions_are_counted_from_a_questions_start_however_it_is_read(least, monkeypatch):
    """TRL gives none, so GPT-2 would count the padding before a question, as it does not while it draws."""
    monkeypatch.setattr(hf_imitate.side_by_side, "MIN_SPARED", least)  # all of it, or none, side by side
    model = gpt2()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    given = batch()
    found = QuestionsReadOnce(model, model, 3)(**given, fused_lm_head=True).log_probs
    for row, (ids, mask, labels) in enumerate(zip(*given.values(), strict=True)):
        plain = model(input_ids=ids[mask == 1][None], labels=labels[mask == 1][None], fused_lm_head=True).log_probs
        is_answer = labels[1:] != -100
        torch.testing.assert_close(found[row, is_answer], plain[0, plain[0] != 0], atol=1e-5, rtol=0)


def rows_of_likelihood():
    """As TRL lays rows of likelihood: padded at the end, questions of different lengths in front of the answers."""
    asked, answers = [[0, 1, 2, 0, 1, 1], [2], [1, 0]], [[1, 1, 0], [2, 3], [0, 1]]
    ids, mask, labels = torch.full((3, 9), 3), torch.zeros(3, 9, dtype=torch.long), torch.full((3, 9), -100)
    for row, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        stop = len(question) + len(answer)
        ids[row, :stop] = torch.tensor(question + answer)
        mask[row, :stop] = 1
        labels[row, len(question) : stop] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def test_rows_of_likelihood_are_read_without_padding_and_scored_on_their_answers_alone():
    causal_lm, read, scored = qwen(), [], []
    names = ("log_probs", "entropy", "is_top1", "label_mask")
    add_fused_lm_head(causal_lm, outputs=names[:3])
    plain = causal_lm(**rows_of_likelihood(), fused_lm_head=True)
    causal_lm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    # Hooks run in order: this one, which is there first, sees the states before they are narrowed, the other after.
    once = QuestionsReadOnce(causal_lm, causal_lm, 3)
    once.model = lambda **inputs: scored.append(inputs["shift_labels"].numel()) or causal_lm(**inputs)
    outputs = once(**rows_of_likelihood(), fused_lm_head=True)
    for name in names:
        torch.testing.assert_close(getattr(outputs, name), getattr(plain, name), atol=1e-5, rtol=0)
    # 8 + 2 + 3 tokens predict something, of 27; 7 of them an answer's.
    assert read[-1] < 18
    assert scored == [7]


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[2]),
    ],
)
def test_what_an_adapter_puts_in_front_or_looks_for_is_seen_by_reading_each_row_anew(config):
    model = qwen()
    assert causal_lm_of(model) is model
    adapted = get_peft_model(model, config)
    assert causal_lm_of(adapted) is None
    assert SparingHead.of(adapted) is None


@pytest.mark.parametrize("row", [slice(0, 4), slice(4, 6)])
def test_what_is_not_a_question_and_then_its_answer_is_read_as_it_is(row):
    """A token that is read and not scored after one that is; an answer with nothing before it."""
    seen, given = [], rows_of_likelihood()
    given["labels"][0] = given["input_ids"][0] if row.start else -100
    given["labels"][0, row] = given["input_ids"][0, row]
    given["attention_mask"][0] = 1
    asking = QuestionsReadOnce(lambda **inputs: seen.append(inputs), qwen(), 3)
    asking(**given, fused_lm_head=True)
    assert seen[0]["input_ids"].shape == (3, 9)


def test_a_model_asked_for_more_than_text_is_asked_as_it_is():
    seen = []
    asking = QuestionsReadOnce(lambda **inputs: seen.append(inputs), qwen(), 3)
    asking(**batch(), fused_lm_head=True, pixel_values=torch.zeros(1))
    assert seen[0]["input_ids"].shape == (6, 9)
