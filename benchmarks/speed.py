"""What doing it right costs: our steps, scores and draws beside those of TRL and lm-evaluation-harness.

One model (3.4 million weights, it has read docstrings), the same rows, batches and steps, fp32, one torch thread; CPU
seconds of one process in which all take turns; totals over totals with 95 % intervals ([`worlds.speed`]). A target is
met where the worse end of the interval meets it.
"""

import contextlib
import functools
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import GenerationConfig, Trainer, TrainerState

from benchmarks import agreement
from benchmarks.worlds import speed as world
from benchmarks.worlds import speed_trainers as arms
from benchmarks.worlds.speed import Ratio, Shape
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.latent_draws import Continuation, sequence_log_probs
from hf_imitate.pairs import Learner, Pair
from hf_imitate.rendering import Renderer, end_token_ids
from hf_imitate.sampling import draw_answers
from hf_imitate.scoring import score_answers
from hf_imitate.sparing_head import SparingHead
from hf_imitate.thoughts import ThoughtLaw


class Sizes(NamedTuple):
    """How much of everything."""

    shape: Shape = world.FULL
    rows: int = 1200
    steps: int = 63
    skipped: int = 3
    repeats: int = 15
    unique: int = 400
    questions: tuple[int, int] = (16, 5)  # of 15 and of 128 tokens, 16 answers each
    drawn: tuple[int, int] = (64, 24)  # answers, tokens of each


FULL = Sizes()
TINY = Sizes(world.TINY, rows=48, steps=3, skipped=1, repeats=2, unique=12, questions=(2, 1), drawn=(4, 4))

CELLS: list[dict[str, Any]] = [
    {"what": "adversarial", "seed": 1},
    {"what": "retrodictive", "seed": 1},
    {"what": "reward", "seed": 1},
    {"what": "scoring", "question": "as they are", "answers": 1},
    {"what": "scoring", "question": "15 tokens", "answers": 16},
    {"what": "scoring", "question": "128 tokens", "answers": 16},
    {"what": "latent", "thoughts": 8},
    {"what": "drawing"},
    {"what": "profile"},
]

GRPO, SFT = "GRPO, frozen reward model", "SFT"
# comparison, ours, theirs, the bound of ours / theirs (or of theirs / ours where it says how often as fast)
TARGETS: dict[str, list[tuple[str, str, float, bool]]] = {
    "adversarial": [
        ("adversarial, retrodictive_coef=0", GRPO, 1.12, False),
        ("adversarial, retrodictive_coef=1", GRPO, 1.20, False),
        ("adversarial, retrodictive_coef=0, all generations", GRPO, 1.22, False),
        ("adversarial, retrodictive_coef=0, all generations, no replay", GRPO, 1.22, False),
        ("adversarial, retrodictive_coef=1", f"{GRPO}, TRL's defaults", 1.15, True),
    ],
    "retrodictive": [("retrodictive", SFT, 1.05, False), ("retrodictive", f"{SFT}, TRL's defaults", 1.7, True)],
    "reward": [("distinguisher's update, 8 pairs", "RewardTrainer, 8 pairs", 1.0, False)],
    "as they are": [("log-probabilities, unique pairs", "lm-evaluation-harness", 1.3, True)],
    "15 tokens": [("log-probabilities, 16 answers to 15 tokens", "lm-evaluation-harness", 1.7, True)],
    "128 tokens": [("log-probabilities, 16 answers to 128 tokens", "lm-evaluation-harness", 6.5, True)],
    "latent": [("8 thoughts, question read once", "token-count bound", 1.15, False)],
    "drawing": [("draws by committed seed", "plain generate", 1.10, False)],
}
DIFFERENCE = 1e-4  # nats


def run_cell(cell: dict[str, Any], sizes: Sizes = FULL, folder: Path = world.PARTS) -> dict[str, Any]:
    """Measure one comparison."""
    arms.quietly()
    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "adversarial": adversarial,
        "retrodictive": retrodictive,
        "reward": reward,
        "scoring": scoring,
        "latent": latent,
        "drawing": drawing,
        "profile": profile,
    }
    with contextlib.redirect_stdout(io.StringIO()), world.one_thread():
        base = world.base(sizes.shape, folder)
        rows = world.docstrings().select(range(sizes.rows))
        return measures[cell["what"]](base, rows, sizes, **{k: v for k, v in cell.items() if k != "what"})


def adversarial(base: Path, rows: Dataset, sizes: Sizes, seed: int) -> dict[str, Any]:
    """One generation batch, its rewards, and one step, against GRPO paid by a frozen reward model of the same size."""
    make = functools.partial(arms.adversarial, base, rows, sizes.steps, **arms.EQUAL)
    everything = {"retrodictive_coef": 0.0, "distinguisher_generations": arms.GENERATIONS}
    makers = {
        GRPO: arms.grpo(base, rows, sizes.steps, **arms.EQUAL),
        "adversarial, retrodictive_coef=0": make(retrodictive_coef=0.0),
        "adversarial, retrodictive_coef=1": make(retrodictive_coef=1.0),
        "adversarial, retrodictive_coef=0, all generations": make(**everything),
        "adversarial, retrodictive_coef=0, all generations, no replay": make(**everything, replay_ratio=0.0),
        f"{GRPO}, TRL's defaults": arms.grpo(base, rows, sizes.steps),
    }
    return {"seconds": world.seconds_per_step(makers, sizes.skipped, seed)}


def retrodictive(base: Path, rows: Dataset, sizes: Sizes, seed: int) -> dict[str, Any]:
    """One step of likelihood. Ours is at its defaults, which on a CPU are fp32 and nothing computed twice."""
    makers = {
        SFT: arms.sft(base, rows, sizes.steps, **arms.EQUAL),
        "retrodictive": arms.retrodictive(base, rows, sizes.steps),
        f"{SFT}, TRL's defaults": arms.sft(base, rows, sizes.steps),
    }
    return {"seconds": world.seconds_per_step(makers, sizes.skipped, seed)}


class LearnerSteps:
    """Updates of a distinguisher on the human's answers and others', as something that takes turns with trainers."""

    def __init__(self, base: Path, rows: Dataset, steps: int):
        model, tokenizer = world.load(base)
        self.learner = Learner(Distinguisher.from_causal_lm(model, tokenizer, peft_config=arms.lora()), 1e-6)
        renderer = self.learner.distinguisher.renderer
        read = [renderer.read(row.answer_ids) for row in renderer.human(rows["prompt"][:], rows["completion"][:])]
        self.pairs = [Pair(q, a, (b,)) for q, a, b in zip(rows["prompt"][:], read, read[1:] + read[:1], strict=True)]
        self.steps, self.callbacks = steps, list[Any]()

    def add_callback(self, callback: Any) -> None:
        """As of a trainer."""
        self.callbacks.append(callback)

    def train(self) -> None:
        """As of a trainer."""
        state = TrainerState()
        for callback in self.callbacks:
            callback.on_train_begin(None, state, None)
        for step in range(self.steps):
            first = 8 * step % (len(self.pairs) - 8)
            self.learner.step(self.pairs[first : first + 8])
            state.global_step = step + 1
            for callback in self.callbacks:
                callback.on_step_end(None, state, None)


def reward(base: Path, rows: Dataset, sizes: Sizes, seed: int) -> dict[str, Any]:
    """The distinguisher's update against a step of TRL's reward model, on equally many pairs."""
    answers = rows["completion"][:]
    pairs = Dataset.from_dict({"prompt": rows["prompt"][:], "chosen": answers, "rejected": answers[1:] + answers[:1]})
    makers: dict[str, Callable[[], Trainer | LearnerSteps]] = {
        "RewardTrainer, 8 pairs": arms.reward(base, pairs, sizes.steps, **arms.EQUAL),
        "distinguisher's update, 8 pairs": lambda: LearnerSteps(base, rows, sizes.steps),
    }
    return {"seconds": world.seconds_per_step(makers, sizes.skipped, seed)}


def scoring(base: Path, rows: Dataset, sizes: Sizes, question: str, answers: int) -> dict[str, Any]:
    """Log-probabilities of given answers, tokenising included, without the end token, which the harness scores not."""
    model, tokenizer = world.load(base)
    pairs = _pairs(rows, tokenizer, sizes, question, answers)
    harness, request = agreement.harness()
    judge = harness(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=16)
    renderer = Renderer(tokenizer, end_token_ids(tokenizer, model.generation_config), None)

    def theirs() -> list[float]:
        asked = [request("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
        return [nats for nats, _ in judge.loglikelihood(asked, disable_tqdm=True)]

    def ours() -> list[float]:
        human = renderer.human([q for q, _ in pairs], [a for _, a in pairs])
        open_ended = [row._replace(answer_ids=row.answer_ids[:-1], ended=False) for row in human]
        return score_answers(model, open_ended, tokenizer.pad_token_id).tolist()

    differences = [abs(a - b) for a, b in zip(ours(), theirs(), strict=True)]
    name = TARGETS[question][0][0]
    seconds = world.seconds_of({"lm-evaluation-harness": theirs, name: ours}, sizes.repeats)
    rows_of_ids = [
        (row.prompt_ids, row.answer_ids[:-1]) for row in renderer.human(*map(list, zip(*pairs, strict=True)))
    ]
    bound = operations_bound(model, rows_of_ids)
    return {"seconds": seconds, "requests": len(pairs), "max_difference": max(differences), "bound": bound}


def operations_bound(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> float:
    """How much fewer the operations of matrices could be, weights times tokens, than the harness needs.

    It reads 16 texts of similar length together, each padded to the longest, and puts the head on all they hold. The
    least: no padding, each question once, and the head where a token is scored.
    """
    head = model.get_output_embeddings().weight.numel()
    body = sum(parameter.numel() for parameter in model.base_model.layers.parameters())
    lengths = sorted((len(question) + len(answer) - 1 for question, answer in rows), reverse=True)
    padded = sum(max(batch) * len(batch) for batch in (lengths[n : n + 16] for n in range(0, len(lengths), 16)))
    scored = sum(len(answer) for _, answer in rows)
    read = scored + sum(len(question) - 1 for question in {tuple(question) for question, _ in rows})
    return padded * (body + head) / (read * body + scored * head)


def _pairs(rows: Dataset, tokenizer: Any, sizes: Sizes, question: str, answers: int) -> list[tuple[str, str]]:
    """Questions that end in no blank (it would count to the answer), and answers to them."""
    texts = [
        (row["prompt"].rstrip(), row["prompt"][len(row["prompt"].rstrip()) :] + row["completion"]) for row in rows
    ]
    if answers == 1:
        return list(dict.fromkeys(texts))[: sizes.unique]
    if question == "15 tokens":
        asked = [q for q, _ in texts if 14 <= len(tokenizer(q)["input_ids"]) <= 16][: sizes.questions[0]]
    else:
        ids = tokenizer("\n".join(q for q, _ in texts))["input_ids"]
        asked = [tokenizer.decode(ids[128 * n : 128 * (n + 1)]).rstrip() for n in range(sizes.questions[1])]
    own = list(dict.fromkeys(answer for _, answer in texts))
    return [(q, own[(answers * n + k) % len(own)]) for n, q in enumerate(asked) for k in range(answers)]


def latent(base: Path, rows: Dataset, sizes: Sizes, thoughts: int, anew: bool = True) -> dict[str, Any]:
    """Forward and backward of log p(thought, answer) for some thoughts to each of 8 rows.

    The bound is what the same forward and backward cost where each thought reads the question anew, times the share of
    tokens that is left where it is read once.
    """
    model, tokenizer = world.load(base)
    renderer = Renderer(tokenizer, end_token_ids(tokenizer, model.generation_config), None)
    human = renderer.human(rows["prompt"][:8], rows["completion"][:8])
    is_ordinary = torch.arange(model.config.vocab_size) > 2
    law = ThoughtLaw((2,), 16, is_ordinary)
    generator = torch.Generator().manual_seed(0)
    asked = [
        # What the retrodictor reads, the question, the answer and the question again, is the longer of the two sides.
        Continuation([*row.prompt_ids, *row.answer_ids, *row.prompt_ids], law.join(_ids(model, generator, 16)))
        for row in human
        for _ in range(thoughts)
    ]
    head = SparingHead.of(model)

    def both(can_share: bool) -> None:
        head.can_share = can_share
        thought, answer = sequence_log_probs(model, law, asked, tokenizer.pad_token_id, "cpu", head=head)
        (thought + answer).sum().backward()
        model.zero_grad()

    works = {"read once": lambda: both(True)} | ({"read anew": lambda: both(False)} if anew else {})
    seconds = world.seconds_of(works, sizes.repeats)
    whole = sum(len(row.prompt_ids) + len(row.ids) for row in asked)
    once = sum(len(row.ids) for row in asked) + sum(
        {tuple(row.prompt_ids): len(row.prompt_ids) for row in asked}.values()
    )
    name = TARGETS["latent"][0][0]
    bound = [value * once / whole for value in seconds.get("read anew", ())]
    return {"seconds": {"token-count bound": bound, name: seconds["read once"]}, "tokens": [whole, once]}


def _ids(model: Any, generator: torch.Generator, number: int) -> list[int]:
    return torch.randint(3, model.config.vocab_size, (number,), generator=generator).tolist()


def drawing(base: Path, rows: Dataset, sizes: Sizes) -> dict[str, Any]:
    """Equally many tokens for all: nothing ends an answer here."""
    model, tokenizer = world.load(base)
    number, length = sizes.drawn
    renderer = Renderer(tokenizer, [tokenizer.pad_token_id], None)
    asked = rows["prompt"][:number]
    tokenizer.padding_side = "left"
    # Without an end token here, generation takes the model's own and stops with the last answer.
    end = tokenizer.pad_token_id
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length, pad_token_id=end, eos_token_id=end)

    def plain() -> None:
        inputs = tokenizer(sorted(asked, key=len), return_tensors="pt", padding=True)
        tokenizer.batch_decode(model.eval().generate(**inputs, generation_config=config))

    def by_seed() -> None:
        draw_answers(model, renderer, asked, num_answers=1, seed=0, max_new_tokens=length, batch_size=number)

    seconds = world.seconds_of({"plain generate": plain, TARGETS["drawing"][0][0]: by_seed}, sizes.repeats)
    return {"seconds": seconds, "tokens": number * length}


def profile(base: Path, rows: Dataset, sizes: Sizes) -> dict[str, Any]:
    """Where one adversarial step goes, at the defaults (`retrodictive_coef=1`), CPU seconds by part."""
    trainer: Any = arms.adversarial(base, rows, sizes.steps, **arms.EQUAL)()
    parts = Parts()
    learner, likelihood = trainer.game.learner, trainer.likelihood
    trainer.model.generate = parts.timed("generation", trainer.model.generate)
    learner.distinguisher.score = parts.timed("scoring", learner.distinguisher.score)
    learner.step = parts.timed("distinguisher's update", learner.step)
    likelihood.loss = parts.timed("likelihood forward", likelihood.loss)
    trainer._compute_loss = parts.timed("loss forward", trainer._compute_loss)
    trainer.accelerator.backward = parts.timed("backward", trainer.accelerator.backward)
    seconds = world.seconds_per_step({"all": lambda: trainer}, 0)["all"]
    total = sum(seconds)
    spent = {name: value / total for name, value in parts.spent.items()}
    return {"shares": spent | {"rest": 1 - sum(spent.values())}, "seconds_per_step": total / len(seconds)}


class Parts:
    """CPU seconds spent in some functions, each without what it spends in others of them."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._inner: list[float] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.process_time() - begun
                self.spent[name] = self.spent.get(name, 0.0) + took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return watched


# --- the table


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """A line per comparison; each interval end that decides is compared with the target."""
    table = []
    for what, comparisons in TARGETS.items():
        cells = [one["result"] for one in results if what in (one["cell"]["what"], one["cell"].get("question"))]
        for ours, theirs, target, is_speed in comparisons:
            a, b = ([value for cell in cells for value in cell["seconds"][name]] for name in (ours, theirs))
            found = _of(a, b, is_speed)
            table.append(
                {
                    "ours": ours,
                    "theirs": theirs,
                    "measure": "times as fast" if is_speed else "cost / cost",
                    "value": found.value,
                    "low": found.low,
                    "high": found.high,
                    "target": f"{'>=' if is_speed else '<='} {target}",
                    "met": found.low >= target if is_speed else found.high <= target,
                    "our_seconds": sum(a) / len(a),
                    "their_seconds": sum(b) / len(b),
                    "pairs": len(a),
                }
            )
    differences = [one["result"]["max_difference"] for one in results if "max_difference" in one["result"]]
    return table, all(row["met"] for row in table) and max(differences) <= DIFFERENCE


def _of(ours: Sequence[float], theirs: Sequence[float], is_speed: bool) -> Ratio:
    return world.ratio(theirs, ours) if is_speed else world.ratio(ours, theirs)


def page(report: dict[str, Any]) -> str:
    """The table as Markdown, with what it was measured on."""
    lines = [
        f"# Speed beside TRL and lm-evaluation-harness, {report['date']}",
        "",
        "CPU seconds, one torch thread, fp32 (TRL's own defaults apart); all take turns in one process; totals over "
        "totals, 95 % percentile bootstrap over the paired steps. Printed by `make bench`.",
        "",
        "| ours | theirs | measure | value | 95 % interval | target | met | our s | their s | pairs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["summary"]:
        lines.append(
            f"| {row['ours']} | {row['theirs']} | {row['measure']} | {row['value']:.3f} | {row['low']:.3f} to "
            f"{row['high']:.3f} | {row['target']} | {'yes' if row['met'] else 'no'} | {row['our_seconds']:.3f} | "
            f"{row['their_seconds']:.3f} | {row['pairs']} |"
        )
    differences = [one["result"]["max_difference"] for one in report["cells"] if "max_difference" in one["result"]]
    shares = next(one["result"] for one in report["cells"] if one["cell"]["what"] == "profile")["shares"]
    bounds = [
        f"{TARGETS[one['cell']['question']][0][0]} {one['result']['bound']:.2f}"
        for one in report["cells"]
        if "bound" in one["result"]
    ]
    lines += [
        "",
        f"Largest difference to lm-evaluation-harness: {max(differences):.1e} nats ({DIFFERENCE:.0e} allowed).",
        "",
        f"Times as fast by operations of matrices alone (weights times tokens): {'; '.join(bounds)}.",
        "",
        "Where one adversarial step goes: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + ".",
        "",
        "Versions: " + ", ".join(f"{name} {value}" for name, value in report["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Ratios with their targets, and the parts of one step."""
    from matplotlib.figure import Figure

    table, _ = summarize(results)
    shares = next(one["result"] for one in results if one["cell"]["what"] == "profile")["shares"]
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    for y, row in enumerate(reversed(table)):
        color = "#1b7837" if row["met"] else "#b2182b"
        left.plot([row["low"], row["high"]], [y, y], color=color, linewidth=3, solid_capstyle="butt")
        left.plot(row["value"], y, "o", color=color)
        left.plot(float(row["target"].split()[1]), y, "|", color="black", markersize=16)
    left.set_xscale("log")
    ticks = (0.7, 1, 1.5, 2, 3, 5, 8)
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    left.set_yticks(
        range(len(table)),
        [f"{row['ours']}\nagainst {row['theirs']}, {row['measure']}" for row in reversed(table)],
        fontsize=7,
    )
    left.set_title("Ratio, 95 % interval, and target (|): green where the worse end meets it", fontsize=10)
    names = sorted(shares, key=shares.__getitem__)
    right.barh(names, [shares[name] for name in names], color="#2166ac")
    for y, name in enumerate(names):
        right.text(shares[name], y, f" {shares[name]:.0%}", va="center", fontsize=9)
    right.set_xlim(0, 1.2 * max(shares.values()))
    right.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.set_title("One adversarial step, by part", fontsize=10)
    figure.savefig(path, dpi=120)
