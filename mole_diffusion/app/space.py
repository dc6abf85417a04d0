"""A model with its card, and a Space around it, ready to upload, from a folder of gates."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import __version__
from ..drawing.settings import TOYBOX, LoRASettings, PictureSettings
from ..errors import MoLEError
from ..files import atomic_path, file_name, try_folder, write_json
from ..lora import inspect_lora
from ..reading import parse_json, read_text

GATES = ("config.json", "diffusion_pytorch_model.safetensors")
BESIDE = ("README.md", "training.json", "curves.png", "gates.png", "samples.png")
SETTINGS = "settings.json"
APP = f'''"""A page with this folder's gates and LoRAs, as `mole space` wrote it."""

import json
from dataclasses import replace
from pathlib import Path

from mole_diffusion.app.serve import serve
from mole_diffusion.drawing.settings import PictureSettings

HERE = Path(__file__).resolve().parent
begin = PictureSettings.from_dict(json.loads((HERE / "{SETTINGS}").read_text(encoding="utf-8")))
loras = tuple(replace(lora, file=str(HERE / lora.file)) for lora in begin.loras)
begin = replace(begin, gates=str(HERE / begin.gates), loras=loras)

if __name__ == "__main__":
    serve([HERE], host="0.0.0.0", port=7860, begin=begin)
'''


def write_space(settings: PictureSettings, out: str | os.PathLike[str]) -> Path:
    """Writes a folder that is a Space, and in it `model`, a repository of its own: gates, LoRAs and their card.

    Args:
        settings: What the page begins with; its `gates` are a folder as `train_gates` leaves it.
        out: Where to; missing, or empty.

    Raises:
        MoLEError: Gates are missing or are not for these LoRAs; the base is not one that a Space can fetch; or `out`
            holds something.
    """
    source, target = Path(settings.gates or ""), Path(out)
    missing = [name for name in GATES if not (source / name).is_file()]
    if settings.gates is None or missing:
        raise MoLEError(f"{source} has no {missing[0]}. Give a folder as `mole train-gates` or `save_gates` writes it.")
    config = parse_json(read_text(source / GATES[0]))
    names, given = [lora["name"] for lora in config["loras"]], [lora.name for lora in settings.loras]
    if names != given:
        raise MoLEError(f"these gates are for {', '.join(names)}, in that order; given are {', '.join(given)}.")
    if settings.base != TOYBOX and (Path(settings.base).exists() or settings.base.count("/") != 1):
        raise MoLEError(f"a Space fetches its base, and {settings.base} is no Hub id such as owner/name.")
    try_folder(target)
    if target.is_dir() and any(target.iterdir()):
        raise MoLEError(f"{target} is not empty. Choose another folder.")
    loras: list[LoRASettings] = []
    for lora in settings.loras:
        inspect_lora(lora.path)  # which says what is wrong with it
        file = f"model/loras/{file_name(lora.name)}.safetensors"
        _copy(Path(lora.path), target / file)
        loras.append(replace(lora, file=file))
    for name in (*GATES, *BESIDE):
        if (source / name).is_file():
            _copy(source / name, target / "model" / name)
    begin = replace(settings, gates="model", loras=tuple(loras), device="cpu", dtype="float32")
    write_json(target / SETTINGS, begin.to_dict())
    _write(target / "README.md", _card(names))
    _write(target / "requirements.txt", f"mole-diffusion[app]=={__version__}\n")
    _write(target / "app.py", APP)
    return target


def _card(names: Sequence[str]) -> str:
    title = json.dumps(" + ".join(names), ensure_ascii=False)
    return f"---\ntitle: {title}\nsdk: gradio\napp_file: app.py\n---\n\nDraws {' + '.join(names)} in one picture.\n"


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        temporary.write_bytes(source.read_bytes())


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
