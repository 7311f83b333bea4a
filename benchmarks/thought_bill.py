"""The bill of retrodiction: how many thoughts a log-probability costs, against divergence and thought length.

A random causal LM of eight tokens is the imitator, and for every question and answer all its thoughts are listed, so
log p, the posterior and both proposals are exact: the imitator's own law before the answer is known ("foresight"), and
a mixture of it with the posterior ("hindsight", a retrodictor that is right half of the time). What is estimated is
only K, the number of thoughts with which the mean estimate comes within a tenth of a nat.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from hf_imitate.latent_draws import Continuation, sequence_log_probs
from hf_imitate.thoughts import ThoughtLaw
from hf_imitate.weight_diagnostics import thoughts_needed

NUM_WORDS, DELIMITER, END, VOCABULARY = 6, 6, 7, 8
NUM_ANSWERS, MOST_THOUGHTS, GAP = 40, 512, 0.1
SEED = 51  # chosen before the first run
LENGTHS, SPREADS = (1, 2, 3, 4), (0.3, 0.6, 0.9)
CELLS = [{"length": length, "spread": spread} for length in LENGTHS for spread in SPREADS]


def new_model(spread: float, seed: int) -> Qwen3ForCausalLM:
    """An untrained model; `spread` says how sharply it prefers some tokens to others."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=spread,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config).eval()


@torch.no_grad()
def enumerated(model: Qwen3ForCausalLM, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log p of every thought, and of thought and answer together, for `NUM_ANSWERS` answers that the model would give.

    [answers, thoughts] each, nats.
    """
    is_ordinary = torch.tensor([True] * NUM_WORDS + [False] * 2)
    law = ThoughtLaw((DELIMITER,), length, is_ordinary)
    thoughts = [list(ids) for n in range(length + 1) for ids in itertools.product(range(NUM_WORDS), repeat=n)]
    rng = np.random.default_rng(seed)

    def score(question: list[int], pairs: list[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
        rows = [Continuation(question, law.join(thought, answer)) for thought, answer in pairs]
        parts = [sequence_log_probs(model, law, rows[i : i + 512], END, "cpu") for i in range(0, len(rows), 512)]
        thought, answer = (torch.cat([part[side] for part in parts]).double().numpy() for side in (0, 1))
        return thought, thought + answer

    log_p_thought, log_p_joint = [], []
    for _ in range(NUM_ANSWERS):
        question = rng.integers(0, NUM_WORDS, 4).tolist()
        alone, _ = score(question, [(thought, [0, END]) for thought in thoughts])
        behind = thoughts[rng.choice(len(thoughts), p=np.exp(alone) / np.exp(alone).sum())]
        _, joint = score(question, [(behind, [word, END]) for word in range(NUM_WORDS)])
        word = int(rng.choice(NUM_WORDS, p=np.exp(joint - np.logaddexp.reduce(joint))))
        both = score(question, [(thought, [word, END]) for thought in thoughts])
        log_p_thought.append(both[0])
        log_p_joint.append(both[1])
    return np.array(log_p_thought), np.array(log_p_joint)


def run_cell(cell: dict[str, Any], num_thoughts: int = MOST_THOUGHTS) -> dict[str, Any]:
    """Both proposals of one world: exact divergence, and the thoughts that `thoughts_needed` bills."""
    seed = SEED + 10 * cell["length"]
    log_prior, log_joint = enumerated(new_model(cell["spread"], seed), cell["length"], seed)
    log_p = np.logaddexp.reduce(log_joint, axis=1)
    log_posterior = log_joint - log_p[:, None]
    log_half = math.log(0.5)
    proposals = {
        "foresight": log_prior,
        "hindsight": np.logaddexp(log_half + log_prior, log_half + log_posterior),
    }
    rng = np.random.default_rng([seed, 1])
    found = {}
    for name, log_q in proposals.items():
        share = np.exp(log_q - np.logaddexp.reduce(log_q, axis=1, keepdims=True))
        drawn = np.array([rng.choice(share.shape[1], num_thoughts, p=own) for own in share])
        log_weights = np.take_along_axis(log_joint - log_q, drawn, axis=1)
        bill = thoughts_needed(log_weights, GAP, log_p, seed=seed)
        divergence = (np.exp(log_posterior) * (log_posterior - log_q)).sum(axis=1)
        found[name] = {"num_thoughts": bill.num_thoughts, "mean_kl": float(divergence.mean())}
    return found


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """One row per world and proposal; passes if the bill grows with the divergence (rank correlation above .8)."""
    rows = [
        {
            "thought length": entry["cell"]["length"],
            "sharpness": entry["cell"]["spread"],
            "proposal": name,
            "KL(posterior, q)": round(seen["mean_kl"], 3),
            "exp(KL)": round(math.exp(seen["mean_kl"]), 2),
            "thoughts needed": seen["num_thoughts"] or f"over {MOST_THOUGHTS}",
        }
        for entry in results
        for name, seen in entry["result"].items()
    ]
    divergences = np.array([row["KL(posterior, q)"] for row in rows])
    bills = np.array([MOST_THOUGHTS * 2 if isinstance(b, str) else b for b in (r["thoughts needed"] for r in rows)])
    ranks = [np.argsort(np.argsort(values)) for values in (divergences, bills)]
    return rows, bool(np.corrcoef(*ranks)[0, 1] > 0.8)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Thoughts needed against divergence; shapes are proposals, colours thought lengths."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    colors = pyplot.get_cmap("viridis")
    for entry in results:
        place = LENGTHS.index(entry["cell"]["length"]) / (len(LENGTHS) - 1)
        for name, marker in (("foresight", "o"), ("hindsight", "^")):
            seen = entry["result"][name]
            bill = seen["num_thoughts"]
            style = {"color": colors(0.9 * place), "marker": marker if bill else "$>$", "s": 60}
            axes.scatter(seen["mean_kl"], bill or MOST_THOUGHTS, **style)
    most = max(seen["mean_kl"] for entry in results for seen in entry["result"].values())
    line = np.linspace(0, most, 50)
    axes.plot(line, np.exp(line), "--", color="grey", label="exp(KL)")
    for length in LENGTHS:
        color = colors(0.9 * LENGTHS.index(length) / (len(LENGTHS) - 1))
        axes.scatter([], [], color=color, label=f"thoughts of at most {length} token{'s' * (length > 1)}")
    axes.scatter([], [], color="grey", marker="o", label="drawn before the answer is known")
    axes.scatter([], [], color="grey", marker="^", label="half of them from the posterior")
    axes.set_yscale("log", base=2)
    axes.set_xlabel("mean KL(posterior, proposal), nats")
    axes.set_ylabel(f"thoughts for a mean gap of {GAP} nats")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
