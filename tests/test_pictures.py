"""The reader of pictures: what people see is what is read, and what cannot be read is named."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from mole_diffusion.cli import inputs
from mole_diffusion.errors import MoLEError
from mole_diffusion.metrics.pictures import picture_tensors
from mole_diffusion.pictures import as_seen, picture_files, read_picture, read_pictures
from mole_diffusion.training.gates.references import _as_tensor
from mole_diffusion.training.lora.data import groups_by_size

RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (4, 1))


def scene(width: int = 5, height: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> Any:
    return np.asarray(image).astype(int)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(array: np.ndarray, colour: int, extra: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel, big-endian as the format wants it; colour 0 is grey, 2 RGB, 4 grey with alpha."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def retagged(tiff: bytes, tag: int, value: int) -> bytes:
    """A TIFF as Pillow writes it, with another value of a tag."""
    start = struct.unpack("<I", tiff[4:8])[0] + 2
    entries = range(start, start + 12 * struct.unpack("<H", tiff[start - 2 : start])[0], 12)
    (place,) = (entry for entry in entries if struct.unpack("<H", tiff[entry : entry + 2])[0] == tag)
    return tiff[: place + 2] + struct.pack("<HII", 4, 1, value) + tiff[place + 12 :]


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize(
    ("tag", "value"), [(257, 2_000_000), (256, 9), (278, 1)], ids=["rows", "columns", "rows of its one strip"]
)
def test_a_tiff_that_holds_less_than_its_header_says_is_named(tmp_path: Path, mode: str, tag: int, value: int) -> None:
    whole = io.BytesIO()
    (Image.fromarray(RAMP[:, :8]) if mode == "I;16" else scene(8, 4).convert(mode)).save(whole, "TIFF")
    assert as_seen(Image.open(whole)).size == (8, 4)
    broken = retagged(whole.getvalue(), tag, value)
    (tmp_path / "a.tif").write_bytes(broken)
    with pytest.raises(MoLEError, match=r"a\.tif cannot be read as a picture: .*(speaks of .* holds|truncated)"):
        read_picture(tmp_path / "a.tif")
    with pytest.raises(MoLEError, match=r"speaks of .* holds|truncated"):
        as_seen(Image.open(io.BytesIO(broken)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK"])
def test_a_tiff_of_channels_one_after_another_holds_all_of_them(mode: str) -> None:
    one = io.BytesIO()
    scene(8, 4).convert(mode).save(one, "TIFF")
    with pytest.raises(MoLEError, match=rf"speaks of {32 * len(mode)} values, and it holds 32\."):
        as_seen(Image.open(io.BytesIO(retagged(one.getvalue(), 284, 2))))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    block = scene(2, 3).resize((32, 48), Image.Resampling.NEAREST)
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    block.save(tmp_path / f"a{suffix}", exif=exif, **options)
    tagged = block.copy()
    tagged.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(tagged)
    seen = read_picture(tmp_path / f"a{suffix}")
    assert seen.size == expected.size == ((32, 48) if orientation < 5 else (48, 32))
    assert np.abs(pixels(seen) - pixels(expected)).max() <= (60 if suffix == ".jpg" else 0)
    assert np.abs(pixels(seen) - pixels(expected)).mean() < 3
    assert as_seen(seen).tobytes() == seen.tobytes()  # not turned twice


def test_damaged_metadata_does_not_turn_or_lose_a_picture(tmp_path: Path) -> None:
    scene().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert read_picture(tmp_path / "a.png").tobytes() == scene().tobytes()


def test_deep_pictures_are_scaled(tmp_path: Path) -> None:
    wanted = np.rint(RAMP[0] / 257)
    (tmp_path / "grey.png").write_bytes(png(RAMP, 0))
    (tmp_path / "rgb.png").write_bytes(png(np.stack([RAMP] * 3, axis=2), 2))
    (tmp_path / "alpha.png").write_bytes(png(np.stack([RAMP, np.full_like(RAMP, 65535)], axis=2), 4))
    Image.fromarray(RAMP).save(tmp_path / "grey.tif")
    (tmp_path / "grey.pgm").write_bytes(b"P5 64 4 65535\n" + RAMP.astype(">u2").tobytes())
    Image.fromarray(RAMP).save(tmp_path / "white-is-zero.tif", tiffinfo={262: 0})
    for file in picture_files(tmp_path):
        seen = pixels(read_picture(file))
        expected = 255 - wanted if file.name == "white-is-zero.tif" else wanted
        assert np.abs(seen[0, :, 0] - expected).max() <= 1, file.name
        assert (seen == seen[:1, :, :1]).all()


def test_a_depth_without_a_white_is_refused(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "integer.tif")
    for name, kind in (("float.tif", "floating-point"), ("integer.tif", "integers of 32 bits")):
        with pytest.raises(MoLEError, match=rf"{name} cannot be read as a picture: it holds {kind}.*Save it with 8"):
            read_picture(tmp_path / name)


def test_what_is_clear_is_white_and_not_what_lies_below(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    layer.putpixel((1, 0), (0, 0, 0, 0))
    layer.save(tmp_path / "rgba.png")
    layer.convert("LA").save(tmp_path / "la.png")
    layer.save(tmp_path / "a.webp", lossless=True, exact=True)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "palette.gif", transparency=1)
    layer.convert("RGB").save(tmp_path / "key.png", transparency=(0, 0, 0))
    (tmp_path / "deep.png").write_bytes(png(np.array([[20000, 0]], np.uint16), 0, chunk(b"tRNS", struct.pack(">H", 0))))
    for file in picture_files(tmp_path):
        assert read_picture(file).getpixel((1, 0)) == (255, 255, 255), file.name
        assert read_picture(file).getpixel((0, 0)) != (255, 255, 255), file.name
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert as_seen(half).getpixel((0, 0)) == (127, 127, 127)
    assert as_seen(half.convert("RGBa")).getpixel((0, 0)) == (127, 127, 127)
    assert as_seen(half.convert("LA").convert("La")).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("packed", [True, False])
def test_long_texts_are_no_pixels(tmp_path: Path, packed: bool) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=packed)
    info.add_itxt("more", "y" * 2_000_000, zip=True)
    scene().save(tmp_path / "a.png", pnginfo=info)
    assert read_picture(tmp_path / "a.png").tobytes() == scene().tobytes()


def test_files_of_a_folder_are_read_or_named_in_natural_order(tmp_path: Path) -> None:
    for name in ("10.PNG", "2.png", "1.jfif", "b.tiff", "a.gif", "img2.bmp", "IMG1.ppm", "03.webp", "no-ending"):
        scene(8, 8).save(tmp_path / name, format={"1.jfif": "JPEG", "no-ending": "PNG"}.get(name))
    (tmp_path / "z.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for name in (".DS_Store", "._2.png", "2.txt", "metadata.jsonl", "README.md", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "inside").mkdir()
    names = [file.name for file in picture_files(tmp_path)]
    readable = ["1.jfif", "2.png", "03.webp", "10.PNG", "a.gif", "b.tiff", "IMG1.ppm", "img2.bmp", "no-ending"]
    assert [name for name in names if name in readable] == readable
    assert sorted(set(names) - set(readable)) == ["gone.png", "z.heic"]
    for name in readable:
        assert read_picture(tmp_path / name).size == (8, 8)
    with pytest.raises(MoLEError, match=r"gone\.png cannot be read as a picture: no such file"):
        read_pictures(tmp_path)
    (tmp_path / "gone.png").unlink()
    with pytest.raises(
        MoLEError, match=r"--images .*z\.heic cannot be read as a picture: it is no picture, or of a kind"
    ):
        inputs.read_pictures("--images", tmp_path)
    with pytest.raises(MoLEError, match="no picture in this folder"):
        picture_files(tmp_path / "inside")
    with pytest.raises(MoLEError, match="there is no such folder"):
        picture_files(tmp_path / "nowhere")
    for name in ("a" * 300, "a\0b"):  # the system itself refuses these
        with pytest.raises(MoLEError, match=r"cannot be read|there is no such folder"):
            picture_files(tmp_path / name)
        with pytest.raises(MoLEError, match="cannot be read as a picture: cannot be opened"):
            read_picture(tmp_path / name)
    (tmp_path / "inside" / "deeper").mkdir()
    with pytest.raises(MoLEError, match="Folders inside are not looked into: deeper"):
        picture_files(tmp_path / "inside")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(MoLEError, match=r"a\.png cannot be read as a picture: a pipe, not a file"):
        read_pictures(tmp_path)


def test_what_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(20 * 2**30)  # takes no space
    with pytest.raises(MoLEError, match=r"a\.png is larger than 1024 MiB"):
        read_picture(tmp_path / "a.png")


def test_postscript_is_no_picture_whatever_its_ending(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(MoLEError, match=r"a\.png cannot be read as a picture: it is PostScript, a program"):
        read_picture(tmp_path / "a.png")


def test_training_references_and_measuring_see_the_same(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    layer = scene(8, 8).convert("RGBA")
    layer.putalpha(100)
    layer.save(tmp_path / "a.png", exif=exif)
    seen = torch.from_numpy(pixels(read_picture(tmp_path / "a.png"))).permute(2, 0, 1).float() / 255
    with Image.open(tmp_path / "a.png") as image:
        trained, reference, measured = (
            groups_by_size([image], 8, 8)[0][1][0] / 2 + 0.5,
            _as_tensor(image)[0],
            picture_tensors(image)[0],
        )
    for given_to in (trained, reference, measured):
        torch.testing.assert_close(given_to, seen, rtol=0, atol=1e-6)


FORMATS = [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("GIF", {}), ("PPM", {}), ("WEBP", {"lossless": True}), ("JPEG", {})]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6)), max_size=4), st.data())
def test_damaged_files_are_a_picture_or_our_error(tmp_path_factory: Any, form: Any, damage: Any, data: Any) -> None:
    buffer = io.BytesIO()
    scene(7, 9).save(buffer, format=form[0], **form[1])
    broken = bytearray(buffer.getvalue())
    for place, new in damage:
        broken[place : place + len(new)] = new
    broken = broken[: data.draw(st.integers(0, len(broken)))]
    file = tmp_path_factory.getbasetemp() / "damaged.png"
    file.write_bytes(broken)
    try:
        outcome = read_picture(file).mode
    except MoLEError as error:
        outcome = str(error)
    assert outcome == "RGB" or "damaged.png cannot be read as a picture" in outcome


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"]), st.integers(0, 2**32))
def test_whatever_the_mode_it_is_what_pillow_shows_on_white(mode: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        values = rng.integers(0, 65536, (3, 4), dtype=np.uint16)
        assert np.abs(pixels(as_seen(Image.fromarray(values)))[..., 1] - values / 257).max() <= 0.5
        return
    image = Image.fromarray(rng.integers(0, 256, (3, 4, 4), dtype=np.uint8), "RGBA").convert(mode)
    rgba = pixels(image.convert("RGBA"))
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(as_seen(image)) - expected).max() <= 1
