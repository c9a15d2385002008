"""Chat templates: programs from strangers, run under bounds.

A chat template is a Jinja program that comes with a model and turns messages into text. Jinja's sandbox keeps it away
from Python's internals; it does not keep it from asking for a gigabyte (`'%1000000000d' % 1`), from looping for a day,
or from doubling a list forty times. So three things are counted here: the turns of its loops, the characters of
everything it makes, and its time. What can make a large value at once (a product, a format, a replacement) is
estimated before it is done. A template that asks for too much is refused in one line.

A template may also mark what the assistant says, with {% generation %} ... {% endgeneration %}. The marked text is
wrapped in two characters that no text contains, which `find_marks` takes out again.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from types import CodeType
from typing import Any

from jinja2 import Environment, Template, TemplateError, Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

# Noncharacters (Unicode 23.7): reserved for a program's own use, never part of a text.
OPENING, CLOSING = "\ufdd1", "\ufdd2"
# What a template's own code can raise; a sandbox escape is a TemplateError.
TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip
# What compiling one can raise: too many levels for Jinja's parser, or for Python's.
COMPILE_ERRORS = (TemplateError, RecursionError, SyntaxError, MemoryError, ValueError)
MAX_SOURCE = 200_000  # characters of a template; long ones have 20,000
MAX_OUTPUT = 1_000_000  # characters of a rendering, besides four times those of the messages
MAX_MADE = 64  # times the output: characters of all values on the way to it
MAX_AT_ONCE = 16  # times the output: estimated characters of one value
MAX_WIDTH = 999  # of a field in a format
MAX_BITS = 256  # of an integer
MAX_DIGITS = 20  # that a number may be rounded to
MAX_OPERATORS = 64  # + and ~ of an expression that are not checked one by one
MAX_TURNS = 1_000_000  # of all loops, macros and filters of one rendering
MAX_SECONDS = 5.0  # of this thread's processor time, per rendering
# Nothing of this does a template need; each can be made to take minutes or gigabytes, or gives another text every time.
UNUSED_FILTERS = ("urlize", "wordwrap", "striptags", "pprint", "random")
UNUSED_METHODS = ("encode", "to_bytes", "translate", "maketrans", "striptags", "unescape", "expandtabs", "zfill")
# Filters and methods of texts whose result is larger than what they are given.
GROWING = ("replace", "join", "indent", "center", "ljust", "rjust", "batch", "slice", "tojson", "truncate", "sum")
STRIPPING = ("strip", "lstrip", "rstrip", "trim")
MACHINERY = (Context, EvalContext, Environment)  # what Jinja itself passes to some filters


class TooMuch(TemplateError):
    """The template asks for more than it may."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """What templates are written for: a sandbox without write access, bounds, and the helpers that they call."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, now: Callable[[], datetime]):
        """
        Args:
            now: the clock that `strftime_now` reads.
        """
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=self.made_of,
            optimized=False,  # nothing is computed while compiling
        )
        self._begin({})
        self.filters["tojson"] = self._to_json
        self.filters["indent"] = _indent
        for name in UNUSED_FILTERS:
            del self.filters[name]
        tables: list[Any] = [self.filters, self.tests]
        for table in tables:
            table |= {name: self._bounded(name, function) for name, function in table.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(self._checked_form(form, 1))

    def compile_bounded(self, source: str) -> Template:
        """A template with a count in each loop; raises one of COMPILE_ERRORS."""
        if len(source) > MAX_SOURCE:
            raise TooMuch(f"{len(source):,} characters: a template may have {MAX_SOURCE:,}")
        self._begin({})
        code = self.compile(_Counted().visit(self.parse(source)))
        assert isinstance(code, CodeType)
        return Template.from_code(self, code, self.make_globals(None))

    def render(self, template: Template, /, **variables: Any) -> str:
        """Render under the bounds; raises one of TEMPLATE_ERRORS."""
        self._begin(variables)
        return template.render(variables)

    def _begin(self, variables: dict[str, Any]) -> None:
        self.given, self.limit, self.knows_limit = variables, MAX_OUTPUT, False
        self.made, self.turns, self.deadline = 0, 0, float("inf")

    # ---- What is counted

    def count_turn(self) -> None:
        """Stands at the beginning of each loop's and macro's body, and before each call and comparison."""
        self.turns += 1
        if self.turns % 64 == 0:
            now = time.thread_time()  # slow on some machines, and few templates come here
            self.deadline = min(self.deadline, now + MAX_SECONDS)
            if self.turns > MAX_TURNS or now > self.deadline:
                raise TooMuch(f"it asks for more than {MAX_TURNS:,} turns of its loops, or {MAX_SECONDS:g} seconds")

    def made_of(self, value: Any) -> Any:
        """Count a value that the template has made; a list of lists of lists ... counts as it would be written out."""
        if isinstance(value, str):
            self.made += len(value)
            if len(value) > self.limit:
                self._fits(len(value), 1)
        elif isinstance(value, (list, tuple, dict, Namespace)):
            size = _size(value, MAX_OUTPUT)
            self.made += size if size <= MAX_OUTPUT else self._fits(_size(value, self._learn_limit()), 1)
        if self.made > MAX_MADE * self.limit:
            self._fits(self.made, MAX_MADE)
        return value

    def concat(self, pieces: Iterable[str]) -> str:  # (Jinja has "".join here)
        """Join output, or a macro's or a block's, as long as it is not too long."""
        pieces = list(pieces)
        self._fits(sum(map(len, pieces)), 1)
        return "".join(pieces)

    def compared(self, value: Any) -> Any:
        """The result of a comparison, which may have gone through a million values."""
        self.count_turn()
        return value

    def add(self, left: Any, right: Any) -> Any:
        """The + operator, in an expression with many of them."""
        return self.made_of(left + right)

    def concatenate(self, *values: Any) -> str:
        """The ~ operator."""
        for value in values:
            self.made_of(value)
        return self.concat(map(str, values))

    def _fits(self, size: int, times: int) -> int:
        """The size, if it is not more than so many times the limit."""
        if size > times * self.limit and size > times * self._learn_limit():
            raise TooMuch(f"it asks for more than {times * self.limit:,} characters")
        return size

    def _learn_limit(self) -> int:
        """What may be written grows with what there is to write; few renderings come so far that it must be known."""
        if not self.knows_limit:
            self.limit += 4 * sum(_size(value) for value in self.given.values())
            self.knows_limit = True
        return self.limit

    # ---- What is estimated before it is done

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """One of * ** %."""
        if isinstance(left, str) and operator == "%":
            self._checked_form(left, _size(right, MAX_AT_ONCE * MAX_OUTPUT))
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            sizes = [_size(v) if hasattr(v, "__len__") else v if isinstance(v, int) else 1 for v in (left, right)]
            self._fits(sizes[0] * sizes[1], 1)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            size = bits[0] * max(abs(right), 1) if operator == "**" else sum(bits)
            if size > MAX_BITS:
                raise TooMuch(f"it asks for a number of {size:,} bits")
        return self.made_of(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a macro, a helper, or a value's method."""
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if owner is self:
            return function(*args)  # what _Counted has put there
        self.count_turn()
        for value in (*args, *kwargs.values()):
            self.made_of(value)
        if isinstance(owner, str):
            self._check_slow(name, owner, args)
        if isinstance(owner, str) and name in GROWING:
            args = tuple(list(arg) if name == "join" else arg for arg in args)
            self._check_growth(name, owner, args)
        return self.made_of(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in UNUSED_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """`'{}'.format(...)`, with the sandbox's formatter."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._checked_form(value.__self__, _size([args, kwargs], MAX_AT_ONCE * MAX_OUTPUT))
            return wrapped(*args, **kwargs)

        return checked

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or a test: its arguments are weighed, its result is counted."""

        @functools.wraps(function)  # keeps what Jinja has noted on the function
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.count_turn()
            given = [arg for arg in (*args, *kwargs.values()) if not isinstance(arg, MACHINERY)]
            for arg in given:
                if not isinstance(arg, str) and _size(arg, MAX_OUTPUT) > MAX_OUTPUT:
                    self._fits(_size(arg, self._learn_limit()), 1)
            if name == "format":
                self._checked_form(str(given[0]), _size(given[1:], MAX_AT_ONCE * MAX_OUTPUT))
            if name in GROWING and given:
                if isinstance(given[0], (Iterator, range)):
                    values = list(given[0])  # says how much it gives by giving it
                    args = tuple(values if arg is given[0] else arg for arg in args)
                    given[0] = values
                self._check_growth(name, given[0], given[1:])
            if given:
                self._check_slow(name, given[0], given[1:])
            return self.made_of(function(*args, **kwargs))

        return checked

    def _check_slow(self, name: str, subject: Any, others: Iterable[Any]) -> None:
        """What takes long for large arguments, although what it gives is small."""
        if name == "round" and any(isinstance(other, int) and abs(other) > MAX_DIGITS for other in others):
            raise TooMuch(f"it asks for more than {MAX_DIGITS} digits")
        if name == "int" and isinstance(subject, str) and len(subject) > MAX_WIDTH:
            raise TooMuch(f"it asks for a number of {len(subject):,} digits")
        if name in STRIPPING and any(isinstance(other, str) and len(other) > MAX_WIDTH for other in others):
            raise TooMuch(f"it asks to strip more than {MAX_WIDTH} different characters")

    def _check_growth(self, name: str, subject: Any, others: Iterable[Any]) -> None:
        """At most as large as the subject times what is put to each of its parts."""
        others = list(others)[1:] if name == "replace" else list(others)
        if name == "sum" and any(isinstance(other, (list, tuple)) for other in others):
            raise TooMuch("it asks for a sum of lists")
        each = sum(abs(other) if isinstance(other, int) else _size(other) for other in others)
        self._fits((_size(subject) + 1) * (each + 1), MAX_AT_ONCE)

    def _checked_form(self, form: str, size: int) -> str:
        """A format whose fields are narrow and not too many for values of that size; `'%1000000000d' % 1` is not."""
        fields = str(form).count("%") + str(form).count("{")
        wide = re.search(r"\d{4}|%[^%a-zA-Z]*\*|:[^}]*\{", str(form))
        if fields and wide:
            raise TooMuch(f"it formats with {form!r:.40}")
        self._fits(fields * (size + MAX_WIDTH), MAX_AT_ONCE)
        return form

    def _to_json(self, value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        """As transformers has it: characters as they are, nothing escaped for HTML."""
        if isinstance(value, Undefined):
            raise TemplateError("tojson of something undefined")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, **options)
        pieces, length = [], 0
        for piece in encoder.iterencode(value):
            pieces.append(piece)
            length = self._fits(length + len(piece), 1)
        return "".join(pieces)


class _Counted(NodeTransformer):
    """Put a count into loops, macros and comparisons, and weigh what is kept: literals, and values that get a name.

    Between two of these an expression can only put together as many values as it has operators, so + and ~ need no
    check of their own unless there are very many.
    """

    def _count(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("count_turn", [], node.lineno)).set_lineno(node.lineno))
        return node

    def _weigh(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _call("made_of", [node], node.lineno)

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        node.node = _call("made_of", [node.node], node.lineno)
        return node

    def visit_With(self, node: nodes.With) -> nodes.Node:
        self.generic_visit(node)
        node.values = [_call("made_of", [value], node.lineno) for value in node.values]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        quick = all(part.op not in ("in", "notin") and isinstance(part.expr, nodes.Const) for part in node.ops)
        return node if quick else _call("compared", [node], node.lineno)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        many = sum(1 for _ in node.find_all((nodes.Add, nodes.Concat))) >= MAX_OPERATORS
        self.generic_visit(node)
        return _call("add", [node.left, node.right], node.lineno) if many else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenate", node.nodes, node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("made_of", [node], node.lineno) if isinstance(node.arg, nodes.Slice) else node

    visit_For = visit_Macro = visit_CallBlock = _count
    visit_List = visit_Tuple = visit_Dict = _weigh


def _call(method: str, arguments: list[Any], line: int) -> nodes.Call:
    """The call of one of the environment's methods, which a template cannot name itself."""
    call = nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)
    call.set_lineno(line)
    return call


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: marks what the assistant says, in some templates."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own protocol)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        first, last = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (OPENING, CLOSING))
        return [first, *body, last]


def find_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendering without its generation marks, and the spans that they stood around."""
    if OPENING not in text:
        return text, []
    spans: list[tuple[int, int]] = []
    start, length, clean = 0, 0, []
    for part in re.split(f"([{OPENING}{CLOSING}])", text):
        if part == OPENING:
            start = length
        elif part == CLOSING:
            spans.append((start, length))
        else:
            clean.append(part)
            length += len(part)
    return "".join(clean), spans


def _size(value: Any, enough: int = MAX_AT_ONCE * MAX_OUTPUT) -> int:
    """The characters of all texts in a value, one more for each part; stops counting beyond `enough`."""
    if isinstance(value, str):
        return len(value)
    count, todo = 0, [value]
    while todo and count <= enough:
        part = todo.pop()
        count += 1
        if isinstance(part, str):
            count += len(part)
        elif isinstance(part, dict):
            todo.extend(part.keys())
            todo.extend(part.values())
        elif isinstance(part, (list, tuple)):
            todo.extend(part)
        elif isinstance(part, Namespace):
            todo.append(part._Namespace__attrs)  # its one field
    return count


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's own, for texts only: it begins with `s += newline`, which makes a list of messages longer."""
    if not isinstance(s, str):
        raise TemplateError(f"indent: {type(s).__name__} is no text")
    return do_indent(s, width, first, blank)


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message)[:200])
