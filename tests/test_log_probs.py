import itertools
import math

import pytest
import torch

from hf_imitate.log_probs import answer_log_probs, nats_to_bits, token_log_probs


def test_tokens_of_a_known_law_get_its_log_probs():
    law = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2], [0.6, 0.2, 0.2]])
    input_ids = torch.tensor([[0, 2, 1]])

    log_p = token_log_probs(law.log()[None], input_ids)

    # Position 0 predicts token 2, position 1 predicts token 1; what position 2 predicts is not in the text.
    torch.testing.assert_close(log_p, torch.tensor([[math.log(0.2), math.log(0.7)]]))


def test_log_probs_do_not_depend_on_the_level_of_the_logits():
    torch.manual_seed(0)
    logits, input_ids = torch.randn(2, 4, 5), torch.randint(5, (2, 4))

    shifted = token_log_probs(logits + 100 * torch.randn(2, 4, 1), input_ids)

    torch.testing.assert_close(shifted, token_log_probs(logits, input_ids), atol=1e-4, rtol=0)


def test_log_probs_match_cross_entropy():
    torch.manual_seed(0)
    logits, input_ids = torch.randn(2, 6, 7), torch.randint(7, (2, 6))

    library = -torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")

    torch.testing.assert_close(token_log_probs(logits, input_ids), library)


def test_an_answer_is_scored_from_its_first_to_its_end_token_and_no_further():
    torch.manual_seed(0)
    logits, input_ids = torch.randn(1, 6, 7), torch.randint(7, (1, 6))
    answer_mask = torch.tensor([[0, 0, 1, 1, 1, 0]])

    log_p = answer_log_probs(logits, input_ids, answer_mask)

    by_hand = sum(logits[0, t - 1].log_softmax(0)[input_ids[0, t]] for t in (2, 3, 4))
    torch.testing.assert_close(log_p, by_hand[None])


def test_all_answers_of_one_length_share_probability_one():
    torch.manual_seed(0)
    tables = torch.randn(3, 4)  # the law of a text that forgets all but its position
    texts = torch.tensor([(0, *answer) for answer in itertools.product(range(4), repeat=2)])
    answer_mask = torch.tensor([[0, 1, 1]]).expand(len(texts), -1)

    log_p = answer_log_probs(tables.expand(len(texts), -1, -1), texts, answer_mask)

    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_an_impossible_question_token_does_not_touch_the_answer():
    logits = torch.zeros(1, 4, 2)
    logits[0, 0, 1] = -torch.inf
    input_ids, answer_mask = torch.tensor([[0, 1, 0, 0]]), torch.tensor([[0, 0, 1, 1]])

    assert answer_log_probs(logits, input_ids, answer_mask).item() == pytest.approx(2 * math.log(0.5))


def test_an_answer_of_no_tokens_is_certain():
    assert answer_log_probs(torch.randn(1, 3, 5), torch.tensor([[0, 1, 2]]), torch.zeros(1, 3)).item() == 0


def test_half_precision_logits_are_summed_in_single_precision():
    torch.manual_seed(0)
    logits = (4 * torch.randn(1, 200, 1000)).bfloat16()
    input_ids = torch.randint(1000, (1, 200))
    answer_mask = torch.ones(1, 200)
    answer_mask[0, 0] = 0

    log_p = answer_log_probs(logits, input_ids, answer_mask)

    exact = answer_log_probs(logits.double().float(), input_ids, answer_mask)
    in_half = logits[:, :-1].log_softmax(2).gather(2, input_ids[:, 1:, None]).sum()
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p, exact)
    assert (in_half - exact).abs() > 0.5


@pytest.mark.parametrize(("logits", "input_ids"), [((2, 3, 4), (2, 2)), ((2, 3), (2, 3)), ((2, 3, 4), (3, 3))])
def test_shapes_that_do_not_belong_together_are_named(logits, input_ids):
    with pytest.raises(ValueError, match=r"\[B, T, V\].*got \(2, 3"):
        token_log_probs(torch.zeros(logits), torch.zeros(input_ids, dtype=torch.long))


def test_a_fair_coin_is_one_bit():
    assert nats_to_bits(math.log(2)) == 1
