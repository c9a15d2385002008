"""GRPO of Mistral-7B-Instruct-v0.3 with LoRA on one GPU with 80 GB: rewards for right answers to math word problems.

For whoever can check answers but has none to show. Records need a question and an answer, such as those of GSM8K
({"question", "answer"}: the number after `####` counts), or a prompt and whatever your own reward reads. Planned, not
measured: 68.0 GB, 24.4 GB with checkpointing=full, 29.4 GFLOP per token. Change first: `data.train_file`;
`rl.reward` (docs/rewards.md); `rl.max_new_tokens`, the longest answer; `lora.start_from` if the policy is an adapter of
yours; `training.micro_batch_size` down if memory runs out.
"""

from nanoft.config import load_file

config = load_file("gpu_80gb.py", beside=__file__).override(
    model={"max_seq_length": 1024},
    lora={"dropout": 0.0},  # the policy that samples is the one that is trained
    data={"train_file": "questions.jsonl", "validation_split": 0.0, "validation_size": 200},
    rl={"reward": ("numeric",), "prompts": 16, "group_size": 8, "max_new_tokens": 512, "clip_high": 0.28},
    training={
        "objective": "grpo",
        "micro_batch_size": 16,  # answers
        "gradient_accumulation_steps": 4,  # the default: a step has rl.prompts x rl.group_size answers
        "num_epochs": 1,
        "learning_rate": 1e-5,
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "log_steps": 1,
        "eval_steps": 20,
        "save_steps": 20,
    },
    evaluation={"metrics": ("numeric",), "max_new_tokens": 512},
)
