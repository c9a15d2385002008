"""Bounded readers for files of unknown origin, and redaction of secrets in output.

A model, an adapter, a data set or a run directory may come from anyone. Its JSON may be nested 100,000 levels deep or
be a pipe that never ends, its YAML may expand until memory is full, its files may be links to a key in the home
directory, and its regular expressions may run forever. So every small file is read here, within bounds, and access
tokens and control characters are removed from output (errors, logs, reports).
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from nanoft import UserError

MAX_JSON = 16 << 20  # bytes; an index of 90,000 tensors has 9 MB. Python objects take at most 25 times as much
MAX_YAML = 100_000  # characters, for which PyYAML takes a second
MAX_DEPTH = 64  # of nested lists and objects
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # environment variables
# Plain values that mean the same in YAML 1.1, which PyYAML reads, and in YAML 1.2 (section 10.3.2; dates are text).
YAML_1_2 = {
    "bool": re.compile("true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?(0|[1-9]\d*)|0x[\da-fA-F]+"),
    "float": re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    "timestamp": re.compile("(?!)"),
}
# Tokens of Hugging Face and W&B, credentials in a URL (user:password@), and a URL's token parameter.
TOKEN = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}|\bwandb_v\d+_\w{20,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)|(?<=[?&]token=)[^&\s]+"
)


class YamlLoader(yaml.SafeLoader):
    """Plain data without aliases or names that appear twice; 1e-4 and -.5 are numbers too, as in YAML 1.2."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few of them can expand a short text until memory is full
            event = self.peek_event()
            line, fix = event.start_mark.line + 1, "write the value again, or put it into a file named by base"
            raise ValueError(f"line {line}: *{event.anchor}: aliases are not supported: {fix}")
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        kind = node.tag.rpartition(":")[2]
        if kind == "int" and len(node.value) > 100:  # Python refuses to print a number of more than 4,300 digits
            raise ValueError(f"line {node.start_mark.line + 1}: a number of {len(node.value):,} digits")
        common = YAML_1_2.get(kind)
        if node.style is None and common is not None and not common.fullmatch(node.value):
            line, fix = node.start_mark.line + 1, "quote it, or write true, false or a decimal number"
            raise ValueError(f"line {line}: {node.value} has different meanings in YAML 1.1 and 1.2: {fix}")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, lines = super().compose_mapping_node(anchor), dict[tuple[str, str], int]()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            line, name = key.start_mark.line + 1, (key.tag, key.value)  # lines count from 0
            if name in lines:
                text = f"line {line}: {key.value!r:.60} appears a second time, after line {lines[name]}"
                raise ValueError(f"{text}: remove one of the two")
            lines[name] = line
        return node


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+\.?\d*)[eE][-+]?\d+$|[-+]\.\d+$"), list("-+.0123456789")
)


def read_bytes(path: Path, limit: int = MAX_JSON, confined: bool = True) -> bytes:
    """The content of a plain file of at most `limit` bytes; if `confined`, a link must stay in its directory."""
    try:
        with open(resolve_file(path, confined), "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise UserError(f"{path}: larger than {limit:,} bytes: is it the right file?")
    return content


def resolve_file(path: Path, confined: bool = True) -> Path:
    """Resolve links, which must stay in the file's directory: others could expose any file that the user may read.

    In the Hub's cache, models--x--y/snapshots/<revision>/<file> is a link into models--x--y/blobs.
    """
    try:
        real, home = path.resolve(strict=True), path.parent.resolve()
    except FileNotFoundError:
        link = f": a link to {os.readlink(path)}, which is missing: copy it again" if path.is_symlink() else ""
        raise UserError(f"{path}: no such file{link}") from None
    except (OSError, ValueError, RuntimeError) as error:  # name too long, a zero byte in it, circular links
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if confined and not real.is_relative_to(home) and not real.is_relative_to(cache):
        raise UserError(f"{path}: a link that leads out of its directory, to {real}: replace it with a copy")
    if not real.is_file():  # a pipe would never end
        raise UserError(f"{path}: not a plain file")
    return real


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a UserError."""
    try:
        value = parse_json(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {value!r:.40}")
    return value


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is none, or a damaged one."""
    try:
        return read_json(path)
    except UserError:
        return {}


def refuse_code(config: dict[str, Any], where: str = "") -> None:
    """Raise a UserError if a config.json or tokenizer_config.json refers to Python code of its model."""
    for name in ("auto_map", "trust_remote_code", "custom_pipelines"):
        if config.get(name):
            what = "this model brings Python code of its own, which nanoft never runs: if not needed, remove the field"
            raise UserError(f"{where}{name}: {config[name]!r:.100}: {what}")


def decode_text(content: bytes) -> str:
    """UTF-8, with or without a byte-order mark; a ValueError for anything else."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("the file is UTF-16: save it as UTF-8")
    return content.decode("utf-8-sig")


def parse_json(content: bytes) -> Any:
    """A JSON value of bounded depth in which no object has a name twice, or a ValueError."""
    text = decode_text(content)
    try:
        return _shallow(json.loads(text, object_pairs_hook=lambda pairs: _unique_names(pairs, text)))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _shallow(value: Any) -> Any:
    """The value; a ValueError if it is nested more than `MAX_DEPTH` deep."""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        parts = (part for item in level for part in (item.values() if isinstance(item, dict) else item))
        level = [part for part in parts if isinstance(part, (dict, list))]
    if level:
        raise ValueError("nested too deeply")
    return value


def _unique_names(pairs: list[tuple[str, Any]], text: str) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        with contextlib.suppress(yaml.YAMLError):  # JSON is YAML, except for some escapes; YAML nodes know their lines
            yaml.compose(text[:MAX_YAML], YamlLoader)  # raises with both lines
        raise ValueError("a name appears twice in an object: remove one of the two")
    return table


def parse_yaml(text: str) -> Any:
    """A YAML value: plain data of bounded size and depth; a ValueError for anything else (see `YamlLoader`)."""
    if len(text) > MAX_YAML:
        raise ValueError(f"longer than {MAX_YAML:,} characters")
    try:
        return _shallow(yaml.load(text, YamlLoader))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (LookupError, AttributeError, ArithmeticError, TypeError):  # from PyYAML for `!!int ''`, `!!timestamp x`
        raise ValueError("a value does not match its tag") from None


class Alarm(BaseException):
    """The time limit; not an Exception, so that code that catches exceptions cannot swallow it."""


def can_interrupt() -> bool:
    return hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Interrupt the block, even a regular expression, with a UserError, where that is possible; 0: no limit."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Alarm

    if not seconds or not can_interrupt():
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Alarm:
        raise UserError(f"{what}: takes longer than {seconds:g} seconds: simplify it") from None
    finally:
        signal.signal(signal.SIGALRM, previous)


def redact(text: str) -> str:
    """Replace access tokens, those in the environment and those of a known form, with ***."""
    for name in SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= 12:  # a shorter value is a placeholder, which may be an ordinary word
            text = text.replace(value, "***")
    return TOKEN.sub("***", text)


def one_line(error: object) -> str:
    """An error as one line for the terminal: redacted, without control characters, of bounded length."""
    text = redact(" ".join(str(error).split()))
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:2000])
    return shown + (" ..." if len(text) > 2000 else "")
