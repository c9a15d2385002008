"""The base model of the demo, from random weights: a small Mistral for the language of configs/tiny/language.py.

For whoever wants to see pre-training, or to rebuild the base of configs/tiny.py: every parameter is trained,
on plain text. `python configs/tiny/language.py build` writes the corpus, runs this config and puts the result in place.
"""

from pathlib import Path

from nanoft.config import Config

HERE = Path(__file__).parent / "tiny"

config = Config().override(
    model={"name": str(HERE / "base"), "dtype": "float32", "max_seq_length": 256, "random_init": True},
    data={"train_file": str(HERE / "corpus.jsonl"), "validation_split": 0.01},
    training={
        "method": "full",
        "micro_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "num_epochs": 3,
        "learning_rate": 2e-3,
        "warmup_steps": 100,
        "min_lr_ratio": 0.05,
        "weight_decay": 0.05,
        "beta2": 0.98,
        "log_steps": 50,
        "eval_steps": 250,
        "save_steps": 500,
    },
    evaluation={"batch_size": 64, "prompts": 0},
    logging={"show_example": False},
    output={"dir": "runs/tiny_base"},
)
