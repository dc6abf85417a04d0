"""`mole speed`: its counts against what is known, and the command from end to end on a model that takes no time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from mole_diffusion.cli import app
from mole_diffusion.composition import COMPOSITIONS
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Experts
from mole_diffusion.experts.forward_passes import ForwardPasses
from mole_diffusion.gating import MoLEModel
from mole_diffusion.speed import SIDES, SIZES, Counted, Speed, SpeedConfig, measure_speed, speed_page
from mole_diffusion.speed import count as count_module
from mole_diffusion.speed.clocks import in_turn, timed
from mole_diffusion.speed.config import WHOLE, Side
from mole_diffusion.speed.count import Alive, FusedAttention, count_base
from mole_diffusion.speed.inside import watched
from mole_diffusion.speed.limits import with_gates, with_products, with_router
from mole_diffusion.speed.measure import SideCost
from mole_diffusion.speed.models import make_inputs, make_loras, make_model, merged, twin
from mole_diffusion.speed.page import saved_table, walk_table
from mole_diffusion.speed.pipeline import pipeline_costs
from mole_diffusion.speed.ratio import Ratio
from mole_diffusion.speed.train import saved_activations, walk_operations
from mole_diffusion.training import GateTrainingConfig
from tests.command import mole

TINY = SpeedConfig(size="tiny", loras=(2,), rounds=1, rank=2, train=True)


def test_sides_come_in_another_order_in_every_round_and_in_the_same_orders_every_time() -> None:
    rounds = list(in_turn(["bare", "sum", "gates"], 30))
    assert [turn for turn, _ in rounds] == list(range(30))
    assert all(sorted(order) == ["bare", "gates", "sum"] for _, order in rounds)
    assert len({tuple(order) for _, order in rounds}) == 6
    assert rounds == list(in_turn(["bare", "sum", "gates"], 30))


@torch.no_grad()
def test_real_sizes_are_of_half_precision_on_a_gpu_and_not_on_a_processor() -> None:
    for device, precision in (("cuda", "bfloat16"), ("cpu", "float32")):
        assert SpeedConfig(size="sd15", device=device).precision == precision
    assert SpeedConfig(size="sd15", dtype="bfloat16").precision == "bfloat16"
    assert SpeedConfig(size="142m", device="cuda").precision == "float32"


def test_operations_and_bytes_of_one_layer() -> None:
    layer, x = nn.Linear(6, 7), torch.randn(5, 6)
    with Counted() as counted:
        layer(x)
    assert counted.operations == 2 * 5 * 6 * 7
    assert counted.bytes == 4 * (7 + 5 * 6 + 6 * 7 + 5 * 7)  # bias, input, weight, output
    assert dict(counted.products) == {((5, 6), (6, 7)): 1}
    conv, picture = nn.Conv2d(3, 4, 3, bias=False), torch.randn(2, 3, 6, 5)
    with Counted() as counted:
        conv(picture)
    assert counted.operations == 2 * 2 * 4 * (4 * 3) * (3 * 3 * 3)
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with Counted() as counted:
        nn.functional.scaled_dot_product_attention(query, key, key)
    assert counted.operations == 2 * (2 * 3 * 5 * 7 * 8) * 2


def test_operations_of_backward_passes() -> None:
    conv, picture = nn.Conv2d(3, 4, 3, bias=False).requires_grad_(False), torch.randn(2, 3, 6, 5, requires_grad=True)
    output = conv(picture)
    with Counted() as counted:
        output.sum().backward()
    assert counted.operations == 2 * 2 * 4 * (4 * 3) * (3 * 3 * 3)  # as many as forward: no gradient of the weight
    query, key = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 7, 8, requires_grad=True)
    attended = nn.functional.scaled_dot_product_attention(query, key, key)
    with Counted() as counted:
        attended.sum().backward()
    assert counted.operations == 5 * 2 * (2 * 3 * 5 * 7 * 8)


def test_a_walk_is_little_more_than_that_of_the_bare_model() -> None:
    counts = walk_operations(SpeedConfig(size="toybox", loras=(3,)), 3)
    bare, gates = counts["bare"], counts["gates"]
    assert bare.forward == 1
    assert 1.9 < bare.backward < 2.6  # frozen weights ask for no gradient of their own
    assert bare.walk == 3.5 + bare.backward
    assert bare.walk < gates.walk < 1.25 * bare.walk
    assert "| toybox | gates | 1." in walk_table({"toybox": counts})


def test_a_table_of_a_tiny_model() -> None:
    told: list[str] = []
    speed = measure_speed(TINY, told.append)
    rows = {row.side: row for row in speed.rows}
    assert set(rows) == set(SIDES)
    assert rows["bare"].processor.middle == rows["bare"].operations == 1.0
    for side in ("empty", "merged"):  # not one product more than the base
        assert rows[side].products == rows["bare"].products
        assert rows[side].operations == 1.0
    # Two low-rank products a module and LoRA with peft, two a module with us, and less for queries, keys and values.
    assert rows["peft"].products - rows["bare"].products == 2 * 2 * speed.sites
    assert rows["sum"].products - rows["bare"].products < 2 * speed.sites
    assert rows["sum"].operations == pytest.approx(rows["peft"].operations, rel=1e-9)
    assert rows["masks"].products >= rows["sum"].products  # every LoRA has joined in
    assert rows["joined"].products < rows["products"].products
    assert rows["products"].products >= rows["sum"].products  # of queries, keys and values we make one
    assert rows["products"].operations == rows["joined"].operations == rows["sum"].operations
    assert rows["gates"].operations < 1.2 * rows["sum"].operations
    assert rows["gated"].operations == pytest.approx(rows["gates"].operations, rel=1e-9)
    assert rows["products"].operators < rows["gated"].operators
    assert rows["routed"].operations == pytest.approx(rows["norm_router"].operations, rel=1e-9)
    assert rows["products"].operators < rows["routed"].operators <= rows["norm_router"].operators
    assert rows["sum"].operators < rows["gates"].operators
    assert rows["bare"].operators < rows["sum"].operators < rows["gates"].operators < rows["peft"].operators
    assert all(row.seconds > 0 and row.memory is not None for row in speed.rows)
    of_one_round = rows["peft"].processor.middle - rows["sum"].processor.middle
    assert rows["peft"].above is not None
    assert rows["peft"].above.middle == pytest.approx(of_one_round, abs=1e-9)
    (setting,) = speed.settings
    assert setting.load > 0
    steps = {step.name: step for step in speed.training}
    assert steps["gates"].saved < 1.6 * steps["bare"].saved  # a tiny model: its factors' share is large
    assert steps["gates, checkpointed"].saved < steps["gates"].saved
    assert any("round 1 of 1" in text for text in told)


def test_a_page_says_what_did_not_compile_and_what_training_keeps() -> None:
    config = SpeedConfig(size="tiny", compiled="whole")
    speed = Speed(config, "CPU", 10, 3, not_compiled="InductorError: no C++ compiler")
    kept = {"142m": {"bare": 646.2, "gates": 712.0}, "sd15": {"bare": 7069.0, "gates": 7620.4}}
    page = speed_page([speed], "mole speed", saved_table(kept))
    assert "for torch did not compile it: InductorError: no C++ compiler" in page
    assert "| size | bare | gates |" in page
    assert "| sd15 | 7069 | 7620 |" in page


def test_a_table_of_a_gpu_says_when_it_waits_for_the_processor() -> None:
    same = Ratio(1.0, 1.0, 1.0)
    row = SideCost("sum", 3, 0.0125, Ratio(1.4, 1.5, 1.6), same, 1.1, 1.2, 10, 20, 5.0, same, busy=0.009)
    masks = dataclasses.replace(row, side="masks", above=Ratio.above([3.0, 5.0, 4.5], [2.0, 5.0, 2.0], [1.0, 4.0, 5.0]))
    speed = Speed(SpeedConfig(device="cuda", compiled="blocks"), "some GPU", 10, 3, rows=[row, masks])
    page = speed_page([speed], "mole speed --device cuda")
    assert "some GPU, repeated blocks compiled" in page
    assert "| plain sum | 3 | 12.50 | 9.00 | 1.500 [1.400, 1.600] | 1.000 [1.000, 1.000] | – | 1.100 |" in page
    assert "| 1.000 [1.000, 1.000] | +0.500 [+0.250, +0.750] | 1.100 |" in page  # of 1, 0 and 0.5
    assert "it waits for the processor" in page
    assert "waits for the processor" not in speed_page([Speed(SpeedConfig(), "CPU", 10, 3)], "mole speed")


def test_a_side_that_raises_costs_no_other_side_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(COMPOSITIONS["budget"]):  # type: ignore[misc, name-defined]
        def weigh(self, *asked: object) -> Tensor:
            raise RuntimeError("nothing | here\nand more")

    monkeypatch.setitem(COMPOSITIONS, "budget", Broken)
    sides: tuple[Side, ...] = ("bare", "budget", "sum")
    speed = measure_speed(SpeedConfig(size="tiny", loras=(2,), rounds=1, rank=2, sides=sides))
    assert [row.side for row in speed.rows] == ["bare", "sum"]
    page = speed_page([speed], "mole speed")
    assert "| budget | 2 | RuntimeError: nothing \\| here | – |" in page
    assert "| plain sum | 2 |" in page


def test_calls_that_follow_one_another_are_timed_together() -> None:
    calls: list[int] = []
    timed(lambda: calls.append(len(calls)), "cpu", calls=5)
    assert calls == [0, 1, 2, 3, 4]


def test_the_tables_of_the_whole_page_have_what_they_compare() -> None:
    for config in WHOLE:
        assert config.sides[0] == "bare"
    assert {config.size for config in WHOLE} == {"142m", "sd15", "toybox", "tiny"}
    assert any(config.loras == (3, 32) and config.used == 3 for config in WHOLE)


def test_training_gates_keeps_hardly_more_than_the_bare_model_does() -> None:
    """At the size of Stable Diffusion 1.5, 512 pixels, three LoRAs: counted on tensors without values."""
    kept = saved_activations(SpeedConfig(size="sd15", loras=(3,)), 3)
    assert kept["gates"] < 1.1 * kept["bare"]
    assert kept["gates, checkpointed"] < 0.1 * kept["bare"]


SMALL: dict[str, dict[str, Any]] = {
    "tiny": SIZES["tiny"].settings,
    "sd3": {**SIZES["sd3"].settings, "num_layers": 2, "num_attention_heads": 1, "caption_projection_dim": 64},
    "flux": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "guidance_embeds": True},
    "z_image": {"n_layers": 1, "n_refiner_layers": 1, "dim": 256, "n_heads": 2, "n_kv_heads": 2},
}


@pytest.mark.parametrize("size", SMALL)
def test_what_is_counted_without_values_is_what_a_call_does(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(SIZES[size], settings=SMALL[size], latent=16, tokens=32, dtype="float32")
    monkeypatch.setitem(SIZES, size, small)
    count = count_base(size, loras=2, rank=4)
    sides: tuple[Side, ...] = ("bare", "sum", "gates", "masks")
    config = SpeedConfig(size=size, loras=(2,), rank=4, rounds=1, sides=sides, batch=small.rows)
    speed = measure_speed(config)
    assert not speed.failed
    assert count.parameters == speed.parameters
    for row in speed.rows:
        assert count.more[row.side] == pytest.approx(row.operations, rel=1e-9)
    assert count.more["gates"] > count.more["sum"] > 1
    assert count.peak["gates"] >= count.peak["sum"] > 0


def test_the_peak_is_of_tensors_that_are_there_at_once() -> None:
    x = torch.empty(1000, device="meta")
    with Alive() as alive:
        y = x + 1  # 4000 bytes
        z = y.view(10, 100) + 1  # and 4000 more: a view has none of its own
        del y
        z += 1
        z @ torch.empty(100, 5, device="meta")  # 2000 and 200, when 4000 are gone
    assert alive.peak == 8000
    with FusedAttention(), Alive() as alive:
        query = torch.empty(1, 2, 4096, 8, device="meta")
        assert torch.nn.functional.scaled_dot_product_attention(query, query, query).shape == query.shape
    assert alive.peak == 2 * query.numel() * 4  # no scores


def test_real_bases_are_counted_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(count_module, "BASES", {"tiny": "A tiny one"})
    done = CliRunner().invoke(app, ["speed", "--count"])
    assert "| A tiny one | 64² |" in done.output
    assert "3 LoRAs of rank 16" in done.output
    refused = CliRunner().invoke(app, ["speed", "--count", "--loras", "1,3"])
    assert refused.exit_code == 2
    assert "give --loras 3, say" in refused.output


def test_left_out_loras_cost_no_operation() -> None:
    sides: tuple[Side, ...] = ("bare", "sum", "gates", "masks")
    rows = measure_speed(SpeedConfig(size="tiny", loras=(3, 32), used=3, rounds=1, rank=2, sides=sides)).rows
    three, many = ({row.side: row for row in rows if row.loras == loaded} for loaded in (3, 32))
    assert three["sum"].operations == many["sum"].operations
    for side in ("sum", "gates", "masks"):  # what gates and masks share out, they share out among all
        assert three[side].products == many[side].products
        assert many[side].operations < 1.02 * three[side].operations
    for side in ("sum", "masks"):  # gates pick out rows of their own
        assert many[side].operators < 1.02 * three[side].operators
    assert many["sum"].bytes < 1.02 * three["sum"].bytes


def test_a_pipeline_calls_little_beside_the_stock_one() -> None:
    costs = {cost.side: cost for cost in pipeline_costs(1, lambda text: None, steps=1)}
    stock, empty, fused = costs["diffusers, no LoRA"], costs["`loras=[]`"], costs["sum, fused"]
    summed, gated = costs["plain sum"], costs["gates per token"]
    assert stock.calls < empty.calls < 1.08 * stock.calls
    assert empty.calls < summed.calls < gated.calls
    assert costs["its products alone"].calls < summed.calls
    assert costs["gates and products alone"].calls < gated.calls
    assert stock.operators < empty.operators < fused.operators < summed.operators < gated.operators
    assert empty.operators < 1.05 * stock.operators
    assert fused.operators < 1.15 * stock.operators


@torch.no_grad()
@pytest.mark.parametrize("joined", [False, True])
def test_products_alone_are_the_sum(joined: bool) -> None:
    model = make_model(TINY)
    inputs, loras = make_inputs(TINY, model), make_loras(TINY, model, 3)
    experts = Experts(loras)
    experts.attach({"unet": (ours := twin(model))})
    experts.weigher = COMPOSITIONS["linear"]()
    alone = with_products(twin(model), "unet", experts, (0, 2), joined)
    with experts.using(keep=torch.tensor([1, 0, 1])):
        torch.testing.assert_close(alone(**inputs)[0], ours(**inputs)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone(**inputs)[0], model(**inputs)[0])
    experts.detach()


@torch.no_grad()
def test_gates_and_products_alone_are_what_gates_give() -> None:
    model = make_model(TINY)
    inputs, loras = make_inputs(TINY, model), make_loras(TINY, model, 3)
    experts = Experts(loras)
    experts.attach({"unet": (ours := twin(model))})
    gates = MoLEModel.from_experts(experts, GateTrainingConfig().gates)
    for weight in gates.parameters():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) if weight.ndim else 0.2)
    experts.weigher = gates
    alone = with_gates(twin(model), "unet", experts, gates)
    torch.testing.assert_close(alone(**inputs)[0], ours(**inputs)[0], rtol=1e-5, atol=1e-5)
    experts.weigher = COMPOSITIONS["normalized"]()
    assert not torch.allclose(alone(**inputs)[0], ours(**inputs)[0], rtol=1e-3, atol=1e-3)
    experts.detach()


def test_what_calls_spend_inside_is_added_up_module_by_module() -> None:
    rounds = [{"a": 1.0, "b": 9.0}, {"a": 2.0, "b": 5.0}, {"a": 3.0, "b": 7.0}]
    assert Ratio.inside(rounds, [10.0, 30.0, 20.0]) == Ratio((1.5 + 6) / 20, (2 + 7) / 20, (2.5 + 8) / 20)


@torch.no_grad()
def test_all_modules_tell_what_they_spend_while_they_are_attached_in_the_block() -> None:
    model = make_model(TINY)
    inputs, loras = make_inputs(TINY, model), make_loras(TINY, model, 2)
    plain = ForwardPasses.add
    with watched() as spent:
        experts = Experts(loras)
        experts.attach({"unet": (ours := twin(model))})
    assert ForwardPasses.add is plain
    experts.weigher = COMPOSITIONS["linear"]()
    ours(**inputs)
    assert set(spent) == set(experts.sites)
    assert all(seconds > 0 for seconds in spent.values())
    experts.detach()


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_router_and_products_alone_are_what_the_router_gives(dtype: Literal["float32", "bfloat16"]) -> None:
    config = dataclasses.replace(TINY, dtype=dtype, targets="conv")
    model = make_model(config)
    inputs, loras = make_inputs(config, model), make_loras(config, model, 3)
    experts = Experts(loras)
    experts.attach({"unet": (ours := twin(model))})
    experts.weigher = COMPOSITIONS["norm_router"]()
    alone = with_router(twin(model), "unet", experts)
    for _ in range(2):  # the second has the weights of the prompt
        torch.testing.assert_close(alone(**inputs)[0], ours(**inputs)[0])
    experts.weigher = COMPOSITIONS["normalized"]()
    assert not torch.allclose(alone(**inputs)[0], ours(**inputs)[0], rtol=1e-3, atol=1e-3)
    experts.detach()


@torch.no_grad()
def test_a_twin_has_the_same_weights_and_a_merged_one_its_own() -> None:
    model = make_model(TINY)
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    loras = make_loras(TINY, model, 2)
    whole = merged(model, loras, "unet")
    inputs = make_inputs(TINY, model)
    assert not torch.equal(whole(**inputs)[0], model(**inputs)[0])
    assert torch.equal(other(**inputs)[0], model(**inputs)[0])
    name = next(iter(loras[0].factors["unet"]))
    change = loras[0].factors["unet"][name].delta() + loras[1].factors["unet"][name].delta()
    before = model.get_submodule(name).weight
    torch.testing.assert_close(whole.get_submodule(name).weight, before + change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "big"}, "`size` must be one of tiny"),
        ({"targets": "most"}, "`targets` must be one of"),
        ({"sides": ("fast",)}, "`sides` must be some of"),
        ({"loras": (0,)}, "at least 1"),
        ({"loras": (3, 10**23)}, "`loras` must be at least 1, and at most 1,000"),
        ({"loras": ()}, "`loras` is empty"),
        ({"rank": 10**23}, "`rank` must be at least 1, and at most 4,096"),
        ({"threads": 10**6}, "`threads` must be at least 1, and at most 1,024"),
        ({"latent": 8_000_000}, "at most 2048"),
        ({"rounds": 0}, "`rounds` must be at least 1"),
        ({"used": 4, "loras": (3, 8)}, "smallest number of LoRAs, 3"),
        ({"latent": 12}, "multiple of 8"),
        ({"walks": True, "size": "sdxl"}, "tiny and sd15"),
        ({"inside": True, "compiled": "whole"}, "not in compiled graphs"),
        ({"inside": True, "device": "cuda"}, "measured on a CPU"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(MoLEError, match=message):
        SpeedConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["meta", "xyz", "cuda:99"])
def test_a_device_that_cannot_be_is_said_before_anything_is_made(device: str) -> None:
    done = mole("speed", "--size", "tiny", "--device", device)
    assert done.exit_code == 2
    assert f"--device {device} cannot be used here" in done.output


def test_real_sizes_have_the_parameters_of_the_real_models() -> None:
    import diffusers

    for name, millions in (("142m", 142), ("sd15", 860), ("sdxl", 2567), ("sd3", 2028)):
        size = SIZES[name]
        with torch.device("meta"):
            model = getattr(diffusers, size.kind)(**size.settings)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


def test_the_command_prints_and_writes_a_page(tmp_path: Path) -> None:
    page, numbers = tmp_path / "speed.md", tmp_path / "speed.json"
    given = ["speed", "--size", "tiny", "--loras", "2", "--rounds", "1", "--rank", "2", "--sides", "bare,sum"]
    given += ["--latent", "8", "--walks", "--inside"]
    result = CliRunner().invoke(app, [*given, "--page", str(page), "--json", str(numbers)])
    assert result.exit_code == 0, result.output
    assert "| plain sum | 2 |" in result.stdout
    assert "A whole step of gate training by the preset `real`, four pictures of 16 pixels" in result.stdout
    assert "mole speed --size tiny --loras 2" in page.read_text(encoding="utf-8")
    (speed,) = json.loads(numbers.read_text(encoding="utf-8"))
    assert [row["side"] for row in speed["rows"]] == ["bare", "sum"]
    assert "*Inside* is what" in page.read_text(encoding="utf-8")
    assert speed["rows"][0]["inside"] is None
    assert 0 < speed["rows"][1]["inside"]["middle"] < speed["rows"][1]["clock"]["middle"]
    assert CliRunner().invoke(app, ["speed", "--loras", "many"]).exit_code == 2
