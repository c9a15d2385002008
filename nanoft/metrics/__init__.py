"""Metrics of answers (`answers`, one table for evaluation and rewards) and their confidence intervals (`bootstrap`)."""
