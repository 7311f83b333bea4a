"""One base with its adapters: answer as the imitator, give answers their log-probability, ask the distinguisher."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from hf_imitate.causal_lm import load_causal_lm, repo_folder
from hf_imitate.checks import Check, check_names, check_outcomes
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.rendering import Answer, Renderer, end_token_ids
from hf_imitate.sampling import draw_answers
from hf_imitate.scoring import score_answers
from hf_imitate.verification import Verification, verify_answers

DEFAULT_MAX_NEW_TOKENS = 256


class LogProb(NamedTuple):
    """Log-probability of each answer, nats.

    Attributes:
        nats (`torch.Tensor`): log p(answer | question), [N], fp64.
        lower_bound (`torch.Tensor`): what log p is at least, for each answer on its own, at the asked confidence. [N].
        effective_sample_size (`torch.Tensor`): draws that an estimate rests on, from 1; infinite where exact. [N].
        is_exact (`torch.Tensor`): whether `nats` is no estimate; `lower_bound` then equals it. [N], bool.
    """

    nats: Tensor
    lower_bound: Tensor
    effective_sample_size: Tensor
    is_exact: Tensor


class Imitator:
    """A causal LM that answers as the people it was trained on: its law is softmax(logits), untruncated.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The causal LM; of a PEFT model, the active adapter counts. Its `generation_config` says which tokens end an
            answer and how long one may be.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        distinguisher ([`Distinguisher`], *optional*):
            What `human_logit` asks.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template of conversational questions.
        max_new_tokens (`int`, *optional*):
            Longest answer, its end token included; defaults to the generation config's, else 256.
        completion_role (`str`, defaults to `"assistant"`):
            Whose turn it speaks in a conversation: `"assistant"`, `"user"`, or `"alternating"`, see
            [`~hf_imitate.rendering.Renderer`].

    Attributes:
        renderer ([`~hf_imitate.rendering.Renderer`]): turns questions and answers into ids; it cuts nothing.

    Example:

    ```python
    imitator = Imitator.from_pretrained("me/me-imitator")
    answers = imitator.answer(["What is on your mind?"], num_answers=4)[0]
    nats = imitator.log_prob(["What is on your mind?"] * 4, answers).nats
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: Any,
        *,
        distinguisher: Distinguisher | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_new_tokens: int | None = None,
        completion_role: str = "assistant",
    ):
        self.model, self.tokenizer = model, tokenizer
        generation_config = model.generation_config
        self.renderer = Renderer(
            tokenizer,
            end_token_ids(tokenizer, generation_config),
            chat_template_kwargs=chat_template_kwargs,
            completion_role=completion_role,
        )
        self.max_new_tokens = max_new_tokens or generation_config.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        self._distinguisher = distinguisher
        self._distinguisher_source: tuple[Path, dict[str, Any]] | None = None

    @classmethod
    def from_pretrained(
        cls,
        repo: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> "Imitator":
        """Load an imitator that was saved by a trainer, or any causal LM with safetensors weights.

        No code from the repo is run, and no pickle is read.

        Args:
            repo (`str` or `Path`):
                Hub repo id or local folder: an adapter (its base is loaded, too) or full weights.
            device (`str` or `torch.device`, *optional*):
                Defaults to the machine's accelerator, else the CPU.
            dtype (`torch.dtype`, *optional*):
                Defaults to float32 on the CPU and to the weights' own type elsewhere.
            revision (`str`, *optional*):
                Branch, tag or commit of a Hub repo.

        Raises:
            FileNotFoundError: there is no such repo, or it holds no causal LM; the message says what was found.
            ValueError: the weights are those of another kind of model.
        """
        root = repo_folder(repo, revision)
        model, tokenizer = load_causal_lm(root, device, dtype)
        file = root / "imitation.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        imitator = cls(
            model,
            tokenizer,
            chat_template_kwargs=stored.get("chat_template_kwargs"),
            max_new_tokens=model.generation_config.max_new_tokens or stored.get("max_answer_tokens"),
            completion_role=stored.get("completion_role", "assistant"),
        )
        if (root / "distinguisher" / "checks.json").is_file():
            imitator._distinguisher_source = (root, {"device": model.device, "dtype": dtype})
        return imitator

    @property
    def distinguisher(self) -> Distinguisher:
        """The distinguisher it was trained with, loaded when first asked for; on the same base where it can be.

        Raises:
            FileNotFoundError: the imitator came without one.
        """
        if self._distinguisher is None:
            if self._distinguisher_source is None:
                raise FileNotFoundError(
                    "This imitator has no distinguisher: there is no folder `distinguisher/` beside it. "
                    "AdversarialTrainer saves one; or pass your own, `Imitator(model, tokenizer, distinguisher=...)`."
                )
            folder, loading = self._distinguisher_source
            base = self.model if isinstance(self.model, PeftModel) else None
            self._distinguisher = Distinguisher.from_pretrained(folder, base=base, **loading)
            self._distinguisher.renderer.completion_role = self.renderer.completion_role
        return self._distinguisher

    def answer(
        self,
        questions: Sequence[str | list[dict]],
        num_answers: int = 1,
        seed: int = 0,
        first_draw: int = 0,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        batch_size: int = 64,
        progress: bool = False,
    ) -> list[list[str]]:
        """Draw answers. They do not depend on the other questions asked, nor on `batch_size`.

        Args:
            questions (`list[str]` or `list[list[dict]]`):
                Questions, all plain or all messages.
            num_answers (`int`, defaults to 1):
                Answers to each.
            seed (`int`, defaults to 0):
                Another seed, other answers. Equal questions get equal answers under one seed and draw number.
            first_draw (`int`, defaults to 0):
                Number of the first draw: `first_draw=4` continues the series that `num_answers=4` began.
            max_new_tokens (`int`, *optional*):
                Longest answer in tokens; longer ones are cut there. Defaults to the trained law's limit.
            temperature (`float`, defaults to 1.0):
                1.0 is the law that was trained.
            batch_size (`int`, defaults to 64):
                Most answers at once.
            progress (`bool`, defaults to `False`):
                Show a progress bar.

        Returns:
            `list[list[str]]`: for each question its answers, as sampled, without end token.
        """
        _check_questions(questions)
        draws = draw_answers(
            self.model,
            self.renderer,
            questions,
            num_answers=num_answers,
            seed=seed,
            first_draw=first_draw,
            max_new_tokens=self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            progress=progress,
        )
        return [[draw.answer.text for draw in of_question] for of_question in draws]

    def verify(
        self,
        questions: Sequence[str | list[dict]],
        answers: Sequence[Sequence[str]],
        seed: int = 0,
        first_draw: int = 0,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        tolerance: float | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Verification:
        """Check that answers are what [`~Imitator.answer`] gives, by one forward per answer, not by drawing again.

        Args:
            questions (`list[str]` or `list[list[dict]]`):
                Questions, as they were asked.
            answers (`list[list[str]]`):
                What `answer` returned, or somebody says it did.
            seed (`int`, defaults to 0):
                What they were drawn with. It should have been drawn after the imitator was frozen.
            first_draw (`int`, defaults to 0):
                As in `answer`.
            max_new_tokens (`int`, *optional*):
                As in `answer`.
            temperature (`float`, defaults to 1.0):
                As in `answer`.
            tolerance (`float`, *optional*):
                Nats by which two logits may be off against each other through rounding. Defaults to 1e-3 in float32
                and to 0.25 in lower precision.
            batch_size (`int`, defaults to 64):
                Most answers in one forward.
            progress (`bool`, defaults to `False`):
                Show a progress bar.

        Returns:
            [`~hf_imitate.verification.Verification`]: `num_tokens`, `num_mismatched`, `capacity_bits` (most bits that
            could still be hidden in the answers together) and `verified`. See
            [`~hf_imitate.verification.verify_answers`] for the rule.

        Raises:
            TypeError, ValueError: questions and answers do not belong together, or a setting is out of range.
        """
        _check_questions(questions)
        return verify_answers(
            self.model,
            self.renderer,
            questions,
            answers,
            seed=seed,
            first_draw=first_draw,
            max_new_tokens=self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            tolerance=tolerance,
            batch_size=batch_size,
            progress=progress,
        )

    def log_prob(
        self,
        questions: Sequence[str | list[dict]],
        answers: Sequence[str],
        confidence: float = 0.95,
        seed: int = 0,
        temperature: float = 1.0,
        batch_size: int = 64,
        progress: bool = False,
    ) -> LogProb:
        """Log-probability of whole answers, end token included, however long; exact, so nothing is drawn.

        As in training, an answer is spelled canonically first ([`~hf_imitate.rendering.canonical_text`]) and scored in
        the tokenizer's own ids: other ids that spell the same only add probability.

        Args:
            questions (`list[str]` or `list[list[dict]]`):
                Questions. N of them.
            answers (`list[str]`):
                One answer to each.
            confidence (`float`, defaults to 0.95):
                Of `lower_bound`, where `nats` is an estimate.
            seed (`int`, defaults to 0):
                Of the draws behind an estimate.
            temperature (`float`, defaults to 1.0):
                Scores softmax(logits / temperature), the law that `answer(temperature=...)` draws from.
            batch_size (`int`, defaults to 64):
                Most answers in one forward.
            progress (`bool`, defaults to `False`):
                Show a progress bar.

        Returns:
            [`LogProb`].

        Raises:
            TypeError, ValueError: questions and answers do not belong together, or a setting is out of range.
        """
        _check_pairs(questions, answers)
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` is {confidence}; it must lie between 0 and 1, such as 0.95.")
        rows = self.renderer.human(questions, answers) if questions else []
        nats = score_answers(
            self.model,
            rows,
            self.tokenizer.pad_token_id or 0,
            batch_size=batch_size,
            temperature=temperature,
            progress=progress,
        )
        is_exact = torch.ones(len(rows), dtype=torch.bool)
        return LogProb(nats, nats.clone(), torch.full_like(nats, torch.inf), is_exact)

    def human_logit(
        self,
        questions: Sequence[str | list[dict]],
        answers: Sequence[str],
        checks: Sequence[Check] | None = None,
        text_only: bool = False,
        **columns: Sequence[Any],
    ) -> Tensor:
        """The distinguisher's logit of each answer; high means a human wrote it.

        Args:
            questions (`list[str]` or `list[list[dict]]`):
                Questions. N of them.
            answers (`list[str]`):
                One answer to each. One longer than the distinguisher reads is cut, as in training.
            checks (`list[Callable]`, *optional*):
                The checks it was trained with.
            text_only (`bool`, defaults to `False`):
                Leave out what the checks add to the logit.
            columns:
                The data set's other columns, one value per answer; passed to the checks.

        Returns:
            `torch.Tensor`: logits, [N], fp32, on the CPU.

        Raises:
            FileNotFoundError: the imitator came without a distinguisher.
            ValueError: `checks` are not those it was trained with, and `text_only` is not set.
        """
        _check_pairs(questions, answers)
        distinguisher = self.distinguisher
        by_name = dict(zip(check_names(checks or ()), checks or (), strict=True))
        if text_only and by_name:
            raise ValueError("`text_only=True` leaves the checks out, and `checks` were given. Drop one of the two.")
        if not text_only and set(by_name) != set(distinguisher.check_names):
            raise ValueError(
                f"The distinguisher was trained with the checks {sorted(distinguisher.check_names)}; got "
                f"{sorted(by_name)}. Pass those functions as `checks`, or `text_only=True` for the text's logit alone."
            )
        for name, values in columns.items():
            if len(values) != len(answers):
                raise ValueError(
                    f"Column `{name}` has {len(values)} values for {len(answers)} answers; give one each."
                )
        outcomes = None
        if by_name and answers:
            completions = list(map(self.renderer.as_completion, questions, answers))
            in_order = [by_name[name] for name in distinguisher.check_names]
            outcomes = check_outcomes(in_order, questions, completions, None, **columns)
        return distinguisher.score(questions, [Answer(text, True) for text in answers], outcomes).cpu()


def _check_questions(questions: Sequence[str | list[dict]]) -> None:
    if isinstance(questions, str):
        raise TypeError("`questions` is one string; give a list, `[question]`.")
    kinds = [
        "text" if isinstance(q, str) else "messages" if isinstance(q, list) else type(q).__name__ for q in questions
    ]
    for index, kind in enumerate(kinds):
        if kind not in ("text", "messages"):
            raise TypeError(
                f"questions[{index}] is a {kind}; give text, or a list of messages such as "
                '`[[{"role": "user", "content": "..."}]]`.'
            )
        if kind != kinds[0]:
            raise TypeError(
                f"questions[{index}] is {kind}, questions[0] is {kinds[0]}. Ask each kind in a call of its own."
            )


def _check_pairs(questions: Sequence[str | list[dict]], answers: Sequence[str]) -> None:
    _check_questions(questions)
    if isinstance(answers, str) or len(answers) != len(questions):
        found = "one string" if isinstance(answers, str) else f"{len(answers)} answers"
        raise ValueError(f"Give one answer to each question, as a list: got {len(questions)} questions and {found}.")
    for index, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise TypeError(
                f"answers[{index}] is a {type(answer).__name__}; give one string per question. For several answers to "
                "one question, repeat the question."
            )
