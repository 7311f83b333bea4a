"""What every run leaves behind: the imitator's repo, its card, its push, and the checkpoint to go on from."""

import dataclasses
import functools
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import GenerationConfig
from transformers.training_args import HubStrategy
from transformers.utils import PushInProgress

from hf_imitate import __version__
from hf_imitate.causal_lm import commit_of, hub_checkpoint
from hf_imitate.hub_cards.card_file import (
    CARD_KEY,
    STALE_AUDITS,
    audit_hash,
    facts_to_json,
    stale_audits,
    write_card,
    write_facts,
)
from hf_imitate.hub_cards.facts import CardFacts, Paper, hub_id_or_none
from hf_imitate.hub_cards.push import push_folder
from hf_imitate.trainers.atomic_saving import AtomicSaving
from hf_imitate.trainers.checkpoints import checkpoint_to_resume, not_whole
from hf_imitate.trainers.engines import Engine

logger = logging.getLogger(__name__)

# Logged numbers whose course the card shows: the loss, and those the guide defines.
CURVES = ("distinguisher/", "answers/", "checks/", "retrodiction/", "thoughts/")
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


class ImitatorSaving(AtomicSaving):
    """The half of a trainer that writes and reads files.

    Comes before TRL's trainer among the bases. The trainer states `trained_law`, `imitation_facts` and `card_facts`.
    One with a second model says by `published_models` and `save_beside` how it is published; by `lack_of` and
    `check_checkpoint` each says what a resumed run needs.
    """

    started_from: str | None = None  # an adapter's repo or folder, where its training goes on

    def __init__(self, *args, **kwargs):
        self._pushes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self._step_of_weights: int | None = None  # of the best checkpoint, once it was loaded
        self._audits_in_doubt: set[str] = set()  # plan hashes of those that lay there before a training
        self._push_of_output: Any = None  # a `Future`, while a thread reads the output folder
        self._said: dict[str, Any] = {}  # what `create_model_card` was told: a later save says it, too
        super().__init__(*args, **kwargs)

    def trained_law(self) -> GenerationConfig:
        """The generation settings whose law was trained."""
        raise NotImplementedError

    def imitation_facts(self) -> dict[str, Any]:
        """How to rebuild the imitator, without a row of the data: what `imitation.json` holds."""
        raise NotImplementedError

    def card_facts(self, model_name: str | None = None, dataset_name: str | None = None) -> CardFacts:
        """What this run can truthfully say about itself."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """As in transformers; `resume_from_checkpoint=True` goes on from the newest checkpoint that is complete.

        A repo id goes on from the checkpoint in that repo, [`~hf_imitate.causal_lm.hub_checkpoint`].

        Raises:
            FileNotFoundError: the repo holds no checkpoint.
            ValueError: there is no complete checkpoint, or the one that was named is not whole; or the run would push,
                for everybody, an adapter whose base is a local folder, be it the imitator's or a second model's.
        """
        if self.args.push_to_hub:
            self._check_base_can_be_pushed()
        self.prepare_output_dir()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(self.checkpoint_to_resume())
        elif resume_from_checkpoint and hub_id_or_none(resume_from_checkpoint) is not None:
            resume_from_checkpoint = str(hub_checkpoint(resume_from_checkpoint, token=self.args.hub_token))
        if resume_from_checkpoint:
            self.check_checkpoint(resume_from_checkpoint)
        self._step_of_weights = None
        self._note_audit()
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._note_audit()

    def _note_audit(self) -> None:
        """Remember that the audit in the run's folder was made before the weights that come now."""
        folder = Path(self.args.output_dir)
        found = audit_hash(folder)
        if found is not None and found not in self._stored_stale_audits(folder):
            self._audits_in_doubt.add(found)

    def _check_base_can_be_pushed(self) -> None:
        published = self.published_models()
        is_local = [
            isinstance(model, PeftModel) and hub_id_or_none(model.config._name_or_path) is None for model in published
        ]
        if any(is_local) and self.args.hub_private_repo is False:
            whose = "The adapter" if is_local[0] else "The adapter of the imitator's second model"
            # A second model is an adapter even where the imitator is none.
            other = (
                "train all weights"
                if len(published) == 1
                else "set `push_to_hub=False` and push what `hf-imitate card DIR --merge NEW` writes"
                if is_local[0]
                else "set `push_to_hub=False`, delete the second model's folder after training and push then"
            )
            raise ValueError(
                f"{whose} would be pushed for everybody, and its base is a local folder that nobody else has. Push "
                f"the base to the Hub and train from its id, set `hub_private_repo=True`, or {other}."
            )

    def checkpoint_to_resume(self) -> Path:
        """The newest complete checkpoint in the run's folder; the log names those passed over.

        Raises:
            ValueError: there is none.
        """
        return checkpoint_to_resume(self.args.output_dir, self.lack_of)

    def check_checkpoint(self, checkpoint: str) -> None:
        """Check that a run can be taken up, before anything is loaded.

        Raises:
            ValueError: a file is missing, cut off or altered.
        """
        lack = self.lack_of(Path(checkpoint))
        if lack is not None:
            raise ValueError(not_whole(checkpoint, lack))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers, but no batch where the run has already seen its last step."""
        # transformers takes a step before it asks whether the one before was the last; a run taken up at its last
        # checkpoint has nothing left to do.
        if self.state.global_step < self.state.max_steps:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        self.control.should_training_stop = True
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        return [], None

    def _load_best_model(self):
        super()._load_best_model()
        self._step_of_weights = self.state.best_global_step

    def last_measured(self) -> dict[str, Any]:
        """The newest value of every logged number, up to the step whose weights these are."""
        newest = self.state.global_step if self._step_of_weights is None else self._step_of_weights
        entries = [entry for entry in self.state.log_history if entry.get("step", 0) <= newest]
        return {key: value for entry in entries for key, value in entry.items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the imitator as it is published: its weights, its law and how it was made."""
        folder = Path(output_dir or self.args.output_dir)
        self._wait_for_push(folder)
        self._name_base_revisions()
        audited = self._audited_weights(folder)
        super().save_model(str(folder), _internal_call=True)
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and full of local paths
            self.save_beside(folder)
            self.trained_law().save_pretrained(str(folder))
            self._write_card(folder, self._audits_of_others(folder, audited))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _audited_weights(self, folder: Path) -> str | None:
        """A hash of the weights in a folder that holds an audit; `None` where either is missing."""
        files = sorted(folder.glob("*.safetensors"))
        if not self.args.should_save or not files or audit_hash(folder) is None:
            return None
        digest = hashlib.blake2b(digest_size=32)
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
        return digest.hexdigest()

    def _audits_of_others(self, folder: Path, audited: str | None) -> set[str]:
        """The audits that were not made of the weights just saved; before, their hash was `audited`."""
        stored, in_doubt = self._stored_stale_audits(folder), self._audits_in_doubt
        if folder.resolve() == Path(self.args.output_dir).resolve():
            self._audits_in_doubt = set()  # answered, and from here on in the file
        if audited is None:
            return stored | in_doubt
        # Such as those of an imitator that was frozen while its distinguisher learned.
        is_same = audited == self._audited_weights(folder)
        return stored - in_doubt if is_same else stored | in_doubt | {audit_hash(folder) or ""}

    def save_beside(self, folder: Path) -> None:
        """Save what a repo holds beside the imitator; the first process alone is asked."""

    def published_models(self) -> tuple[nn.Module, ...]:
        """The models that are saved."""
        return (self.model,)

    def _name_base_revisions(self) -> None:
        """Tie the adapters to the very commit of the base they were trained on, where it is known."""
        for model in self.published_models():
            commit = _base_commit(model)
            for config in model.peft_config.values() if commit and isinstance(model, PeftModel) else ():
                config.revision = commit

    def base_facts(self) -> dict[str, Any]:
        """The base in `imitation.json`. Of a local one the last part only: the rest is nobody's business."""
        name = self.model.config._name_or_path
        is_local = os.path.isdir(name)
        return {
            "base_model": Path(name).name if is_local else name,
            "base_is_local": is_local,
            "base_revision": _base_commit(self.model),
        }

    def run_card_facts(self, model_name: str | None, dataset_name: str | None) -> dict[str, Any]:
        """What the card of every run says, as arguments of [`CardFacts`]."""
        facts = self.imitation_facts()
        return {
            "model_name": model_name or Path(self.args.output_dir).name,
            "objective": self._name,
            "repo_id": self.hub_model_id,
            "base_model": self.model.config._name_or_path or None,
            "base_revision": facts["base_revision"],
            "completion_role": facts["completion_role"],
            "started_from": self.started_from,
            "papers": (Paper(**self._paper),),
            "dataset_name": dataset_name,
            "num_rows": facts["dataset"]["num_rows"],
            "num_labelled": facts["dataset"]["num_labelled"],
            "settings": facts["settings"],
            "versions": facts["versions"],
            "engine": Engine(self.accelerator).name,
            "is_adapter": isinstance(self.model, PeftModel),
            "generation": {k: v for k, v in self.trained_law().to_diff_dict().items() if k != "transformers_version"},
        }

    def training_curves(self) -> dict[str, list[tuple[int, float]]]:
        """What was logged up to the step whose weights these are, by name."""
        newest = self.state.global_step if self._step_of_weights is None else self._step_of_weights
        curves: dict[str, dict[int, float]] = {}
        for entry in self.state.log_history:
            for name, value in entry.items():
                is_shown = name in ("loss", "eval_loss") or name.removeprefix("eval_").startswith(CURVES)
                if is_shown and isinstance(value, int | float) and entry.get("step", 0) <= newest:
                    curves.setdefault(name, {})[entry.get("step", 0)] = value
        return {name: list(points.items()) for name, points in sorted(curves.items())}

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags=None) -> None:
        """Write README.md: the card of what this run measured, and of the audit in its folder."""
        self._said = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags}
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            self._wait_for_push(folder)
            self._write_card(folder, self._stored_stale_audits(folder) | self._audits_in_doubt)

    def _write_card(self, folder: Path, of_others: set[str]) -> None:
        tags = self._said.get("tags")
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        facts = dataclasses.replace(
            self.card_facts(self._said.get("model_name"), self._said.get("dataset_name")),
            tags=tuple(dict.fromkeys([*self._tag_names, *tags])),
            curves=self.training_curves(),
        )
        # Kept in the file: the next process that writes or pushes this card knows nothing of this run.
        stale = {STALE_AUDITS: sorted(of_others)}
        write_facts(folder, {**self.imitation_facts(), CARD_KEY: {**facts_to_json(facts), **stale}})
        try:
            write_card(folder)
        except ValueError as error:  # the audit's file is not ours; weights are never lost for it
            logger.warning("The card says nothing of the audit in %s: %s", folder, error)
            write_card(folder, with_audit=False)

    def _stored_stale_audits(self, folder: Path) -> set[str]:
        try:
            return set(stale_audits(folder))
        except ValueError:  # a file that is no longer whole is written anew
            return set()

    def _wait_for_push(self, folder: Path) -> None:
        """Change nothing in the output folder while a thread reads it."""
        if self._push_of_output is not None and folder.resolve() == Path(self.args.output_dir).resolve():
            wait([self._push_of_output])
            self._push_of_output = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in transformers; what is not said is private."""
        private = self.args.hub_private_repo if private is None else private
        super().init_hf_repo(token=token, private=private is not False)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Push the imitator in one commit, private unless asked otherwise; what only training needs stays here.

        Raises:
            ValueError: what is there cannot be pushed, see [`~hf_imitate.hub_cards.push.push_folder`].
        """
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
        pushed = push_folder(
            self.args.output_dir,
            self.hub_model_id,
            private=private is not False,
            token=token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
            run_as_future=not blocking,
        )
        if not blocking:
            self._push_of_output = pushed
            self._register_push(pushed)
        return pushed

    def _push_from_checkpoint(self, checkpoint_folder):
        # A checkpoint holds the whole repo already; TRL's own would copy the imitator's files alone, and push the rest
        # of the output folder stale.
        if self._unfinished is not None:
            return  # not yet at its place; from there it is pushed
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
            checkpoint_name=self._checkpoint_name(checkpoint_folder),
        )
        if self.args.save_total_limit is not None:
            wait([push])  # before the folder is deleted to make room
        self._register_push(push)

    def _register_push(self, push: Any) -> None:
        earlier = getattr(self, "push_in_progress", None)
        jobs = [] if earlier is None else [job for job in earlier.jobs if not job.done()]
        self.push_in_progress = PushInProgress([*jobs, push])

    def _checkpoint_name(self, folder: str) -> str | None:
        """Where in the repo a checkpoint is kept to go on from, as `hub_strategy` says."""
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(folder).name}
        return names.get(self.args.hub_strategy)


@functools.cache
def versions() -> dict[str, str]:
    """What a run was made with; reading them takes longer than a small checkpoint, so it is done once."""
    return {"hf-imitate": __version__, **{library: version(library) for library in _LIBRARIES}}


def _base_commit(model: Any) -> str | None:
    return getattr(model.config, "_commit_hash", None) or commit_of(model.config._name_or_path)


def _push_or_warn(*args: Any, **kwargs: Any) -> None:
    try:
        push_folder(*args, **kwargs)
    except Exception as error:
        logger.warning("A push in the background failed (%s: %s). Training goes on.", type(error).__name__, error)
