"""What an exact run leaves behind to go on from, beside its imitator."""

import json
from pathlib import Path
from typing import Any

from hf_imitate.trainers.atomic_checkpoints import is_marked, marked_damage
from hf_imitate.trainers.checkpoints import (
    LAST_WRITTEN,
    check_same_run,
    is_whole,
    model_facts,
    rows_digest,
    settings_of_the_course,
    stored_state,
)
from hf_imitate.trainers.imitator_saving import ImitatorSaving

# And the number of the process; what starts with "_" stays behind when an imitator is pushed.
STATE, STATE_VERSION = "_retrodictive_state", 1


class RetrodictiveSaving(ImitatorSaving):
    """The half of [`RetrodictiveTrainer`] that writes and reads the state of a run."""

    _unlogged: dict[str, Any] | None = None  # of a checkpoint between two logs
    _digest: str | None = None

    def lack_of(self, checkpoint: Path) -> str | None:
        """The first file of a checkpoint that is missing, cut off or altered; `None` if it is whole."""
        return damage(checkpoint)

    def check_checkpoint(self, checkpoint: str) -> None:
        """Check that a run can be taken up, before anything is loaded.

        Raises:
            FileNotFoundError: it holds weights alone, or the optimizer or a random state is not there.
            ValueError: a file is missing, cut off or altered, or the run is another one; the message names what.
        """
        super().check_checkpoint(checkpoint)
        folder = Path(checkpoint)
        state = self._state_path(checkpoint)
        if state.is_file():
            was = stored_state(state, STATE_VERSION)["run"]
            check_same_run(folder, was, self._run_facts(), self.args.force_resume)
        elif is_marked(folder):
            check_state_is_there(folder, self.args.world_size, self.args.process_index)
            raise ValueError(
                f"{folder} holds no {state.name}: it was left by another trainer, or by fewer processes than now. "
                "Resume with those that left it."
            )
        check_state_is_there(folder, self.args.world_size, self.args.process_index)

    def _run_facts(self) -> dict[str, Any]:
        """What a run has to share with the one whose checkpoint it takes up, as JSON gives it back."""
        if self._digest is None:
            self._digest = rows_digest(self.train_dataset)
        facts = {
            "num_processes": self.accelerator.num_processes,
            "train_dataset": self._digest,
            **model_facts(self.model),
            **settings_of_the_course(self.args),
        }
        return json.loads(json.dumps(facts, default=str))

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        stored = {
            "version": STATE_VERSION,
            "run": self._run_facts(),
            "unlogged": {
                "loss": self._tr_loss.item(),  # a number in fp32 goes through JSON unchanged
                "last_log": self._globalstep_last_logged,
                "metrics": dict(self._metrics["train"]),
                "tally": self._tally.state("train"),
                "num_tokens": self._total_train_tokens,
            },
        }
        path = self._state_path(output_dir)
        path.parent.mkdir(parents=True, exist_ok=True)  # the first process may not have been there yet
        path.write_text(json.dumps(stored), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        self._unlogged = None
        if checkpoint is None or not self._state_path(checkpoint).is_file():
            return  # of a checkpoint from before there was a state: what was not logged yet is not in the next log
        self._unlogged = stored_state(self._state_path(checkpoint), STATE_VERSION)["unlogged"]
        self._metrics["train"].clear()
        self._metrics["train"].update(self._unlogged["metrics"])
        self._total_train_tokens = self._unlogged["num_tokens"]
        self._tally.take_up("train", self._unlogged["tally"])

    def _state_path(self, folder: str) -> Path:
        return Path(folder) / f"{STATE}_{self.accelerator.process_index}.json"


def damage(checkpoint: str | Path) -> str | None:
    """What a checkpoint of one model lacks: its first file that is missing, cut off or altered. `None` if it is whole.

    Without a marker: transformers writes `trainer_state.json` after everything else of its process.
    """
    folder = Path(checkpoint)
    if is_marked(folder):
        return marked_damage(folder)
    files = [folder / LAST_WRITTEN, *sorted(folder.rglob("*.safetensors"))]
    states = [*folder.glob("optimizer*.pt"), *folder.glob("scheduler.pt"), *folder.glob("rng_state*.pth")]
    for file in [*files, *sorted(states)]:
        if not file.is_file():
            return f"{file.relative_to(folder)} is missing"
        if not is_whole(file):
            return f"{file.relative_to(folder)} is cut off"
    return None


def check_state_is_there(folder: Path, num_processes: int, process: int) -> None:
    """transformers goes on with a fresh optimizer or random state where it finds none, and says nothing.

    Raises:
        FileNotFoundError: naming the file.
    """
    random = "rng_state.pth" if num_processes == 1 else f"rng_state_{process}.pth"
    has_optimizer = any((*folder.glob("optimizer*"), *folder.glob("global_step*")))
    lacking = [] if has_optimizer else ["optimizer.pt"]
    lacking += [] if (folder / random).is_file() else [random]
    if lacking:
        raise FileNotFoundError(
            f"{folder} holds no {lacking[0]}, so it would go on with a fresh one, and to another end. Resume from a "
            "checkpoint that was made with `save_only_model=False` and by as many processes as now; or start anew "
            "from its imitator as `model`."
        )
