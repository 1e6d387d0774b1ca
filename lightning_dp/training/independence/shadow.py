"""A copy of a module that can be run without side effects: what can be copied is not shared with it."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dp.torch_api import (
    CALL_HOOKS,
    TorchDispatchMode,
    arguments_of,
    forward_pre_hooks,
    own_tensors,
    tree_flatten,
    tree_leaves,
    tree_map,
    writes,
)
from lightning_dp.training.manual.plan import ManualPlan
from lightning_dp.training.manual.rehearsal import Rehearsal

RandomState = tuple[Any, ...]


#: Attributes of a module that are PyTorch's and Lightning's own.
_FRAMEWORK = frozenset((*vars(nn.Module()), *vars(pl.LightningModule()), "trainer", "log", "log_dict"))


class Shadow:
    """A copy of a module, and what could not be copied.

    Args:
        module: The module.
        plan: What is known of its optimizers, where its ``training_step`` steps them itself.
        classify: Find out about these optimizers: which of them are stepped with gradients of records.

    Attributes:
        module: The copy. It logs nothing, and its optimizers and schedulers are copies as well.
        shared: Names of attributes that could not be copied and are the user's own.
        logged: What ``self.log`` was called with, by name.
        optimizers: Copies, without state, of the optimizers that the step asked for.
        rehearsal: Runs the step of a module that steps its optimizers itself; ``None``: Lightning does.
    """

    def __init__(self, module: pl.LightningModule, plan: ManualPlan | None = None, classify: bool = False) -> None:
        self.shared: list[str] = []
        self.logged: dict[str, Any] = {}
        self.optimizers: list[Optimizer] = []
        memo: dict[int, Any] = {}
        for tensor in _tensors_of(module):
            # deepcopy would drop what user code set on a parameter, and refuses results of a computation.
            memo[id(tensor)] = _copied(tensor)
        self.module = self._copy(module, memo)
        self.module.trainer = module.trainer
        for layer in self.module.modules():  # an engine records inputs before a clipping rule's hook changes them
            for hook in forward_pre_hooks(layer):
                if hasattr(hook, "active"):
                    hook.active = False
        for name, stub in self._stubs(module, memo, self.logged).items():
            object.__setattr__(self.module, name, stub)
        self.rehearsal: Rehearsal | None = None
        if not module.automatic_optimization and plan is not None:
            found = pl.LightningModule.optimizers(module, use_pl_optimizer=False)
            copies = [self._light(o, memo) for o in (found if isinstance(found, list) else [found])]
            self.rehearsal = Rehearsal(self.module, copies, plan, classify)
            for name, stub in self.rehearsal.stubs().items():
                object.__setattr__(self.module, name, stub)

    def settings(self) -> list[Any]:
        """What the copies of optimizers and schedulers were set to, and whether training is to stop."""
        found: list[Any] = [bool(getattr(self.module.trainer, "should_stop", False))]
        for optimizer in self.optimizers:
            found += [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return found

    def _light(self, optimizer: Optimizer, memo: Mapping[int, Any] | None = None) -> Optimizer:
        """A copy of an optimizer with its settings and without its state; with ``memo``, of the copy's parameters."""
        light = copy.copy(getattr(optimizer, "optimizer", optimizer))
        light.param_groups = [dict(group) for group in light.param_groups]
        if memo is not None:
            for group in light.param_groups:
                group["params"] = [memo[id(p)] for p in group["params"]]
        light.state = {}
        self.optimizers.append(light)
        return light

    def _copy(self, module: pl.LightningModule, memo: dict[int, Any]) -> pl.LightningModule:
        try:
            return copy.deepcopy(module, dict(memo))
        except Exception:  # whatever an attribute raises: a lock, an open file, a handle
            for prefix, child in module.named_modules():
                hooks = {f"{kind}[{i}]": h for kind in CALL_HOOKS for i, h in vars(child).get(kind, {}).items()}
                for name, value in [*vars(child).items(), *hooks.items()]:
                    if name in _FRAMEWORK:
                        continue
                    try:
                        copy.deepcopy(value, dict(memo))
                    except Exception:
                        memo[id(value)] = value
                        if name not in hooks:
                            self.shared.append(f"{prefix}.{name}" if prefix else name)
            return copy.deepcopy(module, memo)

    def _stubs(self, module: pl.LightningModule, memo: dict[int, Any], logged: dict[str, Any]) -> dict[str, Any]:
        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            logged[name] = value

        def log_dict(dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
            logged.update(dictionary)

        made: list[Any] = []

        def schedulers() -> Any:
            if not made:
                found = pl.LightningModule.lr_schedulers(module)
                for scheduler in found if isinstance(found, list) else [found]:
                    optimizer = getattr(scheduler, "optimizer", None)
                    if isinstance(optimizer, Optimizer):
                        memo[id(optimizer)] = self._light(optimizer)
                made.append(copy.deepcopy(found, memo))
            return made[0]

        def optimizers(use_pl_optimizer: bool = True) -> Any:
            found = pl.LightningModule.optimizers(module, use_pl_optimizer=False)
            light = [self._light(o) for o in (found if isinstance(found, list) else [found])]
            return light if isinstance(found, list) else light[0]

        return {"log": log, "log_dict": log_dict, "lr_schedulers": schedulers, "optimizers": optimizers}


def _copied(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter) and type(tensor) is nn.Parameter:
        copied = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
        copied.__dict__.update(tensor.__dict__)
        return copied
    return tensor.detach().clone().requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, and tensors among attributes that deepcopy refuses (results of a computation)."""
    yield from module.parameters()
    for child in module.modules():
        for name, value in vars(child).items():
            if name not in _FRAMEWORK:
                for _, leaf in leaves_of(value, name):
                    if isinstance(leaf, Tensor) and not leaf.is_leaf:
                        yield leaf


def leaves_of(value: Any, name: str, depth: int = 5) -> Iterator[tuple[str, Any]]:
    """What is kept within a value: tensors, arrays, numbers, strings, by a path that a message can name."""
    if isinstance(value, nn.Module | pl.Trainer) or depth == 0:
        return
    if isinstance(value, Mapping):
        yield f"len({name})", len(value)
        for key, part in list(value.items()):
            yield from leaves_of(part, f"{name}[{key!r}]", depth - 1)
    elif isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "deque":
        yield f"len({name})", len(value)
        for index, part in enumerate(list(value)[-64:]):
            yield from leaves_of(part, f"{name}[{index}]", depth - 1)
    elif isinstance(value, Tensor | np.ndarray | int | float | complex | str | bytes | bool | None):
        yield name, value
    elif hasattr(value, "__dict__") and not callable(value):
        for key, part in list(vars(value).items()):
            yield from leaves_of(part, f"{name}.{key}", depth - 1)


def kept_by(module: nn.Module) -> dict[str, Any]:
    """All that a module and its classes keep, by path: parameters, buffers, attributes; metrics are left out."""
    found: dict[str, Any] = {}
    metrics = tuple(f"{name}." for name, child in module.named_modules() if is_metric(child))
    for prefix, child in module.named_modules():
        path = f"{prefix}." if prefix else ""
        if path.startswith(metrics) if metrics else False:
            continue
        for name, tensor in own_tensors(child):
            if tensor is not None:
                found[path + name] = tensor
        for name, value in list(vars(child).items()):
            if name not in _FRAMEWORK:
                found.update(leaves_of(value, path + name))
        for cls in type(child).__mro__:  # what all of a class share
            if str(cls.__module__).partition(".")[0] in _LIBRARIES or cls is object:
                continue
            for name, value in list(vars(cls).items()):
                if not name.startswith("__") and isinstance(value, list | dict | set | int | float | Tensor | deque):
                    found.update(leaves_of(value, f"{cls.__name__}.{name}"))
    return found


#: Packages whose classes keep nothing of a batch.
_LIBRARIES = frozenset(("torch", "lightning", "pytorch_lightning", "transformers", "peft", "opacus", "torchmetrics"))


def is_metric(module: nn.Module) -> bool:
    """Whether a module collects a metric: what it keeps is shown, and not trained on."""
    return any(
        c.__module__.startswith("torchmetrics.") and c.__name__ in ("Metric", "MetricCollection")
        for c in type(module).__mro__
    )


def kept_by_metrics(module: nn.Module) -> list[Tensor]:
    """The tensors that a module's metrics hold, in whatever attribute."""
    kept = [list(vars(child).values()) for child in module.modules() if is_metric(child)]
    return [leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)]


def random_state() -> RandomState:
    """The state of every stream that user code may draw from."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return (
        torch.get_rng_state(),
        [torch.cuda.get_rng_state(d) for d in devices],
        np.random.get_state(),
        random.getstate(),
    )


def same_random_state(one: RandomState, other: RandomState) -> bool:
    """Whether nothing was drawn between two states."""
    same_torch = all(torch.equal(a, b) for a, b in zip([one[0], *one[1]], [other[0], *other[1]], strict=True))
    same_numpy = all(np.array_equal(a, b) for a, b in zip(one[2], other[2], strict=True))
    return same_torch and same_numpy and one[3] == other[3]


def set_random_state(state: RandomState) -> None:
    """Goes back to a state."""
    torch.set_rng_state(state[0])
    for device, cuda_state in enumerate(state[1]):
        torch.cuda.set_rng_state(cuda_state, device)
    np.random.set_state(state[2])
    random.setstate(state[3])


def seed_everything(seed: int) -> None:
    """Seeds all random streams of this process that user code draws from."""
    seed_torch(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_torch(seed: int) -> None:
    """As `torch.manual_seed`, without the milliseconds in which that notes its caller for absent CUDA devices."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Random streams go on afterwards as if nothing had been drawn."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


class AlignedRandomness(TorchDispatchMode):
    """Random numbers that depend on the row that they are drawn for, and not on how many rows there are.

    So that what a record does can be compared between two batches. Dropout is left out altogether: batches that are
    padded to different lengths would have different masks.

    Args:
        rows: Number of rows of the batch.
        seed: Of all streams.
        streams: Which stream each row draws from; by default its own number.
    """

    def __init__(self, rows: int, seed: int = 0, streams: Sequence[int] | None = None) -> None:
        super().__init__()
        self._rows, self._seed, self._calls = rows, seed, 0
        self._streams = list(range(rows)) if streams is None else list(streams)
        #: Whether numbers were drawn at all, dropout aside.
        self.drew = False
        #: Whether numbers were drawn that could not be told apart by rows.
        self.unaligned = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("native_dropout", "_fused_dropout"):
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if "scaled_dot_product" in name:
            return self._without_dropout(func, args, kwargs)
        self._calls += 1
        self.drew = True
        number = self._calls
        leaves, _ = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
        sizes = next((a for a in args if isinstance(a, list | tuple | torch.Size)), None)
        if name == "bernoulli_" and isinstance(args[0], Tensor) and _is_keep_probability(args):
            return args[0].fill_(1.0)  # a mask of dropout, made by hand
        count = len(tensors[0]) if tensors else (sizes[0] if sizes else 0)
        if not count or count % self._rows or name == "randperm":
            self.unaligned = True
            return self._seeded(number, 0, lambda: func(*args, **kwargs))
        each = count // self._rows
        parts = []
        for row in range(self._rows):
            rows = slice(row * each, (row + 1) * each)

            def taken(leaf: Any, rows: slice = rows) -> Any:
                return leaf[rows] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count else leaf

            if tensors:
                own_args, own_kwargs = tree_map(taken, (args, kwargs))
            else:
                own_args = tuple([each, *a[1:]] if a is sizes and a is not None else a for a in args)
                own_kwargs = kwargs
            parts.append(self._seeded(number, self._streams[row], partial(func, *own_args, **own_kwargs)))
        if writes(func):
            return args[0]
        return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts, strict=True)))

    def _seeded(self, number: int, row: int, draw: Callable[[], Any]) -> Any:
        state = torch.get_rng_state()
        seed_torch((self._seed * 1_000_003 + number) * 1_000_003 + row)
        try:
            return draw()
        finally:
            torch.set_rng_state(state)

    @staticmethod
    def _without_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = [a.name for a in arguments_of(func)]
        if "dropout_p" not in names:
            return func(*args, **kwargs)
        index = names.index("dropout_p")
        if index < len(args):
            args = (*args[:index], 0.0, *args[index + 1 :])
        return func(*args, **{**kwargs, **({"dropout_p": 0.0} if "dropout_p" in kwargs else {})})


def _is_keep_probability(args: tuple[Any, ...]) -> bool:
    return len(args) > 1 and isinstance(args[1], float) and 0 < args[1] < 1 and args[0].is_floating_point()
