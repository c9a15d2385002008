"""A GPU with 8 GB: Gemma 3 4B (instruction-tuned, text only) with QLoRA, 2048 tokens.

For whoever wants many languages on a small card; the terms of the model must be accepted on the Hub. Planned, not
measured: 7.2 GB, 4.3 GB with checkpointing=full, 18.1 GFLOP per token. Change first: `data.train_file`.
"""

from nanoft.config import load_file

config = load_file("gpu_8gb.py", beside=__file__).override(model={"name": "google/gemma-3-4b-it"})
