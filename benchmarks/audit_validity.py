"""How often is an audit wrong? Where nothing is to be found, and where the distance of the two laws is known.

* `end to end`: tiny transformers whose humans have the imitator's very law, one fresh model per world, audited by
  [`hf_imitate.audit`] with its default judges. Whatever is found is an error.
* `lora`: a judge of a fine-tuned transformer, on pairs of two different laws whose labels were swapped at random.
* `simulated`: scores without any signal, some of them ties: the sign test, the bound, and a bettor who stops at will.
* `known distance`: laws of total variation .1, .3 and .5 exactly, under the judge that is optimal for them.

An error rate holds if its count is not above what its level allows, with probability .999 (binomial). Levels, seeds
and sizes were fixed before the first run.
"""

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import binom
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_imitate import Imitator, audit
from hf_imitate.audits.checks import audit_checks
from hf_imitate.audits.consistency import audit_consistency
from hf_imitate.audits.distinguishability import judge_pairs, swap_within_pairs
from hf_imitate.audits.evidence import AnswerScores, Evidence
from hf_imitate.audits.hidden_deviation import audit_hidden_deviation
from hf_imitate.audits.judge_family import audit_distinguishability
from hf_imitate.audits.judges import lora_judge
from hf_imitate.audits.splits import split_questions
from hf_imitate.bounds import total_variation_lower_bound_paired
from hf_imitate.e_values import log_e_process, sign_test_p_value
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer

SEED = 2027
LEVEL, CERTAINTY, MOST_OFF = 0.05, 0.999, 0.1
WORLDS_PER_CELL, NUM_WORLD_QUESTIONS = 125, 80
SWAPS_PER_CELL, NUM_LORA_PAIRS = 10, 200
NUM_SIMULATED, NUM_SIMULATED_PAIRS = 10_000, 100
NUM_KNOWN, NUM_KNOWN_QUESTIONS = 1000, 160
DISTANCES = (0.1, 0.3, 0.5)
NOT_MEASURED = "calibration gap not measured"
CELLS: list[dict[str, Any]] = [
    *({"kind": "simulated", "share_tied": share} for share in (0.0, 0.4)),
    *({"kind": "known distance", "distance": t, "shape": s} for t in DISTANCES for s in ("disjoint", "overlapping")),
    *({"kind": "lora", "first": first} for first in range(0, 50, SWAPS_PER_CELL)),
    *({"kind": "end to end", "first": first} for first in range(0, 1000, WORLDS_PER_CELL)),
]
_WORDS = [first + second for first in "bdgm" for second in "aei"]
_END, _PAD = len(_WORDS), len(_WORDS) + 1
# Score of the optimal judge: who alone can have given this answer.
_SCORES = {"human only": 1.0, "likelier human": 1.0, "both": 0.0, "likelier imitator": -1.0, "imitator only": -1.0}


def run_cell(cell: dict[str, Any], num: int | None = None) -> dict[str, Any]:
    """Count errors; `num` replicates instead of the planned number, for tests."""
    if cell["kind"] == "simulated":
        return _simulated(cell["share_tied"], num or NUM_SIMULATED)
    if cell["kind"] == "known distance":
        return _known_distance(cell["distance"], cell["shape"], num or NUM_KNOWN)
    if cell["kind"] == "lora":
        return _lora(range(cell["first"], cell["first"] + (num or SWAPS_PER_CELL)))
    return _end_to_end(range(cell["first"], cell["first"] + (num or WORLDS_PER_CELL)))


def _simulated(share_tied: float, num: int) -> dict[str, Any]:
    rng = np.random.default_rng([SEED, 1, round(100 * share_tied)])
    margins = rng.normal(size=(num, NUM_SIMULATED_PAIRS))
    margins[rng.random(margins.shape) < share_tied] = 0.0
    wins, losses = (margins > 0).sum(axis=1), (margins < 0).sum(axis=1)
    correct = wins + (NUM_SIMULATED_PAIRS - wins - losses) / 2
    bound = cache(lambda count: total_variation_lower_bound_paired(count, NUM_SIMULATED_PAIRS, 1 - LEVEL))
    return {
        "num": num,
        "sign test": int((sign_test_p_value(wins, losses) <= LEVEL).sum()),
        "tv_lower": sum(bound(count) > 0 for count in correct.tolist()),
        "e-value, stopped at its best": int((log_e_process(np.sign(margins)).max(axis=1) >= -np.log(LEVEL)).sum()),
    }


def _known_distance(distance: float, shape: str, num: int) -> dict[str, Any]:
    """`disjoint`: common answers, and a share of each author's own: the most a judge can see at this distance.
    `overlapping`: both authors give both kinds of answers, one of them likelier for each."""

    def optimal(train: list[Pair], valid: list[Pair], seed: int) -> Any:
        return lambda prompts, answers: np.array([_SCORES[answer.text] for answer in answers])

    def is_not_the_imitators_kind(prompts, completions, completion_ids=None, **columns):
        return [not completion.endswith(("imitator only", "likelier imitator")) for completion in completions]

    t = distance
    if shape == "disjoint":
        laws = {"human": (("human only", "both"), (t, 1 - t)), "imitator": (("imitator only", "both"), (t, 1 - t))}
    else:
        kinds = ("likelier human", "likelier imitator")
        laws = {"human": (kinds, (0.5, 0.5)), "imitator": (kinds, (0.5 - t, 0.5 + t))}
    found = {"num": num, "tv_lower": 0, "check_tv_lower": 0, "hidden_deviation": 0, "consistency": 0, "rejected": 0}
    prompts = [f"question {number}" for number in range(NUM_KNOWN_QUESTIONS)]
    for replicate in range(num):
        rng = np.random.default_rng([SEED, 2, round(100 * t), shape == "disjoint", replicate])
        sides = {side: _answers(rng, *law) for side, law in laws.items()}
        # Half of the questions hold all of the distance.
        stated = np.where(rng.random(NUM_KNOWN_QUESTIONS) < 0.5, max(1 - 2 * t, 1e-9), 1.0)
        evidence = _evidence(prompts, sides["human"], sides["imitator"], np.log(stated))
        family = audit_distinguishability(evidence, {"optimal": optimal}, split_questions(prompts, replicate))
        checked = audit_checks(evidence, [is_not_the_imitators_kind], 1 - LEVEL)[-1]
        unique = _evidence(prompts, [Answer("both", True)] * len(prompts), sides["imitator"], np.log(stated))
        above = audit_hidden_deviation(unique, 1 - LEVEL, entropy="unique")[0]
        below = next(f for f in family.findings if f.name == "tv_lower/optimal")
        found["tv_lower"] += below.value > t
        found["check_tv_lower"] += checked.value > t
        found["hidden_deviation"] += above.value < t - 1e-9
        found["consistency"] += audit_consistency([below, checked, above])[0].value > 0
        found["rejected"] += family.p_values["optimal"]["p"] <= LEVEL
    return found


def _answers(rng: np.random.Generator, kinds: tuple[str, ...], law: tuple[float, ...]) -> list[Answer]:
    return [Answer(kinds[place], True) for place in rng.choice(len(kinds), NUM_KNOWN_QUESTIONS, p=law)]


def _evidence(prompts: list[str], human: list[Answer], imitator: list[Answer], nats: np.ndarray) -> Evidence:
    num = len(prompts)
    ones = np.ones(num)
    scores = AnswerScores(nats, nats, ones.astype(int), ones, ones, ones, np.zeros(num, bool))
    return Evidence(prompts, np.arange(num), human, imitator, scores, scores, ones)


def exact_power(distance: float, num_pairs: int) -> float:
    """Power of the sign test in the overlapping world: half of the pairs tie, 1/2 + t of the others win."""
    power = 0.0
    for untied in range(num_pairs + 1):
        needed = next((k for k in range(untied + 1) if binom.sf(k - 1, untied, 0.5) <= LEVEL), untied + 1)
        power += float(binom.pmf(untied, num_pairs, 0.5) * binom.sf(needed - 1, untied, 0.5 + distance))
    return power


def new_imitator(seed: int) -> Imitator:
    """A transformer of random weights over 12 words, that ends an answer at about every fourth word."""
    config = GPT2Config(
        vocab_size=_PAD + 1,
        n_positions=32,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.4,
        tie_word_embeddings=False,
        bos_token_id=_END,
        eos_token_id=_END,
        pad_token_id=_PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        # The first coordinate is 1 everywhere, so that its column of the head is a bias; the second is large after a
        # question of three words and small elsewhere, so that no answer is empty.
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0
        model.lm_head.weight[:, :2] = 0.0
        model.lm_head.weight[_END, 0], model.lm_head.weight[_PAD, 0] = 2.0, -40.0
        model.transformer.wpe.weight[2, 1] = 30.0
        model.lm_head.weight[_END, 1] = -8.0
    vocabulary = {word: i for i, word in enumerate([*_WORDS, "<end>", "<pad>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    return Imitator(model, tokenizer, max_new_tokens=16)


def _questions(seed: int, num: int) -> list[str]:
    every = [" ".join(words) for words in itertools.product(_WORDS, repeat=3)]
    return [every[number] for number in np.random.default_rng([SEED, 3, seed]).choice(len(every), num, replace=False)]


def _lora(swaps: range) -> dict[str, Any]:
    human, imitator = new_imitator(SEED), new_imitator(SEED + 1)
    questions = _questions(0, NUM_LORA_PAIRS)
    sides = [one.answer(questions, seed=SEED, batch_size=500) for one in (human, imitator)]
    pairs = [
        Pair(question, Answer(person[0], True), (Answer(machine[0], True),))
        for question, person, machine in zip(questions, *sides, strict=True)
    ]
    judge = lora_judge(imitator.model, imitator.tokenizer)
    p_values = []
    for swap in swaps:
        seen = judge_pairs(swap_within_pairs(pairs, SEED + swap), judge, name="lora", seed=swap, group_answers=False)
        wins = seen.accuracy * seen.num_pairs - seen.num_ties / 2
        p_values.append(float(sign_test_p_value(round(wins), seen.num_pairs - seen.num_ties - round(wins))))
    return {"num": len(swaps), "sign test, lora": sum(p <= LEVEL for p in p_values), "p_values": p_values}


def _end_to_end(worlds: range) -> dict[str, Any]:
    found: dict[str, Any] = {"num": len(worlds)}

    def count(name: str, is_wrong: bool) -> None:
        found[name] = found.get(name, 0) + bool(is_wrong)

    for world in worlds:
        imitator, questions = new_imitator(world), _questions(world, NUM_WORLD_QUESTIONS)
        humans = [drawn[0] for drawn in imitator.answer(questions, seed=SEED + world, batch_size=500)]
        rows = Dataset.from_dict({"prompt": questions, "completion": humans})
        report = audit(imitator, rows, seed=world, batch_size=500, output_dir=None, progress=False)
        judges = report.ledger["judges"]
        for name, values in judges.items():
            count(f"sign test, {name}", values["p"] <= LEVEL)
        count("any judge after Holm", min(values["p_holm"] for values in judges.values()) <= LEVEL)
        count("any certified bound", any(f.value > 0 for f in report.findings if f.name.startswith("tv_lower/")))
        count("any e-value of 20 k", any(report[f"e_value/{name}"].value >= len(judges) / LEVEL for name in judges))
        # A model that hardly ever ends an answer leaves too few for this one: "not measured".
        low, high = report["calibration_gap"].interval or (math.nan, math.nan)
        count("calibration gap misses 0", low > 0 or high < 0)
        count(NOT_MEASURED, math.isnan(low))
        count("sampler_match below 1", report["sampler_match"].value < 1)
        count("sampler_conformance", report["sampler_conformance"].value <= LEVEL)
    return found


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """One row per kind of error, and one per power."""
    errors: dict[tuple[str, str], tuple[int, int]] = {}
    rows, held = [], []
    for entry in results:
        cell, result = entry["cell"], entry["result"]
        where = cell["kind"]
        if where == "known distance":
            where = f"{cell['shape']}, distance {cell['distance']}"
        if where == "simulated":
            where = f"simulated, {cell['share_tied']:.0%} ties"
        for name, value in result.items():
            if name not in ("num", "p_values", "rejected", NOT_MEASURED):
                wrong, num = errors.get((where, name), (0, 0))
                left_out = result.get(NOT_MEASURED, 0) if name == "calibration gap misses 0" else 0
                errors[where, name] = wrong + value, num + result["num"] - left_out
    for (where, name), (wrong, num) in errors.items():
        # Two bounds of one report contradict each other at most as often as either is wrong; the others never may.
        level = {"consistency": 3 * LEVEL, "sampler_match below 1": 0.0}.get(name, LEVEL)
        most = int(binom.ppf(CERTAINTY, num, level))
        # A t interval: no exact level; twice the nominal one is not let pass.
        most = int(binom.ppf(CERTAINTY, num, 2 * LEVEL)) if name == "calibration gap misses 0" else most
        held.append(wrong <= most)
        rows.append(_row(where, name, num, wrong / num, level, most / num, held[-1]))
    for entry in results:
        cell, result = entry["cell"], entry["result"]
        if cell.get("shape") == "overlapping":
            exact, measured = (
                exact_power(cell["distance"], NUM_KNOWN_QUESTIONS // 2),
                result["rejected"] / result["num"],
            )
            slack = MOST_OFF * exact + 3 * np.sqrt(exact * (1 - exact) / result["num"])
            held.append(bool(abs(measured - exact) <= slack))
            where = f"overlapping, distance {cell['distance']}"
            rows.append(_row(where, "power, beside exact", result["num"], measured, exact, exact + slack, held[-1]))
    return rows, all(held)


def _row(where: str, what: str, num: int, rate: float, level: float, most: float, holds: bool) -> dict[str, Any]:
    values = {"replicates": num, "rate": float(rate), "level": float(level), "at most": float(most)}
    return {"world": where, "error": what, **values, "holds": holds}
