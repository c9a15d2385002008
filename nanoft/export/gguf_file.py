"""The GGUF formats of merge.py: a model or an adapter as one verified file, with its Modelfile and parity file."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from nanoft import UserError
from nanoft.export.adapters import choose_adapter, is_lora_run, open_adapter, require_same_base
from nanoft.export.gguf import atomic_gguf, verify_gguf, write_gguf, write_gguf_lora
from nanoft.export.gguf_companions import modelfile, write_companions
from nanoft.export.model_card import parity_record
from nanoft.export.streaming import StreamedDecoder, open_rows
from nanoft.export.verify import describe_weights, held_out, proof_prompts
from nanoft.models.hub import find_model
from nanoft.models.open import LoadedModel, find_adapter, is_run, open_chat_tokenizer, open_model


def export_gguf(args: argparse.Namespace) -> list[str]:
    """A GGUF file of the merged model (or of a model without an adapter), or of the adapter; returns lines to print."""
    source, out = args.sources[0], Path(args.out)
    kind, default = ("model", "f16") if args.format == "gguf" else ("adapter", "f32")
    dtype, name = args.dtype or default, Path(source).resolve().name
    with atomic_gguf(out, f"{kind}-{dtype}.gguf") as path:
        opened = _open(args)
        chat = open_chat_tokenizer(source, opened, as_trained=True)
        samples, prompts = held_out(source, chat)
        if kind == "model":
            notes = write_gguf(opened, chat, name, dtype, args.base, path)
            proof = verify_gguf(opened, path, proof_prompts(chat, samples), dtype)
            effect = f" (the adapter itself changes logits by {proof.effect:.2g})" if opened.adapters else ""
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
        weights = describe_weights(opened, merged=kind == "model")
        write_companions(path, out, recipe, parity_record(opened.model, chat, prompts, args.parity_tokens, weights))
    return [said, *(f"note: {note}" for note in notes)]


def _open(args: argparse.Namespace) -> LoadedModel:
    """The adapter on its base, or a model without one; its weights stay on the disk unless it is a checkpoint."""
    source = args.sources[0]
    if find_adapter(source) is None and not is_lora_run(source):
        given = {"--only": args.only, "--weights": args.weights, "--base": args.base != "original"}
        if unused := [*(flag for flag, value in given.items() if value), *args.sources[1:]]:
            raise UserError(f"{unused[0]}: {source} has no adapter: remove it")
        result = Path(source) / "model" if is_run(source) else find_model(source, "RUN|MODEL")
        if not result.is_dir():
            return open_model(source, torch.device("cpu"), torch.float32)
        return LoadedModel(StreamedDecoder(open_rows(result)), {}, result, result)
    adapter, _ = choose_adapter(args.sources, args.weights, args.only, args.base, args.unmerge)
    opened = open_adapter(adapter, args.base)
    if not args.any_base:
        require_same_base(adapter)
    return opened
