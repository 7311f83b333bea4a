"""A world small enough to enumerate: vocabulary 8, thoughts of up to 3 tokens, so 259 thoughts and exact sums.

Ids 0 to 5 are the words a to f, 6 is spelled by nothing (the delimiter takes it), 7 ends an answer and pads.
"""

import contextlib
import io
import itertools
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_imitate.latent_draws import Continuation, sequence_log_probs
from hf_imitate.rendering import Rendered
from hf_imitate.trainers.latent_retrodictive_config import LatentRetrodictiveConfig
from hf_imitate.trainers.latent_retrodictive_trainer import LatentRetrodictiveTrainer

WORDS, DELIMITER, END, VOCABULARY, LONGEST = "abcdef", 6, 7, 8, 3
THOUGHTS = [list(ids) for n in range(LONGEST + 1) for ids in itertools.product(range(len(WORDS)), repeat=n)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words a to f and an end token; id 6 is free."""
    words = Tokenizer(models.WordLevel({**{word: i for i, word in enumerate(WORDS)}, "<end>": END}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def save_world(path: Path, seed: int = 0) -> Path:
    """A random two-layer model of eight tokens, sharp enough to have preferences, with its tokenizer."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def load_world(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)


def rows(**columns: list) -> Dataset:
    """Eight questions; the answer says their first word twice."""
    questions = ["a b", "b c", "c d", "d e", "e f", "f a", "a c", "b d"]
    given = {"prompt": questions, "completion": [f"{q[0]} {q[0]}" for q in questions], **columns}
    return Dataset.from_dict(given)


def settings(folder: Path, **changes: Any) -> LatentRetrodictiveConfig:
    plain: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": 3,
        "num_thoughts": 4,
        "num_thoughts_eval": 16,
        "max_thought_length": LONGEST,
        "retrodictor_warmup_steps": 0,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return LatentRetrodictiveConfig(**{**plain, **changes})


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes})


def make(folder: Path, world: Any, dataset: Dataset | None = None, full: bool = False, **changes: Any) -> Any:
    """A trainer; `arguments` among the changes go to it, the others to its settings."""
    arguments = changes.pop("arguments", {})
    if not full:
        arguments = {"peft_config": lora(), **arguments}
    given = {"train_dataset": rows() if dataset is None else dataset, **arguments}
    return LatentRetrodictiveTrainer(
        model=str(world) if isinstance(world, Path) else world, args=settings(folder, **changes), **given
    )


def train(trainer: Any, **kwargs: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(**kwargs)
    return trainer


def log_joint(model: Any, law: Any, prompt_ids: list[int], answer_ids: list[int]) -> torch.Tensor:
    """log p(thought, answer | question) of every thought. [259], fp64."""
    sequences = [Continuation(prompt_ids, law.join(thought, answer_ids)) for thought in THOUGHTS]
    return sum(part.double() for part in sequence_log_probs(model, law, sequences, END, "cpu"))


@torch.no_grad()
def exact_log_prob(model: Any, law: Any, prompt_ids: list[int], answer_ids: list[int]) -> float:
    return torch.logsumexp(log_joint(model, law, prompt_ids, answer_ids), dim=0).item()


def mean_exact(trainer: Any) -> float:
    """Mean exact log p over the training rows, nats."""
    values = [
        exact_log_prob(trainer.model, trainer.thinkers.law, row["prompt_ids"], row["answer_ids"])
        for row in trainer.train_dataset
    ]
    return sum(values) / len(values)


def reference_log_joint(model: Any, prompt_ids: list[int], answer_ids: list[int]) -> torch.Tensor:
    """The same as [`log_joint`] by another road: one sequence at a time, unpadded, each step's softmax written out."""
    words, totals = list(range(len(WORDS))), []
    for thought in THOUGHTS:
        ids = [*prompt_ids, *thought, DELIMITER, *answer_ids]
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        total, start = torch.zeros((), dtype=torch.float64), len(prompt_ids)
        for t in range(len(thought) + 1):
            if t < LONGEST:  # a word or the delimiter; after the third word there is no choice
                may_come = torch.tensor([*words, DELIMITER])
                law = torch.log_softmax(logits[start + t - 1][may_come], dim=0)
                total = total + law[may_come.tolist().index(ids[start + t])]
        for t in range(start + len(thought) + 1, len(ids)):
            total = total + torch.log_softmax(logits[t - 1], dim=0)[ids[t]]
        totals.append(total)
    return torch.stack(totals)


def relative_variance(
    model: Any, law: Any, log_q: torch.Tensor, prompt_ids: list[int], answer_ids: list[int]
) -> float:
    """Variance of one weight over p squared, under a proposal with `log_q` of every thought; exact."""
    with torch.no_grad():
        joint = log_joint(model, law, prompt_ids, answer_ids)
    return ((2 * joint - log_q).exp().sum() / joint.exp().sum() ** 2 - 1).item()


def log_q_of_all(trainer: Any, row: Any) -> torch.Tensor:
    """log q(thought | question, answer) of every thought. [259], fp64."""
    thinkers = trainer.thinkers
    with torch.no_grad(), trainer.retrodictor.active():
        log_q, _ = thinkers.score(trainer.retrodictor.model, thinkers.hindsight_rows(row, THOUGHTS))
    return log_q.double()


def kl_to_posterior(trainer: Any) -> float:
    """Mean KL(posterior || q) over the training rows, nats, exact."""
    rows = [Rendered(one["prompt_ids"], one["answer_ids"], one["ended"]) for one in trainer.train_dataset]
    return sum(kl_of_row(trainer, row) for row in rows) / len(rows)


def kl_of_row(trainer: Any, row: Rendered) -> float:
    """KL(posterior || q) behind one answer, nats, exact."""
    with torch.no_grad():
        joint = log_joint(trainer.model, trainer.thinkers.law, row.prompt_ids, row.answer_ids)
    posterior = torch.log_softmax(joint, dim=0)
    return (posterior.exp() * (posterior - log_q_of_all(trainer, row))).sum().item()
