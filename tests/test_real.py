"""`benchmarks/real/run.py` from end to end, on the toybox: that it works, not what it measures."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from mole_diffusion import toybox
from tests import ROOT

SCRIPT = ROOT / "benchmarks" / "real" / "run.py"


def test_the_page_is_written_and_what_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, subject in (("cat", "cat"), ("teapot", "teapot")):
        (tmp_path / "data" / name).mkdir(parents=True)
        toybox.references(subject)[0].save(tmp_path / "data" / name / "0.png")
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(tmp_path / "dino")
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path / "dino")
    out = tmp_path / "out"
    options = ["--data", tmp_path / "data", "--base", toybox.base_dir(), "--out", out, "--subjects", "cat", "teapot"]
    quick = ["--train-steps", 1, "--steps", 2, "--seeds", 1, "--clip", "toybox", "--device", "cpu"]
    quick += ["--dino", tmp_path / "dino"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, (*options, *quick))])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = json.loads((out / "rows.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["normalized", "budget", "norm_router", "masks"]
    assert all(row["seconds a picture"] > 0 for row in rows)
    for column in ("text", "CLIP-I", "DINOv2"):
        assert all(-1 <= row[column] <= 1 for row in rows)
        assert len({row[column] for row in rows}) > 1
    page = (out / "page.md").read_text()
    assert "| method | text | CLIP-I | DINOv2 | seconds a picture | GiB |" in page
    assert "| masks |" in page
    assert "Pairs: 1; seeds: 1; denoising steps: 2; on cpu" in page
    assert (out / "pictures.png").is_file()
    before = {file: file.stat().st_mtime_ns for file in (out / "pictures").rglob("*.png")} | {
        file: file.stat().st_mtime_ns for file in (out / "loras").glob("*.safetensors")
    }
    assert len(before) == 4 + 2
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert {file: file.stat().st_mtime_ns for file in before} == before
