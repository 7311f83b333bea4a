"""What a latent run leaves behind: imitator, retrodictor and their law, and what a resumed run needs."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig

from hf_imitate.hub_cards.facts import CardFacts, CardMetric
from hf_imitate.retrodictor import RETRODICTOR
from hf_imitate.trainers.atomic_checkpoints import is_marked
from hf_imitate.trainers.checkpoints import (
    check_same_run,
    is_whole,
    model_facts,
    settings_of_the_course,
    stored_state,
)
from hf_imitate.trainers.imitator_saving import ImitatorSaving, versions
from hf_imitate.trainers.retrodictive_saving import check_state_is_there, damage

logger = logging.getLogger(__name__)

# And the number of the process; what starts with "_" stays behind when a checkpoint is pushed.
STATE, STATE_VERSION = "_latent_state", 1
OWN_SETTINGS = (
    *("num_thoughts", "num_thoughts_eval", "max_thought_length", "estimator", "thought_delimiter"),
    *("retrodictor_learning_rate", "retrodictor_warmup_steps", "chat_template_kwargs", "learning_rate"),
    *("lr_scheduler_type", "optim", "max_length", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_steps", "num_train_epochs", "seed"),
)
LAW_NOTE = (
    "Plain loading gives the weights but not the law: it shows the thought and may not close it. Use `Imitator`.",
    "Its log-probabilities are estimates from weighted thoughts: lower bounds in the mean, not exact.",
)


class LatentSaving(ImitatorSaving):
    """The half of [`LatentRetrodictiveTrainer`] that writes and reads files; see there for the algorithm."""

    _unlogged: dict[str, Any] | None = None  # of a checkpoint between two logs

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
        return lacks(checkpoint)

    def save_beside(self, folder: Path) -> None:
        """Save a retrodictor that has a base of its own; PEFT has written one on the imitator's base already."""
        own = folder / RETRODICTOR
        if self.retrodictor is None:
            shutil.rmtree(own, ignore_errors=True)  # of an earlier run in this folder, which had one
        elif self.retrodictor.adapter_name is None:
            own.mkdir(parents=True, exist_ok=True)
            self.retrodictor.save_pretrained(own)

    def published_models(self) -> tuple[nn.Module, ...]:
        """The imitator, and a retrodictor that is not an adapter of it."""
        retrodictor = self.retrodictor
        is_apart = retrodictor is not None and retrodictor.adapter_name is None
        return (self.model, retrodictor.model) if is_apart else (self.model,)

    def trained_law(self) -> GenerationConfig:
        """The generation settings of the answers' part of the law."""
        law = self.thinkers.law
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=law.max_length + len(law.delimiter_ids) + self._counts["train"].longest_answer,
            eos_token_id=self.renderer.end_token_ids,
            pad_token_id=self._tokenizer.pad_token_id,
            bos_token_id=self._tokenizer.bos_token_id,
        )

    def imitation_facts(self) -> dict[str, Any]:
        """How to rebuild the imitator, without a row of the data."""
        counts = self._counts["train"]
        return {
            "version": 1,
            "objective": "latent",
            **self.base_facts(),
            "dataset": {
                "num_rows": counts.num_rows,
                "num_labelled": counts.num_rows,
                "num_thoughts_known": sum(self.train_dataset["has_thought"][:]),
                "num_truncated": counts.num_truncated,
                "num_left_out": counts.num_without_room + counts.num_weightless,
                "fingerprint": self._fingerprint,
            },
            "settings": {name: getattr(self.args, name) for name in OWN_SETTINGS},
            "thoughts": self.thinkers.law.to_json(),
            "has_retrodictor": self.retrodictor is not None,
            "max_answer_tokens": counts.longest_answer,
            "chat_template_kwargs": self.renderer.chat_template_kwargs,
            "completion_role": self.renderer.completion_role,
            "versions": versions(),
        }

    def card_facts(self, model_name: str | None = None, dataset_name: str | None = None) -> CardFacts:
        """What this run can truthfully say about itself."""
        last = self.last_measured()
        units = {
            "eval_retrodiction/bits_per_answer": "bits",
            "eval_retrodiction/bits_per_byte": "bits",
            "eval_thoughts/effective_sample_size": "count",
        }
        return CardFacts(
            is_conversational=self._is_conversational,
            thinks_first=True,
            metrics={name: CardMetric(last[name], unit) for name, unit in units.items() if name in last},
            limits=LAW_NOTE,
            **self.run_card_facts(model_name, dataset_name),
        )

    # --- the state of a run

    def check_checkpoint(self, checkpoint: str) -> None:
        """Check that a run can be taken up, before anything is loaded.

        Raises:
            FileNotFoundError: it holds weights alone, or the optimizer or a random state is not there.
            ValueError: a file is missing, cut off or altered, or the run is another one; the message names what.
        """
        super().check_checkpoint(checkpoint)
        was = self._stored_state(checkpoint)["run"]
        check_same_run(Path(checkpoint), was, self._run_facts(), self.args.force_resume, needed=("thoughts",))
        check_state_is_there(Path(checkpoint), self.args.world_size, self.args.process_index)

    def _run_facts(self) -> dict[str, Any]:
        """What a run has to share with the one whose checkpoint it takes up, as JSON gives it back."""
        facts = {
            "num_processes": self.accelerator.num_processes,
            "train_dataset": self._digest,
            "thoughts": self.thinkers.law.to_json(),
            **model_facts(self.model),
            **settings_of_the_course(self.args),
        }
        return json.loads(json.dumps(facts, default=str))

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        stored = {
            "version": STATE_VERSION,
            "run": self._run_facts(),
            "warmup": self.warmup.state(),
            "baseline": self.steps.baseline,
            "unlogged": {
                "loss": self._tr_loss.item(),  # a number in fp32 goes through JSON unchanged
                "last_log": self._globalstep_last_logged,
                "tally": self._tally.state("train"),
            },
        }
        path = self._state_path(output_dir)
        path.parent.mkdir(parents=True, exist_ok=True)  # the first process may not have been there yet
        tensors = {} if self.learner is None else self.learner.tensors()
        cpu = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(cpu, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps(stored), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        stored = self._stored_state(checkpoint)
        if self.learner is not None:
            self.learner.load(load_file(self._state_path(checkpoint).with_suffix(".safetensors")))
        self.warmup.load_state(stored["warmup"])
        self.steps.baseline = stored["baseline"]
        self.state.max_steps = self.warmup.steps + self._main_steps
        self._unlogged = stored["unlogged"]
        self._tally.take_up("train", stored["unlogged"]["tally"])

    def _stored_state(self, checkpoint: str) -> dict[str, Any]:
        path = self._state_path(checkpoint).with_suffix(".json")
        if not path.is_file():
            raise FileNotFoundError(
                f"{checkpoint} holds no {path.name}, so the retrodictor cannot be restored. Resume from a checkpoint "
                "of LatentRetrodictiveTrainer that was made with `save_only_model=False`."
            )
        return stored_state(path, STATE_VERSION)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.learner is not None:
            for parameter in self.learner.parameters:
                parameter.requires_grad_(False)

    def _load_best_model(self):
        super()._load_best_model()
        path = self._state_path(self.state.best_model_checkpoint).with_suffix(".safetensors")
        if self.learner is not None and path.exists():
            self.learner.load_weights(load_file(path))
        elif self.learner is not None:
            logger.warning(
                "The best checkpoint %s holds no %s, so the retrodictor is that of the last step. Set "
                "`save_only_model=False` to have both of one step.",
                *(self.state.best_model_checkpoint, path.name),
            )

    def _state_path(self, folder: str) -> Path:
        return Path(folder) / f"{STATE}_{self.accelerator.process_index}"


def lacks(checkpoint: Path) -> str | None:
    """The first file of a latent run's checkpoint that is missing or cut off, of any process; `None` if it is whole.

    transformers marks a checkpoint as done when its first process is.
    """
    lack, first = damage(checkpoint), checkpoint / f"{STATE}_0.json"
    if lack is not None or is_marked(checkpoint) or not first.is_file():
        return lack  # without a state it holds weights alone, and says so when it is resumed
    if not is_whole(first):
        return f"{first.name} is cut off"
    number = json.loads(first.read_text(encoding="utf-8"))["run"]["num_processes"]
    states = [checkpoint / f"{STATE}_{i}{end}" for i in range(number) for end in (".json", ".safetensors")]
    random = ["rng_state.pth"] if number == 1 else [f"rng_state_{i}.pth" for i in range(number)]
    for file in [*states, *(checkpoint / name for name in random)]:
        if not file.is_file():
            return f"{file.name} is missing"
        if not is_whole(file):
            return f"{file.name} is cut off"
    return None
