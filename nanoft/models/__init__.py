"""Models on disk: Hugging Face directories, PEFT adapters and run directories, read and written without transformers.

Read `families` first (config.json -> the decoder's switches), then `model_files` (finding a model), `weights`
(streaming its tensors into a decoder), `adapter_files` (PEFT's format) and `open` (from a user's reference to a model
that is ready to use).
"""
