"""Steps of GRPO, nanoft and TRL's GRPOTrainer: how fast, and in how much memory?

    python bench/grpo.py                  3 rounds; writes bench/grpo.json and bench/grpo.md
    python bench/grpo.py --side trl       one process of one side; prints one line of JSON

Both sides sample answers of the same lengths to the same random prompts, with the same LoRA adapter on the same random
weights, ask the same function for rewards, and take one optimizer step on them in the same micro-batches, in fresh
processes that alternate. TRL samples with transformers' `generate`. Each side's answers are its own, so losses are not
compared here (tests/objectives/test_grpo.py does, on equal answers); the mean reward of random answers must agree.
A step is sampling, rewards and training. Peak memory is the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from contender import (
    ALPHA,
    HERE,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PROMPT_LENGTH,
    build_nanoft,
    peak_rss_mb,
    random_weight,
)
from preference import END, PAD, SIDES, alternate, heading, options, run, settings_of
from step import ratio

CLOSE = 0.05  # of the mean rewards of two sets of random answers


def draw_prompts(args: argparse.Namespace) -> list[list[list[int]]]:
    """The prompts of each step, random tokens."""
    chance = np.random.default_rng(args.seed)

    def ids() -> list[int]:
        count = int(np.clip(chance.lognormal(np.log(PROMPT_LENGTH[0]), PROMPT_LENGTH[1]), 4, args.seq))
        return [int(n) for n in chance.integers(2, args.vocab, count)]

    return [[ids() for _ in range(args.prompts)] for _ in range(args.warmup + args.steps)]


def text(ids: list[int]) -> str:
    return " ".join("</s>" if n == END else str(n) for n in ids)


def reward(prompt: str, answer: str, record: dict[str, Any]) -> float:
    """The share of even tokens."""
    numbers = [int(word) for word in answer.split() if word.isdigit()]
    return sum(number % 2 == 0 for number in numbers) / max(1, len(numbers))


def measured(args: argparse.Namespace, seconds: list[float], rewards: list[float]) -> dict[str, Any]:
    import torch

    return {
        "pace": f"{statistics.median(seconds[args.warmup :]):.2f} s a step",
        "seconds": seconds[args.warmup :],
        "reward": statistics.mean(rewards[args.warmup :]),
        "peak_rss_mb": peak_rss_mb(),
        "threads": torch.get_num_threads(),
    }


# ---- The two sides


def run_nanoft(args: argparse.Namespace) -> dict[str, Any]:
    """The steps of train.py."""
    import torch

    from nanoft import kernels
    from nanoft.batches import Sample, TokenDataset, Window, collate
    from nanoft.config import Config
    from nanoft.data.formats import Conversation
    from nanoft.lora import inject_lora
    from nanoft.models.adapter_files import adapter_tensors
    from nanoft.objectives import build_objective
    from nanoft.optim import build_optimizer

    rl = {"reward": ("grpo:reward",), "prompts": args.prompts, "group_size": args.group, "max_new_tokens": args.new}
    training = {"objective": "grpo", "learning_rate": LEARNING_RATE, "weight_decay": 0.0}
    config = Config().override(rl=rl, training=training, lora={"rank": args.r, "alpha": ALPHA})
    model = build_nanoft(args, torch.device("cpu"))
    adapters = inject_lora(model, config.lora, args.seed)
    with torch.no_grad():
        for name, tensor in adapter_tensors(adapters).items():
            tensor.copy_(random_weight(args, name, tensor.shape, torch.device("cpu")))
    if args.ckpt:
        model.activation_policy = ["input"] * args.layers
    warning = kernels.apply(model, config.lora)
    assert not warning, warning
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, config.training)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE

    prompts = [prompt for step in draw_prompts(args) for prompt in step]
    empty = np.array([END], np.int32)
    data = TokenDataset.of([Sample(empty, np.array([True]), record) for record in range(len(prompts))])
    turns = [[{"role": "user", "content": text(p)}, {"role": "assistant", "content": ""}] for p in prompts]
    conversations = [Conversation(messages, None, "random", at, answer_at=1) for at, messages in enumerate(turns)]
    corpus: Any = SimpleNamespace(training=data, validation=data[:0], conversations=lambda s: conversations[: len(s)])
    chat: Any = SimpleNamespace(
        stop_ids=[END], pad_id=PAD, decode=text, control=SimpleNamespace(remove=str),
        encode_prompt=lambda messages, *_: [int(word) for word in messages[-1]["content"].split()],
    )  # fmt: skip
    objective = build_objective(config, adapters, corpus, chat)
    objective.begin(model, [], None, 1)
    model.train()
    seconds, rewards = [], []
    for step in range(args.warmup + args.steps):
        started = time.perf_counter()
        rows = list(np.arange(args.prompts)[:, None] + step * args.prompts)
        (window,) = objective.windows(model, Window([collate(data, rows, PAD)], [0, step], [0, step + 1]), args.bs)
        objective.prepare(model, window)
        for batch in window:
            (objective.loss(model, batch) / objective.count(window)).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
        rewards.append(objective.figures()["reward"])
    return measured(args, seconds, rewards)


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    """GRPOTrainer, told to do the same."""
    import torch
    from datasets import Dataset
    from peer import build_base, draw_weights, lora_config
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = {"<pad>": PAD, "</s>": END, **{str(n): n for n in range(2, args.vocab)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    rows = [{"prompt": text(prompt)} for step in draw_prompts(args) for prompt in step]
    seconds: list[float] = []
    rewards: list[float] = []

    def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        found = [reward(prompt, answer, {}) for prompt, answer in zip(prompts, completions, strict=True)]
        rewards.append(statistics.mean(found))
        return found

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=build_base(args, torch.device("cpu")),
            reward_funcs=score,
            args=GRPOConfig(
                per_device_train_batch_size=args.bs,
                gradient_accumulation_steps=args.prompts * args.group // args.bs,
                num_generations=args.group,
                max_completion_length=args.new,
                temperature=1.0,
                beta=0.0,
                max_steps=args.warmup + args.steps,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_grad_norm=MAX_GRAD_NORM,
                use_cpu=True,
                bf16=args.dtype == "bfloat16",
                gradient_checkpointing=bool(args.ckpt),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                shuffle_dataset=False,
                output_dir=scratch,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"),
            peft_config=lora_config(args),
            callbacks=[Clock()],
        )
        named = dict(trainer.model.named_parameters())
        draw_weights(args, {name.replace(".default", ""): p for name, p in named.items() if p.requires_grad})
        trainer.train()
    return measured(args, seconds, rewards)


# ---- The contest and its report


def contest(args: argparse.Namespace) -> dict[str, Any]:
    results = alternate(HERE / "grpo.py", args)
    ours, theirs = (results[name] for name in SIDES)
    rewards = {name: statistics.mean(run["reward"] for run in runs) for name, runs in results.items()}
    agree = abs(rewards["nanoft"] - rewards["trl"]) < CLOSE
    rounds = list(zip(ours, theirs, strict=True)) if agree else []
    return {
        "rewards": rewards,
        "seconds": {n: statistics.median(s for run in runs for s in run["seconds"]) for n, runs in results.items()},
        "peak_rss_mb": {n: statistics.median(run["peak_rss_mb"] for run in runs) for n, runs in results.items()},
        "speedups": [statistics.median(b["seconds"]) / statistics.median(a["seconds"]) for a, b in rounds],
        "memory_ratios": [a["peak_rss_mb"] / b["peak_rss_mb"] for a, b in rounds],
        **settings_of(args, results),
    }


def report(result: dict[str, Any]) -> str:
    args = result["args"]
    step = f"{args['prompts']} prompts x {args['group']} answers of {args['new']} tokens, micro-batches of {args['bs']}"
    lines = [
        *heading("GRPO: nanoft and TRL's GRPOTrainer", result, f"; a step: {step}"),
        "Written by `bench/grpo.py`, which says what is compared. Medians; ratios with their range over the rounds.",
        "",
        "| | seconds per step | peak memory, MB | mean reward |",
        "|---|---|---|---|",
    ]
    for name in SIDES:
        figures = (result[key][name] for key in ("seconds", "peak_rss_mb", "rewards"))
        lines.append("| {} | {:.2f} | {:,.0f} | {:.3f} |".format(name, *figures))
    lines.append(f"| nanoft / trl | {ratio(result['speedups'])} faster | {ratio(result['memory_ratios'])} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = options(__doc__, HERE / "grpo", 3)
    parser.add_argument("--prompts", type=int, default=2, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens per answer")
    parser.set_defaults(dtype="float32", steps=4, bs=8)
    run(parser.parse_args(), {"nanoft": run_nanoft, "trl": run_trl}, contest, report)


if __name__ == "__main__":
    main()
