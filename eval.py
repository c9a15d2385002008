"""Evaluate a run or a model on held-out data: perplexity, answers, forgetting; base against tuned, with intervals.

    python eval.py runs/tiny --compare-base
    python eval.py runs/tiny --data questions.jsonl --by topic --json figures.json evaluation.metrics=token_f1,rouge_l
    python eval.py runs/tiny --general wikitext.txt
    python eval.py runs/tiny --quantization
    python eval.py mistralai/Mistral-7B-Instruct-v0.3 --data questions.jsonl

More: docs/evaluation.md.
"""

from __future__ import annotations

import sys

from nanoft.runtime.command import Arguments, command

PARSER = Arguments(prog="eval.py", description=__doc__)
add = PARSER.add_argument
add("source", metavar="RUN|MODEL", help="run directory, adapter, model directory or Hub name")
add("overrides", nargs="*", metavar="section.field=value", help="change a setting of the run")
add("--data", metavar="FILE", help="evaluate on this file; default: the run's validation data")
add("--compare-base", action="store_true", help="evaluate the base model too")
add("--by", metavar="FIELD", help="perplexity for each value of this field of the records")
add("--general", metavar="FILE", help="forgetting: perplexity of this text, compared with the base model's")
add("--quantization", action="store_true", help="compare base and adapter on original and quantized weights")
add("--json", metavar="FILE", help="write the figures to this file")
add("--report", metavar="FILE", help="write a Markdown report: wins, losses, worst answers")

if __name__ == "__main__":
    PARSER.check(sys.argv[1:])  # --help, --version and mistakes are answered before torch is imported

import argparse
import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanoft import UserError
from nanoft.config import Config
from nanoft.config.loading import load_config, read_overrides
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.evaluation import evaluate
from nanoft.evaluation.evaluate import EvalResult, compare_quantization
from nanoft.evaluation.held_out import HeldOut, choose_data, provenance, read_held_out
from nanoft.evaluation.report import ReportInputs, report
from nanoft.io.atomic import replace_file
from nanoft.io.hub import use_cache
from nanoft.io.tables import for_terminal
from nanoft.io.untrusted import redact
from nanoft.lora import disabled
from nanoft.metrics import answers
from nanoft.models.adapter_files import load_adapter_tensors
from nanoft.models.model_files import find_model
from nanoft.models.open import LoadedModel, is_run, open_chat_tokenizer, open_model, read_trained_adapter
from nanoft.objectives import OBJECTIVES
from nanoft.runtime.device import choose_device, choose_dtype, seed_everything
from nanoft.tracking.run import to_json
from nanoft.training.validation import validate_config

# Settings that define the model: changing them would evaluate a model that was never trained.
FIXED = ("model.name", "model.random_init", "data.control_tokens", "quantization.", "lora.", "training.")


@command
def main(argv: list[str]) -> int:
    args = PARSER.parse(argv)
    config = read_config(args)
    validate_config(config)
    use_cache(config.model.cache_dir)
    check_arguments(args, config)
    metrics = answers.select_metrics(config.evaluation.metrics)
    data = choose_data(config, args.source, args.data)

    seed_everything(config.system.seed, config.system.threads, config.system.deterministic)
    device = choose_device(config.system.device)
    dtype = choose_dtype(config.model.dtype, device)
    plain = config.system.kernels == "plain"
    loaded = open_model(args.source, device, dtype, original_base=args.quantization, plain=plain)
    if loaded.step is not None:
        print(f"{args.source}: has no result yet: evaluating its best checkpoint, after step {loaded.step}\n")
    if loaded.model.config.has_score:
        config = config.override({"training.objective": "reward"})
        asked = {"--compare-base": args.compare_base, "--general": args.general, "--quantization": args.quantization}
        if flag := next((flag for flag, value in asked.items() if value), None):
            raise UserError(f"{flag}: {args.source} is a reward model, which has no likelihoods: remove {flag}")
    if args.compare_base and not has_base(args.source, loaded, config):
        raise UserError(f"--compare-base: {args.source} is a plain model without a base: remove --compare-base")
    chat = open_chat_tokenizer(args.source, loaded, as_trained=True)
    held_out = read_held_out(config, data, args.source, args.data, args.general, chat)

    if args.quantization:
        samples = HeldOut(held_out.samples, [])  # likelihood only

        def perplexity() -> float | None:
            return measure(config, loaded, chat, samples).perplexity

        values, text = compare_quantization(args.source, loaded, perplexity)
        markdown = f"# {args.source}\n\n{text}\n"
    else:
        tuned, base = measure(config, loaded, chat, held_out, metrics), None
        if (args.compare_base or args.general) and has_base(args.source, loaded, config):
            with base_of(args.source, config, loaded) as base_model:
                base = measure(config, base_model, chat, held_out, metrics)
        for name, figure in tuned.figures.items():
            if not math.isfinite(figure.value):  # no figure is worth printing then
                fault = "its weights are broken or overflow in model.dtype"
                raise UserError(f"{args.source}: {name} is {figure.value}: {fault}")
        inputs = ReportInputs(
            args.source, tuned, base, primary=next(iter(config.evaluation.metrics), "exact_match"),
            limit=config.evaluation.max_new_tokens if loaded.adapters or is_run(args.source) else None,
            groups=held_out.groups, leakage=held_out.leakage,
            provenance=provenance(config, data, args.source, args.data),
            shown=config.evaluation.samples, seed=config.system.seed,
        )  # fmt: skip
        values, text, markdown = report(inputs)
        text = f"{text.removeprefix(chr(10))}\n\nleakage   {held_out.leakage['said']}"
    print(for_terminal(redact(text)))
    write(args.json, "--json", to_json(values, indent=2) + "\n")
    write(args.report, "--report", markdown)
    return 0


def read_config(args: argparse.Namespace) -> Config:
    """The run's own config, or defaults for a plain model, with the overrides."""
    overrides = args.overrides + ([f"evaluation.by_field={args.by}"] if args.by else [])
    if fixed := [item for item in overrides if item.strip().startswith(FIXED)]:
        raise UserError(f"{fixed[0]}: cannot be changed here, because it defines {args.source}: remove it")
    if is_run(args.source):
        config = load_config(Path(args.source) / "config.json", overrides)
        return config.override({"evaluation.max_new_tokens": config.answer_tokens})  # as in the run's report
    return Config().override({**read_overrides(overrides), "model.name": args.source})


def check_arguments(args: argparse.Namespace, config: Config) -> None:
    """Reject files that cannot be read or written before the work, not after it."""
    for flag, file in (("--json", args.json), ("--report", args.report)):
        if file and (os.path.isdir(file) or not os.access(Path(file).parent, os.W_OK)):
            raise UserError(f"{flag}: {file}: a directory, or in a missing or read-only directory: name another file")
    if args.general and not os.path.isfile(args.general):
        raise UserError(f"--general: {args.general}: no such file: check the path")
    if args.compare_base and is_run(args.source) and config.model.random_init:
        raise UserError(f"--compare-base: {args.source} started from random weights: remove --compare-base")


def has_base(source: str, loaded: LoadedModel, config: Config) -> bool:
    return bool(loaded.adapters) or (is_run(source) and not config.model.random_init)


@contextlib.contextmanager
def base_of(source: str, config: Config, loaded: LoadedModel) -> Iterator[LoadedModel]:
    """The same model without its adapters; after training on preferences or in full, the model before training."""
    start = config.lora.start_from if is_run(source) else ""
    if start and OBJECTIVES[config.training.objective].learns != "turns":  # `loaded` has this adapter from here on
        load_adapter_tensors(loaded.adapters, read_trained_adapter(start, config.model.reference).tensors, start)
        loaded.model.eval()  # so that DoRA discards the norms of the previous weights
        yield loaded
    elif loaded.adapters:
        with disabled(loaded.adapters):
            yield loaded
    else:
        base, plain = find_model(config.model.reference), config.system.kernels == "plain"
        yield open_model(str(base), loaded.model.device, loaded.dtype, plain=plain)


def measure(
    config: Config, loaded: LoadedModel, chat: ChatTokenizer, data: HeldOut, metrics: Sequence[answers.Metric] = ()
) -> EvalResult:
    e, context, seed = config.evaluation, config.model.max_seq_length, config.system.seed
    return evaluate.measure(loaded.model, chat, data.samples, data.prompts, e, context, metrics, data.general, seed)


def write(file: str | None, flag: str, text: str) -> None:
    try:
        if file:
            replace_file(Path(file), redact(text).encode())
    except OSError as error:
        raise UserError(f"{flag}: {file}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
