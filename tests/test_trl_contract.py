"""What we lean on in TRL 1.16 and transformers, so that an upgrade that moves it fails here first."""

import inspect
import os

import pytest
import torch
from tiny_runs import make, rows, run
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from hf_imitate.trainers.adversarial_plan import AdversarialPlan
from hf_imitate.trainers.adversarial_saving import AdversarialSaving
from hf_imitate.trainers.adversarial_trainer import AdversarialTrainer
from hf_imitate.trainers.atomic_saving import AtomicSaving
from hf_imitate.trainers.finite import FiniteSteps
from hf_imitate.trainers.imitator_saving import ImitatorSaving

# Every method of TRL's or transformers' that we override, and who defined it.
OVERRIDES = {
    "_prepare_inputs": GRPOTrainer,
    "_generate_and_score_completions": GRPOTrainer,
    "_calculate_rewards": GRPOTrainer,
    "_tokenize_prompts": GRPOTrainer,
    "_generate": GRPOTrainer,
    "_get_per_token_logps_and_entropies": GRPOTrainer,
    "_get_train_sampler": GRPOTrainer,
    "compute_loss": GRPOTrainer,
    "log": GRPOTrainer,
    "create_model_card": GRPOTrainer,
    "_load_optimizer_and_scheduler": GRPOTrainer,
    "_save_optimizer_and_scheduler": Trainer,
    "_load_rng_state": Trainer,
    "_load_from_checkpoint": Trainer,
    "_load_best_model": Trainer,
    "_save_checkpoint": GRPOTrainer,
    "_get_output_dir": Trainer,
    "_push_from_checkpoint": Trainer,
    "train": Trainer,
    "_get_grad_norm": Trainer,
    "evaluate": Trainer,
    "save_model": Trainer,
    "push_to_hub": Trainer,
    "init_hf_repo": Trainer,
    "set_initial_training_values": Trainer,
    "create_optimizer": Trainer,
    "create_scheduler": Trainer,
    "get_batch_samples": Trainer,
}
# Whatever else these are given is passed on.
PASSED_ON = ("_get_per_token_logps_and_entropies",)
ATTRIBUTES = (
    *("_step", "_buffered_inputs", "_tokenizer", "eos_token_ids", "reward_weights", "reward_func_names"),
    *("num_generations", "num_generations_eval", "max_completion_length", "chat_template_kwargs", "use_vllm"),
    *("_created_lr_scheduler", "callback_handler", "hub_model_id", "generation_config", "generation_kwargs"),
)


def own_methods():
    found = {}
    for kind in (FiniteSteps, AtomicSaving, ImitatorSaving, AdversarialSaving, AdversarialPlan, AdversarialTrainer):
        found |= {name: value for name, value in vars(kind).items() if inspect.isfunction(value)}
    return found


def shape(function):
    """Names, kinds and defaults of the parameters."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_the_list_of_overrides_is_complete():
    found = {name for name in own_methods() if hasattr(GRPOTrainer, name) and name != "__init__"}
    assert found == set(OVERRIDES)


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_has_the_signature_of_what_it_overrides(name):
    ours, theirs = shape(own_methods()[name]), shape(getattr(OVERRIDES[name], name))
    if name in PASSED_ON:
        ours, theirs = ours[:2], theirs[:2]
    assert ours == theirs


def test_the_constructors_arguments_are_trls_and_ours():
    theirs = set(inspect.signature(GRPOTrainer).parameters)
    ours = set(inspect.signature(AdversarialTrainer).parameters)
    assert ours - theirs == {"checks", "distinguisher", "distinguisher_peft_config"}
    assert list(inspect.signature(AdversarialTrainer).parameters)[:2] == ["model", "args"]


def test_what_we_read_of_a_trainer_is_there(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, tiny_model_dir)
    assert [name for name in ATTRIBUTES if not hasattr(trainer, name)] == []
    assert trainer.loss_is_scaled_for_ga is True
    assert trainer.reward_func_names == ["distinguisher"]


def test_what_we_read_of_the_settings_is_there():
    names = (
        "generation_batch_size",
        "steps_per_generation",
        "num_iterations",
        "reward_weights",
        "chat_template_kwargs",
    )
    assert [name for name in names if name not in GRPOConfig.__dataclass_fields__] == []


def test_a_pass_over_the_rows_takes_one_draw_of_the_samplers_generator():
    """A resumed run draws as often as passes are behind it."""
    sampler, other = (RepeatSampler(range(12), 2, batch_size=3, repeat_count=2, seed=3) for _ in range(2))
    list(sampler)
    next(iter(other))
    assert list(sampler) == list(other)


def test_a_reward_row_of_nans_leaves_its_group_and_has_no_advantage(tmp_path, tiny_model_dir):
    """How "drop" takes an answer out."""

    def some(completions, **kwargs):
        return [None if i % 4 == 0 else float(i % 4) for i in range(len(completions))]

    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        scale_rewards="none",
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
    )
    trainer = GRPOTrainer(str(tiny_model_dir), reward_funcs=some, args=config, train_dataset=rows())
    trainer.model.train()
    output = trainer._generate_and_score_completions([rows()[0]] * 4)
    torch.testing.assert_close(output["advantages"], torch.tensor([0.0, -1.0, 0.0, 1.0]))


def test_the_trainers_state_is_the_last_file_of_a_checkpoint_but_for_our_marker(tmp_path, tiny_model_dir):
    """So one without a marker that has it was written to its end by that process."""
    run(tmp_path, tiny_model_dir, save_strategy="steps", save_steps=2)
    folder = tmp_path / "run" / "checkpoint-2"
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: os.stat(path).st_mtime_ns)
    assert [path.name for path in files[-2:]] == ["trainer_state.json", "_complete.json"]


def test_trl_tells_nobody_the_name_of_our_trainer():
    """Its usage report names trainers on its own list, and others as "other"."""
    from trl.trainer.base_trainer import _TELEMETRY_TRAINERS

    assert AdversarialTrainer.__name__ not in _TELEMETRY_TRAINERS
