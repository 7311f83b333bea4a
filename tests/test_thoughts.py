"""The law of a thought: it sums to one, it can be read back, and it never touches the vocabulary."""

import itertools

import pytest
import torch
from transformers import AutoTokenizer

from hf_imitate.thoughts import (
    CONTENT,
    FREE,
    ThoughtLaw,
    hindsight_ids,
    settle_thought_law,
    thought_ids,
)


def law_of_eight(delimiter: tuple[int, ...] = (6,), max_length: int = 3) -> ThoughtLaw:
    """Ids 0 to 5 are ordinary but for the delimiter's first; 7 ends answers."""
    is_ordinary = torch.tensor([True] * 6 + [False] * 2)
    is_ordinary[delimiter[0]] = False
    return ThoughtLaw(delimiter, max_length, is_ordinary)


def markov_scores(ids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Logits that depend on the token before, in fp64. [B, T, 8]."""
    table = 3 * torch.randn(9, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = torch.cat([torch.full_like(ids[:, :1], 8), ids[:, :-1]], dim=1)
    return table[before]


@pytest.mark.parametrize("delimiter", [(6,), (5, 0, 1), (6, 6)])
def test_the_probabilities_of_all_thoughts_sum_to_one(delimiter):
    """End token and unused ids are masked and the rest renormalised; the longest thoughts are closed by force."""
    law = law_of_eight(delimiter)
    words = [i for i in range(8) if law.is_ordinary[i]]
    total = 0.0
    for length in range(law.max_length + 1):
        thoughts = [list(ids) for ids in itertools.product(words, repeat=length)]
        ids = torch.tensor([law.join(thought) for thought in thoughts])
        total += law.token_log_probs(markov_scores(ids), ids).sum(dim=1).exp().sum().item()
    assert abs(total - 1) < 1e-9


def test_steps_say_what_may_come_next():
    law = law_of_eight((5, 0))
    ids = torch.tensor([[1, 5, 0, 5, 7], [1, 2, 3, 5, 0], [5, 0, 4, 4, 4], [5, 0, 5, 0, 1]])
    assert law.steps(ids).tolist() == [
        [CONTENT, CONTENT, 0, FREE, FREE, FREE],
        [CONTENT, CONTENT, CONTENT, 5, 0, FREE],
        [CONTENT, 0, FREE, FREE, FREE, FREE],
        [CONTENT, 0, FREE, FREE, FREE, FREE],
    ]
    assert law.steps(torch.zeros(2, 0, dtype=torch.long)).tolist() == [[CONTENT], [CONTENT]]


def test_a_forced_delimiter_costs_nothing_and_an_answer_is_not_masked():
    law = law_of_eight()
    ids = torch.tensor([[0, 1, 2, 6, 6, 7]])
    scores = markov_scores(ids)
    log_p = law.token_log_probs(scores, ids)[0]
    assert log_p[3] == 0
    torch.testing.assert_close(log_p[4:], torch.log_softmax(scores, dim=2)[0, [4, 5], [6, 7]])


def test_a_thought_past_the_longest_has_probability_zero():
    law = law_of_eight()
    ids = torch.tensor([[0, 1, 2, 3, 6]])
    assert law.token_log_probs(markov_scores(ids), ids).sum() == -torch.inf


def test_thought_and_answer_are_read_off_their_ids():
    law = law_of_eight((5, 0))
    for thought, answer in ([], [7]), ([1, 2], [5, 0, 3, 7]), ([0, 0], []):
        assert law.split(law.join(thought, answer)) == (thought, answer)


def test_what_is_no_thought_is_said():
    law = law_of_eight((5, 0))
    assert law.problem([]) is None
    assert law.problem([0, 1, 0]) is None
    assert "longer than" in law.problem([0] * 4)
    assert "delimiter" in law.problem([5])
    assert "tokens" in law.problem([7])


def test_a_law_survives_json():
    law = ThoughtLaw((6, 1), 3, torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool(), opening_ids=(4,))
    again = ThoughtLaw.from_json(law.to_json())
    assert again.to_json() == law.to_json()
    assert torch.equal(again.is_ordinary, law.is_ordinary)
    with pytest.raises(ValueError, match="rule"):
        ThoughtLaw.from_json({**law.to_json(), "rule": "any"})


def test_a_delimiter_that_may_stand_in_a_thought_is_refused():
    with pytest.raises(ValueError, match="where it ends"):
        ThoughtLaw((6,), 3, torch.ones(8, dtype=torch.bool))


def test_an_unused_row_of_the_embeddings_closes_thoughts(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    law = settle_thought_law(tokenizer, 310, [0], max_length=4)
    assert len(law.delimiter_ids) == 1
    assert law.delimiter_ids[0] >= len(tokenizer)
    assert not law.is_ordinary[len(tokenizer) :].any()


def test_else_an_unused_special_token_does(tiny_chat_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_chat_model_dir))
    law = settle_thought_law(tokenizer, len(tokenizer), [tokenizer.eos_token_id], max_length=4)
    assert tokenizer.convert_ids_to_tokens(law.delimiter_ids[0]) == "<|reserved_0|>"
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    assert len(special) == 12
    assert not law.is_ordinary[special].any()
    assert law.is_ordinary.sum() == len(tokenizer) - 12


def test_else_a_fixed_text_does_whose_first_token_no_thought_holds(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    law = settle_thought_law(tokenizer, len(tokenizer), [0], max_length=4, delimiter="\n#!")
    assert list(law.delimiter_ids) == tokenizer("\n#!")["input_ids"]
    assert not law.is_ordinary[law.delimiter_ids[0]]
    assert "delimiter" in law.problem(thought_ids(tokenizer, "a\n"))
    with pytest.raises(ValueError, match="holds an end token"):
        settle_thought_law(tokenizer, len(tokenizer), [0], 4, delimiter="so <|endoftext|>")


def test_a_closing_tag_opens_its_block_after_the_question_once(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    tokenizer.add_tokens(["<think>", "</think>"])
    opening, closing = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    law = settle_thought_law(tokenizer, len(tokenizer), [0], 4, delimiter="</think>")
    assert law.delimiter_ids == (closing,)
    assert law.opened([20, 21]) == [20, 21, opening]
    assert law.opened([20, opening, 22]) == [20, opening, 22]  # a newline after it, as templates put it
    assert not law.is_ordinary[[opening, closing]].any()


def test_text_that_spells_a_special_token_stays_text(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model_dir))
    assert tokenizer.eos_token_id not in thought_ids(tokenizer, "a<|endoftext|>b")


def test_hindsight_ends_where_the_imitator_starts_to_think():
    assert hindsight_ids([1, 2], [3, 7]) == [1, 2, 3, 7, 1, 2]
    assert hindsight_ids([9, 1, 2], [3, 7], bos_token_id=9) == [9, 1, 2, 3, 7, 1, 2]
