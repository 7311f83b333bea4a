import math

import pytest
import torch
from distinguishers import LORA, causal_lm, imitator_model, is_short, is_wanted, trained
from transformers import AutoTokenizer

from hf_imitate.contest import Round, merged, run_checks, score_then_update
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.human_rows import ROW_COLUMN, HumanRow
from hf_imitate.pairs import Learner, Pair
from hf_imitate.rendering import Answer, Rendered, Renderer

NAN = float("nan")
RENDERER = Renderer(None, [1])
NUM_GENERATIONS = 3


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def make(tiny_model_dir, tokenizer):
    def make(checks=(), shared=False):
        if shared:
            model = imitator_model(tiny_model_dir)
            return trained(Distinguisher.on_shared_base(model, tokenizer, LORA, checks=checks))
        return trained(Distinguisher.from_causal_lm(causal_lm(tiny_model_dir), tokenizer, checks=checks))

    return make


def human(text, weight=1.0):
    return HumanRow(Rendered([], [], True), Answer(text, True), weight, len(text))


def a_round(humans=("it", "the list", None), outcomes=None, human_outcomes=None, num_checks=0):
    """Three questions, three generations each; the last question has no human answer."""
    num = len(humans) * NUM_GENERATIONS
    answers = [Answer(f"answer {i}" if i % 3 else "name", i % 4 != 3) for i in range(num)]
    by_row = [None if text is None else human(text) for text in humans for _ in range(NUM_GENERATIONS)]
    empty = torch.zeros(num, num_checks)
    return Round(
        [i // NUM_GENERATIONS for i in range(num)],
        [False] * num,
        [f"q{i // NUM_GENERATIONS}" for i in range(num)],
        answers,
        by_row,
        empty if outcomes is None else outcomes,
        empty if human_outcomes is None else human_outcomes,
    )


def text_scores(distinguisher, batch):
    """Every text on its own, the other road."""
    on_imitator = [distinguisher.score([q], [a]).item() for q, a in zip(batch.prompts, batch.answers, strict=True)]
    on_human = [
        NAN if h is None else distinguisher.score([q], [h.answer]).item()
        for q, h in zip(batch.prompts, batch.humans, strict=True)
    ]
    return torch.tensor(on_imitator), torch.tensor(on_human)


def assert_scores(scores, expected):
    for one, other in zip((scores.imitator, scores.human), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("learn_from", [[], [0, 1], [5, 0, 3], [0, 1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("num_updates", [1, 3])
def test_scores_are_those_before_the_update_for_rows_learned_from_too(make, shared, learn_from, num_updates):
    distinguisher, batch = make(shared=shared), a_round()
    expected = text_scores(distinguisher, batch)

    scores = score_then_update(Learner(distinguisher, 1e-2), batch, learn_from, [[]] * num_updates)

    assert_scores(scores, expected)
    moved = text_scores(distinguisher, batch)[0] - expected[0]
    assert (moved.abs().max() > 1e-3) == bool(learn_from)
    assert math.isnan(scores.loss) == (not learn_from)


@pytest.mark.parametrize("learn_from", [[0, 3], [0, 1, 2, 3, 4, 5]], ids=str)
def test_where_checks_begin_is_no_part_of_the_first_scores(make, learn_from):
    """The first pairs decide it: an answer learned from must not be paid by what it has itself decided."""
    outcomes, human_outcomes = torch.zeros(9, 1), torch.ones(9, 1)
    distinguisher, batch = make(checks=[is_short]), a_round(outcomes=outcomes, human_outcomes=human_outcomes)
    with torch.no_grad():
        distinguisher.check_weights.zero_()
    expected = text_scores(distinguisher, batch)

    scores = score_then_update(Learner(distinguisher, 1e-3), batch, learn_from, [[], []])

    assert_scores(scores, expected)
    assert distinguisher.check_weights.item() > 1


def test_only_scoring_changes_nothing(make):
    distinguisher, batch = make(), a_round()
    before = [p.detach().clone() for p in distinguisher.trainable_parameters()]

    scores = score_then_update(Learner(distinguisher, 1e-2), batch, [0, 1])

    assert_scores(scores, text_scores(distinguisher, batch))
    assert math.isnan(scores.loss)
    assert all(torch.equal(p, q) for p, q in zip(distinguisher.trainable_parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("learn_from", "num_updates", "num_texts"),
    [
        ([0, 1, 2, 3, 4, 5], 1, 9 + 2),  # 9 answers and 2 humans, each read once
        ([0, 1], 1, 9 + 2),
        ([0, 1], 3, 9 + 2 + 2 * (2 + 1)),  # two more updates on two answers and one human
        ([], 1, 9 + 2),
    ],
)
def test_score_and_training_share_one_forward(make, monkeypatch, learn_from, num_updates, num_texts):
    distinguisher, batch = make(), a_round()
    read = []
    forward = distinguisher.text_logits
    monkeypatch.setattr(distinguisher, "text_logits", lambda rows: read.append(len(rows)) or forward(rows))

    score_then_update(Learner(distinguisher, 1e-3), batch, learn_from, [[]] * num_updates)

    assert sum(read) == num_texts


def test_a_batch_is_scored_and_learned_from_after_one_switch_of_adapters(make, monkeypatch):
    """A switch visits every module of the model, and back again."""
    distinguisher, switches = make(shared=True), []
    own, switch = distinguisher.model.active_adapter, distinguisher.model.set_adapter
    monkeypatch.setattr(distinguisher.model, "set_adapter", lambda name: switches.append(name) or switch(name))
    score_then_update(Learner(distinguisher, 1e-3), a_round(), [0, 3], [[], []])
    assert switches == [distinguisher.adapter_name, own]
    assert distinguisher.model.active_adapter == own


def test_an_interruption_in_the_middle_of_a_switch_leaves_the_imitators_adapter_and_flags(make, monkeypatch):
    model = (distinguisher := make(shared=True)).model
    own, switch, flags = model.active_adapter, model.set_adapter, [p.requires_grad for p in model.parameters()]

    def interrupted(name):
        switch(name)
        if name != own:
            raise KeyboardInterrupt

    monkeypatch.setattr(model, "set_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt), distinguisher.active():
        pass
    assert (model.active_adapter, [p.requires_grad for p in model.parameters()]) == (own, flags)


def test_old_answers_are_learned_from_and_never_scored(make):
    batch, old = a_round(), [Pair("old", Answer("was", True), (Answer("gone", True),))]
    one, other = make(), make()
    expected = text_scores(one, batch)

    scores = score_then_update(Learner(one, 1e-3), batch, [0], [old])
    score_then_update(Learner(other, 1e-3), batch, [0], [[]])

    assert_scores(scores, expected)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_the_update_is_that_of_the_same_pairs_one_by_one(make):
    batch, old = a_round(), [Pair("old", Answer("was", True), (Answer("gone", True),))]
    one, other = make(), make()

    score_then_update(Learner(one, 1e-3), batch, [0, 1, 4], [old], max_rows=2)
    Learner(other, 1e-3).step([*(batch.pair(i) for i in (0, 1, 4)), *old])

    for p, q in zip(one.trainable_parameters(), other.trainable_parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("learn_from", [[], [0, 4], [0, 1, 2, 3, 4, 5]], ids=str)
def test_a_check_that_does_not_apply_to_one_side_counts_on_neither_learned_from_or_not(make, learn_from):
    """Weights 1 and 2. Generations of one question would otherwise be paid by different rules in one group."""
    distinguisher = make(checks=[is_short, is_wanted])
    on_human = torch.tensor([[1.0, NAN]] * 3 + [[0.0, 1.0]] * 3 + [[NAN, NAN]] * 3)
    on_imitator = torch.tensor([[0.0, 1.0], [1.0, 0.0], [NAN, 1.0]] * 3)
    batch = a_round(outcomes=on_imitator, human_outcomes=on_human, num_checks=2)
    text_imitator, text_human = text_scores(distinguisher, batch)
    # Question 0: only the first check is shared. Question 1: both, but for the third answer's first. Question 2 has no
    # human answer, so the imitator's own outcomes count.
    added_imitator = torch.tensor([-0.5, 0.5, 0.0, -0.5 + 1.0, 0.5 - 1.0, 1.0, -0.5 + 1.0, 0.5 - 1.0, 1.0])
    added_human = torch.tensor([0.5, 0.5, 0.0, -0.5 + 1.0, -0.5 + 1.0, 1.0, 0.0, 0.0, 0.0])

    scores = score_then_update(Learner(distinguisher, 1e-3), batch, learn_from, [[]])

    assert_scores(scores, (text_imitator + added_imitator, text_human + added_human))


def test_equal_questions_in_a_row_are_read_once_even_where_a_check_does_not_apply(make):
    """NaN differs from itself; the human's answer must not be read again for that."""
    human = Answer("h", True)
    pairs = [Pair("q", human, (Answer(t, True),), 1.0, (float("nan"), 1.0), ((1.0, NAN),)) for t in "abc"]

    together = merged(pairs)

    assert len(together) == 1
    assert together[0].imitator == (Answer("a", True), Answer("b", True), Answer("c", True))
    assert together[0].weight == 3.0
    assert len(together[0].imitator_checks) == 3


@pytest.mark.parametrize(
    "other",
    [
        Pair("r", Answer("h", True), (Answer("b", True),)),
        Pair("q", Answer("h", False), (Answer("b", True),)),
        Pair("q", Answer("h", True), (Answer("b", True),), 2.0),
        Pair("q", Answer("h", True), (Answer("b", True),), 1.0, (1.0,), ((0.0,),)),
    ],
    ids=["question", "end", "weight", "check"],
)
def test_pairs_that_differ_stay_apart(other):
    first = Pair("q", Answer("h", True), (Answer("a", True),))

    assert merged([first, other]) == [first, other]


def test_conversations_are_merged_too():
    question = [{"role": "user", "content": "q"}]
    pairs = [Pair([dict(message) for message in question], Answer("h", True), (Answer(t, True),)) for t in "ab"]

    assert len(merged(pairs)) == 1
    assert merged([]) == []


def test_a_row_without_a_human_answer_is_no_pair():
    with pytest.raises(ValueError, match="Row 7 has no human answer"):
        a_round().pair(7)


def test_checks_are_called_once_per_side_with_the_same_questions_and_columns():
    calls = []

    def spy(prompts, completions, completion_ids=None, **columns):
        calls.append((prompts, completions, completion_ids, columns))
        return [len(text) / 10 for text in completions]

    rows = [
        {"prompt": "q", "completion": "abc", "key": 1, ROW_COLUMN: 0},
        {"prompt": "r", "completion": None, "key": 2, ROW_COLUMN: 1},
        {"prompt": "s", "completion": "abcde", "key": 3, ROW_COLUMN: 2},
    ]

    outcomes, human_outcomes = run_checks(
        [spy],
        rows,
        ["q", "r", "s"],
        [Answer("x", True), Answer("xy", True), Answer("", True)],
        [human_row("abc"), None, human_row("abcde")],
        [[1], [2], [3]],
        RENDERER,
    )

    assert calls == [
        (["q", "r", "s"], ["x", "xy", ""], [[1], [2], [3]], {"key": [1, 2, 3]}),
        (["q", "s"], ["abc", "abcde"], None, {"key": [1, 3]}),
    ]
    torch.testing.assert_close(outcomes, torch.tensor([[0.1], [0.2], [0.0]]))
    torch.testing.assert_close(human_outcomes, torch.tensor([[0.3], [NAN], [0.5]]), equal_nan=True)


def test_without_human_answers_no_check_is_asked_about_them():
    rows = [{"prompt": "q", "completion": None}]

    outcomes, human_outcomes = run_checks([is_short], rows, ["q"], [Answer("x", True)], [None], [[1]], RENDERER)

    assert outcomes.tolist() == [[1.0]]
    assert human_outcomes.isnan().all()
    assert run_checks([], rows, ["q"], [Answer("x", True)], [None], [[1]], RENDERER)[0].shape == (1, 0)


def human_row(text, ended=True):
    return HumanRow(Rendered([1], [2], ended), Answer(text, ended), 1.0, len(text))


def test_a_check_cannot_tell_a_cut_or_untidy_human_answer_by_its_form():
    """Checks once saw the human's raw text, trailing blanks and all, beside the imitator's cut one."""
    seen = []

    def spy(prompts, completions, completion_ids=None, **columns):
        seen.append(completions)
        return [1.0] * len(completions)

    rows = [{"prompt": "q", "completion": "Set the name and return it  \r\n", ROW_COLUMN: 0}]
    run_checks(
        [spy], rows, ["q"], [Answer("Set the \n", False)], [human_row("Set the ", ended=False)], [[1]], RENDERER
    )
    chat = [{"role": "user", "content": "q"}]
    run_checks([spy], rows, [chat], [Answer("Set the", True)], [human_row("Set the")], [[1]], RENDERER)

    assert seen[:2] == [["Set the"], ["Set the"]]
    assert seen[2] == seen[3] == [[{"role": "assistant", "content": "Set the"}]]


def test_a_check_sees_both_sides_in_the_role_whose_turn_it_is():
    seen = []

    def spy(prompts, completions, completion_ids=None, **columns):
        seen.append(completions)
        return [1.0] * len(completions)

    renderer = Renderer(None, [1], completion_role="user")
    chat = [{"role": "assistant", "content": "How can I help?"}]
    rows = [{"prompt": chat, "completion": None, ROW_COLUMN: 0}]
    run_checks([spy], rows, [chat], [Answer("Set the", True)], [human_row("Set the")], [[1]], renderer)

    assert seen == [[[{"role": "user", "content": "Set the"}]]] * 2
