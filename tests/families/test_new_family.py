"""A family that nobody described is refused by name; and what adding one takes: two classes, and one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel

from mole_diffusion import families
from mole_diffusion.errors import MoLEError
from mole_diffusion.families import Architecture, Family
from mole_diffusion.families.base import Text
from mole_diffusion.families.flux import FluxTransformer
from mole_diffusion.families.t5 import T5
from mole_diffusion.pipelines import MoLEPipelineMixin
from tests.families.contract import Case, PipelineContract, RegionContract, StepContract, draw
from tests.tiny.dits import SIZE, WIDTH, tiny_parts

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own use of it


class ChromaTransformer(FluxTransformer):
    """Chroma's, which is FLUX.1's without the Linears of its modulation: a small network makes all of that."""

    classes = ("ChromaTransformer2DModel",)
    vectors = frozenset({"time_text_embed", "distilled_guidance_layer"})
    order = (*FluxTransformer.order, "distilled_guidance_layer")


class Chroma(Family):
    """A transformer of two streams, then of one; T5 reads the text."""

    name = "chroma"
    title = "Chroma"
    denoiser = "transformer"
    architectures: ClassVar[dict[str, Architecture]] = {"transformer": ChromaTransformer(), "text_encoder": T5()}
    texts = (Text(limit=("max_sequence_length", 512)),)


class MoLEChromaPipeline(MoLEPipelineMixin, ChromaPipeline):
    """`diffusers.ChromaPipeline` with LoRAs composed; see `MoLEPipelineMixin`."""


def chroma() -> dict[str, Any]:
    """The components of a small one."""
    parts = tiny_parts("flux")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    return {
        "scheduler": parts["scheduler"],
        "vae": parts["vae"],
        "text_encoder": parts["text_encoder_2"],
        "tokenizer": parts["tokenizer_2"],
        "transformer": transformer.eval(),
    }


def test_it_is_refused_by_name_as_long_as_nobody_describes_it() -> None:
    pipe = MoLEChromaPipeline(**chroma())
    with pytest.raises(MoLEError, match=r"transformer \(ChromaTransformer2DModel\) is of no family.*FLUX\.1"):
        pipe.load_loras({"cat": {}})


CALL = {"height": SIZE, "width": SIZE, "max_sequence_length": 32, "guidance_scale": 1.0}


class TestDescribed(PipelineContract, RegionContract, StepContract):
    case = Case(MoLEChromaPipeline, ChromaPipeline, chroma, CALL, scale="joint_attention_kwargs")

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def described(cls) -> Iterator[None]:
        """As its file in `mole_diffusion/families/` would do it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(families, "FAMILIES", (*families.FAMILIES, Chroma()))
            patch.setattr(families, "ARCHITECTURES", [*families.ARCHITECTURES, ChromaTransformer()])
            yield

    def test_it_takes_no_prompts_of_regions_until_it_says_where_they_go(self, pipe: Any) -> None:
        pipe.set_composition("masks")
        regions = {"cat": {"region": (0, 0, 0.5, 1), "prompt": "a cat asleep"}}
        with pytest.raises(MoLEError, match=r"where further prompts of Chroma go \(`together` of its family\)"):
            draw(self.case, pipe, regions=regions)
