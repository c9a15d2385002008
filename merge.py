"""Turn an adapter into a model that any engine loads, and prove that it is the same model.

python merge.py runs/tiny --out merged
python merge.py runs/tiny --out merged --dtype f32 --base nf4
python merge.py runs/tiny --out adapter --format peft
python merge.py runs/tiny --out tiny.gguf --format gguf --dtype q8_0
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from nanoft import UserError, runtime
from nanoft.chat import ChatTokenizer, Message
from nanoft.config import load_config
from nanoft.corpus import open_corpus
from nanoft.evaluate import held_out_prompts
from nanoft.export import EXPORT_DTYPES, copy_adapter, merge, new_directory, prove, write_adapter
from nanoft.gguf_export import (
    GGUF_DTYPES,
    modelfile,
    new_gguf,
    parity,
    prove_gguf,
    write_companions,
    write_gguf,
    write_gguf_lora,
)
from nanoft.weights import Opened, find_adapter, is_run, open_chat, open_model, stored_dtype, stored_quantization

PROMPTS = 8
PLAIN_TEXTS = ["The quick brown fox jumps over the lazy dog.", '{"city": "Oslo", "people": 4}', "1 2 3 4 5 6 7 8 9 10"]


@runtime.command
def main(argv: list[str]) -> int:
    parser = runtime.Arguments(
        prog="merge.py",
        description="Merge an adapter into its base as a Hugging Face model, or hand it out in PEFT's format.",
        epilog="examples: python merge.py runs/tiny --out merged; "
        "python merge.py runs/tiny --out merged --dtype f32 --base nf4",
    )
    parser.add_argument("source", metavar="RUN|ADAPTER", help="run directory or adapter directory")
    parser.add_argument("--out", required=True, metavar="DIR", help="that does not exist yet; for GGUF, or FILE.gguf")
    parser.add_argument(
        "--format", default="hf", choices=["hf", "peft", "gguf", "gguf-lora"],
        help="hf: merged (default); gguf: merged, for llama.cpp and Ollama; peft, gguf-lora: the adapter alone",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=[*EXPORT_DTYPES, *(form for form in GGUF_DTYPES if form not in EXPORT_DTYPES)],
        help="of the weights, some for GGUF only; default: the base's, of a GGUF file f16, of a GGUF adapter f32",
    )  # fmt: skip
    parser.add_argument(
        "--base", default="original", choices=["original", "nf4"],
        help="merge onto the original weights, or onto the quantised ones it was trained against; default: original",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return export(args.source, Path(args.out), args.format, args.dtype, args.base)


def export(source: str, out: Path, form: str, dtype_name: str | None, onto: Literal["original", "nf4"]) -> int:
    """Everything that merge.py does; returns the exit code."""
    runtime.quiet_libraries()
    if form.startswith("gguf"):
        return export_gguf(source, out, form, dtype_name or ("f16" if form == "gguf" else "f32"), onto)
    if dtype_name and dtype_name not in EXPORT_DTYPES:
        raise UserError(f"--dtype: {dtype_name}: only --format gguf has it")
    adapter = find_adapter(source)
    if adapter is None:
        check_lora_run(source)
    with new_directory(out) as aside:  # refused or gone, unless all of this succeeds
        if form == "peft" and adapter:
            copy_adapter(adapter, aside)
            said = f"{out}: the adapter in PEFT's format"
        else:
            opened = open_model(source, torch.device("cpu"), torch.float32, original_base=onto == "original")
            if opened.step is not None:
                print(f"{source}: no result yet: this is its best checkpoint, after step {opened.step}")
            if form == "peft":
                config = load_config(Path(source) / "config.json")
                model, adapters, base = opened.model, opened.adapters, opened.base_directory
                write_adapter(aside, model, adapters, base, config, opened.step or 0, opened.dtype)
                said = f"{out}: the adapter in PEFT's format"
            else:
                said = merge_and_prove(opened, source, out, aside, dtype_name, onto)
    print(said)
    return 0


def export_gguf(source: str, out: Path, form: str, dtype: str, onto: Literal["original", "nf4"]) -> int:
    """A GGUF file of the merged model (or of a model that needs no merging), or of the adapter alone."""
    if form == "gguf-lora" and find_adapter(source) is None:
        check_lora_run(source)
    with new_gguf(out, f"{'model' if form == 'gguf' else 'adapter'}-{dtype}.gguf") as path:
        opened = open_model(source, torch.device("cpu"), torch.float32, original_base=onto == "original")
        if onto == "nf4" and opened.quantization is None:
            raise UserError(f"--base nf4: {source} was trained on the original weights: leave --base out")
        chat = open_chat(source, opened, as_trained=True)
        name = Path(source).resolve().name
        if form == "gguf":
            notes = write_gguf(opened, chat, name, dtype, onto, path)
            proof = prove_gguf(opened, path, prompts(source, opened), dtype)
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
        write_companions(path, out, recipe, parity(opened.model, chat, questions(source, chat)))
    print("\n".join([said, *(f"note: {note}" for note in notes)]))
    return 0


def questions(source: str, chat: ChatTokenizer) -> list[list[Message]]:
    """A few conversations of the run to answer, held out if it held any; else plain texts as questions."""
    found: list[list[Message]] = []
    if is_run(source):
        config = load_config(Path(source) / "config.json")
        with suppress(UserError):
            corpus = open_corpus(config.data, config.model.max_seq_length, config.system.seed, chat, print)
            samples = corpus.validation if len(corpus.validation) else corpus.training
            held = held_out_prompts(corpus.conversations(corpus.whole(samples), PROMPTS), PROMPTS)
            found = [prompt.messages for prompt in held if not prompt.tools]
    return found or [[{"role": "user", "content": text}] for text in PLAIN_TEXTS]


def check_lora_run(source: str) -> None:
    """Refuse what cannot have an adapter, before anything is loaded."""
    if not is_run(source):
        raise UserError(f"{source}: no adapter here: give a LoRA run or an adapter directory")
    if load_config(Path(source) / "config.json").training.method == "full":
        raise UserError(f"{source}: this run trained every parameter: its result is a whole model already, in model/")


def merge_and_prove(
    opened: Opened, source: str, out: Path, aside: Path, dtype_name: str | None, onto: Literal["original", "nf4"]
) -> str:
    """Write the merged model aside, and make sure that it says what base and adapter say; returns what was proven."""
    if onto == "nf4" and opened.quantization is None:
        raise UserError(f"--base nf4: {source} was trained on the original weights: leave --base out")
    stored = stored_quantization(opened.base_directory)
    base = opened.quantization[0] if opened.quantization and (onto == "nf4" or stored) else "original"
    dtype = EXPORT_DTYPES[dtype_name] if dtype_name else stored_dtype(opened.base_directory)
    merge(opened, dtype, onto, aside)
    texts = prompts(source, opened)
    proof = prove(opened, aside, texts, dtype)
    said = (
        f"largest logit difference {proof.max_difference:.2g} (allowed {proof.allowed:.2g}; "
        f"the adapter itself moves logits by {proof.effect:.2g})"
    )
    if not proof.holds:
        raise UserError(
            f"--out: {out}: the merged model is not the adapter's: {said}: try --dtype f32; nothing was kept"
        )
    name = str(dtype).removeprefix("torch.")
    said = (
        f"{out}: merged onto the {base} weights in {name}; proven against the adapter:\n"
        f"{said}, same most likely token at {proof.same_top_token:.1%} of positions"
    )
    if len(texts) <= len(PLAIN_TEXTS):
        said += "\nnote: proven on a few plain texts only, because the run's own data is not to be had from here"
    if proof.effect < proof.allowed:
        said += f"\nnote: rounding to {name} may drown so weak an adapter; --dtype f32 keeps it"
    if stored:
        said += f"\nnote: the base is stored in {base}: there is no other original of it here"
    elif opened.quantization and onto == "original":
        bits = 8 if opened.quantization[0] == "int8" else 4
        said += f"\nnote: this adapter was trained on {bits}-bit weights; --base nf4 merges onto those instead"
    return said


def prompts(source: str, opened: Opened) -> list[list[int]]:
    """A few samples of the run, held out if it held any, if its data is still there; and a few plain texts."""
    chat = open_chat(source, opened, as_trained=True)
    ids = [chat.tokenizer.encode(text).ids for text in PLAIN_TEXTS]
    if is_run(source):
        config = load_config(Path(source) / "config.json")
        with suppress(UserError):
            corpus = open_corpus(config.data, config.model.max_seq_length, config.system.seed, chat, print)
            samples = corpus.validation if len(corpus.validation) else corpus.training
            ids += [sample.ids.tolist() for sample in samples[:PROMPTS]]
    return [row for row in ids if row]  # beyond PLAIN_TEXTS: the run's own


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
