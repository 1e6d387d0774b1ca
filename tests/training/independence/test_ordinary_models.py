"""Models that people train, with their default dropout and padding collators: none is refused, whatever the train
set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import opacus.layers
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from torch.utils.data import DataLoader

from lightning_dp import FlatClipping, GaussianNoise, PrivateStrategy
from tests.conftest import Net, fit, trainer

#: A module, the records of a train set drawn anew, and a collate function.
Model = tuple[Callable[[], nn.Module], Callable[[torch.Generator], Any], Callable[[list[Any]], Any] | None, Any]

VOCABULARY, COUNT = 40, 40


class Training(Net):
    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__(net)
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def length(g: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (1,), generator=g))


def text(g: torch.Generator) -> Any:
    return [
        {"input_ids": torch.randint(3, VOCABULARY, (length(g, 3, 12),), generator=g), "labels": i % 2}
        for i in range(COUNT)
    ]


def padded_text(items: list[Any]) -> Any:
    ids = pad_sequence([item["input_ids"] for item in items], batch_first=True)
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([item["labels"] for item in items])}


def causal(items: list[Any]) -> Any:
    batch = padded_text(items)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def translated(items: list[Any]) -> Any:
    return causal(items)


def images(g: torch.Generator) -> Any:
    return [(torch.randn(3, 16, 16, generator=g), length(g, 0, 3)) for _ in range(COUNT)]


def segmented(g: torch.Generator) -> Any:
    return [(torch.randn(3, 16, 16, generator=g), torch.randint(3, (16, 16), generator=g)) for _ in range(COUNT)]


def sequences(g: torch.Generator) -> Any:
    return [(torch.randn(length(g, 3, 12), 6, generator=g), length(g, 0, 3)) for _ in range(COUNT)]


def padded_sequences(items: list[Any]) -> Any:
    lengths = torch.tensor([len(x) for x, _ in items])
    return pad_sequence([x for x, _ in items], batch_first=True), lengths, torch.tensor([y for _, y in items])


def spoken(g: torch.Generator) -> Any:
    return [
        (torch.randn(length(g, 8, 14), 6, generator=g), torch.randint(1, 5, (length(g, 1, 4),), generator=g))
        for _ in range(COUNT)
    ]


def padded_speech(items: list[Any]) -> Any:
    x, y = zip(*items, strict=True)
    lengths = [torch.tensor([len(part) for part in parts]) for parts in (x, y)]
    return pad_sequence(list(x), batch_first=True), pad_sequence(list(y), batch_first=True), *lengths


def boxes(g: torch.Generator) -> Any:
    found = []
    for _ in range(COUNT):
        count = length(g, 0, 5)
        target = {"boxes": torch.rand(count, 4, generator=g), "labels": torch.randint(3, (count,), generator=g)}
        found.append((torch.randn(3, 16, 16, generator=g), target))
    return found


def listed(items: list[Any]) -> Any:
    return torch.stack([x for x, _ in items]), [target for _, target in items]


def table(g: torch.Generator) -> Any:
    return [(torch.randn(4, generator=g), torch.randint(9, (3,), generator=g), float(i % 2)) for i in range(COUNT)]


SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
WORDS: dict[str, Any] = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 32}


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**WORDS))


def lora() -> nn.Module:
    return peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


def roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**WORDS, pad_token_id=0))


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS, num_key_value_heads=1))


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=3))


def t5() -> nn.Module:
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_attention_bias" not in name)
    return model


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm_one, self.norm_two, self.relu = nn.GroupNorm(4, 8), nn.GroupNorm(4, 8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_two(self.two(self.relu(self.norm_one(self.one(x)))))
        y += x
        return self.relu(y)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        Residual(),
        Residual(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8, 3),
    )


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn, self.out = kind(6, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class Packed(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 8, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states = self.rnn(packed)[1]
        last = (states[0] if isinstance(states, tuple) else states)[-2:]
        return self.out(torch.cat([last[0], last[1]], 1))


def at_the_end(net: nn.Module, batch: Any) -> Tensor:
    x, lengths, y = batch
    return F.cross_entropy(net(x, lengths), y)


def last_of(net: nn.Module, batch: Any) -> Tensor:
    x, lengths, y = batch
    return F.cross_entropy(net(x)[torch.arange(len(x)), lengths - 1], y)


def ctc(net: nn.Module, batch: Any) -> Tensor:
    x, y, of_x, of_y = batch
    return F.ctc_loss(net(x).log_softmax(-1).transpose(0, 1), y, of_x, of_y, zero_infinity=True)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(768, 8), nn.Linear(4, 768)


def vae(net: Any, batch: Any) -> Tensor:
    x = batch[0].flatten(1)
    mean, log_variance = net.encode(x).chunk(2, 1)
    z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
    divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(1)
    return (F.mse_loss(net.decode(z), x, reduction="none").sum(1) + divergence).mean()


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.norm, self.up, self.out = nn.GroupNorm(4, 16), nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 3, 1)
        self.time = nn.Embedding(10, 16)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        skip = F.silu(self.down(x))
        middle = self.norm(self.middle(skip))
        if t is not None:
            middle = middle + self.time(t)[:, :, None, None]
        return self.out(torch.cat([skip, self.up(F.silu(middle))], 1))


def ddpm(net: nn.Module, batch: Any) -> Tensor:
    x, _ = batch
    signal = torch.linspace(0.99, 0.1, 10)
    t, noise = torch.randint(0, 10, (len(x),)), torch.randn_like(x)
    kept = signal[t][:, None, None, None]
    return F.mse_loss(net(kept.sqrt() * x + (1 - kept).sqrt() * noise, t), noise)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.places, self.queries = nn.Conv2d(3, 16, 4, 4), nn.Embedding(16, 16), nn.Embedding(5, 16)
        self.transformer = nn.Transformer(16, 2, 1, 2, 32, batch_first=True)
        self.kind, self.box = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(x).flatten(2).transpose(1, 2) + self.places(torch.arange(16)[None])
        found = self.transformer(features, self.queries(torch.arange(5)[None]).repeat(len(x), 1, 1))
        return self.kind(found), self.box(found).sigmoid()


def detr(net: nn.Module, batch: Any) -> Tensor:
    kinds, places = net(batch[0])
    each = []
    for scores, place, target in zip(kinds, places, batch[1], strict=True):
        count = len(target["labels"])
        labels = torch.cat([target["labels"], torch.full((5 - count,), 3)])
        distance = (place[:count] - target["boxes"]).abs().sum() / max(count, 1)
        each.append(F.cross_entropy(scores, labels) + distance)
    return torch.stack(each).mean()


class Recommender(nn.Module):
    """DLRM: tables of categories, their products with one another and with dense features."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(9, 8) for _ in range(3)])
        self.dense, self.top = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8 + 6, 1)

    def forward(self, x: Tensor, categories: Tensor) -> Tensor:
        dense = self.dense(x)
        rows = torch.stack([dense, *(table(c) for table, c in zip(self.tables, categories.unbind(1), strict=True))], 1)
        products = torch.bmm(rows, rows.transpose(1, 2))
        i, j = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([dense, products[:, i, j]], 1)).squeeze(1)


def by_name(net: nn.Module, batch: Any) -> Tensor:
    return net(**batch).loss


def classified(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


MODELS: dict[str, Model] = {
    "ResNet with GroupNorm": (resnet, images, None, classified),
    "BERT": (bert, text, padded_text, by_name),
    "BERT with LoRA": (lora, text, padded_text, by_name),
    "RoBERTa": (roberta, text, padded_text, by_name),
    "GPT-2": (gpt2, text, causal, by_name),
    "Llama": (llama, text, causal, by_name),
    "ViT": (vit, images, None, lambda net, b: F.cross_entropy(net(pixel_values=b[0]).logits, b[1])),
    "T5": (t5, text, translated, by_name),
    "GRU": (lambda: Recurrent(nn.GRU), sequences, padded_sequences, last_of),
    "LSTM on packed sequences": (lambda: Packed(nn.LSTM), sequences, padded_sequences, at_the_end),
    "GRU on packed sequences": (lambda: Packed(nn.GRU), sequences, padded_sequences, at_the_end),
    "DPGRU": (lambda: Recurrent(opacus.layers.DPGRU), sequences, padded_sequences, last_of),
    "DPLSTM": (lambda: Recurrent(opacus.layers.DPLSTM), sequences, padded_sequences, last_of),
    "CTC": (lambda: Recurrent(opacus.layers.DPGRU), spoken, padded_speech, ctc),
    "VAE": (Autoencoder, images, None, vae),
    "DDPM": (UNet, images, None, ddpm),
    "U-Net": (UNet, segmented, None, classified),
    "DETR": (Detector, boxes, listed, detr),
    "DLRM": (
        Recommender,
        table,
        None,
        lambda net, b: F.binary_cross_entropy_with_logits(net(b[0], b[1]), b[2].float()),
    ),
}


def train(name: str, seed: int) -> PrivateStrategy:
    make, records, collate, loss = MODELS[name]
    data = records(torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    strategy = PrivateStrategy(FlatClipping(1.0), GaussianNoise(1.0))
    loader = DataLoader(data, batch_size=10, shuffle=True, collate_fn=collate)
    fit(trainer(strategy=strategy, max_steps=3), Training(make(), loss), loader)
    return strategy


@pytest.mark.parametrize("name", MODELS)
def test_an_ordinary_model_is_not_refused(name: str) -> None:
    strategy = train(name, 0)
    assert len(strategy.ledger) == 3
    assert strategy.findings is not None and not strategy.findings.unseen


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 31))
@pytest.mark.parametrize("name", MODELS)
def test_an_ordinary_model_is_not_refused_for_any_train_set(name: str, seed: int) -> None:
    assert len(train(name, seed).ledger) == 3
