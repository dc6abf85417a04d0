"""The words that call each LoRA, found among the tokens of three real kinds of tokenizer."""

from __future__ import annotations

import random
import re

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import ByT5Tokenizer, CLIPTokenizer, T5Tokenizer

from mole_diffusion import toybox
from mole_diffusion.composition import trigger_words
from mole_diffusion.composition.trigger_words import missing_triggers, require_triggers, trigger_tokens
from mole_diffusion.errors import MoLEError

TRIGGERS = {"cat": ("<v1> cat", "sks"), "boot": ("red boot",), "any": ("cat",), "none": ()}


def toybox_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(toybox.base_dir() / "tokenizer")


def clip_tokenizer() -> CLIPTokenizer:
    """The vocabulary of every Stable Diffusion, out of open_clip's package."""
    simple = SimpleTokenizer()
    vocab = {
        piece.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): number
        for piece, number in simple.encoder.items()
    }
    return CLIPTokenizer(vocab=vocab, merges=list(simple.bpe_ranks), model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    pieces = {"▁": 2.0, "▁a": 1.5, "▁cat": 3.0, "cat": 3.5, "egory": 4.0, "▁red": 3.0, "▁boot": 3.0, "▁and": 3.0}
    letters = {letter: 6.0 for letter in "abcdefghijklmnopqrstuvwxyzABC<>v1(),.-!"}
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    vocab = special + [(piece, -cost) for piece, cost in {**letters, **pieces}.items()]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=48)


TOKENIZERS = {"toybox": toybox_tokenizer, "clip": clip_tokenizer, "t5": t5_tokenizer}


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]()


def called(tokenizer, prompt: str, triggers=TRIGGERS, max_length=None) -> dict[str, str]:
    """What the marked tokens of each LoRA say, read back by the tokenizer."""
    [marks] = trigger_tokens(tokenizer, [prompt], triggers, max_length)
    padded = tokenizer(prompt, padding="max_length", max_length=marks.shape[-1], truncation=True)
    ids = torch.tensor(padded["input_ids"])
    assert not marks[:, torch.isin(ids, torch.tensor(tokenizer.all_special_ids))].any()
    texts = (tokenizer.decode(ids[row]) for row in marks)
    return {name: re.sub(r"\s", "", text) for name, text in zip(triggers, texts, strict=True) if text.strip()}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a <v1> cat and a red boot", {"cat": "<v1>cat", "boot": "redboot"}),
        ("<v1> cat", {"cat": "<v1>cat"}),
        ("a <v1>   cat, a cat", {"cat": "<v1>cat", "any": "cat"}),
        ("cat, <v1> cat. cat!", {"cat": "<v1>cat", "any": "catcat"}),
        ("a category and a bobcat", {}),
        ("a cat-like boot", {"any": "cat"}),
        ("(cat) and sks", {"any": "cat", "cat": "sks"}),
        ("red boots", {}),
        ("", {}),
    ],
)
def test_every_occurrence_is_found_as_whole_words_and_the_longest_phrase_wins(tokenizer, prompt, expected):
    assert called(tokenizer, prompt) == expected


def test_capitals_count_as_they_do_for_the_tokenizer():
    assert called(toybox_tokenizer(), "A <V1> CAT") == {"cat": "<v1>cat"}
    assert called(clip_tokenizer(), "A <V1> Cat") == {"cat": "<v1>cat"}
    assert called(t5_tokenizer(), "A Cat") == {}


def test_phrases_that_overlap_in_part_share_no_token(tokenizer):
    triggers = {"colour": ("a red",), "boot": ("red boot",)}
    assert called(tokenizer, "a red boot", triggers) == {"colour": "a", "boot": "redboot"}


def test_several_prompts_have_a_row_each_and_the_tokens_of_the_text_encoder():
    tokenizer = toybox_tokenizer()
    marks = trigger_tokens(tokenizer, ["a <v1> cat", "two boots", "<v1> cat <v1> cat"], TRIGGERS)
    assert marks.shape == (3, 4, tokenizer.model_max_length)
    assert marks.dtype == torch.bool
    assert [row[0].nonzero().flatten().tolist() for row in marks] == [[2, 3], [], [1, 2, 3, 4]]
    assert not marks[:, 3].any()
    assert torch.equal(
        trigger_tokens(tokenizer, "a <v1> cat", {"cat": "<v1> cat"}, 12)[0, 0].nonzero()[:, 0], torch.tensor([2, 3])
    )


def test_tokenizers_without_offsets_find_the_same_tokens(tokenizer):
    draw = random.Random(0)
    parts = ["a", "cat", "<v1>", "category", "red", "boot", ",", "(", ")", "and", "sks", "  ", "cat-", "!", "Cat"]
    compared = 0
    for _ in range(200):
        prompt = "".join(draw.choice(parts) + draw.choice([" ", " ", ""]) for _ in range(draw.randint(1, 9)))
        ids = trigger_words._plain_ids(tokenizer, prompt)
        for phrase in ("<v1> cat", "cat", "red boot", "sks", "(cat"):
            for match in trigger_words._pattern(tokenizer, phrase).finditer(prompt):
                place = (tokenizer, prompt, ids, *match.span())
                assert trigger_words._by_parts(*place) == trigger_words._by_offsets(*place), (prompt, phrase)
                compared += 1
    assert compared > 100


def test_a_slow_tokenizer_and_one_that_pads_on_the_left():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    prompt = "a <v1> cat, a category"
    assert called(tokenizer, prompt, max_length=40) == {"cat": "<v1>cat"}
    right = trigger_tokens(tokenizer, [prompt], TRIGGERS, 40)
    tokenizer.padding_side = "left"
    assert called(tokenizer, prompt, max_length=40) == {"cat": "<v1>cat"}
    assert torch.equal(trigger_tokens(tokenizer, [prompt], TRIGGERS, 40), right.roll(40 - len(prompt) - 1, dims=-1))
    with pytest.raises(MoLEError, match="Give `max_length`"):
        trigger_tokens(tokenizer, [prompt], TRIGGERS)


def test_scripts_without_spaces_have_no_word_boundaries():
    tokenizer = ByT5Tokenizer()
    assert called(tokenizer, "一只猫在睡觉", {"cat": ("猫",)}, 40) == {"cat": "猫"}


def test_words_beyond_what_the_text_encoder_reads_are_an_error_of_their_own(tokenizer):
    limit = tokenizer.model_max_length
    with pytest.raises(
        MoLEError, match=rf"LoRA 'cat' \('<v1> cat', 'sks'\) stand beyond the {limit} tokens .* nearer to its start"
    ):
        trigger_tokens(tokenizer, ["a " * limit + "<v1> cat"], TRIGGERS)
    both = trigger_tokens(tokenizer, ["<v1> cat " + "a " * limit + "<v1> cat"], TRIGGERS)
    assert both[0, 0].any()
    # The last token it reads is the end of the text, which it adds.
    edge = tokenizer("a a cat")["input_ids"]
    assert called(tokenizer, "a a cat cat", {"any": ("cat",)}, len(edge)) == {"any": "cat"}
    with pytest.raises(MoLEError, match="beyond"):
        trigger_tokens(tokenizer, ["a a cat cat"], {"any": ("cat",)}, len(edge) - 1)


def test_triggers_that_cannot_be_told_apart_are_an_error_that_names_both(tokenizer):
    with pytest.raises(MoLEError, match="LoRAs 'one' and 'two' have the same trigger 'a  cat'"):
        trigger_tokens(tokenizer, ["a cat"], {"one": ("cat", "a cat"), "two": ("a  cat",)})
    with pytest.raises(MoLEError, match="trigger of the LoRA 'one' is empty"):
        trigger_tokens(tokenizer, ["a cat"], {"one": (" ",)})
    assert called(tokenizer, "a cat", {"one": ("a cat", "a  cat")}) == {"one": "acat"}


def test_a_prompt_that_lacks_a_subject_s_words_says_every_way_out():
    tokenizer, names = toybox_tokenizer(), ("cat", "boot", "none")
    triggers = {name: TRIGGERS[name] for name in names}
    prompts = ["a <v1> cat and a red boot", "a <v1> cat"]
    spans = trigger_tokens(tokenizer, prompts, triggers)
    assert missing_triggers(spans, names) == {"boot": [1], "none": [0, 1]}
    roles = {"none": "style"}
    with pytest.raises(MoLEError) as error:
        require_triggers(spans, prompts, names, triggers, roles)
    assert str(error.value) == (
        "the prompt 'a <v1> cat' lacks the words that call a LoRA: 'boot' ('red boot'). Write them into the prompt, or "
        "name others with triggers={'boot': …}, or draw without it, loras=['cat', 'none'], or say where it belongs, "
        "regions={'boot': (0, 0, 0.5, 1)}."
    )
    # Each way out ends the error.
    require_triggers(spans[:1], prompts[:1], names, triggers, roles)
    require_triggers(spans, prompts, names, triggers, roles, regions={"boot"})
    require_triggers(spans, prompts, names, triggers, {**roles, "boot": "utility"})
    require_triggers(spans[:, [0, 2]], prompts, ("cat", "none"), triggers, roles)
    other = {**triggers, "boot": ("a",)}
    require_triggers(trigger_tokens(tokenizer, prompts, other), prompts, names, other, roles)
    with pytest.raises(MoLEError, match=r"'none' \(it has none\)"):
        require_triggers(spans, prompts, names, triggers, {"boot": "style"})
