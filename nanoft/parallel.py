"""Many processes, one run: `torchrun --nproc-per-node N train.py CONFIG`.

Every process (rank) runs the same program. Each holds the model and, because the order of the samples is a pure
function of (seed, epoch, index), sees the whole window of every optimizer step; it computes the micro-batches
rank, rank + N, rank + 2 N, ... of it. The gradients are summed over the ranks once a window:

    gradient = sum over ranks of d(nll of its micro-batches) / dw  /  target tokens of the whole window

so N ranks do what one rank does with N times the accumulation, and a rank without a micro-batch adds zeros. All ranks
then clip by the same norm and take the same optimizer step: their weights stay equal without being sent. What is not
arithmetic is rank 0's: it alone reads and writes the run directory and talks, and tells the others what it found out
(`tell`). Decisions that change the control flow are made from numbers that all ranks have in common.

With training.sharding=full, PyTorch's FSDP2 (Zhao et al. 2023; Rajbhandari et al. 2020, stage 3) splits every
parameter, gradient and moment over the ranks, and puts a block's weights together only while the block is computed.

Here are only the few words that ranks say to one another, on top of torch.distributed: gloo on a CPU, NCCL between
GPUs. Without torchrun there is one rank, and nothing here does anything.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from nanoft import TrainingFailed, UserError
from nanoft.checkpoint import Background
from nanoft.config import Config
from nanoft.metrics import Run
from nanoft.model import Decoder
from nanoft.runtime import StopRequest, free_memory, is_out_of_memory

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of what all ranks do together
PATIENCE = timedelta(days=1)  # with what rank 0 does alone: a large corpus takes its time to tokenise
BUCKET_BYTES = 64 << 20  # of gradients in one message
ERRORS = {"UserError": UserError, "TrainingFailed": TrainingFailed}

_sharded = False  # whether the model's parameters are split
_store: Any = None  # a dist.Store, where ranks leave notes for one another; lives in torchrun's own process
_notes = map("nanoft {}".format, itertools.count())  # their names; every rank counts alike


def rank() -> int:
    """Which of the processes this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def together(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Let a command's `main` meet the other ranks first, if torchrun started several; an error is said by one rank."""

    @functools.wraps(main)
    def on_every_rank(argv: list[str]) -> int:
        _meet()
        try:
            code = main(argv)
        except (UserError, TrainingFailed) as error:  # no farewell: others may wait for what never comes
            if not _first_to_say(str(error)):
                raise SystemExit(3 if isinstance(error, TrainingFailed) else 2) from None
            raise
        if ranks() > 1:
            dist.destroy_process_group()
        return code

    return on_every_rank


def _meet() -> None:
    """Join the process group that torchrun's environment variables describe.

    Raises:
        UserError: they do not describe one.
    """
    global _store
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        return
    with _connected():
        try:
            _store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
        except ValueError as error:
            raise UserError(f"{error}: start with torchrun, or unset WORLD_SIZE and RANK") from None
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=TIMEOUT)


def settle_ranks(config: Config) -> Config:
    """The config with the number of ranks that there are.

    Raises:
        UserError: it asks for another number.
    """
    if config.system.ranks not in (1, ranks()):
        wanted = config.system.ranks
        raise UserError(
            f"system.ranks: {wanted} are wanted, and there are {ranks()}: start it with "
            f"torchrun --nproc-per-node {wanted} train.py, or leave the setting out"
        )
    return config.override({"system.ranks": ranks()})


def take_device(device: torch.device, sharding: str) -> None:
    """Make this process's own GPU the one that `cuda` means.

    Raises:
        UserError: there are fewer GPUs than processes, or it is a Mac's; or there is nobody to share with.
    """
    if sharding == "full" and ranks() == 1:
        raise UserError(
            "training.sharding: full splits the model over processes, and this is the only one: start it with "
            "torchrun --nproc-per-node N train.py, or set training.sharding=none"
        )
    if ranks() > 1 and device.type == "mps":
        raise UserError("system.device: Metal is used by one process: start train.py without torchrun")
    if ranks() > 1 and device.type == "cuda":
        wanted, there = int(os.environ.get("LOCAL_WORLD_SIZE", ranks())), torch.cuda.device_count()
        if wanted > there:
            raise UserError(f"torchrun: {wanted} processes for {there} GPUs: set --nproc-per-node {there}")
        if "LOCAL_RANK" not in os.environ:
            raise UserError("torchrun: LOCAL_RANK is not set, so whose GPU is which is not known: start with torchrun")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def check_alike(facts: dict[str, Any]) -> None:
    """Refuse ranks that differ: their results would, too.

    Args:
        facts: versions, settings, ...: JSON values by name; the same names on every rank of the same version.
    Raises:
        UserError: the same one on every rank: who differs, in what.
    """
    everyone = _everyone(facts)
    for other, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                raise UserError(
                    f"torchrun: {name} is {theirs.get(name)} on rank {other} and {value} on rank 0: make them the same"
                )


# ---- Rank 0 knows


def tell(find_out: Callable[[], Any]) -> Any:
    """What rank 0 finds out, a JSON value, on every rank; if it raises, every rank raises."""
    if _store is None:
        return find_out()
    key = next(_notes)
    if rank() == 0:
        try:
            found = find_out()
        except Exception as error:
            _store.set(key, json.dumps([type(error).__name__, str(error)]))
            raise
        with _connected():
            _store.set(key, json.dumps(["", found]))
        return found
    kind, found = json.loads(_read(key))
    if kind:
        raise ERRORS.get(kind, TrainingFailed)(found)
    return found


def rank_0_first(load: Callable[[], T]) -> T:
    """load() on rank 0, then on the others: what it leaves in a cache, they find there."""
    loaded: list[T] = []
    tell(lambda: loaded.append(load()))
    return loaded[0] if loaded else load()


class Follower(Run):
    """The run directory as ranks other than 0 have it: they say and write nothing."""

    def __init__(self, directory: Path):
        self.directory, self.checkpoints = directory, directory / "checkpoints"
        self._metrics = None

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, *_: Any, **__: Any) -> None:
        pass

    def say(self, text: str = "") -> None:
        pass

    def sync(self) -> None:
        pass


class NoSaves(Background):
    """Their saves: rank 0's are those of all."""

    def start(self, *_: Any) -> None:
        pass


def open_run(directory: str) -> Run:
    """Take the run directory, on rank 0; the others follow.

    Raises:
        UserError: as Run.open does.
    """
    opened: list[Run] = []
    tell(lambda: opened.append(Run.open(directory)))
    return opened[0] if opened else Follower(Path(directory))


def shard(model: Decoder, device: torch.device) -> None:
    """Split the parameters of each block, and those outside of the blocks, over the ranks and their devices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    global _sharded
    mesh = init_device_mesh(device.type, (ranks(),))
    for parameter in model.parameters():  # PiSSA's A is a transposed matrix
        parameter.data = parameter.data.contiguous()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _sharded = True


def split_up(model: Any) -> None:
    """After a forward pass, FSDP keeps what lies outside of the blocks together: split it again."""
    if _sharded and hasattr(model, "reshard"):
        model.reshard()


def is_split() -> bool:
    """Whether each rank holds a part of the model only."""
    return _sharded


def one_by_one(blocks: Sequence[nn.Module], use: Callable[[Any], T]) -> Iterator[T] | None:
    """use(block) of blocks that are split, the weights of each together for that long; None if they are not."""

    def together() -> Iterator[T]:
        for block in blocks:
            block.unshard()  # type: ignore[operator]
            yield use(block)
            block.reshard()  # type: ignore[operator]

    return together() if _sharded else None


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which each rank has a part."""
    return tensor.full_tensor() if _is_part(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each of them whole, one after the other, in rank 0's main memory; as they are if they are not split."""
    if not _sharded:
        return tensors
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        found[name] = full.cpu() if rank() == 0 else full.new_empty(0)
    return found


def parted(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of whole tensors, this rank's parts, wherever those of the same name in `like` are split."""

    if not _sharded:
        return tensors
    from torch.distributed.tensor import distribute_tensor

    def part(tensor: Tensor, own: Any) -> Tensor:
        if not _is_part(own):
            return tensor
        return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)

    return {name: part(tensor, like.get(name)) for name, tensor in tensors.items()}


def _is_part(tensor: Any) -> bool:
    if not _sharded:
        return False
    from torch.distributed.tensor import DTensor  # half a second that other runs need not wait

    return isinstance(tensor, DTensor)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Rank 0's values, on every rank; tensors that are split stay as they are."""
    if ranks() == 1 or _sharded:
        return
    for tensor in tensors:
        sent = tensor.detach().contiguous()
        with _connected():
            dist.broadcast(sent, 0)
        tensor.detach().copy_(sent)


# ---- One window, many ranks


def share(items: Iterable[T]) -> Iterator[T]:
    """This rank's part: of what is sorted by length, each rank gets short and long ones."""
    return itertools.islice(items, rank(), None, ranks())


def apart(items: Iterable[T]) -> Iterator[T]:
    """This rank's part of what each can do by itself; all of it where the model is split, for then all compute it."""
    return iter(items) if _sharded else share(items)


def union(found: dict[int, T]) -> dict[int, T]:
    """What all ranks found of what they did `apart`, JSON values by number."""
    if _store is None or _sharded:
        return found
    return dict(sorted(pair for part in _everyone(list(found.items())) for pair in part))


def reseed(seed: int, epoch: int, index: int) -> None:
    """Dropout and noise of a rank are a pure function of (seed, rank, epoch, index).

    Rank 0 keeps the generator that a checkpoint holds, as a single process does.
    """
    if rank():
        own = np.random.SeedSequence([seed, rank(), epoch, index]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(own))


@torch.no_grad()
def add_up(loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Replace the loss and each gradient by its sum over the ranks.

    In a few large messages: many small ones would each wait for the network. Where parameters are split, FSDP has
    summed the gradients during backward, and divided them by the number of ranks.
    """
    if ranks() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if _sharded:
        torch._foreach_mul_([gradient.to_local() for gradient in gradients], float(ranks()))  # type: ignore[attr-defined]
        gradients = []
    for bucket in _buckets([loss, *gradients]):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        with _connected():
            dist.all_reduce(flat)
        for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours together, as far as they fit into BUCKET_BYTES; a larger one by itself."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket


def asked_to_stop(stop: StopRequest) -> bool:
    """Whether any rank was sent a signal; then all stop after the same step."""
    asked = on_any_rank(bool(stop))
    if asked and not stop:
        stop.signal_name = "a signal to another process"
    return asked


def total(*values: float) -> list[float]:
    """Each value's sum over the ranks, in float64."""
    return _reduced(values, dist.ReduceOp.SUM)


def on_any_rank(flag: bool) -> bool:
    """Whether it is so on any rank."""
    return bool(_reduced([flag], dist.ReduceOp.MAX)[0])


def _reduced(values: Sequence[float], operation: Any) -> list[float]:
    """Few numbers, through main memory, so that no GPU has to be waited for."""
    if ranks() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with _connected():
        dist.all_reduce(sums, operation)
    return sums.tolist()


@contextmanager
def alike(device: torch.device) -> Iterator[None]:
    """What fails on one rank fails on all, at the end of the block; memory that is short on one is short on all.

    Where parameters are split, ranks wait for one another inside the block: if memory is short on one, it ends, and
    torchrun ends the others.

    Raises:
        MemoryError: memory was short on some rank.
        TrainingFailed: something else went wrong on another rank; this one's own error passes.
    """
    if ranks() == 1:
        yield
        return
    if _sharded:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            print(
                f"failed: out of memory on rank {rank()}; with training.sharding=full nothing is taken in halves: "
                "lower training.micro_batch_size (with more accumulation), or set training.checkpointing=full",
                file=sys.stderr,
            )
            os._exit(3)  # at once: whoever tidies up waits for the others
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    short = failure is not None and is_out_of_memory(failure)
    if short:
        failure = None  # it holds the frames that hold the memory
        free_memory(device)
    worst = _reduced([1 if short else 2 if failure else 0], dist.ReduceOp.MAX)[0]
    if failure is not None:
        raise failure
    if worst == 1:
        raise MemoryError("out of memory on one of the processes")
    if worst:
        raise TrainingFailed("another process failed: see what it says")


# ---- Words


@contextmanager
def _connected() -> Iterator[None]:
    """The error of a connection that breaks, because another process has ended, becomes one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise TrainingFailed(
            f"another process of this run is gone: the same command goes on from the last checkpoint ({reason})"
        ) from None


def _everyone(value: Any) -> list[Any]:
    """A JSON value of each rank, on every rank."""
    if _store is None:
        return [value]
    key = next(_notes)
    with _connected():
        _store.set(f"{key} {rank()}", json.dumps(value, sort_keys=True))
        return [json.loads(_read(f"{key} {other}")) for other in range(ranks())]


def _read(key: str) -> bytes:
    with _connected():
        _store.wait([key], PATIENCE)
        return _store.get(key)


def _first_to_say(text: str) -> bool:
    """Whether no other rank has said it."""
    try:
        return _store is None or _store.add(text, 1) == 1
    except RuntimeError:  # torchrun is gone
        return True
