"""What is measured of an arm in the contest: fresh judges, bits of the law that is sampled from, and what it costs.

Sums are kept by groups of questions, at random but the same for all arms: that is all the bootstrap needs, so a cell's
numbers stay small enough to be kept in git, and arms are compared on the same questions.
"""

import math
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.worlds import contest_arms as arms
from benchmarks.worlds.contest_tasks import Task
from benchmarks.worlds.contest_training import DRAW_BATCH, Law, answers, load
from hf_imitate.audits.distinguishability import judgement_of, score_split
from hf_imitate.audits.judges import Judge, Scorer, lora_judge, ngram_judge
from hf_imitate.audits.splits import split_pairs, split_questions
from hf_imitate.causal_lm import load_causal_lm
from hf_imitate.e_values import sign_test_p_value
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer

JUDGES = ("ngram", "neural 0", "neural 1")  # and, where answers can be checked, "checker"
JUDGE_BATCH, TEST_SHARE, VALID_SHARE = 32, 0.4, 0.1  # a tenth chooses a judge's weights, the rest trains it
NUM_GROUPS = 40
POWER_SHARES, POWER_LEVEL, POWER_ASKED = (0.2, 0.1), 0.01, 0.1
NUM_ESTIMATES = 8  # of one-of-K's probability, inside the log
LONGEST_GRAM, NUM_COMPARED = 4, 300


def judges_of(task: Task) -> tuple[str, ...]:
    """Three that learn; and the check itself, where there is one."""
    return (*JUDGES, "checker") if task.checks else JUDGES


def kin(task: Task, questions: Sequence[str], humans: Sequence[str]) -> list[str]:
    """What may not stand on two sides of a judge's split, nor in two groups: puzzles of one grid; else a question."""
    return list(humans if task.is_grouped_by_answer else questions)


def groups(keys: Sequence[str]) -> np.ndarray:
    """The group of each key, by its text alone. [N]."""
    return np.array([zlib.crc32(key.encode()) % NUM_GROUPS for key in keys])


def by_group(values: np.ndarray, keys: Sequence[str]) -> list[list[float]]:
    """Sum and number of values in each group."""
    places = groups(keys)
    sums, counts = (np.bincount(places, weights, NUM_GROUPS) for weights in (values, None))
    return [[round(float(total), 2) for total in sums], counts.tolist()]


# --- judges


def judge(task: Task, name: str, folder: Path) -> Judge:
    """N-grams, the check, or a transformer that starts from a language model of its own: another seed, other rows."""
    if name == "ngram":
        return ngram_judge
    if name == "checker":
        return lambda train, valid, seed: (
            lambda asked, given: np.mean(
                [check(asked, [answer.text for answer in given]) for check in task.checks], axis=0
            )
        )
    number = int(name.split()[-1])
    base, tokenizer = load_causal_lm(arms.judge_body(task, number, folder), "cpu", None)
    num_steps, learning_rate, num_trainings = task.settings.judge
    once = lora_judge(
        base, tokenizer, full=True, num_steps=num_steps, batch_size=JUDGE_BATCH, learning_rate=learning_rate
    )
    return best_of(once, num_trainings)


def best_of(judge: Judge, num_trainings: int) -> Judge:
    """The training whose loss on the validation pairs is the smallest: now and then one learns nothing at all."""

    def train_judge(train: list[Pair], valid: list[Pair], seed: int) -> Scorer:
        scorers = [judge(train, valid, seed + 1000 * number) for number in range(num_trainings)]
        return min(scorers, key=lambda scorer: _loss(scorer, valid)) if num_trainings > 1 else scorers[0]

    return train_judge


def _loss(scorer: Scorer, pairs: list[Pair]) -> float:
    """Bradley and Terry's, nats."""
    asked = [pair.prompt for pair in pairs]
    margins = scorer(asked, [pair.human for pair in pairs]) - scorer(asked, [pair.imitator[0] for pair in pairs])
    return float(np.logaddexp(0, -margins).mean())


def pairs_of(rows: Dataset, given: Sequence[Answer]) -> list[Pair]:
    """The human's answer and the imitator's to each question."""
    return [
        Pair(question, Answer(human, True), (answer,))
        for question, human, answer in zip(rows["prompt"], rows["completion"], given, strict=True)
    ]


def judged(task: Task, pairs: list[Pair], name: str, folder: Path) -> dict[str, Any]:
    """One judge, trained afresh on some of the questions and asked about others; rows alone decide which."""
    seed = judges_of(task).index(name)
    asked = [pair.prompt for pair in pairs]
    if task.is_grouped_by_answer:
        split = split_pairs(pairs, seed, TEST_SHARE, VALID_SHARE, [pair.human.text for pair in pairs], False)
    else:
        split = split_questions(asked, seed, TEST_SHARE, VALID_SHARE).take(pairs)
    scores = score_split(split, judge(task, name, folder), name, seed)
    margins = np.array([human[0] - imitator[0] for human, imitator in scores.test])
    wins = (margins > 0) + 0.5 * (margins == 0)
    seen = judgement_of(split, scores, name)
    return {
        "accuracy": round(seen.accuracy, 4),
        "bits": round(seen.bits, 4),
        "p": float(sign_test_p_value((margins > 0).sum(), (margins < 0).sum())),
        "wins": by_group(wins, kin(task, *zip(*((pair.prompt, pair.human.text) for pair in split.test), strict=True))),
    }


def power(task: Task, rows: Dataset, folder: Path) -> dict[str, Any]:
    """Whether each judge notices an imitator who *is* the human but for a share of answers that no human gives.

    Equal answers are ties, which teach and test nothing. Who does not notice a tenth cannot tell, and is left out of
    the verdict.
    """
    asked, humans = rows["prompt"][:], rows["completion"][:]
    order = np.random.default_rng(0).permutation(len(asked))
    found = {}
    for name in judges_of(task):
        seen = {}
        for share in POWER_SHARES:
            given = list(humans)
            for place in order[: round(share * len(asked))]:
                given[place] = task.misfit(asked[place], humans[place])
            seen[share] = judged(task, pairs_of(rows, [Answer(text, True) for text in given]), name, folder)
        noticed = [share for share, one in seen.items() if one["p"] < POWER_LEVEL]
        found[name] = {
            "accuracy": {f"{share:g}": one["accuracy"] for share, one in seen.items()},
            "p": {f"{share:g}": one["p"] for share, one in seen.items()},
            "smallest": min(noticed) if noticed else None,
            "notices": POWER_ASKED in noticed,
        }
    return found


# --- bits, variety and the rest


def log_prob(
    task: Task, law: Law, imitator: Any, asked: list[str], texts: list[str], seed: int = 0
) -> tuple[np.ndarray, float]:
    """Nats of these answers under the law that is sampled from, and how far they are too low in the mean."""
    if law.resample == 1:
        found = imitator.log_prob(asked, texts, temperature=law.temperature, batch_size=DRAW_BATCH)
        return found.nats.numpy(), 0.0
    of_k = imitator.residual(law.resample, list(task.checks) or None, task.max_tokens, law.temperature)
    seen = of_k.log_prob(asked, texts, seed=seed, num_estimates=NUM_ESTIMATES, batch_size=DRAW_BATCH)
    return seen.nats.numpy(), float(seen.log_bias.mean())


def self_bleu(texts: Sequence[Sequence[int]]) -> float:
    """Mean BLEU of each text against all the others: how alike they are.

        exp( mean over n = 1..4 of log  sum_g min(c_own(g), max over others c(g)) / sum_g c_own(g) )

    with the n-grams g of the text; a sum of 0 counts as 1/2 (Lin and Och's smoothing), and texts shorter than n are
    asked for shorter ones alone. Among so many others one is as long, so there is no brevity penalty.
    """
    logs: list[list[float]] = [[] for _ in texts]
    for n in range(1, LONGEST_GRAM + 1):
        own = [Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for text in texts]
        largest: dict[tuple[int, ...], list[int]] = {}
        for counts in own:
            for gram, count in counts.items():
                # Of the two largest counts the text's own is left out.
                largest[gram] = sorted([*largest.get(gram, [0, 0]), count])[-2:]
        for place, counts in enumerate(own):
            total = sum(counts.values())
            if total:
                best = {g: largest[g][0] if largest[g][1] == c else largest[g][1] for g, c in counts.items()}
                known = sum(min(count, best[gram]) for gram, count in counts.items())
                logs[place].append(math.log(max(known, 0.5) / total))
    return float(np.mean([math.exp(np.mean(own)) for own in logs if own]))


def measured(task: Task, law: Law, rows: Dataset, scored: int, folder: Path, seed: int) -> dict[str, Any]:
    """Everything about one law on these rows: judges on all of them, bits and the oracle on the first `scored`."""
    begun = time.process_time()
    imitator = load(task, law.path)
    asked, humans = rows["prompt"][:], rows["completion"][:]
    given = answers(task, law, asked, 1000 + seed, imitator)
    pairs = pairs_of(rows, given)
    nats, bias = log_prob(task, law, imitator, asked[:scored], humans[:scored])
    bits = -nats / math.log(2)
    ids = [task.tokenizer()(texts)["input_ids"] for texts in (humans, [answer.text for answer in given])]
    keys = kin(task, asked, humans)[:scored]
    found: dict[str, Any] = {
        "judges": {name: judged(task, pairs, name, folder) for name in judges_of(task)},
        "bits": round(float(bits.mean()), 4),
        "bias": round(-bias / math.log(2), 4),
        "bits_by_group": by_group(bits, keys),
        "length": round(sum(map(len, ids[1])) / sum(map(len, ids[0])), 4),
        "cut": round(float(np.mean([not answer.ended for answer in given])), 4),
        "self_bleu": round(self_bleu(ids[1][:NUM_COMPARED]), 4),
        "self_bleu_of_humans": round(self_bleu(ids[0][:NUM_COMPARED]), 4),
    }
    if task.checks:
        passed = task.checks[0](asked, [answer.text for answer in given])
        found["passed"] = round(float(np.mean(passed)), 4)
    if task.oracle:
        found |= task.oracle(
            rows.select(range(scored)),
            given[:scored],
            lambda prompts, texts: log_prob(task, law, imitator, prompts, texts, 1)[0],
        )
    return found | {"seconds": round(time.process_time() - begun, 1)}
