"""Direct feedback alignment without privacy on MNIST: test accuracy, and every layer's angle to backpropagation.

python benchmarks/dfa.py [--seeds 1 2 3]
"""

from __future__ import annotations

import argparse
import logging
import warnings

import lightning.pytorch as pl
import torch
from curve import interval

from lightning_dp.zoo import MLP, FeedbackClassifier, MNISTDataModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = MNISTDataModule(batch_size=128)
    accuracies = []
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        width = arguments.width
        module = FeedbackClassifier(MLP([784, width, width, 10]), learning_rate=0.05, decay=True)
        module.feedback_seed = seed
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(max_epochs=arguments.epochs, accelerator="cpu", enable_model_summary=False, **quiet)
        trainer.fit(module, data)
        [metrics] = trainer.test(module, datamodule=data, verbose=False)
        accuracies.append(100 * metrics["test_accuracy"])
        assert data.train is not None
        angles = module.alignment_angles(data.train[slice(512)], 0)  # type: ignore[index]
        weights = ", ".join(f"{name} {angle:.0f}°" for name, angle in angles.items() if name.endswith("weight"))
        print(f"seed {seed}: {accuracies[-1]:.2f} %; angles: {weights}", flush=True)
    mean, half = interval(accuracies)
    print(f"784-{width}-{width}-10: {mean:.2f} % ± {half:.2f}, lowest {min(accuracies):.2f} %")


if __name__ == "__main__":
    main()
