"""What if a number that the step reads were another?

A tracer cannot follow a number once it is Python's (`.item()`, `.tolist()`): it may divide every record's loss, or only
be printed. So the step is run again, on the same records, and is told something else where it reads. A number that
belongs to one record may change that record's gradient and no other's. A number of several records that changes the
gradients of two of them is a factor, a divisor or a threshold that they share. (A length up to which all are padded
changes nothing, where padding is masked.) These tests find what does that on the branch that is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.forms import CallForms
from lightning_dp.gradients.source import is_own_work
from lightning_dp.torch_api import READ_NUMBER, TorchDispatchMode, silently_read
from lightning_dp.training.independence.passes import Seen, first_difference, run_pass
from lightning_dp.training.independence.subject import Subject
from lightning_dp.training.independence.tracer import Read

#: Lines whose numbers are changed one line at a time; those of all others, together.
_LINES = 6

#: Random states in which the step is run until it reads what was traced: which layers run may be drawn.
_ATTEMPTS = 4


#: Another answer in place of what is read.
Alter = Callable[[Read, Tensor], Tensor]


class _OtherReads(Exception):
    """A pass read something else than the one that was traced."""


class _Answers:
    """Matches every read, by its number, with that which the tracer noted, and answers something else."""

    def __init__(self, reads: Sequence[Read], alter: Alter) -> None:
        self.number = 0
        self._reads, self._alter = reads, alter

    def read(self, tensor: Tensor) -> Tensor:
        if is_own_work():
            return tensor
        if self.number >= len(self._reads) or self._reads[self.number].shape != tensor.shape:
            raise _OtherReads
        read = self._reads[self.number]
        self.number += 1
        return self._alter(read, tensor)


class _Scalars(TorchDispatchMode):
    def __init__(self, answers: _Answers) -> None:
        super().__init__()
        self._answers = answers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is READ_NUMBER:
            args = (self._answers.read(args[0]),)
        return func(*args, **(kwargs or {}))


class _Arrays(TorchFunctionMode):
    def __init__(self, answers: _Answers) -> None:
        super().__init__()
        self._answers = answers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = silently_read(func, args)
        if place is not None:
            args = (*args[:place], self._answers.read(args[place]), *args[place + 1 :])
        return func(*args, **(kwargs or {}))


@contextmanager
def _answering(answers: _Answers) -> Iterator[None]:
    with _Scalars(answers), _Arrays(answers):
        yield


def check_answers(subject: Subject, forms: CallForms, reads: Sequence[Read]) -> list[str]:
    """Tells the step other numbers than it reads, and compares gradients.

    Args:
        subject: The step, and the records that were traced.
        forms: How its layers are called.
        reads: What was read, in order.

    Returns:
        What could not be looked at, in sentences.

    Raises:
        UnsupportedModelError: With the line where a number is read that other records' gradients depend on.
    """
    read_at = list(dict.fromkeys(read.line for read in reads if read.owner is not None))
    if not read_at:
        return []
    for seed in range(_ATTEMPTS):
        check = _Check(subject, forms, reads, seed)
        base = check.run(lambda read, tensor: tensor)
        if base is not None:
            break
    else:
        return [
            f"numbers that belong to records are read at {', '.join(read_at[:3])}, and not the same ones when the "
            "step runs again: what it does with others could not be compared"
        ]
    count = len(subject.records)
    for record in dict.fromkeys((0, count - 1)):
        for change in (_other_owned, _less_owned):
            other = check.run(_changed(partial(Read.of, record=record), change))
            if other is None:
                continue
            others = [i for i in range(count) if i != record]
            if first_difference(base, other, others, others):
                where = ", ".join(dict.fromkeys(read.line for read in reads if read.of(record) is not None))
                raise UnsupportedModelError(
                    f"A number of one record is read at {where[:400]} (.item(), if …, .tolist()), and other records' "
                    "gradients depend on it. Let each record decide about itself only: torch.where, or a weight per "
                    "record."
                )
    lines = list(dict.fromkeys(read.line for read in reads if read.of_several() is not None))
    for group in [[line] for line in lines[:_LINES]] + ([lines[_LINES:]] if lines[_LINES:] else []):
        for change in (_other, _next, _far):
            other = check.run(_changed(partial(_of_several_at, lines=group), change))
            if other is None:
                continue
            # A gradient that vanishes tells nothing: a loop over the classes that occur does not find them.
            followers = [
                i
                for i in range(count)
                if base.has_gradient(i) and other.has_gradient(i) and first_difference(base, other, [i], [i])
            ]
            if len(followers) > 1:
                raise UnsupportedModelError(
                    f"A number that depends on several records is read at {', '.join(group[:3])} (.item(), "
                    ".tolist()), and other records' gradients depend on it: a divisor, a factor or a threshold that "
                    "the batch decides. Make it a public constant, or let every record have its own."
                )
    return []


class _Check:
    def __init__(self, subject: Subject, forms: CallForms, reads: Sequence[Read], seed: int) -> None:
        self._subject, self._forms, self._reads, self._seed = subject, forms, reads, seed

    def run(self, alter: Alter) -> Seen | None:
        """A pass that is told other numbers; ``None``: it reads others, or fails with them."""
        answers = _Answers(self._reads, alter)
        try:
            seen = run_pass(
                self._subject, self._forms, self._subject.records, seed=self._seed, surrounding=_answering(answers)
            )
        except Exception:  # user code may refuse such numbers (a label that there is not)
            return None
        return seen


def _of_several_at(read: Read, lines: Sequence[str]) -> Tensor | None:
    return read.of_several() if read.line in lines else None


def _changed(whose: Callable[[Read], Tensor | None], change: Callable[[Tensor], Tensor]) -> Alter:
    def alter(read: Read, tensor: Tensor) -> Tensor:
        own = whose(read)
        return tensor if own is None else torch.where(own.to(tensor.device), change(tensor), tensor)

    return alter


def _other_owned(values: Tensor) -> Tensor:
    return ~values if values.dtype == torch.bool else _next(values)


def _less_owned(values: Tensor) -> Tensor:
    return values if values.dtype == torch.bool else values - 1


def _other(values: Tensor) -> Tensor:
    """Larger numbers: a larger length cuts nothing off. Booleans stay: most conditions are about padding."""
    if values.dtype == torch.bool:
        return values
    return values * 1.5 + 0.1 if values.is_floating_point() else values * 2 + 1


def _next(values: Tensor) -> Tensor:
    return values if values.dtype == torch.bool else values + 1


def _far(values: Tensor) -> Tensor:
    """Beyond what a divisor is kept above (``max(n, 1)``)."""
    return values if values.dtype == torch.bool else values * 2 + 7
