"""Measure a run or a model: perplexity, exact match and stop rate on held-out data, base against tuned.

python eval.py runs/tiny --compare-base
python eval.py runs/tiny --data questions.jsonl --json figures.json
python eval.py mistralai/Mistral-7B-Instruct-v0.3 --data questions.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from nanoft import UserError, evaluate, runtime
from nanoft.batches import Samples
from nanoft.chat import ChatTokenizer
from nanoft.checkpoint import replace_file
from nanoft.config import Config, DataConfig, load_config, read_overrides
from nanoft.corpus import data_hash, open_corpus
from nanoft.files import find_files
from nanoft.lora import disabled
from nanoft.metrics import as_json
from nanoft.records import Conversation
from nanoft.weights import Opened, find_model, is_run, load_model, open_chat, open_model

# Settings that say what a model is: to change them here would measure something that nobody trained.
FIXED = ("model.name", "model.random_init", "quantization.", "lora.", "training.")


@runtime.command
def main(argv: list[str]) -> int:
    parser = runtime.Arguments(
        prog="eval.py",
        description="Perplexity, exact match and stop rate of a run or a model on held-out data.",
        epilog="examples: python eval.py runs/tiny --compare-base; "
        "python eval.py runs/tiny --data questions.jsonl evaluation.prompts=50 --json figures.json",
    )
    parser.add_argument("source", metavar="RUN|MODEL", help="run directory, adapter, model directory or Hub name")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a setting of the run")
    parser.add_argument("--data", metavar="FILE", help="measure on this file; default: the run's validation data")
    parser.add_argument("--compare-base", action="store_true", help="measure the base as well")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    args = parser.parse_intermixed_args(argv)
    return evaluate_source(args.source, args.overrides, args.data, args.compare_base, args.json)


def evaluate_source(source: str, overrides: list[str], data: str | None, compare_base: bool, out: str | None) -> int:
    """Everything that eval.py does; returns the exit code."""
    config = settings(source, overrides)
    check_destination(out)
    data_config = data_of(config, source, data)
    if compare_base and is_run(source) and config.model.random_init:
        raise UserError(f"--compare-base: {source} began with random weights: leave --compare-base out")
    runtime.prepare(config.system.seed, config.system.threads, config.system.deterministic)
    device = runtime.choose_device(config.system.device)
    dtype = runtime.choose_dtype(config.model.dtype, device)
    opened = open_model(source, device, dtype)
    if opened.step is not None:
        print(f"{source}: no result yet: this is its best checkpoint, after step {opened.step}\n")
    if compare_base and not opened.adapters and not is_run(source):
        raise UserError(f"--compare-base: {source} is a plain model, without a base: leave --compare-base out")
    chat = open_chat(source, opened, as_trained=True)
    held = held_out(config, data_config, source, chat)

    tuned = measure(config, opened, chat, held)
    base = None
    if compare_base:
        base = measure_base(config, opened, chat, held)
    print(evaluate.comparison(base, tuned))
    samples = evaluate.side_by_side(base, tuned, config.evaluation.samples)
    print(f"\n{samples}" if samples else "")
    if out:
        write_json(Path(out), as_json(evaluate.results(base, tuned), indent=2) + "\n")
    return 0


def settings(source: str, overrides: list[str]) -> Config:
    """The run's own config, or defaults for a plain model; overrides on top."""
    if fixed := [item for item in overrides if item.strip().startswith(FIXED)]:
        raise UserError(f"{fixed[0]}: cannot be changed here: it says what {source} is, and that is what is measured")
    if is_run(source):
        return load_config(Path(source) / "config.json", overrides)
    return Config().override({**read_overrides(overrides), "model.name": source})


def check_destination(out: str | None) -> None:
    """Find out before the work, not after it, that the figures have nowhere to go."""
    if out and (os.path.isdir(out) or not os.path.isdir(Path(out).parent)):
        raise UserError(f"--json: {out}: is a directory, or its directory does not exist: name a file")


def write_json(path: Path, text: str) -> None:
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise UserError(f"--json: {path}: cannot be written: {error.strerror}") from None


def data_of(config: Config, source: str, data: str | None) -> DataConfig:
    """Which data to measure on: all of `--data`, or the run's own; told before anything is loaded."""
    chosen = everything_in(data, config.data) if data else config.data
    if not chosen.train_file:
        what = "not a run, and a model" if os.path.isdir(source) else "no such run, and a model on the Hub"
        raise UserError(f"{source}: {what} has no validation data: give --data FILE")
    find_files(chosen.train_file, "--data" if data else "data.train_file")
    if not data:
        check_held_out(config, source)
    return chosen


def check_held_out(config: Config, source: str) -> None:
    """Only the split that the run was trained with holds out what it was not trained on."""
    path = Path(source) / "config.json"
    recorded = load_config(path, environment={})
    if (recorded.data, recorded.system.seed) != (config.data, config.system.seed):
        raise UserError(
            f"{source}: another seed or data setting would measure on what it was trained on: use --data FILE"
        )
    if json.loads(path.read_text(encoding="utf-8")).get("provenance", {}).get("data_sha256") != data_hash(config.data):
        raise UserError(f"{source}: its data changed since it was trained: put it back, or give --data FILE")


def everything_in(file: str, settings: DataConfig) -> DataConfig:
    """Settings that keep all of a file that can be kept, read as the run reads its own."""
    kept = ("format", "columns", "delimiter", "max_bad_records", "template_args", "train_on", "truncation")
    return DataConfig(
        train_file=file, validation_split=0.0, deduplicate=False, **{name: getattr(settings, name) for name in kept}
    )


def held_out(config: Config, data: DataConfig, source: str, chat: ChatTokenizer) -> Held:
    """The samples to measure the loss on, and the conversations to answer."""
    corpus = open_corpus(data, config.model.max_seq_length, config.system.seed, chat, print)
    samples = corpus.validation if data is config.data else corpus.training
    if not len(samples):
        raise UserError(f"{source}: this run held nothing out (data.validation_split=0): give --data FILE")
    conversations = corpus.conversations(corpus.whole(samples), config.evaluation.prompts)
    return Held(samples[: config.evaluation.max_samples], conversations)


@dataclass(frozen=True)
class Held:
    """What is measured: the loss on samples, the answers to conversations."""

    samples: Samples
    conversations: list[Conversation]


def measure(config: Config, opened: Opened, chat: ChatTokenizer, held: Held) -> evaluate.Measured:
    e = config.evaluation
    prompts = evaluate.held_out_prompts(held.conversations, e.prompts)
    return evaluate.measure(
        opened.model, chat, held.samples, prompts, e.batch_size, e.prompt_batch_size, e.max_new_tokens
    )


def measure_base(config: Config, opened: Opened, chat: ChatTokenizer, held: Held) -> evaluate.Measured:
    """The same model with its adapters off; after full training, the model it started from."""
    if opened.adapters:
        with disabled(opened.adapters):
            return measure(config, opened, chat, held)
    directory = find_model(config.model.name)
    model = load_model(directory, opened.model.head.device, opened.dtype).eval()
    return measure(config, Opened(model, {}, directory, directory), chat, held)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
