"""The distinguisher's side of an adversarial run: score a generation batch, pay the imitator, learn from it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import Tensor

from hf_imitate.checks import Check, check_name
from hf_imitate.contest import Round, Scores, merged, run_checks, score_then_update
from hf_imitate.guards import Guard, Memory
from hf_imitate.human_rows import ROW_COLUMN, HumanRows, render_humans
from hf_imitate.losses import imitator_reward, paired_wins, penalize_truncated
from hf_imitate.pairs import Learner, Pair
from hf_imitate.rendering import Renderer
from hf_imitate.replay import Entry, ReplayBuffer, entries_from_json, entries_to_json
from hf_imitate.surface import MIN_ANSWERS, audit_surface
from hf_imitate.trainers.adversarial_config import AdversarialConfig
from hf_imitate.trainers.adversarial_heldout import NO_SIGNAL, Heldout, Signal
from hf_imitate.trainers.adversarial_rewards import check_scores
from hf_imitate.trainers.phases import DISTINGUISHER_WARMUP, GAME

logger = logging.getLogger(__name__)

NUM_SURFACE_PAIRS = 200


class Game:
    """Pays the imitator, and trains the distinguisher after the pay is fixed.

    Args:
        args ([`AdversarialConfig`]): settings.
        learner ([`Learner`]): the distinguisher and its optimizer.
        checks (`Sequence[Callable]`): what the distinguisher can verify.
        renderer ([`Renderer`]): reads the imitator's answers.
        human_rows ([`HumanRows`]): the humans' answers, some held out.
        prompts (`Sequence`): the questions, by row.
        accelerator ([`~accelerate.Accelerator`]): knows the processes.
        record (`Callable`): takes a metric's name, sum and count.
    """

    def __init__(
        self,
        args: AdversarialConfig,
        learner: Learner,
        checks: Sequence[Check],
        renderer: Renderer,
        human_rows: HumanRows,
        prompts: Sequence[str | list],
        accelerator: Accelerator,
        record: Callable[[str, float, float], None],
    ):
        self.args, self.learner, self.checks, self.renderer = args, learner, checks, renderer
        self.human_rows, self.prompts = human_rows, prompts
        self.accelerator, self.record = accelerator, record
        self.guard = Guard()
        self.memory = Memory(len(human_rows.train), len(human_rows.heldout))
        self.replay = ReplayBuffer(seed=args.seed)  # the same on all processes
        self.heldout = Heldout(human_rows, prompts, learner, accelerator, record)
        self.surface_entries: list[Entry] | None = []  # None once they were looked at
        self.pause: str | None = None
        self.paused_since: int | None = None

    def score_and_learn(
        self,
        rewards: Tensor,
        batch: Round,
        completion_ids: list[list[int]],
        *,
        num_generations: int,
        phase: str | None,
        step: int,
        lr_scale: float,
    ) -> Tensor:
        """Fill in the distinguisher's column of the rewards, and let the distinguisher learn.

        Args:
            rewards: gathered rewards of the user's functions; column 0 is the distinguisher's. [N, F] over all
                processes, a question's generations in a row.
            batch: this process's share, from `round`.
            completion_ids: of its answers.
            phase: "distinguisher_warmup" or "game"; `None` only scores.
            step: number of the generation batch's first micro-step; draws depend on it alone.
            lr_scale: share of the distinguisher's learning rate.

        Returns:
            Rewards, [N, F]; NaN rows have left their group.
        """
        scores = score_then_update(
            self.learner, batch, max_rows=self.learner.max_rows, **self._lesson(batch, phase, step, lr_scale)
        )
        cut = torch.tensor([not answer.ended for answer in batch.answers], device=rewards.device)
        s_imitator, s_human, cut = (
            gather(values).view(-1, num_generations) for values in (scores.imitator, scores.human, cut)
        )
        has_human = gather(torch.tensor([human is not None for human in batch.humans], device=rewards.device))
        check_scores(s_imitator, s_human, has_human.view_as(cut))
        kind = self.args.truncated_answers
        paid = imitator_reward(self.args.imitator_reward, s_imitator, s_human, cut, kind)
        if kind == "penalty":
            rewards = torch.stack([penalize_truncated(r.view_as(cut), cut).flatten() for r in rewards.T], dim=1)
        rewards[:, 0] = paid.flatten().to(rewards.dtype)
        if kind == "drop":
            # All-NaN is TRL's mark of an answer outside its group: no baseline counts it, and its advantage is 0.
            rewards[cut.flatten()] = torch.nan
        self._record(batch, scores, s_imitator, s_human, completion_ids)
        if phase is not None:
            self._remember(batch, completion_ids, phase)
        self._watch(phase, s_imitator, s_human, cut, paid, batch)
        return rewards

    def round(
        self, rows: list[dict[str, Any]], prompts: list, completion_ids: list[list[int]], is_train: bool
    ) -> Round:
        """This process's answers beside the humans', and what the checks say of both; no process waits for another.

        Raises:
            RuntimeError, TypeError, ValueError: as [`~hf_imitate.checks.check_outcomes`].
        """
        if is_train:
            questions = [int(row[ROW_COLUMN]) for row in rows]
            humans = [self.human_rows.rows.get(question) for question in questions]
            heldout = [question in self.human_rows.is_heldout for question in questions]
        else:
            known = [i for i, row in enumerate(rows) if row["completion"] is not None]
            weights = [rows[i].get("weight") for i in known]
            answered = render_humans(
                self.renderer, [prompts[i] for i in known], [rows[i]["completion"] for i in known], weights
            )
            by_row = dict(zip(known, answered, strict=True))
            humans = [by_row.get(i) for i in range(len(rows))]
            starts = [i == 0 or rows[i] != rows[i - 1] for i in range(len(rows))]
            questions, heldout = list(accumulate(starts)), [False] * len(rows)
        answers = [self.renderer.read(ids) for ids in completion_ids]
        outcomes, human_outcomes = run_checks(
            self.checks, rows, prompts, answers, humans, completion_ids, self.renderer
        )
        return Round(questions, heldout, prompts, answers, humans, outcomes, human_outcomes)

    def _lesson(self, batch: Round, phase: str | None, step: int, lr_scale: float) -> dict[str, Any]:
        """Which rows the distinguisher learns from, and which old pairs beside them."""
        if phase is None:
            return {}
        first = self.accelerator.process_index * len(batch.questions)
        # Before the game each row asks its own question; in it, a question's first generations are as good as any.
        is_paid = phase == GAME and not self.args.freeze_imitator
        most = self.args.distinguisher_generations if is_paid else self.args.num_generations
        learn_from = [
            i
            for i, human in enumerate(batch.humans)
            if human and not batch.heldout[i] and (first + i) % self.args.num_generations < most
        ]
        ratio = self.args.replay_ratio
        num_new = gather(torch.tensor([len(learn_from)], device=self.accelerator.device)).sum().item()
        num_old = round(num_new * ratio / (1 - ratio))
        # By batches, not by micro-steps: however a step is split, it draws the same.
        number = step // self.args.steps_per_generation * self.args.distinguisher_steps
        # Half as many answers to an old question as to a new one: at a ratio of 0.5, twice as many old questions.
        together = max(1, most // 2)
        replayed = [self._old_pairs(num_old, number + k, together) for k in range(self.args.distinguisher_steps)]
        return {"learn_from": learn_from, "replayed": replayed, "lr_scale": lr_scale}

    def _old_pairs(self, size: int, number: int, together: int) -> list[Pair]:
        """This process's share of `size` old comparisons, those of one human answer as one pair."""
        drawn = self.replay.draw(size, number, together)
        mine = drawn[self.accelerator.process_index :: self.accelerator.num_processes]
        return merged([entry.pair(self.prompts, self.human_rows) for entry in mine])

    def _remember(self, batch: Round, completion_ids: list[list[int]], phase: str) -> None:
        if phase == DISTINGUISHER_WARMUP or self.args.freeze_imitator:
            for i, human in enumerate(batch.humans):
                if human is not None and batch.heldout[i]:
                    outcomes = (tuple(side[i].tolist()) for side in (batch.human_outcomes, batch.outcomes))
                    self.heldout.add(Entry(batch.questions[i], batch.answers[i], *outcomes))
        last = None
        for entry in self._everyones_entries(batch, completion_ids):
            if self.surface_entries is not None and entry.row != last:
                self.surface_entries.append(entry)
            last = entry.row
            self.replay.add(entry)
        if len(self.surface_entries or ()) >= NUM_SURFACE_PAIRS:
            self.audit_surface()

    def _everyones_entries(self, batch: Round, completion_ids: list[list[int]]) -> Iterator[Entry]:
        """What may be learned from again, of all processes in their order, whatever their number."""
        device, longest = self.accelerator.device, self.args.max_completion_length
        may = [human is not None and not held for human, held in zip(batch.humans, batch.heldout, strict=True)]
        known = zip(may, batch.questions, completion_ids, strict=True)
        told = [[int(is_known), row, len(ids), *ids, *[0] * (longest - len(ids))] for is_known, row, ids in known]
        outcomes = gather(torch.stack([batch.human_outcomes, batch.outcomes], dim=1).to(device)).tolist()
        everyones = zip(gather(torch.tensor(told, device=device)).tolist(), outcomes, strict=True)
        for (is_known, row, length, *ids), checks in everyones:
            if is_known:
                yield Entry(row, self.renderer.read(ids[:length]), *map(tuple, checks))

    def audit_surface(self) -> None:
        """Look once, on format alone, for what would give the game away; with too few answers, later."""
        entries = self.surface_entries
        if entries is None or len(entries) < MIN_ANSWERS:
            return
        self.surface_entries = None
        humans = [self.human_rows.rows[entry.row].answer for entry in entries]
        leak = audit_surface(humans, [entry.answer for entry in entries])
        self.record("surface/auc", leak.auc, 1)
        if not self.accelerator.is_main_process:
            return
        logger.info(leak.describe())
        if leak.leaks_of_kind("format"):
            logger.warning(
                "%s The distinguisher will find differences in format before anything else. Clean them out of the "
                "data; what the imitator has only not learned yet, a longer warm-up teaches it.",
                leak.describe(),
            )

    def draw_questions(self, number: int, size: int) -> list[int]:
        """Row numbers for the `number`-th batch of the distinguisher's warm-up on this process; every eighth is of a
        held-out row."""
        number = number * self.accelerator.num_processes + self.accelerator.process_index
        first, stop = (number * size // 8, (number + 1) * size // 8) if len(self.human_rows.heldout) else (0, 0)
        heldout = [row for k in range(first, stop) for row in self.human_rows.draw(k, 1, stream=1, heldout=True)]
        return [*self.human_rows.draw(number, size, stream=1)[: size - len(heldout)], *heldout]

    def ask_for_a_signal(self) -> Signal:
        """After its warm-up: a distinguisher that cannot tell pairs apart has nothing to teach, and that is said."""
        signal = self.heldout.signal()
        if self.accelerator.is_main_process:
            if signal.upper < NO_SIGNAL:
                logger.warning(signal.describe(self.args.freeze_imitator))
            elif signal.num > 0 and signal.accuracy < NO_SIGNAL:
                logger.warning(signal.describe_doubt())
            elif signal.num:
                logger.info(
                    "On %d held-out questions the distinguisher prefers the human's answer in %.0f %%.",
                    signal.num,
                    100 * signal.accuracy,
                )
        return signal

    def state(self) -> dict[str, Any]:
        """JSON-ready state, without a word of the rows."""
        surface = self.surface_entries
        return {
            "guard": self.guard.state(),
            "memory": self.memory.state(),
            "pause": self.pause,
            "paused_since": self.paused_since,
            "replay": self.replay.state(),
            "heldout": self.heldout.state(),
            "surface": None if surface is None else entries_to_json(surface),
        }

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take up what `state` wrote; `tensors` are those of `heldout`."""
        self.guard, self.pause, self.paused_since = Guard(**state["guard"]), state["pause"], state["paused_since"]
        self.memory = Memory(**state["memory"])
        self.replay.load_state(state["replay"])
        self.heldout.load_state(state["heldout"], tensors)
        surface = state["surface"]
        self.surface_entries = None if surface is None else entries_from_json(surface)

    def _watch(self, phase, s_imitator, s_human, cut, paid, batch: Round) -> None:
        if phase is None:
            return  # an evaluation in the middle of a pause does not end it
        self._watch_memory(s_imitator, s_human, batch)
        if self.args.freeze_imitator:
            return  # nobody plays, so nothing can go wrong with the game
        if phase == DISTINGUISHER_WARMUP:
            # The warm-up asks answered questions only; answers to the others may be longer.
            asks_all = not self.args.allow_unlabelled
            self.guard.note_start(cut.float().mean().item(), cut.numel(), asks_all)
            return
        known = ~torch.isnan(s_human)
        accuracy = paired_wins(s_human[known], s_imitator[known]).mean().item() if known.any() else None
        spread = paid.nan_to_num().std(dim=1).mean().item()
        share_cut = gather(torch.tensor([self._human_cut(batch)], device=cut.device)).mean().item()
        self.pause = self.guard.update(accuracy, spread, cut.float().mean().item(), share_cut, num_answers=cut.numel())
        if self.pause and self.guard.is_news(self.pause) and self.accelerator.is_main_process:
            logger.warning(self.pause)

    def _watch_memory(self, s_imitator: Tensor, s_human: Tensor, batch: Round) -> None:
        wins, known = paired_wins(s_human, s_imitator), ~torch.isnan(s_human)
        seen = torch.tensor([batch.questions, batch.heldout], device=wins.device).T.contiguous()
        questions, heldout = (column.view_as(wins) for column in gather(seen).T)
        trained_on, others = known & (heldout == 0), known & (heldout == 1)
        accuracy, num = wins[trained_on].mean().item(), len(questions[trained_on].unique())
        warning = self.memory.update(accuracy, num, wins[others].mean().item(), len(questions[others].unique()))
        if warning and self.accelerator.is_main_process:
            logger.warning(warning)

    def _human_cut(self, batch: Round) -> float:
        cut = [not human.answer.ended for human in batch.humans if human]
        return sum(cut) / len(cut) if cut else self.human_rows.num_truncated / len(self.human_rows.rows)

    def _record(self, batch: Round, scores: Scores, s_imitator, s_human, completion_ids) -> None:
        """Metrics over all processes, from scores taken before the update."""
        device = s_imitator.device
        heldout = gather(torch.tensor(batch.heldout, device=device)).view_as(s_imitator)
        known = ~torch.isnan(s_human)
        wins = paired_wins(s_human, s_imitator)
        for name, rows in (("accuracy_fresh", known & ~heldout), ("accuracy_heldout", known & heldout)):
            self.record(f"distinguisher/{name}", wins[rows].sum().item(), rows.sum().item())
        self.record("distinguisher/margin", (s_human - s_imitator)[known].sum().item(), known.sum().item())
        loss = gather(torch.tensor([scores.loss], device=device))
        self.record("distinguisher/loss", loss.nansum().item(), (~loss.isnan()).sum().item())
        human_lengths = [len(human.rendered.answer_ids) if human else 0 for human in batch.humans]
        lengths = [len(ids) if human else 0 for ids, human in zip(completion_ids, batch.humans, strict=True)]
        cut = sum(not answer.ended for answer in batch.answers)
        sums = [sum(lengths), sum(human_lengths), cut, len(batch.answers)]
        lengths, human_lengths, cut, count = gather(torch.tensor([sums], device=device)).sum(dim=0).tolist()
        self.record("answers/length_ratio", lengths, human_lengths)
        self.record("answers/truncated", cut, count)
        if not self.checks:
            return
        for side, outcomes in (("human", batch.human_outcomes), ("imitator", batch.outcomes)):
            applies = ~outcomes.isnan()
            passed = gather(((outcomes >= 0.5) & applies).sum(dim=0)[None].to(device)).sum(dim=0).tolist()
            judged = gather(applies.sum(dim=0)[None].to(device)).sum(dim=0).tolist()
            for check, hits, count in zip(self.checks, passed, judged, strict=True):
                self.record(f"checks/{check_name(check)}/{side}", hits, count)
        for name, weight in zip(
            self.learner.distinguisher.check_names, self.learner.distinguisher.check_weights.tolist(), strict=True
        ):
            self.record(f"checks/{name}/weight", weight, 1)
