"""The command line: what it writes, and one clear line instead of a traceback."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image

from mole_diffusion import __version__, choices, toybox
from mole_diffusion.cli import main
from mole_diffusion.composition import COMPOSITIONS
from mole_diffusion.drawing.opening import read_scheduler
from mole_diffusion.errors import MoLEError
from mole_diffusion.lora import inspect_lora, load_lora, save_lora
from mole_diffusion.pipelines import MoLEStableDiffusionPipeline
from mole_diffusion.training import PRESETS, LoRATrainingConfig, train_lora
from tests import ROOT
from tests.command import mole, picture
from tests.composing import NAMES, composing_pipeline, lora_states
from tests.tiny import families

PROMPT = "a cat, a dog and a mug"


@pytest.fixture(scope="module")
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


def drawing(world: Path, out: Path, *more: object) -> list[object]:
    loras = [part for name in NAMES for part in ("--lora", f"{name}={world / name}.safetensors")]
    options = ["--base", world / "base", *loras, "--prompt", PROMPT, "--steps", 2, "--device", "cpu", "--out", out]
    return ["generate", *options, *more]


COMMANDS = [
    ["demo"],
    ["generate"],
    ["inspect"],
    ["methods"],
    ["train-lora"],
    ["train-gates"],
    ["balance-study"],
    ["evaluate"],
    ["benchmark", "run"],
    ["benchmark", "report"],
    ["toybox", "build"],
    ["toybox", "show"],
    ["toybox", "anonymous"],
    ["toybox", "measure"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    done = mole(*command, "--help")
    assert done.exit_code == 0
    assert f"    mole {' '.join(command)}" in done.stdout


def test_methods_lists_every_method_with_its_cost() -> None:
    done = mole("methods")
    assert done.exit_code == 0
    rows = {cells[1].strip(): cells for line in done.stdout.splitlines() if len(cells := line.split("│")) > 4}
    assert {*COMPOSITIONS, "soup"} <= set(rows)
    assert [rows[name][2].strip() for name in ("linear", "composite", "soup")] == ["1, 1, 1", "1, 2, 3", "1, 1, 1"]
    needed = [rows[name][3].strip() for name in ("linear", "masks", "mole", "soup")]
    assert needed == ["–", "trigger words", "trained gates", "trained gates"]


@pytest.mark.parametrize("columns", [80, 56])
def test_methods_cuts_nothing_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = mole("methods")
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= columns
    sources = "".join(cells[4] for line in done.stdout.splitlines() if len(cells := line.split("│")) > 5)
    for name, method in COMPOSITIONS.items():
        assert "".join(method.source.split()) in "".join(sources.split()), name


@pytest.mark.parametrize("columns", [80, 40])
def test_inspect_cuts_nothing_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    file = toybox.lora_path("cat")
    lines = mole("inspect", file).stdout.splitlines()
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= columns
    hashed = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert hashed in "".join(line.partition("│")[2].strip() for line in lines)
    if columns == 80:
        assert any(hashed in line for line in lines)


def test_version() -> None:
    assert mole("--version").stdout == f"mole {__version__}\n"


def test_a_shell_completes_commands() -> None:
    environment = {**os.environ, "_MOLE_COMPLETE": "complete_bash", "COMP_WORDS": "mole gen", "COMP_CWORD": "1"}
    done = run_script(environment=environment)
    assert done.stdout.split() == ["generate"]


def test_generate_draws_what_the_pipeline_draws(world: Path, tmp_path: Path) -> None:
    done = mole(
        *drawing(world, tmp_path / "new" / "it.png", "--gates", world / "gates", "--only", "cat,mug", "--seed", 5)
    )
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "new" / "it.png") in done.stdout
    pipe = MoLEStableDiffusionPipeline.from_pretrained(world / "base")
    pipe.load_loras({name: world / f"{name}.safetensors" for name in NAMES})
    pipe.load_gates(world / "gates")
    expected = pipe(PROMPT, loras=["cat", "mug"], num_inference_steps=2, generator=torch.manual_seed(5)).images[0]
    assert picture(tmp_path / "new" / "it.png").tobytes() == expected.tobytes()


def test_generate_with_a_plain_method_and_masked_loras(world: Path, tmp_path: Path) -> None:
    choices: list[list[str]] = [[], ["--composition", "linear"], ["--only", ""]]
    pictures = set()
    for choice in choices:
        done = mole(*drawing(world, tmp_path / "it.png", *choice))
        assert done.exit_code == 0, done.output
        pictures.add(picture(tmp_path / "it.png").tobytes())
    assert len(pictures) == len(choices)


def test_inspect(world: Path) -> None:
    done = mole("inspect", world / "dog.safetensors")
    assert done.exit_code == 0, done.output
    for word in ("diffusers", "in the denoiser", "in text_encoder", "6 (", "SHA-256"):
        assert word in done.stdout


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


@pytest.fixture
def tiny_toybox(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny world in the place of the toybox, to try the demo's own code in seconds."""
    replacements = {
        "base_dir": lambda: world / "base",
        "demo_subjects": lambda: list(NAMES),
        "token": lambda name: f"<{name}>",
        "subject_prompt": lambda names, ground: f"{' '.join(names)} on {ground}",
        "references": lambda name: [picture(world / "pictures" / f"{name}.png")],
        "lora_path": lambda name: world / f"{name}.safetensors",
        "gates_dir": lambda names: {"cat+dog+mug": world / "gates"}[names],
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(toybox, name, replacement, raising=False)


@pytest.mark.usefixtures("tiny_toybox")
def test_demo_draws_a_sheet_and_says_who_got_what(tmp_path: Path) -> None:
    done = mole("demo", "--out", tmp_path, "--steps", 1, "--device", "cpu")
    assert done.exit_code == 0, done.output
    sheet, heat_map = picture(tmp_path / "sheet.png"), picture(tmp_path / "gates.png")
    assert sheet.height > 11 * 192  # references, masks, norm router, regions, sums, gates, each alone
    assert sheet.width > 3 * 192
    assert min(heat_map.size) > 300
    assert picture(tmp_path / "first.png").width > 5 * 192  # three files, all of them, and where
    assert '"cat dog mug on grass"' in done.stdout
    places = "".join(line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│"))
    for spec in ("unet.mid_block.attentions.0.transformer_blocks.0", "text_encoder."):
        assert spec in places  # never cut, so that no two look alike
    assert str(tmp_path / "sheet.png") in done.stdout.replace("\n", "")
    # Fresh gates are uniform: a third each in the UNet, a half each in the text encoder, which mug leaves alone.
    assert "0.33" in done.stdout
    assert "–" in done.stdout
    assert "0.50" in done.stdout


@pytest.mark.usefixtures("tiny_toybox")
def test_pictures_of_a_demo_are_kept(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def a_file_takes_the_place(name: str) -> list[Image.Image]:
        out.write_text("mine")
        return [picture(world / "pictures" / f"{name}.png")]

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(toybox, "references", a_file_takes_the_place)
    done = mole("demo", "--out", out, "--steps", 1, "--device", "cpu")
    assert done.exit_code == 2, done.output
    kept = Path(done.stderr.split("lies in ")[1].strip().rstrip("."))
    assert sorted(file.name for file in kept.iterdir()) == ["first.png", "gates.png", "sheet.png"]


@pytest.mark.usefixtures("tiny_toybox")
def test_the_toybox_is_a_base_by_its_name(world: Path, tmp_path: Path) -> None:
    arguments = drawing(world, tmp_path / "it.png")
    arguments[arguments.index("--base") + 1] = "toybox"
    done = mole(*arguments)
    assert done.exit_code == 0, done.output


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


def test_interrupting_exits_130(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        # Not by raising the signal: a shell's background job, as CI may be, ignores it.
        raise KeyboardInterrupt

    monkeypatch.setattr("mole_diffusion.lora.inspect_lora", interrupt)
    done = mole("inspect", world / "cat.safetensors")
    assert done.exit_code == 130
    assert "mole: interrupted" in done.stderr


def test_a_bug_is_not_taken_for_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise AttributeError("ours")

    monkeypatch.setattr("mole_diffusion.lora.inspect_lora", fail)
    assert isinstance(mole("inspect", "x").exception, AttributeError)


def run_script(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    start = "import sys; from mole_diffusion.cli import main; main()"
    command = [sys.executable, "-c", start, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def test_what_is_not_there_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    (tmp_path / "cut.yaml").write_text("name: [")
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "0.png")
    gates = ["--lora", "cat", "--lora", "boot", "--out", str(tmp_path / "gates")]
    train = ["--images", str(tmp_path), "--token", "sks", "--class", "cat", "--out", "cat.safetensors"]
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


def test_what_is_offered_without_torch_is_all_there_is() -> None:
    made_of_settings = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    assert (*made_of_settings, "LCMScheduler", "TCDScheduler") == choices.SCHEDULERS
    assert tuple(PRESETS) == choices.PRESETS
    assert read_scheduler("LCMScheduler") is LCMScheduler
    with pytest.raises(MoLEError, match=r"needs the package torchsde\. Install it with pip install torchsde"):
        read_scheduler("DPMSolverSDEScheduler")


def test_as_a_process_of_its_own() -> None:
    done = run_script("inspect", "no/such.safetensors")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("mole: no/such.safetensors: no such file")


def test_a_terminal_that_has_not_every_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "argv", ["mole", "methods"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    sys.stdout.flush()
    assert b"composite" in written.getvalue()
    assert b"?" in written.getvalue()


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from mole_diffusion.cli import app; print([m for m in ('torch', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
