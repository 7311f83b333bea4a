import contextlib
import copy
import itertools
import math

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from hf_imitate import scoring, side_by_side
from hf_imitate.log_probs import answer_log_probs
from hf_imitate.rendering import Rendered, collate
from hf_imitate.scoring import answer_logits, evaluation_mode, score_answers

PAD, END, VOCAB = 0, 1, 7


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():  # uneven laws: a flat one would hide which tokens are scored
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def rows(model):
    torch.manual_seed(1)

    def ids(length):
        return torch.randint(12, model.config.vocab_size, (length,)).tolist()

    lengths = [(3, 4), (9, 1), (1, 12), (5, 0), (2, 2), (30, 3), (4, 4)]
    return [Rendered(ids(prompt), [*ids(answer), END], True) for prompt, answer in lengths] + [
        Rendered(ids(4), ids(6), False),
        Rendered(ids(2), [], False),
    ]


def one_by_one(model, rows, temperature=1.0):
    """The same numbers by one unpadded forward per row, over all logits."""
    log_p = []
    for row in rows:
        batch = collate([row], PAD)
        with torch.no_grad():
            logits = model(batch.input_ids).logits[:, -batch.input_ids.shape[1] :]
        log_p.append(answer_log_probs(logits / temperature, batch.input_ids, batch.answer_mask))
    return torch.cat(log_p).double()


def tiny_gemma2():
    """A model whose logits are capped after the head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        final_logit_softcapping=0.5,
        initializer_range=1.0,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    return Gemma2ForCausalLM(config).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=END,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_match_one_forward_per_answer_over_all_logits(model, rows, batch_size, temperature):
    scores = score_answers(model, rows, PAD, batch_size=batch_size, temperature=temperature)

    torch.testing.assert_close(scores, one_by_one(model, rows, temperature), atol=1e-4, rtol=0)
    assert scores.dtype == torch.float64
    assert scores[:-1].max() < -1
    assert scores[-1] == 0


@pytest.mark.parametrize("make", [tiny_gemma2, tiny_gpt2], ids=["capped logits", "absolute positions"])
def test_all_answers_share_probability_one(make):
    """Every answer of up to 3 tokens: ended at its end token, or cut at the limit."""
    contents = [token for token in range(VOCAB) if token != END]
    rows = [Rendered([3, 4, 5], [*a, END], True) for n in range(3) for a in itertools.product(contents, repeat=n)]
    rows += [Rendered([3, 4, 5], list(a), False) for a in itertools.product(contents, repeat=3)]
    model = make()

    scores = score_answers(model, rows, PAD)

    assert scores.exp().sum().item() == pytest.approx(1, abs=1e-6)
    some = [*range(0, len(rows), 29)]
    torch.testing.assert_close(scores[some], one_by_one(model, [rows[i] for i in some]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=["lora with head", "prompt tuning"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_the_active_adapter_is_scored(model, rows, adapter):
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), adapter).eval()

    scores = score_answers(adapted, rows, PAD)

    torch.testing.assert_close(scores, one_by_one(adapted, rows), atol=1e-4, rtol=0)
    assert (scores - score_answers(model, rows, PAD))[:-1].abs().max() > 0.1


def test_a_model_that_hides_its_head_is_scored_over_all_logits(model, rows, monkeypatch):
    expected = score_answers(model, rows, PAD)

    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)

    torch.testing.assert_close(score_answers(model, rows, PAD), expected, atol=1e-4, rtol=0)


def test_the_head_reads_only_what_predicts_an_answer(model, rows):
    read = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, __: read.append(args[0].shape[1]))

    score_answers(model, rows, PAD, batch_size=4)

    handle.remove()
    assert sum(read) == sum(len(row.answer_ids) for row in rows)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_long_answers_are_split_into_smaller_batches(model, rows, monkeypatch):
    expected = score_answers(model, rows, PAD)
    sizes = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )

    monkeypatch.setattr(scoring, "MAX_LOGITS", 8 * model.config.vocab_size)
    scores = score_answers(model, rows, PAD)

    handle.remove()
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    assert len(sizes) > 3
    assert sum(sizes) == len(rows)


def test_the_pad_id_does_not_matter(model, rows):
    torch.testing.assert_close(score_answers(model, rows, PAD), score_answers(model, rows, END), atol=1e-5, rtol=0)


def test_a_colder_law_is_sharper(model, rows):
    warm, cold = (score_answers(model, rows, PAD, temperature=t) for t in (1.0, 1e-3))

    # The random rows follow no mode of the law, so a cold law all but excludes them.
    assert (cold[:-1] < 10 * warm[:-1]).all()


def test_scoring_keeps_no_graph_and_restores_every_mode(model, rows):
    mixed = copy.deepcopy(model).train()
    mixed.model.layers[0].eval()
    modes = [module.training for module in mixed.modules()]

    scores = score_answers(mixed, rows, PAD)

    assert not scores.requires_grad
    assert [module.training for module in mixed.modules()] == modes


def test_dropout_is_off_while_scoring_and_on_again_after_an_error():
    dropout = nn.Dropout(0.5)

    with contextlib.suppress(KeyError), evaluation_mode(dropout):
        assert torch.equal(dropout(torch.ones(9)), torch.ones(9))
        raise KeyError

    assert dropout.training


def test_no_answers_have_no_scores(model):
    assert score_answers(model, [], PAD).shape == (0,)


def test_a_question_without_tokens_is_named_by_its_number(model):
    rows = [Rendered([3], [END], True), Rendered([], [END], True)]
    with pytest.raises(ValueError, match="1 of 2 questions have no tokens, the first is number 1"):
        score_answers(model, rows, PAD)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_out_of_range_is_named(model, rows, temperature):
    with pytest.raises(ValueError, match=f"`temperature` is {temperature}"):
        score_answers(model, rows, PAD, temperature=temperature)


def test_a_batch_size_out_of_range_is_named(model, rows):
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        score_answers(model, rows, PAD, batch_size=0)


def answers_to_shared_questions(vocab_size, lengths=((20, 6), (17, 3), (15, 9)), num_answers=5):
    """Several answers, of uneven length, to each of several questions, in mixed order; and one question on its own."""
    generator = torch.Generator().manual_seed(2)

    def ids(length):
        return torch.randint(2, vocab_size, (length,), generator=generator).tolist()

    rows = []
    for prompt_length, longest in lengths:
        prompt = ids(prompt_length)
        answers = [ids(longest * n // num_answers) for n in range(1, num_answers + 1)]
        rows += [
            Rendered(prompt, [*answer, END] if n % 2 else answer, bool(n % 2)) for n, answer in enumerate(answers)
        ]
    rows += [Rendered(ids(18), [*ids(4), END], True), Rendered(rows[0].prompt_ids, [], False)]
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)]


def tokens_read(model, rows, **settings):
    """Scores, and how many ids each forward was given."""
    read = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scores = score_answers(model, rows, PAD, **settings)
    handle.remove()
    return scores, read


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_answers_that_share_a_question_score_as_if_alone(model, batch_size, temperature):
    rows = answers_to_shared_questions(model.config.vocab_size)

    scores, read = tokens_read(model, rows, batch_size=batch_size, temperature=temperature)

    torch.testing.assert_close(scores, one_by_one(model, rows, temperature), atol=1e-4, rtol=0)
    plain = sum(len(row.prompt_ids) + len(row.answer_ids) for row in rows)
    assert sum(batch * length for batch, length in read) < (0.75 * plain if batch_size > 2 else plain)
    assert max(batch for batch, _ in read) <= max(batch_size, 1)


def test_a_shared_question_is_read_once_however_many_answers_it_has(model):
    rows = answers_to_shared_questions(model.config.vocab_size, [(40, 5)], num_answers=9)[:-1]
    rows = [row for row in rows if len(row.prompt_ids) == 40 and row.answer_ids]

    _, read = tokens_read(model, rows)

    # The question's last token goes with each answer, whose last token predicts none.
    assert read == [(1, 39 + sum(len(row.answer_ids) for row in rows))]


def test_no_more_answers_are_read_together_than_fit_a_batch(model):
    rows = answers_to_shared_questions(model.config.vocab_size, [(40, 2)] * 7, num_answers=2)

    scores, read = tokens_read(model, rows, batch_size=4)

    torch.testing.assert_close(scores, one_by_one(model, rows), atol=1e-4, rtol=0)
    assert sum(batch for batch, length in read if length > 40) == 7
    assert max(batch for batch, length in read if length > 40) == 2


def test_answers_that_would_make_a_row_too_long_get_another(model, monkeypatch):
    rows = answers_to_shared_questions(model.config.vocab_size)
    expected, _ = tokens_read(model, rows)

    monkeypatch.setattr(side_by_side, "MAX_ROW", 44)
    scores, read = tokens_read(model, rows)

    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    assert max(length for _, length in read) <= 44


def test_shared_questions_stay_within_the_models_positions():
    """A row is longer than the last of 32 positions, which no answer reaches."""
    model = tiny_gpt2()
    rows = answers_to_shared_questions(VOCAB, [(27, 3), (21, 11)])

    scores, read = tokens_read(model, rows)

    torch.testing.assert_close(scores, one_by_one(model, rows), atol=2e-5, rtol=0)
    assert any(length > 32 for _, length in read)


def tiny_mamba():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=END)
    return MambaForCausalLM(config).eval()


def tiny_recurrent_gemma():
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        lru_width=16,
        attention_window_size=4,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    return RecurrentGemmaForCausalLM(config).eval()


def tiny_mpt():
    torch.manual_seed(0)
    return MptForCausalLM(MptConfig(vocab_size=VOCAB, d_model=16, n_heads=2, n_layers=2, max_seq_len=64)).eval()


@pytest.mark.parametrize(
    "make",
    [tiny_gemma2, tiny_mamba, tiny_recurrent_gemma, tiny_mpt],
    ids=["sliding window", "recurrent state", "both", "distances counted over padding"],
)
def test_a_model_without_a_standard_cache_reads_whole_rows(make):
    model, rows = make(), answers_to_shared_questions(VOCAB)

    scores, read = tokens_read(model, rows)

    torch.testing.assert_close(scores, one_by_one(model, rows), atol=1e-4, rtol=0)
    # The last token of an answer predicts none.
    assert read == [(len(rows), max(len(row.prompt_ids) + len(row.answer_ids) for row in rows) - 1)]


def test_flash_attention_reads_whole_rows(model):
    rows = answers_to_shared_questions(model.config.vocab_size)
    reader = scoring._Reader(model, rows, PAD, 64)
    assert reader.can_share

    other = copy.deepcopy(model)
    other.config._attn_implementation_internal = "flash_attention_2"

    assert not scoring._Reader(other, rows, PAD, 64).can_share


def test_a_short_question_is_read_with_each_answer(model):
    rows = answers_to_shared_questions(model.config.vocab_size, [(3, 30)])

    _, read = tokens_read(model, rows)

    assert len(read) == 1


@pytest.mark.parametrize(
    ("adapter", "is_shared"),
    [
        (LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"), True),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), False),
    ],
    ids=["lora", "prompt tuning"],
)
def test_the_active_adapter_is_scored_with_shared_questions(model, adapter, is_shared):
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), adapter).eval()
    rows = answers_to_shared_questions(model.config.vocab_size)

    scores, read = tokens_read(adapted, rows)

    torch.testing.assert_close(scores, one_by_one(adapted, rows), atol=1e-4, rtol=0)
    assert (len(read) > 1) is is_shared
    assert (scores - score_answers(model, rows, PAD)).abs().max() > 0.1


def test_answer_logits_are_at_every_token_of_every_answer_once(model):
    rows = answers_to_shared_questions(model.config.vocab_size)
    found, seen = {}, []

    for batch in answer_logits(model, rows, PAD, batch_size=4):
        seen += batch.indices
        for row, position, token, logits in zip(*batch[1:], strict=True):
            assert rows[row].answer_ids[position] == token
            assert (row.item(), position.item()) not in found
            found[row.item(), position.item()] = logits

    assert sorted(seen) == list(range(len(rows)))
    assert len(found) == sum(len(row.answer_ids) for row in rows)
    for (row, position), logits in list(found.items())[::7]:
        with torch.no_grad():
            expected = model(torch.tensor([[*rows[row].prompt_ids, *rows[row].answer_ids[:position]]])).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
