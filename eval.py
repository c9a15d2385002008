"""Measure a run or a model on held-out data: likelihood, answers, forgetting, base against tuned, with intervals.

python eval.py runs/tiny --compare-base
python eval.py runs/tiny --data questions.jsonl --by topic --json figures.json evaluation.metrics=token_f1,rouge_l
python eval.py runs/tiny --general wikitext.txt
python eval.py runs/tiny --quantization
python eval.py mistralai/Mistral-7B-Instruct-v0.3 --data questions.jsonl
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from nanoft import UserError
from nanoft.batches import Sample, TokenDataset
from nanoft.config import Config, DataConfig
from nanoft.config.loading import load_config, read_overrides
from nanoft.data import filters
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import NEAR, Corpus, data_hash, open_corpus, reading_of
from nanoft.data.formats import Conversation, read_file
from nanoft.data.sources import find_files
from nanoft.evaluation import evaluate
from nanoft.evaluation.report import ReportInputs, leakage_of_run, report, settings_of
from nanoft.io.atomic import replace_file
from nanoft.io.tables import markdown_table
from nanoft.io.untrusted import redact
from nanoft.lora import DoRALinear, disabled
from nanoft.metrics import answers
from nanoft.models.hub import find_model
from nanoft.models.open import LoadedModel, is_run, open_chat_tokenizer, open_model
from nanoft.models.weights import load_model, stored_quantization
from nanoft.nf4 import quantize
from nanoft.runtime.command import Arguments, command
from nanoft.runtime.device import choose_device, choose_dtype, library_versions, seed_everything
from nanoft.tracking.run import to_json

# Settings that say what a model is: to change them here would measure something that nobody trained.
FIXED = ("model.name", "model.random_init", "quantization.", "lora.", "training.")
NO_LIMIT = 2**31 - 1  # tokens of a plain text, which is read through windows


@command
def main(argv: list[str]) -> int:
    parser = Arguments(
        prog="eval.py",
        description="Perplexity, metrics of answers and stop rate of a run or a model on held-out data.",
        epilog="examples: python eval.py runs/tiny --compare-base; "
        "python eval.py runs/tiny --data questions.jsonl evaluation.metrics=token_f1 --json figures.json; "
        "all of it: docs/evaluation.md",
    )
    parser.add_argument("source", metavar="RUN|MODEL", help="run directory, adapter, model directory or Hub name")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a setting of the run")
    parser.add_argument("--data", metavar="FILE", help="measure on this file; default: the run's validation data")
    parser.add_argument("--compare-base", action="store_true", help="measure the base as well")
    parser.add_argument("--by", metavar="FIELD", help="perplexity for each value of a field of the records")
    parser.add_argument(
        "--general", metavar="FILE", help="has it forgotten? perplexity of this text; compares the base"
    )
    parser.add_argument("--quantization", action="store_true", help="base and adapter on original and 4-bit weights")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    parser.add_argument("--report", metavar="FILE", help="write all of it as Markdown: wins, losses, worst answers")
    args = parser.parse_intermixed_args(argv)
    out = {"--json": args.json, "--report": args.report}
    wish = Wish(args.source, args.data, args.compare_base, args.general, args.quantization, out)
    overrides = args.overrides + ([f"evaluation.by_field={args.by}"] if args.by else [])
    return evaluate_source(wish, overrides)


@dataclass(frozen=True)
class Wish:
    """What the command line asks for, besides settings."""

    source: str
    data: str | None = None
    compare_base: bool = False
    general: str | None = None
    quantization: bool = False
    out: dict[str, str | None] = field(default_factory=dict)  # --json and --report: files to write


@dataclass(frozen=True)
class Held:
    """What is measured: the likelihood of samples, the answers to prompts, the loss on a general text."""

    samples: TokenDataset
    prompts: list[evaluate.Prompt] = field(default_factory=list)
    general: list[Sample] = field(default_factory=list)
    metrics: list[answers.Metric] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    leakage: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def evaluate_source(wish: Wish, overrides: list[str]) -> int:
    """Everything that eval.py does; returns the exit code."""
    config = settings(wish.source, overrides)
    check_wish(wish, config)
    metrics = answers.select_metrics(config.evaluation.metrics)
    data_config = data_of(config, wish.source, wish.data)
    seed_everything(config.system.seed, config.system.threads, config.system.deterministic)
    device = choose_device(config.system.device)
    dtype = choose_dtype(config.model.dtype, device)
    opened = open_model(wish.source, device, dtype, original_base=wish.quantization)
    if opened.step is not None:
        print(f"{wish.source}: no result yet: this is its best checkpoint, after step {opened.step}\n")
    has_base = bool(opened.adapters) or (is_run(wish.source) and not config.model.random_init)
    if wish.compare_base and not has_base:
        raise UserError(f"--compare-base: {wish.source} is a plain model, without a base: leave --compare-base out")
    chat = open_chat_tokenizer(wish.source, opened, as_trained=True)
    held = held_out(config, data_config, wish, chat, metrics)
    if wish.quantization:
        values, text = quantization_report(config, wish.source, opened, chat, held)
        markdown = f"# {wish.source}\n\n{text}\n"
    else:
        values, text, markdown = compare(config, wish, opened, chat, held, has_base)
    print(redact(text))
    for flag, content in (("--json", to_json(values, indent=2) + "\n"), ("--report", markdown)):
        if file := wish.out.get(flag):
            write_file(flag, file, redact(content))
    return 0


def compare(
    config: Config, wish: Wish, opened: LoadedModel, chat: ChatTokenizer, held: Held, has_base: bool
) -> tuple[dict[str, Any], str, str]:
    """Figures, text and Markdown of the ordinary report."""
    tuned, base = measure(config, opened, chat, held), None
    if has_base and (wish.compare_base or wish.general):
        with base_of(config, opened) as model:
            base = measure(config, model, chat, held)
    check_finite(tuned, wish.source)
    found = ReportInputs(
        wish.source,
        tuned,
        base,
        primary=next(iter(config.evaluation.metrics), "exact_match"),
        limit=config.evaluation.max_new_tokens if opened.adapters or is_run(wish.source) else None,
        groups=held.groups,
        places=held.places,
        leakage=held.leakage,
        provenance=held.provenance,
        shown=config.evaluation.samples,
        seed=config.system.seed,
    )
    values, text, markdown = report(found)
    said = f"\nleakage   {held.leakage['said']}" if held.leakage else ""
    return values, text.removeprefix("\n") + f"\n{said}", markdown


def settings(source: str, overrides: list[str]) -> Config:
    """The run's own config, or defaults for a plain model; overrides on top."""
    if fixed := [item for item in overrides if item.strip().startswith(FIXED)]:
        raise UserError(f"{fixed[0]}: cannot be changed here: it says what {source} is, and that is what is measured")
    if is_run(source):
        return load_config(Path(source) / "config.json", overrides)
    return Config().override({**read_overrides(overrides), "model.name": source})


def check_wish(wish: Wish, config: Config) -> None:
    """Find out before the work, not after it, that something is not there or the figures have nowhere to go."""
    for flag, file in wish.out.items():
        if file and (os.path.isdir(file) or not os.path.isdir(Path(file).parent)):
            raise UserError(f"{flag}: {file}: is a directory, or its directory does not exist: name a file")
        if file and not os.access(Path(file).parent, os.W_OK):
            raise UserError(f"{flag}: {file}: its directory may not be written: name a file elsewhere")
    if wish.general and not os.path.isfile(wish.general):
        raise UserError(f"--general: {wish.general}: no such file")
    if wish.compare_base and is_run(wish.source) and config.model.random_init:
        raise UserError(f"--compare-base: {wish.source} began with random weights: leave --compare-base out")


def write_file(flag: str, file: str, text: str) -> None:
    try:
        replace_file(Path(file), text.encode())
    except OSError as error:
        raise UserError(f"{flag}: {file}: cannot be written: {error.strerror}") from None


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
    check_unchanged(config, source)


def check_unchanged(config: Config, source: str) -> None:
    if recorded_provenance(source).get("data_sha256") != data_hash(config.data):
        raise UserError(f"{source}: its data changed since it was trained: put it back, or give --data FILE")


def recorded_provenance(source: str) -> dict[str, Any]:
    """What a run noted of its data, its base and its libraries."""
    return json.loads((Path(source) / "config.json").read_text(encoding="utf-8")).get("provenance", {})


def everything_in(file: str, settings: DataConfig) -> DataConfig:
    """Settings that keep all of a file that can be kept, read as the run reads its own."""
    kept = ("format", "columns", "delimiter", "max_bad_records", "template_args", "train_on", "truncation")
    return DataConfig(
        train_file=file, validation_split=0.0, deduplicate=False, **{name: getattr(settings, name) for name in kept}
    )


def held_out(config: Config, data: DataConfig, wish: Wish, chat: ChatTokenizer, metrics: list[answers.Metric]) -> Held:
    """Everything to measure on, and what is known of it."""
    e, own = config.evaluation, data is config.data
    limit = config.model.max_seq_length if own or not is_text(data) else NO_LIMIT
    corpus = open_corpus(data, limit, config.system.seed, chat, print)
    samples = corpus.validation if own else corpus.training
    if not len(samples):
        raise UserError(f"{wish.source}: this run held nothing out (data.validation_split=0): give --data FILE")
    whole = corpus.whole(samples)
    prompts = evaluate.held_out_prompts(corpus.conversations(whole, e.prompts), e.prompts)
    samples = samples[: e.max_samples]
    general = read_general(wish.general, chat, e.max_samples) if wish.general else []
    groups = {e.by_field: corpus.values(samples, e.by_field)} if e.by_field else {}
    places = [corpus.place(record) for record in samples.records.tolist()]
    leaks, origin = leakage(config, wish, corpus, samples, chat), provenance(config, wish, data)
    return Held(samples, prompts, general, metrics, groups, places, leaks, origin)


def is_text(data: DataConfig) -> bool:
    """Whether all files are plain texts: these are measured whole, whatever their length."""
    files = [file for part in find_files(data.train_file, "--data") for file in part]
    return all(str(next(iter(read_file(file, reading_of(data))))).startswith("text ") for file in files)


def read_general(file: str, chat: ChatTokenizer, limit: int | None) -> list[Sample]:
    """The texts of a file: a .txt file is one; of records, what is said in each."""
    if Path(file).suffix == ".txt":
        try:
            texts = [Path(file).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--general: {file}: cannot be read as UTF-8 text: {error}") from None
    else:
        records = read_file(Path(file), reading_of(DataConfig(train_file=file)))
        texts = [record.said() for record in records if isinstance(record, Conversation)]
    samples = chat.encode_now([chat.text_sample(text, n) for n, text in enumerate(texts[:limit]) if text.strip()])
    if not any(sample.is_target.any() for sample in samples):
        raise UserError(f"--general: {file}: there is no text in it")
    return samples


def leakage(config: Config, wish: Wish, corpus: Corpus, samples: TokenDataset, chat: ChatTokenizer) -> dict[str, Any]:
    """Whether prompts that are measured stand among those that the run was trained on."""
    if not wish.data:
        return leakage_of_run(corpus.report, config.data.near_leaks)
    if not is_run(wish.source):
        return {"said": "not checked: it is not known what the model was trained on: name the run"}
    try:
        recorded = load_config(Path(wish.source) / "config.json", environment={})
        check_unchanged(recorded, wish.source)
        trained = open_corpus(recorded.data, recorded.model.max_seq_length, recorded.system.seed, chat, print)
    except UserError as reason:
        return {"said": f"not checked: {reason}"}
    asked = list(corpus.questions(samples))
    exact, near = filters.leaks(asked, trained.questions(trained.training), NEAR)
    said = f"of {len(asked):,} prompts, {exact:,} stand in the training data word for word and {near:,} nearly so"
    return {"prompts": len(asked), "exact": exact, "near": near, "said": said}


def measure(config: Config, opened: LoadedModel, chat: ChatTokenizer, held: Held) -> evaluate.EvalResult:
    return evaluate.measure(
        opened.model,
        chat,
        held.samples,
        held.prompts,
        config.evaluation,
        config.model.max_seq_length,
        held.metrics,
        held.general,
        config.system.seed,
    )


def check_finite(measured: evaluate.EvalResult, source: str) -> None:
    """A model without a finite loss has no figures worth printing."""
    for name, figure in measured.figures.items():
        if not math.isfinite(figure.value):
            raise UserError(f"{source}: {name} is {figure.value}: its weights are broken or overflow in model.dtype")


@contextlib.contextmanager
def base_of(config: Config, opened: LoadedModel) -> Iterator[LoadedModel]:
    """The same model with its adapters off; after full training, the model it started from."""
    if opened.adapters:
        with disabled(opened.adapters):
            yield opened
    else:
        directory = find_model(config.model.name)
        model = load_model(directory, opened.model.head.device, opened.dtype).eval()
        yield LoadedModel(model, {}, directory, directory)


def provenance(config: Config, wish: Wish, data: DataConfig) -> dict[str, Any]:
    """Enough to do it again: what was measured, on what, with what."""
    recorded = recorded_provenance(wish.source) if is_run(wish.source) else {}
    kept: dict[str, Any] = {name: recorded[name] for name in ("base_sha256", "date") if name in recorded}
    how = {name: value for name, value in dataclasses.asdict(config.evaluation).items() if value is not None}
    return {
        "base": config.model.name,
        "data": wish.data or config.data.validation_file or config.data.train_file,
        "data_sha256": data_hash(data),
        **kept,
        "settings": settings_of(config),
        "evaluation": how,
        "versions": library_versions(),
    }


# ---- Four bits or not


def quantization_report(
    config: Config, source: str, opened: LoadedModel, chat: ChatTokenizer, held: Held
) -> tuple[dict[str, Any], str]:
    """Perplexity of base and adapter on the original weights, and on those in 4 bits (or as the run packed them)."""
    form = opened.quantization or ("nf4", True)
    if not opened.adapters:
        raise UserError(f"--quantization: {source} has no adapter: there is nothing to put on other weights")
    if stored_quantization(opened.base_directory):
        raise UserError(f"--quantization: {opened.base_directory} is stored packed: its original weights are not there")
    held = Held(held.samples)  # likelihood alone
    figures = {"original": both(config, opened, chat, held)}
    pack(opened, form)
    figures[form[0]] = both(config, opened, chat, held)
    rows = [[name, *(f"{perplexity:.5g}" for perplexity in pair.values())] for name, pair in figures.items()]
    was = f"in {opened.quantization[0]}" if opened.quantization else "as they are stored"
    text = f"{markdown_table(['perplexity on weights', 'base', 'tuned'], rows)}\n\ntrained on weights {was}"
    return {"quantization": figures}, text


def both(config: Config, opened: LoadedModel, chat: ChatTokenizer, held: Held) -> dict[str, float | None]:
    """Perplexity of the base, adapters off, and with them."""
    with disabled(opened.adapters):
        base = measure(config, opened, chat, held).perplexity
    return {"base": base, "tuned": measure(config, opened, chat, held).perplexity}


def pack(opened: LoadedModel, form: tuple[str, bool]) -> None:
    """Quantize the linears of the blocks where they stand, one after another; the adapters stay."""
    for name, linear in list(opened.model.named_modules()):
        place, _, leaf = name.rpartition(".")
        if isinstance(linear, nn.Linear) and name.startswith("model.layers."):
            packed = quantize(linear.weight.detach(), form, opened.dtype)
            packed.register_parameter("bias", linear.bias)
            setattr(opened.model.get_submodule(place), leaf, packed)
    for adapter in opened.adapters.values():
        if isinstance(adapter, DoRALinear):
            adapter.measure_base()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
