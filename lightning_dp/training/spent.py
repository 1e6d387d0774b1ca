"""What the weights of a module have cost already: kept with the module, for its next training.

A second Trainer that goes on with the same module starts with an empty ledger, though the weights have seen records: a
notebook cell that is run three times has spent three times. The ledgers of a module are kept here, by weak reference,
and charged to its next training on the same records. A Lightning checkpoint brings its ledger with it, also to
``load_from_checkpoint``.
"""

from __future__ import annotations

import functools
import hashlib
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.statistics.base import PrivateStatistic
from lightning_dp.training import lightning_api
from lightning_dp.training.record_bytes import record_bytes
from lightning_dp.training.repair import loading_repaired
from lightning_dp.training.users_loader import sources

#: The key of the ledger in a Lightning checkpoint.
CHECKPOINT_KEY = "lightning_dp"


#: Records whose content is compared, to recognise a data set: at least so many, and more for so many seconds.
_LOOKED_AT, _SECONDS = 32, 0.2


@dataclass(frozen=True, eq=False)
class DataMark:
    """What a data set is recognised by: the objects that its records come from, and the content of some records.

    Attributes:
        bases: Those objects; ``None`` for one that takes no weak reference.
        numbers: As from `sources`, ``(N, 2)``: for every record, the number of its object, and its index there.
        contents: SHA-256 of the bytes of the records that were looked at and have such a form.
        is_whole: Whether every record was looked at, and is the same whenever it is loaded.
    """

    bases: tuple[weakref.ref[Any] | None, ...]
    numbers: np.ndarray
    contents: frozenset[str]
    is_whole: bool = False

    @classmethod
    def of(cls, dataset: Any, count: int, look: bool = True) -> DataMark:
        """The mark of the first ``count`` records of a data set; without ``look``, no record is loaded."""
        objects, numbers = sources(dataset)
        contents: set[str] = set()
        known = True
        end, looked = time.monotonic() + _SECONDS, 0
        for index in np.random.default_rng(0).permutation(count).tolist() if look else ():
            if looked >= _LOOKED_AT and time.monotonic() > end:
                break
            looked += 1
            data = record_bytes(dataset, index)
            if data is None:
                known = False
            else:
                contents.add(hashlib.sha256(data).hexdigest())
                known = known and data == record_bytes(dataset, index, seed=count + index)  # not augmented
        whole = looked == count and known
        return cls(tuple(_weak(base) for base in objects), numbers[:count], frozenset(contents), whole)

    def shares_objects_with(self, other: DataMark) -> bool:
        """Whether both take some record from the same object, at the same index."""
        for mine, base in enumerate(self.bases):
            for theirs, another in enumerate(other.bases):
                if base is not None and another is not None and base() is another() is not None:
                    one = self.numbers[self.numbers[:, 0] == mine, 1]
                    two = other.numbers[other.numbers[:, 0] == theirs, 1]
                    if len(np.intersect1d(one, two)):
                        return True
        return False

    def shares_records_with(self, other: DataMark) -> bool:
        """Whether some record may be in both data sets: False only if there is evidence that none is.

        That is where both are disjoint parts of the same object, or where every record of one was looked at, and none
        of their hashes is among those of the other. (A record that is transformed otherwise has another hash.)
        """
        if self.shares_objects_with(other):
            return True
        if len(self.bases) == len(other.bases) == 1:
            one, two = (mark.bases[0] for mark in (self, other))
            if one is not None and two is not None and one() is two() is not None:
                return False
        if not self.contents or not other.contents or not (self.is_whole or other.is_whole):
            return True
        return bool(self.contents & other.contents)


def _weak(base: Any) -> weakref.ref[Any] | None:
    try:
        return weakref.ref(base)
    except TypeError:
        return None


@dataclass
class Spending:
    """The ledger of one training of a module, and the data set that it trained on; ``None``: it is not known."""

    ledger: PrivacyLedger
    data: DataMark | None


_BY_MODULE: weakref.WeakKeyDictionary[nn.Module, list[Spending]] = weakref.WeakKeyDictionary()


def spent_by(module: nn.Module, data: DataMark) -> tuple[PrivacyLedger, bool]:
    """What a module's weights have cost on these records.

    Returns:
        The ledger of all trainings that may share a record with ``data``, and whether there were others.
    """
    total, others = PrivacyLedger(), False
    for spending in _BY_MODULE.get(module, ()):
        if spending.data is None or spending.data.shares_records_with(data):
            total.include(spending.ledger)
        else:
            others = True
    return total, others


def note_spending(module: nn.Module, ledger: PrivacyLedger, data: DataMark | None) -> Spending:
    """Adds a ledger to those of a module. It is kept, not copied: what is charged to it later counts as well."""
    spending = Spending(ledger, data)
    _BY_MODULE.setdefault(module, []).append(spending)
    return spending


def share_spending(module: nn.Module, copied: nn.Module) -> None:
    """Lets a copy of a module have cost what the module has."""
    for spending in _BY_MODULE.get(module, ()):
        note_spending(copied, spending.ledger, spending.data)


def _load_state(load: Any) -> Any:
    """Wraps Lightning's function that makes a module from a checkpoint: the checkpoint's ledger is noted for it."""

    @functools.wraps(load)
    def wrapper(cls: Any, checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        entry = checkpoint.get(CHECKPOINT_KEY, {})
        made = load(loading_repaired(cls, entry.get("repaired", {})), checkpoint, *args, **kwargs)
        if type(made) is not cls and isinstance(made, nn.Module):
            made.__class__ = cls
        if CHECKPOINT_KEY in checkpoint and isinstance(made, nn.Module):
            note_spending(made, PrivacyLedger.from_state_dict(checkpoint[CHECKPOINT_KEY]["ledger"]), None)
        return made

    return wrapper


def follow_checkpoints() -> None:
    """Makes ``load_from_checkpoint`` note a checkpoint's ledger as the spending of the module that it makes."""
    lightning_api.wrap_load_state(_load_state)


def statistics_of(module: nn.Module, known: PrivacyLedger) -> PrivacyLedger:
    """What the statistics that a module came with have cost, unless a ledger knows of the run that released them."""
    ledger = PrivacyLedger()
    for layer in module.modules():
        if isinstance(layer, PrivateStatistic) and layer.released is not None:
            run, event = layer.released
            if not known.knows(run):
                ledger.start_run(run)
                ledger.record(event)
    return ledger
