"""Layers that hold a statistic of the train set, which a private strategy releases with noise and charges.

To release another statistic, make a subclass of `PrivateStatistic`: it says what is added up, and what is kept of that.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar, Protocol

import torch
from dp_accounting import DpEvent
from torch import Tensor, nn

from lightning_dp.accounting.ledger import PrivacyLedger

#: Records that are added up at once.
_RECORDS_AT_ONCE = 1024


class Releaser(Protocol):
    """What a layer needs of a private strategy to read records and to release a noisy sum over them."""

    @property
    def num_records(self) -> int:
        """N, which is public: the account's sampling rate states it."""

    def each_record(self) -> Iterator[Any]:
        """Every record of the train set by itself, as a batch of one."""

    def release_sum(self, total: Callable[[], Tensor], noise_multiplier: float, what: str) -> Tensor:
        """The sum ``(n,)`` with noise, charged before it is returned, the same in every process.

        ``total`` runs in the first process only; one record must move it by at most 1 in Euclidean norm.
        """

    def share(self, value: Any) -> Any:
        """The first process's value, in every process."""


class PrivateStatistic(nn.Module, ABC):
    """A layer without trainable parameters, on a statistic of the train set that is released once, with noise.

    A private strategy fills the layer at the start of the first fit, before the noise of training is chosen, so that a
    budget pays for both. Checkpoints keep the statistic: a resumed fit releases and charges nothing again.

    Args:
        in_features: Number of features of a flattened record, d.
        noise_multiplier: Standard deviation of the noise over the sensitivity, which is 1. 0.0: no noise, infinite ε.
        shape: Shape of the statistic.

    Raises:
        ValueError: An argument is out of its range.
    """

    #: Name of the buffer that holds the statistic, and what it is called in messages.
    buffer_name: ClassVar[str]
    label: ClassVar[str]

    def __init__(self, in_features: int, noise_multiplier: float, shape: tuple[int, ...]) -> None:
        super().__init__()
        if in_features < 1:
            raise ValueError(f"{type(self).__name__}: in_features must be at least 1, got {in_features}.")
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(
                f"{type(self).__name__}: noise_multiplier must be non-negative and finite, got {noise_multiplier}."
            )
        self.in_features, self.noise_multiplier = in_features, float(noise_multiplier)
        #: Whether the statistic is known: it was released, or came with a checkpoint.
        self.is_released = False
        #: The run of a ledger that released the statistic, and its event; ``None``: it is public, or not yet released.
        self.released: tuple[str, DpEvent] | None = None
        self.register_buffer(self.buffer_name, torch.full(shape, math.nan))

    @abstractmethod
    def release(self, strategy: Releaser) -> None:
        """Releases the statistic, and fills the layer, in every process with the same numbers."""

    def value(self) -> Tensor:
        """The statistic.

        Raises:
            RuntimeError: It has not been released yet.
        """
        if not self.is_released:
            raise RuntimeError(
                f"{type(self).__name__} has no {self.label} yet. A private strategy releases them when a fit starts "
                "(DifferentialPrivacy(…) or PrivateStrategy(…)); load a checkpoint of one, or use fill() with what is "
                "public."
            )
        value: Tensor = getattr(self, self.buffer_name)
        return value

    def inputs_of(self, batch: Any) -> Tensor:
        """This layer's input for a batch of one record: the batch, or its first entry, as it is loaded. Override it for
        other batches. Layers in front of this one are not applied.

        Raises:
            TypeError: There is no tensor there.
        """
        inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"{type(self).__name__} takes the records from a batch that is a tensor, or a tuple or list that "
                f"begins with one, and found a {type(inputs).__name__}. Override "
                f"{type(self).__name__}.inputs_of(batch)."
            )
        return inputs

    def add_up(self, records: Iterator[Any], added: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum of what ``added`` makes of rows ``(n, d)`` of unit length (`unit_rows`), in double precision.

        Records come one by one: none can influence what another one adds.
        """
        total: Tensor | float = 0.0
        while rows := [self._row(batch) for batch in islice(records, _RECORDS_AT_ONCE)]:
            total = added(unit_rows(torch.stack(rows))) + total
        if not isinstance(total, Tensor):
            return added(torch.zeros(1, self.in_features, dtype=torch.float64, device="cpu"))
        return total

    def _row(self, batch: Any) -> Tensor:
        inputs = self.inputs_of(batch)
        if inputs.numel() != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: in_features is {self.in_features}, and a record has {inputs.numel()} features."
            )
        # In double precision at once: records of several types would be stacked as a type that not all fit into.
        return inputs.detach().flatten().cpu().double()

    def reset(self) -> None:
        """Forgets the statistic."""
        getattr(self, self.buffer_name).fill_(math.nan)
        self.is_released, self.released = False, None

    def set_value(self, statistic: Tensor) -> None:
        """Sets the statistic, a tensor of the buffer's shape, and marks it as released.

        Raises:
            ValueError: A statistic of another shape, or one that is not finite.
        """
        kept = getattr(self, self.buffer_name)
        if statistic.shape != kept.shape or not statistic.isfinite().all():
            raise ValueError(
                f"{type(self).__name__} keeps finite numbers of shape {tuple(kept.shape)}, and was given "
                f"{tuple(statistic.shape)}{'' if statistic.isfinite().all() else ', some of them not finite'}."
            )
        kept.copy_(statistic)
        self.is_released = True

    def get_extra_state(self) -> dict[str, Any]:
        """The event of the release: a checkpoint with the statistic also has its cost."""
        if self.released is None:
            return {}
        run, event = self.released
        ledger = PrivacyLedger()
        ledger.start_run(run)
        ledger.record(event)
        return {"ledger": ledger.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.released = None
        for run in state.get("ledger", {}).get("runs", ()):
            [(event, _)] = PrivacyLedger.from_state_dict({"runs": [run]})
            self.released = str(run["name"]), event

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", {})  # checkpoints of before statistics kept their cost
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.is_released = bool(getattr(self, self.buffer_name).isfinite().all())


def unit_rows(records: Tensor) -> Tensor:
    """Records ``(n, *)``, flattened and scaled to unit length, in double precision, on the CPU: ``(n, d)``.

    A record that is zero, or not finite, becomes a row of zeros: every row's norm is at most 1, up to rounding.
    """
    rows = records.detach().flatten(1).cpu().double()
    # By the largest magnitude first: squares of huge or tiny numbers would be infinite or zero.
    peaks = rows.abs().amax(1, keepdim=True)
    usable = peaks.isfinite() & (peaks > 0)
    rows = torch.where(usable, rows / peaks.where(usable, torch.ones_like(peaks)), torch.zeros_like(rows))
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1)  # at least 1, or the row is zero


def unfilled(modules: Iterable[nn.Module]) -> list[PrivateStatistic]:
    """The layers whose statistic is yet to be released."""
    return [module for module in modules if isinstance(module, PrivateStatistic) and not module.is_released]
