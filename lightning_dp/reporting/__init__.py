"""What is told: privacy card, dashboards, logs, plots."""
