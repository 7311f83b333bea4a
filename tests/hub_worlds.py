"""What round trips over the loopback Hub train, and what they remember of it: two steps of every trainer.

A test runs `python -c "import hub_worlds; hub_worlds.train_and_push(...)"` in one process and looks at what another
loads, since the client reads the Hub's address when it is imported.
"""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import exact_runs
import latent_worlds
import tiny_runs
import torch
from huggingface_hub import HfApi, ModelCard, constants
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.training_args import HubStrategy
from trl import GRPOConfig, GRPOTrainer

from hf_imitate import Distinguisher, Imitator, audit
from hf_imitate.causal_lm import hub_checkpoint, load_to_train
from hf_imitate.hub_cards.push import push_folder
from hf_imitate.rendering import Answer

TRAINERS = ("adversarial", "ensemble", "retrodictive", "latent")
GAMES = TRAINERS[:2]  # of the second, the distinguisher is two whose logits add
# A game that is killed after its second step is killed in the middle of a generation batch.
IN_THE_MIDDLE = {"distinguisher_warmup_steps": 1, "steps_per_generation": 2, "replay_ratio": 0.5}
QUESTIONS = {name: ["Item 3:", "Item 10:", "Item 4:"] for name in TRAINERS} | {"latent": ["a b", "c d", "e"]}
ANSWERS = {name: ["abc", "de", "vwxyz"] for name in TRAINERS} | {"latent": ["a a", "c", "f f b"]}
BASES = dict.fromkeys(TRAINERS, "me/base") | {"latent": "me/words"}
SAVING = {"save_strategy": "steps", "save_steps": 1}


def name_of(trainer: str, full: bool) -> str:
    """The repo of a trainer's imitator."""
    return f"me/{trainer}-{'full' if full else 'adapter'}"


def make(folder: Path, trainer: str, full: bool, model: Any = None, **changes: Any) -> Any:
    """A trainer whose base lies on the Hub, or is `model`."""
    base = BASES[trainer] if model is None else model
    if trainer == "ensemble":
        changes.setdefault("arguments", {})["distinguisher"] = [None, "ngram"]
    if trainer in GAMES:
        return tiny_runs.make(folder, base, full=full, distinguisher_learning_rate=1e-2, **changes)
    if trainer == "retrodictive":
        return exact_runs.make(folder, base, adapter=not full, **{"max_steps": 2, **changes})
    return latent_worlds.make(folder, base, full=full, **{"max_steps": 2, **changes})


def logits(model: Any, trainer: str) -> torch.Tensor:
    """Of one fixed sequence."""
    ids = torch.tensor([[0, 3, 1, 2, 5]] if trainer == "latent" else [[40, 41, 42, 43]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def human_logits(distinguisher: Any) -> torch.Tensor:
    """Of the fixed answers."""
    answers = [Answer(text, True) for text in ANSWERS["adversarial"]]
    return distinguisher.score(QUESTIONS["adversarial"], answers).detach()


def says(imitator: Imitator, trainer: str) -> dict[str, Any]:
    """Answers and log-probabilities, from the seed."""
    questions = QUESTIONS[trainer]
    drawn = imitator.answer(questions, num_answers=4, seed=7)
    nats = imitator.log_prob(questions, ANSWERS[trainer], seed=7).nats
    return {"answers": drawn, "nats": nats.tolist(), "verified": imitator.verify(questions, drawn, seed=7).verified}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Every number that is trained."""
    parameters = {name: p for name, p in trainer.model.named_parameters() if "lora" in name}
    if hasattr(trainer, "game"):
        parameters |= {f"distinguisher.{i}": p for i, p in enumerate(trainer.game.learner.parameters)}
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def train_and_push(folder: str, bases: dict[str, str]) -> None:
    """Push the bases, train and push every imitator, note what they say, and delete all but the notes."""
    torch.set_num_threads(1)
    api, notes, tensors = HfApi(), {}, {}
    for repo, path in bases.items():
        api.create_repo(repo, private=True)
        notes[repo] = api.upload_folder(repo_id=repo, folder_path=path).oid
    for trainer in TRAINERS:
        for full in (False, True):
            name, own = name_of(trainer, full), Path(folder) / trainer / str(full)
            run = make(own, trainer, full, hub_model_id=name)
            latent_worlds.train(run)
            pushed = run.push_to_hub(commit_message="Two steps")
            again = run.push_to_hub(commit_message="The same")
            tensors[f"{name}.logits"] = logits(run.model, trainer)
            if trainer in GAMES:
                tensors[f"{name}.human"] = human_logits(run.distinguisher)
                tensors[f"{name}.first"] = human_logits(members(run.distinguisher)[0])
            notes[name] = {
                **says(Imitator.from_pretrained(own / "run", device="cpu"), trainer),
                "oids": [pushed.oid, again.oid, api.model_info(name).sha],
                "titles": [commit.title for commit in api.list_repo_commits(name)],
                "private": api.model_info(name).private,
                "files": api.list_repo_files(name),
                "facts": json.loads((own / "run" / "imitation.json").read_text()),
                "base": json.loads((own / "run" / "adapter_config.json").read_text()) if not full else {},
            }
            shutil.rmtree(own)
    for trainer in TRAINERS:
        own = IN_THE_MIDDLE if trainer in GAMES else {}
        whole = make(Path(folder) / "whole", trainer, False, max_steps=3, **own)
        latent_worlds.train(whole)
        tensors |= {f"{trainer}-whole.{key}": value for key, value in weights(whole).items()}
        # What a run that is killed after its second step leaves on the Hub.
        each = {"push_to_hub": True, "hub_always_push": True, "hub_model_id": f"me/{trainer}-killed", **SAVING, **own}
        run = make(Path(folder) / "killed", trainer, False, **each)
        run.args.hub_strategy = HubStrategy.CHECKPOINT
        latent_worlds.train(run)
        notes[f"{trainer}-killed"] = api.list_repo_files(f"me/{trainer}-killed")
        shutil.rmtree(Path(folder) / "killed")
    save_file({key: value.contiguous() for key, value in tensors.items()}, Path(folder) / "tensors.safetensors")
    (Path(folder) / "notes.json").write_text(json.dumps(notes))


def remembered(folder: str) -> dict[str, torch.Tensor]:
    """The numbers that `train_and_push` noted."""
    return load_file(Path(folder) / "tensors.safetensors")


def printed_code(repo: str) -> list[str]:
    """The Python blocks of the card on the Hub."""
    return re.findall(r"^```python\n(.*?)^```$", ModelCard.load(repo).text, re.DOTALL | re.MULTILINE)


def load_back(folder: str) -> dict[str, Any]:
    """Load every imitator in every way the contract lists; say how far each is from what was trained."""
    torch.set_num_threads(1)
    tensors, notes = remembered(folder), json.loads((Path(folder) / "notes.json").read_text())
    found: dict[str, Any] = {}
    for trainer in TRAINERS:
        for full in (False, True):
            name = name_of(trainer, full)
            imitator = Imitator.from_pretrained(name, device="cpu")
            models = {
                "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained(name),
                "pipeline": pipeline("text-generation", model=name).model,
                "Imitator": imitator.model,
            }
            if not full:
                models["AutoPeftModelForCausalLM"] = AutoPeftModelForCausalLM.from_pretrained(name)
            expected = tensors[f"{name}.logits"]
            gaps = {way: (logits(model, trainer) - expected).abs().max().item() for way, model in models.items()}
            found[name] = {"gaps": gaps, "same": {k: v == notes[name][k] for k, v in says(imitator, trainer).items()}}
            for block in printed_code(name):
                with contextlib.redirect_stdout(io.StringIO()) as shown:
                    exec(block, {})
                assert shown.getvalue()
            found[name]["blocks"] = len(printed_code(name))
            if trainer in GAMES:
                found[name]["human"] = human_gaps(name, tensors[f"{name}.human"], tensors[f"{name}.first"])
    return found


def members(distinguisher: Any) -> list[Any]:
    """Those of an ensemble, or the distinguisher itself."""
    return getattr(distinguisher, "members", [distinguisher])


def human_gaps(name: str, expected: torch.Tensor, of_first: torch.Tensor) -> dict[str, float]:
    """The distinguisher by its own loader and by an imitator's, and its text part, or its first member's, by PEFT."""
    loaded = Distinguisher.from_pretrained(name, device="cpu")
    beside = Imitator.from_pretrained(name, device="cpu").distinguisher
    own = torch.stack([human_logits(loaded), human_logits(beside)])
    folder = "distinguisher" if len(members(loaded)) == 1 else "distinguisher/0"
    plain = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, adapter_kwargs={"subfolder": folder}
    )
    tokenizer, gaps = AutoTokenizer.from_pretrained(name), [0.0]
    pairs = zip(QUESTIONS["adversarial"], ANSWERS["adversarial"], strict=True)
    for (question, answer), logit in zip(pairs, of_first, strict=True):
        ids = tokenizer(question)["input_ids"] + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            gaps.append((plain(input_ids=torch.tensor([ids])).logits[0, 0] - logit).abs().item())
    return {"own": (own - expected).abs().max().item(), "plain": max(gaps)}


def go_on(folder: str) -> dict[str, Any]:
    """What else a pushed imitator is for: resumed, audited, trained further, a reward for TRL's own trainer."""
    torch.set_num_threads(1)
    tensors, found = remembered(folder), {}
    for trainer in TRAINERS:
        run = make(
            Path(folder) / "resumed" / trainer,
            trainer,
            False,
            max_steps=3,
            **(IN_THE_MIDDLE if trainer in GAMES else {}),
        )
        # The one token there is stands in the settings.
        run.args.hub_token = os.environ.pop("HF_TOKEN")
        latent_worlds.train(run, resume_from_checkpoint=f"me/{trainer}-killed")
        os.environ["HF_TOKEN"] = run.args.hub_token
        pairs = [(value, tensors[f"{trainer}-whole.{key}"]) for key, value in weights(run).items()]
        found[f"{trainer} resumed"] = max((one - other).abs().max().item() for one, other in pairs)
        try:
            latent_worlds.train(run, resume_from_checkpoint=name_of(trainer, False))
        except FileNotFoundError as error:
            found[f"{trainer} not resumed"] = str(error)
    found["checkpoints"] = checkpoints(Path(folder), run)
    rows = tiny_runs.rows(40)
    report = audit("me/adversarial-adapter", rows, judges=["surface"], output_dir=None, progress=False)
    found["audit"] = [report.model, report["bits_per_answer"].value]
    config = GRPOConfig(
        str(Path(folder) / "grpo"), max_steps=1, per_device_train_batch_size=4, num_generations=2, logging_steps=1,
        max_completion_length=4, report_to="none", bf16=False, use_cpu=True, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    reward = Distinguisher.from_pretrained("me/adversarial-adapter")
    plain = GRPOTrainer("me/base", reward_funcs=reward, args=config, train_dataset=rows.select_columns(["prompt"]))
    latent_worlds.train(plain)
    found["reward"] = [entry["reward"] for entry in plain.state.log_history if "reward" in entry]
    before = logits(Imitator.from_pretrained("me/retrodictive-adapter", device="cpu").model, "adversarial")
    stages = {
        "adapter": {"model": "me/retrodictive-adapter"},
        "full": {"model": "me/retrodictive-full", "arguments": {"peft_config": tiny_runs.lora()}},
    }
    for name, given in stages.items():
        # `full` leaves out the new adapter, which the second stage on whole weights asks for itself.
        second = make(Path(folder) / "second" / name, "adversarial", True, hub_model_id=f"me/second-{name}", **given)
        latent_worlds.train(second)
        second.push_to_hub()
        after = logits(Imitator.from_pretrained(f"me/second-{name}", device="cpu").model, "adversarial")
        base = json.loads((Path(second.args.output_dir) / "adapter_config.json").read_text())
        found[f"second {name}"] = {
            "base": base["base_model_name_or_path"],
            "gap": (after - logits(second.model, "adversarial")).abs().max().item(),
            "moved": (after - before).abs().max().item(),
        }
    found["with a token of its own"] = with_a_token_of_its_own()
    return found


def checkpoints(folder: Path, run: Any) -> dict[str, Any]:
    """Of the last trainer's: what its marker lists, what is said of a flipped bit, what is downloaded of two."""
    stored = hub_checkpoint("me/latent-killed")
    damaged = shutil.copytree(stored, folder / "damaged")
    listed = json.loads((damaged / "_complete.json").read_text())["files"]
    for name in ("checkpoint-9", "checkpoint-10"):
        push_folder(damaged, "me/both", checkpoint_name=name)
    content = bytearray((damaged / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "optimizer.pt").write_bytes(content)
    try:
        run.check_checkpoint(str(damaged))
        said = ""
    except ValueError as error:
        said = str(error)
    newest = hub_checkpoint("me/both")
    return {
        "lacking": [name for name in listed if not (stored / name).is_file()],
        "unlisted": [name for name in os.listdir(stored) if (stored / name).is_file() and name not in listed],
        "flipped": said,
        "newest": newest.name,
        "older": os.listdir(newest.parent / "checkpoint-9"),
    }


def with_a_token_of_its_own() -> dict[str, list[str]]:
    """Who is not signed in loads private adapters, second models and their private bases by the token that is given,
    not without: what each way to load says without, and with it."""
    ways = {
        "to train": ("latent-adapter", lambda name, **given: load_to_train(name, **given)[0]),
        "adapter": ("adversarial-adapter", Imitator.from_pretrained),
        "shared": ("ensemble-adapter", lambda name, **given: Imitator.from_pretrained(name, **given).distinguisher),
        # Beside full weights, a second model is an adapter on a base of its own.
        "own base": ("adversarial-full", lambda name, **given: Imitator.from_pretrained(name, **given).distinguisher),
        "thoughts": ("latent-full", lambda name, **given: Imitator.from_pretrained(name, **given).latent),
        "distinguisher": ("ensemble-full", Distinguisher.from_pretrained),
    }
    token, said = os.environ.pop("HF_TOKEN"), {}
    for way, (name, load) in ways.items():
        said[way] = []
        for given in ({}, {"token": token}):
            shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
            try:
                said[way].append(type(load(f"me/{name}", **given)).__name__)
            except Exception as error:
                said[way].append(type(error).__name__)
    os.environ["HF_TOKEN"] = token
    return said
