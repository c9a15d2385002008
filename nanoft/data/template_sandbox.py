"""A sandbox for chat templates, which are untrusted programs: it bounds their time, loops and output.

Jinja's sandbox keeps a template away from Python's internals, but does not keep it from requesting a gigabyte
(`'%1000000000d' % 1`), looping for a day, or doubling a list forty times. So three things are bounded here: the
iterations of loops, the characters of all values created, and the time. The size of an operation that can create a
large value at once (a product, a format, a replacement) is estimated beforehand. A template that exceeds a bound is
refused with one line.

Text in {% generation %} ... {% endgeneration %} is enclosed by two noncharacters, which `find_marks` removes.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from types import CodeType
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# Noncharacters (Unicode 23.7): reserved for internal use, never part of a text.
OPENING, CLOSING = "\ufdd1", "\ufdd2"
# What rendering can raise; an attempt to escape the sandbox is a TemplateError.
TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError
)  # fmt: skip
# What compiling can raise: also too many levels for Jinja's or Python's parser.
COMPILE_ERRORS = (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError)
MAX_SOURCE = 200_000  # characters of a template; long ones have 20,000
MAX_OUTPUT = 1_000_000  # characters of a rendering, plus four times those of the messages
MAX_MADE = 64  # times the output: characters of all intermediate values
MAX_AT_ONCE = 16  # times the output: estimated characters of one value
MAX_WIDTH = 999  # of a field in a format; of an argument in TAKING_LONG
MAX_BITS = 256  # of an integer
MAX_OPERATORS = 64  # unchecked + and ~ in one expression
MAX_STEPS = 1_000_000  # iterations, calls, comparisons and values of one rendering
MAX_SECONDS = 5.0  # of this thread's processor time, per rendering
# Not needed by templates, and each can take minutes or gigabytes.
UNUSED_METHODS = ("encode", "to_bytes", "translate", "maketrans", "striptags", "unescape", "expandtabs", "zfill")
# Filters and string methods whose result may be larger than their arguments.
GROWING = ("replace", "join", "indent", "center", "ljust", "rjust", "batch", "slice", "tojson", "truncate", "sum")
# Those that take long for a long text (characters to strip, digits) or a large number (of digits).
TAKING_LONG = ("strip", "lstrip", "rstrip", "trim", "int", "round")
MACHINERY = (Context, nodes.EvalContext, Environment)  # arguments that Jinja itself passes to some filters


class LimitExceeded(TemplateError):
    """The template exceeds a bound."""


class _Generator(CodeGenerator):
    """Makes the calls that _Tracked inserts without the sandbox's checks."""

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if isinstance(node.node, nodes.EnvironmentAttribute):
            self.write("environment.track(")
            self.visit(node.args[0], frame)
            self.write(")")
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates expect, with its helper functions: sandboxed, read-only and bounded."""

    intercepted_binops = frozenset({"*", "**", "%"})
    code_generator_class = _Generator

    def __init__(self, now: Callable[[], datetime]):  # the clock of strftime_now
        extensions = [_GenerationTag, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.track)
        self.optimized = False  # nothing is computed while compiling
        self._begin({})
        self.filters["tojson"] = self._to_json
        for name in ("urlize", "wordwrap", "striptags", "pprint", "random"):  # unused, slow or random
            del self.filters[name]
        tables: list[Any] = [self.filters, self.tests]
        for table in tables:
            table |= {name: self._bounded(name, function) for name, function in table.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(self._checked_form(form, 1))

    def compile_bounded(self, source: str) -> Template:
        """Compile a template with counters in its loops; raises one of COMPILE_ERRORS."""
        if len(source) > MAX_SOURCE:
            raise LimitExceeded(f"{len(source):,} characters: the limit is {MAX_SOURCE:,}")
        self._begin({})
        code = self.compile(_Tracked().visit(self.parse(source)))
        assert isinstance(code, CodeType)
        return Template.from_code(self, code, dict(self.globals))  # a plain one is copied fast

    def render(self, template: Template, /, **variables: Any) -> str:
        """Render under the bounds; raises one of TEMPLATE_ERRORS."""
        self._begin(variables)
        return template.render(variables)

    def _begin(self, variables: dict[str, Any]) -> None:
        self._variables, self.made, self.steps, self.deadline = variables, 0, 0, float("inf")
        self.__dict__.pop("limit", None)

    @functools.cached_property
    def limit(self) -> int:  # characters; counted only if a template asks for more than MAX_OUTPUT
        return MAX_OUTPUT + 4 * sum(map(_size, self._variables.values()))

    def track(self, value: Any = None) -> Any:
        """Count a step and the size of a value, for lists and objects that of their text."""
        self.steps += 1
        if self.steps % 64 == 0:
            now = time.thread_time()  # slow on some machines
            self.deadline = min(self.deadline, now + MAX_SECONDS)
            if self.steps > MAX_STEPS or now > self.deadline:
                raise LimitExceeded(f"it takes more than {MAX_STEPS:,} steps, or {MAX_SECONDS:g} seconds")
        if isinstance(value, (str, list, tuple, dict, Namespace)):
            self.made += self._measure(value)
            self._fits(self.made, MAX_MADE)
        return value

    def _measure(self, value: Any) -> int:
        """The size of a value; raises LimitExceeded."""
        size = len(value) if isinstance(value, str) else _size(value, MAX_OUTPUT)
        return self._fits(size if size <= MAX_OUTPUT else _size(value, self.limit), 1)

    def concat(self, pieces: Iterable[str]) -> str:  # (Jinja has "".join here)
        """Join the output of the template, a macro or a block."""
        pieces = list(pieces)
        self._fits(sum(map(len, pieces)), 1)
        return "".join(pieces)

    def _fits(self, size: int, times: int) -> int:
        """Return the size; raise LimitExceeded if it is more than `times` the limit."""
        if size > times * MAX_OUTPUT and size > times * self.limit:
            raise LimitExceeded(f"it asks for more than {times * self.limit:,} characters")
        return size

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str) and operator == "%":
            self._checked_form(left, _size(right))
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            sizes = [_size(v) if hasattr(v, "__len__") else v if isinstance(v, int) else 1 for v in (left, right)]
            self._fits(sizes[0] * sizes[1], 1)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            size = bits[0] * max(abs(right), 1) if operator == "**" else sum(bits)
            if size > MAX_BITS:
                raise LimitExceeded(f"it asks for a number of {size:,} bits")
        return self.track(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # Jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(function, "__name__", "")
        for value in (*args, *kwargs.values()):
            self.track(value)
        if isinstance(owner, str):
            args = tuple(map(list, args)) if name == "join" else args
            self._check_call(name, owner, (*args, *kwargs.values()))
        return self.track(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in UNUSED_METHODS and super().is_safe_attribute(obj, attr, value)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test with its arguments checked and its result counted."""

        @functools.wraps(function)  # keeps Jinja's attributes
        def checked(*args: Any, **kwargs: Any) -> Any:
            if name in GROWING:
                args = tuple(list(arg) if isinstance(arg, (Iterator, range)) else arg for arg in args)
            given = [arg for arg in (*args, *kwargs.values()) if not isinstance(arg, MACHINERY)]
            for arg in given:
                if not isinstance(arg, str):
                    self._measure(arg)
            if given:
                self._check_call(name, given[0], given[1:])
            return self.track(function(*args, **kwargs))

        return checked

    def _check_call(self, name: str, subject: Any, others: Iterable[Any]) -> None:
        """Refuse a filter or string method that takes long for these arguments, or whose result may be too large."""
        if name in ("format", "format_map"):
            self._checked_form(str(subject), _size(list(others)))
        if name == "indent" and not isinstance(subject, str):
            raise TemplateError("indent: not a string")  # it would extend a list of messages
        if name in TAKING_LONG:
            for value in (subject, *others) if name == "int" else others:
                if (len(value) if isinstance(value, str) else abs(value) if isinstance(value, int) else 0) > MAX_WIDTH:
                    raise LimitExceeded(f"{name}: one of its arguments is larger than {MAX_WIDTH}")
        if name == "sum" and any(isinstance(other, (list, tuple)) for other in others):
            raise LimitExceeded("it asks for a sum of lists")
        if name in GROWING:  # the result is at most the subject times what is added to each of its parts
            added = list(others)[1:] if name == "replace" else others
            each = sum(abs(other) if isinstance(other, int) else _size(other) for other in added)
            self._fits((_size(subject) + 1) * (each + 1), MAX_AT_ONCE)

    def _checked_form(self, form: str, size: int) -> str:
        """Return a format string if its fields are narrow and not too many; refuse `'%1000000000d' % 1`."""
        fields = str(form).count("%") + str(form).count("{")
        if fields and re.search(r"\d{4}|%[^%a-zA-Z]*\*|:[^}]*\{", str(form)):
            raise LimitExceeded(f"it formats with {form!r:.40}")
        self._fits(fields * (size + MAX_WIDTH), MAX_AT_ONCE)
        return form

    def _to_json(self, value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        text = ""
        for piece in json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, **options).iterencode(value):
            text += piece
            self._fits(len(text), 1)
        return text


class _Tracked(NodeTransformer):
    """Count iterations, macro calls and comparisons, and track literals and assigned values.

    Between two of these, an expression combines only as many values as it has operators, so + and ~ are checked only if
    there are very many.
    """

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        def track(value: Any) -> Any:  # through a method of the environment, which a template cannot access
            method = nodes.EnvironmentAttribute("track")
            return nodes.Call(method, [value], [], None, None).set_lineno(node.lineno)

        operators = sum(1 for _ in node.find_all((nodes.Add, nodes.Concat))) if isinstance(node, nodes.Add) else 0
        self.generic_visit(node)
        match node:
            case nodes.For() | nodes.Macro() | nodes.CallBlock():
                node.body.insert(0, nodes.ExprStmt(track(nodes.Const(None))).set_lineno(node.lineno))
            case nodes.Assign():
                node.node = track(node.node)
            case nodes.With():
                node.values = [track(value) for value in node.values]
            case nodes.Concat():
                node.nodes = [track(part) for part in node.nodes]
            case nodes.Add() if operators >= MAX_OPERATORS:
                return track(node)
            case nodes.Compare():  # may compare a million values
                quick = all(part.op not in ("in", "notin") and isinstance(part.expr, nodes.Const) for part in node.ops)
                return node if quick else track(node)
            case nodes.Getitem(arg=nodes.Slice()) | nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load"):
                return track(node)
        return node


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: marks the text of the assistant."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own protocol)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (OPENING, CLOSING))
        return [first, *body, last]


def find_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendered text without its generation marks, and the marked spans."""
    if OPENING not in text and CLOSING not in text:
        return text, []
    parts = re.split(f"[{OPENING}{CLOSING}]", text)  # every second one is marked
    edges = [0, *itertools.accumulate(map(len, parts))]
    return "".join(parts), [(edges[at], edges[at + 1]) for at in range(1, len(parts), 2)]


def _size(value: Any, enough: int = MAX_AT_ONCE * MAX_OUTPUT) -> int:
    """Characters of all strings in a value, plus one per element; stops counting beyond `enough`."""
    if isinstance(value, str):
        return len(value)
    count, todo = 0, [value]
    while todo and count <= enough:
        part = todo.pop()
        count += 1
        if isinstance(part, str):
            count += len(part)
        elif isinstance(part, dict):
            todo.extend((*part.keys(), *part.values()))
        elif isinstance(part, (list, tuple)):
            todo.extend(part)
        elif isinstance(part, Namespace):
            todo.append(part._Namespace__attrs)  # its one field
    return count


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message)[:200])
