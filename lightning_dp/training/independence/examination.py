"""The examination of a training step by the row tracer: proven, checked, or refused with the line that mixes.

Formal guarantee of what is *proven*: the loss is a sum over records of a function of one record each, and so is every
upstream gradient that a layer records; no decision was taken on what records hold; nothing of a record is kept. Proof:
every operation of the step was found to act on records separately (see `operations`), on values of the operation's own
probe; the composition of such operations does so as well. What is *checked* took decisions on
records (`.item()`, ``if mask.any()``): it holds for the branch that was taken, `Watch` stops at code that was not
examined, and the exchange tests look at what other records do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.gradients.forms import CallForms, LayerForm
from lightning_dp.gradients.model import OPAQUE, trained_layers
from lightning_dp.gradients.rules.registry import rule_for
from lightning_dp.gradients.source import here, is_library
from lightning_dp.training.batches import (
    Concatenated,
    Items,
    Layout,
    Opaque,
    Rows,
    Shared,
    find_layout,
    holds_examples,
    leaves_with_layout,
)
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.owners import State
from lightning_dp.training.independence.shadow import Shadow, is_metric, kept_by, random_state_kept, seed_everything
from lightning_dp.training.independence.subject import Subject, loss_of, reduced
from lightning_dp.training.independence.tracer import Read, Reads, RowTracer, tensors_in

#: What mixes records before the step begins: it reaches one record at a time as well.
_OF_METRIC = "the state of a metric, which earlier records have left"


_OF_COLLATION = "what collate_fn computes from the whole batch"


#: Lines of a message about one kind of problem.
_SHOWN = 4


@dataclass
class Findings:
    """What an examination found.

    Attributes:
        decisions: Lines where something may be decided by what records hold, and how.
        understood: Lines where a batch mean was understood as a mean over records.
        unseen: What could not be examined, in sentences.
        doubts: Why, for an engine that sees one record at a time, the loss may be another than that of a batch.
        logged: Names of metrics that the step logs and that depend on records.
        counts: State that a step changes, whatever the records: counters.
        forms: How layers are called.
        records: How many records were looked at.
        reads: Values that became Python's within ``training_step``, in order.
        constants: Numbers that the batch's are compared with, each with its leaf's place in the batch.
        names: Names of all metrics that the step logs.
        layout: Where the examples are in the batch that was looked at.
    """

    decisions: dict[str, str] = field(default_factory=dict)
    understood: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    logged: set[str] = field(default_factory=set)
    counts: list[str] = field(default_factory=list)
    forms: CallForms = field(default_factory=CallForms)
    operations: int = 0
    records: int = 0
    reads: list[Read] = field(default_factory=list)
    constants: set[tuple[int, float]] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    layout: Layout | None = None

    @property
    def verdict(self) -> str:
        """``"proven"``, ``"checked"`` or, where something could not be looked at, ``"partly checked"``."""
        if self.unseen:
            return "partly checked"
        return "checked" if self.decisions else "proven"

    def merge(self, other: Findings) -> None:
        """Takes over what a later examination found."""
        self.decisions |= other.decisions
        self.understood |= other.understood
        self.unseen += [sentence for sentence in other.unseen if sentence not in self.unseen]
        self.logged |= other.logged
        self.constants |= other.constants
        self.names |= other.names
        self.forms.merge(other.forms)


def examine(
    subject: Subject, batch: Any = None, rows: int = 0, layout: Layout | None = None, seed: int = 1
) -> Findings:
    """Runs a training step under the tracer.

    Args:
        subject: The step, and the records to run it on.
        batch: A batch that was drawn and transferred, to run it on instead, of so many ``rows``.
        layout: That batch's.
        seed: Of the random numbers that the step draws: with others, it may skip other layers (LayerDrop).

    Raises:
        UnsupportedModelError: Records influence one another, or what depends on them is kept; with the line.
    """
    with random_state_kept():
        return _Examination(subject, batch, rows, layout, seed).run()


class _Examination:
    def __init__(self, subject: Subject, batch: Any, rows: int, layout: Layout | None, seed: int) -> None:
        self._subject, self._found, self._seed = subject, Findings(), seed
        self._problems: list[str] = []
        #: Layers of whose calls this is wrong.
        self._layer_problems: dict[str, list[str]] = {}
        self._layer_lines: dict[str, str] = {}
        self._batch, self._layout = batch, layout
        self._rows = rows or len(subject.records) * subject.copies
        self._records = self._rows // subject.copies
        self._tracer = RowTracer(self._records)

    def run(self) -> Findings:
        subject, tracer = self._subject, self._tracer
        shadow = Shadow(subject.module)
        module = shadow.module
        for child in module.modules():
            if is_metric(child):  # what earlier steps have left there is without noise
                for tensor in tensors_in(list(vars(child).values())):
                    why = _OF_METRIC
                    self._tracer.set(tensor, State(owners.constant(owners.MIXED, tensor.dim()), why=why))
        drawn = self._batch is not None
        batch = self._batch if drawn else subject.collated(subject.records)
        if self._layout is None:
            self._layout = self._find_layout(batch)
        self._own(batch, self._layout)
        watch = subject.watch(self._rows, tracer)
        hooks = self._hooks(module)
        seed_everything(self._seed)
        try:
            with subject.stand_in(module), tracer, Reads(tracer), watch:
                if not drawn:
                    batch = subject.transfer(batch)
                self._note_labels(batch)
                self._hook(module, "on_train_batch_start", batch, *subject.arguments)
                counters = _counters(kept_by(module))
                with subject.context():
                    output = module.training_step(batch, *subject.arguments)
                self._found.counts = [n for n, value in _counters(kept_by(module)).items() if counters.get(n) != value]
                loss = loss_of(output)
                state = tracer.state(loss)
                self._found.reads = list(tracer.reads)
                self._hook(module, "on_before_backward", loss)
                with _disable_current_modes():
                    self._backward(module, loss)
                self._hook(module, "on_after_backward")
                self._hook(module, "on_train_batch_end", _detached(output), batch, *subject.arguments)
        finally:
            for handle in hooks:
                handle.remove()
        self._found.understood = watch.changed
        self._found.operations = tracer.operations
        self._found.records = self._records
        self._found.constants, self._found.layout = tracer.constants, self._layout
        self._found.names = set(shadow.logged)
        for name, value in shadow.logged.items():
            known = tracer.state(value) if isinstance(value, Tensor) else None
            if (known is not None and not known.is_public) or isinstance(value, nn.Module):
                self._found.logged.add(name)
        self._look_at_loss(loss, state)
        self._look_at_state(module)
        self._found.unseen += [
            f"attribute '{name}' cannot be copied: what the step does to it was not looked at" for name in shadow.shared
        ]
        self._found.decisions |= {
            line: what for line, what in tracer.decisions.items() if "torchmetrics" not in line
        } | {line: f"{what}: whether places in the batch matter" for line, what in tracer.places.items()}
        if self._problems:
            raise UnsupportedModelError(_listed(self._problems))
        if not drawn:
            self._look_at_other_records()
        return self._found

    # -- the batch -------------------------------------------------------------------------------------------------

    def _find_layout(self, batch: Any) -> Layout:
        """From the same records, and three of them once more: lengths do not change."""
        records = self._subject.records
        more = [*records, *records[:3]]
        large = self._subject.collated(more)
        copies = self._subject.copies
        return find_layout(batch, self._rows, large, len(more) * copies)

    def _own(self, batch: Any, layout: Layout) -> None:
        """Tells the tracer which numbers of the batch are whose."""
        opaque = []
        if not holds_examples(layout):
            self._refuse_opaque(batch)
        other = self._of_others() if self._batch is None else None
        elsewhere = list(leaves_with_layout(other, layout)) if other is not None else []
        for place, (leaf, where, example) in enumerate(leaves_with_layout(batch, layout)):
            if isinstance(where, Shared):
                same = place >= len(elsewhere) or _equal(leaf, elsewhere[place][0])
                if not same and isinstance(leaf, Tensor):
                    why = _OF_COLLATION
                    self._tracer.set(leaf, State(owners.constant(owners.MIXED, leaf.dim()), why=why))
                elif not same:
                    self._found.decisions["collate_fn"] = f"a {type(leaf).__name__} that depends on the whole batch"
                continue
            if isinstance(where, Opaque) or not isinstance(leaf, Tensor):
                opaque.append(type(leaf).__name__)
            elif isinstance(where, Items) and example is not None:
                record = example // self._subject.copies
                self._tracer.own(leaf, owners.constant(record, leaf.dim()))
            elif isinstance(where, Rows):
                self._tracer.own(leaf, owners.rows(leaf.shape[where.dim], leaf.dim(), self._records, where.dim))
            elif isinstance(where, Concatenated):
                self._own_concatenated(leaf)
        kinds = sorted(set(opaque) - {"int", "float", "bool", "NoneType"})
        if kinds:
            self._tracer.opaque = True
            self._found.unseen.append(
                f"what the step does with {', '.join(kinds)} objects in the batch is not followed"
            )

    def _note_labels(self, batch: Any) -> None:
        """Tells the tracer which tensors hold the records' own numbers."""
        assert self._layout is not None
        try:
            leaves = list(leaves_with_layout(batch, self._layout))
        except (KeyError, TypeError, AttributeError):  # a transfer hook made another batch of it
            return
        for place, (leaf, where, _) in enumerate(leaves):
            if isinstance(where, Rows) and isinstance(leaf, Tensor) and leaf.numel() and not leaf.is_complex():
                self._tracer.labels[place] = leaf

    def _of_others(self) -> Any:
        """The batch of as many records in another mixture."""
        records = self._subject.records
        others = records[max(1, len(records) // 2) :] or records
        return self._subject.collated([others[i % len(others)] for i in range(len(records))])

    def _refuse_opaque(self, batch: Any) -> None:
        """A batch in which no entry can be told to be one record's."""
        raise UnsupportedModelError(
            f"The batch ({type(batch).__name__}) holds nothing of which one entry belongs to one record: records "
            "cannot "
            "be told apart. Return tensors, lists, tuples, mappings or dataclasses from the collate function, with one "
            "entry per record."
        )

    def _own_concatenated(self, leaf: Tensor) -> None:
        """Records follow one another, with as many entries as each has: found by leaving some out."""
        subject = self._subject
        bounds = [0]
        if self._batch is None:
            for count in range(1, self._records + 1):
                part = subject.collated(subject.records[:count])
                found = [x for x in _all_tensors(part) if x.dtype == leaf.dtype and x.dim() == leaf.dim()]
                fitting = [len(x) for x in found if x.dim() and torch.equal(x, leaf[: len(x)])]
                if not fitting:
                    break
                bounds.append(max(fitting))
        if len(bounds) != self._records + 1 or bounds[-1] != len(leaf):
            self._tracer.own(leaf, owners.constant(owners.MIXED, leaf.dim()))
            return
        owner = torch.cat(
            [
                torch.full((b - a,), i, dtype=owners.DTYPE)
                for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
            ]
        )
        self._tracer.own(leaf, owner.view([-1] + [1] * (leaf.dim() - 1)), ragged=True)

    # -- layers ----------------------------------------------------------------------------------------------------

    def _hooks(self, module: nn.Module) -> list[Any]:
        return [
            layer.register_forward_hook(self._noted(name), with_kwargs=True)
            for name, layer in trained_layers(module).items()
        ]

    def _noted(self, name: str) -> Callable[..., None]:
        forms = self._found.forms

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            form = forms.layers.setdefault(name, LayerForm())
            input = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(input, Tensor):
                return  # refused by the engine, which says so
            index = len(form.is_shared)
            dim = 0 if not isinstance(layer, OPAQUE) or getattr(layer, "batch_first", False) or input.dim() < 3 else 1
            state = self._tracer.state(input)
            public = state is None or state.is_public
            shared = public and input.dim() > 0 and input.shape[0] == 1 and self._rows > 1
            form.is_shared.append(shared)
            if shared:
                form.constants[index] = input.detach().clone()
            if rule_for(layer) is None:
                leaves, _ = tree_flatten((args, dict(kwargs)))
                form.per_example = tuple(self._is_per_example(leaf) for leaf in leaves)
                if isinstance(output, Tensor) and not output.dim():
                    form.reduction = self._reduction_of(layer, args, kwargs, form.per_example, output)
            if not public and isinstance(state, State):
                problem = self._form_problem(state, input.shape, dim)
                if problem:
                    self._layer_problems.setdefault(problem, []).append(f"'{name}' ({type(layer).__name__})")
                    self._layer_lines.setdefault(problem, here())

        return hook

    def _reduction_of(
        self, layer: nn.Module, args: Any, kwargs: Any, per_example: Sequence[bool], output: Tensor
    ) -> str | None:
        """Whether a layer's one number is the mean or the sum of those of single examples."""
        leaves, structure = tree_flatten((args, dict(kwargs)))
        alone = []
        with _disable_current_modes(), torch.no_grad():
            for row in range(self._rows):
                taken = [leaf[row : row + 1] if own else leaf for leaf, own in zip(leaves, per_example, strict=True)]
                own_args, own_kwargs = tree_unflatten(taken, structure)
                try:
                    alone.append(type(layer).forward(layer, *own_args, **own_kwargs))
                except Exception:  # a layer that takes no single example
                    return None
            for name, found in (("mean", torch.stack(alone).mean()), ("sum", torch.stack(alone).sum())):
                if torch.isclose(found, output, rtol=1e-4, atol=1e-6):
                    return name
        return None

    def _is_per_example(self, leaf: Any) -> bool:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return False
        state = self._tracer.state(leaf)
        if state is None or state.is_public:
            return len(leaf) == self._rows
        return state.owner.shape[0] > 1

    def _form_problem(self, state: State, shape: Sequence[int], dim: int) -> str | None:
        """What is wrong with a layer's input, if examples cannot be told apart by its entries along a dimension."""
        if state.is_mixed:
            return f"what they see depends on several records: {state.why}"
        if state.is_sum:
            return f"what they see is a sum over records: {state.why}"
        owner = state.owner
        if state.reordered:
            return (
                "they see the records in an order that their lengths decide (a packed sequence sorts them): give the "
                "layer padded sequences, and take each one's state at its own length, or use engine='per_example'"
            )
        expected = owners.rows(self._rows, len(shape), self._records, dim) if len(shape) > dim else None
        if expected is not None and owner.dim() == expected.dim() and shape[dim] == self._rows:
            filled = torch.where(owner < 0, expected, owner) if owner.shape == expected.shape else owner
            if filled.shape == expected.shape and bool((filled == expected).all()):
                return None
        if state.ragged:
            return (
                "they see rows that were chosen by what records hold (a mask, packed sequences): call them on all "
                "records, and take what is not wanted out of the loss (torch.where, a weight of 0)"
            )
        placed = owners.blocks(owner)
        if placed is not None and placed[0] == dim and shape[dim] == self._rows:
            return "they see the records in another order than other layers do"
        return (
            "they do not see one entry per example in their leading dimension, which must be the batch. Put the batch "
            "first (batch_first=True; no flattening of batch and time into one dimension), or use "
            "engine='per_example', which is slow but takes any layer"
        )

    # -- the loss ----------------------------------------------------------------------------------------------------

    def _look_at_loss(self, loss: Tensor, state: State | None) -> None:
        if state is None or state.is_public:
            if loss.requires_grad and not self._found.unseen:
                self._found.unseen.append("the loss depends on nothing in the batch that could be followed")
            return
        if state.is_mixed:
            problem = f"The loss is not a sum over records: {state.why}. {_remedy(state.why)}"
            reaches_one = any(source in state.why for source in (_OF_METRIC, _OF_COLLATION))
            if self._subject.needs_layers or reaches_one:
                self._problems.append(problem)
            else:  # one record at a time, they cannot reach one another; but is it the same loss?
                self._found.doubts.append(problem)
                self._found.decisions.setdefault(state.why, "numbers of several records meet")
        elif loss.dim() and (loss.dim() > 1 or len(loss) != self._rows or not state.is_owned):
            self._problems.append(
                f"training_step returned a loss of shape {tuple(loss.shape)}: return one number, or one per example."
            )
        elif state.is_sum and state.terms is not None and not state.ragged:
            if float(state.terms.min()) != float(state.terms.max()):
                self._problems.append(
                    "The loss counts some places of the batch more often than others, whichever records are there. "
                    "Give every record of the batch the same part in the loss."
                )
        elif not loss.dim() and state.is_owned and self._records > 1:
            self._problems.append(
                "The loss depends on one record of the batch only, by its place. Give every record the same part in it."
            )
        custom = sorted(_custom_functions(loss))
        if custom:
            names = ", ".join(custom)
            self._found.decisions.setdefault(names, "a backward pass of its own (autograd.Function)")
        for problem, layers in self._layer_problems.items() if self._subject.needs_layers else ():
            if self._problems and state.is_mixed and state.why in problem:
                continue
            named = list(dict.fromkeys(layers))
            shown = ", ".join(named[:_SHOWN]) + (f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else "")
            self._problems.append(f"Layers {shown}, called at {self._layer_lines[problem]}: {problem}.")

    # -- state -----------------------------------------------------------------------------------------------------

    def _look_at_state(self, module: nn.Module) -> None:
        """Refuses what is kept of records beyond the step."""
        kept = []
        after = kept_by(module)
        for name, value in after.items():
            state = self._tracer.state(value) if isinstance(value, Tensor) else None
            if state is not None and not state.is_public:
                kept.append(name)
        if kept:
            names = ", ".join(f"'{name}'" for name in kept[:_SHOWN])
            more = f" and {len(kept) - _SHOWN} more" if len(kept) > _SHOWN else ""
            self._problems.append(
                f"What depends on records is kept in {names}{more}, without noise, beyond the step: it would reach "
                "later "
                "steps or a checkpoint. Keep nothing of the batch; to follow a metric, use self.log(…, "
                "on_step=False, on_epoch=True) or torchmetrics; "
                "statistics of the data come from PrivateCentering or PrivateProjection."
            )

    def _look_at_other_records(self) -> None:
        """Runs the step on the records in another mixture, and looks whether it keeps something else then."""
        subject = self._subject
        shadows, logs, settings = [], [], []
        half = max(1, len(subject.records) // 2)
        count = len(subject.records)
        parts = subject.records[:half], subject.records[half:] or subject.records
        for part in (parts[0], *parts):  # what differs between equal runs (times) is not the records'
            records = [part[i % len(part)] for i in range(count)]
            whole = Shadow(subject.module)
            shadow = whole.module
            seed_everything(1)
            with subject.stand_in(shadow), subject.watch(self._rows):
                batch = subject.transfer(subject.collated(records))
                self._hook(shadow, "on_train_batch_start", batch, *subject.arguments)
                with subject.context():
                    output = shadow.training_step(batch, *subject.arguments)
                self._hook(shadow, "on_before_backward", loss_of(output))
                self._backward(shadow, loss_of(output))
                self._hook(shadow, "on_after_backward")
                self._hook(shadow, "on_train_batch_end", _detached(output), batch, *subject.arguments)
            shadows.append(kept_by(shadow))
            logs.append(whole.logged)
            settings.append(whole.settings())
        self._found.logged |= {name for name, value in logs[1].items() if not _equal(value, logs[2].get(name))}
        if settings[1] != settings[2]:
            raise UnsupportedModelError(
                "training_step, or a hook, changes the optimizer, its schedule or the Trainer (should_stop) by what "
                "depends on records, without noise. Let schedules go by steps or epochs, or by what has noise."
            )
        control, one, other = shadows
        volatile = {name for name in one if name in control and not _equal(control[name], one[name])}
        self._found.counts = [name for name in self._found.counts if name not in volatile]
        differing = [n for n in one if n not in other or not _equal(one[n], other[n])] + [
            n for n in other if n not in one
        ]
        differing = [name for name in differing if name not in volatile]
        if differing:
            raise UnsupportedModelError(
                f"{', '.join(map(repr, differing[:_SHOWN]))}: training_step, or a hook, keeps there what depends on "
                "the "
                "records of the batch, without noise, and a later step may use it. Keep nothing of the batch; to "
                "follow a metric, use self.log or torchmetrics."
            )

    def _backward(self, module: pl.LightningModule, loss: Tensor) -> None:
        """The backward pass, for hooks of tensors that keep something."""
        if loss.requires_grad:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module.backward(reduced(loss, self._subject.loss_reduction))

    def _hook(self, module: pl.LightningModule, name: str, *args: Any) -> None:
        """Runs a hook of the module's own, if it has one."""
        if getattr(type(module), name) is not getattr(pl.LightningModule, name):
            taken = {"on_train_batch_start": 2, "on_train_batch_end": 3}.get(name, len(args))
            result = getattr(module, name)(*args[:taken])
            if result == -1:
                raise PrivacyConfigurationError(
                    f"{name} returned -1, which skips the rest of the epoch. Whether a step happens must not depend on "
                    "the data: use limit_train_batches, or stop by trainer.should_stop on what has noise."
                )


def _detached(output: Any) -> Any:
    """What a step returned, as Lightning gives it to hooks."""
    if not isinstance(output, dict):
        return {"loss": loss_of(output).detach()}
    return {**output, "loss": loss_of(output).detach()}


def _all_tensors(tree: Any) -> list[Tensor]:
    from lightning_dp.training.batches import parts_of

    if isinstance(tree, Tensor):
        return [tree]
    parts = parts_of(tree)
    if parts is None:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [tensor for part in parts.values() for tensor in _all_tensors(part)]


def _counters(kept: dict[str, Any]) -> dict[str, float]:
    """Single numbers that a module keeps."""
    found: dict[str, float] = {}
    for name, value in kept.items():
        if isinstance(value, int | float):
            found[name] = value
        elif isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.requires_grad:
            found[name] = value.detach().item()
    return found


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape:
            return False
        same = one.detach() == other.detach()
        if one.is_floating_point() and other.is_floating_point():
            same |= one.isnan() & other.isnan()
        return bool(same.all())
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other))
    if type(one) is not type(other):
        return False
    return bool(one == other) or one != one


def _custom_functions(loss: Tensor) -> set[str]:
    """Names of autograd functions with a backward of their own that a loss depends on."""
    found: set[str] = set()
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            found.add(type(node).__name__.removesuffix("Backward"))
        waiting += [following for following, _ in node.next_functions]
    return found


def _remedy(why: str) -> str:
    """What to do about a loss that is no sum over records."""
    if "class weights" in why:
        return (
            "Leave per_record_means on, with which class weights are divided by their public mean; and rather weigh "
            "the "
            "frequent class down than the rare one up, whose gradients clipping would cut again."
        )
    if "targets of the batch that are not" in why:
        return "Leave per_record_means on, with which every record's own targets are averaged first."
    if "batch normalisation" in why:
        return "Use GroupNorm, or a frozen BatchNorm: .eval() and requires_grad_(False) in __init__."
    if "place" in why:
        return (
            "Treat every record alike, wherever in the batch it is. (Labels that became a list or an array, and a "
            "tensor again, look like that: use torch.where, or a table that is indexed by the labels.)"
        )
    if is_library(why):
        return (
            "A library did that: compute the loss in training_step from the model's outputs (logits), per record "
            "first; "
            "or choose another loss or layer of it, or freeze the layer (requires_grad_(False))."
        )
    return (
        "Make training_step treat every record by itself: normalise, average and choose within a record first, then "
        "take the mean over records. A loss over pairs within the batch needs the pairs to be made in the data set."
    )


def _listed(problems: Sequence[str]) -> str:
    """All problems in one message, of at most 2000 characters."""
    if len(problems) == 1:
        text = problems[0]
    else:
        text = "This training step cannot be private as it is:\n  - " + "\n  - ".join(problems)
    return text if len(text) <= 2000 else text[:1990] + " …"
