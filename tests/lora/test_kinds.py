"""Every kind of adapter, at a Linear and at a convolution, against the papers' formulas and PEFT, which trains it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mole_diffusion.composition import NormRouter
from mole_diffusion.composition.budget import site_gram
from mole_diffusion.composition.norms import whole_norms
from mole_diffusion.experts import Experts, ExpertStack
from mole_diffusion.experts.beside import settle
from mole_diffusion.lora import LoRA, LoRAError, LoRAFactors, load_lora
from mole_diffusion.lora.kinds import KINDS
from mole_diffusion.lora.layouts.slot import take_ending
from tests import reference
from tests.running import run_unet, summed
from tests.tiny import tiny_components

D_IN, D_OUT, R = 6, 8, 2
Parts = dict[str, Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape) / 2


def plain(conv: bool) -> tuple[Parts, Tensor]:
    down, up = normal(R, D_IN, *[3, 3] * conv), normal(D_OUT, R, *[1, 1] * conv)
    return {"lora_down.weight": down, "lora_up.weight": up}, reference.lora_product(up.flatten(1), down)


def tucker(conv: bool) -> tuple[Parts, Tensor]:
    down, mid, up = normal(R, D_IN, 1, 1), normal(R, R, 3, 3), normal(D_OUT, R, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    return parts, reference.tucker(mid, up.flatten(1), down.flatten(1))


def loha(conv: bool, r: int = R) -> tuple[Parts, Tensor]:
    side = D_IN * 9 if conv else D_IN
    a1, b1, a2, b2 = normal(D_OUT, r), normal(r, side), normal(D_OUT, r), normal(r, side)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    change = reference.hadamard(reference.lora_product(a1, b1), reference.lora_product(a2, b2))
    return parts, change.reshape(D_OUT, D_IN, *[3, 3] * conv)


def large_loha(conv: bool) -> tuple[Parts, Tensor]:
    """r1 r2 is more than the module's own rank."""
    return loha(conv, r=4)


def loha_cores(conv: bool) -> tuple[Parts, Tensor]:
    a1, b1, a2, b2 = normal(R, D_OUT), normal(R, D_IN), normal(R, D_OUT), normal(R, D_IN)
    t1, t2 = normal(R, R, 3, 3), normal(R, R, 3, 3)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "hada_t1": t1, "hada_t2": t2}
    return parts, reference.hadamard(reference.tucker(t1, a1.T, b1), reference.tucker(t2, a2.T, b2))


def lokr(conv: bool) -> tuple[Parts, Tensor]:
    w1, w2 = normal(2, 3), normal(4, 2, *[3, 3] * conv)
    return {"lokr_w1": w1, "lokr_w2": w2}, reference.kronecker(w1, w2)


def lokr_factored(conv: bool) -> tuple[Parts, Tensor]:
    a1, b1, a2, b2 = normal(2, 1), normal(1, 3), normal(4, R), normal(R, 2 * 9 if conv else 2)
    w2 = reference.lora_product(a2, b2).reshape(4, 2, *[3, 3] * conv)
    parts = {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2_a": a2, "lokr_w2_b": b2}
    return parts, reference.kronecker(reference.lora_product(a1, b1), w2)


def lokr_core(conv: bool) -> tuple[Parts, Tensor]:
    w1, a, b, core = normal(2, 3), normal(R, 4), normal(R, 2), normal(R, R, 3, 3)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}
    return parts, reference.kronecker(w1, reference.tucker(core, a.T, b))


def full(conv: bool) -> tuple[Parts, Tensor]:
    diff = normal(D_OUT, D_IN, *[3, 3] * conv)
    return {"diff": diff}, diff.double()


MADE = {
    f"{make.__name__} of a {'convolution' if conv else 'Linear'}": (make, conv)
    for make in (plain, tucker, loha, large_loha, loha_cores, lokr, lokr_factored, lokr_core, full)
    for conv in (False, True)
    if conv or make not in (tucker, loha_cores, lokr_core)
}
OVER = {title: kind for title, kind in MADE.items() if kind[0] is not full}  # nobody trains magnitudes over it
NO_ALPHA = (lokr, full)  # no factor of them has a rank that alpha could be divided by


def module_of(conv: bool) -> nn.Module:
    """With a stride, a padding and a bias, since all must be the module's own."""
    return nn.Conv2d(D_IN, D_OUT, 3, stride=2, padding=1) if conv else nn.Linear(D_IN, D_OUT)


def read(parts: Parts, module: nn.Module, **extra: Tensor) -> LoRAFactors:
    state = {f"lora_unet_it.{name}": value for name, value in {**parts, **extra}.items()}
    return load_lora(state, {"unet": nn.ModuleDict({"it": module})}).factors["unet"]["it"]


def outputs(factors: LoRAFactors, module: Any, x: Tensor, weight: float = 1.0) -> Tensor:
    """What the engine makes of a module with one LoRA, in float64."""
    rows, beside = settle([None, factors], module, "it")
    stack = ExpertStack(rows, "it")
    output = module(x)
    weights = torch.tensor([[[5.0, weight]]], dtype=torch.float64)
    added = torch.zeros_like(output)
    if factors.r:
        up, down = stack.up_as(torch.float64), stack.down.double()
        if isinstance(module, nn.Conv2d):
            z = nn.functional.conv2d(x, down, None, module.stride, module.padding)
            added = added + torch.einsum("or,brhw->bohw", up, z) * weight
        else:
            added = added + x @ down.T @ up.T * weight
    if beside is not None:
        term = beside.add(x, output, weights, (1,))
        assert term is not None
        added = added + term
    return output + added


def literal(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The module with another weight, in float64."""
    bias = module.bias if bias is None else bias
    if isinstance(module, nn.Conv2d):
        return nn.functional.conv2d(x, weight, bias, module.stride, module.padding)
    return nn.functional.linear(x, weight, bias)


def inputs(conv: bool) -> Tensor:
    return torch.randn(2, D_IN, 5, 5).double() if conv else torch.randn(2, 3, D_IN).double()


@pytest.mark.parametrize(("make", "conv"), MADE.values(), ids=MADE)
def test_a_kind_is_its_formula_and_runs_as_that(make: Any, conv: bool) -> None:
    torch.manual_seed(0)
    parts, change = make(conv)
    alpha = 3.0
    change = change if make in NO_ALPHA else change * alpha / (4 if make is large_loha else R)
    module = module_of(conv).double()
    factors = read(parts, module_of(conv), alpha=torch.tensor(alpha))
    torch.testing.assert_close(factors.delta().double(), change, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        x = inputs(conv)
        torch.testing.assert_close(
            outputs(factors, module, x, 0.7), literal(module, x, module.weight + 0.7 * change), atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize(("make", "conv"), OVER.values(), ids=OVER)
def test_dora_over_a_kind_is_equation_5(make: Any, conv: bool, by_row: bool) -> None:
    torch.manual_seed(1)
    parts, change = make(conv)
    module = module_of(conv).double()
    magnitude = torch.rand(D_OUT, 1) + 0.5 if by_row else torch.rand(1, D_IN) + 0.5
    stored = magnitude.reshape(*magnitude.shape, *[1, 1] * conv)
    factors = read(parts, module, dora_scale=stored)
    wanted = reference.dora_weight(module.weight.detach(), change, magnitude)
    torch.testing.assert_close(
        factors.delta(module.weight.detach()).double(), wanted - module.weight, atol=1e-6, rtol=1e-5
    )
    with torch.no_grad():
        x = inputs(conv)
        mixed = module.weight + 0.7 * (wanted - module.weight)  # a strength is one of the whole change
        torch.testing.assert_close(outputs(factors, module, x, 0.7), literal(module, x, mixed), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(outputs(factors, module, x), literal(module, x, wanted), atol=2e-6, rtol=1e-5)


def test_magnitudes_near_those_of_the_base_count_in_half_precision() -> None:
    """c = 1.001 is 1 in bfloat16; the thousandth must not be lost with it."""
    torch.manual_seed(4)
    parts, change = plain(False)
    module = nn.Linear(D_IN, D_OUT, bias=False)
    down = {name: value * 0.01 for name, value in parts.items()}
    changed = module.weight.detach().double() + change * 0.0001
    factors = read(down, module, dora_scale=1.001 * changed.norm(dim=1, keepdim=True).float())
    rows, beside = settle([factors], module, "it")
    assert beside is not None
    x = torch.randn(64, 1, D_IN)
    with torch.no_grad():
        output = module(x).bfloat16()
        (term,) = beside.outputs(x.bfloat16(), output, (0,)).values()
    assert rows[0] is not None
    torch.testing.assert_close(term.float(), 0.001 * output.float(), atol=1e-6, rtol=2e-2)


@pytest.mark.parametrize("conv", [False, True])
def test_biases(conv: bool) -> None:
    """`lora_bias` of PEFT is scaled as the product is, LyCORIS' `diff_b` is not; one may come alone."""
    torch.manual_seed(2)
    parts, change = plain(conv)
    module = module_of(conv).double()
    inner, outer = normal(D_OUT), normal(D_OUT)
    peft = {"lora_A.weight": parts["lora_down.weight"], "lora_B.weight": parts["lora_up.weight"], "lora_B.bias": inner}
    x = inputs(conv)
    for read_from, bias, weight in (
        ({**peft, "alpha": torch.tensor(1.0)}, inner / R, change / R),
        ({**parts, "diff_b": outer}, outer, change),
        ({"diff_b": outer}, outer, 0 * change),
    ):
        factors = read(read_from, module_of(conv))
        with torch.no_grad():
            wanted = literal(module, x, module.weight + 0.7 * weight, module.bias + 0.7 * bias)
            torch.testing.assert_close(outputs(factors, module, x, 0.7), wanted, atol=1e-6, rtol=1e-5)


def test_float8_with_scales_is_scaled() -> None:
    torch.manual_seed(3)
    parts, _ = plain(False)
    down, up = (tensor.to(torch.float8_e4m3fn) for tensor in parts.values())
    state = {
        "lora_down.weight": down,
        "lora_up.weight": up,
        "lora_down.scale_weight": torch.tensor(0.5),
        "lora_up.scale_weight": torch.arange(1.0, 1 + D_OUT),  # one for every row
    }
    factors = read(state, nn.Linear(D_IN, D_OUT))
    assert torch.equal(factors.down, down.float() * 0.5)
    assert torch.equal(factors.up, up.float() * torch.arange(1.0, 1 + D_OUT)[:, None])
    with pytest.raises(LoRAError, match=r"scales \(3,\) of lora_down.weight \(2, 6\)"):
        read({**state, "lora_down.scale_weight": torch.ones(3)}, nn.Linear(D_IN, D_OUT))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"unet": tiny_components()["unet"]}


def state_of_all_kinds(unet: nn.Module, seed: int) -> dict[str, Tensor]:
    """A kohya file with another kind at every attention projection of the middle, and at two convolutions."""
    torch.manual_seed(seed)
    state = {}
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    d = 64
    by_module: dict[str, Parts] = {
        f"{attention}.to_q": {"hada_w1_a": normal(d, 2), "hada_w1_b": normal(2, d), "hada_w2_a": normal(d, 2),
                              "hada_w2_b": normal(2, d) / 4},
        f"{attention}.to_k": {"lokr_w1": normal(4, 4), "lokr_w2_a": normal(16, 2), "lokr_w2_b": normal(2, 16) / 4},
        f"{attention}.to_v": {"lora_down.weight": normal(3, d), "lora_up.weight": normal(d, 3) / 4,
                              "dora_scale": torch.rand(d, 1) + 0.5},
        f"{attention}.to_out.0": {"diff": normal(d, d) / 8, "diff_b": normal(d)},
        "mid_block.resnets.0.conv1": {"lokr_w1": normal(8, 8), "lokr_w2": normal(8, 8, 3, 3) / 16,
                                      "dora_scale": torch.rand(1, d, 1, 1) + 0.5},
        "mid_block.resnets.1.conv1": {"lora_down.weight": normal(2, d, 1, 1), "lora_mid.weight": normal(2, 2, 3, 3),
                                      "lora_up.weight": normal(d, 2, 1, 1) / 4},
    }  # fmt: skip
    for module, parts in by_module.items():
        state |= {f"lora_unet_{module.replace('.', '_')}.{name}": value for name, value in parts.items()}
    return state


def merged(models: dict[str, Any], loras: list[LoRA], weights: list[float]) -> Tensor:
    """The UNet with the changes in its own weights."""
    unet = tiny_components()["unet"]
    with torch.no_grad():
        for lora, share in zip(loras, weights, strict=True):
            for name, factors in lora.factors["unet"].items():
                module = unet.get_submodule(name)
                module.weight += share * factors.delta(models["unet"].get_submodule(name).weight.detach())
                if factors.bias is not None:
                    module.bias += share * factors.bias
    return run_unet({"unet": unet})


@torch.no_grad()
def test_all_kinds_beside_a_model_are_the_merged_weights(models: dict[str, Any]) -> None:
    """Two LoRAs of every kind at once; each one's magnitudes are relative to the base alone."""
    from mole_diffusion.composition import Linear

    loras = [load_lora(state_of_all_kinds(models["unet"], seed), models, name=str(seed)) for seed in (0, 1)]
    base = run_unet(models)
    experts = Experts(loras)
    experts.attach(models)
    try:
        experts.weigher = Linear()
        for scales in ([1.0, 0.0], [0.0, 0.8], [0.5, 0.8]):
            with experts.using(scale=torch.tensor(scales)):
                ours = run_unet(models)
            assert (ours - base).abs().max() > 1e-2
            torch.testing.assert_close(ours, merged(models, loras, scales), atol=1e-5, rtol=1e-5)
        with experts.using(keep=torch.tensor([0, 0])):
            assert torch.equal(run_unet(models), base)
        with experts.using(keep=torch.tensor([0, 1])):
            torch.testing.assert_close(run_unet(models), merged(models, loras, [0.0, 1.0]), atol=1e-5, rtol=1e-5)
        experts.weigher = NormRouter()
        assert run_unet(models).isfinite().all()
        for site in experts.sites.values():
            changes = [
                lora.factors["unet"][site.module_name].delta(site.module.weight.detach()).double() for lora in loras
            ]
            wanted = torch.tensor([[float((a * b).sum()) for a in changes] for b in changes], dtype=torch.float64)
            torch.testing.assert_close(site_gram(site), wanted, atol=1e-4, rtol=1e-4)
    finally:
        experts.detach()
    assert torch.equal(run_unet(models), base)


@torch.no_grad()
def test_norms_are_those_of_the_whole_outputs(models: dict[str, Any]) -> None:
    loras = [load_lora(state_of_all_kinds(models["unet"], seed), models, name=str(seed)) for seed in (0, 1)]
    seen = {}

    class Look:
        def weigh(self, site: Any, projections: Any, run: Any) -> Tensor:
            if site.beside is not None and not site.stack.is_convolution:
                seen[site.name] = (site, projections.hidden_states, whole_norms(site, projections))
            return torch.zeros(1, 1, 2)

    experts = Experts(loras)
    experts.attach(models)
    try:
        experts.weigher = Look()
        run_unet(models)
        assert len(seen) == 3  # LoKr, DoRA and the bias; a LoHa is rows
        for site, x, norms in seen.values():
            for index, lora in enumerate(loras):
                factors = lora.factors["unet"][site.module_name]
                y = x @ factors.delta(site.module.weight.detach()).T + (0 if factors.bias is None else factors.bias)
                torch.testing.assert_close(norms[index], y.norm(dim=-1), atol=1e-4, rtol=1e-4)
    finally:
        experts.detach()


def test_gates_that_read_ranks_refuse_what_has_none(models: dict[str, Any]) -> None:
    from mole_diffusion.errors import MoLEError
    from mole_diffusion.gating import GateConfig, MoLEModel

    experts = Experts([load_lora(state_of_all_kinds(models["unet"], 0), models)])
    experts.attach(models)
    try:
        with pytest.raises(MoLEError, match=r"add more there \(DoRA, LoKr, a bias\)\. Use input='hidden'"):
            MoLEModel.from_experts(experts, GateConfig(scope="layer"))
        MoLEModel.from_experts(experts, GateConfig(scope="layer", input="hidden"))
    finally:
        experts.detach()


def test_a_dora_needs_the_weights() -> None:
    from mole_diffusion.errors import MoLEError

    parts, _ = plain(False)
    factors = read(parts, nn.Linear(D_IN, D_OUT), dora_scale=torch.ones(D_OUT, 1))
    with pytest.raises(MoLEError, match=r"it has no weights yet \(they are on the meta device\)"):
        settle([factors], nn.Linear(D_IN, D_OUT, device="meta"), "it")
    with pytest.raises(MoLEError, match="What a DoRA changes depends on the weight"):
        factors.delta()


PEFT = {
    "LoHa": ("LoHaConfig", {"alpha": 3}),
    "LoKr": ("LoKrConfig", {"alpha": 3, "decompose_both": True}),
    "LoKr whole": ("LoKrConfig", {"alpha": 3, "r": 64}),
    "LoHa, kernels in factors": ("LoHaConfig", {"alpha": 3, "use_effective_conv2d": True}),
    "LoKr, kernels in factors": ("LoKrConfig", {"alpha": 3, "use_effective_conv2d": True}),
    "DoRA": ("LoraConfig", {"lora_alpha": 3, "use_dora": True, "use_rslora": True}),
    "LoRA with biases": ("LoraConfig", {"lora_alpha": 3, "lora_bias": True}),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # PEFT takes a bias of its own for a factor
@pytest.mark.parametrize(("config", "settings"), PEFT.values(), ids=PEFT)
def test_what_peft_trains_acts_as_in_peft(config: str, settings: Any, models: Any, tmp_path: Any) -> None:
    import peft

    targets = ["mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", "mid_block.resnets.0.conv1", "conv_in"]
    start = "init_lora_weights" if config == "LoraConfig" else "init_weights"
    settings = {"r": 4, **settings, start: False}
    torch.manual_seed(5)
    theirs = peft.get_peft_model(tiny_components()["unet"], getattr(peft, config)(target_modules=targets, **settings))
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter *= 1 + torch.rand_like(parameter)
        elif "lora_B" in name and name.endswith("bias"):
            parameter += torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    lora = load_lora(tmp_path, models)
    assert set(lora.factors["unet"]) == set(targets)
    base = run_unet(models)
    wanted = run_unet({"unet": theirs.base_model.model.eval()})
    assert (wanted - base).abs().max() > 1e-3
    with summed(models, lora):
        torch.testing.assert_close(run_unet(models), wanted, atol=2e-5, rtol=1e-4)


def test_what_a_kind_takes_is_read_in_every_layout() -> None:
    """A new kind is one file: nothing else knows the names of its parts."""
    parts = {part for kind in KINDS for part in kind.takes} - {"down", "up", "mid"}
    assert len(parts) > 10
    for part in parts:
        assert take_ending(f"unet.mid_block.{part}") == ("unet.mid_block", part)
