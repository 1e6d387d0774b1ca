"""Whole models of the kinds that people train: every one against the loop, or refused; and the table in the docs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import opacus.layers
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import zoo
from lightning_dp.gradients.engines import BookKeeping
from lightning_dp.gradients.model import OPAQUE
from lightning_dp.gradients.rules.registry import registered_types
from lightning_dp.training.report import FOLLOWED, RUN_AGAIN, layer_groups
from tests.conftest import assert_close, oracle_gradients

pytestmark = pytest.mark.on_device

TABLE = Path(__file__).parents[2] / "docs" / "coverage.md"


class ClassToken(nn.Module):
    """Bare parameters: a class token, positions and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 4, 4))
        self.scale = nn.Parameter(torch.rand(4))
        self.project = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.project(x)], 1) + self.positions
        return x * self.scale


class SelfAttention(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class CrossAttention(SelfAttention):
    """Queries and keys from different places, then one of them with itself, through the same layer."""

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        y, weights = self.attention(x, x[:, :2].sin(), x[:, :2].cos(), average_attn_weights=False)
        return self.attention(y + weights.mean((1, 2, 3))[:, None, None], x, x, key_padding_mask=padding)[0]


class TimeFirst(nn.Module):
    """Attention in PyTorch's default order, time before batch, inside a network that keeps the batch in front."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.attention(x, x, x)[0].transpose(0, 1)


class First(nn.Module):
    """The first output of a layer that returns several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "bare parameters (class token, positions, layer scale)": (ClassToken, lambda: torch.randn(5, 3, 3)),
    "MultiheadAttention": (SelfAttention, lambda: torch.randn(5, 3, 4)),
    "MultiheadAttention, no bias, keys of other width": (
        lambda: SelfAttention(bias=False, kdim=4, vdim=4, add_zero_attn=True),
        lambda: torch.randn(5, 3, 4),
    ),
    "MultiheadAttention between two sequences, twice": (CrossAttention, lambda: torch.randn(5, 3, 4)),
    "MultiheadAttention, time first": (TimeFirst, lambda: torch.randn(5, 3, 4)),
    "MultiheadAttention, add_bias_kv": (lambda: SelfAttention(add_bias_kv=True), lambda: torch.randn(5, 3, 4)),
    "TransformerEncoderLayer": (encoder_layer, lambda: torch.randn(5, 3, 4)),
    "TransformerDecoderLayer": (
        lambda: OneInput(nn.TransformerDecoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)),
        lambda: torch.randn(5, 3, 4),
    ),
    "TransformerEncoder of two layers": (
        lambda: nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False),
        lambda: torch.randn(5, 3, 4),
    ),
    "Bilinear": (lambda: OneInput(nn.Bilinear(3, 3, 2)), lambda: torch.randn(5, 3)),
    "opacus.layers.DPLSTM": (
        lambda: First(opacus.layers.DPLSTM(3, 4, num_layers=2, batch_first=True)),
        lambda: torch.randn(5, 3, 3),
    ),
    "opacus.layers.DPGRU": (
        lambda: First(opacus.layers.DPGRU(3, 4, batch_first=True, bidirectional=True)),
        lambda: torch.randn(5, 3, 3),
    ),
}


class OneInput(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(0).flip(0))


def check(model: nn.Module, run: Callable[[slice], Tensor], count: int) -> None:
    expected = oracle_gradients(model, lambda i: run(slice(i, i + 1)), count)
    engine = BookKeeping(model)
    with engine.forward(count):
        loss = run(slice(None))
    with engine.backward():
        loss.backward()
    gradients = engine.gradients()
    weights = torch.rand(count, dtype=torch.float64)
    for name, rows in expected.items():
        if name not in gradients:
            assert rows.abs().max() == 0, name
            continue
        assert_close(gradients[name].squared_norms(), rows.flatten(1).pow(2).sum(1), 1e-8)
        total = torch.zeros_like(rows[0])
        gradients[name].add_weighted_sum_(total, weights)
        assert_close(total, torch.einsum("b,b...->...", weights, rows), 1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_loop(name: str) -> None:
    make, draw = MODELS[name]
    model, inputs = make().double(), draw().double()
    target = torch.randn_like(model(inputs))
    check(model, lambda rows: ((model(inputs[rows]) - target[rows]) ** 2).sum(), len(inputs))


def test_attention_drops_out_inside_as_it_does_without_a_recorder() -> None:
    """The recorded gradients are those of the very random numbers that the layer drew."""
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.5, batch_first=True), 2
    ).double()
    inputs, target = torch.randn(2, 6, 3, 4, dtype=torch.float64)

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ((model(inputs) - target) ** 2).sum()

    loss(seed=1).backward()
    engine = BookKeeping(model)
    with engine.forward(6):
        total = loss(seed=1)
    assert total.item() == loss(seed=1).item() != loss(seed=2).item()
    with engine.backward():
        total.backward()
    gradients = engine.gradients()
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter)
        gradients[name].add_weighted_sum_(found, torch.ones(6, dtype=torch.float64))
        assert_close(found, parameter.grad, 1e-9)


def test_attention_in_eval_mode_is_recorded() -> None:
    model, inputs = encoder_layer().double().eval(), torch.randn(5, 3, 4, dtype=torch.float64)
    check(model, lambda rows: model(inputs[rows]).pow(3).sum(), 5)


def test_a_copy_of_attention_made_while_recording_goes_on_as_an_ordinary_layer() -> None:
    model, inputs = SelfAttention(), torch.randn(5, 3, 4)
    with BookKeeping(model).forward(5):
        copied = copy.deepcopy(model)
    assert_close(copied(inputs), model(inputs), 1e-6)
    assert "forward" not in vars(model.attention)


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
def test_attention_with_frozen_parameters_equals_the_loop(frozen: str) -> None:
    model, inputs = SelfAttention().double(), torch.randn(5, 3, 4, dtype=torch.float64)
    model.attention.get_parameter(frozen).requires_grad_(False)
    check(model, lambda rows: model(inputs[rows]).pow(3).sum(), 5)


def language_model(kind: str) -> nn.Module:
    import transformers as hf

    if kind == "GPT-2":
        config = hf.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=6)
        return hf.GPT2LMHeadModel(config)
    config = hf.BertConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=12, vocab_size=11,
        max_position_embeddings=6,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config)


@pytest.mark.parametrize("kind", ["GPT-2", "BERT"])
def test_hugging_face_text_models_equal_the_loop(kind: str) -> None:
    model = language_model(kind).double().eval()
    tokens = torch.randint(1, 11, (4, 6))
    check(model, lambda rows: model(tokens[rows]).logits.pow(2).sum(), 4)


def test_hugging_face_vision_transformer_equals_the_loop() -> None:
    import transformers as hf

    config = hf.ViTConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_channels=1,
    )  # fmt: skip
    model = hf.ViTForImageClassification(config).double()
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    check(model, lambda rows: model(images[rows]).logits.pow(2).sum(), 4)


def test_lora_adapters_equal_the_loop() -> None:
    import peft

    adapted = peft.get_peft_model(language_model("BERT"), peft.LoraConfig(target_modules=["query", "value"], r=2))
    model = adapted.double().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    tokens = torch.randint(1, 11, (4, 6))
    check(model, lambda rows: model(tokens[rows]).logits.pow(2).sum(), 4)
    assert all("lora" in name for name in BookKeeping(model).parameters)


def coverage_table() -> str:
    """The table of docs/coverage.md, from what the tests above run."""
    lines = ["| layer | how |", "|---|---|"]
    homes = {cls: "torch.nn" if cls.__module__.startswith("torch.nn") else zoo.__name__ for cls in registered_types()}
    lines += [f"| `{home}.{cls.__name__}` | rule |" for cls, home in homes.items()]
    for name, (make, _) in MODELS.items():
        groups = layer_groups(make())
        others = sorted({f"{group.way}: `{group.kind}`" for group in groups if group.way in (FOLLOWED, RUN_AGAIN)})
        how = "; ".join(others) if others else "rules"
        lines.append(f"| {name} | {how} |")
    lines += [
        "| GPT-2, BERT (Hugging Face `transformers`) | rules |",
        "| ViT (Hugging Face `transformers`) | rules; tokens and positions are followed to where they meet records |",
        "| LoRA adapters (`peft`) | rules |",
        "| `ParameterList`, `ParameterDict`, parametrizations (`weight_norm`, `spectral_norm`), own parameters of any "
        "module, a layer's weight in a function, penalties | parameters followed to where they meet records |",
        "| layers that see `(B · T, d)`, `(T, B, d)`, `(T · B, d)` | rules |",
        "| `torch.nn.LSTM`, `GRU`, `RNN` and their cells; packed sequences | recorded as linear maps, step by step |",
        "| `torch.nn.EmbeddingBag` with the offsets that `collate_fn` counted | rule |",
        '| `MultiheadAttention`, `add_bias_kv=True` and `dropout > 0` | refused: `engine="per_example"` |',
        '| activation checkpointing | refused: `max_physical_batch_size`, or `engine="per_example"` |',
    ]
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_what_is_tested() -> None:
    assert nn.MultiheadAttention in OPAQUE
    assert coverage_table() in TABLE.read_text(), "run: python -m tests.gradients.test_coverage"


if __name__ == "__main__":
    text = TABLE.read_text().split("| layer | how |")[0] if TABLE.exists() else ""
    TABLE.write_text(text + coverage_table())
