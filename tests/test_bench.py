"""The benchmarks: both sides take the same step, the figures are those of the shape, failures are reported."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanoft import loss
from nanoft.kernels import attention, block
from nanoft.kernels.attention import FastContext
from nanoft.model import Decoder

BENCH = Path(__file__).parent.parent / "bench"
TINY = shlex.split("--hidden 64 --layers 2 --heads 4 --kv 2 --ffn 128 --vocab 512 --seq 256 --steps 2 --rounds 1")


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in ("contender", "step", "growth", "tricks"):
        sys.modules.pop(name, None)


def run(script: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH / script), *more], capture_output=True, text=True, check=False)


def options(**changes: Any) -> argparse.Namespace:
    import step

    return step.parse([], **changes)


@pytest.mark.slow
def test_nanoft_and_the_peer_take_the_same_step() -> None:
    """Packed documents beside padded ones, so a wrong mask, position, loss or accumulation would show."""
    done = run("step.py", *TINY, "--shape", "packed", "--micro", "3", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert list(result)[:5] == ["shape", "nanoft", "peers", "speedup", "memory_ratio"]
    (check,) = result["losses"].values()
    assert check["agree"]
    assert check["largest_difference"] < 1e-5
    assert check["of_grad_norm"] < 1e-4
    ours, (theirs,) = result["nanoft"], result["peers"].values()
    assert result["speedup"] == pytest.approx(ours["tok_s"] / theirs["tok_s"], abs=1e-3)
    assert result["memory_ratio"] == pytest.approx(ours["peak_rss_mb"] / theirs["peak_rss_mb"], abs=1e-3)
    assert ours["tok_s_p10"] <= ours["tok_s"] <= ours["tok_s_p90"]


@pytest.mark.slow
def test_another_peer_gets_the_options_of_every_peer_and_its_losses_are_not_compared(tmp_path: Path) -> None:
    peer = tmp_path / "other.py"
    peer.write_text("import json, sys; print(json.dumps({'tok_s': 1, 'step_s': 1, 'peak_rss_mb': len(sys.argv) - 1}))")
    done = run("step.py", *TINY, "--nf4", "--peer", f"{sys.executable} {peer}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["shape"] == "small nf4"
    assert result["peers"][f"{sys.executable} {peer}"]["peak_rss_mb"] == 2 * 14  # the options that every peer accepts
    assert not result["losses"]
    assert result["speedup"] == result["nanoft"]["tok_s"]


def side(**changes: Any) -> dict[str, Any]:
    run = {"tok_s": 100.0, "step_s": 1.0, "gflop_s": 50.0, "peak_rss_mb": 10, "speeds": [90.0, 110.0]}
    return {**run, "losses": [2.0, 1.0], "grad_norms": [3.0, 3.0], **changes}


CONTROL = {"gflop_s": 200.0, "gflop_of_step": 50.0}


@pytest.mark.parametrize(
    ("theirs", "agree"),
    [
        ({"losses": [2.0, 1.0015], "grad_norms": [3.0, 3.05]}, True),
        ({"losses": [2.0, 1.003]}, False),
        ({"grad_norms": [3.0, 3.1]}, False),
        ({"losses": [2.0, math.nan]}, False),
        ({"grad_norms": [math.nan, 3.0]}, False),
    ],
)
def test_no_ratio_where_the_losses_or_the_gradients_disagree(theirs: dict[str, Any], agree: bool) -> None:
    import step

    results = {"nanoft": [side(tok_s=150.0)], "peer": [side(**theirs)]}
    summary = step.summary(options(), results, {}, CONTROL)
    assert summary["losses"]["peer"]["agree"] is agree
    assert summary["speedup"] == (1.5 if agree else None)
    assert summary["memory_ratio"] == (1.0 if agree else None)
    assert summary["nanoft"]["percent_of_matmul"] == 25.0
    assert ("DISAGREE" in step.table_row(summary)) is not agree


def test_a_failure_is_a_row_with_its_reason() -> None:
    import step

    with pytest.raises(step.Failed, match=r"^ValueError: no such thing$"):
        step.in_process([sys.executable, "-c", "raise ValueError('no such thing')"], 60)
    with pytest.raises(step.Failed, match=r"timeout after 0 s"):
        step.in_process([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    with pytest.raises(step.Failed, match="MemoryError"):
        step.in_process([sys.executable, "-c", "bytearray(1 << 50)"], 60)
    summary = step.summary(options(), {"nanoft": [side()], "peer": []}, {"peer": "out | of"}, CONTROL)
    assert summary["peers"] == {"peer": {"error": "out | of"}}
    assert summary["speedup"] is None
    assert "failed: out / of" in step.table_row(summary)


def test_a_ratio_is_to_the_best_of_the_peers_that_take_the_same_step() -> None:
    import step

    results = {
        "nanoft": [side(tok_s=120.0, peak_rss_mb=4), side(tok_s=180.0, peak_rss_mb=4)],
        "fast": [side(tok_s=80.0, peak_rss_mb=16), side(tok_s=60.0, peak_rss_mb=16)],
        "small": [side(tok_s=40.0, peak_rss_mb=8), side(tok_s=90.0, peak_rss_mb=8)],
        "other": [side(tok_s=500.0, losses=[2.0, 1.5])] * 2,
        "failed": [side()],
    }
    summary = step.summary(options(), results, {"failed": "no such module"}, CONTROL)
    assert summary["speedups"] == [1.5, 2.0]
    assert summary["memory_ratios"] == [0.5, 0.5]
    assert "DISAGREE: other" in step.table_row(summary)


def test_each_side_is_first_in_a_round() -> None:
    import step

    names = ["nanoft", "peer", "trl", "unsloth"]
    orders = [step.rotated(names, number) for number in range(4)]
    assert all(sorted(order) == names for order in orders)
    assert [order[0] for order in orders] == names


def test_the_work_of_a_step_is_that_of_the_shape() -> None:
    """Mistral-7B: 6.979 B weights in linears, 0.134 B in the head, 41.94 M in adapters of rank 16."""
    import contender

    shape = {"hidden": 4096, "layers": 32, "heads": 32, "kv": 8, "ffn": 14336, "vocab": 32768, "r": 16}
    args, n = options(**shape), 4096
    ids = np.zeros(n, dtype=np.int64)
    half_masked = np.where(np.arange(n) < n // 2, contender.IGNORE, ids)
    attention = 3.5 * 4 * 32 * 4096 * (n * (n + 1) / 2)  # of causal pairs: two products forward, five backward
    linears, adapters, head = 4 * 6.979e9 * n, 6 * 41.94e6 * n, 4 * 0.1342e9
    whole = contender.gflop_of_step(args, [contender.Text(ids, ids, 0)])
    assert whole == pytest.approx((linears + adapters + attention + head * (n - 1)) / 1e9, rel=1e-3)
    masked = contender.gflop_of_step(args, [contender.Text(ids, half_masked, 0)])
    assert whole - masked == pytest.approx(head * (n // 2 - 1) / 1e9, rel=1e-3)


def test_curves_are_fitted_and_a_bad_fit_shows_in_the_residual() -> None:
    import growth

    x = [512.0, 1024.0, 2048.0, 4096.0]
    found = growth.fit(x, [3 + 0.5 * n + 2e-4 * n * n for n in x], 2)
    assert found["coefficients"] == pytest.approx([3, 0.5, 2e-4], rel=1e-4)
    assert found["largest_residual"] == 0
    assert growth.fit(x, [1.0, 5.0, 1.0, 5.0], 1)["largest_residual"] > 0.5
    assert growth.fit(x[:3], [1.0, 2.0, 3.0], 2) is None  # a parabola fits any three points


@pytest.mark.slow
@pytest.mark.parametrize("side", ["nanoft", "trl"])
def test_a_side_of_the_preference_benchmark_learns_from_its_pairs(side: str) -> None:
    if side == "trl":
        pytest.importorskip("trl")
    done = run("preference.py", "--side", side, *TINY[:-2], "--ckpt")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["losses"]) == 3
    assert found["losses"][0] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
    assert found["losses"][1] != found["losses"][0]
    assert found["tok_s"] > 0


@pytest.mark.slow
def test_growth_writes_its_points_and_curves(tmp_path: Path) -> None:
    done = run("growth.py", *TINY[:-2], "--quick", "--minutes", "0.05", "--out", str(tmp_path / "growth"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "growth.json").read_text())
    points = [point for sides in written["sweeps"].values() for point in sides["nanoft"]["points"]]
    assert [point for point in points if "error" in point]  # three seconds are not enough for all of them
    assert all(("error" in point) != ("tok_s" in point) for point in points)
    assert (tmp_path / "growth.md").read_text() in done.stdout


def test_the_gpu_script_runs(tmp_path: Path) -> None:
    done = run("gpu.py", "--smoke", "--only", "nanoft masked=0.7 nf4", "--out", str(tmp_path / "gpu"))
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert case["tok_s"] > 0
    assert "| nanoft masked=0.7 nf4 |" in (tmp_path / "gpu.md").read_text()


def test_the_model_of_many_gpus_has_the_right_limits() -> None:
    """On a fast network only compute counts; on a slow one only what is sent, twice or three times."""
    from scaling import Job, Network, data_parallel_s, sharded_s

    job = Job(layers=5, micro_batches=3, tokens=1, forward_s=1.0, backward_s=2.0, block_bytes=8.0, gradient_bytes=2.0)
    free, slow = Network(8, 1e30, 1e30, 0.0), Network(4, 1e-3, 1e-4, 0.0)
    assert data_parallel_s(job, free, 8) == pytest.approx(45.0)
    assert sharded_s(job, free, 8, recompute=True) == pytest.approx(45.0)
    assert data_parallel_s(job, slow, 4) == pytest.approx(45 + 2 * 3 / 4 * 10 / 1e-3)
    assert data_parallel_s(job, slow, 8) == pytest.approx(45 + 2 * 7 / 8 * 10 / 1e-4), "the slowest link counts"
    for recompute in (False, True):
        sent = 3 * 5 * 3 / 4 * (8 * (2 + recompute) + 2) / 1e-3
        assert sharded_s(job, slow, 4, recompute) == pytest.approx(sent, rel=1e-3)
    latency = Network(8, 1e30, 1e30, 1.0)
    assert latency.ring_s(1.0, 8, rounds=2) == pytest.approx(14.0)


class Recorder(TorchDispatchMode):
    """Counts the operators that run, with the shapes of their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, tuple[Any, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = tuple(x.shape for x in tree_leaves((args, kwargs)) if hasattr(x, "shape"))
        self.seen[str(func), shapes] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def patches_undone() -> Iterator[None]:
    """An optimization is removed by assigning to a module or class, otherwise for the life of its process."""
    owners = (sys.modules["contender"], loss, attention, block, FastContext, Decoder)
    before = [dict(vars(owner)) for owner in owners]
    try:
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            for name in [name for name, value in old.items() if vars(owner)[name] is not value]:
                setattr(owner, name, old[name])


def step_without(trick: str, shape: str, ids: Path) -> tuple[Counter[Any], float]:
    """The operators of two tiny steps with this optimization removed, and the last loss."""
    import contender
    import step
    import tricks

    small = shlex.split("--hidden 64 --layers 2 --heads 4 --kv 2 --ffn 128 --seq 256 --steps 2 --warmup 0")
    args = step.parse(small, shape=shape, ids=None)
    if args.packed:
        args.ids = ids
        contender.write_packed(args)
    attention.group_documents.cache_clear()  # as in a fresh process
    with patches_undone(), Recorder() as recorder:
        result = tricks.run(args, trick)
    return recorder.seen, result["losses"][-1]


def test_every_optimization_of_the_table_is_really_removed(tmp_path: Path) -> None:
    """The same loss by other operators; removing what no code looks up any more would change none of them."""
    import tricks

    complete: dict[str, tuple[Counter[Any], float]] = {}
    for name, _, shape, _ in tricks.TRICKS:
        if shape not in complete:
            complete[shape] = step_without("", shape, tmp_path / "ids.npz")
            assert step_without("", shape, tmp_path / "ids.npz") == complete[shape]
        operators, found = step_without(name, shape, tmp_path / "ids.npz")
        assert operators != complete[shape][0], f"{name}: the step is the same without it"
        assert found == pytest.approx(complete[shape][1], abs=2**-5), name  # half of bfloat16's spacing near 10
