"""Kinds of interference between records, and ordinary code that looks like it: what the examination says of each.

``test_independence.py`` trains every kind, and holds the table of docs/independence.md to what came out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import Dataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from tests.conftest import Net
from tests.conftest import dataset as small


def dataset() -> Any:
    return small(80)


PROVEN, CHECKED, REFUSED, NOT_SEEN = "proven", "checked", "refused", "not seen"

#: Kinds by name, in the order of the table.
KINDS: dict[str, Kind] = {}


@dataclass(frozen=True)
class Kind:
    """One kind of code.

    Attributes:
        make: Makes the module.
        expected: What is said of it.
        says: Part of the refusal.
        data: Of which the train set is made.
        collate: The collate function.
        options: Of the strategy.
    """

    make: Callable[[], Net]
    expected: str
    says: str = ""
    data: Callable[[], Any] = dataset
    collate: Callable[[Any], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def kind(name: str, expected: str, says: str = "", **kwargs: Any) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        KINDS[name] = Kind(make, expected, says, **kwargs)
        return make

    return register


def step(name: str, expected: str, says: str = "", **kwargs: Any) -> Callable[[Any], Any]:
    """Registers a loss ``f(module, inputs, labels)``."""

    def register(function: Any) -> Any:
        class Stepping(Net):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return function(self, *batch)

        KINDS[name] = Kind(Stepping, expected, says, **kwargs)
        return function

    return register


# -- ordinary code -----------------------------------------------------------------------------------------------------


@step("a mean-reduced loss", PROVEN)
def ordinary(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x), y)


@step("one loss per record (`training_step` returns a vector)", PROVEN)
def vector(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x), y, reduction="none")


@step("class weights, targets that are ignored (understood as a mean over records)", PROVEN)
def weighted(module: Net, x: Tensor, y: Tensor) -> Tensor:
    targets = torch.where(x[:, 0] > 0, y, -100)
    return F.cross_entropy(module.net(x), targets, weight=torch.tensor([1.0, 5.0, 20.0]))


def one_tensor(items: Any) -> Any:
    """Inputs and labels as parts of one tensor."""
    whole = torch.stack([torch.cat([x, y[None].float()]) for x, y in items])
    return whole[:, :-1], whole[:, -1]


@step("inputs and labels that are views of one tensor", PROVEN, collate=one_tensor)
def views(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x), y.long())


@step("a hook that turns or scales each record's gradient", PROVEN)
def turned(module: Net, x: Tensor, y: Tensor) -> Tensor:
    hidden = torch.tanh(module.net[0](x))  # type: ignore[index]
    hidden.register_hook(lambda grad: -0.5 * grad)
    return F.cross_entropy(module.net[2](hidden), y)  # type: ignore[index]


@step("dropout, noise, in-place activations, masks within a record", PROVEN)
def noisy(module: Net, x: Tensor, y: Tensor) -> Tensor:
    x = F.dropout(x + torch.randn_like(x), 0.1)
    hidden = torch.relu_(module.net[0](x))  # type: ignore[index]
    hidden = torch.where(hidden > 1, hidden, 0.5 * hidden)
    return F.cross_entropy(module.net[2](hidden), y)  # type: ignore[index]


@step("a loop over records", PROVEN)
def loop(module: Net, x: Tensor, y: Tensor) -> Tensor:
    logits = module.net(x)
    return torch.stack([F.cross_entropy(logits[i], y[i]) for i in range(len(x))]).mean()


@kind("training metrics (torchmetrics)", PROVEN)
class Metrics(Net):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        self.accuracy(logits.detach(), batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True)
        return F.cross_entropy(logits, batch[1])


@step("a number that is read (`.item()`, `if mask.any()`)", CHECKED)
def read(module: Net, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(module.net(x), y)
    if (y == 1).any():
        module.log("share", (y == 1).float().mean().item())
    return loss


@step("an autograd function with a backward pass of its own", CHECKED)
def custom(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(_Same.apply(module.net(x)), y)


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


def sequences(count: int = 40) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(3 + i % 4, 6, generator=generator), torch.tensor(i % 3)) for i in range(count)]


def padded(items: Any) -> Any:
    x, y = zip(*items, strict=True)
    return nn.utils.rnn.pad_sequence(list(x), batch_first=True), torch.tensor([len(s) for s in x]), torch.stack(y)


@kind("packed sequences through a recurrent layer", CHECKED, data=sequences, collate=padded)
class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, lengths, y = batch
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return F.cross_entropy(self.out(self.rnn(packed)[1][0]), y)


@step("padding, masked", PROVEN, data=sequences, collate=padded)
def masked(module: Net, x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    mask = torch.arange(x.shape[1])[None] < lengths[:, None]
    return F.cross_entropy((module.net(x) * mask[..., None]).sum(1) / lengths[:, None], y)


# -- interference ------------------------------------------------------------------------------------------------------


@step("padding that leaks", REFUSED, "exchanging some examples", data=sequences, collate=padded)
def unmasked(module: Net, x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x).mean(1), y)


@step("statistics of the batch", REFUSED, r"interference.py:\d+")
def centred(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x - x.mean(0)), y)


@step("the largest value of the batch", REFUSED, "max over several records")
def scaled(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x / x.abs().max().clamp(min=1)), y)


def rare(x: Tensor) -> Tensor:
    """A factor that no record of the data changes."""
    return 1 + ((x > 70) & (x < 71)).float().sum()


@step(
    "a rare factor, where inputs and labels are views of one tensor",
    REFUSED,
    "several records meet",
    collate=one_tensor,
)
def views_mixed(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x), y.long()) * rare(x)


@step("class weights that other records change", REFUSED, "sum over records|several records")
def class_weights(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x), y, weight=torch.ones(3) * rare(x), reduction="none").mean()


@step("a hook of a gradient that other records change", REFUSED, "gradient that a hook returns")
def hooked(module: Net, x: Tensor, y: Tensor) -> Tensor:
    hidden = module.net[0](x)  # type: ignore[index]
    factor = rare(x)
    hidden.register_hook(lambda grad: grad * factor)
    return F.cross_entropy(module.net[2](torch.tanh(hidden)), y)  # type: ignore[index]


@step("a loss over pairs within the batch", REFUSED, "mm mixes records")
def contrastive(module: Net, x: Tensor, y: Tensor) -> Tensor:
    features = module.net(x)
    return F.cross_entropy(features @ features.T, torch.arange(len(x)))


@step("mixup within the batch", REFUSED, "numbers of several records meet")
def mixed(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(0.7 * x + 0.3 * x[torch.randperm(len(x))]), y)


@step("a normaliser that counts (`sum / positives`)", REFUSED, "of a sum over records")
def positives(module: Net, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(module.net(x), y, reduction="none") * (y == 2)
    return losses.sum() / (y == 2).sum().clamp(min=1)


@step("a nonlinear function of the mean loss", REFUSED, "sqrt of a sum over records")
def root(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(module.net(x)[:, 0], y.float()).sqrt()


@step("the hardest records of the batch only", REFUSED, "topk along the dimension of the batch")
def hardest(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x), y, reduction="none").topk(4).values.mean()


@step("a layer on some records only (`h[mask]`)", REFUSED, "rows that were chosen by what records hold")
def selected(module: Net, x: Tensor, y: Tensor) -> Tensor:
    hidden = module.net[0](x)  # type: ignore[index]
    chosen = module.net[2](hidden[y == 1])  # type: ignore[index]
    return F.cross_entropy(module.net[2](hidden), y) + chosen.pow(2).sum() / len(x)  # type: ignore[index]


@step("a record's place in the batch", REFUSED, "place")
def placed(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x * torch.arange(len(x))[:, None]), y)


@step("one place of the batch overwritten", REFUSED, "one place of the batch is overwritten")
def overwritten(module: Net, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[0] = 0
    return F.cross_entropy(module.net(x), y)


@step("half of the batch", REFUSED, "some places of the batch")
def half(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x), y, reduction="none")[: len(x) // 2].sum() / len(x)


@kind(
    "a layer on the rows of packed sequences, sorted by length",
    REFUSED,
    "in an order that their lengths decide|chosen by what",
    data=sequences,
    collate=padded,
)
class Packed(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, lengths, y = batch
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return F.cross_entropy(self.net(packed.data[: len(x)]), y)


@kind("a running mean in a buffer", REFUSED, "kept in 'mean'")
class Running(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.mean.lerp_(batch[0].mean(0), 0.1)
        return super().training_step(batch, batch_idx)


@kind("a running scale in a Python number", REFUSED, "'scale'")
class Scale(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step((batch[0] / self.scale, batch[1]), batch_idx)
        self.scale = 0.9 * self.scale + 0.1 * float(batch[0].abs().max())
        return loss


@kind("counts in an integer buffer", REFUSED, "kept in 'counts'")
class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(3, dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.counts += torch.bincount(batch[1], minlength=3)
        return super().training_step(batch, batch_idx)


@kind("prototypes in a frozen parameter", REFUSED, "kept in 'prototypes'")
class Prototypes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.zeros(6), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.prototypes.lerp_(batch[0].mean(0), 0.1)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=1.0)


@kind("records kept in a list (experience replay)", REFUSED, r"kept in 'seen\[0\]'")
class Replay(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.extend(batch[0])
        return super().training_step(batch, batch_idx)


@kind("state that another hook of the module keeps", REFUSED, "kept in 'mean'")
class Hook(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.mean.lerp_(batch[0].mean(0), 0.1)


def _mixup(items: Any) -> Any:
    x, y = (torch.stack(column) for column in zip(*items, strict=True))
    return 0.7 * x + 0.3 * x.flip(0), y


KINDS["mixing in the collate function"] = Kind(Net, REFUSED, "collate_fn", collate=_mixup)


@kind("mixing in a transfer hook", REFUSED, "on_after_batch_transfer")
class Transfer(Net):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] - batch[0].mean(0), batch[1]


@kind("a term that starts in a later epoch", REFUSED, "did not run when it was examined")
class Later(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch >= 1:
            loss = loss + F.cross_entropy(self.net(batch[0] - batch[0][-1:]), batch[1])
        return loss


@step("a factor by what one of the records holds", REFUSED, "exchanging some examples|smaller batch|in a batch of")
def factor(module: Net, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(module.net(x), y)
    return 0.1 * loss if (x[:, 0] > 2).any() else loss


@step("a divisor that is read (`.item()`)", REFUSED, r"is read at .*interference.py:\d+")
def _(self: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(self.net(x), y, reduction="sum") / (1 + (y == 1).sum().item())


@step("a divisor that is kept above 1 (`max(n, 1)`)", REFUSED, r"is read at|exchanging some examples")
def _(self: Net, x: Tensor, y: Tensor) -> Tensor:
    losses, rare = F.cross_entropy(self.net(x), y % 3, reduction="none"), y == 7
    return losses.mean() + (losses * rare).sum() / max(int(rare.sum()), 1)


@step("a factor where some record has a rare number (`(x == 7.).any()`, an interval)", REFUSED, "exchanging some")
def _(self: Net, x: Tensor, y: Tensor) -> Tensor:
    rare = ((x[:, 0] > 50) & (x[:, 0] < 60)) | (x[:, 5] == 7.0)
    return F.cross_entropy(self.net(x), y) * (2.0 if rare.any() else 1.0)


@step("a number that is read after many others", REFUSED, "is read at")
def _(self: Net, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(self.net(x), y)
    self.log("a", loss.item())
    self.log("b", x.mean().item())
    self.log("c", x.std().item())
    self.log("d", y.float().mean().item())
    self.log("e", x.max().item())
    self.log("f", x.min().item())
    n = (x > 50).sum().item()
    return loss / (1 + n)


@step("a loop over the classes that occur", CHECKED)
def _(self: Net, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(self.net(x), y, reduction="none")
    total = torch.zeros(())
    for label in y.unique().tolist():
        total = total + (losses * (y == label)).sum() / len(x)
    return total


@step("adversarial examples (a gradient within the step)", PROVEN)
def _(self: Net, x: Tensor, y: Tensor) -> Tensor:
    inputs = x.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(F.cross_entropy(self.net(inputs), y), inputs)
    return F.cross_entropy(self.net((x + 0.1 * gradient.sign()).detach()), y)


@step("a factor that is read, and that no record of the data changes", REFUSED, r"is read at .*interference.py:\d+")
def _(self: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(self.net(x), y) * (1 + float((x > 1e6).sum()))


@step("a branch on a label that no record of the data has", REFUSED, "of a sum|exchanging some examples")
def _(self: Net, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(self.net(x), y % 3)
    return loss * 3 if (y == 7).any() else loss


@step("a decision by the first record", REFUSED, "of one record is read at|into other places")
def _(self: Net, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(self.net(x), y)
    return loss * 2 if y[0].item() > 1 else loss


@step("lists of all labels, each record's own used for itself", CHECKED)
def _(self: Net, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(self.net(x), y, reduction="none")
    return torch.stack([2 * loss if label else loss for loss, label in zip(losses, y.tolist(), strict=True)]).mean()


@step("padding that is cut off at the longest of the batch", CHECKED, data=sequences, collate=padded)
def _(self: Net, x: Tensor, lengths: Tensor, y: Tensor) -> Tensor:
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    return F.cross_entropy(self.net((x[:, :longest] * mask[..., None]).sum(1)), y)


@step("a divisor that is counted in Python", REFUSED, "is read at")
def counted(module: Net, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(module.net(x), y, reduction="none") * (y == 2)
    return losses.sum() / max(1, int((y == 2).sum()))


@step("the first rows only, where there are many", REFUSED, "in a batch of|some places")
def first_rows(module: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x), y, reduction="none")[:20].mean()


@kind("state of the class", REFUSED, "history")
class OfTheClass(Net):
    history: list[float] = [1.0]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.history.append(float(batch[0].abs().max()))
        return super().training_step(batch, batch_idx)


@kind("state that a hook of the backward pass keeps", REFUSED, "'last'")
class OfTheBackwardPass(Net):
    last = 0.0

    def on_before_backward(self, loss: Tensor) -> None:
        self.last = float(loss)


@kind("a learning rate that is set by the loss", REFUSED, "changes the optimizer, its schedule")
class Rate(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.optimizers().param_groups[0]["lr"] = float(loss)
        return loss


@kind("outputs that are kept until a hook clears them", PROVEN)
class Cleared(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.kept = loss
        return {"loss": loss, "shown": loss.detach()}

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        assert args[0]["shown"].dim() == 0
        self.kept = None


@step("losses of chunks, weighted by their lengths", CHECKED)
def chunked(module: Net, x: Tensor, y: Tensor) -> Tensor:
    parts = zip(module.net(x).split(8), y.split(8), strict=True)
    return sum(F.cross_entropy(a, b) * len(b) for a, b in parts) / len(y)


@kind("a metric that scales the loss", REFUSED, "the state of a metric")
class ByMetric(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) * (1 + self.mean.compute())
        self.mean.update(loss.detach())
        return loss


def _with_count(items: Any) -> Any:
    x, y = (torch.stack(column) for column in zip(*items, strict=True))
    return x, y, (y == 2).sum() + 1


@step("a count that collation makes", REFUSED, "collate_fn computes from the whole batch", collate=_with_count)
def with_count(module: Net, x: Tensor, y: Tensor, count: Tensor) -> Tensor:
    return F.cross_entropy(module.net(x), y, reduction="sum") / count


class Packet:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


def _in_packets(items: Any) -> Any:
    return Packet(*(torch.stack(column) for column in zip(*items, strict=True)))


@kind("a batch that nobody can look into", REFUSED, "one entry belongs to one record", collate=_in_packets)
class Packets(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch.x, batch.y), batch_idx)


@kind("a clock in a hook", PROVEN)
class Clock(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.started = time.perf_counter()


@step("unfolded images", PROVEN)
def unfolded(module: Net, x: Tensor, y: Tensor) -> Tensor:
    patches = F.unfold(x.view(-1, 1, 2, 3), 2, padding=1).mean(2)
    return F.cross_entropy(module.net(torch.cat([patches, x[:, :2]], 1)), y)


@kind("an attribute that cannot be copied", "partly checked")
class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        import threading

        self.lock = threading.Lock()


class _Neighbours(Dataset[Any]):
    """Every item is the mean of two records: nobody sees that from outside."""

    def __init__(self) -> None:
        self.data = dataset()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return (x + self.data[(index + 1) % len(self.data)][0]) / 2, y


KINDS["mixing inside the data set's `__getitem__`"] = Kind(Net, NOT_SEEN, data=_Neighbours)

_KEPT: list[Tensor] = []


@step("state outside of the module (a global variable)", NOT_SEEN)
def outside(module: Net, x: Tensor, y: Tensor) -> Tensor:
    _KEPT[:] = [x.detach().mean(0)]
    return F.cross_entropy(module.net(x), y)
