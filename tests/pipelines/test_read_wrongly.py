"""A text encoder that does not hold what its file does is an error, not a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import mole_diffusion
from mole_diffusion import MoLEStableDiffusionPipeline
from mole_diffusion.loading import LoadingError
from mole_diffusion.pipelines.read_wrongly import refuse_random_text_encoders
from tests.tiny import tiny_components
from tests.tiny.dits import MADE, tiny_dit


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
        refuse_random_text_encoders({"text_encoder": other})
    # One that the caller gives is theirs, whatever the folder says.
    given = MoLEStableDiffusionPipeline.from_pretrained(tmp_path, text_encoder=other)
    assert given.text_encoder is other
