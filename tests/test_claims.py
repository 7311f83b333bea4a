"""The claims about imitators, each by its example's small form."""

import pytest

from examples import absolute_sense, equal_scores, nothing_sees_it, realizable

JUDGES = ("surface", "ngram", "likelihood")


@pytest.fixture
def run(tmp_path, capsys):
    """Run an example's small form; its report or reports, what it printed, and its figure."""

    def run_example(example, seed=0):
        name = example.__name__.rpartition(".")[2]
        found = example.main(["--smoke", "--output_dir", str(tmp_path), "--seed", str(seed)])
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        return found, capsys.readouterr().out

    return run_example


def test_an_imitator_that_fails_is_exposed_in_an_absolute_sense(run):
    report, printed = run(absolute_sense)
    human, imitator = (report[f"check_pass/solved/{side}"] for side in ("human", "imitator"))
    assert human.value == 1.0
    assert imitator.interval[1] < human.interval[0]
    lower, upper = report["check_tv_lower/solved"], report["hidden_deviation"]
    assert lower.certified
    assert upper.certified
    exact = float(printed.split("log-probabilities: ")[1].split()[0])
    assert 0 < lower.value <= exact <= upper.value
    assert report["consistency"].value == 0


def test_whoever_can_be_imitated_gets_nearer_to_chance_by_training(run):
    """The small form trains little; the full one goes down to chance."""
    reports, _ = run(realizable)
    before, after = (
        [reports[time][f"paired_accuracy/{judge}"].value for judge in JUDGES] for time in ("before", "after")
    )
    assert min(before) >= 0.7
    assert max(after) < min(before)
    assert reports["after"]["bits_per_answer"].interval[1] < reports["before"]["bits_per_answer"].interval[0]


def test_equal_scores_hide_which_imitator_is_bad_and_absolute_findings_tell(run):
    reports, _ = run(equal_scores)
    good, bad = reports.values()
    exact = equal_scores.answer_bits(equal_scores.step_loss(equal_scores.CARELESS))
    for report in (good, bad):
        low, high = report["bits_per_answer"].interval
        assert low < exact < high
    check = "check_pass/keeps_to_the_followers"
    assert good["check_tv_lower/keeps_to_the_followers"].value == 0
    assert bad["check_tv_lower/keeps_to_the_followers"].value > 0.1
    assert bad[f"{check}/human"].value == 1.0
    assert bad["calibration_gap"].interval[1] < 0
    assert bad["tv_lower/likelihood"].value > 0
    assert all(good[f"tv_lower/{judge}"].value == 0 for judge in JUDGES)


def test_the_perfect_imitators_score_is_its_humans_entropy():
    """That makes the scores equal: the careless humans' entropy is what carelessness costs beside careful ones."""
    share = equal_scores.CARELESS
    followers, words = equal_scores.NUM_FOLLOWERS, len(equal_scores.WORDS)
    law = [(1 - share) / followers + share / words] * followers + [share / words] * (words - followers)
    assert sum(law) == pytest.approx(1)
    assert equal_scores.step_entropy(share) == pytest.approx(-sum(p * equal_scores.math.log(p) for p in law))
    assert equal_scores.step_loss(share) == pytest.approx(-equal_scores.math.log(law[0]))
    assert equal_scores.step_entropy(0.0) == pytest.approx(equal_scores.math.log(followers))


def test_fresh_coins_of_a_message_are_seen_by_nothing_but_re_execution(run):
    reports, printed = run(nothing_sees_it)
    honest, hiding = reports["honest"], reports["hiding"]
    for judge in JUDGES:
        assert hiding[f"tv_lower/{judge}"].value == 0
        assert hiding.ledger["judges"][judge]["p_holm"] > 0.01
    assert abs(hiding["bits_per_answer_difference"].value) < 1e-6
    assert hiding["bits_per_answer"].value == pytest.approx(honest["bits_per_answer"].value)
    low, high = hiding["calibration_gap"].interval
    assert low < 0 < high
    assert hiding["sampler_conformance"].value > 0.01
    assert honest["sampler_match"].value == 1.0
    assert hiding["sampler_match"].value < 0.5
    share_read = float(printed.split("With the key, ")[1].split("%")[0])
    assert share_read > 50  # short answers have no room for all 16 bits
