"""The configs that come with nanoft, and that every field they may set is read by the program."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from shapes import SHAPES

import train
from nanoft.config import Config
from nanoft.config.loading import load_file
from nanoft.config.settings import SECTION_NAMES, SECTION_TYPES
from nanoft.models.families import decoder_config
from nanoft.objectives import OBJECTIVES
from nanoft.recompute import keep_by_policy
from nanoft.runtime.device import DTYPES
from nanoft.training.memory_plan import count_parameters, estimate_memory
from tiny_models import make_chat_model

ROOT = Path(__file__).parent.parent
CONFIGS = sorted([*(ROOT / "configs").glob("*.py"), *(ROOT / "configs" / "experiments").glob("*.py")])
SITUATIONS = [path for path in CONFIGS if not path.stem.startswith("tiny")]
LIBRARY = [path for path in sorted((ROOT / "nanoft").rglob("*.py")) if path.parent.name != "config"]
PROGRAM = [*LIBRARY, ROOT / "train.py", ROOT / "eval.py", ROOT / "merge.py"]
NEEDS_NO_COMMENT = {"system.device"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_has_a_docstring(path: Path) -> None:
    config = load_file(path)
    assert config.data.train_file
    assert config.model.name
    assert Config.from_dict(config.to_dict()) == config
    _, paragraph = paragraphs(path)
    assert paragraph.startswith("For whoever ")


def paragraphs(path: Path) -> list[str]:
    """The first line of a config's docstring, and the paragraph after it."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    return [" ".join(part.split()) for part in docstring.split("\n\n")]


def test_there_is_a_config_for_every_situation() -> None:
    names = {str(path.relative_to(ROOT / "configs")) for path in CONFIGS}
    gpus = {f"gpu_{name}.py" for name in ("8gb", "12gb", "16gb_fp16", "24gb", "80gb")} | {"h100.py", "full_finetune.py"}
    experiments = {f"experiments/{name}.py" for name in ("high_rank", "larger_batch", "quick_test")}
    assert names >= {"tiny.py", "tiny_dpo.py", "tiny_kto.py", "dpo_7b.py", "m4.py", "cpu.py"} | gpus | experiments


def test_the_config_for_preferences_of_a_7b_model_has_the_usual_settings() -> None:
    c = load_file(ROOT / "configs" / "dpo_7b.py")
    assert (c.model.name, c.quantization.bits, c.lora.dropout) == ("mistralai/Mistral-7B-Instruct-v0.3", 16, 0.0)
    assert (c.training.objective, c.training.learning_rate, c.preference.beta) == ("dpo", 5e-6, 0.1)
    assert (16 <= c.effective_batch_size() <= 64, c.training.num_epochs) == (True, 1)


def test_the_config_for_an_h100_has_the_usual_settings() -> None:
    c = load_file(ROOT / "configs" / "h100.py")
    assert (c.model.name, c.model.dtype) == ("mistralai/Mistral-7B-Instruct-v0.3", "bfloat16")
    assert (c.model.max_seq_length, 16 <= c.effective_batch_size() <= 32) == (4096, True)
    assert (c.quantization.bits, c.quantization.type, c.quantization.double) == (4, "nf4", True)
    assert (c.lora.rank, c.lora.alpha, c.lora.dropout, c.lora.target_modules) == (16, 32.0, 0.05, ("all-linear",))
    t = c.training
    assert (t.learning_rate, t.lr_scheduler, t.warmup_ratio, t.optimizer) == (2e-4, "cosine", 0.03, "adamw_paged")
    assert (t.max_grad_norm, t.weight_decay, t.num_epochs) == (0.3, 0.01, 3)
    assert (t.log_steps, t.eval_steps, t.save_steps, t.keep_checkpoints) == (10, 100, 500, 3)
    assert (t.micro_batch_size, t.gradient_accumulation_steps, t.checkpointing) == (4, 4, "auto")
    assert (c.data.validation_split, c.logging.report_to) == (0.1, "auto")


def test_the_config_for_a_mac() -> None:
    c = load_file(ROOT / "configs" / "m4.py")
    assert (c.model.dtype, c.model.max_seq_length, c.training.checkpointing) == ("bfloat16", 2048, "auto")
    assert (c.training.micro_batch_size, c.training.gradient_accumulation_steps) == (2, 8)
    assert (c.data.validation_split, c.logging.report_to) == (0.1, "auto")


@pytest.mark.parametrize("name", ["h100", "m4"])
def test_the_expected_time_is_the_tokens_by_the_published_rate(name: str) -> None:
    text = " ".join((ROOT / "configs" / f"{name}.py").read_text().replace("\n#", "\n").split())
    config = load_file(ROOT / "configs" / f"{name}.py")
    records, length = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) records of (\d+)", text)[0])
    tokens, rate, seconds = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) / ([\d,]+) = ([\d,]+) s", text)[0])
    assert tokens == round(records * length * (1 - config.data.validation_split) * config.training.num_epochs)
    assert seconds == round(tokens / rate)
    assert f"{rate:,} tokens per second are published" in text


# --- --plan, for machines that are not here


def claimed(path: Path) -> tuple[float, float, float]:
    """What a config's paragraph says: peak in GB, the same with checkpointing=full, GFLOP per token."""
    _, text = paragraphs(path)
    peak = re.search(r"Planned, not\smeasured: ([\d.]+) GB", text)
    least = re.search(r" ([\d.]+) GB with checkpointing=full", text)
    work = re.search(r" ([\d.]+) GFLOP per token", text)
    assert peak
    assert least
    assert work
    return float(peak[1]), float(least[1]), float(work[1])


@pytest.fixture
def serve_shape(tmp_path: Path, serve_hub: Callable[[Any], None]) -> Callable[[str], type[Hub]]:
    """A Hub with one model: its config.json, and weights that must not be requested."""

    def serve(name: str) -> type[Hub]:
        files = tmp_path / "remote"
        files.mkdir()
        (files / "config.json").write_text(json.dumps(SHAPES[name]))
        (files / "model.safetensors").write_bytes(b"never read")
        hub = type("ThisHub", (Hub,), {"repository": f"models/{name}", "files": files, "asked": []})
        serve_hub(hub)
        return hub

    return serve


@pytest.mark.parametrize("path", SITUATIONS, ids=lambda path: path.stem)
def test_a_plan_needs_no_weights_and_finds_what_the_config_says(
    path: Path, serve_shape: Callable[[str], type[Hub]], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("nanoft.training.plan.measure_speed", lambda *_: (1e-3, 0.0))
    config = load_file(path)
    hub = serve_shape(config.model.name)
    assert train.main([str(path), "--plan"]) == 0
    fetched = {asked.rpartition("/")[2] for asked in hub.asked if "/resolve/" in asked}
    assert fetched == {"config.json"}
    said = capsys.readouterr().out
    figures = {name: float(number) for name, number in re.findall(r"^(\w+) +([\d.]+) G", said, re.MULTILINE)}
    peak, least, work = claimed(path)
    on_a_gpu = config.system.device != "cpu"
    assert figures["peak"] - (0 if on_a_gpu else figures["process"]) == pytest.approx(peak, rel=0.05)
    assert figures["work"] == pytest.approx(work, rel=0.05)
    assert ("not available here" in said) == (on_a_gpu and not torch.cuda.is_available())

    decoder = decoder_config(SHAPES[config.model.name])
    if config.quantization.bits == 4 and config.quantization.dequantize == "auto":  # the GPU of h100.py has room
        config = config.override({"quantization.dequantize": "cached"})
    dtype = DTYPES.get(config.model.dtype, torch.bfloat16)
    sequences = 2 if OBJECTIVES[config.training.objective].learns == "pairs" else 1
    size = (sequences * config.micro_batch_rows(), config.model.max_seq_length)
    again = keep_by_policy("full", 1, decoder.num_layers)
    plan = estimate_memory(
        decoder, count_parameters(decoder, config), config, config.system.device, dtype, *size, again, 0.0
    )
    assert (plan.peak - (0 if on_a_gpu else plan.parts["process"])) / 1e9 == pytest.approx(least, rel=0.05)


def test_the_table_of_the_document_has_the_figures_of_the_configs() -> None:
    text = (ROOT / "docs" / "configs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(configs/[\w/.]+)` \| .* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    shown = {ROOT / path: tuple(map(float, figures)) for path, *figures in rows}
    assert shown == {path: claimed(path) for path in SITUATIONS}


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS if path.stem.startswith("tiny")])
def test_the_plan_of_the_demo(name: str) -> None:
    assert train.main([str(ROOT / "configs" / f"{name}.py"), "--plan"]) == 0


H100 = str(ROOT / "configs" / "h100.py")


def test_what_the_described_machine_cannot_hold_is_one_line(
    serve_shape: Callable[[str], type[Hub]], capsys: pytest.CaptureFixture[str]
) -> None:
    serve_shape("mistralai/Mistral-7B-Instruct-v0.3")
    assert train.main([H100, "--plan", "system.memory_gb=6", "system.device=mps", "training.optimizer=adamw"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "training.micro_batch_size: 4 sequences of 4096 tokens take" in error
    assert "but only 5.40 GB are available" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: system.device: cuda is not available here (available: cpu): set system.device=auto\n"),
        (
            ["--plan", "system.memory_gb=none"],
            "set system.device=auto, or set system.memory_gb to plan for that",
        ),
        (["system.device=auto"], "training.optimizer: adamw_paged runs on cuda, but this device is cpu: set"),
        (["--plan", "system.device=cpu"], "training.optimizer: adamw_paged runs on cuda, but this device is cpu: set"),
        (["--plan", "system.device=tpu"], "system.device: 'tpu' is not one of auto, cuda, mps, cpu"),
    ],
    ids=str,
)
def test_a_device_that_is_not_here_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([H100, *arguments, f"output.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_an_extra_that_is_not_installed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_chat_model(tmp_path / "base")
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    own = [f"model.name={tmp_path / 'base'}", f"data.train_file={tmp_path / 'data.parquet'}"]
    assert train.main([str(ROOT / "configs" / "cpu.py"), *own, f"output.dir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.endswith("data.parquet: Parquet needs pyarrow: pip install -e '.[parquet]'\n")


# --- auto


def bindings(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Every `name = value`, also inside `a, b = x, y`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            if both and not any(isinstance(part, ast.Starred) for part in (*target.elts, *value.elts)):
                pairs = list(zip(target.elts, value.elts, strict=True))
            yield from ((name.id, part) for name, part in pairs if isinstance(name, ast.Name))


def fields_read(source: str) -> set[str]:
    """`section.field` for every `<...>.section.field`, and `s.field` if `s = <...>.section` or `s: SectionConfig`."""
    tree = ast.parse(source)
    dataclass_bodies = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Config")]
    definitions = {id(node) for body in dataclass_bodies for node in ast.walk(body) if body.name != "Config"}
    aliases = {
        (name, value.attr)
        for name, value in bindings(tree)
        if isinstance(value, ast.Attribute) and value.attr in SECTION_TYPES
    }
    aliases |= {
        (node.arg, SECTION_NAMES[node.annotation.id])
        for node in ast.walk(tree)
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name) and node.annotation.id in SECTION_NAMES
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in definitions:
            continue
        if isinstance(node.value, ast.Attribute):
            found.add(f"{node.value.attr}.{node.attr}")
        elif isinstance(node.value, ast.Name):
            found |= {f"{section}.{node.attr}" for name, section in aliases if name == node.value.id}
    return found


def behind_properties(section: str, read: set[str]) -> set[str]:
    """The fields that a section's properties are made of, of properties that are read."""
    used = [
        p for name, p in vars(SECTION_TYPES[section]).items() if isinstance(p, property) and f"{section}.{name}" in read
    ]
    bodies = [ast.parse(textwrap.dedent(inspect.getsource(p.fget))) for p in used if p.fget]
    nodes = [node for body in bodies for node in ast.walk(body) if isinstance(node, ast.Attribute)]
    return {f"{section}.{n.attr}" for n in nodes if isinstance(n.value, ast.Name) and n.value.id == "self"}


def test_the_fields_behind_a_property_are_read_where_it_is() -> None:
    assert behind_properties("model", {"model.reference"}) == {"model.name", "model.revision"}
    assert behind_properties("model", {"model.dtype"}) == set()


def test_the_reader_of_fields_sees_reads_and_nothing_else() -> None:
    source = """
class LoRAConfig:
    x = a.lora.alpha
t, seed = config.training, config.system.seed
print(t.max_steps, other.rank, f"{config.lora.rank}", "config.lora.dropout")
def f(d: DataConfig, rank: int): return d.packing, rank.columns
"""
    assert fields_read(source) & {f"{s}.{f.name}" for s, c in SECTION_TYPES.items() for f in dataclasses.fields(c)} == {
        "training.max_steps",
        "system.seed",
        "lora.rank",
        "data.packing",
    }


@pytest.mark.parametrize("section", SECTION_TYPES)
def test_every_field_is_read_by_the_program(section: str) -> None:
    """Outside nanoft/config/, whose validation does not count as a use."""
    read = set().union(*(fields_read(path.read_text()) for path in PROGRAM))
    read |= behind_properties(section, read)
    fields = {f"{section}.{item.name}" for item in dataclasses.fields(SECTION_TYPES[section])}
    assert fields - read == set(), "settings that nothing reads"


@pytest.mark.parametrize("section", SECTION_TYPES)
def test_every_field_is_explained_beside_it(section: str) -> None:
    source = (ROOT / "nanoft" / "config" / "settings.py").read_text()
    bodies = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    for node in bodies[SECTION_TYPES[section].__name__].body:
        if isinstance(node, (ast.Expr, ast.FunctionDef)):  # the section's docstring and properties
            continue
        assert isinstance(node, ast.AnnAssign)
        assert isinstance(node.target, ast.Name)
        line = source.splitlines()[node.lineno - 1]
        assert "  # " in line or f"{section}.{node.target.id}" in NEEDS_NO_COMMENT, line
