"""The configuration of a private strategy, and the properties that callbacks and statistics read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

from dp_accounting import DpEvent
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.journal.writer import PrivacyJournal
from lightning_dp.mechanism.clipping import Bounding, State
from lightning_dp.mechanism.denoising import Denoiser, DenoiserState
from lightning_dp.mechanism.noise import Noise
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.mechanism.sampling import PoissonBatchSampler
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.training import steering
from lightning_dp.training.accumulation import Accumulation
from lightning_dp.training.books import Books
from lightning_dp.training.checks.model import check_model
from lightning_dp.training.checks.self_check import Examiner
from lightning_dp.training.compiled import Originals
from lightning_dp.training.half_precision import HalfPrecision
from lightning_dp.training.independence.findings import Findings
from lightning_dp.training.independence.shadow import kept_by_metrics
from lightning_dp.training.loader import PoissonDataLoader
from lightning_dp.training.manual.steps import ManualSteps
from lightning_dp.training.micro_batches import MicroBatches
from lightning_dp.training.options import check_names, privacy_options
from lightning_dp.training.processes import OneProcess
from lightning_dp.training.release import Releases
from lightning_dp.training.statement import public_configuration

if TYPE_CHECKING:
    from lightning_dp.training.strategy import PrivateMixin


class Budget(Protocol):
    """The methods of a budget that a strategy calls: before training, and before every release."""

    def choose_noise(self, trainer: Trainer, strategy: PrivateMixin) -> None:
        """Sets ``strategy.noise_multiplier`` for the steps that the Trainer plans, if the noise has none."""

    def step_limit(self, ledger: PrivacyLedger, event: DpEvent) -> int:
        """The most releases that the ledger may hold, if all further ones are this event."""


class ConfiguredStrategy(OneProcess):
    """A strategy with a mechanism, options, and what belongs to one fit: books, releases, micro-batches, examiner."""

    def configure_privacy(
        self, clipping: Bounding | float, noise: Noise | float, denoiser: Denoiser | None = None, **options: Any
    ) -> None:
        """Checks and keeps the configuration; arguments as for `privacy_options`."""
        check_names(type(self).__name__, options)
        self.mechanism, self.options = privacy_options(clipping, noise, denoiser, **options)
        #: All that was charged so far: steps and statistics of this fit, of those that it resumes, and of earlier
        #: trainings of the module on the same records.
        self.ledger = PrivacyLedger()
        #: The noise multiplier in force: that of ``noise``, or the one that a budget chose.
        self.noise_multiplier = self.mechanism.noise.multiplier
        #: Chooses the noise and limits the steps; set by `PrivacyBudget`.
        self.budget: Budget | None = None
        #: The private step of the current fit; ``None`` before it is set up.
        self.private_step: PrivateStep | None = None
        self.randomness = Randomness(self.options.seed, self.mechanism.secure_rng)
        self.books, self.releases = Books(cast("PrivateMixin", self)), Releases(cast("PrivateMixin", self))
        self.micro_batches, self.examiner = (
            MicroBatches(cast("PrivateMixin", self)),
            Examiner(cast("PrivateMixin", self)),
        )
        self.manual = ManualSteps(cast("PrivateMixin", self), self._check_layers, kept_by_metrics)
        self.accumulation, self.originals, self.half_precision = Accumulation(), Originals(), HalfPrecision()
        self.logs: steering.Logs | None = None
        self.train_loader: PoissonDataLoader | None = None
        self._clipping_state: State = {}
        self._denoiser_state: DenoiserState = {}
        self._checked_fingerprint: tuple[Any, ...] = ()
        self._is_set_up = self._nonfinite_reported = False

    @property
    def seed(self) -> int | None:
        """The seed that the user gave: the guarantee holds only while it is secret. ``None``: a secret of 256 bits."""
        return self.randomness.seed

    @property
    def num_records(self) -> int:
        """N, the number of records in the train set. RuntimeError before the train loader has been set up."""
        return self._poisson().num_records

    @property
    def sampling_rate(self) -> float:
        """q, the probability with which each record joins each logical batch; of records with weights, the largest.
        RuntimeError as for `num_records`."""
        return self._poisson().sampling_rate

    @property
    def expected_batch_size(self) -> float:
        """The expected number of records of a batch, q·N without weights: what noisy sums are divided by."""
        return self._poisson().expected_size

    @property
    def findings(self) -> Findings | None:
        """The findings of the self-check; ``None`` before it has examined the training step."""
        return self.examiner.findings

    @property
    def journal(self) -> PrivacyJournal | None:
        """The journal of the current fit; ``None`` without one, and between fits."""
        return self.books.journal

    def public_configuration(self) -> dict[str, Any]:
        """The mechanism as plain data, for the privacy card: public, but for ``"independence"``; see
        `lightning_dp.training.statement`."""
        return public_configuration(cast("PrivateMixin", self))

    def release_sum(self, total: Callable[[], Tensor], noise_multiplier: float, what: str) -> Tensor:
        """A sum over all records of the train set, with Gaussian noise: see `Releases.release_sum`."""
        return self.releases.release_sum(total, noise_multiplier, what)

    def each_record(self) -> Iterator[Any]:
        """Every record of the train set by itself: a batch of one, as Lightning would bring it to the device."""
        return self.releases.each_record()

    def _poisson(self) -> PoissonBatchSampler:
        if self.train_loader is None:
            raise RuntimeError("The sampling rate is known once the Trainer has loaded the train dataloader.")
        return self.train_loader.poisson

    def step_limit(self, event: DpEvent) -> int:
        assert self.budget is not None
        return self.budget.step_limit(self.ledger, event)

    def public_state(self) -> dict[str, Any]:
        """The states of clipping rule and denoiser, for checkpoints: computed from noisy sums alone."""
        step = self.private_step
        return {
            "clipping": dict(step.clipping_state if step else self._clipping_state),
            "denoiser": dict(step.denoiser_state if step else self._denoiser_state),
        }

    def module_in_fit(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    def trainer_in_fit(self) -> Trainer:
        trainer: Trainer = self.module_in_fit().trainer
        return trainer

    def _check_layers(self, among: Collection[int]) -> None:
        check_model(self.module_in_fit(), self.options.engine, among)

    def warn_of_nonfinite(self, step: PrivateStep) -> None:
        """Warns, once a fit, of examples that contributed nothing because their gradient was not finite."""
        if not step.nonfinite_examples or self._nonfinite_reported:
            return
        self._nonfinite_reported = True
        warnings.warn(
            f"lightning_dp: {step.nonfinite_examples} examples of this step had a gradient that is not finite (NaN "
            "or infinity in a record, or an overflow). Such examples contribute nothing, and training goes on; "
            "strategy.private_step.nonfinite_examples counts them. Whether there are any is not private.",
            stacklevel=3,
        )
