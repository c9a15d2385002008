"""Reading a model's tokenizer from its directory, within bounds: the files may come from anyone."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders

from nanoft import UserError
from nanoft.batches import Array
from nanoft.data.template_sandbox import CLOSING, MAX_SOURCE, OPENING
from nanoft.io.untrusted import read_bytes, read_json, refuse_code

# Noncharacters, as in template_sandbox: one splits a control token that a user wrote, one stands for an answer.
BREAK, PLACEHOLDER = "\ufdd0", "\ufdd3"
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
MAX_TOKENIZER = 100 << 20  # bytes of a tokenizer.json; the largest in use have 33 MB
MAX_ID = 1 << 22  # of a token; the largest vocabularies have 2^18
MAX_SPECIAL = 20_000  # control tokens; each is searched for in every text
MAX_GROWTH = 64  # factor by which a normalizer or decoder may lengthen a text


def read_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file: a model needs its tokenizer.json")
    with as_user_error(f"{path}: not a valid tokenizer"):
        tokenizer = Tokenizer.from_buffer(read_bytes(path, MAX_TOKENIZER))
        tokenizer.no_truncation()  # a tokenizer.json may ask for both
        tokenizer.no_padding()
        _check(tokenizer)
    return tokenizer


def read_config(directory: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, if there is one, and check its special tokens."""
    path = directory / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    try:
        refuse_code(settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for key in SPECIAL_TOKENS:
        if not isinstance(token_text(settings.get(key)), str | None):
            raise UserError(f"{path}: {key}: expected a string, found {settings[key]!r:.60}")
    return settings


def read_stop_ids(directory: Path) -> list[int]:
    """The eos_token_id of generation_config.json: none, one or several."""
    path = directory / "generation_config.json"
    stops = (read_json(path) if path.is_file() else {}).get("eos_token_id") or []
    stops = stops if isinstance(stops, list) else [stops]
    if not all(type(stop) is int and 0 <= stop < MAX_ID for stop in stops):
        raise UserError(f"{path}: eos_token_id: expected ids, found {stops!r:.60}")
    return stops


def read_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, or that of tokenizer_config.json, which may be a list of named ones."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return read_bytes(file, 4 * MAX_SOURCE).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {str(t.get("name")): t["template"] for t in template if isinstance(t, dict) and "template" in t}
        template = named.get("default", next(iter(named.values()), template))
    if not isinstance(template, str | None):
        path = directory / "tokenizer_config.json"
        raise UserError(f"{path}: chat_template: expected a string, found {template!r:.60}")
    return template


def token_text(value: Any) -> str | None:
    """A special token is a string, or an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


@contextlib.contextmanager
def as_user_error(message: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into a UserError: a bare Exception, or a panic, a BaseException."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{message}: {error}") from None


def byte_widths(tokenizer: Tokenizer) -> Array | None:
    """(vocabulary,) the bytes of text that each token stands for; None if only the tokenizer knows.

    A byte-level BPE (GPT-2, Llama 3) spells each byte with one character and changes nothing, so the offsets of its
    tokens follow from their widths; having the library track them makes it a third slower.
    """
    changes = tokenizer.normalizer is not None or not isinstance(tokenizer.decoder, decoders.ByteLevel)
    added = tokenizer.get_added_tokens_decoder()
    strips = any(token.lstrip or token.rstrip for token in added.values())
    if changes or strips or "add_prefix_space=True" in str(tokenizer.pre_tokenizer):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    widths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, number in vocabulary.items():
        widths[number] = len(added[number].content.encode()) if number in added else len(token)
    return widths


def _check(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that would fill the memory or never end, or that cannot encode a letter."""
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= MAX_ID:
        raise ValueError(f"a token has the id {largest:,}")
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    if len(special) > MAX_SPECIAL:
        raise ValueError(f"{len(special):,} control tokens: at most {MAX_SPECIAL:,} are allowed")
    if reserved := [text for text in special if {OPENING, CLOSING, BREAK, PLACEHOLDER} & set(text)]:
        raise ValueError(f"the control token {reserved[0]!r:.60} contains a reserved Unicode noncharacter")
    for part in (tokenizer.normalizer, tokenizer.decoder):
        if part is not None and _growth(json.loads(part.__getstate__())) > MAX_GROWTH:
            raise ValueError(f"its {type(part).__name__} makes a text more than {MAX_GROWTH} times as long")
    tokenizer.encode("a 1", add_special_tokens=True)


def _growth(part: dict[str, Any]) -> float:
    """The factor by which a normalizer or decoder may lengthen a text."""
    if part["type"] == "Replace":
        taken = len(part["pattern"].get("String", ""))  # a regular expression, or an empty string, may remove nothing
        return max(1, len(part["content"]) / taken if taken else 1 + len(part["content"]))
    if part["type"] == "Prepend":
        return 1 + len(part["prepend"])
    if part["type"] == "Precompiled":  # 4 bytes: the size of a look-up table; the table; zero-terminated strings
        chart = base64.b64decode(part["precompiled_charsmap"])
        return max(map(len, chart[4 + int.from_bytes(chart[:4], "little") :].split(b"\0")))
    return math.prod(map(_growth, part.get("normalizers") or part.get("decoders") or []))
