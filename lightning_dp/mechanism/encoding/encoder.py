"""Encoding per-example gradients: the largest coordinates, replaced by the entries of a codebook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from lightning_dp.accounting.events import Magnitudes
from lightning_dp.gradients.base import PerExampleGradient
from lightning_dp.gradients.engine import PerExampleEngine, SummingEngine
from lightning_dp.gradients.precision import full_precision
from lightning_dp.mechanism.clipping import scale_down

#: Magnitudes share a bucket, and so a rank, when exponent and this many bits of the mantissa agree: within 0.4 %.
_MANTISSA = 8


#: Number of buckets: they span 16 octaves down from an example's largest magnitude; smaller ones share the lowest.
_BUCKETS = 16 * 2**_MANTISSA


#: Coordinates that are encoded at once, which stay in a core's cache, and that are materialised at once.
_ENCODED, _MATERIALISED = 2**17, 2**22


class Encoder:
    """Encodes rows of per-example gradients; see `GradientEncoding`.

    Args:
        entries: The codebook's vectors.
        max_norm: Clipping norm C.
        coordinates: d, the length of a row; those of ranks beyond the codebook's become 0.
    """

    def __init__(self, entries: Magnitudes, max_norm: float, coordinates: int) -> None:
        self.max_norm = max_norm
        self.everything = sum(entries.counts) == coordinates
        self._last_ranks = torch.tensor(entries.counts).cumsum(0)
        self._values = torch.tensor(entries.values, dtype=torch.float64)

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes rows ``(B, d)`` in place; returns the norms ``(B,)`` of their top k before scaling, and the factors
        ``(B,)`` that the rows were scaled by."""
        if self.everything and len(self._last_ranks) == len(self._values) == 1:  # a flat codebook: no ranks
            norms = torch.linalg.vector_norm(rows, dim=1)
            factors = scale_down(norms, self.max_norm)
            limit = self.max_norm * float(self._values)
            rows.mul_(factors[:, None]).clamp_(-limit, limit)
            return norms, factors
        magnitudes = rows.abs()
        buckets, lowest = _buckets(magnitudes)
        counts = torch.bincount(buckets, minlength=len(rows) * _BUCKETS).view(-1, _BUCKETS)
        # The last rank of a bucket decides about all that share it.
        last_ranks = counts.flip(1).cumsum(1).flip(1)
        levels = torch.searchsorted(self._last_ranks.to(rows.device), last_ranks)  # L: beyond the codebook's ranks
        chosen = self._nearest(levels, counts, lowest)
        bounds = self._values.new_zeros(len(self._values), self._values.shape[1] + 1)
        bounds[:, :-1] = self._values * self.max_norm
        table = bounds.to(rows)[chosen].gather(1, levels)
        if self.everything:
            norms = torch.linalg.vector_norm(rows, dim=1)
        else:
            is_kept = (levels < len(self._last_ranks)).to(rows.dtype)
            kept = magnitudes * is_kept.flatten().index_select(0, buckets).view_as(rows)
            norms = torch.linalg.vector_norm(kept, dim=1)
        factors = scale_down(norms, self.max_norm)
        limits = table.flatten().index_select(0, buckets).view_as(rows)
        torch.clamp(rows.mul_(factors[:, None]), -limits, limits, out=rows)
        return norms, factors

    def _nearest(self, levels: Tensor, counts: Tensor, lowest: Tensor) -> Tensor:
        """Index ``(B,)`` of the vector of largest cosine with the sorted magnitudes, up to the width of a bucket."""
        if len(self._values) == 1:
            return torch.zeros(len(levels), dtype=torch.long, device=levels.device)
        sums = torch.zeros(len(levels), len(self._last_ranks) + 1, dtype=lowest.dtype, device=levels.device)
        sums.scatter_add_(1, levels, counts * lowest)
        return (sums[:, :-1] @ self._values.T.to(sums)).argmax(1)


def _buckets(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """The bucket of every magnitude, flat, ``(B·d,)``, with `_BUCKETS` numbers for each row; and the least magnitude
    ``(B, _BUCKETS)`` of every bucket.

    A larger magnitude never has a lower bucket: the bits of non-negative floating-point numbers are in their order.
    """
    keys = magnitudes.float().view(torch.int32) >> (23 - _MANTISSA)
    offset = keys.amax(1, keepdim=True) - (_BUCKETS - 1)
    lowest = (torch.arange(_BUCKETS, device=keys.device, dtype=torch.int32) + offset).clamp_(min=0)
    buckets = keys.sub_(offset).clamp_(min=0)
    if len(buckets) > 1:
        buckets += torch.arange(0, len(buckets) * _BUCKETS, _BUCKETS, device=keys.device, dtype=torch.int32)[:, None]
    return buckets.flatten(), (lowest << (23 - _MANTISSA)).view(torch.float32)


class EncodedSum(SummingEngine):
    """Sums of encoded per-example gradients, a micro-batch at a time.

    The gradients of a few examples are materialised at once, of one when the model is large.

    Args:
        engine: Supplies the gradients.
        entries, max_norm: As for `Encoder`.
    """

    def __init__(self, engine: PerExampleEngine, entries: Magnitudes, max_norm: float) -> None:
        self.engine, self.parameters, self.max_examples = engine, engine.parameters, engine.max_examples
        self._encode = Encoder(entries, max_norm, sum(p.numel() for p in self.parameters.values()))
        engine.expects_norms = False
        self._total: Tensor | None = None
        self._batch_size = self._bad = 0

    def reset(self) -> None:
        self._total = None

    def take(self) -> tuple[dict[str, Tensor], float]:
        total, self._total = self._total, None
        if total is None:
            return {}, 1.0
        parts = total.split([p.numel() for p in self.parameters.values()])
        return {name: part.view_as(p) for part, (name, p) in zip(parts, self.parameters.items(), strict=True)}, 1.0

    def nonfinite(self) -> int:
        return self._bad

    def forward(self, batch_size: int) -> AbstractContextManager[None]:
        self._batch_size = batch_size
        self.engine.forms = self.forms
        return self.engine.forward(batch_size)

    @contextmanager
    def backward(self, scale: float = 1.0) -> Iterator[None]:
        self._bad, self.norms, self.factors = 0, None, None
        with self.engine.backward(scale):
            yield
        gradients = self.engine.gradients()
        if gradients:
            with full_precision(next(iter(self.parameters.values())).device):
                self._add(gradients, scale)

    def _add(self, gradients: dict[str, PerExampleGradient], scale: float) -> None:
        count = self._batch_size
        sizes = [p.numel() for p in self.parameters.values()]
        some = max(1, _MATERIALISED // sum(sizes))
        measured = []
        dtype = max((p.dtype for p in self.parameters.values()), key=lambda dtype: dtype.itemsize)
        like = next(iter(self.parameters.values()))
        rows = like.new_empty(min(some, count), sum(sizes), dtype=torch.promote_types(dtype, torch.float32))
        for start in range(0, count, some):
            part = rows[: count - start]
            for name, column in zip(self.parameters, part.split(sizes, 1), strict=True):
                if name in gradients:
                    gradients[name].part(start, start + some).write_(column, scale)
                else:
                    column.zero_()
            for few in part.split(max(1, _ENCODED // max(sum(sizes), _BUCKETS))):
                bad = ~torch.linalg.vector_norm(few, dim=1).isfinite()
                if bad.any():
                    self._bad += int(bad.sum())
                    few.masked_fill_(bad[:, None], 0)
                norms, factors = self._encode(few)
                measured.append(torch.stack([norms / scale, factors]))
            self._total = part.sum(0) if self._total is None else self._total.add_(part.sum(0))
        if self.keep_norms:
            self.norms, self.factors = torch.cat(measured, 1)[..., None].unbind(0)
