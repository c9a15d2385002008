"""The self-test: the equations that nanoft guarantees, checked on the user's config, model, data and device.

Most silent failures of fine-tuning break an equation between two ways to compute the same thing: a window split
differently, documents packed or alone, a run interrupted or not, an adapter merged or separate. Each check computes
both sides and measures the relative error `|found - expected| / |expected|`. The tolerance follows from the dtype; it
is 0 where the same operations are done twice. Gradients are those that the loop of train.py passes to its optimizer.
The self-test uses eight pieces of the user's samples, no more memory than training, and the disk space (TMPDIR) of
three checkpoints. `training.compile` is off here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft import TrainingFailed, UserError
from nanoft.batches import Batches, TokenDataset
from nanoft.blocks.trained import Adapter, TrainedRows, apply, is_linear
from nanoft.checkpoint import AsyncCheckpointWriter, CheckpointCorrupted, CheckpointManager, verify
from nanoft.config import Config
from nanoft.lora import disabled, variant_of, weight_of
from nanoft.model import Decoder
from nanoft.models.adapter_files import adapter_tensors, save_adapter
from nanoft.models.open import read_trained_adapter
from nanoft.objectives import build_objective
from nanoft.objectives.distill import OtherAdapter
from nanoft.optim import build_scaler
from nanoft.runtime.command import StopRequest
from nanoft.runtime.device import seed_everything
from nanoft.training import state
from nanoft.training.state import TrainContext, TrainState

Loop = Callable[[TrainContext, TrainState, StopRequest], TrainState]  # train.py's
Equation = tuple[str, str, float, Callable[[], float]]  # name, what is compared, the allowed error, and its measure
DOCUMENTS = 8  # pieces of samples, of as many lengths
SIZES = (1, 2, 4, DOCUMENTS)  # of a micro-batch
TOKENS = 2048  # of all documents together, at most
STEPS = 2  # before the interruption, and after it
SHARE = 0.2  # by which the outputs of a perturbed adapter change, relative to their norm
KEPT = 1 << 16  # values of each gradient that are compared
# Tolerances: of a whole model forward and backward, and of one product or loss.
MODEL = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
PRODUCT = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}
ROW = "{:32} {:6} {:>8} {:>8}  {}"


def shorten(config: Config) -> Config:
    """The user's config for a few steps; what a step computes stays unchanged."""
    changes: dict[str, Any] = {"model.base_device": "auto"}  # on the device, where single adapters are compared
    changes |= {"training.gradient_accumulation_steps": min(2, config.training.gradient_accumulation_steps)}
    changes |= {"training.eval_steps": 0, "training.save_steps": STEPS, "training.compile": False}
    changes |= {"evaluation.on_start": False, "evaluation.samples": 0}
    changes |= {"training.log_steps": 1, "training.early_stopping_patience": 0, "logging.progress_bar": False}
    return config.override(changes)


def resume(ctx: TrainContext, loop: Loop, checkpoints: CheckpointManager, steps: int) -> None:
    """Run train.py's loop from the newest of these checkpoints, or from the beginning, to step `steps`."""
    corpus = replace(ctx.corpus, report={**ctx.corpus.report, "steps": steps})
    ctx = replace(ctx, corpus=corpus, writer=AsyncCheckpointWriter(checkpoints))
    loop(ctx, state.restore(ctx, "auto"), StopRequest())


def run(ctx: TrainContext, loop: Loop) -> int:
    """Run every check with a context that has taken no step and is not reusable; TrainingFailed names a failure."""
    ctx.run.open_metrics(0, [0, 0], [])
    say, tokens = ctx.run.print, min(TOKENS, ctx.batches.longest().ids.numel())
    documents = cut(ctx.batches.samples, tokens)
    say(f"self-test on {ctx.config.model.name}: {int(documents.lengths.sum()):,} tokens of its data, {ctx.device}\n")
    say(ROW.format("check", "result", "measured", "allowed", "compared"))
    failed = list[str]()
    for name, compared, allowed, measure in equations(ctx, loop, documents):
        trouble, error = "", math.nan
        try:
            error = measure()
        except (UserError, TrainingFailed, CheckpointCorrupted) as reason:  # refused, but should work
            trouble = str(reason)
        figures, passed = (f"{error:.2g}", f"{allowed:.2g}"), error <= allowed  # which NaN is not
        say(ROW.format(name, "pass" if passed else "FAIL", *figures, trouble or compared))
        if not passed:
            what = trouble or f"{compared}: error {figures[0]}, allowed {figures[1]}"
            failed.append(f"{name}: {what}")
    if failed:
        raise TrainingFailed(f"self-test: {failed[0]} ({len(failed)} checks failed)")
    return 0


def equations(ctx: TrainContext, loop: Loop, documents: TokenDataset) -> Iterator[Equation]:
    """The checks that apply to the config; the first one needs fresh adapters."""
    model, adapters, lora, place = ctx.model, ctx.adapters, ctx.config.lora, ctx.run.directory
    sure = ctx.device.type == "cpu" or ctx.config.system.deterministic
    near, nearer = MODEL[ctx.machine.dtype], PRODUCT[ctx.machine.dtype]
    exact = 0.0 if sure else near
    unsure = "" if sure else " (bit for bit only with system.deterministic=true)"
    onto = "" if ctx.config.quantization.bits == 16 else ", onto the quantized weights unpacked"
    splits = " = ".join(f"{n}x{DOCUMENTS // n}" for n in SIZES)
    pad, row = ctx.tokenizer.pad_id, int(documents.lengths.sum())
    cuts = [Batches(documents, size, DOCUMENTS // size, 0, pad) for size in SIZES]
    packed = Batches(documents, 1, 1, 0, pad, pack_length=row)
    ids = torch.from_numpy(documents[-1].ids.astype(np.int64))[None].to(ctx.device)
    longest = documents.units([-1])
    from_files = nearer if variant_of(lora).RANKS > 1 else 0.0  # PiSSA's files have twice the rank, another alpha
    resumed, all_state = f"{STEPS} + {STEPS} steps = {2 * STEPS} steps", f"weights, optimizer, random numbers{unsure}"

    def inference(measure: Callable[..., float], *args: Any) -> Callable[[], float]:
        def measured() -> float:
            model.eval()
            with torch.no_grad(), ctx.autocast():
                return measure(*args)

        return measured

    if adapters and not lora.start_from:
        yield "fresh adapter = base", "logits", 0.0, inference(adapter_effect, model, adapters, ids)
    perturb_adapters(adapters)  # from here on every adapter has an effect
    yield splits, "gradient", near, lambda: batching_error(ctx, loop, cuts)
    yield "packed = alone", "gradient", near, lambda: batching_error(ctx, loop, [cuts[0], packed])
    yield "recomputed = kept", f"gradient{unsure}", exact, lambda: recompute_error(ctx, loop, longest)
    if adapters:
        yield "merged = adapter", f"products{onto}", nearer, inference(merged_error, adapters)
        yield "adapter saved = read", "files, products", from_files, inference(files_error, ctx, place)
    yield resumed, all_state, exact, lambda: resume_error(ctx, loop, place)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; 0 only if all numbers are equal, infinite if one is not finite."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    found, expected = found.to(wide), expected.to(wide)
    if torch.equal(found, expected) and expected.isfinite().all():
        return 0.0
    size = expected.abs().amax()  # otherwise the squares of small numbers underflow
    difference, norm = (torch.linalg.vector_norm(t / size).item() for t in (found - expected, expected))
    return difference / norm if math.isfinite(difference) and math.isfinite(norm) else math.inf


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative error of all tensors of the same names, as one vector."""
    if found.keys() != expected.keys():
        return math.inf
    a, b = (torch.cat([part[name].flatten() for name in sorted(expected)]) for part in (found, expected))
    return relative_error(a, b)


class _Taken(Exception):
    """Ends the loop once its gradient has been recorded."""


def gradient(ctx: TrainContext, loop: Loop, batches: Batches) -> dict[str, Tensor]:
    """The unclipped gradients that the first optimizer step of train.py's loop sees, at most KEPT values of each."""
    taken: dict[str, Tensor] = {}

    def take(*_: Any) -> None:
        for name, p in ctx.trained:
            if p.grad is not None:
                step = -(-p.grad.numel() // KEPT) | 1  # odd, so that it is not always the same columns
                taken[name] = p.grad.flatten()[::step].clone()
        raise _Taken

    # clipping would hide a wrong scale; without rollbacks no checkpoint of the beginning is needed
    config = ctx.config.override({"training.max_grad_norm": 0.0, "guard.max_rollbacks": 0})
    unused = CheckpointManager(ctx.run.directory / "no" / "checkpoints", 1)
    scaler = build_scaler(ctx.device, ctx.machine.dtype)
    objective = build_objective(config, ctx.adapters, ctx.corpus, ctx.tokenizer)
    with ctx.autocast():
        objective.begin(ctx.model, [batches.samples], None, DOCUMENTS)
    ctx = replace(ctx, config=config, batches=batches, objective=objective, scaler=scaler)
    torch.manual_seed(config.system.seed)
    try:
        with ctx.optimizer.register_step_pre_hook(take):
            resume(ctx, loop, unused, 1)
    except _Taken:
        return taken
    finally:
        ctx.optimizer.zero_grad(set_to_none=True)
    raise TrainingFailed("the loop took no step: its loss is not finite")


def cut(samples: TokenDataset, tokens: int) -> TokenDataset:
    """Pieces of units spread over the data, of increasing length, each ending in the last target of its sample."""
    longest, pieces = max(DOCUMENTS, tokens // DOCUMENTS), []
    for i in range(DOCUMENTS):
        for sample in samples.units([i * (len(samples) // samples.unit_size) // DOCUMENTS]):
            end = int(np.flatnonzero(sample.is_target).max(initial=-1)) + 1 or len(sample.ids)
            begin = max(0, end - max(2, longest * (i + 1) // DOCUMENTS))
            pieces.append(replace(sample, ids=sample.ids[begin:end], is_target=sample.is_target[begin:end]))
    return TokenDataset.of(pieces, samples.unit_size)


@torch.no_grad()
def perturb_adapters(adapters: dict[str, Adapter]) -> None:
    """Move every trained parameter off its start, at random but the same way each time, until outputs move by SHARE."""
    generator = torch.Generator().manual_seed(7)
    for _, adapter, x in examples(adapters):
        training, before = adapter.training, product(adapter.eval(), x)
        trained = [p for p in adapter.parameters() if p.requires_grad]
        moved = [(p, p.clone(), torch.randn(p.shape, generator=generator).to(p)) for p in trained]
        for exponent in range(-8, 12):
            for p, start, noise in moved:
                size = float(start.square().mean().sqrt()) or 1.0  # zeros, such as lora_B's, have none
                p.copy_(start + 2.0**exponent * size * noise)
            adapter.train(training).eval()  # clears DoRA's cached norm
            if relative_error(product(adapter, x), before) >= SHARE:
                break
        adapter.train(training)


def adapter_effect(model: Decoder, adapters: dict[str, Adapter], ids: Tensor) -> float:
    """How far the adapters move the logits of documents, (b, s), from those of the base."""
    with disabled(adapters):
        base = model.logits(model(ids))  # (b, s, vocab)
    return relative_error(model.logits(model(ids)), base)


def batching_error(ctx: TrainContext, loop: Loop, cuts: list[Batches]) -> float:
    """The gradient of documents in batches of several shapes; without dropout and noise, which depend on the shape."""
    random = [(ctx.model, "neftune_alpha"), *((adapter, "dropout") for adapter in ctx.adapters.values())]
    with ExitStack() as after:
        for module, name in random:
            after.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, 0.0)
        first, *others = [gradient(ctx, loop, batches) for batches in cuts]
    rows = "embed_tokens.rows"  # these tokens need not be in the documents
    if idle := [n for n, _ in ctx.trained if not n.endswith(rows) and (n not in first or not first[n].any())]:
        raise TrainingFailed(f"{idle[0]} is trained but has no effect: its gradient is zero")
    return max(gradient_error(one, first) for one in others)


def recompute_error(ctx: TrainContext, loop: Loop, documents: TokenDataset) -> float:
    """The gradient: activations kept against recomputed, with the same dropout and noise."""
    batches, chosen = Batches(documents, 1, 1, 0, ctx.tokenizer.pad_id), ctx.model.activation_policy
    found = []
    for keep in dict.fromkeys(("all", "input", *chosen)):
        ctx.model.activation_policy = [keep] * len(chosen)
        found.append(gradient(ctx, loop, batches))
    ctx.model.activation_policy = chosen
    return max(gradient_error(one, found[0]) for one in found[1:])


def merged_product(adapter: Adapter, x: Tensor) -> Tensor:
    """The output of the merged module: merged in float32, into the weight that the base uses."""
    stored, bias = weight_of(adapter.base), getattr(adapter.base, "bias", None)
    bias = bias if adapter.bias is None else adapter.bias
    merged = adapter.merged(stored.float()).to(stored.dtype)
    return apply(adapter.base, x, merged, None if bias is None else bias.to(stored.dtype))


def examples(adapters: dict[str, Adapter]) -> Iterator[tuple[str, Adapter, Tensor]]:
    """Each adapter by name, with an input of random numbers, (DOCUMENTS, in)."""
    generator = torch.Generator().manual_seed(0)
    for name, adapter in adapters.items():
        weight = weight_of(adapter.base)
        if isinstance(adapter.base, nn.Embedding):
            ids = torch.randint(len(weight), (DOCUMENTS,), generator=generator).to(weight.device)
            yield name, adapter, torch.cat((ids, adapter.ids)) if isinstance(adapter, TrainedRows) else ids
        else:
            yield name, adapter, torch.randn(DOCUMENTS, weight.shape[-1], generator=generator).to(weight)


def product(adapter: Adapter, x: Tensor) -> Tensor:
    """The adapter's output; for rows of a head, of which only the weight is used, its product."""
    if isinstance(adapter, TrainedRows) and is_linear(adapter.base):
        return F.linear(x, adapter.weight)
    return adapter(x)


def merged_error(adapters: dict[str, Adapter]) -> float:
    """Products of merged modules against those of base and adapter."""
    return max(relative_error(merged_product(adapter, x), product(adapter, x)) for _, adapter, x in examples(adapters))


def files_error(ctx: TrainContext, directory: Path) -> float:
    """Products of adapters read from saved files; infinite if saving these again changes a byte."""
    first, second, base = directory / "first", directory / "second", ctx.config.model.reference
    save_adapter(first, ctx.model, ctx.adapters, ctx.config.lora, base, {})
    read = read_trained_adapter(str(first))
    again = OtherAdapter(read, ctx.model, ctx.adapters).others
    lora = replace(read.lora, dropout=ctx.config.lora.dropout)  # matters in training only
    save_adapter(second, ctx.model, again, lora, base, {})
    if any((second / path.name).read_bytes() != path.read_bytes() for path in first.iterdir()):
        return math.inf
    return max(relative_error(product(again[n], x), product(old, x)) for n, old, x in examples(ctx.adapters))


def resume_error(ctx: TrainContext, loop: Loop, directory: Path) -> float:
    """The last checkpoint of a run that loses its state and resumes in the middle, against an uninterrupted run's."""
    whole, halves = (CheckpointManager(directory / name / "checkpoints", 2) for name in ("whole", "halves"))
    ctx = replace(ctx, validation=ctx.validation[:0])
    resume(ctx, loop, whole, 2 * STEPS)  # saves after STEPS, too
    os.rename(whole.path(STEPS), halves.path(STEPS))
    with torch.no_grad():  # lose everything that a checkpoint must restore
        for tensor in (adapter_tensors(ctx.adapters) if ctx.adapters else dict(ctx.trained)).values():
            tensor.zero_()
    for moments in ctx.optimizer.state.values():
        for key, value in moments.items():
            moments[key] = value.zero_() if isinstance(value, Tensor) else 0
    seed_everything(ctx.config.system.seed ^ 1, 0, False)
    ctx = replace(ctx, scaler=build_scaler(ctx.device, ctx.machine.dtype))
    ctx.batches.seek(ctx.batches.epoch + 1)
    resume(ctx, loop, halves, 2 * STEPS)
    expected, found = (verify(checkpoints.path(2 * STEPS)) for checkpoints in (whole, halves))
    if any(found.state[key] != expected.state[key] for key in ("step", "epoch", "window", "rng", "scaler")):
        return math.inf
    files = ("adapter" if ctx.adapters else "model", "optimizer")
    return max(gradient_error(found.tensors(name), expected.tensors(name)) for name in files)
