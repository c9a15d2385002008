"""Optimizer steps of DPO, nanoft and TRL's DPOTrainer: how fast, in how much memory, and are they the same steps?

    python bench/preference.py                  5 rounds; writes bench/preference.json and bench/preference.md
    python bench/preference.py --side trl       one process of one side; prints one line of JSON

Both sides train the same LoRA adapter on the same random pairs in the same micro-batches, with the base as the
reference and in the same number format, in fresh processes that alternate; losses of all steps must agree, otherwise
no ratio is reported. Prompts and answers have lengths like chat data. TRL runs a row for each answer, padded to the
longest of the micro-batch; nanoft a row for each pair. Tokens per second count no padding, and each token once: the
reference's pass is part of a step. Peak memory is the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from contender import (
    ALPHA,
    HERE,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PROMPT_LENGTH,
    REPLY_LENGTH,
    TOLERANCE,
    add_step_options,
    build_nanoft,
    peak_rss_mb,
    random_weight,
)
from step import Failed, in_process, largest, machine, ratio, say, spread, versions

Side = Callable[[argparse.Namespace], dict[str, Any]]
Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen and rejected answer
SIDES = ("nanoft", "trl")
PAD, END = 0, 1


def draw_pairs(args: argparse.Namespace) -> list[list[list[Pair]]]:
    """The pairs of each micro-batch of each step, with random tokens; every answer ends in END."""
    chance = np.random.default_rng(args.seed)

    def ids(median: float, deviation: float) -> list[int]:
        count = int(np.clip(chance.lognormal(np.log(median), deviation), 4, args.seq // 2 - 1))
        return [int(n) for n in chance.integers(2, args.vocab, count)]

    def pair() -> Pair:
        return ids(*PROMPT_LENGTH), [*ids(*REPLY_LENGTH), END], [*ids(*REPLY_LENGTH), END]

    steps = range(args.warmup + args.steps)
    return [[[pair() for _ in range(args.bs)] for _ in range(args.accumulation)] for _ in steps]


def tokens_of(step: list[list[Pair]]) -> int:
    return sum(2 * len(prompt) + len(chosen) + len(rejected) for micro in step for prompt, chosen, rejected in micro)


def measured(args: argparse.Namespace, seconds: list[float], losses: list[float]) -> dict[str, Any]:
    speeds = [tokens_of(step) / s for step, s in zip(draw_pairs(args), seconds, strict=True)][args.warmup :]
    import torch

    return {
        "pace": f"{statistics.median(speeds):,.0f} tokens/s",
        "tok_s": statistics.median(speeds),
        "speeds": speeds,
        "peak_rss_mb": peak_rss_mb(),
        "losses": losses,
        "threads": torch.get_num_threads(),
    }


# ---- The two sides


def run_nanoft(args: argparse.Namespace) -> dict[str, Any]:
    """The steps of train.py."""
    import torch

    from nanoft import kernels
    from nanoft.batches import Sample, TokenDataset, Window, collate
    from nanoft.config import Config
    from nanoft.lora import inject_lora
    from nanoft.models.adapter_files import adapter_tensors
    from nanoft.objectives import build_objective
    from nanoft.optim import build_optimizer

    changes = {"training.objective": "dpo", "training.learning_rate": LEARNING_RATE, "lora.rank": args.r}
    config = Config().override({**changes, "lora.alpha": ALPHA, "training.weight_decay": 0.0})
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
    objective = build_objective(config, adapters)
    model.train()

    def sample(prompt: list[int], answer: list[int]) -> Sample:
        ids = np.array([*prompt, *answer], np.int32)
        return Sample(ids, np.arange(len(ids)) >= len(prompt), 0)

    seconds, losses = [], []
    for step in draw_pairs(args):
        made = [sample(prompt, answer) for micro in step for prompt, *both in micro for answer in both]
        rows = np.arange(len(made)).reshape(args.accumulation, args.bs, 2)
        data = TokenDataset.of(made, 2)
        window = Window([collate(data, list(micro), PAD) for micro in rows], [0, 0], [0, 1])
        started, loss = time.perf_counter(), torch.zeros(())
        objective.prepare(model, window)
        for batch in window:
            micro_loss = objective.loss(model, batch) / objective.count(window)
            micro_loss.backward()
            loss += micro_loss.detach()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    return measured(args, seconds, losses)


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    """DPOTrainer, told to do the same; its preparation of the data and its logging are not timed."""
    import torch
    from datasets import Dataset
    from peer import build_base, draw_weights, lora_config
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    def text(ids: list[int]) -> str:
        return " ".join("</s>" if n == END else str(n) for n in ids)

    words = {"<pad>": PAD, "</s>": END, **{str(n): n for n in range(2, args.vocab)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    pairs = [pair for step in draw_pairs(args) for micro in step for pair in micro]
    rows = [{"prompt": text(p), "chosen": f" {text(c)}", "rejected": f" {text(r)}"} for p, c, r in pairs]
    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            model=build_base(args, torch.device("cpu")),
            args=DPOConfig(
                per_device_train_batch_size=args.bs,
                gradient_accumulation_steps=args.accumulation,
                max_steps=args.warmup + args.steps,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_grad_norm=MAX_GRAD_NORM,
                max_length=args.seq,
                train_sampling_strategy="sequential",
                use_cpu=True,
                bf16=args.dtype == "bfloat16",
                gradient_checkpointing=bool(args.ckpt),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                output_dir=scratch,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"),
            peft_config=lora_config(args),
            callbacks=[Clock()],
        )
        named = dict(trainer.model.named_parameters())
        draw_weights(args, {name.replace(".default", ""): p for name, p in named.items() if p.requires_grad})
        compute: Callable[..., Any] = trainer.compute_loss

        def noting(*inputs: Any, **options: Any) -> Any:
            loss = compute(*inputs, **options)
            losses.append(float(loss.detach()))
            return loss

        trainer.compute_loss = noting
        trainer.train()
    steps = np.array(losses).reshape(-1, args.accumulation).mean(1)
    return measured(args, seconds, [float(loss) for loss in steps])


# ---- The contest and its report


def alternate(script: Path, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What each side of a script found in each round, in fresh processes."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for number in range(args.rounds):
        for name in SIDES[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, str(script), "--side", name, *sys.argv[1:]]
            results[name].append(found := in_process(command, args.timeout_s))
            say(f"round {number + 1}: {name}: {found['pace']}, {found['peak_rss_mb']:,} MB")
    return results


def settings_of(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    known = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    return {"threads": results["nanoft"][0]["threads"], "rounds": args.rounds, "args": known}


def heading(title: str, result: dict[str, Any], step: str) -> list[str]:
    """The lines of a report above its own."""
    args = result["args"]
    shape = f"{args['layers']} layers of {args['hidden']}, {args['vocab']:,} tokens, LoRA rank {args['r']}"
    return [
        f"# {title}",
        "",
        f"{machine()}, threads used: {result['threads']}; rounds: {result['rounds']};",
        f"{versions()}, trl {version('trl')}.",
        f"{shape}; {args['dtype']}{step}.",
    ]


def options(document: str, out: Path, rounds: int) -> argparse.ArgumentParser:
    """What every contest has."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help="one process of this side alone")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--timeout-s", type=float, default=600, help="for each process")
    parser.add_argument("--out", type=Path, default=out, help="without a suffix")
    add_step_options(parser)
    return parser


def run(
    args: argparse.Namespace, sides: dict[str, Side], contest: Callable[[argparse.Namespace], dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
) -> None:  # fmt: skip
    """One side, or the contest, whose report is written and printed."""
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    if args.side:
        print(json.dumps(sides[args.side](args)))
        return
    try:
        result = contest(args)
    except Failed as error:
        raise SystemExit(str(error)) from None
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(report(result), encoding="utf-8")
    print(report(result))


def contest(args: argparse.Namespace) -> dict[str, Any]:
    results = alternate(HERE / "preference.py", args)
    ours, theirs = (results[name] for name in SIDES)
    differences = [abs(a - b) for a, b in zip(ours[0]["losses"], theirs[0]["losses"], strict=True)]
    agree = max(differences) <= TOLERANCE[args.dtype][0]
    rounds = list(zip(ours, theirs, strict=True)) if agree else []
    return {
        **{name: side_summary(runs) for name, runs in results.items()},
        "speedups": [a["tok_s"] / b["tok_s"] for a, b in rounds],
        "memory_ratios": [a["peak_rss_mb"] / b["peak_rss_mb"] for a, b in rounds],
        "losses_agree": agree,
        "largest_difference": largest(differences),
        "losses": {name: runs[0]["losses"] for name, runs in results.items()},
        **settings_of(args, results),
    }


def side_summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    low, high = spread([speed for run in runs for speed in run["speeds"]])
    medians = {key: statistics.median(run[key] for run in runs) for key in ("tok_s", "peak_rss_mb")}
    return {**medians, "tok_s_p10": low, "tok_s_p90": high}


def report(result: dict[str, Any]) -> str:
    args = result["args"]
    kept = "recomputed" if args["ckpt"] else "kept"
    step = f", activations {kept}; {args['bs']} pairs x {args['accumulation']} micro-batches a step"
    lines = [
        *heading("DPO: nanoft and TRL's DPOTrainer", result, step),
        "Written by `bench/preference.py`, which says what is compared. Speeds are medians (p10 to p90 of all steps),",
        "ratios medians (and range) over the rounds.",
        "",
        "| | tokens/s | peak memory, MB |",
        "|---|---|---|",
    ]
    for name in SIDES:
        side = result[name]
        speed = f"{side['tok_s']:,.0f} ({side['tok_s_p10']:,.0f} to {side['tok_s_p90']:,.0f})"
        lines.append(f"| {name} | {speed} | {side['peak_rss_mb']:,.0f} |")
    lines.append(f"| nanoft / trl | {ratio(result['speedups'])} | {ratio(result['memory_ratios'])} |")
    agree = "the same" if result["losses_agree"] else "DIFFERENT"
    return "\n".join([*lines, "", f"Losses of all steps: {agree}, to {result['largest_difference']:.0e}."]) + "\n"


def main() -> None:
    parser = options(__doc__, HERE / "preference", 5)
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of --bs pairs in a step")
    parser.set_defaults(dtype="float32", steps=4)
    run(parser.parse_args(), {"nanoft": run_nanoft, "trl": run_trl}, contest, report)


if __name__ == "__main__":
    main()
