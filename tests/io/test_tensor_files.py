"""The reader of safetensors headers, against the library; what it refuses is in hostile.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hostile import HEADERS
from safetensors import safe_open
from safetensors.torch import save_file

from nanoft import UserError
from nanoft.io.tensor_files import SIZES, load_tensors, read_header

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
        assert list(found) == file.offset_keys()
    for name, tensor in load_tensors(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor.view(torch.uint8), TENSORS[name].view(torch.uint8)) if tensor.dim() else True
        assert torch.equal(found[name].read(name).float(), TENSORS[name].float())


def test_an_empty_file_of_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors") == {}


@pytest.mark.parametrize("form", SIZES)
def test_the_size_of_every_type_is_the_librarys(form: str, tmp_path: Path) -> None:
    header = f'{{"w":{{"dtype":"{form}","shape":[3],"data_offsets":[0,{3 * SIZES[form]}]}}}}'.encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3 * SIZES[form]))
    assert read_header(path)["w"].shape == (3,)
    with safe_open(path, framework="np") as file:
        assert file.get_slice("w").get_dtype() == form


def test_what_the_library_lets_pass(tmp_path: Path) -> None:
    """The reason why there is a reader of our own: a name that appears twice."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS["a name twice"][0])
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["w"]
    with pytest.raises(UserError, match="'w' appears twice"):
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
