"""A GPU with 16 GB and no bfloat16 (T4, V100, P100): Mistral-7B-Instruct-v0.3 with QLoRA in float16, 2048 tokens.

For whoever has a free notebook or an older server. Planned, not measured: 12.4 GB, 6.1 GB with checkpointing=full,
30.3 GFLOP per token. The loss is scaled; a window whose gradient overflows is skipped, and `overflow_steps` counts it.
Change first: `data.train_file`; `training.micro_batch_size=2`, which fits too, with 8 accumulation steps.
"""

from nanoft.config import load_file

config = load_file("gpu_12gb.py", beside=__file__).override(model={"dtype": "float16"}, system={"memory_gb": 15})
