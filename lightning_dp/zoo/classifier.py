"""A LightningModule for classification."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp.dfa import DFAMixin


class Classifier(pl.LightningModule):
    """Cross-entropy training of a network that maps inputs to logits.

    It logs no training metric: those are computed from private records without noise.

    Args:
        net: The network, ``(B, *) -> (B, classes)``.
        classes: Number of classes.
        optimizer: ``"sgd"`` (with ``momentum``) or ``"adam"``.
        learning_rate: At the start.
        momentum: Of SGD.
        decay: Whether the learning rate falls to zero over the planned steps, along half a cosine.
    """

    def __init__(
        self,
        net: nn.Module,
        classes: int = 10,
        optimizer: Literal["sgd", "adam"] = "sgd",
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        decay: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer, self.learning_rate, self.momentum, self.decay = optimizer, learning_rate, momentum, decay
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.val_accuracy(self(inputs), labels)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.test_accuracy(self(inputs), labels)
        self.log("test_accuracy", self.test_accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, _ = batch
        return self(inputs).softmax(-1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adam":
            optimizer = torch.optim.Adam(self.parameters(), self.learning_rate)
        else:
            optimizer = torch.optim.SGD(self.parameters(), self.learning_rate, momentum=self.momentum)
        if not self.decay:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class FeedbackClassifier(DFAMixin, Classifier):
    """A `Classifier` trained by direct feedback alignment.

    Args:
        net, classes, optimizer, learning_rate, momentum, decay: As for `Classifier`.
        feedback_layers: As for `DFAMixin`; names begin with ``net.``.
    """

    def __init__(
        self,
        net: nn.Module,
        classes: int = 10,
        optimizer: Literal["sgd", "adam"] = "sgd",
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        decay: bool = False,
        feedback_layers: list[str] | None = None,
    ) -> None:
        super().__init__(net, classes, optimizer, learning_rate, momentum, decay)
        self.feedback_layers = feedback_layers
