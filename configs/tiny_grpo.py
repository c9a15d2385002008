"""The demo of learning from rewards: GRPO teaches an assistant to answer exactly, offline, in minutes on a CPU.

For whoever wants to see reinforcement learning work before writing a reward. The assistant (configs/tiny/assistant, an
adapter that was tuned briefly) calls the right tool about half of the time in the wanted form. No answer is shown to
it: it samples eight answers to each prompt, and is told which of them are right (`exact_match`). Try next:
`rl.reward=json_equal`, `rl.updates=2`, `rl.beta=0.05`, your own function: docs/rewards.md.
"""

from pathlib import Path

from nanoft.config import load_file

HERE = Path(__file__).parent / "tiny"

config = load_file("tiny.py", beside=__file__).override(
    lora={"rank": 8, "alpha": 128.0, "start_from": str(HERE / "assistant")},
    rl={"reward": ("exact_match",), "prompts": 16, "group_size": 8, "max_new_tokens": 64},
    training={
        "objective": "grpo",
        "micro_batch_size": 64,  # answers
        "gradient_accumulation_steps": 4,  # the default: a step has rl.prompts x rl.group_size answers
        "max_steps": 60,
        "learning_rate": 3e-5,
        "log_steps": 5,
        "eval_steps": 15,
    },
)
