"""The tiny model itself: stock diffusers draws with it and it is the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny import WORDS, random_lora, tiny_components, tiny_pipeline, tiny_tokenizer


def test_stock_pipeline_draws_and_survives_saving(tmp_path: Path) -> None:
    def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("a red cat", num_inference_steps=2, generator=generator, output_type="pt").images

    pipe = tiny_pipeline()
    images = draw(pipe)
    assert images.shape == (1, 3, 32, 32)
    assert images.std() > 0.01
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(images, draw(again))


def test_components_follow_their_seed() -> None:
    first, same, other = (tiny_components(seed)["unet"].conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_what_is_done_to_a_model_is_done_to_that_one_alone() -> None:
    changed, fresh = tiny_components(), tiny_components()
    made = tiny_components.__wrapped__()
    for name in ("unet", "vae", "text_encoder"):
        for tensor in changed[name].state_dict().values():
            tensor.zero_()
        assert made[name].config == fresh[name].config
        wanted, found = made[name].state_dict(), fresh[name].state_dict()
        assert list(found) == list(wanted)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    changed["tokenizer"].add_tokens("<v1>")
    assert len(fresh["tokenizer"]) == len(made["tokenizer"]) < len(changed["tokenizer"])


def test_tokenizer_knows_its_words() -> None:
    tokenizer = tiny_tokenizer()
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, word
    assert tokenizer.unk_token_id not in tokenizer("unseen-word <v1>").input_ids[1:-1]


def test_random_lora_needs_a_target() -> None:
    with pytest.raises(ValueError, match="matches targets"):
        random_lora(tiny_components(), targets="no such module")
