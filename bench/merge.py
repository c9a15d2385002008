"""Speed and memory of merging an adapter into shards of the shape of a large model, which are written first.

    python bench/merge.py                  writes bench/merge.json and bench/merge.md
    python bench/merge.py --layers 4       a smaller model; results are only printed
    python bench/merge.py --shape qwen3_5_27b --layers 4      other models: DeltaNet layers; or qwen3_30b_a3b: experts

The base has random bfloat16 weights; the adapter has rank 16 on every linear of the blocks.
A process of its own merges, verifies the result and generates from it, as merge.py does. Its peak resident memory is
reset before each part and read after it. All files are in a temporary directory and are deleted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nanoft.config import LoRAConfig
from nanoft.export.merge import merge, open_adapter
from nanoft.export.streaming import StreamedDecoder, open_rows, return_freed_memory
from nanoft.export.verify import verify_merge
from nanoft.generation.generate import generate
from nanoft.io.atomic import write_file
from nanoft.io.tensor_files import Specs, encode_safetensors
from nanoft.lora import inject_lora
from nanoft.model import Decoder
from nanoft.models.adapter_files import save_adapter
from nanoft.models.families import decoder_config, file_name
from nanoft.models.open import read_trained_adapter

HERE = Path(__file__).parent
PLACE = HERE / "merge"
SHARD = 5 * 10**9
RANK = 16
TOKENS = 64  # of each prompt of the verification
PROMPTS = 2
ANSWER_TOKENS = 4


SHAPES: dict[str, dict[str, Any]] = {  # without their number of layers
    "mistral_7b": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
        "sliding_window": None,
    },
    "qwen3_5_27b": {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "vocab_size": 248320,
        "hidden_size": 5120, "intermediate_size": 17408, "num_attention_heads": 24, "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "max_position_embeddings": 262144,
    },
    "qwen3_30b_a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 40960, "sliding_window": None,
    },
}  # fmt: skip


def hf_config(shape: str, layers: int) -> dict[str, Any]:
    return SHAPES[shape] | {"num_hidden_layers": layers, "tie_word_embeddings": False, "dtype": "bfloat16"}


def make_base(directory: Path, config: dict[str, Any]) -> int:
    """Write random weights in shards, some rows at a time; returns their size in bytes."""
    (directory / "config.json").write_text(json.dumps(config))
    shape = decoder_config(config)
    with torch.device("meta"):
        model = Decoder(shape)
    shapes = {file_name(shape.family, name): tuple(p.shape) for name, p in model.named_parameters()}
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02

    def read(name: str) -> Iterator[torch.Tensor]:
        left = math.prod(shapes[name])
        start = zlib.crc32(name.encode()) % (len(noise) // 2)  # equal matrices would be no random ones
        while left:
            count = min(left, len(noise) - start)
            yield (torch.ones(count) if "norm" in name else noise[start:][:count]).bfloat16()
            left -= count

    shards: list[Specs] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * math.prod(shape) > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = (torch.bfloat16, shape)
        size += 2 * math.prod(shape)
    weight_map = {}
    for number, specs in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, encode_safetensors(specs, read))
        weight_map.update(dict.fromkeys(specs, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(2 * math.prod(shape) for shape in shapes.values())


def make_adapter(base: Path, out: Path) -> int:
    """Write an adapter for every linear of the blocks; returns how many those are."""
    lora = LoRAConfig(rank=RANK, alpha=32.0)
    model = StreamedDecoder(open_rows(base))
    adapters = inject_lora(model, lora, seed=1)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B.normal_(std=0.002, generator=torch.Generator().manual_seed(2))
    save_adapter(out, model, adapters, lora, str(base), {})
    return len(adapters)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(adapter: Path, out: Path) -> dict[str, Any]:
    """Merge, verify, generate: seconds and peak memory of each."""
    return_freed_memory()
    figures: dict[str, Any] = {"before_gb": resident("VmRSS") / 1e9}

    def part(name: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        start, cpu = time.perf_counter(), time.process_time()
        result = work()
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        figures[name] = {**spent, "peak_gb": resident("VmHWM") / 1e9}
        return result

    opened = part("open", lambda: open_adapter(read_trained_adapter(str(adapter)), "original"))
    part("merge", lambda: merge(opened, torch.bfloat16, "original", out))
    prompts = torch.randint(32000, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(3)).tolist()
    proof = part("verify", lambda: verify_merge(opened, out, prompts, torch.bfloat16))
    assert proof.holds, proof
    figures["proof"] = {"max_difference": proof.max_difference, "allowed": proof.allowed, "effect": proof.effect}
    merged = StreamedDecoder(open_rows(out))
    part("generate", lambda: generate(merged, prompts[:4], (), ANSWER_TOKENS))
    return figures


def run(name: str, layers: int) -> dict[str, Any]:
    root = Path(tempfile.mkdtemp(prefix="nanoft-merge-", dir=os.environ.get("TMPDIR", "/tmp")))
    try:
        config = hf_config(name, layers)
        shape = decoder_config(config)
        with torch.device("meta"):
            model = Decoder(shape)
        needed = 2 * sum(2 * p.numel() for p in model.parameters())
        if needed * 1.1 > (free := shutil.disk_usage(root).free):
            raise SystemExit(f"{root} has {free / 1e9:.0f} GB free, {needed * 1.1 / 1e9:.0f} GB are needed: --layers")
        (root / "base").mkdir()
        size = make_base(root / "base", config)
        adapters = make_adapter(root / "base", root / "adapter")
        (root / "out").mkdir()
        line = [sys.executable, __file__, "--measure", str(root / "adapter"), str(root / "out")]
        said = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout
        figures = json.loads(said.splitlines()[-1])
    finally:
        shutil.rmtree(root, ignore_errors=True)
    largest = 2 * max(p.numel() for p in model.parameters())
    return {
        "model": {
            "shape": name,
            "layers": layers,
            "parameters": size // 2,
            "weights_gb": size / 1e9,
            "largest_tensor_gb": largest / 1e9,
        },
        "adapter": {"rank": RANK, "modules": adapters},
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "merge_gb_per_s": size / 1e9 / figures["merge"]["seconds"],
        "merge_gb_per_cpu_s": size / 1e9 / figures["merge"]["cpu_seconds"],
        "allowed_peak_gb": 1.5 * largest / 1e9 + 0.5,
        **figures,
    }


def markdown(r: dict[str, Any]) -> str:
    model, proof, threads = r["model"], r["proof"], r["machine"]["threads"]
    parts = [(name, r[name]) for name in ("open", "merge", "verify", "generate")]
    return f"""# Merging an adapter of rank {RANK} on every linear

{model["layers"]} layers of the shape {model["shape"]}: {model["parameters"] / 1e9:.2f} billion random bfloat16 weights
in {model["weights_gb"]:.1f} GB of shards; {threads} thread(s), on a shared machine (CPU seconds are those
of this process). Merged at {r["merge_gb_per_s"]:.2f} GB/s of wall time, {r["merge_gb_per_cpu_s"]:.2f} GB per CPU
second: read, added in float32, rounded, hashed, written, synced.

Memory is that of the whole process; Python and torch alone take {r["before_gb"]:.2f} GB. The limit, 1.5 times the
largest tensor plus 0.5 GB, is {r["allowed_peak_gb"]:.2f} GB.

| part | seconds | CPU seconds | peak GB |
|---|---|---|---|
{chr(10).join(f"| {n} | {p['seconds']:.0f} | {p['cpu_seconds']:.0f} | {p['peak_gb']:.2f} |" for n, p in parts)}

verify: {PROMPTS} prompts of {TOKENS} tokens through base, base + adapter and the merged files; largest logit difference
{proof["max_difference"]:.2g}, allowed {proof["allowed"]:.2g}, the adapter itself {proof["effect"]:.2g}.
generate: 4 prompts of {TOKENS} tokens, {ANSWER_TOKENS} new tokens each; every token reads all weights from the files.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="mistral_7b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--write", action="store_true", help="write the results with fewer layers too")
    parser.add_argument("--measure", nargs=2, metavar=("ADAPTER", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*map(Path, args.measure))))
        return
    result = run(args.shape, args.layers)
    print(json.dumps(result, indent=1))
    if (args.shape, args.layers) == ("mistral_7b", 32) or args.write:
        PLACE.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        PLACE.with_suffix(".md").write_text(markdown(result))


if __name__ == "__main__":
    main()
