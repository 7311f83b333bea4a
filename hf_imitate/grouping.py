"""Which rows belong together, and which groups make up a test set of a wanted size."""

import logging
import random
from collections.abc import Hashable, Sequence

logger = logging.getLogger(__name__)


def choose_test_rows(relations: Sequence[Sequence[Hashable]], test_size: float | int, seed: int) -> list[int]:
    """Choose rows for a test set so that no value of any relation stands on both sides.

    Args:
        relations (`Sequence[Sequence[Hashable]]`):
            At least one list of values, one value per row; `None` ties nothing.
        test_size (`float` or `int`):
            Share of the rows or their number; the nearest that whole groups reach is taken and a difference logged.
        seed (`int`):
            Chooses among the splits.

    Returns:
        `list[int]`: the test rows, ascending.

    Raises:
        TypeError: `test_size` is not a number.
        ValueError: `test_size` is impossible, or one group holds all rows.
    """
    num_rows = len(relations[0])
    num_wanted = wanted_rows(test_size, num_rows)
    groups = connected_rows(relations, num_rows)
    sizes = [len(group) for group in groups]
    if len(groups) == 1:
        raise ValueError(
            f"`dataset` cannot be split: all {num_rows} rows are tied to each other by equal questions"
            f"{' or equal `group_by` values' if len(relations) > 1 else ''}, and a split needs at least two groups. "
            "Use a finer `group_by` (or none), or bring rows with other questions."
        )
    order = random.Random(seed).sample(range(len(groups)), len(groups))
    rows = sorted(row for group in choose_nearest(order, sizes, num_wanted) for row in groups[group])
    if len(rows) != num_wanted:
        logger.warning(
            "split_by_question: %d test rows were asked for; the nearest that keeps groups whole is %d "
            "(%d rows in %d groups, the largest of %d rows).",
            *(num_wanted, len(rows), num_rows, len(groups), max(sizes)),
        )
    return rows


def connected_rows(relations: Sequence[Sequence[Hashable]], num_rows: int) -> list[list[int]]:
    """Group rows that are tied, directly or through others, by equal values (union-find).

    Args:
        relations (`Sequence[Sequence[Hashable]]`):
            One list of values per relation, one value per row; `None` ties nothing.
        num_rows (`int`):
            Rows in all.

    Returns:
        `list[list[int]]`: every row in one group; groups by first row, rows ascending.
    """
    parent = list(range(num_rows))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for values in relations:
        first_row: dict[Hashable, int] = {}
        for row, value in enumerate(values):
            if value is None:
                continue
            one, other = find(first_row.setdefault(value, row)), find(row)
            parent[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = {}
    for row in range(num_rows):
        groups.setdefault(find(row), []).append(row)
    return list(groups.values())


def choose_nearest(order: list[int], sizes: list[int], num_wanted: int) -> list[int]:
    """Choose groups whose rows sum as near to `num_wanted` as any choice can, with some rows left on both sides.

    Args:
        order (`list[int]`):
            Every group once, shuffled: the first groups that fit are taken, so the order decides among good choices.
        sizes (`list[int]`):
            Rows of each group; at least two groups.
        num_wanted (`int`):
            Rows wanted, from 1 to all but one.

    Returns:
        `list[int]`: the chosen groups.
    """
    chosen, num_left = [], num_wanted
    for group in order:
        if sizes[group] <= num_left:
            chosen.append(group)
            num_left -= sizes[group]
    return chosen if num_left == 0 else _choose_nearest_exactly(order, sizes, num_wanted)


def _choose_nearest_exactly(order: list[int], sizes: list[int], num_wanted: int) -> list[int]:
    """Subset sum by bit sets: bit s says that some choice holds s rows. Equal sizes are bundled in powers of two."""
    by_size: dict[int, list[int]] = {}
    for group in order:
        by_size.setdefault(sizes[group], []).append(group)
    bundles = []
    for groups in by_size.values():
        width = 1
        while groups:
            bundles.append(groups[:width])
            groups = groups[width:]
            width *= 2
    reachable = [1]
    for bundle in bundles:
        reachable.append(reachable[-1] | reachable[-1] << sum(sizes[group] for group in bundle))
    num_rows = sum(sizes)
    nearest = (s for gap in range(num_rows) for s in (num_wanted - gap, num_wanted + gap) if 0 < s < num_rows)
    rows_left = next(s for s in nearest if reachable[-1] >> s & 1)
    chosen = []
    for bundle, without in zip(reversed(bundles), reversed(reachable[:-1]), strict=True):
        if not without >> rows_left & 1:
            chosen += bundle
            rows_left -= sum(sizes[group] for group in bundle)
    return chosen


def wanted_rows(test_size: float | int, num_rows: int) -> int:
    """Turn a share or a number of rows into a number of rows that leaves both sides at least one.

    Raises:
        TypeError: `test_size` is not a number.
        ValueError: it leaves one side empty.
    """
    if isinstance(test_size, bool) or not isinstance(test_size, int | float):
        raise TypeError(
            f"`test_size` must be a share (float) or a number of rows (int); got {type(test_size).__name__}."
        )
    is_share = isinstance(test_size, float)
    is_in_range = 0 < test_size < (1 if is_share else num_rows)
    num_wanted = round(test_size * num_rows) if is_in_range and is_share else int(test_size) if is_in_range else 0
    if not 0 < num_wanted < num_rows:
        raise ValueError(
            f"`test_size` is {test_size}, of {num_rows} rows; both sides need at least one row. "
            f"Give a share between 0 and 1 that is at least one row, or a number from 1 to {num_rows - 1}."
        )
    return num_wanted
