"""What an audit will do, written down and hashed before any answer is read."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_imitate import __version__
from hf_imitate.audits.judge_family import POWER_SHARES
from hf_imitate.audits.resampled_law import ResampledLaw
from hf_imitate.audits.splits import QuestionSplit, split_questions
from hf_imitate.causal_lm import commit_of, hub_configs, named_base
from hf_imitate.checks import check_name
from hf_imitate.imitator import Imitator
from hf_imitate.processed_law import ProcessedLaw

TEST_SIZE, VALID_SIZE = 0.5, 0.1
FILES = {"csv", "json", "parquet", "text"}
# Of a folder, what a model's answers and scores depend on.
_OF_A_MODEL = (
    "*.safetensors",
    "*config.json",
    "tokenizer.json",
    "*.jinja",
    "imitation.json",
    "retrodictor/*.safetensors",
)
_SAMPLED = 64  # elements of each weight that enter its fingerprint one by one


class Plan(NamedTuple):
    """An audit's settings.

    Attributes:
        values: all of them, plain JSON.
        hash: BLAKE2b-256 of their canonical JSON, hexadecimal.
        split: of the rows of positive weight, by question.
        ledger: the confidence, and how its error is shared among the certified findings.
    """

    values: dict[str, Any]
    hash: str
    split: QuestionSplit
    ledger: dict[str, Any]

    @property
    def text(self) -> str:
        """JSON, for `plan.json`."""
        return json.dumps({"plan_hash": self.hash, **self.values}, indent=1, sort_keys=True)


def make_plan(
    imitator: Imitator,
    model: Any,
    dataset: Dataset,
    train_dataset: Dataset | None,
    *,
    base: Any,
    against: Any,
    checks: Sequence[str],
    judges: Mapping[str, Any],
    law: ProcessedLaw,
    by: str | None,
    known: Mapping[str, Any],
    confidence: float,
    seed: int,
    resampled: ResampledLaw | None = None,
) -> Plan:
    """Fix everything that could be chosen, before answers are read; rows are known by their questions and hashes."""
    weights = dataset["weight"] if "weight" in dataset.column_names else [None] * len(dataset)
    prompts = [p for p, weight in zip(dataset["prompt"], weights, strict=True) if weight is None or weight > 0]
    split = split_questions(prompts, seed, TEST_SIZE, VALID_SIZE)
    ledger: dict[str, Any] = {"confidence": confidence}
    ledger["certified"] = shares_of_error(1 - confidence, len(judges), len(checks))
    chosen_by = _chosen_by(resampled)
    if chosen_by:
        ledger["resampling"] = chosen_by
    rows_hash = dataset_hash(dataset)
    values = {
        "version": __version__,
        "model": name_of(model),
        "revision": commit_of(model) if isinstance(model, str) else None,
        "weights": weights_fingerprint(imitator.model),
        "rendering": _rendering(imitator),
        "dataset": f"{rows_in_words(dataset)}, hash {rows_hash[:16]}",
        "dataset_hash": rows_hash,
        "train_dataset_hash": None if train_dataset is None else dataset_hash(train_dataset),
        "base": None if base is None else name_of(base),
        "against": None if against is None else name_of(against),
        "checks": list(checks),
        "judges": {name: _judge_in_words(judge) for name, judge in judges.items()},
        "decoding": {"law": law.describe(), **law.settings, "max_new_tokens": imitator.max_new_tokens, **chosen_by},
        "by": by,
        "known": dict(known),
        "seed": seed,
        "split": {"test_size": TEST_SIZE, "valid_size": VALID_SIZE, "rows": _hash([r.tolist() for r in split])},
        "power_shares": list(POWER_SHARES),
        "ledger": ledger,
    }
    if resampled is not None and resampled.residual.checks:
        values["choosing_checks"] = [source_of(check) for check in resampled.residual.checks]
    bodies = {f"judge {name}": str(judge)[5:] for name, judge in judges.items() if str(judge).startswith("lora:")}
    for name, other in {"base": base, "against": against, **bodies}.items():
        if isinstance(other, Imitator | nn.Module):
            values[f"{name}_weights"] = weights_fingerprint(other.model if isinstance(other, Imitator) else other)
        elif other is not None:
            values |= _weights_at(name, str(other))
    return Plan(values, _hash(values), split, ledger)


def shares_of_error(error: float, num_judges: int, num_checks: int) -> dict[str, float]:
    """Error probability of each certified finding: equal shares, by the name before the slash.

    Every judge has a `tv_lower`, every check a `check_tv_lower`; `mean_log_prob_lower` and `hidden_deviation` are one
    each. The shares of all of them add up to `error`.
    """
    share = error / (num_judges + num_checks + 2)
    names = ["tv_lower"] * bool(num_judges) + ["check_tv_lower"] * bool(num_checks)
    return dict.fromkeys([*names, "mean_log_prob_lower", "hidden_deviation"], share)


def _chosen_by(resampled: ResampledLaw | None) -> dict[str, Any]:
    """What the law of an answer kept out of several depends on, besides the imitator; nothing for single draws."""
    if resampled is None:
        return {}
    law = resampled.residual
    return {
        "resample": law.resample,
        "num_estimates": resampled.num_estimates,
        "distinguisher": fingerprint(law.distinguisher)[:32],
    }


def fingerprint(value: Any) -> str:
    """Hash of everything that a distinguisher of any kind is made of: weights, arrays, settings; of checks, the names.

    Tokenizers count by their vocabulary and special tokens.
    """
    digest = hashlib.blake2b(digest_size=32)
    _add(digest, value, set())
    return digest.hexdigest()


def _add(digest: "hashlib.blake2b", value: Any, seen: set[int]) -> None:
    digest.update(f"<{type(value).__name__}".encode())
    if value is None or isinstance(value, str | bytes | int | float):
        digest.update(repr(value).encode())
    elif isinstance(value, Tensor | np.ndarray):
        array = value.detach().double().cpu().numpy() if isinstance(value, Tensor) else value
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(array.tobytes() if array.dtype != object else repr(array.tolist()).encode())
    elif id(value) in seen:
        digest.update(b"again")
    elif isinstance(value, nn.Module):
        digest.update(weights_fingerprint(value).encode())
    elif isinstance(value, PreTrainedTokenizerBase):
        digest.update(repr((sorted(value.get_vocab().items()), value.special_tokens_map)).encode())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            _add(digest, value[key], seen | {id(value)})
    elif isinstance(value, list | tuple):
        for item in value:
            _add(digest, item, seen | {id(value)})
    elif callable(value) and hasattr(value, "__qualname__"):
        digest.update(value.__qualname__.encode())
    else:
        _add(digest, getattr(value, "__dict__", None), seen | {id(value)})
    digest.update(b">")


def rows_in_words(dataset: Dataset) -> str:
    """The data set's name and how many rows there are; a file's rows go by the name of what read them."""
    name = dataset.info.dataset_name or "a data set"
    return f"{f'a {name} file' if name in FILES else name}, {len(dataset)} rows"


def dataset_hash(dataset: Dataset) -> str:
    """Hash of all rows and columns, in order; the same for equal rows however they are stored."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(json.dumps(sorted(dataset.column_names)).encode())
    for row in dataset.with_format(None):
        digest.update(json.dumps(_jsonable(row), sort_keys=True).encode())
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """Hash that changes when a model is trained further: names, shapes, sums and some elements of all its weights."""
    digest = hashlib.blake2b(digest_size=32)
    with torch.no_grad():
        for name, weight in sorted(model.state_dict().items()):
            flat = weight.detach().reshape(-1)
            sampled = flat[:: max(1, flat.numel() // _SAMPLED)].double().cpu()
            total = (
                flat.float().abs().sum(dtype=torch.float64).item() if flat.is_floating_point() else flat.sum().item()
            )
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {total!r}".encode())
            digest.update(sampled.numpy().tobytes())
    return digest.hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """Hash that changes when other weights, settings or a tokenizer are saved into the folder of a model."""
    found = sorted({path for pattern in _OF_A_MODEL for path in folder.glob(pattern) if path.is_file()})
    digests = []
    for path in found:
        with path.open("rb") as stream:
            digests.append([path.relative_to(folder).as_posix(), hashlib.file_digest(stream, "blake2b").hexdigest()])
    return _hash(digests)


def _weights_at(name: str, repo: str, is_base: bool = False) -> dict[str, str | None]:
    """Which weights a folder or Hub repo holds, before they are loaded: a hash or a commit, and those of a base."""
    is_local = Path(repo).is_dir()
    folder = Path(repo) if is_local else hub_configs(repo)
    which = None if folder is None else folder_fingerprint(folder) if is_local else folder.name
    base = named_base(folder) if folder and not is_base else None
    of_base = _weights_at(f"{name}_base", base, is_base=True) if base else {}
    return {f"{name}_{'weights' if is_local else 'revision'}": which, **of_base}


def _rendering(imitator: Imitator) -> str:
    """Hash of what turns questions into ids and ids into answers: without it, other answers would pass for these."""
    own, latent = imitator.renderer, imitator.latent
    template = getattr(imitator.tokenizer, "chat_template", None)
    parts = [imitator.tokenizer, template, own.chat_template_kwargs, own.completion_role, list(own.end_token_ids)]
    return fingerprint([*parts, None if latent is None else latent.thinkers.law.to_json()])


def source_of(check: Any) -> str:
    """Hash of a check's own lines, where they can be had: by another one other answers are kept."""
    try:
        lines = inspect.getsource(check)
    except (OSError, TypeError):
        lines = ""
    return _hash([check_name(check), lines])


def name_of(model: Any) -> str:
    """What reports call a model: its repo id or folder name, never where on this machine it lies."""
    name = str(model) if isinstance(model, str | Path) else ""
    if not name:
        inner = getattr(model, "model", model) if isinstance(model, Imitator) else model
        name = getattr(getattr(inner, "config", None), "_name_or_path", "") or type(inner).__name__
    return Path(name).resolve().name if Path(name).exists() or Path(name).is_absolute() else name


def _judge_in_words(judge: Any) -> str:
    """A judge without the folder its base lies in, whose hash still tells two folders of one name apart."""
    if not isinstance(judge, str):
        return "callable"
    body = judge.removeprefix("lora:")
    looks_local = body.startswith((".", "~", "/")) or "\\" in body or body.count("/") > 1
    if body == judge or not (looks_local or Path(body).exists()):
        return judge
    last = PurePosixPath(name_of(body).replace("\\", "/")).name
    return f"lora:{last} (a local folder, sha256 {hashlib.sha256(body.encode()).hexdigest()[:32]})"


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else repr(value)


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()
