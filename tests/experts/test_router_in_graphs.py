"""What a compiled graph has of the norm router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from mole_diffusion.composition import Call, NormRouter
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Experts, graphs
from mole_diffusion.experts.adding import add_experts
from mole_diffusion.experts.rules import RULES
from tests.running import inputs_of, make_lora, models, unet_inputs
from tests.tiny import CONVOLUTIONS, tiny_components


def test_the_router_in_a_graph_where_no_lora_gives_anything_or_there_are_no_tokens(experts: Experts) -> None:
    """As without a graph: a token goes to all, and where there are no tokens, LoRAs share one unit."""
    site = next(site for name, site in experts.sites.items() if name.endswith("attn1.to_out.0"))
    keep, scale = torch.tensor([[1, 1, 1], [0, 1, 1]]), torch.tensor([1.0, 0.3, 2.0])
    for router in (NormRouter(), NormRouter(temperature=0.5)):
        ruled = router.rules({site: ""})[site.name]
        with experts.using(keep, scale, router):
            run = experts.run("unet")
            choice = torch.stack([run.keep, run.scale.expand(2, -1), torch.ones(2, 3)])
            for x in (torch.zeros(2, 5, *site.stack.input_shape), torch.randn(2, 1, *site.stack.input_shape)):
                projections = site.group.project(site, x, torch.zeros(*x.shape[:2], site.stack.out_features))
                found = RULES[ruled.rule](x, projections.tensors[site.name], choice, ruled.tensors, ruled.numbers)
                expected = router.weigh(site, projections, run)
                assert found.isfinite().all()
                torch.testing.assert_close(found, expected.expand_as(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize(
    ("mug", "alike"),
    [
        ({}, True),
        ({"targets": (CONVOLUTIONS,)}, True),
        ({"rank": 4}, False),
        ({"targets": r"(to_|\.)[qv](_proj)?$"}, False),
    ],
    ids=["alike", "elsewhere", "of another rank", "not at all"],
)
@torch.no_grad()
def test_the_router_looks_at_all_modules_at_once_that_read_the_same(
    mug: dict[str, Any], alike: bool, temperature: float, dtype: torch.dtype
) -> None:
    """In half precision, off rows as long as outputs are large, and no factors lie in memory but those of hooks."""
    tiny, whole = tiny_components(), dtype == torch.float32
    given: dict[str, dict[str, Any]] = {"cat": {}, "boot": {}, "mug": mug}
    experts = Experts([make_lora(tiny, name, i, **{"rank": 3} | its) for i, (name, its) in enumerate(given.items())])
    experts.attach(models({name: model.to(dtype) for name, model in tiny.items() if isinstance(model, nn.Module)}))
    keep, scale = torch.tensor([[1, 1, 1], [0, 1, 1]]), torch.tensor([1.0, 0.3, 2])
    router, call = NormRouter(temperature=temperature), Call(experts.names, ("subject", "style", "subject"))
    together = []
    with experts.using(keep, scale, router, call):
        for site in experts.sites.values():
            run, callback = experts.run(site.component), site.callback
            assert callback is not None
            xs = [inputs_of(site.module, dtype)]
            if not isinstance(site.module, nn.Conv2d):
                xs.append(xs[0][:, :1].contiguous())  # no tokens
            for x in xs:
                base = torch.zeros_like(type(site.module).forward(site.module, x))  # what is rounded is what they add
                expected = add_experts(site, x, base.clone(), run)
                found = graphs.add(callback, site.module, x, base)
                assert (found - expected).float().norm() < (1e-5 if whole else 0.01) * expected.float().norm()
            if callback.ruled is None:  # it reads a prompt, and is served in Python
                assert callback.factors is callback.turned is None
                continue
            together.append(callback.ruled.together)
            assert together[-1] == (alike and site.group.several and not site.stack.is_convolution)
            roots = not whole and site.stack.same_rank  # else with R of each
            assert len(callback.ruled.tensors) == 2 - roots
            factors, other = (callback.factors, callback.turned)[:: 1 if whole else -1]
            assert factors is not None
            assert other is None
            ready = site.only(run.kept, run.orthonormal).group.ready
            assert {factors.down.data_ptr(), factors.up.data_ptr()} <= {tensor.data_ptr() for tensor in ready}
    assert any(together) == alike
    assert not all(together)


@torch.no_grad()
def test_a_graph_has_the_factors_that_suit_a_model_of_another_dtype() -> None:
    tiny = tiny_components()
    experts = Experts([make_lora(tiny, name, seed) for seed, name in enumerate(("cat", "boot"))])
    experts.attach(models(tiny))
    site = next(site for name, site in experts.sites.items() if name.endswith("attn1.to_q"))
    assert site.callback is not None
    with experts.using(weigher=NormRouter()):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            tiny["unet"].to(dtype)(**unet_inputs(dtype=dtype))  # so it is seen that it is another one
            x = inputs_of(site.module, dtype)
            base = torch.zeros(2, 5, site.module.out_features, dtype=dtype)
            graphs.add(site.callback, site.module, x, base.clone())
            made = site.callback.factors, site.callback.turned
            found = graphs.add(site.callback, site.module, x, base.clone())
            assert made[0] is site.callback.factors
            assert made[1] is site.callback.turned
            expected = add_experts(site, x, base.clone(), experts.run("unet"))
            assert (found - expected).norm() < 0.01 * expected.norm()
            assert site.callback.ruled is not None
            assert site.callback.ruled.orthonormal == (dtype == torch.bfloat16)


def test_a_graph_looks_nothing_up_where_all_loras_are(experts: Experts) -> None:
    """A sum at places that are given in a tensor takes a GPU several kernels."""
    for site in experts.sites.values():
        if site.reads == "pixels":
            ruled = NormRouter().rules({site: ""})[site.name]
            z, choice = torch.randn(2, 5, site.stack.rank), torch.ones(3, 2, 3)
            graph = make_fx(lambda *given, ruled=ruled: RULES[ruled.rule](None, *given, ruled.tensors, ruled.numbers))
            operators = {str(node.target) for node in graph(z, choice).graph.nodes}
            assert ("aten.index_add.default" in operators) == (len(site.stack.indices) < 3)


@torch.no_grad()
def test_a_router_that_was_changed_since_is_refused_and_a_new_one_routes(experts: Experts) -> None:
    site = next(site for name, site in experts.sites.items() if name.endswith("attn1.to_out.0"))
    x, router = inputs_of(site.module), NormRouter(temperature=0.5)
    output = type(site.module).forward(site.module, x)
    with experts.using(weigher=router):
        before = graphs.add(site.callback, site.module, x, output)
    router.temperature = 0.1
    with experts.using(weigher=router), pytest.raises(MoLEError, match=r"NormRouter\(temperature=0.1\)"):
        graphs.add(site.callback, site.module, x, output)
    with experts.using(weigher=NormRouter(temperature=0.1)):
        found = graphs.add(site.callback, site.module, x, output)
        expected = add_experts(site, x, output.clone(), experts.run("unet"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 1e-3
