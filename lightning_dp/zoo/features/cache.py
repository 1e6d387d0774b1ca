"""Features of images, kept on disk: computed once, and not once a training."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_dp import __version__


class FeatureCache:
    """Tables of features in a folder. They are as private as the images that they were computed from.

    A table's name is a digest of the images, and of what decides on their features: the module's class and the file it
    is in, its plain attributes and buffers, the versions of torch and of this package. Other modules that a class calls
    are not looked at: empty the folder when you change those.

    Args:
        folder: Where tables are kept. ``None``: nowhere.
        features: The module, before its first use.

    Raises:
        ValueError: A class has no source file.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, features: nn.Module | None) -> None:
        self.folder = None if folder is None or features is None else Path(folder).expanduser()
        self._module = b"" if self.folder is None or features is None else _digest_of_module(features)

    def table(self, images: Tensor, how: str, compute: Callable[[], Tensor]) -> Tensor:
        """The stored table, or the computed one, which is then stored.

        Args:
            images: What it is computed from.
            how: Anything else that the table depends on.
            compute: Computes it.
        """
        if self.folder is None:
            return compute()
        digest = hashlib.sha256(self._module + how.encode())
        digest.update(repr((images.dtype, tuple(images.shape))).encode())
        digest.update(images.cpu().contiguous().numpy().data)
        path = self.folder / f"{digest.hexdigest()[:32]}.pt"
        if path.exists():
            stored: Tensor = torch.load(path, weights_only=True)
            return stored
        table = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.part")
        torch.save(table.cpu(), unfinished)
        os.replace(unfinished, path)  # a table that is there is whole
        return table


def _digest_of_module(features: nn.Module) -> bytes:
    digest = hashlib.sha256(f"{torch.__version__} {__version__}".encode())
    for name, part in features.named_modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str | tuple | list)}
        digest.update(repr((name, type(part).__qualname__, sorted(plain.items()))).encode())
        try:
            digest.update(Path(inspect.getfile(type(part))).read_bytes())
        except (OSError, TypeError) as error:
            raise ValueError(
                f"cache: {type(part).__name__} has no source file, by which a change of it would be noticed. Put it "
                "into a file, or leave cache out."
            ) from error
    for name, buffer in features.named_buffers():
        digest.update(name.encode())
        digest.update(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
