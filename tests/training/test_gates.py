"""`train_gates`: settings, only gates learn, resuming, what it leaves behind; on a tiny model and a random CLIP."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.errors import MoLEError
from mole_diffusion.files import in_use
from mole_diffusion.gating import GateConfig
from mole_diffusion.gating.balance import balance_loss
from mole_diffusion.training import PRESETS, Concept, GateTrainingConfig, TrainingDivergedError
from mole_diffusion.training.engine.randomness import step_generator
from mole_diffusion.training.gates.guidance import Guidance
from mole_diffusion.training.gates.walk import Walker
from tests.gate_training import CONCEPTS, PROMPTS, config, mole_pipeline, train
from tests.tiny import random_lora, tiny_pipeline

pytestmark = pytest.mark.usefixtures("few_steps")


def test_what_cannot_be_trained_says_why(clip: DifferentiableCLIP) -> None:
    with pytest.raises(ValueError, match="StableDiffusionPipeline composes no LoRAs"):
        train(tiny_pipeline(StableDiffusionPipeline), config(), clip)
    with pytest.raises(ValueError, match=r"at least two must be loaded; loaded are \['lora0'\]"):
        train(mole_pipeline(1), config(), clip)
    with pytest.raises(ValueError, match=r"loaded are \[\]"):
        train(mole_pipeline(0), config(), clip)
    pipe = mole_pipeline()
    with pytest.raises(ValueError, match="list of at least one prompt"):
        train(pipe, config(), clip, prompts=[])
    with pytest.raises(ValueError, match="one prompt twice"):
        train(pipe, config(), clip, prompts=["a cat", "a cat"])
    cat = Concept(token="<v1>", class_name="cat")
    with pytest.raises(ValueError, match=r"`concepts` has 'cat', which is no loaded LoRA. Loaded are: lora0, lora1"):
        train(pipe, config(), clip, concepts={"cat": cat})
    with pytest.raises(ValueError, match=r"tokens of their own, got \['<v1>', '<v1>'\]"):
        train(pipe, config(), clip, concepts={"lora0": cat, "lora1": cat})
    with pytest.raises(ValueError, match="compare with concepts, and `concepts` has none"):
        train(pipe, config(local_weight=1.0), clip)
    with pytest.raises(ValueError, match=r"'a <v2> dog in the sand' has none of the tokens \['<v1>'\]"):
        train(pipe, config(identity_weight=1.0, reference_pictures=1), clip, concepts={"lora0": cat})
    with pytest.raises(ValueError, match=r"2 LoRAs cannot all have that share. Use at most 0.500"):
        train(pipe, config(balance="floor", balance_floor=0.6), clip)


def test_gradients_reach_every_gate_and_nothing_else(clip: DifferentiableCLIP) -> None:
    pipe = mole_pipeline()
    models = [pipe.unet, pipe.text_encoder, pipe.vae, clip]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    fresh = {name: value.detach().clone() for name, value in pipe.init_gates(GateConfig()).named_parameters()}

    gates = train(pipe, config(steps=3), clip)

    assert gates is pipe.gates
    # The first step moves the weights, the next ones the temperatures: at uniform gates tau has no gradient.
    assert {name for name, value in gates.named_parameters() if torch.equal(value, fresh[name])} == set()
    assert any(name.startswith("gates.text_encoder") for name in fresh)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())


def test_the_balance_loss_evens_gates_out(clip: DifferentiableCLIP) -> None:
    """A small step of it alone does more than any other, whatever the weights are; on the noise it was taken for.

    Gates are thrown out of balance after the first step: as they begin, it has nothing to do.
    """

    def unevenness(weight: float) -> tuple[float, float]:
        settings = config(steps=2, learning_rate=0.01, balance_weight=weight, rollout_steps=1, guidance_scale=1.0)
        pipe, generator, losses = mole_pipeline(), torch.Generator().manual_seed(0), []

        @torch.no_grad()
        def throw_out_once(step: int, terms: Mapping[str, float]) -> None:
            losses.append(terms["balance"])
            for parameter in pipe.gates.gate_parameters() if step == 1 else ():
                parameter += torch.randn(parameter.shape, generator=generator)

        train(pipe, settings, clip, prompts=PROMPTS[:1], on_step_end=throw_out_once)
        walker = Walker(pipe, settings)
        plan = plan_of(walker, settings, step=1)
        with torch.no_grad(), pipe.gates.record() as record, pipe.composing():
            walker.predict(plan.noise, plan.timesteps[0], walker.encode([PROMPTS[0]]))
        return losses[1], float(balance_loss(record.rows(), record.present()))

    (before, balanced), (same, free) = unevenness(1000.0), unevenness(0.0)
    assert before == same > 2 * math.log(2) + 1e-3
    assert balanced < min(before, free)


def plan_of(walker: Walker, settings: GateTrainingConfig, step: int) -> Any:
    """The walk of a training's step for one prompt, counted from 0."""
    generator = step_generator(settings.seed, step)
    torch.randint(1, (1,), generator=generator)  # which prompt
    return walker.plan(generator)


def test_a_step_of_training_makes_clip_like_its_picture_more(clip: DifferentiableCLIP) -> None:
    """To first order, so by a small step, whatever the weights are; on the noise that it was trained on."""
    pipe = mole_pipeline()
    settings = config(steps=1, learning_rate=0.01, balance="off", rollout_steps=1, guidance_scale=1.0)
    pipe.init_gates(settings.gates)
    guidance, walker = Guidance(clip, settings, PROMPTS[:1], {}, {}), Walker(pipe, settings)

    @torch.no_grad()
    def loss() -> float:
        plan = plan_of(walker, settings, step=0)
        with pipe.composing():
            prediction = walker.predict(plan.noise, plan.timesteps[0], walker.encode([PROMPTS[0]]))
        images = walker.decode(walker.picture_latents(prediction, plan.noise, plan.timesteps[0], plan.noise))
        return guidance.terms(images, [0])["global"].item()

    before, seen = loss(), []
    train(pipe, settings, clip, prompts=PROMPTS[:1], on_step_end=lambda step, terms: seen.append(terms["global"]))
    assert seen == [pytest.approx(before, abs=1e-6)]
    assert loss() < before - 1e-6


def test_the_same_training_gives_the_same_gates_in_one_go_or_in_two(clip: DifferentiableCLIP, tmp_path: Path) -> None:
    settings = config(steps=3, checkpoint_every=1, learning_rate=0.05)
    whole = train(mole_pipeline(), settings, clip, out=tmp_path / "whole", pictures=False)

    def cut(step: int, losses: Mapping[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(mole_pipeline(), settings, clip, work=tmp_path / "work", on_step_end=cut)
    steps: list[int] = []
    resumed = train(
        mole_pipeline(),
        settings,
        clip,
        work=tmp_path / "work",
        out=tmp_path / "resumed",
        pictures=False,
        on_step_end=lambda step, losses: steps.append(step),
    )
    assert steps == [3]
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    reports = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "resumed")]
    assert reports[0] == reports[1]
    assert not list((tmp_path / "whole").glob("*.png"))
    numbers = {"loss", "global", "balance", "entropy", "weight/lora0", "weight/lora1", "temperature", "gradient_norm"}
    assert {name: len(values) for name, values in reports[0]["numbers"].items()} == dict.fromkeys(numbers, 3)
    assert reports[0]["config"]["gates"] == GateConfig().to_dict()

    loaded = mole_pipeline()
    loaded.load_gates(tmp_path / "whole")
    assert all(torch.equal(value, state[name]) for name, value in loaded.gates.state_dict().items())

    with pytest.raises(ValueError, match=r"\(step 3\) is of another training: not the same: the prompts, what CLIP"):
        train(mole_pipeline(), settings, clip, work=tmp_path / "work", prompts=PROMPTS[:1])


def test_what_is_another_when_it_goes_on_is_named(clip: DifferentiableCLIP, tmp_path: Path) -> None:
    def go_on(**changes: Any) -> list[int]:
        steps: list[int] = []
        pipe = mole_pipeline()
        if "lora" in changes:
            pipe.unload_loras(["lora1"])
            pipe.load_loras({"lora1": random_lora(pipe.components, seed=7)})
        picture = Image.new("RGB", (40, 30), changes.get("colour", "red"))
        settings = config(steps=changes.get("steps", 1), local_weight=1.0, rollout_steps=1)
        train(
            pipe,
            settings,
            changes.get("clip", clip),
            concepts={name: dataclasses.replace(one, references=[picture]) for name, one in CONCEPTS.items()},
            work=tmp_path,
            on_step_end=lambda step, _: steps.append(step),
        )
        return steps

    assert go_on() == [1]
    other = copy.deepcopy(clip)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    for changes, named in (
        ({"clip": other, "lora": True}, "not the same: the CLIP, the LoRA 'lora1'"),
        (
            {"steps": 2, "colour": "blue"},
            "`steps` is 1 there and 2 here; not the same: the pictures of 'lora0', .*",
        ),
    ):
        with pytest.raises(MoLEError, match=rf"is of another training: {named}\. Give the same"):
            go_on(**changes)
    # Features differ in their last digits where there are other threads, and are no part of what a training is of.
    rounded = copy.deepcopy(clip)
    encode = rounded.encode_image
    rounded.encode_image = lambda images: encode(images) * (1 + 1e-6)  # type: ignore[method-assign]
    assert go_on(clip=rounded) == []


def test_one_process_writes_into_a_folder(clip: DifferentiableCLIP, tmp_path: Path) -> None:
    with in_use(tmp_path / "out", "-out"), pytest.raises(MoLEError, match="out is in use by another process"):
        train(mole_pipeline(), config(), clip, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def numbers_of(settings: GateTrainingConfig, clip: DifferentiableCLIP, **options: Any) -> dict[str, float]:
    """Those of the last step."""
    found: dict[str, float] = {}
    train(mole_pipeline(), settings, clip, on_step_end=lambda step, numbers: found.update(numbers), **options)
    return found


def test_clip_reads_the_words_it_knows(clip: DifferentiableCLIP) -> None:
    """The guidance compares the picture with the concepts' words, the base model draws the tokens."""
    plain, known = (numbers_of(config(steps=1), clip, concepts=concepts) for concepts in (None, CONCEPTS))
    assert plain["global"] != known["global"]
    assert {name: plain[name] for name in ("balance", "entropy")} == {
        name: known[name] for name in ("balance", "entropy")
    }


def test_every_term_is_weighed_and_logged_on_its_own(clip: DifferentiableCLIP, tmp_path: Path) -> None:
    weights = {"global_weight": 0.5, "local_weight": 2.0, "identity_weight": 3.0, "balance_weight": 0.25}
    settings = config(steps=1, reference_pictures=1, **weights)
    numbers = numbers_of(settings, clip, concepts=CONCEPTS, work=tmp_path)
    total = sum(weights[f"{name}_weight"] * numbers[name] for name in ("global", "local", "identity", "balance"))
    assert numbers["loss"] == pytest.approx(total, rel=1e-5)
    assert len({numbers[name] for name in ("global", "local", "identity", "balance")}) == 4
    assert numbers["entropy"] == pytest.approx(math.log(2), rel=1e-5)
    assert numbers["weight/lora0"] == pytest.approx(0.5)
    for balance, value in (("floor", 0.0), ("off", None)):
        settings = config(steps=1, balance=balance)
        assert numbers_of(settings, clip).get("balance") == value


def test_cutting_a_batch_changes_nothing(clip: DifferentiableCLIP) -> None:
    """With a gradient at every step of an ancestral walk, which draws noise for the whole batch.

    But for the order of float32 sums, which Adam magnifies: a step moves a parameter by up to 0.05.
    """
    settings = config(batch_size=2, steps=2, learning_rate=0.05, gradient_steps=0, eta=1.0, update_every=1)
    whole = train(mole_pipeline(), settings, clip).state_dict()
    parts = train(mole_pipeline(), dataclasses.replace(settings, gradient_accumulation=2), clip).state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=5e-4, rtol=0)
    other = train(mole_pipeline(), dataclasses.replace(settings, seed=1), clip).state_dict()
    assert any((other[name] - value).abs().max() > 1e-2 for name, value in whole.items())


def test_mode_and_checkpointing_give_the_same_gates(clip: DifferentiableCLIP) -> None:
    gates = []
    for mode in ("eval", "train", "checkpointing"):
        pipe = mole_pipeline()
        for model in (pipe.unet, pipe.text_encoder, pipe.vae):
            model.train(mode == "train")
        pipe.text_encoder.config.attention_dropout = 0.5
        settings = config(learning_rate=0.05, gradient_checkpointing=mode == "checkpointing")
        gates.append(train(pipe, settings, clip).state_dict())
        assert pipe.unet.training == pipe.unet.mid_block.training == (mode == "train")
        assert not pipe.unet.is_gradient_checkpointing
        assert not pipe.vae.is_gradient_checkpointing
    for other in gates[1:]:
        for name, value in gates[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_and_take_a_step(clip: DifferentiableCLIP, tmp_path: Path, preset: str) -> None:
    """With a shorter walk, which none of their own settings depends on."""
    few = {"steps": 1, "warmup_steps": 0, "rollout_steps": 2, "reference_pictures": 1, "batch_size": 2}
    if preset == "official":
        few["rollout_steps_max"] = 3
    elif preset == "real":
        few["batch_size"] = 4  # in four parts
    settings = GateTrainingConfig.from_dict(few, preset)
    pipe = mole_pipeline(triggers={name: concept.token for name, concept in CONCEPTS.items()})
    prompts = ["a <v1> cat and a <v2> dog"] if preset == "masks" else list(PROMPTS)  # masks are for all subjects
    numbers: list[Mapping[str, float]] = []
    options: dict[str, Any] = {"concepts": CONCEPTS, "prompts": prompts}
    gates = train(pipe, settings, clip, **options, on_step_end=lambda step, values: numbers.append(values))
    assert all(math.isfinite(value) for value in numbers[0].values())
    assert numbers[0]["gradient_norm"] > 0
    assert any(parameter.abs().max() > 0 for name, parameter in gates.named_parameters() if name.endswith("weight"))


def test_a_nan_stops_with_step_term_and_last_good_checkpoint(clip: DifferentiableCLIP, tmp_path: Path) -> None:
    pipe = mole_pipeline()

    def break_it(step: int, numbers: Mapping[str, float]) -> None:
        if step == 2:
            with torch.no_grad():
                pipe.vae.decoder.conv_out.bias.fill_(float("nan"))

    settings = config(steps=4, checkpoint_every=1)
    good = re.escape(str(tmp_path / "work" / "step-0000002.safetensors"))
    message = rf"stopped at step 3: loss = nan, global = nan.*last good checkpoint is {good}\."
    with pytest.raises(TrainingDivergedError, match=message):
        train(pipe, settings, clip, out=tmp_path / "gates", work=tmp_path / "work", on_step_end=break_it)
    assert (tmp_path / "work" / "step-0000002.safetensors").is_file()
    assert not (tmp_path / "gates").exists()
    assert all(parameter.isfinite().all() for parameter in pipe.gates.parameters())
    with pytest.raises(TrainingDivergedError, match=r"No checkpoint was written before\."):
        train(pipe, settings, clip)


def test_a_missing_tracker_says_what_to_install(clip: DifferentiableCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # hides it where it is installed
    with pytest.raises(ValueError, match=r'log_with="wandb" needs the package wandb.*pip install wandb'):
        train(mole_pipeline(), config(), clip, log_with="wandb")
    with pytest.raises(ValueError, match="must be one of none, tensorboard, wandb, got 'mlflow'"):
        train(mole_pipeline(), config(), clip, log_with="mlflow")
