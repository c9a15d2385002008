"""Generating answers: `sampling` picks a token, `decode` steps the decoder with a cache, `generate` batches prompts.

`chat` is the interactive command. `decode` calls the blocks of the core with another context and has no equations of
its own, so every family that trains also generates. `shared_prompts` keeps a prompt of several answers once.
"""
