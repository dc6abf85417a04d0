"""Gates on disk: what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mole_diffusion.experts import Experts
from mole_diffusion.gating import GateConfig, MoLEModel
from mole_diffusion.lora import LoRA
from tests.running import make_lora, models, run_text, run_unet
from tests.tiny import ATTENTION, TEXT_ENCODER, tiny_components

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def loras(components: dict[str, Any]) -> list[LoRA]:
    targets = (ATTENTION, TEXT_ENCODER)
    return [make_lora(components, name, i, rank=i + 2, targets=targets) for i, name in enumerate(("cat", "boot"))]


@pytest.fixture
def experts(components: dict[str, Any], loras: list[LoRA]) -> Experts:
    experts = Experts(loras)
    experts.attach(models(components))
    return experts


def random_gates(experts: Experts, /, **config: Any) -> MoLEModel:
    gates = MoLEModel.from_experts(experts, GateConfig(**config))
    for parameter in gates.gate_parameters():
        parameter.data += torch.randn_like(parameter) / 3
    return gates


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"scope": "layer", "normalization": "layer_norm", "token_axis": 2},
        {"scope": "network", "token_axis": "flatten"},
        {"experts": "block"},
        {"learn_temperature": False, "temperature": 0.5},
    ],
)
def test_save_load_gives_the_same_pictures(
    components: dict[str, Any], experts: Experts, tmp_path: Path, config: dict[str, Any]
) -> None:
    run_unet(components), run_text(components)
    gates = random_gates(experts, **config)
    experts.weigher = gates
    before = run_unet(components), run_text(components)
    gates.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    # Another process: another model of the same weights, the same LoRAs, nothing else.
    other = tiny_components()
    again = Experts(experts.loras)
    again.attach(models(other))
    loaded = MoLEModel.from_pretrained(tmp_path)
    assert loaded.gate_config == gates.gate_config
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in gates.parameters()]
    again.weigher = loaded
    assert torch.equal(run_unet(other), before[0])
    assert torch.equal(run_text(other), before[1])


def test_gates_of_the_text_encoder_are_in_the_file(experts: Experts, tmp_path: Path) -> None:
    random_gates(experts).save_pretrained(tmp_path)
    keys = load_file(tmp_path / WEIGHTS)
    assert sum(key.startswith("gates.text_encoder/") and key.endswith(".weight") for key in keys) == 2
    assert not any("gram" in key or "lora" in key for key in keys)


def test_other_loras_are_refused_by_name(components: dict[str, Any], experts: Experts, loras: list[LoRA]) -> None:
    gates = MoLEModel.from_experts(experts)
    cat, boot = loras
    gates.check_loras([cat, boot])
    with pytest.raises(ValueError, match=r"LoRAs \['cat', 'boot'\] in this order, got \['boot', 'cat'\]"):
        gates.check_loras([boot, cat])
    with pytest.raises(ValueError, match=r"LoRAs \['cat', 'boot'\], got \['cat', 'mug'\]"):
        gates.check_loras([cat, dataclasses.replace(boot, name="mug")])
    with pytest.raises(ValueError, match=r"got \['cat'\]"):
        gates.check_loras([cat])
    with pytest.raises(ValueError, match=r"'boot' has SHA-256 0123.* and not "):
        gates.check_loras([cat, dataclasses.replace(boot, sha256="0123" * 16)])
    with pytest.raises(ValueError, match=r"'cat' has ranks \[5, 5\] and not \[2, 2\].*'cat' has SHA-256"):
        gates.check_loras([make_lora(components, "cat", 0, rank=5), boot])
    swapped = Experts([boot, cat])
    experts.detach()
    swapped.attach(models(components))
    with pytest.raises(ValueError, match="in this order"):
        swapped.weigher = gates
    assert swapped.weigher is None


def test_another_base_model_is_refused(components: dict[str, Any], experts: Experts, loras: list[LoRA]) -> None:
    gates = MoLEModel.from_experts(experts)
    experts.detach()
    fewer = Experts([dataclasses.replace(lora, factors={"unet": lora.factors["unet"]}) for lora in loras])
    fewer.attach({"unet": components["unet"]})
    with pytest.raises(ValueError, match=r"The gate at text_encoder\.encoder\.layers\.0 was made for other adapted"):
        fewer.weigher = gates
    less = MoLEModel.from_experts(fewer)
    fewer.detach()
    experts.attach(models(components))
    with pytest.raises(ValueError, match=r"places without a gate: \['text_encoder"):
        experts.weigher = less


def test_unattached_experts_are_refused(loras: list[LoRA]) -> None:
    with pytest.raises(ValueError, match="components"):
        MoLEModel.from_experts(Experts(loras))


def test_loading_is_strict(experts: Experts, tmp_path: Path) -> None:
    gates = random_gates(experts)
    gates.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(key for key in tensors if key.endswith("weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"missing keys .*{name}"):
        MoLEModel.from_pretrained(tmp_path)
    save_file({**tensors, "gates.nowhere.weight": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"unexpected keys .*gates\.nowhere\.weight"):
        MoLEModel.from_pretrained(tmp_path)
    save_file({**tensors, name: torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)shape|size"):
        MoLEModel.from_pretrained(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / "config.json").read_text())
    config["gate_config"]["no_such_key"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"Unknown keys \['no_such_key'\]"):
        MoLEModel.from_pretrained(tmp_path)


def test_pickles_are_refused(experts: Experts, tmp_path: Path) -> None:
    gates = random_gates(experts)
    gates.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(gates.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MoLEModel.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_gates(experts: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_gates(experts).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        random_gates(experts).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_push_to_hub_uploads_what_save_writes(
    experts: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the network: the repository's name and the files that would go there."""
    uploads: list[tuple[str, list[str]]] = []

    def create_repo(repo_id: str, **_: Any) -> Any:
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def upload(self: MoLEModel, folder: Any, repo_id: str, **_: Any) -> None:
        uploads.append((repo_id, sorted(path.name for path in Path(folder).iterdir())))

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", create_repo)
    monkeypatch.setattr(MoLEModel, "_upload_folder", upload)
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *_, **__: _Card())
    monkeypatch.setattr("diffusers.utils.hub_utils.populate_model_card", lambda card, *_, **__: card)
    random_gates(experts).save_pretrained(tmp_path / "cat+boot", push_to_hub=True, repo_id="gates")
    assert uploads == [("me/gates", ["README.md", "config.json", WEIGHTS])]
    assert sorted(path.name for path in (tmp_path / "cat+boot").iterdir()) == ["config.json", WEIGHTS]


class _Card:
    def save(self, path: str) -> None:
        Path(path).write_text("card")
