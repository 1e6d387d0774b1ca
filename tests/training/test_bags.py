"""Bags of words that a collate function joins, with offsets, as in torch's own tutorial on text classification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dp import (
    FlatClipping,
    GaussianNoise,
    PrivacyConfigurationError,
    PrivateStrategy,
    UnsupportedModelError,
)
from lightning_dp.training import lightning_api
from tests.conftest import Net, fit, trainer

WORDS, CLASSES, MAX_NORM = 9, 3, 0.05


def texts(count: int = 40) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(WORDS, (1 + i % 4,), generator=generator), i % CLASSES) for i in range(count)]


def joined(items: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """As the tutorial has it."""
    labels, text, offsets = [], [], [0]
    for words, label in items:
        labels.append(label)
        text.append(words)
        offsets.append(words.size(0))
    return torch.tensor(labels, dtype=torch.int64), torch.cat(text), torch.tensor(offsets[:-1]).cumsum(dim=0)


class Bags(Net):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(WORDS, 6, **options)
        self.fc = nn.Linear(6, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels, text, offsets = batch
        return F.cross_entropy(self.fc(self.embedding(text, offsets)), labels)


def data(collate: Callable[[list[Any]], Any] = joined, records: Any = None) -> DataLoader[Any]:
    return DataLoader(texts() if records is None else records, batch_size=8, collate_fn=collate)  # type: ignore[arg-type]


def train(module: Net, loader: DataLoader[Any], **options: Any) -> Any:
    strategy = PrivateStrategy(FlatClipping(MAX_NORM), GaussianNoise(0.0), **options)
    fit(trainer(strategy=strategy, max_steps=1), module, loader)
    return strategy


@pytest.mark.parametrize("options", [{}, {"max_physical_batch_size": 3}], ids=["whole", "parts"])
@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_a_step_is_that_of_one_text_at_a_time(mode: str, options: dict[str, Any], monkeypatch: Any) -> None:
    torch.manual_seed(0)
    module, records = Bags(mode=mode), texts()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    drawn: set[int] = set()
    weigh = lightning_api.weigh_logs_by

    def noted(trainer: Any, batch: Any, *args: Any) -> None:  # is told of every batch that the step sees
        drawn.update(batch[0].tolist())
        weigh(trainer, batch, *args)

    monkeypatch.setattr(lightning_api, "weigh_logs_by", noted)
    # The label is made the record's number, so that it is known which were drawn.
    numbered = [(text, index) for index, (text, _) in enumerate(records)]
    module.fc = nn.Linear(6, len(numbered))
    before |= {f"fc.{name}": p.detach().clone() for name, p in module.fc.named_parameters()}
    strategy = train(module, data(records=numbered), **options)
    assert strategy.findings.verdict == "proven" and drawn

    loop = Bags(mode=mode)
    loop.fc = nn.Linear(6, len(numbered))
    loop.load_state_dict(before)
    total = {name: torch.zeros_like(p) for name, p in loop.named_parameters()}
    for record in drawn:
        loop.zero_grad()
        loop.training_step(joined([numbered[record]]), 0).backward()
        gradients = {name: p.grad for name, p in loop.named_parameters() if p.grad is not None}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert norm > MAX_NORM
        for name, gradient in gradients.items():
            total[name] += gradient * (MAX_NORM / norm)
    [group] = module.configure_optimizers().param_groups
    for name, parameter in module.named_parameters():
        expected = before[name] - group["lr"] * total[name] / 8
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_with_a_last_offset_and_weights_of_the_words() -> None:
    class Weighted(Bags):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            labels, text, offsets, weights = batch
            return F.cross_entropy(self.fc(self.embedding(text, offsets, per_sample_weights=weights)), labels)

    def collate(items: list[Any]) -> Any:
        labels, text, offsets = joined(items)
        return labels, text, torch.cat([offsets, torch.tensor([len(text)])]), 1.0 / (1 + text)

    strategy = train(Weighted(mode="sum", include_last_offset=True), data(collate))
    assert strategy.findings.verdict == "proven"


def test_two_bags_with_offsets_of_their_own() -> None:
    class Two(Bags):
        def __init__(self, swapped: bool) -> None:
            super().__init__()
            self.swapped = swapped

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            (labels, title, of_title), (_, body, of_body) = batch
            if self.swapped:
                of_body = of_title
            return F.cross_entropy(self.fc(self.embedding(title, of_title) + self.embedding(body, of_body)), labels)

    def collate(items: list[Any]) -> Any:
        longer = [(torch.cat([text, text[:1]]), label) for text, label in items]
        return joined(items), joined(longer)

    assert train(Two(swapped=False), data(collate)).findings.verdict == "proven"
    with pytest.raises(UnsupportedModelError, match="not those which collate_fn counted"):
        train(Two(swapped=True), data(collate))


class _Used(Bags):
    """Uses words or offsets for something else."""

    use: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels, text, offsets = batch
        return super().training_step((labels, *type(self).use(self, text, offsets)), batch_idx)


def _after(text: Tensor, offsets: Tensor) -> Tensor:
    """A number of the whole batch, of which nothing is seen in the texts."""
    return text * 0 + offsets[-1] % 2


MISUSES: dict[str, Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "words left out": lambda self, text, offsets: (text[text > -1], offsets),
    "words in another order": lambda self, text, offsets: (text.sort()[0], offsets),
    "words moved by one": lambda self, text, offsets: (text.roll(1), offsets),
    "offsets moved by one": lambda self, text, offsets: (text, (offsets - 1).clamp(min=0)),
    "every second offset moved": lambda self, text, offsets: (text, offsets - offsets % 2),
    "a word that depends on lengths": lambda self, text, offsets: (_after(text, offsets), offsets),
    "offsets made anew": lambda self, text, offsets: (text, torch.arange(len(offsets))),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_whatever_else_is_done_with_words_or_offsets_is_refused(misuse: str) -> None:
    kind = type("Misuse", (_Used,), {"use": staticmethod(MISUSES[misuse])})
    with pytest.raises((UnsupportedModelError, PrivacyConfigurationError)):
        train(kind(), data())


def test_offsets_in_the_loss_are_refused() -> None:
    class Lengths(Bags):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0.01 * self.fc.bias.sum() * batch[2].float().mean()

    with pytest.raises((UnsupportedModelError, PrivacyConfigurationError)):
        train(Lengths(), data())


def _first(items: list[Any]) -> Any:
    """At most twelve words in a batch: later texts lose some."""
    labels, text, offsets = joined(items)
    return labels, text[:12], offsets.clamp(max=12)


def _shifted(items: list[Any]) -> Any:
    """Every text takes the first word of the next."""
    labels, text, offsets = joined(items)
    return labels, text, torch.cat([offsets[:1], (offsets[1:] + 1).clamp(max=len(text))])


def _sorted(items: list[Any]) -> Any:
    labels, text, offsets = joined(items)
    return labels, text.sort()[0], offsets


@pytest.mark.parametrize("collate", [_first, _shifted, _sorted], ids=["cut", "shifted", "sorted"])
def test_a_collate_function_that_mixes_texts_is_refused(collate: Callable[[list[Any]], Any]) -> None:
    with pytest.raises((UnsupportedModelError, PrivacyConfigurationError)):
        train(Bags(), data(collate))


def test_columns_of_one_memory_are_no_public_numbers() -> None:
    """No text has the word that is looked for: only who follows every number sees that a text could."""

    class Looks(Bags):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            labels, text, kinds, offsets = batch
            sign = torch.where((text == WORDS).any(), -1.0, 1.0)
            return F.cross_entropy(self.fc(self.embedding(kinds, offsets) * sign), labels)

    def collate(items: list[Any]) -> Any:
        labels, text, offsets = joined(items)
        text, kinds = torch.stack([text, text.flip(0) * 0 + text]).unbind(0)
        return labels, text, kinds, offsets

    with pytest.raises(UnsupportedModelError, match="depends on several records"):
        train(Looks(), data(collate))


def test_a_column_that_is_longer_in_one_record_is_refused_when_it_comes() -> None:
    class Two(Bags):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            labels, text, tags, offsets = batch
            return F.cross_entropy(self.fc(self.embedding(text, offsets) + self.embedding(tags, offsets)), labels)

    def collate(items: list[Any]) -> Any:
        labels, text, offsets = joined([(text, label) for (text, _), label in items])
        return labels, text, torch.cat([tags for (_, tags), _ in items]), offsets

    generator = torch.Generator().manual_seed(0)
    words = [torch.randint(WORDS, (5 + i % 5,), generator=generator) for i in range(300)]
    records = [((text, text), i % CLASSES) for i, text in enumerate(words)]
    loader = DataLoader(records, batch_size=300, collate_fn=collate)  # type: ignore[arg-type]
    assert train(Two(), loader).findings.verdict == "proven"
    records[201] = (words[201], torch.cat([words[201], words[201][:2]])), 0
    with pytest.raises(UnsupportedModelError, match="are not as long as one another"):
        train(Two(), loader)


def test_a_label_that_could_be_an_offset_is_a_label() -> None:
    lengths = [2, *([1] * 19)]
    records = [(torch.tensor([1, 2][:n]), 0 if n == 2 else 2) for n in lengths]
    assert train(Bags(), data(records=records), max_physical_batch_size=1).findings.verdict == "proven"


def test_words_may_be_changed_one_by_one() -> None:
    kind = type("Capped", (_Used,), {"use": staticmethod(lambda self, text, offsets: (text.clamp(max=5), offsets))})
    assert train(kind(), data()).findings.verdict == "proven"


def test_texts_padded_to_one_length_train_as_well() -> None:
    class Padded(Bags):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.fc(self.embedding(batch[0])), batch[1])

    def collate(items: list[Any]) -> Any:
        padded = nn.utils.rnn.pad_sequence([text for text, _ in items], batch_first=True, padding_value=WORDS - 1)
        return padded, torch.tensor([label for _, label in items])

    assert train(Padded(padding_idx=WORDS - 1), data(collate)).findings.verdict == "proven"


def test_weights_that_differ_from_place_to_place_are_not_taken_for_proven() -> None:
    class ByPlace(Bags):
        def __init__(self) -> None:
            super().__init__(mode="sum")
            self.embedding.requires_grad_(False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            text, labels = batch
            weights = torch.linspace(1, 2, text.numel()).view(text.shape)
            return F.cross_entropy(self.fc(self.embedding(text, per_sample_weights=weights)), labels)

    records = [(text.repeat(4)[:4], label) for text, label in texts()]
    with pytest.raises(UnsupportedModelError, match="places"):
        train(ByPlace(), DataLoader(records, batch_size=8))  # type: ignore[arg-type]
