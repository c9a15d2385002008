"""Turn an adapter into a model that any engine loads, and prove that it is the same model.

python merge.py runs/tiny --out merged
python merge.py runs/tiny --out merged --dtype f32 --base nf4
python merge.py runs/tiny --out adapter --format peft
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from nanoft import UserError, evaluate, runtime
from nanoft.chat import ChatTokenizer
from nanoft.config import load_config
from nanoft.export import EXPORT_DTYPES, copy_adapter, merge, new_directory, prove
from nanoft.records import read_splits
from nanoft.weights import Opened, find_adapter, is_run, open_model, read_json

PROMPTS = 8
PLAIN_TEXTS = ["The quick brown fox jumps over the lazy dog.", '{"city": "Oslo", "people": 4}', "1 2 3 4 5 6 7 8 9 10"]
DTYPE_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="merge.py",
        description="Merge an adapter into its base as a Hugging Face model, or hand it out in PEFT's format.",
        epilog="examples: python merge.py runs/tiny --out merged; "
        "python merge.py runs/tiny --out merged --dtype f32 --base nf4",
    )
    parser.add_argument("source", metavar="RUN|ADAPTER", help="run directory or adapter directory")
    parser.add_argument("--out", required=True, metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument("--format", default="hf", choices=["hf", "peft"], help="default: hf, a merged model")
    parser.add_argument("--dtype", choices=list(EXPORT_DTYPES), help="of the merged weights; default: the base's")
    parser.add_argument(
        "--base", default="original", choices=["original", "nf4"],
        help="merge onto the original weights, or onto the 4-bit weights it was trained against; default: original",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        return export(args.source, Path(args.out), args.format, args.dtype, args.base)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def export(source: str, out: Path, form: str, dtype_name: str | None, onto: str) -> int:
    """Everything that merge.py does; returns the exit code."""
    runtime.quiet_libraries()
    adapter = find_adapter(source)
    if adapter is None:
        raise UserError(f"{source}: no adapter here: give a finished LoRA run or an adapter directory")
    if form == "peft":
        with new_directory(out) as aside:
            copy_adapter(adapter, aside)
        print(f"{out}: the adapter in PEFT's format")
        return 0
    opened = open_model(source, torch.device("cpu"), torch.float32, original_base=onto == "original")
    if onto == "nf4" and opened.quantization is None:
        raise UserError(f"--base nf4: {adapter} was trained on the original weights: leave --base out")
    stored = read_json(opened.base_directory / "config.json")
    dtype = EXPORT_DTYPES[dtype_name or DTYPE_NAMES.get(stored.get("dtype") or stored.get("torch_dtype", ""), "bf16")]
    with new_directory(out) as aside:
        merge(opened, dtype, "nf4" if onto == "nf4" else "original", aside)
        proof = prove(opened, aside, prompts(source, opened), dtype)
        said = f"largest logit difference {proof.max_difference:.2g} (allowed {proof.allowed:.2g})"
        if not proof.holds:
            raise UserError(
                f"--out: {out}: the merged model is not the adapter's: {said}: try --dtype f32; nothing was kept"
            )
    print(f"{out}: merged onto the {onto} weights in {str(dtype).removeprefix('torch.')}; proven against the adapter:")
    print(f"{said}, same most likely token at {proof.same_top_token:.1%} of positions")
    if opened.quantization and onto == "original":
        print("note: this adapter was trained on 4-bit weights; --base nf4 merges onto those instead")
    return 0


def prompts(source: str, opened: Opened) -> list[list[int]]:
    """Held-out prompts of the run with their answers, if its data is still there; else a few plain texts."""
    chat = ChatTokenizer.from_directory(opened.tokenizer_directory)
    if is_run(Path(source)):
        config = load_config(Path(source) / "config.json")
        d = config.data
        if Path(d.train_file).is_file():
            train, held_out, _ = read_splits(
                d.train_file, d.validation_file, d.validation_split, config.system.seed, None, 1.0
            )
            chats = evaluate.held_out_prompts(held_out or train, PROMPTS)
            if chats:
                return [chat.encode_prompt(messages)[-config.model.max_seq_length :] for messages, _ in chats]
    return [chat.tokenizer.encode(text).ids for text in PLAIN_TEXTS]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
