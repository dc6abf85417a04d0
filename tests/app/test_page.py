"""What the page does, without a page: files, colours, regions, fields."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mole_diffusion import toybox
from mole_diffusion.app import drawn_regions, form, said
from mole_diffusion.app.allowed_folders import AllowedFolders
from mole_diffusion.app.coloured import coloured, css_colour
from mole_diffusion.app.comparison import comparison
from mole_diffusion.app.offered_lora import inspect_offered
from mole_diffusion.app.studio import Cancelled, Progress
from mole_diffusion.composition import RegionMap
from mole_diffusion.drawing.as_python import as_python
from mole_diffusion.drawing.painted import as_text
from mole_diffusion.errors import MoLEError
from tests.app.visitors import BOOT, BOTH, CAT


def field(**changes: Any) -> form.PageFields:
    given: dict[str, Any] = {
        "base": "toybox",
        "loras": [CAT, BOOT],
        "prompt": BOTH.prompt,
        "negative_prompt": "",
        "composition": form.BY_ITSELF,
        "options": "",
        "gates": "",
        "regions": "",
        "width": None,
        "height": None,
        "steps": 2,
        "guidance_scale": 2.0,
        "scheduler": "",
        "seed": 0,
        "count": 1,
    }
    return form.PageFields(**{**given, **changes})


def test_paths_outside_of_the_folders_are_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "models", tmp_path / "secret"
    inside.mkdir()
    outside.mkdir()
    (inside / "way").symlink_to(outside)
    allowed = AllowedFolders([inside])
    assert allowed.path("sd") == inside / "sd"
    assert allowed.model(str(inside)) == str(inside)
    assert allowed.model("toybox") == "toybox"
    assert allowed.model("me/my-model") == "me/my-model"
    for bad in ("../secret", str(outside), "/etc/passwd", "way", "way/it", "~", "\0"):
        with pytest.raises(MoLEError, match=r"outside of the folders|is no path"):
            allowed.path(bad)
    with pytest.raises(MoLEError, match="outside of the folders"):
        allowed.model("../secret")
    with pytest.raises(MoLEError, match="there is no such folder"):
        AllowedFolders([tmp_path / "none"])


def test_a_verdict_says_what_a_file_is_or_why_not(tmp_path: Path) -> None:
    good = inspect_offered(str(toybox.lora_path("cat", "kohya")), taken=("cat",))
    assert good.lora is not None
    assert good.lora.name == "cat-2"
    assert good.lora.triggers == ("<v1> cat",)
    assert good.line.startswith("✓")
    assert "kohya" in good.line
    assert "called by <v1> cat" in good.line
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(toybox.lora_path("cat").read_bytes()[:200])
    bad = inspect_offered(str(broken))
    assert bad.lora is None
    assert bad.line.startswith("✗ broken.safetensors")
    assert str(tmp_path) not in bad.line


def test_words_have_the_colour_of_their_lora_and_the_longest_phrase_wins() -> None:
    shown = coloured("a <v1> Cat, a category & a boot", {"cat": ["cat"], "my": ["<v1> cat"], "boot": ["boot"], "x": []})
    assert shown.count("<mark") == 2
    assert f"background:{css_colour(1)}" in shown
    assert ">&lt;v1&gt; Cat</mark>" in shown
    assert "category &amp; a" in shown
    assert "Not called: cat<" in shown
    assert "<script>" not in coloured("<script>", {"<script>": ["a"]})


def test_regions_of_the_canvas_are_boxes_and_masks() -> None:
    mask = Image.new("L", (8, 8))
    empty = as_text(mask)
    mask.paste(255, (0, 0, 4, 8))
    text = json.dumps(
        {
            "boxes": {"cat": [[-0.5, 0, 0.5, 1], [0.2, 0.2, 0.2, 0.9]], "gone": [[0, 0, 1, 1]]},
            "painted": {"cat": empty, "boot": as_text(mask)},
        }
    )
    assert drawn_regions.read(text, ["cat", "boot"]) == {"cat": [(0.0, 0.0, 0.5, 1.0)], "boot": [as_text(mask)]}
    assert drawn_regions.read("", ["cat"]) == {}
    for bad in ("[", "[]", '{"boxes": {"cat": [[0, 1]]}}', '{"boxes": {"cat": 3}}', '{"painted": {"cat": "x"}}'):
        with pytest.raises(MoLEError, match=r"regions of the page|a painted mask"):
            drawn_regions.read(bad, ["cat"])


def test_masks_of_a_picture_go_to_the_canvas_and_come_back() -> None:
    values = torch.zeros(1, 2, 4, 4)
    values[:, 0, :, :2] = 1
    shown = json.loads(drawn_regions.show(["cat", "boot"], masks=RegionMap(values, ["cat", "boot"])))
    assert list(shown["painted"]) == ["cat"]
    assert shown["colours"] == [css_colour(0), css_colour(1)]
    back = drawn_regions.read(json.dumps(shown), ["cat", "boot"])
    assert back == {"cat": [shown["painted"]["cat"]]}


def test_a_form_becomes_settings_for_every_seed() -> None:
    regions = json.dumps({"boxes": {"cat": [[0, 0, 0.5, 1]]}})
    given = field(composition="masks", options="own_words=2.0, online=true", regions=regions, seed=7, count=2)
    first, second = form.read(given, AllowedFolders(["."]))
    assert (first.seed, second.seed) == (7, 8)
    assert first.composition_options == {"own_words": 2.0, "online": True}
    assert first.regions == {"cat": ((0.0, 0.0, 0.5, 1.0),)}
    assert form.read_options(form.write_options({"own_words": 2.0, "online": True})) == first.composition_options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "cat " * 2000}, "the prompt has 8,000 characters"),
        ({"regions": json.dumps({"boxes": {"cat": [[0, 0, 1, 1]] * 51}})}, "cat has 51 boxes; 50 are the most"),
        ({"base": ""}, "the base is empty"),
        ({"base": "/etc"}, "outside of the folders"),
        ({"gates": "/etc"}, "outside of the folders"),
        ({"options": "own_words=2"}, "Choose one by name"),
        ({"composition": "masks", "options": "own_words"}, "an option is written own_words=2"),
        ({"composition": "masks", "options": "own=2"}, "has no option 'own'"),
        ({"steps": 1000}, "number of steps must be a whole number from 1 to 200"),
        ({"steps": None}, "number of steps"),
        ({"count": 100}, "number of seeds"),
        ({"width": 4096}, "the width must be a whole number from 8 to 2048"),
        ({"width": 60}, "the width must be a multiple of 8, such as 56"),
    ],
)
def test_what_a_form_cannot_say_is_told_in_a_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MoLEError, match=message):
        form.read(field(**change), AllowedFolders(["."]))


def test_a_comparison_is_each_alone_the_sum_and_this() -> None:
    rows = comparison(replace(BOTH, composition="masks", regions={"cat": ((0.0, 0.0, 0.5, 1.0),)}))
    assert [label for label, _ in rows] == ["cat alone", "boot alone", "sum", "this"]
    assert [[lora.name for lora in own.loras if lora.on] for _, own in rows] == [
        ["cat"],
        ["boot"],
        ["cat", "boot"],
        ["cat", "boot"],
    ]
    assert [own.composition for _, own in rows] == ["linear", "linear", "linear", "masks"]
    with pytest.raises(MoLEError, match="two LoRAs that are on"):
        comparison(replace(BOTH, loras=(CAT,)))


def test_the_page_says_the_one_line_and_bugs_stay_bugs() -> None:
    assert "a &lt;v1&gt; is missing" in said.wrong(MoLEError("a <v1> is missing"))
    assert "Cancelled" in said.wrong(Cancelled())
    with pytest.raises(KeyError):
        said.wrong(KeyError("x"))
    assert "50 %, 2 min left" in said.progress(Progress(0.5, 130.0, "drawing"))


def test_the_python_call_names_a_composition_with_options() -> None:
    script = as_python(replace(BOTH, composition="masks", composition_options={"own_words": 2.0}))
    assert "from mole_diffusion.composition import Masks" in script
    assert "pipe.set_composition(Masks(own_words=2.0))" in script
