"""A text encoder that does not hold what its file does is an error, not a warning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import mole_diffusion
from mole_diffusion import MoLEStableDiffusionPipeline
from mole_diffusion.cli.inspect import read_models
from mole_diffusion.loading import LoadingError
from mole_diffusion.pipelines.modular import MoLEStableDiffusionXLBlocks
from mole_diffusion.pipelines.read_wrongly import refuse_random_weights
from tests.tiny import tiny_components
from tests.tiny.dits import MADE, tiny_dit
from tests.tiny.families import sdxl


@pytest.mark.parametrize(
    ("family", "component"),
    [
        ("flux", "text_encoder"),  # CLIP
        ("flux", "text_encoder_2"),  # T5
        ("qwen_image", "text_encoder"),
        ("flux2", "text_encoder"),  # Mistral
    ],
)
def test_files_whose_names_transformers_does_not_know_are_refused(family: str, component: str, tmp_path: Path) -> None:
    """It only warns, and would draw with random numbers."""
    tiny_dit(family).save_pretrained(tmp_path)
    ours = getattr(mole_diffusion, f"MoLE{MADE[family][0].__name__}")
    ours.from_pretrained(tmp_path)
    file = tmp_path / component / "model.safetensors"
    save_file({f"other.{key}": tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(LoadingError, match=rf"the {component} in .* knows other names .* leaves its weights random"):
        ours.from_pretrained(tmp_path)


def test_a_text_encoder_with_other_weights_than_its_file_is_refused(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    opened = MoLEStableDiffusionPipeline.from_pretrained(tmp_path)
    other = tiny_components(seed=1)["text_encoder"]
    other.name_or_path = opened.text_encoder.name_or_path
    assert Path(other.name_or_path) == tmp_path / "text_encoder"
    with pytest.raises(LoadingError, match=r"text_encoder in .* weights random. Upgrade it: pip install --upgrade"):
        refuse_random_weights({"text_encoder": other})
    # One that the caller gives is theirs, whatever the folder says.
    given = MoLEStableDiffusionPipeline.from_pretrained(tmp_path, text_encoder=other)
    assert given.text_encoder is other


def drop_one(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tensor for key, tensor in tensors.items() if "layer_norm1.bias" not in key and "norm_out.bias" not in key
    }


def rename(tensors: dict[str, Any]) -> dict[str, Any]:
    return {f"other.{key}": tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("component", "damage"),
    [("unet", drop_one), ("unet", rename), ("vae", rename), ("text_encoder", drop_one)],
)
def test_models_whose_files_lack_weights_are_refused(
    pipe: Any, component: str, damage: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path)
    (file,) = (tmp_path / component).glob("*.safetensors")
    save_file(damage(load_file(file)), file, {"format": "pt"})
    lack = rf"the files of the {component} in .* lack \d+ of its \d+ weights, '.*' among them, which would be random"
    with pytest.raises(LoadingError, match=lack):
        MoLEStableDiffusionPipeline.from_pretrained(tmp_path)
    if component == "unet":
        with pytest.raises(LoadingError, match=lack):
            read_models(str(tmp_path))


def test_names_that_older_versions_wrote_are_read(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    older = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    tensors = load_file(file)
    for new, old in older.items():
        tensors = {key.replace(new, old) if ".attentions." in key else key: one for key, one in tensors.items()}
    assert any("query" in key for key in tensors)
    save_file(tensors, file, {"format": "pt"})
    opened = MoLEStableDiffusionPipeline.from_pretrained(tmp_path)
    for key, one in opened.vae.state_dict().items():
        assert torch.equal(one, pipe.vae.state_dict()[key])


def test_a_modular_pipeline_says_so_when_it_draws(tmp_path: Path) -> None:
    StableDiffusionXLPipeline(**sdxl()).save_pretrained(tmp_path)
    (file,) = (tmp_path / "text_encoder_2").glob("*.safetensors")
    save_file(rename(load_file(file)), file, {"format": "pt"})
    modular_pipe = MoLEStableDiffusionXLBlocks().init_pipeline(str(tmp_path))
    modular_pipe.load_components()
    with pytest.raises(LoadingError, match=r"text_encoder_2 in .* leaves its weights random"):
        modular_pipe(prompt="a cat", num_inference_steps=1)
