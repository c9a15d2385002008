"""Files: writing them so that a crash cannot corrupt them, and reading untrusted ones within bounds.

Read `atomic` first: every file that a run writes goes through it. Nothing here knows about configs, models or runs.
"""
