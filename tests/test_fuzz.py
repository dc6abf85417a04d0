"""Files that chance damaged: LoRA files, gates folders and YAML end in the right thing or in one of our errors.

Pictures and prompts: `test_pictures.py`, `test_prompts.py`.

Bounded in number, and the same in every run. What loads from a damaged file is checked too: its numbers are finite
and do something.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from mole_diffusion.benchmark.config import BenchmarkConfig
from mole_diffusion.cli.gate_settings import read_config
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Experts
from mole_diffusion.gating import GateConfig, MoLEModel
from mole_diffusion.lora import LoRA, convert_lora, inspect_lora, load_lora
from mole_diffusion.yaml_files import parse_yaml, read_yaml
from tests import ROOT
from tests.lora import test_families
from tests.lora_files import to_kohya, to_peft
from tests.running import make_lora, models, run_unet
from tests.tiny import ATTENTION, random_lora, tiny_components

BENCHMARKS = ROOT / "benchmarks"
COMPONENTS = tiny_components()
STATE = random_lora(COMPONENTS, alpha=2.0, targets=r"mid_block.*attn1\.to_[qk]$|text_encoder.*0\.mlp\.fc1$")
FILES = [save(STATE), save(to_kohya(STATE)), save(to_peft(STATE, "unet"))]
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KINDS = {
    "hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 64),
    "lokr_w1": (4, 4), "lokr_w2": (16, 16), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 16), "lokr_t2": (2, 2, 3, 3),
    "lora_down.weight": (2, 64), "lora_up.weight": (64, 2), "lora_mid.weight": (2, 2, 3, 3), "lora_A.weight": (2, 64),
    "lora_B.weight": (64, 2), "lora_B.bias": (64,), "lora_down.scale_weight": (), "dora_scale": (64, 1), "alpha": (),
    "lora_magnitude_vector": (64,), "diff": (64, 64), "diff_b": (64,), "w_norm": (64,), "default.weight": (64, 2),
    "lora_A.default.weight": (2, 64), "lora_B.default.weight": (64, 2), "down.weight": (2, 64), "up.weight": (64, 2),
    "lora_up.scale_weight": (64,), "base_layer.bias": (64,), "hada_t1": (2, 2, 3, 3), "lokr_w1_a": (4, 2),
    "lokr_w1_b": (2, 4),
}  # fmt: skip
STEMS = [f"unet.{MIDDLE}", f"lora_unet_{MIDDLE.replace('.', '_')}", f"base_model.model.{MIDDLE}", MIDDLE,
         "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q", f"lycoris_{MIDDLE.replace('.', '_')}",
         f"lora_transformer_{MIDDLE.replace('.', '_')}", f"unet.{MIDDLE}.processor", "text_encoder.x",
         f"unet.{MIDDLE.rpartition('.')[0]}.processor.to_q_lora", f"unet.{MIDDLE}.lora", "bundle_emb.cat",
         "double_blocks.0.processor.qkv_lora1", "single_blocks.0.processor.qkv_lora"]  # fmt: skip
# What each kind is made of: whole adapters, to be damaged at one place.
WHOLE_KINDS = [
    ("lora_down.weight", "lora_up.weight", "alpha"),
    ("lora_A.weight", "lora_B.weight", "lora_B.bias"),
    ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector"),
    ("lora_down.weight", "lora_up.weight", "dora_scale", "diff_b"),
    ("lora_down.weight", "lora_up.weight", "lora_down.scale_weight", "lora_up.scale_weight"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
    ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"),
    ("lokr_w1_a", "lokr_w1_b", "lokr_w2", "dora_scale"),
    ("diff", "diff_b"),
]
# Of each layout; the authors' names of the same module are those of the published model's blocks.
WHOLE_STEMS = [f"unet.{MIDDLE}", f"lora_unet_{MIDDLE.replace('.', '_')}", f"base_model.model.{MIDDLE}", MIDDLE,
               "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q",
               "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", f"lycoris_{MIDDLE.replace('.', '_')}",
               f"lora_transformer_{MIDDLE.replace('.', '_')}"]  # fmt: skip
ENTRIES = ("lora_adapter_metadata", "adapter_config.json", "ss_tag_frequency", "ss_dataset_dirs", "ss_network_module",
           "modelspec.trigger_phrase", "mole_diffusion.triggers", "_quantization_metadata", "format")  # fmt: skip
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": False,
    "init_lora_weights": True,
    "rank_pattern": {"to_q": 4},
    "alpha_pattern": {"attn1.to_k": 2},
    "target_modules": ["to_q"],
    "modules_to_save": None,
}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -1, 0, 2**63, 1e308, -0.0]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["\x1b[2J", "(a+)+$", "../..", "pissa", "", "LOHA", "[", "\ud800"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
bounded = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def put(value: Any, path: list[int], new: Any) -> Any:
    """A JSON value with something else at one place, which numbers lead to; or nothing there, for `...`."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    key = keys[path[0] % len(keys)]
    if new is ... and len(path) == 1:
        rest = [(k, value[k]) for k in keys if k != key]
        return dict(rest) if isinstance(value, dict) else [entry for _, entry in rest]
    changed = put(value[key], path[1:], None if new is ... else new)
    return {**value, key: changed} if isinstance(value, dict) else [changed if k == key else value[k] for k in keys]


@contextmanager
def refusing() -> Iterator[None]:
    """One of our errors may come, and ends what is inside; it is a line that a terminal may show."""
    message = ""
    try:
        yield
    except MoLEError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) <= 2000


def check_lora(
    content: bytes,
    config: str | None = None,
    *,
    whole: bool = False,
    converted: bool = False,
    components: dict[str, Any] = COMPONENTS,
) -> None:
    """Loading, inspecting and, if told so, converting a file with a config beside it; one that is whole must load."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        path.write_bytes(content)
        if config is not None:
            (Path(folder) / "adapter_config.json").write_text(config, encoding="utf-8", errors="surrogatepass")
        with refusing():
            inspect_lora(path)
        with contextlib.nullcontext() if whole else refusing():
            lora = load_lora(path, components)
            if converted:
                check_converted(path, lora)
            changes = []
            for component, modules in lora.factors.items():
                for name, factors in modules.items():
                    changes.append(factors.delta(components[component].get_submodule(name).weight.detach()))
                    changes += [] if factors.bias is None else [factors.bias]
            assert all(change.isfinite().all() for change in changes)
            assert any(change.any() for change in changes)


def check_converted(path: Path, lora: LoRA) -> None:
    """What loads converts to the same change, or to one of our errors."""
    targets: list[tuple[Any, str]] = [("kohya", "k.safetensors"), ("diffusers", "d.safetensors"), ("peft", "p")]
    for to, name in targets:
        out = path.parent / "out" / name
        with refusing():
            convert_lora(path, out, to, COMPONENTS)
            again = load_lora(out, COMPONENTS)
            assert again.embeddings.keys() == lora.embeddings.keys()
            for component, modules in lora.factors.items():
                for module, factors in modules.items():
                    weight = COMPONENTS[component].get_submodule(module).weight.detach()
                    one, other = factors.delta(weight), again.factors[component][module].delta(weight)
                    least = 1e-5 * float(one.abs().max()) + 1e-30
                    torch.testing.assert_close(other, one, atol=least, rtol=1e-4)


@settings(bounded, max_examples=60)
@given(
    st.sampled_from(WHOLE_STEMS),
    st.sampled_from(WHOLE_KINDS),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]),
    st.sampled_from(["nothing", "key", "gone", "shape", "dtype", "twice", "metadata"]),
    st.data(),
)
def test_whole_adapters_of_every_kind_and_layout(
    stem: str, parts: tuple[str, ...], dtype: torch.dtype, damage: str, data: st.DataObject
) -> None:
    """Undamaged they load; damaged at one place they load as what they are then, or are refused."""
    generator = torch.Generator().manual_seed(len(parts))
    state = {f"{stem}.{part}": torch.randn(KINDS[part], generator=generator).to(dtype) for part in parts}
    metadata = {}
    key = data.draw(st.sampled_from(sorted(state)))
    if damage == "key":
        place = data.draw(st.integers(0, len(key) - 1))
        state[key[:place] + data.draw(st.sampled_from(["", ".", "_", "x", "0", "\x1b"])) + key[place + 1 :]] = (
            state.pop(key)
        )
    elif damage == "gone":
        del state[key]
    elif damage == "shape":
        sides = data.draw(st.lists(st.integers(0, 65), max_size=5))
        state[key] = torch.ones(sides, dtype=torch.float32).to(dtype)
    elif damage == "dtype":
        state[key] = state[key].float().to(data.draw(st.sampled_from([torch.int8, torch.bool, torch.float64])))
    elif damage == "twice":
        state["unet.conv_out.lora_A.weight"] = torch.ones(1, 32, 3, 3)
    elif damage == "metadata":
        names = st.sampled_from(ENTRIES)
        texts = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), ODD.map(json.dumps))
        metadata = data.draw(st.dictionaries(names, texts, max_size=3))
    check_lora(save(state, metadata=metadata), whole=damage == "nothing", converted=True)


@functools.cache
def model_of(family: str) -> tuple[str, Any]:
    return test_families.denoiser(family)


@settings(bounded, max_examples=60)
@given(
    st.sampled_from(["flux", "z_image", "stable_diffusion_3"]),
    st.sampled_from(list(test_families.LAYOUTS)),
    st.sampled_from(list(test_families.KINDS)),
    st.sampled_from(["nothing", "key", "gone", "rows", "dtype", "added"]),
    st.data(),
)
def test_files_of_families_whose_authors_have_one_module_where_there_are_several(
    family: str, layout: str, kind: str, damage: str, data: st.DataObject
) -> None:
    """In every layout: undamaged they load; damaged they load as what they are then, or are refused."""
    component, model = model_of(family)
    torch.manual_seed(0)
    state = {}
    for name, _, parts, _ in test_families.cases(model, family, kind, test_families.LAYOUTS[layout][0]):
        state |= test_families.written(layout, component, name, parts)
    key = data.draw(st.sampled_from(sorted(state)))
    if damage == "key":
        place = data.draw(st.integers(0, len(key) - 1))
        new = key[:place] + data.draw(st.sampled_from(["", ".", "_", "x", "1"])) + key[place + 1 :]
        state[new] = state.pop(key)
    elif damage == "gone":
        del state[key]
    elif damage == "rows" and state[key].ndim:
        state[key] = state[key][: data.draw(st.integers(0, len(state[key])))]
    elif damage == "dtype":
        state[key] = state[key].to(data.draw(st.sampled_from([torch.int8, torch.bool, torch.float64])))
    elif damage == "added":
        state[data.draw(st.sampled_from([f"{key}.x", key.replace("0", "7"), f"x.{key}"]))] = state[key].clone()
    content = save({name: tensor.contiguous() for name, tensor in state.items()})
    check_lora(content, whole=damage == "nothing", components={component: model})


@bounded
@given(st.sampled_from(FILES), st.data())
def test_bytes_of_a_lora_file(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):  # mostly in the header, where the meaning is
        end = data.draw(st.sampled_from([8, header, header, len(content)]))
        damaged[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    check_lora(bytes(damaged[: data.draw(st.sampled_from([len(damaged)] * 4 + [header, len(damaged) - 1, 9]))]))


@bounded
@given(st.sampled_from(FILES), st.lists(st.integers(0, 50), min_size=1, max_size=3), st.one_of(ODD, st.just(...)))
def test_headers_of_a_lora_file(content: bytes, path: list[int], new: Any) -> None:
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(put(json.loads(content[8 : 8 + size]), path, new)).encode()
    check_lora(struct.pack("<Q", len(header)) + header + content[8 + size :])


@settings(bounded, max_examples=60)
@given(
    st.lists(st.sampled_from(STEMS), min_size=1, max_size=2, unique=True),
    st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6, unique=True),
    st.sampled_from([1.0, 0.0, 1e-30, 1e30, float("nan")]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8]),
    st.sampled_from(["", "another side", "another shape"]),
)
def test_parts_of_every_kind_in_every_layout(
    stems: list[str], parts: list[str], size: float, dtype: torch.dtype, damage: str
) -> None:
    """Any parts together: the right thing where they are one adapter, and a line where they are not."""
    state = {}
    generator = torch.Generator().manual_seed(0)
    for stem in stems:
        for index, part in enumerate(parts):
            shape = KINDS[part]
            if index == 0 and damage and shape:
                shape = (shape[0] + 1, *shape[1:]) if damage == "another side" else (*shape, 1)
            state[f"{stem}.{part}"] = (torch.randn(shape, generator=generator) * size).to(dtype)
    check_lora(save(state))


@bounded
@given(st.lists(st.integers(0, 50), min_size=1, max_size=2), st.one_of(ODD, st.just(...)))
def test_configs_of_an_adapter(path: list[int], new: Any) -> None:
    check_lora(FILES[2], json.dumps(put(CONFIG, path, new)))
    text = json.dumps({f"unet.{key}": value for key, value in put(CONFIG, path[:1], new).items()})
    check_lora(save(STATE, metadata={"lora_adapter_metadata": text}))


@bounded
@given(st.text(max_size=200))
def test_metadata_of_a_lora_file(text: str) -> None:
    try:
        content = save(STATE, metadata={"lora_adapter_metadata": text, "adapter_config.json": text})
    except UnicodeEncodeError:  # safetensors itself cannot hold it
        return
    check_lora(content)


@pytest.fixture(scope="module")
def gates_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gates = MoLEModel.from_experts(EXPERTS, GateConfig(scope="layer"))
    for parameter in gates.gate_parameters():
        parameter.data += torch.randn_like(parameter) / 3
    gates.save_pretrained(folder := tmp_path_factory.mktemp("gates"))
    return folder


GATED = tiny_components()
EXPERTS = Experts([make_lora(GATED, name, i, targets=ATTENTION) for i, name in enumerate(("cat", "boot"))])
EXPERTS.attach(models(GATED))


@torch.no_grad()
def check_gates(config: str, weights: bytes | None, source: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(config, encoding="utf-8", errors="surrogatepass")
        name = "diffusion_pytorch_model.safetensors"
        (Path(folder) / name).write_bytes((source / name).read_bytes() if weights is None else weights)
        with refusing():
            EXPERTS.weigher = MoLEModel.from_pretrained(folder)
            assert run_unet(GATED).isfinite().all()


@bounded
@given(path=st.lists(st.integers(0, 50), min_size=1, max_size=5), new=st.one_of(ODD, st.just(...)))
def test_configs_of_gates(gates_folder: Path, path: list[int], new: Any) -> None:
    config = json.loads((gates_folder / "config.json").read_text())
    check_gates(json.dumps(put(config, path, new)), None, gates_folder)


@bounded
@given(st.data())
def test_weights_of_gates(gates_folder: Path, data: st.DataObject) -> None:
    tensors = load_file(gates_folder / "diffusion_pytorch_model.safetensors")
    key = data.draw(st.sampled_from(sorted(tensors)))
    changes = {
        "gone": lambda t: None,
        "another shape": lambda t: t.flatten()[:1],
        "half": lambda t: t.half(),
        "huge": lambda t: t + data.draw(st.floats(-1e38, 1e38)),
        "not finite": lambda t: t * float("nan"),
        "whole numbers": lambda t: t.long(),
    }
    changed = changes[data.draw(st.sampled_from(sorted(changes)))](tensors.pop(key))
    with tempfile.TemporaryDirectory() as folder:
        save_file({**tensors, **({} if changed is None else {key: changed})}, Path(folder) / "x.safetensors")
        content = bytearray((Path(folder) / "x.safetensors").read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    check_gates((gates_folder / "config.json").read_text(), bytes(content), gates_folder)


SETTINGS = {
    "steps": 9,
    "seed": 5,
    "learning_rate": 0.01,
    "gates": {"scope": "layer", "temperature": 2},
    "balance": "off",
}
STUDY = read_yaml(BENCHMARKS / "table1.yaml")


@bounded
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.one_of(ODD, st.just(...)), st.text(max_size=30))
def test_yaml(path: list[int], new: Any, noise: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.yaml"
        readers: list[tuple[Callable[[Path], Any], Any]] = [
            (BenchmarkConfig.from_file, STUDY),
            (lambda file: read_config(None, file, None, {}), SETTINGS),
        ]
        for read, values in readers:
            text = json.dumps(put(values, path, new))
            for content in (text, text[: len(noise)] + noise + text[len(noise) :], noise):
                file.write_text(content, encoding="utf-8", errors="surrogatepass")
                with refusing():
                    read(file)


SIGNS = (
    "a", "b: ", "- ", "\n", "\n  ", "{", "}", "[", "]", ", ", "&a ", "*a", "<<: ", "? ", ": ", "|\n", ">\n",
    "'", '"', "\\", "---\n", "...\n", "%YAML 1.1\n", "!!float ", "!!int ", "!!str ", "!!bool ", "!!null ",
    "!!merge ", "!!map ", "!!seq ", "!!set ", "!!omap ", "!!binary ", "!!timestamp ",
    "!!python/name:os.system ", "!own ", "!<tag:yaml.org,2002:int> ", "0o17", "1e400", ".nan", "2020-01-01",
    "1:30", "~", "off", "=", "9" * 5000, "\t", "#", "\u2028", "\ufeff", "\x1b[2J", '"\\ud800"', "key: v\n",
)  # fmt: skip


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


@settings(bounded, max_examples=150)
@given(st.lists(st.sampled_from(SIGNS), max_size=8).map("".join))
def test_signs_of_yaml_in_any_order(text: str) -> None:
    with refusing():
        assert is_plain(parse_yaml(text))
