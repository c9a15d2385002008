"""A GPU with 16 GB (RTX 4060 Ti, 4080, 5070 Ti, A4000): Qwen3-4B-Instruct-2507 with LoRA in bfloat16, 2048 tokens.

For whoever has the room to keep the weights in 16 bits. Planned, not measured: 13.9 GB, 9.3 GB with checkpointing=full,
18.7 GFLOP per token. Change first: `data.train_file`; `quantization.bits=4` for more than 2,048 tokens.
"""

from nanoft.config import load_file

config = load_file("qwen3_4b_8gb.py", beside=__file__).override(quantization={"bits": 16}, system={"memory_gb": 15.5})
