"""A benchmark: what it draws, what it records, and that it comes out the same however often it is killed."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mole_diffusion import MoLEStableDiffusionPipeline, toybox
from mole_diffusion.benchmark import BenchmarkConfig, run_benchmark, write_report
from mole_diffusion.benchmark.judge import Judge
from mole_diffusion.benchmark.report.paper_table import read_paper
from mole_diffusion.benchmark.row import Row
from mole_diffusion.benchmark.run import read_rows
from mole_diffusion.benchmark.stats import correlation, paired_bootstrap, rank_correlation, wins
from mole_diffusion.cli import app
from mole_diffusion.composition import Merge
from mole_diffusion.methods import METHODS, MergeOptions
from mole_diffusion.metrics import RegionAlignment, oracle_detector
from mole_diffusion.toybox.recipe.gates import TRAINED_ON
from mole_diffusion.toybox.world import compose_scene
from tests import ROOT, forked
from tests.fork_server import ForkServer

SMALL: dict[str, Any] = {
    "name": "small",
    "base": "toybox",
    "concepts": "toybox",
    "compositions": ["cat+boot+teapot", "mug+robot"],
    "methods": ["linear", {"merge": {"scale": 0.5}}, "mole"],
    "gates": "toybox",
    "prompts": ["a photo of {concepts} on grass"],
    "seeds": 2,
    "scale": 0.9,
    "steps": 1,
    "clip": "toybox",
}
FREE: dict[str, Any] = SMALL | {
    "gates": None,
    "compositions": ["cat+boot"],
    "methods": ["linear", "composite", "soup"],
    "batch": 2,
    "train_prompts": ["a photo of {concepts} on slate"],
    "training": {"steps": 3, "batch_size": 1, "rollout_steps": 1, "warmup_steps": 0, "checkpoint_every": 1},
}


def config(**changes: Any) -> BenchmarkConfig:
    return BenchmarkConfig.from_dict(SMALL | changes)


def scores(rows: list[Row]) -> list[Row]:
    """Without what depends on the machine."""
    return [dataclasses.replace(row, seconds=None, memory=None) for row in rows]


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished benchmark; there are no gates for the second composition."""
    folder = tmp_path_factory.mktemp("benchmark")
    assert run_benchmark(config(), folder) == 2
    return folder


def test_every_row_is_there_and_a_failure_says_why(done: Path) -> None:
    rows = read_rows(config(), done)
    assert len(rows) == 12
    failed = [row for row in rows if row.error is not None]
    assert [(row.composition, row.method, row.seed) for row in failed] == [
        ("mug+robot", "mole", 0),
        ("mug+robot", "mole", 1),
    ]
    assert "MoLEError: no gates for 'mug+robot' ship" in failed[0].error
    row = next(row for row in rows if row.method == "merge(scale=0.5)")
    assert row.numbers["text_clipscore"] == pytest.approx(2.5 * max(row.numbers["text_cosine"], 0), abs=1e-6)
    by_concept = row.image_by_concept
    assert list(by_concept) == ["cat", "boot", "teapot"]
    assert row.numbers["image"] == pytest.approx(sum(by_concept.values()) / 3)
    assert row.evaluations == 1
    assert {"omission", "confusion", "all_present", "region"} <= set(row.numbers)
    assert row.seconds is not None
    assert row.memory is not None
    assert row.memory > 1  # beyond the weights, on the CPU as on a GPU


def test_regions_are_measured_as_the_metric_does() -> None:
    study, names = config(), ["cat", "boot", "teapot"]
    looks = [toybox.subject(name).look for name in names]
    picture = toybox.render(compose_scene(names, looks, "slate", np.random.default_rng(0)))
    judge = Judge(study, "cpu")
    references = {name: toybox.references(name) for name in names}
    metric = RegionAlignment(judge.clip, references, oracle_detector())
    expected = metric([picture])
    measured = judge.measure([picture], study.cells()[:1])[0].numbers
    assert measured["region"] == pytest.approx(expected["mean"].item(), abs=1e-5) != 0
    assert measured["detection"] == expected["detection rate"] == 1


def test_pictures_are_those_of_a_call_with_the_same_seed(done: Path) -> None:
    pipe = MoLEStableDiffusionPipeline.from_pretrained(toybox.base_dir())
    pipe.set_progress_bar_config(disable=True)
    names = ["cat", "boot", "teapot"]
    pipe.load_loras({name: toybox.lora_path(name) for name in names})
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 5.0, "loras": dict.fromkeys(names, 0.9)}
    for method, label in ((Merge(0.5), "merge(scale=0.5)"), ("mole", "mole")):
        if method == "mole":
            pipe.load_gates(toybox.gates_dir("cat+boot+teapot"))
        pipe.set_composition(method)
        prompt = toybox.subject_prompt(names, "grass")
        expected = pipe(prompt, generator=torch.manual_seed(1), **options).images[0]
        path = done / "pictures" / "cat+boot+teapot" / label / "p00-s0001.png"
        with Image.open(path) as drawn:
            assert drawn.tobytes() == expected.tobytes()


def test_pictures_are_as_large_as_the_study_says(tmp_path: Path) -> None:
    study = config(compositions=["cat"], methods=["linear"], gates=None, seeds=1, resolution=72)
    assert run_benchmark(study, tmp_path) == 0
    with Image.open(tmp_path / "pictures" / "cat" / "linear" / "p00-s0000.png") as drawn:
        assert drawn.size == (72, 72)
    assert "72×72 pixels" in write_report(study, tmp_path).read_text()
    with pytest.raises(ValueError, match="holds a benchmark with another 'resolution': 72 and not None"):
        run_benchmark(config(compositions=["cat"], methods=["linear"], gates=None, seeds=1), tmp_path)


def test_started_again_it_does_only_what_is_missing(done: Path) -> None:
    before = files(done)
    gone = done / "rows" / "mug+robot" / "linear" / "p00-s0001.json"
    gone.unlink()
    assert run_benchmark(config(), done) == 2  # those that failed are tried again
    after = files(done)
    changed = {name for name in after if after[name] != before[name]}
    assert set(after) == set(before)
    failed = {f"rows/mug+robot/mole/p00-s000{seed}.json" for seed in (0, 1)}
    picture = "pictures/mug+robot/linear/p00-s0001.png"
    assert changed == {str(gone.relative_to(done)), picture} | failed
    assert after[picture][1] == before[picture][1]


def test_a_folder_holds_one_benchmark(done: Path) -> None:
    with pytest.raises(ValueError, match="holds a benchmark with another 'steps': 1 and not 2"):
        run_benchmark(config(steps=2), done)


def test_rows_of_other_loras_do_not_mix_in(tmp_path: Path) -> None:
    shutil.copy(toybox.lora_path("cat"), tmp_path / "a.safetensors")
    concept = {
        "lora": str(tmp_path / "a.safetensors"),
        "phrase": "<v1> cat",
        "description": "striped cat",
        "references": "toybox",
    }
    study = config(concepts={"cat": concept}, compositions=["cat"], methods=["linear"], gates=None, seeds=1)
    assert run_benchmark(study, tmp_path / "out") == 0
    shutil.copy(toybox.lora_path("boot"), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds a benchmark with another 'LoRA files'"):
        run_benchmark(study, tmp_path / "out")
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match=r"concept 'cat': there is no LoRA file .*a\.safetensors"):
        run_benchmark(study, tmp_path / "out")


def test_a_method_that_is_added_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "half", MergeOptions)
    assert "half" in [method.label for method in config(methods="all").methods]
    assert "mole" not in [method.label for method in config(methods="all", gates=None).methods]


def test_the_report_has_the_means_and_names_the_failures(done: Path) -> None:
    path = write_report(config(), done)
    text = path.read_text(encoding="utf-8")
    rows = [row for row in read_rows(config(), done) if row.error is None]
    for label in ("linear", "merge(scale=0.5)", "mole"):
        mine = [row.numbers["image"] for row in rows if row.method == label]
        line = next(line for line in text.splitlines() if line.startswith(f"| {label} | {len(mine)} |"))
        assert f"| {np.mean(mine):.3f} |" in line
    assert "10 pictures measured, 2 failed, 0 missing" in text
    assert "no gates for 'mug+robot' ship" in text
    assert "## Difference to linear" in text
    assert "## How far can one trust alignment?" in text
    for name in ("scatter.png", "cat+boot+teapot.png", "mug+robot.png"):
        with Image.open(path.parent / name) as picture:
            picture.verify()
    with (path.parent / "rows.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 12
    assert float(table[0]["image: cat"]) == rows[0].image_by_concept["cat"]


def test_a_report_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no measured row\. Run `mole benchmark run` first"):
        write_report(config(), tmp_path)


def test_bootstrap_wins_and_correlation() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.3, 1, 400), rng.normal(0, 1, 400)
    ours, theirs = dict(enumerate(a)), {k: b[k] for k in reversed(range(400))} | {999: 5.0}
    mean, low, high = paired_bootstrap(ours, theirs)
    assert mean == pytest.approx((a - b).mean())
    # The interval of the normal approximation; 2,000 draws know a percentile to 0.06 of a standard error.
    spread = (a - b).std(ddof=1) / 400**0.5
    assert (low, high) == pytest.approx((mean - 1.96 * spread, mean + 1.96 * spread), abs=0.2 * spread)
    assert paired_bootstrap(ours, ours) == (0, 0, 0)
    with pytest.raises(ValueError, match="no picture in common"):
        paired_bootstrap({1: 0.0}, {2: 0.0})
    table = {"x": {"a": 1.0, "b": 2.0}, "y": {"a": 3.0, "b": 3.0}, "z": {"a": 0.0}}
    assert wins(table) == {"a": 1.5, "b": 1.5}
    assert wins(table, higher_is_better=False) == {"a": 2.5, "b": 0.5}
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [1, 1, 1]) is None
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 4, 3: 1 minus nothing simple with ties, so Pearson's r of these.
    assert rank_correlation([5, 7, 7, 90], [0, 1, 3, 2]) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 4, 3])[0, 1]
    )
    assert rank_correlation([1, 2, 3], [1, 10, 100]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [1, 1, 1]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "unknown key 'seed'. A benchmark has name, base"),
        ({"compositions": ["cat+dog"]}, "'cat\\+dog' has 'dog', which is no concept. Known are cat, boot"),
        ({"compositions": ["cat+cat"]}, "'cat\\+cat' has 'cat' twice"),
        ({"compositions": []}, "`compositions` must be a list with at least one entry"),
        ({"methods": ["lineal"]}, "'lineal' is no method. Write a name, one of linear"),
        ({"methods": [{"merge": {"size": 1}}]}, "composition 'merge' has no option 'size'; it has scale"),
        ({"methods": ["mole"], "gates": None}, "'mole' needs gates. Say what to train them on"),
        ({"methods": ["linear", "linear"]}, "methods has 'linear' twice"),
        ({"prompts": ["a photo"]}, 'a prompt needs "{concepts}"'),
        ({"seeds": [0, 0]}, "seeds has 0 twice"),
        ({"seeds": 0}, "`seeds` must be a list with at least one entry"),
        ({"steps": 0}, "`steps` must be a number of at least 1, got 0"),
        ({"resolution": 500}, "`resolution` must be a multiple of 8 pixels, or left out, got 500"),
        ({"concepts": {"cat": {"lora": "x"}}}, "concept 'cat' must have exactly lora, phrase, description, references"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


STUDIES = [path for path in sorted((ROOT / "benchmarks").glob("*.yaml")) if path.stem != "table7"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_ship_can_be_read(path: Path) -> None:
    study = BenchmarkConfig.from_file(path)
    assert {"mole", "masks"} & {method.name for method in study.methods}
    if study.paper is not None:
        ours = {row.ours for row in read_paper(study.paper).rows} - {None}
        assert len(ours) > 1
        assert ours <= {method.label for method in study.methods}
    names = ["cat", "boot"]
    measured = {study.prompt(index, names) for index in range(len(study.prompts))}
    assert measured == {toybox.subject_prompt(names, ground) for ground in toybox.GROUNDS[4:]}
    trained = {study.fill(template, names) for template in study.train_prompts}
    assert trained <= {toybox.subject_prompt(names, ground) for ground in TRAINED_ON}


def test_on_the_command_line(done: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL))
    run = CliRunner().invoke(app, ["benchmark", "run", str(path), "--out", str(done), "--device", "cpu"])
    assert run.exit_code == 1, run.output
    assert "2 rows failed" in run.stderr
    report = CliRunner().invoke(app, ["benchmark", "report", str(path), "--out", str(done)])
    assert report.exit_code == 0, report.output
    assert str(done / "report" / "report.md") in report.stdout
    page = ["--page", str(tmp_path / "results")]
    report = CliRunner().invoke(app, ["benchmark", "report", str(path), "--out", str(done), *page])
    assert report.exit_code == 0, report.output
    assert (tmp_path / "results" / "small.md").is_file()
    assert (tmp_path / "results" / "small" / "cat+boot+teapot.png").is_file()
    path.write_text("name: [")
    broken = CliRunner().invoke(app, ["benchmark", "run", str(path)])
    assert broken.exit_code == 2
    assert broken.stderr.startswith(f"mole: {path}:")


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same_table(tmp_path: Path, fork_server: ForkServer) -> None:
    path = tmp_path / "free.yaml"
    path.write_text(json.dumps(FREE))
    study, killed, whole = BenchmarkConfig.from_file(path), tmp_path / "killed", tmp_path / "whole"
    *codes, there = fork_server.run(forked.benchmark, tmp_path, path)
    assert -9 in codes[:2]
    assert codes[2:] == [0, 0, 0]
    assert 0 < there < len(study.cells())
    assert scores(read_rows(study, killed)) == scores(read_rows(study, whole))
    assert len(read_rows(study, killed)) == len(study.cells())
    assert [row.evaluations for row in read_rows(study, whole)][:4] == [1, 1, 2, 2]
    gates = {path.relative_to(whole): path.read_bytes() for path in whole.glob("gates/*/*/*.safetensors")}
    assert len(gates) == 1
    assert {path: (killed / path).read_bytes() for path in gates} == gates
    tables = [write_report(study, folder).read_text().split("## Cost")[0] for folder in (killed, whole)]
    assert tables[0] == tables[1]
    assert json.loads((killed / "benchmark.json").read_text()) == json.loads((whole / "benchmark.json").read_text())
