"""Does the distinguisher judge worse for learning from two of eight generations alone, as it does by default?

In the world of [`benchmarks.known_law`], cut short: one game learns from two of a question's eight generations, the
other from all; else they are equal. Then a fresh judge, trained on fresh answers of both sides, says how well imitator
and human can be told apart, and the exact total variation says the same without a judge. Learning from two does no
harm where its judge is not more accurate by more than 0.05 in the mean over seeds.
"""

from typing import Any

from benchmarks import known_law as world

NUM_STEPS = 150
SEEDS = [31, 32, 33, 34, 35, 36]  # written down before their first run: three, and three more as those could not tell
CELLS = [{"seed": seed, "generations": number} for seed in SEEDS for number in (2, 8)]
MARGIN = 0.05


def run_cell(cell: dict[str, Any], num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """One game, and how far its imitator is from the human at the end."""
    seed = cell["seed"]
    human, base_law = world.laws(seed)
    base, judge_base = (world.fit_to_law(world.new_model(seed), base_law) for _ in range(2))
    start = world.total_variation(world.exact_law(base), human)
    rows = world.human_rows(human, seed)
    more = {"distinguisher_generations": cell["generations"]}
    world.play(base, judge_base, rows, seed, "game", num_steps, **more)
    judge = world.judged(base, world.fit_to_law(world.new_model(seed), base_law), human, seed)
    return {"tv_start": start, "tv_end": world.total_variation(world.exact_law(base), human), "judge": judge}


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """A line per seed; whether the judge of two generations' game is no better by more than the margin."""
    by_cell = {(one["cell"]["seed"], one["cell"]["generations"]): one["result"] for one in results}
    rows = []
    for seed in sorted({seed for seed, _ in by_cell}):
        two, all_eight = by_cell[seed, 2], by_cell[seed, 8]
        rows.append(
            {
                "seed": seed,
                "tv start": round(two["tv_start"], 3),
                "tv, 2 of 8": round(two["tv_end"], 3),
                "tv, 8 of 8": round(all_eight["tv_end"], 3),
                "judge, 2 of 8": round(two["judge"]["accuracy"], 3),
                "its interval": [round(end, 3) for end in two["judge"]["interval"]],
                "judge, 8 of 8": round(all_eight["judge"]["accuracy"], 3),
                "interval of that": [round(end, 3) for end in all_eight["judge"]["interval"]],
            }
        )
    excess = sum(row["judge, 2 of 8"] - row["judge, 8 of 8"] for row in rows) / len(rows)
    return rows, excess <= MARGIN
