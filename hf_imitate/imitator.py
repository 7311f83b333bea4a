"""One base with its adapters: answer as the imitator, give answers their log-probability, ask the distinguisher."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from hf_imitate.candidates import check_resampling, checks_in_order, logits_of
from hf_imitate.causal_lm import load_causal_lm, repo_folder
from hf_imitate.checks import Check
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.latent_imitator import DEFAULT_NUM_ESTIMATES, LatentImitator
from hf_imitate.log_prob_reports import LogProb, estimated_log_prob, exact_log_prob
from hf_imitate.questions import check_columns, check_pairs, check_questions
from hf_imitate.rendering import Answer, Renderer, end_token_ids
from hf_imitate.residual_imitator import DEFAULT_NUM_ESTIMATES_RESAMPLED, ResidualImitator
from hf_imitate.residual_verification import verify_resampled
from hf_imitate.sampling import draw_answers
from hf_imitate.verification import Verification, verify_answers

DEFAULT_MAX_NEW_TOKENS = 256


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
        latent ([`~hf_imitate.latent_imitator.LatentImitator`], *optional*):
            Of an imitator that thinks before it answers, its law; `latent.answer(...)` gives the thoughts, too.

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
        self.latent: LatentImitator | None = None
        self._distinguisher = distinguisher
        self._distinguisher_source: tuple[Path, dict[str, Any]] | None = None

    @classmethod
    def from_pretrained(
        cls,
        repo: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
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
            token (`str` or `bool`, *optional*):
                For private repos and bases, as `huggingface_hub` takes it; defaults to `HF_TOKEN` or the saved login.

        Raises:
            FileNotFoundError: there is no such repo, or it holds no causal LM; the message says what was found.
            ValueError: the weights are those of another kind of model.
        """
        root = repo_folder(repo, revision, token)
        model, tokenizer = load_causal_lm(root, device, dtype, token)
        file = root / "imitation.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        imitator = cls(
            model,
            tokenizer,
            chat_template_kwargs=stored.get("chat_template_kwargs"),
            max_new_tokens=model.generation_config.max_new_tokens or stored.get("max_answer_tokens"),
            completion_role=stored.get("completion_role", "assistant"),
        )
        if stored.get("objective") == "latent":
            imitator.max_new_tokens = stored["max_answer_tokens"]
            imitator.latent = LatentImitator.load(root, stored, model, tokenizer, imitator.renderer, token)
        if (root / "distinguisher" / "checks.json").is_file():
            imitator._distinguisher_source = (root, {"device": model.device, "dtype": dtype, "token": token})
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
            self._distinguisher.speak_as(self.renderer.completion_role)
        return self._distinguisher

    def residual(
        self,
        resample: int = 8,
        checks: Sequence[Check] | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
    ) -> ResidualImitator:
        """The law that `resample=K` speaks of, for what else it can tell: the candidates themselves, how many of them
        count (`resampling`), a certificate from both sides (`enclose_log_prob`). Arguments as in `answer`."""
        longest = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        law: dict[str, Any] = {"max_new_tokens": longest, "temperature": temperature, "latent": self.latent}
        return ResidualImitator(self.model, self.renderer, self.distinguisher, resample=resample, checks=checks, **law)

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
        resample: int = 1,
        checks: Sequence[Check] | None = None,
        **columns: Sequence[Any],
    ) -> list[list[str]]:
        """Draw answers. They do not depend on the other questions asked, nor on `batch_size`.

        With `resample=K`, K candidates are drawn for each answer, and one is kept with probability softmax of the
        distinguisher's logits: nearer to the human's law, see [`~hf_imitate.residual`], at K times the cost.

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
                Show a progress bar, and with `resample` what it cost.
            resample (`int`, defaults to 1):
                Number of candidates per answer; 1 is the plain imitator and asks no distinguisher. The first candidate
                is the plain imitator's answer.
            checks (`list[Callable]`, *optional*):
                The checks the distinguisher was trained with.
            columns:
                The data set's other columns, one value per question; passed to the checks.

        Returns:
            `list[list[str]]`: for each question its answers, as sampled, without end token.

        Raises:
            FileNotFoundError: `resample` is not 1, and the imitator came without a distinguisher.
            TypeError, ValueError: a setting is out of range, or `checks` and `columns` do not fit.
        """
        check_questions(questions)
        check_resampling(resample, checks, columns, len(questions))
        settings: dict[str, Any] = {"num_answers": num_answers, "seed": seed, "first_draw": first_draw}
        settings |= {"batch_size": batch_size, "progress": progress}
        longest = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        draws: list
        if resample != 1:
            draws = self.residual(resample, checks, longest, temperature).answer(
                questions, **settings, columns=columns
            )
        elif self.latent is not None:
            draws = self.latent.answer(questions, max_new_tokens=longest, temperature=temperature, **settings)
        else:
            settings |= {"max_new_tokens": longest, "temperature": temperature}
            draws = draw_answers(self.model, self.renderer, questions, **settings)
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
        resample: int = 1,
        checks: Sequence[Check] | None = None,
        **columns: Sequence[Any],
    ) -> Verification:
        """Check that answers are what [`~Imitator.answer`] gives, by one forward per answer, not by drawing again.

        Where a hidden thought stands before the answer, thought and answer are drawn again; with `resample`, so are
        all candidates, and the choice between them is made again ([`~hf_imitate.residual_verification`]).

        Args:
            questions (`list[str]` or `list[list[dict]]`):
                Questions, as they were asked.
            answers (`list[list[str]]`):
                What `answer` returned, or somebody says it did.
            seed (`int`, defaults to 0):
                What they were drawn with. It should have been drawn after the imitator was frozen.
            first_draw, max_new_tokens, temperature, resample, checks, columns:
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
        check_questions(questions)
        check_resampling(resample, checks, columns, len(questions))
        settings: dict[str, Any] = {"seed": seed, "first_draw": first_draw, "tolerance": tolerance}
        settings |= {"batch_size": batch_size, "progress": progress}
        longest = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        if resample != 1:
            law = self.residual(resample, checks, longest, temperature)
            return verify_resampled(law, questions, answers, **settings, columns=columns)
        settings |= {"max_new_tokens": longest, "temperature": temperature}
        if self.latent is not None:
            return self.latent.verify(questions, answers, **settings)
        return verify_answers(self.model, self.renderer, questions, answers, **settings)

    def log_prob(
        self,
        questions: Sequence[str | list[dict]],
        answers: Sequence[str],
        confidence: float = 0.95,
        seed: int = 0,
        num_estimates: int | None = None,
        temperature: float = 1.0,
        batch_size: int = 64,
        progress: bool = False,
        resample: int = 1,
        checks: Sequence[Check] | None = None,
        **columns: Sequence[Any],
    ) -> LogProb:
        """Log-probability of whole answers, end token included, however long.

        It is exact and nothing is drawn, unless a hidden thought stands before the answer: then it is estimated from
        thoughts drawn in hindsight, [`~hf_imitate.latent_imitator.LatentImitator.log_prob`]; or answers are resampled:
        then from fresh candidates, [`~hf_imitate.residual_imitator.ResidualImitator.log_prob`].

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
            num_estimates (`int`, *optional*):
                Draws behind an estimate, for each answer: thoughts, 64 by default; or sets of `resample` - 1
                candidates, 8 by default (64 where thoughts precede them).
            temperature (`float`, defaults to 1.0):
                Scores softmax(logits / temperature), the law that `answer(temperature=...)` draws from.
            batch_size (`int`, defaults to 64):
                Most answers in one forward.
            progress (`bool`, defaults to `False`):
                Show a progress bar.
            resample, checks, columns:
                As in `answer`: scores the law of those answers. Their limit is the trained law's.

        Returns:
            [`LogProb`].

        Raises:
            FileNotFoundError: `resample` is not 1, and the imitator came without a distinguisher.
            TypeError, ValueError: questions and answers do not belong together, or a setting is out of range.
        """
        check_pairs(questions, answers)
        check_resampling(resample, checks, columns, len(questions))
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` is {confidence}; it must lie between 0 and 1, such as 0.95.")
        if num_estimates is None:
            num_estimates = DEFAULT_NUM_ESTIMATES if self.latent is not None else DEFAULT_NUM_ESTIMATES_RESAMPLED
        if resample != 1:
            law = self.residual(resample, checks, temperature=temperature)
            own = (confidence, seed, num_estimates, batch_size, progress, columns)
            return estimated_log_prob(law.log_prob(questions, answers, *own))
        if self.latent is not None:
            drawn = (confidence, seed, num_estimates, temperature, batch_size, progress)
            return estimated_log_prob(self.latent.log_prob(questions, answers, *drawn))
        return exact_log_prob(self.model, self.renderer, questions, answers, temperature, batch_size, progress)

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
        check_pairs(questions, answers)
        distinguisher = self.distinguisher
        if text_only and checks:
            raise ValueError("`text_only=True` leaves the checks out, and `checks` were given. Drop one of the two.")
        cure = ", or `text_only=True` for the text's logit alone"
        in_order = [] if text_only else checks_in_order(distinguisher, checks, cure)
        check_columns(columns, len(answers))
        as_written = [Answer(text, True) for text in answers]
        return logits_of(distinguisher, self.renderer, questions, as_written, in_order, columns)
