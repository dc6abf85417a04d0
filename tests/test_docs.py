"""README and docs: every snippet of Python runs, every command is one that `mole` knows, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from mole_diffusion.cli import app
from mole_diffusion.families import FAMILIES
from mole_diffusion.lora import load_lora, save_lora
from mole_diffusion.lora.kinds import KINDS
from mole_diffusion.pipelines import MoLEPipelineMixin, MoLEStableDiffusionPipeline, MoLEStableDiffusionXLPipeline
from mole_diffusion.pipelines import __all__ as exported
from mole_diffusion.training import GateTrainingConfig, LoRATrainingConfig
from tests import ROOT
from tests.peers import lora_files
from tests.tiny import random_lora
from tests.tiny.families import sdxl

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("recipes/*.md"))]
SNIPPET = re.compile(r"(<!-- downloads -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def snippets(page: Path, language: str) -> list[tuple[bool, str]]:
    """Whether it downloads, and its text."""
    found = SNIPPET.findall(page.read_text(encoding="utf-8"))
    return [(bool(downloads), text) for downloads, named, text in found if named == language]


def with_snippets(language: str) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if snippets(page, language)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, few_steps: None) -> None:
    """What snippets write goes into a folder of its own, and what they draw and train takes two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mole_diffusion.training.gates.report.SEEDS", (0,))
    draw = MoLEStableDiffusionPipeline.__call__

    def two_steps(pipe: MoLEPipelineMixin, *args: Any, **options: Any) -> Any:
        pipe.set_progress_bar_config(disable=True)
        return draw(pipe, *args, **options | {"num_inference_steps": 2})

    monkeypatch.setattr(MoLEStableDiffusionPipeline, "__call__", two_steps)
    for config, settings in (
        (GateTrainingConfig, {"steps": 2, "batch_size": 1, "rollout_steps": 1, "reference_pictures": 1}),
        (LoRATrainingConfig, {"steps": 2, "batch_size": 1}),
    ):
        monkeypatch.setattr(config, "__init__", _with(config.__init__, settings | {"warmup_steps": 0}))


def _with(init: Any, settings: dict[str, Any]) -> Any:
    return lambda self, **given: init(self, **given | settings)


@pytest.mark.parametrize("page", with_snippets("python"))
def test_python_runs_from_the_top_of_its_page(page: Path, quick: None) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for downloads, text in snippets(page, "python"):
        code = compile(text, page.name, "exec")
        if not downloads:
            exec(code, names)


def test_the_recipe_for_sdxl_runs_on_a_tiny_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, text),) = snippets(ROOT / "docs" / "recipes" / "sdxl.md", "python")
    pipe = MoLEStableDiffusionXLPipeline(**sdxl())
    pipe.set_progress_bar_config(disable=True)
    for name, seed in (("cat", 1), ("dog", 2)):
        lora = load_lora(random_lora(pipe.components, seed=seed), pipe.lora_components, name=name)
        save_lora(lora, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MoLEStableDiffusionXLPipeline, "from_pretrained", lambda *_, **__: pipe)
    names: dict[str, Any] = {}
    exec(text.replace('"dog": (0.5, 0, 1, 1)}', '"dog": (0.5, 0, 1, 1)}, num_inference_steps=2'), names)
    assert names["image"].size[0] > 0


def test_what_no_test_runs_is_known() -> None:
    """What downloads, the recipe for SDXL aside, and moving models off a GPU."""
    left = {page.name: sum(downloads for downloads, _ in snippets(page, "python")) for page in PAGES}
    assert {name: count for name, count in left.items() if count} == {
        "diffusers.md": 1,
        "own_loras.md": 1,
        "low_memory.md": 1,
        "sdxl.md": 1,
    }


def commands(text: str) -> Iterator[list[str]]:
    """The `mole` commands of a piece of shell, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "mole" in words:
            yield words[words.index("mole") + 1 :]


def parse(words: list[str]) -> None:
    """Raises what `mole` would say of its options; nothing is run."""
    command: click.Command = typer.main.get_command(app)
    context = None
    while True:
        context = command.make_context(command.name or "mole", list(words), parent=context)
        if not isinstance(command, typer.core.TyperGroup):
            return
        _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])


@pytest.mark.parametrize("page", with_snippets("bash"))
def test_commands_are_known_with_their_options(page: Path) -> None:
    for _, text in snippets(page, "bash"):
        for words in commands(text):
            if not {"--help", "--version"} & set(words):
                parse(words)
        for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_a_command_with_an_option_that_is_none_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["generate", "--prompt", "x", "--colour", "red"])


RESULTS = sorted((ROOT / "docs" / "results").glob("*.md"))


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=lambda page: f"{page.parent.name}-{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(<?([^)#>]+?)>?(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:|mailto:", link):
            assert (page.parent / link).exists(), link


def rows_of(text: str) -> list[list[str]]:
    """The cells of a page's first table, its head first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not line.startswith("|---")]


def test_the_page_of_families_says_what_the_code_says() -> None:
    """Every pipeline is in it, and beside it the components that its family names."""
    named: list[str] = []
    text = (DOCS / "families.md").read_text(encoding="utf-8")
    for title, pipelines, components in rows_of(text[: text.index("\n## ")])[1:]:
        family = next(f for f in FAMILIES[::-1] if title.startswith(f.title.partition(" or ")[0].rstrip(".x")))
        assert re.findall(r"`(\w+)`", components) == list(family.architectures), title
        for name in re.findall(r"`(MoLE[^`]+)`", pipelines):
            before, brace, rest = name.partition("{")
            endings, _, after = rest.partition("}")
            named += [f"{before}{ending}{after}" for ending in endings.split(",")] if brace else [name]
    assert sorted(named) == sorted(name for name in exported if name.endswith("Pipeline"))


def test_the_page_of_files_has_every_layout_and_family() -> None:
    """The table is made by a command, of the files that the tests of every layout, kind and family load and run."""
    head, *rows = rows_of((DOCS / "files.md").read_text(encoding="utf-8").partition(lora_files.BEGIN)[2])
    assert head[1:] == list(lora_files.TITLES.values())
    assert list(lora_files.TITLES) == list(lora_files.FAMILIES)
    assert {row[0] for row in rows} >= {title for title, _, _ in lora_files.ROWS}
    rows = rows[: len(lora_files.ROWS)]
    assert [row[0] for row in rows] == [title for title, _, _ in lora_files.ROWS]
    assert all(cell.startswith("yes /") for row in rows for cell in row[1:])


def test_the_page_of_files_names_every_kind() -> None:
    kinds = rows_of((DOCS / "files.md").read_text(encoding="utf-8"))
    said = " ".join(cell for row in kinds[1:11] for cell in row)
    for kind in KINDS:
        assert any(f"`{mark}" in said or f"_{mark}" in said for mark in kind.marks), kind.name


def test_every_room_with_public_names_is_in_the_reference() -> None:
    index = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs" / "reference").glob("[!i]*.md"):
        room = page.stem
        assert f"::: mole_diffusion.{room}\n" in page.read_text(encoding="utf-8")
        assert f"({room}.md)" in index


def test_the_readme_is_a_screen_and_a_half() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90
