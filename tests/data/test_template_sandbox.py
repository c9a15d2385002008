"""Untrusted templates: what they may do, as in transformers, and what is refused, within bounds."""

from __future__ import annotations

import copy
import datetime
import json
import subprocess
import sys
from typing import Any

import pytest
from tiers import rest_is_slow
from transformers.utils.chat_template_utils import render_jinja_template

from nanoft.data.template_sandbox import COMPILE_ERRORS, TEMPLATE_ERRORS, BoundedEnvironment, find_marks

MESSAGES = [{"role": "user", "content": "Hé <b>"}, {"role": "assistant", "content": "ja"}]
DOUBLING = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
BIG = "{% set ns = namespace(x='\\U0001f600') %}{% for i in range(19) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
# Each asks for gigabytes, for hours, or for what is none of its business.
BOMBS = {
    "width": "{{ '%1000000000d' % 1 }}",
    "width from an argument": "{{ '%*d' % (1000000000, 1) }}",
    "width in a filter": "{{ '%1000000000d' | format(1) }}",
    "width in format": "{{ '{:1000000000}'.format(1) }}",
    "width in a field of format": "{{ '{:{}}'.format(1, 10**9) }}",
    "width of a date": "{{ strftime_now('%1000000000d') }}",
    "many widths": "{{ ('%999d' * 300000) % ((1,) * 300000) }}",
    "fields of one long text": "{{ ('%(a)s' * 100000) % {'a': 'x' * 900000} }}",
    "product": "{{ 'a' * 1000000000 }}",
    "product of products": "{{ [[1] * 90000] * 1000 }}",
    "list of a long text": "{{ ['x' * 900000] * 10 }}",
    "doubled text": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled by ~": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "squared number": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "power": "{{ 9**9**9 }}",
    "nested list": DOUBLING + "{{ ns.x }}",
    "nested list as text": DOUBLING + "{{ ns.x | string }}",
    "nested list as JSON": DOUBLING + "{{ ns.x | tojson }}",
    "nested list in a format": DOUBLING + "{{ '%s' % ns.x }}",
    "nested list compared": DOUBLING + "{{ ns.x[0][0] == [ns.x] }}",
    "nested namespaces": DOUBLING.replace("[ns.x, ns.x]", "namespace(a=ns.x, b=ns.x)") + "{{ ns.x }}",
    "namespace in itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "loop into a variable": "{% set x %}{% for i in range(100000) %}{{ 'x' * 90000 }}{% endfor %}{% endset %}",
    "loop over lists": "{% for x in range(10000) %}{% set y = range(100000) | list %}{% endfor %}",
    "recursive loop": "{% for i in range(100000) recursive %}{{ loop(range(100000)) }}{% endfor %}",
    "macro in itself": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "macro doubled": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "range": "{{ range(10**9) | list }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "mapped center": "{{ range(100000) | map('center', 99999) | list | length }}",
    "search in a list": "{{ range(100000) | select('in', range(100000) | list) | list | length }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "translate": "{{ 'a'.translate({97: 'b' * 1000000}) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "indent": "{{ 'a' | indent(1000000000, true) }}",
    "indent with a text": "{{ ('\n' * 90000) | indent('x' * 90000) }}",
    "indented block": "{% filter indent(99999) %}{{ '\n' * 90000 }}{% endfilter %}",
    "indented JSON": "{{ [1] | tojson(indent=1000000000) }}",
    "replace": "{{ ('x' * 90000).replace('x', 'y' * 90000) }}",
    "replace as a filter": "{{ ('x' * 90000) | replace('x', 'y' * 90000) }}",
    "replace nothing": "{{ ('x' * 90000) | replace('', 'y' * 90000) }}",
    "join": "{{ ('x' * 90000).join(range(90000) | map('string')) }}",
    "join as a filter": "{{ range(90000) | join('x' * 90000) }}",
    "sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) | length }}",
    "filler": "{{ lipsum(100000) }}",
    "digits": "{{ 1 | round(-100000000) }}",
    "digits up": "{{ 1 | round(100000000, 'ceil') }}",
    "a long number": "{{ ('f' * 900000) | int(0, 16) // 3 }}",
    "strip": "{{ ('a' * 990000).strip('b' * 990000 + 'a') }}",
    "trim": "{{ ('a' * 990000) | trim('b' * 990000 + 'a') }}",
    "a sum of long texts": BIG + "{{ " + "+".join(["ns.x"] * 60) + " }}",
    "list of a text": BIG + "{{ [ns.x[1:], ns.x[2:], ns.x[3:], ns.x[4:]] * 60 }}",
    "slices": "{% set x = '😀' * 900000 %}{{ [" + ", ".join(f"x[{n}:]" for n in range(1, 200)) + "] }}",
    "sorted text": BIG + "{{ (ns.x ~ ns.x) | sort | join('') }}",
    "deep indented JSON": "{% set ns = namespace(x=[1]) %}{% for i in range(200) %}{% set ns.x = [ns.x, 1] %}"
    "{% endfor %}{{ ns.x | tojson(indent=70000) }}",
    "a long refusal": "{{ raise_exception('x' * 900000) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "a long sum": "{{ " + "+".join(["1"] * 50000) + " }}",
    "a long source": "x" * 1_000_001,
    "class": "{{ ''.__class__.__mro__ }}",
    "class by attr": "{{ (''|attr('__class__')).mro() }}",
    "class by format": "{{ '{0.__class__.__mro__}'.format('') }}" + "{{ raise_exception('nothing came out') }}",
    "base classes": "{{ messages.__class__.__base__.__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "globals of a helper": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "clock's object": "{{ strftime_now.__closure__[0].cell_contents }}",
    "environment": "{{ self._TemplateReference__context.environment.globals }}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'content': 'x'}) }}",
    "clear": "{{ messages.clear() }}",
    "division by zero": "{{ 1 // 0 }}",
    "nothing there": "{{ messages[0].nothing.at_all }}",
    "text and number": "{{ 'a' + 1 }}",
    "not found": "{{ 'a'.index('b') }}",
    "date of a number": "{{ strftime_now(3) }}",
    "unknown option": "{{ messages | tojson(nothing=1) }}",
    "JSON of nothing": "{{ nothing | tojson }}",
    "its own words": "{{ raise_exception('roles must alternate') }}",
}

# Many at a time in one process whose memory and processor time the system limits.
RUN = """
import datetime, gc, json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000, 1_500_000_000))
from nanoft.data.template_sandbox import COMPILE_ERRORS, TEMPLATE_ERRORS, BoundedEnvironment
for name, source in json.load(sys.stdin).items():
    messages, started = [{"role": "user", "content": "hi"}], time.process_time()
    try:
        environment = BoundedEnvironment(datetime.datetime.now)
        said = "made " + environment.render(environment.compile_bounded(source), messages=messages)[:60]
    except COMPILE_ERRORS + TEMPLATE_ERRORS as error:
        said = type(error).__name__
    assert messages == [{"role": "user", "content": "hi"}]
    print(json.dumps([name, said, time.process_time() - started]), flush=True)
    gc.collect()
if sys.platform == "linux":  # of this program: ru_maxrss knows the process that started it, too
    with open("/proc/self/status") as status:
        print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def environment() -> BoundedEnvironment:
    return BoundedEnvironment(lambda: datetime.datetime(2024, 2, 29))


def render(source: str, **variables: Any) -> str:
    bounded = environment()
    return bounded.render(bounded.compile_bounded(source), **{"messages": MESSAGES, **variables})


@pytest.mark.parametrize("every", rest_is_slow([1, 5], 5))
def test_bombs_are_refused_in_little_memory_and_time(every: int) -> None:
    bombs = dict(list(BOMBS.items())[::every])
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(bombs), capture_output=True, text=True, timeout=240, check=False
    )
    *results, peak = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-500:]
    assert [name for name, _, _ in results] == list(bombs)
    assert {name: said for name, said, _ in results if said.startswith("made")} == {}
    assert {name: seconds for name, _, seconds in results if seconds > 8} == {}
    assert peak < 1000 * 1024  # kilobytes; a bomb wants gigabytes


def test_a_refusal_is_short() -> None:
    with pytest.raises(TEMPLATE_ERRORS) as caught:
        render(BOMBS["a long refusal"])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | indent(4) }}",  # Jinja's filter begins with `s += newline`
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages | map('indent') | list }}{{ [messages] | map('indent') | list }}",
    ],
)
def test_the_messages_stay_as_they_are(source: str) -> None:
    messages = copy.deepcopy(MESSAGES)
    with pytest.raises(TEMPLATE_ERRORS):
        render(source, messages=messages)
    assert messages == MESSAGES


def test_the_limit_on_the_output_grows_with_the_messages() -> None:
    long = [{"role": "user", "content": "x" * 3_000_000}]
    assert render("{{ messages[0].content ~ messages[0].content }}", messages=long) == "x" * 6_000_000
    with pytest.raises(TEMPLATE_ERRORS, match="asks for more than"):
        render("{% for i in range(7) %}{{ messages[0].content }}{% endfor %}", messages=long)


def test_time_is_bounded_in_every_rendering_anew() -> None:
    bounded = environment()
    template = bounded.compile_bounded("{% for i in range(90000) %}{% endfor %}" * 3)
    for _ in range(8):  # together more turns than one rendering may have
        bounded.render(template, messages=[])


TEMPLATES = {
    "loops and tests": "{% for m in messages if m.role != 'x' %}{{ loop.index }}{{ loop.last }}{{ m.role }}"
    "{% endfor %}",
    "macro": "{% macro say(m, end='.') %}{{ m.content }}{{ end }}{% endmacro %}{{ say(messages[0]) }}"
    "{{ say(messages[1], '!') }}",
    "call block": "{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}x{% endcall %}",
    "namespace": "{% set ns = namespace(a=[], n=0) %}{% for m in messages %}{% set ns.a = ns.a + [m.role] %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.a | join(', ') }}{{ ns.n }}",
    "slices": "{{ messages[1:][0].content }}{{ messages[::-1] | map(attribute='role') | join }}"
    "{{ messages[-1]['role'] }}",
    "texts": "{{ 'a|b'.split('|')[-1].strip() ~ ' x '.lstrip() + 'a'.upper() }}{{ 'abc'.startswith('ab') }}"
    "{{ 'aXb'.replace('X', '--') }}",
    "filters": "{{ ' x ' | trim }}{{ [3, 1] | sort | list }}{{ messages | length }}{{ nothing | default('d') }}"
    "{{ 'ab' | upper }}",
    "formats": "{{ '%s is %d' % ('a', 3) }}{{ '{} {x}'.format(1, x=2) }}{{ '%s' | format('z') }}",
    "dictionaries": "{{ {'a': [1, {'b': 2}]} | tojson }}{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% endfor %}"
    "{{ {'a': 1}.get('b', 5) }}",
    "tests": "{{ messages is iterable }}{{ 'a' is string }}{{ none is none }}{{ x is not defined }}{{ 2 in [1, 2] }}"
    "{{ {} is mapping }}",
    "arithmetic": "{{ 7 % 3 }}{{ 2 ** 8 }}{{ 7 // 2 }}{{ 1.5 * 2 }}{{ loop is defined }}{{ 3 - 5 }}",
    "inline if": "{{ 'a' if messages | length > 1 else 'b' }}{% if not x %}n{% elif y %}y{% else %}z{% endif %}",
    "set block": "{% set x %}<{{ messages[0].content }}>{% endset %}{{ x | length }}{{ x }}",
    "unpacking": "{% set a, b = (1, 2) %}{{ a }}{{ b }}{% for (i, j) in [(1, 2), (3, 4)] %}{{ i * j }}{% endfor %}",
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=list(TEMPLATES))
def test_ordinary_templates_render_as_in_transformers(source: str) -> None:
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=source)
    assert render(source) == expected


def test_generation_marks_are_found_and_taken_out() -> None:
    source = "a{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endfor %}b"
    text, spans = find_marks(render(source))
    assert text == "a[Hé <b>][ja]b"
    assert [text[start:end] for start, end in spans] == ["Hé <b>", "ja"]
    assert find_marks("nothing") == ("nothing", [])


@pytest.mark.parametrize("source", ["{% for m in %}", "{{ 1 | nothing }}", "{% generation %}", "{{ '\ud800' }}{%"])
def test_what_does_not_compile(source: str) -> None:
    with pytest.raises(COMPILE_ERRORS):
        environment().compile_bounded(source)


def test_the_clock() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "29 Feb 2024"
