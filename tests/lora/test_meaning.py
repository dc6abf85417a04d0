"""What changes the meaning of a file's factors: configs and header entries, for loading, inspecting and converting."""

from __future__ import annotations

import json
import pathlib
import re
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from mole_diffusion.lora import LoRAError, convert_lora, inspect_lora, judge, load_lora
from mole_diffusion.lora.patterns import PatternError, Patterns
from tests.lora_files import to_kohya, to_peft
from tests.running import run_unet, summed
from tests.tiny import random_lora, tiny_components

QUERIES = r"attn1\.to_q$"


@pytest.fixture(scope="module")
def state(models: dict[str, Any]) -> dict[str, Tensor]:
    return random_lora(models, targets=QUERIES)


def adapter(folder: Path, state: dict[str, Tensor], **config: Any) -> Path:
    """A PEFT folder of the UNet's factors."""
    folder.mkdir(exist_ok=True)
    save_file(to_peft(state, "unet"), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, **config}))
    return folder


def in_header(path: Path, state: dict[str, Tensor], **config: Any) -> Path:
    """The same config as diffusers writes it."""
    text = json.dumps({f"unet.{name}": value for name, value in {"r": 4, "lora_alpha": 8, **config}.items()})
    save_file(state, path, metadata={"lora_adapter_metadata": text})
    return path


CHANGES = [
    ({"init_lora_weights": "pissa"}, "PiSSA moves a part of the base"),
    ({"init_lora_weights": "pissa_niter_16"}, "PiSSA moves a part of the base"),
    ({"init_lora_weights": "OLoRA"}, "OLoRA moves a part of the base"),
    ({"init_lora_weights": "corda"}, "CorDA moves a part of the base"),
    ({"init_lora_weights": "lora_ga"}, "LoRA-GA moves a part of the base"),
    ({"init_lora_weights": "loftq"}, "LoftQ moves a part of the base"),
    ({"init_lora_weights": "tomorrow"}, "init_lora_weights='tomorrow', which is not known"),
    ({"use_dora": True}, "DoRA"),
    ({"use_qalora": True}, "QALoRA"),
    ({"use_tomorrow": True}, "use_tomorrow, which is not known"),
    ({"peft_type": "ADALORA"}, "ADALORA"),
    ({"alora_invocation_tokens": [1]}, "Activated LoRA"),
    ({"layer_replication": [[0, 2]]}, "layer replication"),
    ({"kasa_config": {"x": 1}}, "KaSA"),
    ({"bias": "all"}, "its config says that biases were trained"),
    ({"modules_to_save": ["conv_in"]}, "its config says modules_to_save"),
    ({"use_rslora": "yes"}, "use_rslora in its config is 'yes', not true or false"),
    ({"lora_alpha": 10**400}, "is not a finite number"),
    ({"lora_alpha": True}, "alpha True is not a finite number"),
    ({"alpha_pattern": {"(?=x)": 1}}, "alpha_pattern in its config has a regular expression"),
    ({"rank_pattern": {"attn1.to_q": 5}}, "its config says rank 5"),
]


@pytest.mark.parametrize(("config", "message"), CHANGES)
def test_what_would_act_otherwise_is_refused_by_name_wherever_it_is_said(
    config: dict[str, Any], message: str, state: dict[str, Tensor], models: Any, tmp_path: Path
) -> None:
    for path in (adapter(tmp_path / "cat", state, **config), in_header(tmp_path / "cat.safetensors", state, **config)):
        readers = (
            lambda path=path: load_lora(path, models),
            lambda path=path: inspect_lora(path),
            lambda path=path: convert_lora(path, path.with_name("out.safetensors"), "kohya", models),
        )
        for read in readers:
            with pytest.raises(LoRAError, match=re.escape(message)) as error:
                read()
            assert "emove these" not in str(error.value)


@pytest.mark.parametrize("start", [None, True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_are_read(start: Any, state: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    lora = load_lora(adapter(tmp_path / "cat", state, init_lora_weights=start), models)
    assert {f.scaling for f in lora.factors["unet"].values()} == {2.0}


@torch.no_grad()
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_remedy_for_moved_bases_gives_a_plain_lora(start: Any, tmp_path: Path) -> None:
    """Done as the message says: PEFT subtracts the adapter that was saved before training."""
    models = tiny_components()
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], init_lora_weights=start)
    model = get_peft_model(tiny_components()["unet"], config)
    model.peft_config["default"].init_lora_weights = True  # PEFT wants it so, that the start is loaded as it was
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = start
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter += 0.05
    with pytest.warns(UserWarning, match="changes the base weights"):
        model.save_pretrained(tmp_path / "cat", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    factors = load_lora(tmp_path / "cat", {"unet": models["unet"]}).factors["unet"]
    trained = dict(model.named_parameters())
    for name, pair in factors.items():
        a, b = (f"base_model.model.{name}.lora_{kind}.default.weight" for kind in "AB")
        change = trained[b] @ trained[a] - before[b] @ before[a]
        assert torch.allclose(pair.delta(), change, atol=1e-5)


WHOLE: dict[str, dict[str, Any]] = {
    "all biases": {"bias": "all"},
    "biases of its own modules": {"bias": "lora_only"},
    "whole modules": {"modules_to_save": ["conv_in", "conv_norm_out"]},
}


@torch.no_grad()
@pytest.mark.parametrize("settings", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("with_config", [True, False])
def test_what_peft_trains_whole_acts_as_in_peft(
    settings: Any, with_config: bool, models: dict[str, Any], tmp_path: Path
) -> None:
    """By the difference to the base's own values: at full weight the base has PEFT's, at half weight half the way."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_out.0"], init_lora_weights=False, **settings)
    theirs: Any = get_peft_model(tiny_components()["unet"], config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter += torch.randn(parameter.shape, generator=generator) / 4
    theirs.save_pretrained(tmp_path / "cat")
    if not with_config:
        (tmp_path / "cat" / "adapter_config.json").unlink()
    lora = load_lora(tmp_path / "cat", models)
    name = "conv_in" if "modules_to_save" in settings else "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    trained, base = (model.get_parameter(f"{name}.bias") for model in (peeled(theirs), models["unet"]))
    torch.testing.assert_close(lora.factors["unet"][name].bias, trained - base)

    wanted, alone = run_unet({"unet": theirs.base_model.model}), run_unet(models)
    assert (wanted - alone).abs().max() > 1e-2
    with summed(models, lora):
        torch.testing.assert_close(run_unet(models), wanted, atol=2e-5, rtol=1e-4)
    assert inspect_lora(tmp_path / "cat").layout == "peft"
    with pytest.raises(LoRAError, match="weights or biases that PEFT trained whole, which have no place in another"):
        convert_lora(tmp_path / "cat", tmp_path / "out.safetensors", "kohya", models)
    assert not (tmp_path / "out.safetensors").exists()


def peeled(model: Any) -> Any:
    """PEFT's model with its modules under the names they had, and the values that were trained."""
    whole = tiny_components()["unet"]
    state = {}
    for key, value in model.base_model.model.state_dict().items():
        if "original_module" not in key and "lora_" not in key:
            state[key.replace(".base_layer", "").replace(".modules_to_save.default", "")] = value
    whole.load_state_dict(state)
    return whole


def test_what_is_whole_needs_the_base_s_values(models: dict[str, Any], tmp_path: Path) -> None:
    name = "base_model.model.conv_in"
    state = {f"{name}.weight": torch.ones_like(models["unet"].conv_in.weight), f"{name}.bias": torch.ones(32)}
    empty = tiny_components()["unet"].to("meta")
    with pytest.raises(LoRAError, match=r"a whole (weight|bias) .* unet.conv_in has no plain values.*before the LoRA"):
        load_lora(state, {"unet": empty})
    assert judge(saved(tmp_path / "it", state), {"unet": empty}, "it").refusal is None
    for config, message in (
        ({"modules_to_save": ["conv_in"]}, "modules_to_save, whole modules trained beside the LoRA, and the file has"),
        ({"bias": "all"}, "that biases were trained, and the file has none"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        ending = "bias" if "bias" not in config else "weight"
        save_file({f"{name}.{ending}": state[f"{name}.{ending}"]}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(LoRAError, match=message):
            load_lora(tmp_path, models)


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def test_inspecting_says_the_scaling_that_loading_uses(state: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    config = {"lora_alpha": 16, "use_rslora": True, "alpha_pattern": {"mid_block.*to_q": 2}}
    for path in (adapter(tmp_path / "cat", state, **config), in_header(tmp_path / "cat.safetensors", state, **config)):
        report = inspect_lora(path)
        used = {f.scaling for f in load_lora(path, models).factors["unet"].values()}
        assert (report.alphas, report.scalings) == ((2.0, 16.0), (1.0, 8.0))
        assert used == set(report.scalings)


@pytest.mark.parametrize("name", ["adapter_model.bin", "cat.pt"])
def test_the_remedy_for_a_pickle_keeps_the_scaling(
    name: str, state: dict[str, Tensor], models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(tmp_path / "cat", state)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / name)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(LoRAError, match=re.escape(f"a pickle ({name})")):
        load_lora(folder, models)
    with pytest.raises(LoRAError) as error:
        load_lora(folder / name, models)
    remedy = re.search(r"`(safetensors\.torch\.save_file\(.*\))`", str(error.value))
    assert remedy
    monkeypatch.chdir(folder)
    exec(remedy[1], {"safetensors": safetensors, "torch": torch, "pathlib": pathlib, "path": name})
    Path("lora.safetensors").rename(tmp_path / "elsewhere.safetensors")  # it needs nothing beside it
    factors = load_lora(tmp_path / "elsewhere.safetensors", models).factors["unet"]
    assert {f.scaling for f in factors.values()} == {2.0}


def test_a_config_belongs_to_the_one_file_beside_it(state: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "cat", state)
    (folder / "adapter_model.safetensors").rename(folder / "renamed.safetensors")
    assert {f.scaling for f in load_lora(folder, models).factors["unet"].values()} == {2.0}
    save_file(to_kohya(state), folder / "renamed.safetensors")  # of another program: the config is not its
    assert {f.scaling for f in load_lora(folder, models).factors["unet"].values()} == {1.0}


def test_a_folder_of_adapters_of_several_models_says_how_to_load_them(
    state: dict[str, Tensor], models: Any, tmp_path: Path
) -> None:
    for component in ("unet", "text_encoder"):
        adapter(tmp_path / component, state)
    with pytest.raises(LoRAError, match=r"a folder of adapters for unet and text_encoder: .*Load each under a name"):
        load_lora(tmp_path, models)


PATTERNS = [
    "to_q", "attn1.to_q", "^conv_in", "conv_in$", "^to_q", "down_blocks.*to_q", ".*attn1.*", r".*\.attn2\.to_out\.0",
    r"layers\.\d+\.self_attn.q_proj", "(to_q|to_k)", "to_[qk]", "[a-z_]+", "a|conv_in|to_q", "blocks?.0.attn1.to_q",
    r"(down|up)_blocks\.\d+\..*", "(?:to_(q|k))", "to_q*", "to_+q", "nothing",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_to_peft(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    for name in (
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "conv_in",
        "up_blocks.1.resnets.0.conv1",
        "text_model.encoder.layers.11.self_attn.q_proj",
    ):
        theirs = {pattern: 1}.get(get_pattern_key([pattern], name), 0)
        assert Patterns({pattern: 1}).find([name], 0) == theirs, name


def test_the_first_pattern_that_fits_counts() -> None:
    assert Patterns({"attn1.to_q": 1, ".*": 2, "to_q": 3}).find(["mid.attn1.to_q"], 0) == 1
    assert Patterns({".*": 2, "attn1.to_q": 1}).find(["mid.attn1.to_q"], 0) == 2
    assert Patterns({"to_k": 2, "to_q": 1}).find(["mid.attn1.to_q"], 0) == 1


@pytest.mark.parametrize("pattern", ["(?=x)", "a{2}", "(", "[", "\\", "*", "(((a)))", r"\b", ".*" * 300, "a)", "^a|b"])
def test_other_expressions_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        Patterns({pattern: 1})


def test_no_expression_keeps_the_reader_busy(state: dict[str, Tensor], models: Any, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "cat", state, alpha_pattern={f"(.*)+((a*)*.*)*{k}x": 1 for k in range(150)})
    before = time.process_time()
    with pytest.raises(LoRAError, match="take too long"):
        load_lora(folder, models)
    assert time.process_time() - before < 10


def test_quantised_numbers_are_named_by_keys_and_by_header(
    state: dict[str, Tensor], models: Any, tmp_path: Path
) -> None:
    path = tmp_path / "cat.safetensors"
    save_file(state, path, metadata={"_quantization_metadata": '{"layers": {}}'})
    with pytest.raises(LoRAError, match="values are quantised"):
        load_lora(path, models)
    key = next(iter(state)).replace("lora_A.weight", "weight_scale")  # of which factor, nobody can say
    with pytest.raises(LoRAError, match="quantised numbers with a scale of their own"):
        load_lora({**state, key: torch.ones(())}, models)


@torch.no_grad()
def test_peft_loads_what_we_read(tmp_path: Path) -> None:
    """Ranks and alphas by expressions, as PEFT's own loading has them."""
    models = tiny_components()
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_v"],
        init_lora_weights=False,
        rank_pattern={"down_blocks.*to_q": 6, "to_v": 3},
        alpha_pattern={"to_v": 9, r"^mid_block.*attn1\.to_q": 1},
    )
    get_peft_model(tiny_components()["unet"], config).save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(tiny_components()["unet"], tmp_path)
    for name, pair in load_lora(tmp_path, {"unet": models["unet"]}).factors["unet"].items():
        layer = theirs.base_model.model.get_submodule(name)
        assert pair.scaling == layer.scaling["default"], name
        assert torch.allclose(pair.delta(), layer.get_delta_weight("default"), atol=1e-6)
