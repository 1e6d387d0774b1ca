"""Where a tensor has the entries of every example."""

from __future__ import annotations

from torch import Tensor

#: ``(B, …)``; ``(B · k, …)``, k entries of every example after one another; ``(k, B, …)``; ``(k · B, …)``, the first
#: entries of all examples, then the second ones.
ROWS, FLAT, SECOND, FLAT_SECOND = "rows", "flat", "second", "flat second"
ARRANGEMENTS = (ROWS, FLAT, SECOND, FLAT_SECOND)


def fits(tensor: Tensor, arrangement: str, batch_size: int) -> bool:
    """Whether a tensor's sizes allow an arrangement, of so many examples."""
    if arrangement == SECOND:
        return tensor.dim() > 1 and tensor.shape[1] == batch_size
    if arrangement == ROWS:
        return tensor.dim() > 0 and len(tensor) == batch_size
    return tensor.dim() > 0 and len(tensor) > 0 and len(tensor) % batch_size == 0


def both(one: str, other: str) -> str | None:
    """The arrangement by which tensors of either can be read, if they have as many dimensions; ``None``: by none.

    With one entry of every example, `FLAT` and `FLAT_SECOND` are `ROWS`. Others cannot be told apart by their sizes.
    """
    if one == other:
        return one
    return {frozenset((ROWS, FLAT)): FLAT, frozenset((ROWS, FLAT_SECOND)): FLAT_SECOND}.get(frozenset((one, other)))


def by_example(tensor: Tensor, arrangement: str, batch_size: int) -> Tensor:
    """``(B, k, …)``, or ``(B, …)`` as it is for `ROWS`."""
    if arrangement == FLAT:
        return tensor.unflatten(0, (batch_size, -1))
    if arrangement == SECOND:
        return tensor.transpose(0, 1)
    return tensor.unflatten(0, (-1, batch_size)).transpose(0, 1) if arrangement == FLAT_SECOND else tensor


def take_apart(tensor: Tensor, arrangement: str, batch_size: int) -> tuple[Tensor, int]:
    """A tensor for `torch.vmap`, and the dimension along which it takes examples: what it sees of one has as many
    dimensions as the whole."""
    if arrangement == FLAT:
        return tensor.unflatten(0, (batch_size, -1)), 0
    if arrangement == SECOND:
        return tensor.unsqueeze(2), 1
    if arrangement == FLAT_SECOND:
        return tensor.unflatten(0, (-1, batch_size)), 1
    return tensor.unsqueeze(1), 0


def put_together(tensor: Tensor, arrangement: str) -> Tensor | None:
    """The reverse of `take_apart`; ``None``: what one example gave has no place in a batch."""
    if arrangement in (FLAT, FLAT_SECOND):
        return tensor.flatten(0, 1) if tensor.dim() > 1 else None
    place = 2 if arrangement == SECOND else 1
    return tensor.squeeze(place) if tensor.dim() > place and tensor.shape[place] == 1 else None


def spread_copies(copies: Tensor, dims: int, arrangement: str, entries: int) -> Tensor | None:
    """Copies of a tensor, ``(B, *shape)``, as they are broadcast against one of so many dimensions.

    Args:
        copies: One for every example.
        dims: Dimensions of the other tensor.
        arrangement: That of the other tensor.
        entries: k.

    Returns:
        ``None`` where the tensor has dimensions of its own in the place of the examples.
    """
    size, own = len(copies), copies.dim() - 1
    if arrangement == SECOND:
        if own == dims and copies.shape[2] == 1:
            return copies.squeeze(2).transpose(0, 1)
        if own >= dims - 1:
            return None
        return copies.reshape(1, size, *[1] * (dims - 2 - own), *copies.shape[1:])
    if own == dims:
        if copies.shape[1] != 1:
            return None
        copies = copies.squeeze(1)
    if own > dims:
        return None
    aligned = copies.reshape(size, *[1] * (dims - copies.dim()), *copies.shape[1:])
    if arrangement == ROWS:
        return aligned
    if arrangement == FLAT:
        return aligned.unsqueeze(1).expand(size, entries, *aligned.shape[1:]).flatten(0, 1)
    return aligned.unsqueeze(0).expand(entries, *aligned.shape).flatten(0, 1)
