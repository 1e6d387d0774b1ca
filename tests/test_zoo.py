from __future__ import annotations

import torch
from torch import nn

from lightning_dp.checks import check_model
from lightning_dp.zoo import MLP, Classifier, DigitsDataModule, TanhCNN


def test_the_tanh_network_has_the_papers_shape() -> None:
    net = TanhCNN()
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert sum(p.numel() for p in net.parameters()) == 26_010  # Papernot et al. 2021, table 1; Tramèr & Boneh 2021
    check_model(Classifier(net), "bookkeeping")
    assert TanhCNN(channels=3, size=32)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_layers_of_an_mlp() -> None:
    linear = [layer for layer in MLP([12, 5, 3]) if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(12, 5), (5, 3)]


def test_digits_are_split_without_overlap() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    assert data.train is not None
    assert data.test is not None
    assert len(data.train) + len(data.test) == 1797
    images, labels = data.train.__getitems__([0, 5])
    assert images.shape == (2, 1, 8, 8)
    assert labels.shape == (2,)
    assert images.abs().max() <= 1
    assert data.train.__getitems__([])[0].shape == (0, 1, 8, 8)
