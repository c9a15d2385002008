"""Tests of nanoft/export/gguf.py: the file and its companions."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from templates import STYLES, save

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.export.gguf import atomic_gguf, companions, modelfile


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


def test_a_modelfile_names_the_file_the_stops_and_the_adapter(tmp_path: Path) -> None:
    chat = ChatTokenizer.from_directory(save(tmp_path, STYLES["llama"]))
    lines = modelfile("m.gguf", chat).splitlines()
    assert lines[1:3] == ["FROM ./m.gguf", 'PARAMETER stop "<|eot_id|>"']
    assert '"raw": true' in lines[4]
    adapter = modelfile("a.gguf", chat, "meta-llama/Some-Model").splitlines()
    assert adapter[1:4] == ["# The base as GGUF: meta-llama/Some-Model", "FROM ./base.gguf", "ADAPTER ./a.gguf"]
