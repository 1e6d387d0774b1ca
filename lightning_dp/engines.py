"""Two ways to obtain per-example gradients, behind one contract.

`BookKeeping` records inputs and upstream gradients of every layer and never materialises what it can avoid (Bu et al.
2023); `PerExample` passes one example at a time through the model: slow, right for any module, and the oracle that the
tests compare everything with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from lightning_dp.gradients import Dense, PerExampleGradient, add
from lightning_dp.layers import rule_for, trainable
from lightning_dp.records import Call, Recorder

ENGINES = ("bookkeeping", "per_example")


class Engine(ABC):
    """Per-example gradients of the trainable parameters of a module, one micro-batch at a time.

    Args:
        module: The model. Which of its parameters are trainable is read here, once.
    """

    #: The most examples that one forward pass may hold; ``None``: as many as memory allows.
    max_examples: int | None = None

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    @abstractmethod
    def forward(self, batch_size: int) -> AbstractContextManager[None]:
        """Surrounds the forward pass of a micro-batch of ``batch_size`` examples."""

    @abstractmethod
    def backward(self) -> AbstractContextManager[None]:
        """Surrounds its backward pass; leaves ``p.grad`` of every parameter as it was."""

    @abstractmethod
    def gradients(self) -> dict[str, PerExampleGradient]:
        """After both: the gradients, by parameter name, of the loss that was given to ``backward``.

        A parameter that the loss did not depend on is left out.
        """


def make_engine(name: str, module: nn.Module) -> Engine:
    """The engine of that name for this module."""
    if name == "bookkeeping":
        return BookKeeping(module)
    if name == "per_example":
        return PerExample(module)
    raise ValueError(f"engine must be one of {ENGINES}, got {name!r}.")


class BookKeeping(Engine):
    """Norms and weighted sums from layer inputs and upstream gradients: one forward and one backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.layers = {name: m for name, m in module.named_modules() if trainable(m)}
        self.recorder = Recorder(self.layers)
        self._names = {id(p): name for name, p in self.parameters.items()}

    def forward(self, batch_size: int) -> AbstractContextManager[None]:
        return self.recorder.forward(batch_size)

    def backward(self) -> AbstractContextManager[None]:
        return self.recorder.backward()

    def gradients(self) -> dict[str, PerExampleGradient]:
        return self.gradients_of(self.recorder.take())

    def gradients_of(self, recorded: dict[str, list[Call]]) -> dict[str, PerExampleGradient]:
        """The gradients that follow from these calls."""
        uses: dict[str, list[PerExampleGradient]] = {}
        for layer, calls in recorded.items():
            module = self.layers[layer]
            rule = rule_for(module)
            assert rule is not None, f"'{layer}' passed the checks without a rule"
            for call in calls:
                assert call.grad_output is not None
                gradients = rule(module, call.unchanged_input(layer), call.grad_output)
                for own_name, gradient in gradients.items():
                    uses.setdefault(self._names[id(getattr(module, own_name))], []).append(gradient)
        return {name: add(gradients) for name, gradients in uses.items()}


class PerExample(Engine):
    """Autograd's own gradient of one example at a time."""

    max_examples = 1

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._gradients: dict[str, PerExampleGradient] = {}

    def forward(self, batch_size: int) -> AbstractContextManager[None]:
        return set_aside(self.parameters.values())  # the step may run backward passes of its own

    @contextmanager
    def backward(self) -> Iterator[None]:
        with set_aside(self.parameters.values()):
            yield
            grads = {name: p.grad for name, p in self.parameters.items()}
            self._gradients = {name: Dense(g.detach()[None]) for name, g in grads.items() if g is not None}

    def gradients(self) -> dict[str, PerExampleGradient]:
        gradients, self._gradients = self._gradients, {}
        return gradients


@contextmanager
def set_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """``p.grad`` is empty inside, and afterwards what it was before."""
    kept: Mapping[nn.Parameter, Tensor | None] = {p: p.grad for p in parameters}
    for parameter in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in kept.items():
            parameter.grad = grad
