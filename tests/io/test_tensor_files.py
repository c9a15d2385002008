"""Reader and writer of safetensors files, against the library; what the reader refuses is in hostile.py."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hostile import HEADERS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoft import UserError
from nanoft.io.tensor_files import (
    SAFETENSORS_DTYPES,
    encode_safetensors,
    load_tensors,
    read_header,
    write_tensors,
)

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.zeros(0, 4, dtype=torch.bfloat16),
    "d": torch.tensor([True, False]),
    "é": torch.ones(3, dtype=torch.float8_e4m3fn),
}


def test_says_what_the_library_says(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {n: h.form for n, h in found.items()} == {n: part.get_dtype() for n, part in theirs.items()}
        assert {n: list(h.shape) for n, h in found.items()} == {n: part.get_shape() for n, part in theirs.items()}
    content = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    del header["__metadata__"]
    assert list(found) == sorted(header, key=lambda name: header[name]["data_offsets"])
    for name, tensor in load_tensors(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor.view(torch.uint8), TENSORS[name].view(torch.uint8)) if tensor.dim() else True
        assert torch.equal(found[name].read().float(), TENSORS[name].float())


def test_an_empty_file_of_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors") == {}


def test_what_the_library_lets_pass(tmp_path: Path) -> None:
    """The reason for nanoft's own reader: the library accepts duplicate names."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS["a name twice"][0])
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["w"]
    with pytest.raises(UserError, match="'w' appears a second time"):
        read_header(path)


def test_a_link_within_the_hubs_cache(tmp_path: Path) -> None:
    """models--x--y/snapshots/revision/file -> ../../blobs/hash"""
    for name in ("blobs", "snapshots/1234"):
        (tmp_path / name).mkdir(parents=True)
    save_file(TENSORS, tmp_path / "blobs" / "abcd")
    path = tmp_path / "snapshots" / "1234" / "x.safetensors"
    path.symlink_to("../../blobs/abcd")
    assert set(load_tensors(path)) == set(TENSORS)
    path.unlink()
    os.rename(tmp_path / "blobs" / "abcd", tmp_path / "abcd")
    path.symlink_to("../../abcd")
    with pytest.raises(UserError, match="a link that leads out of its directory"):
        read_header(path)


# --- writing


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES, ids=str)
def test_safetensors_reads_what_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    values = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "transposed": torch.arange(12).reshape(3, 4).to(dtype).T,
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 5, dtype=dtype),
        "odd length": torch.ones(3, dtype=torch.uint8),
        "wide": torch.ones(2, dtype=torch.float64),
    }
    noted = write_tensors(tmp_path / "x.safetensors", values)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == values.keys()
    for name, value in values.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert noted == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    header = int.from_bytes(content[:8], "little")
    assert header % 8 == 0
    for entry in json.loads(content[8 : 8 + header]).values():
        if "dtype" in entry:
            width = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1}[entry["dtype"]]
            assert entry["data_offsets"][0] % width == 0, "aligned"
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}, "transformers refuses files without it"


def test_tensors_are_read_one_at_a_time_and_once() -> None:
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return torch.full((2,), float(len(asked)))

    specs = dict.fromkeys("cab", (torch.float32, (2,)))
    pieces = encode_safetensors(specs, read)
    next(pieces)
    assert asked == [], "the header needs no tensor"
    for count, _ in enumerate(pieces, start=1):
        assert len(asked) == count
    assert sorted(asked) == ["a", "b", "c"]
