"""The project around the package: what is installed, what is imported when, which versions stand where."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mole_diffusion
from mole_diffusion.files import atomic_path, file_name, write_json
from tests import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run_python(code: str, cwd: Path, *options: str) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_does_not_import_torch() -> None:
    heavy = "import sys, mole_diffusion; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    assert run_python(heavy, ROOT) == "[]"


def test_every_package_folder_is_installed() -> None:
    folders = {"mole_diffusion"} | {
        ".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "mole_diffusion").glob("*/**/__init__.py")
    }
    top = {f"mole_diffusion.{name}" for name in ("pipelines", "metrics") if (ROOT / name / "__init__.py").is_file()}
    data = {"mole_diffusion.benchmark.shipped"}  # `benchmarks/`, which is no Python
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders | top | data


def test_every_public_name_is_there_and_listed() -> None:
    for name in mole_diffusion.__all__:
        assert getattr(mole_diffusion, name) is not None
    assert set(mole_diffusion.__all__) <= set(dir(mole_diffusion))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'train_lorra'; it has .*train_lora"):
        _ = mole_diffusion.train_lorra


def test_a_checkout_that_is_not_installed_finds_its_pipelines(tmp_path: Path) -> None:
    # A copy with one marker pipeline; -S -E hides an installed mole_diffusion.
    shutil.copytree(ROOT / "mole_diffusion", tmp_path / "mole_diffusion", ignore=shutil.ignore_patterns("assets"))
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("HERE = True\n")
    code = "import mole_diffusion.pipelines as p; print(p.HERE, p.__name__)"
    assert run_python(code, tmp_path, "-S", "-E") == "True mole_diffusion.pipelines"


def test_citation_has_the_version_and_the_paper() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version = re.search(r"^version: (\S+)$", citation, re.MULTILINE)
    assert version is not None
    assert version.group(1) == mole_diffusion.__version__
    assert "uWvKBCYh4S" in citation
    assert f"## [{mole_diffusion.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    target = write_json(tmp_path / "state.json", {"step": 1})
    before = target.read_text()

    def fail_halfway() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        fail_halfway()
    assert target.read_text() == before
    assert list(tmp_path.iterdir()) == [target]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "state.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_every_tracked_file_has_a_name_that_every_system_takes() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = {part for path in listed.split("\0") if path for part in path.split("/")}
    assert [name for name in names if not name.startswith(".") and file_name(name) != name] == []
    assert len({name.casefold() for name in listed.split("\0")}) == len(listed.split("\0"))


def test_every_tracked_text_has_the_same_bytes_on_every_system() -> None:
    listed = subprocess.run(["git", "ls-files", "--eol"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    entries = [line.split("\t") for line in listed.stdout.splitlines()]
    texts = {name: how for how, name in entries if "i/-text" not in how}
    assert len(texts) > 100
    assert [name for name, how in texts.items() if "i/crlf" in how or "eol=lf" not in how] == []


def test_what_a_user_can_mend_is_one_class_of_errors() -> None:
    """The command line shows any other error as the bug that it is."""
    files = [file for room in ("mole_diffusion", "metrics", "pipelines") for file in (ROOT / room).rglob("*.py")]
    bare = [file.name for file in files if "raise ValueError(" in file.read_text(encoding="utf-8")]
    assert len(files) > 100
    assert not bare, f"raise MoLEError instead, in {bare}"


def test_no_two_classes_have_one_name() -> None:
    files = [file for room in ("mole_diffusion", "metrics", "pipelines") for file in (ROOT / room).rglob("*.py")]
    found = [
        (node.name, file.name)
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    names = [name for name, _ in found]
    assert len(set(names)) > 100
    assert [entry for entry in found if names.count(entry[0]) > 1] == []
