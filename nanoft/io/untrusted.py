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
import math
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
MAX_NODES = 10_000  # values of a YAML text with all aliases expanded
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
    """Plain data; 1e-4 and -.5 are numbers too, as in YAML 1.2."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+\.?\d*)[eE][-+]?\d+$|[-+]\.\d+$"), list("-+.0123456789")
)


def read_bytes(path: Path, limit: int = MAX_JSON, confined: bool = True) -> bytes:
    """The content of a plain file of at most `limit` bytes; if `confined`, a link must stay in its directory."""
    try:
        found = resolve_file(path) if confined else path
        if not found.is_file():  # a pipe would never end
            raise UserError(f"{path}: {'not a plain file' if found.exists() else 'no such file'}")
        with open(found, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise UserError(f"{path}: larger than {limit:,} bytes: is it the right file?")
    return content


def resolve_file(path: Path) -> Path:
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
    if not real.is_relative_to(home) and not real.is_relative_to(cache):
        raise UserError(f"{path}: a link that leads out of its directory, to {real}: replace it with a copy")
    if not real.is_file():
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
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique_names(pairs, text))
    except RecursionError:
        raise ValueError("nested too deeply") from None
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
            if node := yaml.compose(text[:MAX_YAML], YamlLoader):
                _measure(node, {})  # raises with both lines
        raise ValueError("a name appears twice in an object: remove one of the two")
    return table


def parse_yaml(text: str) -> Any:
    """A YAML value: plain data of bounded size and depth, aliases expanded; otherwise a ValueError.

    A name that occurs twice in a mapping, or a value with different meanings in YAML 1.1 and 1.2, is a ValueError too.
    """
    if len(text) > MAX_YAML:
        raise ValueError(f"longer than {MAX_YAML:,} characters")
    try:
        loader = YamlLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        size, height = _measure(node, {})
        if size > MAX_NODES or height > MAX_DEPTH:
            raise ValueError(f"more than {MAX_NODES:,} values, or nested more than {MAX_DEPTH} deep")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (LookupError, AttributeError, ArithmeticError, TypeError):  # from PyYAML for `!!int ''`, `!!timestamp x`
        raise ValueError("a value does not match its tag") from None


def _measure(node: yaml.Node, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Number of values and depth of a node with its aliases expanded; infinite if it contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf, math.inf
        items: list[Any] = node.value if isinstance(node.value, list) else []
        parts = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
        sizes = [_measure(part, known) for part in parts]
        known[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((height for _, height in sizes), default=0)
        if node.tag.endswith(":int") and len(node.value) > 100:
            raise ValueError(f"a number of {len(node.value):,} digits")
        _refuse_ambiguous(node)
    return known[id(node)]


def _refuse_ambiguous(node: yaml.Node) -> None:
    """Raise a ValueError for a name that a mapping has twice, or a value that YAML 1.1 and 1.2 read differently."""
    line, kind = node.start_mark.line, node.tag.rpartition(":")[2]
    if isinstance(node, yaml.MappingNode):
        names: dict[tuple[str, str], int] = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if (before := names.get((key.tag, key.value))) is not None:
                where, first = f"line {key.start_mark.line + 1}: {key.value!r:.60}", before + 1  # lines from 0
                raise ValueError(f"{where} appears a second time, after line {first}: remove one of the two")
            names[key.tag, key.value] = key.start_mark.line
    elif isinstance(node, yaml.ScalarNode) and node.style is None and kind in YAML_1_2:
        if YAML_1_2[kind].fullmatch(node.value):
            return
        found = "a date" if kind == "timestamp" else yaml.safe_load(node.value)
        meaning, fix = (found, "write") if kind == "timestamp" else (json.dumps(found), f"write {json.dumps(found)} or")
        if found != node.value:  # otherwise its tag was explicit
            text = f"{node.value} means {meaning} in YAML 1.1, but not in YAML 1.2"
            raise ValueError(f"line {line + 1}: {text}: {fix} '{node.value}'")


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
