"""What a record owes: per-example gradients of every layer, and what records them. No privacy in it."""
