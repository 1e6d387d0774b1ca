"""Losses that are a mean over the batch of something that depends on the batch, understood as means over records.

``cross_entropy`` with class weights, or with targets that are ignored, divides by the weights or the number of the
targets in the batch: what one record adds to the gradient then depends on the others. `PerRecordMeans` computes the
mean over records of each record's own mean instead. Class weights are kept, divided by their mean, which is public.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_dp.forms import FormChanged
from lightning_dp.independence import owners
from lightning_dp.independence.owners import PUBLIC, constant, join
from lightning_dp.independence.source import here

if TYPE_CHECKING:
    from lightning_dp.independence.tracer import RowTracer

_ARGUMENTS = {
    F.cross_entropy: ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    F.nll_loss: ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
}

#: How the targets of one call lie: left alone (one record's own); along dimension 0, one record after another; along
#: dimension 0, time before records; along dimension 0, those that records chose (``logits[mask]``).
ALONE, RECORDS_FIRST, TIME_FIRST, RECORDS_SECOND, CHOSEN = "alone", "records first", "time first", "second", "chosen"


class PerRecordMeans(TorchFunctionMode):
    """Rewrites batch means within a training step.

    Formal guarantee: the result is ``(1/B) Σ_b l_b``, and ``l_b`` depends on record b alone. Proof: ``l_b`` is the sum
    of record b's target losses times public weights, divided by the number of its targets that are not ignored.

    Args:
        rows: Number of rows of the batch, one or more per record.
        forms: How the targets of every call lie, in order; what a tracer finds is added.
        tracer: Tells how targets lie. Without one, calls must have the forms that were found.
        enabled: Without, losses are left alone, and only looked at.
    """

    def __init__(self, rows: int, forms: list[str], tracer: RowTracer | None = None, enabled: bool = True) -> None:
        super().__init__()
        self._rows, self._forms, self._tracer, self._enabled = rows, forms, tracer, enabled
        self._calls = 0
        #: What was changed, by line.
        self.changed: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _ARGUMENTS or not self._enabled:
            return func(*args, **kwargs)
        given = {**dict(zip(_ARGUMENTS[func], args, strict=False)), **kwargs}
        target = given["target"]
        old_style = given.get("size_average") is not None or given.get("reduce") is not None
        if given.get("reduction", "mean") != "mean" or old_style or target.is_floating_point() or not target.dim():
            return func(*args, **kwargs)
        form = self._form(given)
        if form == ALONE:
            return func(*args, **kwargs)
        return self._mean_over_records(func, given, form)

    def _form(self, given: dict[str, Any]) -> str:
        index, self._calls = self._calls, self._calls + 1
        if self._tracer is not None:
            found = self._found(given)
            self._forms[index : index + 1] = [found]
            return found
        form: str | None = None
        if index < len(self._forms):
            form = self._forms[index]
        elif self._forms and len(set(self._forms)) == 1:  # as many as a loop has turns
            form = self._forms[0]
        shape = given["target"].shape
        counted = None if form is None else shape[1] if form == RECORDS_SECOND and len(shape) > 1 else shape[0]
        if form in (ALONE, CHOSEN) or (counted is not None and counted % self._rows == 0):
            return str(form)
        raise FormChanged(f"A loss was not computed when the model was examined, and is now (at {here()}).")

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
        placed = owners.blocks(owner)
        ragged = any(s is not None and s.ragged for s in (known, of_target))
        if ragged and bool((owner >= PUBLIC).all()) and owners.varying(owner) in ([0], []) and len(owner.unique()) > 1:
            return CHOSEN
        if placed is None or ragged:
            return ALONE
        if placed[0] == 1 and placed[1].numel() == target.shape[1] == self._rows:
            along = placed[1].flatten()
            return RECORDS_SECOND if bool((along == torch.arange(self._rows)).all()) else ALONE
        if len(target) % self._rows or placed[1].numel() != len(target) or placed[0] != 0:
            return ALONE
        flat, count = placed[1], len(target)
        along = flat.flatten()
        if bool((along == along.new_tensor(range(count))).all()):
            return RECORDS_FIRST
        if bool((flat == along.new_tensor(range(count)).view(-1, len(flat)).T).all()):
            return TIME_FIRST
        return ALONE

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
