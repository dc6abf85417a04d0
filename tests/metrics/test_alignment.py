"""Alignment against naive formulas and torchmetrics' own, known limits, and two processes against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.multimodal import CLIPScore

from mole_diffusion import toybox
from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.loading import LoadingError
from mole_diffusion.metrics import (
    ImageAlignment,
    RegionAlignment,
    TextAlignment,
    VisionBackbone,
    embed_images,
    image_alignment,
    oracle_detector,
    read_picture,
    region_alignment,
    text_alignment,
)
from mole_diffusion.metrics.averages import Averages
from mole_diffusion.toybox.world import compose_scene
from tests import forked
from tests.fork_server import ForkServer

CONCEPTS = ["cat", "boot"]
PROMPTS = ["a photo of a cat on grass", "a photo of a red boot on snow", "a photo of a cat on grass"]


def pictures() -> list[Image.Image]:
    """Three pictures of two sizes."""
    return [
        *toybox.references("cat")[:1],
        toybox.references("boot")[0].resize((80, 96)),
        *toybox.references("cat")[1:2],
    ]


def references() -> dict[str, list[Image.Image]]:
    return {name: toybox.references(name) for name in CONCEPTS}


def numbers(result: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in result.items()}


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    return float((x * y).sum() / (np.sqrt((x * x).sum()) * np.sqrt((y * y).sum())))


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def test_text_alignment_is_the_mean_cosine(toybox_clip: DifferentiableCLIP) -> None:
    values = [
        cosine(toybox_clip.encode_image(as_tensor(image))[0], toybox_clip.encode_text([prompt])[0])
        for image, prompt in zip(pictures(), PROMPTS, strict=True)
    ]
    metric = TextAlignment(toybox_clip, batch_size=2)
    metric.update(pictures()[:2], PROMPTS[:2])
    metric.update(pictures()[2:], PROMPTS[2:])
    assert metric.compute() == pytest.approx({"text alignment (cosine)": sum(values) / 3}, abs=1e-6)
    metric = TextAlignment(toybox_clip, scale="clipscore")
    metric.update(pictures(), PROMPTS)
    scaled = sum(2.5 * max(value, 0) for value in values) / 3
    assert metric.compute() == pytest.approx({"text alignment (clipscore)": scaled}, abs=1e-6)


def test_a_negative_cosine_is_zero_on_the_scale_of_clipscore() -> None:
    image, text = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[-1.0, 0.0], [2.0, 0.0]])
    assert text_alignment(image, text).tolist() == pytest.approx([-1, 0.6])
    assert text_alignment(image, text, "clipscore").tolist() == pytest.approx([0, 1.5])


class Adapter(nn.Module):
    """The toybox's CLIP in the form that torchmetrics asks for."""

    def __init__(self, clip: DifferentiableCLIP) -> None:
        super().__init__()
        self.clip = clip
        self.config = object()

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return self.clip.encode_image(pixels)

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.clip.encode_text([PROMPTS[int(i)] for i in ids])


def process(images: Any = None, text: Any = None, **_: Any) -> dict[str, Tensor]:
    if images is not None:
        return {"pixel_values": torch.stack([image / 255 for image in images])}
    ids = torch.tensor([PROMPTS.index(prompt) for prompt in text])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)[:, None]}


def test_text_alignment_agrees_with_clipscore_of_torchmetrics(toybox_clip: DifferentiableCLIP) -> None:
    images, prompts = [toybox.references(name)[0] for name in ("cat", "boot", "mug")], PROMPTS
    theirs = CLIPScore(model_name_or_path=lambda: (Adapter(toybox_clip), process))
    theirs.update([(as_tensor(image)[0] * 255).byte() for image in images], list(prompts))
    ours = TextAlignment(toybox_clip)
    ours.update(images, prompts)
    # Theirs is 100 times the mean cosine, cut at zero.
    assert 100 * max(ours.compute()["text alignment (cosine)"], 0) == pytest.approx(theirs.compute().item(), abs=1e-3)


def test_image_alignment_is_the_mean_over_pairs_by_concept(toybox_clip: DifferentiableCLIP) -> None:
    metric = ImageAlignment(toybox_clip, references())
    metric.update(pictures(), [["cat"], ["boot", "cat"], ["cat"]])
    features = [toybox_clip.encode_image(as_tensor(image))[0] for image in pictures()]
    expected = {}
    for name, rows in (("cat", [0, 1, 2]), ("boot", [1])):
        known = [toybox_clip.encode_image(as_tensor(image))[0] for image in toybox.references(name)]
        expected[name] = float(np.mean([[cosine(features[row], one) for one in known] for row in rows]))
    expected["mean"] = (expected["cat"] + expected["boot"]) / 2
    assert metric.compute() == pytest.approx(expected, abs=1e-6)


def test_an_identical_picture_is_one(toybox_clip: DifferentiableCLIP) -> None:
    image = toybox.references("cat")[0]
    metric = ImageAlignment(toybox_clip, {"cat": [image]})
    metric.update([image])
    assert metric.compute() == pytest.approx({"cat": 1.0, "mean": 1.0}, abs=1e-6)
    tensor = ImageAlignment(toybox_clip, {"cat": [image]})
    tensor.update(as_tensor(image))
    assert tensor.compute() == metric.compute()


def test_metrics_run_in_half_precision_and_are_reset(toybox_clip: DifferentiableCLIP) -> None:
    metric = TextAlignment(toybox_clip)
    metric.update(pictures(), PROMPTS)
    before = metric.compute()
    half = TextAlignment(DifferentiableCLIP(toybox.clip_dir()).to(torch.bfloat16))
    half.update(pictures(), PROMPTS)
    assert half.compute() == pytest.approx(numbers(before), abs=0.02)
    metric.reset()
    with pytest.warns(UserWarning, match="compute"), pytest.raises(ValueError, match="has measured nothing yet"):
        metric.compute()


@pytest.mark.parametrize("pooled", [True, False])
def test_any_vision_backbone_of_transformers(pooled: bool) -> None:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    model = Dinov2Model(config)
    if not pooled:
        model.forward = lambda pixel_values, run=model.forward: type(
            "Out", (), {"last_hidden_state": run(pixel_values)[0]}
        )
    backbone = VisionBackbone(model, processor)
    image = toybox.references("cat")[0]
    token = model(processor(images=image, return_tensors="pt")["pixel_values"]).last_hidden_state[0, 0]
    features = embed_images(backbone, [image, image.resize((50, 70))])
    assert torch.allclose(features[0], token / token.norm(), atol=1e-5)
    assert torch.allclose(features.norm(dim=-1), torch.ones(2))


def test_a_vision_model_whose_files_lack_weights_is_refused(tmp_path: Path) -> None:
    """Transformers only warns, and would measure with random numbers."""
    from transformers import BitImageProcessorPil, ViTConfig, ViTModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    ViTModel(ViTConfig(**size), add_pooling_layer=False).save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path)
    with pytest.raises(LoadingError, match=r"lack 2 of its weights, 'pooler\.dense\.bias' among them, .* random"):
        VisionBackbone.from_pretrained(tmp_path)
    image = toybox.references("cat")[0]
    first, again = (
        embed_images(VisionBackbone.from_pretrained(tmp_path, add_pooling_layer=False), [image]) for _ in range(2)
    )
    assert torch.equal(first, again)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"other.{key}": tensor for key, tensor in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(LoadingError, match=r"the vision model .* (lack|cannot be loaded)"):
        VisionBackbone.from_pretrained(tmp_path)


def test_a_region_is_measured_inside_its_box_and_a_miss_is_zero(toybox_clip: DifferentiableCLIP) -> None:
    canvas = Image.new("RGB", (96, 64), "green")
    image = toybox.references("cat")[0]
    canvas.paste(image, (20, 0))
    corner = (0, 0, 40, 40)
    shown = {name: list(pictures) for name, pictures in references().items()}
    known = embed_images(toybox_clip, [picture.crop(corner) for picture in shown["cat"]])
    inside = float(np.mean([cosine(embed_images(toybox_clip, [image])[0], one) for one in known]))
    assert region_alignment(toybox_clip, canvas, (20, 0, 84, 64), known) == (pytest.approx(inside, abs=1e-6), True)

    def detector(picture: Image.Image, concept: str) -> tuple[int, int, int, int] | None:
        if any(picture is one for one in shown[concept]):
            return corner
        return (20, 0, 84, 64) if picture is canvas and concept == "cat" else None

    metric = RegionAlignment(toybox_clip, shown, detector)
    metric.update([canvas, image], [["cat", "boot"], ["cat"]])
    half = inside / 2
    assert metric.compute() == pytest.approx(
        {"cat": half, "boot": 0.0, "mean": half / 2, "detection rate": 0.25}, abs=1e-6
    )
    with pytest.raises(ValueError, match=r"the detector gave the box \(0, 0, 97, 64\) in a picture of 96×64"):
        region_alignment(toybox_clip, canvas, (0, 0, 97, 64), known)
    with pytest.raises(ValueError, match="does not find concept 'cat' in its reference picture 0"):
        RegionAlignment(toybox_clip, shown, lambda picture, concept: None)


def test_on_the_toybox_a_right_region_beats_a_wrong_look_and_that_a_miss(toybox_clip: DifferentiableCLIP) -> None:
    rng = np.random.default_rng(0)
    look, other = toybox.subject("cat").look, toybox.subject("teapot").look
    found = {}
    for name, worn in (("right", [look, other]), ("wrong look", [other, look]), ("missing", [other])):
        classes = ["cat", "teapot"] if name != "missing" else ["teapot"]
        metric = RegionAlignment(toybox_clip, {"cat": toybox.references("cat")}, oracle_detector())
        metric.update([toybox.render(compose_scene(classes, worn, "slate", rng)) for _ in range(5)])
        found[name] = metric.compute()
    assert found["right"]["mean"] > found["wrong look"]["mean"] + 0.05 > 0.5
    assert found["missing"] == {"cat": 0.0, "mean": 0.0, "detection rate": 0.0}


def test_wrong_input_is_refused_and_leaves_the_metric_as_it_was(
    toybox_clip: DifferentiableCLIP, tmp_path: Path
) -> None:
    text, image = TextAlignment(toybox_clip), ImageAlignment(toybox_clip, references())
    text.update(pictures(), PROMPTS)
    before = text.compute()
    for bad, error, message in (
        (lambda: text.update([], []), ValueError, "there is no picture to measure"),
        (lambda: text.update(pictures(), PROMPTS[:2]), ValueError, "there are 3 pictures and 2 prompts"),
        (lambda: text.update(pictures(), "a cat"), TypeError, "`prompts` must be a list of strings"),
        (lambda: text.update(pictures(), None), TypeError, "`prompts` must be a list of strings"),
        (lambda: text.update(pictures(), dict.fromkeys(PROMPTS)), TypeError, "`prompts` must be a list of strings"),
        (
            lambda: text.update(pictures(), ["a \ud800", *PROMPTS[1:]]),
            ValueError,
            "half a UTF-16 pair, which is no text",
        ),
        (
            lambda: ImageAlignment(toybox_clip, {"cat": pictures()[0]}),
            TypeError,
            "'cat' must be a list, got one picture",
        ),
        (lambda: text.update(["cat.png"], ["a cat"]), TypeError, "must be a tensor or a list of PIL images"),
        (lambda: text.update(255 * as_tensor(pictures()[0]), ["a cat"]), ValueError, r"they must lie in \[0, 1\]"),
        (
            lambda: TextAlignment(toybox_clip, "percent"),
            ValueError,
            r"must be one of \['cosine', 'clipscore'\], got 'perce",
        ),
        (
            lambda: TextAlignment(toybox_clip, batch_size=0).update(pictures(), PROMPTS),
            ValueError,
            "`batch_size` must be at l",
        ),
        (lambda: image.update(pictures()[:1], ["cat"]), TypeError, r"list of names for each picture, .*\['cat'\]"),
        (lambda: image.update(pictures(), [["cat"]]), ValueError, "3 pictures and 1 lists of concepts"),
        (lambda: image.update(pictures()[:1], [["dog"]]), ValueError, "'dog' of picture 0 has no references. Known"),
        (lambda: ImageAlignment(toybox_clip, {"cat": []}), ValueError, "concept 'cat' has no reference pictures"),
        (lambda: ImageAlignment(toybox_clip, {}), ValueError, "there is no concept"),
        (lambda: image_alignment(torch.ones(1, 2), torch.ones(0, 2)), ValueError, "has no pictures to compare with"),
        (lambda: image_alignment(torch.ones(1, 2), torch.ones(1, 3)), ValueError, r"\(1, 2\) and \(1, 3\)\. Make both"),
        (
            lambda: image_alignment(torch.ones(2), torch.ones(1, 2)),
            ValueError,
            r"of one picture, as `features\[None\]`",
        ),
        (lambda: text_alignment(torch.ones(1, 2), torch.ones(1, 3)), ValueError, "with the width of one encoder"),
        (lambda: text_alignment(torch.ones(2, 3), torch.ones(1, 3)), ValueError, "2 pictures and 1 prompts"),
    ):
        with pytest.raises(error, match=message):
            bad()
    assert text.compute() == before
    (tmp_path / "cut.png").write_bytes(png(tmp_path)[:-60])
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as a picture: .*Write it again"):
        read_picture(tmp_path / "cut.png")


def png(folder: Path) -> bytes:
    pictures()[0].save(folder / "whole.png")
    return (folder / "whole.png").read_bytes()


def measure(part: slice) -> list[Any]:
    clip = DifferentiableCLIP(toybox.clip_dir())
    text, image = TextAlignment(clip, batch_size=1), ImageAlignment(clip, references(), batch_size=1)
    text.update(pictures()[part], PROMPTS[part])
    image.update(pictures()[part], [["cat"], ["boot"], ["cat"]][part])
    return [numbers(text.compute()), numbers(image.compute())]


def measured_in_part(rank: int) -> list[Any]:
    return measure(slice(0, 1) if rank == 0 else slice(1, None))


def test_two_processes_give_what_one_gives(tmp_path: Path, fork_server: ForkServer) -> None:
    first, second = fork_server.run(forked.ranks, tmp_path, __name__, measured_in_part.__name__)
    assert first == second
    for shared, alone in zip(first, measure(slice(None)), strict=True):
        assert shared == pytest.approx(alone, abs=1e-6)  # features, not sums, round otherwise in batches of other sizes


class Numbers(Averages):
    """The mean of what it is given."""

    def update(self, values: torch.Tensor) -> None:
        self.add(values[:, None])


def test_means_do_not_depend_on_the_order() -> None:
    values = torch.cat([torch.rand(50), 1e-6 * torch.rand(50), torch.tensor([float("nan")])])
    means = []
    for seed in range(5):
        metric = Numbers(["number"])
        for part in values[torch.randperm(101, generator=torch.manual_seed(seed))].split(10):
            metric.update(part)
        means.append(metric.means()["number"])
    assert len(set(means)) == 1
    assert means[0] == pytest.approx(values[:100].double().mean().item(), abs=1e-12)
