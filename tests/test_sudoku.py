"""The Sudoku world: its puzzles are what they claim to be, its measures are right, and every arm runs."""

import inspect
import re
from itertools import product

import numpy as np
import pytest
import torch

from benchmarks import acceptance, sudoku, sudoku_rivals
from benchmarks.worlds import sudoku as world
from benchmarks.worlds import sudoku_arms as arms
from examples import sudoku as example


def solutions(puzzle, cell=0):
    """By trying every digit in every blank cell."""
    if cell == 16:
        return [puzzle]
    if puzzle[cell] != world.BLANK:
        return solutions(puzzle, cell + 1)
    found = []
    for digit in "1234":
        r, c = divmod(cell, 4)
        peers = [i for i in range(16) if i // 4 == r or i % 4 == c or (i // 8 == r // 2 and i % 4 // 2 == c // 2)]
        if all(puzzle[i] != digit for i in peers):
            found += solutions(puzzle[:cell] + digit + puzzle[cell + 1 :], cell + 1)
    return found


def test_the_grids_are_all_that_there_are():
    assert sorted(world.grids()) == sorted(solutions(world.BLANK * 16))
    assert len(world.grids()) == 288


def test_every_puzzle_has_the_humans_answer_as_its_only_solution():
    data = world.data()
    for puzzle in [*data.train[:40], *data.unlabelled[:40], *data.test[:40]]:
        assert solutions(puzzle.question) == [puzzle.answer]
    assert all(world.num_solutions(puzzle.question) == 1 for part in data for puzzle in part)


def test_tests_share_no_grid_and_no_question_with_what_is_trained_on():
    train, validation, unlabelled, test = world.data()
    assert (len(train), len(validation), len(unlabelled), len(test)) == (1800, 200, 20_000, 1000)
    trained = {p.grid for p in (*train, *unlabelled)}
    assert len(trained | {p.grid for p in validation}) == 200
    assert len({p.grid for p in test}) == 88
    assert not trained & {p.grid for p in test} and not trained & {p.grid for p in validation}  # noqa: PT018
    questions = [p.question for part in world.data() for p in part]
    assert len(set(questions)) == len(questions)


def test_the_check_passes_the_solution_and_nothing_else():
    puzzle = world.data().test[0]
    other = next(grid for grid in world.grids() if grid != puzzle.answer)
    wrong = [puzzle.answer[:-1], puzzle.answer + "1", "1" * 16, other, ""]
    prompts = [puzzle.question] * (1 + len(wrong))
    assert world.solved(prompts, [puzzle.answer, *wrong]) == [True] + [False] * len(wrong)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The arms at a few steps, from a start of 150."""
    monkeypatch.setattr(arms, "START_STEPS", 150)
    monkeypatch.setattr(arms, "READ_EVERY", 75)
    small = world.data()._replace(validation=world.data().validation[:50], test=world.data().test[:100])
    monkeypatch.setattr(arms, "data", lambda: small)
    return tmp_path


def test_a_solve_rate_is_what_sampling_finds(monkeypatch):
    """Of eight puzzles half learned by heart, so that the rate is neither 0 nor 1."""
    few = world.data()._replace(test=world.data().train[:8])
    monkeypatch.setattr(arms, "data", lambda: few)
    torch.manual_seed(0)
    model = world.new_model()
    for _ in arms._likelihood_steps(model, lambda step: few.test, 0, num_steps=400, rate=2e-3, batch_size=8):
        exact = np.exp(arms.log_probs(model, few.test))
        if exact.mean() > 0.3:
            break

    sampled = arms.sampled_solve_rate(model, seed=0, num_answers=100)

    assert 0.3 < exact.mean() < 0.9
    standard_error = np.sqrt((exact * (1 - exact)).mean() / (8 * 100))
    assert abs(sampled - exact.mean()) < 4 * standard_error


def test_every_arm_starts_from_the_same_weights_and_measures_the_same_puzzles(quick):
    first, again = (arms.start(6, quick).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)

    runs = {
        "game": arms.game(6, quick, num_steps=2, num_warmup=1),
        "likelihood": arms.likelihood(6, quick, num_steps=2),
        "grpo": arms.grpo(6, quick, num_steps=2),
        "rejection": arms.rejection(6, quick, budget=60.0, num_steps=2),
    }

    for name, run in runs.items():
        assert len(run["last"]) == len(run["best"]) == 100, name
        assert run["num_steps"] == 2, name
    assert runs["game"]["curve"][0]["solve_rate"] == runs["likelihood"]["curve"][0]["solve_rate"]
    assert runs["game"]["curve"][0]["test_nats"] == pytest.approx(runs["rejection"]["curve"][0]["test_nats"])
    assert runs["game"]["last"] != runs["likelihood"]["last"] != runs["grpo"]["last"]


def test_the_small_form_of_the_example_shows_both_arms_from_one_start(quick, monkeypatch, capsys):
    """`quick` puts back what the small form sets."""
    curves = example.main(["--smoke", "--figure", str(quick / "sudoku.png")])
    game, likelihood = curves.values()
    assert game[0]["solve_rate"] == likelihood[0]["solve_rate"]
    assert [curve[-1]["step"] for curve in (game, likelihood)] == [2, 2]
    assert game[-1]["test_nats"] != likelihood[-1]["test_nats"]
    printed = capsys.readouterr().out
    assert re.search(rf"the game, with a check +{game[-1]['solve_rate']:.3f} +{example.bits(game[-1]):.2f}", printed)
    assert (quick / "sudoku.png").stat().st_size > 10_000


def test_the_sign_flip_test_agrees_with_all_signs_tried():
    differences = np.random.default_rng(0).normal(0.4, 1.0, size=10)
    signs = np.array(list(product([-1, 1], repeat=10)))
    exact = ((signs * differences).mean(axis=1) >= differences.mean() - 1e-12).mean()

    assert sudoku.sign_flip_p(differences) == pytest.approx(exact, abs=0.005)


@pytest.mark.parametrize(("gain", "more_bits", "holds"), [(0.3, -0.2, True), (0.03, -0.2, False), (0.3, 0.4, False)])
def test_a_claim_holds_where_more_is_solved_at_no_more_bits(gain, more_bits, holds):
    """p of half the puzzles is raised by 2 `gain`; bits of all are shifted by what is left."""
    rng = np.random.default_rng(0)
    control = np.log(rng.uniform(0.2, 0.3, size=(3, 1000)))
    half = rng.permutation(1000)[:500]
    game = control.copy()
    game[:, half] = np.log(np.exp(control[:, half]) + 2 * gain)
    rest = np.setdiff1d(np.arange(1000), half)
    game[:, rest] -= ((game - control).sum(axis=1, keepdims=True) / 500) + 2 * np.log(2) * more_bits
    ours, theirs = ({seed: law[i].tolist() for i, seed in enumerate((1, 2, 3))} for law in (game, control))

    verdict = sudoku.compare(ours, theirs)

    assert verdict["bits"] == pytest.approx(more_bits, abs=0.05)
    assert verdict["holds"] == (holds and verdict["solved"] >= 0.05)


def test_a_gain_of_three_grids_is_no_gain_over_grids():
    grids = np.array([puzzle.grid for puzzle in world.data().test])
    few = np.isin(grids, np.unique(grids)[:3])
    control = np.full((3, 1000), np.log(0.01))
    game = np.where(few, np.log(0.99), control)
    for law in (game, control):
        law[:, ~few] += np.random.default_rng(0).normal(0, 1e-3, size=(~few).sum())

    verdict = sudoku.compare(*({seed: law[i].tolist() for i, seed in enumerate((1, 2, 3))} for law in (game, control)))

    assert verdict["p"] >= 0.01
    assert not verdict["holds"]


def test_an_entry_is_measured_again_when_the_world_behind_it_changes(monkeypatch):
    names = [module.__name__ for module in acceptance.sources(sudoku_rivals)]
    key = acceptance.cell_key(sudoku_rivals, {"seed": 1})
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda part: source(part) + ("# edited" if part is world else ""))

    assert names == ["benchmarks.sudoku_rivals", "benchmarks.worlds.sudoku", "benchmarks.worlds.sudoku_arms"]
    assert acceptance.cell_key(sudoku_rivals, {"seed": 1}) != key


def test_the_picture_shows_every_law(tmp_path):
    law = np.log(np.random.default_rng(0).uniform(0.01, 1, size=1000)).tolist()
    results = [
        {
            "cell": {"seed": 1, "arm": arm},
            "result": {"last": law, "best": law} | ({"start": law} if arm == "game" else {}),
        }
        for arm in ("game", "likelihood, steps", "likelihood, time")
    ]

    sudoku.plot(results, tmp_path / "histogram.png")

    assert (tmp_path / "histogram.png").read_bytes().startswith(b"\x89PNG")
