"""What an installation brings: modules, dependencies and extras, and what each extra says where it is missing."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mole_diffusion.yaml_files import read_yaml
from tests import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
# Import name to package, where they differ.
NAMED = {"PIL": "pillow", "open_clip": "open-clip-torch", "ruamel": "ruamel-yaml", "huggingface_hub": "huggingface-hub"}
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def requirements(*extras: str) -> dict[str, Requirement]:
    """What the package needs, and what these extras add, by name. That an extra has another in it is left out."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    listed = [one for one in map(Requirement, texts) if one.name != PROJECT["name"]]
    by_name = {canonicalize_name(one.name): one for one in listed}
    assert len(by_name) == len(listed), "a dependency stands in two places"
    return by_name


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    exact = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in exact}


def test_constraints_satisfy_every_dependency() -> None:
    exact = pins("constraints.txt")
    for name, requirement in requirements(*EXTRAS).items():
        assert requirement.specifier.contains(exact[name]), f"{requirement} is not met by {exact[name]}"
    assert not [name for name in exact if name.startswith(("nvidia", "cuda", "triton"))]


def test_lower_bounds_are_the_oldest_versions_that_are_tested() -> None:
    """Those that a user meets; tools of developers have one version for both."""
    exact = pins("constraints-lowest.txt")
    for name, requirement in requirements("train", "metrics", "cli", "app").items():
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        # A bound without the last part, 1.9, means any 1.9.x: the newest patch of it may be what is tested.
        assert f"{exact[name]}.".startswith(f"{bound.version}."), name
    for name, requirement in requirements("dev").items():
        assert requirement.specifier.contains(exact[name]), f"{requirement} is not met by {exact[name]}"


def test_every_python_that_is_named_is_tested_and_the_oldest_versions_too() -> None:
    named = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    job = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["versions"]
    matrix = job["strategy"]["matrix"]
    assert set(named) <= set(matrix["python"])
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert matrix["target"] == ["test"]
    assert matrix["include"] == [{"python": named[0], "target": "test-lowest"}]
    assert job["steps"][-1]["run"] == "make ${{ matrix.target }}"


def imported(*files: Path) -> set[str]:
    """The packages from elsewhere that files import."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"mole_diffusion"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    files = [file for room in ("mole_diffusion", "metrics", "pipelines") for file in (ROOT / room).rglob("*.py")]
    used = {NAMED.get(name, name) for name in imported(*files)}
    # torchvision is open_clip's, which does not declare that some of its files need it.
    assert used == set(requirements("train", "metrics", "cli", "app")) - {"torchvision"}


def test_errors_name_the_extras_that_there_are() -> None:
    from mole_diffusion.extras import Extra

    assert [*Extra.__args__, "docs", "dev"] == list(EXTRAS)  # type: ignore[attr-defined]


class Built(NamedTuple):
    """What `pip` gets to install: folders of what lies in the archives."""

    source: Path
    wheel: Path
    sdist: Path
    editable: Path


BUILD = """
import setuptools.build_meta as backend

backend.build_wheel("../wheel"), backend.build_sdist("../sdist"), backend.build_editable("../editable")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built from a copy of the source, in which weights and pictures are left out."""
    folder = tmp_path_factory.mktemp("built")
    built = Built(*(folder / name for name in Built._fields))
    heavy = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.png")
    for name in {path.partition("/")[0] for path in SETUPTOOLS["package-dir"].values()}:
        shutil.copytree(ROOT / name, built.source / name, ignore=heavy)
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, built.source)
    for archives in built[1:]:
        archives.mkdir()
    command = [sys.executable, "-c", BUILD]
    done = subprocess.run(command, cwd=built.source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for archive in (*built.wheel.iterdir(), *built.editable.iterdir()):
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(archive.parent)
    [archive] = built.sdist.iterdir()
    with tarfile.open(archive) as sdist:
        sdist.extractall(built.sdist, filter="data")
    return built._replace(sdist=built.sdist / archive.name.removesuffix(".tar.gz"))


def installed_files(folders: dict[str, Path]) -> set[str]:
    """The modules and data of all packages, by the folder that each lies in."""
    return {
        f"{package}:{file.name}"
        for package, folder in folders.items()
        for file in folder.iterdir()
        if file.suffix in (".py", ".yaml", ".typed")
    }


def package_folders(root: Path, places: dict[str, str]) -> dict[str, Path]:
    """Where each package lies below `root`, if the packages in `places` and what is below them lie there."""
    found = {}
    for package in SETUPTOOLS["packages"]:
        above = max((name for name in places if f"{package}.".startswith(f"{name}.")), key=len)
        found[package] = root.joinpath(places[above], *package.removeprefix(above).strip(".").split("."))
    return found


def test_wheel_sdist_and_editable_install_have_the_same_modules(built: Built) -> None:
    places = SETUPTOOLS["package-dir"]
    [finder] = built.editable.glob("__editable__*_finder.py")
    wheel = installed_files(package_folders(built.wheel, {"mole_diffusion": "mole_diffusion"}))
    assert wheel == installed_files(package_folders(built.source, places))
    assert wheel == installed_files(package_folders(built.sdist, places))
    assert wheel == installed_files(package_folders(Path(), runpy.run_path(str(finder))["MAPPING"]))
    assert {"mole_diffusion.pipelines:mixin.py", "mole_diffusion.benchmark.shipped:table1.yaml"} < wheel
    assert len(wheel) > 300
    assert not list(built.wheel.glob("[!m]*"))  # nothing beside the package and what describes it


CORE = """
import importlib
import sys
import mole_diffusion
from mole_diffusion import MoLEStableDiffusionPipeline, toybox

names = toybox.demo_subjects()
pipe = MoLEStableDiffusionPipeline.from_pretrained(toybox.base_dir())
pipe.set_progress_bar_config(disable=True)
pipe.load_loras({name: toybox.lora_path(name) for name in names})
prompt = "a photo of a <v1> cat, a <v2> boot and a <v3> teapot on grass"
settings = {"num_inference_steps": 2, "output_type": "np"}
masked = pipe(prompt, **settings).images
pipe.masks.save("masks")
boxed = pipe(prompt, regions={"cat": (0, 0, 0.5, 1)}, **settings).images
pipe.load_gates(toybox.gates_dir("+".join(names)))
gated = pipe(prompt, **settings).images
print(*(picture.std() > 0.01 for picture in (masked, boxed, gated)))
for module in ("training", "metrics", "benchmark", "speed", "clip", "toybox.recipe"):
    try:
        room = importlib.import_module("mole_diffusion." + module)
        for one in room.__all__:
            getattr(room, one)
    except mole_diffusion.errors.MoLEError as error:
        print(error)
everything, *reference = sys.argv[1:]
sys.path.append(everything)
for name in reference:
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", None) or [
        key for key, value in vars(module).items() if getattr(value, "__module__", None) == name and key[0] != "_"
    ]
    for one in listed:
        assert getattr(module, one) is not None
    print(len(listed), module.__file__)
"""
REFERENCE = re.compile(r"^::: (\S+)$", re.MULTILINE)


@pytest.mark.slow
def test_a_wheel_draws_without_extras_and_has_all_that_the_reference_lists(built: Built, tmp_path: Path) -> None:
    """Draws where nothing is installed but what `pip install mole-diffusion` brings; then extras are there too."""
    for weights in (ROOT / "mole_diffusion" / "toybox" / "assets").rglob("*"):
        if not (beside := built.wheel / weights.relative_to(ROOT)).exists():
            beside.symlink_to(weights)
    wanted, there = list(requirements()), set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name not in there:
            there.add(name)
            needed = [Requirement(text) for text in importlib.metadata.requires(name) or ()]
            wanted += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    for name in there:
        distribution = importlib.metadata.distribution(name)
        for part in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (tmp_path / part).exists():
                (tmp_path / part).symlink_to(Path(str(distribution.locate_file(part))))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(built.wheel), str(tmp_path)])}
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "reference").glob("*.md"))]
    rooms = [name for page in pages for name in REFERENCE.findall(page)]
    everything = sysconfig.get_path("purelib")
    command = [sys.executable, "-S", "-c", CORE, everything, *rooms]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn, *told = done.stdout.splitlines()
    missing, there = told[:6], told[6:]
    assert drawn == "True True True"
    assert len(there) == len(rooms) >= 10
    for line in there:
        count, file = line.split(" ", 1)
        assert int(count) > 0
        assert Path(file).is_relative_to(built.wheel)
    for message in missing:
        said = re.search(r"needs (\w+), which is not .* Install it: pip install 'mole-diffusion\[(\w+)\]'$", message)
        assert said is not None, message
        brought = requirements(*list(EXTRAS)[: list(EXTRAS).index(said[2]) + 1])
        assert NAMED.get(said[1], said[1]) in brought


def test_the_command_line_says_what_it_needs(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from mole_diffusion.__main__ import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "mole: the command line needs typer, which is not installed. Install it: pip install 'mole-diffusion[cli]'\n"
    )
