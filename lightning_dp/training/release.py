"""Releases of statistics: sums over all records, with noise, charged like private steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from dp_accounting import DpEvent
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_dp.accounting.cost import event_epsilon
from lightning_dp.errors import PrivacyConfigurationError, PrivacyLimitReached
from lightning_dp.mechanism.noise import GaussianNoise
from lightning_dp.statistics.base import PrivateStatistic, unfilled

if TYPE_CHECKING:
    from lightning_dp.training.strategy import PrivateMixin


class Releases:
    """Releases statistics of the train set with noise, and charges them.

    Args:
        strategy: Supplies train set, ledger, journal and budget.
    """

    def __init__(self, strategy: PrivateMixin) -> None:
        self._strategy = strategy
        #: Layers that a ``fast_dev_run`` has filled; `close` resets them.
        self.released: list[PrivateStatistic] = []
        #: Run of the ledger, and event, of the last release.
        self.last_release: tuple[str, DpEvent] | None = None

    def fill(self, trainer: Trainer) -> None:
        """Fills every `PrivateStatistic` of the module that has no value yet, before a batch passes through it.

        Raises:
            PrivacyConfigurationError: The processes hold different statistics; a callback that averages weights has
                copied an empty layer; or the resumed checkpoint paid for a statistic that its module lacks.
            PrivacyLimitReached: The budget has no room for one.
        """
        layers = unfilled(self._strategy.module_in_fit().modules())
        self._strategy.agree(
            len(layers), "The processes hold different statistics: load the same weights in all of them, or in none."
        )
        if not layers:
            return
        trainer.fit_loop.setup_data()  # Lightning does it after the sanity check of validation, which needs the layers
        if self._strategy.train_loader is None:  # limit_train_batches=0
            return
        if averaging := [type(c).__name__ for c in trainer.callbacks if isinstance(c, WeightAveraging)]:  # type: ignore[attr-defined]
            raise PrivacyConfigurationError(
                f"{averaging[0]} copied the module before its {type(layers[0]).__name__} was filled, and would average "
                "and save that copy. Fill the layer first: by a fit without that callback, whose weights you load, or "
                "from public records, by its fill()."
            )
        if self._strategy.books.resumed is not None and self._strategy.ledger.statistics():
            raise PrivacyConfigurationError(
                f"The checkpoint's ledger holds a statistic that was released, and its {type(layers[0]).__name__} no "
                f"{layers[0].label}: to go on would release and charge them again, and train on others. Resume from a "
                "checkpoint that has them, or load its weights into a training of its own."
            )
        # Set before the first release, so that `close` resets all of them when a later release fails.
        self.released = layers if getattr(trainer, "fast_dev_run", False) else []
        for layer in layers:
            layer.release(self._strategy)
            layer.released = self.last_release

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
            PrivacyLimitReached: The budget has no room for the release; nothing was released.
            PrivacyConfigurationError: The journal is on, and not open: this was called outside of a fit.
        """
        if self._strategy.options.journal and not (
            self._strategy.books.is_open or getattr(self._strategy.trainer_in_fit(), "fast_dev_run", False)
        ):
            raise PrivacyConfigurationError(
                f"The release of {what} needs the journal, which is open during a fit: call release_sum from a hook of "
                "the fit (on_fit_start, say), or turn the journal off (journal=False)."
            )
        event = GaussianNoise().event(noise_multiplier)
        delta = getattr(self._strategy.budget, "delta", 1e-5)
        alone = f"ε = {event_epsilon(event, delta):.4g} at δ = {delta:g} by itself"
        if self._strategy.budget is not None and self._strategy.step_limit(event) <= len(self._strategy.ledger):
            raise PrivacyLimitReached(
                f"The privacy budget has no room for the release of {what} with noise multiplier {noise_multiplier:g} "
                f"({alone}). Give it more noise, or the budget a larger ε. Nothing was released."
            )
        rank_zero_info(f"lightning_dp: adding up {self._strategy.num_records} records for {what} …")
        sums: list[Tensor] = []
        with torch.no_grad():
            self._strategy.on_first_process(lambda: sums.append(total()))
        number = len(self._strategy.ledger)
        self._strategy.on_first_process(lambda: self._strategy.books.charge(event, 1))
        self._strategy.ledger.record(event)
        self.last_release = self._strategy.ledger.run, event
        self._strategy.on_first_process(lambda: self._add_noise_(sums[0], noise_multiplier, number))
        rank_zero_info(f"lightning_dp: {what} released with noise multiplier {noise_multiplier:g}: {alone}, charged.")
        noisy: Tensor = self._strategy.share(sums[0] if sums else None)
        return noisy

    def _add_noise_(self, total: Tensor, scale: float, number: int) -> None:
        noise = torch.empty_like(total)
        device = noise.device
        GaussianNoise().fill_(
            noise, scale, lambda block: self._strategy.randomness.torch("statistic", number, device, block)
        )
        total += noise

    def each_record(self) -> Iterator[Any]:
        """Every record of the train set by itself: a batch of one, as Lightning would bring it to the device."""
        for record in range(self._strategy.num_records):
            yield self._strategy.micro_batches.load([record])

    def close(self) -> None:
        """Resets the layers that a ``fast_dev_run`` filled: it keeps no journal, so no release may remain."""
        for layer in self.released:
            layer.reset()
        self.released = []
