"""Greedy answers, nanoft beside transformers' `generate`: how many tokens a second, and are they the same tokens?

    python bench/generate.py                       every case; writes bench/generate.json and bench/generate.md
    python bench/generate.py --case "small bfloat16 16" --rounds 1
    python bench/generate.py --side nanoft --model tiny --batch 32      one side, alone; prints one line of JSON

Both sides run in fresh processes, one after another, in an order that turns every round, on one thread, with the same
weights, prompts, stop ids and limit. There are four times as many prompts as a batch has places, and at least 16, of
different lengths, as in an evaluation: `generate` answers a batch until its longest answer has ended, then the next;
nanoft gives the place of an answer that has ended to the next prompt. A token counts if it belongs to an answer, its
stop id included; padding, and what is computed for answers that have ended, does not. Reading the prompts is part of
the time; a short call before that is not. Time is the process's CPU time, which on one thread is that of a clock, but
for what else the machine does.

- tiny: the repository's base model (configs/tiny/base) asked the questions of its data set, in its chat template.
- small: 41 million random weights, 8 layers of 512, 32,768 tokens; random prompts of 16 to 128 tokens, answers of up
  to 96. Its head holds the embedding in another order, so that it is as sure of the next token as a trained model and
  does not repeat itself; one token in forty ends an answer. "no stop": a random head, and all answers are as long.

Tokens must be equal. In bfloat16 two orders of the same sum differ by a rounding, so there answers may part where the
peer's own two best logits are nearly equal: the largest such gap is reported, and a larger one than TOLERANCE means
that the case gives no ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from contender import HERE, add_step_options, build_nanoft, peak_rss_mb
from step import Failed, in_process, machine, ratio, say, spread, versions

from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.generation import generate
from nanoft.models.weights import load_model

TINY = HERE.parent / "configs" / "tiny" / "base"
QUESTIONS = HERE.parent / "configs" / "tiny" / "conversations.jsonl"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}  # of the largest logit: nearly equal
LIMITS = {"tiny": 64, "small": 96}  # new tokens
CASES = [  # model, number format, batch, whether answers end
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


# ---- What both sides are given


def task(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """Prompts and stop ids."""
    import numpy as np

    count = max(4 * args.batch, 16)
    if args.model == "tiny":
        chat = ChatTokenizer.from_directory(TINY)
        lines = QUESTIONS.read_text(encoding="utf-8").splitlines()[:count]
        prompts = [chat.encode_prompt(json.loads(line)["messages"][:-1]) for line in lines]
        return prompts, chat.stop_ids if args.stops else []
    chance = np.random.default_rng(args.seed)
    lengths = chance.integers(16, 129, count)
    prompts = [chance.integers(0, args.vocab, length).tolist() for length in lengths]
    stops = chance.choice(args.vocab, args.vocab // 40, replace=False).tolist()
    return prompts, sorted(stops) if args.stops else []


def make_sure(args: argparse.Namespace, head: Any, embedding: Any) -> None:
    """Let each token be followed by another one, in long circles: the head is the embedding, reordered.

    The embedding is made large, so that what the layers add to it does not hide it.
    """
    import torch

    order = torch.randperm(len(head), generator=torch.Generator().manual_seed(args.seed))
    with torch.no_grad():
        head[order] = embedding
        embedding.mul_(50)


def measure(
    args: argparse.Namespace, answer: Callable[[list[list[int]], list[int], int], list[list[int]]]
) -> dict[str, Any]:
    """Answer all prompts, as often as asked; `answer` gives new ids, the stop id last."""
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


# ---- The two sides


def run_nanoft(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    device, dtype = torch.device("cpu"), getattr(torch, args.dtype)
    model = (load_model(TINY, device, dtype) if args.model == "tiny" else build_nanoft(args, device)).eval()
    if args.model == "small" and args.stops:
        make_sure(args, model.head, model.model.embed_tokens.weight)

    def answer(prompts: list[list[int]], stops: list[int], limit: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for said in generate.stream(model, prompts, stops, limit, batch_size=args.batch):
            for row, token in said:
                answers[row].append(token)
        return answers

    return measure(args, answer)


def run_peer(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from peer import draw_weights
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    if args.model == "tiny":
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, attn_implementation="sdpa")
    else:
        from contender import hf_config

        shape = {key: value for key, value in hf_config(args).items() if key not in ("architectures", "model_type")}
        model = MistralForCausalLM(MistralConfig(**shape, attn_implementation="sdpa")).to(dtype)
        draw_weights(args, dict(model.named_parameters()))
        if args.stops:
            make_sure(args, model.lm_head.weight, model.model.embed_tokens.weight)
    model.eval()

    def answer(prompts: list[list[int]], stops: list[int], limit: int) -> list[list[int]]:
        batches = [prompts[at : at + args.batch] for at in range(0, len(prompts), args.batch)]
        return [ids for batch in batches for ids in answer_batch(batch, stops, limit)]

    def answer_batch(prompts: list[list[int]], stops: list[int], limit: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        model.generation_config.eos_token_id = stops or None
        said = model.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=0)
        return [upto_stop(row, set(stops)) for row in said[:, width:].tolist()]

    result = measure(args, answer)
    prompts, _ = task(args)
    return {**result, "gaps": [gaps(model, *pair) for pair in zip(prompts, result["answers"], strict=True)]}


def upto_stop(ids: list[int], stops: set[int]) -> list[int]:
    end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def gaps(model: Any, prompt: list[int], ids: list[int]) -> list[float]:
    """At each token of an answer, how far apart the two best logits are, relative to the largest."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    best = logits.topk(2).values
    return [round(gap, 6) for gap in ((best[:, 0] - best[:, 1]) / logits.abs().amax(-1)).tolist()]


# ---- The contest


def contest(args: argparse.Namespace, case: tuple[str, str, int, bool]) -> dict[str, Any]:
    """One case: rounds of both sides and what follows from them; a failure is part of the result."""
    model, dtype, batch, stops = case
    options = ["--model", model, "--dtype", dtype, "--batch", str(batch), "--stops", str(int(stops))]
    options += ["--repeats", str(args.repeats)]
    results: dict[str, list[dict[str, Any]]] = {"nanoft": [], "peer": []}
    errors: dict[str, str] = {}
    for number in range(args.rounds):
        for side in list(results)[:: 1 if number % 2 == 0 else -1]:
            try:
                command = [sys.executable, str(HERE / "generate.py"), "--side", side, *options]
                results[side].append(in_process(command, args.timeout_s))
                say(f"{name(case)}: round {number + 1}: {side}: {results[side][-1]['tok_s']:,.0f} tokens/s")
            except Failed as error:
                errors[side] = str(error)
                say(f"{name(case)}: {side}: {error}")
    if errors:
        return {"case": name(case), "errors": errors, "speedups": []}
    check = compare(results["nanoft"][0]["answers"], results["peer"][0]["answers"], results["peer"][0]["gaps"], dtype)
    pairs = zip(results["nanoft"], results["peer"], strict=True)
    speedups = [round(ours["tok_s"] / theirs["tok_s"], 3) for ours, theirs in pairs] if check["agree"] else []
    sides = {side: summary(runs) for side, runs in results.items()}
    return {"case": name(case), **sides, "speedups": speedups, "tokens": check}


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
    """How many answers are equal, and the largest gap between the peer's best logits where one is not."""
    differing = [row for row, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
    parted = [
        gaps[row][next(at for at, token in enumerate(theirs[row]) if ours[row][at : at + 1] != [token])]
        for row in differing
    ]
    largest = max(parted, default=0.0)
    return {
        "answers": len(theirs),
        "equal": len(theirs) - len(differing),
        "largest_gap": largest,
        "agree": largest <= TOLERANCE[dtype],
    }


def report(cases: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """A Markdown table, one line a case."""
    columns = ["model, format, batch", "nanoft, tokens/s", "transformers, tokens/s", "speedup"]
    columns += ["nanoft, MB", "transformers, MB", "equal answers"]
    lines = [
        "# Greedy answers: nanoft beside transformers' generate",
        "",
        f"{settings['machine']}, one thread; {settings['versions']}; rounds: {settings['rounds']}. {settings['note']}",
        "Written by `bench/generate.py`, which says what is compared. Speeds are medians (p10 to p90 of all calls),",
        "ratios medians (and range) over the rounds. Answers that part do so where the peer's two best logits differ",
        f"by less than {TOLERANCE['bfloat16']:.0%} (bfloat16) or {TOLERANCE['float32']:.0e} (float32) of the largest.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    return "\n".join([*lines, *map(table_row, cases)]) + "\n"


def table_row(case: dict[str, Any]) -> str:
    if "errors" in case:
        failed = "; ".join(f"{side} failed: {error}" for side, error in case["errors"].items())
        return f"| {case['case']} | {failed.replace('|', '/')} | | | | | |"
    sides = [case["nanoft"], case["peer"]]
    cells = [case["case"]]
    cells += [f"{side['tok_s']:,.0f} ({side['tok_s_p10']:,.0f} to {side['tok_s_p90']:,.0f})" for side in sides]
    cells += [ratio(case["speedups"])]
    cells += [f"{side['peak_rss_mb']:,.0f}" for side in sides]
    check = case["tokens"]
    cells += [f"{check['equal']} of {check['answers']}" + ("" if check["agree"] else " DISAGREE")]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_options(parser)  # of which the shape, --dtype and --seed say something here
    parser.set_defaults(dtype="float32")
    parser.add_argument("--case", help="only this one, as the table has it; prints its line of JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="times that all prompts are answered in a round")
    parser.add_argument("--note", default="", help="a sentence for the report, such as what else the machine did")
    parser.add_argument("--out", type=Path, default=HERE / "generate", help="without its suffix")
    parser.add_argument("--timeout-s", type=float, default=900, help="for each process")
    parser.add_argument("--side", choices=["nanoft", "peer"])
    parser.add_argument("--model", choices=list(LIMITS), default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--stops", type=int, default=1, help="0: no answer ends by itself")
    args = parser.parse_args(argv)
    if args.side:
        print(json.dumps(run_nanoft(args) if args.side == "nanoft" else run_peer(args)))
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
