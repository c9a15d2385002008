"""The safetensors format: a strict reader and a streaming writer.

    8 bytes     n, the size of the header, little-endian
    n bytes     JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the rest    the tensors' bytes, one after another, without gaps

Its header can lie: about sizes, so that a reader allocates a terabyte; or with one name twice, so that two readers see
two models. The safetensors library accepts both, so the header is validated here before the library opens the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanoft import UserError
from nanoft.io.atomic import write_file
from nanoft.io.untrusted import MAX_JSON, parse_json, resolve_file

# Bytes of an element by safetensors' dtype names; those of less than a byte are not supported.
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
SAFETENSORS_DTYPES = {  # dtypes that are written
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
Tensors = dict[str, dict[str, Tensor]]  # file name without suffix -> tensors by name
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape by name


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says about one of its tensors."""

    path: Path
    name: str
    form: str  # F32, BF16, U8, ...
    shape: tuple[int, ...]
    transposed: bool = False  # in the file; `shape` and `read` are those of (out, in)

    def read(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the tensor, a view of the file, which is opened anew: an open file keeps what was read in memory."""
        with open_safetensors(self.path) as file:
            if self.transposed:
                return file.get_slice(self.name)[:, rows].t().contiguous()
            tensor: Tensor = file.get_tensor(self.name) if rows == slice(None) else file.get_slice(self.name)[rows]
            return tensor


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a file by name, in the order of their bytes, without reading them."""
    try:
        with open(resolve_file(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON):
                raise ValueError(f"not a safetensors file: a header of {length:,} bytes in a file of {size:,}")
            table = parse_json(file.read(length))
        if not isinstance(table, dict):
            raise ValueError("the header is not a JSON object")
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is not an object of strings")
        headers, end = {}, 0
        for start, stop, name, form, shape in sorted(_entry(name, entry) for name, entry in table.items()):
            if start != end:
                raise ValueError(f"{name!r:.60} begins at byte {start:,} instead of {end:,}")
            headers[name], end = TensorHeader(path, name, form, shape), stop
        if end != size - 8 - length:
            raise ValueError(f"the header describes {end:,} bytes of tensors, but the file has {size - 8 - length:,}")
        return headers
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: corrupted ({error}): download or copy it again") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, as views of it."""
    headers = read_header(path)
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in headers}


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading; a truncated or invalid one is a UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: corrupted ({error}): download or copy it again") from None


def _entry(name: str, entry: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(first byte, end, name, dtype, shape) of a tensor; a ValueError if they are inconsistent."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"} or not name.isprintable():
        raise ValueError(f"{name!r:.60}: expected the fields dtype, shape and data_offsets")
    form, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(form, str) or form not in SIZES:
        raise ValueError(f"{name!r:.60}: unknown dtype {form!r:.20}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > 8 or len(offsets) != 2:
        raise ValueError(f"{name!r:.60}: expected a shape and two offsets")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in shape + offsets):
        raise ValueError(f"{name!r:.60}: a size or offset is not a non-negative 64-bit integer")
    start, stop = offsets
    if math.prod(shape) * SIZES[form] != stop - start:
        raise ValueError(f"{name!r:.60}: {shape!r:.60} of {form} does not match the bytes {start:,} to {stop:,}")
    return start, stop, name, form, tuple(shape)


def encode_safetensors(specs: Specs, read: Callable[[str], Tensor | Iterable[Tensor]]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time.

    `read` returns a tensor by name, or its rows in parts; it is called once each, and only one tensor is held.
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


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write tensors that are in memory; see `write_file`."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_file(path, encode_safetensors(specs, tensors.__getitem__))
