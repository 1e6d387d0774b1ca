"""The models of the benchmarks, with data to train them on: of ordinary layers, which every library can train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dp import DFAMixin
from lightning_dp.zoo import TanhCNN


class Block(nn.Module):
    """A pre-norm transformer block of linear layers and PyTorch's fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, steps, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, steps, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A language model: ``(B, T) -> (B, T, vocabulary)``."""

    def __init__(self, width: int = 256, depth: int = 4, length: int = 128, vocabulary: int = 8000) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(positions))))


class Residual(nn.Module):
    """A wide residual block with group normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(16, inputs), nn.GroupNorm(16, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        return self.shortcut(activated) + self.conv2(F.relu(self.norm2(self.conv1(activated))))


def wide_resnet(depth: int = 16, widen: int = 4, classes: int = 10) -> nn.Sequential:
    """WRN-depth-widen for 3×32×32 images."""
    blocks = (depth - 4) // 6
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    inputs = 16
    for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for block in range(blocks):
            layers.append(Residual(inputs, width, 2 if stage and not block else 1))
            inputs = width
    return nn.Sequential(
        *layers, nn.GroupNorm(16, inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
    )


def mlp() -> nn.Sequential:
    """784-1024-1024-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


class HuggingFace(nn.Module):
    """A model of ``transformers``, made from a configuration, that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def vit_small() -> nn.Module:
    """ViT-small: 12 blocks of width 384, for 3×32×32 images in patches of 4×4."""
    import transformers as hf

    config = hf.ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=32, patch_size=4, num_labels=10
    )
    return HuggingFace(hf.ViTForImageClassification(config))


def gpt2_small() -> nn.Module:
    """GPT-2 small, 124 million parameters, its embeddings tied to its head."""
    import transformers as hf

    return HuggingFace(hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=256, use_cache=False)))


def images(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda count: (torch.randn(count, *shape), torch.randint(10, (count,)))


def token_sequences(length: int, vocabulary: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def draw(count: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(vocabulary, (count, length + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return draw


@dataclass(frozen=True)
class Workload:
    """A model, how to draw its data, and the batch size to train it with."""

    make: Callable[[], nn.Module]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    batch_size: int
    records: int


WORKLOADS = {
    "mlp": Workload(mlp, images(1, 28, 28), 256, 25_600),
    "tanh_cnn": Workload(TanhCNN, images(1, 28, 28), 256, 25_600),
    "wrn": Workload(wide_resnet, images(3, 32, 32), 32, 3_200),
    "transformer": Workload(Transformer, token_sequences(128, 8000), 16, 1_600),
    "vit_small": Workload(vit_small, images(3, 32, 32), 16, 1_600),
    "gpt2_small": Workload(gpt2_small, token_sequences(256, 50257), 2, 200),
}

#: Those that fit into a coffee break on two cores.
SMALL = ("mlp", "tanh_cnn", "wrn", "transformer")


def _mlp_of(width: int = 512, depth: int = 3, batch: int = 256) -> Workload:
    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(784, width), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(width, 10))

    return Workload(make, images(1, 28, 28), batch, 40 * batch)


def _transformer_of(length: int) -> Workload:
    def make() -> nn.Module:
        return Transformer(width=128, depth=2, length=length, vocabulary=1000)

    return Workload(make, token_sequences(length, 1000), 16, 640)


#: How cost grows: by what grows, workloads by its size.
GROWTH: dict[str, dict[int, Workload]] = {
    "batch": {batch: _mlp_of(batch=batch) for batch in (64, 256, 1024)},
    "width": {width: _mlp_of(width=width) for width in (256, 512, 1024, 2048)},
    "depth": {depth: _mlp_of(depth=depth) for depth in (2, 4, 8, 16)},
    "T": {length: _transformer_of(length) for length in (32, 128, 512)},
}


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, mean over all positions (every example has equally many)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


class Module(pl.LightningModule):
    """Any of the networks, trained with plain SGD."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return loss_of(self.net(inputs), targets)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class FeedbackModule(DFAMixin, Module):
    """The same, trained by direct feedback alignment."""
