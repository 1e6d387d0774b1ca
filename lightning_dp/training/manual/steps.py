"""Runs a ``training_step`` that steps its optimizers itself: every step with gradients of records is a release."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dp.errors import FormChanged, PrivacyConfigurationError, PrivacyLimitReached, UnsupportedModelError
from lightning_dp.gradients.engine import set_aside
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.gradients.forms import form_changed_in
from lightning_dp.mechanism.sampling import Draw
from lightning_dp.mechanism.step import Part, PrivateStep
from lightning_dp.torch_api import functions_unwatched, modes_disabled
from lightning_dp.training import lightning_api, steering
from lightning_dp.training.batches import Shapes, shapes_of_one
from lightning_dp.training.manual.derived import DerivedFromRecords
from lightning_dp.training.manual.private_steps import PrivateSteps
from lightning_dp.training.manual.rehearsal import PAST_MANUAL_BACKWARD, parameters_of

if TYPE_CHECKING:
    from lightning_dp.training.strategy import PrivateMixin

#: How often a batch may turn out to run code that was not examined, and rows that are examined then.
_ATTEMPTS, _EXAMINED = 8, 8

_MORE_THAN_EXAMINED = "An optimizer is stepped with a gradient of records, and was not when it was examined."


class ManualSteps:
    """The private steps of a module with ``automatic_optimization = False``.

    Formal guarantee: what a batch changes of the model costs one step of the ledger's multiplier. Proof: an optimizer
    is stepped either with a release (`Part`), of which there are at most as many as share the step's noise; or with
    gradients of losses that depend on no record (`DerivedFromRecords`), from a number of rows that is public: every
    batch is filled up to `size_bound` rows, and rows beyond the sample add nothing to releases. A sample that is larger
    than that, which has a probability below 1e-24, is cut: δ grows by less than ``(1 + e^ε) · 1e-24`` a step.
    Whether a step is taken does not depend on records: what could tell the code about them is refused, when the step is
    examined and while it runs.

    Args:
        strategy: The strategy whose batches are run.
        check_layers: Refuses layers of these parameters, by identity, that cannot be trained privately.
        kept_by_metrics: What the metrics of a module have kept of earlier batches.
    """

    def __init__(
        self,
        strategy: PrivateMixin,
        check_layers: Callable[[Collection[int]], None],
        kept_by_metrics: Callable[[nn.Module], Iterable[Tensor]],
    ) -> None:
        self._strategy, self._check_layers, self._kept_by_metrics = strategy, check_layers, kept_by_metrics
        self._private = PrivateSteps()
        self.reset()

    def reset(self, optimizers: Iterable[Optimizer] = ()) -> None:
        """Forgets everything: at the start of a fit and its end, and when other layers are trained.

        Args:
            optimizers: Those of the fit. They refuse to be stepped past the strategy from now on.
        """
        self._private.close()
        self._private = PrivateSteps()
        self._private.watch(optimizers, self._holds)
        self._derived: DerivedFromRecords | None = None
        self._number = self._batch = self._released = self._rows = 0
        #: Shapes of the parts of a batch, which must be public as well.
        self._shapes: Shapes | None = None
        self._padding: Tensor | None = None
        # And whether a step with a gradient of records was found that was none when it was examined.
        self._has_warned = self._was_more = False
        #: Whether an optimizer was stepped on the current batch.
        self._has_stepped = False

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _step_of(self, parameters: Collection[int]) -> PrivateStep:
        strategy, module = self._strategy, self._strategy.module_in_fit()
        self._check_layers(parameters)
        mechanism = strategy.mechanism.for_module(module)
        engine = mechanism.make_engine(strategy.options.engine, module)
        return PrivateStep(mechanism, engine, strategy.ledger, strategy.randomness)

    def _holds(self, tensor: Any) -> bool:
        return self._derived is not None and self._derived.holds(tensor)

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
                few = min(_EXAMINED, self._rows)
                part = strategy.take_examples(batch, self._rows, slice(0, few))
                records = (draw.records or [0]) * few
                examiner.examine_drawn(part, Draw(records[:few], few), args, reason, seed)
                for optimizer in strategy.optimizers:  # what the first attempt has left there
                    for parameter in parameters_of(optimizer):
                        parameter.grad = None
                if str(reason) == _MORE_THAN_EXAMINED:
                    if self._was_more:  # else no batch would ever be trained on to its end
                        raise UnsupportedModelError(
                            f"{reason} Examining it again found that no record reaches its loss: a number that item() "
                            "reads, perhaps, makes the loss depend on records. Use the tensor instead (.detach())."
                        ) from None
                    self._was_more = True
                if self._has_stepped:
                    # The batch cannot be run again. Its rest is left out, whatever its records are: the course of the
                    # code does not depend on them.
                    rank_zero_info(f"lightning_dp: {reason} It was examined; the rest of this batch is left out.")
                    return None
                strategy.logs.again()
            except UnsupportedModelError as error:
                if "per_example" not in str(error):
                    raise
                raise UnsupportedModelError(
                    f"{error} (With manual optimization, engine='per_example' cannot be used.)"
                ) from None
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
        module, plan = strategy.module_in_fit(), strategy.examiner.understanding.manual
        self._private.make(plan.private, strategy.optimizers, module, self._step_of)
        self._private.use(None if strategy.examiner.findings is None else strategy.examiner.findings.forms)
        self._released, self._has_stepped = 0, False
        self._check_shapes(batch)
        self._padding = None
        if draw.size < self._rows:
            self._padding = torch.arange(self._rows, device=strategy.root_device) >= draw.size
        self._derived = DerivedFromRecords()
        self._derived.mark(batch)
        examined = set() if strategy.examiner.findings is None else strategy.examiner.findings.logged
        self._derived.mark_metrics(self._kept_by_metrics(module))
        self._derived.mark_metrics(steering.logged_of_records(strategy.trainer_in_fit(), examined))
        lightning_api.weigh_logs_by(strategy.trainer_in_fit(), batch)
        trained = [p for optimizer in strategy.optimizers for p in parameters_of(optimizer) if p.requires_grad]
        try:
            with ExitStack() as stack:
                for engine in self._private.engines():
                    stack.enter_context(engine.forward(self._rows))
                stack.enter_context(self._derived.functions())
                stack.enter_context(strategy.micro_batches.watch(self._rows))  # nearest to the step's own code
                stack.enter_context(self._derived)
                output = strategy.user_training_step(batch, *args, **kwargs)
            _refuse_leftovers(self._derived, module)
            return output
        except BaseException:  # perhaps between toggle_optimizer and untoggle_optimizer
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        finally:
            self._derived = None

    def _check_shapes(self, batch: Any) -> None:
        """Takes note of the number of rows, and refuses batches of other shapes: lengths would be the records'."""
        loader = self._strategy.train_loader
        assert loader is not None and loader.poisson.filled_to is not None
        self._rows = loader.poisson.filled_to
        examiner = self._strategy.examiner
        shapes = shapes_of_one(batch, examiner.batch_layout())
        others = examiner.shapes_of_records() if self._shapes is None else [self._shapes]
        self._shapes = shapes
        _refuse_lengths(shapes, others)

    # -- what training_step asks for -------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A backward pass: gradients of private parameters are kept per record, and not shown."""
        strategy = self._strategy
        if self._derived is None:
            raise PrivacyConfigurationError("manual_backward was called outside of training_step.")
        module, is_public = strategy.module_in_fit(), not self._derived.holds(loss)
        strategy.pre_backward(loss)
        loss = strategy.precision_plugin.pre_backward(loss, module)
        private = self._private.by_optimizer
        others = [p for i, o in enumerate(strategy.optimizers) if i not in private for p in parameters_of(o)]
        with functions_unwatched(), ExitStack() as stack:
            if not is_public:  # else what its backward pass does with records is followed
                stack.enter_context(modes_disabled())
            self._private.forget_zeroed()
            for engine in self._private.engines():
                stack.enter_context(engine.backward(keeps_graph=_keeps_graph(*args, **kwargs)))
            stack.enter_context(set_aside([] if is_public else others))
            strategy.precision_plugin.backward(loss, module, None, *args, **kwargs)
            reached = [] if is_public else [p for p in others if p.grad is not None]
        with functions_unwatched(), modes_disabled():
            self._private.put_placeholders(reached, self._batch)
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
            if self._private.waits_since(parameters, self._batch):
                raise PrivacyConfigurationError(
                    "An optimizer is stepped with gradients of several batches: a union of Poisson samples is none, "
                    "and its cost is not known. Call opt.zero_grad() before manual_backward in every batch; for a "
                    "larger batch, give the loader a larger batch_size."
                )
            if number in self._private.by_optimizer:
                self._release(self._private.by_optimizer[number], parameters)
            elif number not in self._strategy.examiner.understanding.manual.public:
                raise FormChanged("training_step steps an optimizer that it did not step when it was examined.")
            else:
                self._refuse_records(parameters)
            self._has_stepped = True

    def _release(self, step: PrivateStep, parameters: list[nn.Parameter]) -> None:
        strategy, engine = self._strategy, step.engine
        plan = strategy.examiner.understanding.manual
        assert isinstance(engine, BookKeeping) and strategy.noise_multiplier is not None
        self._private.forget_zeroed()
        if self._private.placeholders.was_written and not self._has_warned:
            self._has_warned = True
            rank_zero_info(
                "lightning_dp: training_step changes gradients before a step (clip_gradients, p.grad.mul_): they have "
                "no noise yet, so that this changes nothing. Each record's gradient is clipped by the clipping rule; "
                "what is to be done to the noisy gradient belongs into on_before_optimizer_step."
            )
        if not engine.waiting():
            self._refuse_records(parameters)
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
        if self._private.waits(parameters):
            raise FormChanged(_MORE_THAN_EXAMINED)
        assert self._derived is not None
        if any(self._derived.holds(p.grad) for p in parameters):
            raise UnsupportedModelError(PAST_MANUAL_BACKWARD)


def _keeps_graph(
    gradient: Any = None, retain_graph: bool | None = None, create_graph: bool = False, inputs: Any = None
) -> bool:
    """Whether these arguments of `torch.Tensor.backward` let a further pass through the same forward follow."""
    return bool(create_graph if retain_graph is None else retain_graph)


def _refuse_leftovers(derived: DerivedFromRecords, module: nn.Module) -> None:
    """After ``training_step``: what would make its steps, or the module, depend on records past every release."""
    if derived.failure is not None:
        raise UnsupportedModelError(
            "An operation on records failed, and training_step went on: with manual optimization, that could "
            f"decide whether a step is taken. Let the error end the training: {derived.failure}"
        )
    named = [*module.named_parameters(), *module.named_buffers()]
    if written := [name for name, tensor in named if derived.holds(tensor)]:
        raise UnsupportedModelError(
            f"training_step writes what it computes from records into {written[:4]}, without noise. Let an "
            "optimizer change parameters, and keep nothing of the batch in buffers."
        )


def _refuse_lengths(shapes: Shapes, others: Iterable[Shapes]) -> None:
    for other in others:
        if other != shapes:
            one, another = ([shape for _, shape in sorted(known)] for known in (shapes, other))
            raise PrivacyConfigurationError(
                f"A record of a batch has shapes {one}, and of another {another}: with manual optimization, what is "
                "padded to the longest record tells its length to optimizers without noise. Pad all records to one "
                "length (padding='max_length')."
            )
