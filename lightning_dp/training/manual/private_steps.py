"""The private steps of a module's private optimizers, and which of the gradients that wait for them still count."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_dp.errors import PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.gradients.forms import CallForms
from lightning_dp.mechanism.step import PrivateStep
from lightning_dp.training.manual.placeholders import Placeholders
from lightning_dp.training.manual.rehearsal import PAST_MANUAL_BACKWARD, parameters_of


class PrivateSteps:
    """One `PrivateStep` for every private optimizer, of its parameters; gradients wait in their engines."""

    def __init__(self) -> None:
        #: By number of the optimizer.
        self.by_optimizer: dict[int, PrivateStep] = {}
        self.placeholders = Placeholders()
        self._handles: list[RemovableHandle] = []

    def watch(self, optimizers: Iterable[Optimizer], holds: Callable[[Any], bool]) -> None:
        """Lets optimizers refuse, from now on, to be stepped with what has no noise.

        Args:
            optimizers: Those of the fit.
            holds: Whether a gradient may depend on records.
        """

        def check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            parameters = parameters_of(optimizer)
            if any(holds(p.grad) for p in parameters):
                raise UnsupportedModelError(PAST_MANUAL_BACKWARD)
            if self.waits(parameters):
                raise PrivacyConfigurationError(
                    "An optimizer was stepped past Lightning, before its gradient had noise. Take it from "
                    "self.optimizers(), without use_pl_optimizer=False."
                )

        self._handles += [optimizer.register_step_pre_hook(check) for optimizer in optimizers]

    def close(self) -> None:
        """Leaves optimizers and gradients as if there had been no private step."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.placeholders.clear()

    def make(
        self,
        private: Collection[int],
        optimizers: Sequence[Optimizer],
        module: nn.Module,
        step_of: Callable[[Collection[int]], PrivateStep],
    ) -> None:
        """Makes the steps of private optimizers that have none yet.

        Args:
            private: Their numbers.
            optimizers: All optimizers.
            module: The module.
            step_of: Makes a step for what is trainable in the module, given the identities of these parameters.
        """
        for number in sorted(set(private) - self.by_optimizer.keys()):
            own = parameters_of(optimizers[number])
            with _only_trainable(module, own):
                step = step_of({id(p) for p in own})
            assert isinstance(step.engine, BookKeeping)
            # Norms are taken of the same numbers as sums: the step's own code runs between a backward pass and these.
            step.engine.expects_norms = False
            self.by_optimizer[number] = step

    def engines(self) -> Iterator[BookKeeping]:
        """Their engines."""
        for step in self.by_optimizer.values():
            assert isinstance(step.engine, BookKeeping)
            yield step.engine

    def use(self, forms: CallForms | None) -> None:
        """Holds the engines to the calls of layers that were examined."""
        for engine in self.engines():
            engine.forms = forms

    def forget_zeroed(self) -> None:
        """Forgets gradients of records that the user's code has set to zero or taken away."""
        for engine in self.engines():
            engine.forget([n for n in engine.waiting() if not self.placeholders.stands_for(engine.parameters[n])])

    def put_placeholders(self, reached: Iterable[nn.Parameter], batch: int) -> None:
        """After a backward pass: puts them where gradients wait, and on other parameters that it ``reached``."""
        for parameter in reached:
            self.placeholders.put(parameter, batch)
        for engine in self.engines():
            for name in engine.waiting():
                self.placeholders.put(engine.parameters[name], batch)

    def waits(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether one of these has a placeholder."""
        return any(map(self.placeholders.stands_for, parameters))

    def waits_since(self, parameters: Iterable[nn.Parameter], batch: int) -> bool:
        """Whether one of these has a placeholder of another batch."""
        stand = self.placeholders
        return any(stand.stands_for(p) and stand.batch_of(p) != batch for p in parameters)


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
