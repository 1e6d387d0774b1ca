"""Losses that are a mean over the batch of something that depends on the batch, understood as means over records.

``cross_entropy`` with class weights, or with targets that are ignored, divides by the weights or the number of the
targets in the batch: what one record adds to the gradient then depends on the others. `PerRecordMeans` computes the
mean over records of each record's own mean instead (of its sum, where records chose the targets: ``logits[mask]``).
Class weights are kept, divided by their mean, which is public.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_dp.errors import FormChanged, UnsupportedModelError
from lightning_dp.gradients.source import here
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import PUBLIC, constant, join

if TYPE_CHECKING:
    from lightning_dp.training.independence.tracer import RowTracer


_ARGUMENTS = {
    F.cross_entropy: ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    F.nll_loss: ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
}


#: How the targets of one call lie: one record's own; one for each record along dimension 0, or several, one record
#: after another, or time before records; along dimension 1; those that records chose (``logits[mask]``); of several
#: records in no order that is known, which are left alone while they have no weights and none is ignored.
ALONE, ONE_EACH, RECORDS_FIRST, TIME_FIRST = "alone", "one each", "records first", "time first"


RECORDS_SECOND, CHOSEN, PLAIN = "records second", "chosen", "plain"


#: By line, for every call of a step that comes from there.
Forms = dict[str, list[str]]


class PerRecordMeans(TorchFunctionMode):
    """Rewrites batch means within a training step.

    Formal guarantee: the result is ``(1/B) Σ_b l_b``, and ``l_b`` depends on record b alone. Proof: ``l_b`` is the sum
    of record b's target losses times public weights, divided by the number of its targets that are not ignored, if
    they lie together; where records chose the targets (``logits[mask]``), ``l_b`` is the sum itself.

    Args:
        rows: Number of rows of the batch, one or more per record.
        forms: How the targets of every call lie, by line; what a tracer finds is added. ``None``: nobody has looked.
        tracer: Tells how targets lie. Without one, calls must have the forms that were found.
        enabled: If false, losses are left alone, and refused where that makes one record's loss depend on others.
    """

    def __init__(self, rows: int, forms: Forms | None, tracer: RowTracer | None = None, enabled: bool = True) -> None:
        super().__init__()
        self._rows, self._forms, self._tracer, self._enabled = rows, forms, tracer, enabled
        self._calls: dict[str, int] = {}
        #: What was changed, by line.
        self.changed: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _ARGUMENTS:
            return func(*args, **kwargs)
        given = {**dict(zip(_ARGUMENTS[func], args, strict=False)), **kwargs}
        target = given["target"]
        old_style = given.get("size_average") is not None or given.get("reduce") is not None
        if given.get("reduction", "mean") != "mean" or old_style or target.is_floating_point() or not target.dim():
            return func(*args, **kwargs)
        form = self._form(given)
        if form == ALONE:
            return func(*args, **kwargs)
        if form == PLAIN:
            self._check_plain(given)
            return func(*args, **kwargs)
        return self._mean_over_records(func, given, form)

    def _check_plain(self, given: dict[str, Any]) -> None:
        """A loss that is left alone must have no weights, and no target that is ignored, in any step."""
        ignored = given.get("ignore_index", -100)
        if self._tracer is None and (given.get("weight") is not None or bool((given["target"] == ignored).any())):
            raise UnsupportedModelError(
                f"The loss at {here()} is a mean of several records that is divided by class weights, or by the "
                "number of targets that "
                "are "
                f"not {ignored}, of several records: what a record adds depends on the others. Average each record's "
                "own "
                "targets first, then over records; with the self-check and per_record_means on, that is done where a "
                "record's targets lie together."
            )

    def _form(self, given: dict[str, Any]) -> str:
        target = given["target"]
        if self._forms is None:
            if self._rows == 1:
                return RECORDS_FIRST
            return ONE_EACH if self._enabled and target.dim() == 1 and len(target) == self._rows else PLAIN
        line = here()
        index = self._calls[line] = self._calls.get(line, -1) + 1
        known = self._forms.get(line, [])
        if self._tracer is not None:
            found = self._found(given)
            known = self._forms.setdefault(line, known)
            known[index : index + 1] = [_both(known[index], found, line) if index < len(known) else found]
            return found
        form = known[index] if index < len(known) else None
        if form is None and known and len(set(known)) == 1:  # a loop may call the loss more often than before
            form = known[0]
        shape = target.shape
        fits = {
            ONE_EACH: shape[0] == self._rows,
            RECORDS_FIRST: shape[0] % self._rows == 0,
            TIME_FIRST: shape[0] % self._rows == 0,
            RECORDS_SECOND: len(shape) > 1 and shape[1] == self._rows,
        }
        if form is not None and fits.get(form, True):
            return form
        raise FormChanged(f"A loss was not computed when the model was examined, and is now (at {line}).")

    def _found(self, given: dict[str, Any]) -> str:
        """How the targets lie, from who owns them."""
        assert self._tracer is not None
        logits, target = given["input"], given["target"]
        known, of_target = self._tracer.state(logits), self._tracer.state(target)
        classes = 1 if logits.dim() > 1 else 0
        owner = constant(PUBLIC, target.dim())
        if known is not None:
            own = owners.reduce(known.owner, [classes], linear=False, keepdim=False)
            owner = join(owner, own)
        if of_target is not None:
            owner = join(owner, of_target.owner)
        owner = owners.compress(owner)
        if bool((owner < owners.RANDOM).any()) or len(owner[owner >= 0].unique()) < 2:
            return ALONE
        if not self._enabled:
            return PLAIN
        if any(s is not None and s.ragged for s in (known, of_target)):
            return CHOSEN if owners.varying(owner) == [0] else PLAIN
        placed = owners.blocks(owner)
        if placed is None or placed[0] > 1 or placed[1].numel() != target.shape[placed[0]]:
            return PLAIN
        dim, flat = placed
        count = target.shape[dim]
        along, order = flat.flatten(), torch.arange(count)
        if count % self._rows:
            return PLAIN
        if dim == 1:
            return RECORDS_SECOND if count == self._rows and torch.equal(along, order) else PLAIN
        if torch.equal(along, order):
            return ONE_EACH if count == self._rows else RECORDS_FIRST
        return TIME_FIRST if torch.equal(flat, order.view(-1, len(flat)).T) else PLAIN

    def _mean_over_records(self, func: Any, given: dict[str, Any], form: str) -> Tensor:
        weight, target = given.get("weight"), given["target"]
        ignored = given.get("ignore_index", -100)
        losses = func(**{**given, "reduction": "none"})
        if weight is not None:
            losses = losses / weight.mean()
        if form == CHOSEN:
            if self._tracer is not None:
                what = "the targets that records chose are added up, and divided by the number of records"
                self.changed[here()] = f"{func.__name__} is a mean over records: {what}"
            return losses.sum() / self._rows
        several = len(target) != self._rows or target.dim() > 1
        if several:
            counted = (target != ignored).to(losses.dtype)
            losses, counted = (self._by_row(t, form).flatten(1).sum(1) for t in (losses, counted))
            losses = losses / counted.clamp(min=1)
        if self._tracer is not None:
            self._note(func, weight, several)
        return losses.mean()

    def _by_row(self, tensor: Tensor, form: str) -> Tensor:
        """``(B, positions, ...)``."""
        if form == RECORDS_SECOND:
            return tensor.transpose(0, 1)
        if form == TIME_FIRST:
            return tensor.unflatten(0, (-1, self._rows)).transpose(0, 1)
        return tensor.unflatten(0, (self._rows, -1))

    def _note(self, func: Any, weight: Tensor | None, several: bool) -> None:
        what = []
        if weight is not None:
            what.append("class weights are divided by their mean, not by those of the batch")
        if several:
            what.append("a record's targets are averaged first, without those that are ignored")
        if what:
            self.changed[here()] = f"{func.__name__} is a mean over records: {'; '.join(what)}"


def _both(one: str, other: str, line: str) -> str:
    """The form that holds for two passes.

    Raises:
        UnsupportedModelError: There is none.
    """
    if one == other or (other == ONE_EACH and one in (RECORDS_FIRST, TIME_FIRST)):
        return one
    if one == ONE_EACH and other in (RECORDS_FIRST, TIME_FIRST):
        return other
    if PLAIN in (one, other) or ALONE in (one, other):
        return PLAIN
    raise UnsupportedModelError(
        f"The loss at {line} gets a record's targets in one arrangement in some steps ({one}), and in another in "
        "others "
        f"({other}): which are whose cannot be told. Compute the two losses in lines of their own."
    )
