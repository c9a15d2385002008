"""Fine-tune a causal language model: the whole loop, top to bottom.

    python train.py                                       the embedded demo, configs/tiny.py
    python train.py configs/tiny.py training.max_steps=20
    python train.py my.yaml data.train_file=chats.jsonl model.name=mistralai/Mistral-7B-Instruct-v0.3
    python train.py auto data.train_file=chats.jsonl      the config for this machine, from configs/

An interrupted run goes on when the same command is given again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nanoft import TrainingFailed, UserError, checkpoint, evaluate, guard, parallel, ranks, runtime, scores, selftest
from nanoft.adapter import adapter_tensors, load_adapter_tensors
from nanoft.batches import Batch, Batches, Samples, even
from nanoft.chat import ChatTokenizer
from nanoft.checkpoint import Background, Checkpoints, Outcome, Saved
from nanoft.config import Config, check_same_run, load_config, questionable, read_overrides, settled_hash
from nanoft.corpus import REJECTED, Corpus, data_hash, describe, open_corpus
from nanoft.export import save_result
from nanoft.lora import LoRALinear, describe_adapters, disabled, inject_lora
from nanoft.loss import target_nll
from nanoft.metrics import Meter, Run, clock
from nanoft.model import Decoder, compile_blocks
from nanoft.nf4 import Linear4bit, Linear8bit, cache_weights
from nanoft.optim import (
    build_optimizer,
    check_optimizer,
    learning_rate_at,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    warmup_length,
)
from nanoft.plan import Plan, choose_activations, decide_rows, kept, show_plan, too_little
from nanoft.preflight import (
    NAMES,
    Check,
    check_data,
    check_head,
    check_ids,
    judge,
    preview,
    rehearse,
    rehearse_evaluation,
    rehearse_save,
    show_window,
)
from nanoft.probe import Probe
from nanoft.report import Findings, leakage_of_run, report, settings_of
from nanoft.sinks import check_installed, curves_section, listeners
from nanoft.weights import (
    check_quantization,
    find_model,
    hash_files,
    load_model,
    quantization_of,
    read_shape,
    shard_paths,
    stored_dtype,
)

STOPPED_BY_SIGNAL = 75
Tensors = dict[str, torch.Tensor]
Provenance = dict[str, Any]  # what a run depends on: versions, hashes of data and base, device, date
IDENTITY = ("data_sha256", "base_sha256", "versions")  # of these, what a checkpoint says about itself
CONFIGS = Path(__file__).parent / "configs"
DEFAULT_CONFIG = CONFIGS / "tiny.py"
GPU_CONFIGS = {"gpu_80gb.py": 78, "gpu_24gb.py": 23, "gpu_12gb.py": 12, "gpu_8gb.py": 0}  # GB that each needs


@dataclass
class State:
    """Everything that changes while training, besides the weights and the optimizer's moments."""

    step: int = 0  # completed optimizer steps
    epoch: int = 0  # where the data stands: the window that comes next
    window: int = 0
    meter: Meter = field(default_factory=Meter)
    best_step: int = 0
    best_loss: float = float("inf")  # on the validation samples, nats per target token
    evaluations_without_gain: int = 0
    micro_batch_rows: int = 0  # fewer than configured, since memory was short; 0: as configured
    guard: guard.History = field(default_factory=guard.History)


@dataclass
class Job:
    """The parts of one training job, made once and used together."""

    config: Config
    run: Run
    chat: ChatTokenizer
    model: Decoder
    adapters: dict[str, LoRALinear]  # empty when every parameter is trained
    optimizer: torch.optim.Optimizer
    corpus: Corpus
    batches: Batches
    validation: Samples
    checkpoints: Checkpoints
    saves: Background
    base_directory: Path
    device: torch.device
    dtype: torch.dtype
    plan: Plan

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that learn, by name; if they are split over the ranks, this rank's parts."""
        parallel.split_up(self.model)
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def autocast(self) -> Any:
        """Full training keeps float32 weights and computes in model.dtype; adapters cast themselves."""
        wanted = not self.adapters and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if wanted else contextlib.nullcontext()


def train(job: Job, state: State, stop: runtime.StopRequest, total_steps: int) -> State:
    """The loop. Returns how far it came; a checkpoint of that step is on the disk."""
    t, model, optimizer = job.config.training, job.model, job.optimizer
    warmup_steps = warmup_length(t.warmup_steps, t.warmup_ratio, total_steps)
    model.train()
    watch = runtime.MemoryWatch(job.device)
    probe = Probe(job.config, job.run.directory, job.run.log, job.run.say)
    with job.saves, probe, progress_bar(job, state, total_steps) as bar:
        if state.step == 0 and job.config.guard.max_rollbacks:
            save(job, state)  # something to go back to; and whether saving works is known at once
        while state.step < total_steps and not parallel.asked_to_stop(stop) and not out_of_patience(job, state):
            started = time.perf_counter()
            here = [job.batches.epoch, job.batches.index]
            window = job.batches.next_window()  # all micro-batches of one optimizer step
            if here in state.guard.left_out:
                continue

            with runtime.Shortage(job.device) as short_of_memory:
                loss, grad_norm = accumulate(job, window)
            if short_of_memory:
                halve(job, state)  # the same window again, in smaller pieces
                continue
            verdict = guard.judge(job.config.guard, state.guard, loss, grad_norm, here)
            if verdict.reason:
                report_bad_step(job, state, window, here, loss, grad_norm, verdict)
            if verdict.action == "take":
                rate = state.guard.rate * learning_rate_at(
                    state.step, total_steps, t.learning_rate, warmup_steps, t.lr_scheduler, t.min_lr_ratio, t.lr_power
                )
                set_learning_rate(optimizer, rate)
                with runtime.Shortage(job.device) as short_of_memory, parallel.alike(job.device):
                    optimizer.step()
                if short_of_memory:
                    state = go_back(job, state)  # half of a step may be done; a checkpoint has whole ones
                    halve(job, state)
                    continue
                state.step += 1
                probe.step(state.step, job.trained, grad_norm)
            optimizer.zero_grad(set_to_none=True)
            state.epoch, state.window = job.batches.epoch, job.batches.index
            if verdict.action == "stop":
                raise diverged(job, state, window)
            if verdict.action == "roll back":
                state = go_back(job, state, guard.rolled_back(job.config.guard, state.guard))
                bar.update(state.step - bar.n)
            if verdict.action != "take":
                continue

            targets, tokens = (sum(getattr(m, kind) for m in window) for kind in ("target_tokens", "tokens"))
            state.meter.add(loss * targets, tokens, targets, time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss:.3f}, lr {rate:.1e}, {state.meter.tokens_per_second():,.0f} tok/s", False)
            bar.update()
            if due(state.step, t.log_steps, total_steps):
                memory = runtime.peak_memory_gb(job.device)
                values = {"learning_rate": rate, "grad_norm": grad_norm, "peak_memory_gb": memory}
                values |= runtime.memory_now(job.device).figures()
                job.run.log("train", state.step, **state.meter.line(), **values, epoch=state.epoch)
            if due(state.step, t.eval_steps, total_steps):
                evaluate_now(job, state)
            watch_memory(job, state, watch)
            report_save(job, state, job.saves.collect())
            again = parallel.on_any_rank(job.saves.overdue())
            if due(state.step, t.save_steps, total_steps) or state.best_step == state.step or again:
                save(job, state)
        make_sure_of_the_last_save(job, state)
    return state


def accumulate(job: Job, window: list[Batch]) -> tuple[float, float]:
    """Forward and backward over a window, this rank's micro-batches of it: leaves the window's gradient, clipped.

    Returns:
        The loss, in nats per target token of the window, and the norm of the gradient before clipping.
    """
    t, model = job.config.training, job.model
    window_targets = sum(micro_batch.target_tokens for micro_batch in window)
    loss = torch.zeros((), device=job.device)
    parallel.reseed(job.config.system.seed, job.batches.epoch, job.batches.index)
    with parallel.alike(job.device):
        for micro_batch in parallel.share(even(window, parallel.ranks())):
            batch = micro_batch.to(job.device)
            with job.autocast():
                hidden = model(batch.ids, batch.positions, batch.documents, rows=batch.rows)  # (1, targets, hidden)
                nll = target_nll(hidden, model.head, batch.targets, t.label_smoothing, t.z_loss)
            # sum over target tokens / target tokens of the WINDOW: the same however the window is split
            micro_loss = nll / window_targets
            micro_loss.backward()
            loss += micro_loss.detach()
    parameters = [p for _, p in job.trained]
    parallel.add_up(loss, parameters)
    grad_norm = nn.utils.clip_grad_norm_(parameters, t.max_grad_norm or float("inf"))
    return loss.item(), parallel.whole(grad_norm).item()


def due(step: int, every: int, total_steps: int) -> bool:
    """Whether something happens after this step: every so many steps, and after the last."""
    return step == total_steps or (every > 0 and step % every == 0)


def out_of_patience(job: Job, state: State) -> bool:
    """Early stopping: too many evaluations in a row without a gain."""
    patience = job.config.training.early_stopping_patience
    return patience > 0 and state.evaluations_without_gain >= patience


def watch_memory(job: Job, state: State, watch: runtime.MemoryWatch) -> None:
    """Say so before memory runs out, and when it grows and grows."""
    for warning in watch.check(state.step):
        job.run.log("warning", state.step, what="memory", text=warning)
        job.run.say(f"warning: memory after step {state.step}: {warning}")


def log_memory(job: Job, state: State, stage: str) -> None:
    """What is held and what may be, at a stage of the run."""
    job.run.log("memory", state.step, stage=stage, **runtime.memory_now(job.device).figures())


# ---- When a step goes wrong


def report_bad_step(
    job: Job, state: State, window: list[Batch], here: list[int], loss: float, grad_norm: float, verdict: guard.Verdict
) -> None:
    """Say which records were in a window whose loss or gradient is not what it should be."""
    records = [job.corpus.place(record) for micro_batch in window for record in micro_batch.records]
    what = "spike" if verdict.action == "take" else "step skipped"
    figures = {"loss": str(loss), "grad_norm": str(grad_norm), "window": here}
    job.run.log("warning", state.step, what=what, **figures, records=records)
    first, done = (
        ", ".join(Path(record).name for record in records[:4]),
        "taken all the same" if what == "spike" else "left out",
    )
    job.run.say(f"warning: after step {state.step}: {verdict.reason}: {done}: {first}")


def go_back(job: Job, state: State, history: guard.History | None = None) -> State:
    """Take everything from the newest checkpoint that is whole; what the guard has learned since then stays.

    If the last rollback led to that one, and not one step could be taken from it, it is no good: the one before it.

    Args:
        history: of a rollback; None: the guard has nothing to do with it.
    """

    def whole() -> Saved:
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
    except (UserError, checkpoint.Damaged) as reason:
        raise TrainingFailed(f"after step {state.step} the run had to go back, and could not: {reason}") from None
    back.guard = replace(history, back_at=back.step) if history else guard.taken_back(back.guard, state.guard)
    history = back.guard
    job.model.train()
    job.checkpoints.forget_after(back.step)
    job.run.begin(back.step, [back.epoch, back.window], history.left_out, rolled_back=True)
    rate = f", at {history.rate:g} of the learning rate" if history.rate < 1 else ""
    job.run.log("warning", back.step, what="rolled back", since=state.step, rate=history.rate)
    job.run.say(f"warning: back from step {state.step} to the checkpoint of step {back.step}{rate}")
    return back


def diverged(job: Job, state: State, window: list[Batch]) -> TrainingFailed:
    """What to say when nothing helped: where the first bad number arises, and what to change."""
    batch, seen, rate = window[-1].to(job.device), state.guard, job.config.training.learning_rate
    where = "which weight or output is the first was not looked for, because the model is split"
    if job.config.training.sharding == "none":
        with job.autocast():
            where = guard.diagnose(job.model, batch.ids, batch.positions, batch.documents, rows=batch.rows)
    return TrainingFailed(
        f"{seen.skips} windows in a row could not be used after step {state.step}, and {seen.rollbacks} rollbacks "
        f"did not help: {where}: lower training.learning_rate ({rate:g}), or look at the records in train.log"
    )


def halve(job: Job, state: State) -> None:
    """Out of memory: go on from where `state` stands with micro-batches of half the rows; the window stays the same.

    Raises:
        TrainingFailed: they have one row; says what would help.
    """
    rows = job.batches.micro_batch_size
    if rows == 1:
        raise too_little(job.config, rows)
    job.optimizer.zero_grad(set_to_none=True)
    job.batches.micro_batch_size = state.micro_batch_rows = (rows + 1) // 2
    job.batches.seek(state.epoch, state.window)
    if job.run.begun:
        job.run.log("warning", state.step, what="out of memory", micro_batch_rows=state.micro_batch_rows)
    job.run.say(
        f"warning: out of memory after step {state.step} with micro-batches of {rows} rows: again with "
        f"{state.micro_batch_rows}; same samples a step, same loss"
    )


# ---- Evaluating and saving


def evaluate_now(job: Job, state: State) -> None:
    """Loss on the validation samples; remember the best, and count the evaluations that were no better."""
    if not len(job.validation):
        return
    try:
        loss, tokens = validation_loss(job)
    except Exception as error:  # a run is worth more than a look at it
        job.model.train()
        report_failure(job, state, "evaluation", error)
        return
    state.best_step, state.best_loss = parallel.tell(lambda: (state.best_step, state.best_loss))  # if it was saved
    gained = loss < state.best_loss - job.config.training.early_stopping_threshold
    state.evaluations_without_gain = 0 if gained else state.evaluations_without_gain + 1
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
    log_memory(job, state, "evaluated")
    perplexity = evaluate.safe_exp(loss)
    job.run.log("eval", state.step, loss=loss, perplexity=perplexity, target_tokens=tokens)
    best = " (best so far)" if state.best_step == state.step else ""
    job.run.say(f"step {state.step}: validation loss {loss:.4f}, perplexity {perplexity:.4g}{best}")


def validation_loss(job: Job) -> tuple[float, int]:
    """(nats per target token, target tokens), in smaller batches if memory is short."""
    rows = job.config.evaluation.batch_size
    while rows:
        with runtime.Shortage(job.device), job.autocast():
            return evaluate.validation_loss(job.model, job.validation, rows, job.chat.pad_id)
        rows //= 2
        job.model.train()  # the attempt that failed has left it in evaluation, and dropout off
    raise TrainingFailed("out of memory with one validation sample")


def report_failure(job: Job, state: State, what: str, error: Exception) -> None:
    """Something that training can do without went wrong."""
    job.run.log("warning", state.step, what=f"{what} failed", error=f"{type(error).__name__}: {error}")
    job.run.say(f"warning: {what} failed after step {state.step}: {type(error).__name__}: {error}")


def save(job: Job, state: State) -> None:
    """Begin to write a checkpoint; when it is on the disk, and only then, it may be called the best."""
    job.run.sync()
    report_save(job, state, job.saves.collect(wait=True))
    tensors = {weights_file(job): trained_weights(job), "optimizer": optimizer_tensors(job.optimizer, job.trained)}
    tensors = {name: parallel.gathered(named) for name, named in tensors.items()}
    contents = {**asdict(state), "rng": runtime.rng_state()}
    best = (state.best_step, state.best_loss) if state.best_step else None
    job.saves.start(state.step, tensors, contents, best)


def report_save(job: Job, state: State, outcome: Outcome | None) -> None:
    """Log what became of a save. One that failed is no end of training, and there will be another."""
    if outcome is None:
        return
    if outcome.error is None:
        where = str(outcome.path.relative_to(job.run.directory))
        seconds = {"seconds": outcome.seconds, "waited_seconds": outcome.waited_seconds}
        job.run.log("checkpoint", outcome.step, path=where, **seconds)
        return
    if state.best_step == outcome.step:  # its weights are lost: the best is the one before, whose are not
        state.best_step, state.best_loss = job.checkpoints.best() or (0, float("inf"))
    report_failure(job, state, f"saving step {outcome.step}", outcome.error)


def make_sure_of_the_last_save(job: Job, state: State) -> None:
    """A checkpoint of where the run stands, whatever was saved before.

    Raises:
        OSError: the disk refuses; what was saved before is untouched.
    """

    def last_saved(refused: bool) -> int:
        outcome = job.saves.collect(wait=True)
        report_save(job, state, outcome)
        if refused and outcome is not None and outcome.error is not None:
            raise outcome.error
        return job.saves.last_step

    if parallel.tell(lambda: last_saved(False)) != state.step:
        save(job, state)
        parallel.tell(lambda: last_saved(True))


def trained_weights(job: Job) -> dict[str, torch.Tensor]:
    return adapter_tensors(job.adapters) if job.adapters else {name: p.detach() for name, p in job.trained}


def weights_file(job: Job) -> str:
    return "adapter" if job.adapters else "model"


def restore(job: Job, saved: Saved) -> State:
    """Put a checkpoint's weights, optimizer, position and random numbers back.

    Raises:
        Damaged: its hashes are right, and yet it is no checkpoint.
    """
    values = dict(saved.state)
    try:
        rng = values.pop("rng")
        state = State(**{**values, "meter": Meter(**values["meter"]), "guard": guard.History(**values["guard"])})
        runtime.set_rng_state(rng)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise checkpoint.Damaged(f"{saved.path / 'state.json'}: {type(error).__name__}: {error}") from None
    load_weights(job, saved)
    moments = parallel.parted(saved.tensors("optimizer"), optimizer_tensors(job.optimizer, job.trained))
    load_optimizer_tensors(job.optimizer, job.trained, moments)
    if state.micro_batch_rows:  # what fitted into memory
        job.batches.micro_batch_size = min(job.batches.micro_batch_size, state.micro_batch_rows)
    job.batches.seek(state.epoch, state.window)
    job.saves.last_step = state.step
    return state


def start_from(job: Job, choose: Callable[[], Saved | None]) -> State:
    """On every rank, the checkpoint that rank 0 chooses (its state is told, its tensors are read); None: fresh."""

    def chosen() -> tuple[str, dict[str, Any]]:
        saved = choose()
        return (str(saved.path), saved.state) if saved else ("", {})

    path, state = parallel.tell(chosen)
    if path:
        return restore(job, Saved(Path(path), state))
    parallel.broadcast(trained_weights(job).values())
    return State()


def load_weights(job: Job, saved: Saved) -> None:
    """Only the weights of a checkpoint: to go on, or to take the best one as the result."""
    tensors = parallel.parted(saved.tensors(weights_file(job)), trained_weights(job))
    if job.adapters:
        load_adapter_tensors(job.adapters, tensors, str(saved.path))
        return
    checkpoint.fill({name: parameter.detach() for name, parameter in job.trained}, tensors, str(saved.path))


def starting_state(job: Job, resume: str) -> State:
    """Where the run begins, on every rank.

    Raises:
        UserError: `resume` names no checkpoint of this run, or none is whole.
    """
    try:
        return start_from(job, lambda: find_start(job, resume))
    except checkpoint.Damaged as reason:
        raise UserError(f"{reason}: start anew with another output.dir") from None


def find_start(job: Job, resume: str) -> Saved | None:
    """`auto`: the newest checkpoint that is whole, or a fresh start; `never`: a fresh start; PATH: that checkpoint."""
    if resume == "never":
        return None
    if resume != "auto":
        if Path(resume).resolve().parent != job.run.checkpoints.resolve():
            raise UserError(f"--resume: {resume}: is not in {job.run.checkpoints}: name a checkpoint of this run")
        if not Path(resume).is_dir():
            raise UserError(
                f"--resume: {resume}: no such checkpoint: there are those of steps {job.checkpoints.steps()}"
            )
        try:
            return job.checkpoints.verify(Path(resume))
        except (checkpoint.Damaged, OSError) as reason:
            raise UserError(f"--resume: {reason}") from None
    saved, damage = job.checkpoints.newest()
    for what in damage:
        job.run.say(f"warning: {what}: going back to an earlier checkpoint")
    return saved


def load_data(config: Config, run: Run, date: datetime) -> tuple[ChatTokenizer, Corpus, Batches]:
    """The tokenizer, the samples and their order; says what became of every record."""
    d, t, length, seed = config.data, config.training, config.model.max_seq_length, config.system.seed
    chat = ChatTokenizer.from_directory(find_model(config.model.name), d.template_args)
    chat.date = date
    started = time.perf_counter()
    bar = config.logging.progress_bar and not parallel.rank()
    corpus = parallel.rank_0_first(lambda: open_corpus(d, length, seed, chat, run.say, bar))
    parallel.check_alike({"data.train_file": corpus.directory.name})
    batches = Batches(
        corpus.training,
        config.micro_batch_rows(),
        t.gradient_accumulation_steps * config.system.ranks,
        seed,
        chat.pad_id,
        pack_length=length if d.packing else None,
        group_by_length=d.group_by_length,
        pad_to_multiple_of=d.pad_to_multiple_of,
    )
    windows = batches.windows_in_epoch()
    steps = t.max_steps or t.num_epochs * windows
    plan = {"steps_per_epoch": windows, "steps": steps, "epochs": round(steps / windows, 3)}
    corpus = replace(corpus, report={**corpus.report, **plan})
    if not parallel.rank():
        shutil.copyfile(corpus.directory / REJECTED, run.directory / REJECTED)
    for line in describe(corpus.report):
        run.say(line)
    used, seconds = batches.utilisation(), time.perf_counter() - started
    run.say(f"batches   {windows:,} steps an epoch, {used:.1%} of them no padding ({seconds:.1f} s)")
    return chat, corpus, batches


def prepare(
    config: Config, run: Run, provenance: Provenance, chat: ChatTokenizer, corpus: Corpus, batches: Batches
) -> Job:
    """Model, adapters and optimizer; the data is there already, because it fails fastest."""
    t, device = config.training, runtime.choose_device(config.system.device)
    dtype = runtime.choose_dtype(config.model.dtype, device)
    base = find_model(config.model.name)
    check_ids(corpus, read_shape(base).vocab_size)
    keep, plan = choose_activations(config, *batches.longest().ids.shape)  # from what is free before loading
    model = load_base(config, base, torch.device("cpu") if t.sharding == "full" else device, dtype)
    model.keep = parallel.tell(lambda: keep)
    model.neftune_alpha = t.neftune_alpha
    adapters: dict[str, LoRALinear] = {}
    if t.method == "lora":
        adapters = inject_lora(model, config.lora, config.system.seed)
    if t.compile:
        compile_blocks(model)
    if t.sharding == "full":
        parallel.shard(model, device)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, t)
    validation = corpus.validation[: config.evaluation.max_samples]
    identity = {"config_sha256": settled_hash(config)} | {name: provenance[name] for name in IDENTITY}
    saves = parallel.NoSaves if parallel.rank() else Background
    checkpoints = Checkpoints(run.checkpoints, t.keep_checkpoints, t.keep_every, identity, owner=not parallel.rank())
    return Job(
        config,
        run,
        chat,
        model,
        adapters,
        optimizer,
        corpus,
        batches,
        validation,
        checkpoints,
        saves(checkpoints, runtime.free_host_bytes),
        base,
        device,
        dtype,
        plan,
    )


def load_base(config: Config, directory: Path, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The base model: as it is, quantised while it streams in, or random."""
    if config.training.method == "full":
        dtype = torch.float32  # AdamW's small updates are lost when they are added to bfloat16
    seed = config.system.seed if config.model.random_init else None
    model = load_model(directory, device, dtype, quantization_of(config), seed)
    cache_weights(model, config.quantization.dequantize)
    return model


def announce(job: Job, state: State, total_steps: int, seconds_a_step: float) -> None:
    """Say what will happen before it happens: where, what is trained, how long it will take."""
    c, say = job.config, job.run.say
    kinds = (Linear4bit, Linear8bit)
    packed = sum(m.in_features * m.out_features for m in job.model.modules() if isinstance(m, kinds))
    total = sum(p.numel() for p in job.model.parameters()) + packed
    trainable = sum(p.numel() for _, p in job.trained)
    adapter = f"{'DoRA' if c.lora.dora else 'LoRA'} rank {c.lora.rank}"
    kind = "every parameter" if c.training.method == "full" else adapter
    book, double = quantization_of(c) or ("", False)
    base = book.upper() + (", double quantisation" if double else "") + ("" if packed else ", unpacked once")
    many = f"{parallel.ranks()} x " if parallel.ranks() > 1 else ""
    many = f"model split over {many}" if c.training.sharding == "full" else many
    say(f"device    {many}{runtime.describe(job.device)}; computing in {str(job.dtype).removeprefix('torch.')}")
    say(f"model     {c.model.name}" + (f"; base in {base}" if book else ""))
    say(f"training  {kind}: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    for line in describe_adapters(job.adapters):
        say(f"          {line}")
    say(f"attention {job.model.attention_backend(job.dtype, job.config.model.max_seq_length, job.batches.is_packed)}")
    for warning in questionable(c):
        say(f"warning: {warning}")
    if c.logging.show_example:
        say(f"example   {job.chat.mark(job.batches.samples[0], colour=sys.stdout.isatty())}")
    if state.step:
        say(f"resuming  after step {state.step} of {total_steps}")
    left, epochs = total_steps - state.step, job.corpus.report["epochs"]
    duration = clock(left * seconds_a_step)
    say(f"plan      {left:,} steps ({epochs:.3g} epochs) of {c.effective_batch_size()} rows, about {duration}")


def preflight_checks(job: Job, state: State, forced: list[str]) -> float:
    """Look at the data, the head, memory and disk before the first step; returns the seconds that a step takes.

    Raises:
        UserError: a check fails and is not forced.
    """
    head = []
    if job.adapters and not job.config.model.random_init:
        head.append(check_head(job.model, job.chat, job.corpus.training))
    parallel.tell(lambda: check_samples(job, forced, head))
    seconds_a_token, batches = rehearse_step(job, state), job.batches
    measured, predicted = runtime.peak_memory_gb(job.device), job.plan.peak / 1e9
    job.run.say(f"memory    {kept(job.plan)}; predicted {predicted:.2f} GB, measured {measured:.2f} GB")
    if len(job.validation):
        size, pad_id = job.config.evaluation.batch_size, job.chat.pad_id
        with runtime.Shortage(job.device) as short_of_memory:
            job.run.say(rehearse_evaluation(job.model, job.validation, size, pad_id, job.autocast).line())
        if short_of_memory:
            job.run.say(f"warning: out of memory with evaluation.batch_size={size}: smaller batches will be taken")
    weights = parallel.gathered(trained_weights(job))
    moments = parallel.gathered(optimizer_tensors(job.optimizer, job.trained))
    parallel.tell(lambda: check_saving(job, forced, weights, moments))
    seconds = seconds_a_token * batches.samples.lengths.sum() / batches.windows_in_epoch()
    return float(seconds / parallel.ranks())


def check_samples(job: Job, forced: list[str], head: list[Check]) -> None:
    """What the model will see: said, judged, and written down."""
    checks = [*check_data(job.corpus, job.chat, job.config.data.train_on), *head]
    (job.run.directory / "preview.txt").write_text(
        preview(job.corpus, job.chat, job.config.system.seed), encoding="utf-8"
    )
    for check in checks:
        job.run.say(check.line())
    judge(checks, forced)


def check_saving(job: Job, forced: list[str], weights: Tensors, moments: Tensors) -> None:
    """Whether a checkpoint can be written: said, and judged."""
    saved = rehearse_save(job.run.directory, weights, moments, job.config.training.keep_checkpoints)
    job.run.say(saved.line())
    judge([saved], forced)


def rehearse_step(job: Job, state: State) -> float:
    """Forward and backward over the longest micro-batch, with fewer rows if memory is short; seconds a token."""
    while True:
        longest = job.batches.longest()
        with runtime.Shortage(job.device), parallel.alike(job.device):
            fits, seconds = rehearse(job.model, longest, job.autocast)
            job.run.say(fits.line())
            return seconds / longest.tokens
        halve(job, state)


def progress_bar(job: Job, state: State, total_steps: int) -> Any:
    hidden = not job.config.logging.progress_bar or parallel.rank() > 0
    often = 0.1 if sys.stderr.isatty() else 5.0  # s between two looks of the bar: a file keeps every one of them
    options: dict[str, Any] = {"disable": hidden, "mininterval": often, "dynamic_ncols": True, "leave": False}
    return tqdm(total=total_steps, initial=state.step, unit="step", **options)


def finish(job: Job, state: State, stop: runtime.StopRequest) -> bool:
    """Take the best weights as the result, save them, measure base and tuned, and write the report.

    Returns whether it got that far; a signal ends it after a measurement, and the same command does it again.
    """
    where, step = job.run.directory, parallel.tell(lambda: best_step(job, state))
    if step != state.step:
        load_weights(job, Saved(job.checkpoints.path(step), {}))
    if bad := next((name for name, p in job.trained if not parallel.whole(p.isfinite().all())), None):
        rate = job.config.training.learning_rate
        raise TrainingFailed(f"after step {step} {bad} is not finite: lower training.learning_rate ({rate:g})")
    result = parallel.tell(lambda: str(export(job, step)))
    if not job.adapters:
        with torch.no_grad():
            for _, parameter in job.trained:  # measure what is stored, not what was rounded to store it
                parameter.copy_(parameter.to(stored_dtype(job.base_directory)))
    training = {
        "steps": state.step,
        "best_step": state.best_step,
        "seconds": round(state.meter.total_seconds, 3),
        "tokens_per_second": round(state.meter.tokens_per_second(), 1),
        "peak_memory_gb": round(runtime.peak_memory_gb(job.device), 3),
    }
    tuned = measure(job, state, job.model)
    base = None
    if not parallel.asked_to_stop(stop) and not job.config.model.random_init:
        base = measure_base(job, state)
    if parallel.asked_to_stop(stop):
        return False
    if parallel.rank():
        return True
    values, terminal, markdown = report(findings(job, base, tuned, training))
    data = "\n".join(describe(job.corpus.report))
    usage, advice, section = rank_usage(job, state, step)
    markdown += section + curves_section(job.config.logging) + f"\n## Data\n\n{data}\n"
    job.run.write_report({**values, **usage, "data": job.corpus.report}, markdown)
    log_memory(job, state, "finished")
    job.run.log("done", state.step, **training)
    job.run.say(terminal + advice)
    seconds, speed = clock(training["seconds"]), training["tokens_per_second"]
    job.run.say(
        f"\nresult    {result}: {state.step} steps in {seconds}, {speed:,.0f} tokens/s; report in {where}/report.md"
    )
    return True


def rank_usage(job: Job, state: State, step: int) -> tuple[dict[str, Any], str, str]:
    """What `ranks.report` says of the adapters; nothing, and an event, if that fails."""
    try:
        adapters = job.adapters if job.config.training.sharding == "none" else {}
        return ranks.report(adapters, job.optimizer, step)
    except Exception as error:  # a decomposition need not converge
        report_failure(job, state, "the adapters' report", error)
        return {}, "", ""


def best_step(job: Job, state: State) -> int:
    """The step of the best checkpoint that is whole, or of the last."""
    step = state.best_step or state.step
    if step != state.step:
        try:
            job.checkpoints.verify(job.checkpoints.path(step))
        except checkpoint.Damaged as reason:
            job.run.say(f"warning: {reason}: the result is not the best checkpoint, but the last")
            return state.step
    return step


def export(job: Job, step: int) -> Path:
    """Write the result: the weights of that step, which the model has.

    One that is split is put together on the CPU, from the base and the checkpoint.
    """
    if job.config.training.sharding == "full":
        model = load_base(job.config, job.base_directory, torch.device("cpu"), job.dtype)
        adapters = inject_lora(model, job.config.lora, job.config.system.seed) if job.adapters else {}
        job = replace(job, model=model, adapters=adapters)
        load_weights(job, Saved(job.checkpoints.path(step), {}))
    return save_result(job.run.directory, job.model, job.adapters, job.base_directory, job.config, step, job.dtype)


def measure(job: Job, state: State, model: Decoder) -> evaluate.Measured:
    """Validation loss and answers to held-out prompts; nothing, and an event, if that fails: the result is saved."""
    c, e = job.config, job.config.evaluation
    try:
        conversations = job.corpus.conversations(job.corpus.whole(job.corpus.validation), e.prompts)
        prompts, metrics = evaluate.held_out_prompts(conversations, e.prompts), scores.choose(e.metrics)
        while True:
            with runtime.Shortage(job.device), parallel.alike(job.device), job.autocast():
                return evaluate.measure(
                    model, job.chat, job.validation, prompts, e, c.model.max_seq_length, metrics, seed=c.system.seed
                )
            if e.batch_size == e.prompt_batch_size == 1:
                raise TrainingFailed("out of memory with one row")
            halves = {name: max(1, getattr(e, name) // 2) for name in ("batch_size", "prompt_batch_size")}
            e = replace(e, **halves)
    except Exception as error:
        report_failure(job, state, "evaluation", error)
        return evaluate.Measured()


def measure_base(job: Job, state: State) -> evaluate.Measured | None:
    """The same of the model as it was before training."""
    try:
        with base_model(job) as model:
            return measure(job, state, model)
    except Exception as error:
        report_failure(job, state, "evaluation of the base", error)
        return None


def findings(
    job: Job, base: evaluate.Measured | None, tuned: evaluate.Measured, training: dict[str, float]
) -> Findings:
    """What the report is made of."""
    e, groups = job.config.evaluation, {}
    if e.by_field and len(job.validation):
        try:
            groups = {e.by_field: job.corpus.values(job.validation, e.by_field)}
        except UserError as reason:  # the run is done: no reason to lose its report
            job.run.say(f"warning: {reason}")
    provenance = (job.run.recorded_config() or {}).get("provenance", {})
    return Findings(
        job.run.directory.name,
        tuned,
        base,
        primary=next(iter(e.metrics), "exact_match"),
        limit=e.max_new_tokens,
        groups=groups,
        places=[job.corpus.place(record) for record in job.validation.records.tolist()],
        leakage=leakage_of_run(job.corpus.report, job.config.data.near_leaks) if len(job.validation) else {},
        training=training,
        provenance={
            "base": job.config.model.name,
            "data": job.config.data.train_file,
            "settings": settings_of(job.config),
            **provenance,
        },
        shown=e.samples,
        seed=job.config.system.seed,
    )


@contextlib.contextmanager
def base_model(job: Job) -> Iterator[Decoder]:
    """The model as it was before training: adapters switched off, or read again if every parameter was trained."""
    if job.adapters:
        with disabled(job.adapters):
            yield job.model
    else:
        job.optimizer.state.clear()  # its memory is needed for the second model
        split = job.config.training.sharding == "full"
        model = load_base(job.config, job.base_directory, torch.device("cpu") if split else job.device, job.dtype)
        if split:
            parallel.shard(model, job.device)
        yield model


def claim(config: Config, run: Run, resume: str) -> Provenance:
    """Make sure that the directory is this run's, fresh or to go on with, and write its config.json.

    Returns what the run depends on; the date, which a template may print, is that of its first session.
    """
    base = find_model(config.model.name)
    read_shape(base)  # a model that cannot be used is refused before its weights are hashed and the data is read
    check_quantization(base, quantization_of(config))
    weights = [] if config.model.random_init else shard_paths(base)
    tokenizer = [base / name for name in ("config.json", "tokenizer.json") if (base / name).is_file()]
    device = runtime.choose_device(config.system.device)
    recorded = run.recorded_config()
    date = str((recorded or {}).get("provenance", {}).get("date") or datetime.now().date().isoformat())
    provenance: Provenance = {
        "versions": runtime.versions(),
        "device": device.type,
        "dtype": str(runtime.choose_dtype(config.model.dtype, device)).removeprefix("torch."),
        "data_sha256": data_hash(config.data),
        "base_sha256": hash_files([*tokenizer, *weights]),
        "date": date,
    }
    if recorded is not None:
        if resume == "never":
            raise UserError(f"output.dir: {run.directory}: holds a run already: choose another output.dir")
        check_same_run(recorded, config, provenance, str(run.directory))
        if (before := recorded["provenance"].get("versions")) != provenance["versions"]:
            run.say(f"warning: other versions than when the run began ({before}): last bits may differ")
    text = json.dumps({**config.to_dict(), "provenance": provenance}, indent=2) + "\n"
    checkpoint.replace_file(run.directory / "config.json", text.encode())
    return provenance


@dataclass(frozen=True)
class Wish:
    """What the command line asks for, besides the config."""

    resume: str = "auto"
    show_batch: bool = False
    show_step: int | None = None
    preflight: bool = False
    force: list[str] = field(default_factory=list)


def run_training(config: Config, wish: Wish) -> int:
    """One run, from its directory to its report; returns the exit code."""
    runtime.forgive_output()
    runtime.prepare(config.system.seed, config.system.threads, config.system.deterministic)
    device, config = runtime.choose_device(config.system.device), parallel.settle_ranks(config)
    check_optimizer(config.training.optimizer, device)
    check_installed(config.logging)
    scores.choose(config.evaluation.metrics)  # a metric that is not there is told now, not after hours
    parallel.take_device(device, config.training.sharding)
    settings = {f"{section}.{name}": v for section, fields in config.to_dict().items() for name, v in fields.items()}
    name = runtime.describe(device).partition(",")[0]
    parallel.check_alike({"the device": name, **runtime.versions(), **settings})
    with parallel.open_run(config.output.dir) as run, runtime.StopRequest() as stop:
        config = Config.from_dict(parallel.tell(lambda: decide_rows(config, run.recorded_config()).to_dict()))
        provenance = parallel.tell(lambda: claim(config, run, wish.resume))
        with explained(config):
            return run_claimed(config, run, stop, provenance, wish)


@contextlib.contextmanager
def explained(config: Config) -> Iterator[None]:
    """Out of memory where nothing can be halved: while loading, and the like."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if runtime.is_out_of_memory(error):
            raise too_little(config, config.micro_batch_rows()) from None
        raise


def run_claimed(config: Config, run: Run, stop: runtime.StopRequest, provenance: Provenance, wish: Wish) -> int:
    """Load the data, prepare, find where to begin, look before the leap, train, finish."""
    chat, corpus, batches = load_data(config, run, datetime.fromisoformat(provenance["date"]))
    total_steps = corpus.report["steps"]
    if wish.show_batch or wish.show_step is not None:
        show(run, batches, corpus, chat, wish.show_step, total_steps)
        return 0
    job = prepare(config, run, provenance, chat, corpus, batches)
    state = starting_state(job, wish.resume)
    done = state.step >= total_steps or out_of_patience(job, state)
    if done and parallel.tell(lambda: run.is_complete(state.step)):
        run.say(f"complete  {run.directory} has done its {state.step} steps: see report.md there")
        return 0
    seconds_a_step = preflight_checks(job, state, wish.force)
    announce(job, state, total_steps, seconds_a_step)
    if wish.preflight:
        return 0
    job.checkpoints.forget_after(state.step)
    run.begin(state.step, [state.epoch, state.window], state.guard.left_out)
    if not parallel.rank():
        run.listeners = listeners(config, run.directory, state.step)
    parts = {name: size / 1e9 for name, size in job.plan.parts.items()}
    peak = runtime.peak_memory_gb(job.device)
    run.log("memory", state.step, predicted_gb=parts, peak_memory_gb=peak, total_steps=total_steps)
    log_memory(job, state, "prepared")
    state = train(job, state, stop, total_steps)
    if parallel.asked_to_stop(stop) and state.step < total_steps:
        run.say(f"stopped   by {stop.signal_name} after step {state.step}: the same command goes on from there")
        return STOPPED_BY_SIGNAL
    if not finish(job, state, stop):
        run.say(f"stopped   by {stop.signal_name} before the report: the same command writes it")
        return STOPPED_BY_SIGNAL
    return 0


def go_on(job: Job, total_steps: int) -> None:
    """The loop from the newest checkpoint, or from the beginning: what the self-test tests."""
    train(job, starting_state(job, "auto"), runtime.StopRequest(), total_steps)


def run_selftest(config: Config) -> int:
    """Try what is promised on this config, model and data, in a directory that goes away again."""
    runtime.prepare(config.system.seed, config.system.threads, config.system.deterministic)
    check_optimizer(config.training.optimizer, runtime.choose_device(config.system.device))
    with tempfile.TemporaryDirectory(prefix="nanoft-selftest-") as aside:
        config = selftest.shorten(decide_rows(config, None), Path(aside))
        with explained(config), Run.open(config.output.dir) as run:
            provenance = claim(config, run, "never")
            job = prepare(config, run, provenance, *load_data(config, run, datetime.now()))
            run.begin(0, [0, 0], [])
            selftest.run(job, go_on)
    return 0


def show(run: Run, batches: Batches, corpus: Corpus, chat: ChatTokenizer, step: int | None, total_steps: int) -> None:
    """The window of an optimizer step (the first, if none is given) as the model sees it."""
    if step is not None and not 1 <= step <= total_steps:
        raise UserError(f"--show-step: {step}: this run has the steps 1 to {total_steps}")
    window = (step or 1) - 1 + run.skipped_before(step or 1)
    epoch, index = divmod(window, batches.windows_in_epoch())
    batches.seek(epoch, index)
    run.say(f"step {step or 1}: window {index + 1:,} of {batches.windows_in_epoch():,} in epoch {epoch + 1}")
    for line in show_window(batches, index, corpus, chat, colour=sys.stdout.isatty()):
        run.say(line)


def config_for(device_type: str, memory_gb: float) -> Path:
    """The config in configs/ for a device with so much memory."""
    if device_type == "cuda":
        return CONFIGS / next(name for name, least in GPU_CONFIGS.items() if memory_gb >= least)
    return CONFIGS / {"mps": "m4.py", "cpu": "cpu.py"}[device_type]


def pick_config(overrides: list[str]) -> Path:
    """`auto`: the config for this machine, and a line that says which and why."""
    device = runtime.choose_device(read_overrides(overrides).get("system.device", "auto"))
    path = config_for(device.type, runtime.total_memory_gb(device))
    print(f"auto      configs/{path.name}, because this is {runtime.describe(device)}")
    return path


@runtime.command
@parallel.together
def main(argv: list[str]) -> int:
    parser = runtime.Arguments(
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
    parser.add_argument("--force", action="append", default=[], choices=NAMES, help="go on although this check failed")
    args = parser.parse_intermixed_args(argv)
    positional = [args.config, *args.overrides] if args.config else args.overrides
    path = positional.pop(0) if positional and "=" not in positional[0] else DEFAULT_CONFIG
    if path == "auto":
        path = pick_config(positional)
    if args.plan:
        return show_plan(load_config(path, positional))
    if args.selftest:
        return run_selftest(load_config(path, positional))
    wish = Wish(args.resume, args.show_batch, args.show_step, args.preflight, args.force)
    return run_training(load_config(path, positional), wish)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
