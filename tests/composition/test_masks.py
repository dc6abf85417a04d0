"""Methods that bind LoRAs to their subjects in whole calls: what they must equal, and that nothing outlives a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionPipeline, StableDiffusionSAGPipeline
from PIL import Image
from torch import Tensor

from mole_diffusion.composition import COMPOSITIONS, Masks, RegionalComposition, RegionMap
from mole_diffusion.errors import MoLEError
from mole_diffusion.pipelines import (
    MoLEPipelineMixin,
    MoLEStableDiffusionImg2ImgPipeline,
    MoLEStableDiffusionInpaintPipeline,
)
from tests.composing import NAMES, assert_close, composing_pipeline, draw, lora_states
from tests.merging import merge_state
from tests.tiny import tiny_components

PROMPT = "a photo of a cat, a dog and a mug"
BINDING = ["masks", "freefuse", "norm_router"]
REGIONS: dict[str, Any] = {"cat": (0, 0, 0.5, 1), "dog": (0.5, 0, 1, 0.5), "mug": (0.5, 0.5, 1, 1)}


def fresh(method: Any = None) -> Any:
    pipe = composing_pipeline("cat", "dog", "mug")
    pipe.set_composition(method)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    return fresh()


def four(pipe: Any, prompt: Any = PROMPT, **kwargs: Any) -> Tensor:
    return draw(pipe, prompt, **{"num_inference_steps": 4, **kwargs})


@pytest.fixture(scope="module")
def base_and_merged() -> tuple[Tensor, Tensor]:
    """A dog by the base, and by the base with a LoRA in its weights."""
    bare = composing_pipeline()
    base = four(bare, "a dog")
    merge_state(bare, lora_states(bare)["cat"], 0.7)
    return base, four(bare, "a dog")


@pytest.mark.parametrize("name", BINDING)
def test_one_lora_is_that_lora_and_none_is_the_base(
    pipe: Any, base_and_merged: tuple[Tensor, Tensor], name: str
) -> None:
    base, merged = base_and_merged
    pipe.set_composition(name)
    # Alone it needs no word in the prompt: there is nothing to tell it from.
    assert_close(four(pipe, "a dog", loras={"cat": 0.7}), merged)
    assert torch.equal(four(pipe, "a dog", loras=[]), base)
    assert torch.equal(four(pipe, "a dog", loras={"cat": 0.0}), base)


@pytest.fixture(scope="module")
def of_the_base() -> Tensor:
    return four(composing_pipeline(), seed=3)


@pytest.mark.parametrize("method", ["masks", Masks(online=True), "freefuse", "norm_router", Masks(own_words=2.0)])
def test_no_state_survives_a_call(of_the_base: Tensor, method: Any) -> None:
    pipe = fresh(method)
    first, again = four(pipe, seed=3), four(pipe, seed=4)
    if method != "norm_router":
        four(pipe, seed=3, regions=REGIONS)
    assert torch.equal(four(pipe, seed=3), first)
    assert torch.equal(four(fresh(method), seed=4), again)
    pipe.unload_loras()
    assert torch.equal(four(pipe, seed=3), of_the_base)


def test_the_prior_leaves_random_numbers_callbacks_and_settings_alone() -> None:
    pipe = fresh("masks")
    steps: list[int] = []

    def note(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        steps.append(step)
        return {}

    settings = dict(pipe._progress_bar_config)
    state = torch.get_rng_state()
    given = four(pipe, callback_on_step_end=note, generator=torch.manual_seed(0))
    torch.set_rng_state(state)
    torch.manual_seed(0)
    drawn = four(pipe, generator=None)
    assert torch.equal(given, drawn)
    assert steps == [0, 1, 2, 3]
    assert pipe._progress_bar_config == settings


def test_online_masks_evaluate_no_more_than_a_sum_and_two_runs_say_what_they_do() -> None:
    pipe = fresh()
    counted: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: counted.append(1))
    spent = {}
    for name, method in {"sum": "linear", "online": Masks(online=True), "masks": Masks(stop=0.5)}.items():
        pipe.set_composition(method)
        counted.clear()
        four(pipe)
        spent[name] = len(counted)
    assert spent == {"sum": 4, "online": 4, "masks": 6}
    assert Masks(stop=0.5).evaluations(3) * 4 == 6
    assert Masks(online=True).evaluations(3) == 1


@pytest.mark.parametrize(
    ("method", "regions"),
    [("masks", None), ("masks", {"dog": (0.5, 0, 1, 1)}), ("freefuse", None), ("norm_router", None)],
)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_batch_of_different_prompts_equals_separate_calls(
    pipe: Any, method: str, regions: Any, guidance: float
) -> None:
    pipe.set_composition(method)
    prompts = [PROMPT, "a mug, a cat and a red dog on grass"]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    options: dict[str, Any] = {"guidance_scale": guidance, "regions": regions}
    both = four(pipe, prompts, generator=generators(), **options)
    for row, prompt in enumerate(prompts):
        assert_close(both[row : row + 1], four(pipe, prompt, generator=generators()[row], **options))


def test_masks_of_several_pictures_are_given_again_picture_by_picture(pipe: Any) -> None:
    pipe.set_composition("masks")
    halves = torch.zeros(2, 3, 4, 4)
    halves[0, 0, :, :2], halves[1, 0, :, 2:] = 1, 1
    halves[:, 1] = 1 - halves[:, 0]
    names = ("cat", "dog", "mug")

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    both = four(pipe, generator=generators(), num_images_per_prompt=2, regions=RegionMap(halves, names))
    for row in range(2):
        own = RegionMap(halves[row : row + 1], names)
        assert_close(both[row : row + 1], four(pipe, generator=generators()[row], regions=own))
    with pytest.raises(ValueError, match="the region map given has 2 rows, but this call draws 4"):
        four(pipe, num_images_per_prompt=4, regions=RegionMap(halves, names))


@pytest.mark.parametrize(("method", "regions"), [("masks", REGIONS), ("freefuse", None), ("norm_router", None)])
def test_several_pictures_of_a_prompt_are_those_of_calls_for_one(pipe: Any, method: str, regions: Any) -> None:
    pipe.set_composition(method)
    both = four(pipe, num_images_per_prompt=2, generator=_generators(5, 6), regions=regions)
    for row, seed in enumerate((5, 6)):
        assert_close(both[row : row + 1], four(pipe, generator=_generators(seed)[0], regions=regions))


def test_several_pictures_of_a_prompt_have_masks_of_their_own(pipe: Any) -> None:
    pipe.set_composition("masks")
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = four(pipe, num_images_per_prompt=2, generator=seeds)
    masks = pipe.masks
    assert masks.values.shape == (2, 3, 16, 16)
    for row, seed in enumerate((5, 6)):
        assert_close(both[row : row + 1], four(pipe, generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(pipe.masks.values[0], masks.values[row])
    assert not torch.equal(masks.values[0], masks.values[1])


def test_masks_of_a_call_can_be_given_again(pipe: Any) -> None:
    pipe.set_composition("masks")
    first = four(pipe, seed=2)
    masks = pipe.masks
    assert masks.names == ("cat", "dog", "mug")
    counted: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: counted.append(1))
    again = four(pipe, seed=2, regions=masks)
    handle.remove()
    assert len(counted) == 4  # nothing to look for
    # The same regions; given ones draw subjects' words to them harder, so only with that as for found ones is it equal.
    pipe.set_composition(Masks(given_own_words=3.0, given_others_words=6.0))
    assert_close(four(pipe, seed=2, regions=masks), first)
    assert not torch.equal(again, first)
    pipe.set_composition("linear")
    with pytest.raises(ValueError, match=r"'linear' weighs every pixel alike, so `regions` would do nothing.*masks"):
        four(pipe, regions=masks)


def test_given_and_found_regions_mix(pipe: Any) -> None:
    pipe.set_composition("masks")
    four(pipe, regions={"dog": (0.5, 0, 1, 1)})
    masks = pipe.masks
    assert masks.fixed == ("dog",)
    inside, outside = masks.values[0, :, :, 10:], masks.values[0, :, :, :6]
    assert torch.equal(inside[1], torch.ones_like(inside[1]))
    assert not inside[0].any()
    assert not inside[2].any()
    assert not outside[1].any()
    assert outside[0].any()


def test_with_every_region_given_a_call_needs_no_words_and_no_prior(pipe: Any) -> None:
    pipe.set_composition("masks")
    counted: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda *_: counted.append(1))
    four(pipe, "a photo on grass", regions=REGIONS)
    handle.remove()
    assert len(counted) == 4


def test_painted_masks_boxes_and_polygons_of_one_place_are_one_region(pipe: Any) -> None:
    pipe.set_composition("masks")
    left = np.zeros((32, 32), bool)
    left[:, :16] = True
    forms: list[Any] = [
        (0, 0, 0.5, 1),
        (0, 0, 16, 32),
        [(0, 0), (0.5, 0), (0.5, 1), (0, 1)],
        left,
        Image.fromarray(left),
    ]
    drawn = [four(pipe, loras=["cat", "dog"], regions={"cat": form, "dog": (0.5, 0, 1, 1)}) for form in forms]
    for other in drawn[1:]:
        assert_close(other, drawn[0])


def test_a_region_may_have_words_of_its_own(pipe: Any) -> None:
    pipe.set_composition("masks")
    box = (0, 0, 0.5, 1)
    with_words: Any = {"cat": {"region": box, "prompt": "a red cat"}, "dog": (0.5, 0, 1, 1)}
    options: dict[str, Any] = {"loras": ["cat", "dog"], "seed": 1}
    shapes: list[tuple[int, ...]] = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["encoder_hidden_states"].shape)), with_kwargs=True
    )
    drawn = four(pipe, "a photo on grass", regions=with_words, **options)
    handle.remove()
    assert set(shapes) == {(2, 32, 32)}  # twice the tokens
    other = {**with_words, "cat": {"region": box, "prompt": "a blue cat"}}
    assert not torch.equal(four(pipe, "a photo on grass", regions=other, **options), drawn)
    assert torch.equal(four(pipe, "a photo on grass", regions=with_words, **options), drawn)
    batch = four(pipe, ["a photo on grass"] * 2, regions=with_words, **options | {"generator": _generators(1, 1)})
    assert_close(batch, torch.cat([drawn, drawn]))
    with pytest.raises(ValueError, match=r"`regions` of 'cat' has the keys \['box'\]"):
        four(pipe, regions={"cat": {"box": box}})


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_words_repeated_for_negative_prompts_change_nothing() -> None:
    query, key, value = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (5, 7, 7))
    once = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    again = torch.nn.functional.scaled_dot_product_attention(query, key.repeat(1, 1, 3, 1), value.repeat(1, 1, 3, 1))
    torch.testing.assert_close(once, again)


class Perturbed(MoLEPipelineMixin, StableDiffusionPAGPipeline):
    """A pipeline whose guidance runs every prompt once more, with attention that is spoilt."""


@pytest.mark.parametrize("guidance_scale", [0.0, 5.0])
def test_masks_are_not_read_where_guidance_spoils_attention(guidance_scale: float) -> None:
    found = []
    for scale in (0.0, 1e-6):  # the weakest that runs the third part
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe: Any = Perturbed(**tiny_components(), **unused, pag_applied_layers=["mid", "up"])
        pipe.load_loras(lora_states(pipe), triggers={name: name for name in NAMES})
        draw(pipe, PROMPT, num_inference_steps=5, guidance_scale=guidance_scale, pag_scale=scale)
        found.append(pipe.masks.values)
    assert_close(found[1], found[0])


class Guided(MoLEPipelineMixin, StableDiffusionSAGPipeline):
    """A pipeline that exchanges a processor while it draws, and gives it back where the call ends well."""


def test_a_call_that_is_refused_leaves_no_processor_behind() -> None:
    components = {**tiny_components(), "safety_checker": None, "feature_extractor": None}
    pipe: Any = Guided(**components, requires_safety_checker=False)
    pipe.load_loras(lora_states(pipe))
    plain: Any = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipe.set_composition("composite")
    with pipe.composing():
        drawn = draw(plain, num_inference_steps=1)
    before = pipe.unet.attn_processors
    for draws in (lambda: draw(pipe), lambda: draw(StableDiffusionSAGPipeline(**components))):
        with pytest.raises(MoLEError, match="CrossAttnStoreProcessor"), pipe.composing():
            draws()
        assert all(before[name] is processor for name, processor in pipe.unet.attn_processors.items())
    with pipe.composing():
        assert torch.equal(draw(plain, num_inference_steps=1), drawn)


def test_a_picture_that_is_cut_into_tiles_inside_the_model_is_refused() -> None:
    pipe = fresh("masks")
    layer = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    whole = layer.forward

    def tiled(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # as HyperTile has it
        rows, tokens, _ = hidden_states.shape
        return whole(hidden_states.reshape(rows * 4, tokens // 4, -1), *args, **kwargs).reshape(rows, tokens, -1)

    layer.forward = tiled
    with pytest.raises(MoLEError, match=r"something cuts the picture into tiles at unet\.down_blocks\.0\."):
        four(pipe)
    pipe.set_composition("norm_router")
    assert four(pipe).isfinite().all()


def test_a_missing_word_is_an_error_that_offers_what_to_do(pipe: Any) -> None:
    pipe.set_composition("masks")
    with pytest.raises(ValueError, match=r"lacks the words that call a LoRA: 'mug'.*loras=\['cat', 'dog'\].*regions="):
        four(pipe, "a cat and a dog")
    four(pipe, "a cat and a dog", loras=["cat", "dog"])
    four(pipe, "a cat and a dog", regions={"mug": (0, 0, 0.5, 0.5)})
    with pipe.composing([]):
        embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    with pytest.raises(ValueError, match=r"got prompt embeddings or a pipeline of plain diffusers.*spans="):
        four(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative)


def test_prompt_embeddings_with_spans_equal_the_prompt(pipe: Any) -> None:
    # These LoRAs leave the text encoder alone, so that embeddings made outside of the call are the same.
    pipe = composing_pipeline()
    states = {
        name: {key: value for key, value in state.items() if key.startswith("unet")}
        for name, state in lora_states(pipe).items()
    }
    pipe.load_loras(states)
    pipe.set_composition("masks")
    expected = four(pipe)
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    spans = {"cat": [5], "dog": [8], "mug": [11]}
    assert torch.equal(four(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative, spans=spans), expected)
    for wrong, message in (({"cow": [1]}, "'cow', which is not loaded"), ({"cat": [99]}, "from 0 to 15")):
        with pytest.raises(ValueError, match=message):
            four(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative, spans=wrong)
    with pytest.raises(ValueError, match="none are given"):
        four(pipe, spans=spans)


def test_by_default_loras_with_known_words_are_bound_and_others_share() -> None:
    pipe = composing_pipeline()
    states = lora_states(pipe)
    pipe.load_loras(states)
    assert pipe.composition.name == "budget"  # nobody told the words
    unbound = four(pipe)
    pipe.set_composition("budget")
    assert torch.equal(four(pipe), unbound)
    pipe.unload_loras()
    pipe.set_composition(None)
    pipe.load_loras(states, triggers={name: name for name in states})
    assert pipe.composition.name == "masks"
    bound = four(pipe)
    pipe.set_composition("masks")
    assert torch.equal(four(pipe), bound)
    pipe.set_composition(None)
    assert pipe.triggers == {"cat": ("cat",), "dog": ("dog",), "mug": ("mug",)}
    with pytest.raises(ValueError, match="lacks the words"):
        four(pipe, "a cat and a dog")
    four(pipe, "a photo", loras=["mug"])  # one alone is not to be told from anything


@pytest.mark.parametrize("method", ["masks", Masks(online=True), "freefuse"])
def test_image_to_image_and_inpainting_bind_too(method: Any) -> None:
    pipe = fresh(method)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    ours = (MoLEStableDiffusionImg2ImgPipeline, MoLEStableDiffusionInpaintPipeline)
    for cls, options in zip(ours, ({}, {"mask_image": Image.new("L", (32, 32), 255)}), strict=True):
        other = cls.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        options = {"image": picture, "strength": 0.5, "num_inference_steps": 6, **options}
        first = draw(other, PROMPT, **options)
        assert isinstance(other.masks, RegionMap)
        assert torch.equal(draw(other, PROMPT, **options), first)
        assert not torch.equal(draw(other, PROMPT, loras=[], **options), first)
        placed = draw(other, PROMPT, regions=REGIONS, **options)
        assert other.masks.fixed == ("cat", "dog", "mug")
        assert not torch.equal(placed, first)


def test_a_stock_pipeline_inside_composing_is_told_what_is_missing(pipe: Any) -> None:
    pipe.set_composition("masks")
    stock = StableDiffusionPipeline.from_pipe(pipe)
    stock.set_progress_bar_config(disable=True)
    with pipe.composing(), pytest.raises(ValueError, match="a pipeline of plain diffusers, which do not tell"):
        draw(stock, PROMPT)
    with pytest.raises(ValueError, match=r"outside of a pipeline's call\. Draw with `pipe"):
        draw(stock, PROMPT)


def test_attention_of_somebody_elses_processors_is_seen_too() -> None:
    pipe, sliced = fresh("masks"), fresh("masks")
    sliced.enable_attention_slicing(1)
    assert_close(four(sliced), four(pipe))
    assert torch.equal(sliced.masks.values, pipe.masks.values)


@pytest.mark.parametrize(
    ("method", "regions"), [("masks", None), ("masks", REGIONS), ("freefuse", None), ("norm_router", None)]
)
def test_gradient_checkpointing_changes_nothing(method: str, regions: Any) -> None:
    pipe = fresh(method)
    options: dict[str, Any] = {"loras": {"cat": 0.5, "dog": 1.0, "mug": -0.5}, "regions": regions}
    expected = four(pipe, **options)
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    assert_close(four(pipe, **options), expected)


class Halves(RegionalComposition):
    """The first LoRA on the left, the second on the right."""

    name = "halves"
    source = "this test"
    needs = frozenset({"words"})

    def regions(self, run: Any) -> RegionMap:
        call = self.call(run)
        if self not in call.state:
            call.state[self] = RegionMap.from_regions(
                {"cat": (0, 0, 0.5, 1), "dog": (0.5, 0, 1, 1)}, call.names, image_size=(32, 32), grid=(16, 16)
            )
        found: RegionMap = call.state[self]
        return found


def test_a_new_regional_method_is_a_class_and_an_entry(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPOSITIONS, "halves", Halves)
    pipe.set_composition("halves")
    drawn = four(pipe, loras=["cat", "dog"])
    pipe.set_composition(Masks(join=0, own_words=0.0, others_words=0.0, given_own_words=0.0, given_others_words=0.0))
    regions = {"cat": (0, 0, 0.5, 1), "dog": (0.5, 0, 1, 1)}
    assert_close(four(pipe, loras=["cat", "dog"], regions=regions), drawn)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.5, "stop": 0.2}, "`start` and `stop` must be 0 <= start < stop < 1, got 0.5 and 0.2"),
        ({"smoothing": 2}, "`smoothing` must be an odd number of pixels below 1000, got 2"),
        ({"smoothing": 10**30 + 1}, "`smoothing` must be an odd number of pixels below 1000, got 1000"),
        ({"smoothing": float("nan")}, "`smoothing` must be an odd number of pixels below 1000, got nan"),
        ({"background": float("nan")}, "`background` must be finite"),
        ({"own_words": 1e300}, "`own_words` must be finite, and at most"),
        ({"neutral_words": float("inf")}, "`neutral_words` must be finite"),
        ({"join": 1.0}, "`join` must be at least 0 and below 1, got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Masks(**settings)
