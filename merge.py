"""Turn an adapter into a model that any engine loads, and verify that it is the same model.

python merge.py runs/tiny --out merged
python merge.py runs/tiny --out merged --dtype f32 --base nf4 --verify
python merge.py runs/tiny --out adapter --format peft
python merge.py runs/one runs/two --weights 0.7,0.3 --out both
python merge.py runs/tiny --out tiny-gguf --format gguf --dtype q8_0
python merge.py runs/tiny --unmerge merged --out base-again
"""

from __future__ import annotations

import argparse
import sys

from nanoft.runtime.command import Arguments, command

DTYPES = ["bf16", "f16", "f32", "q8_0", "q5_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"]  # from q8_0 on for GGUF only
GGUF = ("gguf", "gguf-lora")  # files rather than directories
# Formats of other tools, and the command that makes them from a merged directory.
ELSEWHERE = {"onnx": "optimum-cli export onnx --model {out} {out}-onnx", "tensorrt": "trtllm-serve {out}"}

PARSER = Arguments(prog="merge.py", description=__doc__)
add = PARSER.add_argument
add("sources", nargs="+", metavar="RUN|ADAPTER", help="run or adapter directories; several are summed")
add("--out", required=True, metavar="DIR", help="a new directory")
add("--format", default="hf", choices=["hf", "peft", "mlx", *GGUF, *ELSEWHERE], help="default: hf, a merged model")
add("--dtype", choices=DTYPES, help="of the weights; default: that of the base, f16 for gguf, f32 for gguf-lora")
add("--base", default="original", choices=["original", "nf4"], help="merge into the original or the quantized weights")
add("--weights", metavar="W,...", help="factor of each adapter; default: 1 each")
add("--only", metavar="WHAT,...", help="attention, mlp, names of modules or regular expressions; default: all")
add("--unmerge", metavar="DIR", help="subtract the adapter from this merged model")
add("--shard-size", default="5GB", metavar="SIZE", help="maximum size of a weights file, such as 500MB; default: 5GB")
add("--verify", action="store_true", help="compare merges into both bases with the trained model, on held-out tokens")
add("--parity-tokens", type=int, default=24, metavar="N", help="tokens of each answer in parity.json; default: 24")
add("--base-model", metavar="DIR", help="the base, if it is not where the adapter says")
add("--fold", action="store_true", help="--format peft: one rank and one alpha for all modules, for vLLM")
add("--any-base", action="store_true", help="accept a base whose files differ from those of training")
add("--push", metavar="REPO", help="upload the result to this repository on the Hub")
add("--private", action=argparse.BooleanOptionalAction, default=True, help="a new repository is private; default: yes")

if __name__ == "__main__":
    PARSER.check(sys.argv[1:])  # --help, --version and mistakes are answered before torch is imported

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.export import merge as export
from nanoft.export import model_card, verify
from nanoft.export.gguf import export_gguf
from nanoft.export.merge import EXPORT_DTYPES, merge
from nanoft.export.streaming import StreamedDecoder, open_rows, return_freed_memory
from nanoft.io.atomic import new_directory, require_new, write_file, write_json
from nanoft.io.tables import for_terminal
from nanoft.models.adapter_files import fold_patterns, save_mlx
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import LoadedModel, TrainedAdapter, open_chat_tokenizer, use_cache_of
from nanoft.runtime.device import quiet_libraries


@command
def main(argv: list[str]) -> int:
    args = PARSER.parse(argv)
    quiet_libraries()
    return_freed_memory()
    check_arguments(args)
    use_cache_of(args.sources[0])
    print(for_terminal("\n".join(export_gguf(args) if args.format in GGUF else export_directory(args)), prose=""))
    if args.push:
        print(f"pushed to {model_card.push(Path(args.out), args.push, args.private)}")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Reject what cannot be done, before anything is read."""
    require_new(args.out)
    if args.format in ELSEWHERE:
        command = ELSEWHERE[args.format].format(out=args.out)
        raise UserError(f"--format: nanoft does not write {args.format}: merge with --format hf first, then: {command}")
    if args.format != "gguf":
        for source in args.sources:
            export.require_adapter(source)
    if args.dtype and args.format == "hf" and args.dtype not in EXPORT_DTYPES:
        raise UserError(f"--dtype: {args.dtype}: for --format gguf only: add that, or choose bf16, f16 or f32")
    given = {"--dtype": args.dtype and args.format not in GGUF, "--unmerge": args.unmerge, "--verify": args.verify}
    if args.fold and args.format != "peft":
        raise UserError("--fold: needs --format peft: remove one of the two")
    if unused := [flag for flag, value in given.items() if value and args.format != "hf"]:
        raise UserError(f"{unused[0]}: needs --format hf: remove one of the two")
    if args.unmerge and (args.base != "original" or args.verify):
        raise UserError("--unmerge: uses that model's weights as they are: remove --base and --verify")
    if args.parity_tokens < 0:
        raise UserError(f"--parity-tokens: {args.parity_tokens} is out of range: it must be >= 0 (0: no answers)")
    if args.out.endswith(".gguf"):
        raise UserError(f"--out: {args.out}: is a directory, for several files: write --out {args.out[:-5]}")
    if args.push:
        model_card.validate_repository(args.push)


def export_directory(args: argparse.Namespace) -> list[str]:
    """A merged model, or the adapter, in a new directory; returns lines for the terminal."""
    source, facts, files = args.sources[0], dict[str, Any](), dict[str, Any]()
    adapter, summed = export.choose_adapter(args)
    if args.fold:
        lora, folded = fold_patterns(adapter.lora, adapter.tensors)
        adapter = replace(adapter, lora=lora, tensors=folded)
    asked = {k: v for k, v in vars(args).items() if k not in ("out", "push", "private", "verify", "parity_tokens")}
    with new_directory(Path(args.out), export.fingerprint(asked, adapter, summed)) as staging:
        opened = export.open_adapter(adapter, args.base if args.format == "hf" else "nf4")
        if not args.any_base and not args.unmerge:
            export.require_same_base(adapter)
        has_score = opened.model.config.has_score
        if has_score and args.verify:
            raise UserError("--verify: compares perplexities, but a reward model has none: remove --verify")
        if opened.step is not None:
            print(f"{source}: has no result yet: exporting its best checkpoint, after step {opened.step}")
        chat = open_chat_tokenizer(source, opened, as_trained=True)
        samples, prompts = verify.held_out(source, chat)
        if args.format == "hf":
            dtype = EXPORT_DTYPES[args.dtype] if args.dtype else ModelFiles.read(opened.base_directory).dtype()
            files = merge(opened, dtype, args.base, staging, args.shard_size, resumable=True)
            lines, facts = verify_merged(args, adapter, opened, chat, samples, staging, dtype)
        elif args.format == "mlx":
            save_mlx(staging, opened.adapters, adapter.lora, opened.model.config, adapter.base_name)
            export.copy_tokenizer(opened, staging)
            lines = ["the adapter in MLX's format"]
        else:
            export.write_peft(staging, opened, adapter)
            lines = ["the adapter in PEFT's format"]
            if adapter.lora.rank_pattern or adapter.lora.alpha_pattern:
                lines.append("note: vLLM scales all modules by the file's alpha / r and ignores patterns: add --fold")
        export.save_template(Path(source), staging)
        model = StreamedDecoder(open_rows(staging)) if args.format == "hf" else opened.model
        weights = verify.describe_weights(opened, merged=args.format == "hf")
        parity = model_card.parity_record(model, chat, prompts, 0 if has_score else args.parity_tokens, weights)
        write_json(staging / "parity.json", parity)
        facts = {
            "format": args.format,
            "is_reward_model": has_score,
            "base": {"name": adapter.base_name, "sha256": adapter.base_sha256},
            "quantization": adapter.quantization,
            "adapters": summed,
            "only": args.only,
            "unmerged": args.unmerge,
        } | facts
        names = {"here": args.push or ".", "rank": args.format == "hf" or model_card.vllm_rank(adapter.lora)}
        card = model_card.model_card(args.format, opened, source, lines, **names)
        write_file(staging / "README.md", [card.encode()])
        write_json(staging / "provenance.json", model_card.provenance_record(source, facts, staging, files))
    return [f"{args.out}: {lines[0]}", *lines[1:]]


def verify_merged(
    args: argparse.Namespace, adapter: TrainedAdapter, opened: LoadedModel, chat: ChatTokenizer,
    samples: list[Sample], merged: Path, dtype: torch.dtype,
) -> tuple[list[str], dict[str, Any]]:  # fmt: skip
    """Lines for the terminal and facts for provenance.json; a UserError if the merge is not base + adapter."""
    proof = verify.verify_merge(opened, merged, verify.proof_prompts(chat, samples), dtype)
    if not proof.holds:
        raise UserError(
            f"--out: {args.out}: the merged model is not base + adapter: {proof}: nothing was kept: try --dtype f32"
        )
    name, stored = str(dtype).removeprefix("torch."), ModelFiles.read(opened.base_directory).quantization
    form = opened.quantization[0] if opened.quantization and (args.base == "nf4" or stored) else "original"
    what = f"subtracted from {args.unmerge}" if args.unmerge else f"merged onto the {form} weights"
    lines = [f"{what} in {name}; verified against base + adapter:", str(proof)]
    facts: dict[str, Any] = {"dtype": name, "onto": form, "proof": asdict(proof)}
    if not samples:
        lines.append("note: verified on a few plain texts only, because the run's data is not available")
    if proof.effect < proof.allowed:
        lines.append(f"note: rounding to {name} may erase an adapter this weak: --dtype f32 keeps it")
    if stored:
        lines.append(f"note: the base is stored in {form} only: there are no original weights in full precision")
    if args.verify or (adapter.quantization and not stored and not opened.model.config.has_score):
        limit = verify.VERIFY_TOKENS if args.verify else verify.VERIFY_TOKENS // 8
        found, tokens = verify.compare_bases(adapter, dtype, chat, samples, limit)
        lines += verify.describe_bases(found, tokens, args.base)
        facts["verify"] = {"tokens": tokens, **{base: asdict(agreement) for base, agreement in found.items()}}
    return lines, facts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
