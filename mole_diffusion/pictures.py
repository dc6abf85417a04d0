"""The one reader of pictures, for training, references, evaluation and benchmark. It gives what people see."""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import MoLEError
from .reading import regular_size

COMPANIONS = frozenset(
    ".txt .caption .json .jsonl .csv .tsv .md .rst .html .xml .yaml .yml .toml .log .ini .db .py .ipynb .sh "
    ".safetensors .npz .npy .pt .lock".split()
)
"""Endings of files that lie beside pictures and are none: captions, tables, notes. All others are read or named."""

_ORIENTATION = 0x0112  # a tag of EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF
_SAMPLES_PER_PIXEL, _PLANES, _CHANNELS_APART = 277, 284, 2
_MOST_BYTES = 1024 * 2**20
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")
_PNG, _NO_PIXELS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def refuse_ending(path: str | os.PathLike[str]) -> None:
    """Raises MoLEError unless a picture can be written under this name: its ending says the format."""
    ending = Path(path).suffix
    if Image.registered_extensions().get(ending.lower()) not in Image.SAVE:
        raise MoLEError(f"{os.fspath(path)}: a picture needs a suffix such as .png, got {ending!r}.")


def picture_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures of a folder in natural order: 2.png before 10.png.

    Whatever its ending, a file is taken for a picture, so that one that cannot be read is named and not left out.
    Left out are hidden files, files of `COMPANIONS`, and what lies in folders inside.

    Raises:
        MoLEError: There is no such folder, or no picture in it.
    """
    path = Path(folder)
    try:
        entries = list(path.iterdir())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character in the name
        raise MoLEError(f"{path}: there is no such folder of pictures.") from None
    except OSError as error:
        raise MoLEError(f"{path}: this folder cannot be read: {error.strerror}.") from None
    visible = [entry for entry in entries if not entry.name.startswith(".")]
    files = [e for e in visible if not e.is_dir() and e.suffix.lower() not in COMPANIONS]
    if not files:
        inside = sorted(entry.name for entry in visible if entry.is_dir())
        hint = f" Folders inside are not looked into: {', '.join(inside[:3])}." if inside else ""
        raise MoLEError(f"{path}: no picture in this folder.{hint} Put .png or .jpg files there.")
    return sorted(files, key=lambda file: natural_order(file.name))


def natural_order(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """A key that sorts names as people do: runs of digits by their number, letters whatever their case."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts], name


def read_picture(file: str | os.PathLike[str]) -> Image.Image:
    """A picture as `as_seen` gives it, read to its end; the first one of an animation.

    Raises:
        MoLEError: There is no such file; or it is cut short, damaged, no picture, or of a kind that cannot be read.
    """
    return _read(Path(file), as_seen)


def read_painted(file: str | os.PathLike[str]) -> Image.Image:
    """A painted mask as it lies in its file, with its transparency, which says what was rubbed out.

    Raises:
        MoLEError: As `read_picture`.
    """
    return _read(Path(file), lambda picture: picture)


def _read(path: Path, seen: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        size = regular_size(path)
    except MoLEError as error:
        raise MoLEError(f"{path} cannot be read as a picture: {error}.") from None
    try:
        if size > _MOST_BYTES:
            raise MoLEError(f"{path} is larger than {_MOST_BYTES // 2**20} MiB, and read whole. Make it smaller.")
        data = path.read_bytes()
    except OSError as error:
        raise MoLEError(f"{path} cannot be read as a picture: {error.strerror or error}.") from None
    try:
        return seen(_decode(data))
    except MoLEError as error:
        raise MoLEError(f"{path} cannot be read as a picture: {error}") from None
    except Image.UnidentifiedImageError:
        raise MoLEError(
            f"{path} cannot be read as a picture: it is no picture, or of a kind that is not known here. "
            "Save it as .png or .jpg, or move it out of the folder."
        ) from None
    except Exception as error:  # damaged data makes the decoders raise what they like
        raise MoLEError(f"{path} cannot be read as a picture: {_why(error)}. Write it again.") from None


def as_seen(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it, RGB with 8 bits: upright, on white where it is transparent.

    Depths of up to 16 bits are scaled, not cut. What is RGB and upright comes out as it is.

    Raises:
        MoLEError: The picture has a depth at which nobody knows what is white: 32-bit integers or floats; or it is a
            TIFF that holds less than its header says.
    """
    if getattr(image, "tile", None):  # not read yet
        _refuse_gaps(image)
    try:
        image.load()  # some formats turn the picture while they read it
    except Exception as error:  # damaged data makes the decoders raise what they like
        raise MoLEError(f"a picture is damaged: {_why(error)}. Write it again.") from None
    turned = _UPRIGHT.get(_orientation(image))
    if image.mode == "RGB" and turned is None and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        layer = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image.convert("RGB")
    if turned is not None:
        image = image.transpose(turned)
    seen = Image.new("RGB", image.size)  # without the orientation, which has been followed
    seen.paste(image)
    return seen


def read_pictures(folder: str | os.PathLike[str]) -> list[Image.Image]:
    """All pictures of a folder.

    Raises:
        MoLEError: As `picture_files` and `read_picture`.
    """
    return [read_picture(file) for file in picture_files(folder)]


def _decode(data: bytes) -> Image.Image:
    if data.startswith(_POSTSCRIPT):  # Pillow hands it to Ghostscript, which would run it
        raise MoLEError("it is PostScript, a program. Save it as .png or .jpg.")
    try:
        picture = Image.open(io.BytesIO(data))
        _refuse_gaps(picture)
        picture.load()
    except ValueError as error:
        # Pillow refuses texts of more than a MiB, as drawing programs write their workflows; they are no pixels.
        if "MAX_TEXT" not in str(error) or not data.startswith(_PNG):
            raise
        picture = Image.open(io.BytesIO(_without_texts(data)))
        picture.load()
    return picture


def _refuse_gaps(picture: Image.Image) -> None:
    """Raises MoLEError where the strips of a TIFF do not fill it: Pillow would leave the rest black, in silence."""
    if picture.format != "TIFF":
        return
    tiles: Any = getattr(picture, "tile", [])
    tags: Any = getattr(picture, "tag_v2", {})
    apart = all(tile[0] == "raw" for tile in tiles) and tags.get(_PLANES) == _CHANNELS_APART
    wanted = picture.width * picture.height * (int(tags.get(_SAMPLES_PER_PIXEL, 1)) if apart else 1)
    filled = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), *_ in tiles)
    if filled < wanted:
        raise MoLEError(f"its header speaks of {wanted} values, and it holds {filled}. Write it again.")


def _without_texts(png: bytes) -> bytes:
    """A PNG without its chunks of text."""
    kept, place = [png[: len(_PNG)]], len(_PNG)
    while place + 8 <= len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        end = place + 12 + length
        if kind not in _NO_PIXELS:
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


def _why(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # viewers show a picture with damaged metadata as it lies there
        return 1


def deep_grey(image: Image.Image) -> np.ndarray:
    """How bright each pixel of a grey picture of more than 8 bits is, in [0, 1], `(h, w)`.

    Raises:
        MoLEError: It has a depth at which nobody knows what is white: 32-bit integers or floats.
    """
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, 16)
    bits = int(bits[0]) if isinstance(bits, tuple) else int(bits)
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not deep or not 8 < bits <= 16:
        kind = "floating-point numbers" if image.mode == "F" else "integers of 32 bits"
        raise MoLEError(f"it holds {kind}, and nobody says which is white. Save it with 8 or 16 bits a channel.")
    levels = np.clip(np.asarray(image).astype(np.float64) / (2**bits - 1), 0, 1)
    return 1 - levels if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else levels


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits, scaled to 8."""
    grey = Image.fromarray(np.rint(deep_grey(image) * 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)))
    return grey
