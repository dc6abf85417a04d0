"""Safetensors files: the header is looked at first, values are read when they are asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mole_diffusion.errors import MoLEError, printable
from mole_diffusion.reading import regular_size

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# Far beyond any adapter that was ever published; a file that goes beyond is damaged, or made to do harm.
LARGEST_FILE, LARGEST_HEADER, MOST_TENSORS, LONGEST_NAME = 16 * 2**30, 25 * 2**20, 50_000, 1_000

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class TensorFileError(MoLEError):
    """What is wrong with a file of tensors, in two parts: the caller knows the file's name and its kind.

    Attributes:
        problem: What was found.
        remedy: What the user can do.
        pickle: Whether it is a pickle, which somebody may want to convert.
    """

    def __init__(self, problem: str, remedy: str = "Download or save it again.", pickle: bool = False) -> None:
        super().__init__(f"{problem}. {remedy}")
        self.problem = problem
        self.remedy = remedy
        self.pickle = pickle


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFile:
    """One safetensors file.

    Args:
        path: The file. Its header is read and checked at once, without its tensors.

    Attributes:
        entries: Kind and shape of every tensor, by name.
        metadata: Text entries of the header.

    Raises:
        TensorFileError: It is no regular file, a pickle, truncated, larger than any adapter, or no safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            size = regular_size(path)
        except MoLEError as error:
            raise TensorFileError(str(error), "Check the path.") from None
        if self.path.suffix.lower() in PICKLE_SUFFIXES:
            raise _pickle()
        try:
            with open(self.path, "rb") as file:
                beginning = file.read(64)
        except OSError as error:
            raise TensorFileError(f"cannot be opened ({error.strerror or error})", "Check the path.") from None
        _check_beginning(beginning, size)
        try:
            # The library checks that the tensors lie one after the other and fill the file to its end.
            with safe_open(self.path, framework="pt") as file:
                names = list(file.keys())
                _check_names(names)
                slices = {name: file.get_slice(name) for name in names}
                self.entries = {name: _entry(name, part.get_dtype(), part.get_shape()) for name, part in slices.items()}
                self.metadata: Mapping[str, str] = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise _damaged(error) from None

    @cached_property
    def _contents(self) -> tuple[dict[str, Tensor], str]:
        try:
            data = self.path.read_bytes()
            tensors = safetensors.torch.load(data)
        except (SafetensorError, OSError) as error:
            raise _damaged(error) from None
        if {name: TensorEntry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != self.entries:
            raise TensorFileError("changed while it was read", "Try again when it is written.")
        return tensors, hashlib.sha256(data).hexdigest()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors as stored, by name; the file is read at the first use, and only then."""
        return self._contents[0]

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes that `tensors` come from."""
        return self._contents[1]


def _check_beginning(beginning: bytes, size: int) -> None:
    if not size:
        raise TensorFileError("an empty file")
    if beginning.startswith(b"version https://git-lfs"):
        raise TensorFileError("a Git LFS pointer, not the weights", "Run `git lfs pull` where it was cloned.")
    header = int.from_bytes(beginning[:8], "little")
    if beginning[8:9] != b"{":  # asked before the magic bytes: a safetensors file may start with the size 0x0280
        if beginning.startswith(PICKLE_MAGIC):
            raise _pickle()
        raise TensorFileError("not a safetensors file", "Save it as safetensors; other formats are not read.")
    if header > size - 8:
        raise TensorFileError("a truncated or damaged safetensors file (its header goes beyond its end)")
    for what, found, most in (("file", size, LARGEST_FILE), ("header", header, LARGEST_HEADER)):
        if found > most:
            raise TensorFileError(f"a {what} of {found:,} bytes; at most {most:,} are read", "Check what it is.")


def _check_names(names: list[str]) -> None:
    if len(names) > MOST_TENSORS:
        raise TensorFileError(f"{len(names):,} tensors; at most {MOST_TENSORS:,} are read", "Check what it is.")
    if too_long := next((name for name in names if len(name) > LONGEST_NAME), None):
        raise TensorFileError(
            f"a tensor with a name of {len(too_long):,} characters, '{printable(too_long, 60)}'", "Check what it is."
        )


def _entry(name: str, dtype: str, shape: list[int]) -> TensorEntry:
    if dtype not in DTYPES:
        raise TensorFileError(
            f"values of type {dtype}, which are quantised or no plain numbers: '{printable(name, 100)}'",
            "Save it in floating point, such as bfloat16.",
        )
    return TensorEntry(DTYPES[dtype], tuple(shape))


def _damaged(error: Exception) -> TensorFileError:
    return TensorFileError(f"a truncated or damaged safetensors file ({printable(str(error))})")


def _pickle() -> TensorFileError:
    return TensorFileError(
        "a pickle, which can run any code when opened, or another archive",
        "Convert it where you trust it: `safetensors.torch.save_file("
        "torch.load(path, map_location='cpu', weights_only=True), 'weights.safetensors')`.",
        pickle=True,
    )
