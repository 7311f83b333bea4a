"""The contest: tasks keep their promises, test rows open once, intervals and verdicts are what they say."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import contest
from benchmarks.worlds import contest_arms as arms
from benchmarks.worlds import contest_judging as judging
from benchmarks.worlds import contest_tasks as tasks
from benchmarks.worlds import contest_training as training
from benchmarks.worlds import contest_verdict as verdicts
from benchmarks.worlds import notes, notes_arms, sudoku
from hf_imitate.rendering import Answer

TINY_NOTES = notes_arms.FULL._replace(train=160, dev=100, test=100, judge_rows=120, unanswered=40)
TINY_ARMS = ["SFT", "combined 1", "one of 8", "distilled once", "distilled, one of 8"]
TINY_SETTINGS = tasks.NOTES.settings._replace(
    sft=(6, 1e-2),
    larger=(6, 6e-3),
    more=(4, 3e-3),
    judge_lm=(6, 5e-3),
    judge=(4, 7e-4, 1),
    game=(2, 4, 2),
    warmup=2,
    residual=(4, 16, 5e-4),
    distil=(3, 5e-3, 20, 2),
)


@pytest.fixture
def tiny(monkeypatch):
    """The notes with few rows and few steps."""
    monkeypatch.setattr(tasks, "NOTES_SIZES", TINY_NOTES)
    tasks._note_rows.cache_clear()
    task = tasks.NOTES.__class__(**{**vars(tasks.NOTES), "settings": TINY_SETTINGS, "sft_sweep": (0.8, 1.0)})
    monkeypatch.setitem(contest.TASKS, "notes", task)
    for name, value in {"SEEDS": [11, 12], "NUM_SEEDS": 1, "SWEEP": (1.0,)}.items():
        monkeypatch.setattr(contest, name, value)
    monkeypatch.setattr(contest, "SCORED", {"dev": 8, "sweep": 8, "test": 8})
    monkeypatch.setattr(contest, "NUM_TIMED", 4)
    yield task
    tasks._note_rows.cache_clear()


# --- tasks


def test_splits_of_the_notes_share_no_question():
    rows = tasks.NOTES.rows()
    parts = [set(rows.train["prompt"]), set(rows.dev["prompt"]), set(rows.test["prompt"]), set(rows.unanswered)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    read = set(tasks.NOTES.judge_rows(0)["prompt"])
    assert not read & set.union(*parts[:3])


def test_sudoku_dev_and_test_share_no_grid_with_each_other_nor_with_training(monkeypatch):
    monkeypatch.setattr(sudoku, "NUM_UNLABELLED", 400)
    monkeypatch.setattr(tasks, "SUDOKU_PUZZLES", 120)
    sudoku.data.cache_clear()
    tasks._sudoku_rows.cache_clear()
    rows = tasks.SUDOKU.rows()
    grids = [set(part["completion"]) for part in rows[:3]]
    assert len(set.union(*grids)) == sum(map(len, grids)) == 180 + 88
    assert sum(map(len, rows[:3])) == 1800 + 240
    read = tasks.SUDOKU.judge_rows(0)
    assert not set(read["prompt"]) & {*rows.dev["prompt"], *rows.test["prompt"], *rows.unanswered}
    assert not set(read["completion"]) & (grids[1] | grids[2])
    sudoku.data.cache_clear()
    tasks._sudoku_rows.cache_clear()


def test_misfits_are_answers_that_no_human_gives():
    question, answer = "3071?", "(307farewell)"
    assert notes.law(question)[answer] > 0
    assert tasks.closed_wrongly(question, answer) not in notes.law(question)

    puzzle = "." * 16
    wrong = tasks.one_digit_wrong(puzzle, sudoku.grids()[0])
    assert sum(a != b for a, b in zip(wrong, sudoku.grids()[0], strict=True)) == 1
    assert sudoku.solved([puzzle], [wrong]) == [False]

    assert tasks.words_exchanged("def f():", "Return the first line.") == "first line. Return the"
    assert tasks.words_exchanged("def f():", "Return.") != "Return."


def test_the_oracle_of_sudoku_loses_only_where_the_imitator_is_right():
    rows = tasks.residual_sudoku.rows_of([sudoku.Puzzle("." * 16, grid, 0) for grid in sudoku.grids()[:4]])
    given = [Answer(sudoku.grids()[number], True) for number in (0, 1, 9, 9)]
    assert tasks.sudoku_oracle(rows, given, None) == {"oracle": 0.75, "impossible": 0.5}


def test_arms_that_ask_a_check_are_only_where_there_is_one():
    longer = {"larger model, longer"}  # where it stopped short
    assert set(arms.arms_of(tasks.SUDOKU)) - set(arms.arms_of(tasks.NOTES)) == {*arms.ASK_A_CHECK, *longer}
    assert set(contest.HEADLINE) < set(arms.arms_of(tasks.NOTES))


def test_arms_of_an_ensemble_choose_from_the_answers_of_one_game_with_a_weight_of_3(monkeypatch):
    assert set(arms.arms_of(tasks.DOCSTRINGS)) - set(arms.arms_of(tasks.NOTES)) == set(arms.OF_AN_ENSEMBLE)
    built, played = [], []

    def keep(task, name, folder, seed, needs, uses, build):
        built.append(name)
        if name == "combined 3":
            build(Path(name))
        return Path(name)

    monkeypatch.setattr(arms, "_keep", keep)
    monkeypatch.setattr(arms, "_play", lambda *given, **own: played.append(own["retrodictive_coef"]))
    monkeypatch.setattr(arms, "start", lambda *given: Path("start"))
    monkeypatch.setattr(arms, "larger", lambda *given: Path("larger"))
    monkeypatch.setattr(arms.Distinguisher, "from_pretrained", lambda *given, **own: None)
    own, anew = (arms.law_of(tasks.DOCSTRINGS, name, 11, Path()) for name in arms.OF_AN_ENSEMBLE)
    assert (own.path.name, anew.path.name) == ("combined 3", "residual of combined 3")
    assert own.resample == anew.resample == 8
    assert built == ["residual of start", "combined 3"] * 2 + ["residual of combined 3"]
    assert played == [3.0, 3.0]


# --- what is measured


def test_self_bleu_is_one_for_copies_and_falls_with_variety():
    assert judging.self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)
    # "1 2 3" against "1 2 4": two of three words, one of two pairs, none of one triple (1/2 by smoothing).
    by_hand = math.exp((math.log(2 / 3) + math.log(1 / 2) + math.log(0.5)) / 3)
    assert judging.self_bleu([[1, 2, 3], [1, 2, 4]]) == pytest.approx(by_hand)


def test_a_repeated_word_counts_no_more_often_than_another_has_it():
    by_hand = math.exp((math.log(1 / 2) + math.log(0.5)) / 2), math.exp((math.log(1 / 2) + math.log(0.5)) / 2)
    assert judging.self_bleu([[1, 1], [1, 2]]) == pytest.approx(np.mean(by_hand))


def test_sums_by_group_add_up_to_the_whole():
    questions = [f"{number}?" for number in range(200)]
    values = np.arange(200.0)
    totals, counts = judging.by_group(values, questions)
    assert sum(totals) == values.sum()
    assert sum(counts) == 200
    assert judging.by_group(values[::-1], questions[::-1]) == [totals, counts]


@pytest.mark.parametrize(("sees", "notices"), [(True, True), (False, False)])
def test_power_is_what_a_judge_sees_of_misfits_among_ties(monkeypatch, tmp_path, sees, notices):
    rows = notes.human_rows(notes.questions(400, 5), 5)
    humans = dict(zip(rows["prompt"], rows["completion"], strict=True))

    def judge(train, valid, seed):
        def score(prompts, answers):
            return np.array([float(humans[q] == a.text and sees) for q, a in zip(prompts, answers, strict=True)])

        return score

    monkeypatch.setattr(judging, "judge", lambda task, name, folder: judge)
    for found in judging.power(tasks.NOTES, rows, tmp_path).values():
        assert found["notices"] == notices
        assert found["accuracy"]["0.1"] == pytest.approx(0.55 if sees else 0.5, abs=0.02)
        assert found["smallest"] == (0.1 if sees else None)


def test_of_several_trainings_the_best_on_validation_pairs_judges():
    pairs = judging.pairs_of(notes.human_rows(notes.questions(20, 5), 5), [Answer("", True)] * 20)

    def judge(train, valid, seed):
        sign = {0: 0.0, 1000: 1.0, 2000: -1.0}[seed]
        return lambda prompts, answers: np.array([sign * len(answer.text) for answer in answers])

    scorer = judging.best_of(judge, 3)([], pairs, 0)
    assert scorer([""], [Answer("abc", True)]) == [3.0]
    assert judging.best_of(judge, 1)([], pairs, 0)([""], [Answer("abc", True)]) == [0.0]


def made_up(accuracy, bits, seeds=(1, 2, 3), spread=0.0, rng=None, per_group=50):
    """What one law's cells hold."""
    rng = rng or np.random.default_rng(0)
    cells = {}
    for seed in seeds:
        shift = spread * rng.standard_normal()
        wins = rng.binomial(per_group, min(1.0, accuracy + shift), 40).tolist()
        own = (per_group * (bits + 0.1 * rng.standard_normal(40))).tolist()
        cells[seed] = {
            "judges": {
                name: {"wins": [wins, [per_group] * 40], "accuracy": accuracy, "bits": 0.1} for name in judging.JUDGES
            },
            "bits_by_group": [own, [per_group] * 40],
        }
    return cells


def test_the_interval_over_questions_is_the_textbooks_where_groups_are_alike():
    """One seed: the mean of 40 group means; its normal interval in closed form."""
    cells = made_up(0.6, 9.0, seeds=(1,))
    law = verdicts.sums(cells, ["ngram"])
    _, bits = verdicts.estimate(law)
    own = np.array(cells[1]["bits_by_group"][0]) / 50
    reach = 1.96 * own.std() / math.sqrt(40)
    assert bits.value == pytest.approx(own.mean())
    assert bits.low == pytest.approx(own.mean() - reach, abs=0.1 * reach)
    assert bits.high == pytest.approx(own.mean() + reach, abs=0.1 * reach)


def test_seeds_that_differ_widen_the_interval():
    alike, unlike = (
        verdicts.estimate(verdicts.sums(made_up(0.6, 9.0, (1, 2, 3, 4, 5), spread), ["ngram"]))[0]
        for spread in (0.0, 0.1)
    )
    assert unlike.high - unlike.low > 2 * (alike.high - alike.low)


@pytest.mark.parametrize(
    ("accuracy", "bits", "beyond", "halves"),
    [
        (0.55, 9.0, True, True),
        (0.55, 8.0, True, True),
        (0.64, 9.0, True, False),  # less seen, but far from half
        (0.55, 9.5, False, True),  # bits were lost
        (0.70, 8.0, False, False),  # as much seen as fine-tuning
        (0.60, 9.0, True, False),  # half exactly is not less than half, beyond doubt
    ],
)
def test_the_verdict_asks_for_both_ends_of_the_frontier(accuracy, bits, beyond, halves):
    frontier = [verdicts.sums(made_up(a, b), ["ngram"]) for a, b in ((0.74, 9.0), (0.70, 9.6))]
    arm = verdicts.sums(made_up(accuracy, bits, rng=np.random.default_rng(1)), ["ngram"])
    seen = verdicts.verdict(arm, frontier, num=500)
    assert (seen.beyond, seen.halves) == (beyond, halves)


def test_students_interval_is_scipys_and_one_seed_bounds_nothing():
    values = [0.1, 0.4, 0.2]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert verdicts.student(values) == pytest.approx((np.mean(values), *expected))
    assert verdicts.student([0.1])[1:] == (-math.inf, math.inf)


def test_seeds_that_disagree_are_not_beyond_however_narrow_the_bootstrap():
    frontier = [verdicts.sums(made_up(0.7, 9.0, (1, 2), per_group=2000), ["ngram"])]
    near, far = (made_up(a, 9.0, (seed,), per_group=2000) for a, seed in ((0.68, 1), (0.58, 2)))
    seen = verdicts.verdict(verdicts.sums(near | far, ["ngram"]), frontier, num=500)
    assert seen.less_seen.high < 0 < seen.less_seen_by_seeds.high
    assert not seen.beyond


def test_both_ends_of_a_frontier_are_kept_and_what_lies_near():
    laws = {0.7: (0.60, 11.0), 0.85: (0.61, 10.0), 1.0: (0.70, 9.5), 1.15: (0.72, 9.0), 1.3: (0.80, 9.1)}
    measured = {t: made_up(accuracy, bits, per_group=2000) for t, (accuracy, bits) in laws.items()}
    assert verdicts.ends_of_frontier(measured, ["ngram"]) == [0.7, 0.85, 1.0, 1.15, 1.3]
    measured[1.2] = made_up(0.75, 9.6, per_group=2000)
    assert 1.2 not in verdicts.ends_of_frontier(measured, ["ngram"])


def test_who_has_nothing_to_halve_halves_nothing():
    frontier = [verdicts.sums(made_up(0.5, 9.0), ["ngram"])]
    arm = verdicts.sums(made_up(0.5, 9.0, rng=np.random.default_rng(1)), ["ngram"])
    assert not verdicts.verdict(arm, frontier, num=500).halves


def test_who_has_fewer_seeds_is_compared_on_those():
    """Seeds differ by more than arms do: the others of the arm would decide."""
    good, bad = made_up(0.55, 8.0, seeds=(1, 2)), made_up(0.75, 11.0, seeds=(3, 4, 5))
    seen = verdicts.verdict(verdicts.sums(good | bad, ["ngram"]), [verdicts.sums(good, ["ngram"])], num=500)
    assert seen.less_seen == seen.dearer == verdicts.Estimate(0.0, 0.0, 0.0)
    assert seen.accuracy.value > 0.6
    assert not seen.beyond


def test_temperature_1_stays_unless_judges_find_another_clearly_harder():
    of_arm = {t: made_up(a, 9.0, per_group=2000) for t, a in ((0.8, 0.65), (0.9, 0.595), (1.0, 0.6))}
    assert verdicts.chosen_temperature(of_arm, ["ngram"]) == 1.0
    assert verdicts.chosen_temperature(of_arm | {0.9: made_up(0.55, 9.0, per_group=2000)}, ["ngram"]) == 0.9


def test_the_best_arm_is_one_of_ours_and_loses_no_bits():
    laws = {
        name: verdicts.sums(made_up(accuracy, bits), ["ngram"])
        for name, accuracy, bits in (
            ("SFT", 0.7, 9.0),
            ("larger model", 0.5, 8.0),
            ("larger model, longer", 0.5, 8.0),
            ("adversarial", 0.55, 12.0),
            ("combined 1", 0.62, 9.0),
            ("one of 8", 0.58, 8.5),
        )
    }
    assert verdicts.best_arm(laws, [laws["SFT"]]) == "one of 8"
    assert verdicts.best_arm({name: laws[name] for name in ("SFT", "adversarial")}, [laws["SFT"]]) == "adversarial"
    assert verdicts.best_arm({"SFT": laws["SFT"]}, [laws["SFT"]]) is None


# --- the ledger


def test_headline_arms_and_sft_of_all_tasks_come_first_and_test_rows_last():
    cells = contest.all_cells()
    assert len({contest.key_of(cell) for cell in cells}) == len(cells)
    num_first = 3 * (1 + 5 * 3 + 2)  # power, five seeds of three arms, and SFT's sweep on two
    assert {cell["arm"] for cell in cells[:num_first]} == {"power", "SFT", *contest.HEADLINE}
    on_test = [cell["part"] == "test" for cell in cells]
    assert on_test == sorted(on_test)
    assert {cell["seed"] for cell in cells if cell["arm"] == "combined 3"} == set(contest.SEEDS[:2])


def test_on_test_rows_the_arm_that_was_best_on_dev_rows_has_all_seeds_and_sweeps_are_of_dev_rows():
    task = tasks.NOTES
    of_best = {
        part: [c["seed"] for c in contest.cells(task, part, "combined 3") if c["arm"] == "combined 3"]
        for part in contest.PARTS_OF_A_TASK
    }
    assert of_best == {"dev": [11, 12], "sweep": [11], "test": contest.SEEDS}
    opened = {"notes": {"best": "combined 3"}}
    keys = {contest.key_of(cell) for cell in contest.all_cells([task], opened)}
    assert keys - {contest.key_of(cell) for cell in contest.all_cells([task])} == {
        f"notes/test/combined 3/{seed}" for seed in contest.SEEDS[2:]
    }


def test_a_ledger_comes_back_as_it_was_written_one_cell_a_line(tmp_path):
    ledger = {"opened": {}, "cells": {"a/dev/SFT/1": {"result": {"x": [1, 2]}}, "b": {"result": {}}}}
    contest.write_ledger(tmp_path / "ledger.json", ledger)
    assert contest.read_ledger(tmp_path / "ledger.json") == ledger
    lines = (tmp_path / "ledger.json").read_text().splitlines()
    assert [line[:4] for line in lines if line.startswith(('"a/', '"b"'))] == ['"a/d', '"b":']
    assert contest.read_ledger(tmp_path / "none.json") == {"opened": {}, "cells": {}}


def complete(task):
    """A ledger in which all dev cells of a task are measured."""
    laws = {"SFT": (0.7, 9.0), "one of 8": (0.58, 8.5)}
    records = {}
    for cell in [*contest.cells(task, "dev"), *contest.cells(task, "sweep")]:
        result = {"ngram": {"notices": True, "smallest": 0.1, "accuracy": {}}}
        if cell["arm"] != "power":
            temperatures = contest.temperatures(cell, {})
            law = made_up(*laws.get(cell["arm"], (0.65, 9.0)), seeds=(cell["seed"],))[cell["seed"]]
            result = {"at": {f"{t:g}": law for t in temperatures}, "cpu_seconds": 1.0, "milliseconds": 1.0}
        records[contest.key_of(cell)] = {
            "settings": contest.settings_of(task, cell["arm"], cell["part"]),
            "result": result,
        }
    return {"opened": {}, "cells": records}


def test_test_rows_open_once_and_only_when_every_arm_was_measured(tmp_path, tiny):
    path, ledger = tmp_path / "contest.json", complete(tiny)
    missing = ledger["cells"].pop("notes/dev/combined 3/11")
    contest.write_ledger(path, ledger)
    with pytest.raises(PermissionError, match=r"1 cells of notes are missing.*combined 3"):
        contest.open_test("notes", ledger_path=path)
    assert not contest.read_ledger(path)["opened"]

    ledger["cells"]["notes/dev/combined 3/11"] = missing
    contest.write_ledger(path, ledger)
    opening = contest.open_test("notes", ledger_path=path)
    assert opening["best"] == "one of 8"
    assert opening["temperatures"]["combined 1"] == 1.0
    assert opening["commit"]
    assert contest.read_ledger(path)["opened"]["notes"] == opening
    with pytest.raises(PermissionError, match="opened once"):
        contest.open_test("notes", "I want to", ledger_path=path)


def test_a_cell_of_test_rows_before_the_opening_is_refused(tmp_path, tiny):
    cell = {"task": "notes", "part": "test", "arm": "SFT", "seed": 11}
    with pytest.raises(PermissionError, match="are not open"):
        contest.run_cell(cell, {"opened": {}, "cells": {}}, tmp_path)


def test_test_rows_are_measured_with_the_settings_they_were_opened_with_alone(tmp_path, tiny, monkeypatch):
    path = tmp_path / "contest.json"
    contest.write_ledger(path, complete(tiny))
    contest.open_test("notes", ledger_path=path)
    monkeypatch.setattr(contest, "SCORED", {"dev": 8, "sweep": 8, "test": 9})
    cell = {"task": "notes", "part": "test", "arm": "combined 1", "seed": 11}
    with pytest.raises(PermissionError, match="other settings of 'combined 1'"):
        contest.run_cell(cell, contest.read_ledger(path), tmp_path)


def test_test_rows_are_measured_with_the_code_they_were_opened_with_alone(tmp_path, tiny, monkeypatch):
    path = tmp_path / "contest.json"
    contest.write_ledger(path, complete(tiny))
    contest.open_test("notes", ledger_path=path)
    monkeypatch.setattr(contest, "code", lambda: "other")
    cell = {"task": "notes", "part": "test", "arm": "SFT", "seed": 11}
    with pytest.raises(PermissionError, match="opened with other code"):
        contest.run_cell(cell, contest.read_ledger(path), tmp_path)


def test_a_cell_is_one_process_s_until_it_is_done(tmp_path):
    with (
        contest.claimed(tmp_path, "notes/dev/SFT/11") as first,
        contest.claimed(tmp_path, "notes/dev/SFT/11") as second,
    ):
        assert (first, second) == (True, False)
    with contest.claimed(tmp_path, "notes/dev/SFT/11") as again:
        assert again


def test_puzzles_of_a_grid_stand_on_one_side_of_a_judges_split(monkeypatch, tmp_path):
    seen = {}

    def judge(train, valid, seed):
        seen["learned"] = {pair.human.text for pair in (*train, *valid)}

        def score(prompts, answers):
            seen.setdefault("asked", set()).update(prompts)
            return np.zeros(len(prompts))

        return score

    monkeypatch.setattr(judging, "judge", lambda task, name, folder: judge)
    grids = sudoku.grids()[:20]
    pairs = [judging.Pair(f"{n} {grid}", Answer(grid, True), (Answer("1", True),)) for grid in grids for n in range(6)]
    found = judging.judged(tasks.SUDOKU, pairs, "ngram", tmp_path)
    tested = {pair.human.text for pair in pairs if pair.prompt in seen["asked"]} - seen["learned"]
    assert tested
    assert sum(found["wins"][1]) == 6 * len(tested)  # all puzzles of each
    assert np.count_nonzero(found["wins"][1]) <= len(tested)  # a grid is one group


def test_cells_of_other_settings_are_no_part_of_the_table(tiny):
    ledger = complete(tiny)
    assert contest.summarize(ledger, tiny)[0]
    for record in ledger["cells"].values():
        record["settings"] = "others"
    assert contest.summarize(ledger, tiny)[0] == []


def test_judges_that_notice_nothing_cannot_tell(tiny):
    ledger = complete(tiny)
    assert any("halved" in line for line in contest.summarize(ledger, tiny)[1])
    ledger["cells"]["notes/dev/power/11"]["result"]["ngram"]["notices"] = False
    assert "cannot tell" in contest.summarize(ledger, tiny)[1][-1]


# --- a whole contest, tiny


def test_a_tiny_contest_runs_goes_on_opens_and_is_summed_up(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(contest.arms, "arms_of", lambda task: TINY_ARMS)
    monkeypatch.setattr(judging, "POWER_SHARES", (0.2,))
    monkeypatch.setattr(judging, "JUDGES", ("ngram", "neural 0"))
    monkeypatch.setattr(training, "READINGS", 1)
    monkeypatch.setattr(contest, "SEEDS", [11])
    path = tmp_path / "contest.json"
    trained = tmp_path / "parts"
    assert contest.run(0.0, ["notes"], path, trained) == 0
    num_dev = 1 + len(TINY_ARMS)
    assert contest.run(60.0, ["notes"], path, trained) == num_dev + len(TINY_ARMS)
    assert contest.run(60.0, ["notes"], path, trained) == 0

    contest.open_test("notes", ledger_path=path)
    record = contest.read_ledger(path)["cells"]["notes/dev/one of 8/11"]["result"]
    assert record["cpu_seconds"] > contest.read_ledger(path)["cells"]["notes/dev/SFT/11"]["result"]["cpu_seconds"]
    assert record["at"]["1"]["bias"] > 0
    assert set(record["at"]["1"]["judges"]) == {"ngram", "neural 0"}
    after = arms.law_of(tiny, "distilled, one of 8", 11, trained)
    assert after.resample == 8
    assert arms.distilled(tiny, 11, trained).name in training.made(after.path)["needs"]
    assert contest.run(60.0, ["notes"], path, trained) == num_dev

    ledger = json.loads(path.read_text())
    table, _, part = contest.summarize(ledger, tiny)
    assert part == "test"
    assert sorted(row["arm"] for row in table) == sorted(["SFT", *TINY_ARMS])
    contest.figure(ledger, tiny, tmp_path / "contest.png")
    assert (tmp_path / "contest.png").read_bytes().startswith(b"\x89PNG")


def adds_up_to_an_even_number(prompts, completions, completion_ids=None, **columns):
    """About half of what an imitator that learned little says."""
    return [sum(map(ord, completion)) % 2 == 0 for completion in completions]


def test_arms_that_ask_a_check_keep_what_passes(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(training, "READINGS", 1)
    checks, rejection = (adds_up_to_an_even_number,), (1, 40, 3, 5e-3)
    task = dataclasses.replace(tiny, checks=checks, settings=TINY_SETTINGS._replace(rejection=rejection))
    asked = task.rows().dev["prompt"][:]

    def passed(law):
        return np.mean(
            adds_up_to_an_even_number(asked, [answer.text for answer in training.answers(task, law, asked, 3)])
        )

    start, first = (arms.law_of(task, name, 11, tmp_path) for name in ("SFT", "SFT, first of 8 that passes"))
    assert 0.2 < passed(start) < 0.8
    assert passed(first) > 0.95  # of 8 answers none passes in one case in hundred and more
    assert training.made(first.path)["steps"] == 0  # nobody was taught

    learned = arms.law_of(task, "rejection sampling", 11, tmp_path)
    own = training.answers(task, start, task.rows().unanswered[:40], 20_000)
    of_those = adds_up_to_an_even_number(own, [answer.text for answer in own])
    assert training.made(learned.path)["num_passed"] == [
        sum(ok and bool(answer.text) for ok, answer in zip(of_those, own, strict=True))
    ]
    after = arms.law_of(task, "rejection, one of 8", 11, tmp_path)
    assert learned.path.name in training.made(after.path)["needs"]
    assert training.load(task, after.path).distinguisher.check_names == ("adds_up_to_an_even_number",)
