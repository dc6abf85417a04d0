"""What ships inside the package: stock libraries open it, and it is what it says."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from mole_diffusion import MoLEStableDiffusionPipeline, toybox
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.lora import inspect_lora, load_lora
from mole_diffusion.toybox.recipe.clip import wrong_scenes
from mole_diffusion.toybox.recipe.loras import IN_KOHYA_LAYOUT, RANKS, WITH_TEXT_ENCODER
from mole_diffusion.toybox.recipe.measure_clip import measure_clip, measure_crops
from mole_diffusion.toybox.shapes import CLASSES
from mole_diffusion.toybox.world import COLORS, article, full_caption, random_scene

pytestmark = pytest.mark.slow
PROMPT = "a photo of a <v1> cat on sand"


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(toybox.base_dir())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def composed() -> MoLEStableDiffusionPipeline:
    pipe = MoLEStableDiffusionPipeline.from_pretrained(toybox.base_dir())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _latents(pipe: StableDiffusionPipeline, prompt: str = PROMPT, **kwargs: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, num_inference_steps=4, generator=generator, output_type="latent", **kwargs).images


def test_every_version_of_transformers_finds_the_text_encoder() -> None:
    """Stable Diffusion's own files say `text_model.`; without it older versions would leave the weights random."""
    from safetensors import safe_open

    with safe_open(toybox.base_dir() / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())


def test_stock_diffusers_opens_the_base_and_draws(stock: StableDiffusionPipeline) -> None:
    picture = stock("a photo of a mug on grass", num_inference_steps=2).images[0]
    assert picture.size == (64, 64)
    assert stock.unet.dtype == stock.text_encoder.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize(
    ("name", "layout"),
    [("cat", "diffusers"), ("boot", "diffusers"), *((name, "kohya") for name in IN_KOHYA_LAYOUT)],
)
def test_stock_diffusers_draws_with_the_loras_what_we_draw(
    stock: StableDiffusionPipeline, composed: MoLEStableDiffusionPipeline, name: str, layout: str
) -> None:
    path = toybox.lora_path(name, layout)  # type: ignore[arg-type]
    prompt = toybox.subject_prompt([name], "sand")
    bare = _latents(stock, prompt)
    stock.load_lora_weights(path)
    theirs = _latents(stock, prompt)
    stock.unload_lora_weights()
    composed.load_loras({name: path})
    composed.set_composition("linear")
    ours = _latents(composed, prompt)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert (ours - bare).abs().max() > 0.05


def test_no_loras_is_the_stock_base_bit_for_bit(
    stock: StableDiffusionPipeline, composed: MoLEStableDiffusionPipeline
) -> None:
    names = toybox.demo_subjects()
    composed.load_loras({name: toybox.lora_path(name) for name in names})
    composed.load_gates(toybox.gates_dir("+".join(names)))
    assert torch.equal(_latents(composed, loras=[]), _latents(stock))
    assert not torch.equal(_latents(composed), _latents(stock))


def test_every_subject_has_a_lora_of_its_rank(stock: StableDiffusionPipeline) -> None:
    components = {"unet": stock.unet, "text_encoder": stock.text_encoder}
    for name in toybox.subjects():
        lora = load_lora(toybox.lora_path(name), components)
        kind = toybox.subject(name).seed
        assert lora.ranks == (RANKS[kind], RANKS[kind])
        assert set(lora.factors) == ({"unet", "text_encoder"} if kind in WITH_TEXT_ENCODER else {"unet"})
    assert len(toybox.subjects()) >= 12
    assert len(WITH_TEXT_ENCODER) >= 4
    assert (min(RANKS), max(RANKS)) == (4, 16)


@pytest.mark.parametrize("name", IN_KOHYA_LAYOUT)
def test_both_layouts_hold_the_same_lora(stock: StableDiffusionPipeline, name: str) -> None:
    components = {"unet": stock.unet, "text_encoder": stock.text_encoder}
    first, second = (load_lora(toybox.lora_path(name, layout), components) for layout in ("diffusers", "kohya"))
    assert inspect_lora(toybox.lora_path(name, "kohya")).layout == "kohya"
    for component, modules in first.factors.items():
        for module, factors in modules.items():
            torch.testing.assert_close(factors.delta(), second.factors[component][module].delta(), atol=1e-6, rtol=1e-5)


def test_open_clip_opens_the_clip_and_it_tells_right_from_wrong() -> None:
    name = f"local-dir:{toybox.clip_dir()}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, 1 + k % 3) for k in range(96)]
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(toybox.render(scene)) for scene in scenes]), normalize=True)
        right = model.encode_text(tokenizer([full_caption(scene) for scene in scenes]), normalize=True)
        changed = [full_caption(wrong_scenes(scene, rng)[k % 3]) for k, scene in enumerate(scenes)]
        wrong = model.encode_text(tokenizer(changed), normalize=True)
    # Three standard errors above chance: a coin for the pair, one in 96 for the list.
    assert ((images * right).sum(1) > (images * wrong).sum(1)).float().mean() > 0.65
    assert ((images @ right.T).argmax(1) == torch.arange(len(scenes))).float().mean() > 0.5


def _draw(pipe: MoLEStableDiffusionPipeline, prompts: list[str], **kwargs: object) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    options = {"num_inference_steps": 15, "guidance_scale": 2.0, "generator": generators}
    return pipe(prompts, **options, **kwargs).images


def test_the_base_draws_the_classes_it_is_told(composed: MoLEStableDiffusionPipeline) -> None:
    pictures = _draw(composed, [f"a photo of {article(name)} {name} on sand" for name in CLASSES])
    found = [{d.class_name for d in detections} for detections in toybox.Oracle().detect(pictures)]
    assert sum(name in seen for name, seen in zip(CLASSES, found, strict=True)) >= 12


def test_the_base_reads_colour_words(composed: MoLEStableDiffusionPipeline) -> None:
    colors = [color for color in COLORS if color != "white"]
    pictures = _draw(composed, [f"a photo of {article(color)} {color} and white mug on grass" for color in colors])
    seen = [{d.look.primary for d in detections} for detections in toybox.Oracle(0.25).detect(pictures)]
    assert sum(color in primaries for color, primaries in zip(colors, seen, strict=True)) >= 5


def test_loras_draw_their_subjects_and_the_base_does_not(composed: MoLEStableDiffusionPipeline) -> None:
    oracle, present = toybox.Oracle(), {"lora": 0, "base": 0}
    for name in toybox.demo_subjects():
        composed.load_loras({name: toybox.lora_path(name)})
        composed.set_composition("linear")
        prompts = [toybox.subject_prompt([name], ground) for ground in toybox.GROUNDS[::2]]
        for kind, loras in (("lora", None), ("base", [])):
            pictures = _draw(composed, prompts, loras=loras)
            present[kind] += sum(oracle(picture, [name])[name].present for picture in pictures)
        composed.unload_loras()
    assert present["base"] <= 1
    assert present["lora"] >= 4


def test_the_gates_that_ship_draw_more_subjects_than_the_normalised_sum(composed: MoLEStableDiffusionPipeline) -> None:
    """On the grounds they were not trained on."""
    names = toybox.demo_subjects()
    composed.load_loras({name: toybox.lora_path(name) for name in names})
    composed.load_gates(toybox.gates_dir("+".join(names)))
    oracle, present = toybox.Oracle(), {}
    for method in ("normalized", "mole"):
        composed.set_composition(method)
        pictures = _draw(composed, [toybox.subject_prompt(names, ground) for ground in ("brick", "slate") * 4])
        present[method] = sum(oracle(picture, names)[name].present for picture in pictures for name in names)
    assert present["mole"] >= present["normalized"] + 6


def test_the_report_says_how_good_it_is() -> None:
    report = json.loads((toybox.base_dir().parent / "report.json").read_text())
    assert set(report["base"]) == {"1", "2", "3", "4", "5", "6"}
    assert set(report["subjects"]) == set(toybox.subjects())
    assert report["oracle"]["rendered"]["hits"] > 0.99
    assert set(report["clip"]) == {"object missing", "wrong look", "looks swapped"}


def test_the_clip_sees_what_the_report_says() -> None:
    seen = measure_clip(DifferentiableCLIP(toybox.clip_dir()), num_scenes=60)
    assert seen == pytest.approx(json.loads((toybox.base_dir().parent / "report.json").read_text())["clip"], abs=0.1)
    assert min(seen.values()) > 0.9


def test_the_clip_tells_a_subjects_crop_from_the_same_class_in_another_look() -> None:
    assert measure_crops(DifferentiableCLIP(toybox.clip_dir()), num_scenes=40) > 1
