"""Building the parts of a training run, in the order in which mistakes are found early.

The run directory is initialized and the data read before the model is loaded, because they fail fastest.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import nanoft
from nanoft import UserError, kernels
from nanoft.batches import Batches
from nanoft.checkpoint import CheckpointManager
from nanoft.config import Config
from nanoft.config.loading import Loaded
from nanoft.config.resume import check_same_run, recorded_settings, resume_fingerprint
from nanoft.config.schemas import FIELDS_FILE
from nanoft.data.builder import REJECTED
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, data_provenance, describe_data
from nanoft.data.dataset import build_datasets as prepare_datasets
from nanoft.io import atomic
from nanoft.io.atomic import hash_named_files
from nanoft.io.tables import format_duration
from nanoft.io.untrusted import redact
from nanoft.kernels import sharding
from nanoft.lora import describe_adapters, disabled
from nanoft.model import Decoder
from nanoft.models.model_files import ModelFiles, check_quantization, described_files, quantization_of
from nanoft.models.weights import cache_weights, load_model
from nanoft.nf4 import Linear4bit, Linear8bit
from nanoft.runtime import distributed
from nanoft.runtime.device import describe_device, library_versions
from nanoft.runtime.machine import Machine
from nanoft.runtime.memory import peak_memory_gb
from nanoft.tracking.run import Run
from nanoft.tracking.trackers import build_trackers
from nanoft.training.memory_plan import Planner, plan_warnings, resolve_micro_batch_size
from nanoft.training.progress import log_memory
from nanoft.training.state import TrainContext, TrainState

Provenance = dict[str, Any]  # what a run depends on: versions, hashes of data, base and source, device, threads, date
IDENTITY = ("config_sha256", "data_sha256", "base_sha256", "versions")  # of these, what a checkpoint says about itself


def shared_facts(config: Config, machine: Machine) -> dict[str, Any]:
    """What must be the same on all ranks."""
    settings = {f"{section}.{name}": v for section, fields in config.to_dict().items() for name, v in fields.items()}
    return {"the device": machine.name, **library_versions(), **settings}


def plan_run(config: Config, machine: Machine, files: ModelFiles, run: Run) -> Planner:
    """The memory planner, its config with the micro-batch size decided."""
    planner = Planner.of(config, machine, files.decoder)
    decided = distributed.broadcast_from_rank0(
        lambda: resolve_micro_batch_size(planner, run.recorded_config()).to_dict()
    )
    return replace(planner, config=Config.from_dict(decided))


def init_run_dir(
    config: Config, run: Run, machine: Machine, files: ModelFiles, resume: str, source: Loaded | None = None
) -> Provenance:
    """On rank 0: check that the directory is new or holds this very run, and write its config.json.

    If the config is from files of another schema, `FIELDS_FILE` says what became of each name there.

    Returns what the run depends on; date (which a template may print) and CPU threads are those of its first session.
    """
    check_quantization(files, quantization_of(config))
    weights = [] if config.model.random_init else files.shards()
    recorded = run.recorded_config()
    before = (recorded or {}).get("provenance", {})
    provenance: Provenance = {
        "versions": library_versions(),
        "device": machine.device.type,
        "dtype": machine.dtype_name,
        "threads": config.system.threads or before.get("threads") or torch.get_num_threads(),
        "config_sha256": before.get("config_sha256")
        or resume_fingerprint(recorded_settings(recorded) if recorded else config),
        **data_provenance(config.data),
        "base_sha256": hash_named_files([*described_files(files.directory), *weights]),
        "source_sha256": hash_named_files(sorted(Path(nanoft.__file__).parent.rglob("*.py"))),
        "date": str(before.get("date") or datetime.now().date().isoformat()),
    }
    if recorded is not None:
        if resume == "never":
            raise UserError(f"output.dir: {run.directory}: holds a run already: choose another output.dir")
        check_same_run(recorded, config, provenance, str(run.directory))
        if (versions := before.get("versions")) != provenance["versions"]:
            run.print(f"warning: other library versions than when the run began ({versions}): last bits may differ")
        if before.get("source_sha256", provenance["source_sha256"]) != provenance["source_sha256"]:
            run.print("warning: the source of nanoft has changed since the run began: results may differ")
        if before.get("threads", provenance["threads"]) != provenance["threads"]:
            threads = f"system.threads: {provenance['threads']} instead of {before['threads']}"
            run.print(f"warning: {threads}: from here on the run is not bit-identical to an uninterrupted one")
    text = json.dumps({**config.to_dict(), "provenance": provenance}, indent=2) + "\n"
    atomic.replace_file(run.directory / "config.json", text.encode())
    if source and source.fields:
        lines = [*source.explanation, *source.fields, "all settings: config.json; planned memory: metrics.jsonl"]
        atomic.replace_file(run.directory / FIELDS_FILE, redact("\n".join(lines) + "\n").encode())
    return provenance


def load_tokenizer(config: Config, files: ModelFiles, date: str) -> ChatTokenizer:
    """The model's tokenizer and chat template; `date` is what a template that prints the date shows."""
    tokenizer = ChatTokenizer.from_directory(files.directory, config.data.template_args)
    tokenizer.date = datetime.fromisoformat(date)
    return tokenizer


def build_datasets(config: Config, tokenizer: ChatTokenizer, run: Run) -> tuple[PreparedDataset, Batches]:
    """The samples, and the batches of those for training; prints how many records were kept and rejected."""
    d, t, length, seed = config.data, config.training, config.model.max_seq_length, config.system.seed
    started = time.perf_counter()
    bar = config.logging.progress_bar and not distributed.process_rank()
    corpus = distributed.main_process_first(lambda: prepare_datasets(d, tokenizer, length, seed, run.print, bar))
    distributed.assert_same_on_all_ranks({"data.train_file": corpus.directory.name})
    rows, micro_batches = config.micro_batch_rows(), t.gradient_accumulation_steps * config.system.ranks
    options: dict[str, Any] = {"group_by_length": d.group_by_length, "pad_to_multiple_of": d.pad_to_multiple_of}
    pack_length = length if d.packing else None
    batches = Batches(corpus.training, rows, micro_batches, seed, tokenizer.pad_id, pack_length, **options)
    windows = batches.windows_in_epoch()
    steps = t.max_steps or math.ceil(t.num_epochs * windows)
    t.check_schedule(steps)
    counts = {"steps_per_epoch": windows, "steps": steps, "epochs": round(steps / windows, 3)}
    corpus = replace(corpus, report={**corpus.report, **counts})
    if not distributed.process_rank():
        shutil.copyfile(corpus.directory / REJECTED, run.directory / REJECTED)
    if corpus.from_cache:
        run.print(f"data      from the cache: {corpus.directory}")
    for line in describe_data(corpus.report):
        run.print(line)
    padding, seconds = 1 - batches.utilization(), time.perf_counter() - started
    run.print(f"batches   {windows:,} steps per epoch, {100 * padding:.1f} % padding ({seconds:.1f} s)")
    return corpus, batches


def load_base(config: Config, machine: Machine, files: ModelFiles, on_cpu: bool = False) -> Decoder:
    """The base model: as it is stored, quantized while it streams from disk, or random."""
    device = torch.device("cpu") if on_cpu or config.training.sharding == "full" else machine.device
    # full training in float32: AdamW's small updates are lost when they are added to bfloat16
    dtype = torch.float32 if config.training.method == "full" else machine.dtype
    seed = config.system.seed if config.model.random_init else None
    model = load_model(files, device, dtype, quantization_of(config), seed)
    cache_weights(model, config.quantization.dequantize)
    return model


def open_checkpoints(config: Config, run: Run, provenance: Provenance) -> CheckpointManager:
    """The checkpoints of the run; only rank 0 writes there."""
    t, is_owner = config.training, not distributed.process_rank()
    identity = {name: provenance[name] for name in IDENTITY}
    return CheckpointManager(run.checkpoints, t.keep_checkpoints, t.keep_every, identity, owner=is_owner)


@contextlib.contextmanager
def base_model(ctx: TrainContext) -> Iterator[Decoder]:
    """The model as it was before training: adapters switched off, or loaded again if every parameter was trained."""
    if ctx.adapters:
        with disabled(ctx.adapters):
            yield ctx.model
    else:
        ctx.optimizer.state.clear()  # its memory is needed for the second model
        model = load_base(ctx.config, ctx.machine, ctx.files)
        if ctx.config.system.kernels == "auto":
            kernels.apply(model)
        if ctx.config.training.sharding == "full":
            sharding.shard_model(model, ctx.device)
        yield model


def print_summary(ctx: TrainContext, state: TrainState, seconds_per_step: float) -> None:
    """Print what is about to happen: on which device, what is trained, how long it will take."""
    c, say = ctx.config, ctx.run.print
    packed = sum(m.in_features * m.out_features for m in ctx.model.modules() if isinstance(m, (Linear4bit, Linear8bit)))
    total = sum(p.numel() for p in ctx.model.parameters()) + packed
    trainable = sum(p.numel() for _, p in ctx.trained)
    kind = f"{'DoRA' if c.lora.dora else 'LoRA'} rank {c.lora.rank}" if ctx.adapters else "every parameter"
    form, double = quantization_of(c) or ("", False)
    base = form.upper() + (", double quantization" if double else "") + ("" if packed else ", dequantized once")
    many = f"{distributed.world_size()} x " if distributed.world_size() > 1 else ""
    many = f"model sharded over {many}" if c.training.sharding == "full" else many
    why = ", with loss scaling" if ctx.scaler.is_enabled() else ""
    why += ": this GPU has no native bfloat16" if why and c.model.dtype == "auto" else ""
    say(f"device    {many}{describe_device(ctx.device)}; computing in {ctx.machine.dtype_name}{why}")
    say(f"model     {c.model.name}" + (f"; base in {base}" if form else ""))
    say(f"training  {kind}: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    for line in describe_adapters(ctx.adapters):
        say(f"          {line}")
    say(f"kernels   {kernels.describe(ctx.model)}")
    say(f"attention {ctx.model.attention_backend(ctx.machine.dtype, c.model.max_seq_length, ctx.batches.is_packed)}")
    longest = int(max(samples.lengths.max() for samples in (ctx.corpus.training, ctx.validation) if len(samples)))
    for warning in plan_warnings(ctx.planner, ctx.files, longest, ctx.total_steps):
        say(f"warning: {warning}")
    if c.logging.show_example:
        say(f"example   {ctx.tokenizer.highlight_targets(ctx.batches.samples[0], color=sys.stdout.isatty())}")
    if state.step:
        say(f"resuming  after step {state.step} of {ctx.total_steps}")
    left, epochs = ctx.total_steps - state.step, f"{ctx.corpus.report['epochs']:.3g} epochs"
    duration = format_duration(left * seconds_per_step)
    say(f"plan      {left:,} steps ({epochs}) of {c.effective_batch_size()} rows, about {duration}")


def is_complete(ctx: TrainContext, state: TrainState) -> bool:
    """Whether the run has done all its steps, and has its report."""
    has_steps_left = state.step < ctx.total_steps and not state.should_stop_early(ctx.config.training)
    if has_steps_left or distributed.broadcast_from_rank0(lambda: ctx.run.finished_step() != state.step):
        return False
    ctx.run.print(f"complete  {ctx.run.directory} has done its {state.step} steps: see report.md there")
    return True


def start_logging(ctx: TrainContext, state: TrainState) -> None:
    """Start recording the run; checkpoints and events of later steps, by an earlier session, are deleted."""
    ctx.checkpoints.delete_after(state.step)
    ctx.run.open_metrics(state.step, [state.epoch, state.window], state.guard.skipped_windows)
    if not distributed.process_rank():
        ctx.run.trackers = build_trackers(ctx.config, ctx.run.directory, state.step)
    predicted, peak = {name: size / 1e9 for name, size in ctx.plan.parts.items()}, peak_memory_gb(ctx.device)
    ctx.run.log("memory", state.step, predicted_gb=predicted, peak_memory_gb=peak, total_steps=ctx.total_steps)
    log_memory(ctx, state, "prepared")
