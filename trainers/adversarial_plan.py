"""What comes when in an adversarial run: its phases, their learning rates, and when an "auto" warm-up is over."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from hf_imitate.plateau import Plateau
from hf_imitate.trainers.adversarial_heldout import MOST_TO_STOP_BY
from hf_imitate.trainers.adversarial_setup import scheduled_rates, set_learning_rates, show_total
from hf_imitate.trainers.phases import DISTINGUISHER_LM_WARMUP, DISTINGUISHER_WARMUP, GAME, IMITATOR_WARMUP

READING_EVERY = 10  # steps between two readings of a warm-up on held-out rows


class AdversarialPlan:
    """The half of [`AdversarialTrainer`] that orders its steps; see there for the algorithm."""

    _entered_phase: str | None
    _phase_schedule: LambdaLR | None
    _last_fitted: int

    @property
    def phase(self) -> str:
        """The phase of the step now under way."""
        return self.phases.name(self.state.global_step)

    @property
    def meets_humans(self) -> bool:
        """Whether the distinguisher learns and nobody is paid: each row of a batch then asks a question of its own."""
        return self.phase == DISTINGUISHER_WARMUP or self.args.freeze_imitator

    def set_initial_training_values(self, args, dataloader):
        """`max_steps` and `num_train_epochs` count the game; the loop runs the warm-ups before it."""
        _, per_epoch, num_examples, _, batch_size, steps_in_epoch, game = super().set_initial_training_values(
            args, dataloader
        )
        self.phases.game, self._steps_per_pass = game, per_epoch
        self._last_fitted = -1  # a run that was interrupted in the middle of a step does it again
        if not self.bodies.learners:
            self.phases.distinguisher_lm_warmup = 0  # also where an earlier `train()` has fitted them
        total = self.phases.total
        return -(-total // per_epoch), per_epoch, num_examples, total * batch_size, batch_size, steps_in_epoch, total

    def _get_train_sampler(self, dataset=None):
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in transformers; a frozen imitator's holds nothing of the imitator."""
        if not self.args.freeze_imitator:
            return super().create_optimizer(model)
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD([self._stand_in], lr=self.args.learning_rate)
            # Several processes would synchronise gradients, of which there are none.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The user's schedule over the steps of the game, inside the schedule of the phases."""
        game = super().create_scheduler(self.phases.game or num_training_steps, optimizer)
        if game is self._phase_schedule:
            return game  # of an earlier `train()`, around a schedule the user gave
        if not isinstance(game, LambdaLR):
            raise ValueError(
                f"The schedule is a {type(game).__name__}; the phases need one that is a function of the step. Leave "
                "it out of `optimizers` and set `lr_scheduler_type`."
            )
        self._game_schedule = game.lr_lambdas[0]
        warmup = self.args.imitator_warmup_learning_rate / max(game.base_lrs)
        moves = 0.0 if self.args.freeze_imitator else 1.0
        self.lr_scheduler = self._phase_schedule = LambdaLR(
            game.optimizer, lambda step: moves * self.phases.learning_rate_factor(step, warmup, self._game_schedule)
        )
        return self.lr_scheduler

    def _enter_phase(self) -> None:
        """At a step's start: end an "auto" warm-up that stopped helping, and open the phase that has begun."""
        step = self.state.global_step
        if step != self._last_reading and self._is_reading_due(step):
            self._last_reading = step
            value = self._read()
            if math.isfinite(value) and self._is_auto():  # NaN: no held-out pair was met yet
                self._plateau.update(value)
            if self._plateau.is_reached:
                self.phases.end(step)
                self.state.max_steps = self.phases.total
                show_total(self.callback_handler.callbacks, self.phases.total)
        if self.phase == self._entered_phase:
            return
        left, self._entered_phase = self._entered_phase, self.phase
        self._buffered_inputs, self._plateau = None, Plateau()
        set_learning_rates(self.lr_scheduler, scheduled_rates(self.lr_scheduler, step))
        if self.phase in (DISTINGUISHER_WARMUP, GAME):
            self.bodies.release()
        if self.phase == GAME:
            self.likelihood.open_budget(self.model)
            self.game.audit_surface()
            if left == DISTINGUISHER_WARMUP and not self.args.freeze_imitator:
                if self.args.distinguisher_warmup_steps == "auto":
                    self.game.heldout.restore()
                for name, value in self.game.ask_for_a_signal().metrics().items():
                    self._record(name, value, 1)
            if not self.args.freeze_imitator:
                self.game.heldout.forget()

    def keep_the_best(self) -> None:
        """At the end of a run with a frozen imitator: the distinguisher's best weights, and what they are worth."""
        self.game.heldout.restore()
        signal = self.game.ask_for_a_signal()
        if signal.num:
            self.log(signal.metrics())

    def _read(self) -> float:
        """What should fall, on held-out rows: nats of whoever learns by likelihood, else the distinguisher's loss."""
        if self.phase == IMITATOR_WARMUP:
            return self.likelihood.heldout_nats(self.model, self.game.heldout.stopping[:MOST_TO_STOP_BY])
        if self.phase == DISTINGUISHER_LM_WARMUP:
            return self.bodies.heldout_nats()
        return self.game.heldout.reading(keep=True).loss

    def _is_auto(self) -> bool:
        """Whether the phase under way ends when it stops helping."""
        return {
            IMITATOR_WARMUP: self.args.imitator_warmup_steps,
            DISTINGUISHER_LM_WARMUP: self.args.distinguisher_lm_warmup_steps,
            DISTINGUISHER_WARMUP: self.args.distinguisher_warmup_steps,
        }.get(self.phase) == "auto"

    def _is_reading_due(self, step: int) -> bool:
        number = self.phases.step_in_phase(step)
        # What a frozen imitator's distinguisher was at its best is kept to the end of the run.
        keeps = self.args.freeze_imitator and self.phase in (DISTINGUISHER_WARMUP, GAME)
        has_heldout = len(self.likelihood.rows.heldout) > 0
        return (self._is_auto() or keeps) and has_heldout and number > 0 and number % READING_EVERY == 0
