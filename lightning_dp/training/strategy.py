"""The strategies that make a Trainer private: the only code that touches Lightning's training loop.

One Lightning batch is one logical batch is one private step, so that `global_step`, schedulers, `max_steps`,
`log_every_n_steps` and the progress bar count private steps.
"""

from __future__ import annotations

import math
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from dp_accounting import DpEvent, NeighboringRelation
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins import CheckpointIO, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import CheckpointError

from lightning_dp.accounting.cost import event_epsilon
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.errors import (
    ACTIVATION_CHECKPOINTING,
    FormChanged,
    PrivacyConfigurationError,
    PrivacyLimitReached,
    UnsupportedModelError,
)
from lightning_dp.gradients.engines import ENGINES
from lightning_dp.gradients.forms import form_changed_in
from lightning_dp.journal.files import relative_path
from lightning_dp.journal.writer import PrivacyJournal
from lightning_dp.mechanism.clipping import Bounding, FlatClipping, State
from lightning_dp.mechanism.denoising import Denoiser, DenoiserState
from lightning_dp.mechanism.noise import GaussianNoise, Noise
from lightning_dp.mechanism.randomness import Randomness
from lightning_dp.mechanism.sampling import PoissonBatchSampler
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.statistics.base import PrivateStatistic, unfilled
from lightning_dp.training import steering
from lightning_dp.training.batches import Layout, find_layout, take_rows
from lightning_dp.training.checks import configuration
from lightning_dp.training.checks import model as model_checks
from lightning_dp.training.checks.contributions import check_contributions
from lightning_dp.training.independence.collation import check_collation, check_copies_stay_together
from lightning_dp.training.independence.examination import Findings, examine
from lightning_dp.training.independence.exchange import check_exchange
from lightning_dp.training.independence.losses import PerRecordMeans
from lightning_dp.training.independence.shadow import random_state_kept
from lightning_dp.training.independence.shadow import seed_everything as seed_records
from lightning_dp.training.independence.subject import Subject, Understanding, choose_records, fresh, loss_of, reduced
from lightning_dp.training.independence.watch import Watch
from lightning_dp.training.loader import PoissonDataLoader, PoissonIterator, fingerprint, records_and_batch_size
from lightning_dp.training.run_directory import run_directory, software_versions
from lightning_dp.training.spent import (
    CHECKPOINT_KEY,
    DataMark,
    Spending,
    follow_checkpoints,
    note_spending,
    spent_by,
    statistics_of,
)

#: Records that are traced, and that are exchanged; at most so many rows, where each record has several.
_TRACED, _EXCHANGED, _EXAMINED_ROWS = 8, 18, 36


#: How often a step may turn out to run code that was not examined (LayerDrop skips other layers each time).
_ATTEMPTS = 8


class Budget(Protocol):
    """What a strategy asks before it spends."""

    def choose_noise(self, trainer: Trainer, strategy: PrivateMixin) -> None:
        """Sets ``strategy.noise_multiplier`` for the steps that the Trainer plans, if the noise has none."""

    def step_limit(self, ledger: PrivacyLedger, event: DpEvent) -> int:
        """The most steps that the ledger may hold if all further ones are this event."""


class PrivateMixin(Strategy):
    """What makes a Lightning strategy private; combined with one that knows devices and processes.

    It derives from `Strategy` so that the class of a strategy that already exists can be exchanged for one that
    includes it (see `make_private`).
    """

    #: Strategies that can be made private by `make_private`.
    supported: ClassVar[tuple[type[Strategy], ...]] = (SingleDeviceStrategy,)

    #: Whether a callback made this strategy private, rather than the user who built it.
    made_private = False

    def configure_privacy(
        self,
        clipping: Bounding,
        noise: Noise,
        max_physical_batch_size: int | None,
        engine: str,
        loss_reduction: str,
        self_check: bool,
        seed: int | None,
        journal: bool,
        denoiser: Denoiser | None = None,
        secure_rng: bool = False,
        augmentation_multiplicity: int = 1,
        per_record_means: bool = True,
    ) -> None:
        """Checks and keeps the configuration; arguments as for `PrivateStrategy`."""
        if not isinstance(clipping, Bounding):
            raise TypeError(f"clipping must be a clipping rule such as FlatClipping(1.0), got {clipping!r}.")
        if not isinstance(noise, Noise):
            raise TypeError(f"noise must be a noise such as GaussianNoise(1.0), got {noise!r}.")
        if denoiser is not None and not isinstance(denoiser, Denoiser):
            raise TypeError(f"denoiser must be one such as LowPassDenoiser(), or None, got {denoiser!r}.")
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}.")
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}.")
        if max_physical_batch_size is not None and max_physical_batch_size < 1:
            raise ValueError(f"max_physical_batch_size must be at least 1, got {max_physical_batch_size}.")
        if not isinstance(augmentation_multiplicity, int) or augmentation_multiplicity < 1:
            raise ValueError(
                f"augmentation_multiplicity must be a whole number, at least 1, got {augmentation_multiplicity!r}."
            )
        if max_physical_batch_size is not None and max_physical_batch_size < augmentation_multiplicity:
            raise ValueError(
                f"max_physical_batch_size={max_physical_batch_size} is less than augmentation_multiplicity="
                f"{augmentation_multiplicity}: all augmentations of a record pass through the model together."
            )
        self.clipping, self.noise, self.denoiser = clipping, noise, denoiser
        self.augmentation_multiplicity = augmentation_multiplicity
        self.max_physical_batch_size = max_physical_batch_size
        self.engine, self.loss_reduction, self.self_check = engine, loss_reduction, self_check
        self.per_record_means = per_record_means
        #: What examinations of the training step have found; ``None`` before the first.
        self.findings: Findings | None = None
        self._understanding = Understanding()
        self._subject: Subject | None = None
        self._layout: Layout | None = None
        self._logs: steering.Logs | None = None
        #: Every private step taken so far, in this fit and those that it resumes.
        self.ledger = PrivacyLedger()
        #: The noise multiplier in force: that of ``noise``, or the one that a budget chose.
        self.noise_multiplier = noise.multiplier
        #: Chooses the noise and limits the steps; set by `PrivacyBudget`.
        self.budget: Budget | None = None
        #: The private step of the current fit; ``None`` before it is set up.
        self.private_step: PrivateStep | None = None
        #: Whether steps are kept in a file before their results are used.
        self.keep_journal = journal
        #: The journal of the current fit; ``None`` without one, and between fits.
        self.journal: PrivacyJournal | None = None
        self._journal_reference: dict[str, str] | None = None
        self._resumed: _Resumed | None = None
        self._clipping_state: State = {}
        self._denoiser_state: DenoiserState = {}
        if secure_rng and not isinstance(noise, GaussianNoise):
            raise ValueError(
                f"secure_rng=True hardens Gaussian noise, and nothing is known of {type(noise).__name__}. Use "
                "GaussianNoise, or leave secure_rng out."
            )
        self._randomness = Randomness(seed, secure_rng)
        self._train_loader: PoissonDataLoader | None = None
        self._batch_examples: int | None = None
        self._largest_share = 0
        self._examples_left_to_backward = 0
        self._bound: tuple[Any, ...] = ()
        self._released: list[PrivateStatistic] = []
        self._spending: Spending | None = None
        self._last_release: tuple[str, DpEvent] | None = None
        self._run_directory = ""
        self._is_set_up = self._journal_is_due = self._journal_is_open = False
        self._self_check_pending, self._nonfinite_reported = self_check, False

    # -- what callbacks read ---------------------------------------------------------------------------------------

    @property
    def seed(self) -> int | None:
        """The explicit seed, with which the guarantee holds only while it is secret; ``None`` in earnest runs."""
        return self._randomness.seed

    @property
    def num_records(self) -> int:
        """N, the number of records in the train set. Known once the train loader has been set up."""
        return self._poisson().num_records

    @property
    def sampling_rate(self) -> float:
        """q, the probability with which each record joins each logical batch."""
        return self._poisson().sampling_rate

    @property
    def expected_batch_size(self) -> float:
        """q·N, the public number that noisy sums are divided by."""
        return self.sampling_rate * self.num_records

    def _poisson(self) -> PoissonBatchSampler:
        if self._train_loader is None:
            raise RuntimeError("The sampling rate is known once the Trainer has loaded the train dataloader.")
        return self._train_loader.poisson

    # -- set-up ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            assert self.lightning_module is not None
            configuration.check_trainer(trainer)
            configuration.check_precision(trainer, self.clipping)
            model_checks.check_model(self.lightning_module, self.engine)
            self._randomness.renew()
            self._randomness.share(self.share)
            self.ledger.start_run(self.share(secrets.token_hex(8)))
            self.private_step = None
            self._self_check_pending = self.self_check
            self.findings, self._subject, self._layout = None, None, None
            self._understanding = Understanding()
            if not self.self_check:
                rank_zero_warn(
                    "lightning_dp: self_check=False: nobody looks whether records influence one another's gradients. "
                    "If "
                    "they do, ε is false. The privacy card says so."
                )
            self._run_directory = run_directory(trainer)  # before a search for learning rates puts the loggers away
        elif self.lightning_module is not None:
            self.clipping.attach(self.lightning_module)
        super().setup(trainer)
        if fitting:
            self._bind(trainer)
            self._is_set_up = True
            if self._journal_is_due:  # a setup hook asked for the train loader: the checkpoint was not loaded then
                self._open_journal(trainer)
            self._fill_statistics(trainer)

    def _bind(self, trainer: Trainer) -> None:
        """Binds the private step to the parameters that are trainable now."""
        assert self.lightning_module is not None
        clipping = self.clipping.bind(self.lightning_module)
        configuration.check_mechanism(clipping, self.noise, self.denoiser)
        clipping.attach(self.lightning_module)
        engine = clipping.make_engine(self.engine, self.lightning_module)
        configuration.check_augmentations(engine, clipping, self.augmentation_multiplicity)
        engine.copies = self.augmentation_multiplicity
        engine.forms = None if self.findings is None else self.findings.forms
        configuration.check_optimizers(trainer, engine)
        before = self.private_step
        step = PrivateStep(
            engine,
            clipping,
            self.noise,
            self.ledger,
            self._randomness,
            self.add_up if trainer.world_size > 1 else None,
            self._charge_journal,
            self.denoiser,
            trainer.global_rank,
            trainer.world_size,
        )
        step.denoiser_state = self._denoiser_state
        if self._clipping_state.keys() == step.clipping_state.keys():
            step.clipping_state = self._clipping_state
        if before is not None:  # layers were frozen or unfrozen: the same training goes on
            step.clipping_state, step.denoiser_state = before.clipping_state, before.denoiser_state
            step.nonfinite_examples, step.keep_norms = before.nonfinite_examples, before.keep_norms
        self.private_step = step
        self._bound = self._fingerprint()
        shapes = [(name, tuple(p.shape), p.dtype) for name, p in engine.parameters.items()]
        self.agree(shapes, "The processes train different parameters: the same layers must be frozen in all of them.")

    def _fingerprint(self) -> tuple[Any, ...]:
        """What the checks have looked at: when any of it changes, they must look again."""
        found: list[Any] = [id(p) for p in self._optimized_parameters()]
        for module in self._module().modules():
            own = vars(module)
            found += (
                id(module),
                type(module),
                own.get("forward"),
                module.training if model_checks.is_batch_norm(module) else 0,
            )
            for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                found += map(id, own[name].values())
            for name, p in own["_parameters"].items():
                if p is not None:
                    found += (name, id(p), p.requires_grad, model_checks.has_hooks(p))
        return tuple(found)

    def _optimized_parameters(self) -> list[torch.nn.Parameter]:
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    # -- other processes, of which there are none here: see `lightning_dp.training.distributed` ------------------------

    def share(self, value: Any) -> Any:
        """The first process's value, in every process."""
        return value

    def agree(self, value: Any, problem: str) -> None:
        """Raises, in every process, if they have different values.

        Raises:
            PrivacyConfigurationError: With what is the ``problem`` then.
        """

    def on_first_process(self, action: Callable[[], None]) -> None:
        """Does something in the first process; an error there is one in every process."""
        action()

    def add_up(self, tensor: Tensor) -> Callable[[], None]:
        """Starts to add up a tensor over all processes, in place; returns a function that waits for the total."""
        return lambda: None

    def process_dataloader(self, dataloader: object) -> object:
        trainer = self._trainer()
        if not (trainer.state.fn == TrainerFn.FITTING and trainer.training):
            return super().process_dataloader(dataloader)
        num_records, batch_size = records_and_batch_size(dataloader)
        if trainer.world_size > 1:
            dataset = dataloader.dataset  # type: ignore[attr-defined]
            self.agree(
                (batch_size, fingerprint(dataset)),
                "The processes have different train sets, or batch sizes: record i of one is not record i of another, "
                "and a record could count several times. Load the same records in the same order everywhere: give "
                "random_split a generator with a fixed seed; sort what is listed from folders.",
            )
        expected = batch_size * trainer.world_size
        if expected > num_records:
            rank_zero_warn(
                f"The expected batch size ({expected}) exceeds the {num_records} records of the train set; every "
                "record will be in every batch (sampling rate 1), without amplification by sampling."
            )
        sampler = PoissonBatchSampler(
            num_records,
            min(1.0, expected / num_records),
            self._randomness,
            first_step=lambda: len(self.ledger),
            shard=trainer.global_rank,
            num_shards=trainer.world_size,
            copies=self.augmentation_multiplicity,
        )
        self._train_loader = PoissonDataLoader.replacing(dataloader, sampler)  # type: ignore[arg-type]
        self._journal_is_due = not self._is_set_up
        if self._is_set_up:
            self._open_journal(trainer)
        return self._train_loader

    def on_train_start(self) -> None:
        super().on_train_start()
        loaders = self._trainer().fit_loop._combined_loader
        assert loaders is not None
        others = [loader for loader in loaders.flattened if loader is not self._train_loader]
        if others and len(loaders.flattened) == 1:
            raise PrivacyConfigurationError(
                "The train dataloader was exchanged after it was set up (BatchSizeFinder and Tuner.scale_batch_size do "
                "that): the batch size decides the sampling rate, and so ε. Choose it beforehand; what fits into "
                "memory at once is max_physical_batch_size."
            )
        if others:
            raise PrivacyConfigurationError(
                "Private training draws one Poisson sample per step and needs exactly one train dataloader. Combine "
                "several data sets into one (torch.utils.data.ConcatDataset)."
            )
        steering.check_validation(self._trainer(), self._train_loader)
        steering.warn(self._trainer())
        self._logs = steering.Logs(self._trainer(), lambda: self.findings.names if self.findings is not None else set())
        if self.budget is not None:
            self.budget.choose_noise(self._trainer(), self)
        self.noise_multiplier = self.share(self.noise_multiplier)
        if self.noise_multiplier is None:
            raise PrivacyConfigurationError(
                "No noise multiplier: give GaussianNoise(multiplier=…), or add the callback PrivacyBudget(epsilon=…, "
                "delta=…), which chooses it. (multiplier=0.0 trains without noise: ε is infinite.)"
            )
        if self.journal is not None and self.ledger.statistics():
            # What was charged first has described the run: a budget had not chosen the noise of its steps by then.
            self.journal.note(noise_multiplier=self.noise_multiplier)

    # -- statistics of all records ---------------------------------------------------------------------------------

    def _fill_statistics(self, trainer: Trainer) -> None:
        """Releases what layers need to know of the train set, before anything passes through them."""
        layers = unfilled(self._module().modules())
        self.agree(
            len(layers), "The processes hold different statistics: load the same weights in all of them, or in none."
        )
        if not layers:
            return
        trainer.fit_loop.setup_data()  # the sanity check of validation comes before Lightning would do that
        if self._train_loader is None:  # limit_train_batches=0
            return
        if averaging := [type(c).__name__ for c in trainer.callbacks if isinstance(c, WeightAveraging)]:  # type: ignore[attr-defined]
            raise PrivacyConfigurationError(
                f"{averaging[0]} copied the module before its {type(layers[0]).__name__} was filled, and would average "
                "and save that copy. Fill the layer first: by a fit without that callback, whose weights you load, or "
                "from public records, by its fill()."
            )
        if self._resumed is not None and self.ledger.statistics():
            raise PrivacyConfigurationError(
                f"The checkpoint's ledger holds a statistic that was released, and its {type(layers[0]).__name__} no "
                f"{layers[0].what}: to go on would release and charge them again, and train on others. Resume from a "
                "checkpoint that has them, or load its weights into a training of its own."
            )
        # Before the first release: should a later one fail, those before it are forgotten as well.
        self._released = layers if getattr(trainer, "fast_dev_run", False) else []
        for layer in layers:
            layer.release(self)
            layer.released = self._last_release

    def each_record(self) -> Iterator[Any]:
        """Every record of the train set by itself: a batch of one, as Lightning would bring it to the device."""
        for record in range(self.num_records):
            yield self._load([record])

    def release_sum(self, total: Callable[[], Tensor], noise_multiplier: float, what: str) -> Tensor:
        """A sum over all records of the train set, with Gaussian noise: a statistic, charged like a private step.

        Formal guarantee: the release is a Gaussian mechanism of this noise multiplier, and the ledger, and the journal
        where one is kept, hold it before the noisy sum exists. Proof: every number of a sum that one record moves by at
        most 1, in Euclidean norm, gets independent noise of standard deviation ``noise_multiplier``, from a stream that
        nothing else draws from.

        Args:
            total: Computes the sum ``(n,)``, in the first process only. One record, added or removed, must move it by
                at most 1 in Euclidean norm.
            noise_multiplier: Standard deviation of the noise; 0 gives infinite ε.
            what: What is released, for messages.

        Returns:
            The noisy sum, on the CPU, the same in every process.

        Raises:
            PrivacyLimitReached: The budget has no room for it; nothing was released.
        """
        if self.keep_journal and not (self._journal_is_open or getattr(self._trainer(), "fast_dev_run", False)):
            raise PrivacyConfigurationError(
                f"The release of {what} needs the journal, which is open during a fit: call release_sum from a hook of "
                "the fit (on_fit_start, say), or turn the journal off (journal=False)."
            )
        event = GaussianNoise().event(noise_multiplier)
        delta = getattr(self.budget, "delta", 1e-5)
        alone = f"ε = {event_epsilon(event, delta):.4g} at δ = {delta:g} by itself"
        if self.budget is not None and self._step_limit(event) <= len(self.ledger):
            raise PrivacyLimitReached(
                f"The privacy budget has no room for the release of {what} with noise multiplier {noise_multiplier:g} "
                f"({alone}). Give it more noise, or the budget a larger ε. Nothing was released."
            )
        rank_zero_info(f"lightning_dp: adding up {self.num_records} records for {what} …")
        sums: list[Tensor] = []
        with torch.no_grad():
            self.on_first_process(lambda: sums.append(total()))
        number = len(self.ledger)
        self.on_first_process(lambda: self._charge_journal(event, 1))
        self.ledger.record(event)
        self._last_release = self.ledger.run, event
        self.on_first_process(lambda: self._add_noise_(sums[0], noise_multiplier, number))
        rank_zero_info(f"lightning_dp: {what} released with noise multiplier {noise_multiplier:g}: {alone}, charged.")
        noisy: Tensor = self.share(sums[0] if sums else None)
        return noisy

    def _add_noise_(self, total: Tensor, scale: float, number: int) -> None:
        noise = torch.empty_like(total)
        device = noise.device
        GaussianNoise().fill_(noise, scale, lambda block: self._randomness.torch("statistic", number, device, block))
        total += noise

    # -- the journal -----------------------------------------------------------------------------------------------

    def _open_journal(self, trainer: Trainer) -> None:
        """Opens the journal, and charges the steps that it knows and the checkpoint does not."""
        self._journal_is_due = False
        if self._spending is None and not getattr(trainer, "fast_dev_run", False):
            self._include_spent()
        if not self.keep_journal or getattr(trainer, "fast_dev_run", False):
            self._share_ledger()
            return
        if self._journal_is_open:  # the train loader has been loaded again
            if self.journal is not None:
                self.journal.set_num_records(self.num_records)
            return
        self.on_first_process(lambda: self._start_journal(trainer))
        self._journal_is_open = True
        self._share_ledger()

    def _include_spent(self) -> None:
        """Charges what the module's weights, and the statistics that came with it, have cost before."""
        assert self._train_loader is not None
        module = self._module()
        data = DataMark.of(self._train_loader.dataset, self.num_records)
        before, others = spent_by(module, data)
        new = before.copy()
        if self._resumed is not None:  # the checkpoint's ledger is in this one, and its weights replace the module's
            new = PrivacyLedger()
        new.include(statistics_of(module, self.ledger))
        known = len(self.ledger)
        self.ledger.include(new)
        if more := len(self.ledger) - known:
            rank_zero_warn(
                f"lightning_dp: this module's weights have cost privacy on these records before: {more} private "
                "steps or "
                "statistics that another training took. They are charged to this training too, and its noise is chosen "
                "for what is left. To begin anew, make a new module; to go on, give the budget a larger ε."
            )
        if others:
            rank_zero_warn(
                "lightning_dp: this module was trained privately on other records before, which are not charged here: "
                "what is stated holds for the records of this train set."
            )
        self._spending = note_spending(module, self.ledger, data)

    def _share_ledger(self) -> None:
        """Every process counts what the first one does: streams are numbered by steps, which must be the same."""
        state, run, reference = self.share((self.ledger.state_dict(), self.ledger.run, self._journal_reference))
        if not self._trainer().is_global_zero:
            self.ledger.become(PrivacyLedger.from_state_dict(state))
            self.ledger.start_run(run)
            self._journal_reference = reference

    def _start_journal(self, trainer: Trainer) -> None:
        noise = {name: value for name, value in describe(self.noise).items() if name not in ("multiplier", "scale")}
        mechanism = {"clipping": describe(self.clipping), "noise": " ".join(map(str, noise.values()))}
        journal = PrivacyJournal(self._run_directory, num_records=self.num_records, configuration=mechanism)
        try:
            self._charge_lost_steps(journal)
            journal.include(self.ledger)
        except BaseException:
            journal.close()
            raise
        journal.start_run(
            self.ledger.run,
            lambda: {"model_steps": trainer.global_step, "configuration": self.public_configuration()},
        )
        self.journal, self._journal_reference = journal, journal.reference()

    def _charge_lost_steps(self, journal: PrivacyJournal) -> None:
        resumed, before = self._resumed, len(self.ledger)
        if resumed is not None and resumed.journal is not None:
            known = journal.continue_from(resumed.journal, Path(resumed.checkpoint).absolute().parent)
            if known is not None:
                self.ledger.include(known)
            else:
                rank_zero_warn(
                    f"lightning_dp: the privacy journal of the checkpoint ({resumed.journal['path']}) is gone: steps "
                    "that were taken after the checkpoint was saved, if any, are unknown and not charged."
                )
        elif resumed is not None:
            rank_zero_warn(
                "lightning_dp: the checkpoint was saved without a privacy journal: steps that were taken after it was "
                "saved, if any, are unknown and not charged."
            )
        self.ledger.include(journal.known())
        lost = len(self.ledger) - (before if resumed is None else resumed.steps)
        uncertain = f" (of these, {journal.uncertain_steps} were reserved and perhaps never taken)"
        note = uncertain if lost and journal.uncertain_steps else ""
        note += " (a statistic counts as a step)" if self.ledger.statistics() else ""
        if resumed is not None:
            rank_zero_info(
                f"lightning_dp: the checkpoint contains {resumed.steps} private steps; {lost} more were taken and are "
                f"lost{note}; they are charged, {len(self.ledger)} in all. Journal: {journal.path}"
            )
        elif lost:
            rank_zero_warn(
                f"lightning_dp: {lost} private steps were taken in this directory before{note}, and are charged to "
                "this training too. To account for it alone, give it a directory of its own (a logger, or "
                f"Trainer(default_root_dir=…)). Journal: {journal.path}"
            )

    def _charge_journal(self, event: DpEvent, at_most: int | None) -> None:
        if self.journal is not None:
            self.journal.charge(event, at_most)

    def public_configuration(self) -> dict[str, Any]:
        """What a privacy statement says about the mechanism: plain data, nothing that depends on the records."""
        step = self.private_step
        groups = step.groups if step is not None else [()]
        state = step.clipping_state if step is not None else None
        bound = step.clipping if step is not None else self.clipping
        return {
            "clipping": describe(self.clipping),
            "sensitivity": bound.sensitivity(NeighboringRelation.ADD_OR_REMOVE_ONE, groups, state),
            "groups": len(groups),
            "noise": {**describe(self.noise), "multiplier": self.noise_multiplier},
            "denoiser": None if self.denoiser is None else describe(self.denoiser),
            "num_records": self.num_records,
            "sampling_rate": self.sampling_rate,
            "expected_batch_size": self.expected_batch_size,
            "engine": self.engine,
            "loss_reduction": self.loss_reduction,
            "max_physical_batch_size": self.max_physical_batch_size,
            "augmentation_multiplicity": self.augmentation_multiplicity,
            "self_check": self.self_check,
            "independence": self._independence(),
            "seed_given": self.seed is not None,
            "secure_rng": self._randomness.secure,
            "journal": self.keep_journal,
            "precision": str(self._trainer().precision),
            "model": type(self._module()).__name__,
            "trainable_parameters": sum(p.numel() for p in step.engine.parameters.values()) if step else None,
            "software": software_versions(),
        }

    def _independence(self) -> dict[str, Any] | None:
        """What is known about the independence of records, for the privacy card."""
        if self.findings is None:
            return None
        return {
            "verdict": self.findings.verdict,
            "decisions": dict(self.findings.decisions),
            "losses": dict(self.findings.understood),
            "not_checked": list(self.findings.unseen),
        }

    def teardown(self) -> None:
        if self.journal is not None:
            self.journal.close()
        self.journal, self._resumed = None, None
        if self._logs is not None:
            self._logs.close()
        self._logs = None
        for layer in self._released:  # no journal knows what a trial run released: nothing of it may be left
            layer.empty()
        self._released = []
        if self._spending is not None:  # this strategy's ledger may go on with another module
            self._spending.ledger = self.ledger.copy()
        self._spending = None
        self._is_set_up = self._journal_is_due = self._journal_is_open = False
        super().teardown()

    # -- the training step -----------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        assert self._train_loader is not None and self.lightning_module is not None
        configuration.check_no_accumulation(self._trainer())
        drawn = self._iterator()
        self._refuse_skipped_batch()
        self._batch_examples = drawn.last_size
        self._largest_share = -(-drawn.last_total // self._trainer().world_size)
        if self._bound != self._fingerprint():
            # A callback froze, unfroze or exchanged layers: bound exactly what is trained from now on.
            model_checks.check_model(self.lightning_module, self.engine)
            self._bind(self._trainer())
            self._self_check_pending = self.self_check

    def _refuse_skipped_batch(self) -> None:
        if self._batch_examples is not None:
            raise PrivacyConfigurationError(
                "A batch was drawn that no training step was taken on: on_train_batch_start returned -1, which skips "
                "the rest of the epoch. Whether a step happens must not depend on the data. Use limit_train_batches, "
                "or "
                "trainer.should_stop on what has noise."
            )

    def on_train_end(self) -> None:
        super().on_train_end()
        self._refuse_skipped_batch()

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the user's ``training_step`` on every micro-batch of the logical batch, and all backward passes but the
        last, which Lightning asks for through `backward`."""
        step, count = self.private_step, self._batch_examples
        assert step is not None
        if count is None:
            raise PrivacyConfigurationError(
                "The optimizer evaluated the loss more than once on one batch; each evaluation would be a further "
                "release. Use an optimizer that takes one gradient per step."
            )
        self._batch_examples = None
        assert self._logs is not None
        self._logs.begin()
        for seed in range(_ATTEMPTS):
            try:
                return self._logical_batch(step, batch, count, args, kwargs)
            except (FormChanged, SystemError) as error:
                reason = form_changed_in(error)
                if reason is None:
                    raise
                # Nothing was charged, and nothing of this batch was released.
                self._examine_drawn(batch, count, args, reason, seed)
                self._logs.again()
        return self._logical_batch(step, batch, count, args, kwargs)

    def _logical_batch(
        self, step: PrivateStep, batch: Any, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """All micro-batches of a logical batch of ``count`` records."""
        assert self.noise_multiplier is not None
        step.begin(
            self.noise_multiplier,
            self.sampling_rate,
            self.expected_batch_size,
            limit=None if self.budget is None else self._step_limit,
        )
        self._examples_left_to_backward = 0
        self._check_examples(args)
        results = self._trainer()._results
        # As many micro-batches in every process, so that each of them is at the same place.
        largest = self._largest_share
        copies = step.engine.copies
        physical = max(1, self.max_physical_batch_size // copies) if self.max_physical_batch_size else largest
        most = min(physical, step.engine.max_examples or largest)
        parts = -(-largest // most) if largest else 0
        weighted_loss: Any = 0.0
        for part in range(parts):
            start, stop = count * part // parts, count * (part + 1) // parts
            if start == stop:
                self._accompany(args, kwargs)
                continue
            rows = slice(start * copies, stop * copies)
            micro_batch = batch if stop - start == count else self.take_examples(batch, count * copies, rows)
            if results is not None:  # so that self.log weights its means by the micro-batch's size
                results.batch, results.batch_size = micro_batch, None
            size = (stop - start) * copies
            with step.engine.forward(size), self._watch(size):
                output = super().training_step(micro_batch, *args, **kwargs)
            loss = reduced(loss_of(output), self.loss_reduction)
            weighted_loss += loss.detach() * ((stop - start) / count if self.loss_reduction == "mean" else 1)
            if stop < count:
                with step.backward(self._loss_scale(stop - start)):
                    self.precision_plugin.backward(loss, self._module(), None)
        if count == 0:  # of an empty draw, or share of one, the gradient is noise
            return torch.zeros((), device=self.root_device, requires_grad=True)
        if results is not None:
            results.batch, results.batch_size = batch, None
        self._examples_left_to_backward = stop - start
        shown = loss + (weighted_loss - loss.detach()) if parts > 1 else loss
        return {**output, "loss": shown} if isinstance(output, dict) else shown

    def _watch(self, rows: int) -> AbstractContextManager[Any]:
        """Holds a step of so many rows to what was examined."""
        if self.findings is None:  # nobody has looked at the step
            return PerRecordMeans(rows, None, enabled=self.per_record_means)
        known = self._understanding
        return Watch(rows, known.losses, known.places, enabled=self.per_record_means)

    def _accompany(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs ``training_step`` for nothing, on a record that was not drawn, where another process has one that was.

        What the step exchanges between processes (a log with ``sync_dist=True``, say) would wait for this one. What it
        logs counts like a batch of one record.
        """
        step, results = self.private_step, self._trainer()._results
        assert step is not None
        copies = step.engine.copies
        batch = self._load([0] * copies)
        if results is not None:
            results.batch, results.batch_size = batch, None
        with step.engine.forward(copies), self._watch(copies):
            super().training_step(batch, *args, **kwargs)

    def _load(self, records: list[int]) -> Any:
        """The batch that consists of these records of the train set, as Lightning would bring it to the device."""
        assert self._train_loader is not None
        return self._transfer(self.precision_plugin.convert_input(self._train_loader.collate_records(records)))

    def _transfer(self, batch: Any) -> Any:
        """Brings a collated batch to the device, through the transfer hooks."""
        batch = self._module()._on_before_batch_transfer(batch, dataloader_idx=0)
        return self.batch_to_device(batch, dataloader_idx=0)

    def take_examples(self, batch: Any, size: int, examples: slice | list[int]) -> Any:
        """Some examples of a transferred batch of ``size``. Override it for batches that are not trees of tensors."""
        return take_rows(batch, self._batch_layout(), size, examples)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Takes a step of the optimizer, which does not see the loss: it has no noise."""

        def private() -> Any:
            closure()
            return steering.HiddenLoss()

        return super().optimizer_step(optimizer, private, *args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """The last backward pass of a logical batch, and the release: no hook runs between the two."""
        step, module = self.private_step, self._module()
        assert step is not None
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        if self._examples_left_to_backward:
            with step.backward(self._loss_scale(self._examples_left_to_backward), last=True):
                self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        step.release(others=[*module.parameters(), *self._optimized_parameters()])
        if step.nonfinite_examples and not self._nonfinite_reported:
            self._nonfinite_reported = True
            warnings.warn(
                f"lightning_dp: {step.nonfinite_examples} examples of this step had a gradient that is not finite (NaN "
                "or infinity in a record, or an overflow). Such examples contribute nothing, and training goes on; "
                "strategy.private_step.nonfinite_examples counts them. Whether there are any is not private.",
                stacklevel=2,
            )
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    def _step_limit(self, event: DpEvent) -> int:
        assert self.budget is not None
        return self.budget.step_limit(self.ledger, event)

    def _iterator(self) -> PoissonIterator:
        """The iterator that Lightning takes train batches from."""
        combined: Any = self._trainer().fit_loop._combined_loader
        iterator: PoissonIterator = combined._iterator.iterators[0]
        return iterator

    def _loss_scale(self, examples: int) -> float:
        """What makes the sum over an example's copies the gradient of their mean loss."""
        return float(examples) if self.loss_reduction == "mean" else 1.0 / self.augmentation_multiplicity

    # -- the examination of the step ---------------------------------------------------------------------------------

    def _check_examples(self, args: tuple[Any, ...]) -> None:
        """Examines the training step, on records spread over the data set rather than on those that were drawn."""
        if not self._self_check_pending:
            return
        self._self_check_pending = False
        if self.num_records < 2:
            rank_zero_warn(
                "lightning_dp: the train set has one record: whether records are independent is not checked."
            )
            return
        subject = self._subject = self._make_subject(args)
        findings = self._examine(subject)
        steering.check_monitors(self._trainer(), findings.logged)
        self._announce(findings)

    def _make_subject(self, args: tuple[Any, ...]) -> Subject:
        copies, loader = self.augmentation_multiplicity, self._train_loader
        assert loader is not None
        most = min(_EXCHANGED, _EXAMINED_ROWS // copies)
        if self.max_physical_batch_size:
            most = min(most, self.max_physical_batch_size // copies)
        with random_state_kept():
            seed_records(0)
            records = choose_records(
                lambda index: loader.load_record(index, copies), self.num_records, max(2, min(most, self.num_records))
            )
        # Whether records are independent does not depend on precision, but autocast's rounding blurs the comparison.
        mixed = isinstance(self.precision_plugin, MixedPrecision)
        return Subject(
            module=self._module(),
            records=records,
            collate=lambda items: self.precision_plugin.convert_input(loader.collate_items(items)),
            transfer=self._transfer,
            arguments=args,
            context=nullcontext if mixed else self.precision_plugin.train_step_context,
            stand_in=self._standing_in,
            loss_reduction=self.loss_reduction,
            copies=copies,
            largest_batch=self._largest_batch(),
            needs_layers=self.engine == "bookkeeping",
            per_record_means=self.per_record_means,
            understanding=self._understanding,
        )

    def _largest_batch(self) -> int:
        """The most records that one forward pass is likely to have: four standard deviations above the mean."""
        expected = self.expected_batch_size
        drawn = expected + 4 * math.sqrt(expected * (1 - self.sampling_rate))
        share = math.ceil(min(drawn, self.num_records) / self._trainer().world_size)
        if self.max_physical_batch_size:
            share = min(share, self.max_physical_batch_size // self.augmentation_multiplicity)
        return min(share, (self.private_step and self.private_step.engine.max_examples) or share)

    def _examine(self, subject: Subject) -> Findings:
        """Everything that can be known before a step is taken; keeps it.

        Raises:
            UnsupportedModelError, PrivacyConfigurationError: Records are not independent, or the engine cannot see all.
        """
        try:
            unseen = check_collation(subject)
            if subject.copies > 1:
                check_copies_stay_together(subject)
            sorts = any("order of its own" in sentence for sentence in unseen)
            few = replace(subject, records=subject.records[: max(2, min(_TRACED, len(subject.records)))])
            findings = examine(few)
            if findings.counts and (self.engine == "per_example" or self.max_physical_batch_size):
                self._refuse_counters(findings.counts)
            try:
                unseen += check_exchange(subject, findings, compare_places=not sorts)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(" ".join([*findings.doubts, str(error)])[:2000]) from None
            if subject.needs_layers:
                state = self.private_step.clipping_state if self.private_step else {}
                unseen += check_contributions(subject, self.clipping, state, findings.forms)
        except (UnsupportedModelError, PrivacyConfigurationError) as error:
            raise type(error)(str(error)) from None
        except CheckpointError as error:
            raise UnsupportedModelError(ACTIVATION_CHECKPOINTING) from error
        findings.unseen += [sentence for sentence in unseen if sentence not in findings.unseen]
        if self.findings is None:
            self.findings = findings
        else:
            self.findings.merge(findings)
        if self.private_step is not None:
            self.private_step.engine.forms = self.findings.forms
        return findings

    def _refuse_counters(self, counts: list[str]) -> None:
        """State that every call of training_step changes would count micro-batches, and so the records drawn."""
        names = ", ".join(map(repr, counts[:4]))
        if self.engine == "per_example":
            raise UnsupportedModelError(
                f"training_step changes {names} whenever it is called, and engine='per_example' calls it once for "
                "every record: after a few steps it would tell exactly how many were drawn. Count steps by "
                "self.global_step "
                "instead."
            )
        raise UnsupportedModelError(
            f"training_step changes {names} whenever it is called, and max_physical_batch_size calls it once per "
            "micro-batch: how often depends on the size of the sample. Count steps by self.global_step instead."
        )

    def _examine_drawn(self, batch: Any, count: int, args: tuple[Any, ...], reason: FormChanged, seed: int) -> None:
        """A step does what was not examined: examines it on the very batch, before anything is charged.

        Raises:
            UnsupportedModelError: Records are not independent in it.
        """
        subject = self._subject
        if subject is None or self.findings is None:
            raise reason
        subject.arguments = args
        copies = self.augmentation_multiplicity
        try:
            found = examine(subject, batch, count * copies, self._batch_layout(), seed)
            self.findings.merge(found)
            # What made the step take another way is among these records.
            drawn = self._iterator().last_records
            if len(drawn) > 1 and self._train_loader is not None:
                loader = self._train_loader
                with random_state_kept():
                    chosen = choose_records(
                        lambda index: loader.load_record(drawn[index], copies), len(drawn), len(subject.records)
                    )
                self._examine(replace(subject, records=chosen))
            self._examine(subject)
            self.findings.merge(found)
            steering.check_monitors(self._trainer(), found.logged)
        except (UnsupportedModelError, PrivacyConfigurationError) as error:
            raise UnsupportedModelError(f"{reason} {error}"[:2000]) from None

    def _announce(self, findings: Findings) -> None:
        for line, what in findings.understood.items():
            rank_zero_info(f"lightning_dp: {line}: {what} (per_record_means=False leaves losses as they are).")
        if findings.unseen:
            rank_zero_warn(f"lightning_dp: not checked: {'; '.join(findings.unseen)}. The privacy card says so.")

    @contextmanager
    def _standing_in(self, shadow: Any) -> Iterator[None]:
        """Hooks that the Trainer calls reach the shadow of the module, and not the module."""
        module, self._lightning_module = self._lightning_module, shadow
        try:
            yield
        finally:
            self._lightning_module = module

    def _batch_layout(self) -> Layout:
        """Where the examples are in a transferred batch, found from two sizes."""
        if self._layout is None:
            loader = self._train_loader
            assert loader is not None
            copies = self.augmentation_multiplicity
            with random_state_kept():
                some = [loader.load_record(i % self.num_records, copies) for i in range(5)]
                batches = []
                for records in (some, [*some, *some[:2]]):
                    items = [fresh(item) for record in records for item in record]
                    seed_records(0)
                    batches.append(self._transfer(self.precision_plugin.convert_input(loader.collate_items(items))))
            self._layout = find_layout(batches[0], 5 * copies, batches[1], 7 * copies)
        return self._layout

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        step = self.private_step
        checkpoint[CHECKPOINT_KEY] = {
            "ledger": self.ledger.state_dict(),
            "clipping": dict(step.clipping_state if step else self._clipping_state),
            "denoiser": dict(step.denoiser_state if step else self._denoiser_state),
        }
        if self._journal_reference is not None:
            path, folder = self._journal_reference["path"], os.path.dirname(os.path.abspath(filepath))
            checkpoint[CHECKPOINT_KEY]["journal"] = {
                **self._journal_reference,
                "relative": relative_path(path, folder),
            }
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if CHECKPOINT_KEY in checkpoint:
            # Steps that this process has taken and the checkpoint does not know were taken all the same.
            try:
                ledger = PrivacyLedger.from_state_dict(checkpoint[CHECKPOINT_KEY]["ledger"])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise PrivacyConfigurationError(
                    f"The ledger in the checkpoint {checkpoint_path} makes no sense ({error}): the file is damaged, or "
                    "was changed. Resume from another checkpoint; the journal beside it knows what was taken."
                ) from error
            self.ledger.include(ledger)
            reference = checkpoint[CHECKPOINT_KEY].get("journal")
            if self._trainer().state.fn == TrainerFn.FITTING:
                self._resumed = _Resumed(os.fspath(checkpoint_path), len(ledger), reference)
            elif self._journal_reference is None and reference is not None:
                self._journal_reference = {key: reference[key] for key in ("name", "path")}
            self._clipping_state = dict(checkpoint[CHECKPOINT_KEY]["clipping"])
            self._denoiser_state = dict(checkpoint[CHECKPOINT_KEY].get("denoiser", {}))
        elif self._trainer().state.fn == TrainerFn.FITTING:
            raise PrivacyConfigurationError(
                f"The checkpoint {checkpoint_path} holds no privacy ledger: it comes from training without privacy, "
                "and what that training revealed is unknown. If it never saw the private data, load its weights with "
                "load_from_checkpoint instead of resuming from it."
            )
        return checkpoint

    # -- shorthand -------------------------------------------------------------------------------------------------

    def _module(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module

    def _trainer(self) -> Trainer:
        trainer: Trainer = self._module().trainer
        return trainer


@dataclass(frozen=True)
class _Resumed:
    """The checkpoint that a fit resumes from: its path, its number of private steps, and where its journal is."""

    checkpoint: str
    steps: int
    journal: dict[str, str] | None


def describe(stage: object) -> dict[str, Any]:
    """A stage of the mechanism, or a part of one, in plain data: its class and its public parameters."""

    def plain(value: Any) -> Any:
        if isinstance(value, int | float | str | list | tuple | Mapping | None):
            return value
        return describe(value)

    parameters = {f.name: plain(getattr(stage, f.name)) for f in fields(stage)} if is_dataclass(stage) else {}
    return {"class": type(stage).__name__, **parameters}


#: What can be combined with a strategy of Lightning's to make it private.
MIXINS: list[Any] = [PrivateMixin]


class PrivateStrategy(PrivateMixin, SingleDeviceStrategy):
    """Differentially private training on one device, of any `LightningModule`, unchanged.

    Every step draws a Poisson sample of the train set, bounds the contribution of each example to the gradient, adds
    noise, and charges the ledger. The user's train loader supplies data set, collation and workers; its batch size
    becomes the *expected* batch size.

    Example::

        trainer = L.Trainer(
            strategy=PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.1), max_physical_batch_size=256),
            callbacks=[PrivacyMonitor(delta=1e-5)],
        )

    Args:
        clipping: How contributions are bounded.
        noise: The noise. Without a multiplier, `PrivacyBudget` chooses one.
        denoiser: What is done to the noisy gradient before the optimizer sees it; ``None``: nothing.
        max_physical_batch_size: The most examples that pass through the model at once, every augmentation counted; the
            result does not depend on it. ``None``: the whole logical batch.
        engine: ``"bookkeeping"``, fast, for layers that have a rule; ``"per_example"``, slow, for any.
        loss_reduction: Whether the loss that ``training_step`` returns is a ``"mean"`` or a ``"sum"`` over examples.
        self_check: Whether a few records are used, before the first step, to check that examples do not influence one
            another and that the engine sees every gradient.
        seed: Makes sampling and noise reproducible, for tests and debugging. **The guarantee then holds only while the
            seed is secret.** `seed_everything` has no influence on either. Steps that a crash has lost are charged and
            not repeated: the resumed run draws what follows them.
        journal: Whether every step is written to ``privacy_journal.jsonl``, beside the logs, before its result is used,
            so that steps that a crash loses are charged when training is resumed.
        secure_rng: Whether sampling and noise come from a cryptographic generator, and Gaussian noise is hardened
            against attacks on its floating-point numbers (see `hardened_gaussian_` in
            `lightning_dp.mechanism.noise` for what that claims). Slower; needs ``pip install 'lightning-dp[secure]'``.
        augmentation_multiplicity: How many times, K, every record of a batch is loaded, to be augmented anew each time
            by the data set or by ``on_after_batch_transfer``. What is bounded is the gradient of the record's mean loss
            over the K: sensitivity, noise and ε are those of ``K = 1``. The batch that ``training_step`` sees has K
            rows per record, one after another: collation, transfer hooks and ``take_examples`` must keep their order,
            which the self-check looks at. Source: De et al. 2022, section 3.2, "Unlocking High-Accuracy Differentially
            Private Image Classification through Scale".
        per_record_means: Whether a cross-entropy that is a mean over the batch's targets, weighted by class or without
            those that are ignored, is understood as the mean over records of each record's own mean. Without, such
            losses are refused: what they divide by depends on the other records.
        device, accelerator, checkpoint_io, precision_plugin: As for Lightning's `SingleDeviceStrategy`; the Trainer
            fills them in.

    Raises:
        PrivacyConfigurationError, UnsupportedModelError: At the start of a fit, when something cannot be trained
            privately; the message says what and what to do.
    """

    strategy_name = "private"

    def __init__(
        self,
        clipping: Bounding = FlatClipping(1.0),
        noise: Noise = GaussianNoise(),
        denoiser: Denoiser | None = None,
        max_physical_batch_size: int | None = None,
        engine: str = "bookkeeping",
        loss_reduction: str = "mean",
        self_check: bool = True,
        seed: int | None = None,
        journal: bool = True,
        secure_rng: bool = False,
        augmentation_multiplicity: int = 1,
        per_record_means: bool = True,
        device: torch.device | str | int | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__("cpu" if device is None else device, accelerator, checkpoint_io, precision_plugin)
        self._device_chosen = device is not None
        self._num_nodes = 1
        self.configure_privacy(
            clipping,
            noise,
            max_physical_batch_size,
            engine,
            loss_reduction,
            self_check,
            seed,
            journal,
            denoiser,
            secure_rng,
            augmentation_multiplicity,
            per_record_means,
        )

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The Trainer assigns the devices it chose; there may be one."""
        return None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise PrivacyConfigurationError(
                f"PrivateStrategy trains on one device, and the Trainer has {len(devices)}. Use PrivateDDPStrategy "
                "(strategy='private_ddp'), or Trainer(devices=1)."
            )
        if devices and not self._device_chosen:
            self._root_device = devices[0]

    @property
    def num_nodes(self) -> int:
        """The Trainer assigns the number of nodes; there may be one."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        if num_nodes > 1:
            raise PrivacyConfigurationError(
                "PrivateStrategy trains on one node. Use PrivateDDPStrategy (strategy='private_ddp'), or "
                "Trainer(num_nodes=1)."
            )
        self._num_nodes = num_nodes


def make_private(strategy: Strategy, **configuration: Any) -> PrivateMixin:
    """Makes a strategy that the Trainer has already built private, in place, by exchanging its class.

    Args:
        strategy: The strategy; one that is private already is returned as it is.
        configuration: Arguments of `PrivateMixin.configure_privacy`.

    Raises:
        PrivacyConfigurationError: The strategy is of a kind whose gradients cannot be intercepted.
    """
    if isinstance(strategy, PrivateMixin):
        return strategy
    mixin = next((mixin for mixin in MIXINS if type(strategy) in mixin.supported), None)
    if mixin is None and type(strategy).__module__.startswith("pytorch_lightning"):
        raise PrivacyConfigurationError(
            "This Trainer comes from the package pytorch_lightning, which lightning_dp does not know. Import the same "
            "names from lightning: `import lightning as L` and L.Trainer (pip install lightning)."
        )
    if mixin is None:
        raise PrivacyConfigurationError(
            f"Private training does not know how {type(strategy).__name__} computes and exchanges gradients. Use one "
            "device (Trainer(devices=1)), or strategy='ddp'."
        )
    before: Any = type(strategy)
    strategy.__class__ = type(f"Private{before.__name__}", (mixin, before), {})
    assert isinstance(strategy, PrivateMixin)
    try:
        strategy.configure_privacy(**configuration)
    except BaseException:  # what is only half private would fail again when it is torn down
        strategy.__class__ = before
        raise
    strategy.made_private = True
    return strategy


def register_strategies() -> None:
    """Makes ``Trainer(strategy="private")`` work."""
    follow_checkpoints()
    StrategyRegistry.register(
        PrivateStrategy.strategy_name,
        PrivateStrategy,
        description="Differentially private training on one device",
        override=True,
    )
