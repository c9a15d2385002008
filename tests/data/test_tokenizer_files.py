"""Tests of nanoft/data/tokenizer_files.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from nanoft import UserError
from nanoft.data.tokenizer_files import byte_widths, read_settings, read_tokenizer


def write(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_the_template_may_be_a_file_a_setting_or_one_of_several(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == ({}, {}, [])
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    only = {"default": "b", "tool_use": "b"}
    for setting, expected in (("a", {"default": "a"}), (named, {**only, "default": "a"}), (named[:1], only)):
        write(tmp_path, tokenizer_config={"chat_template": setting}, generation_config={"eos_token_id": 7})
        assert read_settings(tmp_path)[1:] == (expected, [7])
    (tmp_path / "chat_template.jinja").write_text("of its own file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("c")
    assert read_settings(tmp_path)[1] == {"default": "of its own file", "rag": "c"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config": {"chat_template": 3}},
            "chat_template: expected a string, found 3",
        ),
        ({"tokenizer_config": {"bos_token": 1}}, "tokenizer_config.json: bos_token: expected a string, found 1"),
        ({"generation_config": {"eos_token_id": ["a"]}}, "generation_config.json: eos_token_id: expected token ids"),
        ({"generation_config": {"eos_token_id": [True]}}, "generation_config.json: eos_token_id: expected token ids"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(write(tmp_path, **files))


def test_a_model_needs_its_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.json: no such file"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: not a valid tokenizer"):
        read_tokenizer(tmp_path)
    Tokenizer(models.BPE({}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer.json: not a valid tokenizer: it has no tokens"):
        read_tokenizer(tmp_path)


def test_byte_widths_are_the_bytes_of_each_token() -> None:
    """A byte-level BPE decodes any ids to so many bytes; with a normalizer only the library knows."""
    spellings = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {spelling: number for number, spelling in enumerate([*spellings, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>é"])
    widths = byte_widths(tokenizer)
    assert widths is not None
    text = "abab cé 漢"
    ids = tokenizer.encode(text).ids
    assert widths[np.array(ids)].sum() == len(text.encode())
    assert widths[tokenizer.token_to_id("<s>é")] == len("<s>é".encode())
    tokenizer.normalizer = normalizers.Lowercase()
    assert byte_widths(tokenizer) is None
