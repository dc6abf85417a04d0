"""A text encoder that does not hold what its file does is an error, not a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mole_diffusion import MoLEStableDiffusionPipeline
from mole_diffusion.loading import LoadingError
from mole_diffusion.pipelines.read_wrongly import refuse_random_text_encoders
from tests.tiny import tiny_components


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
