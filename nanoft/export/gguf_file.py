"""The GGUF formats of merge.py: a verified file, with a Modelfile for Ollama and prompts with expected answers.

Ollama does not read the chat template in a GGUF file; it has a template language of its own (Go's). A template that
only puts fixed texts around messages is translated; for any other, the Modelfile says that prompts must be sent raw.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer, Message, TemplateRefusal
from nanoft.export.gguf import perplexity_in_llama_cpp, verify_gguf, write_gguf, write_gguf_lora
from nanoft.export.merge import choose_adapter, is_lora_run, open_adapter, require_same_base
from nanoft.export.model_card import model_card, parity_record
from nanoft.export.streaming import StreamedDecoder, open_rows
from nanoft.export.verify import describe_weights, held_out, proof_prompts
from nanoft.io.atomic import new_directory, require_new, write_file, write_json
from nanoft.models.model_files import find_model
from nanoft.models.open import LoadedModel, find_adapter, is_run, open_chat_tokenizer, open_model


def export_gguf(args: argparse.Namespace) -> list[str]:
    """A GGUF file of the merged model (or of a model without an adapter), or of the adapter; returns lines to print."""
    source, out = args.sources[0], Path(args.out)
    kind, default = ("model", "f16") if args.format == "gguf" else ("adapter", "f32")
    dtype, name = args.dtype or default, Path(source).resolve().name
    with atomic_gguf(out, f"{kind}-{dtype}.gguf") as path:
        opened = _open(args)
        if opened.model.config.has_score:
            raise UserError(f"--format {args.format}: {source} is a reward model, for --format hf or peft: use one")
        chat = open_chat_tokenizer(source, opened, as_trained=True)
        samples, prompts = held_out(source, chat)
        if kind == "model":
            notes = write_gguf(opened, chat, name, dtype, args.base, path)
            proof = verify_gguf(opened, path, proof_prompts(chat, samples), dtype)
            said = f"read back and compared: {proof}"
            if not proof.holds:
                raise UserError(f"{out}: {said}: try --dtype f32; nothing was kept")
            measured, facts = perplexity_in_llama_cpp(opened, path, samples)
            recipe, notes = modelfile(path.name, chat), [measured, *(f"note: {note}" for note in notes)]
        else:
            write_gguf_lora(opened, name, dtype, path)
            facts, notes, said = {}, [], f"the adapter as GGUF, for a GGUF file of {opened.base_directory}"
            recipe = modelfile(path.name, chat, str(opened.base_directory))
        weights = describe_weights(opened, merged=kind == "model")
        card_path, recipe_path, parity_path = companions(path, out)
        card = model_card(args.format, opened, source, [said, *notes], file=path.name, recipe=recipe_path.name)
        write_file(card_path, [card.encode()])
        write_file(recipe_path, [recipe.encode()])
        parity = parity_record(opened.model, chat, prompts, args.parity_tokens, weights)
        write_json(parity_path, parity | facts)
    return [f"{out}: {said}", *notes]


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
    adapter, _ = choose_adapter(args)
    opened = open_adapter(adapter, args.base)
    if not args.any_base:
        require_same_base(adapter)
    return opened


# ---- The file and its companions


@contextmanager
def atomic_gguf(out: Path, name: str) -> Iterator[Path]:
    """Yield where to write a GGUF file: it and its companions get their names together at the end, or are deleted.

    `out` is FILE.gguf, next to which FILE.Modelfile and FILE.parity.json will be; or a directory for the file `name`.
    """
    if out.suffix != ".gguf":
        with new_directory(out) as staging:
            yield staging / name
        return
    places = [*companions(out, out), out]
    for each in places:
        require_new(each)

    def place(staging: Path, _: Path) -> None:
        for path in places:
            os.rename(staging / path.name, path)

    with new_directory(out, place=place) as staging:
        yield staging / out.name


def companions(path: Path, out: Path) -> list[Path]:
    """Paths of model card, Modelfile and parity file, with the GGUF file's name unless it has its own directory."""
    prefix = f"{path.stem}." if out.suffix == ".gguf" else ""
    return [path.with_name(f"{prefix}{name}") for name in ("README.md", "Modelfile", "parity.json")]


def modelfile(file: str, chat: ChatTokenizer, adapter_of: str | None = None) -> str:
    """A Modelfile for Ollama: weights, stop strings, chat template; adapter_of: the base's name of an adapter file."""
    lines = ["# ollama create NAME -f THIS_FILE"]
    if adapter_of is None:
        lines.append(f"FROM ./{file}")
    else:
        lines += [f"# The base as GGUF: {adapter_of}", "FROM ./base.gguf", f"ADAPTER ./{file}"]
    stops = [text for number in chat.stop_ids if (text := chat.tokenizer.id_to_token(number))]
    lines += [f'PARAMETER stop """{text}"""' if '"' in text else f'PARAMETER stop "{text}"' for text in stops]
    if template := ollama_template(chat):
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# Ollama cannot express this model's chat template. The GGUF file has it, for llama.cpp;")
        lines.append('# send rendered prompts to Ollama, with "raw": true.')
    return "\n".join(lines) + "\n"


def ollama_template(chat: ChatTokenizer) -> str | None:
    """The chat template as a Go template; None if it does more than put fixed texts around messages.

    These are found by rendering short conversations and verified by rendering a longer one.
    """
    system, *turns = (
        {"role": role, "content": f"{role.upper()}-{number}"}
        for number, role in enumerate(["system", "user", "assistant", "user", "assistant", "user"])
    )
    try:
        opening, asked = _gaps(chat, turns[:1])
        said = _gaps(chat, turns[:2])[-1]
        later = _gaps(chat, turns[:3])[2].removeprefix(said)
        if _gaps(chat, turns) != [opening, asked, said + later, asked, said + later, asked]:
            return None
    except (TemplateRefusal, ValueError):
        return None
    bos = chat.special["bos_token"] if chat.wants_bos else ""  # Ollama adds it itself
    opening = opening.removeprefix(bos)
    branches = f"{{{{ if eq $i 0 }}}}{_go(opening)}{{{{ else }}}}{_go(later)}{{{{ end }}}}"
    before = after = ""
    with suppress(TemplateRefusal, ValueError):  # many templates have no system message
        before, after, *rest = _gaps(chat, [system, *turns])
        if rest != [asked, said + later, asked, said + later, asked]:
            return None
        second = '{{ else if and (eq $i 1) (eq (index $.Messages 0).Role "system") }}'
        branches = branches.replace("{{ else }}", f"{second}{{{{ else }}}}")
    return (
        f'{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "system" }}}}{_go(before.removeprefix(bos))}'
        f'{{{{ .Content }}}}{_go(after)}{{{{ else if eq .Role "user" }}}}{branches}{{{{ .Content }}}}{_go(asked)}'
        f"{{{{ else }}}}{{{{ .Content }}}}{_go(said)}{{{{ end }}}}{{{{ end }}}}"
    )


def _gaps(chat: ChatTokenizer, messages: Sequence[Message]) -> list[str]:
    """The texts around messages, the last with the generation prompt; a ValueError if a message is changed."""
    rest, gaps = chat.render(messages, add_generation_prompt=messages[-1]["role"] == "user"), []
    for message in messages:
        before, found, rest = rest.partition(message["content"])
        if not found:
            raise ValueError
        gaps.append(before)
    return [*gaps, rest]


def _go(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
