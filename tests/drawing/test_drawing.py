"""A picture tells how it was made, and what it tells draws it again, to the bit."""

from __future__ import annotations

import base64
import json
import os
import shlex
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mole_diffusion import toybox
from mole_diffusion.composition import COMPOSITIONS
from mole_diffusion.drawing import methods, painted, png
from mole_diffusion.drawing.as_command import as_command
from mole_diffusion.drawing.as_python import as_python
from mole_diffusion.drawing.settings import LoRASettings, PictureSettings
from mole_diffusion.errors import MoLEError
from mole_diffusion.methods import options
from tests.command import mole, picture

PROMPT = 'a photo of a <v1> cat, a <v2> boot and "something" on sand'


def settings(**changes: Any) -> PictureSettings:
    """One of everything that settings can hold, in two quick steps."""
    mask = Image.new("L", (8, 8))
    mask.paste(255, (4, 0, 8, 8))
    given: dict[str, Any] = {
        "prompt": PROMPT,
        "loras": (
            LoRASettings("cat", "toybox:cat", strength=0.9, triggers=("<v1> cat",)),
            LoRASettings("shoe", str(toybox.lora_path("boot")), triggers=("<v2> boot",)),
            LoRASettings("fish", "toybox:fish", on=False, role="style"),
        ),
        "composition": "masks",
        "composition_options": {"own_words": 2.0, "smoothing": 5},
        "regions": {"cat": ((0.0, 0.0, 0.5, 1.0),), "shoe": (painted.as_text(mask), (0.5, 0.5, 1.0, 1.0))},
        "negative_prompt": "a car",
        "height": 72,
        "width": 64,
        "steps": 2,
        "scheduler": "DDPMScheduler",
        "guidance_scale": 3.0,
        "seed": 11,
    }
    return PictureSettings(**{**given, **changes})


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of `mole generate`, by the very command line of its settings."""
    out = tmp_path_factory.mktemp("drawn") / "it.png"
    done = mole(*shlex.split(as_command(settings()))[1:], "--out", out)
    assert done.exit_code == 0, done.output
    return out


def test_a_picture_of_the_command_line_has_the_settings_that_drew_it(drawn: Path) -> None:
    told = png.read_settings(drawn)
    hashed = [replace(lora, sha256="") for lora in told.loras]
    assert all(len(lora.sha256) == 64 for lora in told.loras)
    # A file of the toybox is the toybox's wherever it was named.
    shoe = replace(settings().loras[1], file="toybox:boot")
    assert replace(told, loras=()) == replace(settings(), loras=())
    assert hashed == [settings().loras[0], shoe, settings().loras[2]]


def test_the_python_call_draws_the_same_picture(drawn: Path) -> None:
    with Image.open(drawn) as image:
        script = image.text[png.PYTHON]  # type: ignore[attr-defined]
    assert script == as_python(png.read_settings(drawn))
    made: dict[str, Any] = {}
    exec(script, made)
    assert made["image"].tobytes() == picture(drawn).tobytes()


def test_of_several_pictures_each_knows_which_it_is(tmp_path: Path) -> None:
    done = mole(
        *("generate", "--prompt", "a photo of a cat", "--steps", 1, "--num-images", 2, "--out", tmp_path / "it.png")
    )
    assert done.exit_code == 0, done.output
    told = [png.read_settings(tmp_path / f"it-{index}.png") for index in range(2)]
    assert [(own.seed, own.num_images, own.index) for own in told] == [(0, 2, 0), (0, 2, 1)]
    made: dict[str, Any] = {}
    exec(as_python(told[1]), made)
    assert made["image"].tobytes() == picture(tmp_path / "it-1.png").tobytes()


def test_settings_come_back_from_json() -> None:
    full = settings(gates="me/cat+boot", base="./base", base_config="./like", device="cuda", dtype="bfloat16", index=0)
    assert PictureSettings.from_dict(json.loads(json.dumps(full.to_dict()))) == full
    assert PictureSettings("a cat").to_dict() == {"prompt": "a cat"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"promt": "a cat"}, "have no 'promt'; they have prompt, base"),
        ({"prompt": 3}, "`prompt` must be of type str, got 3"),
        ({"steps": 0}, "`steps` must be a whole number from 1"),
        ({"steps": True}, "`steps` must be a whole number from 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite, and at most"),
        ({"guidance_scale": 10**400}, "guidance_scale must be finite, and at most"),
        ({"loras": [{"name": "cat", "file": "a", "strength": 1e300}]}, "strength of cat must be finite, and at most"),
        ({"loras": [{"name": "cat"}]}, "needs a `file`, got None"),
        ({"loras": [{"name": "cat", "file": "a", "role": "king"}]}, "must be one of subject, style, utility"),
        ({"loras": [{"name": "cat", "file": "a"}, {"name": "cat", "file": "b"}]}, "has a name twice"),
        ({"loras": [{"name": "cat", "file": "a", "on": 1}]}, "must be true or false"),
        ({"regions": {"dog": [[0, 0, 1, 1]]}}, "which is none of the LoRAs"),
        ({"loras": [{"name": "cat", "file": "a"}], "regions": {"cat": [[0, 0, 1]]}}, "Give .left, top"),
    ],
)
def test_settings_that_cannot_be_are_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MoLEError, match=message):
        PictureSettings.from_dict({"prompt": "a cat", **change})


def test_pictures_of_others_and_damaged_ones_are_told(tmp_path: Path) -> None:
    file = tmp_path / "it.png"
    Image.new("RGB", (8, 8)).save(file)
    with pytest.raises(MoLEError, match="does not tell how it was made"):
        png.read_settings(file)
    for text, message in (("{", "is not JSON"), ('{"prompt": 3}', "`prompt` must be")):
        texts = PngInfo()
        texts.add_itxt(png.SETTINGS, text)
        Image.new("RGB", (8, 8)).save(file, pnginfo=texts)
        with pytest.raises(MoLEError, match=message):
            png.read_settings(file)
    with pytest.raises(MoLEError, match="a folder, not a file"):
        png.read_settings(tmp_path)
    if hasattr(os, "mkfifo"):  # which opening would wait for
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(MoLEError, match=r"pipe\.png: a pipe, not a file"):
            png.read_settings(tmp_path / "pipe.png")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(MoLEError, match=r"it\.png is no PNG that can be read"):
        png.read_settings(file)


def test_masks_travel_as_text() -> None:
    mask = Image.new("L", (16, 8))
    mask.paste(255, (8, 0, 16, 8))
    assert painted.as_mask(painted.as_text(mask)).tobytes() == mask.tobytes()
    layer = Image.new("RGBA", (16, 8))
    layer.paste((230, 159, 0, 255), (8, 0, 16, 8))
    assert painted.as_mask(painted.as_text(layer)).tobytes() == mask.tobytes()
    for text in ("data:image/png;base64,????", "data:image/png;base64,AAAA", "hello"):
        with pytest.raises(MoLEError, match="a painted mask"):
            painted.as_mask(text)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_small_file_that_stands_for_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(MoLEError, match=r"bomb\.png has 9000 x 9000 pixels"):
        png.read_settings(tmp_path / "bomb.png")
    with pytest.raises(MoLEError, match="a painted mask of 9000 x 9000 pixels is too large"):
        painted.as_mask(painted.PREFIX + base64.b64encode(bomb).decode())


def test_options_of_methods_are_their_plain_arguments() -> None:
    assert options("merge") == {"scale": 0.8}
    assert options("budget") == {}
    assert options("mole") == {}
    assert options("masks")["online"] is False
    assert options("freefuse")["modulation"] == "share"
    for name in COMPOSITIONS:
        assert methods.method(name, options(name)).name == name
    assert methods.method("switch", {"every": 2}).every == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("mask", {}, "there is no composition 'mask'"),
        ("merge", {"scael": 1.0}, "has no option 'scael'; it has scale"),
        ("linear", {"scale": 1.0}, "it has none"),
        ("merge", {"scale": "loud"}, "must be a number, got 'loud'"),
        ("merge", {"scale": True}, "must be a number, got True"),
        ("masks", {"online": 1}, "must be true or false, got 1"),
        ("switch", {"every": 1.5}, "must be a whole number, got 1.5"),
        ("masks", {"modulation": 1}, "must be a word, got 1"),
        ("masks", {"modulation": "loud"}, "`modulation` must be one of"),
        ("switch", {"every": 0}, "`every` must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_told(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(MoLEError, match=message):
        methods.method(name, given)


def test_options_on_the_command_line_need_their_composition() -> None:
    done = mole("generate", "--prompt", "a cat", "--composition-option", "own_words=2")
    assert done.exit_code == 2
    assert "Say of which: --composition masks" in done.output
