"""`hf-imitate adversarial`, `retrodictive`, `latent`: train, here or in the processes `accelerate launch` starts."""

import difflib
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_imitate.cli_data import check_is_there, load_named, split_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from trl import DatasetMixtureConfig, ScriptArguments, TrlParser

_USAGE = "hf-imitate {name} [--config FILE] [--<setting> VALUE ...] [options of accelerate launch]"
_LAUNCHED = "--launched"  # set on the processes that `accelerate launch` starts, so that they do not launch again


class _Trainer(NamedTuple):
    """A trainer that a command calls.

    Attributes:
        name: of the trainer's class; its config's is the same with `Config`.
        module: where both live, but for the ending.
    """

    name: str
    module: str

    def load(self, kind: str) -> type:
        module = importlib.import_module(f"hf_imitate.trainers.{self.module}_{kind.lower()}")
        return getattr(module, f"{self.name}{kind}")


TRAINERS = {
    "adversarial": _Trainer("Adversarial", "adversarial"),
    "retrodictive": _Trainer("Retrodictive", "retrodictive"),
    "latent": _Trainer("LatentRetrodictive", "latent_retrodictive"),
}


def train(name: str, argv: list[str]) -> int:
    """Parse settings, then train in this process or in those that `accelerate launch` starts; returns the status."""
    is_launched = _is_launched(argv)
    argv = [part for word in argv for part in _separate_config(word) if part != _LAUNCHED]
    try:
        _check_config_file(argv)
        parser = make_parser(name)
        *settings, from_file, from_line = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
        _check_settings(*settings)
        launch_arguments = _launch_arguments(parser, from_file, from_line)
    except (ValueError, OSError) as error:
        return _refused(name, error)
    if is_launched or not (launch_arguments or _needs_several_processes()):
        try:
            return _run(name, *settings)
        except KeyboardInterrupt:
            return 130  # what is left was said by the trainer
    return _launch(name, launch_arguments, _without_subsequence(argv, from_line))


def make_parser(name: str) -> "TrlParser":
    """The settings that one of `TRAINERS` takes."""
    from dataclasses import dataclass, field

    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    @dataclass
    class AdversarialScriptArguments(ScriptArguments):
        distinguisher: list[str] | None = field(
            default=None,
            metadata={
                "help": "Repo id or path of a separate model to tell human from imitated answers with, `ngram`, or "
                "several of these, whose logits add; by default a second adapter on the imitator's base."
            },
        )

    script = AdversarialScriptArguments if name == "adversarial" else ScriptArguments
    types = (script, TRAINERS[name].load("Config"), ModelConfig, DatasetMixtureConfig)
    parser = TrlParser(types, prog=f"hf-imitate {name}", usage=_USAGE.format(name=name), allow_abbrev=False)
    for action in parser._actions:
        # Of a field that takes a number or "auto", the parser of dataclasses knows the number alone; the config knows
        # both, and reads a number from text.
        if action.default == "auto" and action.type is int:
            action.type = str
    return parser


def _make_trainer(
    name: str, script_args: Any, training_args: Any, model_args: Any, mixture: "DatasetMixtureConfig"
) -> Any:
    """The trainer with its rows and models, which are checked here."""
    from trl import get_peft_config, get_quantization_config

    dataset = load_dataset(script_args, mixture)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    own = {"distinguisher": _distinguisher(script_args.distinguisher)} if name == "adversarial" else {}
    return TRAINERS[name].load("Trainer")(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=split_of(dataset, script_args.dataset_train_split),
        eval_dataset=_eval_split(dataset, script_args, training_args),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        **own,
    )


def _run(name: str, *settings: Any) -> int:
    """Train, save, and perhaps push; returns the status."""
    from hf_imitate.trainers.ranks import ProcessFailure

    trainer = None
    try:
        trainer = _make_trainer(name, *settings)
        trainer.train(resume_from_checkpoint=_checkpoint(trainer.args.resume_from_checkpoint))
    except (ValueError, TypeError, OSError, ProcessFailure) as error:
        if trainer is not None and trainer.state.max_steps:
            raise  # the steps had begun: where it happened matters as well
        return _refused(name, error)
    args, dataset_name = trainer.args, settings[0].dataset_name
    trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Imitator saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"Imitator pushed to {trainer.hub_model_id}.")
    trainer.end()
    return 0


def _refused(name: str, error: Exception) -> int:
    print(f"hf-imitate {name}: error: {error}", file=sys.stderr)
    return 2


def _checkpoint(given: str | bool | None) -> str | bool | None:
    """On the command line, the newest one is asked for by a word; transformers would take it for a path."""
    words = {"true": True, "false": None}
    return words.get(given.lower(), given) if isinstance(given, str) else given


def _distinguisher(given: list[str] | str | None) -> list[str] | str | None:
    """One name is one distinguisher, however it was written; in a file it may stand without a list."""
    return given[0] if isinstance(given, list) and len(given) == 1 else given


def _is_launched(argv: list[str]) -> bool:
    # A process that torchrun or `accelerate launch` started by the user's own hand has a rank, and not our flag.
    return _LAUNCHED in argv or "LOCAL_RANK" in os.environ


def _separate_config(word: str) -> list[str]:
    # TrlParser looks for the word `--config` alone; argparse users also write `--config=file`.
    return word.split("=", 1) if word.startswith("--config=") else [word]


def _check_config_file(argv: list[str]) -> None:
    if "--config" not in argv:
        return
    path = argv[argv.index("--config") + 1 :][:1]
    if not path:
        raise ValueError("`--config` is not followed by a file. Write `--config settings.yaml`.")
    if not Path(path[0]).is_file():
        raise FileNotFoundError(f"`--config` is {path[0]!r}; there is no such file. Give the path of a YAML file.")


def _check_settings(script_args: "ScriptArguments", training_args: Any, model_args: Any, mixture: Any) -> None:
    from hf_imitate.hub_cards.facts import hub_id_or_none

    if model_args.model_name_or_path is None:
        raise ValueError("No model to train. Give `--model_name_or_path`: a Hub id, or the directory of a model.")
    if not Path(name := model_args.model_name_or_path).is_dir() and hub_id_or_none(name) is None:
        raise FileNotFoundError(
            f"`model_name_or_path` is {name!r}: no directory that is there, and no Hub id. Check its spelling."
        )
    if script_args.dataset_name is not None:
        check_is_there(script_args.dataset_name)
    elif not mixture.datasets:
        raise ValueError(
            "No data to learn from. Give `--dataset_name`: a Hub id, a .json, .jsonl, .csv or .parquet file, a "
            "directory, or `docstrings` for the embedded data; or list several under `datasets:` in the config file."
        )


def _launch_arguments(parser: "TrlParser", from_file: list[str], from_line: list[str]) -> list[str]:
    """Turn what no config field claimed into arguments of `accelerate launch`, or say that nobody knows them."""
    from accelerate.commands.launch import launch_command_parser

    options = {option: action for action in launch_command_parser()._actions for option in action.option_strings}
    from_pairs = []
    for flag, value in zip(from_file[::2], from_file[1::2], strict=True):
        # In a file a switch has a value, `multi_gpu: true`; on the command line it has none.
        is_switch = flag in options and options[flag].nargs == 0
        if not is_switch or value == "True":
            from_pairs += [flag] if is_switch else [flag, value]
    arguments = from_pairs + from_line
    for word in from_file[::2] + [word for word in from_line if word.startswith("--")]:
        flag = word.split("=", 1)[0]
        if flag not in options and flag != "--accelerate_config":
            known = [option for action in parser._actions for option in action.option_strings] + list(options)
            close = difflib.get_close_matches(flag, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"Nothing is called `{flag}`: no setting, and no option of `accelerate launch`.{hint}")
    return _resolve_accelerate_config(arguments)


def _resolve_accelerate_config(arguments: list[str]) -> list[str]:
    """Replace `--accelerate_config <name or path>` by accelerate's `--config_file <path>`."""
    from importlib.resources import files

    if "--accelerate_config" not in arguments:
        return arguments
    index = arguments.index("--accelerate_config")
    if index + 1 == len(arguments):
        raise ValueError(
            "`--accelerate_config` is not followed by a name or a path. Write `--accelerate_config fsdp2`."
        )
    value, rest = arguments[index + 1], [*arguments[:index], *arguments[index + 2 :]]
    if Path(value).is_file():
        return ["--config_file", value, *rest]
    named = {
        entry.name.removesuffix(".yaml"): str(entry)
        for folder in (files("trl.accelerate_configs"), files("hf_imitate.trainers") / "accelerate_configs")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }
    if value not in named:
        raise ValueError(f"`--accelerate_config` is {value!r}: no file, and none of {', '.join(sorted(named))}.")
    is_counted = any(word.split("=", 1)[0] == "--num_processes" for word in rest)
    return ["--config_file", named[value], *([] if is_counted else _num_processes(value)), *rest]


def _num_processes(config: str) -> list[str]:
    """As many processes as there are GPUs, where a configuration of ours or TRL's is named and no number is given."""
    import torch

    if config in ("cpu", "single_gpu"):
        return []
    if not torch.cuda.device_count():
        raise ValueError(
            f"`--accelerate_config {config}` starts a process on every GPU, and there is none. Use `cpu`, or say how "
            "many by `--num_processes`."
        )
    return ["--num_processes", str(torch.cuda.device_count())]


def _needs_several_processes() -> bool:
    import torch
    from accelerate.commands.config import default_config_file

    # TRL's trainers refuse to spread one process over several GPUs; `accelerate config` is a choice already made.
    return os.path.isfile(default_config_file) or torch.cuda.device_count() > 1


def _launch(name: str, launch_arguments: list[str], script_arguments: list[str]) -> int:
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Without an accelerator, each of several processes would take itself for the only one.
    environment = {} if torch.accelerator.is_available() else {"accelerate_use_cpu": "true"}
    # As a module: run as a file, this folder would come first on the path, and its `rows` or `demo` hide others.
    script = ["--module", "hf_imitate.cli", name, _LAUNCHED, *script_arguments]
    try:
        with patch_environment(**environment):
            launch_command(launch_command_parser().parse_args([*launch_arguments, *script]))
    except subprocess.CalledProcessError as error:
        return error.returncode  # what went wrong was said by the process that failed
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    return 0


def _without_subsequence(words: list[str], removed: list[str]) -> list[str]:
    """`words` without the ordered subsequence `removed`."""
    rest = list(removed)
    return [word for word in words if not (rest and word == rest[0] and rest.pop(0))]


def load_dataset(script_args: "ScriptArguments", mixture: "DatasetMixtureConfig") -> "DatasetDict":
    """The data set that the settings name, or the mixture they describe."""
    from trl import get_dataset

    if mixture.datasets:
        return get_dataset(mixture)
    return load_named(
        script_args.dataset_name,
        script_args.dataset_config,
        mixture.test_split_size,
        script_args.dataset_train_split,
        script_args.dataset_streaming,
    )


def _eval_split(dataset: "DatasetDict", script_args: "ScriptArguments", training_args: Any) -> "Dataset | None":
    return None if training_args.eval_strategy == "no" else split_of(dataset, script_args.dataset_test_split)
