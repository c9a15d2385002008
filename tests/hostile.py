"""Hostile inputs, each made from a valid one: models, tokenizers, adapters, runs, configs; see test_hostile.py.

A case is a kind (what it is a case of), a change to a copy of a good one, and what the refusal must say. `run_cases` is
what a process of its own does with them all, under limits of memory and processor time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanoft import lora
from nanoft.config.loading import load_config
from nanoft.data import template_sandbox
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.io.untrusted import one_line
from nanoft.models import adapter_files
from nanoft.models.open import open_chat_tokenizer, open_model
from nanoft.models.weights import load_model

CANARY = Path(tempfile.gettempdir(), f"nanoft-canary-{os.getpid()}")  # a directory that no case may make
SECRET = "-----BEGIN PRIVATE KEY----- of somebody"
TOKEN = "hf_" + "aB3" * 12
MEMORY = 3 << 30  # bytes of address space besides what the process has with everything imported


@dataclass(frozen=True)
class Case:
    kind: str  # model | tokenizer | adapter | run | config, or a command on one: train | merge | eval
    change: Callable[[Path], Any]
    says: str  # a regular expression


class Payload:
    """Unpickled, it makes the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(CANARY),)


# ---- Safetensors files


def tensor_file(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else header.encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + data


def entry(start: Any = 0, stop: Any = 8, shape: Any = (2,), form: Any = "F32", **more: Any) -> str:
    return json.dumps({"dtype": form, "shape": shape, "data_offsets": [start, stop], **more})


def one(said: str, data: int = 8) -> bytes:
    return tensor_file('{"w":' + said + "}", bytes(data))


HEADERS: dict[str, tuple[bytes, str]] = {
    "length of 2^63": (tensor_file("{}", length=2**63), "corrupted"),
    "length beyond the file": (tensor_file("{}", length=3), "corrupted"),
    "no header": (tensor_file(""), "corrupted"),
    "null": (tensor_file("null"), "corrupted"),
    "a list": (tensor_file("[]"), "corrupted"),
    "a text": (tensor_file('"w"'), "corrupted"),
    "nested": (tensor_file('{"w":' + "[" * 100_000), "corrupted"),
    "nested a little": (tensor_file('{"w":' + "[" * 80 + "]" * 80 + "}"), "corrupted"),
    "not UTF-8": (tensor_file(b'{"\xff": 1}'), "corrupted"),
    "UTF-16": (tensor_file("{}".encode("utf-16")), "corrupted"),
    "a name twice": (tensor_file('{"w":' + entry() + ',"w":' + entry() + "}", bytes(8)), "'w' appears a second time"),
    "a field twice": (one(entry()[:-1] + ', "dtype": "F16"}'), "duplicate field `dtype`"),
    "overlap": (tensor_file(f'{{"a":{entry()},"b":{entry(4, 12)}}}', bytes(12)), "corrupted"),
    "one place for two": (
        tensor_file(f'{{"a":{entry()},"b":{entry()}}}', bytes(8)),
        "corrupted",
    ),
    "hole": (tensor_file(f'{{"a":{entry()},"b":{entry(12, 20)}}}', bytes(20)), "corrupted"),
    "a hole in front": (one(entry(8, 16), 16), "corrupted"),
    "reversed": (one(entry(8, 0)), "corrupted"),
    "beyond the file": (one(entry(0, 8), 4), "corrupted"),
    "far beyond the file": (one(entry(0, 2**42, [2**40])), "corrupted"),
    "bytes left over": (one(entry(), 9), "corrupted"),
    "negative place": (one(entry(-8, 0)), "corrupted"),
    "fractional place": (one(entry(0, 8.0)), "corrupted"),
    "true as a place": (one(entry(False, 8)), "corrupted"),
    "a text as a place": (one(entry("0", 8)), "corrupted"),
    "three places": (one('{"dtype":"F32","shape":[2],"data_offsets":[0,4,8]}'), "corrupted"),
    "negative shape": (one(entry(shape=[-2])), "corrupted"),
    "two negatives": (one(entry(shape=[-1, -2])), "corrupted"),
    "shape that overflows": (one(entry(0, 0, [2**62, 4])), "corrupted"),
    "place that overflows": (one(entry(0, 2**64)), "corrupted"),
    "a number of 5,000 digits": (
        one('{"dtype":"F32","shape":[1' + "0" * 5000 + '],"data_offsets":[0,8]}'),
        "corrupted",
    ),
    "a million dimensions": (one(entry(shape=[1] * 1_000_000)), "corrupted"),
    "shape as a number": (one(entry(shape=2)), "corrupted"),
    "shape of lists": (one(entry(shape=[[2]])), "corrupted"),
    "type of another size": (one(entry(form="F16")), "corrupted"),
    "type unheard of": (one(entry(form="F3")), "corrupted"),
    "type as a list": (one(entry(form=["F32"])), "corrupted"),
    "another field": (one(entry(code="x")), "do not fit config.json"),
    "field missing": (one('{"dtype":"F32","shape":[2]}'), "corrupted"),
    "an entry that is null": (one("null"), "corrupted"),
    "terminal codes in a name": (
        tensor_file('{"\\u001b]0;x\\u0007":' + entry() + "}", bytes(8)),
        "do not fit config.json",
    ),
    "half a character in a name": (tensor_file('{"\\ud800":' + entry() + "}", bytes(8)), "corrupted"),
    "metadata as a list": (tensor_file('{"__metadata__":[]}'), "corrupted"),
    "metadata of tables": (tensor_file('{"__metadata__":{"a":{}}}'), "corrupted"),
    "17 MB of white space": (tensor_file("{" + " " * (17 << 20) + "}"), "do not fit config.json"),
    "a pickle": (pickle.dumps(Payload()), "corrupted"),
    "a zip file": (b"PK\x03\x04" + bytes(100), "corrupted"),
    "nothing": (b"", "corrupted"),
    "a tensor nobody expects": (one(entry()), "do not fit config.json"),
    "names without end": (
        tensor_file("{" + ",".join(f'"{n}{"x" * 40}":{entry(0, 0, [0])}' for n in range(100_000)) + "}"),
        "tensors do not fit config.json",
    ),
}


def put(name: str, content: bytes | str) -> Callable[[Path], Any]:
    """Replace a file."""
    data = content.encode() if isinstance(content, str) else content

    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(data)

    return change


def fields(name: str, **changes: Any) -> Callable[[Path], Any]:
    """Change a JSON file."""

    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def raw_field(name: str, field: str, value: str) -> Callable[[Path], Any]:
    """Add a field to a JSON file, as text."""

    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(path.read_text().rstrip()[:-1] + f', "{field}": {value}}}')

    return change


def link(name: str, to: str = "outside") -> Callable[[Path], Any]:
    """Replace a file by a link; `outside` is a copy of it elsewhere, which would be read without complaint."""

    def change(directory: Path) -> None:
        path, elsewhere = directory / name, directory.with_name(f"{directory.name}-elsewhere")
        if to == "outside":
            shutil.move(path, elsewhere)
        path.unlink(missing_ok=True)
        path.symlink_to(elsewhere if to == "outside" else to)

    return change


def pipe(name: str) -> Callable[[Path], Any]:
    """Replace a file by a pipe that nobody writes into."""

    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return change


def directory(name: str) -> Callable[[Path], Any]:
    return lambda place: [(place / name).unlink(), (place / name).mkdir()]


def sparse(name: str, size: int) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        with open(directory / name, "wb") as file:
            file.truncate(size)

    return change


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda directory: [change(directory) for change in changes]


def only_pickle(old: str, new: str) -> Callable[[Path], Any]:
    return both(lambda d: (d / old).unlink(), put(new, pickle.dumps(Payload())))


def huge_tensor(directory: Path) -> None:
    """A file of a terabyte, which takes no room on the disk: one tensor that the model has, of another shape."""
    header = '{"model.norm.weight":' + entry(0, 2**40, [2**38]) + "}"
    (directory / "model.safetensors").write_bytes(tensor_file(header))
    os.truncate(directory / "model.safetensors", 8 + len(header) + 2**40)


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NO_COUNT = "is not a whole number from 1 to"
MODELS = {f"header: {name}": Case("model", put(WEIGHTS, data), says) for name, (data, says) in HEADERS.items()} | {
    "weights in a pickle": Case(
        "model", only_pickle(WEIGHTS, "pytorch_model.bin"), "pickles, such as pytorch_model.bin"
    ),
    "weights in pickles": Case("model", only_pickle(WEIGHTS, "pytorch_model-00001-of-00002.bin"), "pickle"),
    "weights of a terabyte": Case("model", huge_tensor, "tensors do not fit|Cannot allocate memory"),
    "weights linked from elsewhere": Case("model", link(WEIGHTS), "leads out of its directory"),
    "weights as a pipe": Case("model", pipe(WEIGHTS), "not a plain file"),
    "weights that never end": Case("model", link(WEIGHTS, "/dev/zero"), "leads out of its directory"),
    "a shard linked from elsewhere": Case(
        "model",
        both(put(INDEX, '{"weight_map": {"w": "model.safetensors"}}'), link(WEIGHTS)),
        "leads out of its directory",
    ),
    "a shard with a long name": Case("model", put(INDEX, '{"weight_map": {"w": "' + "x" * 5000 + '"}}'), "weight_map"),
    "a shard with a zero byte": Case(
        "model", both(put(INDEX, '{"weight_map": {"w": "a\\u0000b"}}'), lambda d: (d / WEIGHTS).unlink()), "missing"
    ),
    "a shard two levels up": Case("model", put(INDEX, '{"weight_map": {"w": "../../model.safetensors"}}'), "leaves"),
    "an index of 17 MB": Case("model", put(INDEX, "[" + "0," * (17 << 19) + "0]"), "larger than"),
    "an index nested": Case("model", put(INDEX, '{"weight_map":' * 70 + "1" + "}" * 70), "nested too deeply"),
    "config as a pipe": Case("model", pipe(CONFIG), "config.json: not a plain file"),
    "config that never ends": Case("model", link(CONFIG, "/dev/zero"), "config.json: a link that leads out"),
    "config linked from elsewhere": Case("model", link(CONFIG), "config.json: a link that leads out"),
    "config linked to itself": Case("model", link(CONFIG, CONFIG), "config.json: cannot be read"),
    "config as a directory": Case(
        "model", both(lambda d: (d / CONFIG).unlink(), lambda d: (d / CONFIG).mkdir()), CONFIG
    ),
    "config of a gigabyte": Case("model", sparse(CONFIG, 1 << 30), "larger than"),
    "config with a mark in front": Case("model", put(CONFIG, b"\xef\xbb\xbf{}"), "architectures: none"),
    "config nested": Case("model", raw_field(CONFIG, "x", "[" * 900 + "]" * 900), "nested too deeply"),
    "an unknown field of 10 MB": Case("model", raw_field(CONFIG, "x", '"' + "y" * 10_000_000 + '"'), "x: 'yyy"),
    "a number of 5,000 digits": Case("model", raw_field(CONFIG, "hidden_size", "1" + "0" * 5000), "not valid JSON"),
    "code of its own": Case("model", fields(CONFIG, auto_map={"AutoModel": "evil.Model"}), "auto_map: .*never runs"),
    "code of its own, asked for": Case("model", fields(CONFIG, trust_remote_code=True), "trust_remote_code"),
    "code of its own, for a pipeline": Case("model", fields(CONFIG, custom_pipelines={"x": {}}), "custom_pipelines"),
    "hidden_size 10^12": Case("model", fields(CONFIG, hidden_size=10**12), f"hidden_size: .*{NO_COUNT}"),
    "hidden_size -1": Case("model", fields(CONFIG, hidden_size=-1), f"hidden_size: -1 {NO_COUNT}"),
    "hidden_size 32.0": Case("model", fields(CONFIG, hidden_size=32.0), f"hidden_size: 32.0 {NO_COUNT}"),
    "hidden_size a text": Case("model", fields(CONFIG, hidden_size="32"), f"hidden_size: '32' {NO_COUNT}"),
    "hidden_size true": Case("model", fields(CONFIG, hidden_size=True), f"hidden_size: True {NO_COUNT}"),
    "hidden_size a list": Case("model", fields(CONFIG, hidden_size=[32]), f"hidden_size: .*{NO_COUNT}"),
    "layers 10^9": Case("model", fields(CONFIG, num_hidden_layers=10**9), f"num_hidden_layers: .*{NO_COUNT}"),
    "layers 10^9, Qwen": Case(
        "model", fields(CONFIG, num_hidden_layers=10**9, architectures=["Qwen2ForCausalLM"]), "num_hidden_layers"
    ),
    "vocab_size 10^15": Case("model", fields(CONFIG, vocab_size=10**15), f"vocab_size: .*{NO_COUNT}"),
    "heads 10^9": Case("model", fields(CONFIG, num_attention_heads=10**9), f"num_attention_heads: .*{NO_COUNT}"),
    "key heads 10^9": Case("model", fields(CONFIG, num_key_value_heads=10**9), f"num_key_value_heads: .*{NO_COUNT}"),
    "head_dim 10^11": Case("model", fields(CONFIG, head_dim=10**11), f"head_dim: .*{NO_COUNT}"),
    "intermediate_size 10^18": Case("model", fields(CONFIG, intermediate_size=10**18), "intermediate_size"),
    "every size at its largest": Case(
        "model",
        fields(CONFIG, vocab_size=1 << 22, hidden_size=1 << 18, intermediate_size=1 << 20, head_dim=1 << 13),
        "do not fit config.json",
    ),
    "a thousand layers": Case("model", fields(CONFIG, num_hidden_layers=1000), "do not fit config.json"),
    "a window of 10^30": Case("model", fields(CONFIG, sliding_window=10**30), "sliding_window"),
    "a million layer types": Case(
        "model",
        fields(CONFIG, architectures=["Qwen2ForCausalLM"], use_sliding_window=True, layer_types=["x"] * 1_000_000),
        "layer_types",
    ),
    "epsilon NaN": Case("model", fields(CONFIG, rms_norm_eps=float("nan")), "rms_norm_eps"),
    "epsilon infinite": Case("model", raw_field(CONFIG, "rms_norm_eps", "1e999"), "rms_norm_eps"),
    "epsilon 10^400": Case("model", fields(CONFIG, rms_norm_eps=10**400), "rms_norm_eps"),
    "theta NaN": Case("model", fields(CONFIG, rope_theta=float("nan")), "rope"),
    "theta 10^400": Case("model", fields(CONFIG, rope_theta=10**400), CONFIG),
    "rope by zero": Case("model", fields(CONFIG, rope_scaling={"type": "linear", "factor": 0}), "config.json"),
    "rope as a list": Case("model", fields(CONFIG, rope_scaling=[1]), "config.json"),
    "rope with an infinite factor": Case(
        "model",
        fields(CONFIG, rope_scaling={"type": "yarn", "factor": 2.0, "attention_factor": float("inf")}),
        "angles are not finite",
    ),
    "architectures in lists": Case("model", fields(CONFIG, architectures=[["LlamaForCausalLM"]]), "config.json"),
    "quantization as a list": Case("model", fields(CONFIG, quantization_config=[1]), "config.json"),
}

# ---- Tokenizers and templates

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
BLOCKS = "".join(
    f"{{% block b{n} %}}{{{{ self.b{n + 1}() }}}}{{{{ self.b{n + 1}() }}}}{{% endblock %}}" for n in range(40)
)
MILLION = "{% set x = range(100000) | list %}{% set t = 'a' * 900000 %}"


def template(source: str, says: str = "takes more than") -> Case:
    return Case("tokenizer", put(TEMPLATE, source), says)


def tokens(*contents: str) -> Callable[[Path], Any]:
    """Add control tokens."""

    def change(directory: Path) -> None:
        path = directory / TOKENIZER
        tokenizer = json.loads(path.read_text())
        first = 1 + max([*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])])
        tokenizer["added_tokens"] += [{"id": first + n, "content": c, **SPECIAL} for n, c in enumerate(contents)]
        path.write_text(json.dumps(tokenizer))

    return change


def big_id(directory: Path) -> None:
    path = directory / TOKENIZER
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["zzz"] = 2**32 - 1
    path.write_text(json.dumps(tokenizer))


def part(**parts: Any) -> Callable[[Path], Any]:
    return fields(TOKENIZER, **parts)


TOKENIZERS = {
    "endless expression": Case(
        "tokenizer",
        part(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(a+)+(?=[bc])"}}),
        "cannot encode|not a valid tokenizer",
    ),
    "expression that is none": Case(
        "tokenizer", part(pre_tokenizer={**SPLIT, "pattern": {"Regex": "("}}), "not a valid"
    ),
    "pieces of length 0": Case("tokenizer", part(pre_tokenizer={"type": "FixedLength", "length": 0}), "non-zero"),
    "special token that is not there": Case(
        "tokenizer",
        part(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "not a valid tokenizer",
    ),
    "a chart that is none": Case(
        "tokenizer", part(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "not a valid tokenizer"
    ),
    "doubling": Case(
        "tokenizer", part(normalizer={"type": "Sequence", "normalizers": [DOUBLE] * 60}), "64 times longer"
    ),
    "a letter into a book": Case("tokenizer", part(normalizer={**DOUBLE, "content": "b" * 10_000_000}), "64 times"),
    "an expression into a book": Case(
        "tokenizer", part(normalizer={**DOUBLE, "pattern": {"Regex": ""}, "content": "b" * 100}), "64 times"
    ),
    "a book in front": Case("tokenizer", part(normalizer={"type": "Prepend", "prepend": "b" * 10**7}), "64 times"),
    "doubling in the decoder": Case(
        "tokenizer", part(decoder={"type": "Sequence", "decoders": [DOUBLE] * 60}), "64 times"
    ),
    "a token number of 2^32": Case("tokenizer", big_id, "a token has the id 4,294,967,295"),
    "control tokens that never end": Case("tokenizer", tokens("ro", "r\ufdd0"), "reserved Unicode noncharacter"),
    "30,000 control tokens": Case("tokenizer", tokens(*(f"<{n}>" for n in range(30_000))), "control tokens"),
    "nested": Case("tokenizer", put(TOKENIZER, '{"model":' + "[" * 100_000), "not a valid tokenizer"),
    "of 101 MB": Case("tokenizer", sparse(TOKENIZER, 101 << 20), "larger than"),
    "as a pipe": Case("tokenizer", pipe(TOKENIZER), "no such file"),
    "linked from elsewhere": Case("tokenizer", link(TOKENIZER), "leads out of its directory"),
    "settings linked from elsewhere": Case("tokenizer", link(SETTINGS), "leads out of its directory"),
    "settings nested": Case("tokenizer", put(SETTINGS, '{"a":' * 100 + "1" + "}" * 100), "nested too deeply"),
    "settings with code": Case("tokenizer", fields(SETTINGS, auto_map={"AutoTokenizer": ["x.T", None]}), "never runs"),
    "stop token 10^30": Case(
        "tokenizer", put("generation_config.json", f'{{"eos_token_id": {10**30}}}'), "expected token ids"
    ),
    "stop token -1": Case("tokenizer", put("generation_config.json", '{"eos_token_id": [-1]}'), "expected token ids"),
    "stop token true": Case("tokenizer", put("generation_config.json", '{"eos_token_id": true}'), "expected token ids"),
    "template linked from elsewhere": Case(
        "tokenizer", both(put(TEMPLATE, "{{ messages }}"), link(TEMPLATE)), "leads out of its directory"
    ),
    "template of a gigabyte": Case("tokenizer", sparse(TEMPLATE, 1 << 30), "larger than"),
    "template: blocks of blocks": template(BLOCKS + "{% block b40 %}{% endblock %}", "more than|recursion"),
    "template: searches": template(MILLION + "{{ 'q' in x }}" * 12_000),
    "template: comparisons": template(MILLION + "{% set y = range(100000) | list %}" + "{{ x == y }}" * 13_000),
    "template: searches in a text": template(MILLION + "{{ t.find('ab') }}{{ t.count('aab') }}" * 5_000),
    "template: searches in a loop": template(
        MILLION + "{% for i in range(1000) %}" + "{% if 'q' in x %}{% endif %}" * 500 + "{% endfor %}"
    ),
    "template: a namespace in itself": template(
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns | tojson }}", "more than|serial"
    ),
    "template: a namespace in itself, joined": template(
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns | join }}", "more than|iterable"
    ),
    "template: long": template("{{ a }}" * 30_000, "the limit is 200,000"),
    "template: long, but short enough": template("{{ a }}" * 28_000 + "{{ 1 // 0 }}", "division"),
    "template: a shell": template(
        f"{{{{ cycler.__init__.__globals__.os.mkdir('{CANARY}') }}}}", "unsafe|undefined|has no attribute"
    ),
    "template: a module": template(f"{{{{ self.__init__.__globals__['os'].mkdir('{CANARY}') }}}}", "unsafe|undefined"),
}

# ---- Adapters

ADAPTER, ADAPTED = "adapter_config.json", "adapter_model.safetensors"
ENDLESS = "(.+)+!"


def first_a(shape: list[int], form: str, size: int) -> Callable[[Path], Any]:
    """The adapter's file with nothing but one A, and a B of no columns."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = f'"{name}A.weight":{entry(0, size, shape, form)},"{name}B.weight":{entry(size, size, [32, 0], form)}'
    return put(ADAPTED, tensor_file(f"{{{pair}}}", bytes(size)))


def retype(directory: Path) -> None:
    """Every tensor of the adapter as whole numbers of the same width."""
    path = directory / ADAPTED
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))


ADAPTERS = {
    "adapter in a pickle": Case(
        "adapter", only_pickle(ADAPTED, "adapter_model.bin"), "adapter_model.bin: pickles can run code"
    ),
    "adapter linked from elsewhere": Case("adapter", link(ADAPTED), "leads out of its directory"),
    "adapter as a pipe": Case("adapter", pipe(ADAPTED), "is missing"),
    "its config linked from elsewhere": Case("adapter", link(ADAPTER), "leads out of its directory"),
    "its config nested": Case("adapter", raw_field(ADAPTER, "x", "[" * 80 + "]" * 80), "nested too deeply"),
    "its note nested": Case("adapter", put("nanoft.json", '{"a":' * 80 + "1" + "}" * 80), "nested too deeply"),
    "its tensors in one place": Case("adapter", put(ADAPTED, HEADERS["one place for two"][0]), "corrupted"),
    "its tensors twice": Case("adapter", put(ADAPTED, HEADERS["a name twice"][0]), "corrupted"),
    "a matrix that is a number": Case("adapter", first_a([], "F32", 4), "has rank 0"),
    "a matrix of nothing": Case("adapter", first_a([0, 32], "F32", 0), "has rank 0"),
    "whole numbers": Case("adapter", retype, "is torch.int32, but"),
    "targets that never end": Case("adapter", fields(ADAPTER, target_modules=ENDLESS), "takes longer than"),
    "targets that never end, as a list": Case(
        "adapter", fields(ADAPTER, target_modules=[ENDLESS]), "takes longer than"
    ),
    "ranks that never end": Case("adapter", fields(ADAPTER, rank_pattern={ENDLESS: 4}), "takes longer than"),
    "alphas that never end": Case("adapter", fields(ADAPTER, alpha_pattern={ENDLESS: 4}), "takes longer than"),
    "targets nested": Case("adapter", fields(ADAPTER, target_modules="(" * 5000), "not a regular expression"),
    "targets repeated": Case("adapter", fields(ADAPTER, target_modules="a{99999999999}"), "not a regular expression"),
    "flags inside": Case("adapter", fields(ADAPTER, rank_pattern={"(?i)q_proj": 4}), "not a regular expression"),
    "base with a zero byte": Case(
        "adapter", fields(ADAPTER, base_model_name_or_path="/a\0b"), "base_model_name_or_path"
    ),
    "base with a long name": Case(
        "adapter", fields(ADAPTER, base_model_name_or_path="/" + "x" * 9999), "base_model_name"
    ),
    "base that is a list": Case("adapter", fields(ADAPTER, base_model_name_or_path=["x"]), "is not a name"),
    "rank true": Case("adapter", fields(ADAPTER, rank_pattern={"q_proj": True}), "rank_pattern"),
    "rank 10^9 by pattern": Case("adapter", fields(ADAPTER, rank_pattern={"q_proj": 10**9}), "out of range"),
}

# ---- Runs and their checkpoints

STEP = "checkpoints/step-000004"


def sealed(name: str, content: bytes | None, **config: Any) -> Callable[[Path], Any]:
    """Replace, or remove, a file of the best checkpoint, its manifest made to fit."""

    def change(run: Path) -> None:
        path = run / STEP / "manifest.json"
        body = json.loads(path.read_text())["body"]
        (run / STEP / name).unlink()
        del body["files"][name]
        if content is not None:
            (run / STEP / name).write_bytes(content)
            body["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        digest = hashlib.sha256(json.dumps(body, indent=1, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({"body": body, "sha256": digest}))
        stored = json.loads((run / CONFIG).read_text())
        for section, values in config.items():
            stored[section].update(values)
        (run / CONFIG).write_text(json.dumps(stored))

    return change


def pissa(run: Path) -> None:
    stored = json.loads((run / CONFIG).read_text())
    stored["lora"]["init"] = "pissa"
    (run / CONFIG).write_text(json.dumps(stored))


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A0.weight"
RUNS = {
    "state without a step": Case("run", sealed("state.json", b"{}"), "state.json: step: None"),
    "state with a step in words": Case("run", sealed("state.json", b'{"step": "4"}'), "state.json: step: '4'"),
    "state nested": Case("run", sealed("state.json", b'{"a":' * 80 + b"1" + b"}" * 80), "state.json"),
    "weights in one place": Case("run", sealed("adapter.safetensors", HEADERS["overlap"][0]), "adapter.safetensors"),
    "weights a pickle": Case("run", sealed("adapter.safetensors", pickle.dumps(Payload())), "corrupted"),
    "no weights": Case("run", sealed("adapter.safetensors", None), "adapter.safetensors: no such file"),
    "half of PiSSA": Case(
        "run",
        sealed("adapter.safetensors", tensor_file(f'{{"{NAME}":{entry()}}}', bytes(8)), lora={"init": "pissa"}),
        "not the tensors of an adapter",
    ),
    "PiSSA that is none": Case("run", pissa, "step-000004|do not fit|has|is"),
    "manifest as a pipe": Case("run", pipe(f"{STEP}/manifest.json"), "manifest.json"),
    "manifest linked from elsewhere": Case("run", link(f"{STEP}/manifest.json"), "manifest.json|unexpected file"),
    "manifest of a gigabyte": Case("run", sparse(f"{STEP}/manifest.json", 1 << 30), "manifest.json"),
    "best nested": Case("run", put("best.json", '{"a":' * 80 + "1" + "}" * 80), "best.json"),
    "best outside": Case("run", put("best.json", '{"checkpoint": "/etc/passwd"}'), "checkpoints/passwd"),
    "provenance as a list": Case("run", fields(CONFIG, provenance=[1]), "config.json: provenance"),
    "provenance without a type": Case("run", fields(CONFIG, provenance={"dtype": ["x"]}), "provenance.dtype"),
    "a date that is none": Case("run", fields(CONFIG, provenance={"dtype": "float32", "date": [1]}), "provenance.date"),
    "config nested": Case("run", raw_field(CONFIG, "x", "[" * 80 + "]" * 80), "nested too deeply"),
}

# ---- Configs


def laughs(rows: int, join: str = "[{}]") -> str:
    lines = [f"a0: &a0 {join.format(', '.join(['x'] * 9))}"]
    lines += [f"a{n}: &a{n} {join.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, rows)]
    return "\n".join(lines) + f"\ndata: *a{rows - 1}\n"


MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 30))
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200))


def yaml(text: str, says: str = "not valid YAML") -> Case:
    return Case("config", put("c.yaml", text), says)


CONFIGS = {
    "laughs": yaml(laughs(30)),
    "merges": yaml(MERGES + "model: *a29"),
    "an alias in itself": yaml("model: &a {name: *a}"),
    "a list in itself": yaml("lora: {target_modules: &a [*a]}"),
    "a chain of aliases": yaml(CHAIN + "lora: *a199"),
    "a date that is none": yaml("model: {name: !!timestamp x}"),
    "a number that is empty": yaml("lora: {rank: !!int ''}"),
    "a truth that is none": yaml("data: {packing: !!bool x}"),
    "a number of 5,000 digits": yaml("lora: {rank: 0x" + "f" * 5000 + "}"),
    "a number of 2,000 places": yaml("lora: {rank: " + "1:" * 2000 + "1}"),
    "200 KB": yaml("# " + "x" * 200_000),
    "lists in a text": yaml("data: {columns: '" + "[" * 5000 + "'}", "data.columns"),
    "laughs in a text": yaml("data: {columns: '{a: &a [x,x], b: &b [*a,*a], c: *q}'}", "data.columns"),
    "an object": yaml(f"model: !!python/object/apply:os.mkdir ['{CANARY}']"),
    "a new object": yaml(f"model: !!python/object/new:os.mkdir ['{CANARY}']"),
    "a module": yaml("model: !!python/module:antigravity"),
    "bytes that are none": yaml("model: {name: !!binary '='}", "not valid YAML|model.name"),
    "keys that are lists": yaml("? [a]\n: 1"),
    "a control character": yaml("model: {name: '\x07'}"),
    "a token": yaml(f"model: {{name: {TOKEN}}}", "model.name: contains what looks like an access token"),
    "a token in a table": yaml(f"data: {{template_args: {{key: {TOKEN}}}}}", "template_args: contains what looks"),
    "a password": yaml("data: {train_file: 'https://me:secret@x.org/a.jsonl'}", "train_file: contains what looks"),
    "JSON nested": Case("config", put("c.json", '{"model":' * 70 + "1" + "}" * 70), "nested too deeply"),
    "JSON of 17 MB": Case("config", put("c.json", '"' + "x" * (17 << 20) + '"'), "larger than"),
    "a pipe": Case("config", pipe("c.yaml"), "no such config file"),
    "an endless file": Case("config", link("c.yaml", "/dev/zero"), "no such config file"),
    "an expression nested": yaml("lora: {target_modules: ['" + "(" * 3000 + "']}", "regular expression"),
    "a rank in lists": yaml("lora: {rank: " + "[" * 50 + "]" * 50 + "}", "lora.rank"),
    "provenance as a text": Case("config", put("c.json", '{"provenance": "x"}'), "provenance"),
}

# ---- The same through the commands


def stolen(directory: Path) -> None:
    """A file beside the adapter that is a link to a private key, which merging would publish."""
    key = directory.with_name(f"{directory.name}-key")
    key.write_text(SECRET)
    (directory / "tokenizer.model").symlink_to(key)


COMMANDS = {
    **{
        f"train: {name}": Case("train", MODELS[name].change, MODELS[name].says)
        for name in (
            "header: length of 2^63", "header: a name twice", "header: one place for two", "weights in a pickle",
            "weights linked from elsewhere", "config as a pipe", "code of its own", "hidden_size 10^12", "layers 10^9",
            "a window of 10^30", "quantization as a list", "an unknown field of 10 MB",
            "header: terminal codes in a name", "epsilon NaN",
        )
    },
    **{
        f"train: tokenizer: {name}": Case("train", TOKENIZERS[name].change, TOKENIZERS[name].says)
        for name in (
            "doubling", "a token number of 2^32", "control tokens that never end", "settings with code",
            "pieces of length 0", "linked from elsewhere",
        )
    },
    "train: quantization in lists": Case(
        "train",
        fields(CONFIG, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": ["nf4"]}),
        "quantization_config",
    ),
    **{
        f"{command}: {name}": Case(command, ADAPTERS[name].change, ADAPTERS[name].says)
        for command in ("merge", "eval")
        for name in (
            "adapter in a pickle", "adapter linked from elsewhere", "its tensors twice", "targets that never end",
            "whole numbers", "its config nested",
        )
    },
    "merge: somebody's key": Case("merge_stolen", lambda d: None, "tokenizer.model: a link that leads out"),
}  # fmt: skip

CASES: dict[str, Case] = {
    **{f"model: {name}": case for name, case in MODELS.items()},
    **{f"tokenizer: {name}": case for name, case in TOKENIZERS.items()},
    **{f"adapter: {name}": case for name, case in ADAPTERS.items()},
    **{f"run: {name}": case for name, case in RUNS.items()},
    **{f"config: {name}": case for name, case in CONFIGS.items()},
    **COMMANDS,
}


# ---- Running them


def read(kind: str, path: Path, good: Path) -> str:
    """Read a case as nanoft does; returns the error as the terminal shows it."""
    from nanoft import UserError

    cpu, talk = torch.device("cpu"), [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b"}]
    try:
        if kind == "model":
            load_model(path, cpu, torch.float32)
        elif kind == "tokenizer":
            chat = ChatTokenizer(path)
            list(chat.encode(chat.render_samples(talk, 0)))
        elif kind == "config":
            load_config(path / ("c.json" if (path / "c.json").exists() else "c.yaml"), [], {})
        elif kind in ("adapter", "run"):
            open_chat_tokenizer(str(path), open_model(str(path), cpu, torch.float32), as_trained=True)
        else:
            return command(kind, path, good)
    except UserError as error:
        return one_line(error)
    return "accepted"


def command(kind: str, path: Path, good: Path) -> str:
    """Run a command on a case, as from the terminal; returns its last line if it exits with 2."""
    import eval as eval_command
    import merge
    import train

    out = path.with_name(f"{path.name}-out")
    if kind == "train":
        settings = json.loads((good / "run.json").read_text())
        settings["model"]["name"], settings["output"]["dir"] = str(path), str(out)
        out.with_suffix(".json").write_text(json.dumps(settings))
        main, arguments = train.main, [str(out.with_suffix(".json"))]
    elif kind == "eval":
        main, arguments = eval_command.main, [str(path), "--data", str(good / "data.jsonl"), "evaluation.prompts=2"]
    else:
        main, arguments = merge.main, [str(path), "--out", str(out)]
    said, stdout = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(stdout):
        code = main(arguments)
    if code != 2 or said.getvalue().count("\n") != 1 or out.exists():
        return f"exit code {code}, {out.name} there: {out.exists()}, said: {said.getvalue()[-2000:]}"
    return said.getvalue().rstrip("\n")


def run_cases() -> None:
    """Cases, as (name, kind, path) in JSON on stdin, one after another; prints (name, what was said, seconds).

    The limits of time are shorter than in use, so that the tests are.
    """

    template_sandbox.MAX_SECONDS = lora.MATCHING_SECONDS = adapter_files.MATCHING_SECONDS = 0.5
    good, cases = json.load(sys.stdin)
    read("model", Path(good) / "model", Path(good))  # everything is imported before memory is limited

    with open("/proc/self/statm") as sizes:
        limit = int(sizes.read().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, kind, path in cases:
        started = time.process_time()
        try:
            said = read(kind, Path(path), Path(good))
        except BaseException as error:
            said = f"escaped: {type(error).__name__}: {error}"[:2000]
        print(json.dumps([name, said, time.process_time() - started]), flush=True)


if __name__ == "__main__":
    run_cases()
