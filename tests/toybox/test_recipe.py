"""The recipe, end to end and very short: it runs, resumes exactly, and leaves what stock libraries open."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mole_diffusion import toybox
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.toybox import recipe
from mole_diffusion.toybox.recipe.base import _LAYOUT_LABELS as LABELS
from mole_diffusion.toybox.recipe.base import BaseSettings, layout, layout_loss, load_base, train_base
from mole_diffusion.toybox.recipe.clip import clip_config, encode, train_clip, wrong_scenes
from mole_diffusion.toybox.recipe.loop import AveragedWeights, made_ahead, run_stage, step_rng, trapezoid
from mole_diffusion.toybox.recipe.loras import company_scenes, lora_config
from mole_diffusion.toybox.recipe.text_encoder import IGNORED, NOUN_LABELS, reading
from mole_diffusion.toybox.recipe.tokenizer import make_tokenizer
from mole_diffusion.toybox.recipe.vae import load_vae
from mole_diffusion.toybox.shapes import CLASSES, PATTERNS
from mole_diffusion.toybox.subjects import SUBJECTS
from mole_diffusion.toybox.vocabulary import MAX_TOKENS
from mole_diffusion.toybox.world import (
    COLORS,
    GROUNDS,
    IMAGE_SIZE,
    Look,
    Scene,
    SceneObject,
    full_caption,
    random_scene,
)

CPU = torch.device("cpu")


def _train(work_dir: Path, num_steps: int, stop: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    average = AveragedWeights(module, 0.9)

    def step(k: int) -> dict[str, torch.Tensor]:
        if stop and k == num_steps // 2:
            raise KeyboardInterrupt
        x = torch.from_numpy(step_rng(0, "test", k).standard_normal((8, 4), np.float32))
        return {"loss": module(x).square().mean()}

    settings = {"num_steps": num_steps, "schedule": trapezoid, "work_dir": work_dir, "seed": seed}
    run_stage("test", module, optimizer, int, step, device=CPU, average=average, **settings)
    assert torch.equal(module.weight, average.tensors["average.weight"])
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_an_interrupted_stage_goes_on_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = _train(tmp_path / "straight", 20)
    monkeypatch.setattr("mole_diffusion.toybox.recipe.loop._SAVE_EVERY_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "broken", 20, stop=True)
    resumed = _train(tmp_path / "broken", 20)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    with pytest.raises(ValueError, match="is of another training"):
        _train(tmp_path / "broken", 20, seed=1)


def test_a_module_in_channels_last_goes_on_bit_by_bit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused optimiser walks weights and moments as they lie in memory, so both must lie alike."""

    def train(work_dir: Path, stop: bool = False) -> torch.Tensor:
        torch.manual_seed(0)
        module = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=True)

        def step(k: int) -> dict[str, torch.Tensor]:
            if stop and k == 4:
                raise KeyboardInterrupt
            x = torch.from_numpy(step_rng(0, "test", k).standard_normal((2, 3, 8, 8), np.float32))
            return {"loss": module(x.contiguous(memory_format=torch.channels_last)).square().mean()}

        settings = {"num_steps": 8, "schedule": trapezoid, "work_dir": work_dir, "seed": 0}
        run_stage("test", module, optimizer, int, step, device=CPU, average=AveragedWeights(module, 0.9), **settings)
        return module.weight.detach()

    straight = train(tmp_path / "straight")
    monkeypatch.setattr("mole_diffusion.toybox.recipe.loop._SAVE_EVERY_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", stop=True)
    assert torch.equal(train(tmp_path / "broken"), straight)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="other processes are forked, on Linux")
def test_other_processes_make_the_same_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(number: int) -> tuple[int, np.ndarray, int]:
        return number, step_rng(0, "test", number).standard_normal(3), os.getpid()

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    here, there = (list(made_ahead(make, range(3, 40), torch.device(name))) for name in ("cpu", "cuda"))
    assert [number for number, _, _ in here] == [number for number, _, _ in there] == list(range(3, 40))
    assert all(np.array_equal(a, b) for (_, a, _), (_, b, _) in zip(here, there, strict=True))
    assert all(type(array) is np.ndarray for _, array, _ in there)
    assert {pid for *_, pid in here} == {os.getpid()}
    assert os.getpid() not in {pid for *_, pid in there}


def test_a_loss_that_is_no_number_stops_with_the_step(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    average = AveragedWeights(module, 0.9)

    def step(k: int) -> dict[str, torch.Tensor]:
        return {"loss": module.weight.sum() * (float("nan") if k == 3 else 1.0)}

    settings = {"num_steps": 5, "schedule": trapezoid, "work_dir": tmp_path, "seed": 0}
    with pytest.raises(ValueError, match="stopped at step 4: loss = nan"):
        run_stage("test", module, optimizer, int, step, device=CPU, average=average, **settings)


def test_the_layout_says_of_every_cell_what_stands_there() -> None:
    look = Look("red", "white", "dotted")
    scene = Scene("snow", (SceneObject("mug", look, 8, 16, 24), SceneObject("cat", look, 48, 40, 16)))
    planes = dict(zip(LABELS, layout(scene), strict=True))
    box = np.zeros((8, 8), bool)
    box[2:5, 1:4] = box[5:7, 6:8] = True
    for name, plane in planes.items():
        assert name == "ground" or ((plane > 0) == box).all(), name
    assert {CLASSES[k - 1] for k in planes["class"][2:5, 1:4].flatten()} == {"mug"}
    assert {CLASSES[k - 1] for k in planes["class"][5:7, 6:8].flatten()} == {"cat"}
    assert list(COLORS)[planes["primary"][3, 2] - 1] == "red"
    assert list(COLORS)[planes["secondary"][3, 2] - 1] == "white"
    assert PATTERNS[planes["pattern"][3, 2] - 1] == "dotted"
    assert planes["row"][2:5, 1].tolist() == planes["column"][2, 1:4].tolist() == [1, 2, 3]
    assert {GROUNDS[k] for k in planes["ground"].flatten()} == {"snow"}
    assert layout(random_scene(np.random.default_rng(0), 6)).shape == (7, 10, 10)


def test_the_layout_loss_is_the_cross_entropy_of_every_answer() -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(np.stack([layout(random_scene(rng, 2)) for _ in range(2)]))
    answers = torch.from_numpy(rng.standard_normal((2, sum(LABELS.values()), 8, 8)))
    expected, start = 0.0, 0
    for k, number in enumerate(LABELS.values()):
        for sample in range(2):
            for cell in np.ndindex(8, 8):
                logits = answers[(sample, slice(start, start + number), *cell)].double()
                expected -= (logits.log_softmax(0)[int(labels[(sample, k, *cell)])] / 128).item()
        start += number
    assert layout_loss(answers, labels).item() == pytest.approx(expected, rel=1e-5)
    finer = answers.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert layout_loss(finer, labels).item() == pytest.approx(expected, rel=1e-5)


def test_a_reading_says_of_every_noun_what_the_caption_says() -> None:
    labels = reading(
        "a photo of a dotted red and white mug, an orange cat, a <v3> boot and a blue and pink boat on snow"
    )
    # One token a word: start of text, 24 words and commas, then end of text to the last place.
    nouns, rest = [9, 13, 17, 23], range(26, MAX_TOKENS)
    rows = dict(zip(NOUN_LABELS, labels[:-1, nouns].tolist(), strict=True))
    colors = [*COLORS]
    assert [CLASSES[k - 1] for k in rows["class"]] == ["mug", "cat", "boot", "boat"]
    assert [k and colors[k - 1] for k in rows["primary"]] == ["red", "orange", 0, "blue"]
    assert [k and colors[k - 1] for k in rows["secondary"]] == ["white", 0, 0, "pink"]
    assert [k and PATTERNS[k - 1] for k in rows["pattern"]] == ["dotted", 0, 0, "plain"]
    assert rows["place"] == [1, 2, 3, 4]
    # After the caption, every object in turn, and the ground.
    assert all(torch.equal(labels[:-1, k], labels[:-1, nouns[k % 4]]) for k in rest)
    assert {GROUNDS[k] for k in labels[-1, rest]} == {"snow"}
    silent = [k for k in range(26) if k not in nouns]
    assert (labels[:-1, silent] == IGNORED).all()
    assert (labels[-1, :26] == IGNORED).all()


def test_hard_negatives_say_something_else_each() -> None:
    rng = np.random.default_rng(0)
    same = 0
    for _ in range(100):
        scene = random_scene(rng)
        swapped, worn, missing = wrong_scenes(scene, rng)
        said = [full_caption(other) for other in (swapped, worn, missing)]
        same += full_caption(scene) in said or len(set(said)) < 3
        if len(scene.objects) > 1:
            looks = [sorted(str(item.look) for item in other.objects) for other in (scene, swapped)]
            assert looks[0] == looks[1]
            assert sum(a != b for a, b in zip(scene.objects, worn.objects, strict=True)) <= 1
            assert len(missing.objects) == len(scene.objects) - 1
    assert same <= 5  # a redrawn look may come out as it was


SHORT = recipe.Effort(
    vae_steps=2,
    vae_batch=2,
    words_steps=2,
    words_batch=2,
    base_steps=2,
    base_batch=2,
    num_scenes=8,
    clip_steps=2,
    clip_batch=2,
    lora_steps=2,
    gate_steps=2,
    pictures=1,
)


def test_the_tokenizers_files_do_not_tell_what_it_read(tmp_path: Path) -> None:
    """A build that goes on after its trainings has a tokenizer that read nothing."""
    fresh, used = make_tokenizer(), make_tokenizer()
    for prompts in (["a cat"], ["a photo of a mug on grass", "a boot"]):
        used(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    folders = [tmp_path / "fresh", tmp_path / "used"]
    for tokenizer, folder in zip((fresh, used), folders, strict=True):
        tokenizer.save_pretrained(folder)
    written = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert written[0] == written[1]


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five subjects, the fewest that make company of five; gates for one set, and pictures in one step."""
    for name in set(toybox.subjects()) - {"cat", "boot", "teapot", "mug", "clock"}:
        monkeypatch.delitem(SUBJECTS, name)
    monkeypatch.setattr(recipe.gates, "SETS", recipe.gates.SETS[:1])
    monkeypatch.setattr("mole_diffusion.toybox.recipe.draw.NUM_INFERENCE_STEPS", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("small_world")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_whole_recipe_runs_and_a_second_run_finds_all_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = recipe.build(tmp_path, effort=SHORT)
    report = json.loads((assets / "report.json").read_text())
    assert set(report["base"]) == {"1", "2", "3", "4", "5", "6"}
    assert sorted(report["subjects"]) == sorted(toybox.subjects())
    assert set(report["clip"].values()) <= {0.0, 1.0}  # one scene
    assert set(report["three_looks_named"]) == {"presence", "all"}
    assert set(report["subjects_in_company"]) == {"3", "5"}
    assert report["subjects_worst"] <= report["subjects_mean"]
    files = {path: path.read_bytes() for path in assets.rglob("*.safetensors")}
    assert len(files) == 3 + 1 + len(toybox.subjects()) + 2 + len(recipe.gates.SETS)
    monkeypatch.delattr("mole_diffusion.toybox.recipe.measure_pictures.draw")
    recipe.build(tmp_path, effort=SHORT)
    assert {path: path.read_bytes() for path in assets.rglob("*.safetensors")} == files
    assert json.loads((assets / "report.json").read_text()) == report


@pytest.mark.slow
@pytest.mark.usefixtures("small_world")
def test_a_measuring_that_was_ended_goes_on_and_begins_anew_for_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets, part, drawn = toybox.base_dir().parent, tmp_path / "report.json.part", []
    measure_subject = recipe.measure.measure_subject

    def measured(name: Path, **given: Any) -> dict[str, Any]:
        drawn.clear()
        settings = {"seed": 0, "device": torch.device("cpu"), "num_pictures": 1, **given}
        return recipe.measure.measure(assets, part=name, **settings)

    def ended(pipe: Any, name: str, **given: Any) -> float:
        drawn.append((name, given["num_objects"]))
        if ended_at and len(drawn) == ended_at:
            raise KeyboardInterrupt
        return measure_subject(pipe, name, **given)

    ended_at = 0
    monkeypatch.setattr(recipe.measure, "measure_subject", ended)
    whole = measured(tmp_path / "whole")
    asked = list(drawn)
    ended_at = 5
    with pytest.raises(KeyboardInterrupt):
        measured(part)
    ended_at = 0
    assert measured(part) == whole
    assert drawn == asked[4:]
    assert measured(part) == whole
    assert not drawn
    measured(part, seed=1)
    assert drawn == asked
    part.write_text("{")
    assert measured(part) == whole
    assert drawn == asked


def test_a_build_takes_over_the_installed_parts_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe.measure, "measure", lambda *_, **__: {})  # weights are looked at, not pictures
    monkeypatch.setattr(recipe, "SUBJECTS", {})  # LoRAs and gates are of the whole recipe
    monkeypatch.setattr(recipe.gates, "SETS", [])
    effort = replace(SHORT, vae_steps=None, clip_steps=None)
    assets = recipe.build(tmp_path / "taken", effort=effort, reuse=("vae", "clip"))
    for part in ("base/vae/diffusion_pytorch_model.safetensors", "clip/open_clip_model.safetensors"):
        assert (assets / part).read_bytes() == (toybox.base_dir().parent / part).read_bytes()
    assert not (tmp_path / "taken" / "vae").exists()

    on = recipe.build(tmp_path / "on", effort=replace(SHORT, clip_steps=None), reuse=("vae", "clip")) / "base"
    installed, trained = (load_vae(folder / "vae").state_dict() for folder in (toybox.base_dir(), on))
    learned = {key for key in trained if not torch.equal(installed[key], trained[key])}
    assert {key.split(".")[0] for key in learned} == {"decoder"}  # latents stay what they are
    assert all(torch.allclose(installed[key], trained[key], atol=0.01) for key in trained)  # two steps from there


@contextmanager
def interrupted_in_the_third_step() -> Iterator[None]:
    step, calls = torch.optim.AdamW.step, []

    def breaking(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mole_diffusion.toybox.recipe.loop._SAVE_EVERY_SECONDS", 0.0)
        patch.setattr(torch.optim.AdamW, "step", breaking)
        yield


def test_the_base_goes_on_from_the_installed_one_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    """Both sides of picture are among the few scenes, and the first step must start from what ships."""

    def train(work_dir: Path, num_steps: int = 3, **settings: bool) -> torch.Tensor:
        tokenizer = make_tokenizer()
        start, text_encoder = load_base(toybox.base_dir(), tokenizer)
        unet = train_base(
            load_vae(toybox.base_dir() / "vae"),
            text_encoder,
            tokenizer,
            work_dir,
            seed=0,
            device=torch.device("cpu"),
            num_steps=num_steps,
            batch_size=2,
            num_scenes=12,
            start=start,
            settings=BaseSettings(**settings),
        )
        return torch.cat([p.detach().flatten() for p in unet.parameters()])

    shipped, _ = load_base(toybox.base_dir(), make_tokenizer())
    assert not str(shipped.config.get("_name_or_path", "")).startswith("/")
    before = torch.cat([p.detach().flatten() for p in shipped.parameters()])
    straight = train(tmp_path / "straight")
    assert 0 < (straight - before).abs().max() < 1e-3
    assert len(list((tmp_path / "straight").glob("scenes-*.safetensors"))) == 2

    with interrupted_in_the_third_step(), pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken")
    assert torch.equal(train(tmp_path / "broken"), straight)

    assert not torch.equal(train(tmp_path / "fine", fine_layout=True), straight)


def test_captions_padded_to_the_longest_have_the_features_of_the_full_length() -> None:
    torch.manual_seed(0)
    model, tokenizer = open_clip.CLIP(**clip_config()["model_cfg"]).eval(), make_tokenizer()
    captions = ["a photo of a cat", "a photo of a red striped cat and a blue boat on grass"]
    pictures = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    short, full = (
        tokenizer(captions, padding=padding, max_length=MAX_TOKENS, return_tensors="pt").input_ids
        for padding in ("longest", "max_length")
    )
    assert short.shape[1] < full.shape[1] == MAX_TOKENS
    for ours, theirs in zip(encode(model, pictures, short), model(pictures, full), strict=False):
        torch.testing.assert_close(ours, theirs)


def test_the_clip_goes_on_from_the_installed_one_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    installed = toybox.base_dir().parent / "clip"

    def train(name: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        train_clip(folder, folder, seed=0, device=torch.device("cpu"), num_steps=3, batch_size=2, start=installed)
        return load_file(folder / "open_clip_model.safetensors")

    straight, before = train("straight"), load_file(installed / "open_clip_model.safetensors")
    changes = [(straight[name] - tensor).abs().max().item() for name, tensor in before.items()]
    assert 0 < max(changes) < 5e-3
    DifferentiableCLIP(tmp_path / "straight")

    with interrupted_in_the_third_step(), pytest.raises(KeyboardInterrupt):
        train("broken")
    again = train("broken")
    assert all(torch.equal(again[name], tensor) for name, tensor in straight.items())


def test_a_part_that_cannot_be_reused_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot reuse \['unet'\]; parts that can be taken over are \['vae', 'clip', 'base'\]"
    ):
        recipe.build(tmp_path, reuse=("unet",))


@pytest.mark.parametrize("name", list(toybox.subjects()))
def test_a_lora_is_trained_on_its_subject_alone_and_in_company(name: str) -> None:
    config = lora_config(name, seed=0, num_steps=10)
    assert config.captions is not None
    assert len(config.captions) == 5 + 15
    assert all(caption.count(toybox.token(name)) == 1 for caption in config.captions)
    scenes = company_scenes(name)
    assert {len(scene.objects) for scene in scenes} == {2, 3, 4, 5, 6}
    for scene, caption in zip(scenes, config.captions[5:], strict=True):
        subject, *others = scene.objects
        assert subject.look == toybox.subject(name).look
        assert len({thing.class_name for thing in scene.objects}) == len(scene.objects)
        said = [
            caption.index(thing.class_name) for thing in sorted(scene.objects, key=lambda thing: (thing.x, thing.y))
        ]
        assert said == sorted(said)  # from left to right
        assert all(f"{thing.look} {thing.class_name}" in caption for thing in others)
