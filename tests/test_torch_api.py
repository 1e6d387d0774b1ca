"""PyTorch's private names do what is relied on, in the version that is installed; and they stand in one file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_dp import torch_api

PACKAGE = Path(torch_api.__file__).parent
aten = torch.ops.aten


class Seen(torch_api.TorchDispatchMode):
    """Remembers the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_writing_in_place_is_counted() -> None:
    tensor = torch.zeros(3)
    before = torch_api.version_of(tensor)
    tensor[:1].add_(1)
    assert torch_api.version_of(tensor) == before + 1


def test_views_know_their_base_and_share_its_storage() -> None:
    tensor = torch.zeros(3)
    view = tensor[1:]
    assert torch_api.base_of(tensor) is None
    assert torch_api.base_of(view) is tensor
    assert torch_api.storage_id(view) == torch_api.storage_id(tensor) != torch_api.storage_id(tensor.clone())


@pytest.mark.parametrize("register", [Tensor.register_hook, Tensor.register_post_accumulate_grad_hook])
def test_hooks_of_a_gradient_are_seen(register: Callable[..., Any]) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert not torch_api.has_gradient_hooks(parameter)
    register(parameter, lambda *_: None)
    assert torch_api.has_gradient_hooks(parameter)


def test_norms_and_scaling_of_many() -> None:
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([[5.0]])]
    assert torch.stack(torch_api.euclidean_norms(tensors)).tolist() == [5.0, 5.0]
    torch_api.scale_(tensors, 2.0)
    torch_api.scale_(tensors, torch.tensor(0.5))
    torch_api.scale_(tensors, 3.0)
    assert [tensor.tolist() for tensor in tensors] == [[9.0, 12.0], [[15.0]]]


def test_hooks_before_a_forward_are_listed_and_removed() -> None:
    class Mark:
        def __call__(self, *_: Any) -> None:
            """Does nothing."""

    layer = nn.Linear(2, 2)
    other: Callable[..., None] = lambda *_: None  # noqa: E731
    layer.register_forward_pre_hook(other)
    layer.register_forward_pre_hook(Mark(), with_kwargs=True)
    layer.register_forward_pre_hook(Mark())
    assert len(torch_api.forward_pre_hooks(layer)) == 3
    torch_api.remove_forward_pre_hooks(layer, Mark)
    assert torch_api.forward_pre_hooks(layer) == [other]
    layer(torch.zeros(1, 2))
    assert all(hasattr(layer, name) for name in torch_api.CALL_HOOKS)


@pytest.mark.parametrize("name", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_a_module_s_backward_are_seen(name: str) -> None:
    layer = nn.Linear(2, 2)
    assert not torch_api.has_backward_hooks(layer)
    getattr(layer, name)(lambda *_: None)
    assert torch_api.has_backward_hooks(layer)


@pytest.mark.parametrize(
    "register",
    [nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook],
)
def test_hooks_of_all_modules_are_seen(register: Callable[..., Any]) -> None:
    assert not torch_api.has_global_hooks()
    handle = register(lambda *_: None)
    try:
        assert torch_api.has_global_hooks()
    finally:
        handle.remove()


def test_the_nodes_of_a_graph_are_met_once() -> None:
    weight = nn.Parameter(torch.ones(2))
    product = weight * weight
    nodes = list(torch_api.graph_nodes((product + product).sum()))
    assert len(nodes) == len(set(nodes)) == 4
    assert [node.variable for node in nodes if hasattr(node, "variable")] == [weight]
    assert list(torch_api.graph_nodes(torch.ones(2))) == []


@pytest.mark.parametrize("name", ["tolist", "numpy", "__array__"])
def test_some_reads_run_no_operation(name: str) -> None:
    seen: list[Any] = []

    class Operations(torch_api.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Operations():
        getattr(torch.ones(2), name)()
    assert torch_api.READ_NUMBER not in seen
    assert name in torch_api.SILENT_READS


def test_a_tensor_that_was_put_back_passes_for_unchanged() -> None:
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * weight).sum()
    version = torch_api.version_of(weight)
    with torch.no_grad():
        weight.mul_(2).div_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward(retain_graph=True)
    torch_api.set_version(weight, version)
    loss.backward()
    assert torch.equal(weight.grad, 2 * torch.ones(2))


def test_a_tensor_stands_for_a_parameter() -> None:
    layer = nn.Linear(2, 2)
    weight, zeros = layer.weight, torch.zeros(2, 2)
    torch_api.put_parameter(layer, "weight", zeros)
    assert layer.weight is zeros
    assert torch.equal(layer(torch.ones(1, 2))[0], layer.bias)
    torch_api.put_parameter(layer, "weight", weight)
    assert layer.weight is weight


def test_a_module_s_own_tensors_are_listed() -> None:
    layer = nn.BatchNorm1d(2, affine=False)
    layer.child = nn.Linear(2, 2)
    own = dict(torch_api.own_tensors(layer))
    assert own.keys() == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert own["weight"] is None and own["running_mean"] is layer.running_mean


def test_a_module_s_own_children_are_listed_wherever_they_are_used() -> None:
    layer = nn.Linear(2, 2)
    assert torch_api.own_modules(nn.Sequential(layer, layer)) == [("0", layer), ("1", layer)]


def test_padding_is_as_pad_takes_it() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=(1, 2), padding_mode="circular")
    assert torch_api.padding_of(layer) == [2, 2, 1, 1]


def test_batch_norms_are_told() -> None:
    assert torch_api.is_batch_norm(nn.SyncBatchNorm(2)) and torch_api.is_batch_norm(nn.LazyBatchNorm2d())
    assert not torch_api.is_batch_norm(nn.InstanceNorm1d(2)) and not torch_api.is_batch_norm(nn.GroupNorm(1, 2))


def test_operations_are_named() -> None:
    with Seen() as seen:
        tensor = torch.zeros(2)
        tensor.add_(tensor)
        tensor.sum().item()
    add, read = seen.functions[-3], seen.functions[-1]
    assert read is torch_api.READ_NUMBER
    assert (torch_api.operation_name(add), torch_api.overload_name(add)) == ("add_", "Tensor")
    assert [argument.name for argument in torch_api.arguments_of(add)] == ["self", "other", "alpha"]
    assert torch_api.writes(add) and not torch_api.writes(aten.add.Tensor)
    assert torch_api.arguments_of(add)[0].alias_info.is_write


def test_modes_can_be_put_aside() -> None:
    class SeenFunctions(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Seen() as seen, torch_api.modes_disabled():
        torch.zeros(2)
    with SeenFunctions() as functions, torch_api.functions_unwatched():
        torch.relu(torch.zeros(2))
    assert not seen.functions and not functions.count


PRIVATE = re.compile(
    r"torch\.(\w+\.)*_[a-z]"  # torch._foreach_norm, torch.utils._pytree
    r"|torch\._C|aten\._local_scalar_dense|\._version\b|\._base\b|\._cdata\b|\._schema\b|\._op(name|erator)\b"
    r"|\._(reversed_padding|forward|backward|global|parameters|buffers|overload|load_state|combined_loader)\w*"
)
#: Where they may stand. Of the last, `nn.Module._load_from_state_dict`, which is documented for overriding.
ALLOWED = ("torch_api.py", "training/lightning_api.py", "statistics/base.py")


@pytest.mark.parametrize(
    "module",
    [path for path in sorted(PACKAGE.rglob("*.py")) if str(path.relative_to(PACKAGE)) not in ALLOWED],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_private_names_stand_in_one_file(module: Path) -> None:
    code = [line.partition("#")[0] for line in module.read_text(encoding="utf-8").splitlines()]
    found = [line.strip() for line in code if PRIVATE.search(line) and "self._" not in line and "``" not in line]
    assert found == []


def test_a_compiled_module_s_call_can_be_put_aside() -> None:
    module = nn.Linear(2, 2)
    assert torch_api.compiled_call(module) is None
    module.compile(backend="eager")
    call = torch_api.compiled_call(module)
    assert call is not None
    torch_api.put_compiled_call(module, None)
    assert torch_api.compiled_call(module) is None
    assert not torch_api.is_compiled(module)
    compiled = torch.compile(module, backend="eager")
    assert torch_api.is_compiled(compiled) and torch_api.original_of(compiled) is module


def test_functions_of_subclasses_are_unwatched_and_modes_are_not() -> None:
    class Seeing(Tensor):
        seen: ClassVar[list[Any]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    class Mode(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    tensor = torch.zeros(2).as_subclass(Seeing)
    Seeing.seen.clear()
    with Mode() as mode, torch_api.subclasses_unwatched():
        torch.add(tensor, 1)
    assert mode.count == 1
    assert not Seeing.seen


def test_calls_of_custom_functions_are_passed_on() -> None:
    class Kind(Tensor):
        pass

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return 2 * tensor

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    told: list[Any] = []

    def handle(function: Any, args: tuple[Any, ...]) -> Any:
        told.append(args)
        return function(*args)

    before = torch.autograd.Function.apply
    plain = torch.ones(2)
    with torch_api.custom_functions_passed_to(handle, Kind):
        assert torch.equal(Double.apply(plain), 2 * plain)
        assert not told
        assert torch.equal(Double.apply(plain.as_subclass(Kind)).as_subclass(Tensor), 2 * plain)
        assert len(told) == 1
    assert torch.autograd.Function.apply == before
    assert torch.equal(Double.apply(plain), 2 * plain)
