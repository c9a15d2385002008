"""Fine-tune a causal language model: the whole loop, top to bottom.

    python train.py                                       the embedded demo, configs/tiny.py
    python train.py configs/tiny.py training.max_steps=20
    python train.py my.yaml data.train_file=chats.jsonl model.name=mistralai/Mistral-7B-Instruct-v0.3
    python train.py auto data.train_file=chats.jsonl      the config for this machine, from configs/

An interrupted run goes on when the same command is given again.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nanoft import TrainingFailed, UserError, checkpoint, guard
from nanoft.batches import Batch, eval_batches, pad_to_multiple
from nanoft.checkpoint import Checkpoint
from nanoft.config import Config
from nanoft.config.loading import load_config, read_overrides
from nanoft.optim import learning_rate, set_learning_rate
from nanoft.runtime import distributed
from nanoft.runtime.command import Arguments, StopRequest, command, ignore_broken_output
from nanoft.runtime.device import choose_device, choose_dtype, describe_device, library_versions, seed_everything
from nanoft.runtime.energy import EnergyMeter
from nanoft.runtime.memory import (
    MemoryMonitor,
    Shortage,
    is_out_of_memory,
    peak_memory_gb,
    read_memory,
    total_memory_gb,
)
from nanoft.tracking.profiler import Profiler
from nanoft.tracking.run import Run
from nanoft.tracking.trackers import build_trackers
from nanoft.training import self_test
from nanoft.training.doctor import validate_environment
from nanoft.training.finalize import finalize
from nanoft.training.memory_plan import out_of_memory_error, resolve_micro_batch_size, show_plan
from nanoft.training.preflight import CHECKS, check_room, preflight_checks, require_passed, show_step
from nanoft.training.recovery import halve_micro_batch
from nanoft.training.saving import ensure_final_checkpoint, log_memory, report_failure, report_save, save
from nanoft.training.setup import Provenance, build_training, init_run_dir, load_data, print_summary
from nanoft.training.state import TrainContext, TrainState, start_from, starting_state
from nanoft.training.validation import validate_config

STOPPED_BY_SIGNAL = 75
CONFIGS = Path(__file__).parent / "configs"
DEFAULT_CONFIG = CONFIGS / "tiny.py"
GPU_CONFIGS = {"gpu_80gb.py": 78, "gpu_24gb.py": 23, "gpu_12gb.py": 12, "gpu_8gb.py": 0}  # GB that each needs


def train(job: TrainContext, state: TrainState, stop: StopRequest, total_steps: int) -> TrainState:
    """The loop. Returns how far it came; a checkpoint of that step is on the disk."""
    watch, energy, is_first = MemoryMonitor(job.device), EnergyMeter(job.device), not distributed.process_rank()
    probe = Profiler(job.config, job.run)
    job.model.train()
    with job.saves, probe, progress_bar(job, state, total_steps) as bar:
        if state.step == 0 and job.config.guard.max_rollbacks:
            save(job, state)  # something to go back to; and whether saving works is known at once
        while state.step < total_steps and not distributed.stop_requested(stop) and not out_of_patience(job, state):
            started = time.perf_counter()
            here = [job.batches.epoch, job.batches.index]
            window = job.batches.next_window()  # all micro-batches of one optimizer step
            if here in state.guard.left_out:
                continue

            with Shortage(job.device) as short_of_memory:
                loss, grad_norm = accumulate(job, window)
            if short_of_memory:
                halve_micro_batch(job, state)  # the same window again, in smaller pieces
                continue
            verdict = guard.check_step(job.config.guard, state.guard, loss, grad_norm, here)
            if verdict.reason:
                report_bad_step(job, state, window, here, loss, grad_norm, verdict)
            if verdict.action != "take":
                state = leave_out(job, state, window, verdict)
                continue

            rate = state.guard.rate * scheduled_rate(job, state, total_steps)
            set_learning_rate(job.optimizer, rate)
            with Shortage(job.device) as short_of_memory, distributed.same_exception(job.device):
                job.optimizer.step()
            if short_of_memory:
                state = go_back(job, state)  # half of a step may be done; a checkpoint has whole ones
                halve_micro_batch(job, state)
                continue
            state.step += 1
            state.epoch, state.window = job.batches.epoch, job.batches.index
            probe.step(state.step, job.trained, grad_norm)
            job.optimizer.zero_grad(set_to_none=True)

            count(state, window, loss, time.perf_counter() - started, energy.used())
            bar.set_postfix_str(f"loss {loss:.3f}, lr {rate:.1e}, {state.meter.tokens_per_second():,.0f} tok/s", False)
            bar.update(state.step - bar.n)  # which may have gone back
            if due(state.step, job.config.training.log_steps, total_steps):
                log_step(job, state, rate, grad_norm)
            if due(state.step, job.config.training.eval_steps, total_steps):
                evaluate_now(job, state)
            watch_memory(job, state, watch)
            report_save(job, state, job.saves.collect())
            if due_to_save(job, state, total_steps):
                save(job, state)
        ensure_final_checkpoint(job, state)
    return state


def accumulate(job: TrainContext, window: list[Batch]) -> tuple[float, float]:
    """Forward and backward over a window, this rank's micro-batches of it: leaves the window's gradient, clipped.

    Returns:
        The loss, in nats per target token of the window, and the norm of the gradient before clipping.
    """
    t, model = job.config.training, job.model
    job.objective.prepare(model, window)
    units = job.objective.count(window)
    loss = torch.zeros((), device=job.device)
    distributed.seed_process(job.config.system.seed, job.batches.epoch, job.batches.index)
    with distributed.same_exception(job.device):
        for micro_batch in distributed.shard(pad_to_multiple(window, distributed.world_size())):
            batch = micro_batch.to(job.device)
            with job.autocast():
                # sum over units / units of the WINDOW: the same however the window is split
                micro_loss = job.objective.loss(model, batch) / units
            micro_loss.backward()
            loss += micro_loss.detach()
    parameters = [p for _, p in job.trained]
    distributed.all_reduce_gradients(loss, parameters)
    grad_norm = nn.utils.clip_grad_norm_(parameters, t.max_grad_norm or float("inf"))
    return loss.item(), distributed.full_tensor(grad_norm).item()


def scheduled_rate(job: TrainContext, state: TrainState, total_steps: int) -> float:
    """The learning rate that the schedule has for the next step."""
    return learning_rate(state.step, total_steps, job.config.training)


def count(state: TrainState, window: list[Batch], loss: float, seconds: float, joules: float) -> None:
    """Add a step to the sums of the run."""
    targets, tokens = (sum(getattr(m, kind) for m in window) for kind in ("target_tokens", "tokens"))
    state.meter.add(loss * targets, tokens, targets, seconds, joules)


def log_step(job: TrainContext, state: TrainState, rate: float, grad_norm: float) -> None:
    """A `train` line: means since the last one, and what is true now."""
    memory = {"peak_memory_gb": peak_memory_gb(job.device), **read_memory(job.device).figures()}
    values = {"learning_rate": rate, "grad_norm": grad_norm, **memory}
    job.run.log("train", state.step, **state.meter.flush(), **values, epoch=state.epoch)


def due(step: int, every: int, total_steps: int) -> bool:
    """Whether something happens after this step: every so many steps, and after the last."""
    return step == total_steps or (every > 0 and step % every == 0)


def due_to_save(job: TrainContext, state: TrainState, total_steps: int) -> bool:
    """At the steps that were asked for, at the best so far, and again after a save that failed."""
    again = distributed.all_reduce_any(job.saves.overdue())
    return due(state.step, job.config.training.save_steps, total_steps) or state.best_step == state.step or again


def out_of_patience(job: TrainContext, state: TrainState) -> bool:
    """Early stopping: too many evaluations in a row without a gain."""
    patience = job.config.training.early_stopping_patience
    return patience > 0 and state.evaluations_without_gain >= patience


def progress_bar(job: TrainContext, state: TrainState, total_steps: int) -> Any:
    hidden = not job.config.logging.progress_bar or distributed.process_rank() > 0
    often = 0.1 if sys.stderr.isatty() else 5.0  # s between two looks of the bar: a file keeps every one of them
    options: dict[str, Any] = {"disable": hidden, "mininterval": often, "dynamic_ncols": True, "leave": False}
    return tqdm(total=total_steps, initial=state.step, unit="step", **options)


# ---- When a step goes wrong


def report_bad_step(
    job: TrainContext,
    state: TrainState,
    window: list[Batch],
    here: list[int],
    loss: float,
    grad_norm: float,
    verdict: guard.Verdict,
) -> None:
    """Say which records were in a window whose loss or gradient is not what it should be."""
    records = [job.corpus.location(record) for micro_batch in window for record in micro_batch.records]
    what = "spike" if verdict.action == "take" else "step skipped"
    figures = {"loss": str(loss), "grad_norm": str(grad_norm), "window": here}
    job.run.log("warning", state.step, what=what, **figures, records=records)
    first = ", ".join(Path(record).name for record in records[:4])
    done = "taken all the same" if what == "spike" else "left out"
    job.run.print(f"warning: after step {state.step}: {verdict.reason}: {done}: {first}")


def leave_out(job: TrainContext, state: TrainState, window: list[Batch], verdict: guard.Verdict) -> TrainState:
    """A window that is not learned from: pass it over, or go back, or give up, as the guard says.

    Raises:
        TrainingFailed: the guard says that it is over.
    """
    job.optimizer.zero_grad(set_to_none=True)
    state.epoch, state.window = job.batches.epoch, job.batches.index
    if verdict.action == "stop":
        raise diverged(job, state, window)
    if verdict.action == "roll back":
        return go_back(job, state, guard.rolled_back_history(job.config.guard, state.guard))
    return state


def go_back(job: TrainContext, state: TrainState, history: guard.History | None = None) -> TrainState:
    """Take everything from the newest checkpoint that is whole; what the guard has learned since then stays.

    If the last rollback led to that one, and not one step could be taken from it, it is no good: the one before it.

    Args:
        history: of a rollback; None: the guard has nothing to do with it.
    """

    def whole() -> Checkpoint:
        report_save(job, state, job.saves.collect(wait=True))
        again = history is not None and state.step == state.guard.back_at
        stuck = again and job.checkpoints.newest(before=state.step)[0] is not None
        saved, _ = job.checkpoints.newest(before=state.step if stuck else float("inf"))
        if saved is None:
            raise UserError("no checkpoint could be saved before")
        return saved

    job.optimizer.zero_grad(set_to_none=True)
    try:
        back = replace(start_from(job, whole), micro_batch_rows=state.micro_batch_rows)
    except (UserError, checkpoint.CheckpointCorrupted) as reason:
        raise TrainingFailed(f"after step {state.step} the run had to go back, and could not: {reason}") from None
    back.guard = replace(history, back_at=back.step) if history else guard.restored_history(back.guard, state.guard)
    history = back.guard
    job.model.train()
    job.checkpoints.forget_after(back.step)
    job.run.open_metrics(back.step, [back.epoch, back.window], history.left_out, rolled_back=True)
    rate = f", at {history.rate:g} of the learning rate" if history.rate < 1 else ""
    figures: dict[str, Any] = {"since": state.step, "rate": history.rate, "left_out": history.left_out}
    job.run.log("warning", back.step, what="rolled back", **figures)
    job.run.print(f"warning: back from step {state.step} to the checkpoint of step {back.step}{rate}")
    return back


def diverged(job: TrainContext, state: TrainState, window: list[Batch]) -> TrainingFailed:
    """What to say when nothing helped: where the first bad number arises, and what to change."""
    batch, seen, rate = window[-1].to(job.device), state.guard, job.config.training.learning_rate
    where = "which weight or output is the first was not looked for, because the model is split"
    if job.config.training.sharding == "none":
        with job.autocast():
            where = guard.diagnose(job.model, batch.ids, batch.positions, batch.documents, batch.target_positions)
    return TrainingFailed(
        f"{seen.skips} windows in a row could not be used after step {state.step}, and {seen.rollbacks} rollbacks "
        f"did not help: {where}: lower training.learning_rate ({rate:g}), or look at the records in train.log"
    )


# ---- Between two steps


def evaluate_now(job: TrainContext, state: TrainState) -> None:
    """Loss on the validation samples; remember the best, and count the evaluations that were no better."""
    if not len(job.validation):
        return
    try:
        figures = validation_loss(job)
    except Exception as error:  # a run is worth more than a look at it
        job.model.train()
        report_failure(job, state, "evaluation", error)
        return
    loss = figures["loss"]
    state.best_step, state.best_loss = distributed.broadcast_from_rank0(
        lambda: (state.best_step, state.best_loss)
    )  # if it was saved
    gained = loss < state.best_loss - job.config.training.early_stopping_threshold
    state.evaluations_without_gain = 0 if gained else state.evaluations_without_gain + 1
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
    log_memory(job, state, "evaluated")
    job.run.log("eval", state.step, **figures)
    best = " (best so far)" if state.best_step == state.step else ""
    job.run.print(f"step {state.step}: validation loss {loss:.4f}, perplexity {figures['perplexity']:.4g}{best}")


def validation_loss(job: TrainContext) -> dict[str, float]:
    """What the objective measures, in smaller batches if memory is short."""
    rows = job.config.evaluation.batch_size
    while rows:
        with Shortage(job.device), job.autocast():
            return job.objective.evaluate(job.model, eval_batches(job.validation, rows, job.chat.pad_id))
        rows //= 2
        job.model.train()  # the attempt that failed has left it in evaluation, and dropout off
    raise TrainingFailed("out of memory with one validation sample")


def watch_memory(job: TrainContext, state: TrainState, watch: MemoryMonitor) -> None:
    """Say so before memory runs out, and when it grows and grows."""
    for warning in watch.check(state.step):
        job.run.log("warning", state.step, what="memory", text=warning)
        job.run.print(f"warning: memory after step {state.step}: {warning}")


# ---- The command


@dataclass(frozen=True)
class Wish:
    """What the command line asks for, besides the config."""

    resume: str = "auto"
    show_batch: bool = False
    show_step: int | None = None
    preflight: bool = False
    force: list[str] = field(default_factory=list)

    def shows_data(self) -> bool:
        """And loads no model."""
        return self.show_batch or self.show_step is not None


def run_training(config: Config, wish: Wish) -> int:
    """One run, from its directory to its report; returns the exit code."""
    ignore_broken_output()
    seed_everything(config.system.seed, config.system.threads, config.system.deterministic)
    device, config = choose_device(config.system.device), distributed.resolve_world_size(config)
    distributed.select_device(device, config.training.sharding)
    validate_environment(config, device)  # what the machine cannot do is told now, not after hours
    settings = {f"{section}.{name}": v for section, fields in config.to_dict().items() for name, v in fields.items()}
    name = describe_device(device).partition(",")[0]
    distributed.assert_same_on_all_ranks({"the device": name, **library_versions(), **settings})
    with Run.open(config.output.dir) as run, StopRequest() as stop:
        config = Config.from_dict(
            distributed.broadcast_from_rank0(lambda: resolve_micro_batch_size(config, run.recorded_config()).to_dict())
        )
        if not wish.shows_data():
            distributed.broadcast_from_rank0(
                lambda: require_passed([check_room(config)], wish.force)
            )  # before a large model is fetched
        provenance = distributed.broadcast_from_rank0(lambda: init_run_dir(config, run, wish.resume))
        with explained(config):
            return run_claimed(config, run, stop, provenance, wish)


@contextlib.contextmanager
def explained(config: Config) -> Iterator[None]:
    """Out of memory where nothing can be halved: while loading, and the like."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise out_of_memory_error(config, config.micro_batch_rows()) from None
        raise


def run_claimed(config: Config, run: Run, stop: StopRequest, provenance: Provenance, wish: Wish) -> int:
    """Load the data, prepare, find where to begin, look before the leap, train, finish."""
    chat, corpus, batches = load_data(config, run, datetime.fromisoformat(provenance["date"]))
    total_steps = corpus.report["steps"]
    if wish.shows_data():
        show_step(run, batches, corpus, chat, wish.show_step, total_steps)
        return 0
    longest = batches.longest().ids.shape[1]
    distributed.broadcast_from_rank0(lambda: require_passed([check_room(config, longest)], wish.force))
    job = build_training(config, run, provenance, chat, corpus, batches)
    state = starting_state(job, wish.resume)
    done = state.step >= total_steps or out_of_patience(job, state)
    if done and distributed.broadcast_from_rank0(lambda: run.finished_step() == state.step):
        run.print(f"complete  {run.directory} has done its {state.step} steps: see report.md there")
        return 0
    seconds_a_step = preflight_checks(job, state, wish.force)
    print_summary(job, state, total_steps, seconds_a_step)
    if wish.preflight:
        return 0
    job.checkpoints.forget_after(state.step)
    run.open_metrics(state.step, [state.epoch, state.window], state.guard.left_out)
    if not distributed.process_rank():
        run.trackers = build_trackers(config, run.directory, state.step)
    parts = {name: size / 1e9 for name, size in job.plan.parts.items()}
    peak = peak_memory_gb(job.device)
    run.log("memory", state.step, predicted_gb=parts, peak_memory_gb=peak, total_steps=total_steps)
    log_memory(job, state, "prepared")
    state = train(job, state, stop, total_steps)
    if distributed.stop_requested(stop) and state.step < total_steps:
        run.print(f"stopped   by {stop.signal_name} after step {state.step}: the same command goes on from there")
        return STOPPED_BY_SIGNAL
    if not finalize(job, state, stop):
        run.print(f"stopped   by {stop.signal_name} before the report: the same command writes it")
        return STOPPED_BY_SIGNAL
    return 0


def go_on(job: TrainContext, total_steps: int) -> None:
    """The loop from the newest checkpoint, or from the beginning: what the self-test tests."""
    train(job, starting_state(job, "auto"), StopRequest(), total_steps)


def run_selftest(config: Config) -> int:
    """Try what is promised on this config, model and data, in a directory that goes away again.

    Raises:
        UserError: it is not the only process.
    """
    if distributed.world_size() > 1:
        raise UserError("--selftest: is for one process: start train.py without torchrun")
    seed_everything(config.system.seed, config.system.threads, config.system.deterministic)
    validate_environment(config, choose_device(config.system.device))
    with tempfile.TemporaryDirectory(prefix="nanoft-selftest-") as aside:
        config = self_test.shorten(resolve_micro_batch_size(config, None), Path(aside))
        with explained(config), Run.open(config.output.dir) as run:
            provenance = init_run_dir(config, run, "never")
            job = build_training(config, run, provenance, *load_data(config, run, datetime.now()))
            run.open_metrics(0, [0, 0], [])
            self_test.run(job, go_on)
    return 0


def config_for(device_type: str, memory_gb: float) -> Path:
    """The config in configs/ for a device with so much memory."""
    if device_type == "cuda":
        return CONFIGS / next(name for name, least in GPU_CONFIGS.items() if memory_gb >= least)
    return CONFIGS / {"mps": "m4.py", "cpu": "cpu.py"}[device_type]


def pick_config(overrides: list[str]) -> Path:
    """`auto`: the config for this machine, and a line that says which and why."""
    device = choose_device(read_overrides(overrides).get("system.device", "auto"))
    size = total_memory_gb(device)
    if device.type == "cuda" and choose_dtype("auto", device) == torch.float32:
        size /= 2  # before Ampere: in float32, activations take twice the memory
    path = config_for(device.type, size)
    if not distributed.process_rank():
        print(f"auto      configs/{path.name}, because this is {describe_device(device)}")
    return path


@command
@distributed.distributed_main
def main(argv: list[str]) -> int:
    parser = Arguments(
        prog="train.py",
        description="Fine-tune a causal language model: LoRA, QLoRA, or every parameter.",
        epilog="examples: python train.py configs/tiny.py; python train.py configs/tiny.py quantization.bits=4; "
        "python train.py auto model.name=Qwen/Qwen2.5-3B-Instruct data.train_file=mine.jsonl",
    )
    parser.add_argument("config", nargs="?", help="Python, YAML or JSON file, or auto; default: configs/tiny.py")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a setting")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="default: auto")
    parser.add_argument("--show-batch", action="store_true", help="print the first batch as the model sees it and stop")
    parser.add_argument("--show-step", type=int, metavar="N", help="print the batch of optimizer step N and stop")
    parser.add_argument("--plan", action="store_true", help="print memory and time before anything is loaded and stop")
    parser.add_argument("--preflight", action="store_true", help="check data, memory and disk and stop")
    parser.add_argument("--selftest", action="store_true", help="try here what is promised, in minutes, and stop")
    parser.add_argument("--force", action="append", default=[], choices=CHECKS, help="go on although this check failed")
    args = parser.parse_intermixed_args(argv)
    positional = [args.config, *args.overrides] if args.config else args.overrides
    path = positional.pop(0) if positional and "=" not in positional[0] else DEFAULT_CONFIG
    if path == "auto":
        path = pick_config(positional)
    config = load_config(path, positional)
    validate_config(config)
    if args.plan:  # alone, system.ranks says of how many processes one is planned
        return distributed.broadcast_from_rank0(
            lambda: show_plan(distributed.resolve_world_size(config) if distributed.world_size() > 1 else config)
        )
    if args.selftest:
        return run_selftest(config)
    return run_training(config, Wish(args.resume, args.show_batch, args.show_step, args.preflight, args.force))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
