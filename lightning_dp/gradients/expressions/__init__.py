"""Parameters that are used by code rather than by a layer that has a rule: followed to where they meet records.

``x + self.position``, a weight that is computed from others (LoRA, weight_norm), a table that is looked up and added to
scores: what is computed from parameters alone is an `Expression`, which takes note of what is done to it. Where it
meets records, every example gets a copy of its own, whose gradient is that example's; through what was computed from
parameters alone, that gradient is carried back by autograd.

Formal guarantee: what is handed over for a parameter is, row by row, the gradient of every example's own loss, if row b
of the loss depends on row b of what the meeting returns (which the self-check examines). Proof: a meeting is the given
function, applied to one example's row at a time, row b with copy b; so copy b reaches the loss through row b alone, and
the chain rule carries its gradient to the parameter through a function in which no record occurs.
"""

from lightning_dp.gradients.expressions.expression import Expression
from lightning_dp.gradients.expressions.following import Expressions

__all__ = ["Expression", "Expressions"]
