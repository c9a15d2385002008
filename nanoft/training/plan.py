"""`train.py --plan`: memory by part, tokens and time of a step, before a weight is loaded.

The tokens are those of the run's own windows; of large files, of windows of the first records. The time is tried out: a
few blocks of the base's shape, with random weights, take a micro-batch of these windows, and what each further block
adds is multiplied. So short samples, packing, the share of targets and small matrices count as they do in training.
"""

from __future__ import annotations

import time
from dataclasses import fields, replace

import numpy as np
import torch

from nanoft import UserError, kernels
from nanoft.batches import Batch, Batches, Sample, TokenDataset, collate
from nanoft.config import Config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import build_datasets
from nanoft.data.sources import HUB, find_files
from nanoft.io.tables import for_terminal, wrap
from nanoft.lora import inject_lora
from nanoft.model import DecoderConfig
from nanoft.models.model_files import ModelFiles
from nanoft.models.weights import load_model
from nanoft.objectives import OBJECTIVES
from nanoft.optim import build_optimizer, check_optimizer
from nanoft.runtime.device import Machine, set_threads
from nanoft.training.memory_plan import Counts, Plan, Planner, describe_streaming, suggest_savings
from nanoft.training.setup import make_batches, plan_warnings

ROWS_TRIED = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
WHOLE_BYTES, FIRST = 20e6, 1000  # data up to this size is tokenized as a whole, of other files so many records each
FEW, TRIED = 4, 1024  # blocks that are tried, of equal ones two; tokens, or one sequence of more


def planned_batches(config: Config, files: ModelFiles) -> Batches:
    """The windows of the run, or of its first records; a UserError if tokenizer or data are not here."""
    if any(part.strip().startswith(HUB) for part in config.data.train_file.split(",")):
        raise UserError("the data is not downloaded")
    data, tokenizer = config.data, ChatTokenizer.from_config(files.directory, config)
    if sum(file.stat().st_size for part in find_files(data.train_file) for file in part) > WHOLE_BYTES:
        most = min(data.max_samples or FIRST, FIRST)
        data = replace(data, max_samples=most, validation_split=0.0, validation_size=None, validation_file=None)
    learns = OBJECTIVES[config.training.objective].learns
    given = data, tokenizer, config.sample_length, config.system.seed, lambda line: None, learns
    return make_batches(config, build_datasets(*given), tokenizer.pad_id)


def full_batch(planner: Planner) -> Batch:
    """One long sequence, half of whose tokens are targets."""
    length = min(planner.config.model.max_seq_length, TRIED)
    ids = np.random.default_rng(0).integers(0, planner.decoder.vocab_size, length, dtype=np.int32)
    return collate(TokenDataset.of([Sample(ids, np.arange(length) >= length // 2, 0)]), [[0]], 0)


def gflop_per_token(decoder: DecoderConfig, counts: Counts, config: Config, length: int, again: float) -> float:
    """Floating-point operations of a token in training, in 10^9, if half of the tokens are targets.

    A product with n weights costs 2 n forward, 2 n for the gradient of its input, 2 n for its own if it is trained.
    Causal attention: 2 q (length + 1) forward, 2.5 times that backward. `again` is the share of blocks computed twice.
    """
    sizes = [own.head_dim for layer, own in enumerate(decoder.by_layer) if decoder.mixer(layer) == "attention"]
    attention = 2 * decoder.num_heads * sum(sizes) * (length + 1)
    frozen = counts.active * (2 + 2 + 2 * again) + attention * (3.5 + again)
    head = 0.5 * decoder.vocab_size * decoder.hidden_size
    if config.training.method == "full":
        return (frozen + 2 * counts.active + 6 * head) / 1e9
    return (frozen + 6 * counts.trained * counts.active / counts.linears + 4 * head) / 1e9


def measure_speed(planner: Planner, files: ModelFiles, plan: Plan, batch: Batch) -> tuple[float, float]:
    """Seconds of forward and backward per token, and of an update, measured on a few blocks with random weights."""
    config, machine, layers = planner.config, planner.machine, planner.decoder.num_layers
    per_layer = [f.name for f in fields(planner.decoder) if isinstance(getattr(planner.decoder, f.name), tuple)]
    batch, objective, full = batch.to(machine.device), OBJECTIVES["sft"](config), config.training.method == "full"
    casts = full and machine.dtype != torch.float32

    def seconds(count: int) -> np.ndarray:
        cut = {name: getattr(planner.decoder, name)[:count] for name in per_layer}
        shape = replace(files, decoder=replace(planner.decoder, **cut, num_layers=count, has_score=False))
        model = load_model(shape, machine.device, torch.float32 if full else machine.dtype, random_seed=0)
        model.activation_policy = plan.keep[:count]
        adapters = {} if full else inject_lora(model, replace(config.lora, init="default"), 0)
        if config.system.kernels == "auto":
            kernels.apply(model, config.lora if adapters else None)
        optimizer = build_optimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad], config.training)
        model.train()
        taken: list[tuple[float, float]] = []
        started = time.perf_counter()
        while len(taken) < 2 or (len(taken) < 12 and time.perf_counter() - started < 2):  # the first one warms up
            before = time.perf_counter()
            with torch.autocast(machine.device.type, machine.dtype, enabled=casts):
                loss = objective.loss(model, batch)
            loss.backward()
            loss.item()  # waits for the device
            between = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            taken.append((between - before, time.perf_counter() - between))
        return np.median(taken[1:], axis=0)

    kinds = [getattr(planner.decoder, name) for name in per_layer]
    are_equal = all(one == kind[0] for kind in kinds for one in kind)
    most = 2 if are_equal and layers > FEW else min(layers, FEW)
    all_tried = seconds(most)
    if layers > most:  # what one more block takes, times the blocks that are left
        all_tried = all_tried + (layers - most) * (all_tried - seconds(1)) / (most - 1)
    return float(all_tried[0] / batch.tokens), float(all_tried[1])


def show_plan(config: Config) -> int:
    """Print memory by part, and time, before anything is loaded; a UserError if it does not fit."""
    machine = Machine.detect_or_describe(config)
    check_optimizer(config.training.optimizer, machine.device)  # before anything is downloaded
    files = ModelFiles.find(config.model.reference)
    set_threads(config.system.threads)
    planner = Planner.of(config, machine, files.decoder).resolved(None)
    config, length, room = planner.config, config.model.max_seq_length, machine.room_bytes
    unit = planner.unit_size  # sequences
    plan = planner.choose_activations(config.micro_batch_rows() * unit, length)

    def say(name: str, text: str) -> None:
        print(wrap(f"{name:16} {text}", 17))

    say("model", files.description)
    kind, rows = machine.device.type, config.effective_batch_size() * unit
    if not machine.present:
        say("device", f"{kind} with {machine.memory_bytes / 1e9:.1f} GB, not available here")
    for name, size in plan.parts.items():
        say(name, f"{size / 1e9:9.3f} GB")
    if config.model.base_device == "host":
        say("host", describe_streaming(planner))
    say("peak", f"{plan.peak / 1e9:9.3f} GB of {room / 1e9:.1f} available; {plan.recomputed}")
    try:
        batches = planned_batches(config, files)
        window = batches.rows(0)
        rows_tried = window[len(window) // 2]
        few = max(1, TRIED * len(rows_tried) // sum(int(batches.samples.lengths[row].sum()) for row in rows_tried))
        batch = collate(batches.samples, rows_tried[-few:], batches.pad_id, batches.pad_to_multiple_of)
        tokens = OBJECTIVES[config.training.objective].tokens_per_step(config, batches)
        seen, assumed = int(batch.ids.shape[1]), f"per step of {rows:,} sequences, on average"
    except UserError as error:
        batch, tokens, seen = full_batch(planner), float(rows * length), length
        assumed = f"per step: {rows:,} sequences of model.max_seq_length={length:,} tokens ({error})"
    say("tokens", f"{tokens:9,.0f} {assumed}")
    recomputed = sum(one != "all" for one in plan.keep) / len(plan.keep)
    work = gflop_per_token(planner.decoder, planner.counts, config, seen, recomputed)
    say("work", f"{work:9.3g} GFLOP per token")
    if machine.present and plan.peak <= room and config.model.base_device != "host":  # no copies are tried
        try:
            per_token, update = measure_speed(planner, files, plan, batch)
            own = tokens / config.system.ranks
            step = per_token * own + update
            of = f"{step:,.2g} s per step, measured on a few random blocks"
            say("speed", f"{own / step:9,.0f} tokens/s; {of}")
        except UserError as error:  # a setting names a block that is not among these few
            say("speed", f"not measured: {error}")
    fitting = [rows for rows in ROWS_TRIED if planner.plan(rows * unit, length, planner.keep_by("full")).peak <= room]
    most = f"{fitting[-1]} and more" if fitting == ROWS_TRIED else f"at most {max(fitting, default=0)}"
    say("micro-batch", f"{most} sequences of {length} tokens fit, with training.checkpointing=full")
    for warning in plan_warnings(planner, files, length, None):
        print(for_terminal(f"warning: {warning}"))
    if plan.peak > room:
        fewer = "training.micro_batch_size=auto, or lower model.max_seq_length"
        fix = f"set {fewer if fitting else suggest_savings(planner, 1, length)}"
        raise UserError(
            f"training.micro_batch_size: {config.micro_batch_rows()} sequences of {length} tokens take "
            f"{plan.peak / 1e9:.2f} GB, but only {room / 1e9:.2f} GB are available: {fix}"
        )
    return 0
