"""Reports on a training: privacy card, dashboards, logs, plots."""
