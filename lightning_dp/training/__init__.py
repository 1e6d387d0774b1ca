"""The Lightning side: strategies, callbacks, loader, checks."""
