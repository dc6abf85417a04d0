"""What tests of commands are run on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mole_diffusion.lora import load_lora, save_lora
from tests.composing import NAMES, composing_pipeline, lora_states


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model, three LoRAs, gates for them and some pictures."""
    folder = tmp_path_factory.mktemp("world")
    pipe = composing_pipeline()
    pipe.save_pretrained(folder / "base")
    for name, state in lora_states(pipe).items():
        lora = replace(load_lora(state, pipe.lora_components, name=name), triggers=(name,))
        save_lora(lora, folder / f"{name}.safetensors")
    pipe.load_loras({name: folder / f"{name}.safetensors" for name in NAMES})
    pipe.init_gates()
    pipe.save_gates(folder / "gates")
    (folder / "pictures").mkdir()
    for name, colour in zip(NAMES, ("red", "green", "blue"), strict=True):
        Image.new("RGB", (48, 32), colour).save(folder / "pictures" / f"{name}.png")
    return folder
