"""Turn an adapter into a model that any engine loads, and prove that it is the same model.

python merge.py runs/tiny --out merged
python merge.py runs/tiny --out merged --dtype f32 --base nf4 --verify
python merge.py runs/tiny --out adapter --format peft
python merge.py runs/one runs/two --weights 0.7,0.3 --out both
python merge.py runs/tiny --out tiny.gguf --format gguf --dtype q8_0
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nanoft import UserError, __version__
from nanoft.batches import Sample
from nanoft.config.loading import load_config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import open_corpus
from nanoft.evaluation import evaluate
from nanoft.export.gguf import GGUF_DTYPES, atomic_gguf, verify_gguf, write_gguf, write_gguf_lora
from nanoft.export.gguf_companions import modelfile, write_companions
from nanoft.export.merge import (
    EXPORT_DTYPES,
    PROGRESS,
    combined,
    copy_adapter,
    copy_tokenizer,
    merge,
    new_directory,
    open_adapter,
    write_peft,
)
from nanoft.export.model_card import (
    model_card,
    parity_record,
    provenance_record,
    push,
    run_facts,
    validate_repository,
)
from nanoft.export.streaming import StreamedDecoder, give_back_freed_memory, open_rows
from nanoft.export.verify import Agreement, prove, recommended, verify
from nanoft.io.atomic import write_file, write_json
from nanoft.io.tables import markdown_table
from nanoft.io.untrusted import read_json
from nanoft.models.adapter_files import adapter_tensors, hash_tensors, save_mlx
from nanoft.models.hub import find_model
from nanoft.models.open import (
    LoadedModel,
    TrainedAdapter,
    find_adapter,
    is_run,
    open_chat_tokenizer,
    open_model,
    read_trained_adapter,
)
from nanoft.models.weights import base_files, hash_files, stored_dtype, stored_quantization
from nanoft.runtime.command import Arguments, command
from nanoft.runtime.device import quiet_libraries

PROMPTS = 8
VERIFY_TOKENS = 4096  # of held-out samples, that --verify measures on
PLAIN_TEXTS = ["The quick brown fox jumps over the lazy dog.", '{"city": "Oslo", "people": 4}', "1 2 3 4 5 6 7 8 9 10"]
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
GGUF = ("gguf", "gguf-lora")  # files rather than directories
# What is not written here, and the one command of the tool that makes it from a merged directory.
ELSEWHERE = {"onnx": "optimum-cli export onnx --model {out} {out}-onnx", "tensorrt": "trtllm-serve {out}"}


@command
def main(argv: list[str]) -> int:
    parser = Arguments(
        prog="merge.py",
        description="Merge an adapter into its base as a Hugging Face model, or hand it out in another tool's format.",
        epilog="examples: python merge.py runs/tiny --out merged; "
        "python merge.py runs/tiny --out merged --dtype f32 --base nf4 --verify; "
        "python merge.py runs/one runs/two --weights 0.7,0.3 --out both; "
        "python merge.py runs/tiny --unmerge merged --out base-again",
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="RUN|ADAPTER", help="run or adapter directories; several are added up")
    add("--out", required=True, metavar="DIR", help="that does not exist yet; for GGUF, or FILE.gguf")
    add("--format", default="hf", choices=[*FORMATS, *GGUF, *ELSEWHERE], help="default: hf, a merged model")
    add(
        "--dtype", choices=list(dict.fromkeys([*EXPORT_DTYPES, *GGUF_DTYPES])),
        help="of the weights, some for GGUF only; default: the base's, of a GGUF file f16, of a GGUF adapter f32",
    )  # fmt: skip
    add(
        "--base", default="original", choices=["original", "nf4"],
        help="merge onto the original weights, or onto the quantized ones it was trained against; default: original",
    )  # fmt: skip
    add("--weights", metavar="W,...", help="of each adapter's change; default: 1 each")
    add("--only", metavar="WHAT,...", help="attention, mlp, names of modules or regular expressions; default: all")
    add("--unmerge", metavar="DIR", help="take the adapter out of this merged model again")
    add("--shard-size", default="5GB", metavar="SIZE", help="of a file of weights, such as 500MB; default: 5GB")
    add("--verify", action="store_true", help="compare both bases with the trained model on held-out tokens")
    add("--parity-tokens", type=int, default=24, metavar="N", help="of each answer in parity.json; default: 24")
    add("--any-base", action="store_true", help="go on if the base's files are not those it was trained on")
    add("--push", metavar="REPO", help="upload the result to this repository on the Hub")
    args = parser.parse_args(argv)
    return export(args)


def export(args: argparse.Namespace) -> int:
    """Everything that merge.py does; returns the exit code."""
    quiet_libraries()
    give_back_freed_memory()
    check_arguments(args)
    if args.format in GGUF:
        return export_gguf(args)
    adapter, hashes = choose_adapter(args)
    with new_directory(Path(args.out), key_of(args, adapter, hashes)) as aside:  # gone, unless all of this succeeds
        job = open_job(args, adapter)
        files = FORMATS[args.format](job, aside)
        describe(job, hashes, aside, files)
    print("\n".join(job.said))
    if args.push:
        print(f"pushed to {push(Path(args.out), args.push)}")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be done, before anything is read."""
    if os.path.lexists(args.out):
        raise UserError(f"--out: {args.out}: exists already: choose another name or remove it")
    if args.format in ELSEWHERE:
        command = ELSEWHERE[args.format].format(out=args.out)
        raise UserError(f"--format: {args.format} is not written here: merge with --format hf first, then: {command}")
    for source in args.sources:
        if find_adapter(source) is None and args.format != "gguf":
            check_lora_run(source)
    if args.dtype and args.format == "hf" and args.dtype not in EXPORT_DTYPES:
        raise UserError(f"--dtype: {args.dtype}: only --format gguf has it")
    if args.format != "hf":
        given = {"--dtype": args.dtype and args.format not in GGUF, "--unmerge": args.unmerge, "--verify": args.verify}
        for flag in (flag for flag, value in given.items() if value):
            raise UserError(f"{flag}: is about a merged model of --format hf: leave it out, or use that format")
    if args.unmerge and (args.base != "original" or args.verify):
        raise UserError("--unmerge: takes the adapter out of that model as it is: leave --base and --verify out")
    if args.parity_tokens < 0:
        raise UserError(f"--parity-tokens: {args.parity_tokens}: give a number from 0 (no answers) on")
    if args.push and args.format in GGUF:
        raise UserError("--push: uploads directories with a card, not GGUF files: hf upload does it")
    if args.push:
        validate_repository(args.push)


def export_gguf(args: argparse.Namespace) -> int:
    """A GGUF file of the merged model (or of a model that needs no merging), or of the adapter alone."""
    source, out = args.sources[0], Path(args.out)
    dtype, name = args.dtype or ("f16" if args.format == "gguf" else "f32"), Path(source).resolve().name
    with atomic_gguf(out, f"{'model' if args.format == 'gguf' else 'adapter'}-{dtype}.gguf") as path:
        opened = open_for_gguf(args)
        chat = open_chat_tokenizer(source, opened, as_trained=True)
        samples, asked = held_out(source, chat)
        if args.format == "gguf":
            notes = write_gguf(opened, chat, name, dtype, args.base, path)
            proof = verify_gguf(opened, path, prompts(chat, samples), dtype)
            effect = f" (the adapter itself moves logits by {proof.effect:.2g})" if opened.adapters else ""
            said = (
                f"{out}: read back and compared: largest logit difference {proof.max_difference:.2g}{effect}, "
                f"same most likely token at {proof.same_top_token:.1%} of positions"
            )
            if not proof.holds:
                raise UserError(f"{said}: allowed is {proof.allowed:.2g}: try --dtype f32; nothing was kept")
            recipe = modelfile(path.name, chat)
        else:
            write_gguf_lora(opened, name, dtype, path)
            notes, said = [], f"{out}: the adapter as GGUF, for a GGUF file of {opened.base_directory}"
            recipe = modelfile(path.name, chat, str(opened.base_directory))
        expected = parity_record(opened.model, chat, asked, args.parity_tokens, weights_in_words(args, opened))
        write_companions(path, out, recipe, expected)
    print("\n".join([said, *(f"note: {note}" for note in notes)]))
    return 0


def open_for_gguf(args: argparse.Namespace) -> LoadedModel:
    """The adapter on its base, or a model without one; on the disk, but for a checkpoint of every parameter."""
    source = args.sources[0]
    if find_adapter(source) is None and not (is_run(source) and is_lora_run(source)):
        given = {"--only": args.only, "--weights": args.weights, "--base": args.base != "original"}
        given |= dict.fromkeys(args.sources[1:], True)
        for what in (what for what, value in given.items() if value):
            raise UserError(f"{what}: {source} has no adapter: leave it out")
        result = Path(source) / "model" if is_run(source) else find_model(source, "RUN|MODEL")
        if not result.is_dir():
            return open_model(source, torch.device("cpu"), torch.float32)
        return LoadedModel(StreamedDecoder(open_rows(result)), {}, result, result)
    adapter, _ = choose_adapter(args)
    opened = open_adapter(adapter, args.base)
    if not args.any_base:
        check_base(adapter)
    return opened


def is_lora_run(source: str) -> bool:
    return load_config(Path(source) / "config.json").training.method == "lora"


def check_lora_run(source: str) -> None:
    """Refuse what cannot have an adapter, before anything is loaded."""
    if not is_run(source):
        raise UserError(f"{source}: no adapter here: give a LoRA run or an adapter directory")
    if not is_lora_run(source):
        raise UserError(f"{source}: this run trained every parameter: its result is a whole model already, in model/")


# --- which adapter, on which base


def choose_adapter(args: argparse.Namespace) -> tuple[TrainedAdapter, list[str]]:
    """What all of the sources and --weights, --only, --unmerge come to; and each source's hash."""
    adapters = [read_trained_adapter(source) for source in args.sources]
    check_numbers(adapters)
    weights, only = read_weights(args.weights, len(adapters)), args.only.split(",") if args.only else []
    hashes = [hash_tensors(adapter.tensors) for adapter in adapters]
    if args.unmerge:
        check_unmerge(Path(args.unmerge), adapters, hashes)
        return combined(adapters, [-weight for weight in weights], only, Path(args.unmerge)), hashes
    chosen = combined(adapters, weights, only)
    if args.base == "nf4" and chosen.quantization is None and stored_quantization(chosen.base) is None:
        raise UserError(f"--base nf4: {args.sources[0]} was trained on the original weights: leave --base out")
    return chosen, hashes


def check_numbers(adapters: Sequence[TrainedAdapter]) -> None:
    """Refuse an adapter that is broken: no proof is made of one that is handed out as it is."""
    for adapter in adapters:
        for name, tensor in adapter.tensors.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"{adapter.place}: {name} holds NaN or infinity: take the adapter of an earlier checkpoint"
                )


def read_weights(text: str | None, count: int) -> list[float]:
    """The numbers of --weights, one for each adapter."""
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise UserError(f"--weights: {text!r:.60}: give {count} numbers, one for each adapter, such as 0.7,0.3")
    return weights


def check_base(adapter: TrainedAdapter) -> None:
    """Refuse a base that the adapter fits, but whose files are not those that it was trained on."""
    if adapter.base_sha256 and hash_files(base_files(adapter.base)) != adapter.base_sha256:
        raise UserError(
            f"{adapter.base}: its files are not those that {adapter.place} was trained on (another SHA-256): "
            "put those back, or add --any-base"
        )


def check_unmerge(directory: Path, adapters: Sequence[TrainedAdapter], hashes: Sequence[str]) -> None:
    """Refuse to take out what was never put in, or what cannot be taken out."""
    if not directory.is_dir():
        raise UserError(f"--unmerge: {directory}: no such directory: give a merged model")
    for adapter in adapters:
        if adapter.lora.bias != "none":
            raise UserError(
                f"--unmerge: {adapter.place} replaced biases, and the old ones are only in the base: use it"
            )
    if (directory / "provenance.json").is_file():
        told = json.dumps(read_json(directory / "provenance.json").get("adapters"))
        if not all(digest in told for digest in hashes):
            raise UserError(f"--unmerge: {directory} was not merged from {adapters[0].place}: see its provenance.json")


def key_of(args: argparse.Namespace, adapter: TrainedAdapter, hashes: list[str]) -> str:
    """What is being made, in 16 letters: the same for the same command on the same files."""
    base = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in base_files(adapter.base)]
    asked = {
        name: value for name, value in vars(args).items() if name not in ("out", "push", "verify", "parity_tokens")
    }
    text = json.dumps([__version__, asked, hashes, str(adapter.base.resolve()), base])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- the work


@dataclass(frozen=True)
class Job:
    """What is asked for, and what it takes."""

    args: argparse.Namespace
    adapter: TrainedAdapter
    opened: LoadedModel  # the adapter on the base that is merged onto, which stays on the disk
    chat: ChatTokenizer
    samples: list[Sample]  # of the run, held out if it held any
    asked: list[evaluate.Prompt]
    facts: dict[str, Any] = field(default_factory=dict)  # for provenance.json
    said: list[str] = field(default_factory=list)  # lines for the terminal and the card


def open_job(args: argparse.Namespace, adapter: TrainedAdapter) -> Job:
    """Base and adapter, and what there is to prove them on."""
    onto = "original" if args.base == "original" and args.format == "hf" else "nf4"  # an adapter: as it was trained
    opened = open_adapter(adapter, onto)  # type: ignore[arg-type]
    if not args.any_base and not args.unmerge:
        check_base(adapter)
    adapter = replace(adapter, tensors=adapter_tensors(opened.adapters))  # once in memory is enough
    if opened.step is not None:
        print(f"{args.sources[0]}: no result yet: this is its best checkpoint, after step {opened.step}")
    chat = open_chat_tokenizer(args.sources[0], opened, as_trained=True)
    return Job(args, adapter, opened, chat, *held_out(args.sources[0], chat))


def held_out(source: str, chat: ChatTokenizer) -> tuple[list[Sample], list[evaluate.Prompt]]:
    """Samples and prompts of the run, held out if it held any, if its data is still there."""
    if is_run(source):
        config = load_config(Path(source) / "config.json")
        with suppress(UserError):
            corpus = open_corpus(config.data, config.model.max_seq_length, config.system.seed, chat, print)
            samples = corpus.validation if len(corpus.validation) else corpus.training
            conversations = corpus.conversations(corpus.whole(samples), PROMPTS)
            return list(samples[: VERIFY_TOKENS // 8]), evaluate.held_out_prompts(conversations, PROMPTS)
    return [], []


def prompts(chat: ChatTokenizer, samples: Sequence[Sample]) -> list[list[int]]:
    """Token ids to prove a merge on: a few plain texts, and a few samples of the run."""
    ids = [chat.tokenizer.encode(text).ids for text in PLAIN_TEXTS]
    ids += [sample.ids.tolist() for sample in samples[:PROMPTS]]
    return [row for row in ids if row]


def write_merged(job: Job, aside: Path) -> dict[str, Any]:
    """A merged model in the Hugging Face layout, proven."""
    args, opened = job.args, job.opened
    dtype = EXPORT_DTYPES[args.dtype] if args.dtype else stored_dtype(opened.base_directory)
    size = read_size(args.shard_size)
    files = merge(opened, dtype, args.base, aside, size, aside / PROGRESS)
    proof = prove(opened, aside, prompts(job.chat, job.samples), dtype)
    name, stored = str(dtype).removeprefix("torch."), stored_quantization(opened.base_directory)
    form = opened.quantization[0] if opened.quantization and (args.base == "nf4" or stored) else "original"
    said = (
        f"largest logit difference {proof.max_difference:.2g} (allowed {proof.allowed:.2g}; "
        f"the adapter itself moves logits by {proof.effect:.2g})"
    )
    if not proof.holds:
        raise UserError(
            f"--out: {args.out}: the merged model is not the adapter's: {said}: try --dtype f32; nothing was kept"
        )
    what = f"taken out of {args.unmerge}" if args.unmerge else f"merged onto the {form} weights"
    job.said.append(f"{what} in {name}; proven against the adapter:")
    job.said.append(f"{said}, same most likely token at {proof.same_top_token:.1%} of positions")
    if not job.samples:
        job.said.append("note: proven on a few plain texts only, because the run's own data is not to be had from here")
    if proof.effect < proof.allowed:
        job.said.append(f"note: rounding to {name} may drown so weak an adapter; --dtype f32 keeps it")
    if stored:
        job.said.append(f"note: the base is stored in {form}: there is no other original of it here")
    if args.unmerge:
        job.said.append(rounding(aside, read_trained_adapter(args.sources[0]).base, Path(args.unmerge)))
    job.facts.update(dtype=name, onto=form, proof=asdict(proof))
    if not args.unmerge and (args.verify or (job.adapter.quantization and not stored)):
        job.facts["verify"] = say_agreement(job, dtype)
    return files


def say_agreement(job: Job, dtype: torch.dtype) -> dict[str, Any]:
    """Perplexity and nearness to the trained model of each base that it could be merged onto."""
    rows: list[list[int]] = []
    targeted: list[list[bool]] = []
    limit = VERIFY_TOKENS if job.args.verify else VERIFY_TOKENS // 8
    for sample in job.samples:
        if sum(map(len, rows)) < limit:
            rows.append(sample.ids.tolist())
            targeted.append(sample.is_target.tolist())
    if not rows:
        rows = [row for row in prompts(job.chat, []) if len(row) > 1]
        targeted = [[True] * len(row) for row in rows]
    found = verify(job.adapter, dtype, rows, targeted)
    trained, tokens = next(iter(found.values())).wanted_perplexity, sum(map(len, rows))
    job.said.append(f"on {tokens:,} held-out tokens, beside the model as it was trained (perplexity {trained:.5g}):")
    job.said.append(agreement_table(found))
    if len(found) > 1:
        best = recommended(found)
        done = "" if best == job.args.base else f": --base {best} merges onto those instead"
        job.said.append(f"recommended: onto the {best} weights{done}")
    return {"tokens": tokens, **{name: asdict(agreement) for name, agreement in found.items()}}


def agreement_table(found: dict[str, Agreement]) -> str:
    rows = [
        [f"--base {name}", f"{a.perplexity:.5g}", f"{a.perplexity / a.wanted_perplexity - 1:+.3%}",
         f"{a.divergence:.2e}", f"{a.same_top_token:.1%}"]
        for name, a in found.items()
    ]  # fmt: skip
    return markdown_table(["merged", "perplexity", "change", "KL (nats)", "same top token"], rows)


def rounding(out: Path, base: Path, merged: Path) -> str:
    """How far what was taken out is from the base, and why."""
    dtype = str(stored_dtype(merged)).removeprefix("torch.")
    why = f"the merged weights had been rounded to {dtype}, and what that cut off is not to be had again"
    with suppress(UserError, KeyError):
        ours, theirs, farthest = open_rows(out), open_rows(base), 0.0
        for name in theirs.shapes:
            for a, b in zip(ours.rows(name), theirs.rows(name), strict=True):
                farthest = max(farthest, (a - b).abs().max().item())
        return f"largest difference of a weight from {base}: {farthest:.2g} ({why})"
    return f"note: {why}; the base is not here to compare with"


def read_size(text: str) -> int:
    """Bytes of 500MB or 5GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip().upper())
    if not found or not (size := int(float(found[1]) * UNITS[found[2]])):
        raise UserError(f"--shard-size: {text!r:.40} is no size: write one like 500MB or 5GB")
    return size


def write_adapter_copy(job: Job, aside: Path) -> dict[str, Any]:
    """The adapter in PEFT's format: byte for byte as it is, if it is in it already."""
    args, found = job.args, find_adapter(job.args.sources[0])
    if found and len(args.sources) == 1 and not args.only and read_weights(args.weights, 1) == [1.0]:
        copy_adapter(found, aside)
    else:
        write_peft(aside, job.opened, job.adapter)
    job.said.append("the adapter in PEFT's format")
    return {}


def write_mlx(job: Job, aside: Path) -> dict[str, Any]:
    """The adapter as mlx-lm reads it."""
    save_mlx(aside, job.opened.adapters, job.opened.model.config.num_layers, job.adapter.base_name)
    copy_tokenizer(job.opened, aside)
    job.said.append("the adapter in MLX's format")
    return {}


# How each format is written into an empty directory; hashes of files that are known already come back.
FORMATS: dict[str, Callable[[Job, Path], dict[str, Any]]] = {
    "hf": write_merged,
    "peft": write_adapter_copy,
    "mlx": write_mlx,
}


def weights_in_words(args: argparse.Namespace, opened: LoadedModel) -> str:
    """What parity.json's answers are computed with: an adapter on another base may answer otherwise."""
    if args.format in ("hf", "gguf"):
        return "those of this export, before any quantization of its own"
    form = opened.quantization[0] if opened.quantization else "its own number format"
    return f"the adapter on its base in {form}; on another base answers may differ"


def describe(job: Job, hashes: list[str], aside: Path, files: dict[str, Any]) -> None:
    """parity.json, README.md and provenance.json."""
    args, adapter = job.args, job.adapter
    model = StreamedDecoder(open_rows(aside)) if args.format == "hf" else job.opened.model
    expected = parity_record(model, job.chat, job.asked, args.parity_tokens, weights_in_words(args, job.opened))
    write_json(aside / "parity.json", expected)
    weights = read_weights(args.weights, len(hashes))
    merged = zip(args.sources, hashes, weights, strict=True)
    facts = {
        "format": args.format,
        "base": {"name": adapter.base_name, "sha256": adapter.base_sha256},
        "quantization": adapter.quantization,
        "adapters": [{"source": source, "sha256": digest, "weight": weight} for source, digest, weight in merged],
        "only": args.only,
        "unmerged": args.unmerge,
        **job.facts,
    }
    run = run_facts(args.sources[0])
    write_file(aside / "README.md", [model_card(args.format, facts, run, adapter.base, job.said).encode()])
    write_json(aside / "provenance.json", provenance_record(args.sources[0], facts, aside, files))
    job.said[0] = f"{args.out}: {job.said[0]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
