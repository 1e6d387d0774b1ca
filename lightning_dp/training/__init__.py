"""What touches Lightning: strategies, callbacks, loader, checks."""
