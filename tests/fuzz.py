"""Random inputs to every reader: what is valid is read, and everything else is refused in one line.

In the ordinary tests each target gets a few hundred inputs (test_hostile.py). For longer, with other inputs every time:

    python tests/fuzz.py --minutes 10

It prints how many inputs each target had, and ends at the first one that a target does not stand.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from nanoft import UserError
from nanoft.config import Config, DataConfig
from nanoft.config.loading import load_config
from nanoft.config.settings import SECTION_TYPES
from nanoft.data.formats import read_file
from nanoft.data.sources import read_raw
from nanoft.data.template_sandbox import COMPILE_ERRORS, TEMPLATE_ERRORS, BoundedEnvironment
from nanoft.io.tensor_files import SAFETENSORS_DTYPES, read_header
from nanoft.io.untrusted import one_line, parse_json, parse_yaml

PLACE = Path(tempfile.mkdtemp(prefix="nanoft-fuzz-"))
FIELDS = [f"{section}.{name}" for section, kind in SECTION_TYPES.items() for name in kind.__dataclass_fields__]

numbers = st.one_of(st.integers(-3, 40), st.integers(), st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30, 10**400]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=12)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def check_refusal(error: UserError, where: object) -> None:
    """One line that says where."""
    said = one_line(error)
    assert str(where) in said
    assert said.isprintable()


# ---- The header of a safetensors file: what is accepted here, the library accepts, and says the same of it

SIZES = {form: dtype.itemsize for dtype, form in SAFETENSORS_DTYPES.items()}
places = st.integers(0, 24) | numbers | st.floats() | st.none()
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*SIZES, "F4", "f32", ""]) | values,
        "shape": st.lists(st.integers(0, 3) | numbers, max_size=4) | values,
        "data_offsets": st.lists(places, min_size=2, max_size=2) | values,
    }
)


@st.composite
def headers(draw: Any) -> bytes:
    """Files: half of them valid except for a field or two, half of them arbitrary."""
    names = draw(st.lists(st.sampled_from("abc") | st.text(max_size=4), max_size=4))
    table, end = [], 0
    for name in names:
        form, shape = draw(st.sampled_from(sorted(SIZES))), draw(st.lists(st.integers(0, 3), max_size=3))
        size = SIZES[form]
        for number in shape:
            size *= number
        good = {"dtype": form, "shape": shape, "data_offsets": [end, end + size]}
        end += size
        table.append((name, draw(st.sampled_from([good] * 6) | entries | values)))
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(said)}" for name, said in table) + "}"
    content = draw(
        st.sampled_from([text.encode()] * 4) | st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode())
    )
    length = draw(st.sampled_from([len(content)] * 8) | st.integers(0, 2**64 - 1))
    return length.to_bytes(8, "little") + content + bytes(draw(st.sampled_from([end] * 8) | st.integers(0, 40)))


def check_header(content: bytes) -> None:
    path = PLACE / "x.safetensors"
    path.write_bytes(content)
    try:
        found = read_header(path)
    except UserError as error:
        check_refusal(error, path)
        return
    try:
        with safe_open(path, framework="pt") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            assert theirs == {name: header.shape for name, header in found.items()}
            for name in found:
                assert file.get_slice(name).get_dtype() == found[name].form
    except SafetensorError as error:  # it knows less than is written here only of an empty file's header
        raise AssertionError(f"accepted here, refused there: {error}") from error


# ---- Configs, as JSON, YAML and overrides

names = st.sampled_from([name.partition(".")[2] for name in FIELDS]) | st.text(max_size=4)
sections = st.sampled_from([*SECTION_TYPES, "provenance"]) | st.text(max_size=4)
trees = st.dictionaries(sections, st.dictionaries(names, values, max_size=3) | values, max_size=3)
ours = st.sampled_from([name.split(".") for name in FIELDS])  # one field, with any value
right = st.tuples(ours, values).map(lambda pair: {pair[0][0]: {pair[0][1]: pair[1]}})


def check_config(name: str, content: bytes) -> None:
    path = PLACE / name
    path.write_bytes(content)
    try:
        config = load_config(path, [], {})
    except UserError as error:
        check_refusal(error, path)
        return
    assert Config.from_dict(config.to_dict()) == config


def check_tree(tree: Any) -> None:
    check_config("c.json", json.dumps(tree).encode())
    check_config("c.yaml", yaml.safe_dump(tree).encode("utf-8", "surrogatepass"))


YAML_PIECES = [
    "a", "model", "lora: ", "rank: ", "data: ", "columns: ", "- ", "? ", ": ", "\n", "\n  ", "{", "}", "[", "]", ", ",
    "&a ", "*a", "<<: ", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!null ",
    "!!str ", "!!python/name:os.system ", "!!map ", "!!seq ", "!!merge ", "!x ", "'", '"', "|\n", ">\n", "0x", "0b",
    "1_0", "1:2", "2001-13-40", "2001-12-14t21:59:43.10-25:99", "0001-01-01 00:00:00 +23:59", ".inf", "=", "~", "#",
    "---\n", "...", "%YAML 1.1\n", "\t", "@", "`", "\x07", "\ufeff", "é",
]  # fmt: skip


def check_yaml(text: str) -> None:
    with contextlib.suppress(ValueError):
        parse_yaml(text)
    check_config("c.yaml", text.encode("utf-8", "surrogatepass"))


def check_override(pair: tuple[str, str]) -> None:
    try:
        Config().override({pair[0]: pair[1]})
    except UserError as error:
        check_refusal(error, pair[0])


# ---- JSON

JSON_PIECES = [
    '{"a":', "[", "]", "}", ",", "1", "-", "1e999", "NaN", '"', "\\ud800", "\\", "null", " ", "\n", ":", "0" * 50,
]  # fmt: skip


def check_json(content: bytes) -> None:
    try:
        repr(parse_json(content))
    except ValueError:
        return


# ---- Records

RECORD_PIECES = [
    '{"messages":', '[{"role":"user","content":', '"assistant"', '"x"', "}", "]", "[", "{", ",", "\n",
    '{"prompt":"a"', ',"completion":"b"}', '{"text":', '"tools":', "null", "1", '"tool_calls"', ":", '"\\u0000"',
    "\ufeff", "a,b\n", '"',
]  # fmt: skip


def check_records(name: str, content: bytes) -> None:
    path = PLACE / name
    path.write_bytes(content)
    try:
        for _ in read_raw(path):
            pass
        for _ in read_file(path, DataConfig()):
            pass
    except UserError as error:
        check_refusal(error, path)


# ---- Templates

TEMPLATE_PIECES = [
    "{{ ", " }}", "{% for m in ", "messages", " %}", "{% endfor %}", "{% if ", "{% else %}", "{% endif %}",
    "{% set x = ", "{% set ns.x = ", "namespace(x=1)", "{% macro f(a) %}", "{% endmacro %}", "f(", ")", "x", "ns",
    "m", ".content", "['role']", "[1:]", "[0]", " + ", " ~ ", " * ", " ** ", " % ", " // ", " in ", " == ", " is ",
    " not ", "defined", "'a'", "'%s'", "'{}'", "1", "10", "99999", "-1", "1.5", "[", "]", "(", ", ", "{'a': ", "}",
    " | tojson", " | join", " | list", " | length", " | replace('a', 'bb')", " | map('upper')",
    " | selectattr('role')", " | sort", " | format(1)", " | batch(3)", " | trim", " | round(2)", " | int", " | sum",
    " | indent(4)", " | attr('__class__')", ".__class__", ".format(", ".join(", ".split(", ".items()", ".mro", "loop",
    "loop.index", "loop(", "range(", "cycler(", "joiner(", "dict(", "self", "self.b()", "{% block b %}",
    "{% endblock %}", "{% generation %}", "{% endgeneration %}", "{% break %}", "{% continue %}", "strftime_now(",
    "raise_exception(", "{% call f(1) %}", "{% endcall %}", "caller()", "{% filter upper %}", "{% endfilter %}", "{#",
    "#}", "{% include 'x' %}", "{% with a = ", "{% endwith %}", "{% autoescape true %}", "{% endautoescape %}",
    "recursive", "é", "\n",
]  # fmt: skip
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<b>"}]


def check_template(source: str) -> None:
    environment = BoundedEnvironment(lambda: datetime.datetime(2024, 2, 29))
    started = time.thread_time()
    try:
        made = environment.render(environment.compile_bounded(source), messages=MESSAGES, add_generation_prompt=True)
        assert len(made) <= 1_100_000
    except COMPILE_ERRORS + TEMPLATE_ERRORS:
        pass
    assert time.thread_time() - started < 10
    assert MESSAGES == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<b>"}]


atoms = st.sampled_from(
    [
        "messages",
        "x",
        "ns",
        "m",
        "m.content",
        "'a'",
        "'%s{}'",
        "1",
        "99999",
        "-1",
        "1.5",
        "true",
        "none",
        "[1, 'b']",
        "{}",
    ]
)
OPERATORS = ["+", "~", "*", "**", "%", "//", "/", "in", "==", "<", "and", "or", "if x else"]
FILTERS = [
    "tojson", "join", "join('a')", "list", "length", "replace('a', 'bb')", "map('upper')", "map(attribute='role')",
    "selectattr('role')", "sort", "format(1)", "batch(3)", "trim", "round(2)", "int", "float", "sum", "indent(4)",
    "attr('__class__')", "string", "first", "last", "unique", "groupby('role')", "items", "dictsort", "reverse",
    "slice(2)", "center(9)", "title", "urlencode", "xmlattr", "default('a')", "safe", "escape", "truncate(3)", "max",
    "min",
]  # fmt: skip
CALLS = [
    "range",
    "dict",
    "cycler",
    "joiner",
    "namespace",
    "strftime_now",
    "raise_exception",
    "f",
    "loop",
    "x.format",
    "'a'.join",
]
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(lambda parts: f"({' '.join(parts)})"),
        st.tuples(inner, st.sampled_from(FILTERS)).map(lambda parts: f"({parts[0]} | {parts[1]})"),
        st.tuples(st.sampled_from(CALLS), inner).map(lambda parts: f"{parts[0]}({parts[1]})"),
        st.tuples(
            inner, st.sampled_from(["[1:]", "[0]", "[x]", ".a", ".__class__", ".items()", ".split('a')", ".upper()"])
        ).map("".join),
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
    ),
    max_leaves=8,
)
statements = st.recursive(
    expressions.map(lambda e: f"{{{{ {e} }}}}") | st.text(max_size=3),
    lambda inner: st.one_of(
        st.tuples(expressions, inner).map(lambda p: f"{{% for m in {p[0]} %}}{p[1]}{{% endfor %}}"),
        st.tuples(expressions, inner).map(lambda p: f"{{% if {p[0]} %}}{p[1]}{{% endif %}}"),
        st.tuples(expressions, inner).map(lambda p: f"{{% set x = {p[0]} %}}{p[1]}"),
        st.tuples(expressions, inner).map(
            lambda p: f"{{% set ns = namespace(a={p[0]}) %}}{{% set ns.b = ns.a %}}{p[1]}"
        ),
        st.tuples(inner, inner).map(lambda p: f"{{% macro f(x) %}}{p[0]}{{% endmacro %}}{p[1]}{{{{ f(1) }}}}"),
        st.tuples(inner, inner).map("".join),
        inner.map(lambda s: f"{{% generation %}}{s}{{% endgeneration %}}"),
    ),
    max_leaves=6,
)


def pieces(of: list[str], most: int = 30) -> Any:
    return st.lists(st.sampled_from(of) | st.text(max_size=3), max_size=most).map("".join)


def as_bytes(texts: Any) -> Any:
    return st.one_of(texts.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary(max_size=40))


TARGETS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "safetensors header": (headers(), check_header),
    "config tree": (trees | right, check_tree),
    "config YAML": (pieces(YAML_PIECES), check_yaml),
    "config override": (st.tuples(st.sampled_from(FIELDS), pieces(YAML_PIECES, 8)), check_override),
    "JSON": (as_bytes(pieces(JSON_PIECES, 90)), check_json),
    "records, JSON Lines": (as_bytes(pieces(RECORD_PIECES)), lambda content: check_records("r.jsonl", content)),
    "records, JSON": (as_bytes(pieces(RECORD_PIECES)), lambda content: check_records("r.json", content)),
    "records, CSV": (as_bytes(pieces(RECORD_PIECES)), lambda content: check_records("r.csv", content)),
    "template in pieces": (pieces(TEMPLATE_PIECES), check_template),
    "template": (statements, check_template),
}


def search(name: str, examples: int, derandomize: bool = True) -> None:
    """Run a target on that many inputs."""
    inputs, check = TARGETS[name]
    profile = settings(
        max_examples=examples,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    profile(given(inputs)(check))()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    warnings.simplefilter("ignore", SyntaxWarning)  # Python's, at `{{ 1[0] }}`; the commands ignore it, too
    end, counts = time.monotonic() + 60 * parser.parse_args().minutes, dict.fromkeys(TARGETS, 0)
    while time.monotonic() < end:
        for name in TARGETS:
            search(name, 500, derandomize=False)
            counts[name] += 500
    for name, count in counts.items():
        print(f"{name:22} {count:9,} inputs")


if __name__ == "__main__":
    main()
