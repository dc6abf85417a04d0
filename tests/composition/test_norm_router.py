"""The norm router: who has a token, against its literal transcription, and what rows it reads that off."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mole_diffusion.composition import Budget, NormRouter
from mole_diffusion.composition.norms import output_norms, sizes_at
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import ExpertStack, Projections, Site
from mole_diffusion.lora import LoRAFactors
from mole_diffusion.speed.counted import Counted
from tests import reference
from tests.composing import NAMES, composing_pipeline, lora_states
from tests.running import models, run_unet
from tests.tiny import ATTENTION, CONVOLUTIONS, FEED_FORWARD, random_lora


@torch.no_grad()
def test_the_norm_router_gives_each_token_to_the_largest_output_for_its_kind(pipe: Any) -> None:
    method = NormRouter()
    site = next(s for s in pipe.experts.sites.values() if s.module_name.endswith("attn1.to_out.0"))
    x = torch.randn(2, 6, site.stack.down.shape[1])
    output = site.module(x)
    with pipe.composing():
        run = pipe.experts.run("unet")
        weights = method.weigh(site, site.group.project(site, x, output), run)
        soft = NormRouter(temperature=0.5).weigh(site, site.group.project(site, x, output), run)
    loras = [lora.factors["unet"][site.module_name] for lora in pipe.experts.loras]
    literal = [(f.down, f.up, f.scaling) for f in loras]
    for row in range(2):
        assert weights[row].argmax(dim=-1).tolist() == reference.norm_router(x[row], literal)
    assert torch.equal(weights.sum(dim=-1), torch.ones(2, 6))
    assert set(weights.flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(soft.sum(dim=-1), torch.ones(2, 6))
    assert torch.equal(soft.argmax(dim=-1), weights.argmax(dim=-1))


def in_dtype(dtype: torch.dtype) -> Any:
    """A pipeline with models of a dtype: in that of the factors, products are made with these themselves."""
    pipe = composing_pipeline()
    for model in models(dict(pipe.components)).values():
        model.to(dtype)
    return pipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_the_norm_router_weighs_all_that_read_one_tensor_at_once_and_each_by_its_own_outputs(dtype: Any) -> None:
    """Two methods that are asked in turn, as a wrapper may, do not take each other's."""
    hard, soft, pipe = NormRouter(), NormRouter(temperature=0.5), in_dtype(dtype)
    pipe.load_loras({name: random_lora(pipe.components, rank=4, seed=seed) for seed, name in enumerate(NAMES)})
    sites = [s for s in pipe.experts.sites.values() if ".attn1.to_" in s.name and s.group.several][2::-1]
    sites = [site.only(None, orthonormal=True) for site in sites]  # as they are when pictures are drawn with it
    assert len({id(site.group) for site in sites}) == 1
    x = torch.randn(2, 6, *sites[0].stack.input_shape, dtype=dtype)
    sites[0].group.make_ready(x)
    with pipe.composing():
        run = pipe.experts.run("unet")
        products = []
        for site in sites:
            with Counted() as counted:
                projections = site.group.project(site, x, site.module(x))
                weights, shares = (method.weigh(site, projections, run) for method in (hard, soft))
            products.append(counted.count)
            alone = Projections(x, {site.name: projections.rows[site.name]}, 2)
            torch.testing.assert_close(shares, soft.weigh(site, alone, run))
            loras = [lora.factors["unet"][site.module_name] for lora in pipe.experts.loras]
            literal = [(f.down, f.up, f.scaling) for f in loras]
            for row in range(2):
                assert weights[row].argmax(dim=-1).tolist() == reference.norm_router(x[row], literal)
    sizes = 0 if sites[0].stack.orthonormal else 2  # for each method
    assert products == [1 + 1 + sizes, 1, 1]  # the base's, and down of all


@torch.no_grad()
def test_autocast_rounds_nothing_that_the_norm_router_compares() -> None:
    """In half precision the least mean there may be is nothing, and two LoRAs look alike."""
    for name, dtype in itertools.product(("attn1.to_out.0", "attn1.to_q"), (torch.float32, torch.bfloat16)):
        pipe = in_dtype(dtype)
        pipe.load_loras({name: random_lora(pipe.components, rank=4, seed=seed) for seed, name in enumerate(NAMES)})
        site = next(s for s in pipe.experts.sites.values() if s.module_name.endswith(name))
        site = site.only(None, orthonormal=True)
        assert site.stack.orthonormal == (dtype == torch.bfloat16)
        x = torch.randn(2, 40, site.stack.down.shape[1], dtype=dtype)
        for choice in (None, {"cat": 0.3, "dog": 1.0, "mug": 1.0}):
            with pipe.composing(choice):
                run = pipe.experts.run("unet")
                projections = [site.group.project(site, x, site.module(x)) for _ in range(2)]
                exact = NormRouter(temperature=0.5).weigh(site, projections[0], run)
                with torch.autocast("cpu", torch.bfloat16):
                    assert torch.equal(NormRouter(temperature=0.5).weigh(site, projections[1], run), exact)


@torch.no_grad()
def test_sizes_of_outputs_come_from_factors_alone(pipe: Any) -> None:
    """Also where LoRAs of other ranks, or none, touch the module, and where a rank is above the module's width."""
    wide = LoRAFactors(torch.randn(9, 5), torch.randn(3, 9), 0.5)
    as_wide = LoRAFactors(torch.randn(9, 5), torch.randn(3, 9), 1.5)
    narrow = LoRAFactors(torch.randn(2, 5), torch.randn(3, 2), 2.0)
    x = torch.randn(2, 7, 5)
    for loras in ([wide, None, narrow], [wide, as_wide], [None, as_wide], [narrow]):
        stack = ExpertStack(loras, "here")
        sizes = output_norms(stack, (x @ stack.down.T).flatten(0, 1)).view(-1, 2, 7)
        assert len(sizes) == len(stack.indices)
        kernels = [f and LoRAFactors(f.down[..., None, None], f.up[..., None, None], f.scaling) for f in loras]
        of_picture = output_norms(ExpertStack(kernels, "here"), (x @ stack.down.T).transpose(1, 2))
        for place, index in enumerate(stack.indices):
            factors: Any = loras[index]
            literal = reference.delta((factors.down, factors.up, factors.scaling))
            expected = (x.double() @ literal.T).norm(dim=-1)
            torch.testing.assert_close(sizes[place].double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(of_picture[place].double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_are_as_long_as_outputs_are_large_where_columns_are_orthonormal() -> None:
    """And what is added stays the same: also with a rank above the module's width, and of a LoRA that adds nothing."""
    wide = LoRAFactors(torch.randn(9, 5), torch.randn(3, 9), 0.5)
    narrow = LoRAFactors(torch.randn(2, 5), torch.randn(3, 2), -2.0)
    nothing = LoRAFactors(torch.randn(2, 5), torch.zeros(3, 2), 1.0)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    for loras in ([wide, None, narrow], [narrow, nothing], [None, wide], [narrow], [None, narrow, nothing, wide]):
        for kernel in (False, True):
            ones = (1, 1) if kernel else ()
            given = [
                f and LoRAFactors(f.down.view(*f.down.shape, *ones), f.up.view(*f.up.shape, *ones), f.scaling)
                for f in loras
            ]
            stack = ExpertStack(given, "here").with_orthonormal_columns()
            assert stack.ranks == tuple(0 if f is None else min(f.r, 3) for f in loras)
            assert set(stack.scalings) == {1.0}
            down, up = stack.down_as(torch.float64).flatten(1), stack.up_as(torch.float64)
            z = (x @ down.T).split([stack.ranks[i] for i in stack.indices], dim=-1)
            for index, rows in zip(stack.indices, z, strict=True):
                factors: Any = loras[index]
                size = float((factors.up * factors.scaling).norm()) or 1.0
                literal = reference.delta((factors.down, factors.up, factors.scaling))
                owned = stack.expert_of_rank == index
                torch.testing.assert_close(up[:, owned] @ down[owned], literal, rtol=1e-9, atol=1e-9)
                expected = (x @ literal.T).norm(dim=-1)
                torch.testing.assert_close(size * rows.norm(dim=-1), expected, rtol=1e-6, atol=1e-6)


class Asked(NormRouter):
    """The same router, of products as they are; or one that halves what it gives."""

    def __init__(self, orthonormal: bool, temperature: float = 0.0, half: bool = False) -> None:
        super().__init__(temperature)
        self._orthonormal, self._half = orthonormal, half

    @property
    def orthonormal(self) -> bool:
        return self._orthonormal

    def weigh(self, site: Any, projections: Any, run: Any) -> Tensor:
        weights = super().weigh(site, projections, run)
        return weights / 2 if self._half else weights


@pytest.mark.parametrize("kernel", [(), (1, 1)])
@torch.no_grad()
def test_sizes_of_rows_in_half_precision_are_not_rounded_on_their_way(kernel: tuple[int, ...]) -> None:
    module: Any = (nn.Conv2d(8, 8, 1) if kernel else nn.Linear(8, 8)).bfloat16()
    factors = [LoRAFactors(torch.randn(4, 8, *kernel), torch.randn(8, 4, *kernel)) for _ in range(2)]
    site = Site("unet", "a", module, ExpertStack(factors, "a")).only(None, orthonormal=True)
    x = torch.randn(2, *((8, 3, 5) if kernel else (15, 8))).bfloat16()
    projections = site.group.project(site, x, module(x))
    rows = projections.tensors["unet.a"].double().unflatten(-1, (2, 4))
    found = sizes_at(site, projections.rows["unet.a"])(projections)
    torch.testing.assert_close(found.permute(1, 2, 0).double(), rows.norm(dim=-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", [(), (1, 1)])
@torch.no_grad()
def test_sizes_are_those_of_outputs_in_any_batch(kernel: tuple[int, ...]) -> None:
    module: Any = nn.Conv2d(8, 6, 1) if kernel else nn.Linear(8, 6)
    factors = [LoRAFactors(torch.randn(4, 8, *kernel), torch.randn(6, 4, *kernel), 0.5 + i) for i in range(3)]
    site = Site("unet", "a", module, ExpertStack(factors, "a"))
    sizes = sizes_at(site, torch.zeros(1))
    for batch in (2, 3, 1):
        x = torch.randn(batch, *((8, 3, 5) if kernel else (15, 8)))
        tokens = x.flatten(2).transpose(1, 2) if kernel else x
        found = sizes(site.group.project(site, x, module(x)))
        for size, lora in zip(found, factors, strict=True):
            literal = reference.delta((lora.down.flatten(1), lora.up.flatten(1), lora.scaling))
            torch.testing.assert_close(size.double(), (tokens.double() @ literal.T).norm(dim=-1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_norm_router_sees_other_choices_and_scales_in_the_same_call(pipe: Any) -> None:
    site = next(s for s in pipe.experts.sites.values() if s.module_name.endswith("attn1.to_out.0"))
    x, method, everyone = torch.randn(2, 6, site.stack.down.shape[1]), NormRouter(), torch.ones(len(pipe.experts.names))
    using, seen = pipe.experts.using, []

    def look() -> None:
        run = pipe.experts.run("unet")
        seen.append(method.weigh(site, site.group.project(site, x, site.module(x)), run))

    with pipe.composing():
        look()
        with using(scale=2 * everyone):
            look()
            with using(keep=(everyone.cumsum(0) == 1).float()):
                look()
    assert torch.equal(seen[1], 2 * seen[0])
    assert torch.equal(seen[2][..., 0], torch.full((2, 6), 2.0))
    assert not seen[2][..., 1:].any()


@pytest.mark.parametrize(("ranks", "reach"), [((4, 4, 4), ATTENTION), ((4, 2, 5), ATTENTION), ((4, 4, 4), r"to_q$")])
@torch.no_grad()
def test_the_norm_router_adds_the_same_whatever_rows_it_is_shown(ranks: tuple[int, ...], reach: str) -> None:
    """Weighed at once for all that read one tensor, at each, with LoRAs left out or of another role, and soft."""
    pipe = in_dtype(torch.float64)
    loras = {
        name: random_lora(pipe.components, rank=rank, seed=seed, targets=(attention, FEED_FORWARD, CONVOLUTIONS))
        for seed, (name, rank, attention) in enumerate(zip(NAMES, ranks, (ATTENTION, reach, ATTENTION), strict=True))
    }
    pipe.load_loras(loras, roles={NAMES[2]: "style"})
    components = dict(pipe.components)
    base = run_unet(components)
    for temperature, half in itertools.product((0.0, 0.3), (False, True)):
        for choice in (NAMES, {NAMES[0]: 0.5, NAMES[1]: 2.0, NAMES[2]: 1.0}, NAMES[:2]):
            drawn = {}
            for orthonormal in (False, True):
                pipe.set_composition(Asked(orthonormal, temperature, half))
                with pipe.composing(choice):
                    drawn[orthonormal] = run_unet(components)
            torch.testing.assert_close(drawn[True], drawn[False], atol=1e-5, rtol=1e-5)
            assert (drawn[True] - base).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["attn1.to_out.0", "attn1.to_q"])
def test_gradients_go_through_the_soft_norm_router_and_not_through_who_wins(name: str, dtype: Any) -> None:
    pipe = in_dtype(dtype)
    pipe.load_loras({name: random_lora(pipe.components, rank=4, seed=seed) for seed, name in enumerate(NAMES)})
    site = next(s for s in pipe.experts.sites.values() if s.module_name.endswith(name)).only(None, orthonormal=True)
    x = torch.randn(2, 6, *site.stack.input_shape, dtype=dtype, requires_grad=True)
    with pipe.composing():
        run = pipe.experts.run("unet")
        hard, soft = (
            NormRouter(temperature).weigh(site, site.group.project(site, x, site.module(x)), run)
            for temperature in (0.0, 0.5)
        )
    assert not hard.requires_grad
    (found,) = torch.autograd.grad(soft[..., 0].sum(), x)
    moved = torch.zeros_like(x)
    moved[0, 2, 1] = 1e-2
    with torch.no_grad(), pipe.composing():
        run = pipe.experts.run("unet")
        further, back = (
            NormRouter(0.5).weigh(site, site.group.project(site, y, site.module(y)), run)[..., 0].sum()
            for y in (x + moved, x - moved)
        )
    assert float((further - back) / 2e-2) == pytest.approx(float(found[0, 2, 1]), rel=0.05, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_the_norm_router_makes_one_product_for_all_that_read_one_tensor_and_none_of_copies(dtype: Any) -> None:
    pipe = in_dtype(dtype)
    reach = dict(zip(NAMES, (ATTENTION, FEED_FORWARD, FEED_FORWARD), strict=True))
    components = dict(pipe.components)
    pipe.load_loras({name: random_lora(components, rank=4, seed=len(to), targets=(to,)) for name, to in reach.items()})
    for chosen in (NAMES, NAMES[:2], NAMES[1:]):  # of the last, all that a feed-forward has
        counts = {}
        for method in ("linear", "norm_router"):
            pipe.set_composition(method)
            with pipe.composing(chosen):
                run_unet(components)
                with Counted() as counted:
                    run_unet(components)
            counts[method] = counted.count
        # Where two of all three are, their weights stand in columns of all three: a product of (2, 3).
        feed_forward = [site for site in pipe.experts.sites.values() if ".ff." in site.name]
        of_two = feed_forward if NAMES[2] in chosen else []
        kept = {NAMES.index(name) for name in chosen}
        groups = {site.group for site in pipe.experts.sites.values() if kept & set(site.stack.indices)}
        of_sizes = groups if dtype == torch.float32 else ()
        assert counts["norm_router"] == counts["linear"] + len(of_two) + len(of_sizes), chosen
    assert Budget(NormRouter()).orthonormal


@torch.no_grad()
def test_the_norm_router_has_loras_in_memory_once_as_a_sum_has() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pipe = in_dtype(dtype)
        pipe.load_loras({name: random_lora(pipe.components, rank=4, seed=seed) for seed, name in enumerate(NAMES)})
        made = {}
        for method in ("norm_router", "linear"):
            pipe.set_composition(method)
            with pipe.composing():
                run_unet(dict(pipe.components))
            sites = [site.only(None, method == "norm_router") for site in pipe.experts.sites.values()]
            made[method] = {tensor.data_ptr(): tensor.nbytes for site in sites for tensor in site.group.ready}
            if method == "norm_router" and dtype == torch.bfloat16:  # nothing that only a sum needs
                assert not any(site.group.ready for site in pipe.experts.sites.values())
        assert sum(made["norm_router"].values()) == sum(made["linear"].values()) > 0
        assert (made["norm_router"] == made["linear"]) == (dtype == torch.float32)
    site = next(site for site in pipe.experts.sites.values() if not site.group.several)
    site.move_to(site.module.float())
    assert site.only(None, orthonormal=True) is site


@torch.no_grad()
def test_of_two_loras_that_are_equally_large_the_first_has_the_token() -> None:
    other = composing_pipeline()
    cat = lora_states(other)["cat"]
    louder = {key: 3 * tensor if "lora_A" in key else tensor for key, tensor in cat.items()}  # equal but for rounding
    assert any((louder[key] != cat[key]).any() for key in cat)
    other.load_loras({"first": cat, "second": louder}, triggers={"first": "cat", "second": "dog"})
    site = next(s for s in other.experts.sites.values() if s.module_name.endswith("attn1.to_out.0"))
    x = torch.randn(2, 60, site.stack.down.shape[1])
    with other.composing():
        run = other.experts.run("unet")
        weights = NormRouter().weigh(site, site.group.project(site, x, site.module(x)), run)
    assert weights.unique(dim=1).tolist() == [[[1.0, 0.0]]] * 2
    site = next(s for s in other.experts.sites.values() if s.module_name.endswith("attn2.to_k"))
    x = torch.randn(2, 60, site.stack.down.shape[1])
    there = torch.tensor([[True] * 60, [True] * 40 + [False] * 20])  # a prompt and what fills it up
    with other.composing():
        run = other.experts.run("unet")
        filled = dataclasses.replace(run, told=dataclasses.replace(run.told, words=there))
        weights = NormRouter().weigh(site, site.group.project(site, x, site.module(x)), filled)
    assert weights.unique(dim=1).tolist() == [[[1.0, 0.0]]] * 2


@torch.no_grad()
def test_the_norm_router_shares_tokens_to_which_nobody_gives_anything(pipe: Any) -> None:
    for name in ("attn1.to_out.0", "attn2.to_k"):
        site = next(s for s in pipe.experts.sites.values() if s.module_name.endswith(name))
        x = torch.zeros(2, 6, site.stack.down.shape[1])
        with pipe.composing():
            run = pipe.experts.run("unet")
            weights = NormRouter(temperature=0.5).weigh(site, site.group.project(site, x, site.module(x)), run)
        torch.testing.assert_close(weights, torch.full((2, 6, 3), 1 / 3))


@torch.no_grad()
def test_the_norm_router_works_out_a_prompt_once_and_anew_for_another(pipe: Any) -> None:
    method = NormRouter()
    site = next(s for s in pipe.experts.sites.values() if s.module_name.endswith("attn2.to_k"))
    x = torch.randn(2, 6, site.stack.down.shape[1])

    def weights(run: Any) -> torch.Tensor:
        return method.weigh(site, site.group.project(site, x, site.module(x)), run)

    with pipe.composing():
        first = weights(pipe.experts.run("unet"))
        assert weights(pipe.experts.run("unet")) is first
        x.neg_()[:, 0] += 5.0
        changed = weights(pipe.experts.run("unet"))
        times, x = x._version, x.flip(1)
        for _ in range(times):  # changed as often as the other was
            x.mul_(1)
        other = weights(pipe.experts.run("unet"))
        with pipe.experts.using(keep=torch.tensor([0, 1, 0])):
            alone = weights(pipe.experts.run("unet"))
    assert not torch.equal(changed, first)
    assert torch.equal(other, changed.flip(1))
    assert torch.equal(alone, torch.tensor([0.0, 1.0, 0.0]).expand(2, 6, 3))


@torch.no_grad()
def test_styles_and_loras_left_out_compete_for_no_token(pipe: Any) -> None:
    other = composing_pipeline()
    other.load_loras(lora_states(other), roles={"dog": "style"})
    site = next(s for s in other.experts.sites.values() if s.module_name.endswith("attn1.to_out.0"))
    x = torch.randn(2, 6, site.stack.down.shape[1])
    for temperature in (-1.0, float("nan"), 1e-300, 1e300):  # by the third, quotients are infinite and weights nothing
        with pytest.raises(MoLEError, match="`temperature` must be 0"):
            NormRouter(temperature)
    for temperature in (0.0, 0.5):
        with other.composing({"cat": 0.5, "dog": 2.0}):
            run = other.experts.run("unet")
            weights = NormRouter(temperature).weigh(site, site.group.project(site, x, site.module(x)), run)
        torch.testing.assert_close(weights, torch.tensor([0.5, 2.0, 0.0]).expand(2, 6, 3))
    with other.composing(["dog"]):
        run = other.experts.run("unet")
        weights = NormRouter().weigh(site, site.group.project(site, x, site.module(x)), run)
    assert weights[0].tolist() == [[0.0, 1.0, 0.0]] * 6
