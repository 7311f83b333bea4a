"""One of K answers on the notes: the world is what it claims to be, memories are short, and every cell runs."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import residual, residual_distil
from benchmarks.worlds import notes, notes_arms
from hf_imitate import Distinguisher, Imitator
from hf_imitate.rendering import Answer

TINY = notes_arms.Sizes(
    train=160,
    dev=60,
    test=80,
    scored=12,
    judge_rows=128,
    few=40,
    unanswered=40,
    small_steps=10,
    few_steps=10,
    large_steps=10,
    distinguisher=(6, 16, 0.1),
    same_size=(6, 16, 0.2),
    judge_lm_steps=10,
    judge_steps=6,
    distil_steps=6,
)


def written_by_hand(question, rng):
    """The human, step by step: open, say, forget, be kind, close."""
    number = rng.choice(3, p=[0.5, 0.3, 0.2])
    said = list(question[:-1])
    if rng.random() < 0.3:
        del said[rng.integers(len(said))]
    words = rng.choice(["thankyou", "goodluck", "takecare", "farewell"], p=[0.4, 0.3, 0.2, 0.1])
    return "([{"[number] + "".join(said) + words + ")]}"[number]


@pytest.mark.parametrize("question", ["3071?", "3301?"])
def test_the_humans_law_is_what_the_process_gives(question):
    """In 3301 two ways to forget a digit give one answer: their probabilities add up."""
    rng = np.random.default_rng(0)
    num = 20_000
    counts = Counter(written_by_hand(question, rng) for _ in range(num))
    law = notes.law(question)

    assert sum(law.values()) == pytest.approx(1)
    assert set(counts) <= set(law)
    for answer, p in law.items():
        assert abs(counts[answer] / num - p) < 5 * math.sqrt(p / num) + 1e-3, answer


def test_rows_and_entropy_are_those_of_the_law():
    question = "3071?"
    p = np.array(list(notes.law(question).values()))
    assert notes.entropy([question]) == pytest.approx(-(p * np.log(p)).sum())

    rows = notes.human_rows(notes.questions(2000, 3), 3)
    nats = -notes.human_log_prob(rows["prompt"][:], rows["completion"][:])
    error = nats.std() / math.sqrt(len(nats))
    assert abs(nats.mean() - notes.entropy(rows["prompt"][:])) < 4 * error
    assert notes.human_log_prob([question], ["(3071thankyou]"])[0] == -math.inf


def test_a_short_memory_costs_the_entropy_of_what_it_forgot(monkeypatch):
    """Whole notes in memory: the human's entropy. Eleven tokens: how it was opened is gone, all else is there."""
    monkeypatch.setattr(notes, "DIGITS", "012")
    asked = [f"{i}{j}{k}{n}?" for i in "012" for j in "012" for k in "012" for n in "012"]
    exact = notes.entropy(asked)
    opening = -sum(p * math.log(p) for p in notes.FRAMES.values())
    assert notes.entropy_with_memory(99) == pytest.approx(exact)
    assert notes.entropy_with_memory(11) == pytest.approx(exact + opening, abs=1e-3)
    assert notes.entropy_with_memory(6) > notes.entropy_with_memory(11) + 0.1


@pytest.mark.parametrize(("size", "remembers"), [("small", False), ("large", True)])
def test_only_the_larger_model_knows_at_the_end_how_a_note_was_opened(size, remembers):
    """The next token's law after two notes that differ in the opening alone, the product's own scores included."""
    torch.manual_seed(0)
    model = notes.new_model(size).eval()
    texts = ["(307farewell", "[307farewell", "(308farewell"]
    ids = torch.tensor([notes.tokenizer()("3071?" + text)["input_ids"] for text in texts])
    with torch.no_grad():
        opened, differently, other = model(ids).logits[:, -1].log_softmax(-1)
    assert torch.allclose(opened, differently, atol=1e-6) != remembers
    assert not torch.allclose(opened, other, atol=1e-6)

    imitator = Imitator(model, notes.tokenizer(), max_new_tokens=notes.MAX_TOKENS)
    closings = [text + ")" for text in texts[:2]]
    whole = imitator.log_prob(["3071?"] * 2, closings).nats
    row = torch.tensor(notes.tokenizer()("3071?" + closings[0])["input_ids"] + [0])
    with torch.no_grad():
        by_hand = model(row[None]).logits[0, 4:-1].log_softmax(-1).gather(1, row[5:, None]).sum()
    torch.testing.assert_close(whole[0], by_hand, atol=1e-4, rtol=0, check_dtype=False)


def test_kept_answers_of_a_short_memory_verify_and_are_scored_as_they_are_drawn():
    """Shared prefixes do not fit a sliding window; drawing, re-execution and estimates agree all the same."""
    torch.manual_seed(0)
    model = notes.new_model("small").eval()
    distinguisher = Distinguisher.from_causal_lm(notes.new_model("large"), notes.tokenizer(), seed=0)
    imitator = Imitator(model, notes.tokenizer(), distinguisher=distinguisher, max_new_tokens=notes.MAX_TOKENS)
    asked = ["3071?", "22?", "98765?"]
    kept = imitator.answer(asked, resample=4, seed=3)
    assert imitator.verify(asked, kept, resample=4, seed=3).verified
    texts = [own[0] for own in kept]
    plain = imitator.log_prob(asked, texts).nats
    factor = imitator.log_prob(asked, texts, resample=4, num_estimates=4, seed=5).nats - plain
    assert (factor <= math.log(4) + 1e-4).all()


def test_no_question_of_the_judges_language_models_is_asked_elsewhere():
    reserved = {q for seed in (7000, 7001) for q in notes.questions(1000, seed, reserved=True)}
    others = {q for seed in (41, 42) for q in notes.questions(3000, seed)}
    assert not reserved & others
    train, dev, test = notes_arms.data(41, TINY)
    parts = [set(part["prompt"]) for part in (train, dev, test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 300


def test_every_human_answer_fits():
    rows = notes.human_rows(notes.questions(3000, 5), 5)
    lengths = [len(ids) for ids in notes.tokenizer()(rows["completion"][:])["input_ids"]]
    assert max(lengths) == notes.MAX_TOKENS - 1
    assert notes.tokenizer().decode(notes.tokenizer()("[307goodluck]")["input_ids"]) == "[307goodluck]"


def test_the_oracle_sees_nothing_in_the_humans_own_law_and_everything_in_impossible_answers():
    rows = notes.human_rows(notes.questions(400, 5), 5)
    again = notes.human_rows(rows["prompt"][:], 6)["completion"]
    own = [Answer(text, True) for text in again]
    found = notes_arms.oracle(rows, own, notes.human_log_prob)
    assert found == {"oracle": 0.5, "impossible": 0.0}

    half = [Answer("99", True) if i % 2 else answer for i, answer in enumerate(own)]
    assert notes_arms.oracle(rows, half, notes.human_log_prob) == {"oracle": 0.75, "impossible": 0.5}


def test_the_oracle_of_a_known_law_wins_as_often_as_enumeration_says():
    """The imitator is the human who never forgets; paired accuracy by a sum over both answers."""
    asked = [f"{q}" for q in notes.questions(300, 9)]
    forgetless = {q: {a: p for a, p in notes.law(q).items() if is_whole(q, a)} for q in asked}
    forgetless = {q: {a: p / sum(law.values()) for a, p in law.items()} for q, law in forgetless.items()}

    def log_prob(prompts, answers):
        return np.array([math.log(forgetless[q].get(a, 1e-300)) for q, a in zip(prompts, answers, strict=True)])

    exact = []
    for q in asked:
        human, own = notes.law(q), forgetless[q]
        ratio = {a: human[a] / own.get(a, 1e-300) for a in human}
        share_above = [sum(p for a, p in human.items() if ratio[a] > ratio[b] * (1 + 1e-9)) for b in own]
        ties = [sum(p for a, p in human.items() if abs(ratio[a] / ratio[b] - 1) <= 1e-9) for b in own]
        exact.append(sum(p * (up + tie / 2) for p, up, tie in zip(own.values(), share_above, ties, strict=True)))
    rng = np.random.default_rng(0)
    wins = []
    for seed in range(8):
        rows = notes.human_rows(asked, 100 + seed)
        drawn = [
            Answer(list(forgetless[q])[rng.choice(len(forgetless[q]), p=list(forgetless[q].values()))], True)
            for q in asked
        ]
        wins.append(notes_arms.oracle(rows, drawn, log_prob)["oracle"])
    assert np.mean(wins) == pytest.approx(np.mean(exact), abs=0.03)
    assert np.mean(exact) > 0.6


def is_whole(question, answer):
    return question[:-1] in answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notes")


def run_all(entry, folder):
    seed = entry.SEEDS[0]
    cells = [cell for cell in entry.CELLS if cell.get("seed", seed) == seed and cell.get("judge", 0) == 0]
    return [{"cell": cell, "result": entry.run_cell(cell, TINY, folder)} for cell in cells]


def test_every_cell_of_the_residual_entry_runs_and_is_summed_up(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(residual, "TEMPERATURES", (0.8, 1.0))
    monkeypatch.setattr(residual, "NUM_TIMED", 8)
    monkeypatch.setattr(notes, "entropy_with_memory", lambda: 4.3)  # the enumeration has a test of its own
    results = run_all(residual, folder)
    rows, passed = residual.summarize(results)

    assert not passed  # ten steps teach nobody
    laws = [row["law"] for row in rows]
    assert laws[0] == "temperature 1"
    assert laws[2:8] == ["more likelihood", "one of 2", "one of 4", "one of 8", "one of 16", "larger model"]
    assert rows[2]["gained"] != 0 != rows[5]["gained"]
    assert rows[0]["gained"] == 0
    for row in rows[2:8]:
        assert row["gained"] == pytest.approx(rows[0]["bits"] - row["bits"], abs=0.02)
    by_human = next(one["result"] for one in results if one["cell"]["part"] == "scores")
    asked, humans = (
        notes_arms.data(residual.SEEDS[0], TINY).test[name][: TINY.scored] for name in ("prompt", "completion")
    )
    model = notes_arms.load(notes_arms.likelihood("small", residual.SEEDS[0], TINY, folder))
    own = -model.log_prob(asked, humans).nats.mean().item() / math.log(2)
    luck = by_human["entropy"] + notes.human_log_prob(asked, humans).mean() / math.log(2)
    assert by_human["laws"]["temperature 1"]["bits"] == pytest.approx(own + luck, abs=1e-3)
    assert all(len({*row} ^ {*rows[0]}) == 0 for row in rows)
    residual.plot(results, tmp_path / "residual.png")
    assert (tmp_path / "residual.png").read_bytes().startswith(b"\x89PNG")


def test_every_cell_of_the_distillation_runs_and_is_summed_up(folder):
    results = run_all(residual_distil, folder)
    rows, _ = residual_distil.summarize(results)
    assert [row["law"] for row in rows] == ["one of 8", "round 0", "round 1", "round 2"]
    assert rows[1]["of the bits gained"] == 0
    assert rows[0]["bits"] != rows[1]["bits"]
    # So few steps may teach nothing, and then the weights from before are kept; but each round learned.
    readings = [one["result"]["imitator"]["dev_bits"] for one in results if one["cell"]["part"] == "training"]
    assert [len({*one}) > 2 for one in readings] == [True, True]


@pytest.mark.parametrize(
    ("after", "gained", "holds"), [(0.59, 0.5, True), (0.61, 0.5, False), (0.59, 0.05, False), (0.45, 0.5, True)]
)
def test_the_claim_asks_for_half_of_the_advantage_and_for_bits(after, gained, holds):
    for temperatures in (("best temperature", "temperature 1"), ("temperature 1", "best temperature")):
        accuracy = dict(zip(temperatures, ([0.68, 0.72], [0.8, 0.8]), strict=True)) | {"one of 8": [after, after]}
        assert residual.claim(accuracy, {"bits_gained": gained, "standard_error": 0.05}) == holds


def test_what_is_kept_of_a_gain_is_a_share_of_it():
    measured = {"round 0": 10.0, "one of 8": 9.0, "round 1": 9.4}
    assert residual_distil.share_kept(measured, "round 1") == pytest.approx(0.6)
    assert residual_distil.share_kept(measured, "round 0") == 0
    assert residual_distil.share_kept({"round 0": 1.0, "one of 8": 1.0, "round 1": 0.5}, "round 1") == 0
