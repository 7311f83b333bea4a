"""Settings of [`RetrodictiveTrainer`]."""

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from hf_imitate.trainers.adversarial_config import BITS, LOWEST_BITS
from hf_imitate.trainers.settings_checks import COMMON, check_numbers, check_saving

LOSS_REDUCTIONS = ("answer", "token")


@dataclass
class RetrodictiveConfig(SFTConfig):
    """Settings of [`RetrodictiveTrainer`]: those of [`~trl.SFTConfig`] and the ones below.

    > [!NOTE]
    > Defaults that differ from `SFTConfig`: `learning_rate=2e-4` (LoRA; with full fine-tuning take TRL's 2e-5),
    > `hub_private_repo=True`; without an accelerator no bf16 and no gradient checkpointing (there both only cost
    > time). Settings under which the loss is no longer that of log p(answer given question) are errors.

    Parameters:
        loss_reduction (`str`, *optional*, defaults to `"answer"`):
            What the loss is a mean over. `"answer"`: over answers, each with minus its log p(answer given question)
            summed over its tokens, in nats; the optimum is the humans' law. `"token"`: over the tokens of a step, as
            in TRL; an answer then counts for less in a step of long ones.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template of conversational questions, in training and by `Imitator`. Empty by default:
            the template's own choices. A template that opens a block of thoughts needs it closed here.
        force_resume (`bool`, *optional*, defaults to `False`):
            Whether a resumed run may have other settings, rows or adapters than the checkpoint it goes on from; a
            warning then names them, and the last bits are no longer the same. `--force` on the command line.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate; with full fine-tuning take 2e-5."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Old name of `activation_checkpointing`."}
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Trade compute for memory. Default: on with an accelerator, off on CPU."}
    )
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "Whether pushes make private repos. Only `False` makes public ones."}
    )

    loss_reduction: str = field(default="answer", metadata={"help": "Mean over what: 'answer' or 'token'."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Passed to the chat template of conversational questions."}
    )
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
        check_numbers(self, COMMON)
        super().__post_init__()
        if self.loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"`loss_reduction` is {self.loss_reduction!r}; need one of {list(LOSS_REDUCTIONS)}.")
        self._check_objective()
        self._check_lengths()
        check_saving(self)

    def _check_objective(self) -> None:
        """Refuse what makes the loss another one than that of log p(answer given question)."""
        plain = {
            "loss_type": (("nll",), "weighs a token by its own probability"),
            "label_smoothing_factor": ((0, None), "mixes a uniform law into the humans'"),
            "completion_only_loss": ((None, True), "scores the question, too"),
            "assistant_only_loss": ((False,), "scores other turns than the answer's"),
            "truncation_mode": (("keep_start",), "cuts the question away"),
            "average_tokens_across_devices": ((True,), "normalises each process by itself"),
        }
        for name, (allowed, what_it_does) in plain.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, which {what_it_does}: the loss would no longer be that of "
                    f"log p(answer given question). Leave it at {allowed[0]!r}, or use TRL's SFTTrainer."
                )
        if (self.dataset_kwargs or {}).get("skip_prepare_dataset"):
            raise ValueError(
                "`dataset_kwargs` asks for `skip_prepare_dataset`, but which tokens are an answer's is decided when "
                "rows are prepared. Leave it out and give rows of text or messages."
            )

    def _check_lengths(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"`max_length` is {self.max_length}; a question and an answer take at least 2 tokens. Raise it, or "
                "set None for no limit but the model's."
            )
        packs = self.packing or self.eval_packing
        if packs and self.max_length is None:
            raise ValueError("`packing` needs to know how long a row may be. Set `max_length`.")
        if packs and self.packing_strategy != "bfd":
            raise ValueError(
                f"`packing_strategy` is {self.packing_strategy!r}, which cuts answers in the middle, so that their "
                "tokens no longer stand after their question. Use 'bfd'."
            )
        if self.padding_free and not self.packing and self.max_length is not None:
            raise ValueError(
                f"`padding_free=True` without packing goes with `max_length=None` alone; it is {self.max_length}. Set "
                "`packing=True`, or `max_length=None`."
            )
