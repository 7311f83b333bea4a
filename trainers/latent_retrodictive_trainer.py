"""Retrodictive imitation through hidden thoughts: log p of a human's answer, estimated from thoughts in hindsight."""

import logging
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer

from hf_imitate.classifier import without_dropout
from hf_imitate.log_probs import nats_to_bits
from hf_imitate.retrodictor import Thinkers
from hf_imitate.rows import is_conversational_row
from hf_imitate.sampling import check_drawing
from hf_imitate.scoring import num_positions
from hf_imitate.thoughts import settle_thought_law
from hf_imitate.trainers.adversarial_inputs import check_best_metric
from hf_imitate.trainers.adversarial_setup import preserved_random_state, show_total
from hf_imitate.trainers.checkpoints import TakeUpTheLog, rows_digest
from hf_imitate.trainers.engines import Engine
from hf_imitate.trainers.finite import FiniteSteps, at_step, check_loss
from hf_imitate.trainers.latent_learner import WARMUP, RetrodictorLearner, Warmup
from hf_imitate.trainers.latent_retrodictive_config import LatentRetrodictiveConfig
from hf_imitate.trainers.latent_rows import (
    PREPARED,
    check_latent_rows,
    collate_latent_rows,
    prepare_latent_rows,
)
from hf_imitate.trainers.latent_saving import LatentSaving
from hf_imitate.trainers.latent_setup import (
    COLUMNS,
    METRICS,
    build_retrodictor,
    check_no_retrodictor,
    settle_padding,
)
from hf_imitate.trainers.latent_steps import LatentSteps
from hf_imitate.trainers.ranks import agreed
from hf_imitate.trainers.retrodictive_rows import RowCounts, settle_renderer
from hf_imitate.trainers.starting_model import starting_model
from hf_imitate.trainers.tally import Tally

logger = logging.getLogger(__name__)


class LatentRetrodictiveTrainer(FiniteSteps, LatentSaving, SFTTrainer):
    """Train a causal LM that thinks before it answers to give what humans really answered the highest log-probability.

    The imitator writes a hidden thought z, a delimiter, then the answer y, so log p(y | x) is a sum over thoughts. A
    retrodictor q has seen the answer and guesses the thought behind it. With z_1 .. z_K drawn from q,

        w_k = p(z_k, y | x) / q(z_k | x, y)        log p(y | x)  ~  L_K = log mean_k w_k,   E L_K <= log p(y | x)

    in nats, over all tokens, delimiter and end token included. The imitator ascends L_K; by default ("rws") the
    retrodictor descends KL(posterior || q). They are two LoRA adapters on one base and share no trained parameter
    (with full fine-tuning, q is an adapter on a frozen copy of the starting base); each has its own backward. One law
    of thoughts holds wherever they are drawn or scored: ordinary tokens only, renormalised, closed by force at
    `max_thought_length`. Before the first step q learns from the imitator's own dreams. A row's `thought`, where
    known, is an exact sample of the posterior: both models learn its likelihood.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The imitator to train: any causal LM, or an adapter to train further, with a new retrodictor.
        args ([`LatentRetrodictiveConfig`], *optional*): settings.
        train_dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and `completion`, plain or conversational; optional `weight` (float) and `thought` (text
            that the human thought; "" for none, `None` where it is not known). Other columns are not read.
        eval_dataset ([`~datasets.Dataset`] or `dict`, *optional*): rows of the same form; their thoughts are not read.
        retrodictor_peft_config ([`~peft.PeftConfig`], *optional*): the retrodictor's adapter; the imitator's, else.
        processing_class, callbacks, optimizers, quantization_config, peft_config: as in [`~trl.SFTTrainer`].

    Example:

    ```python
    from hf_imitate import LatentRetrodictiveConfig, LatentRetrodictiveTrainer
    from peft import LoraConfig

    trainer = LatentRetrodictiveTrainer(
        model="Qwen/Qwen3-0.6B",
        args=LatentRetrodictiveConfig(output_dir="me-imitator", thought_delimiter="</think>"),
        train_dataset=dataset["train"],
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["hf-imitate", "trl", "imitation-learning", "latent-retrodictive-imitation"]
    _name = "Latent retrodictive imitation"
    _paper = {
        "title": "Reweighted Wake-Sleep",
        "id": "1406.2751",
        "citation": textwrap.dedent("""\
            @inproceedings{bornschein2015reweighted,
                title     = {{Reweighted Wake-Sleep}},
                author    = {J{\\"o}rg Bornschein and Yoshua Bengio},
                booktitle = {International Conference on Learning Representations},
                year      = 2015,
                eprint    = {arXiv:1406.2751},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: LatentRetrodictiveConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        retrodictor_peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = LatentRetrodictiveConfig(f"{name.split('/')[-1] or 'model'}-imitator")
        role = check_latent_rows(train_dataset, eval_dataset)
        check_best_metric(eval_dataset, args)
        self.thinkers: Thinkers | None = None  # until model and tokenizer are there
        self._tally = Tally()
        self._counts: dict[str, RowCounts] = {}
        checked: Any = train_dataset
        self._fingerprint = checked._fingerprint
        question = checked[0]["prompt"]
        self._is_conversational = is_conversational_row(question)
        loading = (processing_class, args, peft_config, quantization_config)
        with starting_model(self, model, *loading) as start:
            check_no_retrodictor(start["model"])
            super().__init__(
                **start,
                args=args,
                data_collator=collate_latent_rows,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self.renderer = settle_renderer(
            self._tokenizer, self.model.generation_config, question, role, args.chat_template_kwargs
        )
        check_drawing(self.model, 1.0, 0, {})
        ends = self.renderer.end_token_ids
        settle_padding(self._tokenizer, self.model, ends)
        without_dropout(self.model)
        engine = Engine.of(self.accelerator, start["model"], args)
        self.retrodictor = build_retrodictor(self.model, retrodictor_peft_config or peft_config, args, engine)
        if self.retrodictor is not None and self.retrodictor.adapter_name is None:
            self.retrodictor.model.to(self.accelerator.device)
        vocab_size = self.model.config.get_text_config().vocab_size
        self.thinkers = Thinkers(
            model=self.model,
            law=settle_thought_law(self._tokenizer, vocab_size, ends, args.max_thought_length, args.thought_delimiter),
            retrodictor=self.retrodictor,
            end_token_ids=ends,
            pad_token_id=self._tokenizer.pad_token_id,
            bos_token_id=self._tokenizer.bos_token_id,
            max_rows=args.per_device_train_batch_size * args.num_thoughts,
            positions=num_positions(self.model),
        )
        own = (self.processing_class, args, False, None)
        self.train_dataset = self._prepare_dataset(train_dataset, *own, "train")
        self._digest = rows_digest(self.train_dataset)
        if isinstance(eval_dataset, dict):
            self.eval_dataset = {name: self._prepare_dataset(one, *own, name) for name, one in eval_dataset.items()}
        elif eval_dataset is not None:
            self.eval_dataset = self._prepare_dataset(eval_dataset, *own, "eval")
        self.learner: RetrodictorLearner | None = None
        if self.retrodictor is not None:
            self.learner = RetrodictorLearner(
                self.retrodictor,
                args.retrodictor_learning_rate or args.learning_rate,
                args.max_grad_norm,
                partial(reduce, reduction="mean") if self.accelerator.num_processes > 1 else None,
            )
            for parameter in self.learner.parameters:
                # TRL seeds every process differently, so what was made here differs until it is sent round.
                broadcast(parameter.data)
        self.steps = LatentSteps(
            args, self.thinkers, self.learner, self._counts["train"].longest_answer, self.compute_loss_context_manager
        )
        self.warmup = Warmup.from_setting(0 if self.learner is None else args.retrodictor_warmup_steps)
        self._main_steps = 0
        self._phase_schedule: LambdaLR | None = None
        self._schedule: Any = None  # the user's, over the imitator's steps
        self.add_callback(TakeUpTheLog(self))

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if self.thinkers is None or set(PREPARED) <= set(dataset.column_names):
            return dataset  # TRL asks before the model is there to say what ends an answer, and again for `evaluate`
        name = dataset_name if dataset_name.endswith("_dataset") else f"{dataset_name}_dataset"
        dataset, self._counts[dataset_name] = prepare_latent_rows(
            dataset, self.renderer, self.thinkers, args.max_length, name
        )
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    @property
    def phase(self) -> str:
        """The phase of the step now under way: "retrodictor_warmup" or "training"."""
        return self.warmup.phase(self.state.global_step)

    # --- the plan: a warm-up of the retrodictor before the steps that `max_steps` counts

    def set_initial_training_values(self, args, dataloader):
        """`max_steps` and `num_train_epochs` count the imitator's steps; the loop runs the warm-up before them."""
        _, per_epoch, num_examples, _, batch_size, steps_in_epoch, steps = super().set_initial_training_values(
            args, dataloader
        )
        self._main_steps, total = steps, self.warmup.steps + steps
        return -(-total // per_epoch), per_epoch, num_examples, total * batch_size, batch_size, steps_in_epoch, total

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The user's schedule over the imitator's steps; before them it stands still."""
        given = super().create_scheduler(self._main_steps or num_training_steps, optimizer)
        if given is self._phase_schedule:
            return given  # of an earlier `train()`, around a schedule the user gave
        if not isinstance(given, LambdaLR):
            raise ValueError(
                f"The schedule is a {type(given).__name__}; the warm-up needs one that is a function of the step. "
                "Leave it out of `optimizers` and set `lr_scheduler_type`."
            )
        self._schedule = given.lr_lambdas[0]
        self.lr_scheduler = self._phase_schedule = LambdaLR(
            given.optimizer, lambda step: self.warmup.learning_rate_factor(step, self._schedule)
        )
        return self.lr_scheduler

    # --- one step

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The imitator's forward and backward, then the retrodictor's, each under its own adapter."""
        step, scale = self.state.global_step, 1 / self.current_gradient_accumulation_steps
        if self.phase == WARMUP:
            self.model.train()
            loss = scale * self.steps.dream(inputs["rows"].rows, step, scale)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.steps.learn_in_hindsight(scale)
        if self.learner is not None and self.accelerator.sync_gradients:
            self._step_retrodictor(self.learner, step)
        return loss

    def _step_retrodictor(self, learner: RetrodictorLearner, step: int) -> None:
        number = step - self.warmup.steps
        with at_step(step):
            learner.step(1.0 if number < 0 else self._schedule(number))
        if number >= 0:
            return
        loss = reduce(self.steps.take_dream_loss(), reduction="mean").item()
        self._tally.add("train", "retrodictor/dream_loss", loss, 1)
        if self.warmup.take_reading(step, loss):
            self.state.max_steps = self.warmup.steps + self._main_steps
            show_total(self.callback_handler.callbacks, self.state.max_steps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Minus the bound, nats per answer; a loss that is not finite is an error."""
        rows, step = inputs["rows"].rows, self.state.global_step
        is_training = self.model.training
        loss, table = self._loss(
            partial(self.steps.loss, model, rows, step) if is_training else partial(self.steps.evaluate, rows)
        )
        check_loss(loss, self.model, self.accelerator, step, self.phase)
        self._record(table)
        return (loss, None) if return_outputs else loss

    def _loss(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        try:
            return compute()
        except ValueError:
            # A law or a log-probability is no number; the error says so without the step.
            nothing = torch.full((), torch.nan, device=self.accelerator.device)
            check_loss(nothing, self.model, self.accelerator, self.state.global_step, self.phase)
            raise
        except FloatingPointError:
            with agreed(self.accelerator, self.state.global_step):  # where the others are in `check_loss`
                raise

    def _record(self, table: Tensor) -> None:
        table = table.float().to(self.accelerator.device)
        if self.model.training:
            # `gather_for_metrics` would cut every batch that an epoch's last step accumulates to the size of its last.
            mode, sums = "train", self.accelerator.reduce(table.sum(dim=0))
        else:
            # By row, so that those which only fill the last batch of several processes are left out.
            mode, sums = "eval", self.accelerator.gather_for_metrics(table).double().sum(dim=0)
        values = dict(zip(COLUMNS, sums.tolist(), strict=True))
        for name, (total, count) in METRICS.items():
            scale = nats_to_bits(1.0) if name.startswith("retrodiction/") else 1.0
            self._tally.add(mode, name, scale * values[total], values[count])

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As in transformers; training then goes on as if it had not happened."""
        with preserved_random_state():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """TRL's metrics and ours, with the phase of the last step."""
        mode = "train" if self.model.training else "eval"
        values: dict[str, Any] = dict(self._tally.flush(mode))
        if mode == "eval":
            # Of several evaluation sets, each has its own prefix; TRL's metrics all have "eval_".
            prefix = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), "eval")
            values = {f"{prefix}_{name}": value for name, value in values.items()}
        elif values:
            values["phase"] = self.warmup.phase(max(self.state.global_step - 1, 0))
        logs.update(values)
        super().log(logs, start_time)
