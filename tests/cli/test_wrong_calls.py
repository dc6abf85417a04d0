"""Wrong calls: one clear line instead of a traceback, and before torch is imported where that is not needed."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from diffusers import LCMScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image

from mole_diffusion import choices
from mole_diffusion.composition import COMPOSITIONS
from mole_diffusion.drawing.cuda_driver import OTHERS
from mole_diffusion.drawing.opening import read_scheduler
from mole_diffusion.errors import MoLEError
from mole_diffusion.methods import METHODS, options
from mole_diffusion.training import PRESETS
from tests import ROOT
from tests.command import drawing, mole


def bad_calls(world: Path, tmp: Path) -> dict[str, tuple[list[object], str]]:
    draw = drawing(world, tmp / "it.png")
    train: list[object] = ["train-lora", "--token", "x", "--class", "dog", "--base", world / "base"]
    empty = tmp / "empty"
    empty.mkdir()
    return {
        "lora without a name": ([*draw, "--lora", "cat.safetensors"], "--lora takes name=value, got 'cat.safetensors'"),
        "name twice": ([*draw, "--lora", "cat=x.safetensors"], "--lora has the name 'cat' twice"),
        "no such lora": ([*draw, "--lora", "fox=no/fox.safetensors"], "no/fox.safetensors"),
        "unknown choice": (
            [*draw, "--only", "fox"],
            "`--only` has 'fox', which is not loaded. Loaded are: cat, dog, mug",
        ),
        "unknown method": ([*draw, "--composition", "sum"], "--composition sum: must be one of linear"),
        "gates missing": ([*draw, "--composition", "mole"], "composition 'mole' needs gates"),
        "no such gates": ([*draw, "--gates", tmp / "nowhere"], "nowhere"),
        "gates without loras": (
            ["generate", "--base", world / "base", "--prompt", "x", "--gates", world / "gates", "--device", "cpu"],
            "--gates weigh LoRAs, and there is no --lora",
        ),
        "number format": (
            [*train, "--images", world / "pictures", "--out", tmp / "x.safetensors", "--dtype", "float16"],
            "--dtype float16: must be one of float32, bfloat16, where something is trained",
        ),
        "no such base": (
            ["generate", "--base", "./nowhere", "--prompt", "x"],
            "--base ./nowhere: there is no such folder",
        ),
        "no picture format": ([*draw, "--out", tmp / "it.xyz"], "a picture needs a suffix such as .png, got '.xyz'"),
        "no such device": ([*draw, "--device", "tpu9"], "--device tpu9 cannot be used here. Try --device cpu."),
        "not a lora": (["inspect", world / "base" / "model_index.json"], "model_index.json"),
        "no toybox": (
            ["toybox", "measure", "--assets", world],
            "no toybox, for it lacks loras and clip. Make one with mole toybox build.",
        ),
        "numbers into a folder": (["toybox", "measure", "--out", empty], "is a folder, and a file is to be written"),
        "no picture format of a sheet": (["toybox", "show", "--out", tmp / "it.txt"], "a picture needs a suffix such"),
        "too many strangers": (["toybox", "anonymous", "--count", 157], "count must be 1 to 156"),
        "no file": (["inspect", tmp / "none.safetensors"], "none.safetensors"),
        "no folder": ([*train, "--images", tmp / "none", "--out", "x.safetensors"], "none: there is no such folder"),
        "no pictures": ([*train, "--images", empty, "--out", "x.safetensors"], "no picture in this folder"),
        "a pickle": ([*train, "--images", world / "pictures", "--out", "x.pt"], "written as .safetensors, got '.pt'"),
        "empty token": ([*train[:2], " ", *train[3:], "--images", empty, "--out", "x.safetensors"], "--token is empty"),
        "empty class": ([*train[:4], "", *train[5:], "--images", empty, "--out", "x.safetensors"], "--class is empty"),
        "rank 0": (
            [*train, "--images", world / "pictures", "--out", "x.safetensors", "--rank", 0],
            "Invalid value for '--rank'",
        ),
    }


def test_bad_input_is_one_line_and_exit_code_2(world: Path, tmp_path: Path) -> None:
    calls = bad_calls(world, tmp_path)
    for case, (arguments, message) in calls.items():
        done = mole(*arguments)
        assert done.exit_code == 2, (case, done.output, done.exception)
        lines = [line for line in done.stderr.splitlines() if line.startswith("mole: ")]
        assert len(lines) == 1, (case, done.stderr)
        assert message in lines[0], case
        assert "Traceback" not in done.output
    assert not (tmp_path / "it.png").exists()


WRONG_STUDIES: dict[str, dict[str, object]] = {
    "'soap' is no method": {"methods": ["soap"]},
    "has no option 'scales'; it has scale": {"methods": [{"merge": {"scales": 1}}]},
    "unknown settings ['word']": {"methods": [{"mole": {"training": {"word": 1}}}], "train_prompts": ["a {concepts}"]},
    "--base ./none: there is no such folder": {"base": "./none"},
    "has 'fox', which is no concept": {"compositions": ["cat+fox"]},
    "'ViT-Y' is neither a folder": {"clip": "ViT-Y:openai"},
    "image_encoder none: there is no such folder": {"image_encoder": "none"},
    "concept 'a': there is no LoRA file": {
        "concepts": {"a": {"lora": "/no/a.safetensors", "phrase": "a", "description": "a", "references": "toybox"}},
        "compositions": ["a"],
    },
}


def write_study(folder: Path, changed: Mapping[str, object]) -> str:
    study = {"name": "it", "base": "toybox", "concepts": "toybox", "compositions": ["cat"], "clip": "toybox"}
    file = folder / f"{len(list(folder.iterdir()))}.yaml"
    file.write_text(json.dumps({**study, "methods": ["linear"], "prompts": ["{concepts}"], **changed}))
    return str(file)


def test_what_is_not_there_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    (tmp_path / "cut.yaml").write_text("name: [")
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "0.png")
    gates = ["--lora", "cat", "--lora", "boot", "--out", str(tmp_path / "gates")]
    train = ["--images", str(tmp_path / "one"), "--token", "sks", "--class", "cat", "--out", "cat.safetensors"]
    measure = ["evaluate", "--out", str(tmp_path / "e.csv"), "--prompts", str(tmp_path / "prompts.txt"), "--images"]
    wrong = {
        "cat=/no/cat.safetensors: no such file": ["generate", "--prompt", "x", "--lora", "cat=/no/cat.safetensors"],
        f"{os.path.expanduser('~')}/no/cat.safetensors: no such file": [
            "generate",
            "--prompt",
            "x",
            "--lora",
            "cat=~/no/cat.safetensors:0.8",
        ],
        f"--references {os.path.expanduser('~')}/no/cat: there": [
            *measure,
            str(tmp_path),
            "--references",
            "cat=~/no/cat",
        ],
        "--dtype float8: must be one of": ["generate", "--prompt", "x", "--dtype", "float8"],
        "--images /no/pictures: there is no such": [*measure, "/no/pictures"],
        "--references /no/cat: there is no such": [*measure, str(tmp_path), "--references", "cat=/no/cat"],
        "--image-encoder no: there is no such folder": [*measure, str(tmp_path / "one"), "--image-encoder", "no"],
        "no picture in this folder": [*measure, str(tmp_path)],
        "--clip /no/clip: there is no such folder": [*measure, str(tmp_path), "--clip", "/no/clip"],
        "no prompts: give --prompt": ["train-gates", *gates],
        "--clip ./no: there is no such folder": ["balance-study", *gates, "--prompt", "x", "--clip", "./no"],
        "config /no.yaml: there is no such": ["benchmark", "run", "/no.yaml"],
        "config no.yml: there is no such": ["benchmark", "report", "no.yml"],
        "cut.yaml: ": ["benchmark", "run", str(tmp_path / "cut.yaml")],
    }
    cat = ["generate", "--prompt", "a <v1> cat", "--lora", "cat"]
    wrong |= {
        "--scheduler Euler: must be one of DDIMScheduler": [*cat, "--scheduler", "Euler"],
        "--composition sum: must be one of linear": [*cat, "--composition", "sum"],
        "--composition-option is an option of a composition": [*cat, "--composition-option", "own_words=2"],
        "--role cat=pet: a role is one of subject": [*cat, "--role", "cat=pet"],
        "--role dog=…: there is no --lora dog": [*cat, "--role", "dog=style"],
        "`--only` has 'dog', which is not loaded": [*cat, "--only", "dog"],
        "--trigger dog=…: there is no --lora dog": [*cat, "--trigger", "dog=x"],
        "--guidance-scale must be finite": [*cat, "--guidance-scale", "inf"],
        "--gates ./no: there is no such folder": [*cat, "--gates", "./no"],
        "--base-config says how a single file is built": [*cat, "--base-config", "."],
        "--preset house: must be one of default": ["train-gates", *gates, "--prompt", "x", "--preset", "house"],
        "--log-with paper: must be one of none": ["train-gates", *gates, "--prompt", "x", "--log-with", "paper"],
        "--learning-rate nan: must be positive": ["train-gates", *gates, "--prompt", "x", "--learning-rate", "nan"],
        "Give --lora twice": ["train-gates", *gates[2:], "--prompt", "x"],
        "--to a1111: must be one of diffusers": ["convert", str(tmp_path), "--to", "a1111", "--out", "x.safetensors"],
        "--reuse unet: must be one of vae": ["toybox", "build", "--reuse", "unet"],
        "--assets no: there is no such": ["toybox", "measure", "--assets", "no"],
        "Invalid value for '--steps'": ["train-lora", *train, "--steps", "0"],
        "--learning-rate 0.0: must be positive": ["train-lora", *train, "--learning-rate", "0"],
    }
    gates += ["--prompt", "x"]
    measure += [str(tmp_path / "one"), "--clip"]
    masks = [*cat, "--composition", "masks", "--composition-option"]
    wrong |= {
        "composition 'masks' has no option 'words'; it has online, start": [*masks, "words=2"],
        "`smoothing` must be an odd number": [*masks, "smoothing=2"],
        "`modulation` must be one of": [*masks, "modulation=loud"],
        "composition 'mole' needs gates": [*cat, "--composition", "mole"],
        "--region would do nothing: composition 'linear'": [
            *cat,
            "--composition",
            "linear",
            "--region",
            "cat=0,0,.5,1",
        ],
        "--save-masks: masks tell several LoRAs apart": [*cat, "--save-masks", str(tmp_path / "masks")],
        "which is empty or reversed": [*cat, "--region", "cat=0.5,0,0.2,1"],
        "neither a box LEFT,TOP,RIGHT,BOTTOM": [*cat, "--region", "cat=no.png"],
        "unknown settings ['word']": ["train-gates", *gates, "--set", "word=1"],
        "`scope` must be one of": ["balance-study", *gates, "--set", "gates.scope=galaxy"],
        "`temperature` must be positive": ["balance-study", *gates, "--temperature", "-1"],
        "--clip: 'ViT-Z' is neither": ["train-gates", *gates, "--clip", "ViT-Z"],
        "ViT-L-14 without pretrained weights": ["train-gates", *gates, "--clip", "ViT-L-14"],
        "--clip: `pretrained` is 'none-such'; ViT-B-32 without": [*measure, "ViT-B-32:none-such"],
        "'words' is no CLIP": [*measure, "words"],
        "`resolution` must be a multiple of 8 pixels, or None": ["train-lora", *train, "--resolution", "63"],
        "'a dog' has none of `triggers`": ["train-lora", *train, "--prompt", "a dog"],
        "`size` must be one of tiny": ["speed", "--size", "huge"],
        "`sides` must be some of bare": ["speed", "--sides", "bear"],
        "--loras takes whole numbers": ["speed", "--loras", "x"],
        "--device meta cannot be used here. Try --device cpu": [*cat, "--device", "meta"],
        "--device tpu9 cannot be used here": ["demo", "--device", "tpu9"],
        "--device warp:1 cannot be used here": ["toybox", "measure", "--device", "warp:1"],
    }
    wrong |= {said: ["benchmark", "run", write_study(tmp_path, changed)] for said, changed in WRONG_STUDIES.items()}
    wrong["--base ./no: there is no such folder"] = [
        "train-gates", "--lora", f"cat={tmp_path}", *gates[4:], "--prompt", "x", "--base", "./no", "--clip", "x",
    ]  # fmt: skip
    code = (
        "import json, sys; from typer.testing import CliRunner; from mole_diffusion.cli import app\n"
        "said = [CliRunner().invoke(app, one) for one in json.loads(sys.argv[1])]\n"
        "print(json.dumps([[one.exit_code, one.stderr] for one in said] + ['torch' in sys.modules]))"
    )
    command = [sys.executable, "-c", code, json.dumps(list(wrong.values()))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    *said, torch_is_there = json.loads(done.stdout)
    for message, (exit_code, stderr) in zip(wrong, said, strict=True):
        assert exit_code == 2, message
        assert message in stderr
        assert len(stderr.splitlines()) == 1
    assert not torch_is_there


@pytest.mark.skipif(os.name == "nt" or any(path.exists() for path in OTHERS), reason="only torch can tell here")
def test_a_gpu_that_is_not_there_is_told_before_torch_is_imported() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from mole_diffusion.cli import app\n"
        "done = CliRunner().invoke(app, ['demo', '--device', 'cuda:99']); print(done.exit_code, done.stderr, end='')\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    said = "2 mole: --device cuda:99 cannot be used here: there is no such NVIDIA GPU. Try --device cpu.\n"
    assert done.stdout == said


def test_what_is_offered_without_torch_is_all_there_is() -> None:
    made_of_settings = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    assert (*made_of_settings, "LCMScheduler", "TCDScheduler") == choices.SCHEDULERS
    assert tuple(PRESETS) == choices.PRESETS
    assert tuple(METHODS) == tuple(COMPOSITIONS)
    for name, method in METHODS.items():
        assert method().needs == COMPOSITIONS[name]().needs
        taken = inspect.signature(COMPOSITIONS[name].__init__).parameters.values()
        plain = [one for one in taken if one.default is not one.empty and one.name not in ("gates", "method")]
        assert {one.name: one.default for one in plain} == options(name)
    assert read_scheduler("LCMScheduler") is LCMScheduler
    with pytest.raises(MoLEError, match=r"needs the package torchsde\. Install it with pip install torchsde"):
        read_scheduler("DPMSolverSDEScheduler")
