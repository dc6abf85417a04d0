"""Prompts that regions have of their own, where words and pixels are one sequence: who sees whom, and nobody else."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mole_diffusion import MoLEStableDiffusion3Pipeline
from mole_diffusion.composition import Masks, RegionMap
from mole_diffusion.errors import MoLEError
from mole_diffusion.families import architecture_of, arguments
from tests.families.test_stable_diffusion_3 import GUIDED
from tests.families.transformers import FAMILIES, loaded, picture
from tests.tiny import dits, random_lora
from tests.tiny.families import sd3

ALL = ["sd3", *FAMILIES]
PROMPT = "a photo on grass"
WORDS = {"a": "a red cat", "b": "a blue dog asleep"}
BOXES = {"a": (0, 0, 0.5, 1.0), "b": (0.5, 0.25, 1.0, 1.0)}
SAID: dict[str, Any] = {name: {"region": BOXES[name], "prompt": WORDS[name]} for name in BOXES}


@functools.cache
def loaded_sd3() -> Any:
    pipe = MoLEStableDiffusion3Pipeline(**sd3())
    pipe.set_progress_bar_config(disable=True)
    parts = {"transformer": pipe.transformer}
    pipe.load_loras({name: random_lora(parts, rank=2, targets="attn", seed=seed) for seed, name in enumerate("ab")})
    return pipe


def draw(pipe: Any, family: str, prompt: Any = PROMPT, **kwargs: Any) -> Tensor:
    if family == "flux2":  # what it looks at is neither words nor the picture's own pixels
        kwargs = {"image": picture(64), **kwargs}
    if family != "sd3":
        return dits.draw(pipe, family, prompt, **kwargs)
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.manual_seed(0), **GUIDED}
    images: Tensor = pipe(prompt=prompt, **{**given, **kwargs}).images
    return images


@dataclass
class Seen:
    """One attention: the layer, what went in before anything was added to scores, and what came out."""

    layer: str
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


class Watching(TorchFunctionMode):
    """Keeps what goes through torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.layer = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            given = {**dict(zip(names, args, strict=False)), **{n: x for n, x in (kwargs or {}).items() if n in names}}
            self.seen.append(Seen(self.layer, **given, output=output))
        return output


@dataclass
class Step:
    """The first step of a picture: what the transformer was told and gave, call by call, and its attention."""

    given: list[dict[str, Any]]
    predicted: list[Any]
    seen: list[Seen]
    masks: RegionMap


def first_step(pipe: Any, family: str, **kwargs: Any) -> Step:
    model, watching = pipe.transformer, Watching()
    given: list[dict[str, Any]] = []
    predicted: list[Any] = []

    def begin(_: Any, args: Any, named: Any) -> None:
        given.append(arguments(model, args, named))
        if len(given) == 1:
            watching.__enter__()

    def end(_: Any, __: Any, output: Any) -> None:
        predicted.append(output[0])
        if len(predicted) == 1:
            watching.__exit__(None, None, None)

    def inside(name: str) -> None:
        watching.layer = name

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end),
        *(
            part.register_forward_pre_hook(lambda *_, name=name: inside(name))
            for name, part in model.named_modules()
            if hasattr(part, "set_processor")
        ),
    ]
    draw(pipe, family, num_inference_steps=1, **kwargs)
    for handle in handles:
        handle.remove()
    return Step(given, predicted, watching.seen, pipe.masks)


@functools.cache
def with_words(family: str) -> Step:
    """Both regions with prompts of their own."""
    return first_step(made(family), family, regions=SAID)


def made(family: str) -> Any:
    pipe = loaded_sd3() if family == "sd3" else loaded(family)
    pipe.set_composition(Masks(given_own_words=0, given_others_words=0, join=0))
    return pipe


REFINERS = {"z_image": "context_refiner", "krea2": "text_fusion.refiner_blocks"}
"""Layers in which words attend to each other alone."""
ROW = {"sd3": 1}
"""Which row of the first call has the prompt, where it is not the first."""


def lengths(pipe: Any, family: str) -> list[int]:
    """How many tokens the transformer is given of the prompt and of those of the regions, in this order."""
    limit = (GUIDED if family == "sd3" else dits.CALL[family]).get("max_sequence_length")
    limits = {} if limit is None else {"max_sequence_length": limit}
    with torch.no_grad():
        encoded = [pipe.family.encode(pipe, [text], "cpu", **limits) for text in (PROMPT, *WORDS.values())]
    if family == "krea2":  # what fills a region's prompt up is left out
        return [encoded[0][0].shape[1], *(int(there.sum()) for _, there in encoded[1:])]
    return [len(embeds[0]) for embeds, *_ in encoded]


def sees(one: tuple[str, int], other: tuple[str, int], shares: Tensor) -> float:
    """How much of another token a token sees: a factor on its attention, before that is normalised."""
    kinds = {one[0], other[0]}
    if kinds == {"region"}:
        return float(one[1] == other[1])
    if kinds == {"region", "prompt"}:
        return 0.0
    if kinds == {"region", "pixel"}:
        (_, region), (_, pixel) = (one, other) if one[0] == "region" else (other, one)
        return float(shares[pixel, region])
    if one[0] == "neither" and other[0] == "region":
        return 0.0
    return 1.0


@pytest.mark.parametrize("family", ALL)
def test_words_of_a_region_and_its_pixels_see_each_other_and_nobody_else_sees_them(family: str) -> None:
    """softmax of the scores, times how much each token sees of each other, literally and in float64."""
    step, pipe, row = with_words(family), made(family), ROW.get(family, 0)
    known = architecture_of(pipe.transformer)
    told = known.told(pipe.transformer, step.given[0])
    counts = lengths(pipe, family)
    whose = [("prompt" if part == 0 else "region", part - 1) for part, n in enumerate(counts) for _ in range(n)]
    words = told.joint.text.stop - told.joint.text.start
    whose += [("prompt", -1)] * (words - len(whose))  # what Z-Image fills up with
    shares = step.masks.at(*told.sample_size)[0].double()
    assert set(shares.unique().tolist()) > {0.0, 1.0}  # an edge in between
    there = torch.ones(words, dtype=torch.bool) if told.words is None or family == "z_image" else told.words[row]

    factors: dict[bool, Tensor] = {}
    for one in step.seen:
        refining = family in REFINERS and one.layer.startswith(REFINERS[family])
        if not refining and not known.meeting.match(one.layer):
            continue
        tokens = one.query.shape[2]
        if refining:
            assert tokens == words
            kinds, visible = whose, there
        else:
            kinds = [("neither", -1)] * tokens
            kinds[told.joint.text] = whose
            kinds[told.joint.pixels] = [("pixel", index) for index in range(len(shares))]
            visible = torch.ones(tokens, dtype=torch.bool)
            visible[told.joint.text] = there
        if refining not in factors:
            seen = torch.tensor([[sees(a, b, shares) for b in kinds] for a in kinds], dtype=torch.float64)
            factors[refining] = seen * visible
        query, key, value = (x[row].double() for x in (one.query, one.key, one.value))
        key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in (key, value))
        weights = factors[refining] * (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).exp()
        expected = weights @ value / weights.sum(dim=-1, keepdim=True)
        # Tokens that only fill up are read by nobody.
        torch.testing.assert_close(one.output[row].double()[:, visible], expected[:, visible], rtol=1e-4, atol=1e-5)
    assert len(factors) == (2 if family in REFINERS else 1)
    assert (("neither", -1) in kinds) == (family == "flux2")


GUIDED_APART = {"sd3": lambda predicted: predicted[0][:1], "z_image": lambda predicted: predicted[0][1]}
"""What is predicted for the negative prompt, where that is no call of its own."""


@pytest.mark.parametrize("family", ALL)
def test_a_region_s_own_prompt_is_read_and_a_negative_prompt_knows_nothing_of_it(family: str) -> None:
    pipe, step = made(family), with_words(family)
    other = first_step(pipe, family, regions={**SAID, "a": {"region": BOXES["a"], "prompt": "a green boot"}})
    row = ROW.get(family, 0)
    assert (other.predicted[0][row] - step.predicted[0][row]).abs().max() > 1e-4
    if family in ("flux", "flux2"):  # no negative prompt
        return
    plain = first_step(pipe, family, regions=BOXES)
    negative = GUIDED_APART.get(family, lambda predicted: predicted[1])
    torch.testing.assert_close(negative(step.predicted), negative(plain.predicted), rtol=0, atol=1e-5)
    assert (plain.predicted[0][row] - step.predicted[0][row]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["sd3", "z_image", "krea2", "qwen_image"])
def test_prompts_of_a_batch_have_the_words_of_a_region_behind_their_own(family: str) -> None:
    pipe = made(family)
    prompts = [PROMPT, "a mug and a clock on a red wall in the grass"]
    one_step: dict[str, Any] = {"regions": SAID, "num_inference_steps": 1}
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = draw(pipe, family, prompts[:], generator=seeds, **one_step)
    for row, prompt in enumerate(prompts):
        if family in ("z_image", "qwen_image") and row == 0:
            continue  # in a batch, pixels or a region's words stand behind the longest of the prompts
        alone = draw(pipe, family, prompt, generator=torch.Generator().manual_seed(row), **one_step)
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-4)


def test_it_is_read_without_its_lora_and_not_where_there_is_none() -> None:
    pipe = made("sd3")
    others = [{**SAID, "a": {"region": BOXES["a"], "prompt": words}} for words in ("a red cat", "a green boot")]
    left_out = [draw(pipe, "sd3", regions=regions, loras=["b"], num_inference_steps=1) for regions in others]
    assert not torch.equal(*left_out)
    base = draw(pipe, "sd3", loras=[], num_inference_steps=1)
    assert torch.equal(draw(pipe, "sd3", regions=SAID, loras=[], num_inference_steps=1), base)


def test_embeddings_take_no_further_words() -> None:
    pipe = made("flux")
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(PROMPT, None, device="cpu", max_sequence_length=32)
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "spans": {"a": [0], "b": [1]}}
    with pytest.raises(MoLEError, match=r"regions of a, b have prompts of their own.*behind `prompt_embeds`"):
        dits.draw(pipe, "flux", None, regions=SAID, **given)
