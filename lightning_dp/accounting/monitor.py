"""ε while a training runs, at logarithmic cost."""

from __future__ import annotations

import math

from dp_accounting import ComposedDpEvent, DpEvent, SelfComposedDpEvent

from lightning_dp.accounting.cost import check_delta, event_epsilon
from lightning_dp.accounting.events import Accountant, Adjacency
from lightning_dp.accounting.ledger import PrivacyLedger
from lightning_dp.accounting.pld import COARSE


class EpsilonMonitor:
    """ε of a growing ledger at little cost, for display while training runs.

    Formal guarantee: a value is never below the true ε. Proof: it is an upper bound (on a coarser grid, see
    `event_epsilon`) on ε of the ledger or of the ledger with some more steps of its last kind; ε grows with every step.
    It is at most 1 % above: the further steps raise ε by half a per cent, which is checked, and the coarser grid by
    less than that, which is measured by the tests rather than proven.

    Cost: one evaluation, of some milliseconds, whenever ε has grown by half a per cent, and a second one in the same
    call if the first looked too far ahead. Their number grows with the logarithm of the number of steps.

    Args:
        delta: The δ at which ε is stated.
        accountant: ``"pld"`` or ``"rdp"``.
        adjacency: ``"add_or_remove"`` or ``"replace_one"``.
    """

    _TOLERANCE, _AIM = 1.005, 1.0045

    def __init__(self, delta: float, accountant: Accountant = "pld", adjacency: Adjacency = "add_or_remove") -> None:
        check_delta(delta)
        self.delta, self.accountant, self.adjacency = delta, accountant, adjacency
        #: How often ε has been computed.
        self.evaluations = 0
        self._before: list[tuple[DpEvent, int]] = []
        self._last: DpEvent | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        #: The value serves for these numbers of steps of the last kind; it is ε of the last of them.
        self._from, self._until, self._value = 0, 0, 0.0
        #: d log ε / d log steps, as last seen.
        self._slope = 1.0

    def bound(self, ledger: PrivacyLedger) -> float:
        """An upper bound on ε of the ledger, within 1 % of it."""
        entries = list(ledger)
        if not entries:
            return 0.0
        *before, (event, steps) = entries
        if event != self._last or before != self._before:
            self._last, self._before = event, before
            self._start_anew()
        if not self._from <= steps <= self._until:
            self._advance(steps)
        return self._value

    def _advance(self, steps: int) -> None:
        """Computes a value for this number of steps, and for as many more as it serves for."""
        known, at = self._value, self._until
        if at == 0 or steps < at:
            known, reach = 0.0, steps
        else:
            reach = math.floor(at * (self._AIM ** (1 / self._slope) if known else 2.0))
        until = max(steps, reach)
        value = self._evaluate(until)
        if until > steps and value > self._TOLERANCE * known:
            until, value = steps, self._evaluate(steps)
        # ε of every number of steps beyond ``at`` is at least what is known of ``at``.
        self._from = at + 1 if at and steps > at and value <= self._TOLERANCE * known else steps
        if 0 < known < value < math.inf and until > at > 0:
            self._slope = max(0.1, math.log(value / known) / math.log(until / at))
        self._until, self._value = until, value

    def _evaluate(self, steps: int) -> float:
        assert self._last is not None
        self.evaluations += 1
        parts = [SelfComposedDpEvent(event, count) for event, count in [*self._before, (self._last, steps)]]
        return event_epsilon(ComposedDpEvent(parts), self.delta, self.accountant, self.adjacency, COARSE)
