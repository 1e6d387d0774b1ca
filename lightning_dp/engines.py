"""Two ways to obtain per-example gradients, behind one contract.

`BookKeeping` records inputs and upstream gradients of every layer and never materialises what it can avoid (Bu et al.
2023); `PerExample` passes one example at a time through the model: slow, right for any module, and the oracle that the
tests compare everything with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.forms import CallForms
from lightning_dp.gradients import Dense, PerExampleGradient, add, full_precision
from lightning_dp.layers import calls_linear, of_linear_map, recompute, rule_for, trainable, trained_layers
from lightning_dp.records import Call, Recorder, getattr_path

ENGINES = ("bookkeeping", "per_example")


class Engine(ABC):
    """What the trainable parameters of a module owe to every example, one micro-batch at a time.

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

    #: How layers are called, once that has been examined: every forward pass is held to it. ``None``: nobody knows.
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

    #: Takes, within the backward pass, the gradient of a parameter to which nothing more will come, by its name.
    #: ``None``: all gradients are kept for `gradients`. An engine that cannot tell keeps them too.
    on_complete: Callable[[str, PerExampleGradient], None] | None = None

    @abstractmethod
    def gradients(self) -> dict[str, PerExampleGradient]:
        """After both: the gradients, by parameter name, of the loss that was given to ``backward``.

        A parameter that the loss did not depend on is left out.
        """


class SummingEngine(Engine):
    """An engine that bounds every example's contribution during the backward pass."""

    #: Norms ``(B, G)`` of what was bounded in the last micro-batch, as they were before, and the factors ``(B, G)``
    #: that bounded it; kept when `keep_norms` is set. Not private.
    norms: Tensor | None = None
    factors: Tensor | None = None
    keep_norms = False

    #: Takes, within the last backward pass of a step, the sum of a parameter to which nothing more will come, by its
    #: name, and a factor that it is yet to be multiplied with. ``None``: all sums are kept for `take`.
    on_complete: Callable[[str, Tensor, float], None] | None = None

    @abstractmethod
    def reset(self) -> None:
        """Forgets the sums of an interrupted step."""

    @abstractmethod
    def nonfinite(self) -> int:
        """How many examples of the last micro-batch were left out because something about them was not finite."""

    @abstractmethod
    def take(self) -> tuple[dict[str, Tensor], float]:
        """The sums over all micro-batches since, by parameter name, and a factor that they are yet to be multiplied
        with. They are the caller's from now on. A parameter that no loss depended on is left out."""


def make_engine(name: str, module: nn.Module) -> PerExampleEngine:
    """The engine of that name for this module."""
    if name == "bookkeeping":
        return BookKeeping(module)
    if name == "per_example":
        return PerExample(module)
    raise ValueError(f"engine must be one of {ENGINES}, got {name!r}.")


class BookKeeping(PerExampleEngine):
    """Norms and weighted sums from layer inputs and upstream gradients: one forward and one backward pass.

    A layer is dealt with as soon as its upstream gradient is known, within the backward pass: what its weighted sum
    does not need is freed there.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.layers = trained_layers(module)
        self.recorder = self.make_recorder(self.consume)
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._uses: dict[str, list[PerExampleGradient]] = {}
        #: The layers that use a parameter, by its name: several when it is tied.
        self._users: dict[str, list[str]] = {}
        for layer, child in self.layers.items():
            for own_name in trainable(child):
                self._users.setdefault(self._names[id(getattr_path(child, own_name))], []).append(layer)

    def make_recorder(self, consume: Callable[[str, Call], None] | None) -> Recorder:
        """A recorder of this engine's layers."""
        without_rule = [
            name for name, layer in self.layers.items() if rule_for(layer) is None and not calls_linear(layer)
        ]
        recorder = Recorder(self.layers, without_rule, consume)
        recorder.forms = self.forms
        return recorder

    def forward(self, batch_size: int) -> AbstractContextManager[None]:
        self._uses, self.recorder.forms = {}, self.forms
        return self.recorder.forward(batch_size)

    @contextmanager
    def backward(self, scale: float = 1.0) -> Iterator[None]:
        with set_aside(self.parameters.values()):
            with self.recorder.backward():
                yield
            past = [name for name, p in self.parameters.items() if p.grad is not None]
        if past:
            raise UnsupportedModelError(
                f"Parameters {past[:4]}: a gradient came to them past their layers' calls, and would not be bounded. "
                "They are used outside their layer's forward: a weight passed to a function, a penalty on weights in "
                "the loss (use the optimizer's weight_decay), a pruned or exchanged layer. Call the layer itself, or "
                "use engine='per_example', which is slow but takes any layer."
            )

    def consume(self, layer: str, call: Call) -> None:
        """Takes note of one call of a layer, whose gradient is known."""
        with full_precision(call.input.device):
            self._consume(layer, call)

    def _consume(self, layer: str, call: Call) -> None:
        form = None if self.forms is None else self.forms.layers.get(layer)
        per_example = None if form is None else form.per_example
        for name, gradient in gradients_of(self.layers[layer], layer, call, per_example).items():
            parameter = self._names[id(getattr_path(self.layers[layer], name))]
            count = sum(map(self.recorder.count, self._users[parameter]))
            if self.copies > 1:
                gradient = gradient.over_copies(self.copies)
            if self.expects_norms and count == 1:
                gradient.squared_norms()
            uses = self._uses.setdefault(parameter, [])
            uses.append(gradient)
            if self.on_complete is not None and len(uses) == count:
                self.on_complete(parameter, add(self._uses.pop(parameter)))

    def gradients(self) -> dict[str, PerExampleGradient]:
        uses, self._uses = self._uses, {}
        return {name: add(gradients) for name, gradients in uses.items()}


def gradients_of(
    module: nn.Module, layer: str, call: Call, per_example: Sequence[bool] | None = None
) -> Mapping[str, PerExampleGradient]:
    """The gradients, by the layer's own parameter names, that follow from one call of it.

    Args:
        module, layer: The layer, and its name.
        call: Its call.
        per_example: Which of all arguments have one entry per example, where that is known.
    """
    assert call.grad_output is not None
    input, rule = call.unchanged_input(layer), rule_for(module)
    if call.linear is not None:
        return of_linear_map(module, call.linear, input, call.grad_output)
    if rule is not None:
        return rule(module, input, call.grad_output)
    assert call.arguments is not None
    try:
        return recompute(module, *call.arguments, call.grad_output, per_example)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModelError(
            f"Layer '{layer}' ({type(module).__name__}) has no rule, and its forward cannot be run once more for every "
            f"example: {_why_not_again(str(error))} Or use engine='per_example', which is slow but takes any layer."
        ) from None


def _why_not_again(error: str) -> str:
    """What a layer does that keeps it from being run once more, and the way out."""
    if "random" in error:
        return (
            "it draws random numbers, by itself or by a child (dropout, DropPath). Hold its own parameters in a "
            "module of "
            "their own, whose forward applies them, so that what draws has none (MultiheadAttention: "
            "add_bias_kv=False)."
        )
    if "inplace" in error or "in-place" in error or "in place" in error:
        return (
            "it writes in place into a tensor that it has made itself (out[:, t] = h). Collect the parts in a list, "
            "and "
            "put them together by torch.stack or torch.cat."
        )
    if ".item()" in error or "data-dependent" in error:
        return (
            "what it does depends on the data (if x.any(), .item(), x[mask]). Compute both ways, and use torch.where."
        )
    return f"{error.splitlines()[0].removeprefix('vmap: ')[:200]}"


class PerExample(PerExampleEngine):
    """Autograd's own gradient of one example at a time."""

    max_examples = 1

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._gradients: dict[str, PerExampleGradient] = {}

    def forward(self, batch_size: int) -> AbstractContextManager[None]:
        return set_aside(self.parameters.values())  # the step may run backward passes of its own

    @contextmanager
    def backward(self, scale: float = 1.0) -> Iterator[None]:
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
