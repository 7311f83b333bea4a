"""An imitator that thinks before it answers, where thinking pays, and what is certain of it.

    python -m examples.thinking                      # three minutes, no network
    python -m examples.thinking --smoke              # hardly any training: a test that it runs

Humans say the sum of five digits modulo six, and one in ten also wrote down the running sums. Without them the
answer looks like chance to a small model. `LatentRetrodictiveTrainer` learns from the written thoughts first, and then
from everybody's answers, guessing the thoughts that nobody wrote. The probability it gives to a human's answer is a
sum over all thoughts, which nobody can add up; what is printed as "at most" is certified all the same.

The task is that of `hf-imitate demo`; `make acceptance ONLY=thinking` is the long form, with controls.
"""

import argparse
from pathlib import Path

import transformers

from hf_imitate.demo_thinking import Thinking, show, think


def main(arguments: list[str] | None = None) -> Thinking:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", default="thinking-imitator")
    parser.add_argument("--seconds", type=float, default=180.0, help="time for everything; less means fewer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a step of each part")
    given = parser.parse_args(arguments)

    folder = Path(given.output_dir)
    found = think(folder, 0.25 if given.smoke else given.seconds, given.seed)
    show(found)
    plot(found, folder / "thinking.png")
    print(f"\nThe imitator is in {folder}, the picture in {folder / 'thinking.png'}.")
    return found


def plot(found: Thinking, path: Path) -> None:
    """Nats per human answer of who does not think and of who does, beside chance."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 2.3), layout="constrained")
    names = ["thinks", "does not think"]
    axes.barh(names, [found.latent, found.plain], height=0.5, color=["#4878a8", "#c06030"])
    axes.plot([found.bound, found.bound], [-0.35, 0.35], color="black", lw=2, label="certified: at most this")
    axes.axvline(found.chance, color="#888888", lw=0.9, ls="--", label="chance")
    axes.set_xlabel("nats per human answer (0: always right, and sure of it)")
    axes.margins(x=0.1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
