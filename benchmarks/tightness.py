"""How much of its bound a record's gradient takes up, per bound of a convolution: the tanh CNN on MNIST.

    python benchmarks/tightness.py [--npz mnist.npz]

Printed are medians, over 256 records, of the norm of the weight's gradient over its bound, for limits that the record
just keeps: 1 would be a bound that is always attained. Trained without privacy, for the measurement only.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from curve import images
from torch import Tensor, nn

from lightning_dp.gradients.rules.layers import convolution
from lightning_dp.mechanism.backprop.layer_bounds import ConvolutionLayerBound
from lightning_dp.zoo import TanhCNN

KINDS = ("window_sum", "unfolded", "raw", "raw_sum")


def ratios(layer: Any, input: Tensor, grad: Tensor) -> dict[str, float]:
    """By kind of bound."""
    norms = convolution(layer, input, grad)["weight"].squared_norms().sqrt()
    found = {}
    for kind in KINDS:
        bound = ConvolutionLayerBound(kind)
        layer.bias.requires_grad_(False)  # the bias has a limit of its own
        unit = bound.sensitivities(layer, 1.0, 1.0)["weight"]
        limit = unit * bound.input_norms(layer, input) * bound.measure(layer, input, grad)[0]
        layer.bias.requires_grad_(True)
        found[kind] = (norms / limit).median().item()
    return found


def report(net: nn.Module, inputs: Tensor, labels: Tensor, steps: int) -> None:
    """Prints the ratios of every convolution."""
    for name, layer in net.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        seen: list[Tensor] = []

        def record(module: nn.Module, args: Any, output: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(args[0].detach())
            output.register_hook(seen.append)

        handle = layer.register_forward_hook(record)
        F.cross_entropy(net(inputs), labels, reduction="sum").backward()
        handle.remove()
        cells = ", ".join(f"{kind} {value:.3f}" for kind, value in ratios(layer, *seen).items())
        print(f"after {steps} steps, {name}: {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npz", default=None, help="as for curve.py")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train, labels, _, _ = images(arguments.npz)
    train = 2 * train - 1
    net = TanhCNN()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    report(net, train[:256], labels[:256], 0)
    for _ in range(arguments.steps):
        chosen = torch.randint(len(labels), (128,))
        optimizer.zero_grad()
        F.cross_entropy(net(train[chosen]), labels[chosen]).backward()
        optimizer.step()
    report(net, train[:256], labels[:256], arguments.steps)


if __name__ == "__main__":
    main()
