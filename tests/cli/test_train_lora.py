"""`mole train-lora`."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from mole_diffusion.lora import inspect_lora, load_lora
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from mole_diffusion.training import LoRATrainingConfig, train_lora
from tests.command import mole, picture
from tests.composing import NAMES, composing_pipeline
from tests.tiny import families


def test_train_lora_writes_a_lora_that_loads(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.safetensors"
    options = ["--images", world / "pictures", "--token", "mug", "--class", "dog", "--rank", 2, "--device", "cpu"]
    done = mole("train-lora", "--base", world / "base", *options, "--steps", 2, "--batch-size", 1, "--out", out)
    assert done.exit_code == 0, done.output
    pipe = composing_pipeline()
    pipe.load_loras({"new": out})
    assert pipe.experts.loras[0].ranks == (2, 2)
    assert pipe.experts.loras[0].triggers == ("mug dog",)
    assert "mug dog" in mole("inspect", out).stdout
    wordings = ["--prompt", "a mug", "--prompt", "a red mug dog"]
    done = mole(
        "train-lora", "--base", world / "base", *options, *wordings, "--steps", 1, "--batch-size", 1, "--out", out
    )
    assert done.exit_code == 0, done.output
    pipe.load_loras({"other": out})
    assert pipe.experts.loras[1].triggers == ("mug",)


def test_train_lora_trains_a_base_of_another_family_with_both_its_text_encoders(world: Path, tmp_path: Path) -> None:
    StableDiffusionXLPipeline(**families.sdxl()).save_pretrained(tmp_path / "xl")
    out = tmp_path / "new.safetensors"
    options = ["--images", world / "pictures", "--token", "mug", "--class", "dog", "--rank", 2, "--device", "cpu"]
    options += ["--steps", 1, "--batch-size", 1, "--text-encoder"]
    done = mole("train-lora", "--base", tmp_path / "xl", *options, "--out", out)
    assert done.exit_code == 0, done.output
    assert inspect_lora(out).modules.keys() == {"unet", "text_encoder", "text_encoder_2"}


def test_train_lora_trains_on_a_base_in_either_format(world: Path, tmp_path: Path) -> None:
    """As `train_lora` does on a pipeline that was opened so; the two formats round apart."""
    out = tmp_path / "new.safetensors"
    options = ["--images", world / "pictures", "--token", "mug", "--class", "dog", "--rank", 2, "--device", "cpu"]
    options += ["--steps", 1, "--batch-size", 1, "--out", out]
    images = [picture(world / "pictures" / f"{name}.png") for name in sorted(NAMES)]
    config = LoRATrainingConfig(prompts=["a photo of a mug dog"], rank=2, steps=1, warmup_steps=0, batch_size=1)
    written = []
    for dtype in ("float32", "bfloat16"):
        done = mole("train-lora", "--base", world / "base", *options, "--dtype", dtype)
        assert done.exit_code == 0, done.output
        pipe = MoLEStableDiffusionPipeline.from_pretrained(world / "base", dtype=getattr(torch, dtype))
        wanted = train_lora(pipe, images, config, progress=False)["unet"]
        written.append(load_lora(out, pipe.components).factors["unet"])
        assert wanted.keys() == written[-1].keys()
        for name, one in written[-1].items():
            assert one.up.dtype == torch.float32
            assert torch.equal(one.up, wanted[name].up), name
    assert any(not torch.equal(one.up, written[1][name].up) for name, one in written[0].items())


def test_train_lora_has_the_defaults_of_the_training() -> None:
    from mole_diffusion.cli.train_lora import train_lora as command

    ours, config = inspect.signature(command).parameters, LoRATrainingConfig(prompts=["it"])
    for name in ("rank", "steps", "batch_size", "learning_rate", "resolution", "seed"):
        assert ours[name].default == getattr(config, name), name
