"""Is it true here? What nanoft promises, tried on a user's own config, model, data and device.

Most ways in which a fine-tuning goes silently wrong break an equation between two ways to compute one thing: a window
cut differently, documents packed or alone, a run stopped or not, an adapter merged or beside its base. Each check
computes both sides and measures how far they are apart, as a share of the norm:

    |found - expected| / |expected|

What is allowed follows from the number format, and is nothing at all where the same operations are done twice. The
gradients are those that train.py's own loop hands to its optimizer, and the tests use the same functions. The work is
bounded by eight documents, pieces of the user's samples, that together are no larger than a micro-batch; the memory by
what training takes; the disk (TMPDIR) by three checkpoints. `training.compile` is off here.

    python train.py CONFIG --selftest
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from nanoft import TrainingFailed, UserError
from nanoft.batches import Batches, Sample, TokenDataset, collate
from nanoft.checkpoint import AsyncCheckpointWriter, CheckpointCorrupted, CheckpointManager, verify
from nanoft.config import Config
from nanoft.generation.generate import generate
from nanoft.lora import LoRALinear, by_pattern, disabled, variant_of, weight_of
from nanoft.loss import chunk_rows, token_nll
from nanoft.model import Decoder
from nanoft.models.adapter_files import adapter_tensors, load_adapter_tensors, read_adapter, save_adapter
from nanoft.runtime.device import seed_everything
from nanoft.runtime.memory import available_host_bytes
from nanoft.training.state import TrainContext

GoOn = Callable[[TrainContext, int], None]  # train.py's loop: from the job's newest checkpoint, or none, to that step
DOCUMENTS = 8  # pieces of samples, of as many lengths
SIZES = (1, 2, 4, DOCUMENTS)  # of a micro-batch
TOKENS = 2048  # of all documents together, at most
STEPS = 2  # before the interruption, and after it
ANSWER = 16  # tokens
SHARE = 0.2  # of a weight's norm: how far an adapter is moved from its start
KEPT = 1 << 16  # values of each gradient that are compared
# A whole model forward and backward, rounded on different ways; one product, one loss.
MODEL = {torch.float32: 1e-4, torch.bfloat16: 0.1}
PRODUCT = {torch.float32: 1e-5, torch.bfloat16: 0.02}
ROW = "{:32} {:6} {:>8} {:>8}  {}"


@dataclass(frozen=True)
class Check:
    """An equation, what of its two sides is compared, how far apart they may be, and what measures it."""

    name: str
    compared: str
    allowed: float
    measure: Callable[[], float]
    pointless: str = ""  # why there is nothing to check
    measured: float = math.nan
    trouble: str = ""  # what kept it from measuring

    @property
    def passed(self) -> bool:
        return bool(self.pointless) or self.measured <= self.allowed  # which NaN is not

    def done(self) -> Check:
        """The same with its result; where something is refused that should work, the check has failed, too."""
        try:
            return self if self.pointless else replace(self, measured=self.measure())
        except (UserError, TrainingFailed, CheckpointCorrupted) as error:
            return replace(self, trouble=str(error))

    def line(self) -> str:
        if self.pointless:
            return ROW.format(self.name, "-", "", "", f"not applicable: {self.pointless}")
        result, figures = "pass" if self.passed else "FAIL", (f"{self.measured:.2g}", f"{self.allowed:.2g}")
        return ROW.format(self.name, result, *figures, self.trouble or self.compared)


def shorten(config: Config, directory: Path) -> Config:
    """The user's config for a few steps in a directory of their own; what is computed in a step stays as it is."""
    changes = {"training.gradient_accumulation_steps": min(2, config.training.gradient_accumulation_steps)}
    changes |= {"training.eval_steps": 0, "training.save_steps": STEPS, "training.compile": False}
    changes |= {"training.log_steps": 1, "training.early_stopping_patience": 0, "logging.progress_bar": False}
    return config.override({**changes, "output.dir": str(directory / "run")})


def run(job: TrainContext, go_on: GoOn) -> list[Check]:
    """Do every check, a line of the table each.

    Args:
        job: fresh: no step was taken. It is used up.
    Raises:
        TrainingFailed: names the first check that failed.
    """
    say, tokens = job.run.print, min(TOKENS, job.batches.longest().ids.numel())
    documents = TokenDataset.of(cut(job.batches.samples, tokens))
    say(f"self-test on {job.config.model.name}: {int(documents.lengths.sum()):,} tokens of its data, {job.device}\n")
    say(ROW.format("check", "result", "measured", "allowed", "compared"))
    done: list[Check] = []
    for check in checks(job, go_on, documents):
        done.append(check.done())
        say(done[-1].line())
        if len(done) == 1:
            perturb_adapters(job.adapters)  # from here on every adapter says something
    if failed := [check for check in done if not check.passed]:
        first = failed[0]
        what = first.trouble or f"{first.compared}: {first.measured:.2g} apart, {first.allowed:.2g} allowed"
        raise TrainingFailed(f"self-test: {first.name}: {what} ({len(failed)} of {len(done)} checks failed)")
    return done


def checks(job: TrainContext, go_on: GoOn, documents: TokenDataset) -> list[Check]:
    """The table. The first one wants fresh adapters."""
    model, adapters, lora, place = job.model, job.adapters, job.config.lora, job.run.directory
    sure = job.device.type == "cpu" or job.config.system.deterministic
    near, nearer = MODEL[job.dtype], PRODUCT[job.dtype]
    none = "" if adapters else "every parameter is trained: there is no adapter"
    exact = 0.0 if sure else near
    unsure = "" if sure else " (bit for bit only with system.deterministic=true)"
    onto = "" if job.config.quantization.bits == 16 else ", onto the quantized weights unpacked"
    splits = " = ".join(f"{n}x{DOCUMENTS // n}" for n in SIZES)
    prompts = [(s.ids[: max(1, int(s.is_target.argmax()))]).tolist() for s in documents[::2]]
    ids, pad = torch.from_numpy(documents[-1].ids.astype(np.int64))[None].to(job.device), job.chat.pad_id

    def in_use(measure: Callable[..., float], *args: Any) -> Callable[[], float]:
        def measured() -> float:
            model.eval()
            with torch.no_grad(), job.autocast():
                return measure(*args)

        return measured

    return [
        Check("fresh adapter = base", "logits", 0.0, in_use(adapter_effect, model, adapters, ids), none),
        Check(splits, "gradient", near, lambda: splits_apart(job, go_on, documents)),
        Check("packed = alone, in use", "logits and loss", near, in_use(packed_apart, model, documents, pad)),
        Check("packed = alone, in training", "gradient", near, lambda: packed_gradients_apart(job, go_on, documents)),
        Check("computed again = kept", f"gradient{unsure}", exact, lambda: kept_apart(job, go_on, documents[-1:])),
        Check("loss in chunks = at once", "loss, gradient", nearer, lambda: loss_apart(job, documents[-1:])),
        Check("merged = adapter, each linear", f"products{onto}", nearer, in_use(products_apart, adapters), none),
        Check("merged = adapter", f"logits{onto}", near, in_use(merged_apart, model, adapters, ids), none),
        Check(
            "adapter saved = read",
            "bytes of the files, products of each linear",
            nearer if lora.init == "pissa" else 0.0,  # its files have twice the rank and another alpha
            in_use(files_apart, job, place),
            none,
        ),
        # both the likeliest token's logit and that of the one taken may be off
        Check("with a cache = without", "greedy tokens", 2 * near, in_use(answers_apart, model, prompts)),
        Check(
            f"{STEPS} + {STEPS} steps = {2 * STEPS} steps",
            f"weights, optimizer, random numbers{unsure}",
            exact,
            lambda: resumed_apart(job, go_on, place),
        ),
    ]


# --- two numbers, two tensors, two gradients


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of the norm; 0 for the same numbers only, infinite where one is none."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    found, expected = found.to(wide), expected.to(wide)
    if torch.equal(found, expected) and expected.isfinite().all():
        return 0.0
    size = expected.abs().amax()  # without it the squares of small numbers would be 0
    difference, norm = (torch.linalg.vector_norm(t / size).item() for t in (found - expected, expected))
    return difference / norm if math.isfinite(difference) and math.isfinite(norm) else math.inf


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The same over all parameters together."""
    if found.keys() != expected.keys():
        return math.inf
    a, b = (torch.cat([part[name].flatten() for name in sorted(expected)]) for part in (found, expected))
    return relative_error(a, b)


def saving_to(job: TrainContext, checkpoints: CheckpointManager) -> TrainContext:
    """The same job with other checkpoints."""
    return replace(job, checkpoints=checkpoints, saves=AsyncCheckpointWriter(checkpoints, available_host_bytes))


class _Taken(Exception):
    """The loop has its gradient and need not go on."""


def gradient(job: TrainContext, go_on: GoOn, batches: Batches) -> dict[str, Tensor]:
    """What train.py's loop hands to the optimizer at the first step over these batches, unclipped; by parameter.

    At most KEPT values of each, evenly spread, so that a copy costs little also where every parameter is trained.
    """
    taken: dict[str, Tensor] = {}

    def take(*_: Any) -> None:
        for name, p in job.trained:
            if p.grad is not None:
                step = -(-p.grad.numel() // KEPT) | 1  # odd, so that it is not always the same columns
                taken[name] = p.grad.flatten()[::step].clone()
        raise _Taken

    # clipping would hide a wrong scale; without rollbacks no checkpoint of the beginning is needed
    config = job.config.override({"training.max_grad_norm": 0.0, "guard.max_rollbacks": 0})
    job = saving_to(
        replace(job, config=config, batches=batches), CheckpointManager(job.run.directory / "no" / "checkpoints", 1)
    )
    hook = job.optimizer.register_step_pre_hook(take)
    torch.manual_seed(config.system.seed)
    try:
        go_on(job, 1)
    except _Taken:
        return taken
    finally:
        hook.remove()
        job.optimizer.zero_grad(set_to_none=True)
    raise TrainingFailed("the loop took no step: its loss is not finite")


@contextmanager
def without_dropout(job: TrainContext) -> Iterator[None]:
    """Without dropout and noise, which differ with the shape of a batch."""
    alpha, dropout = job.model.neftune_alpha, {name: adapter.dropout for name, adapter in job.adapters.items()}
    job.model.neftune_alpha = 0.0
    for adapter in job.adapters.values():
        adapter.dropout = 0.0
    try:
        yield
    finally:
        job.model.neftune_alpha = alpha
        for name, adapter in job.adapters.items():
            adapter.dropout = dropout[name]


# --- what is looked at


def cut(samples: Sequence[Sample], tokens: int) -> list[Sample]:
    """Pieces of samples spread over the data, each ending in its sample's last target, of ever more tokens."""
    longest = max(DOCUMENTS, tokens // DOCUMENTS)
    pieces = []
    for i in range(DOCUMENTS):
        sample = samples[i * len(samples) // DOCUMENTS]
        end = int(np.flatnonzero(sample.is_target).max(initial=-1)) + 1 or len(sample.ids)
        begin = max(0, end - max(2, longest * (i + 1) // DOCUMENTS))
        pieces.append(Sample(sample.ids[begin:end], sample.is_target[begin:end], sample.record))
    return pieces


@torch.no_grad()
def perturb_adapters(adapters: dict[str, LoRALinear]) -> None:
    """Move each adapter off its start, at random, but the same way each time: |s dB A| = SHARE |W|."""
    generator = torch.Generator().manual_seed(7)
    for adapter in adapters.values():
        step = torch.randn(adapter.lora_B.shape, generator=generator).to(adapter.lora_B)  # (out, r)
        change = adapter.scaling * torch.linalg.vector_norm(step @ adapter.lora_A).item()
        adapter.lora_B.add_(step, alpha=SHARE * torch.linalg.vector_norm(weight_of(adapter.base)).item() / change)
        for p in (adapter.bias, adapter.lora_magnitude_vector):
            if p is not None:
                p.mul_(1 + SHARE * torch.randn(p.shape, generator=generator).to(p))
        adapter.train(adapter.training)  # forgets the norm of what it was


# --- the equations


def adapter_effect(model: Decoder, adapters: dict[str, LoRALinear], ids: Tensor) -> float:
    """How far the adapters move the logits of documents, (b, s), from those of the base."""
    with disabled(adapters):
        base = model.logits(model(ids))  # (b, s, vocab)
    return relative_error(model.logits(model(ids)), base)


def splits_apart(job: TrainContext, go_on: GoOn, documents: TokenDataset) -> float:
    """One window cut into micro-batches of 1, 2, 4, ... rows: one gradient."""
    with without_dropout(job):
        cuts = [Batches(documents, size, DOCUMENTS // size, 0, job.chat.pad_id) for size in SIZES]
        found = [gradient(job, go_on, batches) for batches in cuts]
    return max(gradient_error(one, found[0]) for one in found[1:])


def packed_apart(model: Decoder, documents: TokenDataset, pad_id: int) -> float:
    """All documents in one row against each by itself: logits of every token, and the loss."""
    device, losses = model.head.device, torch.zeros(2, dtype=torch.float64)
    batch = collate(documents, [np.arange(len(documents))], pad_id).to(device)
    packed = model(batch.ids, batch.positions, batch.documents)  # (1, all tokens, hidden)
    farthest = 0.0
    for place, together in enumerate(packed.split(documents.lengths.tolist(), dim=1)):
        one = collate(documents, [[place]], pad_id).to(device)
        alone = model(one.ids)
        farthest = max(farthest, relative_error(model.logits(together), model.logits(alone)))
        for i, hidden in enumerate((together, alone)):
            losses[i] += token_nll(hidden[0, one.target_positions], model.head, one.targets).sum().cpu()
    return max(farthest, relative_error(losses[0], losses[1]))


def packed_gradients_apart(job: TrainContext, go_on: GoOn, documents: TokenDataset) -> float:
    """All documents in one row against a row each: one gradient."""
    row, pad_id = int(documents.lengths.sum()), job.chat.pad_id
    with without_dropout(job):
        alone = gradient(job, go_on, Batches(documents, 1, DOCUMENTS, 0, pad_id))
        return gradient_error(gradient(job, go_on, Batches(documents, 1, 1, 0, pad_id, pack_length=row)), alone)


def kept_apart(job: TrainContext, go_on: GoOn, documents: TokenDataset) -> float:
    """Activations kept against computed again, with the same dropout and noise: one gradient."""
    batches, chosen = Batches(documents, 1, 1, 0, job.chat.pad_id), job.model.activation_policy
    found = []
    for keep in dict.fromkeys(("all", "input", *chosen)):
        job.model.activation_policy = [keep] * len(chosen)
        batches.seek(0, 0)
        found.append(gradient(job, go_on, batches))
    job.model.activation_policy = chosen
    return max(gradient_error(one, found[0]) for one in found[1:])


def loss_apart(job: TrainContext, documents: TokenDataset) -> float:
    """The chunked loss and its gradients against the plain formula on all logits, over more rows than a chunk has."""
    model, t = job.model.eval(), job.config.training
    batch = collate(documents, [[0]], job.chat.pad_id).to(job.device)
    with torch.no_grad(), job.autocast():
        hidden = model(batch.ids, target_positions=batch.target_positions)[0]  # (targets, hidden)
    rows = torch.arange(chunk_rows(len(model.head), job.device) * 5 // 4 + 1, device=job.device)
    size = torch.linspace(0.5, 1.5, len(rows), device=job.device)[:, None]  # no two rows are the same
    hidden = (hidden[rows % len(hidden)] * size).to(hidden.dtype).requires_grad_()
    wanted = [hidden, model.head] if model.head.requires_grad else [hidden]
    arguments = (hidden, model.head, batch.targets[rows % len(batch.targets)], t.label_smoothing, t.z_loss)
    ours, plain = token_nll(*arguments).sum(), plain_nll(*arguments)
    pairs = zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(plain, wanted), strict=True)
    return max(relative_error(ours.detach(), plain.detach()), *itertools.starmap(relative_error, pairs))


def plain_nll(hidden: Tensor, head: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """The sum of `token_nll` as PyTorch says it, on all logits, (n, vocab)."""
    logits = hidden @ head.to(hidden.dtype).T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    return nll + z_loss * logits.logsumexp(-1).square().sum()


def merged_product(adapter: LoRALinear, x: Tensor) -> Tensor:
    """x W'^T + b' of the linear that takes the adapter's place: merged in float32, onto what its base multiplies by."""
    weight = adapter.merged(weight_of(adapter.base).float()).to(x.dtype)  # (out, in)
    bias = adapter.base.bias if adapter.bias is None else adapter.bias
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def examples(adapters: dict[str, LoRALinear]) -> Iterator[tuple[str, LoRALinear, Tensor]]:
    """Each adapter by name, with an input of random numbers, (DOCUMENTS, in)."""
    generator = torch.Generator().manual_seed(0)
    for name, adapter in adapters.items():
        x = torch.randn(DOCUMENTS, adapter.base.in_features, generator=generator)
        yield name, adapter, x.to(weight_of(adapter.base))


def products_apart(adapters: dict[str, LoRALinear]) -> float:
    """Each linear merged against itself with its adapter; the farthest."""
    return max(relative_error(merged_product(adapter, x), adapter(x)) for _, adapter, x in examples(adapters))


def merged_apart(model: Decoder, adapters: dict[str, LoRALinear], ids: Tensor) -> float:
    """The whole model merged against base and adapters: logits. Each weight is merged when it is used, and let go."""

    def merge(adapter: LoRALinear) -> Any:
        return adapter.base.register_forward_hook(lambda _, inputs, __: merged_product(adapter, inputs[0]))

    expected = model.logits(model(ids))  # (b, s, vocab)
    hooks = [merge(adapter) for adapter in adapters.values()]
    try:
        with disabled(adapters):
            return relative_error(model.logits(model(ids)), expected)
    finally:
        for hook in hooks:
            hook.remove()


def files_apart(job: TrainContext, directory: Path) -> float:
    """The adapter's files, read into other adapters on the same base: those give the same products.

    Infinite if a byte differs when they are written again.
    """
    first, second = directory / "first", directory / "second"
    save_adapter(first, job.model, job.adapters, job.config.lora, job.config.model.name, {})
    read, base, tensors, note = read_adapter(first)
    lora = replace(read, dropout=job.config.lora.dropout)  # which matters in training only
    again, generator = {}, torch.Generator()
    for name, adapter in job.adapters.items():
        rank, alpha = by_pattern(lora.rank_pattern, name, lora.rank), by_pattern(lora.alpha_pattern, name, lora.alpha)
        again[name] = variant_of(lora)(adapter.base, replace(lora, rank=rank, alpha=alpha), generator).eval()
    load_adapter_tensors(again, tensors, str(first))
    save_adapter(second, job.model, again, lora, base, note)
    if any((second / path.name).read_bytes() != path.read_bytes() for path in first.iterdir()):
        return math.inf
    return max(relative_error(again[name](x), adapter(x)) for name, adapter, x in examples(job.adapters))


def answers_apart(model: Decoder, prompts: list[list[int]]) -> float:
    """Greedy answers to all prompts at once, with a cache, against one pass over each prompt and answer without one.

    How far the likeliest token is ahead of the one in the answer, in deviations of the logits: 0 if it is the same.
    """
    farthest = 0.0
    for prompt, answer in zip(prompts, generate(model, prompts, (), ANSWER), strict=True):
        ids = torch.tensor([[*prompt, *answer.ids]], device=model.head.device)
        logits = model.logits(model(ids)[0, len(prompt) - 1 : -1])  # (answer, vocab)
        ahead = logits.amax(-1) - logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        farthest = max(farthest, (ahead / logits.std(-1)).nan_to_num(nan=math.inf).max().item())
    return farthest


def resumed_apart(job: TrainContext, go_on: GoOn, directory: Path) -> float:
    """A run that goes through against one that forgets all and goes on from the checkpoint in the middle.

    Weights, optimizer, place in the data and random numbers, as the last checkpoints of both have them.
    """
    whole, halves = (CheckpointManager(directory / name / "checkpoints", 2) for name in ("whole", "halves"))
    job = replace(job, validation=job.validation[:0])
    go_on(saving_to(job, whole), 2 * STEPS)  # saves after STEPS, too
    os.rename(whole.path(STEPS), halves.path(STEPS))
    forget(job)
    go_on(saving_to(job, halves), 2 * STEPS)
    expected, found = (verify(checkpoints.path(2 * STEPS)) for checkpoints in (whole, halves))
    if any(found.state[key] != expected.state[key] for key in ("step", "epoch", "window", "rng")):
        return math.inf
    files = ("adapter" if job.adapters else "model", "optimizer")
    return max(tensors_apart(*(saved.path / f"{name}.safetensors" for saved in (found, expected))) for name in files)


@torch.no_grad()
def forget(job: TrainContext) -> None:
    """Destroy everything that a checkpoint has to bring back."""
    weights = adapter_tensors(job.adapters) if job.adapters else dict(job.trained)
    for tensor in weights.values():
        tensor.zero_()
    for state in job.optimizer.state.values():
        for key, value in state.items():
            state[key] = value.zero_() if isinstance(value, Tensor) else 0
    seed_everything(job.config.system.seed ^ 1, 0, False)
    job.batches.seek(job.batches.epoch + 1, 0)


def tensors_apart(found: Path, expected: Path) -> float:
    """The pair of tensors that is farthest apart in two files, of which one pair at a time is read."""
    with safe_open(found, "pt") as one, safe_open(expected, "pt") as other:
        if set(one.keys()) != set(other.keys()):
            return math.inf
        pairs = ((one.get_tensor(name), other.get_tensor(name)) for name in one.keys())  # noqa: SIM118
        return max(itertools.starmap(relative_error, pairs), default=0.0)
