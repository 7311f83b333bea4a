"""Everything a model card may say about an imitator, gathered before a word of the card is written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hf_imitate.audits.report import AuditReport

# The Hub's own rule: an optional owner, then a name; 96 characters, no leading or trailing mark.
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_ARXIV_ID = re.compile(r"\d{4}\.\d{4,5}(?:v\d+)?", re.ASCII)

# Nothing that could lead out of the repository, or be anything else than a picture's plain name.
_FIGURE = re.compile(r"(?:[A-Za-z0-9][\w-]*/)*[A-Za-z0-9][\w-]*\.png", re.ASCII)
_MOST_NAME = 300  # characters; the Hub's own limit is 96 for each part of an id

TRAINED_LAW: Mapping[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""The settings under which `generate` samples the law that was trained: the model's own, cut nowhere."""


class CardMetric(NamedTuple):
    """
    One measured number as the card shows it.

    Args:
        value (`float` or `None`):
            The measurement; `None` prints "not measured".
        unit (`str`, *optional*, defaults to `""`):
            What the number counts, e.g. `"bits"`, `"probability"`, `"ratio"`.
        interval (`tuple[float, float]`, *optional*):
            Lower and upper end, in the same unit; `None` prints "not stated".
    """

    value: float | None
    unit: str = ""
    interval: tuple[float, float] | None = None


class Sample(NamedTuple):
    """
    One question, asked for the card, and what the imitator answered; never a row of anybody's data.

    Args:
        question (`str`):
            What was asked, by whoever makes the card.
        answer (`str`):
            What it wrote.
    """

    question: str
    answer: str


@dataclass(frozen=True)
class Paper:
    """
    A paper the objective comes from; its fields are the keys of TRL's `_paper`, so `Paper(**trainer._paper)` works.

    Args:
        title (`str`):
            Title in full.
        id (`str`):
            arXiv identifier, linked as `https://huggingface.co/papers/<id>`; empty if it has none.
        citation (`str`):
            BibTeX entry.
    """

    title: str
    id: str
    citation: str

    @property
    def url(self) -> str | None:
        """The paper's page on the Hub, or `None` if `id` is no arXiv identifier."""
        return f"https://huggingface.co/papers/{self.id}" if _ARXIV_ID.fullmatch(self.id) else None


@dataclass(frozen=True)
class CardFacts:
    """
    All a card may state about one imitator. What is left at its default is unknown, and the card says so.

    Strings may come from anywhere (a data set's name, a file name): they are escaped when the card is rendered, never
    here.

    Args:
        model_name (`str`):
            Name at the top of the card.
        objective (`str`):
            Name of the training objective, e.g. `"Adversarial imitation"`.
        repo_id (`str`, *optional*):
            `owner/name` on the Hub; without it, the quick start loads `model_name` as a local directory.
        base_model (`str`, *optional*):
            Model training started from: a Hub id, or a local path (then never linked, and only its last part shown).
        base_revision (`str`, *optional*):
            Commit or branch of `base_model`.
        started_from (`str`, *optional*):
            Adapter on `base_model` whose training went on: a Hub id, or a local path (then only its last part shown).
        papers (`tuple[Paper, ...]`, *optional*):
            Where the objective comes from.
        dataset_name (`str`, *optional*):
            A Hub id, a local path, or any other name.
        answered_by (`str`, *optional*):
            Whose answers the data set holds, in words: `"members of a chess club, who agreed to it"`.
        num_rows (`int`, *optional*):
            Training rows.
        num_labelled (`int`, *optional*):
            Training rows that hold a human's answer.
        is_conversational (`bool`, *optional*, defaults to `False`):
            Whether questions are lists of messages; the quick start asks in the same form.
        completion_role (`str`, *optional*, defaults to `"assistant"`):
            Whose turn it speaks in. The user's no template opens by itself: the quick start is then `Imitator`.
        settings (`Mapping[str, Any]`, *optional*):
            Settings that decide the result, by argument name.
        metrics (`Mapping[str, CardMetric]`, *optional*):
            Measurements by name; plain `(value, unit, interval)` tuples do as well.
        curves (`Mapping[str, Sequence[tuple[int, float]]]`, *optional*):
            (step, value) of what was logged while training, by name, in order.
        audit ([`~hf_imitate.AuditReport`], *optional*):
            What an audit of these weights found.
        figures (`tuple[str, ...]`, *optional*):
            Pictures, as paths inside the repository: `"audit/losses.png"`.
        samples (`tuple[Sample, ...]`, *optional*):
            Questions asked for the card, with answers. Shown fenced, escaped and cut; none unless somebody asks.
        versions (`Mapping[str, str]`, *optional*):
            Library to version.
        tags (`tuple[str, ...]`, *optional*):
            Hub tags in addition to those every card carries.
        license (`str`, *optional*):
            The licence, if somebody chose one: an id of the Hub's, or the name of another.
        is_adapter (`bool`, *optional*, defaults to `False`):
            Whether the repository holds a PEFT adapter rather than full weights.
        engine (`str`, *optional*):
            What it was trained on, by its name in [`~hf_imitate.hub_cards.engines.ENGINES`].
        thinks_first (`bool`, *optional*, defaults to `False`):
            Whether a hidden thought comes before each answer: the quick start is then `Imitator`, since plain loading
            gives the weights but not the law.
        has_distinguisher (`bool`, *optional*, defaults to `False`):
            Whether `distinguisher/` lies beside the imitator.
        check_names (`tuple[str, ...]`, *optional*):
            Checks the distinguisher was trained with.
        limits (`tuple[str, ...]`, *optional*):
            Sentences on what this model cannot do, beyond those true of every imitator.
        generation (`Mapping[str, Any]`, *optional*, defaults to `TRAINED_LAW`):
            Settings of `generate` that reproduce the trained law; add `max_new_tokens`.

    Raises:
        ValueError: `num_labelled` exceeds `num_rows`, a metric is not (value, unit, interval), or a figure is no
            picture inside the repository.
    """

    model_name: str
    objective: str
    repo_id: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    started_from: str | None = None
    papers: tuple[Paper, ...] = ()
    dataset_name: str | None = None
    answered_by: str | None = None
    num_rows: int | None = None
    num_labelled: int | None = None
    is_conversational: bool = False
    completion_role: str = "assistant"
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, CardMetric] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    audit: AuditReport | None = None
    figures: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    license: str | None = None
    is_adapter: bool = False
    engine: str | None = None
    thinks_first: bool = False
    has_distinguisher: bool = False
    check_names: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=lambda: dict(TRAINED_LAW))

    def __post_init__(self) -> None:
        if self.num_rows is not None and self.num_labelled is not None and self.num_labelled > self.num_rows:
            raise ValueError(
                f"`num_labelled` is {self.num_labelled} but `num_rows` is only {self.num_rows}; rows with a human's "
                "answer are a part of all rows. Count both on the same training set."
            )
        for name, metric in self.metrics.items():
            if not isinstance(metric, tuple) or not 1 <= len(metric) <= 3:
                raise ValueError(
                    f"`metrics[{name!r}]` is {metric!r}; a metric is (value, unit, interval). "
                    'Write for example `CardMetric(0.53, "probability", (0.49, 0.57))`.'
                )
        for figure in self.figures:
            if _FIGURE.fullmatch(figure) is None:
                raise ValueError(
                    f"`figures` holds {figure!r}; a figure is the path of a .png inside the repository, such as "
                    "'audit/losses.png', in plain letters."
                )

    @property
    def metric_rows(self) -> tuple[tuple[str, CardMetric], ...]:
        """(name, metric) in the order given, each metric a full `CardMetric`."""
        return tuple((name, CardMetric(*metric)) for name, metric in self.metrics.items())

    @property
    def curve_rows(self) -> tuple[tuple[str, Sequence[tuple[int, float]]], ...]:
        """(name, points) of every curve that has a point."""
        return tuple((name, points) for name, points in self.curves.items() if points)

    @property
    def asks_as(self) -> str:
        """Whose message a question in the card is."""
        return "assistant" if self.completion_role == "user" else "user"

    @property
    def load_from(self) -> str:
        """What `from_pretrained` is given in the card's code. What no repository can be called is cut."""
        return (self.repo_id or self.model_name)[:_MOST_NAME]

    @property
    def hub_base_model(self) -> str | None:
        """`base_model` if it can be the id of a model on the Hub, else `None`."""
        return hub_id_or_none(self.base_model)

    @property
    def hub_start(self) -> str | None:
        """`started_from` if it can be the id of a model on the Hub, else `None`."""
        return hub_id_or_none(self.started_from)

    @property
    def hub_dataset(self) -> str | None:
        """`dataset_name` if it can be the id of a data set on the Hub (`owner/name`), else `None`."""
        hub_id = hub_id_or_none(self.dataset_name)
        # A bare word is far likelier a name of our own ("docstrings") than one of the Hub's few ownerless data sets.
        return hub_id if hub_id is not None and "/" in hub_id else None


def is_figure(path: str) -> bool:
    """Whether a card may show the file at `path`, relative to the repository, as a picture."""
    return _FIGURE.fullmatch(path) is not None


def hub_id_or_none(name: str | None) -> str | None:
    """
    Return `name` if others could find it on the Hub, and `None` if it is a local path or no valid id.

    Args:
        name (`str`, *optional*):
            A Hub id or a path. A path that exists on this machine is local even if it looks like an id.

    Returns:
        `str` or `None`.
    """
    if name is None or _HUB_ID.fullmatch(name) is None or "--" in name or ".." in name:
        return None
    return None if Path(name).exists() else name
