"""What a repo of anybody's may say in its files, read before it is loaded: nothing that runs, leads out or is huge."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_imitate.strict_json import StrictJSONError, children, read_json

MAX_JSON_BYTES = 16 * 2**20
MAX_TOKENS = 2**20
"""Longest answer, in tokens, that a repo may ask for."""
MAX_RANK, MAX_LAYERS, MAX_INTEGER = 2**14, 2**12, 2**40
MAX_MEMBERS = 64
MAX_REPLICATIONS, MAX_MODULES = 64, 2**12
MAX_PATTERN = 1000
"""Longest regular expression, in characters, that may choose an adapter's modules."""
_MAX_PATHS = 2**20
_NAME_LENGTH = 64  # characters of a module's name that one quantifier may end at
_SPARE_NUMBERS = 2**24  # of tables that are computed, not stored
_FOLDERS = ("", "distinguisher", "retrodictor")
_OUR_FILES = ("imitation.json", "checks.json", "adapter_config.json", "generation_config.json", "config.json")
_READ = (*_OUR_FILES, "tokenizer_config.json", "model.safetensors.index.json")
_READ_SUFFIXES = {".json", ".safetensors", ".txt", ".model", ".jinja"}
# Of a model's config: how often something is built, in a loop.
_COUNTS = re.compile(r"(_layers|n_layer|num_labels)$|^(num|n)_.*(layer|expert|head|block|group)s?$")
# Of an adapter's config: names of modules, or regular expressions for them.
_CHOOSES_MODULES = ("_modules", "_pattern", "modules_to_save", "target_parameters")
_PLAIN_NAMES = re.compile(r"[\w.\-]*")
_REGEX_CHARACTERS = re.compile(r"[\w.\-|()\\^$?:*+\[\]!=]*")


class UnsafeRepoError(ValueError):
    """A repo's file says what no imitator needs, and what could harm whoever loads it. Nothing was loaded."""


def check_repo(folder: Path) -> None:
    """Read a repo's small files, and stop before anything is loaded where one of them cannot be trusted.

    Args:
        folder (`Path`):
            A local folder, or a snapshot in the Hub's cache.

    Raises:
        UnsafeRepoError: the message names the file and the field, never its words.
    """
    for part in _folders(folder):
        for path in part.iterdir():
            if path.suffix in _READ_SUFFIXES:
                _check_stays_inside(path, folder)
        for name in _READ:
            if (part / name).is_file():
                where = (part / name).relative_to(folder).as_posix()
                values = read_object(part / name, where)
                _CHECKS[name](values, where)
                if name == "config.json":
                    _check_size(values, part, where)


def read_object(file: Path, name: str | None = None) -> dict[str, Any]:
    """Read a JSON object that anybody may have written.

    Args:
        file (`Path`):
            Where it is.
        name (`str`, *optional*):
            What errors call it; by default its name.

    Raises:
        UnsafeRepoError: it is no JSON object, too long, nested too deeply, or holds a number that is none.
    """
    name = name or file.name
    if file.stat().st_size > MAX_JSON_BYTES:
        raise UnsafeRepoError(f"{name} has more than {MAX_JSON_BYTES:,} bytes.")
    try:
        values = read_json(file)
    except StrictJSONError as error:
        raise UnsafeRepoError(f"{name} {error}. Download the repo again.") from None
    if not isinstance(values, dict):
        raise UnsafeRepoError(f"{name} holds a {type(values).__name__}; it must be an object.")
    return values


def check_model_config(values: Mapping[str, Any], name: str = "config.json") -> None:
    """Check a model's config, whose fields transformers follows.

    Raises:
        UnsafeRepoError: it names code of another repo as its attention (transformers would download and run it), or
            weights outside its folder; or a size is none that a model has.
    """
    for key, value in _walk(values):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not abs(value) <= (MAX_LAYERS if _COUNTS.search(key) else MAX_INTEGER):
            raise UnsafeRepoError(f"{name}: `{key}` is larger than that of any model.")
        # `attn_implementation="org/kernel"` makes transformers load a kernel from the Hub: code.
        if key.endswith("_implementation") and any("/" in text for text in _texts(value)):
            raise UnsafeRepoError(f"{name}: `{key}` names a repo with code, and none is run. Remove the field.")
        if key == "configuration_files":
            raise UnsafeRepoError(f"{name}: `{key}` leads to another file, which is not read. Remove the field.")
        if key == "transformers_weights" and not _is_plain_name(value):
            raise UnsafeRepoError(f"{name}: `{key}` is no file of this folder.")


def check_model_size(config: PretrainedConfig, auto_class: type, folder: Path) -> None:
    """Stop where a config speaks of a model that is larger than the weights beside it: transformers would make it up.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            What [`check_model_config`] has passed.
        auto_class (`type`):
            Builds the model, as `AutoModelForCausalLM` does; here without memory for its weights.
        folder (`Path`):
            Holds safetensors weights; where it holds none, nothing is checked.

    Raises:
        UnsafeRepoError: the model has more numbers than the files can store, at two bits each where it is quantised
            and a byte otherwise; or it cannot be built.
    """
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not stored:
        return
    try:
        with torch.device("meta"):
            model = auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)  # type: ignore[attr-defined]
    except (RuntimeError, OverflowError) as error:  # a weight of more bytes than can be counted
        raise UnsafeRepoError(f"config.json: no such model can be built ({type(error).__name__}).") from None
    numbers = sum(tensor.numel() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    in_a_byte = 4 if getattr(config, "quantization_config", None) else 1
    if numbers > in_a_byte * stored + _SPARE_NUMBERS:
        raise UnsafeRepoError("config.json: the model has more weights than the files beside it hold.")


def _folders(folder: Path) -> Iterable[Path]:
    for name in _FOLDERS:
        part = folder / name
        if part.is_dir():
            yield part
            # A distinguisher may be several, in folders of their own; the repo may be a distinguisher's.
            yield from (path for path in sorted(part.glob("*")) if path.is_dir() and (name or path.name.isdigit()))


def _check_stays_inside(path: Path, folder: Path) -> None:
    root = folder.resolve()
    # The Hub's cache keeps contents in `blobs/` beside `snapshots/<commit>/`, and links to them, from checkpoints too.
    allowed = [root, *(place.parent / "blobs" for place in root.parents[:2] if place.name == "snapshots")]
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise UnsafeRepoError(
            f"{path.relative_to(folder).as_posix()} is a link that leads out of the folder. If that is meant, put the "
            "file itself there."
        )


def _check_size(values: Mapping[str, Any], part: Path, name: str) -> None:
    """Stop where a config speaks of more than the files beside it hold: it would be made up, in memory."""
    stored = sum(path.stat().st_size for path in part.glob("*.safetensors"))
    vocabulary, width = values.get("vocab_size"), values.get("hidden_size")
    if stored and isinstance(vocabulary, int) and isinstance(width, int) and vocabulary * width > 4 * stored:
        raise UnsafeRepoError(f"{name}: `vocab_size` times `hidden_size` is more than the weights beside it hold.")


def _check_imitation(values: Mapping[str, Any], name: str) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "objective": (str,),
        "chat_template_kwargs": (dict, type(None)),
        "completion_role": (str,),
        "max_answer_tokens": (int, type(None)),
        "thoughts": (dict,),
        "has_retrodictor": (bool,),
    }
    for key, kind in kinds.items():
        if key in values:
            _check_kind(values[key], kind, f"{name}: `{key}`")
    _check_tokens(values.get("max_answer_tokens"), f"{name}: `max_answer_tokens`")
    thoughts = values.get("thoughts") or {}
    _check_tokens(thoughts.get("max_thought_length", 1), f"{name}: `thoughts.max_thought_length`", least=0)
    needed = {"max_answer_tokens", "thoughts"} if values.get("objective") == "latent" else set()
    if missing := sorted(key for key in needed if values.get(key) is None):
        raise UnsafeRepoError(f"{name}: a latent imitator needs `{missing[0]}`, and it is missing.")


def _check_checks(values: Mapping[str, Any], name: str) -> None:
    if values.get("kind") not in (None, "ngram", "ensemble"):
        raise UnsafeRepoError(f"{name}: `kind` is none that a distinguisher has.")
    members = values.get("num_members", 2)
    _check_kind(members, (int,), f"{name}: `num_members`")
    if not 2 <= members <= MAX_MEMBERS:
        raise UnsafeRepoError(f"{name}: `num_members` is no whole number from 2 to {MAX_MEMBERS}.")
    checks = values.get("checks", {})
    _check_kind(checks, (dict,), f"{name}: `checks`")
    for weight in checks.values():
        _check_kind(weight, (int, float), f"{name}: a weight in `checks`")
        if not (math.isfinite(weight) and abs(weight) < 1e6):
            raise UnsafeRepoError(f"{name}: a weight in `checks` is larger than any that training can reach.")
    _check_tokens(values.get("max_answer_tokens"), f"{name}: `max_answer_tokens`")


def _check_adapter(values: Mapping[str, Any], name: str) -> None:
    base = values.get("base_model_name_or_path")
    _check_kind(base, (str, type(None)), f"{name}: `base_model_name_or_path`")
    if base and ".." in PurePosixPath(base.replace("\\", "/")).parts:
        raise UnsafeRepoError(f"{name}: `base_model_name_or_path` leads out of its folder. Load the base yourself.")
    _check_kind(values.get("revision"), (str, type(None)), f"{name}: `revision`")
    ranks = [values.get("r", 0), *_values(values.get("rank_pattern"))]
    if any(not isinstance(rank, int) or not 0 <= rank <= MAX_RANK for rank in ranks):
        raise UnsafeRepoError(f"{name}: the rank is no whole number up to {MAX_RANK:,}.")
    for alpha in [values.get("lora_alpha", 1), *_values(values.get("alpha_pattern"))]:
        _check_kind(alpha, (int, float), f"{name}: `lora_alpha`")
        if not abs(alpha) < 1e6:
            raise UnsafeRepoError(f"{name}: `lora_alpha` is larger than any that training can bear.")
    replications = values.get("layer_replication") or []
    _check_kind(replications, (list,), f"{name}: `layer_replication`")
    is_plain = len(replications) <= MAX_REPLICATIONS and all(_is_layer_range(pair) for pair in replications)
    if not is_plain or sum(abs(end - start) for start, end in replications) > MAX_LAYERS:
        raise UnsafeRepoError(f"{name}: `layer_replication` is no list of up to {MAX_REPLICATIONS} ranges of layers.")
    for key, value in values.items():
        if key.endswith(_CHOOSES_MODULES) and value is not None:
            _check_modules(key, value, f"{name}: `{key}`")


def _check_modules(key: str, value: Any, what: str) -> None:
    """What PEFT matches with the name of every module: plain names, or a regular expression that soon ends."""
    _check_kind(value, (str, list, dict), what)
    # Only these PEFT matches as they stand; names in lists it surrounds by `.*`.
    if len(value) > (MAX_PATTERN if isinstance(value, str) else MAX_MODULES):
        raise UnsafeRepoError(f"{what} names more modules than any model has.")
    may_be_regex = isinstance(value, dict) or (isinstance(value, str) and key != "layers_pattern")
    for text in [value] if isinstance(value, str) else value:
        _check_kind(text, (str,), f"{what}, or an item in it,")
        if not (_PLAIN_NAMES.fullmatch(text) or (may_be_regex and _soon_ends(text))):
            raise UnsafeRepoError(
                f"{what} is neither a module's name nor a regular expression that is sure to end soon: at most "
                f"{MAX_PATTERN:,} characters, no repeated group, few `*` and `+`. Give a list of names."
            )


def _soon_ends(pattern: str) -> bool:
    """Whether a regular expression can be matched in few ways, so that a search for all of them ends.

    No group is repeated; then the ways are at most the product of those at each quantifier and each alternation.
    """
    if len(pattern) > MAX_PATTERN or not _REGEX_CHARACTERS.fullmatch(pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    plain = re.sub(r"\[\^?[^\[\]]+\]", "x", re.sub(r"\\.", "x", pattern))
    if set("[]\\") & set(plain) or re.search(r"\)[*+]", plain):
        return False
    groups_marked = plain.replace("(?", "(")
    quantifiers = re.findall(r"[*+?][?+]?", groups_marked)
    ways = math.prod(2 if found[0] == "?" else _NAME_LENGTH for found in quantifiers)
    return ways * math.prod(_alternatives(groups_marked)) <= _MAX_PATHS


def _alternatives(pattern: str) -> list[int]:
    """How many alternatives each group offers, the whole included."""
    open_groups, closed = [1], []
    for character in pattern:
        if character == "(":
            open_groups.append(1)
        elif character == ")":
            closed.append(open_groups.pop())
        elif character == "|":
            open_groups[-1] += 1
    return closed + open_groups


def _is_layer_range(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    return all(isinstance(end, int) and 0 <= end <= MAX_LAYERS for end in pair)


def _check_generation(values: Mapping[str, Any], name: str) -> None:
    _check_tokens(values.get("max_new_tokens"), f"{name}: `max_new_tokens`")


def _check_config(values: Mapping[str, Any], name: str) -> None:
    check_model_config(values, name)


def _check_tokenizer(values: Mapping[str, Any], name: str) -> None:
    # transformers opens the files that its tokenizer's config names, wherever they are.
    for key, value in values.items():
        if key.endswith("_file") and value is not None and not _is_plain_name(value):
            raise UnsafeRepoError(f"{name}: `{key}` is no file of this folder.")


def _check_index(values: Mapping[str, Any], name: str) -> None:
    shards = values.get("weight_map", {})
    _check_kind(shards, (dict,), f"{name}: `weight_map`")
    if not all(_is_plain_name(shard) for shard in shards.values()):
        raise UnsafeRepoError(f"{name}: `weight_map` names a file outside this folder.")


_CHECKS = {
    "imitation.json": _check_imitation,
    "checks.json": _check_checks,
    "adapter_config.json": _check_adapter,
    "generation_config.json": _check_generation,
    "config.json": _check_config,
    "tokenizer_config.json": _check_tokenizer,
    "model.safetensors.index.json": _check_index,
}


def _check_kind(value: Any, kinds: tuple[type, ...], what: str) -> None:
    # A bool passes for an int in Python, and for nothing else here.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UnsafeRepoError(
            f"{what} is a {type(value).__name__}; it must be {' or '.join(k.__name__ for k in kinds)}."
        )


def _check_tokens(value: Any, what: str, least: int = 1) -> None:
    if value is None:
        return
    _check_kind(value, (int,), what)
    if not least <= value <= MAX_TOKENS:
        raise UnsafeRepoError(f"{what} is no number of tokens from {least} to {MAX_TOKENS:,}.")


def _values(pattern: Any) -> list[Any]:
    return list(pattern.values()) if isinstance(pattern, dict) else []


def _is_plain_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")


def _walk(value: Any) -> Iterable[tuple[str, Any]]:
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            yield from part.items()
        left.extend(children(part))


def _texts(value: Any) -> Iterable[str]:
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            yield part
        left.extend(children(part))
