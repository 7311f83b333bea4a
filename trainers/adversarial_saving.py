"""What an adversarial run leaves behind: the imitator's repo, its card, its push, and what a resumed run needs."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig

from hf_imitate.distinguisher import ADAPTER_NAME
from hf_imitate.hub_cards.facts import CardFacts, CardMetric
from hf_imitate.human_rows import ROW_COLUMN
from hf_imitate.trainers.adversarial_config import AdversarialConfig
from hf_imitate.trainers.checkpoints import (
    STATE,
    STATE_VERSION,
    TakeUpTheLog,
    check_resumable,
    damage,
    data_digest,
    model_facts,
    settings_of_the_course,
)
from hf_imitate.trainers.imitator_saving import ImitatorSaving, versions
from hf_imitate.trainers.phases import DISTINGUISHER_WARMUP, GAME, Phases

logger = logging.getLogger(__name__)

_OF_QUESTIONS = ("prompt_ids", "prompt_mask")  # in a generation batch
# Of a machine, a push, a resumed run.
_NO_SETTINGS = ("hub_private_repo", "gradient_checkpointing", "activation_checkpointing", "force_resume")
OWN_SETTINGS = (
    *(
        field.name
        for field in dataclasses.fields(AdversarialConfig)
        if field.name in AdversarialConfig.__annotations__ and field.name not in _NO_SETTINGS
    ),
    *("num_generations", "max_completion_length", "temperature", "max_steps", "num_train_epochs", "beta", "seed"),
)


class AdversarialSaving(ImitatorSaving):
    """The half of [`AdversarialTrainer`] that writes and reads files; see there for the algorithm."""

    def __init__(self, *args, **kwargs):
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
        self._unlogged = None
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def lack_of(self, checkpoint: Path) -> str | None:
        """The first file, of any process, that is missing, cut off or altered; `None` if all are whole."""
        return damage(checkpoint)

    def check_checkpoint(self, checkpoint: str) -> None:
        """Check that the game can be taken up, before anything is loaded.

        Raises:
            FileNotFoundError, ValueError: as [`~hf_imitate.trainers.checkpoints.check_resumable`].
        """
        check_resumable(checkpoint, self.accelerator.process_index, self._run_facts(), self.args.force_resume)

    def _run_facts(self) -> dict[str, Any]:
        """What a run has to share with the one whose checkpoint it takes up, as JSON gives it back."""
        if self._digest is None:
            self._digest = data_digest(self.train_dataset["prompt"], self.likelihood.rows.rows)
        facts = {
            "num_processes": self.accelerator.num_processes,
            "train_dataset": self._digest,
            "checks": self.distinguisher.check_names,
            "reward_funcs": self.reward_func_names,
            "distinguisher": f"{sum(p.numel() for p in self.game.learner.parameters)} trained numbers",
            **model_facts(self.model),
            **settings_of_the_course(self.args),
        }
        return json.loads(json.dumps(facts, default=str))

    # --- the imitator's repo

    def save_beside(self, folder: Path) -> None:
        """Save the distinguisher."""
        self.distinguisher.save_beside(folder / "distinguisher", self._tokenizer)

    def published_models(self) -> tuple[nn.Module, ...]:
        """The imitator and its distinguisher."""
        return self.model, *self.distinguisher.published_models()

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
        rows = self.likelihood.rows
        return {
            "version": 1,
            "objective": "adversarial",
            **self.base_facts(),
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
            "versions": versions(),
        }

    def card_facts(self, model_name: str | None = None, dataset_name: str | None = None) -> CardFacts:
        """What this run can truthfully say about itself."""
        last = self.last_measured()
        units = {
            "eval_retrodiction/bits_per_answer": "bits",
            "eval_retrodiction/bits_per_byte": "bits",
            "eval_distinguisher/accuracy_fresh": "probability",
            "distinguisher/accuracy_heldout": "probability",
            "eval_answers/length_ratio": "ratio",
        }
        return CardFacts(
            **self.run_card_facts(model_name, dataset_name),
            is_conversational=not isinstance(self.train_dataset[0]["prompt"], str),
            metrics={name: CardMetric(last[name], unit) for name, unit in units.items() if name in last},
            has_distinguisher=True,
            check_names=self.distinguisher.check_names,
            limits=(
                "The distinguisher of training is not an audit: what it cannot see, nobody has looked for.",
                "Numbers measured while training come from the distinguisher the imitator was trained against.",
            ),
        )

    # --- the state of a run

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        tensors = {f"parameter.{i}": p for i, p in enumerate(self.game.learner.parameters)}
        optimizer = self.game.learner.optimizer.state_dict()
        for index, moments in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        buffered = self._buffered_inputs or []
        for i, part in enumerate(buffered):
            tensors |= {
                f"buffer.{i}.{name}": value
                for name, value in part.items()
                if isinstance(value, torch.Tensor) and name not in _OF_QUESTIONS
            }
        tensors |= self.bodies.tensors() | self.game.heldout.tensors()
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
            "question_widths": [part["prompt_ids"].shape[1] for part in buffered],
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
        self.bodies.load_tensors(tensors)
        self._step = stored["step"]
        self._buffered_inputs = [
            self._buffered(tensors, i, width) for i, width in enumerate(stored["question_widths"])
        ] or None
        # The warm-ups may have ended early; how long the game lasts is for this run's settings to say.
        self.phases = dataclasses.replace(Phases(**stored["phases"]), game=self.phases.game)
        self._entered_phase, self._last_reading = stored["entered_phase"], stored["last_reading"]
        self._plateau = dataclasses.replace(self._plateau, **stored["plateau"])
        if self._entered_phase in (DISTINGUISHER_WARMUP, GAME):
            self.bodies.release()
        elif self.phases.distinguisher_lm_warmup and not self.bodies.learners:
            raise ValueError(
                f"{checkpoint} is from before the distinguisher's body was fitted, and this trainer has let go of "
                "what fits it. Make a new trainer and resume with that."
            )
        self.likelihood.load_state(stored["likelihood"])
        self.game.load_state(stored["game"], tensors)
        self.state.max_steps = self.phases.total
        self._take_up_metrics(stored["unlogged"])
        for _ in range(stored["passes"]):
            next(iter(self._sampler))  # TRL's sampler draws the order of each pass from where the last draw ended

    def _take_up_metrics(self, unlogged: dict[str, Any]) -> None:
        self._unlogged = unlogged
        self._metrics["train"].clear()
        self._metrics["train"].update(unlogged["metrics"])
        self._tally.take_up("train", unlogged["tally"])

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

    def _buffered(self, tensors: dict[str, torch.Tensor], index: int, width: int) -> dict[str, torch.Tensor]:
        """A part of the generation batch as TRL buffered it, its questions rendered from their rows."""
        prefix, device = f"buffer.{index}.", self.accelerator.device
        part = {
            name.removeprefix(prefix): tensor.to(device) for name, tensor in tensors.items() if name.startswith(prefix)
        }
        questions = self.renderer.prompt_ids([self.train_dataset[row]["prompt"] for row in part[ROW_COLUMN].tolist()])
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in questions]
        padded = [[self._tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in questions]
        of_questions = (torch.tensor(rows, device=device) for rows in (padded, mask))
        return {**dict(zip(_OF_QUESTIONS, of_questions, strict=True)), **part}

    def _state_path(self, folder: str) -> Path:
        return Path(folder) / f"{STATE}_{self.accelerator.process_index}"
