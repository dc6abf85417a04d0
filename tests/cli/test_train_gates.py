"""`mole train-gates` and `mole balance-study`: from the command line to the training, and bad input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_diffusion import toybox
from mole_diffusion.cli.gate_inputs import (
    GateArguments,
    read_concepts,
    read_training_prompts,
    toybox_loras,
)
from mole_diffusion.cli.gate_settings import read_config
from mole_diffusion.gating import GateConfig
from mole_diffusion.lora import load_lora, save_lora
from mole_diffusion.training import GateTrainingConfig
from tests import ROOT
from tests.command import mole
from tests.tiny import ATTENTION, random_lora, tiny_pipeline
from tests.tiny.clip import write_clip

TINY = [
    "rollout_steps=1",
    "guidance_scale=1",
    "reference_pictures=1",
    "gates.scope=network",
    "gates.token_axis=pooled",
    "gates.input=experts",
    "gates.null_expert=false",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model, two LoRAs and a CLIP."""
    folder = tmp_path_factory.mktemp("world")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "base")
    for seed, name in enumerate(("cat", "dog")):
        state = random_lora({"unet": pipe.unet}, targets=ATTENTION, seed=seed)
        save_lora(load_lora(state, {"unet": pipe.unet}, name=name), folder / f"{name}.safetensors")
    torch.manual_seed(0)
    write_clip(folder / "clip")
    return folder


def call(world: Path, command: str, *more: object) -> list[object]:
    loras = [part for name in ("cat", "dog") for part in ("--lora", f"{name}={world / name}.safetensors")]
    concepts: list[object] = []
    for name, token in (("cat", "<v1>"), ("dog", "<v2>")):
        concepts += ["--token", f"{name}={token}", "--class", f"{name}={name}"]
    tiny = [part for setting in TINY for part in ("--set", setting)]
    return [command, "--base", world / "base", "--device", "cpu", *loras, *concepts, *tiny, *more]


@pytest.mark.usefixtures("few_steps")
def test_train_gates_trains_what_it_was_told(world: Path, tmp_path: Path) -> None:
    (tmp_path / "gates.yaml").write_text("learning_rate: 1e-2\nsteps: 9\nseed: 5\ngates: {temperature: 2}\n")
    (tmp_path / "prompts.txt").write_text("# for CLIP\na <v2> dog in the sand\n\n")
    done = mole(
        *call(world, "train-gates", "--clip", world / "clip", "--out", tmp_path / "new" / "gates"),
        *("--config", tmp_path / "gates.yaml", "--set", "seed=6", "--steps", 2, "--batch-size", 1),
        *("--prompts", tmp_path / "prompts.txt", "--template", "{concepts} on grass", "--prompt", "a <v1> cat"),
        *("--description", "dog=red dog"),
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"gates: {tmp_path / 'new' / 'gates'}" in done.stdout
    record = json.loads((tmp_path / "new" / "gates" / "training.json").read_text())
    assert record["prompts"] == {
        "a <v1> cat": "a cat",
        "a <v2> dog in the sand": "a red dog in the sand",
        "a <v1> cat and a <v2> dog on grass": "a cat and a red dog on grass",
        "a <v2> dog and a <v1> cat on grass": "a red dog and a cat on grass",
    }
    config = GateTrainingConfig.from_dict(record["config"])
    assert (config.steps, config.seed, config.learning_rate, config.batch_size) == (2, 6, 1e-2, 1)
    assert config.gates == GateConfig(scope="network", temperature=2.0)
    assert (tmp_path / "new" / "gates.work" / "state.json").is_file()
    assert "peak memory" in done.stderr
    card = (tmp_path / "new" / "gates" / "README.md").read_text()
    assert "- base: base\n" in card
    assert str(world) not in card


@pytest.mark.usefixtures("few_steps")
def test_balance_study_prints_its_table(world: Path, tmp_path: Path) -> None:
    options = ["--clip", world / "clip", "--prompt", "a <v1> cat, a <v2> dog", "--steps", 1, "--temperature", 4]
    options += ["--dtype", "bfloat16"]
    done = mole(*call(world, "balance-study", *options, "--out", tmp_path / "study"))
    assert done.exit_code == 0, (done.output, done.exception)
    for words in ("| balance loss |", "| no balance loss |", "| temperature 4 |", f"study: {tmp_path / 'study'}"):
        assert words in done.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_is_opened_in_the_format_that_was_asked_for(world: Path, dtype: str) -> None:
    names = ("cat", "dog")
    arguments = GateArguments(
        base=str(world / "base"),
        lora=[f"{name}={world / name}.safetensors" for name in names],
        token=[f"{name}={name}" for name in names],
        class_name=[f"{name}={name}" for name in names],
        description=None,
        references=None,
        prompt=["a cat and a dog"],
        prompts=None,
        template=None,
        clip=str(world / "clip"),
        clip_pretrained=None,
        preset=None,
        learning_rate=None,
        device="cpu",
        dtype=dtype,
    )
    found = arguments.read(GateTrainingConfig())
    assert {found.pipe.unet.dtype, found.pipe.text_encoder.dtype} == {getattr(torch, dtype)}


def test_balance_study_looks_at_its_temperatures_before_any_model(tmp_path: Path) -> None:
    file, folder = tmp_path / "empty.safetensors", tmp_path / "empty"
    folder.mkdir()
    for empty in (file, folder / "open_clip_config.json", folder / "open_clip_model.safetensors"):
        empty.touch()
    lora = [
        "--lora",
        f"a={file}",
        "--lora",
        f"b={file}",
        "--base",
        folder,
        "--clip",
        folder,
        "--template",
        "{concepts}",
    ]
    done = mole("balance-study", *lora, "--out", tmp_path / "study", "--temperature", "-1")
    assert done.exit_code == 2
    assert "`temperature` must be positive and finite, got -1.0" in " ".join(done.output.split())


def test_later_sources_of_settings_go_first(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("{preset: official, steps: 50, seed: 1, eta: 0.1, gates: {scope: layer, temperature: 3}}")
    config = read_config("paper", file, ["seed=2", "steps=60", "gates.scope=matrix"], {"seed": 3, "steps": None})
    assert (config.steps, config.seed, config.eta, config.rollout_steps) == (60, 3, 0.1, 50)
    assert config.gates == GateConfig(scope="matrix", temperature=3.0, token_axis="flatten")
    assert read_config(None, file, None, {}).loss_shape == "log"
    assert read_config(None, None, None, {}) == GateTrainingConfig()
    assert read_config(None, None, None, {"steps": 20}).warmup_steps == 5
    assert read_config(None, None, ["warmup_steps=4"], {"steps": 20}).warmup_steps == 4


def test_words_that_yaml_once_took_for_booleans_are_settings(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("balance: off\nmixed_precision: no\ngradient_checkpointing: true\n")
    config = read_config(None, tmp_path / "a.yaml", ["gates.learn_temperature=false"], {})
    assert (config.balance, config.mixed_precision, config.gradient_checkpointing) == ("off", "no", True)
    assert not config.gates.learn_temperature
    assert read_config(None, None, ["balance=off"], {}).balance == "off"


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        (["steps"], "", "--set takes name=value, got 'steps'. Example: --set gates.scope=layer"),
        (["stepps=1"], "", r"unknown settings \['stepps'\]"),
        (["gates.scope=head"], "", "`scope` must be one of"),
        (["steps=lots"], "", "`steps` must be of type int"),
        ([], "[1, 2]", "must be a dictionary of settings, got list"),
        ([], "{a", "no YAML that can be read"),
        ([], "preset: best", "there is no preset 'best'"),
    ],
)
def test_settings_that_cannot_be_say_why(tmp_path: Path, settings: list[str], text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(None, tmp_path / "a.yaml", settings, {})
    with pytest.raises(ValueError, match=r"no\.yaml: no such file"):
        read_config(None, tmp_path / "no.yaml", [], {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": ["fox=<v1>"]}, "--token fox=…: there is no --lora fox=…; there are cat, dog"),
        ({"token": ["cat=<v1>"]}, "--token cat=… needs --class for cat too"),
        ({"description": ["cat=red cat"]}, "--description cat=… needs --token and --class for cat too"),
        ({"token": ["cat=<v1>"], "class_name": ["cat=cat"], "references": ["cat=no/where"]}, "there is no such folder"),
        ({"token": ["cat=a b"], "class_name": ["cat=cat"]}, "`token` must be one word"),
    ],
)
def test_concepts_that_cannot_be_say_why(options: Mapping[str, Any], message: str) -> None:
    files = {"cat": "cat.safetensors", "dog": "dog.safetensors"}
    given = {"token": None, "class_name": None, "description": None, "references": None, **options}
    with pytest.raises(ValueError, match=message):
        read_concepts(files, **given)


def test_prompts_that_cannot_be_say_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prompts: give --prompt, --prompts FILE or --template"):
        read_training_prompts(None, None, None, {})
    with pytest.raises(ValueError, match=r"none\.txt: there is no such file"):
        read_training_prompts(None, tmp_path / "none.txt", None, {})


def test_bad_input_is_one_line_and_exit_code_2(world: Path, tmp_path: Path) -> None:
    good = ["--clip", world / "clip", "--prompt", "a <v1> cat", "--out", tmp_path / "gates"]
    base = world / "base"
    cases: dict[str, tuple[list[object], str]] = {
        "no prompts": (call(world, "train-gates", *good[:2], *good[4:]), "no prompts: give --prompt"),
        "no clip": (call(world, "train-gates", *good[2:]), "--clip is missing"),
        "one lora": (
            ["train-gates", "--base", base, "--device", "cpu", "--lora", f"cat={world / 'cat.safetensors'}", *good],
            "Give --lora twice or more often",
        ),
        "no such lora": (call(world, "train-gates", "--lora", "fox=no/fox.safetensors", *good), "no/fox.safetensors"),
        "bad setting": (call(world, "train-gates", *good, "--set", "eta=2"), "`eta` must lie between 0"),
        "bad tracker": (call(world, "train-gates", *good, "--log-with", "paper"), "--log-with paper: must be"),
    }
    for case, (arguments, message) in cases.items():
        done = mole(*arguments)
        assert done.exit_code == 2, (case, done.output, done.exception)
        lines = [line for line in done.stderr.splitlines() if line.startswith("mole: ")]
        assert len(lines) == 1, (case, done.stderr)
        assert message in lines[0], (case, lines[0])
        assert "Traceback" not in done.output
    assert not (tmp_path / "gates").exists()


def test_a_toybox_subject_needs_only_its_name() -> None:
    entries, known = toybox_loras(["boot", "mine=mine.safetensors", "cat"])
    assert entries == [f"boot={toybox.lora_path('boot')}", "mine=mine.safetensors", f"cat={toybox.lora_path('cat')}"]
    assert list(known) == ["boot", "cat"]
    described = known["boot"].describe(toybox.subject_prompt(["boot"], "grass"))
    assert described == toybox.described_prompt(["boot"], "grass")
    assert len(known["boot"].references) == len(toybox.references("boot"))
    with pytest.raises(ValueError, match="dragon"):
        toybox_loras(["dragon"])


def test_the_settings_of_table_7_are_settings() -> None:
    settings = read_config(None, ROOT / "benchmarks" / "table7.yaml", None, {})
    assert settings.guidance_scale == 2.0
