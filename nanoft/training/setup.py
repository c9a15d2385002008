"""Build the parts of a training run, in an order that finds mistakes early.

The run directory is initialized and the data is read before the model is loaded, because mistakes there show fastest.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import nanoft
from nanoft import UserError, kernels
from nanoft.batches import Batches
from nanoft.blocks.trained import Adapter
from nanoft.checkpoint import AsyncCheckpointWriter, CheckpointManager
from nanoft.config import Config, LoRAConfig
from nanoft.config.fields import nearest
from nanoft.config.loading import Loaded, read_config
from nanoft.config.resume import check_same_run, recorded_settings, resume_fingerprint
from nanoft.config.settings import config_warnings
from nanoft.data.builder import REJECTED
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset, data_provenance, describe_data
from nanoft.data.dataset import build_datasets as prepare_datasets
from nanoft.data.inspection import utilization
from nanoft.data.tokenizer_files import TEMPLATE_FILE
from nanoft.evaluation.held_out import read_general
from nanoft.io import atomic
from nanoft.io.bars import Bar
from nanoft.io.hub import use_cache
from nanoft.io.tables import format_duration, wrap
from nanoft.kernels import sharding
from nanoft.kernels.streaming import keep_on_host, stream_blocks
from nanoft.lora import LoRALinear, disabled
from nanoft.model import Decoder
from nanoft.models.adapter_files import hash_tensors, load_adapter_tensors, vocabulary_of
from nanoft.models.model_files import ModelFiles, check_quantization, described_files, quantization_of
from nanoft.models.open import TrainedAdapter, read_trained_adapter, with_added_tokens
from nanoft.models.weights import add_score, cache_weights, grow_vocabulary, load_model
from nanoft.nf4 import PackedLinear
from nanoft.objectives import OBJECTIVES, trains_score
from nanoft.objectives.rollouts import with_room_for_answers
from nanoft.optim import warmup_steps
from nanoft.runtime import cores, distributed
from nanoft.runtime.device import Machine, describe_device, library_versions
from nanoft.runtime.memory import peak_memory_gb
from nanoft.tracking.run import Run, is_shown
from nanoft.tracking.trackers import build_trackers, chosen_trackers
from nanoft.training.memory_plan import Planner, describe_streaming
from nanoft.training.progress import in_smaller_batches, log_memory, steps_between
from nanoft.training.state import TrainContext, TrainState
from nanoft.training.validation import check_schedule, validate_config

Provenance = dict[str, Any]  # what a run depends on: versions, hashes of data, base and source, device, threads, date
# Settings that lora.start_from takes from the adapter.
SHAPE = """
    rank alpha target_modules rank_pattern alpha_pattern rslora dora bias modules_to_save trainable_token_indices
""".split()  # noqa: SIM905
CODES = set(PackedLinear.NAMES)  # parts of packed weights, parameters of a sharded model
IDENTITY = ("config_sha256", "data_sha256", "base_sha256", "versions")  # the part that each checkpoint records


def read_source(path: str | Path, words: Sequence[str]) -> Loaded:
    """Read and check the config; for files of another schema, print how their names were translated."""
    source = read_config(path, words)
    for line in [] if distributed.process_rank() else source.explanation:
        if is_shown(line, source.config.logging.level):
            print(line)
    validate_config(source.config)
    use_cache(source.config.model.cache_dir)
    Bar.enabled = source.config.logging.progress_bar and not distributed.process_rank()
    return source


def plan_run(config: Config, machine: Machine, files: ModelFiles, run: Run) -> Planner:
    """The memory planner; its config has the final micro-batch size."""
    planner = Planner.of(config, machine, files.decoder)
    name, objective = config.training.objective, OBJECTIVES[config.training.objective]
    if config.lora.dropout and objective.learns != "turns":
        run.print(f"warning: lora.dropout: disabled with training.objective={name}, in both forward passes")
        planner = replace(planner, config=config.override({"lora.dropout": 0.0}))

    chosen = distributed.broadcast_from_rank0(lambda: planner.resolved(run.recorded_config()).config.to_dict())
    planner = replace(planner, config=Config.from_dict(chosen))
    if planner.config.model.base_device == "host":
        run.print(f"base      {describe_streaming(planner).strip()}")
    return planner


def init_run_dir(
    config: Config, run: Run, machine: Machine, files: ModelFiles, resume: str, start: TrainedAdapter | None = None
) -> Provenance:
    """On rank 0: check that the directory is new or holds the same run, and write its config.json.

    Returns what the run depends on; the date (which a template may print) and CPU threads are those of its first
    session.
    """
    check_quantization(files, quantization_of(config))
    weights = [] if config.model.random_init else files.shards()
    for note in files.notes:
        run.print(f"warning: {note}")
    recorded = run.recorded_config()
    before, threads = (recorded or {}).get("provenance", {}), config.system.threads
    fingerprint = before.get("config_sha256") or resume_fingerprint(recorded_settings(recorded) if recorded else config)
    provenance: Provenance = {
        "versions": library_versions(),
        "device": machine.device.type,
        "dtype": machine.dtype_name,
        "threads": threads if threads not in ("auto", 0) else before.get("threads") or torch.get_num_threads(),
        "waiting": cores.waiting(),
        "config_sha256": fingerprint,
        **data_provenance(config.data),
        "base_sha256": atomic.hash_files([*described_files(files.directory), *weights]),
        "source_sha256": atomic.hash_files(sorted(Path(nanoft.__file__).parent.rglob("*.py"))),
        **({"start_sha256": hash_tensors(start.tensors)} if start else {}),
        "date": str(before.get("date") or datetime.now().date().isoformat()),
    }
    if recorded is not None:
        if resume == "never":
            raise UserError(f"output.dir: {run.directory}: already holds a run: choose another output.dir")
        check_same_run(recorded, config, provenance, str(run.directory))
        if (versions := before.get("versions")) != provenance["versions"]:
            run.print(f"warning: library versions differ from those at the start ({versions}): last bits may differ")
        if before.get("source_sha256", provenance["source_sha256"]) != provenance["source_sha256"]:
            run.print("warning: nanoft's source has changed since the run began: results may differ")
        if before.get("threads", provenance["threads"]) != provenance["threads"]:
            other = f"system.threads: {provenance['threads']} instead of {before['threads']}"
            run.print(f"warning: {other}: from here on the run is not bit-identical to an uninterrupted one")
    text = json.dumps({**config.to_dict(), "provenance": provenance}, indent=2) + "\n"
    atomic.replace_file(run.directory / "config.json", text.encode())
    if start:
        check_start(start, config, provenance, run)
    return provenance


def load_tokenizer(
    config: Config, files: ModelFiles, date: str, run: Run, start: TrainedAdapter | None
) -> ChatTokenizer:
    """The tokenizer and chat template; a configured template is saved. `date`: shown by templates that print it."""
    chosen, saved = config.model.chat_template, run.directory / TEMPLATE_FILE
    if chosen is not None and saved.is_file() and not Path(chosen).is_file():  # the file was moved meanwhile
        config = config.override(model={"chat_template": str(saved)})
    tokenizer = ChatTokenizer.from_config(files.directory if start is None else start.tokenizer, config)
    tokenizer.date = datetime.fromisoformat(date)
    for name in sorted(config.data.template_args.keys() - tokenizer.variables):
        known = nearest(name, sorted(tokenizer.variables))
        raise UserError(f"data.template_args: {name}: the chat template does not read it{known}")
    if not tokenizer.has_own_template:
        run.print(f"template  {files.directory} has none: using ChatML, with answers that end with the EOS token")
    if chosen is not None:
        text = tokenizer.template.encode()
        if saved.is_file() and saved.read_bytes() != text:
            what = f"{chosen}: differs from {saved}, with which this run began"
            raise UserError(f"model.chat_template: {what}: choose another output.dir, or restore the template")
        if not distributed.process_rank():
            atomic.replace_file(saved, text)
    return tokenizer


def build_datasets(config: Config, tokenizer: ChatTokenizer, run: Run) -> tuple[PreparedDataset, Batches]:
    """The samples, and the batches for training; prints how many records were kept and rejected."""
    d, t, length, seed = config.data, config.training, config.model.max_seq_length, config.system.seed
    started, learns = time.perf_counter(), OBJECTIVES[t.objective].learns
    read_general(config.evaluation.general_file, tokenizer)  # a mistake in it shows now, not in the report
    most = config.sample_length
    corpus = distributed.main_process_first(lambda: prepare_datasets(d, tokenizer, most, seed, run.print, learns))
    distributed.assert_same_on_all_ranks({"data.train_file": corpus.directory.name})
    if config.sampled_tokens:
        corpus = with_room_for_answers(corpus, length - config.sampled_tokens, run.print)
    needed = {
        f"training.early_stopping_patience: {t.early_stopping_patience}": t.early_stopping_patience,
        "evaluation.on_start: true": config.evaluation.on_start,
    }
    for setting in [setting for setting, value in needed.items() if value and not len(corpus.validation)]:
        fix = "set data.validation_file or data.validation_size, or remove this setting"
        raise UserError(f"{setting}: there is no validation data: {fix}")
    batches = make_batches(config, corpus, tokenizer.pad_id)
    windows = batches.windows_in_epoch()
    steps = t.max_steps or math.ceil(t.num_epochs * windows)
    check_schedule(t, steps)
    counts = {"steps_per_epoch": windows, "steps": steps, "epochs": round(steps / windows, 3)}
    corpus = replace(corpus, report={**corpus.report, **counts})
    if not distributed.process_rank():
        shutil.copyfile(corpus.directory / REJECTED, run.directory / REJECTED)
    if corpus.from_cache:
        run.print(f"data      from the cache: {corpus.directory}")
    for line in describe_data(corpus.report):
        run.print(line)
    for number in sorted({*tokenizer.added_ids} - {*corpus.used_ids.tolist()}):
        why = f"{tokenizer.tokenizer.id_to_token(number)} occurs as a token in no training sample"
        run.print(f"warning: model.add_tokens: {why}: its row of the embedding is not trained")
    padding, seconds = 1 - utilization(batches), time.perf_counter() - started
    run.print(f"batches   {windows:,} steps per epoch, {100 * padding:.1f} % padding ({seconds:.1f} s)")
    return corpus, batches


def make_batches(config: Config, corpus: PreparedDataset, pad_id: int) -> Batches:
    """The training samples in windows, as the settings ask for."""
    d, t, rewarded = config.data, config.training, bool(config.rl.reward)
    # with rewards a window holds the prompts of a step, whose answers become its micro-batches
    window = config.micro_batch_rows(), t.gradient_accumulation_steps * config.system.ranks
    window = (1, config.rl.prompts) if rewarded else window
    pack_length = config.model.max_seq_length if d.packing and not rewarded else None
    batches = Batches(
        corpus.training, *window, config.system.seed, pad_id,
        pack_length, d.group_by_length, d.pad_to_multiple_of, t.shuffle,
    )  # fmt: skip
    batches.micro_batch_size = config.micro_batch_rows()
    return batches


def read_start(config: Config) -> tuple[Config, TrainedAdapter | None]:
    """The settings with the shape of lora.start_from's adapter, and that adapter; a UserError if they contradict."""
    lora, source = config.lora, config.lora.start_from
    if not source:
        return with_score(config), None
    if config.training.method != "lora":
        raise UserError(f"lora.start_from: {source}: needs training.method=lora: change one of them")
    start = read_trained_adapter(source, config.model.name or None)
    if lora.init != LoRAConfig.init:
        raise UserError(f"lora.init: {lora.init}: conflicts with lora.start_from={source}: remove one of the two")
    if not trains_score(config) and "score" in start.lora.modules_to_save:
        raise UserError(f"lora.start_from: {source} is a reward model: set training.objective=reward")
    if trains_score(config) and any(".lm_head." in name for name in start.tensors):
        fix = "merge it with merge.py, and set model.name to the result"
        raise UserError(f"lora.start_from: {source} trained lm_head, which a reward model replaces: {fix}")
    taken: dict[str, Any] = {}
    for name in SHAPE:
        own, default, theirs = (getattr(settings, name) for settings in (lora, LoRAConfig(), start.lora))
        if own not in (default, theirs):
            raise UserError(f"lora.{name}: {own}: {source} has {theirs}, which cannot be changed: remove lora.{name}")
        taken[f"lora.{name}"] = theirs
    tokens = config.model.add_tokens
    if tokens not in ((), start.add_tokens):
        raise UserError(f"model.add_tokens: {source} has its own tokens: remove it, or merge that adapter first")
    return with_score(config.override({**taken, "model.add_tokens": start.add_tokens})), start


def with_score(config: Config) -> Config:
    """The settings with the scalar head of a reward model among what is trained."""
    saved = config.lora.modules_to_save
    is_missing = trains_score(config) and config.training.method == "lora" and "score" not in saved
    return config.override({"lora.modules_to_save": (*saved, "score")}) if is_missing else config


def load_start(adapters: dict[str, Adapter], start: TrainedAdapter) -> None:
    """Begin from a trained adapter; a scalar head that it does not have starts fresh."""
    own = {name: a for name, a in adapters.items() if name != "score" or "score" in start.lora.modules_to_save}
    load_adapter_tensors(own, start.tensors, f"lora.start_from: {start.place}")


def check_start(start: TrainedAdapter, config: Config, provenance: Provenance, run: Run) -> None:
    """Refuse an adapter of another base; warn if its base was quantized differently."""
    if start.base_sha256 not in (None, provenance["base_sha256"]):
        fix = "set model.name to its base, or remove lora.start_from"
        raise UserError(f"lora.start_from: {start.place}: was not trained on {config.model.name}: {fix}")
    if start.quantization != quantization_of(config):
        forms = [form[0] if form else "full precision" for form in (start.quantization, quantization_of(config))]
        run.print(f"warning: {start.place} was trained on a base in {forms[0]}, and continues on one in {forms[1]}")


def with_tokens(planner: Planner, tokenizer: ChatTokenizer) -> Planner:
    """The settings with the rows of model.add_tokens among what is trained."""
    config, tied = planner.config, planner.decoder.tied
    if not tokenizer.added_ids or config.lora.start_from:
        return planner
    lora = with_added_tokens(config.lora, tokenizer.added_ids, tied)
    return replace(planner, config=replace(config, lora=lora))


def vocabulary(files: ModelFiles, tokenizer: ChatTokenizer, start: TrainedAdapter | None = None) -> int:
    """The vocabulary size: the model's own tokens, added ones, and those of the adapter that it starts from."""
    more = vocabulary_of(start.lora, start.tensors) if start else 0
    return max(files.decoder.vocab_size, more, *(number + 1 for number in tokenizer.added_ids))


def load_base(config: Config, machine: Machine, files: ModelFiles, tokens: int = 0, on_cpu: bool = False) -> Decoder:
    """The base model: as stored, quantized while it streams from disk, or random; with at least `tokens` tokens."""
    device = torch.device("cpu") if on_cpu else machine.device
    store = keep_on_host if config.model.base_device == "host" else None
    store = distributed.keep_shard if config.training.sharding == "full" and not on_cpu else store
    # full training in float32: AdamW's small updates would be lost when added to bfloat16 weights
    dtype = torch.float32 if config.training.method == "full" else machine.dtype
    seed = config.system.seed if config.model.random_init else None
    model = load_model(files, device, dtype, quantization_of(config), seed, store=store)
    grow_vocabulary(model, tokens)
    if trains_score(config):
        add_score(model, config.system.seed)
    elif model.score is not None:
        raise UserError(f"model.name: {config.model.name}: is a reward model: set training.objective=reward")
    cache_weights(model, config.quantization.dequantize)
    return model


def place_model(model: Decoder, config: Config, device: torch.device) -> None:
    """Shard the model, or leave its frozen blocks in host memory, if the settings say so."""
    if config.training.sharding == "full":
        sharding.shard_model(model, device)
    elif config.model.base_device == "host":
        stream_blocks(model, device)


def begin_objective(ctx: TrainContext) -> None:
    """Compute, once per run, what the objective needs from the model before training."""
    sides, size = [ctx.corpus.training, ctx.validation], ctx.config.evaluation.batch_size
    in_smaller_batches(ctx, size, lambda size: ctx.objective.begin(ctx.model, sides, ctx.run.directory, size))


def open_checkpoints(config: Config, run: Run, provenance: Provenance) -> AsyncCheckpointWriter:
    """The run's checkpoints and their background writer; only rank 0 writes."""
    t, is_owner = config.training, not distributed.process_rank()
    identity = {name: provenance[name] for name in IDENTITY}
    checkpoints = CheckpointManager(run.checkpoints, t.keep_checkpoints, t.keep_every, identity, owner=is_owner)
    return AsyncCheckpointWriter(checkpoints)


@contextlib.contextmanager
def base_model(ctx: TrainContext) -> Iterator[Decoder]:
    """The model before training: with adapters off (preferences: as at step 0), or loaded again in full training."""
    if ctx.adapters:
        reference = getattr(ctx.objective, "reference", None)
        with reference.weights() if reference else disabled(ctx.adapters):
            yield ctx.model
    else:
        ctx.optimizer.state.clear()  # its memory is needed for the second model
        with distributed.same_exception(ctx.device):
            model = load_base(ctx.config, ctx.machine, ctx.files)
            if ctx.config.system.kernels == "auto":
                kernels.apply(model)
            place_model(model, ctx.config, ctx.device)
        yield model


def describe_parameters(model: Decoder) -> list[str]:
    """A line for each kind of module: its frozen and trained numbers, and their formats; nothing is left out."""
    found: dict[str, Counter[str]] = {}
    for name, module in model.named_modules():
        place = name.removesuffix(".base").replace("router.proj", "router").split(".")
        own = found.setdefault(f"{'experts.' * ('experts' in place)}{place[-1]}", Counter())
        rank = f", rank {len(module.lora_A)}" if isinstance(module, LoRALinear) else ""
        for part, p in module.named_parameters(recurse=False):
            if part not in CODES:
                form = str(p.dtype).removeprefix("torch.")
                own[f"trained in {form}{rank}" if p.requires_grad else f"frozen in {form}"] += p.numel()
        if isinstance(module, PackedLinear):
            own[f"frozen in {module.kind}"] += module.in_features * module.out_features
    said = {kind: "; ".join(f"{count:,} {how}" for how, count in own.items()) for kind, own in found.items() if own}
    return [f"{kind}: {text}" for kind, text in said.items()]


def plan_warnings(planner: Planner, files: ModelFiles, longest: int, total_steps: int | None) -> list[str]:
    """Settings that are probably a mistake, for this base and samples of up to `longest` tokens, one line each."""
    t = planner.config.training
    warnings = [*config_warnings(planner.config, total_steps), *planner.counts.rank_warnings]
    high = 2e-4 if t.method == "lora" else 2e-5
    steps = total_steps or t.max_steps or 10**9  # unknown: many
    if t.optimizer.startswith("adamw") and t.learning_rate > high and not warmup_steps(steps, t):
        why = "high for a run without warm-up, because Adam's first moments are noisy"
        warnings.append(f"training.learning_rate={t.learning_rate}: {why}: set training.warmup_steps")
    if longest > files.context_length:
        known = f"{files.context_length:,} positions (max_position_embeddings): lower it"
        warnings.append(f"model.max_seq_length: samples have up to {longest:,} tokens, but the base knows {known}")
    return warnings


def print_summary(ctx: TrainContext, state: TrainState, seconds_per_step: float) -> None:
    """Print the set-up of the run: its device, what is trained, how long it will take."""
    c, t, say = ctx.config, ctx.config.training, ctx.run.print
    packed = sum(m.in_features * m.out_features for m in ctx.model.modules() if isinstance(m, PackedLinear))
    total = packed + sum(p.numel() for n, p in ctx.model.named_parameters() if n.rpartition(".")[2] not in CODES)
    trainable = sum(p.numel() for _, p in ctx.trained)
    kind = f"{'DoRA' if c.lora.dora else 'LoRA'} rank {c.lora.rank}" if ctx.adapters else "every parameter"
    form, double = quantization_of(c) or ("", False)
    base = form.upper() + (", double quantization" if double else "") + ("" if packed else ", dequantized once")
    many = f"{distributed.world_size()} x " if distributed.world_size() > 1 else ""
    many = f"model sharded over {many}" if c.training.sharding == "full" else many
    why = ", with loss scaling" if ctx.scaler.is_enabled() else ""
    why += ": this GPU has no native bfloat16" if why and c.model.dtype == "auto" else ""
    say(f"device    {many}{describe_device(ctx.device)}; computing in {ctx.machine.dtype_name}{why}")
    if ctx.device.type == "cpu" and cores.prepared:
        say(f"          {cores.prepared}")
    say(f"model     {c.model.name}" + (f"; base in {base}" if form else ""))
    say(f"training  {kind}: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    for line in describe_parameters(ctx.model):
        say(wrap(f"          {line}", 12))
    say(f"kernels   {kernels.describe(ctx.model)}")
    shape = ctx.machine.dtype, c.model.max_seq_length, ctx.batches.is_packed
    say(f"attention {kernels.describe_attention(ctx.model, *shape)}")
    longest = int(max(samples.lengths.max() for samples in (ctx.corpus.training, ctx.validation) if len(samples)))
    longest = min(longest, c.model.max_seq_length)  # the model reads no more than this
    for warning in plan_warnings(ctx.planner, ctx.files, longest, ctx.total_steps):
        say(f"warning: {warning}")
    if c.logging.show_example:
        say(f"example   {ctx.tokenizer.highlight_targets(ctx.batches.samples[0], color=sys.stdout.isatty())}")
    if state.step:
        say(f"resuming  after step {state.step} of {ctx.total_steps}")
    left, epochs = ctx.total_steps - state.step, f"{(n := ctx.corpus.report['epochs']):.3g} epoch{'s' * (n != 1)}"
    duration = format_duration(left * seconds_per_step)
    duration += ", without sampling" if c.sampled_tokens else ""
    say(f"plan      {left:,} steps ({epochs}) of {c.effective_batch_size()} sequences, about {duration}")
    often = []
    for what, every in (("evaluation", t.eval_steps), ("checkpoint", t.save_steps), ("log", t.log_steps)):
        steps = float(steps_between(every, ctx.total_steps, ctx.corpus.report["steps_per_epoch"]))
        said = f"{what} every {steps:g} step{'s' * (steps != 1)}" if steps else f"{what} at the end"
        often.append(said.replace(" ", "\xa0"))  # lines break between them only
    say(wrap(f"          {', '.join(often)}", 10).replace("\xa0", " "))


def is_complete(ctx: TrainContext, state: TrainState) -> bool:
    """Whether the run has completed all its steps and has its report."""
    has_steps_left = state.step < ctx.total_steps and not state.should_stop_early(ctx.config.training)
    if has_steps_left or distributed.broadcast_from_rank0(lambda: ctx.run.finished_step() != state.step):
        return False
    ctx.run.print(f"complete  {ctx.run.directory}: all {state.step} steps are done: see its report.md")
    return True


def start_logging(ctx: TrainContext, state: TrainState) -> None:
    """Start recording the run; an earlier session's checkpoints and events of later steps are deleted."""
    ctx.checkpoints.delete_after(state.step)
    ctx.run.open_metrics(state.step, [state.epoch, state.window], state.guard.skipped_windows)
    if not distributed.process_rank():
        ctx.run.trackers = build_trackers(ctx.config, ctx.run.directory, state.step)
    if (report_to := ctx.config.logging.report_to) in ("all", "auto"):
        found = ", ".join(chosen_trackers(report_to)) or "none is installed"
        ctx.run.print(f"trackers  {found} (logging.report_to={report_to})")
    predicted, peak = {name: size / 1e9 for name, size in ctx.plan.parts.items()}, peak_memory_gb(ctx.device)
    ctx.run.log("memory", state.step, predicted_gb=predicted, peak_memory_gb=peak, total_steps=ctx.total_steps)
    log_memory(ctx, state, "prepared")
