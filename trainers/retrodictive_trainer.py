"""Retrodictive imitation, exact: an imitator is scored by the log-probability it gave to what the human answered."""

import math
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer, pack_dataset

from hf_imitate.batching import forward_cost
from hf_imitate.hub_cards.facts import CardFacts, CardMetric
from hf_imitate.log_probs import nats_to_bits
from hf_imitate.rendering import Renderer
from hf_imitate.rows import is_conversational_row
from hf_imitate.trainers.adversarial_inputs import check_best_metric
from hf_imitate.trainers.checkpoints import TakeUpTheLog
from hf_imitate.trainers.finite import FiniteSteps, check_loss
from hf_imitate.trainers.imitator_saving import versions
from hf_imitate.trainers.questions_read_once import QuestionsReadOnce, causal_lm_of
from hf_imitate.trainers.retrodictive_config import RetrodictiveConfig
from hf_imitate.trainers.retrodictive_rows import (
    ANSWER_COLUMNS,
    IGNORED,
    PREPARED,
    ROW,
    WEIGHT,
    AnswerCollator,
    RowCounts,
    check_padding,
    check_rows,
    check_set,
    first_tokens,
    plain_columns,
    prepare_rows,
    settle_renderer,
    sums_by_row,
)
from hf_imitate.trainers.retrodictive_saving import RetrodictiveSaving
from hf_imitate.trainers.rows_by_length import RowsByLength
from hf_imitate.trainers.starting_model import starting_model
from hf_imitate.trainers.tally import Tally

# What decides the result, for `imitation.json` and the card.
OWN_SETTINGS = (
    *(
        "loss_reduction",
        "chat_template_kwargs",
        "learning_rate",
        "lr_scheduler_type",
        "optim",
        "max_length",
        "packing",
    ),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "seed"),
)


class RetrodictiveTrainer(FiniteSteps, RetrodictiveSaving, SFTTrainer):
    """Train a causal LM to give what humans really answered the highest log-probability.

    TRL's [`~trl.SFTTrainer`] under another normaliser, on rows rendered as everything here renders them. With N
    answers in a step, whatever the number of processes and of accumulated batches,

        loss = - 1/N sum_i  w_i log p(y_i | x_i),      log p(y | x) = sum_t log p(y_t | x, y_<t), end token included

    in nats; w is the row's `weight` under the data set's mean. Its optimum is the humans' law: the excess over it is
    KL(human || imitator). What an imitator writes and what it states as log p are then one law, exactly.

    An answer has the tokens a sampled one could have: its content, the first end token, nothing after. What a template
    writes before it belongs to the question. An answer that does not fit into `max_length` is cut, carries no end
    token and is left out of every bits figure; how many is logged.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The imitator to train: any causal LM, or an adapter to train further.
        args ([`RetrodictiveConfig`], *optional*): settings.
        train_dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and `completion`, what a human answered, plain or conversational; `weight` (float)
            optional. Other columns are not read.
        eval_dataset ([`~datasets.Dataset`] or `dict`, *optional*): rows of the same form.
        processing_class, callbacks, optimizers, quantization_config, peft_config: as in [`~trl.SFTTrainer`].

    Example:

    ```python
    from hf_imitate import RetrodictiveConfig, RetrodictiveTrainer, load_docstrings, split_by_question
    from peft import LoraConfig

    dataset = split_by_question(load_docstrings(), test_size=0.1)
    trainer = RetrodictiveTrainer(
        model="Qwen/Qwen3-0.6B",
        args=RetrodictiveConfig(output_dir="me-imitator"),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["hf-imitate", "trl", "imitation-learning", "retrodictive-imitation"]
    _name = "Retrodictive imitation"
    _paper = {
        "title": "Is Behavior Cloning All You Need? Understanding Horizon in Imitation Learning",
        "id": "2407.15007",
        "citation": textwrap.dedent("""\
            @article{foster2024behavior,
                title   = {{Is Behavior Cloning All You Need? Understanding Horizon in Imitation Learning}},
                author  = {Dylan J. Foster and Adam Block and Dipendra Misra},
                year    = 2024,
                eprint  = {arXiv:2407.15007},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RetrodictiveConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = RetrodictiveConfig(f"{name.split('/')[-1] or 'model'}-imitator")
        role = check_rows(train_dataset, eval_dataset)
        check_best_metric(eval_dataset, args)
        check_padding(processing_class)
        self.renderer: Renderer
        self._counts: RowCounts  # of the data set that was prepared last
        self._is_assembled = False  # rows wait until model and tokenizer are there
        self._tally = Tally()
        loading = (processing_class, args, peft_config, quantization_config)
        with starting_model(self, model, *loading) as start:
            super().__init__(
                **start,
                args=args,
                train_dataset=plain_columns(train_dataset),
                eval_dataset=eval_dataset,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism cut answers into parts on several processes, and their normaliser "
                "counts whole ones. Leave them off, or use TRL's SFTTrainer."
            )
        self._fingerprint, question = self.train_dataset._fingerprint, self.train_dataset[0]["prompt"]
        self._is_conversational = is_conversational_row(question)
        self.renderer = settle_renderer(
            self._tokenizer, self.model.generation_config, question, role, args.chat_template_kwargs
        )
        self._causal_lm = causal_lm_of(self.model)
        self._is_assembled = True
        self.data_collator = AnswerCollator(**vars(self.data_collator))
        own = (self.processing_class, args)
        self.train_dataset = self._prepare_dataset(train_dataset, *own, args.packing, None, "train")
        self._train_counts = self._counts
        packing = args.packing if args.eval_packing is None else args.eval_packing
        if isinstance(eval_dataset, dict):
            self.eval_dataset = {
                name: self._prepare_dataset(one, *own, packing, None, name) for name, one in eval_dataset.items()
            }
        elif eval_dataset is not None:
            self.eval_dataset = self._prepare_dataset(eval_dataset, *own, packing, None, "eval")
        self.add_callback(TakeUpTheLog(self))

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if not self._is_assembled or set(PREPARED) <= set(dataset.column_names):
            return dataset  # TRL asks before the model is there to say what ends an answer, and again for `evaluate`
        name = f"{dataset_name}_dataset" if dataset_name in ("train", "eval") else f"eval_dataset {dataset_name}"
        check_set(dataset, name, self.renderer.completion_role)
        limits = (args.max_length, getattr(self.model.config.get_text_config(), "max_position_embeddings", None))
        limit = min((limit for limit in limits if limit), default=None)
        with args.main_process_first(desc="rendering"):
            dataset, self._counts = prepare_rows(dataset, self.renderer, limit, name, args.dataset_num_proc)
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            if packing:
                dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *ANSWER_COLUMNS]))

    # --- the loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """The normaliser of a step over its batches and processes: answers, where TRL has tokens."""
        if self.args.loss_reduction == "answer":
            batch_samples = [
                {"labels": torch.where(first_tokens(batch["labels"]), batch["labels"], IGNORED)}
                for batch in batch_samples
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, weighted, under the normaliser that was chosen; one that is not finite is an error."""
        answers = {name: inputs[name] for name in (*ANSWER_COLUMNS, ROW)}
        inputs = {name: value for name, value in inputs.items() if name not in answers}
        # Several processes wait for each other in every forward, so they must agree on how many there are.
        per_forward = forward_cost(self.args.device) if self.accelerator.num_processes == 1 else math.inf
        reading: Callable[..., Any] = RowsByLength(model, per_forward)
        if self._causal_lm is not None:
            reading = QuestionsReadOnce(reading, self._causal_lm, self._tokenizer.pad_token_id)
        weighing = Weighing(reading, answers[WEIGHT])
        result = super().compute_loss(weighing, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        check_loss(loss, self.model, self.accelerator, self.state.global_step, "training")
        self._record_bits(weighing.log_p, inputs["labels"], **answers)
        if num_items_in_batch is not None or self.args.loss_reduction == "token":
            return result
        # In evaluation TRL has taken the mean over this batch's tokens.
        num_tokens, num_answers = (inputs["labels"] != IGNORED).sum(), first_tokens(inputs["labels"]).sum()
        scale = num_tokens / num_answers.clamp(min=1)
        return (result[0] * scale, result[1]) if return_outputs else result * scale

    @torch.no_grad()
    def _record_bits(self, log_p: Tensor, labels: Tensor, answer_weight: Tensor, answer_bytes: Tensor, answer_row):
        is_whole, is_first = answer_bytes > 0, first_tokens(labels)
        count = torch.where(is_whole & is_first, answer_weight, 0.0)
        nats = torch.where(is_whole[:, 1:], -log_p * answer_weight[:, 1:], 0.0)
        sums = sums_by_row([nats, count[:, 1:], (count * answer_bytes)[:, 1:]], answer_row[:, 1:])
        if self.model.training:
            # `gather_for_metrics` would cut every batch that an epoch's last step accumulates to the size of its last.
            mode, total = "train", self.accelerator.reduce(sums.sum(dim=0))
        else:
            # By row, so that those which only fill the last batch of several processes are left out.
            mode, total = "eval", self.accelerator.gather_for_metrics(sums).sum(dim=0)
        total_nats, total_count, total_bytes = total.tolist()
        self._tally.add(mode, "retrodiction/bits_per_answer", nats_to_bits(total_nats), total_count)
        self._tally.add(mode, "retrodiction/bits_per_byte", nats_to_bits(total_nats), total_bytes)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """TRL's metrics and ours."""
        mode = "train" if self.model.training else "eval"
        values = self._tally.flush(mode)
        if mode == "eval":
            # Of several evaluation sets, each has its own prefix; TRL's metrics all have "eval_".
            prefix = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), "eval")
            values = {f"{prefix}_{name}": value for name, value in values.items()}
        logs.update(values)
        super().log(logs, start_time)

    # --- what it says of itself

    def trained_law(self) -> GenerationConfig:
        """The generation settings whose law was trained: temperature 1, nothing cut but what is longer than any
        answer it was trained on."""
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=self._train_counts.longest_answer,
            eos_token_id=self.renderer.end_token_ids,
            pad_token_id=self._tokenizer.pad_token_id,
            bos_token_id=self._tokenizer.bos_token_id,
        )

    def imitation_facts(self) -> dict[str, Any]:
        """How to rebuild the imitator, without a row of the data."""
        counts = self._train_counts
        return {
            "version": 1,
            "objective": "retrodictive",
            **self.base_facts(),
            "dataset": {
                "num_rows": counts.num_rows,
                "num_labelled": counts.num_rows,
                "num_truncated": counts.num_truncated,
                "num_left_out": counts.num_without_room + counts.num_weightless,
                "fingerprint": self._fingerprint,
            },
            "settings": {name: getattr(self.args, name) for name in OWN_SETTINGS},
            "max_answer_tokens": counts.longest_answer,
            "chat_template_kwargs": self.renderer.chat_template_kwargs,
            "completion_role": self.renderer.completion_role,
            "versions": versions(),
        }

    def card_facts(self, model_name: str | None = None, dataset_name: str | None = None) -> CardFacts:
        """What this run can truthfully say about itself."""
        last, counts = self.last_measured(), self._train_counts
        bits = ("eval_retrodiction/bits_per_answer", "eval_retrodiction/bits_per_byte")
        limits = ["Its log-probabilities say how likely an answer was to be given, not whether it is right."]
        if counts.num_truncated:
            limits.append(
                f"{counts.num_truncated} of {counts.num_rows} training answers were cut, so their ends were not "
                "learned; bits leave them out."
            )
        return CardFacts(
            **self.run_card_facts(model_name, dataset_name),
            is_conversational=self._is_conversational,
            metrics={name: CardMetric(last[name], "bits") for name in bits if name in last},
            limits=tuple(limits),
        )


class Weighing:
    """A model whose scored tokens count by their row's weight; it keeps log p of each as the model gave it.

    Args:
        model (`Callable`): gives log p of each token but the first under TRL's fused head.
        weight (`torch.Tensor`): of each token. [B, T].

    Attributes:
        log_p (`torch.Tensor`): log p of tokens 1 .. T-1, nats, fp32, 0 where nothing is scored. [B, T-1].
    """

    def __init__(self, model: Callable[..., Any], weight: Tensor):
        self.model, self.weight = model, weight[:, 1:]
        self.log_p = torch.zeros_like(self.weight)

    def __call__(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        if inputs.get("fused_lm_head"):
            # Prompt tuning puts tokens of its own in front.
            log_p = outputs.log_probs[:, -self.weight.shape[1] :]
            self.log_p = log_p.detach()
            outputs.log_probs = log_p * self.weight
        return outputs
