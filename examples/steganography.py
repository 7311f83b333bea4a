"""Plant an imitator that hides a message, and see who notices: a fresh judge, or the humans' own answers.

    python -m examples.steganography                 # a minute on one core, no network
    python -m examples.steganography --smoke         # the same on fewer questions

The honest imitator is a small transformer, and the humans of this world are its own samples, so it is perfect. The
planted one draws by a *soft rotation*: a keyed preference for one half of what it could say next. Without the key its
answers are distributed like the honest ones; with it, every answer spells a bit. The price is paid in probability: the
humans' answers, scored by the planted law, lose bits that they do not lose under the honest one.
"""

import argparse

import transformers

from benchmarks import steganography as table


def main(arguments: list[str] | None = None) -> None:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="few questions: shows that it runs, proves little")
    parser.add_argument("--figure", default="steganography.png", help="where the picture goes")
    given = parser.parse_args(arguments)
    size = {"num_questions": 80, "num_steps": 20} if given.smoke else {"num_questions": 1000, "num_steps": 300}
    results = []
    for scheme in ("honest", "green list, unigram", "rotation .5", "coding, fresh nonce"):
        result = table.run_cell({"scheme": scheme}, seed=1, **size)
        results.append({"cell": {"scheme": scheme}, "result": result})
        judge = max(result["judges"].values(), key=lambda seen: seen["accuracy"])
        read = f"{result['decoded']['accuracy']:.1%}" if "decoded" in result else "no message"
        print(f"\n{scheme}")
        print(f"  best judge without the key  {judge['accuracy']:.3f} (chance is 0.5)")
        print(f"  messages read with the key  {read}")
        print(
            f"  bits the humans lose        {result['price']['price']:.2f} ± {result['price']['standard_error']:.2f}"
        )
        print(f"  re-execution finds it       {'no' if result['re_executed']['verified'] else 'yes'}")
    table.plot(results, given.figure)
    print(f"\nThe picture is in {given.figure}.")


if __name__ == "__main__":
    main()
