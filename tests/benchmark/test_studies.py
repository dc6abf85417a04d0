"""Studies that come along are found by their names, from a checkout and from a wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mole_diffusion.benchmark import BenchmarkConfig, studies
from mole_diffusion.errors import MoLEError
from tests import ROOT
from tests.command import mole


def test_a_name_is_a_study_that_comes_along_and_a_path_stays_one(tmp_path: Path) -> None:
    found = studies.find_study("table1")
    assert found.read_text() == (ROOT / "benchmarks" / "table1.yaml").read_text()
    assert BenchmarkConfig.from_file(found).paper is not None
    assert studies.find_study(tmp_path / "mine.yaml") == tmp_path / "mine.yaml"
    with pytest.raises(MoLEError, match=r"no study of that name comes along; there are .*table1"):
        studies.find_study("table2")
    with pytest.raises(MoLEError, match="a folder and no file"):
        studies.find_study(tmp_path)


def test_a_wheel_has_them_in_the_benchmarks_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped"
    shutil.copytree(ROOT / "benchmarks", shipped)
    monkeypatch.setattr(studies, "_FOLDERS", (shipped, tmp_path / "none"))
    assert studies.find_study("table1") == shipped / "table1.yaml"


def test_an_unknown_study_is_one_line() -> None:
    done = mole("benchmark", "run", "table2")
    assert done.exit_code == 2
    assert "no study of that name" in done.output
