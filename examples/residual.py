"""Answer with one of K, kept by a distinguisher that can check: better answers from weights that stand still.

    python -m examples.residual                      # some ten minutes on one core, no network
    python -m examples.residual --smoke              # hardly any training: a test that it runs

The imitator fills 4x4 Sudokus as people did, and often fails. A distinguisher learns to tell its answers from people's
and is given a check, as one is given a verifier; the imitator is not touched. Drawing K answers and keeping one with
probability softmax of the distinguisher's logits is a law that can be stated, so bits per human answer are estimated
without bias, and the rate of solved puzzles is the mean probability of the one right answer.

It is the first half of `make acceptance ONLY=residual_sudoku`, on one seed.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import transformers

from benchmarks import residual_sudoku as table
from benchmarks.worlds import sudoku_arms
from benchmarks.worlds.sudoku import data


def main(arguments: list[str] | None = None) -> dict[int, dict[str, float]]:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--figure", default="residual.png", help="where the picture goes")
    parser.add_argument("--smoke", action="store_true", help="hardly any training, few puzzles")
    given = parser.parse_args(arguments)
    num_scored = 150
    if given.smoke:
        num_scored, sudoku_arms.START_STEPS, sudoku_arms.READ_EVERY = 6, 20, 20
        table.DISTINGUISHER_STEPS, table.DISTINGUISHER_BATCH = 2, 8

    print("Likelihood, then a distinguisher beside an imitator that stands still. This takes longest.")
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(None):
        table.STARTS = Path(scratch)
        imitator = table.residual(given.seed)
    print(f"A passed check counts {imitator.distinguisher.check_weights.item():.2f} nats for human.\n")
    print(f"{'K':>3}  {'solved':>7}  {'of sampled':>10}  {'bits per human answer':>22}  {'CPU ms per answer':>18}")
    found = {}
    for k in (1, 2, 4, 8):
        law = found[k] = table.measured(
            imitator, data().test[:num_scored], k, 2 if given.smoke else table.ESTIMATES[k], given.seed
        )
        bits = f"{law['bits']:.2f} ± {law['standard_error_of_bits']:.2f}"
        print(
            f"{k:3}  {law['solved']:7.3f}  {law['solved_of_sampled']:10.3f}  {bits:>22}  "
            f"{1000 * law['cpu_seconds']:18.1f}"
        )
    plot(found, given.figure)
    print(f"\nThe picture is in {given.figure}.")
    return found


def plot(found: dict[int, dict[str, float]], path: str) -> None:
    """Solved puzzles and bits of the human's answer against K."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    for axis, name, label in zip(
        panels, ("solved", "bits"), ("share of puzzles solved", "bits per human answer"), strict=True
    ):
        axis.plot(list(found), [law[name] for law in found.values()], "o-", ms=4, color="#4878a8")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(found), list(map(str, found)))
        axis.set_xlabel("K: answers drawn, one kept")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
