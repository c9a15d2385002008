"""Evaluate a model on held-out data: `evaluate` measures, `report` writes report.md and report.json.

Training and eval.py share both, so the figures at the end of a run equal those of `eval.py RUN`.
"""
