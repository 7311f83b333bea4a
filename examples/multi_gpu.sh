#!/usr/bin/env bash
# One machine, several GPUs: likelihood with the model's weights spread over all of them, then the game from where that
# ended, each GPU with a copy of the model and questions of its own.
#
#     bash examples/multi_gpu.sh Qwen/Qwen3-8B                        # one process to a GPU
#     bash examples/multi_gpu.sh Qwen/Qwen3-8B --num_processes 4      # any option of `accelerate launch`
#
# Other configurations, and how far each was tried: docs/distributed.md. A killed run goes on from its newest whole
# checkpoint: docs/resume.md.
set -euo pipefail
cd "$(dirname "$0")/.."

model=${1:-Qwen/Qwen3-0.6B}
options=("${@:2}")

hf-imitate retrodictive \
    --config examples/retrodictive.yaml \
    --model_name_or_path "$model" \
    --use_peft false \
    --learning_rate 2e-5 \
    --output_dir docstring-likelihood \
    --accelerate_config fsdp2 "${options[@]}"

hf-imitate adversarial \
    --config examples/adversarial.yaml \
    --model_name_or_path docstring-likelihood \
    --imitator_warmup_steps 0 \
    --output_dir docstring-imitator \
    --accelerate_config multi_gpu "${options[@]}"
