"""The tiny transformer families: the stock pipelines draw with them, the same each time, and words matter."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import WORDS
from tests.tiny.dits import MADE, SYSTEM, draw, qwen_tokenizer, t5_tokenizer, tiny_dit


@pytest.mark.parametrize("family", MADE)
def test_the_stock_pipeline_draws_and_the_prompt_matters(family: str) -> None:
    pipe = tiny_dit(family)
    picture = draw(pipe, family)
    assert picture.isfinite().all()
    assert torch.equal(draw(tiny_dit(family), family), picture)
    assert not torch.equal(draw(pipe, family, prompt="a red mug in grass"), picture)


def test_words_are_one_token_each() -> None:
    qwen, t5 = qwen_tokenizer(), t5_tokenizer()
    for word in [*WORDS, *SYSTEM]:
        assert len(qwen(f" {word}").input_ids) == 1
    assert [len(t5(word, add_special_tokens=False).input_ids) for word in WORDS] == [1] * len(WORDS)


@pytest.mark.parametrize("family", ["qwen_image", "krea2"])
def test_the_tokens_that_a_pipeline_drops_are_its_template(family: str) -> None:
    pipe = tiny_dit(family)
    prefix = getattr(pipe, "prompt_template_encode_prefix", None) or pipe.prompt_template_encode.partition("{}")[0]
    assert len(pipe.tokenizer(prefix).input_ids) == pipe.prompt_template_encode_start_idx
