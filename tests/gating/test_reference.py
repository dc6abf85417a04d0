"""Gates and mixtures against the equations of `tests/reference.py`, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_diffusion import families
from mole_diffusion.experts import Experts
from mole_diffusion.families.unet import UNet
from mole_diffusion.gating import GateConfig, MoLEModel, masked_softmax
from mole_diffusion.gating.gate import Gate
from mole_diffusion.lora import LoRA, LoRAFactors
from tests import reference
from tests.weighing import Numbers

WIDTH, SIZE, BATCH = 6, (3, 4), 2
PROJECTIONS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")


class OneHead(nn.Module):
    """f_attn of the reference, with the names diffusers gives its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](F.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x)))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.net = nn.ModuleList([first, nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[1](self.net[0].proj(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.ff = OneHead(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(x)
        return x + self.ff(x)


class Denoiser(nn.Module):
    """Two transformer blocks over the pixels of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, sample: Tensor, timestep: Any = None) -> Tensor:
        x = sample.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            x = block(x)
        return x

    def theta(self, index: int) -> dict[str, Tensor]:
        block = self.transformer_blocks[index]
        return {name: block.get_parameter(f"{name}.weight").detach() for name in PROJECTIONS + FEED_FORWARD}


def make_lora(name: str, seed: int, rank: int, targets: Sequence[str]) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for block in range(2):
        for target in targets:
            d_in = 2 * WIDTH if target == "ff.net.2" else WIDTH
            d_out = 2 * WIDTH if target == "ff.net.0.proj" else WIDTH
            down = torch.randn(rank, d_in, generator=generator) / 3
            up = torch.randn(d_out, rank, generator=generator) / 3
            factors[f"transformer_blocks.{block}.{target}"] = LoRAFactors(down, up, 0.7 + seed)
    return LoRA(name, "<test>", "diffusers", name * 16, {"transformer": factors})


def literal(lora: LoRA, module: str) -> reference.FACTORS:
    pair = lora.factors["transformer"][module]
    return pair.down, pair.up, pair.scaling


class TwoBlocks(UNet):
    """Reads and order as in a UNet."""

    classes = ("Denoiser",)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Denoiser:
    monkeypatch.setattr(families, "ARCHITECTURES", [TwoBlocks()])
    return Denoiser().double()


@pytest.fixture
def loras() -> list[LoRA]:
    """Mixed ranks; the last touches neither the queries nor the feed-forward layers."""
    return [
        make_lora("a", 1, 2, PROJECTIONS + FEED_FORWARD),
        make_lora("b", 2, 3, PROJECTIONS + FEED_FORWARD),
        make_lora("c", 3, 1, ("attn1.to_k", "attn1.to_v", "attn1.to_out.0")),
    ]


@pytest.fixture
def experts(model: Denoiser, loras: list[LoRA]) -> Experts:
    experts = Experts(loras)
    experts.attach({"transformer": model})
    return experts


def sample() -> Tensor:
    return torch.randn(BATCH, WIDTH, *SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def block_inputs(model: Denoiser, *args: Any) -> list[Tensor]:
    """What each block is given in one pass, and the output of the last."""
    seen: list[Tensor] = []
    handles = [b.register_forward_pre_hook(lambda _, a: seen.append(a[0])) for b in model.transformer_blocks]
    with torch.no_grad():
        output = model(*args)
    for handle in handles:
        handle.remove()
    assert len(seen) == 2
    return [*seen, output]


def test_weights_equal_equations_1_and_2(model: Denoiser, experts: Experts, loras: list[LoRA]) -> None:
    module = "transformer_blocks.0.attn1.to_q"
    layer = model.get_submodule(module)
    weight, x = layer.weight.detach(), sample().flatten(2).transpose(1, 2)
    touching = [literal(lora, module) for lora in loras[:2]]
    experts.weigher = Numbers(torch.ones(3))
    torch.testing.assert_close(layer(x), x @ reference.eq1_linear(weight, touching).T, atol=1e-12, rtol=1e-12)
    experts.weigher = Numbers(torch.tensor([0.25, 0.75, 0.0]))
    expected = x @ reference.eq2_normalized(weight, touching, [0.25, 0.75]).T
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("normalization", ["l2", "rms", "layer_norm"])
@pytest.mark.parametrize("token_axis", ["pooled", 2, "flatten"])
def test_rank_space_gates_equal_the_literal_ones(
    model: Denoiser, experts: Experts, loras: list[LoRA], normalization: Any, token_axis: Any
) -> None:
    model(sample())  # flattened gates need to have seen the resolution
    config = GateConfig(normalization=normalization, token_axis=token_axis, temperature=0.7)
    gates = MoLEModel.from_experts(experts, config).double()
    experts.weigher = gates
    positions = {"pooled": 1, 2: 4, "flatten": 12}[token_axis]
    literal_e: dict[str, Tensor] = {}
    size = 2.0 if normalization == "l2" else 0.25  # of e, so that gates are far from uniform and from one-hot
    for spec in gates.specs:
        assert spec.positions == positions
        # e[j]: weight of every entry of the concatenated expert outputs in logit j; rows come E_1, E_2, E_3, and in
        # each expert position by position, with the entry modules' features side by side.
        generator = torch.Generator().manual_seed(5)
        parts = {
            (m, i): torch.randn(3, positions, WIDTH, generator=generator, dtype=torch.float64) * size
            for m, entry in enumerate(spec.entries)
            for i, rank in enumerate(entry.ranks)
            if rank
        }
        columns = [torch.cat([parts[m, i] for m in range(3) if (m, i) in parts], dim=-1).flatten(1) for i in range(3)]
        literal_e[spec.name] = torch.cat(columns, dim=1).T  # (N L d, N)
        gate: Any = gates.get_submodule("gates." + spec.name.replace(".", "/"))
        rank_space = [
            part
            @ loras[i].factors["transformer"][spec.entries[m].module].up.double()
            * loras[i].factors["transformer"][spec.entries[m].module].scaling
            for (m, i), part in parts.items()
        ]
        gate.weight.data = torch.cat(rank_space, dim=-1)
        gate.log_temperature.data = torch.tensor(0.7, dtype=torch.float64).log()  # not rounded to fp32
        if normalization == "layer_norm":
            gate.weight_sum.data = literal_e[spec.name].sum(dim=0)
    with gates.record() as record:
        inputs = block_inputs(model, sample())
    for index, name in enumerate(record.names):
        for row in range(BATCH):
            outputs = []
            for lora in loras:
                modules = [f"transformer_blocks.{index}.{p}" for p in PROJECTIONS[:3]]
                outputs.append(
                    torch.cat(
                        [
                            inputs[index][row] @ reference.delta(literal(lora, module)).T
                            for module in modules
                            if module in lora.factors["transformer"]
                        ],
                        dim=-1,
                    )
                )
            expected = reference.literal_gate(outputs, literal_e[name], normalization, 0.7, token_axis, SIZE)
            assert max(expected) > 0.36
            actual = record.gates[name][row]
            torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    assert len(record.names) == 2


@pytest.mark.parametrize("gate_input", ["experts", "hidden"])
def test_token_gates_equal_the_equations_token_by_token(
    model: Denoiser, experts: Experts, loras: list[LoRA], gate_input: Any
) -> None:
    """Eqs. 9-13 where every token is a picture of its own."""
    module = "transformer_blocks.1.attn1.to_v"
    config = GateConfig(scope="matrix", token_axis="token", input=gate_input, temperature=0.7)
    gates = MoLEModel.from_experts(experts, config).double()
    experts.weigher = gates
    gate: Any = gates.get_submodule(f"gates.transformer/{module.replace('.', '/')}")
    gate.log_temperature.data = torch.tensor(0.7, dtype=torch.float64).log()  # not rounded to fp32
    read = 3 * WIDTH if gate_input == "experts" else WIDTH
    e = torch.randn(3, read, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ups = [
        lora.factors["transformer"][module].up.double() * lora.factors["transformer"][module].scaling for lora in loras
    ]
    rank_space = torch.cat([part @ up for part, up in zip(e.split(WIDTH, dim=-1), ups, strict=False)], dim=-1)
    gate.weight.data = (rank_space if gate_input == "experts" else e)[:, None]
    layer = model.get_submodule(module)
    x = sample().flatten(2).transpose(1, 2)
    output = layer(x)
    seen = []
    for row in range(BATCH):
        for token in range(x.shape[1]):
            here = x[row, token : token + 1]
            outputs = [here @ reference.delta(literal(lora, module)).T for lora in loras]
            expected = reference.literal_gate(outputs if gate_input == "experts" else [here], e.T, "rms", 0.7)
            mixed = reference.eq12_13_mixture(here @ layer.weight.detach().T, outputs, expected)
            torch.testing.assert_close(output[row, token : token + 1], mixed, atol=1e-12, rtol=0)
            seen.append(torch.tensor(expected))
    assert torch.stack(seen).std(dim=0).min() > 0.05  # tokens differ


@pytest.mark.parametrize("token_axis", ["pooled", "flatten"])
def test_block_experts_equal_equations_5_to_13(
    model: Denoiser, experts: Experts, loras: list[LoRA], token_axis: Any
) -> None:
    model(sample())
    gates = MoLEModel.from_experts(experts, GateConfig(experts="block", token_axis=token_axis)).double()
    for parameter in gates.gate_parameters():
        parameter.data = torch.randn_like(parameter) / 3
    experts.weigher = gates
    with gates.record() as record:
        inputs = block_inputs(model, sample())
    for index, name in enumerate(record.names):
        theta = model.theta(index)
        gate: Any = gates.get_submodule("gates." + name.replace(".", "/"))
        # Ours lays positions outside and experts inside; the paper the other way round.
        e = gate.weight.detach().unflatten(-1, (3, WIDTH)).transpose(1, 2).flatten(1).T
        for row in range(BATCH):
            x = inputs[index][row]
            prefix = f"transformer_blocks.{index}."
            outputs = []
            for lora in loras:
                touched = [m for m in lora.factors["transformer"] if m.startswith(prefix)]
                alone = {m.removeprefix(prefix): literal(lora, m) for m in touched}
                outputs.append(reference.eq7_8_block_expert(x, theta, alone))
            expected = reference.literal_gate(outputs, e, "rms", gate.temperature.item(), token_axis)
            torch.testing.assert_close(
                record.gates[name][row], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
            )
            mixed = reference.eq12_13_mixture(reference.eq5_6_block(x, theta), outputs, expected)
            torch.testing.assert_close(inputs[index + 1][row], mixed, atol=1e-12, rtol=1e-12)
    assert len(record.names) == 2


def test_block_mixture_with_module_experts_is_the_weighted_block(
    model: Denoiser, experts: Experts, loras: list[LoRA]
) -> None:
    """With experts per module, a block gate weighs every LoRA's change of every weight of the block alike."""
    gates = MoLEModel.from_experts(experts).double()
    for parameter in gates.gate_parameters():
        parameter.data = torch.randn_like(parameter)
    experts.weigher = gates
    with gates.record() as record:
        inputs = block_inputs(model, sample())
    for index, name in enumerate(record.names):
        for row in range(BATCH):
            theta = model.theta(index)
            for lora, gate in zip(loras, record.gates[name][row].tolist(), strict=True):
                for module in lora.factors["transformer"]:
                    prefix = f"transformer_blocks.{index}."
                    if module.startswith(prefix):
                        key = module.removeprefix(prefix)
                        theta[key] = theta[key] + gate * reference.delta(literal(lora, module))
            expected = reference.eq5_6_block(inputs[index][row], theta)
            torch.testing.assert_close(inputs[index + 1][row], expected, atol=1e-12, rtol=1e-12)


def test_masked_softmax_equals_renormalised_gates() -> None:
    logits, keep = torch.randn(3, 4, dtype=torch.float64), torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]])
    gates = masked_softmax(logits, keep)
    for row in range(3):
        unmasked = reference.eq11_gates(logits[row].tolist(), 1.0)
        expected = reference.masked_gates(unmasked, keep[row].tolist())
        torch.testing.assert_close(gates[row], torch.tensor(expected, dtype=torch.float64), atol=1e-14, rtol=0)
    assert masked_softmax(logits, torch.zeros(1, 4)).abs().max() == 0


def test_an_all_zero_expert_output_gives_uniform_gates_and_finite_gradients() -> None:
    for normalization in ("l2", "rms", "layer_norm"):
        gate = Gate(3, 1, 6, 18, normalization)  # type: ignore[arg-type]
        gate.set_up([torch.randn(6, 2) for _ in range(3)])
        gate.weight.data.normal_()
        features = torch.zeros(2, 1, 6, requires_grad=True)
        gates = torch.softmax(gate(features), dim=-1)
        gates[:, 0].sum().backward()
        torch.testing.assert_close(gates, torch.full((2, 3), 1 / 3))
        assert features.grad is not None
        assert features.grad.isfinite().all()


class Backwards(nn.ModuleList):
    """The same blocks, gone through from the last to the first."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([*super().__iter__()][::-1])


def test_scopes_read_their_entry_before_it_changes(model: Denoiser, experts: Experts) -> None:
    """A module that runs before what its gate reads is an error, not a stale gate."""
    experts.weigher = MoLEModel.from_experts(experts, GateConfig(scope="network"))
    model(sample())
    model.transformer_blocks.__class__ = Backwards
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1\.to_q ran before .*blocks\.0\.attn1\.to_q"):
        model(sample())
