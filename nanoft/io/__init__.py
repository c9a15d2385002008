"""Files: writing them so that a crash cannot corrupt them, and reading those of strangers within bounds.

Read `atomic` first (every file that a run writes goes through it), then `untrusted` (bounded readers, redaction of
access tokens) and `tensor_files` (safetensors). `tables` formats text. Nothing here knows a config, a model or a run.
"""
