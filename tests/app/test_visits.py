"""What visitors get: pictures in turn, their own session, what they drew last time."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mole_diffusion import toybox
from mole_diffusion.app import form
from mole_diffusion.app.allowed_folders import AllowedFolders
from mole_diffusion.app.session import Session
from mole_diffusion.app.studio import Cancelled, Studio, Ticket
from mole_diffusion.drawing import png
from mole_diffusion.drawing.settings import LoRASettings, PictureSettings
from mole_diffusion.errors import MoLEError
from tests.app.visitors import BOOT, BOTH, CAT, cancel_after


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
