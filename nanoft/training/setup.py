"""One training job: its parts, what changes while it trains, and how both are made, saved and brought back.

A job is made in an order in which whatever can be wrong is found early: the directory is claimed, the data read, then
the model loaded. What changes is little: the weights that learn, the optimizer's moments, the random numbers, and
`State`. A checkpoint holds exactly these, so a job that is brought back from one goes on as if nothing had been.
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

from nanoft import UserError, checkpoint, kernels
from nanoft.batches import Batches
from nanoft.checkpoint import AsyncCheckpointWriter, CheckpointManager
from nanoft.config import Config
from nanoft.config.resume import check_same_run, resume_fingerprint
from nanoft.config.settings import config_warnings
from nanoft.data.builder import REJECTED
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, build_datasets, data_hash, describe_data
from nanoft.io import atomic
from nanoft.io.hashing import hash_named_files
from nanoft.io.tables import format_duration
from nanoft.kernels import sharding
from nanoft.lora import LoRALinear, describe_adapters, disabled, inject_lora
from nanoft.model import Decoder
from nanoft.models.dequantize import cache_weights
from nanoft.models.families import read_shape
from nanoft.models.hub import find_model
from nanoft.models.weights import check_quantization, load_model, quantization_of, shard_paths
from nanoft.nf4 import Linear4bit, Linear8bit
from nanoft.objectives import build_objective
from nanoft.optim import build_optimizer
from nanoft.recompute import compile_blocks
from nanoft.runtime import distributed
from nanoft.runtime.device import choose_device, choose_dtype, describe_device, library_versions
from nanoft.runtime.memory import available_host_bytes
from nanoft.tracking.run import Run
from nanoft.training.memory_plan import choose_activations
from nanoft.training.preflight import check_ids
from nanoft.training.state import TrainContext, TrainState

Provenance = dict[str, Any]  # what a run depends on: versions, hashes of data and base, device, date
IDENTITY = ("data_sha256", "base_sha256", "versions")  # of these, what a checkpoint says about itself


# ---- Made


def init_run_dir(config: Config, run: Run, resume: str) -> Provenance:
    """Make sure that the directory is this run's, fresh or to go on with, and write its config.json.

    Returns what the run depends on; the date, which a template may print, is that of its first session.
    """
    base = find_model(config.model.name)
    read_shape(base)  # a model that cannot be used is refused before its weights are hashed and the data is read
    check_quantization(base, quantization_of(config))
    weights = [] if config.model.random_init else shard_paths(base)
    tokenizer = [base / name for name in ("config.json", "tokenizer.json") if (base / name).is_file()]
    device = choose_device(config.system.device)
    recorded = run.recorded_config()
    date = str((recorded or {}).get("provenance", {}).get("date") or datetime.now().date().isoformat())
    provenance: Provenance = {
        "versions": library_versions(),
        "device": device.type,
        "dtype": str(choose_dtype(config.model.dtype, device)).removeprefix("torch."),
        "data_sha256": data_hash(config.data),
        "base_sha256": hash_named_files([*tokenizer, *weights]),
        "date": date,
    }
    if recorded is not None:
        if resume == "never":
            raise UserError(f"output.dir: {run.directory}: holds a run already: choose another output.dir")
        check_same_run(recorded, config, provenance, str(run.directory))
        if (before := recorded["provenance"].get("versions")) != provenance["versions"]:
            run.print(f"warning: other versions than when the run began ({before}): last bits may differ")
    text = json.dumps({**config.to_dict(), "provenance": provenance}, indent=2) + "\n"
    atomic.replace_file(run.directory / "config.json", text.encode())
    return provenance


def load_data(config: Config, run: Run, date: datetime) -> tuple[ChatTokenizer, PreparedDataset, Batches]:
    """The tokenizer, the samples and their order; says what became of every record."""
    d, t, length, seed = config.data, config.training, config.model.max_seq_length, config.system.seed
    chat = ChatTokenizer.from_directory(find_model(config.model.name), d.template_args)
    chat.date = date
    started = time.perf_counter()
    bar = config.logging.progress_bar and not distributed.process_rank()
    corpus = distributed.main_process_first(lambda: build_datasets(d, chat, length, seed, run.print, bar))
    distributed.assert_same_on_all_ranks({"data.train_file": corpus.directory.name})
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
    steps = t.max_steps or math.ceil(t.num_epochs * windows)
    plan = {"steps_per_epoch": windows, "steps": steps, "epochs": round(steps / windows, 3)}
    corpus = replace(corpus, report={**corpus.report, **plan})
    if not distributed.process_rank():
        shutil.copyfile(corpus.directory / REJECTED, run.directory / REJECTED)
    for line in describe_data(corpus.report):
        run.print(line)
    used, seconds = batches.utilization(), time.perf_counter() - started
    run.print(f"batches   {windows:,} steps per epoch, {100 * (1 - used):.1f} % padding ({seconds:.1f} s)")
    return chat, corpus, batches


def build_training(
    config: Config, run: Run, provenance: Provenance, chat: ChatTokenizer, corpus: PreparedDataset, batches: Batches
) -> TrainContext:
    """Model, adapters and optimizer; the data is there already, because it fails fastest."""
    t, device = config.training, choose_device(config.system.device)
    dtype = choose_dtype(config.model.dtype, device)
    base = find_model(config.model.name)
    check_ids(corpus, read_shape(base).vocab_size)
    keep, plan = choose_activations(config, *batches.longest().ids.shape)  # from what is free before loading
    model = load_base(config, base, torch.device("cpu") if t.sharding == "full" else device, dtype)
    model.activation_policy = distributed.broadcast_from_rank0(lambda: keep)
    model.neftune_alpha = t.neftune_alpha
    adapters: dict[str, LoRALinear] = {}
    if t.method == "lora":
        adapters = inject_lora(model, config.lora, config.system.seed)
    if config.system.kernels == "auto" and (warning := kernels.apply(model, config.lora if adapters else None)):
        run.print(f"warning: {warning}")
    if t.compile:
        compile_blocks(model)
    if t.sharding == "full":
        sharding.shard_model(model, device)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, t)
    validation = corpus.validation[: config.evaluation.max_samples]
    identity = {"config_sha256": resume_fingerprint(config)} | {name: provenance[name] for name in IDENTITY}
    saves = checkpoint.NullWriter if distributed.process_rank() else AsyncCheckpointWriter
    checkpoints = CheckpointManager(
        run.checkpoints, t.keep_checkpoints, t.keep_every, identity, owner=not distributed.process_rank()
    )
    return TrainContext(
        config,
        run,
        chat,
        model,
        adapters,
        build_objective(config),
        optimizer,
        corpus,
        batches,
        validation,
        checkpoints,
        saves(checkpoints, available_host_bytes),
        base,
        device,
        dtype,
        plan,
    )


def load_base(config: Config, directory: Path, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The base model: as it is, quantized while it streams in, or random."""
    if config.training.method == "full":
        dtype = torch.float32  # AdamW's small updates are lost when they are added to bfloat16
    seed = config.system.seed if config.model.random_init else None
    model = load_model(directory, device, dtype, quantization_of(config), seed)
    cache_weights(model, config.quantization.dequantize)
    return model


@contextlib.contextmanager
def base_model(job: TrainContext) -> Iterator[Decoder]:
    """The model as it was before training: adapters switched off, or read again if every parameter was trained."""
    if job.adapters:
        with disabled(job.adapters):
            yield job.model
    else:
        job.optimizer.state.clear()  # its memory is needed for the second model
        split = job.config.training.sharding == "full"
        model = load_base(job.config, job.base_directory, torch.device("cpu") if split else job.device, job.dtype)
        if job.config.system.kernels == "auto":
            kernels.apply(model)
        if split:
            sharding.shard_model(model, job.device)
        yield model


def print_summary(job: TrainContext, state: TrainState, total_steps: int, seconds_a_step: float) -> None:
    """Say what will happen before it happens: where, what is trained, how long it will take."""
    c, say = job.config, job.run.print
    kinds = (Linear4bit, Linear8bit)
    packed = sum(m.in_features * m.out_features for m in job.model.modules() if isinstance(m, kinds))
    total = sum(p.numel() for p in job.model.parameters()) + packed
    trainable = sum(p.numel() for _, p in job.trained)
    adapter = f"{'DoRA' if c.lora.dora else 'LoRA'} rank {c.lora.rank}"
    kind = "every parameter" if c.training.method == "full" else adapter
    book, double = quantization_of(c) or ("", False)
    base = book.upper() + (", double quantization" if double else "") + ("" if packed else ", unpacked once")
    many = f"{distributed.world_size()} x " if distributed.world_size() > 1 else ""
    many = f"model split over {many}" if c.training.sharding == "full" else many
    say(f"device    {many}{describe_device(job.device)}; computing in {str(job.dtype).removeprefix('torch.')}")
    say(f"model     {c.model.name}" + (f"; base in {base}" if book else ""))
    say(f"training  {kind}: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    for line in describe_adapters(job.adapters):
        say(f"          {line}")
    say(f"kernels   {kernels.describe(job.model)}")
    say(f"attention {job.model.attention_backend(job.dtype, job.config.model.max_seq_length, job.batches.is_packed)}")
    for warning in config_warnings(c):
        say(f"warning: {warning}")
    if c.logging.show_example:
        say(f"example   {job.chat.highlight_targets(job.batches.samples[0], color=sys.stdout.isatty())}")
    if state.step:
        say(f"resuming  after step {state.step} of {total_steps}")
    left, epochs = total_steps - state.step, job.corpus.report["epochs"]
    duration = format_duration(left * seconds_a_step)
    say(f"plan      {left:,} steps ({epochs:.3g} epochs) of {c.effective_batch_size()} rows, about {duration}")
