"""What a check buys: the game solves more Sudokus than likelihood alone, and finds the human's answer less surprising.

    python -m examples.sudoku                        # some ten minutes on one core, no network
    python -m examples.sudoku --smoke                # hardly any training: a test that it runs

People fill 4x4 Sudokus, each of which has one solution; a small imitator learns from too few of them. From its best
step on, one copy goes on with likelihood. The other plays: its distinguisher is given a check, as one is given a
verifier, and 20 000 puzzles that nobody answered are asked as well. With one right answer to each question the share
of solved puzzles is exactly the mean probability of the human's answer. How the trainer is called, `game` shows in
benchmarks/worlds/sudoku_arms.py.

People always solve, so a failure is something that no human does, and whoever can check sees it: total variation from
people is exactly the share that is not solved, and a check tells 1/2 + half of it of pairs. The game's distinguisher
has that check; what else it goes by are texts (more: examples/absolute_sense.py).

It is one seed of `make acceptance ONLY=sudoku`, which has the controls.
"""

import argparse
import contextlib
import math
import tempfile
from pathlib import Path

import transformers

from benchmarks.worlds import sudoku_arms as arms

Curve = list[dict[str, float]]
COLOURS = {"the game, with a check": "#4878a8", "likelihood alone": "#c06030"}


def main(arguments: list[str] | None = None) -> dict[str, Curve]:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--figure", default="sudoku.png", help="where the picture goes")
    parser.add_argument("--smoke", action="store_true", help="hardly any training, few puzzles")
    given = parser.parse_args(arguments)
    num_steps, num_warmup = arms.NUM_STEPS, arms.NUM_WARMUP
    if given.smoke:
        num_steps, num_warmup, arms.START_STEPS, arms.READ_EVERY = 2, 1, 20, 20

    with tempfile.TemporaryDirectory() as scratch:
        print(f"From likelihood's best step, {num_steps} steps of the game. This takes longest.")
        with contextlib.redirect_stdout(None):  # the trainer's forty numbers every 50 steps
            game = arms.game(given.seed, Path(scratch), num_steps, num_warmup=num_warmup)
        print("From the same step, as many of likelihood alone.")
        likelihood = arms.likelihood(given.seed, Path(scratch), num_steps)
    curves = dict(zip(COLOURS, (game["curve"], likelihood["curve"]), strict=True))
    print(f"\n{'':24}  {'solved':>6}  {'bits per human answer':>21}  {'told by a check':>15}  {'CPU seconds':>11}")
    readings = {"start": game["curve"][0]} | {name: curve[-1] for name, curve in curves.items()}
    for name, reading in readings.items():
        solved = reading["solve_rate"]
        seconds = f"{reading['cpu_seconds']:.0f}" if name in curves else ""
        print(f"{name:24}  {solved:6.3f}  {bits(reading):21.2f}  {1 - solved / 2:15.3f}  {seconds:>11}")
    print(f"{'people':24}  {1:6.3f}  {0:21.2f}  {0.5:15.3f}")
    plot([curves], given.figure)
    print(f"\nThe picture is in {given.figure}.")
    return curves


def bits(reading: dict[str, float]) -> float:
    """Of one human answer, on test puzzles."""
    return -reading["test_nats"] / math.log(2)


def plot(runs: list[dict[str, Curve]], path: str) -> None:
    """Solved puzzles and bits of the human's answer against steps; one line for each run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for curves in runs:
        for name, curve in curves.items():
            steps = [reading["step"] for reading in curve]
            label = name if curves is runs[0] else None
            panels[0].plot(steps, [reading["solve_rate"] for reading in curve], color=COLOURS[name], label=label)
            panels[1].plot(steps, list(map(bits, curve)), color=COLOURS[name])
    for axis, label in zip(panels, ("share of unseen puzzles solved", "bits per human answer"), strict=True):
        axis.set_xlabel("steps from the same start")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    panels[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
