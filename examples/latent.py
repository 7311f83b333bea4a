"""Train an imitator that thinks before it documents a Python function, and bound log p of what people wrote.

    python examples/latent.py                      # a tiny base, trained here in minutes, without the network
    python examples/latent.py Qwen/Qwen3-0.6B      # any causal language model of the Hub, on a GPU
    python examples/latent.py --smoke              # a few steps, to see that it runs; its numbers mean nothing

The same from the shell: `hf-imitate latent --config examples/latent.yaml`.
"""

import argparse
import math

from peft import LoraConfig

from hf_imitate import (
    Imitator,
    LatentRetrodictiveConfig,
    LatentRetrodictiveTrainer,
    load_docstrings,
    split_by_question,
)
from hf_imitate.tiny_base import tiny_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="Hub id or directory; by default a tiny base trained here")
    parser.add_argument("--output_dir", default="thinking-docstring-imitator")
    parser.add_argument(
        "--max_steps", type=int, default=100, help="steps of the imitator; a warm-up comes before them"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args()

    # Many functions share a first line: grouped by answer, no held-out answer was seen in training.
    dataset = split_by_question(load_docstrings(), test_size=0.1, group_by="completion")
    # Where people wrote down what they thought, a column `thought` would hold it; here nobody did.

    trainer = LatentRetrodictiveTrainer(
        model=arguments.model or str(tiny_base()),
        args=LatentRetrodictiveConfig(
            output_dir=arguments.output_dir,
            max_steps=2 if arguments.smoke else arguments.max_steps,
            retrodictor_warmup_steps=2 if arguments.smoke else "auto",
            num_thoughts=4,
            num_thoughts_eval=16,
            max_thought_length=64 if arguments.model else 8,
            max_length=160,
            per_device_train_batch_size=8,
        ),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"].select(range(8 if arguments.smoke else 64)),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    before = trainer.evaluate()["eval_retrodiction/bits_per_answer"]
    trainer.train()
    after = trainer.evaluate()["eval_retrodiction/bits_per_answer"]
    print(f"At most about {before:.1f} bits per held-out answer before, {after:.1f} after.")
    trainer.save_model()
    # trainer.push_to_hub() would publish the folder: privately, unless the config says otherwise.

    imitator = Imitator.from_pretrained(arguments.output_dir)
    questions, humans = dataset["test"]["prompt"][:3], dataset["test"]["completion"][:3]
    found = imitator.log_prob(questions, humans, confidence=0.95, num_estimates=64)
    own = imitator.latent.answer(questions, seed=0)
    for number, (question, human) in enumerate(zip(questions, humans, strict=True)):
        estimate, most = (-nats[number].item() / math.log(2) for nats in (found.nats, found.lower_bound))
        drawn = own[number][0]
        print(
            f"\n{question.strip()}\n  human:    {human} (about {estimate:.1f} bits; at 95 %, at most {most:.1f})\n"
            f"  thought:  {drawn.thought!r}\n  imitator: {drawn.answer.text}"
        )


if __name__ == "__main__":
    main()
