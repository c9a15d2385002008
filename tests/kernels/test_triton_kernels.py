"""Triton's kernels: their formulas, in Triton's interpreter on a CPU; and the GPU resources of compiled kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is installed on Linux only")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
FORMULAS = Path(__file__).with_name("triton_formulas.py")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_every_kernel_computes_its_formula(tier: str, device: str) -> None:
    """In a process of its own: whether kernels are interpreted is decided as Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(device == "cpu"))}
    command = [sys.executable, "-m", "pytest", FORMULAS, "-m", tier, "-n0", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def test_any_row_gets_a_power_of_two_warps() -> None:
    """Triton launches no others; hidden sizes such as 896, 2560 and 3584 are no powers of two."""
    from nanoft.kernels.triton_kernels import rows

    warps = [rows(numbers)["num_warps"] for numbers in range(1, 20000)]
    assert set(warps) == {1, 2, 4, 8, 16}
    assert warps == sorted(warps)


# --- compiled for GPUs that are not here

POINTERS = {"packed": "*u8", "nested": "*fp32", "values": "*fp32", "offset": "*fp32", "points": "*fp32"}
TENSORS = ["x", "weight", "y", "dy", "dx", "gate", "up", "dgate", "dup", "cos", "sin", "out"]
NUMBERS = ["blocks", "size", "gate_row", "up_row", "token_stride", "heads", "angles", "angle_rows"]
# Those of Qwen2.5-7B: rows of 3584, 28 heads of 128.
CONSTANTS: dict[str, Any] = {"BLOCK": 64, "NESTED": 256, "PER_PROGRAM": 16, "EPS": 1e-5, "OFFSET": 0.0, "NORMED": True}
CONSTANTS |= {"HEADS": 32, "WIDTH": 1024, "KIND": "gelu"}


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_they_keep_everything_in_registers(capability: int, tmp_path: Path) -> None:
    """Of every kernel in the module; what does not fit into registers would go to memory, by the stack."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nanoft.kernels import triton_kernels as module

    found = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
    assert len(found) >= 7
    for name, kernel in found.items():
        scales = "*u8" if name.startswith("unpack") else "*fp32"
        types = {**POINTERS, "absmax": scales, **dict.fromkeys(TENSORS, "*bf16"), **dict.fromkeys(NUMBERS, "i32")}
        constants = {**CONSTANTS, "SIZE": 128 if "rotate" in name else 4096}
        own = {argument: constants[argument] for argument in kernel.arg_names if argument.isupper()}
        signature = {a: "constexpr" if a in own else types[a] for a in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs={(kernel.arg_names.index(a),): v for a, v in own.items()})
        options = module.EXACT if name.startswith("unpack") else module.FUSED if "gated" in name else module.rows(3584)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        binary = tmp_path / f"{name}.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
        figures = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
        print(f"sm_{capability} {name}: {figures['REG']} registers")
        assert (figures["STACK"], figures["LOCAL"]) == ("0", "0"), name
        assert int(figures["REG"]) <= 128, name  # two programs of eight warps fit on a multiprocessor
