"""Files: writing them so that a crash cannot corrupt them, and reading those of strangers within bounds.

Read `atomic` first: every file that a run writes goes through it. Nothing here knows a config, a model or a run.
"""
