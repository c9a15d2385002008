"""Data-parallel training with several processes: `torchrun --nproc-per-node N train.py CONFIG`.

Every process (rank) runs the same program. The order of the samples is a pure function of (seed, epoch, index), so each
rank knows the whole window of every optimizer step, and computes its micro-batches rank, rank + N, rank + 2 N, ...
The gradients are summed over the ranks once per window:

    gradient = sum over ranks of d(loss of its micro-batches) / dw  /  units of the whole window

so N ranks do what one rank does with N times the accumulation steps. All ranks then clip by the same norm and take the
same optimizer step, so their weights stay equal. Only rank 0 prints and accesses the run directory; it broadcasts what
it reads. Control flow depends only on values that all ranks share.

The collectives here use torch.distributed: gloo on a CPU, NCCL between GPUs. Without torchrun the world size is 1, and
they do nothing. Sharding (training.sharding=full) is in nanoft/kernels/sharding.py.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from nanoft import TrainingFailed, UserError
from nanoft.config import Config
from nanoft.runtime.command import StopRequest
from nanoft.runtime.memory import OutOfMemory, is_out_of_memory, release_memory

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of a collective
PATIENCE = timedelta(days=1)  # while rank 0 works alone: it may tokenize a large corpus
BUCKET_BYTES = 64 << 20  # of gradients per all-reduce
ERRORS = {"UserError": UserError, "TrainingFailed": TrainingFailed}
_sharded = False  # whether the model's parameters are split
_store: Any = None  # a dist.Store in torchrun's process: JSON values that ranks exchange
_keys = map("nanoft {}".format, itertools.count())  # names of these values, in the same order on every rank


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def distributed_main(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Join the other ranks before a command's `main`, if torchrun started several; only one rank prints an error."""

    @functools.wraps(main)
    def on_every_rank(argv: list[str]) -> int:
        _init_process_group()
        try:
            code = main(argv)
        except (UserError, TrainingFailed) as error:  # without destroying the group: others may wait in it
            is_first = True
            with suppress(RuntimeError):  # torchrun is gone
                is_first = _store is None or _store.add(str(error), 1) == 1
            if not is_first:
                raise SystemExit(3 if isinstance(error, TrainingFailed) else 2) from None
            raise
        if world_size() > 1:
            dist.destroy_process_group()
        return code

    return on_every_rank


def _init_process_group() -> None:
    """Join the process group that torchrun's environment variables describe."""
    global _store
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        return
    try:
        _store, rank, world = _collective(lambda: next(rendezvous("env://", timeout=TIMEOUT)))
    except ValueError as error:
        raise UserError(f"{error}: start with torchrun, or unset WORLD_SIZE and RANK") from None
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    _collective(lambda: dist.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=TIMEOUT))


def resolve_world_size(config: Config) -> Config:
    wanted = config.system.ranks
    if wanted not in (1, world_size()):
        raise UserError(
            f"system.ranks: {wanted}, but the world size is {world_size()}: start with "
            f"torchrun --nproc-per-node {wanted} train.py, or remove the setting"
        )
    return config.override({"system.ranks": world_size()})


def assert_same_on_all_ranks(facts: dict[str, Any]) -> None:
    """Refuse ranks that differ in versions, settings, ... (JSON values by name): their results would differ."""
    everyone = _all_gather(facts)
    for other, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                differ = f"{name} is {theirs.get(name)} on rank {other} and {value} on rank 0"
                raise UserError(f"torchrun: {differ}: make them the same")


def broadcast_from_rank0(find_out: Callable[[], Any]) -> Any:
    """The result of rank 0's find_out(), a JSON value, on every rank; if it raises, every rank raises."""
    if _store is None:
        return find_out()
    key = next(_keys)
    if process_rank() == 0:
        try:
            found = find_out()
        except Exception as error:
            _store.set(key, json.dumps([type(error).__name__, str(error)]))
            raise
        _collective(_store.set, key, json.dumps(["", found]))
        return found
    kind, found = json.loads(_read(key))
    if kind:
        raise ERRORS.get(kind, TrainingFailed)(found)
    return found


def main_process_first(load: Callable[[], T]) -> T:
    """load() on rank 0, then on the others, which find its result in a cache."""
    loaded: list[T] = []
    broadcast_from_rank0(lambda: loaded.append(load()))
    return loaded[0] if loaded else load()


def mark_sharded() -> None:
    global _sharded
    _sharded = True


def is_sharded() -> bool:
    """Whether each rank holds only a shard of every parameter."""
    return _sharded


def keep_shard(module: nn.Module) -> None:
    """Keep this rank's part of each tensor that was loaded of a module; a scalar stays whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor  # takes half a second, so only here

    for name, whole in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if whole.dim() and not whole.is_meta and not hasattr(whole, "full_tensor"):
            mesh = init_device_mesh(whole.device.type, (world_size(),))
            part = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
            delattr(module, name)  # FSDP shards parameters only, so a buffer becomes one
            module.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))


@torch.no_grad()
def gather_shards(module: nn.Module) -> dict[str, nn.Parameter]:
    """Make the parameters whole of which `keep_shard` has kept a part; returns the parts, by name."""
    parts = {name: p for name, p in module.named_parameters() if hasattr(p, "full_tensor")}
    for name, part in parts.items():
        whole = part.full_tensor()
        set_parameter(module, name, nn.Parameter(whole, requires_grad=part.requires_grad))
    return parts


@contextmanager
def gathered(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The module with whole parameters, for the duration of a `with` block; see `gather_shards`."""
    parts = gather_shards(module)
    yield parts
    for name, part in parts.items():
        set_parameter(module, name, part)


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    place, _, leaf = name.rpartition(".")
    module.get_submodule(place).register_parameter(leaf, parameter)


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's values to every rank; sharded tensors stay as they are."""
    if world_size() == 1 or _sharded:
        return
    for tensor in tensors:
        sent = tensor.detach().contiguous()
        _collective(dist.broadcast, sent, 0)
        tensor.detach().copy_(sent)


def split_work(items: Iterable[T]) -> Iterator[T]:
    """This rank's share of independent work: every N-th item, so that each rank gets short and long ones.

    With a sharded model it is all of the work, because all ranks compute together.
    """
    return iter(items) if _sharded else itertools.islice(items, process_rank(), None, world_size())


def all_gather_dict(found: dict[int, T]) -> dict[int, T]:
    """The union of the ranks' results of `split_work`, JSON values by number; with a sharded model, rank 0's."""
    if _sharded:
        return dict(broadcast_from_rank0(lambda: list(found.items())))
    if _store is None:
        return found
    return dict(sorted(pair for part in _all_gather(list(found.items())) for pair in part))


@contextmanager
def gradients_summed_over_ranks(
    loss: Tensor, parameters: Sequence[nn.Parameter], seed: Sequence[int]
) -> Iterator[None]:
    """Wrap the backward passes of this rank's share of a window; afterwards loss and gradients are the whole window's.

    `seed` is the run's seed, epoch and index of the window, for this rank's dropout.
    """
    seed_process(*seed)
    with same_exception(loss.device):
        yield
    all_reduce_gradients(loss, parameters)


def seed_process(seed: int, epoch: int, index: int) -> None:
    """Make a rank's dropout a pure function of (seed, rank, epoch, index); rank 0 keeps the checkpointed generator."""
    if process_rank():
        own = np.random.SeedSequence([seed, process_rank(), epoch, index]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(own))


@torch.no_grad()
def all_reduce_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Replace the loss and each gradient by its sum over the ranks, in a few large all-reduces.

    With a sharded model, FSDP has summed the gradients during backward, and divided them by the world size.
    """
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if _sharded:
        torch._foreach_mul_([gradient.to_local() for gradient in gradients], float(world_size()))  # type: ignore[attr-defined]
        gradients = []
    for bucket in _buckets([loss, *gradients]):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        _collective(dist.all_reduce, flat)
        for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of at most BUCKET_BYTES in total; a larger one by itself."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket


def stop_requested(stop: StopRequest) -> bool:
    """Whether any rank received a signal; then all stop after the same step."""
    asked = all_reduce_any(bool(stop))
    if asked and not stop:
        stop.signal_name = "a signal to another process"
    return asked


def all_reduce_sum(*values: float) -> list[float]:
    """Each value's sum over the ranks, in float64."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_any(flag: bool) -> bool:
    return bool(_all_reduce([flag], dist.ReduceOp.MAX)[0])


def _all_reduce(values: Sequence[float], operation: Any) -> list[float]:
    """Reduce a few numbers on the CPU, so that no GPU is synchronized."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    _collective(dist.all_reduce, sums, operation)
    return sums.tolist()


@contextmanager
def same_exception(device: torch.device) -> Iterator[None]:
    """At the end of the block, raise one rank's error on every rank; running out of memory becomes `OutOfMemory`.

    Another rank's error is a `TrainingFailed`; a rank's own error is raised as it is. With a sharded model the ranks
    wait for one another inside the block, so a rank without memory exits with 3.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    short = failure is not None and is_out_of_memory(failure)
    if short and _sharded:
        print(
            f"failed: out of memory on rank {process_rank()}: training.sharding=full cannot retry the step: "
            "lower training.micro_batch_size (with more accumulation), or set training.checkpointing=full",
            file=sys.stderr,
        )
        os._exit(3)  # at once: an orderly exit would wait for the other ranks
    if short:
        release_memory(device, failure)
        failure = None
    worst = 1.0 if short else 2.0 if failure else 0.0
    if not _sharded:
        worst = _all_reduce([worst], dist.ReduceOp.MAX)[0]
    if failure is not None:
        raise failure
    if worst == 1:
        raise OutOfMemory("out of memory")
    if worst:
        raise TrainingFailed("another process failed: see its message")


def _collective(call: Callable[..., T], *arguments: Any) -> T:
    """call(*arguments); the error of a broken connection becomes one line."""
    try:
        return call(*arguments)
    except RuntimeError as error:
        gone, reason = "another process of this run is gone", str(error).partition("\n")[0]
        raise TrainingFailed(f"{gone}: the same command resumes from the last checkpoint ({reason})") from None


def _all_gather(value: Any) -> list[Any]:
    """A JSON value of each rank, on every rank."""
    if _store is None:
        return [value]
    key = next(_keys)
    _collective(_store.set, f"{key} {process_rank()}", json.dumps(value, sort_keys=True))
    return [json.loads(_read(f"{key} {other}")) for other in range(world_size())]


def _read(key: str) -> bytes:
    _collective(_store.wait, [key], PATIENCE)
    return _collective(_store.get, key)
