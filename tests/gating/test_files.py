"""Gates on disk: what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Experts
from mole_diffusion.files import NotWrittenError
from mole_diffusion.gating import GateConfig, MoLEModel
from mole_diffusion.gating.identity import GatesError
from mole_diffusion.lora import LoRA, load_lora, save_lora
from tests.running import make_lora, models, run_text, run_unet
from tests.tiny import ATTENTION, TEXT_ENCODER, tiny_components

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def loras() -> list[LoRA]:
    components, targets = tiny_components(), (ATTENTION, TEXT_ENCODER)
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
    gates.check_loras([cat, dataclasses.replace(boot, sha256="0123" * 16)])  # the same factors in another file
    doubled = {n: {m: dataclasses.replace(f, scaling=9.0) for m, f in fs.items()} for n, fs in boot.factors.items()}
    with pytest.raises(ValueError, match=r"'boot' has factors of SHA-256 \w{12}… and not "):
        gates.check_loras([cat, dataclasses.replace(boot, factors=doubled)])
    with pytest.raises(ValueError, match=r"'cat' has ranks \[5, 5\] and not \[2, 2\].*'cat' has factors of SHA-256"):
        gates.check_loras([make_lora(components, "cat", 0, rank=5), boot])
    swapped = Experts([boot, cat])
    experts.detach()
    swapped.attach(models(components))
    with pytest.raises(ValueError, match="in this order"):
        swapped.weigher = gates
    assert swapped.weigher is None


def test_another_base_model_is_refused(experts: Experts) -> None:
    gates = MoLEModel.from_experts(experts)
    saved: dict[str, Any] = {name: gates.config[name] for name in ("gate_config", "loras", "gate_table")}
    table = [dict(spec) for spec in saved["gate_table"]]
    table[0]["modules"] = table[0]["modules"][1:]
    with pytest.raises(ValueError, match=rf"The gate at {re.escape(table[0]['name'])} was made for other adapted"):
        experts.weigher = MoLEModel(**{**saved, "gate_table": table})
    with pytest.raises(ValueError, match=rf"places without a gate: \['{re.escape(table[0]['name'])}"):
        experts.weigher = MoLEModel(**{**saved, "gate_table": table[1:]})


def test_other_modules_are_another_lora(components: dict[str, Any], experts: Experts, loras: list[LoRA]) -> None:
    gates = MoLEModel.from_experts(experts)
    experts.detach()
    fewer = Experts([dataclasses.replace(lora, factors={"unet": lora.factors["unet"]}) for lora in loras])
    fewer.attach({"unet": components["unet"]})
    with pytest.raises(ValueError, match=r"'cat' has factors of SHA-256"):
        fewer.weigher = gates


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
    with pytest.raises(MoLEError, match=rf"keys of another shape .*{name}"):
        MoLEModel.from_pretrained(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    config = json.loads((tmp_path / "config.json").read_text())
    config["gate_config"]["no_such_key"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json has unknown keys \['no_such_key'\] in gate_config"):
        MoLEModel.from_pretrained(tmp_path)


def test_pickles_are_refused(experts: Experts, tmp_path: Path) -> None:
    gates = random_gates(experts)
    gates.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(gates.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(MoLEError, match=r"safetensors: no such file \(diffusion_pytorch_model\.bin is a pickle"):
        MoLEModel.from_pretrained(tmp_path)


def test_another_model_is_not_saved_over(experts: Experts, tmp_path: Path) -> None:
    gates, theirs = random_gates(experts), tmp_path / WEIGHTS
    theirs.write_text("weights of a UNet")
    for config in (None, '{"_class_name": "UNet2DConditionModel"}', "[1", "[]"):
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(
            GatesError, match=r"is there and not of gates; it would be replaced\. Choose another folder"
        ):
            gates.save_pretrained(tmp_path)
    assert theirs.read_text() == "weights of a UNet"
    theirs.unlink()
    (tmp_path / "config.json").unlink()
    for _ in range(2):
        gates.save_pretrained(tmp_path)


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
    uploads: list[tuple[str, list[str], str]] = []

    def create_repo(repo_id: str, **_: Any) -> Any:
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def upload(self: MoLEModel, folder: Any, repo_id: str, **_: Any) -> None:
        names = sorted(path.name for path in Path(folder).iterdir())
        uploads.append((repo_id, names, (Path(folder) / "README.md").read_text()))

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", create_repo)
    monkeypatch.setattr(MoLEModel, "_upload_folder", upload)
    gates = random_gates(experts)
    folder = tmp_path / "cat+boot"
    gates.save_pretrained(folder, push_to_hub=True, repo_id="gates")
    assert [upload[:2] for upload in uploads] == [("me/gates", ["README.md", "config.json", WEIGHTS])]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]
    card = uploads[0][2]
    assert "library_name: mole_diffusion" in card
    assert all(lora.fingerprint in card and f"- {lora.name}:" in card for lora in experts.loras)
    # A training leaves its card beside the gates; loaded from there and pushed by anybody, it is that card.
    (folder / "README.md").write_text("---\nlibrary_name: mole_diffusion\n---\n# of the training\n")
    gates.save_pretrained(folder, push_to_hub=True)
    MoLEModel.from_pretrained(folder).push_to_hub("again")
    assert [(upload[0], upload[2].splitlines()[-1]) for upload in uploads[1:]] == [
        ("me/cat+boot", "# of the training"),
        ("me/again", "# of the training"),
    ]
    (folder / "README.md").write_text("somebody else's notes")
    MoLEModel.from_pretrained(folder).push_to_hub("others")
    assert uploads[-1][2] == card


def test_where_gates_lay_is_not_told(experts: Experts, tmp_path: Path) -> None:
    random_gates(experts).save_pretrained(tmp_path / "secret")
    loaded = MoLEModel.from_pretrained(tmp_path / "secret")
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "secret" / "config.json").read_bytes()
    assert "secret" not in (tmp_path / "again" / "config.json").read_text()
    assert "_name_or_path" not in loaded.config


def test_one_lora_in_another_file_keeps_its_gates(components: dict[str, Any], tmp_path: Path) -> None:
    loras = [make_lora(components, "cat", 0), make_lora(components, "boot", 1)]
    experts = Experts(loras)
    experts.attach(models(components))
    gates = MoLEModel.from_experts(experts)
    for layout in ("kohya", "diffusers"):
        save_lora(loras[0], tmp_path / "other.safetensors", layout=layout, metadata={"note": layout})  # type: ignore[arg-type]
        other = load_lora(tmp_path / "other.safetensors", components, name="cat")
        assert other.sha256 != loras[0].sha256
        gates.check_loras([other, loras[1]])


def test_folders_of_earlier_versions_go_with_the_very_file(experts: Experts, tmp_path: Path) -> None:
    random_gates(experts).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for saved, lora in zip(config["loras"], experts.loras, strict=True):
        saved["sha256"] = lora.sha256
    (tmp_path / "config.json").write_text(json.dumps(config))
    experts.weigher = MoLEModel.from_pretrained(tmp_path)


class CLIPTextModel(nn.Module):
    """A text encoder as transformers had it once: the same modules one level down."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.text_model = inner


@pytest.mark.parametrize("config", [{}, {"scope": "matrix"}, {"scope": "network"}, {"experts": "block"}])
def test_names_do_not_depend_on_the_version_of_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    """Saved where the text encoder's modules lie flat, loaded where they are nested, and the other way round."""
    flat, nested = tiny_components(), tiny_components()
    nested["text_encoder"] = CLIPTextModel(nested["text_encoder"])
    folders = []
    for name, parts in (("flat", flat), ("nested", nested)):
        loras = [make_lora(flat, lora, i, targets=(ATTENTION, TEXT_ENCODER)) for i, lora in enumerate(("cat", "boot"))]
        if name == "nested":
            loras = [
                dataclasses.replace(
                    lora,
                    factors={
                        part: {f"text_model.{m}" if part == "text_encoder" else m: f for m, f in factors.items()}
                        for part, factors in lora.factors.items()
                    },
                )
                for lora in loras
            ]
        parts["experts"] = Experts(loras)
        parts["experts"].attach(models(parts))
        MoLEModel.from_experts(parts["experts"], GateConfig(**config)).save_pretrained(tmp_path / name)
        folders.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert folders[0] == folders[1]
    for parts in (flat, nested):
        gates = MoLEModel.from_pretrained(tmp_path / "flat")
        parts["experts"].weigher = gates
        with gates.record() as record, torch.no_grad():
            (parts["text_encoder"].text_model if parts is nested else parts["text_encoder"])(torch.tensor([[3, 5, 2]]))
        assert any(place.startswith("text_encoder") for place in record.gates)
        assert not any("text_model" in place for place in record.gates)


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], Any]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = to

    return change


def _drop(*path: Any) -> Callable[[dict[str, Any]], Any]:
    def change(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        del config[path[-1]]

    return change


CONFIGS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (_drop("loras"), "lacks loras"),
    (_drop("loras", 0, "sha256"), "lacks sha256 in loras"),
    (_drop("loras", 0, "name"), "lacks name in loras"),
    (_drop("gate_config", "token_axis"), "lacks token_axis in gate_config"),
    (_drop("gate_table", 0, "entries"), "lacks entries in gate_table"),
    (_drop("_class_name"), "_class_name is not MoLEModel"),
    (_set("_class_name", to="UNet2DConditionModel"), "_class_name is not MoLEModel"),
    (_set("loras", 0, "name", to=7), "whose name is no text"),
    (_set("loras", 1, "name", to="cat"), "two LoRAs of one name"),
    (_set("loras", 0, "sha256", to="x" * 64), "whose sha256 is none"),
    (_set("loras", 0, "ranks", to=[2, "2"]), "whose ranks are none"),
    (_set("loras", to={"cat": 1}), "has loras that are no list"),
    (_set("gate_config", to=[1]), "something else than an object in gate_config"),
    (_set("gate_config", "temperature", to="1"), "`temperature` must be positive"),
    (_set("gate_config", "temperature", to=10**400), "`temperature` must be positive"),
    (_set("gate_config", "null_expert", to="no"), "`null_expert` must be true or false"),
    (_set("gate_config", "scope", to=["block"]), "`scope` must be one of"),
    (_set("gate_table", 0, "positions", to=10**12), "positions are no number"),
    (_set("gate_table", 0, "positions", to=10**9), "keys of another shape"),
    (_set("gate_table", 0, "positions", to=True), "positions are no number"),
    (_set("gate_table", 0, "indices", to=[0, 5]), "indices are not those"),
    (_set("gate_table", 0, "indices", to=[]), "indices are not those"),
    (_set("gate_table", 0, "entries", 0, "features", to=-1), "features are no number"),
    (_set("gate_table", 0, "entries", 0, "module", to="elsewhere"), "reads a module it does not weigh"),
    (_set("gate_table", 0, "hidden_features", to=8), "do not go with input"),
    (_set("gate_table", 0, "block", to="mid_block"), "another block than its kind"),
    (_set("gate_table", 0, "name", to=None), "without a name"),
    (_set("more", to=1), r"unknown keys \['more'\]"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS)
def test_configs_are_hostile_input(experts: Experts, tmp_path: Path, change: Any, message: str) -> None:
    random_gates(experts).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GatesError, match=message):
        MoLEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a JSON object"),
        ('"elsewhere"', "is not a JSON object"),
        ("{", "is not JSON"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
        ('{"a":' * 300 + "1" + "}" * 300, "nested too deeply"),
        ("", "is not JSON"),
        (b"\xff\xfe", "not a text in UTF-8"),
    ],
)
def test_configs_that_are_none(experts: Experts, tmp_path: Path, text: Any, message: str) -> None:
    random_gates(experts).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(GatesError, match=message):
        MoLEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.half(), "has torch.float16 where gates have float32"),
        (lambda t: t.long(), "has torch.int64 where gates have float32"),
        (lambda t: t * float("nan"), "NaN, infinity or numbers beyond"),
        (lambda t: t + 1e30, "NaN, infinity or numbers beyond"),
    ],
)
def test_tensors_of_another_kind_or_not_finite(experts: Experts, tmp_path: Path, change: Any, message: str) -> None:
    random_gates(experts).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for part in (".weight", ".log_temperature"):
        name = next(key for key in tensors if key.endswith(part))
        save_file({**tensors, name: change(tensors[name])}, tmp_path / WEIGHTS)
        with pytest.raises(GatesError, match=message):
            MoLEModel.from_pretrained(tmp_path)


def test_pipes_in_the_place_of_files(experts: Experts, tmp_path: Path) -> None:
    for name in (WEIGHTS, "config.json"):
        random_gates(experts).save_pretrained(tmp_path)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(GatesError, match=rf"{name}: a pipe, not a file"):
            MoLEModel.from_pretrained(tmp_path)
    with pytest.raises(GatesError, match="no such folder, and no Hub id"):
        MoLEModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(GatesError, match="cannot be had from the Hub"):
        MoLEModel.from_pretrained("me/nowhere", local_files_only=True)


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000, "a\0b", "\ud800"])
def test_names_that_no_folder_has(experts: Experts, name: str) -> None:
    with pytest.raises(GatesError, match="no such folder"):
        MoLEModel.from_pretrained(name)
    with pytest.raises(GatesError):
        MoLEModel.from_pretrained(".", subfolder=name)
    with pytest.raises(NotWrittenError, match="cannot be written"):
        random_gates(experts).save_pretrained(name)


def test_gates_whose_indices_were_called_experts_are_read(experts: Experts, tmp_path: Path) -> None:
    gates = random_gates(experts)
    gates.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for row in config["gate_table"]:
        row["experts"] = row.pop("indices")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert MoLEModel.from_pretrained(tmp_path).specs == gates.specs
