"""What an adversarial run leaves behind: the imitator's repo, its card, its push, and what a resumed run needs."""

import dataclasses
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from transformers.training_args import HubStrategy
from transformers.utils import PushInProgress

from hf_imitate import __version__
from hf_imitate.distinguisher import ADAPTER_NAME
from hf_imitate.hub_cards.facts import CardFacts, CardMetric, Paper
from hf_imitate.hub_cards.model_card import render_card
from hf_imitate.hub_cards.push import push_folder
from hf_imitate.trainers.adversarial_config import AdversarialConfig
from hf_imitate.trainers.checkpoints import (
    STATE,
    STATE_VERSION,
    TakeUpTheLog,
    check_resumable,
    checkpoint_to_resume,
    data_digest,
    withdraw,
)
from hf_imitate.trainers.phases import Phases

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
_NO_SETTINGS = ("hub_private_repo", "gradient_checkpointing", "activation_checkpointing")  # of a machine or a push
OWN_SETTINGS = (
    *(
        field.name
        for field in dataclasses.fields(AdversarialConfig)
        if field.name in AdversarialConfig.__annotations__ and field.name not in _NO_SETTINGS
    ),
    *("num_generations", "max_completion_length", "temperature", "max_steps", "num_train_epochs", "beta", "seed"),
)
# A resumed run may be longer; whatever else these say would mean something else from there on.
FIXED_SETTINGS = (
    *(name for name in OWN_SETTINGS if name not in ("max_steps", "num_train_epochs")),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations"),
    *("lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "epsilon", "reward_weights"),
    *("shuffle_dataset", "data_seed"),
)


class AdversarialSaving:
    """The half of [`AdversarialTrainer`] that writes and reads files; see there for the algorithm."""

    def __init__(self, *args, **kwargs):
        self._pushes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self._step_of_weights: int | None = None  # of the best checkpoint, once it was loaded
        self._unlogged: dict[str, Any] | None = None  # of a checkpoint between two logs
        self._digest: str | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(TakeUpTheLog(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As in transformers; `resume_from_checkpoint=True` goes on from the newest checkpoint that is complete.

        Raises:
            FileNotFoundError, ValueError: there is nothing to resume from, a file is missing or cut off, or it is of
                another run; the message names the file or the setting.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(checkpoint_to_resume(self.args.output_dir))
        if resume_from_checkpoint:
            check_resumable(resume_from_checkpoint, self.accelerator.process_index, self._run_facts())
        self._step_of_weights = self._unlogged = None
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers, which takes a step before it asks whether the one before was the last: none where it
        was, so that a run taken up at its last checkpoint has nothing left to do."""
        if self.state.global_step < self.state.max_steps:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        self.control.should_training_stop = True
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        return [], None

    def _run_facts(self) -> dict[str, Any]:
        """What a run has to share with the one whose checkpoint it takes up, as JSON gives it back."""
        if self._digest is None:
            self._digest = data_digest(self.train_dataset["prompt"], self.likelihood.rows.rows)
        facts = {
            "num_processes": self.accelerator.num_processes,
            "train_dataset": self._digest,
            "checks": self.distinguisher.check_names,
            "reward_funcs": self.reward_func_names,
            "imitator": "an adapter" if isinstance(self.model, PeftModel) else "all weights",
            "distinguisher": f"{sum(p.numel() for p in self.game.learner.parameters)} trained numbers",
            **{name: getattr(self.args, name) for name in FIXED_SETTINGS},
        }
        return json.loads(json.dumps(facts, default=str))

    # --- the imitator's repo

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the imitator as it is published: its weights, its law, its distinguisher and how it was made."""
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call and withdraw(folder, self.accelerator.process_index):
            self.accelerator.wait_for_everyone()
        self._name_base_revisions()
        super().save_model(str(folder), _internal_call=True)
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and full of local paths
            own_tokenizer = self.distinguisher.tokenizer is not self._tokenizer
            self.distinguisher.save_pretrained(folder / "distinguisher", with_tokenizer=own_tokenizer)
            self.trained_law().save_pretrained(str(folder))
            text = json.dumps(self.imitation_facts(), indent=2, ensure_ascii=False)
            (folder / "imitation.json").write_text(text + "\n", encoding="utf-8")
            self._write_card(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _name_base_revisions(self) -> None:
        """Tie the adapters to the very commit of the base they were trained on, where it is known."""
        for model in (self.model, self.distinguisher.model):
            commit = getattr(model.config, "_commit_hash", None)
            for config in model.peft_config.values() if commit and isinstance(model, PeftModel) else ():
                config.revision = commit

    def trained_law(self) -> GenerationConfig:
        """The generation settings whose law was trained: temperature 1, nothing cut but the length."""
        return GenerationConfig(
            do_sample=True,
            temperature=self.args.temperature,
            top_p=self.args.top_p,
            top_k=self.args.top_k,
            max_new_tokens=self.max_completion_length,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self._tokenizer.pad_token_id,
            bos_token_id=self._tokenizer.bos_token_id,
        )

    def imitation_facts(self) -> dict[str, Any]:
        """How to rebuild the imitator, without a row of the data."""
        name = self.model.config._name_or_path
        rows = self.likelihood.rows
        return {
            "version": 1,
            "objective": "adversarial",
            # Of a local base the last part only: the rest is nobody's business.
            "base_model": Path(name).name if os.path.isdir(name) else name,
            "base_is_local": os.path.isdir(name),
            "base_revision": getattr(self.model.config, "_commit_hash", None),
            "dataset": {
                "num_rows": len(self.train_dataset),
                "num_labelled": len(rows.rows),
                "num_heldout": len(rows.heldout),
                "num_truncated": rows.num_truncated,
                "fingerprint": self.train_dataset._fingerprint,
            },
            "settings": {name: getattr(self.args, name) for name in OWN_SETTINGS},
            "phases": self.phases.state(),
            "checks": list(self.distinguisher.check_names),
            "max_answer_tokens": self.max_completion_length,
            **{"chat_template_kwargs": self.chat_template_kwargs, "completion_role": self.renderer.completion_role},
            "versions": {"hf-imitate": __version__, **{library: version(library) for library in LIBRARIES}},
        }

    def card_facts(self, model_name: str | None = None, dataset_name: str | None = None) -> CardFacts:
        """What this run can truthfully say about itself."""
        facts = self.imitation_facts()
        newest = self.state.global_step if self._step_of_weights is None else self._step_of_weights
        entries = [entry for entry in self.state.log_history if entry.get("step", 0) <= newest]
        last = {key: value for entry in entries for key, value in entry.items()}
        units = {
            "eval_retrodiction/bits_per_answer": "bits",
            "eval_retrodiction/bits_per_byte": "bits",
            "eval_distinguisher/accuracy_fresh": "probability",
            "distinguisher/accuracy_heldout": "probability",
            "eval_answers/length_ratio": "ratio",
        }
        return CardFacts(
            model_name=model_name or Path(self.args.output_dir).name,
            objective=self._name,
            repo_id=self.hub_model_id,
            base_model=self.model.config._name_or_path or None,
            base_revision=facts["base_revision"],
            papers=(Paper(**self._paper),),
            dataset_name=dataset_name,
            num_rows=facts["dataset"]["num_rows"],
            num_labelled=facts["dataset"]["num_labelled"],
            is_conversational=not isinstance(self.train_dataset[0]["prompt"], str),
            settings=facts["settings"],
            metrics={name: CardMetric(last[name], unit) for name, unit in units.items() if name in last},
            versions=facts["versions"],
            is_adapter=isinstance(self.model, PeftModel),
            has_distinguisher=True,
            check_names=self.distinguisher.check_names,
            limits=(
                "The distinguisher of training is not an audit: what it cannot see, nobody has looked for.",
                "Numbers measured while training come from the distinguisher the imitator was trained against.",
            ),
            generation={k: v for k, v in self.trained_law().to_diff_dict().items() if k != "transformers_version"},
        )

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None) -> None:
        """Write README.md: the card of what this run measured."""
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir), model_name, dataset_name, tags)

    def _write_card(self, folder: Path, model_name=None, dataset_name=None, tags=None) -> None:
        facts = self.card_facts(model_name, dataset_name)
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        facts = dataclasses.replace(facts, tags=tuple(dict.fromkeys([*self._tag_names, *tags])))
        render_card(facts).save(str(folder / "README.md"))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Push the imitator in one commit, private unless asked otherwise; what only training needs stays here."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kwargs.setdefault("model_name", (self.hub_model_id or self.args.output_dir).split("/")[-1])
        self.create_model_card(**kwargs)
        self._finish_current_push()
        return push_folder(
            self.args.output_dir,
            self.hub_model_id,
            private=private is not False,
            token=token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
            run_as_future=not blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder):
        # A checkpoint holds the whole repo already; TRL's own would copy the imitator's files alone, and push the rest
        # of the output folder stale.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # All of it in the background: a network that is away for a moment must not end a run.
        push = self._pushes.submit(
            _push_or_warn,
            checkpoint_folder,
            self.hub_model_id,
            private=self.args.hub_private_repo is not False,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )
        if self.args.save_total_limit is not None:
            wait([push])  # before the folder is deleted to make room
        earlier = self.push_in_progress.jobs if self.push_in_progress is not None else []
        self.push_in_progress = PushInProgress([*(job for job in earlier if not job.done()), push])

    # --- the state of a run

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        tensors = {f"parameter.{i}": p for i, p in enumerate(self.game.learner.parameters)}
        optimizer = self.game.learner.optimizer.state_dict()
        for index, moments in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        for i, part in enumerate(self._buffered_inputs or []):
            tensors |= {f"buffer.{i}.{name}": value for name, value in part.items() if isinstance(value, torch.Tensor)}
        # Of every node on its own, the other nodes' files are elsewhere.
        processes = [self.accelerator.process_index] if self.args.save_on_each_node else range(self.args.world_size)
        stored = {
            "version": STATE_VERSION,
            "processes": list(processes),
            "run": self._run_facts(),
            "unlogged": {
                "loss": self._tr_loss.item(),  # a number in fp32 goes through JSON unchanged
                "last_log": self._globalstep_last_logged,
                "metrics": dict(self._metrics["train"]),
                "tally": self._tally.state("train"),
            },
            "step": self._step,
            "passes": int(self.state.global_step // self._steps_per_pass),
            "num_buffered": len(self._buffered_inputs or []),
            "phases": self.phases.state(),
            "entered_phase": self._entered_phase,
            "last_reading": self._last_reading,
            "plateau": dataclasses.asdict(self._plateau),
            "likelihood": self.likelihood.state(),
            "game": self.game.state(),
        }
        path = self._state_path(output_dir)
        path.parent.mkdir(parents=True, exist_ok=True)  # the first process may not have been there yet
        cpu = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(cpu, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps(stored), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = self._state_path(checkpoint)
        stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        tensors = load_file(path.with_suffix(".safetensors"))
        learner = self.game.learner
        self._load_distinguisher(tensors)
        optimizer = learner.optimizer.state_dict()
        optimizer["state"] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                optimizer["state"].setdefault(int(index), {})[moment] = tensor
        learner.optimizer.load_state_dict(optimizer)
        self._step = stored["step"]
        device = self.accelerator.device
        self._buffered_inputs = [_buffered(tensors, i, device) for i in range(stored["num_buffered"])] or None
        # The warm-ups may have ended early; how long the game lasts is for this run's settings to say.
        self.phases = dataclasses.replace(Phases(**stored["phases"]), game=self.phases.game)
        self._entered_phase, self._last_reading = stored["entered_phase"], stored["last_reading"]
        self._plateau = dataclasses.replace(self._plateau, **stored["plateau"])
        self.likelihood.load_state(stored["likelihood"])
        self.game.load_state(stored["game"])
        self.state.max_steps = self.phases.total
        self._take_up_metrics(stored["unlogged"])
        for _ in range(stored["passes"]):
            next(iter(self._sampler))  # TRL's sampler draws the order of each pass from where the last draw ended

    def _take_up_metrics(self, unlogged: dict[str, Any]) -> None:
        self._unlogged = unlogged
        self._metrics["train"].clear()
        self._metrics["train"].update(unlogged["metrics"])
        self._tally.flush("train")
        for name, (total, count) in unlogged["tally"].items():
            self._tally.add("train", name, total, count)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # transformers would take the folder `distinguisher/` for an adapter of the imitator, whatever its base is.
        active = self.model.active_adapter
        for name in self.model.peft_config:
            if name != ADAPTER_NAME:
                folder = Path(resume_from_checkpoint) / ("" if name == "default" else name)
                self.model.load_adapter(str(folder), name, is_trainable=name == active)
        self.model.set_adapter(active)

    def _load_best_model(self):
        super()._load_best_model()
        self._step_of_weights = self.state.best_global_step
        path = self._state_path(self.state.best_model_checkpoint).with_suffix(".safetensors")
        if path.exists():
            self._load_distinguisher(load_file(path))
            return
        logger.warning(
            "The best checkpoint %s holds no %s, so the imitator is that of step %d and the distinguisher that of the "
            "last step. Set `save_only_model=False` to have both of one step.",
            self.state.best_model_checkpoint,
            path.name,
            self.state.best_global_step,
        )

    def _load_distinguisher(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for i, parameter in enumerate(self.game.learner.parameters):
                parameter.copy_(tensors[f"parameter.{i}"])

    def _state_path(self, folder: str) -> Path:
        return Path(folder) / f"{STATE}_{self.accelerator.process_index}"


def _buffered(tensors: dict[str, torch.Tensor], index: int, device: torch.device) -> dict[str, torch.Tensor]:
    prefix = f"buffer.{index}."
    return {
        name.removeprefix(prefix): tensor.to(device) for name, tensor in tensors.items() if name.startswith(prefix)
    }


def _push_or_warn(*args: Any, **kwargs: Any) -> None:
    try:
        push_folder(*args, **kwargs)
    except Exception as error:
        logger.warning("A push in the background failed (%s: %s). Training goes on.", type(error).__name__, error)
