"""Exchange tests, for what a trace of operations cannot see: collation, padding, branches that it did not take.

Some records stay and the others are exchanged: for real ones, chosen to differ, and for extreme ones (zeros, huge
numbers, NaN). What is seen of those that stay must not change. Both halves are exchanged, and every second record; all
records change places; some are left out. Dropout is off and other random numbers are drawn per row
(`AlignedRandomness`), so that random models are compared like others.

These tests look at some records and at this state of the model: they find mistakes, and prove nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_dp.errors import FormChanged, UnsupportedModelError
from lightning_dp.gradients.engines import PerExample
from lightning_dp.gradients.forms import form_changed_in
from lightning_dp.training.batches import Rows, leaves_with_layout
from lightning_dp.training.independence.answers import check_answers
from lightning_dp.training.independence.examination import examine
from lightning_dp.training.independence.findings import Findings
from lightning_dp.training.independence.passes import (
    Seen,
    close,
    first_difference,
    has_common_factor,
    is_low_precision,
    run_pass,
)
from lightning_dp.training.independence.shadow import AlignedRandomness, random_state_kept, seed_everything
from lightning_dp.training.independence.subject import Subject, loss_of, record_size, reduced, stand_in


def check_exchange(subject: Subject, findings: Findings, compare_places: bool = True) -> list[str]:
    """Runs the step on records of which some are exchanged, and compares what is seen of the others.

    Args:
        subject: The step and the records.
        findings: What the tracer found on the first of them. Where an exchanged record makes the step run other code,
            that is traced as well, and added.
        compare_places: Whether collation keeps the order of records.

    Returns:
        What could not be looked at, in sentences.

    Raises:
        UnsupportedModelError: With the layer's or parameter's name.
    """
    with random_state_kept():
        if not subject.needs_layers:  # no layer is recorded: whole gradients are compared
            return _check_sums(subject)
        few = replace(subject, records=subject.records[: findings.records])
        unseen = check_answers(few, findings.forms, findings.reads)
        return unseen + _Exchange(subject, findings, compare_places).run()


#: Numbers that records are compared with, and are made to hold, at most.
_CONSTANTS = 16


def _spread(constants: set[tuple[int, float]]) -> list[tuple[int, float]]:
    """Numbers to try: those, and the middle of two that bound an interval."""
    found = sorted(constants)
    middles = [
        (place, (low + high) / 2)
        for (place, low), (other, high) in pairwise(found)
        if place == other and high - low > 1 and not float((low + high) / 2).is_integer()
    ]
    return [*middles, *found]


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
                stand_in(records[i], k)
                for i, k in zip(second, ["large", "zeros", "nan", "small"] * count, strict=False)
            ]
            self._compare(base, [*(records[i] for i in first), *extremes], first, first, "extreme")
            if self._findings.decisions:  # else no branch, and no number that is read, depends on records
                self._compare_with_constants(base, first)
            early = [records[second[0]]] * half  # the same one, so that nothing differs there
            self._compare(base, [*early, *(records[i] for i in second)], second, second, "others", seed=1)
            evens, odds = everyone[0::2], everyone[1::2]
            mixed = [records[i] if i in evens else records[odds[(i // 2 + 1) % len(odds)]] for i in everyone]
            self._compare(base, mixed, evens, evens, "others", seed=2)
            sizes = [record_size(record) for record in records]
            short = [i for i in everyone if sizes[i] < max(sizes)]
            if short:  # without the longest records, the others are padded less
                shortest = records[sizes.index(min(sizes))]
                self._compare(base, [records[i] if i in short else shortest for i in everyone], short, short, "others")
        self._check_reduction(base, [records[i] for i in first], first if self._compare_places else [])
        self._check_full_size(base)
        return self._unseen

    def _check_full_size(self, base: Seen) -> None:
        """In a batch as large as they come, every copy of a record must get what the record gets in a small one."""
        subject, count = self._subject, len(self._subject.records)
        size = subject.largest_batch
        if size <= count or base.unaligned or not self._compare_places:
            return
        kept = [place % count for place in range(size)]
        full = self._run([subject.records[i] for i in kept], streams=kept, keep_calls=False)
        factor = count / size if subject.loss_reduction == "mean" else 1.0
        places = list(range(size))
        difference = first_difference(base, full, kept, places, factor)
        if not difference and has_common_factor(base, full, kept, places, factor):
            difference = "The loss"
        if difference:
            raise UnsupportedModelError(
                f"{difference}: in a batch of {size} records some count for more, or less, than in one of {count}: by "
                "their place (only the first so many rows, chunks of unequal weight), or by how many there are. Give "
                "every record the same part in the loss, whatever the size of the batch."
            )

    def _compare_with_constants(self, base: Seen, first: list[int]) -> None:
        """Compares the first half when records hold a number that the step compares them with, or do not.

        The second half is filled with the number, or left; once beside a first half that is left, and once beside one
        that is filled (a divisor that counts such records is kept at 1 where there are none).
        """
        layout, records = self._findings.layout, self._subject.records
        if layout is None:
            return
        half, count = len(first), len(records)
        numbers = _spread(self._findings.constants)
        if len(numbers) > _CONSTANTS:
            self._note(
                f"records are compared with {len(numbers)} numbers: what the step does where they hold one was tried "
                f"for {_CONSTANTS} of them"
            )
        for place, value in numbers[:_CONSTANTS]:

            def filled(batch: Any, start: int, stop: int, place: int = place, value: float = value) -> Any:
                leaf, where, _ = list(leaves_with_layout(batch, layout))[place]
                assert isinstance(where, Rows)
                each = leaf.shape[where.dim] // count
                leaf.narrow(where.dim, start * each, (stop - start) * each).fill_(value)
                return batch

            self._compare(base, records, first, first, "extreme", edit=partial(filled, start=half, stop=count))
            try:
                some = self._run(records, edit=partial(filled, start=0, stop=half))
            except UnsupportedModelError:
                raise
            except Exception:  # user code may refuse such numbers
                continue
            self._compare(some, records, first, first, "extreme", edit=partial(filled, start=0, stop=count))

    def _compare(
        self,
        base: Seen,
        records: list[list[Any]],
        kept: list[int],
        places: list[int],
        kind: str,
        seed: int = 0,
        edit: Callable[[Any], Any] | None = None,
    ) -> None:
        """Compares what is seen of the ``kept`` records with what is seen at their ``places`` among others."""
        seed = seed if base.drew else 0  # another random state, where that makes a difference
        reference = base if seed == 0 else self._run(self._subject.records, seed=seed)
        # Every record draws what it drew before, wherever it is now.
        streams = list(range(len(records)))
        for record, place in zip(kept, places, strict=True):
            streams[place] = record
        try:
            other = self._run(records, seed=seed, streams=streams, edit=edit)
        except UnsupportedModelError:
            raise
        except Exception:
            if kind == "extreme":  # such numbers may be refused by user code
                return
            raise
        if reference.unaligned and reference.shapes() != other.shapes():
            self._note("random numbers that depend on the whole batch were drawn: not all passes could be compared")
            return
        difference = first_difference(reference, other, kept, places)
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

    def _check_reduction(self, whole: Seen, records: list[list[Any]], kept: list[int]) -> None:
        """Leaving out records must change the others' gradients as ``loss_reduction`` says, and not otherwise."""
        subject = self._subject
        factor = len(subject.records) / len(records) if subject.loss_reduction == "mean" else 1.0
        few = self._run(records)
        if kept and not whole.unaligned:
            difference = first_difference(whole, few, kept, kept, factor)
            if not difference and has_common_factor(whole, few, kept, kept, factor):
                difference = "The loss"
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

    def _run(self, records: Sequence[list[Any]], edit: Callable[[Any], Any] | None = None, **kwargs: Any) -> Seen:
        """One pass; the step is traced first where these records make it run code that was not."""
        subject = replace(self._subject, records=list(records))
        for seed in range(_ATTEMPTS):
            try:
                return run_pass(subject, self._findings.forms, records, edit=edit, **kwargs)
            except (FormChanged, SystemError) as error:
                if form_changed_in(error) is None:
                    raise
                batch = None if edit is None else edit(subject.transfer(subject.collated(records)))
                rows = 0 if edit is None else len(records) * subject.copies
                layout = None if edit is None else self._findings.layout
                self._findings.merge(examine(subject, batch, rows, layout, seed))
        return run_pass(subject, self._findings.forms, records, edit=edit, **kwargs)


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
        if not close(parts.sum(0) * factor, gradient, scale, is_low_precision(gradient)):
            raise UnsupportedModelError(
                f"Parameter '{name}': the gradients of single records do not add up to that of their batch, so that "
                f"engine='per_example' would train another loss. loss_reduction='{subject.loss_reduction}' does not "
                "explain it: if training_step returns a sum over the examples, pass loss_reduction='sum'; otherwise "
                "records influence one another (a loss over pairs, batch statistics, a normaliser that counts). Make "
                "training_step treat every record by itself."
            )
    return []


def _whole_gradient(subject: Subject, records: Sequence[list[Any]], first: int) -> tuple[dict[str, Tensor], bool]:
    shadow = subject.shadow().module
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
