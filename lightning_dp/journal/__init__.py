"""What is written down: every private step, before its result is used."""
