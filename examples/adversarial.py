"""Train an imitator of the people who document Python: signature in, first line of the docstring out.

    python examples/adversarial.py                      # a tiny base, trained here in minutes, without the network
    python examples/adversarial.py Qwen/Qwen3-0.6B      # any causal language model of the Hub, on a GPU

The same from the shell, without the check: `hf-imitate adversarial --config examples/adversarial.yaml`.
"""

import argparse

from peft import LoraConfig

from hf_imitate import AdversarialConfig, AdversarialTrainer, Imitator, load_docstrings, split_by_question
from hf_imitate.tiny_base import tiny_base


def ends_with_a_period(prompts, completions, **columns):
    """Pass an answer that ends like a sentence.

    A check is what a distinguisher can *verify*. It need not be right: people, too, pass it only sometimes, and the
    distinguisher learns how much a passed check tells about who wrote the answer.
    """
    return [completion.rstrip().endswith(".") for completion in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="Hub id or directory; by default a tiny base trained here")
    parser.add_argument("--output_dir", default="docstring-imitator")
    parser.add_argument("--max_steps", type=int, default=100, help="steps of the game; warm-ups come before them")
    arguments = parser.parse_args()

    # Many functions share a first line: grouped by answer, no held-out answer was seen in training.
    dataset = split_by_question(load_docstrings(), test_size=0.1, group_by="completion")

    trainer = AdversarialTrainer(
        model=arguments.model or str(tiny_base()),
        args=AdversarialConfig(
            output_dir=arguments.output_dir,
            max_steps=arguments.max_steps,
            num_generations=8,
            per_device_train_batch_size=16,
            max_completion_length=48,
        ),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"].select(range(64)),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        checks=[ends_with_a_period],
    )
    trainer.train()
    trainer.save_model()
    # trainer.push_to_hub() would publish the folder: privately, unless the config says otherwise.

    questions = dataset["test"]["prompt"][:5]
    answers = Imitator.from_pretrained(arguments.output_dir).answer(questions, num_answers=2, seed=0)
    for question, human, imitated in zip(questions, dataset["test"]["completion"][:5], answers, strict=True):
        print(f"\n{question.strip()}\n  human:    {human}\n  imitator: {imitated[0]}\n            {imitated[1]}")


if __name__ == "__main__":
    main()
