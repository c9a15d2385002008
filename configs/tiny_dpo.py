"""The demo of preference training: DPO teaches an assistant which of two right answers is wanted, offline, on a CPU.

For whoever wants to see preferences work before collecting some. The assistant (configs/tiny/assistant, an adapter for
the base of configs/tiny.py) begins some tool calls with their name, others with their arguments; both mean the same.
The pairs (configs/tiny/preferences.jsonl) prefer the name first. So `json_equal`, which ignores the order of keys,
should stay, and `regex`, the share of answers that begin with the name, should rise. Try next:
`preference.loss=ipo`, `training.objective=simpo`, `preference.beta=0.02`, or your own pairs: docs/preference.md.
"""

from pathlib import Path

from nanoft.config import load_file

HERE = Path(__file__).parent / "tiny"

config = load_file("tiny.py", beside=__file__).override(
    lora={"rank": 8, "alpha": 128.0, "start_from": str(HERE / "assistant")},  # also the reference
    data={"train_file": str(HERE / "preferences.jsonl"), "validation_split": 0.2},
    preference={"beta": 0.5},  # with 0.1, so small a model soon moves too far from its reference and forgets calls
    training={
        "objective": "dpo",
        "micro_batch_size": 8,  # pairs
        "gradient_accumulation_steps": 2,
        "num_epochs": 1,
        "learning_rate": 3e-5,
        "log_steps": 5,
        "eval_steps": 25,
    },
    evaluation={"metrics": ('regex:^{"name"', "json_equal")},
)
