"""Read a model's tokenizer from its directory, within bounds, because the files may come from anyone."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders

from nanoft import UserError
from nanoft.batches import Array
from nanoft.data.template_sandbox import CLOSING, MAX_SOURCE, OPENING
from nanoft.io.untrusted import read_bytes, read_json, refuse_code

# Noncharacters, as in template_sandbox: BREAK splits a control token in a text, PLACEHOLDER stands for an answer.
BREAK, PLACEHOLDER = "\ufdd0", "\ufdd3"
NONCHARACTERS = {OPENING, CLOSING, BREAK, PLACEHOLDER}
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
TEMPLATE_FILE = "chat_template.jinja"
MAX_TOKENIZER = 100 << 20  # bytes of a tokenizer.json; the largest ones have 33 MB
MAX_ID = 1 << 22  # of a token; the largest vocabularies have 2^18
MAX_SPECIAL = 20_000  # control tokens; every text is searched for each of them
MAX_GROWTH = 64  # factor by which a normalizer or decoder may lengthen a text


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read tokenizer.json; refuse one that would fill memory, run forever, or fail to encode a letter."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file: copy the model's tokenizer.json there")
    with as_user_error(f"{path}: not a valid tokenizer"):
        tokenizer = Tokenizer.from_buffer(read_bytes(path, MAX_TOKENIZER))
        tokenizer.no_truncation()  # a tokenizer.json may ask for both
        tokenizer.no_padding()
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ValueError("it has no tokens")
        if max(ids) >= MAX_ID:
            raise ValueError(f"a token has the id {max(ids):,}")
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        if len(special) > MAX_SPECIAL:
            raise ValueError(f"{len(special):,} control tokens: at most {MAX_SPECIAL:,} are allowed")
        if reserved := [text for text in special if NONCHARACTERS & set(text)]:
            raise ValueError(f"the control token {reserved[0]!r:.60} contains a reserved Unicode noncharacter")
        for part in (tokenizer.normalizer, tokenizer.decoder):
            if part is not None and _growth(json.loads(part.__getstate__())) > MAX_GROWTH:
                raise ValueError(f"its {type(part).__name__} can make a text more than {MAX_GROWTH} times longer")
        tokenizer.encode("a 1", add_special_tokens=True)
    return tokenizer


def add_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[int, ...]:
    """Make each text a control token, appended to the vocabulary if it is new; return their ids."""
    for text in texts:
        if not text.strip() or NONCHARACTERS & set(text) or texts.count(text) > 1:
            raise UserError(f"model.add_tokens: {text!r:.60} cannot be a token: give distinct visible texts")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    return tuple(number for text in texts if (number := tokenizer.token_to_id(text)) is not None)


def read_settings(directory: Path) -> tuple[dict[str, str], dict[str, str], list[int]]:
    """The special tokens, the chat templates by name (`default`, `tool_use`, ...), and the stop ids.

    A token is a string, or an object with its content. Templates are in separate files or in the settings: one, or a
    list of named ones.
    """
    path = directory / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    refuse_code(settings, f"{path}: ")
    special: dict[str, str] = {}
    for key in SPECIAL_TOKENS:
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            special[key] = text
        elif text is not None:
            raise UserError(f"{path}: {key}: expected a string, found {token!r:.60}")
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    files = {"default": directory / TEMPLATE_FILE, **{file.stem: file for file in more}}
    templates: dict[str, Any] = {name: read_template(file) for name, file in files.items() if file.is_file()}
    stored = settings.get("chat_template") if not templates else None
    if isinstance(stored, list):
        templates = {str(t.get("name")): t["template"] for t in stored if isinstance(t, dict) and "template" in t}
        templates = {"default": next(iter(templates.values()), stored), **templates}  # a list without one is refused
    elif stored is not None:
        templates = {"default": stored}
    if odd := [template for template in templates.values() if not isinstance(template, str)]:
        raise UserError(f"{path}: chat_template: expected a string, found {odd[0]!r:.60}")
    path = directory / "generation_config.json"
    stops = (read_json(path) if path.is_file() else {}).get("eos_token_id") or []
    stops = stops if isinstance(stops, list) else [stops]
    if not all(type(stop) is int and 0 <= stop < MAX_ID for stop in stops):
        raise UserError(f"{path}: eos_token_id: expected token ids, found {stops!r:.60}")
    return special, templates, stops


def read_template(file: Path) -> str:
    try:
        return read_bytes(file, 4 * MAX_SOURCE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text: {error}") from None


@contextlib.contextmanager
def as_user_error(message: str) -> Iterator[None]:
    """Turn errors of the tokenizers library into a UserError: a bare Exception, or a panic (a BaseException)."""
    try:
        yield
    except BaseException as error:
        is_foreign = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, UserError) or not is_foreign:
            raise
        raise UserError(f"{message}: {error}") from None


def byte_widths(tokenizer: Tokenizer) -> Array | None:
    """(vocabulary,) the number of bytes of text that each token stands for; None if the tokens do not tell.

    A byte-level BPE (GPT-2, Llama 3) writes each byte as one character and changes nothing, so the offsets of its
    tokens follow from their widths. Tracking offsets in the library makes encoding a third slower.
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


def _growth(part: dict[str, Any]) -> float:  # the factor by which a normalizer or decoder may lengthen a text
    if part["type"] == "Replace":
        taken = len(part["pattern"].get("String", ""))  # a regular expression or an empty string may match nothing
        return max(1, len(part["content"]) / taken if taken else 1 + len(part["content"]))
    if part["type"] == "Prepend":
        return 1 + len(part["prepend"])
    return math.prod(map(_growth, part.get("normalizers") or part.get("decoders") or []))
