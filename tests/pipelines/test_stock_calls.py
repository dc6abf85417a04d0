"""diffusers' own calls about adapters do for our LoRAs what their names say, or name them."""

from __future__ import annotations

from typing import Any

import diffusers.loaders
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from transformers.integrations import PeftAdapterMixin

from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import AttachError
from tests.composing import assert_close, composing_pipeline, draw, lora_states
from tests.tiny import ATTENTION, random_lora, tiny_components

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
OURS = r"adapters of `load_lora_weights`, and the LoRAs cat were loaded by `load_loras`: "
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def test_calls_of_diffusers_do_for_ours_what_their_names_say() -> None:
    pipe, base = composing_pipeline("cat", "dog"), draw(composing_pipeline())
    drawn = draw(pipe)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), base)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), drawn)
    pipe.delete_adapters("dog")
    assert pipe.experts.names == ("cat",)
    pipe.unload_lora_weights()
    assert pipe.experts is None
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("unfuse_lora", []),
        ("set_adapters", [["cat"], [0.3]]),
        ("set_adapters", [[]]),
        ("set_adapters", ["of nobody"]),
        ("delete_adapters", ["of nobody"]),
        ("set_lora_device", [["cat"], "cpu"]),
        ("set_lora_device", ["cat", "cpu"]),
        ("enable_lora_hotswap", []),
    ],
)
def test_calls_that_cannot_mean_ours_name_them(call: str, arguments: list[Any]) -> None:
    pipe = composing_pipeline("cat")
    with pytest.raises(ValueError, match=OURS):
        getattr(pipe, call)(*arguments)


ARGUMENTS: dict[str, list[Any]] = {
    "set_adapters": [["cat"]],
    "set_adapter": ["cat"],
    "delete_adapters": [["cat"]],
    "delete_adapter": ["cat"],
    "save_lora_adapter": ["folder"],
    "load_lora_adapter": [{}, "unet", False],
    "load_adapter": ["folder", "cat"],
    "add_adapter": [LoraConfig(target_modules=["to_q"]), "cat"],
}


def calls_of_models() -> list[tuple[str, str]]:
    """Every call about adapters that a UNet and a text encoder inherit, but the one that lists them."""
    found = []
    for component, mixin in (("unet", diffusers.loaders.PeftAdapterMixin), ("text_encoder", PeftAdapterMixin)):
        names = [name for name, value in vars(mixin).items() if callable(value) and not name.startswith("_")]
        found += [(component, name) for name in names if name != "active_adapters"]
    return found


@pytest.mark.parametrize(("component", "call"), calls_of_models())
def test_calls_of_models_about_adapters_name_ours_and_change_nothing(component: str, call: str) -> None:
    pipe = composing_pipeline("cat")
    drawn = draw(pipe)
    named = {"adapter_name": "cat"} if call == "load_lora_adapter" else {}
    with pytest.raises(ValueError, match=OURS):
        getattr(getattr(pipe, component), call)(*ARGUMENTS.get(call, []), **named)
    assert torch.equal(draw(pipe), drawn)
    assert getattr(pipe, component).active_adapters() == ["cat"]
    pipe.unload_loras()
    assert call not in vars(getattr(pipe, component))


def test_calls_of_a_stock_pipeline_on_our_models_name_ours_too() -> None:
    pipe = composing_pipeline("cat")
    stock = StableDiffusionPipeline.from_pipe(pipe)
    for call, arguments in (("unload_lora_weights", []), ("fuse_lora", []), ("disable_lora", [])):
        with pytest.raises(ValueError, match=OURS):
            getattr(stock, call)(*arguments)
    drawn = draw(stock)
    pipe.disable_lora()
    assert torch.equal(draw(stock), draw(StableDiffusionPipeline(**tiny_components(), **NO_CHECKER)))
    with pipe.composing():
        assert torch.equal(draw(pipe), draw(pipe, loras=[]))
    pipe.enable_lora()
    assert torch.equal(draw(stock), drawn)


def test_disable_lora_is_no_more_once_the_loras_it_was_about_are_gone() -> None:
    pipe = composing_pipeline()
    pipe.disable_lora()
    pipe.load_loras({"cat": lora_states(pipe)["cat"]})
    expected = draw(composing_pipeline("cat"))
    assert torch.equal(draw(pipe), expected)
    pipe.disable_lora()
    pipe.unload_loras()
    pipe.load_loras({"cat": lora_states(pipe)["cat"]})
    assert torch.equal(draw(pipe), expected)


def test_calls_of_models_about_adapters_of_peft_go_on_beside_ours() -> None:
    pipe = composing_pipeline("cat")
    drawn = draw(pipe)
    theirs = random_lora({"unet": pipe.unet}, 3, ATTENTION, seed=8)
    pipe.unet.load_lora_adapter(dict(theirs), prefix="unet", adapter_name="theirs")
    assert pipe.unet.active_adapters() == ["theirs", "cat"]
    beside = draw(pipe)
    pipe.unet.set_adapters("theirs", 0.5)
    assert not torch.equal(draw(pipe), beside)
    for call, arguments in (("disable_lora", []), ("disable_adapters", []), ("set_adapters", [["theirs", "cat"]])):
        with pytest.raises(ValueError, match=OURS):
            getattr(pipe.unet, call)(*arguments)
    with pytest.raises(ValueError, match=OURS):
        pipe.fuse_lora(adapter_names=["theirs", "cat"])
    pipe.unet.delete_adapters("theirs")
    assert_close(draw(pipe), drawn)


def test_fused_loras_draw_as_beside_the_weights_and_leave_them_as_they_were() -> None:
    pipe = composing_pipeline("cat", "mug")
    base = draw(pipe, loras=[])
    with pytest.raises(MoLEError, match=r"cat, mug can be fused only with weights that stay the same.*none is chosen"):
        pipe.fuse_lora()
    pipe.set_composition("linear")
    beside = draw(pipe, loras={"cat": 0.5, "mug": 1.0})
    with pytest.raises(ValueError, match=r"choose and weigh them in each call"):
        pipe.fuse_lora(lora_scale=0.5)
    pipe.fuse_lora()
    assert_close(draw(pipe, loras={"cat": 0.5, "mug": 1.0}), beside)
    assert torch.equal(draw(pipe, loras=[]), base)
    with pytest.raises(
        MoLEError, match=r"cannot choose a composition whose weights change while .* fused.*unfuse_lora"
    ):
        pipe.set_composition("masks")
    with pytest.raises(MoLEError, match=r"cannot choose a composition whose weights change"):
        pipe.init_gates()
    assert pipe.gates is None
    pipe.unload_loras(["mug"])
    assert pipe.experts.merged
    alone = draw(pipe)
    pipe.unfuse_lora()
    assert not pipe.experts.merged
    assert_close(draw(pipe), alone)
    with pytest.raises(ValueError, match=OURS):
        pipe.unfuse_lora()
    pipe.unload_loras()
    assert torch.equal(draw(pipe), base)


def test_lists_of_adapters_have_ours_and_those_of_peft() -> None:
    pipe = composing_pipeline("cat", "mug")
    assert pipe.get_active_adapters() == ["cat", "mug"]
    assert pipe.get_list_adapters() == {"unet": ["cat", "mug"], "text_encoder": ["cat"]}
    theirs = random_lora({"unet": pipe.unet}, 3, ATTENTION, seed=8)
    with pytest.raises(ValueError, match=OURS):
        pipe.load_lora_weights(dict(theirs), adapter_name="cat")
    pipe.load_lora_weights(dict(theirs), adapter_name="theirs")
    assert pipe.get_active_adapters() == ["cat", "mug", "theirs"]
    assert pipe.get_list_adapters() == {"unet": ["theirs", "cat", "mug"], "text_encoder": ["cat"]}
    pipe.set_adapters("theirs", 0.5)  # looks into these lists
    pipe.disable_lora()
    assert pipe.get_active_adapters() == []
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {"unet": ["cat", "mug"], "text_encoder": ["cat"]}


def test_beside_adapters_of_peft() -> None:
    base = composing_pipeline()
    cat, theirs = lora_states(base)["cat"], random_lora({"unet": base.unet}, 3, ATTENTION, seed=8)
    pipe = composing_pipeline()
    pipe.load_lora_weights(dict(theirs), adapter_name="theirs")
    with pytest.raises(AttachError, match=r"carries a PEFT adapter \(theirs, at .*load_lora_weights.*fuse_lora"):
        pipe.load_loras({"cat": cat})
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.load_loras({"cat": cat})

    both = composing_pipeline()
    both.load_loras({"cat": cat, "theirs": theirs})
    both.set_composition("linear")
    assert_close(draw(pipe), draw(both), atol=2e-4)

    ours = composing_pipeline("cat")
    alone = draw(ours)
    ours.load_lora_weights(dict(theirs), adapter_name="theirs")
    assert_close(draw(ours), draw(both), atol=2e-4)
    with pytest.raises(ValueError, match=r"`loras=\[\]` is the bare base model, and the adapters theirs of"):
        draw(ours, loras=[])
    ours.unload_lora_weights()  # diffusers puts new modules in the place of those our hooks were on
    assert_close(draw(ours), alone)
    ours.unload_loras()
    assert_close(draw(ours), draw(composing_pipeline()))
