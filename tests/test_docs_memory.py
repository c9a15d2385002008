"""docs/memory.md against the planner: every planned figure in it is recomputed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from shapes import MISTRAL_7B, SHAPES

from nanoft.config import Config
from nanoft.config.loading import load_file
from nanoft.generation.decode import Decoding
from nanoft.models.families import decoder_config
from nanoft.models.weights import load_model
from nanoft.runtime.device import DTYPES, Machine
from nanoft.training.memory_plan import Plan, Planner, block_bytes, count_parameters, host_bytes
from nanoft.training.plan import gflop_per_token
from tiny_models import make_reference

ROOT = Path(__file__).parent.parent
MEMORY = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")


def plan(config: Config) -> Plan:
    """What --plan computes for a GPU with the memory that the config names, without such a GPU."""
    memory_bytes = (config.system.memory_gb or 0) * 1e9
    dtype = DTYPES.get(config.model.dtype, torch.bfloat16)
    machine = Machine(torch.device("cuda"), dtype, memory_bytes, present=False)
    planner = Planner.of(config, machine, decoder_config(SHAPES[config.model.name]))
    return planner.choose_activations(config.micro_batch_rows(), config.model.max_seq_length)


def gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def section(title: str) -> str:
    return MEMORY[MEMORY.index(f"## {title}") :].removeprefix("## ").partition("\n## ")[0]


EXAMPLE = load_file(ROOT / "configs" / "gpu_12gb.py").override({"training.checkpointing": "none"})


def test_the_example_is_what_the_planner_finds() -> None:
    found = plan(EXAMPLE)
    rows = dict(re.findall(r"^\| `?([a-z, ]+?)`? \|.*\| ([\d.]+) \|$", section("One example"), re.MULTILINE))
    zero = {name for name, size in found.parts.items() if not size}
    assert rows.keys() - {"peak"} == found.parts.keys() - zero
    assert {name: f"{found.parts[name] / 1e9:.3f}" for name in rows if name != "peak"} | {
        "peak": gb(found.peak)
    } == rows


def test_the_arithmetic_of_the_example_is_right() -> None:
    """The products that stand there, with their operands, give the figures beside them."""
    counts = count_parameters(decoder_config(MISTRAL_7B), EXAMPLE)
    text = section("One example")
    for value in (counts.linears, counts.others, counts.trained, 94_432):
        assert f"{value:,}" in text
    number, operator = r"\(*\d[\d,./]*\)*", r" [x+/] "
    sums = re.findall(rf"({number}(?:{operator}{number})+) = (\d[\d,.]*\d)", text + section("Evaluation"))
    assert len(sums) >= 8
    for formula, shown in sums:
        value = eval(formula.replace(",", "").replace("x", "*"), {"__builtins__": {}})
        scale = 1e9 if "." in shown else 1
        assert value / scale == pytest.approx(float(shown.replace(",", "")), abs=5e-4), formula


def test_each_setting_moves_the_peak_as_the_table_says() -> None:
    rows = re.findall(r"^\| `([\w.]+)=(\w+)` \| ([\d.]+) \|", section("What a setting saves"), re.MULTILINE)
    assert len(rows) >= 12
    found = {f"{name}={value}": gb(plan(EXAMPLE.override({name: value})).peak) for name, value, _ in rows}
    assert found == {f"{name}={value}": shown for name, value, shown in rows}


def test_the_cost_of_recomputing_blocks() -> None:
    decoder = decoder_config(MISTRAL_7B)
    counts = count_parameters(decoder, EXAMPLE)
    once, twice = (gflop_per_token(decoder, counts, EXAMPLE, 2048, again) for again in (0.0, 1.0))
    (shown,) = re.findall(r"(\d+) % more work", MEMORY)
    assert round(100 * (twice / once - 1)) == int(shown)


def test_the_table_of_gpus_is_the_plan_of_their_configs() -> None:
    lines = [line.strip("| ").split(" | ") for line in section("By GPU").splitlines() if line.startswith("| ")]
    names, *rows = [cells for cells in lines if not cells[0].startswith("---")]
    configs = [load_file(ROOT / name.strip("`")) for name in names[1:]]
    plans = [plan(config) for config in configs]
    shown = {cells[0].strip("`"): cells[1:] for cells in rows}
    expected = {name: [gb(p.parts[name]) for p in plans] for name in plans[0].parts if name in shown}
    expected |= {
        "peak": [gb(p.peak) for p in plans],
        "blocks recomputed": [f"{sum(k != 'all' for k in p.keep)} of {len(p.keep)}" for p in plans],
        "sequences x tokens": [f"{c.micro_batch_rows()} x {c.model.max_seq_length}" for c in configs],
    }
    assert {name: cells for name, cells in shown.items() if name != "model"} == expected
    assert len(expected) == 11


def test_the_cache_of_keys_and_values_has_the_size_of_the_formula(tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    model = load_model(tmp_path, CPU, torch.bfloat16)
    decoding, c = Decoding(model), model.config
    with torch.no_grad():
        decoding.join([[3, 4, 5], [6]], 7)
    tokens = 2 * (3 + 7)  # rows x (longest prompt + new tokens)
    assert sum(part.nbytes for part in [*decoding.keys.values(), *decoding.values.values()]) == (
        2 * c.num_layers * c.num_kv_heads * c.head_dim * 2 * tokens
    )
    assert f"{8 * (512 + 128) * 131_072 / 1e9:.2f} GB" in section("Evaluation")


def test_what_a_base_in_host_memory_takes() -> None:
    text = section("A base larger than the GPU")
    bits16, bits4 = (EXAMPLE.override({"quantization.bits": n, "training.checkpointing": "full"}) for n in (16, 4))
    machine = Machine(torch.device("cuda"), torch.bfloat16, 12e9, present=False)
    planner, packed = (Planner.of(config, machine, decoder_config(MISTRAL_7B)) for config in (bits16, bits4))
    on_host = plan(bits16.override({"model.base_device": "host"}))
    assert f"takes {gb(on_host.peak)} GB on the GPU instead of {gb(plan(bits16).peak)}: two blocks of" in text
    assert (
        f"{gb(block_bytes(planner))} GB instead of 32. In host memory it takes {host_bytes(planner) / 1e9:.1f}" in text
    )
    copied = [2 * 30 * block_bytes(one) / 1e9 for one in (planner, packed)]
    assert f"{copied[0]:.1f} GB; that" in text
    assert f"{copied[0] / 25:.2f} s, so" in text
    assert f"In 4 bits it is {copied[1]:.1f} GB" in text
