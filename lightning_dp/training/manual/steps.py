"""Runs a ``training_step`` that steps its optimizers itself: every step with gradients of records is a release."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dp.errors import FormChanged, PrivacyConfigurationError, PrivacyLimitReached, UnsupportedModelError
from lightning_dp.gradients.engine import set_aside
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.gradients.forms import form_changed_in
from lightning_dp.mechanism.sampling import Draw, size_bound
from lightning_dp.mechanism.step import Part, PrivateStep
from lightning_dp.torch_api import functions_unwatched, modes_disabled
from lightning_dp.training import lightning_api
from lightning_dp.training.manual.derived import DerivedFromRecords
from lightning_dp.training.manual.placeholders import Placeholders
from lightning_dp.training.manual.rehearsal import PAST_MANUAL_BACKWARD, parameters_of

if TYPE_CHECKING:
    from lightning_dp.training.strategy import PrivateMixin

#: How often a batch may turn out to run code that was not examined.
_ATTEMPTS = 8


class ManualSteps:
    """The private steps of a module with ``automatic_optimization = False``.

    Formal guarantee: what a batch changes of the model costs one step of the ledger's multiplier. Proof: an optimizer
    is stepped either with a release (`Part`), of which there are at most as many as share the step's noise; or with
    gradients of losses that depend on no record (`DerivedFromRecords`), from a number of rows that is public: the
    batch is filled up to `size_bound` rows, and rows beyond the sample add nothing to releases. A sample that is larger
    than that, which has a probability below 1e-24, is cut: δ grows by less than ``(1 + e^ε) · 1e-24`` a step.
    Whether a step is taken does not depend on records: what could tell the code about them is refused, when the step is
    examined and while it runs.

    Args:
        strategy: The strategy whose batches are run.
        check_layers: Refuses layers of these parameters, by identity, that cannot be trained privately.
    """

    def __init__(self, strategy: PrivateMixin, check_layers: Callable[[Collection[int]], None]) -> None:
        self._strategy, self._check_layers = strategy, check_layers
        self.reset()

    def reset(self, optimizers: Iterable[Optimizer] = ()) -> None:
        """Forgets everything, at the start of a fit and when other layers are trained.

        Args:
            optimizers: Those of the fit. They refuse to be stepped past the strategy from now on.
        """
        for optimizer in optimizers:
            if not getattr(optimizer, "_lightning_dp_watched", False):
                optimizer.register_step_pre_hook(self._refuse_placeholders)
                optimizer._lightning_dp_watched = True  # type: ignore[attr-defined]
        #: The private step of every private optimizer, by its number.
        self.steps: dict[int, PrivateStep] = {}
        self._placeholders = Placeholders()
        self._derived: DerivedFromRecords | None = None
        self._number = self._batch = self._released = 0
        self._rows = 0
        self._padding: Tensor | None = None
        #: Whether an optimizer was stepped on the current batch.
        self._has_stepped = False

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _refuse_placeholders(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(map(self._placeholders.stands_for, parameters_of(optimizer))):
            raise PrivacyConfigurationError(
                "An optimizer was stepped past Lightning, before its gradient had noise. Take it from "
                "self.optimizers(), without use_pl_optimizer=False."
            )

    def _make_steps(self) -> None:
        """Makes the private steps of the optimizers that are known to be private and have none yet."""
        strategy, plan = self._strategy, self._strategy.examiner.understanding.manual
        module = strategy.module_in_fit()
        for number in sorted(plan.private - self.steps.keys()):
            own = parameters_of(strategy.optimizers[number])
            with _only_trainable(module, own):
                self._check_layers({id(p) for p in own})
                mechanism = strategy.mechanism.for_module(module)
                engine = mechanism.make_engine(strategy.options.engine, module)
            self.steps[number] = PrivateStep(mechanism, engine, strategy.ledger, strategy.randomness)

    # -- a batch ---------------------------------------------------------------------------------------------------

    def run(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs ``training_step`` on a drawn batch, and charges it."""
        strategy, examiner = self._strategy, self._strategy.examiner
        draw = strategy.micro_batches.drawn
        assert draw is not None and strategy.logs is not None
        strategy.micro_batches.drawn = None
        strategy.logs.begin()
        examiner.run_once(args)
        self._charge()
        for seed in range(_ATTEMPTS):
            try:
                return self._run(batch, draw, args, kwargs)
            except (FormChanged, SystemError) as error:
                reason = form_changed_in(error)
                if reason is None:
                    raise
                examiner.examine_drawn(batch, draw, args, reason, seed)
                if self._has_stepped:
                    # The batch cannot be run again. Its rest is left out, whatever its records are: the course of the
                    # code does not depend on them.
                    return None
                strategy.logs.again()
        return self._run(batch, draw, args, kwargs)

    def _charge(self) -> None:
        """Charges all that this batch may release, before any of it."""
        strategy = self._strategy
        assert strategy.noise_multiplier is not None
        event = strategy.mechanism.event(strategy.noise_multiplier, strategy.sampling_rate)
        self._number = len(strategy.ledger)
        allowed = None if strategy.budget is None else strategy.step_limit(event) - self._number
        if allowed is not None and allowed <= 0:
            raise PrivacyLimitReached(
                f"The privacy budget allows no step after the {strategy.ledger.steps} that were taken. Nothing was "
                "released."
            )
        strategy.books.charge(event, allowed)
        strategy.ledger.record(event)
        self._batch += 1

    def _run(self, batch: Any, draw: Draw, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        strategy = self._strategy
        self._make_steps()
        self._released, self._has_stepped = 0, False
        batch, self._rows = self._filled(batch, draw)
        records = min(draw.size, self._rows)
        self._padding = None
        if records < self._rows:
            self._padding = torch.arange(self._rows, device=strategy.root_device) >= records
        self._derived = DerivedFromRecords()
        self._derived.mark(batch)
        lightning_api.weigh_logs_by(strategy.trainer_in_fit(), batch)
        trained = [p for optimizer in strategy.optimizers for p in parameters_of(optimizer) if p.requires_grad]
        try:
            with ExitStack() as stack:
                for step in self.steps.values():
                    if strategy.examiner.findings is not None:
                        step.engine.forms = strategy.examiner.findings.forms
                    stack.enter_context(step.engine.forward(self._rows))
                stack.enter_context(strategy.micro_batches.watch(self._rows))
                stack.enter_context(self._derived)
                return strategy.user_training_step(batch, *args, **kwargs)
        except BaseException:  # perhaps between toggle_optimizer and untoggle_optimizer
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        finally:
            self._derived = None

    def _filled(self, batch: Any, draw: Draw) -> tuple[Any, int]:
        """The batch with a public number of rows, where public optimizers could count them; and that number."""
        strategy = self._strategy
        rows = max(draw.size, 1)
        if strategy.examiner.understanding.manual.public:
            rows = size_bound(strategy.num_records, strategy.sampling_rate)
        if rows == draw.size:
            return batch, rows
        size = draw.size
        if not size:  # some record, of which nothing is used
            batch, size = strategy.micro_batches.load([0]), 1
        return strategy.take_examples(batch, size, [row % size for row in range(rows)]), rows

    # -- what training_step asks for -------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A backward pass: gradients of private parameters are kept per record, and not shown."""
        strategy = self._strategy
        if self._derived is None:
            raise PrivacyConfigurationError("manual_backward was called outside of training_step.")
        module, is_public = strategy.module_in_fit(), not self._derived.holds(loss)
        strategy.pre_backward(loss)
        loss = strategy.precision_plugin.pre_backward(loss, module)
        others = [p for i, o in enumerate(strategy.optimizers) if i not in self.steps for p in parameters_of(o)]
        with functions_unwatched(), modes_disabled(), ExitStack() as stack:
            self._forget_zeroed()
            for engine in self._engines():
                stack.enter_context(engine.backward())
            stack.enter_context(set_aside([] if is_public else others))
            strategy.precision_plugin.backward(loss, module, None, *args, **kwargs)
            reached = [] if is_public else [p for p in others if p.grad is not None]
        with functions_unwatched(), modes_disabled():
            for parameter in reached:
                self._placeholders.put(parameter, self._batch)
            for engine in self._engines():
                for name in engine.waiting():
                    self._placeholders.put(engine.parameters[name], self._batch)
        loss = strategy.precision_plugin.post_backward(loss, module)
        strategy.post_backward(loss)
        return loss

    def before_step(self, optimizer: Optimizer) -> None:
        """Before an optimizer is stepped: gives it a release, or makes sure that it needs none."""
        if self._derived is None:
            raise PrivacyConfigurationError("An optimizer was stepped outside of training_step.")
        number = next(i for i, known in enumerate(self._strategy.optimizers) if known is optimizer)
        parameters = parameters_of(optimizer)
        with functions_unwatched(), modes_disabled():
            stale = [p for p in parameters if self._is_stale(p)]
            if stale:
                raise PrivacyConfigurationError(
                    "An optimizer is stepped with gradients of several batches: a union of Poisson samples is none, "
                    "and its cost is not known. Call opt.zero_grad() before manual_backward in every batch; for a "
                    "larger batch, give the loader a larger batch_size."
                )
            if number in self.steps:
                self._release(self.steps[number], parameters)
            else:
                self._refuse_records(parameters)
            self._has_stepped = True

    def _release(self, step: PrivateStep, parameters: list[nn.Parameter]) -> None:
        strategy, engine = self._strategy, step.engine
        plan = strategy.examiner.understanding.manual
        assert isinstance(engine, BookKeeping) and strategy.noise_multiplier is not None
        self._forget_zeroed()
        if not engine.waiting():
            return
        if self._released >= plan.releases:
            raise FormChanged("training_step takes more steps on a batch than when it was examined.")
        step.contributions.padding = self._padding
        step.begin(
            strategy.noise_multiplier,
            strategy.sampling_rate,
            strategy.expected_batch_size,
            part=Part(self._number, self._released, plan.releases),
        )
        self._released += 1
        with step.backward(float(self._rows)):
            pass  # what the backward passes have found is bounded here, once for all of them
        step.release(others=parameters)
        strategy.warn_of_nonfinite(step)

    def _refuse_records(self, parameters: list[nn.Parameter]) -> None:
        """Raises if an optimizer that no release belongs to has a gradient that may depend on records."""
        if any(map(self._placeholders.stands_for, parameters)):
            raise FormChanged("An optimizer is stepped with a gradient of records, and was not when it was examined.")
        assert self._derived is not None
        if any(p.grad is not None and self._derived.holds(p.grad) for p in parameters):
            raise UnsupportedModelError(PAST_MANUAL_BACKWARD)

    def _is_stale(self, parameter: nn.Parameter) -> bool:
        return self._placeholders.stands_for(parameter) and self._placeholders.batch_of(parameter) != self._batch

    def _forget_zeroed(self) -> None:
        """Forgets gradients of records that the user's code has set to zero or taken away."""
        for engine in self._engines():
            engine.forget([n for n in engine.waiting() if not self._placeholders.stands_for(engine.parameters[n])])

    def _engines(self) -> Iterator[BookKeeping]:
        for step in self.steps.values():
            assert isinstance(step.engine, BookKeeping)
            yield step.engine


@contextmanager
def _only_trainable(module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within, no other parameter of the module requires a gradient."""
    own = {id(p) for p in parameters}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
