"""Settings of [`LatentRetrodictiveTrainer`]."""

from dataclasses import dataclass, field

from hf_imitate.estimators import ESTIMATORS
from hf_imitate.trainers.retrodictive_config import RetrodictiveConfig
from hf_imitate.trainers.settings_checks import COUNT, POSITIVE, check_numbers
from hf_imitate.trainers.warmup_setting import steps_or_auto

COMPARING = ("rws", "ovis")  # estimators that weigh thoughts against each other

OWN_NUMBERS = {
    **dict.fromkeys(("num_thoughts", "num_thoughts_eval", "max_thought_length"), COUNT),
    "retrodictor_learning_rate": POSITIVE,
}


@dataclass
class LatentRetrodictiveConfig(RetrodictiveConfig):
    """Settings of [`LatentRetrodictiveTrainer`]: those of [`~trl.SFTConfig`] and the ones below.

    > [!NOTE]
    > Defaults that differ from `SFTConfig`: `learning_rate=1e-4` (LoRA), `remove_unused_columns=False` (thoughts and
    > weights travel with their rows), `hub_private_repo=True`; without an accelerator no bf16 and no gradient
    > checkpointing. Dropout is off in both models: a thought is scored by the law that drew it. `max_length` limits
    > question and answer together, as in TRL; thoughts come on top of it. fp16, packing and settings under which the
    > loss is no longer that of log p(answer given question) are errors.

    Parameters:
        num_thoughts (`int`, *optional*, defaults to `8`):
            Thoughts per answer in training. Cost grows with it; a bad proposal is not cured by it.
        num_thoughts_eval (`int`, *optional*, defaults to `64`):
            Thoughts per answer in evaluation: the estimate is a lower bound in the mean, nearer to the truth the more.
        max_thought_length (`int`, *optional*, defaults to `256`):
            Most tokens of a thought. One that long is closed by force, with probability 1, wherever thoughts are
            drawn or scored. Long thoughts cost most of a step's time.
        estimator (`str`, *optional*, defaults to `"rws"`):
            `"rws"` (reweighted wake-sleep: both models follow the normalised weights; no score-function noise),
            `"ovis"` (both ascend the importance-weighted bound), `"elbo"` (both ascend the evidence lower bound), or
            `"prior"` (no retrodictor: the imitator's own thoughts, drawn without having seen the answer).
        thought_delimiter (`str`, *optional*):
            Text that closes a thought, such as `"</think>"`; its first token cannot stand in a thought. `None` takes
            an unused id of the vocabulary, or "####" where there is none. The vocabulary is never resized.
        retrodictor_learning_rate (`float`, *optional*):
            `None` means `learning_rate`. It follows the imitator's schedule.
        retrodictor_warmup_steps (`int` or `str`, *optional*, defaults to `"auto"`):
            Steps before the first of the imitator's, in which the retrodictor learns from dreams: thoughts and answers
            of the imitator's own, whose thoughts are exact samples of what it is to guess. `"auto"` stops when its
            loss on new dreams stops falling, at most 100 steps. Not counted by `max_steps` and `num_train_epochs`.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the imitator."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Only False: thoughts and weights travel with their rows."}
    )

    num_thoughts: int = field(default=8, metadata={"help": "Thoughts per answer in training."})
    num_thoughts_eval: int = field(default=64, metadata={"help": "Thoughts per answer in evaluation."})
    max_thought_length: int = field(default=256, metadata={"help": "Most tokens of a thought."})
    estimator: str = field(default="rws", metadata={"help": "'rws', 'ovis', 'elbo' or 'prior'."})
    thought_delimiter: str | None = field(
        default=None, metadata={"help": "Text that closes a thought. Default: an unused id of the vocabulary."}
    )
    retrodictor_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the retrodictor. Default: learning_rate."}
    )
    retrodictor_warmup_steps: str | int = field(
        default="auto", metadata={"help": "Steps in which the retrodictor learns from dreams, or 'auto'."}
    )

    def __post_init__(self):
        self.retrodictor_warmup_steps = steps_or_auto("retrodictor_warmup_steps", self.retrodictor_warmup_steps)
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"`estimator` is {self.estimator!r}; need one of {sorted(ESTIMATORS)}.")
        check_numbers(self, OWN_NUMBERS)
        if self.num_thoughts < 2 and self.estimator in COMPARING:
            raise ValueError(
                f"`num_thoughts` is {self.num_thoughts}; the estimator {self.estimator!r} compares thoughts and needs "
                "at least 2. Set `num_thoughts=8`, use `estimator='elbo'`, or use RetrodictiveTrainer if answers come "
                "without hidden thoughts."
            )
        if self.estimator == "prior" and self.retrodictor_warmup_steps not in ("auto", 0):
            raise ValueError(
                f"`retrodictor_warmup_steps` is {self.retrodictor_warmup_steps}, and the estimator 'prior' has no "
                "retrodictor. Leave it out, or use 'rws', 'ovis' or 'elbo'."
            )
        if self.thought_delimiter is not None and not self.thought_delimiter.strip():
            raise ValueError(
                "`thought_delimiter` is empty or only whitespace, so nobody could tell a thought from its answer. "
                "Give a text, such as '</think>', or None for an unused id."
            )
        self._check_whole_rows()
        super().__post_init__()
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"`lr_scheduler_type={str(self.lr_scheduler_type)!r}` depends on the loss, which means something else "
                "in the warm-up. Use a schedule over steps, such as 'linear', 'cosine' or 'constant'."
            )

    def _check_whole_rows(self) -> None:
        """Refuse what a sum over hidden thoughts leaves no room for."""
        plain = {
            "loss_reduction": (("answer",), "a mean over tokens is no bound on log p of the answer"),
            "packing": ((False,), "a row is drawn after and scored on its own"),
            "eval_packing": ((None, False), "a row is drawn after and scored on its own"),
            "padding_free": ((False,), "a row is drawn after and scored on its own"),
            "remove_unused_columns": ((False,), "thoughts and weights travel with their rows"),
            "fp16": ((False,), "weights of thoughts are differences of sums that fp16 cannot hold; use bf16 or fp32"),
            "neftune_noise_alpha": ((None,), "noise makes the scored law another than the one that draws"),
            "router_aux_loss_coef": ((None, 0, 0.0), "the loss here is the bound alone"),
            "use_liger_kernel": ((False,), "its kernels have no place for masked thoughts"),
        }
        for name, (allowed, why) in plain.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but {why}. Leave it at {allowed[0]!r}.")
