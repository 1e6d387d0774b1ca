"""ε and δ of events: which accountant, which bound.

Accountants: ``"pld"`` (privacy loss distributions: tight, the default) and ``"rdp"`` (Rényi differential privacy: the
moments accountant's successor, a few per cent to 20 % above). Adjacency is ``"add_or_remove"`` one record unless said
otherwise; ``"replace_one"`` is the other.
"""

from __future__ import annotations

import math

from dp_accounting import DpEvent

from lightning_dp.accounting.events import (
    ACCOUNTANTS,
    ADJACENCIES,
    Accountant,
    Adjacency,
    has_loss_distribution,
    is_non_private,
    parts_of_event,
)
from lightning_dp.accounting.pld import EXACT, FINE, composed_losses
from lightning_dp.accounting.rdp import rdp_delta, rdp_epsilon

#: Beyond this, ε is stated by Rényi differential privacy (an upper bound as well): the tight computation costs memory
#: in proportion to ε, and says no more about privacy.
_MEANINGLESS_EPSILON = 1000.0

#: The share of δ from which rounding is felt in ε.
_FELT = 1e-3


def check_delta(delta: float) -> None:
    """Raises ValueError unless 0 < δ < 1: Gaussian noise has no finite ε at δ = 0, and δ = 1 promises nothing."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie strictly between 0 and 1, got {delta}.")


def _check(accountant: str, adjacency: str) -> None:
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {ACCOUNTANTS}, got {accountant!r}.")
    if adjacency not in ADJACENCIES:
        raise ValueError(f"adjacency must be one of {ADJACENCIES}, got {adjacency!r}.")


def event_epsilon(
    event: DpEvent,
    delta: float,
    accountant: Accountant = "pld",
    adjacency: Adjacency = "add_or_remove",
    resolution: float = FINE,
) -> float:
    """An upper bound on ε at this δ of any composition of Poisson-subsampled mechanisms, by either accountant.

    Once a part of it has noise that is not Gaussian, the bound is the Rényi accountant's, whichever is asked for.

    Formal guarantee (replace_one): with noise of standard deviation z and sampling rate q, exchanging one record of
    bounded contribution is dominated by the pair ``P = (1-q) N(0, z²) + q N(1, z²)`` and
    ``Q = (1-q) N(0, z²) + q N(-1, z²)``, which composes.
    Proof: given the other sampled records, the outputs are ``(1-q) N(0) + q N(u)`` and ``(1-q) N(0) + q N(v)`` with
    ‖u‖, ‖v‖ ≤ 1; a mixture over those records is no worse (hockey-stick divergences are jointly convex). A test of size
    p under N(0) accepts N(u) with at most, and N(v) with at least, the probability of the half-line of size p under
    N(1) and N(-1) (Neyman & Pearson), both at once, so for every α the divergence
    ``sup_A q N_u(A) - α q N_v(A) - (α-1)(1-q) N_0(A)`` is largest for u = 1, v = -1. Domination composes: Zhu, Dong &
    Wang 2022, theorem 10. The pair is tighter than the subsampled Gaussian of multiplier z/2, and equal to it at q = 1.

    Args:
        event: What was released.
        delta: Strictly between 0 and 1.
        accountant: ``"pld"`` or ``"rdp"``.
        adjacency: ``"add_or_remove"`` or ``"replace_one"``.
        resolution: Wanted cell of the grid of privacy losses (``"pld"``); a wide range of losses or a large ε takes a
            wider one. A coarser grid is cheaper, and gives an upper bound too.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: No accountant is known for a part of the event.
    """
    check_delta(delta)
    _check(accountant, adjacency)
    if is_non_private(event):
        return math.inf
    parts = parts_of_event(event)
    if not parts:
        return 0.0
    if accountant == "rdp" or not has_loss_distribution(event):
        return rdp_epsilon(parts, delta, adjacency)
    rough = rdp_epsilon(parts, delta, adjacency, few=True)
    if rough == 0:
        return 0.0
    if rough > _MEANINGLESS_EPSILON:
        return rdp_epsilon(parts, delta, adjacency)
    composed = composed_losses(parts, adjacency, resolution, rough)
    if composed.infinity > _FELT * delta:
        composed = composed_losses(parts, adjacency, resolution, rough, EXACT)
    found = composed.epsilon(delta)
    # Where rounding decides, Rényi differential privacy, which has no such floor, may be the lower of two bounds.
    return found if composed.infinity <= _FELT * delta else min(found, rdp_epsilon(parts, delta, adjacency))


def event_delta(
    event: DpEvent, epsilon: float, accountant: Accountant = "pld", adjacency: Adjacency = "add_or_remove"
) -> float:
    """An upper bound on δ at this ε, as `event_epsilon` is on ε at a given δ. 1.0 at a finite ε if a step had no noise.

    Raises:
        ValueError: ε is negative or not a number.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}.")
    _check(accountant, adjacency)
    parts = [] if is_non_private(event) else parts_of_event(event)
    if math.isinf(epsilon):
        return 0.0
    if not parts:
        return 1.0 if is_non_private(event) else 0.0
    by_rdp = rdp_delta(parts, epsilon, adjacency)
    if not has_loss_distribution(event):
        return by_rdp
    rough = max(rdp_epsilon(parts, 1e-9, adjacency, few=True), min(epsilon, _MEANINGLESS_EPSILON))
    if accountant == "rdp" or rough > _MEANINGLESS_EPSILON:
        return by_rdp
    composed = composed_losses(parts, adjacency, FINE, rough)
    found = composed.delta(epsilon)
    if composed.infinity > _FELT * found:
        composed = composed_losses(parts, adjacency, FINE, rough, EXACT)
        found = composed.delta(epsilon)
    return found if composed.infinity <= _FELT * found else min(found, by_rdp)


def rough_epsilon(event: DpEvent, delta: float, adjacency: Adjacency = "add_or_remove") -> float:
    """An upper bound on ε in about a millisecond."""
    if is_non_private(event):
        return math.inf
    parts = parts_of_event(event)
    return rdp_epsilon(parts, delta, adjacency, few=True) if parts else 0.0
