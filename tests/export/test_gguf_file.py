"""Tests of nanoft/export/gguf.py: the file and its companions."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from templates import STYLES, save

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.export.gguf import atomic_gguf, companions, modelfile, ollama_template


def test_the_file_and_its_companions_get_their_names_together(tmp_path: Path) -> None:
    out = tmp_path / "some" / "m.gguf"
    with atomic_gguf(out, "unused") as path:
        path.write_text("weights")
        for companion in companions(path, out):
            companion.write_text("beside")
        assert not out.exists()
    assert {p.name for p in out.parent.iterdir()} == {"m.gguf", "m.README.md", "m.Modelfile", "m.parity.json"}
    for name in ("m.gguf", "m.Modelfile"):
        other = out.with_name(name.replace("m.", "n."))
        other.write_text("mine")
        with pytest.raises(UserError, match="already exists"), atomic_gguf(out.with_name("n.gguf"), "unused"):
            pass
        assert other.read_text() == "mine"
        other.unlink()
    with suppress(RuntimeError), atomic_gguf(out.with_name("n.gguf"), "unused") as path:
        path.write_text("half")
        raise RuntimeError
    killed = "import os; from nanoft.export.gguf import *; "
    killed += "writing = atomic_gguf(Path('n.gguf'), ''); writing.__enter__().touch(); os._exit(9)"
    subprocess.run([sys.executable, "-c", killed], cwd=out.parent, check=False)
    assert any(path.name.startswith(".tmp-n") for path in out.parent.iterdir())
    with suppress(RuntimeError), atomic_gguf(out.with_name("n.gguf"), "unused"):  # the next one sweeps up
        raise RuntimeError
    with atomic_gguf(tmp_path / "dir", "model.gguf") as path:
        path.write_text("weights")
        for companion in companions(path, tmp_path / "dir"):
            companion.write_text("beside")
    assert {p.name for p in (tmp_path / "dir").iterdir()} == {"model.gguf", "README.md", "Modelfile", "parity.json"}
    assert {p.name for p in out.parent.iterdir()} == {"m.gguf", "m.README.md", "m.Modelfile", "m.parity.json"}


def as_ollama_renders(template: str, messages: list[dict[str, str]]) -> str:
    """The few actions of Go's templates that are used: texts, .Content, and which message it is."""
    pieces = template.removeprefix("{{ range $i, $_ := .Messages }}").removesuffix("{{ end }}")
    text = ""
    for number, message in enumerate(messages):
        taken, skipping = [], []  # of each open if: whether a branch was taken; whether this one is skipped
        for action in pieces.replace("}}{{", "}}\0{{").split("\0"):
            inside = action[3:-3]
            _, _, condition = inside.partition("if ")
            holds = {
                'eq .Role "system"': message["role"] == "system",
                'eq .Role "user"': message["role"] == "user",
                "eq $i 0": number == 0,
                'and (eq $i 1) (eq (index $.Messages 0).Role "system")': number == 1
                and messages[0]["role"] == "system",
            }.get(condition, True)
            if inside.startswith("if "):
                taken.append(holds)
                skipping.append(not holds)
            elif inside.startswith("else"):
                skipping[-1] = taken[-1] or not holds
                taken[-1] = taken[-1] or holds
            elif inside == "end":
                taken.pop()
                skipping.pop()
            elif not any(skipping):
                text += message["content"] if inside == ".Content" else json.loads(inside)
    return text


@pytest.mark.parametrize("style", STYLES)
def test_ollamas_template_renders_as_the_models_own(style: str, tmp_path: Path) -> None:
    chat = ChatTokenizer.from_directory(save(tmp_path, STYLES[style]))
    template = ollama_template(chat)
    if style == "mistral":  # it moves the system text to the last question
        assert template is None
        assert "Ollama cannot express this model's chat template" in modelfile("m.gguf", chat)
        return
    assert template is not None
    turns = [{"role": role, "content": f"{role} says {n}"} for n in range(3) for role in ("user", "assistant")]
    talks = [turns[:1], turns[:3], turns[:5]]
    if style != "llama":
        talks += [[{"role": "system", "content": 'Be "brief".'}, *talk] for talk in talks]
    bos = chat.special["bos_token"] if chat.wants_bos else ""
    for talk in talks:
        assert as_ollama_renders(template, talk) == chat.render_prompt(talk).removeprefix(bos)


def test_a_modelfile_names_the_file_the_stops_and_the_adapter(tmp_path: Path) -> None:
    chat = ChatTokenizer.from_directory(save(tmp_path, STYLES["llama"]))
    lines = modelfile("m.gguf", chat).splitlines()
    assert lines[1:3] == ["FROM ./m.gguf", 'PARAMETER stop "<|eot_id|>"']
    assert lines[3].startswith('TEMPLATE """{{ range')
    adapter = modelfile("a.gguf", chat, "meta-llama/Some-Model").splitlines()
    assert adapter[1:4] == ["# The base as GGUF: meta-llama/Some-Model", "FROM ./base.gguf", "ADAPTER ./a.gguf"]
