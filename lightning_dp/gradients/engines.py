"""Two ways to obtain per-example gradients, behind one contract.

`BookKeeping` records inputs and upstream gradients of every layer and never materialises what it can avoid (Bu et al.
2023); `PerExample` passes one example at a time through the model: slow, right for any module, and the oracle that the
tests compare everything with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from lightning_dp.errors import UnsupportedModelError
from lightning_dp.gradients.base import Dense, PerExampleGradient
from lightning_dp.gradients.covered import covered_layers, uncovered
from lightning_dp.gradients.engine import PerExampleEngine, set_aside
from lightning_dp.gradients.layer_call import LayerCall
from lightning_dp.gradients.model import getattr_path, trainable
from lightning_dp.gradients.precision import full_precision
from lightning_dp.gradients.recorder import Recorder
from lightning_dp.gradients.rules.composite import calls_linear, of_linear_map
from lightning_dp.gradients.rules.recompute import recompute
from lightning_dp.gradients.rules.registry import rule_for, takes_arguments
from lightning_dp.gradients.rules.second_order import balanced, second_order_rule
from lightning_dp.gradients.tied import add
from lightning_dp.torch_api import functions_unwatched

ENGINES = ("bookkeeping", "per_example")


def make_engine(name: str, module: nn.Module) -> PerExampleEngine:
    """The engine of that name, one of `ENGINES`, for this module; another name is a ValueError."""
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
        self._module = module
        self.layers = covered_layers(module)
        self._uncovered = uncovered(module, self.layers)
        self._uses: dict[str, list[PerExampleGradient]] = {}
        names = {id(p): name for name, p in self.parameters.items()}
        #: The names of layers' parameters, by layer and the layer's own name.
        self._names: dict[tuple[str, str], str] = {}
        #: The layers that use a parameter, by its name: several when it is tied.
        self._users: dict[str, list[str]] = {}
        for layer, child in self.layers.items():
            for own_name in trainable(child):
                name = self._names[layer, own_name] = names[id(getattr_path(child, own_name))]
                self._users.setdefault(name, []).append(layer)
        self.recorder = self.make_recorder(self.consume)

    def make_recorder(self, consume: Callable[[str, LayerCall], None] | None) -> Recorder:
        """A recorder of this engine's layers."""
        with_arguments = [
            name
            for name, layer in self.layers.items()
            if not calls_linear(layer) and ((rule := rule_for(layer)) is None or takes_arguments(rule))
        ]
        recorder = Recorder(self._module, self.layers, with_arguments, consume, self._followed(), self._take)
        recorder.forms = self.forms
        return recorder

    def _followed(self) -> set[str]:
        """Names of the parameters that are followed to where they meet records, and of all others of their layers."""
        outside = set() if self.forms is None else self.forms.outside
        followed = (self._uncovered | outside) & self.parameters.keys()
        layers = {layer for name in followed for layer in self._users.get(name, ())}
        return followed | {name for (layer, _), name in self._names.items() if layer in layers}

    def forward(self, batch_size: int) -> AbstractContextManager[None]:
        self._uses = {}
        if self.recorder.followed != self._followed():
            self.recorder = self.make_recorder(self.consume)
        self.recorder.forms = self.forms
        return self.recorder.forward(batch_size)

    @contextmanager
    def backward(self, scale: float = 1.0, keeps_graph: bool = False) -> Iterator[None]:
        with set_aside(self.parameters.values()):
            with self.recorder.backward(keeps_graph):
                yield
            past = [name for name, p in self.parameters.items() if p.grad is not None]
            past += self.recorder.expressions.missed()
        if past:
            raise UnsupportedModelError(
                f"Parameters {past[:4]}: a gradient came to them past their layers' calls, and would not be bounded. "
                "They are used outside their layer's forward: a weight passed to a function, a penalty on weights in "
                "the loss (use the optimizer's weight_decay), a pruned or exchanged layer. Call the layer itself, or "
                "use engine='per_example', which is slow but takes any layer."
            )

    def consume(self, layer: str, call: LayerCall) -> None:
        """Takes note of one call of a layer, whose gradient is known."""
        with full_precision(call.input.device), functions_unwatched():
            self._consume(layer, call)

    def _consume(self, layer: str, call: LayerCall) -> None:
        form = None if self.forms is None else self.forms.layers.get(layer)
        per_example = None if form is None else form.per_example
        for name, gradient in gradients_of(self.layers[layer], layer, call, per_example).items():
            if call.is_split:
                gradient = gradient.over_copies(call.input.shape[1])
            self._take(self._names[layer, name], gradient)

    def _take(self, parameter: str, gradient: PerExampleGradient) -> None:
        """Takes note of a parameter's gradient at one use."""
        of_layers = sum(map(self.recorder.count, self._users.get(parameter, ())))
        count = of_layers + self.recorder.expressions.copies.expected(parameter)
        if self.copies > 1:
            gradient = gradient.over_copies(self.copies)
        if self.expects_norms and count == 1:
            gradient.squared_norms()
        uses = self._uses.setdefault(parameter, [])
        uses.append(gradient)
        if self.on_complete is not None and len(uses) == count:
            self.on_complete(parameter, add(self._uses.pop(parameter)))

    def waiting(self) -> set[str]:
        """Names of the parameters that `gradients` would give a gradient of."""
        return set(self._uses)

    def forget(self, names: Iterable[str]) -> None:
        """Drops what backward passes have found of these parameters so far, as ``p.grad = None`` does."""
        for name in names:
            self._uses.pop(name, None)

    def gradients(self) -> dict[str, PerExampleGradient]:
        uses, self._uses = self._uses, {}
        return {name: add(gradients) for name, gradients in uses.items()}


def gradients_of(
    module: nn.Module, layer: str, call: LayerCall, per_example: Sequence[bool] | None = None
) -> Mapping[str, PerExampleGradient]:
    """The gradients, by the layer's own parameter names, that follow from one call of it.

    Args:
        module, layer: The layer, and its name.
        call: Its call.
        per_example: Which of all arguments have one entry per example, where that is known.

    Raises:
        UnsupportedModelError: The layer has no rule and cannot be recomputed, or its input was modified in place.
    """
    assert call.grad_output is not None
    input, rule = call.unchanged_input(layer), rule_for(module)
    if call.is_split and rule is not None:
        return rule(module, input.flatten(0, 1), call.grad_output.flatten(0, 1))
    if call.backward_at is not None:
        second_order = second_order_rule(module)
        assert second_order is not None
        return second_order(module, call.backward_at, *balanced(call.backward_at, call.grad_output, input))
    if call.linear is not None:
        return of_linear_map(module, call.linear, input, call.grad_output)
    if rule is not None and takes_arguments(rule):
        return rule(module, input, call.grad_output, call.arguments)
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
