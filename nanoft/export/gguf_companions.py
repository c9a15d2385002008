"""The files next to a GGUF file: a Modelfile for Ollama, and prompts with expected answers for checking an engine.

Ollama does not read the chat template in a GGUF file; it has a template language of its own (Go's). A template that
only puts fixed texts around messages is translated; for any other, the Modelfile says that prompts must be sent raw.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanoft.data.chat_tokenizer import ChatTokenizer, Message, TemplateRefusal
from nanoft.io.atomic import write_file, write_json


def companions(path: Path, out: Path) -> list[Path]:
    """Paths of the Modelfile and the parity file, with the GGUF file's name unless it has its own directory."""
    prefix = f"{path.stem}." if out.suffix == ".gguf" else ""
    return [path.with_name(f"{prefix}{name}") for name in ("Modelfile", "parity.json")]


def write_companions(path: Path, out: Path, modelfile: str, expected: dict[str, Any]) -> None:
    """Write the Modelfile and the parity file of a GGUF file at `path`, which will become `out` or be in it."""
    recipe, parity = companions(path, out)
    write_file(recipe, [modelfile.encode()])
    write_json(parity, expected)


def modelfile(file: str, chat: ChatTokenizer, adapter_of: str | None = None) -> str:
    """A Modelfile for Ollama: weights, stop strings, chat template; adapter_of: the base's name of an adapter file."""
    lines = ["# ollama create NAME -f THIS_FILE"]
    if adapter_of is None:
        lines.append(f"FROM ./{file}")
    else:
        lines += [f"# The base as GGUF: {adapter_of}", "FROM ./base.gguf", f"ADAPTER ./{file}"]
    stops = [text for number in chat.stop_ids if (text := chat.tokenizer.id_to_token(number))]
    lines += [f"PARAMETER stop {_quoted(text)}" for text in stops]
    if template := ollama_template(chat):
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines += [
            "# Ollama cannot express this model's chat template. The GGUF file has it, for llama.cpp;",
            '# send rendered prompts to Ollama, with "raw": true.',
        ]
    return "\n".join(lines) + "\n"


def ollama_template(chat: ChatTokenizer) -> str | None:
    """The chat template as a Go template; None if it does more than put fixed texts around messages.

    The fixed texts are found by rendering short conversations and verified by rendering a longer one.
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
    opening = _without_bos(chat, opening)
    branches = f"{{{{ if eq $i 0 }}}}{_go(opening)}{{{{ else }}}}{_go(later)}{{{{ end }}}}"
    before = after = ""
    with suppress(TemplateRefusal, ValueError):  # many templates have no system message
        before, after, *rest = _gaps(chat, [system, *turns])
        if rest != [asked, said + later, asked, said + later, asked]:
            return None
        second = '{{ else if and (eq $i 1) (eq (index $.Messages 0).Role "system") }}'
        branches = branches.replace("{{ else }}", f"{second}{{{{ else }}}}")
    return (
        f'{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "system" }}}}{_go(_without_bos(chat, before))}'
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


def _without_bos(chat: ChatTokenizer, text: str) -> str:
    """Ollama adds the BOS itself."""
    return text.removeprefix(chat.special["bos_token"]) if chat.wants_bos else text


def _go(text: str) -> str:
    """A string literal in a Go template."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _quoted(text: str) -> str:
    return f'"""{text}"""' if '"' in text else f'"{text}"'
