"""A model with its card, and a Space around it, ready to upload, from gates or the settings of a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .. import __version__
from ..drawing.as_python import as_python
from ..drawing.settings import TOYBOX, LoRASettings, PictureSettings
from ..errors import MoLEError
from ..files import atomic_folder, file_name, try_folder, write_json
from ..gating.folder import read_gates
from ..lora import inspect_lora

GATES = ("config.json", "diffusion_pytorch_model.safetensors")
BESIDE = ("README.md", "training.json", "curves.png", "gates.png", "samples.png")
SETTINGS = "settings.json"
APP = f'''"""A page with this folder's LoRAs and settings, as `mole space` wrote it."""

import json
from dataclasses import replace
from pathlib import Path

from mole_diffusion.app.serve import serve
from mole_diffusion.drawing.settings import PictureSettings

HERE = Path(__file__).resolve().parent
begin = PictureSettings.from_dict(json.loads((HERE / "{SETTINGS}").read_text(encoding="utf-8")))
loras = tuple(replace(lora, file=str(HERE / lora.file)) for lora in begin.loras)
begin = replace(begin, gates=begin.gates and str(HERE / begin.gates), loras=loras)

if __name__ == "__main__":
    serve([HERE], host="0.0.0.0", port=7860, begin=begin)
'''


def write_space(settings: PictureSettings, out: str | os.PathLike[str]) -> Path:
    """Writes a folder that is a Space, and in it `model`, a repository of its own: LoRAs, gates if any, and their card.

    Args:
        settings: What the page begins with. `gates`, if any, are a folder as `train_gates` leaves it.
        out: Where to; missing, or empty.

    Raises:
        MoLEError: A LoRA cannot be read, or is another file than the one that the settings mean; gates are missing or
            are not for these LoRAs; the base is not one that a Space can fetch; or `out` holds something.
    """
    settings = PictureSettings.from_dict(settings.to_dict())  # the page reads them so, and says what it does not take
    target, names = Path(out), [lora.name for lora in settings.loras]
    if not names:
        raise MoLEError("a Space needs LoRAs, and these settings have none. Draw with one, or more.")
    if settings.base != TOYBOX and (Path(settings.base).exists() or settings.base.count("/") != 1):
        raise MoLEError(f"a Space fetches its base, and {settings.base} is no Hub id such as owner/name.")
    if settings.gates is not None:
        _check_gates(Path(settings.gates), names)
    for lora in settings.loras:
        found = inspect_lora(lora.path)  # which says what is wrong with it
        if lora.sha256 and lora.sha256 != found.sha256:
            raise MoLEError(f"{Path(lora.path).name} is another file than the one that {lora.name} was drawn with.")
    try_folder(target)
    if target.is_dir() and any(target.iterdir()):
        raise MoLEError(f"{target} is not empty. Choose another folder.")
    with atomic_folder(target) as folder:
        _fill(folder, settings)
    return target


def _fill(folder: Path, settings: PictureSettings) -> None:
    """Writes the Space into an empty folder."""
    model = folder / "model"
    (model / "loras").mkdir(parents=True)
    loras: list[LoRASettings] = []
    for number, lora in enumerate(settings.loras, start=1):
        file = f"model/loras/{number}-{file_name(lora.name)}.safetensors"
        (folder / file).write_bytes(Path(lora.path).read_bytes())
        loras.append(replace(lora, file=file))
    begin = replace(settings, loras=tuple(loras), device="cpu", dtype="float32")
    texts = {
        folder / "README.md": _card([lora.name for lora in loras]),
        folder / "requirements.txt": f"mole-diffusion[app]=={__version__}\n",
        folder / "app.py": APP,
    }
    if settings.gates is None:
        texts[model / "README.md"] = _model_card(begin)
    else:
        begin = replace(begin, gates="model")
        for name in (*GATES, *BESIDE):
            if (Path(settings.gates) / name).is_file():
                (model / name).write_bytes((Path(settings.gates) / name).read_bytes())
    write_json(folder / SETTINGS, begin.to_dict())
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def _check_gates(folder: Path, names: Sequence[str]) -> None:
    missing = [name for name in GATES if not (folder / name).is_file()]
    if missing:
        raise MoLEError(f"{folder} has no {missing[0]}. Give a folder as `mole train-gates` or `save_gates` writes it.")
    own = [lora["name"] for lora in read_gates(folder).settings["loras"]]
    if own != list(names):
        raise MoLEError(f"these gates are for {', '.join(own)}, in that order; given are {', '.join(names)}.")


def _card(names: Sequence[str]) -> str:
    title = json.dumps(" + ".join(names), ensure_ascii=False)
    return f"---\ntitle: {title}\nsdk: gradio\napp_file: app.py\n---\n\nDraws {' + '.join(names)} in one picture.\n"


def _model_card(settings: PictureSettings) -> str:
    """Of LoRAs without gates: what draws a picture with them."""
    base = "" if settings.base == TOYBOX else f"base_model: {json.dumps(settings.base)}\n"
    title = " + ".join(lora.name for lora in settings.loras)
    from_here = replace(
        settings, loras=tuple(replace(lora, file=lora.file.removeprefix("model/")) for lora in settings.loras)
    )
    return (
        f"---\nlibrary_name: mole_diffusion\n{base}tags:\n- lora\n---\n\n# {title}\n\n"
        f"LoRAs that are drawn with together. In this folder:\n\n```python\n{as_python(from_here)}```\n"
    )
