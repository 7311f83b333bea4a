"""Thoughts are drawn from the law they are scored by."""

import copy
from collections import Counter

import latent_worlds as worlds
import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from hf_imitate import sparing_head
from hf_imitate.latent_draws import Continuation, draw_thoughts, sequence_log_probs
from hf_imitate.sampling import stream_key
from hf_imitate.sparing_head import SparingHead
from hf_imitate.thoughts import ThoughtLaw


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return worlds.load_world(worlds.save_world(tmp_path_factory.mktemp("world"))).eval()


def law(delimiter: tuple[int, ...] = (6,)) -> ThoughtLaw:
    is_ordinary = torch.tensor([True] * 6 + [False] * 2)
    is_ordinary[delimiter[0]] = False
    return ThoughtLaw(delimiter, worlds.LONGEST, is_ordinary)


def draw(model, law, prompts, number=1, **kwargs):
    keys = [stream_key(0, "test", f"{ids}", k) for ids in prompts for k in range(number)]
    return draw_thoughts(model, law, [ids for ids in prompts for _ in range(number)], keys, [7], 7, **kwargs)


@pytest.mark.parametrize("delimiter", [(6,), (5, 0, 1)])
@pytest.mark.parametrize("longest_answer", [0, 4])
def test_the_recorded_log_q_is_that_of_teacher_forcing(model, delimiter, longest_answer):
    rule = law(delimiter)
    prompts = [[0, 1], [3], [2, 2, 4, 1]]
    drawn = draw(model, rule, prompts, 20, max_answer_tokens=longest_answer, max_rows=25)
    before = [ids for ids in prompts for _ in range(20)]
    rows = [
        Continuation(ids, rule.join(one.thought_ids, one.answer_ids)) for ids, one in zip(before, drawn, strict=True)
    ]
    with torch.no_grad():
        log_q, _ = sequence_log_probs(model, rule, rows, 7, "cpu")
    recorded = torch.tensor([one.log_prob_thought for one in drawn])
    torch.testing.assert_close(recorded, log_q, atol=1e-5, rtol=0)
    assert {len(one.thought_ids) for one in drawn} == {0, 1, 2, 3}


def test_thoughts_come_as_often_as_their_probability_says(model):
    rule, number = law(), 3000
    with torch.no_grad():
        rows = [Continuation([0, 1], rule.join(thought)) for thought in worlds.THOUGHTS]
        law_of_all = sequence_log_probs(model, rule, rows, 7, "cpu")[0].double().exp()
    drawn = Counter(tuple(one.thought_ids) for one in draw(model, rule, [[0, 1]], number, max_rows=1000))
    seen = torch.tensor([drawn[tuple(thought)] / number for thought in worlds.THOUGHTS], dtype=torch.float64)
    assert sum(drawn.values()) == number
    # The total variation of 3 000 draws from this law from the law itself is .07 +- .006; at temperature .7 it is .3.
    assert (seen - law_of_all).abs().sum() / 2 < 0.1


def test_a_draw_depends_on_its_key_and_question_alone(model):
    rule = law()
    together = draw(model, rule, [[0, 1], [2, 2, 4, 1], [3]], 4, max_answer_tokens=4)
    alone = draw(model, rule, [[3]], 4, max_answer_tokens=4, max_rows=3)
    assert [one[:2] for one in together[8:]] == [one[:2] for one in alone]


def test_an_end_token_that_the_model_loves_stands_in_no_thought(model, monkeypatch):
    """And after the delimiter it ends the answer at once; an answer of its own choice is cut at the limit."""
    rule = law()
    forward = model.forward

    def loving(token):
        def call(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.logits[..., token] += 100
            return output

        return call

    monkeypatch.setattr(model, "forward", loving(7))
    drawn = draw(model, rule, [[0, 1]], 20, max_answer_tokens=4)
    assert all(set(one.thought_ids) <= set(range(6)) for one in drawn)
    assert all(one.answer_ids == [7] for one in drawn)
    monkeypatch.setattr(model, "forward", loving(6))
    drawn = draw(model, rule, [[0, 1]], 3, max_answer_tokens=4)
    assert all(one[:2] == ([], [6] * 4) for one in drawn)


@pytest.mark.parametrize("positions", ["rotary", "absolute"])
def test_log_probs_do_not_depend_on_the_batch(model, positions):
    """Questions are padded on the left, so a model of absolute positions has to be told them."""
    rule = law()
    if positions == "absolute":
        torch.manual_seed(0)
        small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=8, bos_token_id=7, eos_token_id=7, **small)).eval()
    rows = [Continuation([0, 1], rule.join([1, 2], [3, 7])), Continuation([2, 2, 4, 1], rule.join([], [1, 1, 7]))]
    with torch.no_grad():
        together = torch.stack(sequence_log_probs(model, rule, rows, 7, "cpu"))
        alone = torch.cat([torch.stack(sequence_log_probs(model, rule, [row], 7, "cpu")) for row in rows], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_joint_log_probs_equal_a_softmax_written_out(model):
    with torch.no_grad():
        exact = worlds.reference_log_joint(model, [0, 1], [2, 7])
        torch.testing.assert_close(worlds.log_joint(model, law(), [0, 1], [2, 7]), exact, atol=1e-5, rtol=0)


class LargestScores(TorchDispatchMode):
    """Notes how many rows of scores over the vocabulary any tensor of a computation held at once."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size, self.most = vocab_size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocab_size,):
                self.most = max(self.most, tensor.numel() // self.vocab_size)
        return output


def test_a_head_in_pieces_gives_the_same_values_and_gradients_and_holds_few_scores(monkeypatch):
    """In pieces of 40 positions, forward and backward; whole, all 259 * 7 have scores at once."""
    torch.manual_seed(0)  # 29 is no other size of this model
    small = {"n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 0.5}
    trained = GPT2LMHeadModel(GPT2Config(vocab_size=29, bos_token_id=7, eos_token_id=7, **small)).eval()
    rule = ThoughtLaw((6,), worlds.LONGEST, torch.arange(29) < 6)
    before = ([0, 1], [2, 2, 4, 1])
    rows = [Continuation(before[i % 2], rule.join(z, [2, 3, 7][i % 3 :])) for i, z in enumerate(worlds.THOUGHTS)]
    coefficients = torch.randn(2, len(rows), generator=torch.Generator().manual_seed(0))

    def run(head) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        with LargestScores(29) as seen:
            values = torch.stack(sequence_log_probs(trained, rule, rows, 7, "cpu", 1.3, head))
            gradients = torch.autograd.grad((coefficients * values).sum(), list(trained.parameters()))
        return values, list(gradients), seen.most

    values, gradients, whole = run(None)
    monkeypatch.setattr(sparing_head, "MAX_SCORES", 29 * 40)
    in_pieces, same_gradients, most = run(SparingHead.of(trained))
    torch.testing.assert_close(in_pieces, values, atol=1e-6, rtol=1e-6)
    for one, other in zip(same_gradients, gradients, strict=True):
        scale = max(other.abs().max().item(), 1.0)
        torch.testing.assert_close(one / scale, other / scale, atol=5e-6, rtol=0)
    assert whole >= len(rows) * 6
    # One row of scores for each row of the forward comes from the model's own head, asked for the last position.
    assert most < len(rows) / 2
    with torch.no_grad(), LargestScores(29) as seen:
        without = sequence_log_probs(trained, rule, rows, 7, "cpu", 1.3, SparingHead.of(trained))
        torch.testing.assert_close(torch.stack(without), values)
    assert seen.most < len(rows) / 2


def test_a_model_that_changes_its_scores_after_the_head_keeps_them_whole(model):
    """Gemma caps them; a head on its own would be another law."""
    capped = copy.deepcopy(model)
    assert SparingHead.of(capped) is not None
    capped.forward = lambda *args, **kwargs: _capped(type(capped).forward(capped, *args, **kwargs))
    assert SparingHead.of(capped) is None


def _capped(output):
    output.logits = 5 * torch.tanh(output.logits / 5)
    return output


def test_the_models_that_are_trained_have_their_heads_in_pieces(model):
    adapted = get_peft_model(copy.deepcopy(model), worlds.lora())
    assert SparingHead.of(adapted) is not None
    assert SparingHead.of(adapted).head is adapted.get_base_model().lm_head
    absolute = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    assert SparingHead.of(absolute) is not None
