"""The examination of a training step by the row tracer: proven, checked, or refused with the line that mixes.

Formal guarantee of what is *proven*: the loss is a sum over records of a function of one record each, and row b of
every upstream gradient that a layer records depends on record b alone; no decision was taken on what records hold;
nothing of a record is kept. Proof: every operation of the step was found to act on records separately (see
`operations`), on values of the operation's own probe; the composition of such operations does so as well.
Limits: tensor sizes count as public, though padding makes them depend on records; of the backward pass, hooks of
tensors are traced, and a layer's backward hook, or a ``backward`` of the module's own, is *checked*. What is *checked*
took decisions on records (`.item()`, ``if mask.any()``): it holds for the branch that was taken, `Watch` stops at code
that was not examined, and the exchange tests look at what other records do.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.torch_api import SILENT_READS, graph_nodes, has_backward_hooks, modes_disabled
from lightning_dp.training.batches import Layout
from lightning_dp.training.independence import owners
from lightning_dp.training.independence.batch_owners import OF_COLLATION, OF_METRIC, BatchOwners, same_values
from lightning_dp.training.independence.findings import Findings
from lightning_dp.training.independence.layer_calls import LayerCalls
from lightning_dp.training.independence.owners import State
from lightning_dp.training.independence.remedies import listed, remedy
from lightning_dp.training.independence.shadow import is_metric, kept_by, random_state_kept, seed_everything
from lightning_dp.training.independence.subject import Subject, loss_of, reduced
from lightning_dp.training.independence.tracer import Reads, RowTracer, tensors_in
from lightning_dp.training.manual.rehearsal import NothingPrivate

#: Names that a message shows for one kind of problem.
_SHOWN = 4


def examine(
    subject: Subject, batch: Any = None, rows: int = 0, layout: Layout | None = None, seed: int = 1
) -> Findings:
    """Runs a training step under the tracer.

    Args:
        subject: The step, and the records to run it on.
        batch: A batch that was drawn and transferred, to run it on instead, of so many ``rows``.
        layout: That batch's.
        seed: Of the random numbers that the step draws: with others, it may skip other layers (LayerDrop).

    Returns:
        What was found.

    Raises:
        UnsupportedModelError: Records influence one another, or what depends on them is kept; with the line.
        PrivacyConfigurationError: The step returned no loss, or a hook ended the epoch.
    """
    with random_state_kept():
        return _Examination(subject, batch, rows, layout, seed).run()


class _Examination:
    def __init__(self, subject: Subject, batch: Any, rows: int, layout: Layout | None, seed: int) -> None:
        self._subject, self._found, self._seed = subject, Findings(), seed
        self._problems: list[str] = []
        self._batch, self._layout = batch, layout
        self._rows = rows or len(subject.records) * subject.copies
        self._records = self._rows // subject.copies
        self._tracer = RowTracer(self._records)
        self._owners = BatchOwners(subject, self._tracer, self._found, self._rows, batch is not None)
        self._calls = LayerCalls(
            self._tracer,
            self._found.forms,
            self._rows,
            self._records,
            subject.understanding,
            subject.loss_reduction,
            is_drawn=batch is not None,
        )

    def run(self) -> Findings:
        subject, tracer = self._subject, self._tracer
        shadow = subject.shadow(classify=True)
        if shadow.rehearsal is not None:
            shadow.rehearsal.is_public = self._is_public
        module = shadow.module
        for child in module.modules():
            if is_metric(child):  # what earlier steps have left there is without noise
                for tensor in tensors_in(list(vars(child).values())):
                    why = OF_METRIC
                    self._tracer.set(tensor, State(owners.constant(owners.MIXED, tensor.dim()), why=why))
        drawn = self._batch is not None
        batch = self._batch if drawn else subject.collated(subject.records)
        if self._layout is None:
            self._layout = self._owners.find_layout(batch)
        self._owners.own(batch, self._layout)
        watch, without = subject.watch(self._rows, tracer), None
        seed_everything(self._seed)
        with subject.stand_in(module), tracer, Reads(tracer), watch:
            if not drawn:
                batch = subject.transfer(batch)
            self._owners.note_labels(batch, self._layout)
            self._hook(module, "on_train_batch_start", batch, *subject.arguments)
            counters = _counters(kept_by(module))
            with subject.context(), self._calls.noted(module):
                try:
                    output = module.training_step(batch, *subject.arguments)
                except NothingPrivate as nothing:
                    without = nothing
            if without is not None:
                with modes_disabled():
                    self._without_loss(module, shadow.logged, without)
                raise without
            self._found.counts = [
                name
                for name, value in _counters(kept_by(module)).items()
                if name in counters and counters[name] != value
            ]
            self._calls.look_again()
            loss = loss_of(output)
            state = tracer.state(loss)
            self._found.reads = list(tracer.reads)
            self._hook(module, "on_before_backward", loss)
            with modes_disabled():
                self._backward(module, loss)
            self._hook(module, "on_after_backward")
            self._hook(module, "on_train_batch_end", _detached(output), batch, *subject.arguments)
        self._found.understood = watch.changed
        self._found.operations = tracer.operations
        self._found.records = self._records
        self._found.constants, self._found.layout = tracer.constants, self._layout
        _note_logs(self._found, tracer, shadow.logged)
        self._look_at_loss(loss, state)
        self._look_at_state(module)
        if shadow.rehearsal is not None:
            self._look_at_decisions()
        self._found.unseen += [
            f"attribute '{name}' cannot be copied: what the step does to it was not looked at" for name in shadow.shared
        ]
        self._found.decisions |= {
            line: what for line, what in tracer.decisions.items() if "torchmetrics" not in line
        } | {line: f"{what}: whether places in the batch matter" for line, what in tracer.places.items()}
        if self._problems:
            raise UnsupportedModelError(listed(self._problems))
        if not drawn:
            self._look_at_other_records()
        return self._found

    def _without_loss(self, module: nn.Module, logged: dict[str, Any], nothing: NothingPrivate) -> None:
        """What a run must not do that takes no step with a gradient of records: keep what they hold, or read it."""
        self._look_at_state(module)
        self._look_at_decisions()
        if self._problems:
            raise UnsupportedModelError(listed(self._problems))
        _note_logs(self._found, self._tracer, logged)
        nothing.names, nothing.logged = set(self._found.names), set(self._found.logged)

    # -- the loss ----------------------------------------------------------------------------------------------------

    def _look_at_loss(self, loss: Tensor, state: State | None) -> None:
        if state is None or state.is_public:
            if loss.requires_grad and not self._found.unseen:
                self._found.unseen.append("the loss depends on nothing in the batch that could be followed")
            return
        if state.is_mixed:
            problem = f"The loss is not a sum over records: {state.why}. {remedy(state.why)}"
            reaches_one = any(source in state.why for source in (OF_METRIC, OF_COLLATION))
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
        for name, layer in self._subject.module.named_modules():
            if has_backward_hooks(layer):
                self._found.decisions.setdefault(f"layer '{name}'", "a hook of its backward pass")
        for why in dict.fromkeys(self._tracer.gradient_problems):
            self._problems.append(f"The gradient that a hook returns is not one record's: {why}. {remedy(why)}")
        custom = sorted(_custom_functions(loss))
        if custom:
            names = ", ".join(custom)
            self._found.decisions.setdefault(names, "a backward pass of its own (autograd.Function)")
        for problem, layers in self._calls.problems.items() if self._subject.needs_layers else ():
            if self._problems and state.is_mixed and state.why in problem:
                continue
            named = [f"'{name}' ({self._calls.kinds[name]})" for name in dict.fromkeys(layers) if self._trains(name)]
            if not named:
                continue
            shown = ", ".join(named[:_SHOWN]) + (f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else "")
            self._problems.append(f"Layers {shown}, called at {self._calls.lines[problem]}: {problem}.")

    def _is_public(self, loss: Tensor) -> bool:
        state = self._tracer.state(loss)
        return state is None or state.is_public

    def _trains(self, layer: str) -> bool:
        """Whether a layer's parameters, or the parameter of this name, are stepped with gradients of records."""
        plan = self._subject.understanding.manual
        if not plan.is_known:
            return True
        private = {id(p) for number in plan.private for p in self._subject.optimized(number)}
        trained = {name: p for name, p in self._subject.module.named_parameters() if p.requires_grad}
        used = [trained[layer]] if layer in trained else self._subject.module.get_submodule(layer).parameters()
        return any(id(p) in private for p in used if p.requires_grad)

    def _look_at_decisions(self) -> None:
        """With manual optimization, what is decided by records may be whether a step is taken. Reads by operations are
        refused while the step runs; here, those that no operation shows."""
        named = {f"{name}()" for name in SILENT_READS}
        lines = [line for line, what in self._tracer.decisions.items() if what in named and "torchmetrics" not in line]
        if lines:
            self._problems.append(
                f"training_step reads what records hold at {', '.join(lines[:_SHOWN])} (tolist(), numpy()): with "
                "manual optimization, it could decide whether a step is taken, which ε does not cover. Log the tensor "
                "itself (self.log takes it), and use torch.where instead of a condition."
            )

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
                "later steps or a checkpoint. Keep nothing of the batch; to follow a metric, use self.log(…, "
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
            whole = subject.shadow()
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
        self._found.logged |= {name for name, value in logs[1].items() if not same_values(value, logs[2].get(name))}
        if settings[1] != settings[2]:
            raise UnsupportedModelError(
                "training_step, or a hook, changes the optimizer, its schedule or the Trainer (should_stop) by what "
                "depends on records, without noise. Let schedules go by steps or epochs, or by what has noise."
            )
        control, one, other = shadows
        volatile = {name for name in one if name in control and not same_values(control[name], one[name])}
        self._found.counts = [name for name in self._found.counts if name not in volatile]
        differing = [n for n in one if n not in other or not same_values(one[n], other[n])] + [
            n for n in other if n not in one
        ]
        differing = [name for name in differing if name not in volatile]
        if differing:
            raise UnsupportedModelError(
                f"{', '.join(map(repr, differing[:_SHOWN]))}: training_step, or a hook, keeps there what depends on "
                "the records of the batch, without noise, and a later step may use it. Keep nothing of the batch; to "
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


def _counters(kept: dict[str, Any]) -> dict[str, float]:
    """Single numbers that a module keeps."""
    found: dict[str, float] = {}
    for name, value in kept.items():
        if isinstance(value, int | float):
            found[name] = value
        elif isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.requires_grad:
            found[name] = value.detach().item()
    return found


def _custom_functions(loss: Tensor) -> set[str]:
    """Names of autograd functions with a backward of their own that a loss depends on."""
    custom = (node for node in graph_nodes(loss) if isinstance(node, BackwardCFunction))
    return {type(node).__name__.removesuffix("Backward") for node in custom}


def _note_logs(found: Findings, tracer: RowTracer, logged: dict[str, Any]) -> None:
    """Takes note of the metrics that the step logged, and of those that depend on records."""
    found.names = set(logged)
    for name, value in logged.items():
        known = tracer.state(value) if isinstance(value, Tensor) else None
        if (known is not None and not known.is_public) or isinstance(value, nn.Module):
            found.logged.add(name)
