"""A decoder whose matrices stay on the disk, against the one in memory, bitsandbytes' packed bases included."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import MERGE_VARIANTS, PLAIN, make_adapter
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from transformers import AutoModelForCausalLM

from nanoft import UserError
from nanoft.config import LoRAConfig
from nanoft.export import streaming
from nanoft.export.merge import open_adapter, write_peft
from nanoft.export.streaming import StreamedDecoder, Weights, open_rows
from nanoft.export.verify import hidden_states
from nanoft.generation.generate import generate
from nanoft.models.adapter_files import adapter_tensors, hash_tensors
from nanoft.models.families import FAMILIES
from nanoft.models.open import open_model, read_trained_adapter
from nanoft.models.weights import load_model
from tiny_models import make_chat_model, make_packed, make_reference

CPU = torch.device("cpu")
IDS = torch.arange(3, 63).view(2, 30)


@pytest.fixture(autouse=True)
def _few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SLAB", 1000)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    result: torch.Tensor = model(ids).logits if hasattr(model, "generate") else model.logits(model(ids))
    return result


@pytest.mark.parametrize("case", ["llama-bias", "llama3-rope", "mistral-window", "qwen2", "qwen3"])
def test_from_disk_and_in_transformers_say_the_same(case: str, tmp_path: Path) -> None:
    theirs = make_reference(case, tmp_path, shard_size="100KB")
    ours = StreamedDecoder(open_rows(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-4
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    in_memory = generate(load_model(tmp_path, CPU, torch.float32).eval(), prompts, (), 12)
    assert generate(ours, prompts, (), 12) == in_memory


@pytest.mark.parametrize("family", FAMILIES)
def test_from_disk_and_in_memory_say_the_same(family: str, tmp_path: Path) -> None:
    """With the factors and caps of every family."""
    make_family(family, tmp_path)
    in_memory = load_model(tmp_path, CPU, torch.float32).eval()
    rounding = 4e-5 if in_memory.config.attention_scale == 1 else 1e-5  # unscaled attention magnifies it
    assert (logits(StreamedDecoder(open_rows(tmp_path))) - logits(in_memory)).abs().max() < rounding


def test_what_is_in_memory_is_small_and_the_head_is_not_to_be_multiplied_by(tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    model = StreamedDecoder(open_rows(tmp_path))
    assert all(p.dim() == 1 for p in model.parameters())
    assert model.head.shape == (199, 64)
    assert model.head.isnan().all()


def test_to_open_an_adapter_reads_no_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a large base would be read within the time limit on names of modules."""
    make_chat_model(tmp_path / "base", "llama-bias")
    make_adapter(tmp_path / "base", tmp_path / "adapter", lora=replace(PLAIN, target_modules=("all-linear",)))
    matrices, read = list[str](), Weights.read
    monkeypatch.setattr(Weights, "read", lambda self, name, rows: (matrices.append(name), read(self, name, rows))[1])
    streamed = open_adapter(read_trained_adapter(str(tmp_path / "adapter")), "original")
    assert matrices
    assert not [name for name in matrices if len(streamed.model.weights.shapes[name]) > 1]


@pytest.mark.parametrize("quantization", [None, {"type": "nf4", "double": True}, {"type": "int8", "double": False}])
@pytest.mark.parametrize("variant", [*MERGE_VARIANTS, "plain"])
def test_an_adapter_on_it_does_what_it_does_in_memory(variant: str, quantization: Any, tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base", "llama-bias")
    lora = replace(PLAIN, rank=4, **MERGE_VARIANTS.get(variant, {}))
    make_adapter(tmp_path / "base", tmp_path / "adapter", lora=lora, quantization=quantization, dtype="bfloat16")
    adapter = read_trained_adapter(str(tmp_path / "adapter"))
    tuned = {}
    for onto, original in (("nf4", False), ("original", True)):
        whole = open_model(str(tmp_path / "adapter"), CPU, torch.float32, original_base=original)
        streamed = open_adapter(adapter, onto)  # type: ignore[arg-type]
        tuned[onto] = logits(streamed.model)
        assert (tuned[onto] - logits(whole.model)).abs().max() < 1e-4
        assert (streamed.quantization, streamed.dtype) == (whole.quantization, whole.dtype)
    assert torch.equal(tuned["nf4"], tuned["original"]) == (quantization is None)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", [*MERGE_VARIANTS, "plain"])
def test_an_adapter_in_16_bits_does_what_its_copy_in_32_bits_does(
    variant: str, stored: torch.dtype, tmp_path: Path
) -> None:
    make_chat_model(tmp_path / "base", "llama-bias")
    lora = replace(PLAIN, rank=4, **MERGE_VARIANTS.get(variant, {}))
    path = make_adapter(tmp_path / "base", tmp_path / "adapter", lora=lora) / "adapter_model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(path).items()}, path)
    streamed = open_adapter(read_trained_adapter(str(tmp_path / "adapter")), "original")
    whole = open_model(str(tmp_path / "adapter"), CPU, torch.float32)
    assert (logits(streamed.model) - logits(whole.model)).abs().max() < 1e-4
    weights = replace(open_rows(tmp_path / "base"), adapters=streamed.adapters)
    copied = replace(weights, adapters=whole.adapters)
    assert all((weights.whole(name) - copied.whole(name)).abs().max() < 1e-6 for name in weights.shapes)
    write_peft(tmp_path, streamed, read_trained_adapter(str(tmp_path / "adapter")))
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert all(torch.equal(tensor.float(), written[name]) for name, tensor in load_file(path).items())


def pages_of(path: Path) -> int:
    """The resident memory, in kB, of what this process has mapped of a file."""
    places = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(int(re.search(r"Rss: +(\d+)", place)[1]) for place in places if str(path) in place)  # type: ignore[index]


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="mapped pages are counted by /proc")
def test_factors_stay_in_their_file(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base", "llama-bias")
    path = make_adapter(tmp_path / "base", tmp_path / "adapter") / "adapter_model.safetensors"
    adapter = read_trained_adapter(str(tmp_path / "adapter"))
    opened = open_adapter(adapter, "original")
    own = adapter_tensors(opened.adapters)
    assert own
    assert all(own[name].is_set_to(tensor) for name, tensor in adapter.tensors.items())
    assert not pages_of(path)
    for tensor in own.values():
        tensor.sum()
    assert pages_of(path)
    weights = replace(open_rows(tmp_path / "base"), adapters=opened.adapters)
    for work in (lambda: logits(opened.model), lambda: hash_tensors(own), lambda: [*weights.rows("lm_head.weight")]):
        for tensor in own.values():
            tensor.sum()
        work()
        assert not pages_of(path)


@pytest.mark.parametrize("variant", [*MERGE_VARIANTS, "plain"])
def test_merged_in_passing_is_what_transformers_and_peft_merge(variant: str, tmp_path: Path) -> None:
    from peft import PeftModel

    make_chat_model(tmp_path / "base", "llama-bias")
    make_adapter(
        tmp_path / "base", tmp_path / "adapter", lora=replace(PLAIN, rank=4, **MERGE_VARIANTS.get(variant, {}))
    )
    opened = open_adapter(read_trained_adapter(str(tmp_path / "adapter")), "original")
    weights = replace(open_rows(tmp_path / "base"), adapters=opened.adapters)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    for name, tensor in theirs.state_dict().items():
        assert (weights.whole(name) - tensor).abs().max() < 1e-5, name
    assert (logits(StreamedDecoder(weights)) - logits(theirs)).abs().max() < 1e-4
    rounded = replace(weights, dtype=torch.bfloat16)
    assert {part.dtype for name in weights.shapes for part in rounded.rows(name)} == {torch.bfloat16}
    assert (logits(StreamedDecoder(rounded)) - logits(theirs.bfloat16().float())).abs().max() < 0.02


def test_a_packed_base_is_unpacked(tmp_path: Path) -> None:
    make_reference("llama-bias", tmp_path / "source")
    theirs = make_packed(tmp_path / "source", tmp_path / "base", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ours = logits(StreamedDecoder(open_rows(tmp_path / "base")))
    assert (ours - logits(load_model(tmp_path / "base", CPU, torch.float32).eval())).abs().max() < 1e-4
    assert (ours - logits(theirs)).abs().max() < 0.05  # bitsandbytes multiplies in bfloat16 on some CPUs
    assert (ours - logits(load_model(tmp_path / "source", CPU, torch.float32).eval())).abs().max() > 0.2


@pytest.mark.parametrize("most", [1, 20, 64, 10_000])
def test_rows_of_different_lengths_go_through_together(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoft.export.verify.PASS_TOKENS", most)
    make_reference("mistral", tmp_path)
    model = load_model(tmp_path, CPU, torch.float32).eval()
    rows = [list(range(3, 3 + length)) for length in (7, 2, 30, 1, 12)]
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([row]))[0] for row in rows])
    assert (hidden_states(model, rows) - alone).abs().max() < 1e-5


def test_a_missing_shard_and_a_short_one_are_refused(tmp_path: Path) -> None:
    make_reference("mistral", tmp_path, shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-4])
    with pytest.raises(UserError, match=f"{shard.name}: corrupted"):
        open_rows(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: one of .* files, but missing"):
        open_rows(tmp_path)


MEASURE = """
    import sys, torch
    from pathlib import Path
    from nanoft.export.merge import open_adapter
    from nanoft.export.streaming import StreamedDecoder, open_rows, return_freed_memory
    from nanoft.export.verify import hidden_states
    from nanoft.models.open import read_trained_adapter

    def resident(field):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    torch.set_num_threads(1)
    return_freed_memory()
    hidden_states(StreamedDecoder(open_rows(Path(sys.argv[1]))), [[1, 2]])
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = resident("VmRSS")
    opened = open_adapter(read_trained_adapter(sys.argv[2]), "original")
    opened.model.logits(hidden_states(opened.model, [list(range(30))]))
    print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from /proc")
def test_a_pass_holds_a_few_rows_of_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128, "num_hidden_layers": 4}
    make_chat_model(tmp_path / "base", **sizes, num_attention_heads=8, dtype=torch.bfloat16)
    make_adapter(tmp_path / "base", tmp_path / "adapter", lora=LoRAConfig(rank=4))
    line = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "base"), str(tmp_path / "adapter")]
    said = subprocess.run(line, capture_output=True, text=True, check=True)
    written = (tmp_path / "base/model.safetensors").stat().st_size
    assert written > 110e6
    assert int(said.stdout) < 60e6  # a slab of 16 MB in float32, and its file's pages


def test_rows_are_read_as_they_are_stored(tmp_path: Path) -> None:
    make_reference("qwen3", tmp_path)
    weights: Weights = open_rows(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"
    for name, tensor in stored.items():
        parts = list(weights.rows(name))
        assert torch.equal(torch.cat(parts), tensor)
        assert max(part.numel() for part in parts) <= max(1000, tensor[0].numel())
