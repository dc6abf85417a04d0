"""What CLIP is asked and shown: concepts in prompts, the terms as formulas, reference pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.training import Concept, prompts_from_templates
from mole_diffusion.training.gates.concepts import text_for_clip
from mole_diffusion.training.gates.guidance import Guidance, crop_grid
from mole_diffusion.training.gates.references import reference_features, reference_pictures
from tests import reference
from tests.gate_training import CONCEPTS, config, mole_pipeline

TEXTS = ("a <v1> cat and a <v2> dog", "a <v2> dog on grass")
ALL = {"global_weight": 0.5, "local_weight": 2.0, "identity_weight": 3.0}


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a <v1> cat and a <v2> dog", "a cat and a red dog"),
        ("<v1> beside <v2>", "cat beside red dog"),
        ("a <v1>  cat, <v1>; a <v12> cat", "a cat, cat; a <v12> cat"),
        ("a sks boot and a sksy boot", "a boot and a sksy boot"),
        ("a sks bootleg", "a boot bootleg"),
        ("a cat", "a cat"),
    ],
)
def test_clip_reads_words_for_tokens(prompt: str, text: str) -> None:
    concepts = {**CONCEPTS, "boot": Concept(token="sks", class_name="boot")}
    assert text_for_clip(prompt, concepts) == text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"token": " "}, "`token` of a concept is empty"),
        ({"token": "a b"}, "`token` must be one word, got 'a b'"),
        ({"class_name": ""}, "`class_name` of a concept is empty"),
        ({"description": " "}, "`description` of a concept is empty"),
    ],
)
def test_concepts_that_cannot_be_say_why(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Concept(**{"token": "<v1>", "class_name": "cat", **values})


def test_prompts_from_templates() -> None:
    assert prompts_from_templates(["{concepts} on grass"], CONCEPTS) == [
        "a <v1> cat and a <v2> dog on grass",
        "a <v2> dog and a <v1> cat on grass",
    ]
    many = {str(k): Concept(token=f"<{k}>", class_name="mug") for k in range(4)}
    rotations = prompts_from_templates(["{concepts}", "two: {concepts}"], many)
    assert len(rotations) == 8
    assert rotations[1] == "a <1> mug, a <2> mug, a <3> mug and a <0> mug"
    with pytest.raises(ValueError, match=r'needs "\{concepts\}" once, got \'a cat\''):
        prompts_from_templates(["a cat"], CONCEPTS)
    with pytest.raises(ValueError, match="Templates need concepts"):
        prompts_from_templates(["{concepts}"], {})


def make_guidance(clip: DifferentiableCLIP, **changes: Any) -> Guidance:
    generator = torch.Generator().manual_seed(3)
    references = {name: torch.randn(k + 1, 16, generator=generator) for k, name in enumerate(CONCEPTS)}
    references = {name: value / value.norm(dim=-1, keepdim=True) for name, value in references.items()}
    return Guidance(clip, config(**(ALL | changes)), TEXTS, CONCEPTS, references)


def test_the_terms_are_their_formulas(clip: DifferentiableCLIP) -> None:
    guidance = make_guidance(clip, identity_crops=2)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    chosen = [0, 1, 0]
    terms = guidance.terms(images, chosen)
    assert set(terms) == {"global", "local", "identity"}
    generator = torch.Generator().manual_seed(3)
    pictures = [torch.randn(k + 1, 16, generator=generator).double() for k in range(2)]
    of_concept = [reference.unit(sum(reference.unit(p) for p in rows) / len(rows)) for rows in pictures]
    texts = clip.encode_text(["a cat and a red dog", "a red dog on grass"]).double()
    alone = clip.encode_text(["a photo of a cat", "a photo of a red dog"]).double()
    for row, prompt in enumerate(chosen):
        image = clip.encode_image(images[row : row + 1])[0].double()
        called = [0, 1] if prompt == 0 else [1]
        local = [reference.eq_directional(image, of_concept[c], texts[prompt], alone[c]) for c in called]
        crops = [images[row : row + 1, :, y : y + 16, x : x + 16] for y in (0, 16) for x in (0, 16)]
        found = [clip.encode_image(crop)[0].double() for crop in crops]
        identity = [1 - max(reference.cosine(crop, of_concept[c]) for crop in found) for c in called]
        assert terms["global"][row].item() == pytest.approx(1 - reference.cosine(image, texts[prompt]), abs=1e-5)
        assert terms["local"][row].item() == pytest.approx(sum(local) / len(local), abs=1e-5)
        assert terms["identity"][row].item() == pytest.approx(sum(identity) / len(identity), abs=1e-5)
    expected = 0.5 * terms["global"] + 2 * terms["local"] + 3 * terms["identity"]
    torch.testing.assert_close(guidance.weigh(terms), expected)


def test_only_the_nearest_crops_are_kept_for_the_gradient(clip: DifferentiableCLIP) -> None:
    """The value and the gradient are those of the maximum over all crops."""
    guidance = make_guidance(clip, global_weight=0.0, local_weight=0.0, identity_crops=3)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    chosen = [0, 1, 0]
    found = guidance.terms(images, chosen)["identity"]
    (gradient,) = torch.autograd.grad(found.sum(), images)
    crops = crop_grid(images, 3)
    features = clip.encode_image(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
    best = (features @ guidance.references.T).amax(dim=1)
    expected = 1 - torch.stack([best[0].mean(), best[1, 1], best[2].mean()])
    (wanted,) = torch.autograd.grad(expected.sum(), images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(guidance.terms(images, chosen)["identity"], expected, atol=1e-5, rtol=0)


def test_what_is_kept_for_the_gradient_is_of_few_crops(clip: DifferentiableCLIP) -> None:
    guidance = make_guidance(clip, global_weight=0.0, local_weight=0.0, identity_crops=3)
    images = torch.rand(3, 3, 32, 32).requires_grad_()

    def kept(action: Callable[[], object]) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
            action()
        return sum(sizes)

    all_crops = crop_grid(images.detach(), 3).flatten(0, 1).requires_grad_()
    assert kept(lambda: guidance.terms(images, [0, 1, 0])) < 0.5 * kept(lambda: clip.encode_image(all_crops))


def test_terms_of_no_weight_are_left_out(clip: DifferentiableCLIP) -> None:
    images = torch.rand(1, 3, 32, 32)
    assert set(make_guidance(clip, identity_weight=0.0).terms(images, [0])) == {"global", "local"}
    only = Guidance(clip, config(), ["a cat"], {}, {})
    assert set(only.terms(images, [0])) == {"global"}


def test_gradients_flow_to_the_picture_in_every_term(clip: DifferentiableCLIP) -> None:
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    for name, term in make_guidance(clip).terms(images, [0, 1]).items():
        (gradient,) = torch.autograd.grad(term.sum(), images, retain_graph=True)
        assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0, name


def test_the_log_shaped_loss_never_leaves_its_domain(clip: DifferentiableCLIP) -> None:
    guidance = Guidance(clip, config(loss_shape="log"), ["a cat"], {}, {})
    total = torch.tensor([0.4, 1.6, 2.5, 3.0], requires_grad=True)
    loss = guidance.weigh({"global": total})
    expected = [-math.log((2.5 - 0.4) / 2), -math.log((2.5 - 1.6) / 2), -math.log(0.01), -math.log(0.01)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    loss.sum().backward()
    assert total.grad is not None
    assert total.grad.isfinite().all()


def test_crops_reach_every_edge() -> None:
    images = torch.arange(10 * 12).view(1, 1, 10, 12).expand(2, 3, 10, 12).float()
    crops = crop_grid(images, 3)
    assert crops.shape == (2, 9, 3, 5, 6)
    assert crops[0, 0, 0, 0, 0] == images[0, 0, 0, 0]
    assert crops[0, 8, 0, -1, -1] == images[0, 0, -1, -1]
    assert torch.equal(crops[1, 5, 2], images[1, 2, 2:7, 6:12])
    assert torch.equal(crop_grid(images, 1)[0, 0, 0], images[0, 0, 2:7, 3:9])


def features(
    pipe: Any, clip: DifferentiableCLIP, concepts: Any, cache: Path | None, **changes: Any
) -> dict[str, Tensor]:
    settings = config(reference_pictures=2, local_weight=1.0, **changes)
    return reference_features(clip, reference_pictures(pipe, settings, concepts, cache))


@pytest.mark.usefixtures("few_steps")
def test_references_are_the_users_or_drawn_once_by_the_lora_alone(clip: DifferentiableCLIP, tmp_path: Path) -> None:
    own = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (64, 64), "blue")]
    concepts = {**CONCEPTS, "lora1": Concept(token="<v2>", class_name="dog", references=own)}
    pipe = mole_pipeline()
    pipe.set_composition("normalized")
    drawn = features(pipe, clip, concepts, tmp_path)
    assert pipe.composition.name == "normalized"
    red = clip.encode_image(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 30, 40))
    torch.testing.assert_close(drawn["lora1"][:1], red)
    assert [len(value) for value in drawn.values()] == [2, 2]
    files = sorted(tmp_path.iterdir())
    assert [file.name[:6] for file in files] == ["lora0-"] * 2

    before = [file.stat().st_mtime_ns for file in files]
    again = features(pipe, clip, concepts, tmp_path)
    uncached = features(pipe, clip, concepts, None)
    for name, value in drawn.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, uncached[name])
    assert [file.stat().st_mtime_ns for file in files] == before
    Image.new("RGB", (32, 32), "red").save(files[0])
    assert not torch.equal(features(pipe, clip, concepts, tmp_path)["lora0"], drawn["lora0"])  # they are really read

    features(pipe, clip, concepts, tmp_path, seed=1)
    assert len(list(tmp_path.iterdir())) == 4
    alone = mole_pipeline(1)
    other = features(alone, clip, {"lora0": CONCEPTS["lora0"]}, None)
    torch.testing.assert_close(other["lora0"], drawn["lora0"], atol=1e-3, rtol=0)  # the other LoRA took no part


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(("of_training", "of_pictures"), [(2.0, 2.0), (1.0, 5.0)])
def test_references_are_drawn_with_the_guidance_of_training(
    of_training: float, of_pictures: float, clip: DifferentiableCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that wants little guidance would be compared with pictures that it never draws."""
    pipe, told = mole_pipeline(1), []
    whole = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda *a, **k: (told.append(k["guidance_scale"]), whole(*a, **k))[1])
    features(pipe, clip, {"lora0": CONCEPTS["lora0"]}, None, guidance_scale=of_training)
    assert told == [of_pictures] * 2
