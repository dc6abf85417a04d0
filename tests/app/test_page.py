"""What the page does, without a page: verdicts, colours, regions, forms, jobs in turn, sessions that do not mix."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mole_diffusion import toybox
from mole_diffusion.app import drawn_regions, form, said, training
from mole_diffusion.app.allowed_folders import AllowedFolders
from mole_diffusion.app.coloured import coloured, css_colour
from mole_diffusion.app.comparison import comparison
from mole_diffusion.app.offered_lora import inspect_offered
from mole_diffusion.app.session import Session
from mole_diffusion.app.studio import Cancelled, Progress, Studio, Ticket
from mole_diffusion.composition import RegionMap
from mole_diffusion.drawing import png
from mole_diffusion.drawing.as_python import as_python
from mole_diffusion.drawing.painted import as_text
from mole_diffusion.drawing.settings import LoRASettings, PictureSettings
from mole_diffusion.errors import MoLEError
from tests.tiny import random_lora, tiny_pipeline
from tests.tiny.clip import write_clip

CAT, BOOT = (
    LoRASettings("cat", "toybox:cat", triggers=("<v1> cat",)),
    LoRASettings("boot", "toybox:boot", triggers=("<v2> boot",)),
)
BOTH = PictureSettings("a <v1> cat and a <v2> boot", loras=(CAT, BOOT), steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio("cpu")


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


def note(events: Iterable[Any], seen: list[Any]) -> None:
    """Keeps what was told before an error."""
    for event in events:
        seen.append(event)


def cancel_after(count: int, events: Iterable[Any], ticket: Ticket, seen: list[Any]) -> None:
    """Iterates; cancels when so many events were seen."""
    for event in events:
        seen.append(event)
        if len(seen) == count:
            ticket.cancel()


class Impatient(Ticket):
    """Cancelled by itself after so many evaluations of the denoiser."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.cancel()
        super().check()


# --- files of this computer --------------------------------------------------------------------------------------


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


# --- what stands on the page -------------------------------------------------------------------------------------


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


# --- jobs --------------------------------------------------------------------------------------------------------


def test_a_picture_of_the_page_is_that_of_its_python_call(studio: Studio, tmp_path: Path) -> None:
    session = Session()
    session.drop(["toybox:cat", "toybox:boot"])
    wanted = replace(BOTH, loras=tuple(session.loras), regions={"cat": ((0.0, 0.0, 0.5, 1.0),)})
    told = list(session.draw(studio, [wanted, replace(wanted, seed=1)]))
    assert told[-1].done == 1.0
    assert [now.done for now in told] == sorted(now.done for now in told)
    assert any(now.preview is not None for now in told)
    assert [own.settings.seed for own in session.drawn] == [0, 1]
    assert session.drawn[0].masks is not None
    python, command, settings = session.told(0)
    assert "mole generate" in command
    assert json.loads(settings)["regions"] == {"cat": [[0.0, 0.0, 0.5, 1.0]]}
    made: dict[str, Any] = {}
    exec(python, made)
    assert made["image"].tobytes() == session.drawn[0].picture.tobytes()
    # Dropped again, the picture restores the page.
    other = Session()
    again = other.restore(str(session.files[1]), AllowedFolders([tmp_path]))
    assert again == session.drawn[1].settings == png.read_settings(session.files[1])
    assert other.loras == list(again.loras)


def test_gates_are_drawn_by_layer_and_step(studio: Studio) -> None:
    teapot = LoRASettings("teapot", "toybox:teapot", triggers=("<v3> teapot",))
    gates = str(toybox.gates_dir("cat+boot+teapot"))
    prompt = f"{BOTH.prompt} and a <v3> teapot"
    session = Session()
    list(session.draw(studio, [replace(BOTH, prompt=prompt, loras=(CAT, BOOT, teapot), gates=gates)]))
    assert session.drawn[0].gates is not None
    weights, places, loras = session.drawn[0].gates
    assert tuple(weights.shape) == (len(places), 3, 2)
    assert loras == ("cat", "boot", "teapot")
    assert [path.is_file() for path in session.gates(0)] == [True, True]


def test_a_cancelled_job_ends_and_the_next_one_draws(studio: Studio) -> None:
    session = Session()
    seen: list[Any] = []
    with pytest.raises(Cancelled):
        cancel_after(1, session.draw(studio, [replace(BOTH, steps=100)]), session.ticket, seen)
    assert len(seen) < 50
    assert session.drawn == []
    with pytest.raises(Cancelled):  # one that was cancelled while it waited never begins
        list(session.draw(studio, [BOTH]))
    session.ticket = Ticket()
    list(session.draw(studio, [BOTH]))
    assert len(session.drawn) == 1


def test_two_visitors_get_their_own_pictures(studio: Studio) -> None:
    wanted = {
        "cat": replace(BOTH, loras=(CAT,), prompt="a <v1> cat", seed=3),
        "boot": replace(BOTH, loras=(BOOT,), prompt="a <v2> boot", seed=4),
    }
    alone = {}
    for name, own in wanted.items():
        alone[name] = next(reversed(list(studio.draw([own], Ticket())))).picture.tobytes()
    sessions = {name: Session() for name in wanted}
    threads = [
        threading.Thread(target=lambda name=name: list(sessions[name].draw(studio, [wanted[name]] * 2)))
        for name in wanted
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, session in sessions.items():
        assert [own.picture.tobytes() for own in session.drawn] == [alone[name]] * 2


def test_an_error_leaves_the_studio_ready(studio: Studio) -> None:
    session = Session()
    with pytest.raises(MoLEError, match="lacks the words that call a LoRA: 'boot'"):
        list(session.draw(studio, [replace(BOTH, prompt="a <v1> cat")]))
    with pytest.raises(MoLEError, match="no such folder, and it is no Hub id"):
        list(session.draw(studio, [replace(BOTH, base="./none")]))
    list(session.draw(studio, [BOTH]))
    assert session.drawn[0].settings.composition is None


def test_a_drawing_takes_the_place_of_the_last_one_and_leaves_a_training_alone() -> None:
    session = Session()
    drawing, trained = session.ticket, session.training
    session.ask()
    with pytest.raises(Cancelled):
        drawing.check()
    trained.check()
    session.ask_to_train()
    with pytest.raises(Cancelled):
        trained.check()
    session.ticket.check()
    session.training.check()


def test_rows_take_what_was_typed_and_files_come_once(tmp_path: Path) -> None:
    session = Session()
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(toybox.lora_path("cat").read_bytes())
    session.drop(["toybox:cat", str(copy), "toybox:boot"])
    assert [lora.name for lora in session.loras] == ["cat", "boot"]
    assert session.refused == ["✗ copy.safetensors is there already."]
    session.edit([True, "kitty", 0.5, "<v1> cat, kitten", "subject", False, "boot", 1, "", "style"])
    assert session.loras[0].triggers == ("<v1> cat", "kitten")
    assert (session.loras[0].strength, session.loras[1].on, session.loras[1].role) == (0.5, False, "style")
    with pytest.raises(MoLEError, match="two LoRAs have one name"):
        session.edit([True, "boot", 1, "", "subject", True, "boot", 1, "", "subject"])
    with pytest.raises(MoLEError, match="has no weight"):
        session.edit([True, "cat", None, "", "subject", True, "boot", 1, "", "subject"])


def test_loras_of_a_restored_picture_are_known_by_their_bytes(tmp_path: Path) -> None:
    file = tmp_path / "mug.safetensors"
    file.write_bytes(toybox.lora_path("mug").read_bytes())
    session = Session()
    session.drop([str(file)])
    there = session.loras[0]
    elsewhere = replace(there, file="/home/somebody/mug.safetensors")
    settings = PictureSettings("a mug", loras=(elsewhere, replace(CAT, sha256="0" * 64)))
    (mug, line), (cat, changed) = form.find_again(settings, session.loras, AllowedFolders([tmp_path]))
    assert (mug.file, mug.on) == (str(file), True)
    assert line.startswith("✓")
    assert not cat.on
    assert "has changed" in changed
    (gone, line), *_ = form.find_again(settings, [], AllowedFolders([tmp_path]))
    assert not gone.on
    assert line.startswith("✗ drop mug.safetensors on the page again")


def test_training_from_the_page_stops_and_goes_on(
    studio: Studio, tmp_path: Path, few_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mole_diffusion.training.gates.report.SEEDS", (0,))
    monkeypatch.setattr("mole_diffusion.training.gates.report.PROMPTS_SHOWN", 1)
    plan, config = training.plan(BOTH, "a photo of {concepts}", 5, 1, 2.0, "", "gates", AllowedFolders([tmp_path]))
    assert (config.steps, config.batch_size, config.guidance_scale) == (5, 1, 2.0)
    config = replace(config, identity_weight=0.0, rollout_steps=2, checkpoint_every=1)
    seen: list[Any] = []
    with pytest.raises(Cancelled):
        note(training.train(studio, plan, config, Impatient(after=4)), seen)
    assert [event.doing for event in seen[:2]] == [
        "opening toybox and the CLIP that guides",
        "drawing what each LoRA draws alone",
    ]
    numbers = [event.number for event in seen[2:]]
    assert 1 <= numbers[-1] < 5
    *steps, out = [event for event in training.train(studio, plan, config, Ticket()) if not isinstance(event, Progress)]
    assert steps[0].number == numbers[-1] + 1  # every step left a checkpoint
    assert steps[-1].number == 5
    assert out == tmp_path / "gates"
    assert (tmp_path / "gates" / "samples.png").is_file()


@pytest.mark.parametrize(
    ("settings", "templates", "message"),
    [
        (replace(BOTH, loras=(CAT,)), "{concepts}", "two LoRAs or more"),
        (replace(BOTH, base="me/mine"), "{concepts}", "the CLIP that guides is missing: only the toybox has its own"),
        (BOTH, " ", "there is no prompt"),
        (replace(BOTH, loras=(CAT, replace(BOOT, file="b", triggers=("v2",)))), "{concepts}", "token and its class"),
    ],
)
def test_what_cannot_be_trained_is_told(
    settings: PictureSettings, templates: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(MoLEError, match=message):
        training.plan(settings, templates, 5, 1, 2.0, "", "gates", AllowedFolders([tmp_path]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "."}, r"\. is the page's own folder"),
        ({"folder": " "}, "has no name"),
        ({"folder": "../gates"}, "outside of the folders"),
        ({"clip": "/etc"}, "outside of the folders"),
        ({"clip": "ViT-B-32:/etc/passwd"}, "open_clip has no weights ViT-B-32:/etc/passwd: it has openai"),
        ({"clip": "ViT-X:openai"}, "there is no such architecture"),
        ({"batch_size": 65}, "pictures a step must be a whole number from 1 to 64"),
        ({"guidance_scale": None}, "the guidance scale of training is empty"),
    ],
)
def test_a_training_stays_in_its_folders_and_bounds(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"steps": 5, "batch_size": 1, "guidance_scale": 2.0, "clip": "", "folder": "gates"}
    with pytest.raises(MoLEError, match=message):
        training.plan(BOTH, "{concepts}", allowed=AllowedFolders([tmp_path]), **{**given, **change})
    assert list(tmp_path.iterdir()) == []


def test_gates_train_on_another_base_with_a_clip_of_its_own(
    tmp_path: Path, few_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mole_diffusion.training.gates.report.SEEDS", (0,))
    base = tiny_pipeline()
    base.save_pretrained(tmp_path / "base")
    write_clip(tmp_path / "clip")
    loras = []
    for seed, (token, kind) in enumerate((("sks", "cat"), ("xyz", "dog"))):
        file = tmp_path / f"{kind}.safetensors"
        save_file(random_lora(base.components, seed=seed), file)
        loras.append(LoRASettings(kind, str(file), triggers=(f"{token} {kind}",)))
    settings = PictureSettings("gates", base=str(tmp_path / "base"), loras=tuple(loras))
    plan, config = training.plan(settings, "a {concepts}", 2, 2, 2.0, "clip", "gates", AllowedFolders([tmp_path]))
    assert (config.gradient_accumulation, config.gradient_checkpointing) == (2, True)  # a picture at a time
    *_, out = training.train(Studio("cpu"), plan, replace(config, rollout_steps=2, reference_pictures=1), Ticket())
    told = json.loads((out / "training.json").read_text())
    assert told["prompts"]["a a sks cat and a xyz dog"] == "a a cat and a dog"
    assert (out / "samples.png").is_file()


def test_float16_trains_nothing(tmp_path: Path) -> None:
    plan, config = training.plan(BOTH, "{concepts}", 5, 1, 2.0, "", "gates", AllowedFolders([tmp_path]))
    with pytest.raises(MoLEError, match="--dtype bfloat16"):
        next(training.train(Studio("cpu", "float16"), plan, config, Ticket()))


def test_the_python_call_names_a_composition_with_options() -> None:
    script = as_python(replace(BOTH, composition="masks", composition_options={"own_words": 2.0}))
    assert "from mole_diffusion.composition import Masks" in script
    assert "pipe.set_composition(Masks(own_words=2.0))" in script
