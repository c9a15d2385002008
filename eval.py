"""Measure a run or a model: perplexity, exact match and stop rate on held-out data, base against tuned.

python eval.py runs/tiny --compare-base
python eval.py runs/tiny --data questions.jsonl --json figures.json
python eval.py mistralai/Mistral-7B-Instruct-v0.3 --data questions.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from nanoft import UserError, evaluate, runtime
from nanoft.batches import make_samples
from nanoft.chat import ChatTokenizer
from nanoft.checkpoint import replace_file
from nanoft.config import Config, load_config
from nanoft.lora import disabled
from nanoft.records import Conversation, read_conversations, read_splits
from nanoft.weights import Opened, is_run, load_model, open_model


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="eval.py",
        description="Perplexity, exact match and stop rate of a run or a model on held-out data.",
        epilog="examples: python eval.py runs/tiny --compare-base; "
        "python eval.py runs/tiny --data questions.jsonl evaluation.prompts=50 --json figures.json",
    )
    parser.add_argument("source", metavar="RUN|MODEL", help="run directory, model directory or Hub name")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a setting of the run")
    parser.add_argument(
        "--data", metavar="FILE", help="measure on all of this file; default: the run's validation data"
    )
    parser.add_argument("--compare-base", action="store_true", help="measure the base as well")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    args = parser.parse_intermixed_args(argv)
    try:
        return evaluate_source(args.source, args.overrides, args.data, args.compare_base, args.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def evaluate_source(source: str, overrides: list[str], data: str | None, compare_base: bool, out: str | None) -> int:
    """Everything that eval.py does; returns the exit code."""
    config = settings(source, overrides)
    runtime.prepare(config.system.seed, config.system.threads, config.system.deterministic)
    conversations = held_out(config, source, data)
    device = runtime.choose_device(config.system.device)
    dtype = runtime.choose_dtype(config.model.dtype, device)
    opened = open_model(source, device, dtype)
    chat = ChatTokenizer.from_directory(opened.tokenizer_directory)

    tuned = measure(config, opened, chat, conversations)
    base = None
    if compare_base:
        base = measure_base(config, opened, source, chat, conversations)
    print(evaluate.comparison(base, tuned))
    samples = evaluate.side_by_side(base, tuned, config.evaluation.samples)
    print(f"\n{samples}" if samples else "")
    if out:
        replace_file(Path(out), (json.dumps(evaluate.results(base, tuned), indent=2) + "\n").encode())
    return 0


def settings(source: str, overrides: list[str]) -> Config:
    """The run's own config, or defaults for a plain model; overrides on top."""
    if is_run(Path(source)):
        return load_config(Path(source) / "config.json", overrides)
    changes = dict(item.split("=", 1) for item in overrides if "=" in item)
    return Config().override({"model.name": source, **changes})


def held_out(config: Config, source: str, data: str | None) -> list[Conversation]:
    """All of `--data`, or what the run held out."""
    d = config.data
    if data:
        return read_conversations(data, d.max_samples, d.max_bad_records)[0]
    if not d.train_file:
        raise UserError(f"{source}: a plain model has no validation data: give --data FILE")
    _, conversations, _ = read_splits(
        d.train_file, d.validation_file, d.validation_split, config.system.seed, d.max_samples, d.max_bad_records
    )
    if not conversations:
        raise UserError(f"{source}: this run held nothing out (data.validation_split=0): give --data FILE")
    return conversations


def measure(
    config: Config, opened: Opened, chat: ChatTokenizer, conversations: list[Conversation]
) -> evaluate.Measured:
    c, e = config, config.evaluation
    limited = conversations[: e.max_samples]
    samples, _ = make_samples(limited, chat, c.model.max_seq_length, c.data.truncation, c.data.max_bad_records)
    prompts = evaluate.held_out_prompts(conversations, e.prompts)
    return evaluate.measure(opened.model, chat, samples, prompts, e.batch_size, e.prompt_batch_size, e.max_new_tokens)


def measure_base(
    config: Config, opened: Opened, source: str, chat: ChatTokenizer, conversations: list[Conversation]
) -> evaluate.Measured:
    """The same model with its adapters off; after full training, the model it started from."""
    if opened.adapters:
        with disabled(opened.adapters):
            return measure(config, opened, chat, conversations)
    if not is_run(Path(source)):
        raise UserError(f"--compare-base: {source} is a plain model: it has no base to compare with")
    directory = Path(config.model.name)
    model = load_model(directory, opened.model.head.device, opened.dtype).eval()
    return measure(config, Opened(model, {}, directory, directory), chat, conversations)


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BrokenPipeError:  # `eval.py ... | head`: the reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
