"""FLUX, FLUX.2, Z-Image, Krea 2 and Qwen-Image: whose words stand where in a prompt, and which pixels see them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mole_diffusion.composition import FreeFuse, Linear, Masks
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Run
from mole_diffusion.experts.seam import LayerSeam
from mole_diffusion.families import architecture_of
from mole_diffusion.gating import GateConfig
from tests.families.transformers import CAPTIONS, FAMILIES, REGIONS, UNGUIDED, loaded, with_triggers
from tests.tiny.dits import draw


@pytest.fixture
def pipe(family: str) -> Any:
    pipe = loaded(family)
    pipe.set_composition("linear")
    return pipe


class Blind(Linear):
    """Adds nothing, and keeps every pixel from every word; notes what it is shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[LayerSeam, Tensor, Tensor, Tensor]] = []

    def weigh(self, *_: Any) -> Any:
        return None

    def attention_bias(self, layer: LayerSeam, query: Tensor, key: Tensor, run: Run) -> Tensor:
        return query.new_full((len(query), 1, query.shape[2], key.shape[2]), float("-inf"))

    def watches(self, run: Run) -> bool:
        return True

    def attended(self, layer: LayerSeam, query: Tensor, key: Tensor, output: Tensor, run: Run) -> None:
        self.shown.append((layer, query, key, output))


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_that_may_not_look_at_words_do_not_know_the_prompt(family: str, pipe: Any) -> None:
    pipe.set_composition(blind := Blind())
    said = {"prompt": CAPTIONS[0]}
    other = {"prompt": CAPTIONS[1]}
    if family == "qwen_image":  # a negative prompt has a call of its own, and fewer words
        said, other = {**said, "true_cfg_scale": 1.0}, {**other, "true_cfg_scale": 1.0}
    if family == "flux":  # CLIP's vector of the prompt goes another way
        said, other = {**said, "prompt_2": CAPTIONS[0]}, {**said, "prompt_2": CAPTIONS[1]}
    if family == "z_image":  # places of the pixels follow the length of the prompt, filled up to 32
        other = {"prompt": "a green boot"}
    one = draw(pipe, family, **said, num_inference_steps=1)
    layers = [name for name, _ in pipe.transformer.named_modules() if meets(pipe.transformer, name)]
    crossed = [shown for shown in blind.shown if shown[0].crossed]
    assert {shown[0].name for shown in crossed} == set(layers)
    told = pipe.experts.context.told
    for layer, query, key, output in crossed:
        heads = query.shape[1]
        assert query.shape[2] == told.sample_size[0] * told.sample_size[1] == 64
        assert key.shape[1:3] == (heads, told.joint.text.stop - told.joint.text.start)
        assert output.shape[1:] == (64, heads * query.shape[-1])
        assert layer.scale == pytest.approx(query.shape[-1] ** -0.5)
    torch.testing.assert_close(draw(pipe, family, **other, num_inference_steps=1), one, rtol=0, atol=1e-5)
    base = [draw(pipe, family, **which, num_inference_steps=1, loras=[]) for which in (said, other)]
    assert (base[0] - base[1]).abs().max() > 1e-3


def meets(model: nn.Module, name: str) -> bool:
    pattern = architecture_of(model).meeting
    assert pattern is not None
    found = pattern.match(name)
    return found is not None and found[1] == name


class Reader(Masks):
    """Masks that keep whose words they were told, and the embeddings, of each call of the transformer."""

    def __init__(self) -> None:
        super().__init__(given_own_words=0, given_others_words=0)
        self.read: list[tuple[Tensor, Tensor]] = []

    def regions(self, run: Run) -> Any:
        text = run.encoder_hidden_states
        assert text is not None
        self.read.append((self.words(self.call(run)).of_embeddings(text), text))
        return super().regions(run)


def read(pipe: Any, family: str, prompt: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    pipe.set_composition(reader := Reader())
    draw(pipe, family, prompt, num_inference_steps=1, regions=REGIONS, **kwargs)
    return reader.read


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_found_where_their_embeddings_are(family: str, pipe: Any) -> None:
    """Language models read from left to right: the first embedding that another word changes is the word's own."""
    prompt = "a photo of a red cat and a dog"
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    ((owned, text), *_) = read(pipe, family, prompt)
    with_triggers(pipe, {"a": "mug", "b": "dog"})
    ((_, other), *_) = read(pipe, family, prompt.replace("cat", "mug"))
    row = 0  # the prompt comes first in every family, where it shares a batch too
    marked = owned[row, 0].nonzero().flatten().tolist()
    assert len(marked) == 1
    assert owned[row, 1].sum() == 1
    assert not (owned[row, 0] & owned[row, 1]).any()
    if family == "flux":  # T5 reads both ways; its tokens are known
        ids = pipe.tokenizer_2(prompt).input_ids
        assert marked == [ids.index(pipe.tokenizer_2("cat").input_ids[0])]
        return
    changed = (text[row] != other[row]).flatten(1).any(dim=1).nonzero().flatten()
    assert changed[0] == marked[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_pictures_and_negative_prompts_are_told_apart(family: str, pipe: Any) -> None:
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    prompts = ["a cat and a dog", "a green boot in the grass with a dog and a cat"]
    given = prompts[:]
    beside = {"negative_prompt": ["sand", "sand"]} if family == "qwen_image" else {}
    calls = read(pipe, family, given, num_images_per_prompt=2, **beside)
    assert given == prompts  # nobody wrote into the caller's list
    (positive, _), *others = calls
    assert all(positive[row].any(dim=1).all() for row in range(4))
    assert torch.equal(positive[0], positive[1])
    assert torch.equal(positive[2], positive[3])
    assert not torch.equal(positive[0], positive[2])
    assert not positive[4:].any()  # Z-Image's negative prompts are in the same batch
    assert len(others) == (family in ("flux2_klein", "krea2", "qwen_image"))
    assert not any(owned.any() for owned, _ in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_found_and_act(family: str, pipe: Any) -> None:
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    pipe.set_composition("masks")
    picture = draw(pipe, family, num_inference_steps=3)
    found = pipe.masks
    assert found is not None
    assert found.values.shape[2:] == (8, 8)
    assert found.values.amax(dim=(0, 2, 3)).min() > 0  # each has some pixel of its own
    again = draw(pipe, family, num_inference_steps=3)
    assert torch.equal(picture, again)
    pipe.set_composition(FreeFuse())
    draw(pipe, family, num_inference_steps=3)
    assert pipe.masks is not None


def test_words_of_the_template_are_nobodys() -> None:
    pipe = loaded("qwen_image")
    with_triggers(pipe, {"a": "image", "b": "dog"})
    ((owned, _), *_) = read(pipe, "qwen_image", "a dog in an image")
    assert owned[0, 0].nonzero().flatten().tolist() == [4]


def test_embeddings_of_z_image_are_listed_and_their_words_told() -> None:
    pipe = loaded("z_image")
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    embeds, negative = pipe.encode_prompt(["a cat and a dog"], max_sequence_length=48)
    kwargs = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "spans": {"a": [5], "b": [7]}}
    ((owned, _), *_) = read(pipe, "z_image", None, num_images_per_prompt=2, **kwargs)
    assert owned[:2, :, :8].nonzero().tolist() == [[0, 0, 5], [0, 1, 7], [1, 0, 5], [1, 1, 7]]
    assert owned.sum() == 4


@pytest.mark.parametrize(("modulation", "weights"), [("share", [0.5, 0.5]), ("first", [1.0, 0.0]), ("off", [0.0, 0.0])])
def test_modulation_that_no_mask_reaches_is_a_setting(modulation: Any, weights: list[float]) -> None:
    pipe = loaded("flux2_klein")
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    seen: list[list[float]] = []

    class Spy(Masks):
        def weigh(self, site: Any, projections: Any, run: Run) -> Tensor | None:
            given = super().weigh(site, projections, run)
            if given is not None and site.reads == "vector":
                seen.append(given[0, 0].tolist())
            return given

    pipe.set_composition(Spy(modulation=modulation))
    draw(pipe, "flux2_klein", num_inference_steps=1, regions=REGIONS)
    assert seen
    assert all(one == weights for one in seen)
    with pytest.raises(MoLEError, match="`modulation` must be one of"):
        Masks(modulation="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["z_image", "krea2", "qwen_image"])
@pytest.mark.parametrize("method", ["mole", "norm_router"])
def test_what_fills_up_a_short_prompt_is_not_read(family: str, method: str) -> None:
    """In a batch with a longer prompt, a picture is what it is alone."""
    pipe = loaded(family)
    if method == "mole":
        gates = pipe.init_gates(GateConfig(scope="matrix"))
        with torch.no_grad():
            for number, parameter in enumerate(gates.gate_parameters()):
                parameter.copy_(3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    pipe.set_composition(method)
    prompts = ["a cat", "a dog in the grass with a mug and a boot and a clock " * 4]
    given = {"num_inference_steps": 1, "max_sequence_length": 128, **UNGUIDED[family]}
    try:
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        both = draw(pipe, family, prompts, generator=seeds, **given)
        alone = draw(pipe, family, prompts[0], generator=torch.Generator().manual_seed(1), **given)
    finally:
        pipe.unload_gates()
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-4)
