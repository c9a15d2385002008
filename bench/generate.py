"""Greedy generation, nanoft, transformers' `generate` and unsloth: tokens per second, and are they the same tokens?

    python bench/generate.py                       every case; writes bench/generate.json and bench/generate.md
    python bench/generate.py --environments DIRECTORY      unsloth, too, from bench/environments.py
    python bench/generate.py --case "small bfloat16 16" --rounds 1
    python bench/generate.py --side nanoft --model tiny --batch 32      one side, alone; prints one line of JSON

All sides run in fresh processes, one after another, in an order that rotates every round, on one thread, with the same
weights, prompts, stop ids and limit. The number of prompts is four times the batch size, and at least 16; their lengths
differ, as in an evaluation. `generate` runs a batch until its longest answer ends, then the next batch; nanoft gives
the place of a finished answer to the next prompt. A token counts if it belongs to an answer, the stop id included;
padding and tokens computed for finished answers do not. Reading the prompts is timed; a short warm-up call is not. Time
is the CPU time of the process: with one thread it is wall time without the influence of other processes.

- tiny: the demo's base model (configs/tiny/base) with the questions of its dataset, in its chat template.
- small: 41 million random weights, 8 layers of 512, 32,768 tokens; random prompts of 16 to 128 tokens, answers of up to
  96. The head is a permutation of the embedding, so that the model is as confident as a trained one and does not
  repeat itself; one token in forty ends an answer. "no stop": a random head, and all answers have the same length.

Tokens must be equal. In bfloat16, sums depend on their order, so answers may diverge where the two largest logits of
the peer are nearly equal. The largest such gap is reported; if it exceeds TOLERANCE, no ratio is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contender import HERE, add_step_options, build_nanoft, peak_rss_mb
from environments import python_of
from step import Failed, flags, in_process, machine, ratio, rotated, say, spread, versions

from nanoft import kernels
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.generation import generate
from nanoft.models.weights import load_model

TINY = HERE.parent / "configs" / "tiny" / "base"
QUESTIONS = HERE.parent / "configs" / "tiny" / "conversations.jsonl"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}  # relative to the largest logit: nearly equal
LIMITS = {"tiny": 64, "small": 96}  # new tokens
CASES = [  # model, dtype, batch size, whether answers end
    ("tiny", "float32", 1, True),
    ("tiny", "float32", 32, True),
    ("tiny", "bfloat16", 32, True),
    ("small", "float32", 1, True),
    ("small", "float32", 16, True),
    ("small", "float32", 16, False),
    ("small", "bfloat16", 1, True),
    ("small", "bfloat16", 16, True),
    ("small", "bfloat16", 16, False),
]


# ---- The task


def task(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """Prompts and stop ids."""
    import numpy as np

    count = max(4 * args.batch, 16)
    if args.model == "tiny":
        chat = ChatTokenizer(TINY)
        lines = QUESTIONS.read_text(encoding="utf-8").splitlines()[:count]
        prompts = [chat.encode_prompt(json.loads(line)["messages"][:-1]) for line in lines]
        return prompts, chat.stop_ids if args.stops else []
    chance = np.random.default_rng(args.seed)
    lengths = chance.integers(16, 129, count)
    prompts = [chance.integers(0, args.vocab, length).tolist() for length in lengths]
    stops = chance.choice(args.vocab, args.vocab // 40, replace=False).tolist()
    return prompts, sorted(stops) if args.stops else []


def make_sure(args: argparse.Namespace, head: Any, embedding: Any) -> None:
    """Make the model confident: each token predicts another one, because the head is a permutation of the embedding.

    The embedding is scaled up so that it dominates what the layers add to it.
    """
    import torch

    order = torch.randperm(len(head), generator=torch.Generator().manual_seed(args.seed))
    with torch.no_grad():
        head[order] = embedding
        embedding.mul_(50)


def measure(
    args: argparse.Namespace, answer: Callable[[list[list[int]], list[int], int], list[list[int]]]
) -> dict[str, Any]:
    """Answer all prompts, `args.repeats` times; `answer` returns the new ids, the stop id last."""
    prompts, stops = task(args)
    answer(prompts[: args.batch], stops, 4)
    speeds = []
    for _ in range(args.repeats):
        started = time.process_time()
        answers = answer(prompts, stops, LIMITS[args.model])
        speeds.append(sum(map(len, answers)) / (time.process_time() - started))
    return {
        "tok_s": round(statistics.median(speeds), 2),
        "speeds": [round(speed, 2) for speed in speeds],
        "tokens": sum(map(len, answers)),
        "peak_rss_mb": peak_rss_mb(),
        "answers": answers,
    }


# ---- The sides


def run_nanoft(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    device, dtype = torch.device("cpu"), getattr(torch, args.dtype)
    model = (load_model(TINY, device, dtype) if args.model == "tiny" else build_nanoft(args, device)).eval()
    kernels.apply(model)
    if args.model == "small" and args.stops:
        make_sure(args, model.head, model.model.embed_tokens.weight)

    def answer(prompts: list[list[int]], stops: list[int], limit: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for said in generate.stream(model, prompts, stops, limit, batch_size=args.batch):
            for row, token, _ in said:
                answers[row].append(token)
        return answers

    return measure(args, answer)


def run_transformers(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    if args.model == "small":
        return run_generate(args, random_base(args))
    dtype = getattr(torch, args.dtype)
    return run_generate(args, AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, attn_implementation="sdpa"))


def random_base(args: argparse.Namespace) -> Any:
    """The small model of both peers."""
    import torch
    from peer import build_base

    args.nf4 = args.ckpt = 0
    model = build_base(args, torch.device("cpu"))
    if args.stops:
        make_sure(args, model.lm_head.weight, model.model.embed_tokens.weight)
    model.config.use_cache = True
    return model


def write_base(args: argparse.Namespace) -> dict[str, Any]:
    """The small model in a directory, from which unsloth reads it."""
    from peer_trl import word_tokenizer

    random_base(args).save_pretrained(args.directory)
    word_tokenizer(args.vocab).save_pretrained(args.directory)
    return {}


def run_unsloth(args: argparse.Namespace) -> dict[str, Any]:
    os.environ |= {"UNSLOTH_SKIP_TORCHVISION_CHECK": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    from unsloth import FastLanguageModel  # isort: split

    import torch

    with tempfile.TemporaryDirectory() as directory:
        if args.model == "small":
            in_process([*own_side("base"), *case_options(args), "--directory", directory], args.timeout_s)
        source = directory if args.model == "small" else str(TINY)
        dtype = getattr(torch, args.dtype)
        model, _ = FastLanguageModel.from_pretrained(source, max_seq_length=1024, dtype=dtype, load_in_4bit=False)
    FastLanguageModel.for_inference(model)
    return run_generate(args, model)


def run_generate(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """transformers' `generate`, or what unsloth makes of it."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model.eval()

    def answer(prompts: list[list[int]], stops: list[int], limit: int) -> list[list[int]]:
        batches = [prompts[at : at + args.batch] for at in range(0, len(prompts), args.batch)]
        return [ids for batch in batches for ids in answer_batch(batch, stops, limit)]

    def answer_batch(prompts: list[list[int]], stops: list[int], limit: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        model.generation_config.eos_token_id = stops or None
        said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=0)
        return [upto_stop(row, set(stops)) for row in said[:, width:].tolist()]

    result = measure(args, answer)
    prompts, _ = task(args)
    return {**result, "gaps": [gaps(model, *pair) for pair in zip(prompts, result["answers"], strict=True)]}


def upto_stop(ids: list[int], stops: set[int]) -> list[int]:
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def gaps(model: Any, prompt: list[int], ids: list[int]) -> list[float]:
    """For each token of an answer, the gap between the two largest logits, relative to the largest."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    best = logits.topk(2).values
    return [round(gap, 6) for gap in ((best[:, 0] - best[:, 1]) / logits.abs().amax(-1)).tolist()]


# ---- The contest


def own_side(side: str) -> list[str]:
    return [sys.executable, str(HERE / "generate.py"), "--side", side]


def case_options(args: argparse.Namespace) -> list[str]:
    return flags(args, ["model", "dtype", "batch", "stops", "repeats"])


def contest(args: argparse.Namespace, case: tuple[str, str, int, bool]) -> dict[str, Any]:
    """One case: rounds of all sides and their summary; a failure is part of the result."""
    args.model, args.dtype, args.batch, args.stops = *case[:3], int(case[3])
    commands = {side: own_side(side) for side in ("nanoft", "transformers")}
    if args.environments is not None:
        commands["unsloth"] = [str(python_of(args.environments / "unsloth")), *own_side("unsloth")[1:]]
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
    errors: dict[str, str] = {}
    for number in range(args.rounds):
        for side in rotated([side for side in commands if side not in errors], number):
            try:
                results[side].append(in_process([*commands[side], *case_options(args)], args.timeout_s))
                say(f"{name(case)}: round {number + 1}: {side}: {results[side][-1]['tok_s']:,.0f} tokens/s")
            except Failed as error:
                errors[side] = str(error)
                say(f"{name(case)}: {side}: {error}")
    sides = {side: {"error": errors[side]} if side in errors else summary(results[side]) for side in results}
    ours = results.pop("nanoft")
    peers = {side: runs for side, runs in results.items() if not {side, "nanoft"} & set(errors)}
    checks = {
        side: compare(ours[0]["answers"], runs[0]["answers"], runs[0]["gaps"], case[1]) for side, runs in peers.items()
    }
    compared = [runs for side, runs in peers.items() if checks[side]["agree"]]
    rounds = zip(ours, *compared, strict=True) if compared else []
    speedups = [round(our["tok_s"] / max(peer["tok_s"] for peer in rest), 3) for our, *rest in rounds]
    return {"case": name(case), "sides": sides, "speedups": speedups, "tokens": checks}


def name(case: tuple[str, str, int, bool]) -> str:
    model, dtype, batch, stops = case
    return f"{model} {dtype} {batch}" + ("" if stops else " no stop")


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    low, high = spread([speed for run in runs for speed in run["speeds"]])
    return {
        "tok_s": statistics.median(run["tok_s"] for run in runs),
        "tok_s_p10": low,
        "tok_s_p90": high,
        "peak_rss_mb": statistics.median(run["peak_rss_mb"] for run in runs),
        "tokens": runs[0]["tokens"],
    }


def compare(ours: list[list[int]], theirs: list[list[int]], gaps: list[list[float]], dtype: str) -> dict[str, Any]:
    """The number of equal answers, and the largest gap of the peer's logits where answers diverge."""
    differing = [row for row, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
    diverged = [
        gaps[row][next(at for at, token in enumerate(theirs[row]) if ours[row][at : at + 1] != [token])]
        for row in differing
    ]
    largest = max(diverged, default=0.0)
    return {
        "answers": len(theirs),
        "equal": len(theirs) - len(differing),
        "largest_gap": largest,
        "agree": largest <= TOLERANCE[dtype],
    }


def report(cases: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """A Markdown table, one line per case."""
    sides = list(cases[0]["sides"])
    columns = ["model, dtype, batch size", *(f"{side}, tokens/s" for side in sides), "times the fastest"]
    columns += [*(f"{side}, MB" for side in sides), "equal answers"]
    lines = [
        "# Greedy generation: nanoft and its peers",
        "",
        f"{settings['machine']}, one thread; {settings['versions']}; rounds: {settings['rounds']}. {settings['note']}",
        "Written by `bench/generate.py`, which says what is compared. Speeds are medians (p10 to p90 of all calls),",
        "ratios medians (and range) over the rounds. Answers diverge only where the peer's two largest logits differ",
        f"by less than {TOLERANCE['bfloat16']:.0%} (bfloat16) or {TOLERANCE['float32']:.0e} (float32) of the largest.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    return "\n".join([*lines, *map(table_row, cases)]) + "\n"


def table_row(case: dict[str, Any]) -> str:
    sides = list(case["sides"].values())
    cells = [case["case"]]
    for side in sides:
        failed = f"failed: {side['error']}".replace("|", "/") if "error" in side else ""
        cells += [failed or f"{side['tok_s']:,.0f} ({side['tok_s_p10']:,.0f} to {side['tok_s_p90']:,.0f})"]
    cells += [ratio(case["speedups"])]
    cells += ["" if "error" in side else f"{side['peak_rss_mb']:,.0f}" for side in sides]
    checks = case["tokens"].values()
    equal = [f"{check['equal']} of {check['answers']}" + ("" if check["agree"] else " DISAGREE") for check in checks]
    cells += ["; ".join(equal)]
    return "| " + " | ".join(cells) + " |"


SIDES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "nanoft": run_nanoft,
    "transformers": run_transformers,
    "unsloth": run_unsloth,
    "base": write_base,
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_options(parser)  # only the shape, --dtype and --seed matter here
    parser.set_defaults(dtype="float32")
    parser.add_argument("--case", help="only this one, named as in the table; prints a line of JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="how often all prompts are answered per round")
    parser.add_argument("--note", default="", help="a sentence for the report")
    parser.add_argument("--out", type=Path, default=HERE / "generate", help="without a suffix")
    parser.add_argument("--timeout-s", type=float, default=900, help="for each process")
    parser.add_argument("--environments", type=Path, metavar="DIRECTORY", help="of bench/environments.py, for unsloth")
    parser.add_argument("--side", choices=list(SIDES))
    parser.add_argument("--directory", help="of --side base")
    parser.add_argument("--model", choices=list(LIMITS), default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--stops", type=int, default=1, help="0: answers never end by a stop id")
    args = parser.parse_args(argv)
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return 0
    settings = {"machine": machine(), "versions": versions(), "rounds": args.rounds, "note": args.note}
    cases = []
    for case in [case for case in CASES if args.case in (None, name(case))]:
        cases.append(contest(args, case))
        print(json.dumps(cases[-1]), flush=True)
        if not args.case:
            args.out.with_suffix(".md").write_text(report(cases, settings), encoding="utf-8")
            args.out.with_suffix(".json").write_text(json.dumps({**settings, "cases": cases}, indent=2) + "\n")
    return 0 if all(case["speedups"] for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
