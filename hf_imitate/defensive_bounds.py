"""MATH: log p from both sides, to a chosen factor and confidence, by weights that cannot be large. Nats."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_imitate.bounds import Interval


class RelativeEstimate(NamedTuple):
    """What a stopping rule knows so far."""

    is_finished: bool
    log_prob: float | None  # nats; None until finished
    interval: Interval  # of log p, nats; (-inf, 0), which says nothing, until finished
    num_draws: int  # weights used


def defensive_log_weights(
    log_p_thought: ArrayLike, log_p_answer: ArrayLike, log_q_thought: ArrayLike, prior_share: float
) -> np.ndarray:
    """Log weights of thoughts drawn from a mixture: with probability `prior_share` from p, else from the retrodictor.

        w = p(thought) p(answer | thought) / (a p(thought) + (1 - a) q(thought))  <=  sup p(answer | thought) / a

    The denominator is the density of the whole *mixture*, whichever part drew the thought. Each draw chooses its part
    independently; fixed counts per part (stratification) need the realised share and are not for [`StoppingRule`].

    Args:
        log_p_thought: log p(thought | question), nats. [K].
        log_p_answer: log p(answer | question, thought). [K].
        log_q_thought: log q(thought | question, answer), of every thought, also those that p drew; -inf is 0. [K].
        prior_share: a, in (0, 1].

    Returns:
        Nats. [K].
    """
    if not 0 < prior_share <= 1:
        raise ValueError(
            f"`prior_share` must lie in (0, 1]; got {prior_share}. Without the prior, weights are unbounded."
        )
    log_p, log_q = np.asarray(log_p_thought, dtype=np.float64), np.asarray(log_q_thought, dtype=np.float64)
    share_of_q = math.log1p(-prior_share) if prior_share < 1 else -math.inf
    return log_p + np.asarray(log_p_answer) - np.logaddexp(math.log(prior_share) + log_p, share_of_q + log_q)


class StoppingRule:
    """Draw weights until p is known to a factor 1 + epsilon with probability 1 - delta, whatever their law (T5).

        draw until  sum w / B >= Y,   Y = 1 + (1 + e) 4 (exp(1) - 2) log(2 / delta) / e^2,  e = epsilon / (1 + epsilon)
        estimate    B Y / N           with     p / (1 + epsilon)  <=  estimate  <=  (1 + epsilon) p

    Assumes independent draws of one law with E w = p and **0 <= w <= B proved in advance**; a maximum over draws
    proves nothing. For [`defensive_log_weights`] B = c / prior_share, where c >= sup p(answer | thought) over all
    thoughts; c = 1 always holds. Draws are used in order and none is left out. About Y B / p draws are needed:
    practical for answers of probability above about 1e-3.

    The rule is in *factor* form, like an approximate model counter's; the usual form |estimate - p| <= e p is run at
    e = epsilon / (1 + epsilon), which implies it.

    ```python
    rule = StoppingRule(log_largest_weight=-math.log(0.2), epsilon=0.2, confidence=0.95, max_draws=100_000)
    while rule.wants_more():
        rule.add(draw_log_weights(64))
    rule.result()
    ```

    Args:
        log_largest_weight: log B, nats.
        epsilon: positive.
        confidence: 1 - delta.
        max_draws: give up after this many. Giving up is honest: the result then says nothing about p.

    Source:
        Dagum, Karp, Luby and Ross, "An Optimal Algorithm for Monte Carlo Estimation", SIAM J. Comput. 29 (2000).
    """

    def __init__(
        self, log_largest_weight: float, epsilon: float = 0.2, confidence: float = 0.95, max_draws: int = 100_000
    ) -> None:
        if not epsilon > 0 or not 0 < confidence < 1 or max_draws < 1 or not math.isfinite(log_largest_weight):
            raise ValueError(
                "Need `epsilon` > 0, 0 < `confidence` < 1, `max_draws` >= 1 and a finite `log_largest_weight`; got "
                f"{epsilon}, {confidence}, {max_draws}, {log_largest_weight}."
            )
        relative = epsilon / (1 + epsilon)
        self.log_largest_weight = log_largest_weight
        self.epsilon = epsilon
        self.max_draws = max_draws
        self.threshold = 1 + (1 + relative) * 4 * (math.e - 2) * math.log(2 / (1 - confidence)) / relative**2
        self._sum = 0.0
        self._num_draws = 0
        self._is_finished = False

    def expected_draws(self, log_prob: float) -> float:
        """About how many draws it takes if log p is this, nats."""
        return self.threshold * math.exp(self.log_largest_weight - log_prob)

    def wants_more(self) -> bool:
        """Whether more weights are wanted: neither finished nor at `max_draws`."""
        return not self._is_finished and self._num_draws < self.max_draws

    def add(self, log_weights: ArrayLike) -> bool:
        """Take weights in the order drawn, nats, -inf for 0; those after the stop are left. Returns whether finished.

        Raises:
            ValueError: a weight is NaN or above the proved largest, so the interval would be wrong.
        """
        log_w = np.atleast_1d(np.asarray(log_weights, dtype=np.float64))
        # Rounding in fp32 sums may pass the bound by a hair.
        if not (log_w <= self.log_largest_weight + 1e-4).all():
            raise ValueError(
                f"A weight is NaN or above exp({self.log_largest_weight:.6g}), the largest that was declared. Declare "
                "a proved bound (c = 1 always holds: `log_largest_weight=-log(prior_share)`) and start again."
            )
        if not self.wants_more():
            return self._is_finished
        log_w = log_w[: self.max_draws - self._num_draws]
        running = self._sum + np.cumsum(np.exp(np.minimum(log_w - self.log_largest_weight, 0.0)))
        is_over = running >= self.threshold
        self._is_finished = bool(is_over.any())
        num_used = int(is_over.argmax()) + 1 if self._is_finished else len(log_w)
        if num_used:
            self._sum = float(running[num_used - 1])
            self._num_draws += num_used
        return self._is_finished

    def result(self) -> RelativeEstimate:
        """What is known now; before the stop, and for ever after `max_draws` without one, that is nothing."""
        if not self._is_finished:
            return RelativeEstimate(False, None, Interval(-math.inf, 0.0), self._num_draws)
        log_prob = self.log_largest_weight + math.log(self.threshold / self._num_draws)
        # From |estimate - p| <= e p with e = epsilon / (1 + epsilon); the upper end is that of the factor form.
        low = log_prob - math.log1p(self.epsilon / (1 + self.epsilon))
        high = min(log_prob + math.log1p(self.epsilon), 0.0)
        return RelativeEstimate(True, log_prob, Interval(low, high), self._num_draws)
