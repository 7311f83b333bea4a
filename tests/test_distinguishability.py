import math
from collections import Counter

import numpy as np
import pytest

from hf_imitate.audits.distinguishability import Judgement, judge_pairs, swap_within_pairs
from hf_imitate.audits.judges import ngram_judge
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer

WORDS = [f"w{number}" for number in range(60)]
STOCK = [f"stock phrase {number} of it" for number in range(40)]


def free_answer(rng) -> Answer:
    return Answer(" ".join(rng.choice(WORDS, size=rng.integers(3, 9))), True)


def stock_answer(rng) -> Answer:
    """Three answers in ten are stock phrases, the popular ones far more often than the rare: no copies, one law."""
    return Answer(STOCK[int(40 * rng.random() ** 3)], True) if rng.random() < 0.3 else free_answer(rng)


def pairs_of_one_law(num_pairs: int, seed: int, draw=free_answer) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [Pair(f"question {seed} {number}", draw(rng), (draw(rng),)) for number in range(num_pairs)]


def with_a_tic(pairs: list[Pair], share: float = 0.5, seed: int = 0) -> list[Pair]:
    """The imitator says "basically" in a share of its answers; no human ever does."""
    has_tic = np.random.default_rng(seed).random(len(pairs)) < share
    return [
        Pair(pair.prompt, pair.human, (Answer("basically " + pair.imitator[0].text, True),)) if tic else pair
        for pair, tic in zip(pairs, has_tic, strict=True)
    ]


def jensen_shannon_bits(p: list[float], q: list[float]) -> float:
    middle = (np.array(p) + np.array(q)) / 2
    return sum(0.5 * x * math.log2(x / m) for law in (p, q) for x, m in zip(law, middle, strict=True) if x > 0)


def fixed_judge(score):
    """A judge that learns nothing: `score(answer)` is its score."""
    return lambda train, valid, seed: lambda prompts, answers: np.array([score(answer) for answer in answers], float)


def test_a_planted_difference_is_found_as_large_as_it_is():
    # Half the answers carry the tic: seen, the judge is always right; unseen, it tosses a coin.
    found = judge_pairs(with_a_tic(pairs_of_one_law(1000, 0)), ngram_judge, name="ngram")
    assert found.interval.low <= 0.75 <= found.interval.high
    # No judge extracts more bits than there are; this one must find most of them.
    exact_bits = jensen_shannon_bits([0, 1], [0.5, 0.5])
    assert 0.75 * exact_bits < found.bits < exact_bits + 0.02
    assert found.bits_interval.low > 0.2


def test_identical_laws_look_alike():
    found = [judge_pairs(pairs_of_one_law(400, seed), ngram_judge, name="ngram", seed=seed) for seed in range(8)]
    assert sum(f.interval.low <= 0.5 <= f.interval.high for f in found) >= 7
    assert np.mean([f.accuracy for f in found]) == pytest.approx(0.5, abs=0.035)
    assert np.mean([f.bits for f in found]) <= 0.01


def test_labels_swapped_within_pairs_leave_nothing_to_find():
    swapped = swap_within_pairs(with_a_tic(pairs_of_one_law(600, 0)), seed=1)
    found = judge_pairs(swapped, ngram_judge, name="ngram")
    assert found.interval.low <= 0.5 <= found.interval.high
    assert found.bits <= 0.01


def test_a_swap_exchanges_two_answers_and_their_checks_in_about_half_of_the_pairs():
    human, first, second = Answer("h", True), Answer("a", False), Answer("b", True)
    pair = Pair("q", human, (first, second), 2.0, (1.0,), ((0.0,), (float("inf"),)))
    swapped = swap_within_pairs([pair] * 400)
    counts = Counter(swapped)
    assert set(counts) == {pair, Pair("q", first, (human, second), 2.0, (0.0,), ((1.0,), (float("inf"),)))}
    assert 160 <= counts[pair] <= 240


def test_copied_answers_do_not_praise_a_judge_that_learned_them_by_heart():
    """Every human answer stands under four questions, each time beside a fresh imitator answer of the same law.
    A split by question shows the judge most test answers in training: "found", although nothing differs."""
    found: dict[bool, list[Judgement]] = {True: [], False: []}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        humans = [free_answer(rng) for _ in range(100)]
        pairs = [Pair(f"question {number}", humans[number % 100], (free_answer(rng),)) for number in range(400)]
        for group_answers in found:
            judged = judge_pairs(pairs, ngram_judge, name="ngram", seed=seed, group_answers=group_answers)
            found[group_answers].append(judged)
    assert all(judged.interval.low > 0.6 for judged in found[False])
    assert np.mean([judged.accuracy for judged in found[True]]) == pytest.approx(0.5, abs=0.06)


def test_popular_answers_do_not_tell_the_authors_apart_through_the_split():
    """Grouping by the human's answer alone gathers each stock phrase's human uses on one side and leaves the
    imitator's on both: a judge then learns a difference that only the split made, and is wrong on the other side."""
    by_both, by_human = [], []
    for seed in range(8):
        pairs = pairs_of_one_law(400, seed, stock_answer)
        by_both.append(judge_pairs(pairs, ngram_judge, name="ngram", seed=seed).accuracy)
        keys = [pair.human.text for pair in pairs]
        alone = judge_pairs(pairs, ngram_judge, name="ngram", seed=seed, group_by=keys, group_answers=False)
        by_human.append(alone.accuracy)
    assert np.mean(by_both) == pytest.approx(0.5, abs=0.035)
    assert np.mean(by_human) < 0.47


def test_bits_are_the_jensen_shannon_divergence_of_two_coins():
    p_human, p_imitator = 0.8, 0.3
    rng = np.random.default_rng(0)
    sides = [[Answer("yes" if yes else "no", True) for yes in rng.random(6000) < p] for p in (p_human, p_imitator)]
    pairs = [
        Pair(f"q{number}", human, (imitator,)) for number, (human, imitator) in enumerate(zip(*sides, strict=True))
    ]
    found = judge_pairs(pairs, ngram_judge, name="ngram")
    exact = jensen_shannon_bits([p_human, 1 - p_human], [p_imitator, 1 - p_imitator])
    assert found.bits == pytest.approx(exact, abs=0.03)
    assert found.bits_interval.low <= exact <= found.bits_interval.high
    # The accuracy of the best judge: "yes" beats "no", equal words tie.
    assert found.accuracy == pytest.approx(0.5 + (p_human - p_imitator) / 2, abs=0.02)
    assert found.num_ties == pytest.approx(3000 * (0.8 * 0.3 + 0.2 * 0.7), abs=120)


def test_intervals_cover_the_exact_values_as_often_as_they_say():
    """A judge that knows both laws, 150 times: its exact accuracy and bits are sums over two outcomes. Many
    validation pairs, since bits are those of the judge as calibrated."""
    judge = fixed_judge(lambda answer: answer.text == "yes")
    exact_bits = jensen_shannon_bits([0.7, 0.3], [0.5, 0.5])
    covered = np.zeros(2)
    for seed in range(150):
        texts = np.where(np.random.default_rng(seed).random((400, 2)) < [0.7, 0.5], "yes", "no").tolist()
        pairs = [Pair(f"q{number}", Answer(h, True), (Answer(m, True),)) for number, (h, m) in enumerate(texts)]
        settings = {"confidence": 0.9, "valid_size": 0.45, "group_answers": False}
        found = judge_pairs(pairs, judge, name="x", seed=seed, **settings)
        covered += [
            found.interval.low <= 0.6 <= found.interval.high,
            found.bits_interval.low <= exact_bits <= found.bits_interval.high,
        ]
    assert (covered / 150 >= 0.85).all()


def test_equal_scores_are_half_a_success_and_no_bits():
    found = judge_pairs(pairs_of_one_law(100, 0), fixed_judge(lambda answer: 3.0), name="blind")
    assert found.accuracy == 0.5
    assert found.num_ties == found.num_pairs == 50
    assert found.bits == pytest.approx(0.0, abs=1e-12)


def test_equal_answers_tie_although_scores_depend_on_the_batch():
    def judge(train, valid, seed):
        return lambda prompts, answers: np.random.default_rng(0).normal(size=len(answers))

    pairs = [Pair(f"q{number}", Answer("same", True), (Answer("same", True),)) for number in range(60)]
    assert judge_pairs(pairs, judge, name="noisy").num_ties == 30


def test_an_answer_that_was_cut_is_another_answer():
    pairs = [Pair(f"q{number}", Answer("same", True), (Answer("same", False),)) for number in range(100)]
    assert judge_pairs(pairs, fixed_judge(lambda answer: answer.ended), name="end").accuracy == 1.0
    assert judge_pairs(pairs, ngram_judge, name="ngram").accuracy == 1.0


def test_no_question_and_no_answer_stands_on_both_sides():
    seen: dict[str, list] = {}

    def judge(train, valid, seed):
        seen.update(train=train, valid=valid, test=[])

        def score(prompts, answers):
            seen["test"].append(list(zip(prompts, answers, strict=True)))
            return np.zeros(len(answers))

        return score

    # Pairs 2k and 2k + 1 share a human answer, pairs i and i + 250 a question: groups of four.
    rng = np.random.default_rng(0)
    humans = [free_answer(rng) for _ in range(250)]
    pairs = [
        Pair([{"role": "user", "content": f"q{number % 250}"}], humans[number // 2], (Answer(f"m{number}", True),))
        for number in range(500)
    ]
    found = judge_pairs(pairs, judge, name="spy")
    assert "No question and no answer stands on both sides" in found.findings[0].detail
    sides = [
        {(p.prompt[0]["content"], a.text) for p in seen[part] for a in (p.human, *p.imitator)}
        for part in ("train", "valid")
    ]
    sides.append({(prompt[0]["content"], answer.text) for prompt, answer in seen["test"][1]})
    for one in range(3):
        for other in range(one):
            assert not {question for question, _ in sides[one]} & {question for question, _ in sides[other]}
            assert not {answer for _, answer in sides[one]} & {answer for _, answer in sides[other]}


def test_equal_group_by_values_stay_together():
    sides = []

    def judge(train, valid, seed):
        sides.extend([{pair.prompt.split()[-1] for pair in part} for part in (train, valid)])
        return lambda prompts, answers: np.zeros(len(answers))

    pairs = pairs_of_one_law(200, 0)
    authors = [int(pair.prompt.split()[-1]) // 10 for pair in pairs]
    judge_pairs(pairs, judge, name="spy", group_by=authors)
    train, valid = ({int(number) // 10 for number in side} for side in sides)
    assert not train & valid


def test_one_trial_per_question():
    """Ten humans answered each question: they are one trial, and the interval says so."""
    pairs = [
        Pair(pair.prompt.rsplit(" ", 1)[0] + f" {number // 10}", pair.human, pair.imitator)
        for number, pair in enumerate(pairs_of_one_law(400, 0))
    ]
    found = judge_pairs(pairs, fixed_judge(lambda answer: len(answer.text)), name="length")
    assert found.num_pairs == 20
    assert found.interval.high - found.interval.low > 0.35
    assert not found.findings[0].certified


def test_a_closed_set_of_questions_counts_pairs():
    """With 8 questions there is no test question to spare; answers to them are independent draws."""
    rng = np.random.default_rng(0)
    choices = ["red", "green", "blue", "grey"]
    favourite = [rng.permutation(4) for _ in range(8)]
    pairs = []
    for number in range(800):
        order = favourite[number % 8]
        human, imitator = order[rng.choice(4, p=[0.7, 0.1, 0.1, 0.1])], order[rng.choice(4, p=[0.1, 0.7, 0.1, 0.1])]
        pairs.append(Pair(f"q{number % 8}", Answer(choices[human], True), (Answer(choices[imitator], True),)))
    found = judge_pairs(pairs, ngram_judge, name="ngram")
    assert found.num_pairs == 400
    # The laws differ only by question. The best judge wins, by the human's answer: favourite, one of two, second.
    exact = 0.7 * (0.9 + 0.1 / 2) + 0.2 * (0.7 + 0.2 / 2) + 0.1 * 0.7 / 2
    assert found.interval.low <= exact <= found.interval.high
    assert "too common to stand on one side" in found.findings[0].detail


def test_weights_count_and_widen_the_interval():
    pairs = pairs_of_one_law(400, 0)
    judge = fixed_judge(lambda answer: len(answer.text))
    plain = judge_pairs(pairs, judge, name="length")
    heavy = [
        Pair(pair.prompt, pair.human, pair.imitator, 4.0 if len(pair.human.text) > len(pair.imitator[0].text) else 1.0)
        for pair in pairs
    ]
    weighted = judge_pairs(heavy, judge, name="length")
    wins = plain.accuracy
    assert weighted.accuracy == pytest.approx(4 * wins / (4 * wins + 1 - wins), abs=0.03)
    assert weighted.num_pairs < plain.num_pairs
    assert plain.findings[0].certified
    assert not weighted.findings[0].certified
    equal = [Pair(pair.prompt, pair.human, pair.imitator, 7.0) for pair in pairs]
    assert judge_pairs(equal, judge, name="length") == plain


def test_several_generations_share_their_questions_trial():
    pairs = [Pair(p.prompt, p.human, p.imitator * 3) for p in pairs_of_one_law(100, 0)]
    single = [Pair(p.prompt, p.human, p.imitator[:1]) for p in pairs]
    for judge in (fixed_judge(lambda answer: len(answer.text)), ngram_judge):
        one, three = judge_pairs(single, judge, name="x"), judge_pairs(pairs, judge, name="x")
        assert (three.accuracy, three.num_pairs) == (one.accuracy, one.num_pairs)
        assert (three.bits, *three.bits_interval) == pytest.approx((one.bits, *one.bits_interval), abs=1e-3)
        assert one.findings[0].certified
        assert not three.findings[0].certified


def test_bits_ignore_the_scale_and_the_offset_of_scores():
    pairs = with_a_tic(pairs_of_one_law(300, 0))
    one = judge_pairs(pairs, fixed_judge(lambda answer: -answer.text.count("basically")), name="x")
    other = judge_pairs(pairs, fixed_judge(lambda answer: 5 - 1000 * answer.text.count("basically")), name="x")
    assert one.bits == pytest.approx(other.bits, abs=1e-4)
    assert one.bits > 0.2


def test_a_judge_that_is_confident_and_wrong_has_negative_bits():
    num_calls = []

    def judge(train, valid, seed):
        def score(prompts, answers):
            num_calls.append(len(answers))
            sign = 1 if len(num_calls) == 1 else -1  # right on the validation pairs, then turned round
            return np.array([sign * (not answer.text.startswith("basically")) for answer in answers], float)

        return score

    found = judge_pairs(with_a_tic(pairs_of_one_law(200, 0), share=1.0), judge, name="turned")
    assert found.accuracy == 0.0
    assert found.bits < -2
    assert found.findings[1].value == found.bits


def test_the_findings_say_what_was_measured():
    found = judge_pairs(with_a_tic(pairs_of_one_law(100, 0)), ngram_judge, name="ngram", confidence=0.9)
    accuracy, bits = found.findings
    assert (accuracy.name, accuracy.unit, accuracy.value) == ("paired_accuracy/ngram", "probability", found.accuracy)
    assert (accuracy.interval, accuracy.confidence, accuracy.n) == (found.interval, 0.9, 50)
    assert accuracy.certified
    assert (bits.name, bits.unit, bits.value, bits.certified) == ("judge_bits/ngram", "bits", found.bits, False)
    assert "[0.001, 0.999]" in bits.detail


@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        (pairs_of_one_law(39, 0), {}, "at least 40 pairs to learn and be tested; got 39"),
        (pairs_of_one_law(60, 0), {"test_size": 0.9, "valid_size": 0.1}, "leave some for training"),
        (pairs_of_one_law(60, 0), {"group_by": [1]}, "got 1 for 60 pairs"),
        (pairs_of_one_law(60, 0), {"group_by": [1, 2] * 30}, "2 groups"),
        ([Pair("secret", Answer("private", True), ())] * 60, {}, r"60 pairs have no imitator answer \(rows \[0, 1"),
        ([Pair("q", Answer("a", True), (Answer("b", True),), 0.0)] * 60, {}, "not positive"),
    ],
)
def test_pairs_that_cannot_be_judged_are_refused_without_their_text(pairs, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        judge_pairs(pairs, ngram_judge, name="ngram", **settings)
    assert "secret" not in str(caught.value)
    assert "private" not in str(caught.value)


def test_a_test_within_one_group_is_refused_as_there_is_no_error_to_state():
    """The interval over groups was a division by zero."""
    keys = [0] * 20 + list(range(1, 21))
    with pytest.raises(ValueError, match=r"21 groups of equal questions.* too few to train, validate and test on"):
        judge_pairs(pairs_of_one_law(40, 0), fixed_judge(len), name="n", seed=4, group_by=keys, group_answers=False)


@pytest.mark.parametrize(
    "scores", [lambda n: np.full(n, np.nan), lambda n: np.zeros((n, 1)), lambda n: np.zeros(n - 1)]
)
def test_scores_that_are_not_one_number_per_answer_are_refused(scores):
    with pytest.raises(ValueError, match="one finite score per answer"):
        judge_pairs(pairs_of_one_law(60, 0), lambda *_: lambda prompts, answers: scores(len(answers)), name="odd")
