"""Adversarial imitation: an imitator is paid for answers that a distinguisher takes for the human's."""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer

from hf_imitate.checks import Check, check_names
from hf_imitate.human_rows import ROW_COLUMN, HumanRows, render_humans, without_internal
from hf_imitate.merged_adapter import merged_adapter
from hf_imitate.pairs import Learner
from hf_imitate.plateau import Plateau
from hf_imitate.sparing_head import SparingHead
from hf_imitate.trainers.adversarial_body import BodyWarmup
from hf_imitate.trainers.adversarial_config import AdversarialConfig
from hf_imitate.trainers.adversarial_game import Game
from hf_imitate.trainers.adversarial_inputs import (
    check_best_metric,
    check_data,
    check_distinguisher,
    check_evaluation,
    check_frozen,
    check_lengths,
    check_read_lengths,
    named_sets,
    try_checks,
)
from hf_imitate.trainers.adversarial_likelihood import HumanLikelihood
from hf_imitate.trainers.adversarial_plan import AdversarialPlan
from hf_imitate.trainers.adversarial_rewards import (
    DISTINGUISHER_REWARD,
    check_paid,
    check_rewards,
    guarded,
    raise_first,
)
from hf_imitate.trainers.adversarial_saving import AdversarialSaving
from hf_imitate.trainers.adversarial_setup import (
    GivenDistinguisher,
    PhaseCallback,
    build_distinguisher,
    draw_despite_nans,
    lm_warmup_steps,
    preserved_random_state,
    settle_renderer,
    with_row_numbers,
)
from hf_imitate.trainers.engines import Engine
from hf_imitate.trainers.finite import FiniteSteps, at_step, check_loss
from hf_imitate.trainers.phases import (
    DISTINGUISHER_LM_WARMUP,
    DISTINGUISHER_WARMUP,
    GAME,
    IMITATOR_WARMUP,
    Phases,
    warmup_caps,
)
from hf_imitate.trainers.questions_read_once import QuestionsReadOnce, causal_lm_of
from hf_imitate.trainers.ranks import agreed
from hf_imitate.trainers.starting_model import starting_model
from hf_imitate.trainers.tally import Tally


def distinguisher_reward(completions, **kwargs) -> list[float]:
    """Holds the distinguisher's column in TRL's tables; `_calculate_rewards` fills it."""
    return [0.0] * len(completions)


distinguisher_reward.__name__ = DISTINGUISHER_REWARD


class AdversarialTrainer(FiniteSteps, AdversarialSaving, AdversarialPlan, GRPOTrainer):
    """Train a causal LM to answer as the human would, by a game against a distinguisher.

    Phases of one loop, each of ordinary steps that are logged, checkpointed and resumed:

    1. *Imitator warm-up*: likelihood of the human answers; then the same for the body of a separate distinguisher.
    2. *Distinguisher warm-up*: the imitator stands still, the distinguisher learns to tell the two apart.
    3. *The game*: the imitator answers each question G times; the distinguisher scores all answers, then is updated on
       some of them and on old ones; the imitator takes a gradient step up

           mean_i (s_i - mean of the others' s) log p(answer_i | x)  +  retrodictive_coef * log p(human answer | x')

       with both log p summed over tokens and under one constant normaliser, the questions x' drawn on their own. At
       the optimum of the default loss s = log p_human - log p_imitator + c(x), and c(x) cancels within a question: so
       with the default reward the first term descends KL(imitator || human), the second KL(human || imitator). The
       score is taken before the update, from a distinguisher fitted to older imitators, too: the same fixed point,
       delayed. That optimum exists across questions only; with one answer to each the distinguisher can learn them
       by heart, of which the trainer warns. The loss's centring (slope .93), the clip of centred scores at 5 nats, and
       PPO's clipping where a generation batch serves several steps depart from that gradient.

    Both sides reach the distinguisher through one renderer, token for token, ended exactly when they ended.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The imitator to train: any causal LM, or an adapter to train further.
        args ([`AdversarialConfig`], *optional*): settings.
        train_dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and `completion`, what a human answered; `weight` (float) optional. All other columns
            travel to checks and rewards. `completion=None` with `allow_unlabelled=True`.
        eval_dataset ([`~datasets.Dataset`] or `dict`, *optional*): rows of the same form.
        checks (`list[Callable]`, *optional*):
            What the distinguisher can verify: TRL's reward signature, outcomes in [0, 1]; each enters its logit with a
            learned weight.
        reward_funcs (`Callable` or `list`, *optional*):
            Further rewards, TRL's, added to the distinguisher's; `reward_weights` has one weight for each of them.
        distinguisher (`str`, [`~transformers.PreTrainedModel`], [`Distinguisher`] or a `list` of these, *optional*):
            Who judges. By default a second adapter and a head on the imitator's own frozen base, or with full
            fine-tuning an adapter on a frozen copy of the starting base; in a list, `None` is that one. "ngram" is
            logistic on hashed n-grams, length and overlap with the question; of a list, the logits add. It pays to
            let it know more than the imitator: a larger causal LM's body is first fitted to the same rows.
        distinguisher_peft_config ([`~peft.PeftConfig`], *optional*): its adapter; by default like the imitator's.
        processing_class, callbacks, optimizers, quantization_config, peft_config: as in [`~trl.GRPOTrainer`].

    Example:

    ```python
    from hf_imitate import AdversarialConfig, AdversarialTrainer, load_docstrings, split_by_question
    from peft import LoraConfig

    dataset = split_by_question(load_docstrings(), test_size=0.1)
    trainer = AdversarialTrainer(
        model="Qwen/Qwen3-0.6B",
        args=AdversarialConfig(output_dir="me-imitator"),
        train_dataset=dataset["train"],
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["hf-imitate", "trl", "imitation-learning", "adversarial-imitation"]
    _name = "Adversarial imitation"
    _paper = {
        "title": "Generative Adversarial Imitation Learning",
        "id": "1606.03476",
        "citation": textwrap.dedent("""\
            @inproceedings{ho2016gail,
                title     = {{Generative Adversarial Imitation Learning}},
                author    = {Jonathan Ho and Stefano Ermon},
                booktitle = {Advances in Neural Information Processing Systems},
                year      = 2016,
                eprint    = {arXiv:1606.03476},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: AdversarialConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        checks: Sequence[Check] | None = None,
        reward_funcs: Callable | list[Callable] | None = None,
        distinguisher: GivenDistinguisher = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        distinguisher_peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = AdversarialConfig(f"{name.split('/')[-1] or 'model'}-imitator")
        self.checks = [checks] if callable(checks) else list(checks or [])
        check_names(self.checks)
        reward_funcs = [] if reward_funcs is None else reward_funcs
        reward_funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        check_rewards(reward_funcs, args.reward_weights)
        role = check_data(train_dataset, eval_dataset, args)
        check_best_metric(eval_dataset, args)
        check_frozen(args, reward_funcs, optimizers)
        check_distinguisher(distinguisher)
        try_checks(self.checks, train_dataset)
        self._failures: list[Exception] = []  # of rewards, in this generation batch
        # TRL counts the distinguisher's reward, too; the user's settings stay as they were given.
        weights, args.reward_weights = args.reward_weights, None
        loading = (processing_class, args, peft_config, quantization_config, args.freeze_imitator)
        try:
            with starting_model(self, model, *loading) as start:
                super().__init__(
                    **start,
                    reward_funcs=[distinguisher_reward, *(guarded(reward, self._failures) for reward in reward_funcs)],
                    args=args,
                    train_dataset=with_row_numbers(train_dataset),
                    eval_dataset=eval_dataset,
                    callbacks=callbacks,
                    optimizers=optimizers,
                )
        finally:
            args.reward_weights = weights
        self.reward_weights = torch.tensor([1.0, *(weights or [1.0] * len(reward_funcs))])
        # What the loop takes its gradients and its steps on where nothing of the imitator has any.
        self._stand_in = torch.nn.Parameter(torch.zeros((), device=self.accelerator.device))
        if args.freeze_imitator:
            self.model.requires_grad_(False)
        self.renderer = settle_renderer(self, role)
        human_rows = HumanRows(self.train_dataset, self.renderer, args.heldout_fraction, args.seed)
        sets = named_sets(train_dataset, eval_dataset)
        check_lengths(human_rows, sets, self.renderer, self.model, args)
        self.engine = Engine.of(self.accelerator, start["model"], args)
        self.engine.check_frozen(args.freeze_imitator)
        self.distinguisher = build_distinguisher(
            *(distinguisher, self.model, self.renderer, args, self.checks, peft_config, distinguisher_peft_config),
            self.engine,
        )
        check_read_lengths(self.distinguisher, sets, self._tokenizer, self.model, args)
        # In the order of the learned weights, which a distinguisher that was trained before brings along.
        self.checks = list(self.distinguisher.checks)
        self.distinguisher.place(self.accelerator.device, self.accelerator.autocast, bool(args.gradient_checkpointing))
        for parameter in self.distinguisher.trainable_parameters():
            # TRL seeds every process differently, so what was made here differs until it is sent round.
            broadcast(parameter.data)
        learner = Learner(
            self.distinguisher,
            args.distinguisher_learning_rate or 3 * args.learning_rate,
            loss=args.distinguisher_loss,
            max_rows=args.per_device_train_batch_size,
            reduce=partial(reduce, reduction="sum") if self.accelerator.num_processes > 1 else None,
        )
        prompts = self.train_dataset["prompt"]
        common = (human_rows, prompts, self.accelerator, self._record)
        self.game = Game(args, learner, self.checks, self.renderer, *common)
        self.likelihood = HumanLikelihood(
            human_rows,
            self._tokenizer.pad_token_id,
            args.per_device_train_batch_size,
            args.retrodictive_coef,
            args.retrodictive_budget,
            # TRL's fused head scores answers alone where Triton runs; elsewhere it scores questions and padding, too.
            SparingHead.of(self.model) if self.accelerator.device.type == "cpu" else None,
            self.accelerator,
            self._record,
        )
        lm_steps = lm_warmup_steps(args, self.distinguisher)
        bodies = self.distinguisher.bodies if lm_steps else []
        self.bodies = BodyWarmup(args, bodies, self.game.heldout.stopping, *common)
        rows_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        imitator, distinguishing, lm = warmup_caps(
            *(args.imitator_warmup_steps, args.distinguisher_warmup_steps, len(human_rows.train), rows_per_step),
            distinguisher_lm=lm_steps,
        )
        self.phases = Phases(imitator, distinguishing, game=0, distinguisher_lm_warmup=lm)
        self._plateau = Plateau()
        self._last_reading = self._last_fitted = -1
        self._entered_phase = self._phase_schedule = None
        self._tally = Tally()
        # Says the plan; holds the imitator still during a pause; ends a run that does not recover.
        self.add_callback(PhaseCallback(self))

    def _record(self, name: str, total: float, count: float) -> None:
        self._tally.add("train" if self.model.training else "eval", name, total, count)

    # --- one step. TRL calls, in this order: `_prepare_inputs` for every micro-step; where a new generation batch is
    # due, `_generate_and_score_completions`, in it `_tokenize_prompts` and `_calculate_rewards`; then `compute_loss`.
    # `_step` counts micro-steps, `state.global_step` the optimizer's.

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            first = self.accelerator.process_index * len(generation_batch)
            asked = generation_batch[-first % self.num_generations_eval :: self.num_generations_eval]
            rows = [row for row in asked if row["completion"] is not None]
            columns = [[row.get(key) for row in rows] for key in ("prompt", "completion", "weight")]
            inputs = super()._prepare_inputs(generation_batch)
            inputs["human_rows"] = render_humans(self.renderer, *columns)
            return inputs
        self._enter_phase()
        if self.phase == IMITATOR_WARMUP:
            return {"human_rows": self.likelihood.draw(self._step)}
        if self.phase == DISTINGUISHER_LM_WARMUP:
            self._fit_bodies()
            return {"prompt_ids": torch.tensor([[self._tokenizer.pad_token_id]], device=self.accelerator.device)}
        if self.meets_humans and not self.use_vllm:
            # Nobody is paid yet, so no question needs G answers: as many different humans as the batch has room for.
            number = self._step // self.args.steps_per_generation
            asked = self.game.draw_questions(number, len(generation_batch))
            generation_batch = [self.train_dataset[row] for row in asked]
        return super()._prepare_inputs(generation_batch)

    def _fit_bodies(self) -> None:
        """One update of the distinguisher's body, at the first micro-step of an optimizer step."""
        step = self.state.global_step
        if step != self._last_fitted:
            self._last_fitted = step
            with at_step(step):
                self.bodies.step(self.phases.step_in_phase(step), self.phases.lm_learning_rate_factor(step))

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        # A checkpoint says by its rows what a generation batch was asked, not by their tokens.
        output[ROW_COLUMN] = torch.tensor([row[ROW_COLUMN] for row in inputs], device=output["prompt_ids"].device)
        if self.game.pause is not None:
            output["advantages"] = torch.zeros_like(output["advantages"])
        return output

    def _generate(self, prompts: list):
        with merged_adapter(self.model):
            try:
                return super()._generate(prompts)
            except RuntimeError as error:
                if "probability tensor" not in str(error) or self.generation_config.remove_invalid_values:
                    raise
                draw_despite_nans(self)
                return super()._generate(prompts)

    def _tokenize_prompts(self, prompts: list):
        """The very ids that the human's answer stands after, in training and to the distinguisher."""
        return self.renderer.prompt_ids(prompts), None, {}

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        public = [without_internal(row) for row in inputs]
        completions = self.renderer.in_their_roles(prompts, completions)
        rewards = super()._calculate_rewards(public, prompts, completions, completion_ids_list)
        is_train = self.model.training
        phase = self.phase if is_train else None
        with agreed(self.accelerator, self.state.global_step):
            raise_first(self._failures)
            batch = self.game.round(inputs, prompts, completion_ids_list, is_train)
        in_phase = self.phases.step_in_phase(self.state.global_step)
        with at_step(self.state.global_step):
            # Scores; in training it then updates the distinguisher, keeps answers for replay, and asks the guard.
            rewards = self.game.score_and_learn(
                rewards,
                batch,
                completion_ids_list,
                num_generations=self.num_generations if is_train else self.num_generations_eval,
                phase=phase,
                step=self._step,
                lr_scale=self._game_schedule(in_phase) if phase == GAME else 1.0,
            )
            check_paid(rewards, self.reward_func_names)
        return rewards

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        """The imitator, what it was and its reference are read in one way: they are compared."""
        causal_lm = causal_lm_of(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        if causal_lm is not None:
            model = QuestionsReadOnce(model, causal_lm, self._tokenizer.pad_token_id)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of the phase, in nats under the policy term's normaliser; a loss that is not finite is an error."""
        loss = self._loss_of_phase(model, inputs, num_items_in_batch)
        check_loss(loss, self.model, self.accelerator, self.state.global_step, self.phase)
        return (loss, None) if return_outputs else loss

    def _loss_of_phase(self, model, inputs, num_items_in_batch):
        if not self.model.training:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.likelihood.loss(model, inputs["human_rows"])
            return loss
        if self.args.freeze_imitator:
            return 0.0 * self._stand_in
        # The policy term's own normaliser, so that the two are weighed in the same nats.
        scale = 1 / (self.max_completion_length * self.current_gradient_accumulation_steps)
        if self.phase == IMITATOR_WARMUP:
            return scale * self.likelihood.loss(model, inputs["human_rows"])
        if self.phase in (DISTINGUISHER_LM_WARMUP, DISTINGUISHER_WARMUP):
            # The imitator's rate is 0, but every process runs a forward and a backward of the wrapped model.
            return 0.0 * model(input_ids=inputs["prompt_ids"][:1, -1:]).logits.float().sum()
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if self.likelihood.multiplier == 0:
            return loss
        nats = self.likelihood.loss(model, self.likelihood.draw(self._step))
        loss = loss + self.likelihood.multiplier * scale * nats
        self.likelihood.keep_budget(nats.item())
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As in transformers; training then goes on as if it had not happened."""
        if not isinstance(eval_dataset, str):
            check_evaluation(eval_dataset, self.renderer.completion_role)
        with preserved_random_state():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """TRL's metrics and ours, with the phase of the last step."""
        mode = "train" if self.model.training else "eval"
        values = self._tally.flush(mode)
        if mode == "train":
            if values:
                logs["phase"] = self.phases.name(max(self.state.global_step - 1, 0))
            logs.update(values)
        else:
            # Of several evaluation sets, each has its own prefix; TRL's metrics all have "eval_".
            prefix = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), "eval")
            logs.update({f"{prefix}_{name}": value for name, value in values.items()})
        super().log(logs, start_time)
