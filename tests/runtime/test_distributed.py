"""Several processes, started by torchrun: the same result as one process with more accumulation, and how they end."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import EXACT, close, codes, run, start, torchrun
from runs import equal, events, losses, quick, result
from shapes import MISTRAL_7B
from tiers import rest_is_slow

import train
from nanoft import UserError
from nanoft.config import Config
from nanoft.config.resume import check_same_run, first_difference, resume_fingerprint
from nanoft.models.families import decoder_config
from nanoft.runtime import distributed
from nanoft.runtime.device import Machine, select_device
from nanoft.training.memory_plan import Planner, resolve_micro_batch_size
from nanoft.training.validation import validate_config
from tiny_models import make_chat_model, write_records


def answers(directory: Path) -> list[str]:
    found = re.findall(r"^ *(?:base|tuned): .*$", (directory / "train.log").read_text(), re.MULTILINE)
    assert len(found) >= 2
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process: 36 samples in windows of 8 rows, two micro-batches of 4; the fifth has one of them only."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    assert train.main(quick(directory, **EXACT)) == 0
    return directory


# --- exact


NOTE_ANSWERS = """
from nanoft.evaluation import evaluate
answer = evaluate.generate
def answering(model, prompts, *rest):
    with open(pathlib.Path(sys.argv[0]).with_name(f"answers-{rank}"), "a") as noted:
        noted.write("x" * len(prompts))  # those that this rank answers
    return answer(model, prompts, *rest)
evaluate.generate = answering
"""


@pytest.mark.quick
def test_two_ranks_with_one_micro_batch_each_are_one_rank_with_two(alone: Path, tmp_path: Path) -> None:
    """The same bits: a + b has one rounding. The second rank has nothing to do in the last window of an epoch."""
    directory = tmp_path / "run"
    out, err = run(2, directory, NOTE_ANSWERS, training__gradient_accumulation_steps=1)
    assert codes(directory) == {0: 0, 1: 0}, err
    assert losses(directory) == losses(alone)
    assert dict(losses(directory, "eval")) == pytest.approx(dict(losses(alone, "eval")), rel=1e-12)
    assert equal(result(directory), result(alone))
    for said in ("device    2 x CPU", "plan      8 steps", "result    "):  # by one of them
        assert out.count(said) == 1
    names = {path.name for path in directory.iterdir()}
    assert names == {path.name for path in alone.iterdir()}
    assert json.loads((directory / "config.json").read_text())["system"]["ranks"] == 2
    figures = [json.loads((where / "report.json").read_text()) for where in (directory, alone)]
    assert figures[0]["base"] == figures[1]["base"]
    assert figures[0]["tuned"] == figures[1]["tuned"]
    assert answers(directory) == answers(alone)
    answered = [(directory.with_name("run-codes") / f"answers-{n}").read_text() for n in (0, 1)]
    samples = [[(e["step"], e["answer"]) for e in events(where, "sample")] for where in (directory, alone)]
    assert samples[0] == samples[1]
    count = 2 * figures[0]["tuned"]["prompts"] + len(samples[0])  # base and tuned, and at each evaluation
    assert len(answered[0]) + len(answered[1]) == count
    assert min(map(len, answered)) > 0


SHORT_ON_ONE = """
calls = [0]
loop, real = train.train, sft.token_nll
def failing(*args):
    calls[0] += 1
    return torch.empty(2**60, dtype=torch.uint8) if rank == 2 and calls[0] == 2 else real(*args)
def looping(*args):
    sft.token_nll = failing
    return loop(*args)
train.train = looping
"""


@pytest.mark.slow
def test_three_ranks_and_memory_that_is_short_on_one(tmp_path: Path) -> None:
    """All take the same window again with 2 rows instead of 3; the samples, and so the losses, stay the same."""
    whole, directory = tmp_path / "whole", tmp_path / "run"
    split = {"training__micro_batch_size": 3, "training__gradient_accumulation_steps": 6}
    assert train.main(quick(whole, **EXACT, **split)) == 0
    out, err = run(3, directory, SHORT_ON_ONE, **{**split, "training__gradient_accumulation_steps": 2})
    assert codes(directory) == {0: 0, 1: 0, 2: 0}, err
    assert "with micro-batch size 3: retrying with 2" in out
    assert [loss for _, loss in losses(directory)] == pytest.approx([loss for _, loss in losses(whole)], abs=1e-6)
    close(result(directory), result(whole), 1e-5)


OVERFLOW_ON_ONE = """
calls = [0]
real = distributed.all_reduce_gradients
def overflowing(loss, parameters):
    calls[0] += 1
    if rank == 1 and calls[0] == 4:
        gradient = parameters[-1].grad
        (gradient.to_local() if distributed.is_sharded() else gradient).fill_(float("inf"))
    return real(loss, parameters)
distributed.all_reduce_gradients = overflowing
train.build_scaler = lambda *_: torch.amp.GradScaler("cpu", init_scale=64.0)
loop = train.train
def looping(ctx, *rest):
    state = loop(ctx, *rest)
    scale = [ctx.scaler.get_scale(), state.overflow_steps]
    pathlib.Path(sys.argv[0]).with_name(f"scale-{rank}").write_text(str(scale))
    return state
train.train = looping
"""


@pytest.mark.parametrize("sharding", rest_is_slow(["none", "full"], "none"))
def test_an_overflow_on_one_rank_is_one_on_every_rank(sharding: str, tmp_path: Path) -> None:
    """The fourth window: the ranks' gradients are summed, so both see it, and both halve the loss scale."""
    changes = {"training__gradient_accumulation_steps": 1, "training__eval_steps": 0, "model__dtype": "float16"}
    make_chat_model(tmp_path / "base")
    changes |= {"model__name": tmp_path / "base", "data__train_file": write_records(tmp_path / "data.jsonl", 40)}
    changes |= {"training__sharding": sharding, "training__max_steps": 5, "evaluation__prompts": 0}
    _, err = run(2, tmp_path / "run", OVERFLOW_ON_ONE, **changes)
    assert codes(tmp_path / "run") == {0: 0, 1: 0}, err
    assert [line["window"] for line in events(tmp_path / "run") if line["what"] == "overflow"] == [[0, 3]]
    found = [(tmp_path / "run-codes" / f"scale-{rank}").read_text() for rank in (0, 1)]
    assert found == [str([32.0, 1])] * 2
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5]


# the fifth window has no targets on this rank
BAD_ON_ONE = """
calls = [0]
loop, real = train.train, sft.token_nll
def failing(*args):
    calls[0] += 1
    return real(*args) * (float("nan") if rank == 1 and calls[0] in (2, 6, 7) else 1.0)
def looping(*args):
    sft.token_nll = failing
    return loop(*args)
train.train = looping
"""


@pytest.mark.slow
def test_a_bad_number_on_one_rank_is_judged_alike_and_all_go_back_together(tmp_path: Path) -> None:
    changes = {"training__gradient_accumulation_steps": 1, "training__eval_steps": 0, "guard__max_skips": 2}
    out, err = run(2, tmp_path / "run", BAD_ON_ONE, **changes)
    assert codes(tmp_path / "run") == {0: 0, 1: 0}, err
    assert out.count("warning: rolled back from step") == 1
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"quantization__bits": 4},
        {"training__method": "full", "training__learning_rate": 1e-4},
        {"data__packing": True, "model__max_seq_length": 200, "training__micro_batch_size": 1},
        {"lora__init": "pissa", "lora__alpha": 16.0},
    ],
    ids=["qlora", "full", "packed", "pissa"],
)
def test_other_methods_on_two_ranks(changes: dict[str, Any], tmp_path: Path) -> None:
    assert train.main(quick(tmp_path / "alone", **EXACT, **changes)) == 0
    run(2, tmp_path / "run", **changes, training__gradient_accumulation_steps=1)
    pairs = zip(losses(tmp_path / "run"), losses(tmp_path / "alone"), strict=True)
    assert max(abs(a - b) for (_, a), (_, b) in pairs) <= 1e-6
    close(result(tmp_path / "run"), result(tmp_path / "alone"), 1e-5)


# --- interrupted


AFTER_STEP_5 = """
log = train.Run.log
def telling(self, event, step, **values):
    log(self, event, step, **values)
    if event == "train" and step == 5:
        {what}
train.Run.log = telling
"""


@pytest.mark.slow
def test_stopped_by_a_signal_on_two_ranks_it_goes_on_with_one(alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    stop = AFTER_STEP_5.format(what="os.kill(os.getppid(), 15)")  # torchrun, which tells all ranks
    out, err = run(2, directory, stop, training__gradient_accumulation_steps=1)
    assert codes(directory) == {0: 75, 1: 75}, err
    assert "stopped   by " in out
    assert len(losses(directory)) < 8
    assert train.main(quick(directory, **EXACT)) == 0
    assert losses(directory) == losses(alone)
    assert equal(result(directory), result(alone))


NOTE_PID = "pathlib.Path(sys.argv[0]).with_name(f'pid-{rank}').write_text(str(os.getpid()))"


def test_when_one_rank_is_killed_the_others_end_and_the_run_goes_on(alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    constant = {"training__lr_scheduler": "constant", "training__warmup_ratio": 0.0, "training__eval_steps": 0}
    many = {"training__max_steps": 400, "training__gradient_accumulation_steps": 1}
    process = start(2, directory, NOTE_PID, **constant, **many)
    deadline = time.monotonic() + 120
    while not (directory / "checkpoints" / "step-000006").is_dir():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(int((tmp_path / "run-codes" / "pid-1").read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert codes(directory)[0] in (3, 75), err
    if codes(directory)[0] == 3:
        assert "failed: another process of this run is gone: the same command resumes" in err
    saved = max(int(path.name[5:]) for path in (directory / "checkpoints").glob("step-*"))
    fewer = {"training__max_steps": saved + 2}
    assert train.main(quick(directory, **EXACT, **constant, **fewer)) == 0
    assert train.main(quick(tmp_path / "whole", **EXACT, **constant, **fewer)) == 0
    assert losses(directory) == losses(tmp_path / "whole")
    assert equal(result(directory), result(tmp_path / "whole"))


@pytest.mark.slow
def test_resumed_with_dropout_on_two_ranks_equals_uninterrupted(tmp_path: Path) -> None:
    """Dropout of rank 1 is a function of the window, that of rank 0 is in the checkpoint."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    changes = {"lora__dropout": 0.2, "training__gradient_accumulation_steps": 1}
    run(2, whole, **changes)
    run(2, halves, AFTER_STEP_5.format(what="os.kill(os.getppid(), 15)"), **changes)
    assert codes(halves) == {0: 75, 1: 75}
    run(2, halves, **changes)
    assert codes(halves) == {0: 0, 1: 0}
    assert losses(halves) == losses(whole)
    assert equal(result(halves), result(whole))


# --- split over the ranks


SHARDED = {"training__sharding": "full", "training__gradient_accumulation_steps": 1}
BRIEF = {"training__max_steps": 1, "evaluation__prompts": 0}
PARTS_ONLY = """
build = train.build
def building(*args):
    ctx = build(*args)
    parts = [p for p in ctx.model.parameters() if p.requires_grad or p is not ctx.model.head]  # a frozen head is whole
    for dtype in {p.dtype for p in parts}:  # of packed weights, uint8 and int8
        held = sum(p.to_local().numel() for p in parts if p.dtype == dtype)
        every = sum(p.numel() for p in parts if p.dtype == dtype)
        assert held < 0.6 * every, (dtype, held, every)
    left = [b for m in ctx.model.modules() if hasattr(m, "parts") for b in m.buffers(recurse=False)]
    assert sum(b.numel() for b in left) == len(left)  # scalars
    assert all(p.device.type == "cpu" for p in parts)
    return ctx
train.build = building
"""
LOADED_IN_PARTS = """
from nanoft.models import weights
keep_shard, held, every = distributed.keep_shard, [0], [0]
def keeping(linear):
    keep_shard(linear)
    blocks = [p for p in linear.parameters() if not p.is_meta]
    held[0] += sum(p.to_local().nbytes for p in blocks)
    every[0] += sum(p.nbytes for p in blocks)
distributed.keep_shard = keeping
load = setup.load_base
def loading(*args):
    model = load(*args)
    whole = [n for n, p in model.named_parameters() if n.endswith("_proj.weight") and not hasattr(p, "full_tensor")]
    assert not whole and 0 < held[0] < 0.6 * every[0], (whole, held, every)
    return model
setup.load_base = loading
"""


@pytest.mark.parametrize("bits", rest_is_slow([16, 4, 8], 16, 4))
def test_split_over_two_ranks_it_learns_the_same_and_goes_on_with_one(bits: int, tmp_path: Path) -> None:
    """Of a base in 4 or 8 bits, each rank holds half of the codes and scales, from loading on."""
    alone, directory, settings = tmp_path / "alone", tmp_path / "run", {"quantization__bits": bits}
    assert train.main(quick(alone, **EXACT, **settings)) == 0
    stop = PARTS_ONLY + LOADED_IN_PARTS + AFTER_STEP_5.format(what="os.kill(os.getppid(), 15)")
    out, err = run(2, directory, stop, **SHARDED, **settings, training__checkpointing="full")
    assert codes(directory) == {0: 75, 1: 75}, err
    described = next(line for line in (alone / "train.log").read_text().splitlines() if "training  " in line)
    assert described[described.index("training  ") :] in out  # the same number of parameters
    assert train.main(quick(directory, **EXACT, **settings)) == 0
    assert [loss for _, loss in losses(directory)] == pytest.approx([loss for _, loss in losses(alone)], abs=1e-6)
    close(result(directory), result(alone), 1e-6)


METHODS: dict[str, dict[str, Any]] = {
    "full": {"training__method": "full", "training__learning_rate": 1e-4},
    "full-bf16": {"training__method": "full", "training__learning_rate": 1e-4, "model__dtype": "bfloat16"},
    "dora-bf16": {"lora__dora": True, "lora__rank": 5, "model__dtype": "bfloat16"},
    "pissa-sgd": {
        "lora__init": "pissa", "lora__alpha": 16.0, "training__optimizer": "sgd", "training__learning_rate": 0.5,
    },
    "packed": {"data__packing": True, "model__max_seq_length": 200, "training__micro_batch_size": 1},
    "qpissa-dora": {
        "quantization__bits": 4, "quantization__double": False, "lora__init": "pissa", "lora__dora": True,
    },
    "qlora-cached": {"quantization__bits": 4, "quantization__dequantize": "cached"},
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=name, marks=[pytest.mark.slow] * (name != "qlora-cached"))
        for name, changes in METHODS.items()
    ],
)
def test_other_methods_split_over_three_ranks(changes: dict[str, Any], tmp_path: Path) -> None:
    """Of one process with six micro-batches of 2 rows; begun there, gone on with on three, ended on one again."""
    size = {"training__micro_batch_size": 2, **changes}
    six, two = ({**size, "training__gradient_accumulation_steps": n} for n in (6, 2))
    constant = {"training__lr_scheduler": "constant", "training__warmup_ratio": 0.0}
    assert train.main(quick(tmp_path / "alone", **EXACT, **six, **constant)) == 0
    directory = tmp_path / "run"
    assert train.main(quick(directory, **EXACT, **six, **constant, training__max_steps=3)) == 0
    _, err = run(3, directory, **two, **constant, training__sharding="full")
    assert codes(directory) == {0: 0, 1: 0, 2: 0}, err
    allowed = 0.02 if changes.get("model__dtype") == "bfloat16" else 2e-6
    pairs = zip(losses(directory), losses(tmp_path / "alone"), strict=True)
    assert max(abs(a - b) for (_, a), (_, b) in pairs) <= allowed
    close(result(directory), result(tmp_path / "alone"), 1e-2 if allowed > 0.01 else 1e-5)
    figures = [json.loads((where / "report.json").read_text()) for where in (directory, tmp_path / "alone")]
    assert figures[0]["base"]["perplexity"] == pytest.approx(figures[1]["base"]["perplexity"], rel=allowed)
    assert figures[0]["tuned"]["perplexity"] == pytest.approx(figures[1]["tuned"]["perplexity"], rel=max(allowed, 1e-4))


def test_split_it_measures_and_answers_what_one_process_does(tmp_path: Path) -> None:
    one = {"training__max_steps": 1, "evaluation__prompt_batch_size": 2}  # a batch of two prompts of different lengths
    assert train.main(quick(tmp_path / "alone", **EXACT | one)) == 0
    out, err = run(2, tmp_path / "run", **SHARDED, **one)
    assert codes(tmp_path / "run") == {0: 0, 1: 0}, err
    assert "failed" not in out
    assert answers(tmp_path / "run") == answers(tmp_path / "alone")
    figures = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("run", "alone")]
    for model in ("base", "tuned"):
        assert figures[0][model] == pytest.approx(figures[1][model], rel=1e-5)


ROOM_ON_ONE = """
from nanoft.models import weights
weights.choose_dequantize = lambda *_: "cached" if rank else "per_use"
"""


def test_split_all_ranks_keep_the_base_packed_if_one_has_no_room_for_more(tmp_path: Path) -> None:
    """Dequantizing gathers the shards of a weight, for which every rank is needed."""
    _, err = run(2, tmp_path / "run", ROOM_ON_ONE, **SHARDED, **BRIEF, quantization__bits=4)
    assert codes(tmp_path / "run") == {0: 0, 1: 0}, err


FAILS_ON_ONE = """
load, loads = setup.load_base, [0]
def loading(*args):
    loads[0] += 1
    if rank == 1 and loads[0] == 2:
        raise RuntimeError("no second model")
    return load(*args)
setup.load_base = loading
"""


def test_a_base_that_one_rank_cannot_load_again_is_left_out_of_the_report(tmp_path: Path) -> None:
    changes = {"training__method": "full", "training__gradient_accumulation_steps": 1, **BRIEF}
    out, err = run(2, tmp_path / "run", FAILS_ON_ONE, **changes)
    assert codes(tmp_path / "run") == {0: 0, 1: 0}, err
    assert "warning: evaluation of the base failed after step 1: TrainingFailed: another process failed" in out
    figures = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "base" not in figures
    assert figures["tuned"]["perplexity"] > 1


WORSE_AND_WORSE = """
evaluated, evaluations = sft.perplexity.validation_loss, [-1]
def worse(*args):
    evaluations[0] += 1
    loss, tokens = evaluated(*args)
    return loss + 10 * evaluations[0], tokens
sft.perplexity.validation_loss = worse
"""


@pytest.mark.slow
def test_split_it_goes_back_and_takes_the_best_weights(tmp_path: Path) -> None:
    """Rank 1's loss is NaN twice in a row; every evaluation is made worse than the one before."""
    changes = {**SHARDED, "guard__max_skips": 2, "training__max_steps": 12}
    out, err = run(2, tmp_path / "run", BAD_ON_ONE + WORSE_AND_WORSE, **changes)
    assert codes(tmp_path / "run") == {0: 0, 1: 0}, err
    assert out.count("warning: rolled back from step") == 1
    evaluations = losses(tmp_path / "run", "eval")
    best = evaluations[0]
    assert best[0] == 4
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["training"]["best_step"] == best[0]
    assert report["tuned"]["perplexity"] == pytest.approx(torch.tensor(best[1]).exp().item(), rel=1e-4)


SHORT_ANYWHERE = """
loop, real, calls = train.train, sft.token_nll, [0]
def failing(*args):
    calls[0] += 1
    return torch.empty(2**60, dtype=torch.uint8) if rank == 1 and calls[0] == 4 else real(*args)
def looping(*args):
    sft.token_nll = failing
    return loop(*args)
train.train = looping
"""


@pytest.mark.slow
def test_split_and_short_of_memory_it_ends_with_what_would_help(tmp_path: Path) -> None:
    _, err = run(2, tmp_path / "run", SHORT_ANYWHERE, **SHARDED)
    assert "failed: out of memory on rank 1: training.sharding=full cannot retry the step: lower " in err
    assert codes(tmp_path / "run").get(0, 3) in (3, 75)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"training.optimizer": "adamw_8bit"}, "training.optimizer: the state of adamw_8bit cannot be sharded: set "),
        ({"training.compile": True}, "training.compile: not supported with training.sharding=full"),
    ],
)
def test_what_cannot_be_split_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        validate_config(Config().override({"training.sharding": "full", **changes}))


def test_alone_there_is_nobody_to_share_with() -> None:
    with pytest.raises(UserError, match=r"training.sharding: full .* --nproc-per-node N"):
        select_device(torch.device("cpu"), "full")


# --- refused


@pytest.mark.slow
def test_a_plan_is_told_once_for_the_processes_that_there_are(tmp_path: Path) -> None:
    sharded = ["--plan", "training.method=full", "training.sharding=full", "system.device=cpu"]
    said = {}
    for processes in (1, 2):
        done = torchrun(processes, ["train.py", "configs/tiny.py", *sharded])
        out, err = done.communicate(timeout=120)
        assert done.returncode == 0, err
        (said[processes],) = [float(line.split()[1]) for line in out.splitlines() if line.startswith("optimizer")]
    assert said[2] == pytest.approx(said[1] / 2, abs=1e-3)
    refused = torchrun(2, ["train.py", "configs/tiny.py", "--selftest", "system.device=cpu"])
    _, err = refused.communicate(timeout=120)
    assert err.count("error: --selftest: runs in one process: start train.py without torchrun\n") == 1


def test_ranks_that_differ_are_refused_by_one_of_them(tmp_path: Path) -> None:
    older = (
        "real = train.library_versions\nif rank == 1:\n    train.library_versions = lambda: {**real(), 'torch': '1.0'}"
    )
    _, err = run(2, tmp_path / "run", older)
    assert codes(tmp_path / "run") == {0: 2, 1: 2}
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    here = importlib.metadata.version("torch")
    assert lines == [f"error: torchrun: torch is 1.0 on rank 1 and {here} on rank 0: make them the same"]
    assert not (tmp_path / "run").exists()


def test_each_rank_builds_the_same_data_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    changes = {"training__max_steps": 1, "training__eval_steps": 0, "evaluation__prompts": 0}
    out, err = run(2, tmp_path / "run", **changes)
    assert codes(tmp_path / "run") == {0: 0, 1: 0}, err
    assert out.count("the cache is not writable (Not a directory): the data is not cached") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"system__device": "cuda"}, "error: system.device: cuda is not available here"),
        ({"data__train_file": "missing.jsonl"}, "missing.jsonl"),
        ({"training__learning_rat": 1}, "training.learning_rat"),
        (
            {"training__micro_batch_size": "auto", "training__gradient_accumulation_steps": 5},
            "training.gradient_accumulation_steps: a step of 5 sequences cannot be split evenly over 2 processes",
        ),
    ],
)
def test_a_mistake_is_one_line_from_one_rank(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    _, err = run(2, tmp_path / "run", **changes)
    assert set(codes(tmp_path / "run").values()) == {2}
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert reason in lines[0]


@pytest.mark.slow
def test_another_number_of_rows_a_step_is_refused_with_the_fix(alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert train.main(quick(directory, **EXACT, training__max_steps=2)) == 0
    _, err = run(2, directory)
    assert codes(directory) == {0: 2, 1: 2}
    assert "the effective batch size of this run is 8, and 2 processes make it 16: change " in err


def split(size: int, steps: int, ranks: int) -> Config:
    names = ("training.micro_batch_size", "training.gradient_accumulation_steps", "system.ranks")
    return Config().override(dict(zip(names, (size, steps, ranks), strict=True)))


def test_the_rows_of_a_step_are_the_ranks_together() -> None:
    assert split(4, 2, 3).effective_batch_size() == 24
    assert first_difference(split(4, 6, 1), split(4, 2, 3)) is None
    assert resume_fingerprint(split(4, 6, 1)) == resume_fingerprint(split(2, 3, 4))
    assert first_difference(split(4, 6, 1), split(4, 6, 2)) is not None


def test_other_ranks_must_keep_the_effective_batch_size() -> None:
    recorded = split(4, 4, 1).to_dict()
    check_same_run(recorded, split(2, 4, 2), {}, "run")
    message = "the effective batch size of this run is 16, and 2 processes make it 32: change training.micro_batch_size"
    with pytest.raises(UserError, match=message):
        check_same_run(recorded, split(4, 4, 2), {}, "run")


def test_rows_by_memory_are_shared_evenly() -> None:
    auto = Config().override({"training.micro_batch_size": "auto", "training.gradient_accumulation_steps": 7})
    auto = auto.override({"system.ranks": 2, "system.device": "cpu"})
    planner = Planner.of(auto, Machine.detect(auto), decoder_config(MISTRAL_7B))
    with pytest.raises(UserError, match=r"a step of 7 sequences .* over 2 processes: set it to 6"):
        resolve_micro_batch_size(planner, None)


def test_a_number_of_ranks_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match=r"system.ranks: 3, but the world size is 1: .* --nproc-per-node 3"):
        distributed.resolve_world_size(Config().override({"system.ranks": 3}))


@pytest.mark.parametrize(("world", "reason"), [("2", "MASTER_ADDR expected"), ("two", "invalid literal")])
def test_variables_that_describe_no_group_are_one_line(
    world: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert train.main(["configs/tiny.py", "--plan"]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.endswith(": start with torchrun, or unset WORLD_SIZE and RANK\n")
    assert error.count("\n") == 1


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes for 2 GPUs: set --nproc-per-node 2"):
        select_device(torch.device("cuda"), "none")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(distributed, "process_rank", lambda: 5)  # of two machines, started without torchrun
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    select_device(torch.device("cuda"), "none")
    assert chosen == [1]
    with pytest.raises(UserError, match="Metal"):
        select_device(torch.device("mps"), "none")


# --- the words, one by one


WORDS = """
import torch
from torch import nn
from nanoft import TrainingFailed, UserError
from nanoft.runtime import distributed

def raised(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def fail(error):
    raise error

def short():
    with distributed.same_exception(torch.device("cpu")):
        if distributed.process_rank() == 1:
            torch.empty(2**60, dtype=torch.uint8)

def broken():
    with distributed.same_exception(torch.device("cpu")):
        if distributed.process_rank() == 1:
            fail(ValueError("odd"))

@distributed.distributed_main
def main(argv):
    me, n = distributed.process_rank(), distributed.world_size()
    assert n == 3
    assert list(distributed.split_work(range(8))) == list(range(me, 8, 3))
    every = {i: [i / 3, "x"] for i in range(4)}
    assert distributed.all_gather_dict({i: every[i] for i in distributed.split_work(range(4))}) == every
    assert distributed.broadcast_from_rank0(lambda: ["found", me]) == ["found", 0]
    assert raised(lambda: distributed.broadcast_from_rank0(lambda: fail(UserError("what")))) == "UserError: what"
    wrong = raised(lambda: distributed.broadcast_from_rank0(lambda: fail(KeyError("x"))))
    assert wrong == ("TrainingFailed: 'x'" if me else "KeyError: 'x'"), wrong
    assert distributed.all_reduce_sum(0.1 * me, 1) == [0.1 * 0 + 0.1 * 1 + 0.1 * 2, 3]
    assert [distributed.all_reduce_any(me == 1), distributed.all_reduce_any(False)] == [True, False]
    assert raised(short).startswith("OutOfMemory")
    other = "TrainingFailed: another process failed: see its message"
    assert raised(broken) == ("ValueError: odd" if me == 1 else other)

    distributed.BUCKET_BYTES = 1000  # the 20 x 20 by itself
    shapes = [(3, 5), (20, 20), (), (7,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    chance = torch.Generator().manual_seed(0)
    grads = [[torch.randn(shape, generator=chance) for shape in shapes] for _ in range(3)]
    for i, p in enumerate(parameters):
        p.grad = grads[me][i].clone()
    loss = torch.tensor(float(me))
    distributed.all_reduce_gradients(loss, parameters)
    assert loss == 3
    for i, p in enumerate(parameters):
        torch.testing.assert_close(p.grad, sum(grads[r][i].double() for r in range(3)).float())
    values = torch.full((4,), float(me))
    distributed.broadcast_tensors([values])
    assert values.eq(0).all()

    drawn = []
    for window in (0, 0, 1):
        distributed.seed_process(5, 0, window)
        drawn.append(torch.rand(4))
    if me:
        assert drawn[0].equal(drawn[1]) and not drawn[1].equal(drawn[2])
    first = torch.stack([torch.zeros(4)] * 3)
    first[me] = drawn[0]
    torch.distributed.all_reduce(first)
    assert len({tuple(row) for row in first.tolist()}) == 3
    distributed.assert_same_on_all_ranks({"a": 1})
    differ = raised(lambda: distributed.assert_same_on_all_ranks({"a": 1, "b": me // 2}))
    assert differ.startswith("UserError: torchrun: b is 1 on rank 2"), differ
    print(f"rank {me} is done", flush=True)
    return 0

raise SystemExit(main([]))
"""


@pytest.mark.slow
def test_the_words_that_ranks_say_to_one_another(tmp_path: Path) -> None:
    script = tmp_path / "words.py"
    script.write_text(WORDS)
    process = torchrun(3, [str(script)])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert sorted(out.split("\n"))[1:] == [f"rank {n} is done" for n in range(3)]


@pytest.mark.quick
def test_alone_there_is_nobody_to_talk_to() -> None:
    assert (distributed.process_rank(), distributed.world_size()) == (0, 1)
    assert distributed.broadcast_from_rank0(lambda: {1, 2}) == {1, 2}, "not even JSON is made of it"
    assert distributed.all_reduce_sum(0.5, 3) == [0.5, 3]
    assert (list(distributed.split_work(range(3))), distributed.all_gather_dict({2: "c"})) == ([0, 1, 2], {2: "c"})
    p = torch.nn.Parameter(torch.ones(2))
    distributed.all_reduce_gradients(torch.ones(()), [p])
    assert p.grad is None
    with pytest.raises(ValueError, match="odd"), distributed.same_exception(torch.device("cpu")):
        raise ValueError("odd")
