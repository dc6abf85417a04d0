"""Methods that bind LoRAs to their subjects in whole calls: what they must equal, and that nothing outlives a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mole_diffusion.composition import COMPOSITIONS, Masks, RegionalComposition, RegionMap
from mole_diffusion.experts.seam import LayerSeam
from tests.composing import assert_close, composing_pipeline, lora_states
from tests.composition.binding import PROMPT, REGIONS, four, fresh, generators
from tests.merging import merge_state
from tests.tiny import ATTENTION, FEED_FORWARD, TEXT_ENCODER, random_lora

BINDING = ["masks", "freefuse", "norm_router"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return fresh()


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


@pytest.mark.parametrize(("method", "regions"), [("masks", REGIONS), ("freefuse", None), ("norm_router", None)])
def test_several_pictures_of_a_prompt_are_those_of_calls_for_one(pipe: Any, method: str, regions: Any) -> None:
    pipe.set_composition(method)
    both = four(pipe, num_images_per_prompt=2, generator=generators(5, 6), regions=regions)
    for row, seed in enumerate((5, 6)):
        assert_close(both[row : row + 1], four(pipe, generator=generators(seed)[0], regions=regions))


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


class Everywhere(Masks):
    """Masks that are asked at every module, and may be asked in every attention layer."""

    def weigh(self, *asked: Any) -> Any:
        return super().weigh(*asked)

    def biases(self, run: Any) -> bool:
        return True


UNBIASED = dict.fromkeys(("own_words", "others_words", "given_own_words", "given_others_words"), 0.0)


@pytest.mark.parametrize("same_ranks", [True, False])
@pytest.mark.parametrize(
    ("regions", "loras", "unbiased"),
    [(None, None, False), (None, None, True), (REGIONS, None, False), (None, ["dog", "mug"], False)],
)
def test_what_is_asked_once_for_many_is_what_would_be_asked_of_each(
    monkeypatch: pytest.MonkeyPatch, same_ranks: bool, regions: Any, loras: Any, unbiased: bool
) -> None:
    """Weights once a place and pass; layers that attend to the prompt in passes that are read or biased alone."""
    settings: dict[str, Any] = UNBIASED if unbiased else {}
    pipe = fresh() if not same_ranks else composing_pipeline()
    if same_ranks:
        components = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
        targets = (ATTENTION, FEED_FORWARD, TEXT_ENCODER)
        states = {
            name: random_lora(components, rank=4, alpha=2, targets=targets, seed=seed)
            for seed, name in enumerate(("cat", "dog", "mug"))
        }
        pipe.load_loras(states)
    pipe.set_composition(Everywhere(**settings))
    expected = four(pipe, regions=regions, loras=loras)
    asked: dict[str, list[Any]] = {"weigh": [], "bias": [], "attended": [], "passes": []}

    def noted(owner: Any, name: str) -> None:
        done = getattr(owner, name)

        def note(self: Any, *given: Any) -> Any:
            asked[name].append((self, *given))
            return done(self, *given)

        monkeypatch.setattr(owner, name, note)

    noted(RegionalComposition, "weigh")
    noted(LayerSeam, "bias")
    noted(LayerSeam, "attended")
    pipe.unet.register_forward_hook(lambda *_: asked["passes"].append(pipe.experts.context))
    pipe.set_composition(Masks(**settings))
    assert_close(four(pipe, regions=regions, loras=loras), expected, atol=1e-5)
    passes = asked["passes"]
    sites = [site for site in pipe.experts.sites.values() if site.component == "unet"]
    places = {(site.reads, site.halvings) for site in sites}
    weighed = [given for given in asked["weigh"] if given[3].component == "unet"]
    assert len(weighed) == len(places) * len(passes) < len(sites) * len(passes) / 2
    layers = len([name for name, _ in pipe.unet.named_modules() if name.endswith(".attn2")])
    reading = len(passes) - 4  # passes before the picture
    assert reading == (regions is None)
    asking = reading if unbiased else len(passes)
    assert len(asked["bias"]) == len(asked["attended"]) == layers * asking


def test_a_bias_of_ones_own_is_asked_for_and_so_is_attention_among_pixels() -> None:
    class Own(Masks):
        def attention_bias(self, *asked: Any) -> None:
            self.asked = True

    class Reading(Masks):
        def read(self, *shown: Any) -> None:
            super().read(*shown)

    pipe = fresh(method := Own(**UNBIASED))
    four(pipe)
    assert method.asked
    assert Masks().crossed_alone
    assert not Own().crossed_alone
    assert not Reading().crossed_alone
    assert not COMPOSITIONS["freefuse"]().crossed_alone


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
