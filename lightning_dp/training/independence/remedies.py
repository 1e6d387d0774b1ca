"""What to do about a loss that is no sum over records, and all problems in one message."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dp.gradients.source import is_library


def remedy(why: str) -> str:
    """What to do about a loss that is no sum over records."""
    if "class weights" in why:
        return (
            "Leave per_record_means on, with which class weights are divided by their public mean; and rather weigh "
            "the frequent class down than the rare one up, whose gradients clipping would cut again."
        )
    if "targets of the batch that are not" in why:
        return "Leave per_record_means on, with which every record's own targets are averaged first."
    if "batch normalisation" in why:
        return "Use GroupNorm, or a frozen BatchNorm: .eval() and requires_grad_(False) in __init__."
    if "place" in why:
        return (
            "Treat every record alike, wherever in the batch it is. (Labels that became a list or an array, and a "
            "tensor again, look like that: use torch.where, or a table that is indexed by the labels.)"
        )
    if is_library(why):
        return (
            "A library did that: compute the loss in training_step from the model's outputs (logits), per record "
            "first; "
            "or choose another loss or layer of it, or freeze the layer (requires_grad_(False))."
        )
    return (
        "Make training_step treat every record by itself: normalise, average and choose within a record first, then "
        "take the mean over records. A loss over pairs within the batch needs the pairs to be made in the data set."
    )


def listed(problems: Sequence[str]) -> str:
    """All problems in one message, of at most 2000 characters."""
    if len(problems) == 1:
        text = problems[0]
    else:
        text = "This training step cannot be private as it is:\n  - " + "\n  - ".join(problems)
    return text if len(text) <= 2000 else text[:1990] + " …"
