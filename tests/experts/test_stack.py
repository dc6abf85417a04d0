"""The stacked product against the plain sum over LoRAs, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_diffusion.experts import ExpertStack, Site
from mole_diffusion.experts.site import group_sites
from mole_diffusion.families.unet import UNet
from mole_diffusion.lora import LoRAFactors

RANKS = (3, 1, 5)


def linear_factors(ranks: Sequence[int], d_in: int, d_out: int) -> list[LoRAFactors]:
    return [LoRAFactors(torch.randn(r, d_in), torch.randn(d_out, r), 0.5 + r) for r in ranks]


def add(site: Site, x: Tensor, output: Tensor, weights: Tensor) -> Tensor:
    projected = site.group.project(site, x, output).rows[site.name]
    return site.stack.add_to(output, projected, weights)


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 6), (2, 3, 4, 6)])
def test_linear_equals_the_explicit_sum(shape: tuple[int, ...]) -> None:
    module = nn.Linear(6, 7).double()
    factors = linear_factors(RANKS, 6, 7)
    site = Site("unet", "a", module, ExpertStack(factors, "a"))
    x = torch.randn(*shape, dtype=torch.float64)
    gamma = torch.rand(2, 1, 3, dtype=torch.float64)
    result = add(site, x, module(x), gamma)
    weights = gamma.reshape(2, 3, *[1] * (x.ndim - 1))
    expected = module(x)
    for i, factor in enumerate(factors):
        delta = factor.scaling * x @ factor.down.double().T @ factor.up.double().T
        expected = expected + weights[:, i] * delta
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": (1, 3), "padding": "same"},
    ],
)
def test_convolution_equals_the_explicit_sum(options: dict[str, Any]) -> None:
    module = nn.Conv2d(4, 6, **options).double()
    factors = [LoRAFactors(torch.randn(r, 4, *module.kernel_size), torch.randn(6, r, 1, 1), 0.5) for r in RANKS]
    site = Site("unet", "a", module, ExpertStack(factors, "a"))
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    output = module(x)
    gamma = torch.rand(2, output[0, 0].numel(), 3, dtype=torch.float64)  # another weight at every position
    expected = output.clone()
    result = add(site, x, output, gamma)
    for i, factor in enumerate(factors):
        delta = F.conv2d(x, factor.delta().double(), None, module.stride, module.padding, module.dilation)
        expected = expected + gamma[:, :, i].reshape(2, 1, *output.shape[2:]) * delta
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)  # `delta()` multiplies in fp32


def test_a_lora_that_does_not_touch_the_module_has_no_rows() -> None:
    first, _, third = linear_factors(RANKS, 6, 7)
    stack = ExpertStack([first, None, third], "a")
    assert stack.ranks == (3, 0, 5)
    assert stack.indices == (0, 2)
    assert stack.expert_of_rank.tolist() == [0] * 3 + [2] * 5
    weights = stack.scaled(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.float32)
    assert weights.tolist() == [1.0 * 3.5] * 3 + [3.0 * 5.5] * 5  # times their scalings, one a rank


def test_scalings_are_as_precise_as_the_weights_they_multiply_and_gradients_pass_them() -> None:
    """Whatever weights came before: rounded ones, in a pass that keeps nothing for gradients."""
    factors = [LoRAFactors(torch.randn(2, 4), torch.randn(6, 2), scaling) for scaling in (0.1, 1.0, 0.3)]
    stack = ExpertStack([factors[0], None, factors[2]], "a")
    with torch.inference_mode():
        stack.scaled(torch.ones(1, 5, 3), torch.float32)
    for dtype in (torch.float32, torch.float64):
        weights = torch.ones(1, 5, 3, dtype=dtype, requires_grad=True)
        scaled = stack.scaled(weights, dtype)
        assert isinstance(scaled, Tensor)
        expected = torch.tensor([0.1, 0.3], dtype=dtype).expand(5, 2)
        assert torch.equal(scaled[0, :, :, 0], expected)
        scaled.sum().backward()
        assert weights.grad is not None
        assert torch.equal(weights.grad[0, 0], torch.tensor([0.1, 0.0, 0.3], dtype=dtype))


def test_matrices_and_one_by_one_convolutions_are_interchangeable() -> None:
    matrix = LoRAFactors(torch.randn(2, 4), torch.randn(6, 2), 1.0)
    kernel = LoRAFactors(matrix.down[..., None, None], matrix.up[..., None, None], 1.0)
    conv, linear = nn.Conv2d(4, 6, 1), nn.Linear(4, 6)
    image, tokens = torch.randn(2, 4, 3, 5), torch.randn(2, 5, 4)
    ones = torch.ones(1, 1, 1)
    for module, x in ((conv, image), (linear, tokens)):
        results = [
            add(Site("unet", "a", module, ExpertStack([factor], "a")), x, module(x), ones)
            for factor in (matrix, kernel)
        ]
        assert torch.equal(*results)


def test_projections_of_one_input_are_shared_and_let_go() -> None:
    attention = nn.ModuleDict({name: nn.Linear(6, 7) for name in ("to_q", "to_k", "to_v", "to_out")})
    sites = {
        name: Site("unet", name, module, ExpertStack(linear_factors(RANKS, 6, 7), name))
        for name, module in attention.items()
    }
    group_sites(list(sites.values()), attention, UNet())
    group = sites["to_q"].group
    assert [site.module_name for site in group.sites] == ["to_q", "to_k", "to_v"]
    x, other = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    output = attention["to_q"](x)
    shared = group.project(sites["to_q"], x, output)
    assert group.project(sites["to_k"], x, output) is shared
    different = group.project(sites["to_v"], other, output)  # not the tensor the others read
    assert different is not shared
    torch.testing.assert_close(different.tensors["unet.to_v"], other @ sites["to_v"].stack.down.T)
    group.let_go()
    for name in ("to_q", "to_k", "to_v"):
        group.project(sites[name], x, output)
    assert group._open is None


def test_what_cannot_run_beside_a_module_is_refused() -> None:
    factor = LoRAFactors(torch.randn(2, 4), torch.randn(6, 2), 1.0)
    with pytest.raises(ValueError, match=r"map \(4,\) to 6, but the module maps \(5,\) to 6"):
        Site("unet", "a", nn.Linear(5, 6), ExpertStack([factor], "a"))
    with pytest.raises(ValueError, match="groups=2"):
        Site("unet", "a", nn.Conv2d(4, 6, 1, groups=2), ExpertStack([factor], "a"))
    with pytest.raises(ValueError, match=r"map \(4,\) to 6, but the module maps \(4,\) to 4"):
        Site("unet", "a", nn.LayerNorm(4), ExpertStack([factor], "a"))
    with pytest.raises(TypeError, match="Embedding"):
        Site("unet", "a", nn.Embedding(4, 6), ExpertStack([factor], "a"))
    with pytest.raises(ValueError, match="disagree about a"):
        ExpertStack([factor, LoRAFactors(torch.randn(2, 5), torch.randn(6, 2), 1.0)], "a")
    with pytest.raises(ValueError, match="No LoRA"):
        ExpertStack([None], "a")
