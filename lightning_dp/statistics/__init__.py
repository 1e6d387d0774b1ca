"""Layers on a statistic of the train set that is released with noise."""
