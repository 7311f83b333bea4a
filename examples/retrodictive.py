"""Train an imitator of the people who document Python by the log-probability of what they wrote, and state that of new
answers.

    python examples/retrodictive.py                      # a tiny base, trained here in minutes, without the network
    python examples/retrodictive.py Qwen/Qwen3-0.6B      # any causal language model of the Hub, on a GPU

The same from the shell: `hf-imitate retrodictive --config examples/retrodictive.yaml`.
"""

import argparse
import math

from peft import LoraConfig

from hf_imitate import Imitator, RetrodictiveConfig, RetrodictiveTrainer, load_docstrings, split_by_question
from hf_imitate.tiny_base import tiny_base


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("model", nargs="?", help="Hub id or directory; by default a tiny base trained here")
    parser.add_argument("--output_dir", default="docstring-imitator")
    parser.add_argument("--max_steps", type=int, default=200)
    arguments = parser.parse_args()

    # Many functions share a first line: grouped by answer, no held-out answer was seen in training.
    dataset = split_by_question(load_docstrings(), test_size=0.1, group_by="completion")

    trainer = RetrodictiveTrainer(
        model=arguments.model or str(tiny_base()),
        args=RetrodictiveConfig(
            output_dir=arguments.output_dir,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=16,
            max_length=256,
            # A base of a million parameters takes ten times the rate that suits a large one.
            learning_rate=2e-4 if arguments.model else 2e-3,
        ),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    before = trainer.evaluate()["eval_retrodiction/bits_per_answer"]
    trainer.train()
    after = trainer.evaluate()["eval_retrodiction/bits_per_answer"]
    print(f"Bits per held-out answer: {before:.1f} before, {after:.1f} after {arguments.max_steps} steps.")
    trainer.save_model()
    # trainer.push_to_hub() would publish the folder: privately, unless the config says otherwise.

    imitator = Imitator.from_pretrained(arguments.output_dir)
    questions, humans = dataset["test"]["prompt"][:5], dataset["test"]["completion"][:5]
    own = [answers[0] for answers in imitator.answer(questions, seed=0)]
    for question, human, imitated in zip(questions, humans, own, strict=True):
        nats = imitator.log_prob([question, question], [human, imitated]).nats
        of_human, of_imitator = (f"{-value / math.log(2):.1f} bits" for value in nats.tolist())
        print(f"\n{question.strip()}\n  human:    {human} ({of_human})\n  imitator: {imitated} ({of_imitator})")


if __name__ == "__main__":
    main()
