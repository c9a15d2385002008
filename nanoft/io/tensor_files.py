"""The safetensors format, read with suspicion.

    8 bytes     n, the size of the header, little-endian
    n bytes     JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the rest    the tensors' bytes, one after another, without a gap

Nothing in such a file can run code. But it can lie: about sizes, so that a reader allocates a terabyte; with two
tensors in one place, or one name twice, so that two readers see two models. The safetensors library refuses most of
that, takes a name that is there twice without a word, and reads a header of 100 MB. So the header is read here first,
strictly, before the library sees the file and before anything is allocated.
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

# Bytes of an element, by safetensors' names; those of less than a byte are nobody's weights here.
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
MAX_DIMENSIONS = 8
FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of one of its tensors."""

    path: Path
    form: str  # F32, BF16, U8, ...
    shape: tuple[int, ...]

    def read(self, name: str) -> Tensor:
        """The tensor, a view of the file; that is opened anew, for an open one keeps in memory what was read of it."""
        with open_safetensors(self.path) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of the tensor."""
        with open_safetensors(self.path) as file:
            part: Tensor = file.get_slice(name)[rows]
            return part


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of a file by name, in the order of their bytes; nothing of them is read.

    Raises:
        UserError: no such file, a link that leads out of its directory, or a header that is not exactly right.
    """
    try:
        return _parse(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}): fetch or copy it again") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, views of it.

    Raises:
        UserError: as `read_header`.
    """
    found = read_header(path)
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in found}


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file, open to read.

    Raises:
        UserError: truncated or otherwise not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}): fetch or copy it again") from None


def _parse(path: Path) -> dict[str, TensorHeader]:
    with open(resolve_file(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_JSON):
            raise ValueError(f"no safetensors file: a header of {length:,} bytes, where the file has {size:,}")
        table = parse_json(file.read(length), unique=True)
    if not isinstance(table, dict):
        raise ValueError("its header is not a table")
    notes = table.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("its __metadata__ is not a table of texts")
    headers, end = {}, 0
    for start, stop, name, form, shape in sorted(_entry(name, said) for name, said in table.items()):
        if start != end:
            raise ValueError(f"{name!r:.60} begins at byte {start:,}, where {end:,} comes next")
        headers[name], end = TensorHeader(path, form, shape), stop
    if end != size - 8 - length:
        raise ValueError(f"its tensors have {end:,} bytes, and the file has {size - 8 - length:,} for them")
    return headers


def _entry(name: str, said: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(first byte, the byte behind the last, name, form, shape) of a tensor, if all that fits together."""
    if not isinstance(said, dict) or said.keys() != FIELDS or not name.isprintable():
        raise ValueError(f"{name!r:.60}: expected dtype, shape and data_offsets of it")
    form, shape, place = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(form, str) or form not in SIZES:
        raise ValueError(f"{name!r:.60}: its type is {form!r:.20}")
    if not isinstance(shape, list) or not isinstance(place, list) or len(shape) > MAX_DIMENSIONS or len(place) != 2:
        raise ValueError(f"{name!r:.60}: expected a shape and two places")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in shape + place):
        raise ValueError(f"{name!r:.60}: a size or place is no whole number of 64 bits")
    start, stop = place
    if math.prod(shape) * SIZES[form] != stop - start:
        raise ValueError(f"{name!r:.60}: {shape!r:.60} of {form} does not take the bytes {start:,} to {stop:,}")
    return start, stop, name, form, tuple(shape)


Tensors = dict[str, dict[str, Tensor]]  # file name without suffix -> named tensors
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # the tensors of a file: dtype and shape by name
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def encode_safetensors(specs: Specs, read: Callable[[str], Tensor | Iterable[Tensor]]) -> Iterator[bytes | memoryview]:
    """Tensors in the safetensors format, one at a time: 8 bytes of header size, JSON header, raw data.

    Args:
        specs: name -> (dtype, shape) of every tensor of the file.
        read: gives a tensor by name, or its rows some at a time; called once each, and only one is held.
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
    return write_file(
        path, encode_safetensors({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors.__getitem__)
    )
