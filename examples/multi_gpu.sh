#!/usr/bin/env bash
# One machine, several GPUs: likelihood with the model's weights spread over all of them, then the game from where that
# ended, each GPU with a copy of the model and questions of its own.
#
#     bash examples/multi_gpu.sh Qwen/Qwen3-8B 4          # model, number of GPUs (default: all that nvidia-smi lists)
#
# Options of `accelerate launch` pass through: `--num_machines`, `--mixed_precision`, or a file of one's own by
# `--config_file`; docs/distributed.md says how far each engine was tried. With the same answers, several processes take
# the steps of one; which answers are drawn depends on their number. Where one process fails, all stop, and a killed run
# goes on from its newest whole checkpoint with `--resume_from_checkpoint true`.
set -euo pipefail
cd "$(dirname "$0")/.."

model=${1:-Qwen/Qwen3-0.6B}
processes=${2:-$(nvidia-smi --list-gpus | wc -l)}

hf-imitate retrodictive \
    --config examples/retrodictive.yaml \
    --model_name_or_path "$model" \
    --use_peft false \
    --learning_rate 2e-5 \
    --output_dir docstring-likelihood \
    --num_processes "$processes" \
    --accelerate_config fsdp2

hf-imitate adversarial \
    --config examples/adversarial.yaml \
    --model_name_or_path docstring-likelihood \
    --imitator_warmup_steps 0 \
    --output_dir docstring-imitator \
    --num_processes "$processes" \
    --accelerate_config multi_gpu
