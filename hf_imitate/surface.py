"""Format features of answers: length, end marker, whitespace, Unicode. The leak audit before training.

A distinguisher that can tell the sides apart by format alone teaches the imitator nothing about content, and what
tells them apart is then often an accident of the data's preparation: a lost end token, a leading space, other Unicode.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import mannwhitneyu
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hf_imitate.bounds import Interval, clopper_pearson
from hf_imitate.rendering import Answer

# In this order: of two features that separate equally well, the earlier one names the cause.
FEATURE_KINDS: dict[str, str] = {
    "ended": "format",  # 1 if the answer ended by itself
    "special_marker": "format",  # looks like <|im_end|>, </s>, [INST] or a think tag
    "carriage_returns": "format",
    "not_nfc": "format",
    "control_characters": "format",  # control, bidirectional and zero-width characters
    "replacement_characters": "format",  # U+FFFD: bytes that were no UTF-8
    "unusual_spaces": "format",  # no-break spaces, line separators and the like
    "leading_whitespace": "format",
    "trailing_whitespace": "format",
    "tabs": "format",
    "doubled_spaces": "format",
    "newlines": "style",  # inside the answer
    "non_ascii_share": "style",
    "first_is_upper": "style",
    "first_is_lower": "style",
    "first_is_digit": "style",
    "last_is_sentence_end": "style",
    "num_characters": "length",
    "num_words": "length",
}
FEATURE_NAMES: tuple[str, ...] = tuple(FEATURE_KINDS)

MIN_ANSWERS = 20  # per side: below, five folds hold out fewer than four answers of each side
_NUM_FOLDS = 5
_FALSE_ALARM = 0.01  # that any of the features is called a leak when none is
_SMALLEST_LEAK = 0.05  # in AUC: with many answers, differences too small to matter are significant too

_SPECIAL_MARKER = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?(?:think|thinking|answer|s|pad|eos|bos|unk|im_start|im_end|end_of_turn)>|\[/?INST\]"
    r"|<\uff5c[^\uff5c]{1,40}\uff5c>"
)
_SENTENCE_ENDS = frozenset(".!?:;\u2026\u3002\uff01\uff1f")


class SurfaceLeak(NamedTuple):
    """What format alone tells.

    Attributes:
        auc (`float`): probability that a logistic regression on the format features, tested on answers it was not
            fitted to, ranks a human's answer above an imitator's; 1/2 says that nothing was found.
        interval (`Interval`): two-sided 95 % for `auc`, approximate and on the wide side.
        leaking_feature (`str`): the feature that separates best on its own, whether or not it separates at all.
        feature_auc (`dict[str, float]`): AUC of each feature on its own; above 1/2, humans have more of it.
        num_pairs (`int`): answers on the smaller side.
        leaks (`tuple[str, ...]`): the features that really differ, worst first: significant together at 1 %, and
            an AUC further than 0.05 from 1/2.
        means (`dict[str, tuple[float, float]]`): mean of each feature over the human and the imitator answers.
    """

    auc: float
    interval: Interval
    leaking_feature: str
    feature_auc: dict[str, float]
    num_pairs: int
    leaks: tuple[str, ...]
    means: dict[str, tuple[float, float]]

    def leaks_of_kind(self, kind: str) -> tuple[str, ...]:
        """The leaks that are `"format"` (end, whitespace, Unicode: repair the data), `"style"` or `"length"`."""
        return tuple(name for name in self.leaks if FEATURE_KINDS[name] == kind)

    def describe(self) -> str:
        """One line for people, worst leak first; it holds no text of any answer."""
        found = [
            f"`{name}` ({FEATURE_KINDS[name]}; AUC {self.feature_auc[name]:.2f}, mean {self.means[name][0]:.3g} in "
            f"human and {self.means[name][1]:.3g} in imitator answers)"
            for name in self.leaks
        ]
        told = f"Format alone tells the sides apart with AUC {self.auc:.2f} ({self.num_pairs} pairs)"
        return f"{told}: {', '.join(found)}." if found else f"{told}; no single feature differs."


def surface_features(text: str, ended: bool) -> np.ndarray:
    """Describe the format of one answer, and nothing of what it says.

    Counts enter as log(1 + count). First and last characters, newlines and lengths are read without the surrounding
    whitespace, so that a stray space at an end moves one feature only.

    Args:
        text (`str`): the answer without any end marker.
        ended (`bool`): `True` if it ended by itself, `False` if it was cut at the length limit.

    Returns:
        `np.ndarray`, float64, one finite number per name in `FEATURE_NAMES`.
    """
    inner = text.strip()
    first, last = inner[:1], inner[-1:]
    is_plain = text.isascii() and text.isprintable()
    kinds = [] if is_plain else [_character_kind(character) for character in text]
    features = {
        "ended": float(ended),
        "special_marker": math.log1p(len(_SPECIAL_MARKER.findall(text))),
        "carriage_returns": math.log1p(text.count("\r")),
        "not_nfc": float(not unicodedata.is_normalized("NFC", text)),
        "control_characters": math.log1p(kinds.count("control")),
        "replacement_characters": math.log1p(text.count("\ufffd")),
        "unusual_spaces": math.log1p(kinds.count("space")),
        "leading_whitespace": math.log1p(len(text) - len(text.lstrip()) if inner else 0),
        "trailing_whitespace": math.log1p(len(text) - len(text.rstrip())),
        "tabs": math.log1p(inner.count("\t")),
        "doubled_spaces": math.log1p(len(re.findall(r"(?<=\S) {2,}(?=\S)", inner))),
        "newlines": math.log1p(inner.count("\n")),
        "non_ascii_share": sum(not c.isascii() for c in inner) / max(len(inner), 1),
        "first_is_upper": float(first.isupper()),
        "first_is_lower": float(first.islower()),
        "first_is_digit": float(first.isdigit()),
        "last_is_sentence_end": float(last in _SENTENCE_ENDS),
        "num_characters": math.log1p(len(inner)),
        "num_words": math.log1p(len(inner.split())),
    }
    return np.array([features[name] for name in FEATURE_NAMES])


def audit_surface(human: Sequence[Answer], imitator: Sequence[Answer], seed: int = 0) -> SurfaceLeak:
    """Ask whether format alone tells human from imitator answers, and which feature gives it away.

    A standardised logistic regression on the format features is cross-validated in five folds. The order of the
    answers does not matter. Nineteen coefficients cannot memorise answers, so repeated answers may stand in several
    folds.

    Args:
        human (`Sequence[Answer]`): human answers.
        imitator (`Sequence[Answer]`): imitator answers, best to the same questions.
        seed (`int`, *optional*, defaults to `0`): chooses the folds.

    Returns:
        [`SurfaceLeak`].

    Raises:
        ValueError: a side has fewer than 20 answers.

    Source:
        Mann and Whitney (1947) for the AUC of a single feature and its null law with ties; the interval is Clopper
        and Pearson's for as many independent pairs as the smaller side has answers.
    """
    sides = [np.array([surface_features(answer.text, answer.ended) for answer in side]) for side in (human, imitator)]
    num_pairs = min(len(sides[0]), len(sides[1]))
    if num_pairs < MIN_ANSWERS:
        raise ValueError(
            f"The surface audit got {len(sides[0])} human and {len(sides[1])} imitator answers and needs at least "
            f"{MIN_ANSWERS} of each. Bring more rows, or sample more answers."
        )
    # Sorted rows make every later step independent of the order in which the answers came.
    rows_human, rows_imitator = (side[np.lexsort(side.T[::-1])] for side in sides)
    rng = np.random.default_rng(seed)
    folds = np.concatenate([rng.permutation(np.arange(len(side)) % _NUM_FOLDS) for side in sides])
    rows = np.concatenate([rows_human, rows_imitator])
    is_human = np.repeat([1, 0], [len(rows_human), len(rows_imitator)])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    scores = cross_val_predict(classifier, rows, is_human, cv=PredefinedSplit(folds), method="decision_function")
    # Scores of different folds come from different fits: only those of one fold are compared.
    per_fold = [roc_auc_score(is_human[folds == k], scores[folds == k]) for k in range(_NUM_FOLDS)]
    auc = float(np.mean(per_fold))

    feature_auc, p_values = {}, {}
    for column, name in enumerate(FEATURE_NAMES):
        feature_auc[name], p_values[name] = _single_feature(rows_human[:, column], rows_imitator[:, column])
    by_deviation = sorted(FEATURE_NAMES, key=lambda name: -round(abs(feature_auc[name] - 0.5), 9))
    leaks = tuple(
        name
        for name in by_deviation
        if p_values[name] < _FALSE_ALARM / len(FEATURE_NAMES) and abs(feature_auc[name] - 0.5) > _SMALLEST_LEAK
    )
    means = {
        name: (float(rows_human[:, column].mean()), float(rows_imitator[:, column].mean()))
        for column, name in enumerate(FEATURE_NAMES)
    }
    interval = clopper_pearson(auc * num_pairs, num_pairs)
    return SurfaceLeak(auc, interval, by_deviation[0], feature_auc, num_pairs, leaks, means)


def _single_feature(human: np.ndarray, imitator: np.ndarray) -> tuple[float, float]:
    """AUC of one feature, ties 1/2, and the p-value of "no difference"; a constant feature tells nothing."""
    if human.min() == max(human.max(), imitator.max()) and human.min() == imitator.min():
        return 0.5, 1.0
    test = mannwhitneyu(human, imitator, method="asymptotic")
    return float(test.statistic) / (len(human) * len(imitator)), float(test.pvalue)


def _character_kind(character: str) -> str:
    """ "control", "space" (other than a blank), or "plain"; newline, return and tab have features of their own."""
    if character in "\n\r\t ":
        return "plain"
    category = unicodedata.category(character)
    if category in ("Cc", "Cf"):
        return "control"
    return "space" if category in ("Zs", "Zl", "Zp") else "plain"
