"""`DifferentiableCLIP` beside open_clip's own preprocessing and features, on a random small model in a local folder."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mole_diffusion import toybox
from mole_diffusion.clip import DifferentiableCLIP, _quick_gelu
from mole_diffusion.clip_names import open_clip_name
from mole_diffusion.errors import MoLEError
from tests.tiny.clip import SIZE, write_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_clip(tmp_path_factory.mktemp("clip"))


def picture(height: int, width: int) -> Image.Image:
    """Smooth colours and hard edges, where resizing filters differ most."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * ((x // 5 + y // 7) % 2), 255 * x / width, 255 * y / height]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(
    ("height", "width", "levels"),
    [(SIZE, SIZE, 0), (SIZE, SIZE + 9, 0), (64, 64, 2), (57, 90, 2), (24, 24, 2)],
)
def test_preprocessing_is_open_clips(folder: Path, height: int, width: int, levels: int) -> None:
    _, _, reference = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    clip = DifferentiableCLIP(folder)
    image = picture(height, width)
    ours, theirs = clip.preprocess(as_tensor(image)), reference(image)[None]
    assert ours.shape == theirs.shape == (1, 3, SIZE, SIZE)
    assert ((ours - theirs) * clip.std).abs().max() <= levels / 255 + 1e-6


def test_features_are_open_clips_and_of_unit_length(folder: Path) -> None:
    model, _, reference = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    clip = DifferentiableCLIP(f"local-dir:{folder}")
    image, texts = picture(SIZE, SIZE), ["a red mug", "a blue boot on grass"]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    with torch.no_grad():
        expected_image = model.eval().encode_image(reference(image)[None], normalize=True)
        expected_texts = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(clip.encode_image(as_tensor(image)), expected_image, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(clip.encode_text(texts), expected_texts)
    torch.testing.assert_close(clip.encode_text(texts).norm(dim=-1), torch.ones(2))


def test_the_picture_has_a_gradient_and_the_model_none(folder: Path) -> None:
    clip = DifferentiableCLIP(folder)
    image = as_tensor(picture(48, 64)).requires_grad_()
    similarity = (clip.encode_image(image) * clip.encode_text(["a red mug"])).sum()
    similarity.backward()
    assert image.grad is not None
    # 64 pixels wide, the centre 48 count: the margins are cut off.
    assert image.grad[..., 12:52].abs().sum(1).gt(0).float().mean() > 0.9
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    step = (image + 1e-2 * image.grad / image.grad.abs().max()).detach()
    assert (clip.encode_image(step) * clip.encode_text(["a red mug"])).sum() > similarity


def test_it_runs_in_bf16(folder: Path) -> None:
    clip = DifferentiableCLIP(folder)
    full = clip.encode_image(as_tensor(picture(64, 64)))
    half = clip.to(torch.bfloat16).encode_image(as_tensor(picture(64, 64)))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0, atol=5e-2)


def test_what_cannot_be_loaded_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder nor an open_clip architecture"):
        DifferentiableCLIP("ViT-Z-99")
    with pytest.raises(ValueError, match=r"`pretrained` is None; ViT-B-32 without .*scores at random.*openai"):
        DifferentiableCLIP("ViT-B-32")
    with pytest.raises(ValueError, match=r"has its own weights\. Leave it out"):
        DifferentiableCLIP(folder, pretrained="openai")
    with pytest.raises(ValueError, match=r"lacks open_clip_config\.json and open_clip_model\.safetensors"):
        DifferentiableCLIP(tmp_path)
    with pytest.raises(ValueError, match="knows square pictures"):
        DifferentiableCLIP(write_clip(tmp_path, resize_mode="squash"))
    save_file({"logit_scale": torch.ones(())}, write_clip(tmp_path) / "open_clip_model.safetensors")
    with pytest.raises(OSError, match=r"(?s)open_clip cannot load local-dir:.*Load it once with a network, or give a"):
        DifferentiableCLIP(tmp_path)


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8).byte()])
def test_what_is_no_batch_of_pictures_is_refused(folder: Path, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be floating point in \[0, 1\]"):
        DifferentiableCLIP(folder).preprocess(images)


def test_once_torch_is_imported_open_clip_itself_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "open_clip")
    with pytest.raises(MoLEError, match="scores at random"):
        open_clip_name("ViT-B-32", "no-such-weights")
    assert "open_clip" in sys.modules  # its files are read in its stead only where no thread may import meanwhile


def test_one_string_is_no_list_of_texts(folder: Path) -> None:
    with pytest.raises(TypeError, match="must be a list of strings, got the string 'a mug'"):
        DifferentiableCLIP(folder).encode_text("a mug")


def test_weights_that_were_trained_with_quick_gelu_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a network: what open_clip builds for weights by name, up to the download.
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: str(tmp_path / "weights.pt"))
    monkeypatch.setattr("open_clip.factory.load_checkpoint", lambda *_, **__: {})
    (tmp_path / "weights.pt").touch()
    for name, weights, kind in (
        ("ViT-B-32", "openai", "QuickGELU"),
        ("ViT-B-32-quickgelu", "openai", "QuickGELU"),
        ("ViT-B-32", "laion2b_s34b_b79k", "GELU"),
    ):
        block = DifferentiableCLIP(name, weights).model.visual.transformer.resblocks[0]
        assert type(block.mlp[1]).__name__ == kind
    with pytest.raises(MoLEError, match=r"has QuickGELU, .* trained without. Choose ViT-B-32\."):
        _quick_gelu("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


@pytest.mark.parametrize("tokenizer", ["open_clip's", "of transformers"])
def test_a_text_longer_than_the_model_reads_is_said(folder: Path, tokenizer: str) -> None:
    clip = DifferentiableCLIP(folder if tokenizer == "open_clip's" else toybox.clip_dir())
    room = clip._tokenizer.context_length - 2  # beside start and end
    clip.encode_text(["a " * room, "a"])
    with pytest.warns(UserWarning, match=rf"1 of 2 prompts are longer than the {room + 2} tokens .*The first: 'a a a"):
        clip.encode_text(["a", "a " * (room + 1)])
