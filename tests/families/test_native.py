"""Pipelines of every family where diffusers looks for its own: tasks, dtypes, pipelines of one's own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)

import mole_diffusion
from mole_diffusion import MoLEStableDiffusion3Pipeline, pipelines
from mole_diffusion.loading import LoadingError
from mole_diffusion.lora import load_lora, save_lora
from mole_diffusion.pipelines import pipeline_class
from tests.command import mole, picture
from tests.families.contract import lora_state
from tests.tiny import tiny_components
from tests.tiny.families import controlnet, sd3, sdxl

MADE: dict[str, Any] = {"StableDiffusion": tiny_components, "StableDiffusionXL": sdxl, "StableDiffusion3": sd3}


def made(name: str) -> Any:
    beside = {"requires_safety_checker": False} if name == "StableDiffusion" else {}
    parts = MADE[name]()
    if name == "StableDiffusion":
        parts |= {"safety_checker": None, "feature_extractor": None}
    return getattr(mole_diffusion, f"MoLE{name}Pipeline")(**parts, **beside)


@pytest.mark.parametrize("name", MADE)
def test_auto_pipelines_find_the_pipeline_of_another_task_with_its_loras(name: str) -> None:
    pipe = made(name)
    pipe.load_loras({"cat": lora_state(pipe, 0)})
    for auto, task in ((AutoPipelineForImage2Image, "Img2Img"), (AutoPipelineForInpainting, "Inpaint")):
        other = auto.from_pipe(pipe, dtype=torch.float32)
        assert type(other).__name__ == f"MoLE{name}{task}Pipeline"
        assert other.experts is pipe.experts
    back = AutoPipelineForText2Image.from_pipe(other, dtype=torch.float32)
    assert type(back) is type(pipe)
    if name != "StableDiffusion3":
        guided = AutoPipelineForText2Image.from_pipe(pipe, controlnet=controlnet(pipe.unet), dtype=torch.float32)
        assert type(guided).__name__ == f"MoLE{name}ControlNetPipeline"
        assert guided.experts is pipe.experts


def test_a_pipeline_is_opened_as_a_custom_one_and_in_a_dtype(tmp_path: Path) -> None:
    """As docs/families.md says, `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`: a file or a folder."""
    made("StableDiffusionXL").save_pretrained(tmp_path / "base")
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "pipeline.py").write_text(
        "import mole_diffusion\n\n\nclass Composing(mole_diffusion.MoLEStableDiffusionXLPipeline):\n    pass\n"
    )
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "base",
        custom_pipeline=str(tmp_path / "custom"),
        trust_remote_code=True,
        dtype=torch.bfloat16,
    )
    assert isinstance(pipe, mole_diffusion.MoLEStableDiffusionXLPipeline)
    assert pipe.unet.dtype == torch.bfloat16
    pipe.load_loras({"cat": lora_state(pipe, 0)})
    assert set(pipe.experts.matches()["cat"]) == {"unet", "text_encoder", "text_encoder_2"}
    line = tmp_path / "composing.py"
    line.write_text("from mole_diffusion import MoLEStableDiffusionXLPipeline\n")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base", custom_pipeline=str(line), trust_remote_code=True)
    assert type(pipe) is mole_diffusion.MoLEStableDiffusionXLPipeline
    assert DiffusionPipeline.from_pretrained(tmp_path / "base").__class__.__name__ == "StableDiffusionXLPipeline"


def test_every_pipeline_of_diffusers_for_these_tasks_is_here_and_runs_the_contract() -> None:
    ours = {name for name in pipelines.__all__ if name.endswith("Pipeline")}
    for name in ours:
        for task in ("Img2Img", "Inpaint"):
            other = f"{name.removeprefix('MoLE').removesuffix('Pipeline')}{task}Pipeline"
            assert not hasattr(diffusers, other) or f"MoLE{other}" in ours, other
    cases: set[type] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        module = importlib.import_module(f"tests.families.{path.stem}")
        cases |= {one.case.ours for one in vars(module).values() if hasattr(one, "case")}
    assert {getattr(pipelines, name) for name in ours} <= cases


@pytest.mark.parametrize("name", MADE)
def test_a_base_says_which_pipeline_is_for_it(name: str, tmp_path: Path) -> None:
    made(name).save_pretrained(tmp_path)
    found = pipeline_class(tmp_path)
    assert found is getattr(mole_diffusion, f"MoLE{name}Pipeline")
    assert isinstance(found.from_pretrained(tmp_path), found)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ('{"_class_name": "KolorsPipeline"}', "KolorsPipeline"),
        ('{"_class_name": ["a", "b"]}', r"\['a', 'b'\]"),
        ("{}", "_class_name"),
        ("[]", "cannot be loaded"),
        ("{", "cannot be loaded"),
        (None, "cannot be loaded"),
    ],
)
def test_a_base_for_none_of_our_pipelines_is_an_error_that_names_them(
    index: str | None, said: str, tmp_path: Path
) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(LoadingError, match=said):
        pipeline_class(tmp_path)


def test_the_command_line_draws_on_another_family(tmp_path: Path) -> None:
    pipe = made("StableDiffusion3")
    pipe.save_pretrained(tmp_path / "base")
    save_lora(load_lora(lora_state(pipe, 0), pipe.lora_components, name="cat"), tmp_path / "cat.safetensors")
    call = ["generate", "--base", str(tmp_path / "base"), "--lora", f"cat={tmp_path / 'cat.safetensors'}"]
    call += ["--prompt", "a cat", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "picture.png")]
    done = mole(*call)
    assert done.exit_code == 0, done.output
    pipe = MoLEStableDiffusion3Pipeline.from_pretrained(tmp_path / "base")
    pipe.load_loras({"cat": tmp_path / "cat.safetensors"})
    drawn = pipe("a cat", num_inference_steps=2, generator=[torch.Generator().manual_seed(0)]).images[0]
    assert picture(tmp_path / "picture.png").tobytes() == drawn.tobytes()

    refused = mole(*call, "--scheduler", "DDIMScheduler")
    assert refused.exit_code == 2
    assert "FlowMatchEulerDiscreteScheduler" in refused.output
