"""Exchange tests, for what a trace of operations cannot see: collation, data sets, branches that it did not take.

Some records stay and the others are exchanged: for real ones, chosen to differ, and for extreme ones (zeros, huge
numbers, NaN). What is seen of those that stay must not change. Both halves are exchanged, and every second record; all
records change places; some are left out. Dropout is off and other random numbers are drawn per row
(`AlignedRandomness`), so that random models are compared like others.

These tests look at some records and at this state of the model: they find mistakes, and prove nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_dp.batches import Concatenated, Layout, Rows, find_layout, leaves_with_layout, parts_of
from lightning_dp.engines import BookKeeping, PerExample, set_aside
from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.forms import FormChanged, form_changed_in
from lightning_dp.gradients import PerExampleGradient, wide
from lightning_dp.independence.examination import Findings, examine
from lightning_dp.independence.shadow import AlignedRandomness, Shadow, random_state_kept, seed_everything
from lightning_dp.independence.subject import Subject, loss_of, record_size, reduced, stand_in
from lightning_dp.records import Call

WAY_OUT = "or use engine='per_example', which is slow but takes any layer"


def check_collation(subject: Subject, seed: int = 0) -> list[str]:
    """A record's own rows of a batch must be the same in another company.

    Returns:
        What could not be looked at, in sentences.

    Raises:
        PrivacyConfigurationError: Collation, or a transfer hook, mixes records, drops or repeats some.
    """
    records = subject.records
    rows = len(records) * subject.copies
    half = len(records) // 2
    with random_state_kept():
        batches = []
        unaligned = False
        others = [*records[half:], *records[:half]]
        companies = [records, [*records[:half], *others[: len(records) - half]], [*others[:half], *records[half:]]]
        for company in [*companies, [*records, *records[:3]]]:
            count = len(company) * subject.copies
            aligned = AlignedRandomness(count, seed)
            with aligned:
                batches.append(subject.transfer(subject.collated(company, seed)))
            unaligned |= aligned.unaligned
        whole, *exchanged, larger = batches
        _check_count(whole, rows)
        try:
            layout = find_layout(whole, rows, larger, rows + 3 * subject.copies)
        except TypeError as error:
            raise PrivacyConfigurationError(str(error)) from None
        kept = [slice(0, half * subject.copies), slice(half * subject.copies, rows)]
        for batch, own in zip(exchanged, kept, strict=True):
            if not _same_rows(whole, batch, layout, rows, own):
                if _in_some_order(subject, whole, layout, rows):
                    return ["collation puts records into an order of its own: places were not compared"]
                if unaligned:
                    return ["collation draws random numbers that depend on the whole batch: rows were not compared"]
                raise PrivacyConfigurationError(
                    "Exchanging some records of a batch changed the rows of others: collate_fn or a transfer hook "
                    "(on_after_batch_transfer) mixes records (mixup, normalising by the batch) or sorts them anew. "
                    "Let it treat every record by itself; mix or normalise in the data set, by public numbers."
                )
    return []


def _check_count(batch: Any, rows: int) -> None:
    """A collate function that drops records is told so first."""
    lengths = _lengths(batch)
    if lengths and rows > max(lengths):
        raise PrivacyConfigurationError(
            f"collate_fn made a batch of at most {max(lengths)} rows of {rows} records: it drops some (None, say). How "
            "many are left would depend on the data. Leave such records out of the data set instead: "
            "torch.utils.data.Subset(dataset, [i for i in range(len(dataset)) if is_good(dataset[i])])."
        )


def _lengths(batch: Any) -> set[int]:
    """How long the parts of a batch are, wherever they count."""
    if isinstance(batch, Tensor):
        return set(batch.shape)
    parts = parts_of(batch)
    return set() if parts is None else {len(parts)}.union(*map(_lengths, parts.values()))


def _rows_of(batch: Any, layout: Layout, rows: int, own: slice) -> list[Any]:
    found: list[Any] = []
    for leaf, where, example in leaves_with_layout(batch, layout):
        if isinstance(where, Rows) and isinstance(leaf, Tensor):
            each = leaf.shape[where.dim] // rows
            start, stop, _ = own.indices(rows)
            found.append(leaf.narrow(where.dim, start * each, (stop - start) * each))
        elif example is not None and example in range(*own.indices(rows)):
            found.append(leaf)
        elif isinstance(where, Concatenated):
            found.append(None)
    return found


def _same_rows(one: Any, other: Any, layout: Layout, rows: int, own: slice) -> bool:
    pairs = zip(_rows_of(one, layout, rows, own), _rows_of(other, layout, rows, own), strict=False)
    return all(_same_leaf(a, b) for a, b in pairs)


def _same_leaf(one: Any, other: Any) -> bool:
    """Equal as far as both are long: padding may go on."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return isinstance(one, Tensor) == isinstance(other, Tensor)
    if one.dim() != other.dim():
        return False
    common = tuple(slice(0, min(a, b)) for a, b in zip(one.shape, other.shape, strict=True))
    a, b = one[common], other[common]
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _in_some_order(subject: Subject, whole: Any, layout: Layout, rows: int) -> bool:
    """Whether the rows are those of single records, in an order that collation chose (by length, say)."""
    left = list(range(rows))
    for record in subject.records:
        alone = subject.transfer(subject.collated([record]))
        own = _rows_of(alone, layout, subject.copies, slice(0, 1))
        place = next(
            (r for r in left if all(map(_same_leaf, own, _rows_of(whole, layout, rows, slice(r, r + 1))))), None
        )
        if place is None:
            return False
        left.remove(place)
    return True


def check_copies_stay_together(subject: Subject) -> None:
    """The augmentations of a record must stay side by side.

    Raises:
        PrivacyConfigurationError: Collation or transfer moves rows, so that they cannot be told from another record's.
    """
    try:
        unseen = check_collation(subject)
    except PrivacyConfigurationError as error:
        raise PrivacyConfigurationError(
            f"augmentation_multiplicity={subject.copies}: exchanging some records of a batch changed the rows of "
            "others, so that the augmentations of a record cannot be told from those of another. Collate and transfer "
            f"must keep the order of rows (no sorting by length), and treat each by itself. ({error})"
        ) from None
    if any("order of its own" in sentence for sentence in unseen):
        raise PrivacyConfigurationError(
            f"augmentation_multiplicity={subject.copies}: exchanging some records of a batch changed the rows of "
            "others: collation sorts them, so that the augmentations of a record cannot be told from those of another."
        )


def check_exchange(subject: Subject, findings: Findings, compare_places: bool = True) -> list[str]:
    """Runs the step on records of which some are exchanged, and compares what is seen of the others.

    Args:
        subject: The step and the records.
        findings: What the tracer found. Where an exchanged record makes the step run other code, that is traced as
        well,
            and added.
        compare_places: Whether collation keeps the order of records.

    Returns:
        What could not be looked at, in sentences.

    Raises:
        UnsupportedModelError: With the layer's or parameter's name.
    """
    with random_state_kept():
        if not subject.needs_layers:  # no layer is recorded: whole gradients are compared
            return _check_sums(subject)
        return _Exchange(subject, findings, compare_places).run()


#: How often a pass may turn out to run code that was not traced: LayerDrop skips other layers each time.
_ATTEMPTS = 4


class _Exchange:
    def __init__(self, subject: Subject, findings: Findings, compare_places: bool) -> None:
        self._subject, self._findings, self._compare_places = subject, findings, compare_places
        self._unseen: list[str] = []

    def run(self) -> list[str]:
        records = self._subject.records
        count, half = len(records), len(records) // 2
        first, second = list(range(half)), list(range(half, count))
        everyone = [*first, *second]
        base = self._run(records, compare_with_autograd=True)
        if self._compare_places:
            turned = [records[i] for i in [*second, *first]]
            self._compare(base, turned, everyone, [*range(count - half, count), *range(count - half)], "places")
            extremes = [
                stand_in(records[i], k) for i, k in zip(second, ["large", "zeros", "nan"] * count, strict=False)
            ]
            self._compare(base, [*(records[i] for i in first), *extremes], first, first, "extreme")
            early = [records[second[i % len(second)]] for i in first]
            self._compare(base, [*early, *(records[i] for i in second)], second, second, "others", seed=1)
            evens, odds = everyone[0::2], everyone[1::2]
            mixed = [records[i] if i in evens else records[odds[(i // 2 + 1) % len(odds)]] for i in everyone]
            self._compare(base, mixed, evens, evens, "others", seed=2)
            self._compare(base, [records[0] if i in second else records[i] for i in everyone], first, first, "others")
            sizes = [record_size(record) for record in records]
            short = [i for i in everyone if sizes[i] < max(sizes)]
            if short:  # without the longest records, the others are padded less
                shortest = records[sizes.index(min(sizes))]
                self._compare(base, [records[i] if i in short else shortest for i in everyone], short, short, "others")
        self._check_reduction(base, [records[i] for i in first], first if self._compare_places else [])
        self._check_full_size(base)
        return self._unseen

    def _check_full_size(self, base: _Seen) -> None:
        """In a batch as large as they come, every copy of a record must get what the record gets in a small one."""
        subject, count = self._subject, len(self._subject.records)
        size = subject.largest_batch
        if size <= count or base.unaligned or not self._compare_places:
            return
        kept = [place % count for place in range(size)]
        full = self._run([subject.records[i] for i in kept], streams=kept, keep_calls=False)
        factor = count / size if subject.loss_reduction == "mean" else 1.0
        difference = _difference(base, full, kept, list(range(size)), factor)
        if difference:
            raise UnsupportedModelError(
                f"{difference}: in a batch of {size} records some count for more, or less, than in one of {count}: by "
                "their place (only the first so many rows, chunks of unequal weight), or by how many there are. Give "
                "every record the same part in the loss, whatever the size of the batch."
            )

    def _compare(
        self, base: _Seen, records: list[list[Any]], kept: list[int], places: list[int], kind: str, seed: int = 0
    ) -> None:
        """Compares what is seen of the ``kept`` records with what is seen at their ``places`` among others."""
        seed = seed if base.drew else 0  # another random state, where that makes a difference
        reference = base if seed == 0 else self._run(self._subject.records, seed=seed)
        # Every record draws what it drew before, wherever it is now.
        streams = list(range(len(records)))
        for record, place in zip(kept, places, strict=True):
            streams[place] = record
        try:
            other = self._run(records, seed=seed, streams=streams)
        except UnsupportedModelError:
            raise
        except Exception:
            if kind == "extreme":  # such numbers may be refused by user code
                return
            raise
        if reference.unaligned and reference.shapes() != other.shapes():
            self._note("random numbers that depend on the whole batch were drawn: not all passes could be compared")
            return
        difference = _difference(reference, other, kept, places)
        if difference:
            if reference.unaligned:
                self._note("random numbers that depend on the whole batch were drawn: not all passes could be compared")
                return
            what = "putting records into other places" if kind == "places" else "exchanging some examples of the batch"
            raise UnsupportedModelError(
                f"{difference}: {what} changed what was seen of others. Batch statistics, padding that is not masked, "
                "a loss over pairs within the batch, a softmax over dimension 0, a mean over all tokens of the batch, "
                "or mixing in the collate function do that; make training_step treat every example by itself (average "
                "per example first, then over examples)."
            )

    def _note(self, sentence: str) -> None:
        if sentence not in self._unseen:
            self._unseen.append(sentence)

    def _check_reduction(self, whole: _Seen, records: list[list[Any]], kept: list[int]) -> None:
        """Leaving out records must change the others' gradients as the announced reduction says, and not otherwise."""
        subject = self._subject
        factor = len(subject.records) / len(records) if subject.loss_reduction == "mean" else 1.0
        few = self._run(records)
        if kept and not whole.unaligned:
            difference = _difference(whole, few, kept, kept, factor)
        else:
            larger, smaller = factor * whole.typical_gradient(), few.typical_gradient()
            off = larger > 2 * smaller or smaller > 2 * larger
            difference = "The loss" if off else None
        if difference:
            raise UnsupportedModelError(
                f"{difference}: a smaller batch changed an example's gradient, which loss_reduction="
                f"'{subject.loss_reduction}' does not explain. If training_step returns a sum over the examples, pass "
                "loss_reduction='sum'; if it returns a mean, 'mean'; otherwise the loss is normalised by something "
                "that depends on the data."
            )

    def _run(self, records: Sequence[list[Any]], **kwargs: Any) -> _Seen:
        """One pass; the step is traced first where these records make it run code that was not."""
        for seed in range(_ATTEMPTS):
            try:
                return self._pass(records, **kwargs)
            except (FormChanged, SystemError) as error:
                if form_changed_in(error) is None:
                    raise
                self._findings.merge(examine(replace(self._subject, records=list(records)), seed=seed))
        return self._pass(records, **kwargs)

    def _pass(
        self,
        records: Sequence[list[Any]],
        compare_with_autograd: bool = False,
        seed: int = 0,
        streams: Sequence[int] | None = None,
        keep_calls: bool = True,
    ) -> _Seen:
        subject = self._subject
        shadow = Shadow(subject.module).module
        engine = BookKeeping(shadow)
        engine.copies, engine.forms = subject.copies, self._findings.forms
        recorder = engine.make_recorder(None if keep_calls else engine.consume)
        rows = len(records) * subject.copies
        aligned = AlignedRandomness(rows, seed, _rows_in(streams, subject.copies))
        with warnings.catch_warnings(), set_aside(engine.parameters.values()), subject.stand_in(shadow):
            warnings.simplefilter("ignore")
            seed_everything(seed)
            with aligned:
                batch = subject.transfer(subject.collated(records, seed))
                recording = recorder.forward(rows, keep_requires_grad=compare_with_autograd)
                with recording, subject.watch(rows, hold=True), subject.context():
                    output = shadow.training_step(batch, *subject.arguments)
                loss = reduced(loss_of(output), subject.loss_reduction)
                for parameter in engine.parameters.values():
                    parameter.grad = None  # the step may have run backward passes of its own
                with recorder.backward():
                    shadow.backward(loss)
            calls = recorder.take() if keep_calls else {}
            for layer, made in calls.items():
                for call in made:
                    engine.consume(layer, call)
            gradients = engine.gradients()
            if compare_with_autograd:
                _compare_with_autograd(engine, gradients, calls, len(records))
        return _Seen(
            calls,
            {name: gradient.squared_norms().sqrt() for name, gradient in gradients.items()},
            aligned.drew,
            aligned.unaligned,
            subject.copies,
        )


def _rows_in(examples: Sequence[int] | None, copies: int) -> list[int] | None:
    """The rows of these examples."""
    return None if examples is None else [i * copies + k for i in examples for k in range(copies)]


def _check_sums(subject: Subject) -> list[str]:
    """The gradient of a batch must be the sum of those of single records, or their mean: for an engine that takes one
    record at a time, with which another loss than the user's would be trained otherwise."""
    records = subject.records[:6]
    whole, unaligned = _whole_gradient(subject, records, 0)
    try:
        alone = [_whole_gradient(subject, [record], index)[0] for index, record in enumerate(records)]
    except (RuntimeError, IndexError, ValueError) as error:
        raise UnsupportedModelError(
            f"engine='per_example' passes one record at a time, and training_step fails on a batch of one: {error}"
        ) from None
    if unaligned:
        return ["random numbers that depend on the whole batch were drawn: single records were not compared with it"]
    factor = 1 / len(records) if subject.loss_reduction == "mean" else 1.0
    largest = max((g.norm().item() for found in alone for g in found.values()), default=0.0)
    for name, gradient in whole.items():
        parts = torch.stack([found[name] for found in alone])
        scale = max(parts.norm().item() * factor, 1e-3 * largest * factor)
        if not _close(parts.sum(0) * factor, gradient, scale, _is_low_precision(gradient)):
            raise UnsupportedModelError(
                f"Parameter '{name}': the gradients of single records do not add up to that of their batch, so that "
                f"engine='per_example' would train another loss. loss_reduction='{subject.loss_reduction}' does not "
                "explain it: if training_step returns a sum over the examples, pass loss_reduction='sum'; otherwise "
                "records influence one another (a loss over pairs, batch statistics, a normaliser that counts). Make "
                "training_step treat every record by itself."
            )
    return []


def _whole_gradient(subject: Subject, records: Sequence[list[Any]], first: int) -> tuple[dict[str, Tensor], bool]:
    shadow = Shadow(subject.module).module
    rows = len(records) * subject.copies
    aligned = AlignedRandomness(rows, 0, [first * subject.copies + r for r in range(rows)])
    engine = PerExample(shadow)
    with warnings.catch_warnings(), subject.stand_in(shadow):
        warnings.simplefilter("ignore")
        seed_everything(0)
        with aligned:
            batch = subject.transfer(subject.collated(records))
            with subject.watch(rows), subject.context():
                loss = reduced(loss_of(shadow.training_step(batch, *subject.arguments)), subject.loss_reduction)
            for parameter in shadow.parameters():
                parameter.grad = None
            shadow.backward(loss)
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in engine.parameters.items()
    }
    return found, aligned.unaligned


@dataclass
class _Seen:
    """What one pass through a shadow showed."""

    calls: dict[str, list[Call]]
    #: Per-example norms of the gradients of every parameter.
    norms: dict[str, Tensor]
    #: Whether random numbers were drawn, and whether some cannot be told apart by rows.
    drew: bool
    unaligned: bool
    #: Rows of the calls that belong to each example.
    copies: int

    def typical_gradient(self) -> float:
        """The median, over examples, of the norm of the gradient."""
        norms = torch.stack(list(self.norms.values())).norm(dim=0)
        return norms.median().item()

    def shapes(self) -> dict[str, list[torch.Size]]:
        """The shapes of what layers saw, of one example."""
        return {name: [call.input.shape[1:] for call in made] for name, made in self.calls.items()}


def _compare_with_autograd(
    engine: BookKeeping, gradients: Mapping[str, PerExampleGradient], calls: dict[str, list[Call]], size: int
) -> None:
    """The engine's gradients with weights of one must add up to what autograd found."""
    largest = max((p.grad.norm().item() for p in engine.parameters.values() if p.grad is not None), default=0.0)
    low_precision = any(_is_low_precision(c.grad_output) for made in calls.values() for c in made)
    for name, parameter in engine.parameters.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if not expected.isfinite().all():
            continue
        found = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        scale = 1e-3 * largest  # next to that, a gradient that should be zero is rounding
        if name in gradients:
            gradients[name].add_weighted_sum_(found, torch.ones(size, device=parameter.device))
            scale = max(scale, gradients[name].squared_norms().sum().sqrt().item())
        if not _close(found, expected, scale, low_precision):
            raise UnsupportedModelError(
                f"Parameter '{name}': its gradient is not explained by its layer's calls. It is used outside the "
                "layer's forward (a weight passed to a function, a penalty on weights in the loss: use the "
                "optimizer's weight_decay), through a function stored on the module that a copy cannot follow, or the "
                f"layer is re-run in the backward (activation checkpointing). Call the layer itself, {WAY_OUT}."
            )


#: Relative error of what bfloat16 adds up over a batch.
_LOW_TOLERANCE = 0.2


def _is_low_precision(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)


def _close(found: Tensor, expected: Tensor, scale: float = 0.0, low_precision: bool = False) -> bool:
    """Equal up to rounding, in Euclidean norm; entries that are not finite on either side do not count.

    ``scale`` is the norm of what was added up to give these, when they may have cancelled.
    """
    tolerance = _LOW_TOLERANCE if low_precision or _is_low_precision(expected) else 1e-3
    found, expected = wide(found), wide(expected)
    difference, size = (found - expected).norm().item(), expected.norm().item()
    if not (math.isfinite(difference) and math.isfinite(size)):
        finite = found.isfinite() & expected.isfinite()
        found, expected = found.double().where(finite, 0), expected.double().where(finite, 0)
        difference, size = (found - expected).norm().item(), expected.norm().item()
    return difference <= tolerance * max(size, scale) + 1e-12


def _difference(
    first: _Seen, second: _Seen, kept: Sequence[int], places: Sequence[int], factor: float = 1.0
) -> str | None:
    """Where the ``kept`` examples of a pass differ from what another has in their ``places``.

    The first pass's gradients are multiplied by ``factor``. Names the first layer whose input differs, else the layer
    nearest to the loss whose upstream gradient does. What has another length (padding) is compared by the norm of the
    gradient.
    """
    low = any(_is_low_precision(c.grad_output) for made in first.calls.values() for c in made)
    rows = torch.tensor(_rows_in(list(kept), first.copies))
    others = torch.tensor(_rows_in(list(places), first.copies))

    uppermost = max(
        (wide(c.grad_output).norm().item() for made in first.calls.values() for c in made if c.grad_output is not None),
        default=0.0,
    )
    uppermost = uppermost if math.isfinite(uppermost) else 0.0

    def same(one: Tensor | None, other: Tensor | None, factor: float, scale: float = 0.0) -> bool:
        if one is None or other is None or one.shape[1:] != other.shape[1:]:
            return True
        a, b = one[rows.to(one.device)], other[others.to(other.device)]
        if a.is_floating_point() and not torch.equal(a.isfinite(), b.isfinite()):
            return False
        return _close(b, a * factor if factor != 1 else a, scale, low_precision=low)

    def pairs(name: str) -> list[tuple[Call, Call]]:
        made, remade = first.calls[name], second.calls.get(name, [])
        return list(zip(made, remade, strict=True)) if len(made) == len(remade) else []

    # Padding that is longer makes rows of padding: what is seen there is nobody's, and only gradients count.
    same_lengths = bool(second.calls) and first.shapes() == second.shapes()
    for name in first.calls if same_lengths else ():
        if not all(same(a.input, b.input, 1.0) for a, b in pairs(name)):
            return f"Layer '{name}'"
    for name in reversed(first.calls) if same_lengths else ():
        if not all(same(a.grad_output, b.grad_output, factor, 1e-3 * uppermost * factor) for a, b in pairs(name)):
            return f"Layer '{name}'"
    kept_index, place_index = torch.tensor(list(kept)), torch.tensor(list(places))
    # Next to the largest, a gradient that should be zero (of a bias before a normalisation) is rounding.
    largest = max((norms[kept_index.to(norms.device)].norm().item() for norms in first.norms.values()), default=0.0)
    for name in {**first.norms, **second.norms}:
        zeros = next(iter({**first.norms, **second.norms}.values()))
        one, other = first.norms.get(name), second.norms.get(name)
        a = zeros.new_zeros(len(kept)) if one is None else one[kept_index.to(one.device)]
        b = zeros.new_zeros(len(places)) if other is None else other[place_index.to(other.device)]
        if not _close(b, a * factor, 1e-3 * factor * largest, low):
            return f"Parameter '{name}'"
    return None
