"""What an engine leaves to a second model, and what is said of each; FSDP and DeepSpeed by a stand-in, for Accelerate
runs neither without GPUs."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from latent_worlds import make as make_latent
from latent_worlds import save_world
from tiny_runs import imitator_weights, make, same, train
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_imitate.hub_cards.engines import ENGINES, describe_engine, engine_table
from hf_imitate.trainers import adversarial_trainer, latent_retrodictive_trainer
from hf_imitate.trainers.engines import Engine

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "trainers" / "accelerate_configs").glob("*.yaml"))
NAMES = {"fsdp2": "FSDP", "zero2": "DeepSpeed", "zero3": "ZeRO-3"}


class StandIn:
    """An accelerator that only says what it is."""

    def __init__(self, name: str):
        self.device = torch.device("cuda")
        self.distributed_type = DistributedType.FSDP if name == "fsdp2" else DistributedType.DEEPSPEED
        plugin = SimpleNamespace(zero_stage=int(name[-1]), set_deepspeed_weakref=self._note)
        self.state = SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin=SimpleNamespace(fsdp_version=2))
        self.num_restored = 0

    def _note(self):
        self.num_restored += 1


def under(monkeypatch, name):
    """Let trainers believe in an engine where they build their second model, and nowhere else."""
    for module in (adversarial_trainer, latent_retrodictive_trainer):
        monkeypatch.setattr(module, "Engine", SimpleNamespace(of=lambda _, *rest: Engine.of(StandIn(name), *rest)))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_configuration_becomes_what_its_name_says_in_the_processes(file, monkeypatch):
    config = load_config_from_file(str(file))
    kinds = {"single_gpu": "NO", "multi_gpu": "MULTI_GPU", "cpu": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == DistributedType(kinds.get(file.stem, "DEEPSPEED"))
    assert config.num_processes == {"single_gpu": 1, "cpu": 2}.get(file.stem, -1)
    args = launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "2", "x.py"])
    args, _, _ = _validate_launch_command(args)
    assert [args.use_fsdp, args.use_deepspeed, args.multi_gpu, args.cpu] == [
        *(file.stem == "fsdp2", file.stem.startswith("zero"), file.stem in ("multi_gpu", "cpu"), False)
    ]
    if file.stem.startswith("zero"):
        args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == ("no" if file.stem == "cpu" else "bf16")
    if file.stem == "fsdp2":
        assert FullyShardedDataParallelPlugin().fsdp_version == 2
    if file.stem.startswith("zero"):
        assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert DeepSpeedPlugin().zero_stage == int(file.stem[-1])


def test_there_is_a_configuration_for_every_engine_that_is_not_called_untested():
    tried = {name for name, engine in ENGINES.items() if engine.status != "untested"}
    assert tried - {"single_cpu"} == {file.stem.replace("cpu", "multi_cpu") for file in CONFIGS}
    assert {engine.status for engine in ENGINES.values()} == {"tested", "parsed only", "untested"}


def test_the_guide_holds_the_table_of_the_code():
    assert engine_table() in (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_a_card_says_what_trained_the_model_and_how_far_that_is_tested(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir, use_cpu=True, max_steps=1)
    assert trainer.card_facts().engine == "single_cpu"
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "| Engine | one process on a CPU, tested by hf-imitate's own tests |" in card
    assert describe_engine("megatron_lm") == "megatron_lm, untested"


@pytest.mark.parametrize("name", NAMES)
def test_where_the_engine_forbids_it_the_distinguisher_has_a_base_of_its_own_and_says_why(
    tmp_path, tiny_model_dir, monkeypatch, caplog, name
):
    shared = make(tmp_path / "shared", tiny_model_dir)
    assert shared.distinguisher.model is shared.model
    under(monkeypatch, name)
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path / "apart", tiny_model_dir)
    (said,) = [record.message for record in caplog.records if "frozen copy" in record.message]
    assert f"more memory on each process, since {NAMES[name]}" in said
    assert "With LoRA under DDP it shares the imitator's base." in said
    assert "distinguisher" not in trainer.model.peft_config
    # Its base is the starting one, without the imitator's adapter; only its own adapter and head are trained.
    own = trainer.distinguisher.model.get_base_model().model.state_dict()
    base = {key.replace(".base_layer", ""): value for key, value in own.items() if "lora_" not in key}
    start = type(trainer.model.get_base_model()).from_pretrained(tiny_model_dir).model.state_dict()
    assert same(base, start)
    mine = {id(parameter) for parameter in trainer.model.parameters()}
    assert not mine & {id(parameter) for parameter in trainer.distinguisher.model.parameters()}
    before = imitator_weights(trainer)
    train(trainer)
    assert not same(before, imitator_weights(trainer))
    trainer.save_model()
    assert (tmp_path / "apart" / "run" / "distinguisher" / "adapter_model.safetensors").is_file()


def test_a_model_given_as_an_object_lends_the_distinguisher_its_base_without_the_adapter(
    tmp_path, tiny_model_dir, monkeypatch
):
    under(monkeypatch, "zero3")
    model = make(tmp_path / "first", tiny_model_dir, full=True).model
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    trainer = make(tmp_path, model)
    base = trainer.distinguisher.model.get_base_model()
    assert (base.model.norm.weight == 2.0).all()
    assert not [name for name, _ in base.named_parameters() if "lora_" in name and "default" not in name]
    assert sum("lora_A" in name for name, _ in base.named_parameters()) == 14  # its own alone


def test_an_object_without_weights_on_this_process_is_refused(tiny_model_dir):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model_dir))
    with pytest.raises(ValueError, match=r"holds none of its weights\. Give its repo id"):
        Engine(StandIn("fsdp2")).whole_base(model)


@pytest.mark.parametrize("name", NAMES)
def test_the_retrodictor_has_a_base_of_its_own_there_too(tmp_path, monkeypatch, caplog, name):
    world = save_world(tmp_path / "world")
    assert make_latent(tmp_path, world).retrodictor.adapter_name is not None
    under(monkeypatch, name)
    with caplog.at_level(logging.WARNING):
        trainer = make_latent(tmp_path, world)
    assert trainer.retrodictor.adapter_name is None
    assert f"since {NAMES[name]}" in caplog.text


def test_second_models_are_loaded_whole_whatever_the_engine_does_to_the_imitators_weights(monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    accelerator = StandIn("zero3")
    with Engine(accelerator).loading_whole():
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
        assert not is_deepspeed_zero3_enabled()
        assert accelerator.num_restored == 0
    assert accelerator.num_restored == 1
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_a_frozen_imitator_is_refused_where_a_model_is_prepared_with_its_optimizer(
    tmp_path, tiny_model_dir, monkeypatch
):
    under(monkeypatch, "fsdp2")
    with pytest.raises(ValueError, match=r"`freeze_imitator=True` under fsdp2, .* under DDP"):
        make(tmp_path, tiny_model_dir, freeze_imitator=True)


# --- vLLM, which is not installed


class Engineless:
    """TRL's connection to vLLM, which answers every question by the same ids, each with a log-probability of -2."""

    answer = (40, 41, 42)

    def __init__(self, **settings):
        self.settings, self.num_syncs = settings, 0

    def sync_weights(self):
        self.num_syncs += 1

    def generate(self, prompts, images, num_generations, profiler):
        answers = [list(self.answer) for _ in prompts]
        return prompts, answers, [[[-2.0] for _ in answer] for answer in answers], None


def test_answers_of_vllm_are_weighed_by_what_the_trained_model_says_of_them(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engineless)
    trainer = make(
        tmp_path, tiny_model_dir, use_vllm=True, vllm_mode="colocate", distinguisher_warmup_steps=1, max_steps=2
    )
    told = trainer.vllm_generation.settings
    law = {"temperature": 1.0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0, "max_completion_length": 6}
    assert {name: told[name] for name in law} == law
    assert told["top_k"] in (0, None)
    assert (told["mode"], told["trust_remote_code"], told["structured_outputs_regex"]) == ("colocate", False, None)
    train(trainer)
    assert trainer.vllm_generation.num_syncs == 3  # once for every step
    (name,) = {key for entry in trainer.state.log_history for key in entry if key.endswith("sampling_ratio/max")}
    ratios = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert all(0 < ratio < 1 for ratio in ratios)  # three tokens that the model gives less than vLLM said
