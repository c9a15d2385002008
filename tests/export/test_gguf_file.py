"""Tests of nanoft/export/gguf.py: the Modelfile."""

from __future__ import annotations

from pathlib import Path

from templates import STYLES, save

from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.export.gguf import modelfile


def test_a_modelfile_names_the_file_the_stops_and_the_adapter(tmp_path: Path) -> None:
    chat = ChatTokenizer(save(tmp_path, STYLES["llama"]))
    lines = modelfile("m.gguf", chat).splitlines()
    assert lines[1:3] == ["FROM ./m.gguf", 'PARAMETER stop "<|eot_id|>"']
    assert '"raw": true' in lines[4]
    adapter = modelfile("a.gguf", chat, "meta-llama/Some-Model").splitlines()
    assert adapter[1:4] == ["# The base as GGUF: meta-llama/Some-Model", "FROM ./base.gguf", "ADAPTER ./a.gguf"]
