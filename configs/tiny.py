"""The demo: a small base model learns to answer with tool calls, offline, in half a minute on two CPU cores.

For whoever wants to see everything work before reading it. The base (configs/tiny/base, a million parameters) speaks a
small language and has never seen a chat; the data (configs/tiny/conversations.jsonl) asks for tool calls. Try next:
`quantization.bits=4` for QLoRA, `lora.rank=4`, or your own `data.train_file`.
"""

from pathlib import Path

from nanoft.config import Config

HERE = Path(__file__).parent / "tiny"

config = Config().override(
    model={"name": str(HERE / "base"), "dtype": "float32", "max_seq_length": 1024},
    lora={"rank": 16, "alpha": 256.0},  # a tiny model takes larger updates than a large one, for which alpha is 32
    data={"train_file": str(HERE / "conversations.jsonl"), "validation_split": 0.1, "truncation": "prompt"},
    training={
        "micro_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "num_epochs": 3,
        "learning_rate": 5e-4,
        "warmup_ratio": 0.05,
        "log_steps": 10,
        "eval_steps": 50,
        "save_steps": 50,
    },
    evaluation={"batch_size": 32, "prompts": 200, "max_new_tokens": 64},
)
