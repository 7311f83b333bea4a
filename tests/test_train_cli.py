"""Training from the shell: settings, errors, launching, and one run from a config file to a saved imitator."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hub_server import hub_environment, hub_server

from hf_imitate import cli, train_cli

ROOT = Path(__file__).parent.parent
NAMED = ["--model_name_or_path", "any", "--dataset_name", "docstrings"]


def shell(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hf_imitate.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def parser():
    return train_cli.make_parser("adversarial")


def parse(parser, *arguments: str):
    *settings, from_file, from_line = parser.parse_args_and_config(
        list(arguments), return_remaining_strings=True, separate_remaining_strings=True
    )
    return settings, from_file, from_line


def write_rows(path: Path, num_rows: int = 24) -> Path:
    names = ["size", "name", "path", "list", "file", "item"]
    rows = [{"prompt": f"def {names[i % 6]}_{i}():\n", "completion": f"Return the {names[i % 6]} of {i}."}
            for i in range(num_rows)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_flag_beats_the_file_and_the_file_beats_the_default(parser, tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("learning_rate: 3.0e-5\nreplay_ratio: 0.25\nimitator_warmup_steps: 7\n")
    (_, args, _, _), from_file, from_line = parse(
        parser, "--config", str(config), "--replay_ratio", "0.75", "--distinguisher_warmup_steps", "auto"
    )
    assert (args.learning_rate, args.replay_ratio, args.imitator_warmup_steps) == (3e-5, 0.75, 7)
    assert args.distinguisher_warmup_steps == "auto"
    assert from_file == from_line == []


@pytest.mark.parametrize(
    ("words", "in_file", "expected"),
    [
        ([], "", None),
        (["--distinguisher", "ngram"], "", "ngram"),
        (["--distinguisher", "ngram", "a/model"], "", ["ngram", "a/model"]),
        ([], "distinguisher: a/model", "a/model"),
        ([], "distinguisher: [ngram, a/model]", ["ngram", "a/model"]),
    ],
)
def test_one_or_several_distinguishers_are_named_on_the_line_or_in_a_file(parser, tmp_path, words, in_file, expected):
    config = tmp_path / "x.yaml"
    config.write_text(f"seed: 1\n{in_file}\n")
    (script, *_), from_file, from_line = parse(parser, "--config", str(config), *words)
    assert train_cli._distinguisher(script.distinguisher) == expected
    assert from_file == from_line == []


@pytest.mark.parametrize("name", train_cli.TRAINERS)
def test_resuming_is_asked_for_by_a_word_or_a_path_and_forced_by_a_short_flag(name):
    parser = train_cli.make_parser(name)
    (_, args, _, _), _, from_line = parse(parser, "--resume_from_checkpoint", "true", "--force", "--output_dir", "x")
    assert (train_cli._checkpoint(args.resume_from_checkpoint), args.force_resume, from_line) == (True, True, [])
    (_, args, _, _), *_ = parse(parser, "--resume_from_checkpoint", "x/checkpoint-3", "--output_dir", "x")
    assert (train_cli._checkpoint(args.resume_from_checkpoint), args.force_resume) == ("x/checkpoint-3", False)
    assert [train_cli._checkpoint(given) for given in (None, "False", True)] == [None, None, True]


def test_ctrl_c_on_the_command_line_is_status_130(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_cli, "_run", interrupted)
    monkeypatch.setattr(train_cli, "_needs_several_processes", lambda: False)
    assert cli.main(["retrodictive", *NAMED, "--output_dir", "x"]) == 130


@pytest.mark.parametrize("name", train_cli.TRAINERS)
def test_every_field_of_the_config_is_a_flag(name):
    import dataclasses

    flags = {option for action in train_cli.make_parser(name)._actions for option in action.option_strings}
    config = train_cli.TRAINERS[name].load("Config")
    assert {f"--{field.name}" for field in dataclasses.fields(config) if field.init} <= flags


def test_latent_takes_a_number_or_auto(tmp_path):
    line = ["--output_dir", str(tmp_path), "--retrodictor_warmup_steps", "7", "--num_thoughts", "3"]
    (_, args, _, _), _, from_line = parse(train_cli.make_parser("latent"), *line)
    assert (args.retrodictor_warmup_steps, args.num_thoughts) == (7, 3)
    assert from_line == []


def test_retrodictive_takes_its_own_settings_from_file_and_flag(tmp_path):
    config = tmp_path / "x.yaml"
    config.write_text("loss_reduction: token\nmax_length: 64\n")
    parser = train_cli.make_parser("retrodictive")
    line = ["--config", str(config), "--max_length", "32", "--chat_template_kwargs", '{"enable_thinking": false}']
    (_, args, _, _), from_file, from_line = parse(parser, *line)
    assert (args.loss_reduction, args.max_length) == ("token", 32)
    assert args.chat_template_kwargs == {"enable_thinking": False}
    assert from_file == from_line == []


def test_the_retrodictive_example_config_names_only_settings_that_exist(tmp_path):
    parser = train_cli.make_parser("retrodictive")
    (script, args, model, _), from_file, _ = parse(
        parser, "--config", str(ROOT / "examples" / "retrodictive.yaml"), "--output_dir", str(tmp_path)
    )
    assert from_file == []
    assert (script.dataset_name, model.use_peft, args.loss_reduction) == ("docstrings", True, "answer")
    assert args.metric_for_best_model == "eval_retrodiction/bits_per_answer"


def test_a_retrodictive_command_says_what_is_wrong(capsys):
    assert cli.main(["retrodictive", *NAMED, "--loss_reduction", "mean"]) == 2
    assert "hf-imitate retrodictive: error: `loss_reduction` is 'mean'" in capsys.readouterr().err
    assert cli.main(["retrodictive", *NAMED, "--distinguisher", "x"]) == 2
    assert "`--distinguisher`: no setting" in capsys.readouterr().err


def test_retrodictive_trains_from_a_file_of_rows_to_a_saved_imitator(tiny_model_dir, tmp_path, monkeypatch, capsys):
    from hf_imitate import Imitator

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(train_cli, "_needs_several_processes", lambda: False)
    line = ["--dataset_name", str(write_rows(tmp_path / "rows.jsonl")), "--output_dir", str(tmp_path / "out")]
    line += ["--model_name_or_path", str(tiny_model_dir), "--max_steps", "1", "--use_cpu", "true"]
    more = ["--test_split_size", "0.25", "--eval_strategy", "steps", "--eval_steps", "1", "--report_to", "none"]
    assert cli.main(["retrodictive", *line, *more]) == 0
    assert f"Imitator saved to {tmp_path / 'out'}." in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| Data set | `rows.jsonl` |" in card
    assert "| `eval_retrodiction/bits_per_answer` |" in card
    assert Imitator.from_pretrained(tmp_path / "out").log_prob(["def a():"], ["Return."]).is_exact.all()


def test_the_example_config_names_only_settings_that_exist(tmp_path):
    parser = train_cli.make_parser("adversarial")
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
        ([*NAMED, "--model_name_or_path", "./gone"], "'./gone': no directory that is there, and no Hub id"),
        ([*NAMED, "--config"], "`--config` is not followed by a file"),
        ([*NAMED, "--config=no.yaml"], "'no.yaml'; there is no such file"),
        ([*NAMED, "--retrodictive_coeff", "1"], "`--retrodictive_coeff`: no setting"),
        ([*NAMED, "--retrodictive_coeff", "1"], "Did you mean `--retrodictive_coef`?"),
        ([*NAMED, "--checks", "module:function"], "`--checks`: no setting"),
        ([*NAMED, "--imitator_reward", "gale"], "`imitator_reward` is 'gale'"),
        ([*NAMED, "--imitator_warmup_steps", "soon"], "`imitator_warmup_steps` is 'soon'"),
        ([*NAMED, "--accelerate_config", "warp"], "none of cpu, fsdp1, fsdp2"),
        ([*NAMED, "--accelerate_config"], "`--accelerate_config` is not followed"),
    ],
)
def test_an_error_says_what_was_given_and_what_to_do(arguments, said, capsys):
    assert cli.main(["adversarial", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", train_cli.TRAINERS)
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "secret?", "reply": "secret"}, "no column `prompt`"),
        ({"prompt": 1, "completion": "secret"}, "column `prompt`"),
        ({"prompt": "secret?", "completion": "secret", "weight": "heavy"}, "column `weight`"),
    ],
)
def test_bad_rows_are_named_without_a_traceback(name, row, said, tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(train_cli, "_needs_several_processes", lambda: False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
    line = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(rows), "--output_dir", str(tmp_path)]
    assert cli.main([name, *line, "--use_cpu", "true", "--report_to", "none"]) == 2
    printed = capsys.readouterr().err
    assert f"hf-imitate {name}: error: `train_dataset` " in printed
    assert said in printed
    assert "secret" not in printed


@pytest.mark.parametrize("name", train_cli.TRAINERS)
def test_where_nothing_can_be_taken_up_it_is_said_without_a_traceback(
    name, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(train_cli, "_needs_several_processes", lambda: False)
    rows, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    line = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(rows), "--output_dir", str(out)]
    if name == "adversarial":
        line += ["--max_completion_length", "16"]
    line += ["--use_cpu", "true", "--report_to", "none", "--resume_from_checkpoint", "true"]
    assert cli.main([name, *line]) == 2
    assert f"error: {out} holds no complete checkpoint to resume from." in capsys.readouterr().err


def test_an_error_in_a_step_shows_where_it_happened(tiny_model_dir, tmp_path, monkeypatch):
    def broken(self, *given, **named):
        raise ValueError("in a step")

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(train_cli, "_needs_several_processes", lambda: False)
    monkeypatch.setattr(train_cli.TRAINERS["retrodictive"].load("Trainer"), "training_step", broken)
    line = ["--dataset_name", str(write_rows(tmp_path / "rows.jsonl")), "--output_dir", str(tmp_path / "out")]
    line += ["--model_name_or_path", str(tiny_model_dir), "--use_cpu", "true", "--report_to", "none"]
    with pytest.raises(ValueError, match="in a step"):
        cli.main(["retrodictive", *line])


def test_the_status_of_several_processes_is_that_of_the_first_that_failed(monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def launch(arguments):
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file="<none>")
        raise ChildFailedError("hf_imitate.cli", {0: failure})

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch)
    assert train_cli._launch("retrodictive", ["--num_processes", "2"], NAMED) == 2


def test_launch_options_reach_accelerate_and_settings_reach_the_script(tmp_path, monkeypatch):
    config = tmp_path / "x.yaml"
    config.write_text("num_processes: 2\nmulti_gpu: false\ncpu: true\nlearning_rate: 3.0e-5\n")
    launched = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    monkeypatch.setattr(train_cli, "_run", lambda *settings: pytest.fail("trained in this process"))
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
    monkeypatch.setattr(train_cli, "_launch", lambda *arguments: pytest.fail("launched again"))
    monkeypatch.setattr(train_cli, "_run", lambda *settings: trained.append(settings) or 0)
    assert cli.main(["adversarial", "--launched", *NAMED, "--config", str(config)]) == 0
    assert len(trained) == 1
    assert not train_cli._is_launched(NAMED)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert train_cli._is_launched(NAMED)


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
