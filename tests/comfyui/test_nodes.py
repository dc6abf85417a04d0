"""The nodes for ComfyUI, against a stand-in for its package; see `stand_in.py` for what that shows."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mole_diffusion import toybox
from mole_diffusion.errors import MoLEError
from tests import ROOT
from tests.comfyui import stand_in

FOLDER = ROOT / "comfyui"


@pytest.fixture(scope="module")
def nodes() -> Iterator[ModuleType]:
    before = dict(sys.modules)
    stand_in.install()
    spec = importlib.util.spec_from_file_location("comfyui_nodes", FOLDER / "nodes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - set(before):
        if name.startswith("comfy"):
            del sys.modules[name]


def loras(nodes: ModuleType, *names: str) -> Any:
    found: Any = ()
    for name in names:
        (found,) = nodes.LoRAWithRole.execute(f"toybox:{name}", "", 1.0, "", "subject", found).args
    return found


def compose(nodes: ModuleType, **changes: Any) -> Any:
    given = {
        "base": "toybox",
        "loras": loras(nodes, "cat", "boot"),
        "prompt": "a <v1> cat and a <v2> boot",
        "negative_prompt": "",
        "composition": nodes.BY_ITSELF,
        "options": "",
        "gates": "",
        "width": 0,
        "height": 0,
        "steps": 2,
        "guidance_scale": 2.0,
        "seed": 0,
    }
    return nodes.Compose.execute(**{**given, **changes}).args


def test_every_schema_names_what_its_node_takes(nodes: ModuleType) -> None:
    extension = asyncio.run(nodes.comfy_entrypoint())
    listed = asyncio.run(extension.get_node_list())
    schemas = [node.define_schema() for node in listed]
    assert len({schema.node_id for schema in schemas}) == len(listed) == 4
    for node, schema in zip(listed, schemas, strict=True):
        assert [slot.id for slot in schema.inputs] == list(inspect.signature(node.execute).parameters)
        for slot in schema.inputs:
            default = inspect.signature(node.execute).parameters[slot.id].default
            assert bool(slot.options.get("optional")) == (default is not inspect.Parameter.empty)


def test_the_registry_is_told_what_it_asks_for() -> None:
    told = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    assert told["project"].keys() >= {"name", "version", "description", "license", "dependencies", "urls"}
    assert told["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName"}


def test_masks_come_out_and_go_in_again(nodes: ModuleType) -> None:
    picture, masks, python = compose(nodes)
    assert picture.shape == (1, 64, 64, 3)
    assert picture.dtype == torch.float32
    assert 0 <= picture.min() < picture.max() <= 1
    assert "load_loras" in python
    (mask,) = nodes.AutomaticMask.execute(masks, "cat").args
    assert mask.shape == (1, 64, 64)
    half = torch.zeros(1, 64, 64)
    half[:, :, :32] = 1
    (regions,) = nodes.MaskIn.execute("cat", half).args
    placed, masks, _ = compose(nodes, regions=regions)
    assert not torch.equal(placed, picture)
    (mask,) = nodes.AutomaticMask.execute(masks, "cat").args
    assert mask[:, :, :24].min() > 0.9
    assert mask[:, :, 40:].max() < 0.1


def test_what_cannot_be_is_told(nodes: ModuleType, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(toybox.lora_path("cat").read_bytes()[:100])
    with pytest.raises(MoLEError, match=r"broken\.safetensors"):
        nodes.LoRAWithRole.execute(str(broken), "", 1.0, "", "subject")
    with pytest.raises(MoLEError, match="the mask of 'cat' is empty"):
        nodes.MaskIn.execute("cat", torch.zeros(1, 8, 8))
    with pytest.raises(MoLEError, match="no option 'own'"):
        compose(nodes, composition="masks", options='{"own": 2}')
    with pytest.raises(MoLEError, match="knows no places"):
        nodes.AutomaticMask.execute((None, (64, 64)), "cat")
