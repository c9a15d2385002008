"""A GPU with 80 GB: Mistral-7B-Instruct-v0.3 with LoRA on a base in bfloat16, nothing quantized.

For whoever wants to train the adapter on the same weights that it will be merged into. Planned, not measured: 68.0 GB,
24.4 GB with checkpointing=full, 32.2 GFLOP per token. Change first: `data.train_file`; `lora.rank` (the report says
whether it fits); `data.packing=true` for short samples; `quantization.bits=4` for 32 billion parameters.
"""

from nanoft.config import load_file

config = load_file("h100.py", beside=__file__).override(quantization={"bits": 16}, training={"optimizer": "adamw"})
