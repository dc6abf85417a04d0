"""`mole generate`: each option does what the pipeline does, and every mistake is told before work begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from mole_diffusion.cli.lora_entries import read_loras
from mole_diffusion.composition import RegionMap
from mole_diffusion.drawing import draw
from mole_diffusion.errors import MoLEError
from mole_diffusion.loading import LoadingError
from mole_diffusion.lora import load_lora, save_lora
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from tests.command import mole, picture
from tests.composing import NAMES, composing_pipeline, lora_states
from tests.single_file import write_single_file

PROMPT = "a cat, a dog and a mug"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model and three LoRAs, which do not say what calls them."""
    folder = tmp_path_factory.mktemp("world")
    pipe = composing_pipeline()
    pipe.save_pretrained(folder / "base")
    for name, state in lora_states(pipe).items():
        save_lora(load_lora(state, pipe.lora_components, name=name), folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def composing(world: Path) -> Any:
    pipe = MoLEStableDiffusionPipeline.from_pretrained(world / "base")
    pipe.load_loras({name: world / f"{name}.safetensors" for name in NAMES}, triggers={name: name for name in NAMES})
    return pipe


def drawing(world: Path, out: Path, *more: object, strengths: str = "") -> list[object]:
    loras = [part for name in NAMES for part in ("--lora", f"{name}={world / name}.safetensors{strengths}")]
    options = ["--base", world / "base", *loras, "--prompt", PROMPT, "--steps", 2, "--device", "cpu", "--out", out]
    return ["generate", *options, *more]


def told(*names: str) -> list[str]:
    return [part for name in names for part in ("--trigger", f"{name}={name}")]


def drawn(pipe: Any, seed: int = 0, **options: Any) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    image: Image.Image = pipe(PROMPT, num_inference_steps=2, generator=generator, **options).images[0]
    return image.tobytes()


@pytest.mark.parametrize(
    ("entry", "file", "strength"),
    [
        ("cat=a/cat.safetensors", "a/cat.safetensors", 1.0),
        ("cat=a/cat.safetensors:0.8", "a/cat.safetensors", 0.8),
        ("cat=a/cat.safetensors:-1", "a/cat.safetensors", -1.0),
        ("cat=a/cat.safetensors:.5", "a/cat.safetensors", 0.5),
        (r"cat=C:\x.safetensors", r"C:\x.safetensors", 1.0),
        (r"cat=C:\x.safetensors:2", r"C:\x.safetensors", 2.0),
        ("cat=a:1/cat.safetensors", "a:1/cat.safetensors", 1.0),
    ],
)
def test_a_number_after_the_last_colon_is_a_strength(entry: str, file: str, strength: float) -> None:
    assert read_loras([entry], with_toybox=False) == ({"cat": file}, {"cat": strength})


def test_a_toybox_subject_needs_only_its_name() -> None:
    files, strengths = read_loras(["cat", "boot:0.5", "fish=cat"], with_toybox=True)
    assert [Path(file).name for file in files.values()] == ["cat.safetensors", "boot.safetensors", "cat"]
    assert strengths == {"cat": 1.0, "boot": 0.5, "fish": 1.0}
    with pytest.raises(MoLEError, match="takes name=value, got 'cat'"):
        read_loras(["cat"], with_toybox=False)


def test_strengths_triggers_roles_and_size_are_those_of_the_pipeline(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "it.png"
    calls = ["--trigger", "cat=cat", "--trigger", "cat=kitten", *told("dog"), "--role", "mug=style"]
    done = mole(*drawing(world, out, *calls, "--width", 48, strengths=":0.7"))
    assert done.exit_code == 0, done.output
    pipe = MoLEStableDiffusionPipeline.from_pretrained(world / "base")
    files = {name: world / f"{name}.safetensors" for name in NAMES}
    pipe.load_loras(files, triggers={"cat": ["cat", "kitten"], "dog": "dog"}, roles={"mug": "style"})
    assert pipe.composition.name == "masks"
    assert picture(out).size == (48, 32)
    assert picture(out).tobytes() == drawn(pipe, loras=dict.fromkeys(NAMES, 0.7), width=48, height=32)
    assert picture(out).tobytes() != drawn(pipe, width=48, height=32)


def test_regions_are_boxes_and_painted_pictures(world: Path, composing: Any, tmp_path: Path) -> None:
    out, mask = tmp_path / "it.png", tmp_path / "mask.png"
    painted = Image.new("L", (32, 32))
    painted.paste(255, (16, 0, 32, 16))
    painted.save(mask)
    boxes = ["--region", "cat=0,0,0.5,1", "--region", f"dog={mask}", "--region", "dog=20, 24, 32, 32"]
    done = mole(*drawing(world, out, *told("mug"), *boxes))
    assert done.exit_code == 0, done.output
    regions = {"cat": (0, 0, 0.5, 1), "dog": [painted, (20, 24, 32, 32)]}
    assert picture(out).tobytes() == drawn(composing, regions=regions)
    assert picture(out).tobytes() != drawn(composing)


def test_every_picture_that_was_drawn_is_kept(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    real = draw.draw

    def a_file_takes_the_place(*arguments: Any) -> Any:
        out.write_text("mine")
        return real(*arguments)

    monkeypatch.setattr(draw, "draw", a_file_takes_the_place)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    masks = [*told(*NAMES), "--save-masks", out / "masks"]
    done = mole(*drawing(world, out / "it.png", "--num-images", 2, *masks))
    assert done.exit_code == 2, done.output
    assert "it-0.png cannot be written: a part of its path is a file. Choose" in done.stderr
    kept = Path(done.stderr.split("So it is with 2 more. What was made lies in ")[1].strip().rstrip("."))
    assert sorted(file.name for file in kept.iterdir()) == ["it-0.png", "it-1.png", "masks"]
    assert (kept / "masks" / "overlay-1.png").is_file()


def test_several_pictures_have_seeds_and_masks_of_their_own(world: Path, composing: Any, tmp_path: Path) -> None:
    out, masks = tmp_path / "new" / "it.png", tmp_path / "masks"
    done = mole(*drawing(world, out, *told(*NAMES), "--seed", 4, "--num-images", 2, "--save-masks", masks))
    assert done.exit_code == 0, done.output
    assert not out.exists()
    for index in range(2):
        saved = picture(out.with_name(f"it-{index}.png"))
        # A batch sums in another order.
        difference = torch.frombuffer(bytearray(saved.tobytes()), dtype=torch.uint8).int() - torch.frombuffer(
            bytearray(drawn(composing, seed=4 + index)), dtype=torch.uint8
        )
        assert difference.abs().max() <= 1
        assert f"it-{index}.png (seed {4 + index})" in done.stdout
        assert min(picture(masks / f"overlay-{index}.png").size) >= 256
    saved_masks = RegionMap.load(masks)
    assert saved_masks.names == NAMES
    assert saved_masks.rows == 2
    # A mask that was saved is a region.
    done = mole(*drawing(world, out, *told(*NAMES), "--region", f"mug={masks / 'mug-0.png'}"))
    assert done.exit_code == 0, done.output


def test_scheduler_and_number_format(world: Path, composing: Any, tmp_path: Path) -> None:
    out = tmp_path / "it.png"
    done = mole(*drawing(world, out, "--scheduler", "DDPMScheduler", "--composition", "budget"))
    assert done.exit_code == 0, done.output
    composing.scheduler = DDPMScheduler.from_config(composing.scheduler.config)
    composing.set_composition("budget")
    exact = drawn(composing)
    assert picture(out).tobytes() == exact
    done = mole(*drawing(world, out, "--composition", "linear", "--dtype", "bfloat16"))
    assert done.exit_code == 0, done.output
    pipe = MoLEStableDiffusionPipeline.from_pretrained(world / "base", dtype=torch.bfloat16)
    pipe.load_loras({name: world / f"{name}.safetensors" for name in NAMES})
    pipe.set_composition("linear")
    assert picture(out).tobytes() == drawn(pipe)


def bad_calls(world: Path, tmp: Path) -> dict[str, tuple[list[object], str]]:
    draw = drawing(world, tmp / "it.png")
    (tmp / "file").write_text("x")
    (tmp / "text.png").write_text("x")
    (tmp / "folder.png").mkdir()
    gated = [*draw, "--gates", tmp]
    none: list[object] = ["generate", "--base", world / "base", "--device", "cpu", "--out", tmp / "it.png", "--prompt"]
    one = [*none, "a cat", "--lora", f"cat={world / 'cat'}.safetensors"]
    return {
        "empty prompt": ([*none, "  "], "--prompt is empty"),
        "the WebUI's LoRAs": ([*none, "a cat <lora:cat:0.8>"], "--prompt has <lora:cat:0.8>, which would be read as"),
        "no such file": ([*none, "x", "--lora", "cat=no.safetensors:0.5"], "no.safetensors: no such file"),
        "no finite strength": (
            [*none, "x", "--lora", "cat=x.safetensors:1e999"],
            "the strength must be finite, and at most 1e+06, got inf. Such as 0.8",
        ),
        "strength beyond all": (
            [*none, "x", "--lora", "cat=x.safetensors:1e39"],
            "finite, and at most 1e+06, got",
        ),
        "a device nobody built": ([*draw, "--device", "hpu"], "--device hpu cannot be used here. Try --device cpu"),
        "a picture nobody draws": ([*draw, "--width", 10**9], "--width 1000000000: must be at most 16384"),
        "a name that is none": ([*draw, "--only", "cat,,dog"], "`--only` has '', which is not loaded"),
        "a seed that is none": (["demo", "--seed", 2**64, "--out", tmp], "'--seed'"),
        "cannot compute": ([*draw, "--device", "meta"], "--device meta cannot be used here. Try --device cpu"),
        "number format": ([*draw, "--dtype", "int8"], "--dtype int8: must be one of auto, float32, float16, bfloat16"),
        "scheduler": ([*draw, "--scheduler", "Euler"], "--scheduler Euler: must be one of DDIMScheduler, "),
        "trigger without a LoRA": ([*draw, "--trigger", "fox=fox"], "no --lora fox=…; there are cat, dog, mug"),
        "role without a LoRA": (
            [*none, "x", "--role", "fox=style"],
            "--role fox=…: there is no --lora fox=…; there is",
        ),
        "region without a LoRA": ([*draw, "--region", "fox=0,0,1,1"], "--region fox=…: there is no --lora fox=…"),
        "no such role": ([*draw, "--role", "cat=pet"], "--role cat=pet: a role is one of subject, style, utility"),
        "no words": ([*draw, "--trigger", "cat="], "--trigger takes name=value, got 'cat='"),
        "reversed box": ([*draw, "--region", "cat=0.5,0,0.2,1"], "(0.5, 0.0, 0.2, 1.0), which is empty or reversed"),
        "three numbers": ([*draw, "--region", "cat=0,0,1"], "--region cat=0,0,1: the region of 'cat' has 3 numbers"),
        "outside": ([*draw, "--width", 32, "--height", 32, "--region", "cat=40,0,60,32"], "covers nothing of the"),
        "neither box nor file": ([*draw, "--region", "cat=left"], "--region cat=left: neither a box LEFT,TOP,RIGHT"),
        "no picture": ([*draw, "--region", f"cat={tmp / 'text.png'}"], "text.png cannot be read as a picture"),
        "regions nobody reads": (
            [*draw, "--region", "cat=0,0,1,1", "--composition", "linear"],
            "--region would do nothing: composition 'linear' knows no places. Choose --composition masks",
        ),
        "regions under gates": ([*gated, "--region", "cat=0,0,1,1"], "composition 'mole' knows no places"),
        "masks of one": ([*one, "--save-masks", tmp / "m"], "here the whole picture belongs to cat"),
        "masks without words": ([*draw, "--save-masks", tmp / "m"], "nobody said which words call 'cat'"),
        "masks of a sum": ([*draw, "--save-masks", tmp / "m", "--composition", "merge"], "'merge' knows no places"),
        "gates without LoRAs": ([*none, "x", "--gates", tmp], "--gates weigh LoRAs, and there is no --lora"),
        "no such gates": ([*draw, "--gates", "./nowhere"], "--gates ./nowhere: there is no such folder"),
        "a pickled model": (
            ["generate", "--prompt", "x", "--base", "models/sd.ckpt"],
            "sd.ckpt: a pickle, which can run",
        ),
        "a model of another kind": (
            ["generate", "--prompt", "x", "--base", tmp / "text.png"],
            "text.png: is a file of another kind. Give a folder or a file that ends in .safetensors",
        ),
        "no such single file": (["generate", "--prompt", "x", "--base", "no.safetensors"], "there is no such file"),
        "unwritable": ([*draw, "--out", tmp / "file" / "it.png"], "it.png cannot be written: a part of its path is a"),
        "a folder": ([*draw, "--out", tmp / "folder.png"], "folder.png is a folder, and a file is to be written"),
        "masks into a file": ([*draw, "--save-masks", tmp / "file"], "file is a file, and a folder is to be written"),
        "no multiple of 8": ([*draw, "--width", 30], "--width 30: must be a multiple of 8, such as 24"),
        "no steps": ([*draw, "--steps", 0], "'--steps'"),
        "too many steps": ([*draw, "--steps", 1001], "'--steps'"),
        "nothing to build": ([*draw, "--base-config", tmp], "--base-config says how a single file is built"),
        "no such option": ([*draw, "--colour", "red"], "No such option: --colour"),
        "no prompt": (["generate"], "Missing option '--prompt'"),
    }


def test_every_mistake_is_one_line_before_a_model_is_loaded(world: Path, tmp_path: Path) -> None:
    # Where the base is opened at all, there is another message: nothing is in this one.
    (tmp_path / "base").mkdir()
    for case, (arguments, message) in bad_calls(world, tmp_path).items():
        given = [tmp_path / "base" if argument == world / "base" else argument for argument in arguments]
        done = mole(*given)
        assert done.exit_code == 2, (case, done.output, done.exception)
        lines = done.stderr.splitlines()
        assert len(lines) == 1, (case, done.stderr)
        assert lines[0].startswith("mole: "), case
        assert message in lines[0], (case, lines[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "file", "folder.png", "text.png"]


def test_a_single_file_draws_what_its_folder_draws(world: Path, tmp_path: Path) -> None:
    file = write_single_file(MoLEStableDiffusionPipeline.from_pretrained(world / "base"), tmp_path / "sd.safetensors")
    pictures = []
    for base in ([world / "base"], [file, "--base-config", world / "base"]):
        arguments = drawing(world, tmp_path / "it.png", *base[1:])
        arguments[arguments.index("--base") + 1] = base[0]
        done = mole(*arguments)
        assert done.exit_code == 0, done.output
        pictures.append(picture(tmp_path / "it.png").tobytes())
    assert pictures[0] == pictures[1]


def test_a_single_file_is_no_pickle(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "sd.ckpt")
    with pytest.raises(LoadingError, match=r"sd\.ckpt is no \.safetensors file, and pickles, which can run any code"):
        MoLEStableDiffusionPipeline.from_single_file(tmp_path / "sd.ckpt")
    os.mkfifo(tmp_path / "sd.safetensors")
    with pytest.raises(MoLEError, match=r"sd\.safetensors: a pipe, not a file"):
        MoLEStableDiffusionPipeline.from_single_file(tmp_path / "sd.safetensors")


def test_a_single_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"no weights")
    done = mole("generate", "--base", file, "--prompt", "x", "--device", "cpu", "--out", tmp_path / "it.png")
    assert done.exit_code == 2, done.exception
    assert "model.safetensors cannot be loaded: " in done.stderr
    assert "--base-config" in done.stderr
