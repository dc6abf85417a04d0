"""Changes of layers of normalisation: in every family, under weights of every place, merged, and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from mole_diffusion.composition import Linear, NormRouter
from mole_diffusion.composition.budget import site_gram
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Experts, Projections, Run, Site
from mole_diffusion.gating import GateConfig, MoLEModel
from mole_diffusion.lora import LoRAError, convert_lora, inspect_lora, load_lora
from mole_diffusion.lora.modules import ModuleIndex
from tests import reference
from tests.lora.test_families import caller, denoiser
from tests.running import run_text, run_unet, summed, unet_inputs
from tests.tiny import tiny_components
from tests.weighing import Numbers

GROUPS, LAYERS = "mid_block.resnets.0.norm1", "mid_block.attentions.0.transformer_blocks.0.norm2"


def norms_of(model: nn.Module) -> list[str]:
    """Of the outer levels of a UNet none, which has many."""
    shapes = ModuleIndex(model).shapes
    return [name for name in shapes if len(shapes[name]) == 1 and not name.startswith(("down", "up"))]


def changes(model: nn.Module, component: str, names: list[str], seed: int) -> dict[str, Tensor]:
    """A file as LyCORIS writes it, with a change of every weight and of every bias that is there."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in names:
        module: Any = model.get_submodule(name)
        stem = f"{component}.{name}"
        state[f"{stem}.w_norm"] = torch.randn(module.weight.shape, generator=generator) / 4
        if getattr(module, "bias", None) is not None:
            state[f"{stem}.b_norm"] = torch.randn(module.weight.shape, generator=generator) / 4
    return state


def unet() -> tuple[str, Any, Callable[[Any], Tensor]]:
    small = unet_inputs(batch=1, size=8)
    return "unet", tiny_components()["unet"], lambda model: run_unet({"unet": model}, **small)


def clip() -> tuple[str, Any, Callable[[Any], Tensor]]:
    return "text_encoder", tiny_components()["text_encoder"], lambda model: run_text({"text_encoder": model})


def flan() -> tuple[str, Any, Callable[[Any], Tensor]]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False)).eval()
    ids = torch.tensor([[3, 5, 8, 1]])
    return "text_encoder_3", model, lambda model: model(input_ids=ids, decoder_input_ids=ids).logits


def transformer(family: str) -> Callable[[], tuple[str, Any, Callable[[Any], Tensor]]]:
    def make() -> tuple[str, Any, Callable[[Any], Tensor]]:
        component, model = denoiser(family)
        return component, model, lambda model: caller(family, model)()

    return make


MODELS = {"UNet": (unet, 9), "CLIP": (clip, 5), "T5": (flan, 7)}
LEAST = {"stable_diffusion_3": 4, "flux": 4, "flux2": 4, "z_image": 12, "krea2": 12, "qwen_image": 5}
MODELS |= {name: (transformer(name), least) for name, least in LEAST.items()}


@torch.no_grad()
@pytest.mark.parametrize(("make", "least"), MODELS.values(), ids=MODELS)
def test_changes_of_norms_are_those_of_the_weights(make: Any, least: int) -> None:
    component, model, run = make()
    names = norms_of(model)
    assert len(names) >= least
    states = [changes(model, component, names[: 1 if i else None], seed=i) for i in (0, 1)]
    loras = [load_lora(state, {component: model}, name=str(i)) for i, state in enumerate(states)]
    assert list(loras[0].factors[component]) == names
    base, shares = run(model), (0.7, -0.4)
    experts = Experts(loras)
    experts.attach({component: model})
    try:
        experts.weigher = Numbers(torch.tensor(shares))
        ours = run(model)
        experts.weigher = Linear()
        experts.merge()
        with experts.using(scale=torch.tensor(shares)):
            fused = run(model)
    finally:
        experts.detach()
    assert torch.equal(run(model), base)
    for share, state in zip(shares, states, strict=True):
        for key, change in state.items():
            name, _, part = key.removeprefix(f"{component}.").rpartition(".")
            target = getattr(model.get_submodule(name), "weight" if part == "w_norm" else "bias")
            target += share * change
    changed = run(model)
    assert (changed - base).abs().max() > 1e-3
    torch.testing.assert_close(ours, changed, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(fused, changed, atol=2e-5, rtol=1e-4)


class Random:
    """Other weights at every position."""

    def __init__(self) -> None:
        self.given: dict[str, Tensor] = {}

    def weigh(self, site: Site, projections: Projections, run: Run) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        self.given[site.module_name] = torch.rand(
            projections.batch, projections.tokens, 2, generator=generator, dtype=torch.float64
        )
        return self.given[site.module_name]


@torch.no_grad()
def test_every_position_has_its_own_weight() -> None:
    """Against the formulas in float64: a norm has no inner product, so a mask acts on its output alone."""
    model = tiny_components()["unet"].double()
    loras = [load_lora(changes(model, "unet", [GROUPS, LAYERS], s), {"unet": model}, name=str(s)) for s in (1, 2)]
    experts = Experts(loras)
    experts.attach({"unet": model})
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
        for name in (GROUPS, LAYERS)
    ]
    try:
        experts.weigher = weigher = Random()
        run_unet({"unet": model})
    finally:
        experts.detach()
        for handle in handles:
            handle.remove()
    for name, literal in ((GROUPS, reference.group_norm), (LAYERS, reference.layer_norm)):
        module: Any = model.get_submodule(name)
        x, output = seen[name]
        sizes = (module.num_groups,) if name == GROUPS else ()
        wanted = literal(x, module.weight, module.bias, module.eps, *sizes)
        for index, lora in enumerate(loras):
            factors = lora.factors["unet"][name]
            assert factors.gain is not None
            assert factors.bias is not None
            added = literal(x, factors.gain.double(), factors.bias.double(), module.eps, *sizes)
            weights = weigher.given[name][..., index]
            wanted = wanted + added * (
                weights.reshape(len(x), 1, *x.shape[2:]) if name == GROUPS else weights[..., None]
            )
        torch.testing.assert_close(output, wanted, atol=1e-10, rtol=1e-8)


# A norm, and its axes in the order (samples, tokens, heads, d): heads come before the tokens or
# behind them. Of the last one several rows are one sample's.
HEADS = {
    "stable_diffusion_3": ("transformer_blocks.0.attn.norm_q", (0, 2, 1, 3)),
    "flux": ("single_transformer_blocks.0.attn.norm_k", (0, 1, 2, 3)),
    "krea2": ("text_fusion.layerwise_blocks.0.attn.norm_q", (0, 1, 2, 3)),
}


@torch.no_grad()
@pytest.mark.parametrize("family", HEADS)
def test_heads_of_queries_and_keys_have_the_weight_of_their_token(family: str) -> None:
    """Against the formula in float64: whatever axis the heads are on, they are of one position."""
    component, model = denoiser(family)
    name, tokens_first = HEADS[family]
    module: Any = model.get_submodule(name)
    loras = [load_lora(changes(model, component, [name], s), {component: model}, name=str(s)) for s in (1, 2)]
    experts, run = Experts(loras), caller(family, model)
    base = run()
    experts.attach({component: model})
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        experts.weigher = weigher = Random()
        run()
        gates = MoLEModel.from_experts(experts, GateConfig(scope="matrix", input="hidden", token_axis="token"))
        for other in (gates, NormRouter()):
            experts.weigher = other
            assert run().isfinite().all()
            assert not torch.equal(run(), base)
        with pytest.raises(MoLEError, match=r"norm_[qk] was given queries or keys of shape \(2, 5, \d+\)"):
            module(torch.ones(2, 5, len(module.weight)))  # as a processor would that has its heads among the samples
    finally:
        experts.detach()
        handle.remove()
    x, output = (given.permute(tokens_first) for given in seen[0])
    own = 1 + module.weight if family == "krea2" else module.weight
    gains = [lora.factors[component][name].gain for lora in loras]
    weights = weigher.given[name].reshape(*x.shape[:2], 1, 2)
    wanted = reference.rms_norm(x, own, module.eps)
    for index, gain in enumerate(gains):
        assert gain is not None
        wanted = wanted + weights[..., index, None] * reference.rms_norm(x, gain, module.eps)
    torch.testing.assert_close(output.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def attached() -> Any:
    model = tiny_components()["unet"]
    state = changes(model, "unet", [GROUPS, LAYERS], seed=1)
    other = changes(model, "unet", [LAYERS], seed=2)
    experts = Experts([load_lora(s, {"unet": model}, name=str(i)) for i, s in enumerate((state, other))])
    experts.attach({"unet": model})
    yield experts
    experts.detach()


def test_the_budget_counts_them_as_a_diagonal_matrix(attached: Experts) -> None:
    """n has unit variance, so `gain * n` is as loud as a matrix with the gain on its diagonal is on white noise."""
    gains = [lora.factors["unet"][LAYERS].gain.double() for lora in attached.loras]
    wanted = torch.tensor([[float((a * b).sum()) for a in gains] for b in gains], dtype=torch.float64)
    torch.testing.assert_close(site_gram(attached.sites[f"unet.{LAYERS}"]), wanted)


@torch.no_grad()
def test_gates_and_the_router_take_them(attached: Experts) -> None:
    model = attached.component("unet")
    base = run_unet({"unet": model})
    for scope in ("matrix", "block"):
        gates = MoLEModel.from_experts(attached, GateConfig(scope=scope, input="hidden", token_axis="token"))
        for weigher in (gates, NormRouter()):
            attached.weigher = weigher
            drawn = run_unet({"unet": model})
            assert drawn.isfinite().all()
            assert (drawn - base).abs().max() > 1e-3
    attached.weigher = None


@pytest.mark.filterwarnings("ignore")  # LyCORIS warns of its optional kernels
@torch.no_grad()
def test_what_lycoris_trains_acts_as_in_lycoris() -> None:
    from lycoris import LycorisNetwork, create_lycoris

    models, theirs = {"unet": tiny_components()["unet"]}, tiny_components()["unet"]
    torch.manual_seed(0)
    targets = [GROUPS, LAYERS, "mid_block.attentions.0.norm"]
    LycorisNetwork.apply_preset({"target_module": [], "target_name": targets})
    network = create_lycoris(theirs, 1.0, linear_dim=4, algo="locon", train_norm=True)
    network.apply_to()
    for parameter in network.parameters():
        parameter.copy_(torch.randn_like(parameter) / 3)
    lora = load_lora({key: value.detach().clone() for key, value in network.state_dict().items()}, models)
    assert set(lora.factors["unet"]) == set(targets)
    wanted = run_unet({"unet": theirs})
    with summed(models, lora):
        torch.testing.assert_close(run_unet(models), wanted, atol=2e-5, rtol=1e-3)


def test_names_of_the_authors_and_other_spellings() -> None:
    """`diff` as programs write it that extract LoRAs; CompVis counts the parts of a residual block."""
    model = tiny_components()["unet"]
    diff = torch.randn(64)
    for stem in (
        f"unet.{GROUPS}", f"lora_unet_{GROUPS.replace('.', '_')}", "diffusion_model.middle_block.0.in_layers.0",
        "lora_unet_middle_block_0_in_layers_0",
    ):  # fmt: skip
        for part in ("diff", "w_norm"):
            factors = load_lora({f"{stem}.{part}": diff}, {"unet": model}).factors["unet"]
            assert list(factors) == [GROUPS]
            assert torch.equal(factors[GROUPS].gain, diff)
    last = load_lora({"diffusion_model.out.0.diff_b": torch.ones(32)}, {"unet": model}).factors["unet"]
    assert list(last) == ["conv_norm_out"]


def test_inspecting_and_converting(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_components()["unet"]
    state = changes(model, "unet", [GROUPS, LAYERS], seed=1)
    save_file(state, tmp_path / "it.safetensors")
    assert inspect_lora(tmp_path / "it.safetensors").kinds == {"normalisation": 2}
    out = convert_lora(tmp_path / "it.safetensors", tmp_path / "kohya.safetensors", "kohya", {"unet": model})
    assert {key.rpartition(".")[2] for key in load_file(out)} == {"w_norm", "b_norm"}
    one, other = (load_lora(path, {"unet": model}) for path in (tmp_path / "it.safetensors", out))
    assert one.fingerprint == other.fingerprint
    with pytest.raises(LoRAError, match=r"normalisation with diff_b has no place in diffusers's layout.*`kohya`"):
        convert_lora(tmp_path / "it.safetensors", tmp_path / "no.safetensors", "diffusers", {"unet": model})


TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
REFUSED = {
    "of another width": ({f"{GROUPS}.w_norm": torch.ones(63)}, r"layers, shape \(63,\), do not fit .*\(64,\)"),
    "magnitudes": (
        {f"{GROUPS}.w_norm": torch.ones(64), f"{GROUPS}.dora_scale": torch.ones(64, 1)},
        "magnitudes at mid_block.resnets.0.norm1, a layer of normalisation",
    ),
    "factors at a norm": (
        {f"{LAYERS}.lora_A.weight": torch.ones(1, 64), f"{LAYERS}.lora_B.weight": torch.ones(64, 1)},
        r"lora_A.weight \(1, 64\) and lora_B.weight \(64, 1\) do not fit .* weight \(64,\)",
    ),
    "a Kronecker product at a norm": (
        {f"{LAYERS}.lokr_w1": torch.ones(8, 1), f"{LAYERS}.lokr_w2": torch.ones(8, 1)},
        r"LoKr of \(64, 1\) does not fit .* weight \(64,\)",
    ),
    "one at a Linear": ({f"{TO_Q}.w_norm": torch.ones(64)}, r"normalisation layers, shape \(64,\), do not fit .*to_q "),
    "two spellings": (
        {f"{GROUPS}.w_norm": torch.ones(64), f"{GROUPS}.diff": torch.ones(64)},
        "two keys for the diff of one module: .*norm1.diff', '.*norm1.w_norm'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("state", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_meaning_is_refused(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(LoRAError, match=message):
        load_lora({f"unet.{key}": value for key, value in state.items()}, {"unet": tiny_components()["unet"]})


def test_norms_of_queries_and_keys_of_models_that_nobody_described_are_refused_by_name() -> None:
    """Nothing says whether their heads come before the tokens or behind them."""
    model = nn.ModuleDict({"to_q": nn.Linear(8, 8), "norm_q": nn.RMSNorm(8)})
    with pytest.raises(LoRAError, match=r"1 of 1 modules are RMSNorm, of which no change is read.*Merge it"):
        load_lora({"transformer.norm_q.w_norm": torch.ones(8)}, {"transformer": model})
