"""Gradient encoding: a bound on every coordinate of what a record adds."""
