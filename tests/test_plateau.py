from hf_imitate.plateau import Plateau


def readings(plateau, values):
    return [(plateau.update(value), plateau.is_reached) for value in values]


def test_it_is_reached_after_patience_readings_in_a_row_without_improvement():
    assert readings(Plateau(patience=2), [3.0, 2.0, 2.5, 1.0, 1.0, 1.5]) == [
        (True, False),
        (True, False),
        (False, False),
        (True, False),
        (False, False),
        (False, True),
    ]


def test_a_gain_smaller_than_the_least_one_does_not_count():
    plateau = Plateau(patience=1, min_delta=0.1)

    assert readings(plateau, [1.0, 0.95]) == [(True, False), (False, True)]
    assert plateau.best == 1.0
    assert plateau.update(0.85)


def test_no_number_is_no_improvement():
    plateau = Plateau(patience=1)

    assert not plateau.update(float("nan"))
    assert plateau.is_reached
    assert plateau.update(1.0)
