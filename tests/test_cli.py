"""The command line: what it says, what it passes on, and one run from a config file to a saved imitator."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hub_server import hub_environment, hub_server

from hf_imitate import cli

ROOT = Path(__file__).parent.parent
NAMED = ["--model_name_or_path", "any", "--dataset_name", "docstrings"]


def shell(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hf_imitate.cli", *arguments]
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def parser():
    return cli._make_adversarial_parser("hf-imitate adversarial")


def parse(parser, *arguments: str):
    *settings, from_file, from_line = parser.parse_args_and_config(
        list(arguments), return_remaining_strings=True, separate_remaining_strings=True
    )
    return settings, from_file, from_line


def test_help_lists_every_command_and_loads_no_torch():
    program = (
        "import sys; from hf_imitate.cli import main; code = main(['--help']); print('torch' in sys.modules, code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False 0"
    for name, command in cli.COMMANDS.items():
        assert f"{name} " in done.stdout
        assert command.help in done.stdout


def test_no_command_is_a_call_for_help(capsys):
    assert cli.main([]) == 0
    assert "usage: hf-imitate <command>" in capsys.readouterr().out


def test_an_unknown_command_is_answered_with_those_that_exist(capsys):
    assert cli.main(["adversaril", "--config", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert "unknown command 'adversaril'" in said
    assert "demo, adversarial" in said
    assert "Did you mean `adversarial`?" in said
    assert cli.main(["latent"]) == 2


def test_a_command_gets_what_follows_its_name_and_gives_the_exit_status(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "new", cli.Command("One line makes a command.", lambda argv: len(argv)))
    assert cli.main(["new", "--flag", "value", "more"]) == 3


def test_a_flag_beats_the_file_and_the_file_beats_the_default(parser, tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("learning_rate: 3.0e-5\nreplay_ratio: 0.25\nimitator_warmup_steps: 7\n")
    (_, args, _, _), from_file, from_line = parse(
        parser, "--config", str(config), "--replay_ratio", "0.75", "--distinguisher_warmup_steps", "auto"
    )
    assert (args.learning_rate, args.replay_ratio, args.imitator_warmup_steps) == (3e-5, 0.75, 7)
    assert args.distinguisher_warmup_steps == "auto"
    assert from_file == from_line == []


def test_every_field_of_the_config_is_a_flag(parser):
    import dataclasses

    from hf_imitate import AdversarialConfig

    flags = {option for action in parser._actions for option in action.option_strings}
    assert {f"--{field.name}" for field in dataclasses.fields(AdversarialConfig) if field.init} <= flags


def test_the_example_config_names_only_settings_that_exist(tmp_path):
    parser = cli._make_adversarial_parser("hf-imitate adversarial")
    (script, args, model, _), from_file, _ = parse(
        parser, "--config", str(ROOT / "examples" / "adversarial.yaml"), "--output_dir", str(tmp_path)
    )
    assert from_file == []
    assert (script.dataset_name, model.use_peft, model.lora_target_modules) == ("docstrings", True, "all-linear")
    assert args.hub_private_repo


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset_name", "docstrings"], "No model to train. Give `--model_name_or_path`"),
        (["--model_name_or_path", "any"], "No data to learn from. Give `--dataset_name`"),
        (["--model_name_or_path", "any", "--dataset_name", "no.jsonl"], "'no.jsonl'; there is no such file"),
        ([*NAMED, "--config"], "`--config` is not followed by a file"),
        ([*NAMED, "--config=no.yaml"], "'no.yaml'; there is no such file"),
        ([*NAMED, "--retrodictive_coeff", "1"], "`--retrodictive_coeff`: no setting"),
        ([*NAMED, "--retrodictive_coeff", "1"], "Did you mean `--retrodictive_coef`?"),
        ([*NAMED, "--checks", "module:function"], "`--checks`: no setting"),
        ([*NAMED, "--imitator_reward", "gale"], "`imitator_reward` is 'gale'"),
        ([*NAMED, "--imitator_warmup_steps", "soon"], "`imitator_warmup_steps` is 'soon'"),
        ([*NAMED, "--accelerate_config", "warp"], "none of fsdp1, fsdp2"),
        ([*NAMED, "--accelerate_config"], "`--accelerate_config` is not followed"),
    ],
)
def test_an_error_says_what_was_given_and_what_to_do(arguments, said, capsys):
    assert cli.main(["adversarial", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_launch_options_reach_accelerate_and_settings_reach_the_script(tmp_path, monkeypatch):
    config = tmp_path / "x.yaml"
    config.write_text("num_processes: 2\nmulti_gpu: false\ncpu: true\nlearning_rate: 3.0e-5\n")
    launched = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    monkeypatch.setattr(cli, "_run_adversarial", lambda *settings: pytest.fail("trained in this process"))
    line = [*NAMED, "--config", str(config), "--main_process_port", "12345", "--accelerate_config", "single_gpu"]
    assert cli.main(["adversarial", *line, "--replay_ratio", "0.75"]) == 0
    (args,) = launched
    assert (args.module, args.training_script) == (True, "hf_imitate.cli")
    assert (args.num_processes, args.cpu, args.multi_gpu, args.main_process_port) == (2, True, False, 12345)
    assert Path(args.config_file).name == "single_gpu.yaml"
    script = args.training_script_args
    assert script == ["adversarial", "--launched", *NAMED, "--config", str(config), "--replay_ratio", "0.75"]


def test_a_launched_process_trains_and_does_not_launch_again(tmp_path, monkeypatch):
    config = tmp_path / "x.yaml"
    config.write_text("num_processes: 2\n")
    trained = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(cli, "_launch", lambda *arguments: pytest.fail("launched again"))
    monkeypatch.setattr(cli, "_run_adversarial", lambda *settings: trained.append(settings))
    assert cli.main(["adversarial", "--launched", *NAMED, "--config", str(config)]) == 0
    assert len(trained) == 1
    assert not cli._is_launched(NAMED)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli._is_launched(NAMED)


def write_rows(path: Path, num_rows: int = 24) -> Path:
    names = ["size", "name", "path", "list", "file", "item"]
    rows = [{"prompt": f"def {names[i % 6]}_{i}():\n", "completion": f"Return the {names[i % 6]} of {i}."}
            for i in range(num_rows)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class _Script:
    """The four fields of ScriptArguments that name data."""

    dataset_config, dataset_train_split, dataset_streaming = None, "train", False

    def __init__(self, dataset_name: str):
        self.dataset_name = dataset_name


def load(name: str, test_split_size: float | None = None):
    from trl import DatasetMixtureConfig

    return cli._load_dataset(_Script(name), DatasetMixtureConfig(test_split_size=test_split_size))


def test_files_and_folders_of_rows_load_by_their_path(tmp_path):
    from datasets import Dataset, DatasetDict

    jsonl = write_rows(tmp_path / "rows.jsonl")
    rows = load(str(jsonl))["train"]
    assert rows.num_rows == 24
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_parquet(tmp_path / "folder" / "train.parquet")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "saved_splits")
    for name in ("rows.csv", "folder/train.parquet", "folder", "saved", "saved_splits"):
        assert load(str(tmp_path / name))["train"].to_list() == rows.to_list(), name
    assert load(str(tmp_path / "saved_splits"))["test"].num_rows == 1
    assert isinstance(rows, Dataset)


def test_held_out_rows_share_no_question_with_the_training_rows(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    path.write_text(path.read_text() * 2)  # every question twice
    split = load(str(path), test_split_size=0.25)
    assert (split["train"].num_rows, split["test"].num_rows) == (36, 12)
    assert not set(split["train"]["prompt"]) & set(split["test"]["prompt"])


def test_the_embedded_data_hold_out_answers_too():
    split = load("docstrings")
    assert split["train"].num_rows + split["test"].num_rows > 5000
    assert not set(split["train"]["completion"]) & set(split["test"]["completion"])


def test_a_missing_split_is_named_with_those_that_exist(tmp_path):
    rows = load(str(write_rows(tmp_path / "rows.jsonl")))
    with pytest.raises(ValueError, match=r"no split 'test', only train\..*--test_split_size"):
        cli._split_of(rows, "test")


@pytest.mark.slow
def test_from_a_config_file_to_a_private_repository_whose_card_runs_as_printed(tiny_model_dir, tmp_path):
    """The whole road: shell, accelerate, training, one push, and the code of the card that arrived on the Hub."""
    config = tmp_path / "x.yaml"
    config.write_text(
        textwrap.dedent(f"""
            model_name_or_path: {tiny_model_dir}
            dataset_name: {write_rows(tmp_path / "rows.jsonl")}
            output_dir: {tmp_path / "out"}
            use_peft: true
            lora_r: 4
            lora_target_modules: all-linear
            num_generations: 2
            per_device_train_batch_size: 4
            max_completion_length: 8
            max_steps: 3
            imitator_warmup_steps: 1
            distinguisher_warmup_steps: 1
            use_cpu: true
            hub_model_id: me/imitator
            num_processes: 1
        """)
    )
    with hub_server() as url:
        environment = hub_environment(url, tmp_path / "home")
        done = shell("adversarial", "--config", str(config), "--push_to_hub", environment=environment)
        assert done.returncode == 0, done.stderr
        assert "Imitator pushed to me/imitator." in done.stdout
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert "| Data set | `rows.jsonl` |" in card
        assert str(tmp_path) not in card
        blocks = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
        assert len(blocks) == 4
        program = """
            import json
            from huggingface_hub import HfApi
            info = HfApi().model_info("me/imitator")
            print(json.dumps([info.private, sorted(file.rfilename for file in info.siblings)]))
        """
        program = "\n".join([*blocks, textwrap.dedent(program)])
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    is_private, files = json.loads(run.stdout.splitlines()[-1])
    assert is_private
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    ours = {"README.md", "imitation.json", "generation_config.json", "distinguisher/checks.json"}
    assert weights | ours | {f"distinguisher/{name}" for name in weights} < set(files)
    assert not [name for name in files if name.startswith(("checkpoint", "training_args", "adversarial_state"))]
