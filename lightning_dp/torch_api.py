"""Every private name of PyTorch that is used: a function each, which ``tests/test_torch_api.py`` holds to what PyTorch
does.

Overriding what a class documents for it (``nn.Module._load_from_state_dict``) is not meant, nor the tree functions of
``torch.utils._pytree``, which are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["TorchDispatchMode", "tree_flatten", "tree_leaves", "tree_map", "tree_unflatten"]

# -- tensors -------------------------------------------------------------------------------------------------------


def version_of(tensor: Tensor) -> int:
    """How often a tensor's memory was written to in place."""
    return tensor._version


def set_version(tensor: Tensor, version: int) -> None:
    """Lets a tensor whose numbers are again what they were pass for one that was never written to."""
    torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of; ``None``: it is none."""
    return tensor._base


def storage_id(tensor: Tensor) -> int:
    """The same number for tensors of the same storage, and for no others that are alive."""
    return int(tensor.untyped_storage()._cdata)


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether something was registered that is called with the tensor's gradient."""
    return bool(tensor._backward_hooks) or bool(getattr(tensor, "_post_accumulate_grad_hooks", None))


def euclidean_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of every tensor, in few kernels."""
    return list(torch._foreach_norm(list(tensors)))


def scale_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiplies every tensor by a factor, in place, in few kernels."""
    torch._foreach_mul_(list(tensors), factor)


#: Functions by which a tensor's values become Python's or NumPy's without an operation.
SILENT_READS = frozenset(("tolist", "numpy", "__array__", "__dlpack__", "__repr__", "__reduce_ex__", "tensor_split"))


def silently_read(func: Any, args: Sequence[Any]) -> int | None:
    """Which argument of a call of a function of tensors is read so, if it is a tensor; ``None``: none is."""
    name = getattr(func, "__name__", "")
    place = 1 if name == "tensor_split" else 0
    is_read = name in SILENT_READS and len(args) > place and isinstance(args[place], Tensor)
    return place if is_read else None


def graph_nodes(tensor: Tensor) -> Iterator[Any]:
    """Every node of the graph that autograd would go back through from a tensor, once."""
    seen: set[Any] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


@contextmanager
def custom_functions_passed_to(
    handle: Callable[[Callable[..., Any], tuple[Any, ...]], Any], kind: type
) -> Iterator[None]:
    """Calls of `torch.autograd.Function`'s ``apply``, of which no ``__torch_function__`` is told, go to ``handle``.

    Args:
        handle: Called with the function and its arguments, in place of the function, where one of these is a ``kind``.
        kind: A subclass of `torch.Tensor`.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        function = original.__get__(None, cls)
        if not kwargs and any(isinstance(arg, kind) for arg in args):
            return handle(function, args)
        return function(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore


# -- modules -------------------------------------------------------------------------------------------------------

#: Attributes of a module that hold hooks around its call.
CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether something was registered that is called with a module's gradients."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """What is called before a module's forward, in order."""
    return list(module._forward_pre_hooks.values())


def remove_forward_pre_hooks(module: nn.Module, kind: type) -> None:
    """Removes the hooks that are instances of ``kind`` from what is called before a module's forward."""
    for handle, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, kind):
            del module._forward_pre_hooks[handle]
            module._forward_pre_hooks_with_kwargs.pop(handle, None)


def has_global_hooks() -> bool:
    """Whether something was registered that is called around the forward of every module."""
    hooks = nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Parameters and buffers of a module itself by attribute, also those that are ``None`` or shared."""
    yield from module._parameters.items()
    yield from module._buffers.items()


def put_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Lets a tensor stand where a module has a parameter: assignment takes nothing but parameters."""
    module._parameters[name] = tensor  # type: ignore[assignment]


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` returned for another, its original."""
    return isinstance(module, OptimizedModule)


def original_of(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` returned this one for."""
    return module._orig_mod  # type: ignore[return-value]


def compiled_call(module: nn.Module) -> Any:
    """What a module's call runs since ``module.compile()``; ``None``: its forward."""
    return module._compiled_call_impl


def put_compiled_call(module: nn.Module, call: Any) -> None:
    """Lets a module's call run this, as ``module.compile()`` does; ``None``: its forward."""
    module._compiled_call_impl = call


def own_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a module by attribute, also those that are shared."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def padding_of(convolution: nn.modules.conv._ConvNd) -> list[int]:
    """Padding as `torch.nn.functional.pad` takes it: last dimension first, both sides."""
    return list(convolution._reversed_padding_repeated_twice)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module normalises over the batch when it is in training mode."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


# -- operations ----------------------------------------------------------------------------------------------------

#: Reading a tensor's only number (``item()``, ``bool()``, ``float()``), as dispatch modes see it.
READ_NUMBER = torch.ops.aten._local_scalar_dense.default


def modes_disabled() -> AbstractContextManager[Any]:
    """No dispatch mode sees what runs inside."""
    return _disable_current_modes()


def functions_unwatched() -> AbstractContextManager[Any]:
    """No ``__torch_function__`` and no mode of functions sees what runs inside: the library's own work on a layer's
    call is none of the step's code."""
    return torch._C.DisableTorchFunction()


def subclasses_unwatched() -> AbstractContextManager[Any]:
    """No ``__torch_function__`` of a subclass of tensors sees what runs inside; modes of functions do."""
    return torch._C.DisableTorchFunctionSubclass()


def operation_name(func: Any) -> str:
    """``"add_"`` of ``aten.add_.Tensor``."""
    return str(func._opname) if hasattr(func, "_opname") else str(func.overloadpacket.__name__)


def overload_name(func: Any) -> str:
    """``"Tensor"`` of ``aten.add_.Tensor``."""
    return str(func._overloadname)


def arguments_of(func: Any) -> list[Any]:
    """The arguments of an operation's schema, with ``name``, ``default_value`` and ``alias_info``."""
    return list(func._schema.arguments)


def writes(func: Any) -> bool:
    """Whether an operation writes to one of its arguments."""
    return bool(func._schema.is_mutable)
