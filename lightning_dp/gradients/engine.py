"""What an engine is: it supplies per-example gradients, or their bounded sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from lightning_dp.gradients.base import PerExampleGradient
from lightning_dp.gradients.forms import CallForms


class Engine(ABC):
    """Computes, per example, the gradients of a module's trainable parameters, one micro-batch at a time.

    There are two kinds: a `PerExampleEngine` supplies per-example gradients, which a clipping rule weighs and adds up;
    a `SummingEngine` bounds during the backward pass, and supplies the sum.

    Args:
        module: The model. Which of its parameters are trainable is read here, once.
    """

    #: The most examples that one forward pass may hold; ``None``: as many as memory allows.
    max_examples: int | None = None

    #: Rows of a micro-batch that make up an example, one after another: its augmentations. An example's gradient is the
    #: sum over them.
    copies = 1

    #: How layers were called when the model was examined; another form is an error. ``None``: it was not examined.
    forms: CallForms | None = None

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}

    @abstractmethod
    def forward(self, batch_size: int) -> AbstractContextManager[None]:
        """Surrounds the forward pass of a micro-batch of ``batch_size`` rows: examples, times their copies."""

    @abstractmethod
    def backward(self, scale: float = 1.0) -> AbstractContextManager[None]:
        """Surrounds its backward pass; leaves ``p.grad`` of every parameter as it was.

        Args:
            scale: What the gradients must be multiplied with to be those of single examples' losses.
        """


class PerExampleEngine(Engine):
    """An engine that supplies the gradient of every example."""

    #: Whether norms will be asked for: then they are computed as early as possible, and what only they need is freed.
    expects_norms = True

    #: Called within the backward pass with a parameter's name and gradient, once that is final. ``None``: all gradients
    #: are kept for `gradients`. An engine that cannot tell when they are final keeps them too.
    on_complete: Callable[[str, PerExampleGradient], None] | None = None

    @abstractmethod
    def gradients(self) -> dict[str, PerExampleGradient]:
        """After `forward` and `backward`: the gradients, by parameter name, of the loss that was differentiated.

        A parameter that the loss did not depend on is left out.
        """


class SummingEngine(Engine):
    """An engine that bounds every example's contribution during the backward pass."""

    #: Norms ``(B, G)`` of what was bounded in the last micro-batch, as they were before, and the factors ``(B, G)``
    #: that bounded it; kept when `keep_norms` is set. Not private.
    norms: Tensor | None = None
    factors: Tensor | None = None
    keep_norms = False

    #: Called within the last backward pass of a step with a parameter's name, its final sum, and a factor that the sum
    #: is yet to be multiplied with. ``None``: all sums are kept for `take`. An engine that cannot tell when they are
    #: final keeps them too.
    on_complete: Callable[[str, Tensor, float], None] | None = None

    @abstractmethod
    def reset(self) -> None:
        """Forgets the sums of an interrupted step."""

    @abstractmethod
    def nonfinite(self) -> int:
        """How many examples of the last micro-batch were left out because something about them was not finite."""

    @abstractmethod
    def take(self) -> tuple[dict[str, Tensor], float]:
        """The sums over all micro-batches since the last `take` or `reset`, by parameter name, and a factor that they
        are yet to be multiplied with; the engine forgets them. A parameter that no loss depended on is left out."""


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
