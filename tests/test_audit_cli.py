"""`hf-imitate audit`: from a model folder and a file to a report."""

import json
import shutil

import pytest
from audit_worlds import word_answers
from distinguishers import make
from transformers import AutoTokenizer

from hf_imitate.audit_cli import AuditArguments, main, make_parser
from hf_imitate.audits.audit_plan import dataset_hash
from hf_imitate.cli_data import load_named


@pytest.fixture
def data(tmp_path):
    import numpy as np

    rows = word_answers(np.random.default_rng(0), 40, length=3)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"q{n}", "completion": a.text}) for n, a in enumerate(rows)))
    return path


def test_a_folder_and_a_file_become_a_report(tiny_model_dir, data, tmp_path, capsys):
    config = tmp_path / "audit.yaml"
    config.write_text(f"dataset_name: {data}\nmax_new_tokens: 4\nseed: 3\njudges: [surface]\n")
    arguments = ["--model_name_or_path", str(tiny_model_dir), "--config", str(config), "--seed", "5"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out"), "--temperature", "0.9"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# Audit of")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["seed"] == 5
    assert plan["judges"] == {"surface": "surface"}
    assert plan["decoding"] == {"law": "temperature 0.9", "temperature": 0.9, "max_new_tokens": 4}


def test_the_questions_that_training_held_out_of_a_file_are_audited(tiny_model_dir, data, tmp_path):
    """Whoever trains from the shell has one file; audited whole, it would flatter by the rows that were trained on."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("\n".join(json.dumps(row | {"prompt": f"{row['prompt']} {i}"}) for i in range(3) for row in rows))
    arguments = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(data), "--judges", "surface"]
    arguments += ["--max_new_tokens", "3", "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--test_split_size", "0.25"]) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    held_out = load_named(str(data), test_size=0.25)  # as `hf-imitate retrodictive --test_split_size 0.25` does
    assert held_out["test"].num_rows == 30
    assert plan["dataset"].startswith("a json file, 30 rows")
    assert plan["dataset_hash"] == dataset_hash(held_out["test"])
    assert plan["train_dataset_hash"] == dataset_hash(held_out["train"])


def test_what_is_missing_is_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--dataset_name", "docstrings"])
    assert caught.value.code == 2
    assert "--model_name_or_path" in capsys.readouterr().err


def test_bad_rows_end_with_one_line(tiny_model_dir, data, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(data), "--by", "age"])
    assert caught.value.code == 2
    assert "'age'" in capsys.readouterr().err


def test_every_setting_of_audit_is_a_flag():
    parsed = make_parser().parse_args_and_config(["--judges", "ngram", "lora:me/body", "--top_k", "5"])[0]
    assert parsed.judges == ["ngram", "lora:me/body"]
    assert parsed.top_k == 5
    assert isinstance(parsed, AuditArguments)


def test_answers_that_the_distinguisher_keeps_are_audited(tiny_model_dir, data, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "imitator")
    distinguisher = make("full", tiny_model_dir, AutoTokenizer.from_pretrained(tiny_model_dir))
    distinguisher.save_pretrained(folder / "distinguisher")
    arguments = ["--model_name_or_path", str(folder), "--dataset_name", str(data), "--judges", "surface"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_new_tokens", "3"]
    assert main([*arguments, "--resample", "2", "--num_estimates", "3"]) == 0
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert report["ledger"]["resampling"]["resample"] == report["decoding"]["resample"] == 2
    assert report["decoding"]["num_estimates"] == 3


def test_nothing_can_be_kept_without_a_distinguisher(tiny_model_dir, data, tmp_path, capsys):
    arguments = ["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(data)]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--resample", "4", "--output_dir", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "has no distinguisher" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--power", "--resample", "4"])
    assert caught.value.code == 2
    assert "it has no use for --resample" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_ends_with_one_line(tiny_model_dir, data, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    taken = ["--output_dir", str(tmp_path / "taken")]
    with pytest.raises(SystemExit) as ended:
        main(["--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(data), *taken])
    assert ended.value.code == 2
    assert "File exists" in capsys.readouterr().err
