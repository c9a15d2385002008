"""Whole runs with every objective on preferences: exact for every split of a window, and after every interruption."""

from __future__ import annotations

import json
import signal
import traceback
from pathlib import Path
from typing import Any

import grouped_products  # noqa: F401
import pytest
import torch
from preferences import BEYOND_SFT, settings_of_run, write_pairs
from ranks import close, codes, run
from runs import (
    Capture,
    Patch,
    equal,
    events,
    gradients,
    in_the_loop,
    losses,
    nan_in,
    no_memory,
    one_line,
    quick,
    refused,
    result,
    stop_after,
)
from safetensors.torch import load_file
from tiers import rest_is_slow
from tiny_families import make_family
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

import nanoft.model
import train
from nanoft.kernels import attention, experts
from nanoft.objectives import OBJECTIVES, reference
from nanoft.objectives.balance import BalancedSFT
from nanoft.training import self_test
from tiny_models import make_chat_model, write_records

WITH_REFERENCE = [name for name in BEYOND_SFT if getattr(OBJECTIVES[name], "uses_reference", False)]
FULL: dict[str, Any] = {"training__method": "full", "training__learning_rate": 1e-4}
PACKED: dict[str, Any] = {"data__packing": True, "model__max_seq_length": 200, "training__micro_batch_size": 1}
SHORT: dict[str, Any] = {"training__eval_steps": 0, "evaluation__prompts": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("preferences")
    make_chat_model(root / "base", "qwen2")
    write_pairs(root / "pairs.jsonl")
    return root


@pytest.fixture(scope="module")
def start(root: Path) -> Path:
    """A run whose adapter others continue."""
    assert train.main(on(root, root / "start", "simpo", **SHORT, training__max_steps=2)) == 0
    return root / "start"


def on(root: Path, directory: Path, objective: str, **changes: Any) -> list[str]:
    """Arguments of a short run; a learning rate at which losses move."""
    named = {"model__name": root / "base", "data__train_file": root / "pairs.jsonl", "training__learning_rate": 0.01}
    return quick(directory, **{**named, "training__objective": objective, **settings_of_run(objective), **changes})


def one_gradient(root: Path, directory: Path, objective: str, size: int, steps: int, **changes: Any) -> Any:
    named = {"model__name": root / "base", "data__train_file": root / "pairs.jsonl", "training__objective": objective}
    return gradients(directory, size, steps, torch.float32, **named, **settings_of_run(objective), **changes)


# --- what a GPU would wait for


def caller() -> str:
    """Where in the library we are."""
    return next(f"{f.filename}:{f.lineno}" for f in reversed(traceback.extract_stack()) if "/nanoft/" in f.filename)


class Waits(TorchDispatchMode):
    """Counts operations that make the CPU wait for a GPU: values read, and shapes that depend on values."""

    READ = ("tolist", "numpy", "cpu")

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self.found: list[str] = []
        for name in self.READ:
            patch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))

    def counted(self, name: str, original: Any) -> Any:
        def call(tensor: torch.Tensor, *values: Any, **more: Any) -> Any:
            if _get_current_dispatch_mode() is self:
                self.found.append(f"{name} in {caller()}")
            return original(tensor, *values, **more)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name == "index" else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount"):
            self.found.append(f"{name} in {caller()}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("objective", rest_is_slow(OBJECTIVES, "sft", "dpo", "kto"))
def test_no_micro_batch_waits_for_the_device(
    objective: str, packed: bool, root: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    found = waits_of_a_run(objective, root, tmp_path, monkeypatch, **(PACKED if packed else {}))
    assert not found, "\n".join(sorted({*found}))


@pytest.mark.parametrize(("grouped", "alpha"), [(True, 0.0), (True, 0.1), (False, 0.0)])
def test_grouped_products_of_experts_wait_for_nothing(
    grouped: bool, alpha: float, root: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Where there is a kernel for them; the loop waits for the number of rows of each expert."""
    make_family("qwen3_moe", tmp_path / "base")
    monkeypatch.setattr(experts, "has_grouped_products", lambda device, dtype: grouped and dtype == torch.float32)
    adapted = {"model__name": tmp_path / "base", "lora__target_modules": "all-linear", "lora__dropout": 0.1}
    adapted |= {"training__balance_loss": alpha}
    monkeypatch.setitem(OBJECTIVES, "sft", BalancedSFT if alpha else OBJECTIVES["sft"])
    found = waits_of_a_run("sft", root, tmp_path, monkeypatch, **adapted)
    assert {place.rpartition("/")[2].partition(":")[0] for place in found} == (set() if grouped else {"moe.py"})


def waits_of_a_run(objective: str, root: Path, tmp_path: Path, monkeypatch: Patch, **changes: Any) -> list[str]:
    """Those of forward and backward of each micro-batch, after its tensors are on the device."""
    waits, batches = Waits(monkeypatch), []
    loss, backward, grouping = OBJECTIVES[objective].loss, torch.Tensor.backward, attention.group_documents

    def on_cpu(documents: Any) -> Any:  # its tensors are the CPU's, wherever the model is
        with _disable_current_modes():
            return grouping(documents)

    def counted_loss(self: Any, model: Any, batch: Any) -> Any:
        batches.append(batch)
        with waits:
            return loss(self, model, batch)

    def counted_backward(self: torch.Tensor, *values: Any, **more: Any) -> None:
        with waits:
            backward(self, *values, **more)

    monkeypatch.setattr(attention, "group_documents", on_cpu)
    monkeypatch.setattr(OBJECTIVES[objective], "loss", counted_loss)
    monkeypatch.setattr(torch.Tensor, "backward", counted_backward)
    changes = {**SHORT, **changes, "training__max_steps": 2}
    if OBJECTIVES[objective].learns == "turns":
        changes["data__train_file"] = write_records(tmp_path / "chats.jsonl")
    assert train.main(on(root, tmp_path / "run", objective, **changes)) == 0
    assert batches
    return waits.found


# --- one gradient


@pytest.mark.parametrize("settings", [{}, {"data__packing": True}, FULL], ids=["lora", "packed", "full"])
@pytest.mark.parametrize("objective", BEYOND_SFT)
def test_a_window_has_one_gradient_however_it_is_split(
    objective: str, settings: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    changes = {**settings, "model__max_seq_length": 160}
    whole = one_gradient(root, tmp_path / "8x1", objective, 8, 1, **changes)
    for size, count in ((4, 2), (2, 4), (1, 8)):
        split = one_gradient(root, tmp_path / f"{size}x{count}", objective, size, count, **changes)
        assert self_test.gradient_error(split, whole) <= 1e-6


@pytest.mark.parametrize("objective", BEYOND_SFT)
def test_kernels_and_recomputation_change_no_gradient(objective: str, root: Path, tmp_path: Path) -> None:
    fast = one_gradient(root, tmp_path / "fast", objective, 4, 2, training__checkpointing="none")
    plain = one_gradient(root, tmp_path / "plain", objective, 4, 2, system__kernels="plain")
    again = one_gradient(root, tmp_path / "again", objective, 4, 2, training__checkpointing="full")
    assert self_test.gradient_error(plain, fast) <= 1e-5
    assert equal(again, fast)


SPLIT: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"training__method": "full"},
    "lora, sharded": {"training__sharding": "full"},
    "full, sharded": {"training__method": "full", "training__sharding": "full"},
    "nf4, sharded": {"quantization__bits": 4, "training__sharding": "full"},
}
RUN_BY_DEFAULT = [("kto", "lora"), ("grpo", "full"), ("reward", "nf4, sharded"), ("distill", "lora, sharded")]


@pytest.mark.parametrize(
    ("objective", "variant"), rest_is_slow([(o, v) for o in BEYOND_SFT for v in SPLIT], *RUN_BY_DEFAULT)
)
def test_two_ranks_are_one_with_twice_the_accumulation(
    objective: str, variant: str, root: Path, tmp_path: Path
) -> None:
    changes = {
        "model__name": root / "base",
        "data__train_file": root / "pairs.jsonl",
        "training__objective": objective,
        "training__learning_rate": 1e-3,
        "evaluation__prompts": 0,
        **settings_of_run(objective),
        **SPLIT[variant],
    }
    assert train.main(quick(tmp_path / "alone", **{**changes, "training__sharding": "none"})) == 0
    _, err = run(2, tmp_path / "two", **{"training__gradient_accumulation_steps": 1, **changes})
    assert codes(tmp_path / "two") == {0: 0, 1: 0}, err
    for kind in ("train", "eval"):
        pairs = zip(events(tmp_path / "two", kind), events(tmp_path / "alone", kind), strict=True)
        for ours, theirs in pairs:
            names = ["loss", *(name for name in theirs if name.startswith(("rewards/", "logps/", "kl")))]
            if "full" in variant and theirs["step"] == 1:  # rewards are still 0, up to rounding
                names = [name for name in names if name != "rewards/accuracies"]
            assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], rel=1e-4, abs=1e-5)
    close(result(tmp_path / "two"), result(tmp_path / "alone"), 1e-5)


SHORT_ONCE = """
from nanoft.objectives import kto, reference, rollouts
from nanoft.training import preflight
place, name, caller = {place}, {name!r}, {caller!r}
real, failed = getattr(place, name), []
def failing(*args):
    if rank == 1 and not failed and caller in (None, sys._getframe(1).f_code.co_name):
        failed.append(True)
        torch.empty(2**60, dtype=torch.uint8)
    return real(*args)
setattr(place, name, failing)
"""
SHORT_IN: dict[str, tuple[str, dict[str, str | None], dict[str, Any]]] = {
    "reference": ("dpo", {"place": "reference", "name": "sequence_logps", "caller": None}, FULL),
    "pairs": ("dpo", {"place": "preflight", "name": "sequence_logps", "caller": None}, {}),
    "divergence": ("kto", {"place": "kto", "name": "sequence_logps", "caller": "estimate_kl"}, {}),
    "rewards": ("grpo", {"place": "rollouts.Prompts", "name": "_score", "caller": "rewards_of"}, {}),
}


@pytest.mark.parametrize("where", rest_is_slow([*SHORT_IN], "divergence"))
def test_one_rank_runs_out_of_memory_once(where: str, root: Path, tmp_path: Path) -> None:
    """The other rank takes smaller batches, too; figures are those of one process."""
    objective, place, more = SHORT_IN[where]
    changes = {
        "model__name": root / "base",
        "data__train_file": root / "pairs.jsonl",
        "training__objective": objective,
        "training__max_steps": 2,
        "evaluation__prompts": 2 if objective == "grpo" else 0,
        **settings_of_run(objective),
        **more,
    }
    assert train.main(quick(tmp_path / "alone", **changes)) == 0
    split = {"training__gradient_accumulation_steps": 1, **changes}
    _, err = run(2, tmp_path / "two", SHORT_ONCE.format(**place), **split)
    assert codes(tmp_path / "two") == {0: 0, 1: 0}, err
    for kind in ("train", "eval"):
        for ours, theirs in zip(events(tmp_path / "two", kind), events(tmp_path / "alone", kind), strict=True):
            names = ["loss", *(name for name in ("kl", "reward") if name in theirs)]
            assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["start", "full"])
def test_sharded_the_reference_is_the_same(method: str, root: Path, start: Path, tmp_path: Path) -> None:
    changes = {
        "model__name": root / "base",
        "data__train_file": root / "pairs.jsonl",
        "training__objective": "dpo",
        "evaluation__prompts": 0,
        **(FULL if method == "full" else {"lora__start_from": start}),
    }
    assert train.main(quick(tmp_path / "alone", **changes)) == 0
    split = {"training__sharding": "full", "training__gradient_accumulation_steps": 1}
    _, err = run(2, tmp_path / "two", **changes, **split)
    assert codes(tmp_path / "two") == {0: 0, 1: 0}, err
    assert dict(losses(tmp_path / "two")) == pytest.approx(dict(losses(tmp_path / "alone")), rel=1e-4)
    ours, theirs = ([e["kl_per_token"] for e in events(tmp_path / which, "eval")] for which in ("two", "alone"))
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    assert ours[-1] > 0


# --- interruptions


RESUMED: dict[str, dict[str, Any]] = {
    "lora": {},
    "start": {"lora__start_from": True},
    "full": FULL,
    "full, reference lost": FULL,
    "packed": PACKED,
    "qlora": {"quantization__bits": 4},
    "float16": {"model__dtype": "float16"},
}


@pytest.mark.parametrize("variant", rest_is_slow(RESUMED, "lora", "start", "full, reference lost"))
@pytest.mark.parametrize("objective", rest_is_slow(BEYOND_SFT, "dpo", "kto"))
def test_resumed_equals_uninterrupted_bit_for_bit(
    objective: str, variant: str, root: Path, start: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    changes = {**RESUMED[variant], "evaluation__prompts": 0}
    if "lora__start_from" in changes:
        changes["lora__start_from"] = start
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train.main(on(root, whole, objective, **changes)) == 0
    line = {"kto": "%, KL ", "grpo": "held-out reward ", "distill": "validation loss "}.get(objective, "%, margin ")
    assert line in capsys.readouterr().out
    with monkeypatch.context() as patch:
        stop_after(5, patch, signal.SIGTERM)
        assert train.main(on(root, halves, objective, **changes)) == train.STOPPED_BY_SIGNAL
    kept = halves / reference.FILE
    assert kept.is_file() == (variant.startswith("full") and objective in WITH_REFERENCE)
    if "lost" in variant:
        kept.unlink(missing_ok=True)
    assert train.main(on(root, halves, objective, **changes)) == 0
    assert losses(halves) == losses(whole)
    assert losses(halves, "eval") == losses(whole, "eval")
    assert equal(result(halves), result(whole))
    if variant.startswith("full") and objective in WITH_REFERENCE:
        assert equal(load_file(kept), load_file(whole / reference.FILE))


@pytest.mark.parametrize("objective", rest_is_slow(BEYOND_SFT, "kto", "dpo"))
def test_out_of_memory_takes_the_same_window_again_in_halves(
    objective: str, root: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    whole, short = (on(root, tmp_path / name, objective, **SHORT) for name in ("whole", "short"))
    assert train.main(whole) == 0

    def failing(number: int, real: Any, *args: Any, **options: Any) -> Any:
        done = real(*args, **options)
        return no_memory() if number in (4, 7) else done

    with monkeypatch.context() as patch:
        in_the_loop(patch, "backward", failing, torch.Tensor)
        assert train.main(short) == 0
    assert [w["micro_batch_rows"] for w in events(tmp_path / "short") if w["what"] == "out of memory"] == [2, 1]
    found = [dict(losses(tmp_path / name)) for name in ("short", "whole")]
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("objective", BEYOND_SFT)
def test_out_of_memory_at_one_unit_ends_with_3(
    objective: str, root: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    in_the_loop(monkeypatch, "run_block", no_memory, nanoft.model)
    assert train.main(on(root, tmp_path / "run", objective, **SHORT)) == 3
    captured = capsys.readouterr()
    assert one_line(captured.err).startswith("failed: out of memory with micro-batch size 1: try ")
    assert captured.out.count("warning: out of memory after step 0") == 2  # 4 rows, 2 rows


@pytest.mark.parametrize("objective", rest_is_slow(BEYOND_SFT, "dpo"))
def test_a_bad_window_is_passed_over_and_many_roll_back(
    objective: str, root: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    in_the_loop(monkeypatch, "accumulate", nan_in(5, 6, 8))
    changes = {**SHORT, "guard__max_skips": 2, "training__save_steps": 2}
    assert train.main(on(root, tmp_path / "run", objective, **changes)) == 0
    assert "rolled back" in [w["what"] for w in events(tmp_path / "run")]
    assert losses(tmp_path / "run")[-1][0] == 8


# --- the parts of a run


METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": FULL,
    "packed": PACKED,
    "qlora": {"quantization__bits": 4},
    "float16": {"model__dtype": "float16"},
    "dora": {"lora__dora": True},
    "pissa": {"lora__init": "pissa"},
}


@pytest.mark.parametrize("method", rest_is_slow(METHODS, "lora", "full"))
@pytest.mark.parametrize("objective", BEYOND_SFT)
def test_the_self_test_passes(objective: str, method: str, root: Path, tmp_path: Path) -> None:
    assert train.main([*on(root, tmp_path / "run", objective, **METHODS[method]), "--selftest"]) == 0


@pytest.mark.parametrize("kernels", rest_is_slow(["auto", "plain"], "auto"))
@pytest.mark.parametrize("objective", rest_is_slow(WITH_REFERENCE, "dpo"))
def test_the_first_step_finds_no_difference_to_the_reference(
    objective: str, kernels: str, root: Path, start: Path, tmp_path: Path
) -> None:
    methods: dict[str, dict[str, Any]] = {"start": {"lora__start_from": start}, **METHODS}
    del methods["packed"], methods["full"]
    for name, method in methods.items():
        settings = {**SHORT, **method, "system__kernels": kernels, "training__max_steps": 1}
        assert train.main(on(root, tmp_path / name, objective, **settings)) == 0
        (first,) = events(tmp_path / name, "train")
        assert [first[f"rewards/{side}"] for side in ("chosen", "rejected")] == [0.0, 0.0], name
        if OBJECTIVES[objective].learns == "pairs":
            assert (first["rewards/margins"], first["rewards/accuracies"]) == (0.0, 0.0)
            assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("objective", rest_is_slow(BEYOND_SFT, "dpo", "kto"))
@pytest.mark.parametrize("words", [["--plan"], ["--preflight"]], ids=" ".join)
def test_plan_and_rehearsal(objective: str, words: list[str], root: Path, tmp_path: Path, capsys: Capture) -> None:
    assert train.main([*on(root, tmp_path / "run", objective), *words]) == 0
    out = capsys.readouterr().out
    assert ("GB" if words == ["--plan"] else "forward and backward fit") in out


def test_dropout_is_off_with_a_warning(root: Path, tmp_path: Path, capsys: Capture) -> None:
    for name, dropout in (("with", 0.5), ("without", 0.0)):
        assert train.main(on(root, tmp_path / name, "dpo", **SHORT, lora__dropout=dropout)) == 0
        warned = "warning: lora.dropout: disabled with training.objective=dpo" in capsys.readouterr().out
        assert warned == (dropout > 0)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert json.loads((tmp_path / "with" / "config.json").read_text())["lora"]["dropout"] == 0.0


def test_kto_refuses_a_step_of_one_answer(root: Path, tmp_path: Path, capsys: Capture) -> None:
    one = {"training__micro_batch_size": 1, "training__gradient_accumulation_steps": 1}
    refused(on(root, tmp_path / "one", "kto", **one), ["training.objective: kto", "accumulation_steps"], capsys)
    refused([*on(root, tmp_path / "planned", "kto", **one), "--plan"], ["accumulation_steps"], capsys)
    assert not list(tmp_path.glob("*/config.json")), "the fix may use the same directory"


@pytest.mark.parametrize("objective", BEYOND_SFT)
@pytest.mark.parametrize(
    "field",
    [
        "training.label_smoothing=0.1",
        "training.z_loss=0.1",
        "training.neftune_alpha=5",
        "training.balance_loss=0.1",
        "data.train_on=all",
    ],
)
def test_what_only_supervised_training_reads_is_refused(
    objective: str, field: str, root: Path, tmp_path: Path, capsys: Capture
) -> None:
    name = field.partition("=")[0]
    refused([*on(root, tmp_path / "run", objective), field], [f"{name}: ", "has no effect", objective], capsys)


SETTINGS = {"loss": "robust", "label_smoothing": 0.1, "sft_weight": 0.1, "gamma": 0.7, "beta": 0.3}
SETTINGS |= {"desirable_weight": 2.0, "undesirable_weight": 2.0}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_read_or_refused(objective: str, name: str, root: Path, tmp_path: Path, capsys: Capture) -> None:
    if name in OBJECTIVES[objective].settings:
        return
    fragments = [f"preference.{name}: ", "has no effect", objective]
    refused([*on(root, tmp_path / "run", objective), f"preference.{name}={SETTINGS[name]}"], fragments, capsys)


def test_ipo_has_no_label_smoothing(root: Path, tmp_path: Path, capsys: Capture) -> None:
    changes = {"preference__loss": "ipo", "preference__label_smoothing": 0.1}
    refused(on(root, tmp_path / "run", "dpo", **changes), ["preference.label_smoothing", "loss=ipo"], capsys)
