"""An imitator that thinks before it answers, loaded for use: it hides the thought, and estimates its log-probability.

[`~hf_imitate.imitator.Imitator`] hands over to [`LatentImitator`] where `imitation.json` says "latent".
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_imitate.causal_lm import load_causal_lm
from hf_imitate.estimators import importance_weighted_log_prob
from hf_imitate.latent_draws import Drawn
from hf_imitate.questions import check_answer_lists
from hf_imitate.rendering import Answer, Rendered, Renderer
from hf_imitate.retrodictive_bounds import log_prob_lower_bound
from hf_imitate.retrodictor import RETRODICTOR, Retrodictor, Thinkers
from hf_imitate.rows import question_key
from hf_imitate.sampling import GumbelSampler, check_drawing, stream_key
from hf_imitate.scoring import check_positions, check_prompt_ids, check_temperature, evaluation_mode, num_positions
from hf_imitate.thoughts import ThoughtLaw
from hf_imitate.verification import CountingSampler, Verification, settle_tolerance

DEFAULT_NUM_ESTIMATES = 64
THOUGHT_INCLUDED = " (the longest thought is counted)"


class ThoughtAnswer(NamedTuple):
    """One sampled answer.

    Attributes:
        thought: what was thought before it, as text.
        answer: what it says.
        thought_ids: the thought's tokens, without the delimiter.
        ids: the answer's tokens, the end token included if it ended by itself.
    """

    thought: str
    answer: Answer
    thought_ids: list[int]
    ids: list[int]


class LatentLogProb(NamedTuple):
    """Log-probability of each answer, estimated from weighted thoughts. Nats, [N], fp64, on the CPU.

    Attributes:
        nats: log of the mean weight, a lower bound of log p in the mean; -inf where every weight is 0.
        lower_bound: what log p is at least, for each answer on its own, at the asked confidence (Markov).
        effective_sample_size: thoughts that the estimate rests on, from 1 to the number drawn; 0 if all weights are 0.
        log_weights: of each thought. [N, K].
    """

    nats: Tensor
    lower_bound: Tensor
    effective_sample_size: Tensor
    log_weights: Tensor


class LatentImitator:
    """The law of answers that follow hidden thoughts.

    Args:
        thinkers ([`~hf_imitate.retrodictor.Thinkers`]): imitator, retrodictor and the law of thoughts.
        renderer ([`~hf_imitate.rendering.Renderer`]): turns questions and answers into ids.
        max_answer_tokens (`int`): longest answer that is drawn, its end token included.
    """

    def __init__(self, thinkers: Thinkers, renderer: Renderer, max_answer_tokens: int):
        self.thinkers, self.renderer, self.max_answer_tokens = thinkers, renderer, max_answer_tokens

    @classmethod
    def load(
        cls,
        folder: Path,
        stored: dict[str, Any],
        model: PreTrainedModel | PeftModel,
        tokenizer: Any,
        renderer: Renderer,
        token: str | bool | None = None,
    ) -> "LatentImitator":
        """What a folder holds beside the imitator's weights, which are loaded already.

        Args:
            folder (`Path`): a repo's root.
            stored (`dict`): what its `imitation.json` holds.
            model: the imitator; a retrodictor that shares its base becomes an adapter of it.
            tokenizer: of the model.
            renderer: with the imitator's own end tokens.
            token: of the Hub, for a base of the retrodictor's own.

        Raises:
            FileNotFoundError: the retrodictor is missing, or is stored otherwise than as safetensors.
            ValueError: the law of thoughts is of a kind that is not known here, or of another vocabulary.
        """
        law = ThoughtLaw.from_json(stored["thoughts"])
        vocab_size = model.config.get_text_config().vocab_size
        if len(law.is_ordinary) != vocab_size:
            raise ValueError(
                f"The law of thoughts is over {len(law.is_ordinary)} tokens, and the model has {vocab_size}. The base "
                "is not the one it was trained on; check its revision."
            )
        thinkers = Thinkers(
            model=model,
            law=law,
            retrodictor=load_retrodictor(folder, model, token) if stored.get("has_retrodictor", True) else None,
            end_token_ids=renderer.end_token_ids,
            pad_token_id=renderer.end_token_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            positions=num_positions(model),
        )
        return cls(thinkers, renderer, stored["max_answer_tokens"])

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
        purpose: str = "answer",
        make_sampler: Callable[..., GumbelSampler] = GumbelSampler,
    ) -> list[list[ThoughtAnswer]]:
        """Think, then answer; draws depend on the question, the seed and the draw's number alone.

        Args:
            questions: all plain or all messages. N.
            num_answers: to each.
            seed: another seed, other draws.
            first_draw: number of the first draw.
            max_new_tokens: longest answer, the thought not counted; defaults to the longest one trained on.
            temperature: of thought and answer; 1.0 is the law that was trained.
            batch_size: most answers at once.
            progress: show a progress bar.
            purpose: draws for another purpose are independent of these.
            make_sampler: builds the sampler of each batch.
        """
        longest = self.max_answer_tokens if max_new_tokens is None else max_new_tokens
        sizes = {"num_answers": num_answers, "max_new_tokens": longest, "batch_size": batch_size}
        check_drawing(self.thinkers.model, temperature, first_draw, sizes)
        prompts = self.renderer.prompt_ids(questions) if questions else []
        check_prompt_ids(prompts)
        keys = [
            [stream_key(seed, purpose, question, first_draw + number) for number in range(num_answers)]
            for question in questions
        ]
        self.thinkers.max_rows = batch_size
        asked = [Rendered(ids, [], False) for ids in prompts]
        needed = [self.thinkers.longest_forward(row) + longest for row in asked]
        check_positions(needed, self.thinkers.positions, "questions", f"{THOUGHT_INCLUDED}, lower `max_new_tokens`")
        drawn: list[list[Drawn]] = []
        with tqdm(total=len(asked), desc="thinking and answering", disable=not progress) as bar:
            for chunk in _chunks(len(asked), num_answers, batch_size):
                drawn += self.thinkers.dream(asked[chunk], keys[chunk], longest, temperature, make_sampler)
                bar.update(len(asked[chunk]))
        decode = self.renderer.tokenizer.decode
        return [
            [
                ThoughtAnswer(
                    decode(one.thought_ids, clean_up_tokenization_spaces=False),
                    self.renderer.read(one.answer_ids),
                    *(one.thought_ids, one.answer_ids),
                )
                for one in own
            ]
            for own in drawn
        ]

    def log_prob(
        self,
        questions: Sequence[str | list[dict]],
        answers: Sequence[str],
        confidence: float = 0.95,
        seed: int = 0,
        num_estimates: int = DEFAULT_NUM_ESTIMATES,
        temperature: float = 1.0,
        batch_size: int = 64,
        progress: bool = False,
    ) -> LatentLogProb:
        """Estimate log p(answer | question) from thoughts drawn in hindsight, end token included.

        Every draw is used, and the thoughts behind different rows are independent, also where question and answer are
        the same: the bounds over a test set ask for that.

        Args:
            questions: N of them.
            answers: one to each.
            confidence: of `lower_bound`, for each answer on its own.
            seed: of the draws.
            num_estimates: thoughts drawn for each answer, K.
            temperature: scores the law that `answer(temperature=...)` draws from.
            batch_size: most sequences in one forward.
            progress: show a progress bar.
        """
        check_temperature(temperature)
        if num_estimates < 1:
            raise ValueError(f"`num_estimates` is {num_estimates}; at least 1 thought has to be drawn.")
        rows = self.renderer.human(questions, answers) if questions else []
        check_prompt_ids([row.prompt_ids for row in rows])
        needed = [self.thinkers.longest(row) for row in rows]
        check_positions(needed, self.thinkers.positions, "questions with their answers", THOUGHT_INCLUDED)
        seen: Counter[str] = Counter()
        keys = []
        for question, answer in zip(questions, answers, strict=True):
            purpose = f"log_prob {question_key(answer)}"
            pair = f"{purpose} {question_key(question)}"
            keys.append([stream_key(seed, purpose, question, k, seen[pair]) for k in range(num_estimates)])
            seen[pair] += 1
        self.thinkers.max_rows = batch_size
        log_weights = torch.zeros(len(rows), num_estimates, dtype=torch.float64)
        with (
            evaluation_mode(self.thinkers.model),
            tqdm(total=len(rows), desc="estimating", disable=not progress) as bar,
        ):
            for chunk in _chunks(len(rows), num_estimates, batch_size):
                log_p_joint, log_q, _ = self.thinkers.log_weights(rows[chunk], keys[chunk], temperature)
                # A draw that is no number counts as weight 0, never as no draw.
                log_weights[chunk] = torch.where((log_p_joint - log_q).isnan(), -torch.inf, log_p_joint - log_q)
                bar.update(len(rows[chunk]))
        estimate = importance_weighted_log_prob(log_weights, torch.zeros_like(log_weights))
        lower = torch.as_tensor(log_prob_lower_bound(log_weights.numpy(), confidence), dtype=torch.float64)
        return LatentLogProb(estimate.log_prob, lower, estimate.effective_sample_size, log_weights)

    def verify(
        self,
        questions: Sequence[str | list[dict]],
        answers: Sequence[Sequence[str]],
        seed: int,
        first_draw: int = 0,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        tolerance: float | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Verification:
        """Draw thoughts and answers again, and compare the answers' texts.

        The thought is not shown, so nothing can follow it: an answer whose text differs counts as one mismatch, and
        so does an honest one where rounding chose another of two tokens within the tolerance. `num_tokens` and
        `capacity_bits` count the decisions of thoughts, delimiters and answers together.

        Args:
            questions: as they were asked. N.
            answers: for each question its answers, in the order of their draws.
            seed, first_draw, max_new_tokens, temperature: what they were drawn with.
            tolerance: nats by which two logits may be off against each other.
            batch_size: most answers at once.
            progress: show a progress bar.
        """
        check_answer_lists(questions, answers)
        margin = settle_tolerance(self.thinkers.model, tolerance)
        samplers: list[CountingSampler] = []

        def make_sampler(keys: Any, length: int, temperature: float, end_token_ids: Any) -> CountingSampler:
            samplers.append(CountingSampler(keys, length, temperature, end_token_ids, tolerance=margin))
            return samplers[-1]

        most = max(map(len, answers), default=0)
        if not most:
            return Verification(0, 0, 0.0, True)
        settings = (first_draw, max_new_tokens, temperature, batch_size, progress)
        drawn = self.answer(questions, most, seed, *settings, make_sampler=make_sampler)
        close = len(self.thinkers.law.delimiter_ids)
        pairs = [pair for own, texts in zip(drawn, answers, strict=True) for pair in zip(own, texts, strict=False)]
        num_mismatched = sum(one.answer.text != text for one, text in pairs)
        return Verification(
            num_tokens=sum(len(one.thought_ids) + close + len(one.ids) for one, _ in pairs),
            num_mismatched=num_mismatched,
            capacity_bits=math.fsum(bits for sampler in samplers for bits in sampler.bits),
            verified=num_mismatched == 0,
        )


def _chunks(num_rows: int, draws_per_row: int, batch_size: int) -> Iterator[slice]:
    """Slices of rows, a few batches of draws each, so that progress can be shown and memory stays bounded."""
    size = max(1, 8 * batch_size // draws_per_row)
    return (slice(first, first + size) for first in range(0, num_rows, size))


def load_retrodictor(folder: Path, model: PreTrainedModel | PeftModel, token: str | bool | None = None) -> Retrodictor:
    """The retrodictor stored in a repo's folder: beside the imitator's adapter on one base, or on a base of its own.

    Raises:
        FileNotFoundError: there is none, or not as safetensors; no pickle is read.
    """
    own = folder / RETRODICTOR
    if not any(own.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} is a latent imitator without `{RETRODICTOR}/*.safetensors`, so nothing proposes the thoughts "
            "behind an answer. Load the whole repo; no pickle is read."
        )
    is_adapter = (own / "adapter_config.json").is_file()
    if is_adapter and isinstance(model, PeftModel) and _shares_base(model, own):
        active = model.active_adapter
        model.load_adapter(str(own), RETRODICTOR, is_trainable=False)
        model.set_adapter(active)
        model.requires_grad_(False)
        return Retrodictor(model, RETRODICTOR)
    loaded, _ = load_causal_lm(own, model.device, model.dtype, token)
    return Retrodictor(loaded)


def _shares_base(model: PeftModel, own: Path) -> bool:
    config, mine = PeftConfig.from_pretrained(str(own)), model.peft_config[model.active_adapter]
    same = (config.base_model_name_or_path, config.revision) == (mine.base_model_name_or_path, mine.revision)
    return same and isinstance(config, LoraConfig) and isinstance(mine, LoraConfig)
