"""The safetensors format: a strict reader and a streaming writer.

    8 bytes     n, the size of the header, little-endian
    n bytes     JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the rest    the tensors' bytes, one after another, without gaps

The header can be wrong on purpose. The safetensors library refuses sizes and offsets that do not fit the file, but it
accepts a name that occurs twice, from which two readers can load two different models. That is checked here.
"""

from __future__ import annotations

import json
import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoft import UserError
from nanoft.io.atomic import write_file
from nanoft.io.untrusted import parse_json, resolve_file

SAFETENSORS_DTYPES = {  # dtypes that are written
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
READ_DTYPES = {form: dtype for dtype, form in SAFETENSORS_DTYPES.items()} | {
    "I8": torch.int8, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
Tensors = dict[str, dict[str, Tensor]]  # file name without suffix -> tensors by name
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name
MAPPED, MAPPING = WeakSet[mmap.mmap](), threading.Lock()  # files of which there are views


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says about one of its tensors."""

    path: Path
    name: str
    form: str  # F32, BF16, U8, ...
    shape: tuple[int, ...]
    transposed: bool = False  # in the file; `shape` and `read` are those of (out, in)
    expert: int | None = None  # of a stack of tensors, this one alone
    first: int = 0  # of its rows

    def read(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the tensor, as a view of the file, which is reopened each time: an open one keeps pages in memory."""
        with open_safetensors(self.path) as file:
            if self.expert is not None:
                own: Tensor = file.get_slice(self.name)[self.expert]
                own = own.t().contiguous() if self.transposed else own
                return own[self.first : self.first + self.shape[0]][rows]
            if self.transposed:
                return file.get_slice(self.name)[:, rows].t().contiguous()
            tensor: Tensor = file.get_tensor(self.name) if rows == slice(None) else file.get_slice(self.name)[rows]
            return tensor


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a file by name, in the order of their bytes, without reading them."""
    resolve_file(path)
    with open_safetensors(path), open(path, "rb") as stream:
        table = parse_json(stream.read(int.from_bytes(stream.read(8), "little")))
    table.pop("__metadata__", None)
    ordered = sorted(table, key=lambda name: (table[name]["data_offsets"], name))
    return {name: TensorHeader(path, name, table[name]["dtype"], tuple(table[name]["shape"])) for name in ordered}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, as views of it, which is read where they are used; see `release_pages`."""
    headers, tensors = read_header(path), dict[str, Tensor]()
    with open_safetensors(path), open(path, "rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    with MAPPING:
        MAPPED.add(mapped)
    end = 8 + int.from_bytes(mapped[:8], "little")
    for name, header in headers.items():  # in the order of their bytes
        if (dtype := READ_DTYPES.get(header.form)) is None:
            raise UserError(f"{path}: {name}: {header.form} is not supported: save it in float32")
        count = math.prod(header.shape)
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=end) if count else torch.empty(0, dtype=dtype)
        tensors[name], end = flat.view(header.shape), end + flat.nbytes
    return tensors


def release_pages() -> None:
    """Drop what was read of mapped files from memory; tensors of `load_tensors` read it again: never change those."""
    with MAPPING:  # checkpoints are written in another thread
        for mapped in MAPPED:
            mapped.madvise(mmap.MADV_DONTNEED)


def one_by_one(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors; the pages of one are dropped before the next."""
    for item in tensors.items():
        yield item
        release_pages()


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading; a truncated or invalid one is a UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, MemoryError, ValueError) as error:  # MemoryError: safetensors maps it all
        raise UserError(f"{path}: corrupted ({error}): download or copy it again") from None


def encode_safetensors(specs: Specs, read: Callable[[str], Tensor | Iterable[Tensor]]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time.

    `read` returns a tensor by name, or its rows in parts; it is called once per tensor, and only one tensor is held.
    """
    ordered = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        dtype, shape = specs[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in ordered:
        found = read(name)
        for part in [found] if isinstance(found, Tensor) else found:
            host = part.detach().cpu().contiguous()
            yield memoryview(host.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        release_pages()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write tensors that are in memory; see `write_file`."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_file(path, encode_safetensors(specs, tensors.__getitem__))
