"""Our code on weights that torch's `fully_shard` lays in shards over two processes; Accelerate does so with GPUs
alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from tiny_runs import load, make
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl.trainer.utils import add_fused_lm_head

from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer
from hf_imitate.trainers.finite import blame

RATE = 0.1


def each_process(folder: Path, model: Path) -> None:
    """One step of likelihood on shards and one on whole weights, a distinguisher beside them, and a save."""
    trainer = make(folder, model, full=True, per_device_train_batch_size=4, use_cpu=True)
    rank = trainer.accelerator.process_index
    shards, whole = load(model), load(model)
    for one in (shards, whole):
        add_fused_lm_head(one, outputs=("log_probs",))  # GRPO does so with its own
    mesh = init_device_mesh("cpu", (2,))
    for layer in shards.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(shards, mesh=mesh)
    likelihood, learner = trainer.likelihood, trainer.game.learner
    likelihood.head = None  # as on GPUs, where TRL's fused head is asked
    mine, all_rows = likelihood.draw(0), likelihood.rows.draw(0, 8)
    loss = likelihood.loss(shards, mine)
    loss.backward()
    likelihood.loss(whole, likelihood.rows.batch(all_rows)).backward()
    found: dict[str, Any] = {"gradients": 0.0, "sharded": all(isinstance(p, DTensor) for p in shards.parameters())}
    by_name = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in shards.named_parameters():
            gap = (parameter.grad.full_tensor() - by_name[name].grad).abs().max().item()
            found["gradients"] = max(found["gradients"], gap)
            parameter -= RATE * parameter.grad
            by_name[name] -= RATE * by_name[name].grad
    found["nats"] = likelihood.mean_nats(shards, all_rows) - likelihood.mean_nats(whole, all_rows)
    # Of one row, one process has none; a batch of evaluation may hold no question of its own either.
    one_row = all_rows[:1]
    found["nats of one"] = likelihood.mean_nats(shards, one_row) - likelihood.mean_nats(whole, one_row)
    found["loss of none"] = likelihood.loss(shards, likelihood.rows.batch(one_row) if rank == 0 else []).item()
    text = ("de", "fg")[rank]
    learner.step([Pair("Item 1:", Answer("abc", True), (Answer(text, True),))])
    weights = torch.cat([parameter.detach().flatten() for parameter in learner.parameters])
    found["distinguisher"] = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    found["replicated"] = not any(isinstance(p, DTensor) for p in trainer.distinguisher.model.parameters())
    state = get_model_state_dict(shards, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        whole.save_pretrained(folder / "saved", state_dict=state)
        trainer.distinguisher.save_beside(folder / "saved" / "distinguisher", trainer._tokenizer)
        trainer._tokenizer.save_pretrained(folder / "saved")
    found["saved"] = 0.0
    torch.distributed.barrier()
    for name, parameter in load(folder / "saved").named_parameters():
        found["saved"] = max(found["saved"], (parameter - by_name[name]).abs().max().item())
    with torch.no_grad():
        shards.model.norm.weight.mul_(torch.nan)
    found["blame"] = blame(shards)
    (folder / f"sharded{rank}.json").write_text(json.dumps(found), encoding="utf-8")
