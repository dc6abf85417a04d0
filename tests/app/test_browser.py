"""The page in a real browser: from a dropped file to a picture, regions by mouse and keys, two visitors, a broken file,
a cancel. Skipped where there is no browser; `playwright install chromium` brings one."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mole_diffusion import toybox
from mole_diffusion.drawing import png
from tests import ROOT

if importlib.util.find_spec("gradio") is None:  # not imported here, which takes seconds: the page is another process
    pytest.skip("gradio is not installed", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")
PATIENCE = 120_000  # milliseconds; a busy machine draws slowly
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as play:
        if found is None and not Path(play.chromium.executable_path).is_file():
            pytest.skip("no browser: neither Chromium nor Chrome on the path, nor playwright's (playwright install)")
        opened = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mole app` in a process of its own, as people start it."""
    command = "import sys; from mole_diffusion.cli import main; sys.argv[0] = 'mole'; main()"
    folder, log = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("log") / "stderr"
    options = ["app", "--no-browser", "--device", "cpu", "--folder", str(folder)]
    with log.open("w") as errors:
        process = subprocess.Popen([sys.executable, "-c", command, *options], cwd=ROOT, stderr=errors)
    try:
        for _ in range(3000):
            said = re.search(r"The page is at (http://127\.0\.0\.1:\d+)/ and", log.read_text())
            if said is not None or process.poll() is not None:
                break
            time.sleep(0.2)
        assert said is not None, log.read_text()
        yield said[1]
    finally:
        process.terminate()
        process.wait()


def visit(browser: Any, address: str, **options: Any) -> Any:
    page = browser.new_page(**options)
    page.set_default_timeout(PATIENCE)
    page.wrong = []  # what a console would show in red
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.goto(address)
    page.locator("mark").first.wait_for()
    return page


def quick(page: Any, seed: int = 0) -> None:
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_label("Seed", exact=True).fill(str(seed))


def choose(page: Any, label: str, option: str) -> None:
    """With the keyboard."""
    page.get_by_label(label, exact=True).fill(option)
    page.keyboard.press("Enter")


def drawn(page: Any, tmp_path: Path) -> Path:
    page.get_by_text("is ready").wait_for()
    source = page.locator("#mole-gallery img").first.get_attribute("src")
    file = tmp_path / "it.png"
    file.write_bytes(page.request.get(source).body())
    return file


def box(page: Any, left: float, top: float, right: float, bottom: float) -> None:
    """Pulls a box on the canvas with the mouse."""
    canvas = page.locator("#mole-canvas")
    canvas.scroll_into_view_if_needed()
    frame = canvas.bounding_box()
    page.mouse.move(frame["x"] + left * frame["width"], frame["y"] + top * frame["height"])
    page.mouse.down()
    page.mouse.move(frame["x"] + right * frame["width"], frame["y"] + bottom * frame["height"], steps=4)
    page.mouse.up()


def test_from_a_dropped_file_to_a_picture_with_regions_by_mouse(browser: Any, address: str, tmp_path: Path) -> None:
    page = visit(browser, address, viewport={"width": 1280, "height": 1000})
    mug = tmp_path / "my-mug.safetensors"
    shutil.copy(toybox.lora_path("mug"), mug)
    page.locator("#mole-drop input[type=file]").set_input_files(str(mug))
    token = toybox.token("mug")
    page.get_by_text(f"called by {token} mug").wait_for()
    page.get_by_label("Prompt", exact=True).press_sequentially(f" beside a {token} mug")
    page.locator("mark", has_text="mug").wait_for()
    box(page, 0.02, 0.1, 0.45, 0.9)
    page.get_by_role("radio", name="my-mug").click()
    page.get_by_role("button", name="Paint").click()
    box(page, 0.7, 0.2, 0.8, 0.8)
    page.get_by_text("cat: 1 box; my-mug: painted").wait_for()
    quick(page)
    page.locator("#mole-draw").click()
    settings = png.read_settings(drawn(page, tmp_path))
    assert [lora.name for lora in settings.loras] == ["cat", "boot", "my-mug"]
    (region,) = settings.regions["cat"]
    assert region == pytest.approx((0.02, 0.1, 0.45, 0.9), abs=0.01)
    (mask,) = settings.regions["my-mug"]
    assert isinstance(mask, str)
    assert page.wrong == []
    page.close()


def test_a_picture_dropped_again_restores_the_page_with_the_keyboard_alone(
    browser: Any, address: str, tmp_path: Path
) -> None:
    page = visit(browser, address)
    quick(page, seed=5)
    choose(page, "Composition", "masks")
    page.get_by_placeholder("own_words=").fill("own_words=2.0")  # once the method has said its options
    page.locator("#mole-canvas").focus()
    for key in ("Enter", "ArrowLeft", "Shift+ArrowDown"):
        page.keyboard.press(key)
    page.locator("#mole-draw").focus()
    page.keyboard.press("Enter")
    file = drawn(page, tmp_path)
    settings = png.read_settings(file)
    assert settings.regions == {"cat": ((0.2, 0.25, 0.7, 0.8),)}
    assert settings.composition_options == {"own_words": 2.0}
    other = visit(browser, address)
    other.locator("#mole-restore input[type=file]").set_input_files(str(file))
    other.get_by_text("are restored").wait_for()
    assert other.get_by_label("Seed", exact=True).input_value() == "5"
    other.get_by_text("cat: 1 box").wait_for()
    assert other.get_by_label("Composition", exact=True).input_value() == "masks"
    assert other.get_by_label("Options of the composition").input_value() == "own_words=2.0"
    page.close()
    other.close()


def test_two_visitors_see_their_own(browser: Any, address: str, tmp_path: Path) -> None:
    pages = [visit(browser, address), visit(browser, address)]
    for seed, page in enumerate(pages):
        quick(page, seed=seed)
    for page in pages:
        page.locator("#mole-draw").click()
    seeds = []
    for number, page in enumerate(pages):
        (tmp_path / str(number)).mkdir()
        seeds.append(png.read_settings(drawn(page, tmp_path / str(number))).seed)
        page.close()
    assert seeds == [0, 1]


def test_a_broken_file_and_a_bad_field_are_one_line(browser: Any, address: str, tmp_path: Path) -> None:
    page = visit(browser, address)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(toybox.lora_path("mug").read_bytes()[:300])
    page.locator("#mole-drop input[type=file]").set_input_files(str(broken))
    line = page.get_by_text(re.compile("✗ broken.safetensors"))
    line.wait_for()
    assert "Traceback" not in line.inner_text()
    page.locator("#mole-base input, #mole-base textarea").fill("/etc")
    page.locator("#mole-draw").click()
    page.get_by_text("lies outside of the folders").wait_for()
    page.close()


def test_a_cancel_ends_a_picture(browser: Any, address: str) -> None:
    page = visit(browser, address)
    page.get_by_label("Steps", exact=True).fill("200")
    page.locator("#mole-draw").click()
    page.get_by_text(re.compile(r"(drawing|beginning): ")).wait_for()
    page.locator("#mole-cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    page.close()


def test_every_field_has_a_name_and_a_phone_shows_all(browser: Any, address: str) -> None:
    page = visit(browser, address, viewport={"width": 390, "height": 800}, color_scheme="dark")
    fields = page.locator("input:visible, textarea:visible, button:visible, canvas:visible, [role=listbox]:visible")
    nameless = fields.evaluate_all(
        """found => found.filter(one => !(one.labels && one.labels.length) && !one.getAttribute("aria-label")
            && !one.textContent.trim() && !one.title && one.type !== "file").map(one => one.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#mole-draw").evaluate("one => one.getBoundingClientRect().bottom <= window.innerHeight")
    page.close()


def test_names_of_others_and_files_of_this_computer_are_refused(address: str) -> None:
    """Somebody else's page whose name leads here has the browser say that name."""
    answer = urllib.request.urlopen(urllib.request.Request(address))
    assert answer.status == 200
    for path, name in (("/", "evil.example"), ("/gradio_api/file=/etc/passwd", "127.0.0.1")):
        asked = urllib.request.Request(address + path, headers={"Host": name})
        with pytest.raises(urllib.error.HTTPError, match=r"40[03]"):
            urllib.request.urlopen(asked)
