"""`benchmarks/real/run.py` from end to end, on the toybox: that it works, not what it measures."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from mole_diffusion import toybox
from tests import ROOT

SCRIPT = ROOT / "benchmarks" / "real" / "run.py"


def test_the_page_is_written_and_what_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, subject in (("cat", "cat"), ("teapot", "teapot")):
        (tmp_path / "data" / name).mkdir(parents=True)
        toybox.references(subject)[0].save(tmp_path / "data" / name / "0.png")
    out = tmp_path / "out"
    options = ["--data", tmp_path / "data", "--base", toybox.base_dir(), "--out", out, "--subjects", "cat", "teapot"]
    quick = ["--train-steps", 1, "--steps", 2, "--seeds", 1, "--clip", "toybox", "--dino", "", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, (*options, *quick))])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = json.loads((out / "rows.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["normalized", "budget", "norm_router", "masks"]
    assert all(row["seconds a picture"] > 0 and -1 <= row["CLIP-I"] <= 1 for row in rows)
    assert "| masks |" in (out / "page.md").read_text()
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.png")} | {
        file: file.stat().st_mtime_ns for file in (out / "loras").glob("*.safetensors")
    }
    assert len(before) == 4 + 2
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert {file: file.stat().st_mtime_ns for file in before} == before
