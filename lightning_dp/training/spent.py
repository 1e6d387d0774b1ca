"""What the weights of a module have cost already: it stays with the module, whoever trains it next.

A second Trainer that goes on with the same module starts with an empty ledger, and the weights are not empty: a
notebook cell that is run three times has spent three times. What was spent is kept here, weakly, by module, and goes
into the ledger of the next training on the same records. A Lightning checkpoint brings its ledger with it, also to
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
from lightning.pytorch.core import saving
from torch import nn

from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.statistics.base import PrivateStatistic
from lightning_dp.training.loader import record_bytes, sources

#: The key of the ledger in a Lightning checkpoint.
CHECKPOINT_KEY = "lightning_dp"


#: Records whose content is looked at, to recognise a data set: so many, and more while there is time.
_LOOKED_AT, _SECONDS = 32, 0.2


@dataclass(frozen=True, eq=False)
class DataMark:
    """By what a data set is recognised: the objects that its records come from, and the content of some."""

    bases: tuple[weakref.ref[Any] | None, ...]
    numbers: np.ndarray
    contents: frozenset[str]
    #: Whether the content of every record was looked at.
    is_whole: bool = False

    @classmethod
    def of(cls, dataset: Any, count: int, look: bool = True) -> DataMark:
        """The mark of the first ``count`` records of a data set; without ``look``, no record is loaded."""
        objects, numbers = sources(dataset)
        contents: set[str] = set()
        end, looked = time.monotonic() + _SECONDS, 0
        for index in np.random.default_rng(0).permutation(count).tolist() if look else ():
            if looked >= _LOOKED_AT and time.monotonic() > end:
                break
            looked += 1
            data = record_bytes(dataset, index)
            if data is not None:
                contents.add(hashlib.sha256(data).hexdigest())
        whole = looked == count and bool(contents)
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
        """Whether some record is in both; when nobody can tell, it is.

        It is not where both are other parts of the same object, or where none of the records looked at in one is among
        all those of the other.
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
    """What one training has spent, and on which records (``None``: unknown ones)."""

    ledger: PrivacyLedger
    data: DataMark | None


_BY_MODULE: weakref.WeakKeyDictionary[nn.Module, list[Spending]] = weakref.WeakKeyDictionary()


def spent_by(module: nn.Module, data: DataMark) -> tuple[PrivacyLedger, bool]:
    """What a module's weights have cost on these records.

    Returns:
        One ledger, and whether the weights have seen other records as well.
    """
    total, others = PrivacyLedger(), False
    for spending in _BY_MODULE.get(module, ()):
        if spending.data is None or spending.data.shares_records_with(data):
            total.include(spending.ledger)
        else:
            others = True
    return total, others


def note_spending(module: nn.Module, ledger: PrivacyLedger, data: DataMark | None) -> Spending:
    """Keeps with a module that its weights cost what this ledger says, now and later on."""
    spending = Spending(ledger, data)
    _BY_MODULE.setdefault(module, []).append(spending)
    return spending


def _load_state(load: Any) -> Any:
    """Lightning's way to make a module of a checkpoint, which also brings what its weights have cost."""

    @functools.wraps(load)
    def wrapper(cls: Any, checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        made = load(cls, checkpoint, *args, **kwargs)
        if CHECKPOINT_KEY in checkpoint and isinstance(made, nn.Module):
            note_spending(made, PrivacyLedger.from_state_dict(checkpoint[CHECKPOINT_KEY]["ledger"]), None)
        return made

    return wrapper


def follow_checkpoints() -> None:
    """Lets ``load_from_checkpoint`` bring the ledger that a checkpoint holds."""
    if not hasattr(saving._load_state, "__wrapped__"):
        saving._load_state = _load_state(saving._load_state)


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
