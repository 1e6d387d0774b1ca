"""A manual training step without its steps: what it would step with, as one loss that the examinations understand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dp.errors import FormChanged, PrivacyConfigurationError, UnsupportedModelError
from lightning_dp.torch_api import (
    functions_unwatched,
    graph_nodes,
    is_batch_norm,
    modes_disabled,
    set_version,
    version_of,
)
from lightning_dp.training.manual.placeholders import Placeholders
from lightning_dp.training.manual.plan import Asked, ManualPlan

#: Said where a gradient did not come through ``manual_backward``.
PAST_MANUAL_BACKWARD = (
    "A parameter has a gradient when its optimizer is stepped that did not come from self.manual_backward(loss): "
    "loss.backward(), or an assignment to p.grad, goes past the bound. Call self.manual_backward(loss)."
)


class NothingPrivate(PrivacyConfigurationError):
    """A run of a training step took no step with a gradient of records.

    Attributes:
        names, logged: Of the metrics that it logged: all, and those that depend on records.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.names: set[str] = set()
        self.logged: set[str] = set()


class Rehearsal:
    """Runs the ``training_step`` of a copy of a module; backward passes and steps are taken note of, and not taken.

    The step's "loss" is the sum of all losses whose gradients private optimizers are stepped with: it is a sum over
    records if, and only if, each of them is, and its gradient is theirs.

    Args:
        module: The copy.
        optimizers: Copies of its optimizers, of the copy's parameters, in order.
        plan: What is known of the optimizers: parameters of those that are not private are not trained here.
        classify: The step is being examined: which losses and optimizers are public is found, not known.
    """

    def __init__(
        self, module: pl.LightningModule, optimizers: Sequence[Optimizer], plan: ManualPlan, classify: bool
    ) -> None:
        self._module, self._optimizers, self._plan, self._classify = module, list(optimizers), plan, classify
        self._training_step: Callable[..., Any] = module.training_step
        #: Whether a loss depends on no record of the batch; set by who can tell.
        self.is_public: Callable[[Tensor], bool] = lambda loss: False
        self._toggled: dict[nn.Parameter, bool] = {}
        self._places = {
            parameter: (number, place)
            for number, optimizer in enumerate(self._optimizers)
            for place, parameter in enumerate(parameters_of(optimizer))
        }
        for optimizer in self._optimizers:
            optimizer.step = self._stepper(optimizer)  # type: ignore[method-assign]
            optimizer.toggle_model = self._toggler(optimizer)  # type: ignore[attr-defined]
            optimizer.optimizer = optimizer  # type: ignore[attr-defined]
        #: Parameters that are trained in a step, and in no one's gradients here.
        self._public: list[nn.Parameter] = []
        if not classify:
            for number, optimizer in enumerate(self._optimizers):
                if number not in plan.private:  # it is stepped with what no record reaches, or not yet
                    self._public += [p for p in parameters_of(optimizer) if p.requires_grad]
            for parameter in self._public:
                parameter.requires_grad_(False)
            for layer in module.modules():
                if is_batch_norm(layer) and layer.training:
                    layer.forward = _row_by_row(layer)

    def stubs(self) -> dict[str, Any]:
        """Methods that stand in for the copy's own, by name."""
        return {
            "training_step": self.training_step,
            "manual_backward": self.manual_backward,
            "optimizers": self.optimizers,
            "toggle_optimizer": self.toggle,
            "untoggle_optimizer": self.untoggle,
            "toggled_optimizer": lambda optimizer: self._toggler(optimizer)(),
        }

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The copies, as `LightningModule.optimizers` gives them."""
        return self._optimizers if len(self._optimizers) > 1 else self._optimizers[0]

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the step.

        Returns:
            The sum of all losses whose gradients private optimizers are stepped with.

        Raises:
            NothingPrivate: There is none.
            UnsupportedModelError: A parameter has a gradient that came by another way than ``manual_backward``.
        """
        self._placeholders = Placeholders()
        #: The losses so far, what became of them, and which of them each parameter's gradient stands for.
        self._losses: list[Tensor] = []
        self._asked: list[Asked] = []
        self._behind: dict[nn.Parameter, list[int]] = {}
        #: The steps so far: the optimizer, and the losses behind its gradients.
        self._steps: list[tuple[int, set[int]]] = []
        for parameter in self._public:
            parameter.requires_grad_(True)
        with _kept(list(self._places)):
            self._training_step(batch, *args, **kwargs)
        for parameter in self._public:
            parameter.requires_grad_(False)
        if self._classify:
            self._conclude()
        terms = [
            loss if asked.times == 1 else loss * asked.times
            for loss, asked in zip(self._losses, self._asked, strict=True)
            if asked.times
        ]
        if not terms:
            raise NothingPrivate(
                "training_step took no step of an optimizer with a gradient that depends on the batch: there is "
                "nothing to train privately. With manual optimization, call self.manual_backward(loss) and then step "
                "an optimizer from self.optimizers(), on one of the first batches. (Gradients of several batches "
                "cannot be added up: for a larger batch, give the loader a larger batch_size.)"
            )
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Notes which parameters the loss's gradient would reach."""
        number = len(self._losses)
        self._losses.append(loss)
        if self._classify:
            reached = [self._places[p] for p in _reached(loss) if p in self._places]
            self._asked.append(Asked(reached, self.is_public(loss)))
        else:
            if number >= len(self._plan.asked):
                raise FormChanged("training_step asks for more backward passes than when it was examined.")
            self._asked.append(self._plan.asked[number])
        for optimizer, place in self._asked[number].reached:
            parameter = parameters_of(self._optimizers[optimizer])[place]
            if not self._placeholders.stands_for(parameter):
                self._behind[parameter] = []
            self._placeholders.put(parameter, 0)
            self._behind[parameter].append(number)

    def _stepper(self, optimizer: Optimizer) -> Callable[..., Any]:
        def step(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            result = closure() if closure is not None else None
            if self._classify:
                self._note_step(optimizer)
            return result

        return step

    def _note_step(self, optimizer: Optimizer) -> None:
        behind: set[int] = set()
        for parameter in parameters_of(optimizer):
            if self._placeholders.stands_for(parameter):
                behind |= set(self._behind[parameter])
            elif parameter.grad is not None and bool(torch.count_nonzero(parameter.grad)):
                raise UnsupportedModelError(PAST_MANUAL_BACKWARD)
        if not behind:
            return
        number = next(i for i, known in enumerate(self._optimizers) if known is optimizer)
        self._steps.append((number, behind))

    def _conclude(self) -> None:
        """Tells the plan what this run did."""
        private = {n for n, behind in self._steps if not all(self._asked[index].is_public for index in behind)}
        self._plan.learn(private, {n for n, _ in self._steps}, self._asked)
        releases = [behind for number, behind in self._steps if number in self._plan.private]
        self._plan.releases = max(self._plan.releases, len(releases))
        for behind in releases:
            for index in behind:
                self._asked[index].times += 1

    # -- toggles ---------------------------------------------------------------------------------------------------

    def toggle(self, optimizer: Optimizer) -> None:
        """As `LightningModule.toggle_optimizer`, on the copy's parameters."""
        self._toggled = {p: p.requires_grad for other in self._optimizers for p in parameters_of(other)}
        own = set(parameters_of(optimizer))
        for parameter in self._toggled.keys() - own:
            parameter.requires_grad_(False)

    def untoggle(self, optimizer: Optimizer) -> None:
        """As `LightningModule.untoggle_optimizer`."""
        for parameter, required in self._toggled.items():
            parameter.requires_grad_(required)
        self._toggled = {}

    def _toggler(self, optimizer: Optimizer) -> Callable[..., Any]:
        @contextmanager
        def toggled(sync_grad: bool = True) -> Iterator[None]:
            self.toggle(optimizer)
            yield
            self.untoggle(optimizer)

        return toggled


@contextmanager
def _kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Undoes what is done to parameters within (weights that are clamped after a step), also for autograd."""
    with functions_unwatched(), modes_disabled():
        before = [(p, version_of(p), p.detach().clone()) for p in parameters]
    yield
    with functions_unwatched(), modes_disabled():
        for parameter, version, values in before:
            if version_of(parameter) != version or not torch.equal(parameter, values):
                parameter.data.copy_(values)
                set_version(parameter, version)


def _row_by_row(layer: Any) -> Callable[[Tensor], Tensor]:
    """A forward of BatchNorm by its running statistics. One that normalised records was refused; one that normalises
    fakes would make them differ with the size of the batch, which is public where they are trained with."""

    def forward(input: Tensor) -> Tensor:
        mean, variance = layer.running_mean, layer.running_var
        if mean is None or variance is None:
            mean, variance = input.new_zeros(input.shape[1]), input.new_ones(input.shape[1])
        return F.batch_norm(input, mean, variance, layer.weight, layer.bias, False, 0.0, layer.eps)

    return forward


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _reached(loss: Tensor) -> list[nn.Parameter]:
    """Parameters that a backward pass from this loss would give a gradient to."""
    leaves = (getattr(node, "variable", None) for node in graph_nodes(loss))
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, nn.Parameter)}.values())
