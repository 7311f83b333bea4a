"""Which rows belong together, and which groups make up a test set of a wanted size."""

from collections.abc import Hashable, Sequence


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
