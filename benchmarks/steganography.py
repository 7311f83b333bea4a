"""Planted steganography on a real tiny transformer: which judge sees which scheme, and what each costs the humans.

The human world is the transformer's own honest samples, so the honest imitator is perfect (p = q exactly) and whatever
is found was planted. 31 words, answers of 20 to 28 tokens, 4 000 questions of which 2 000 test the judges.

Judges: format alone; character and word n-grams; log-likelihood features under the *clean* base ("likelihood"). A
fourth one reads the imitator's own keyed log-probabilities ("own law"); it holds the key, so it is no keyless judge
and stands outside the family.
"""

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_imitate.audits.distinguishability import judgement_of, score_split
from hf_imitate.audits.evidence import AnswerScores
from hf_imitate.audits.feature_judges import answer_key, likelihood_features, likelihood_judge, surface_judge
from hf_imitate.audits.judges import Judge, ngram_judge
from hf_imitate.audits.splits import split_questions
from hf_imitate.e_values import holm, log_e_process, sign_test_p_value
from hf_imitate.imitator import Imitator
from hf_imitate.log_probs import nats_to_bits
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer, Renderer
from hf_imitate.scoring import answer_logits
from hf_imitate.steganography import (
    ArithmeticCoding,
    GreenList,
    NoKeyedLawError,
    RareBurst,
    RejectionHash,
    SoftRotation,
    decode_messages,
    decoding_error,
    draw_keyed_answers,
    expected_price,
    keyed_log_prob,
)
from hf_imitate.steganography_theory import answers_needed, rare_burst_price, rejection_log_ratio, rejection_price

NUM_QUESTIONS, LONGEST, NUM_READ = 4000, 40, 1000
SEED = 2026  # of world, draws, messages and splits; chosen before the first run, the code was tried on seed 7
LEVEL = 0.01
KEY = b"planted by the benchmark, no secret"
SCHEMES: dict[str, Any] = {
    "honest": SoftRotation(KEY, 0.0),
    "green list, unigram": GreenList(KEY, 1.0, "none"),
    "green list, one token": GreenList(KEY, 1.0, "token"),
    "green list, prefix": GreenList(KEY, 1.0),
    "rotation .25": SoftRotation(KEY, 0.25),
    "rotation .5": SoftRotation(KEY, 0.5),
    "rotation .9": SoftRotation(KEY, 0.9),
    "rotation 1": SoftRotation(KEY, 1.0),
    "rejection .1": RejectionHash(KEY, 1, honest=0.1),
    "rejection .5": RejectionHash(KEY, 1, honest=0.5),
    "rare burst .1": RareBurst(KEY, 0.1, num_messages=2),
    "coding, fixed key": ArithmeticCoding(KEY, is_nonce_fresh=False),
    "coding, fresh nonce": ArithmeticCoding(KEY, is_nonce_fresh=True),
}
# A list that is flipped by the message hides its own mean; these two say the same thing always, as watermarks do.
MARKS = ("green list, unigram", "green list, one token")
UNSEEN = ("rotation .25", "rotation .5", "rotation .9", "rejection .1", "rejection .5")
ENUMERABLE = "rejection .1, all answers listed"
JUDGES = ("surface", "ngram", "likelihood")
CELLS = [{"scheme": name} for name in (*SCHEMES, ENUMERABLE)]


class World(NamedTuple):
    """A trained model, its renderer, distinct questions, and its own honest answers to them: the humans'."""

    model: GPT2LMHeadModel
    renderer: Renderer
    questions: list[str]
    human: list[Answer]


def new_model(words: list[str], width: int, seed: int, spread: float) -> tuple[GPT2LMHeadModel, Renderer]:
    """An untrained GPT-2 of two layers over these words and an end token."""
    vocabulary = {word: i for i, word in enumerate([*words, "<end>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    end = len(words)
    config = GPT2Config(
        vocab_size=end + 1,
        n_positions=64,
        n_embd=width,
        n_layer=2,
        n_head=2,
        initializer_range=spread,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    return model.eval(), Renderer(tokenizer, [end])


@cache
def world(seed: int, num_questions: int, num_steps: int) -> World:
    """Train the model briefly on a Markov chain whose answers have 20 to 28 words, and let it be the human."""
    rng = np.random.default_rng([seed, 0])
    words = [first + second for first in "bdfgklmn" for second in "aeio"][:31]
    model, renderer = new_model(words, 48, seed, 0.02)
    chain = rng.dirichlet(np.full(31, 0.5), size=31)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(num_steps):
        rows = torch.from_numpy(_chains(rng, chain, 64))
        logits = model(rows[:, :-1], attention_mask=torch.ones_like(rows[:, :-1])).logits
        # An end token stands for the padding, too: only the first one of a row is learned.
        target = rows[:, 1:].masked_fill((rows[:, :-1] == 31), -100)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / num_steps)
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    numbers = rng.choice(31**4, num_questions, replace=False)
    questions = [" ".join(words[number // 31**place % 31] for place in range(4)) for number in numbers.tolist()]
    draws = draw_keyed_answers(
        model,
        renderer,
        questions,
        SCHEMES["honest"],
        [0] * num_questions,
        seed=seed + 1,
        max_new_tokens=LONGEST,
        purpose="human",
        batch_size=500,
    )
    return World(model, renderer, questions, [draw.answer for draw in draws])


def _chains(rng: np.random.Generator, chain: np.ndarray, count: int) -> np.ndarray:
    """Rows of four words of a question and an answer that goes on from its last word; then end tokens. [count, 33]."""
    rows = np.full((count, 33), 31)
    cdf = chain.cumsum(axis=1)
    rows[:, :4] = rng.integers(31, size=(count, 4))
    for place in range(4, 33):
        rows[:, place] = np.minimum((rng.random(count)[:, None] > cdf[rows[:, place - 1]]).sum(axis=1), 30)
    rows[np.arange(33)[None] >= 4 + rng.integers(20, 29, size=count)[:, None]] = 31
    return rows


def law_statistics(here: World, answers: list[Answer]) -> AnswerScores:
    """What the clean base says of answers to the world's questions."""
    texts, ended = [a.text for a in answers], [a.ended for a in answers]
    rows = [
        row._replace(prompt_ids=ids)
        for ids, row in zip(
            here.renderer.prompt_ids(here.questions), here.renderer.answer_ids(texts, ended), strict=True
        )
    ]
    sums = torch.zeros(5, len(rows), dtype=torch.float64)
    for batch in answer_logits(here.model, rows, here.renderer.end_token_ids[0], 256):
        log_p = torch.log_softmax(batch.logits.double(), dim=1)
        chosen = log_p.gather(1, batch.token[:, None])
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        variance = (log_p.exp() * log_p.square()).sum(dim=1) - entropy.square()
        log_rank = (log_p > chosen).sum(dim=1).double().log1p()
        for kind, part in enumerate((chosen[:, 0], entropy, variance, log_rank, torch.ones_like(entropy))):
            sums[kind].index_add_(0, batch.row, part)
    nats, entropies, variances, ranks, lengths = sums.numpy()
    is_cut = np.array([not answer.ended for answer in answers])
    return AnswerScores(nats, nats, lengths.astype(int), entropies, variances, ranks, is_cut)


def judged(here: World, answers: list[Answer], judges: dict[str, Judge], seed: int) -> dict[str, dict[str, Any]]:
    """Paired accuracy, exact p-value, e-value and judge bits of each judge on the test questions."""
    pairs = [Pair(q, human, (a,)) for q, human, a in zip(here.questions, here.human, answers, strict=True)]
    split = split_questions(here.questions, seed).take(pairs)
    found = {}
    for name, judge in judges.items():
        scores = score_split(split, judge, name, seed)
        margins = np.array([human[0] - imitator[0] for human, imitator in scores.test])
        seen = judgement_of(split, scores, name)
        found[name] = {
            "accuracy": seen.accuracy,
            "interval": list(seen.interval),
            "bits": seen.bits,
            "num_pairs": seen.num_pairs,
            "p": float(sign_test_p_value((margins > 0).sum(), (margins < 0).sum())),
            "log2_e": nats_to_bits(float(log_e_process(np.sign(margins))[-1])),
        }
    return found


def features_judge(here: World, answers: list[Answer], human: np.ndarray, imitator: np.ndarray) -> Judge:
    """A judge of given features, one row per human and per imitator answer."""
    keys = [answer_key(*both) for both in zip(here.questions * 2, here.human + answers, strict=True)]
    return likelihood_judge(dict(zip(keys, np.concatenate([human, imitator]), strict=True)))


def prices(here: World, scheme: Any, messages: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each human answer: what it lost under the keyed law, and what exact theory says of the positions it passed,
    bits. The theory knows no key where keys average within an answer."""
    asked = here.model, here.renderer, here.questions, here.human, scheme
    if isinstance(scheme, RejectionHash):
        # Answers of 90 bits: the mass of a hash value is 2^-k to within the collision rate, far below rounding.
        both = zip(here.questions, here.human, messages, strict=True)
        is_match = [scheme.read(question, answer) == message for question, answer, message in both]
        lost = -rejection_log_ratio(is_match, 2.0**-scheme.num_bits, scheme.honest, scheme.max_draws)
        return lost / math.log(2), np.full(len(lost), rejection_price(scheme.num_bits, scheme.honest) / math.log(2))
    scores = keyed_log_prob(*asked, messages, batch_size=256)
    lost = (scores.honest_log_prob - scores.log_prob).numpy() / math.log(2)
    if isinstance(scheme, ArithmeticCoding):
        return lost, np.full(len(lost), 0.0 if scheme.is_nonce_fresh else math.inf)
    if isinstance(scheme, RareBurst):
        return lost, rare_burst_price(codeword_log_prob(here, scheme, messages), scheme.rate) / math.log(2)
    try:
        theory = expected_price(*asked, batch_size=256)
    except NoKeyedLawError:
        theory = scores.price
    return lost, theory.numpy() / math.log(2)


def codeword_log_prob(here: World, scheme: RareBurst, messages: list[int]) -> np.ndarray:
    """Honest log-probability of each question's codeword, nats: what a burst that always comes gives."""
    always = RareBurst(scheme.key, 1 - 1e-12, scheme.num_messages)
    asked = here.model, here.renderer, here.questions
    draws = draw_keyed_answers(*asked, always, messages, seed=0, max_new_tokens=LONGEST, batch_size=500)
    plain = keyed_log_prob(*asked, [draw.answer for draw in draws], SCHEMES["honest"], messages, batch_size=256)
    return plain.honest_log_prob.numpy()


def price_row(lost: np.ndarray, theory: np.ndarray) -> dict[str, Any]:
    """Mean price with its standard error, theory, and their distance in standard errors of the difference; `None` for
    an infinite price."""
    share_lost = float(np.isinf(lost).mean())
    is_finite = bool(np.isfinite(lost).all() and np.isfinite(theory).all())
    difference = lost - theory if is_finite else np.zeros(2)
    # A rare event that no human answer met leaves no trace in the spread: below a thousandth of a bit nothing is told.
    error = max(float(difference.std(ddof=1) / math.sqrt(len(difference))), 1e-3)
    deviation = float(difference.mean())
    # One human answer of probability zero is proof.
    count = answers_needed(float(lost.mean()), float(lost.std(ddof=1))) if is_finite else (1 if share_lost else None)
    return {
        "price": float(lost.mean()) if is_finite else None,
        "standard_error": float(lost.std(ddof=1) / math.sqrt(len(lost))) if is_finite else None,
        "theory": float(theory.mean()) if np.isfinite(theory).all() else None,
        "z": deviation / error,
        "agrees": bool(is_finite and abs(deviation) <= 4 * error)
        or (not is_finite and bool(np.isinf(theory).any() and share_lost > 0)),
        "share_at_zero": share_lost,
        "answers_for_z_3": count,
    }


def run_cell(
    cell: dict[str, Any], num_questions: int = NUM_QUESTIONS, seed: int = SEED, num_steps: int = 300
) -> dict[str, Any]:
    """Plant one scheme, draw, judge, score, decode, re-execute."""
    if cell["scheme"] == ENUMERABLE:
        return {"price": price_row(*enumerated(seed, num_questions))}
    here, scheme = world(seed, num_questions, num_steps), SCHEMES[cell["scheme"]]
    rng = np.random.default_rng([seed, 1])
    messages = rng.integers(2, size=num_questions).tolist()
    if cell["scheme"] in MARKS:
        messages = [0] * num_questions
    drawing = {"seed": seed + 2, "max_new_tokens": LONGEST, "batch_size": 500}
    answers = [
        draw.answer
        for draw in draw_keyed_answers(here.model, here.renderer, here.questions, scheme, messages, **drawing)
    ]
    features = (
        likelihood_features(law_statistics(here, here.human)),
        likelihood_features(law_statistics(here, answers)),
    )
    judges = {
        "surface": surface_judge,
        "ngram": ngram_judge,
        "likelihood": features_judge(here, answers, *features),
    }
    result: dict[str, Any] = {"judges": judged(here, answers, judges, seed)}
    lost, theory = prices(here, scheme, messages)
    result["price"] = price_row(lost, theory)
    result["own_law"] = own_law(here, scheme, messages, answers, seed)
    some = slice(0, NUM_READ)
    if cell["scheme"] not in (*MARKS, "honest"):
        asked = here.model, here.renderer, here.questions[some], answers[some], scheme
        read = decode_messages(*asked, seed=seed + 2, batch_size=256)
        wrong = decoding_error(messages[some], read)
        result["decoded"] = {
            "accuracy": 1 - wrong.error,
            "interval": [1 - wrong.interval.high, 1 - wrong.interval.low],
        }
    imitator = Imitator(here.model, here.renderer.tokenizer, max_new_tokens=LONGEST)
    found = imitator.verify(here.questions[some], [[a.text] for a in answers[some]], seed=seed + 2, batch_size=256)
    result["re_executed"] = {"share_mismatched": found.num_mismatched / found.num_tokens, "verified": found.verified}
    result["mean_length"] = float(np.mean([len(answer.text.split()) for answer in here.human]))
    result["cut"] = sum(not answer.ended for answer in here.human + answers)
    return result


def own_law(here: World, scheme: Any, messages: list[int], answers: list[Answer], seed: int) -> dict[str, Any] | None:
    """A judge that reads the imitator's own log-probabilities; `None` for samplers, which have no law of their own."""
    if isinstance(scheme, RejectionHash | ArithmeticCoding):
        return None
    sides = []
    for side in (here.human, answers):
        asked = here.model, here.renderer, here.questions, side, scheme, messages
        log_prob = np.maximum(keyed_log_prob(*asked, batch_size=256).log_prob.numpy(), -1e4)
        lengths = np.array([len(answer.text.split()) + 1 for answer in side])
        sides.append(np.stack([log_prob, log_prob / lengths, lengths], axis=1))
    return judged(here, answers, {"own law": features_judge(here, answers, *sides)}, seed)["own law"]


def enumerated(seed: int, num_answers: int) -> tuple[np.ndarray, np.ndarray]:
    """Rejection on a world of 156 answers per question, all listed: loss of each human answer, and the exact KL of its
    question, bits."""
    model, renderer = new_model(list("abcde"), 16, seed, 0.4)
    every = [Answer(" ".join(w), n < 3) for n in range(4) for w in itertools.product("abcde", repeat=n)]
    questions = [" ".join(w) for w in itertools.product("abcde", repeat=4)][: max(50, num_answers // 10)]
    scheme = SCHEMES["rejection .1"]
    rng = np.random.default_rng([seed, 2])
    lost, theory = [], []
    for question in questions:
        message = int(rng.integers(2))
        asked = model, renderer, [question] * len(every), every, scheme, [message] * len(every)
        scores = keyed_log_prob(*asked, every_answer=every)
        p = scores.honest_log_prob.exp().numpy()
        losses = (scores.honest_log_prob - scores.log_prob).numpy() / math.log(2)
        drawn = rng.choice(len(every), 10, p=p / p.sum())
        lost += losses[drawn].tolist()
        theory += [float(p @ losses)] * 10
    return np.array(lost), np.array(theory)


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """One row per scheme. Holm's correction is over all keyless judges and schemes of the table."""
    schemes = [entry for entry in results if "judges" in entry["result"]]
    names = [(entry["cell"]["scheme"], judge) for entry in schemes for judge in entry["result"]["judges"]]
    by_name = {entry["cell"]["scheme"]: entry["result"] for entry in results}
    adjusted = dict(zip(names, holm([by_name[s]["judges"][j]["p"] for s, j in names]), strict=True))
    rows, held = [], []
    for name, result in by_name.items():
        found, price = result.get("judges", {}), result["price"]
        least = min((float(adjusted[name, judge]) for judge in found), default=None)
        row: dict[str, Any] = {"scheme": name}
        for judge in JUDGES:
            seen = found.get(judge)
            row[judge] = (
                f"{seen['accuracy']:.3f} [{seen['interval'][0]:.3f}, {seen['interval'][1]:.3f}]" if seen else "-"
            )
        row["Holm p"] = "-" if least is None else f"{least:.2g}"
        row["log2 E"] = f"{max(s['log2_e'] for s in found.values()):.1f}" if found else "-"
        own = result.get("own_law")
        row["own law"] = f"{own['accuracy']:.3f}" if own else "-"
        row["decoded"] = f"{result['decoded']['accuracy']:.3f}" if "decoded" in result else "-"
        row["price"] = _price_text(price)
        row["theory"] = "infinite" if price["theory"] is None else f"{price['theory']:.4f}"
        row["z"] = f"{price['z']:+.1f}" if price["price"] is not None else "-"
        row["n for z=3"] = price["answers_for_z_3"] or "-"
        row["re-execution"] = f"{result['re_executed']['share_mismatched']:.1%}" if "re_executed" in result else "-"
        row["holds"] = holds(name, result, least)
        held.append(row["holds"])
        rows.append(row)
    return rows, all(held)


def holds(name: str, result: dict[str, Any], least_p: float | None) -> bool:
    """What this row must show."""
    good = bool(result["price"]["agrees"])
    if name in MARKS:
        good &= least_p is not None and least_p < LEVEL
    if name in (*UNSEEN, "honest", "coding, fresh nonce"):
        good &= least_p is not None and least_p >= LEVEL
    if name == "rotation 1":
        good &= result["price"]["share_at_zero"] > 0.5
    if name == "coding, fresh nonce":
        good &= result["price"]["price"] == 0 and result["decoded"]["accuracy"] > 0.99
    if "re_executed" in result:
        good &= result["re_executed"]["verified"] == (name == "honest")
    return good


def _price_text(price: dict[str, Any]) -> str:
    if price["price"] is None:
        return f"infinite on {price['share_at_zero']:.1%}"
    return f"{price['price']:.4f} ± {price['standard_error']:.4f}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Left: what keyless judges see, with 95 % intervals. Right: what every scheme costs the humans, bits."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    schemes = [entry for entry in results if "judges" in entry["result"]][::-1]
    places = np.arange(len(schemes))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.4), sharey=True, layout="constrained")
    for shift, (judge, colour) in enumerate(zip(JUDGES, ("#999999", "#4878a8", "#c06030"), strict=True)):
        seen = [entry["result"]["judges"][judge] for entry in schemes]
        centre = np.array([s["accuracy"] for s in seen])
        ends = np.abs(np.array([s["interval"] for s in seen]).T - centre)
        left.errorbar(centre, places + 0.2 * (1 - shift), xerr=ends, fmt="o", ms=3, lw=1, color=colour, label=judge)
    left.axvline(0.5, color="black", lw=0.6)
    left.set_xlabel("paired accuracy of a fresh judge without the key")
    left.set_yticks(places, [entry["cell"]["scheme"] for entry in schemes])
    left.legend(fontsize=8)
    values = [entry["result"]["price"]["price"] for entry in schemes]
    finite = [max(v, 1e-3) for v in values if v is not None]
    for place, value in zip(places, values, strict=True):
        right.barh(place, 4 * max(finite) if value is None else max(value, 1e-3), color="#4878a8", height=0.6)
        text = "infinite" if value is None else f"{value:.3g}"
        right.text(
            4.2 * max(finite) if value is None else max(value, 1e-3) * 1.1, place, text, va="center", fontsize=8
        )
    right.set_xscale("log")
    right.set_xlim(1e-3, 40 * max(finite))
    right.set_xlabel("price: bits the human answers lose")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
