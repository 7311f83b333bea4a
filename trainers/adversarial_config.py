"""Settings of [`AdversarialTrainer`]."""

from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

from hf_imitate.losses import DISTINGUISHER_LOSSES, IMITATOR_REWARDS
from hf_imitate.trainers.settings_checks import (
    COMMON,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    check_numbers,
    check_saving,
)
from hf_imitate.trainers.warmup_setting import steps_or_auto

TRUNCATED_ANSWERS = ("score", "drop", "penalty")
BITS = ("/bits_per_answer", "/bits_per_byte")
LOWEST_BITS = "eval_retrodiction/bits_per_answer"
# What may stand in `generation_kwargs`: how answers are computed, not how they are drawn or where they end.
LAWLESS_GENERATION = ("use_cache", "cache_implementation", "cache_config", "pad_token_id", "bos_token_id")

OWN_NUMBERS = {
    **dict.fromkeys(("imitator_warmup_learning_rate", "distinguisher_learning_rate", "epsilon"), POSITIVE),
    **dict.fromkeys(("retrodictive_coef", "retrodictive_budget", "beta"), NOT_NEGATIVE),
    **dict.fromkeys(("distinguisher_steps", "distinguisher_generations", "num_generations"), COUNT),
    **dict.fromkeys(("max_completion_length", "num_iterations", "steps_per_generation"), COUNT),
    **dict.fromkeys(("replay_ratio", "heldout_fraction"), SHARE),
}


@dataclass
class AdversarialConfig(GRPOConfig):
    """Settings of [`AdversarialTrainer`]: those of [`~trl.GRPOConfig`] and the ones below.

    > [!NOTE]
    > Defaults that differ from `GRPOConfig`: `scale_rewards="none"` (dividing by a question's standard deviation keeps
    > the step size constant where only noise is left), `loss_type="dr_grpo"` (the stated gradient needs a constant
    > normaliser), `learning_rate=2e-5` (LoRA), `disable_dropout=True` (an answer is scored by the forward that
    > trains), `hub_private_repo=True`; without an accelerator no bf16 and no gradient checkpointing (there both only
    > cost time). The imitator's law is that of temperature 1, untruncated: settings that change it are errors.

    Parameters:
        distinguisher_loss (`str`, *optional*, defaults to `"bradley_terry"`):
            `"bradley_terry"` compares the two answers to a question, which cancels what all answers to it share;
            `"bce"` labels each answer on its own.
        imitator_reward (`str`, *optional*, defaults to `"logit"`):
            `"logit"`, whose policy gradient is that of reverse KL; `"pair"`, sigmoid of the difference to the human's,
            bounded, needs labelled questions; `"gail"`, -log(1 - D), an f-divergence only with `"bce"`. Each is
            centred leave-one-out per question, then clipped at 5 nats (which keeps the fixed point, not the exact
            gradient).
        retrodictive_coef (`float`, *optional*):
            Weight of the summed negative log-likelihood of human answers, in nats and with the policy term's
            normaliser: the ratio of forward to reverse KL. `None` means 1.0, or the multiplier if a budget is given
            (giving both is an error). At 0 nothing but the distinguisher holds the imitator: it collapsed where its
            rate was a third of the distinguisher's.
        retrodictive_budget (`float`, *optional*):
            Nats the mean human log-probability may fall below its value at the end of the warm-up. A Lagrange
            multiplier on a moving average of training batches keeps it; it is reported on held-out rows.
        imitator_warmup_steps (`int` or `str`, *optional*, defaults to `"auto"`):
            Likelihood steps on the human answers before the game. `"auto"` stops when held-out nats stop improving, at
            most 3 passes over the rows and 1 000 steps: a distinguisher teaches little to an imitator still far off.
            Without held-out rows it takes them all.
        imitator_warmup_learning_rate (`float`, *optional*, defaults to `2e-4`):
            Learning rate of those steps: that of supervised fine-tuning with LoRA. A game's rate would not move it.
        distinguisher_lm_warmup_steps (`int` or `str`, *optional*, defaults to `"auto"`):
            Likelihood steps of a separate distinguisher's body on the same human rows, before it classifies: it then
            knows what human answers look like, of which one bit per pair teaches little. At the rate of
            `imitator_warmup_learning_rate`. `"auto"` stops when held-out nats stop improving, at most 3 passes over
            the rows and 1 000 steps; it is 0 where the distinguisher shares the imitator's base or starts from a copy
            of it, and where it comes without a language model's head.
        distinguisher_warmup_steps (`int` or `str`, *optional*, defaults to `"auto"`):
            Classification steps before the game, the imitator standing still. `"auto"` stops when the loss on held-out
            pairs stops improving, at most 200 steps. A weak distinguisher at the start destroys the imitator. Without
            held-out rows it takes them all.
        distinguisher_learning_rate (`float`, *optional*):
            `None` means 3 times `learning_rate`: it has to follow a moving imitator. Constant in its warm-up; in the
            game it follows the imitator's schedule.
        distinguisher_steps (`int`, *optional*, defaults to `1`):
            Updates per generation batch. 1 shares one forward between score and update.
        distinguisher_generations (`int`, *optional*, defaults to `2`):
            How many of a question's generations it trains on; all are scored. More cost more and teach a little more:
            with all eight, total variation fell to .22 in place of .25 in a small world (docs/performance.md).
        replay_ratio (`float`, *optional*, defaults to `0.5`):
            Share of old answers in the distinguisher's batches, for it alone: more human rows per step, fewer cycles.
        heldout_fraction (`float`, *optional*, defaults to `0.05`):
            Share of the human answers neither it nor the likelihood term trains on. They tell learning from memory.
        truncated_answers (`str`, *optional*, defaults to `"score"`):
            Answers cut at `max_completion_length`: `"score"` shows them without an end marker, like a human answer cut
            there; `"drop"` takes them out of their group; `"penalty"` gives them their group's lowest reward.
        allow_unlabelled (`bool`, *optional*, defaults to `False`):
            Whether rows with `completion=None` may ask questions nobody answered.
        freeze_imitator (`bool`, *optional*, defaults to `False`):
            Whether only the distinguisher learns, against an imitator that stays as it is, trainable or not; the
            result is for `Imitator.answer(..., resample=K)`. There is no imitator warm-up, no policy term and no
            likelihood term, so settings of these are errors, and the steps of the game are more of the
            distinguisher's warm-up, at a rate that follows the schedule.
        force_resume (`bool`, *optional*, defaults to `False`):
            Whether a resumed run may have other settings, rows or adapters than the checkpoint it goes on from; a
            warning then names them, and the last bits are no longer the same. `--force` on the command line.

    With `use_vllm=True` an answer's policy term is weighed by its probability under the trained model over that under
    vLLM, up to `vllm_importance_sampling_clip_max` (3); TRL logs the ratios. All answers are paid and learned from.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of the imitator in the game."})
    scale_rewards: str = field(default="none", metadata={"help": "Reward scaling, as in GRPOConfig."})
    loss_type: str = field(
        default="dr_grpo", metadata={"help": "Only 'dr_grpo': the stated gradient needs a constant normaliser."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Switch dropout off in the model."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Old name of `activation_checkpointing`."}
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Trade compute for memory. Default: on with an accelerator, off on CPU."}
    )
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "Whether pushes make private repos. Only `False` makes public ones."}
    )

    distinguisher_loss: str = field(default="bradley_terry", metadata={"help": "'bradley_terry' or 'bce'."})
    imitator_reward: str = field(default="logit", metadata={"help": "'logit', 'pair', or 'gail' (only with 'bce')."})
    retrodictive_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the human answers' summed negative log-likelihood. Default 1.0, or the budget's."
        },
    )
    retrodictive_budget: float | None = field(
        default=None,
        metadata={"help": "Nats the mean human log-probability may fall below its value before the game."},
    )
    imitator_warmup_steps: str | int = field(
        default="auto", metadata={"help": "Likelihood steps before the game, or 'auto'."}
    )
    imitator_warmup_learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of those steps."})
    distinguisher_lm_warmup_steps: str | int = field(
        default="auto",
        metadata={"help": "Likelihood steps of a separate distinguisher's body, or 'auto'; 0 for a shared base."},
    )
    distinguisher_warmup_steps: str | int = field(
        default="auto", metadata={"help": "Classification steps before the game, or 'auto'."}
    )
    distinguisher_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the distinguisher. Default: 3 x learning_rate."}
    )
    distinguisher_steps: int = field(default=1, metadata={"help": "Distinguisher updates per generation batch."})
    distinguisher_generations: int = field(
        default=2, metadata={"help": "How many of a question's generations the distinguisher trains on."}
    )
    replay_ratio: float = field(
        default=0.5, metadata={"help": "Share of old answers in the distinguisher's batches, in [0, 1)."}
    )
    heldout_fraction: float = field(default=0.05, metadata={"help": "Share of human answers held out, in [0, 1)."})
    truncated_answers: str = field(default="score", metadata={"help": "'score', 'drop' or 'penalty'."})
    allow_unlabelled: bool = field(default=False, metadata={"help": "Allow rows with completion=None."})
    freeze_imitator: bool = field(default=False, metadata={"help": "Only the distinguisher learns."})
    force_resume: bool = field(
        default=False,
        metadata={"help": "Resume although a setting of the run is another.", "aliases": ["--force"]},
    )

    def __post_init__(self):
        on_cpu = self.use_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
        if self.bf16 is None and on_cpu:
            self.bf16 = False
        if self.gradient_checkpointing is None and self.activation_checkpointing is None:
            self.activation_checkpointing = not on_cpu
        if on_cpu:
            self.dataloader_pin_memory = False  # there is nothing to pin memory for, and torch warns of it
        self.hub_private_repo = self.hub_private_repo is not False
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model, self.greater_is_better = LOWEST_BITS, False
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(BITS):
            self.greater_is_better = False  # transformers takes all but losses for scores
        for name in ("imitator_warmup_steps", "distinguisher_lm_warmup_steps", "distinguisher_warmup_steps"):
            setattr(self, name, steps_or_auto(name, getattr(self, name)))
        if self.freeze_imitator:
            self._check_frozen()
        self._check_choices()
        self._check_combinations()
        self._check_ranges()
        super().__post_init__()
        self._check_law()
        if self.distinguisher_generations > self.num_generations:
            raise ValueError(
                f"`distinguisher_generations` is {self.distinguisher_generations}, but a question has only "
                f"`num_generations`={self.num_generations}. Lower the first or raise the second."
            )
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"`lr_scheduler_type={str(self.lr_scheduler_type)!r}` depends on the loss, which means something else "
                "in each phase. Use a schedule over steps, such as 'linear', 'cosine' or 'constant'."
            )

    def _check_choices(self) -> None:
        choices = {
            "distinguisher_loss": tuple(DISTINGUISHER_LOSSES),
            "imitator_reward": tuple(IMITATOR_REWARDS),
            "truncated_answers": TRUNCATED_ANSWERS,
            "loss_type": ("dr_grpo",),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; need one of {list(allowed)}.")

    def _check_frozen(self) -> None:
        """`freeze_imitator=True`: nothing may ask the imitator to move."""
        if self.imitator_warmup_steps == "auto":
            self.imitator_warmup_steps = 0
        contradicting = {
            "imitator_warmup_steps": (0, "would move the imitator before the game"),
            "retrodictive_coef": (None, "weighs a likelihood term that moves the imitator"),
            "retrodictive_budget": (None, "holds the imitator to what it loses in the game"),
            "num_iterations": (1, "lets the imitator learn from answers again"),
        }
        for name, (neutral, what) in contradicting.items():
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"`{name}`={getattr(self, name)} {what}, and `freeze_imitator=True` keeps it as it is. Leave "
                    f"`{name}` at {neutral}, or set `freeze_imitator=False`."
                )

    def _check_combinations(self) -> None:
        if self.imitator_reward == "gail" and self.distinguisher_loss != "bce":
            raise ValueError(
                "`imitator_reward='gail'` needs `distinguisher_loss='bce'`: under 'bradley_terry' the logit is free up"
                " to a constant per question, and -log(1 - D) depends on it. Set 'bce', or use the 'logit' reward."
            )
        if self.imitator_reward == "pair" and self.allow_unlabelled:
            raise ValueError(
                "`imitator_reward='pair'` compares with the human's answer, and `allow_unlabelled=True` admits "
                "questions without one. Use the 'logit' reward, or labelled questions only."
            )
        if self.retrodictive_coef is not None and self.retrodictive_budget is not None:
            raise ValueError(
                f"Both `retrodictive_coef`={self.retrodictive_coef} and "
                f"`retrodictive_budget`={self.retrodictive_budget} are given; the budget sets the coefficient itself. "
                "Give one of them."
            )
        check_saving(self)
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns` is True, which drops the human's answers before anyone sees them. Set False."
            )

    def _check_ranges(self) -> None:
        if self.max_completion_length is None:
            raise ValueError(
                "`max_completion_length` is None, and the loss is normalised by it. Give the longest answer in tokens."
            )
        check_numbers(self, COMMON | OWN_NUMBERS)

    def _check_law(self) -> None:
        neutral = {
            "temperature": (1,),
            "top_p": (1,),
            "top_k": (0, None),
            "min_p": (0, None),
            "repetition_penalty": (1,),
        }
        given = {name: getattr(self, name) for name in neutral}
        neutral["do_sample"] = (True,)
        more = self.generation_kwargs or {}
        given |= {name: value for name, value in more.items() if name in neutral}
        unknown = sorted(more.keys() - {*neutral, *LAWLESS_GENERATION})
        if unknown:
            raise ValueError(
                f"`generation_kwargs` has {unknown}, which may change the law that answers are drawn from, while "
                f"their log-probabilities stay those of the plain law. Take them out (only "
                f"{list(LAWLESS_GENERATION)} may stand there), and use them where the finished imitator is sampled."
            )
        for name, value in given.items():
            if value not in neutral[name]:
                raise ValueError(
                    f"`{name}` is {value}; an imitator's law is that of temperature 1, untruncated, or neither its "
                    f"gradient nor its log-probabilities would be what they are called. Leave `{name}` at "
                    f"{neutral[name][0]} here, and change it where the finished imitator is sampled."
                )
        if self.use_vllm:
            self._check_vllm()
        self._check_gradient()

    def _check_vllm(self) -> None:
        """vLLM's numbers are not quite the trained model's: an answer's weight has to make up for the whole of it."""
        if self.vllm_structured_outputs_regex is not None:
            raise ValueError(
                "`vllm_structured_outputs_regex` is given, which draws answers from another law than the imitator's. "
                "Leave it out; where answers have to be of a form, say so by a check or a reward."
            )
        modes = ("sequence_mask", "sequence_truncate")
        mode = self.vllm_importance_sampling_mode if self.vllm_importance_sampling_correction else None
        if mode not in modes:
            raise ValueError(
                f"`vllm_importance_sampling_correction` is {self.vllm_importance_sampling_correction} and "
                f"`vllm_importance_sampling_mode` is {self.vllm_importance_sampling_mode!r}: answers that vLLM drew "
                "by its own numbers would count as the imitator's. Leave the correction on, and weigh whole answers "
                f"by one of {list(modes)}."
            )

    def _check_gradient(self) -> None:
        plain = {
            "mask_truncated_completions": (
                False,
                "takes the answers that were cut out of the loss, but not out of the others' baseline. Leave it at "
                "False and use `truncated_answers='drop'`",
            ),
            "importance_sampling_level": (
                "token",
                "weighs a whole answer by the mean over its tokens, which is not the stated gradient. Leave it at "
                "'token'",
            ),
            "multi_objective_aggregation": (
                "sum_then_normalize",
                "divides each reward by its spread, which changes their weights from question to question. Leave it "
                "at 'sum_then_normalize' and weigh your own rewards by `reward_weights`",
            ),
            "top_entropy_quantile": (
                1.0,
                "leaves tokens out of the policy term, which then is no longer the gradient of an answer's "
                "log-probability. Leave it at 1.0",
            ),
            "off_policy_mask_threshold": (
                None,
                "leaves answers out of the policy term by what they were paid. Leave it at None and, against stale "
                "answers, lower `num_iterations` or `steps_per_generation`",
            ),
        }
        for name, (value, why_and_cure) in plain.items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, which {why_and_cure}.")
