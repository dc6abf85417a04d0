"""The words that call a LoRA, read from what its file says, whoever wrote that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from mole_diffusion import toybox
from mole_diffusion.lora import inspect_lora, load_lora, save_lora
from mole_diffusion.lora.triggers import LONGEST_JSON, MOST_PHRASES, read_triggers, write_triggers
from tests.tiny import random_lora, tiny_components


def kohya(tags: Any, dirs: Any = None, regularisation: Any = None) -> dict[str, str]:
    values = {"ss_tag_frequency": tags, "ss_dataset_dirs": dirs, "ss_reg_dataset_dirs": regularisation}
    return {key: json.dumps(value) for key, value in values.items() if value is not None}


def sizes(**counts: int) -> dict[str, dict[str, int]]:
    return {name: {"n_repeats": 10, "img_count": count} for name, count in counts.items()}


@pytest.mark.parametrize(
    ("metadata", "triggers"),
    [
        ({}, ()),
        ({"mole_diffusion.triggers": '["<v1> cat", " my  cat ", "<v1> cat"]'}, ("<v1> cat", "my cat")),
        ({"modelspec.trigger_phrase": "sks dog, a red  boot,"}, ("sks dog", "a red boot")),
        ({"mole_diffusion.triggers": "[]", "modelspec.trigger_phrase": "sks"}, ("sks",)),
        ({"modelspec.trigger_phrase": "sks", **kohya({"1_tok": {"tok": 1}})}, ("sks",)),
        # As ai-toolkit writes its trigger word, and as kohya counts a folder of pictures without captions.
        (kohya({"1_TOK": {"TOK": 1}}), ("TOK",)),
        (kohya({"10_sks dog": {"sks dog": 12}}, sizes(**{"10_sks dog": 12})), ("sks dog",)),
        (kohya({"a": {"sks": 4, "1girl": 8, " sks": 6, "sitting": 5}}, sizes(a=10)), ("sks",)),
        # Of several in all captions the first, and over all data sets.
        (kohya({"a": {"sks": 10, "1girl": 10}, "b": {"sks": 3}}, sizes(a=10, b=3)), ("sks",)),
        (kohya({"a": {"sks": 9, "1girl": 3}}, sizes(a=10)), ("sks",)),
        (kohya({"a": {"sks": 8, "1girl": 3}}, sizes(a=10)), ()),
        (kohya({"a": {"sks": 10}, "b": {"dog": 10}}, sizes(a=10, b=10)), ()),
        # Pictures of the class alone, against forgetting.
        (kohya({"a": {"sks": 10}, "b": {"dog": 90}}, sizes(a=10), sizes(b=90)), ("sks",)),
        # Nobody says how many captions there are.
        (kohya({"a": {"sks": 10, "1girl": 3}}), ()),
    ],
)
def test_what_trainers_write(metadata: dict[str, str], triggers: tuple[str, ...]) -> None:
    assert read_triggers(metadata) == triggers


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "17",
        "[" * 100_000,
        "1" * 10_000,
        "[[1], {}, null]",
        '{"a": 1}',
        '{"a": {"sks": "many"}}',
        '{"a": {"sks": -1}}',
        '{"a": {"sks": true}}',
        '{"a": {"sks": NaN}}',
        '{"a": {"": 3}}',
        '{"a": {"sks": 1' + 400 * "0" + "}}",
        json.dumps(["x" * 101, "a\u0000b", "\x1b[31m", " "]),
        json.dumps({"a": {"x" * 101: 3}}),
        json.dumps(["sks", " " * LONGEST_JSON]),
    ],
)
def test_strange_metadata_names_nothing(text: str) -> None:
    for key in ("mole_diffusion.triggers", "ss_tag_frequency"):
        assert read_triggers({key: text}) == ()
    assert read_triggers({**kohya({"a": {"sks": 1, "dog": 1}}), "ss_dataset_dirs": text}) == ()
    assert read_triggers({**kohya({"set": {"sks": 1}}), "ss_reg_dataset_dirs": text}) == ("sks",)
    assert len(read_triggers({"modelspec.trigger_phrase": text})) <= MOST_PHRASES


def test_there_are_never_many() -> None:
    assert len(read_triggers(write_triggers([str(number) for number in range(99)]))) == MOST_PHRASES


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_keeps_its_triggers(layout: Any, tmp_path: Path) -> None:
    models = tiny_components()
    state = random_lora(models, targets="mid_block.*attn1.to_q$")
    assert load_lora(state, models).triggers == ()
    save_file(state, tmp_path / "one.safetensors", metadata={"modelspec.trigger_phrase": "<v1> cat, ünser Kater"})
    one = load_lora(tmp_path / "one.safetensors", models)
    assert one.triggers == ("<v1> cat", "ünser Kater")
    two = save_lora(one, tmp_path / "two.safetensors", layout=layout, metadata={"author": "me"})
    assert load_lora(two, models).triggers == inspect_lora(two).triggers == one.triggers
    with safe_open(two, "pt") as file:
        assert file.metadata()["author"] == "me"


@pytest.mark.parametrize("name", toybox.subjects())
def test_the_toybox_s_loras_name_token_and_class(name: str) -> None:
    expected = (f"{toybox.token(name)} {toybox.class_name(name)}",)
    for layout in ("diffusers", "kohya") if name in ("cat", "clock") else ("diffusers",):
        assert inspect_lora(toybox.lora_path(name, layout)).triggers == expected  # type: ignore[arg-type]
