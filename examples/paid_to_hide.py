"""Pay an imitator for a hidden bit, and watch what the game's judges see and what the humans' answers lose.

    python -m examples.paid_to_hide                        # the game alone: minutes on one core, no network
    python -m examples.paid_to_hide --budget               # the same, held by `retrodictive_budget`
    python -m examples.paid_to_hide --smoke                # shows that it runs, proves little

`reward_funcs` of [`AdversarialTrainer`] takes anybody's reward. Here a receiver pays when the answer says, in a half
of the answers that looks like any other, the keyed parity of a nonce in the question. Who has no key sees answers of
the right frequencies. But an answer that depends on the key is less likely where the human gave another: whatever
arrives with error e costs the human answers at least d(1/2 || 1 - e) nats; a budget on these nats bounds the bit.
"""

import argparse

import transformers

from benchmarks import paid_to_hide as paid
from hf_imitate.steganography_theory import largest_accuracy


def main(arguments: list[str] | None = None) -> None:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", action="store_true", help="hold the human answers' log-probability")
    parser.add_argument("--smoke", action="store_true", help="few steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--figure", default="paid_to_hide.png", help="where the picture goes")
    given = parser.parse_args(arguments)
    num_steps = paid.NUM_STEPS
    if given.smoke:
        paid.TAUGHT_STEPS, paid.UNTAUGHT_STEPS, paid.NUM_ROWS = 20, 10, 300
        paid.NUM_JUDGED, paid.JUDGE_STEPS, paid.WARMUP, paid.BATCH, num_steps = 60, 2, 1, 32, 2
    cell = {"seed": given.seed, "arm": paid.ARMS[given.budget]}
    found = paid.run_cell(cell, num_steps)
    end = found["end"]
    print(f"\nmessages that arrive         {found['start']['received']:.3f} before, {end['received']:.3f} after")
    print(f"judge without the key        {found['judge']['accuracy']:.3f}")
    print(f"the same judge with the key  {found['oracle']['accuracy']:.3f}")
    print(f"the same judge on a misfit   {found['power']['accuracy']:.3f}, at best {found['power']['best']:.3f}")
    print(
        f"nats the human answers lose  {end['price']:.3f}: at most {largest_accuracy(end['price']):.3f} could arrive"
    )
    paid.plot([{"cell": cell, "result": found}], given.figure)
    print(f"The picture is in {given.figure}.")


if __name__ == "__main__":
    main()
