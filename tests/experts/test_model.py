"""Experts on a tiny Stable Diffusion: what they add, and what they leave behind."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch import nn

from mole_diffusion.experts import AttachError, Experts, MoLEAttnProcessor
from mole_diffusion.lora import LoRA
from tests.merging import merge
from tests.running import in_float64, make_lora, models, run_text, run_unet, unet_inputs
from tests.tiny import ATTENTION, FEED_FORWARD, tiny_components
from tests.weighing import Numbers


@pytest.fixture(scope="module")
def loras() -> list[LoRA]:
    """Mixed ranks; the second touches neither convolutions nor the text encoder."""
    components = tiny_components()
    return [
        make_lora(components, "cat", 1, rank=4),
        make_lora(components, "boot", 2, rank=7, targets=(ATTENTION, FEED_FORWARD)),
        make_lora(components, "mug", 3, rank=2),
    ]


@pytest.fixture
def experts(components: dict[str, Any], loras: list[LoRA]) -> Experts:
    experts = Experts(loras)
    experts.attach(models(components))
    return experts


@torch.no_grad()
@pytest.mark.parametrize("engine", ["auto", "hooks"])
def test_one_lora_equals_that_lora_merged(components: dict[str, Any], loras: list[LoRA], engine: Any) -> None:
    merged = tiny_components()
    merge(merged, loras[0])
    experts = Experts(loras[:1])
    experts.attach(models(components), engine)
    experts.weigher = Numbers(torch.ones(1))
    base = run_unet(tiny_components())
    torch.testing.assert_close(run_unet(components), run_unet(merged), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run_text(components), run_text(merged), atol=1e-5, rtol=1e-5)
    assert (run_unet(components) - base).abs().max() > 0.01  # the LoRA is not too small to be seen


@torch.no_grad()
def test_several_loras_equal_their_weighted_sum(
    components: dict[str, Any], experts: Experts, loras: list[LoRA]
) -> None:
    merged = tiny_components()
    for lora, weight in zip(loras, (0.5, -0.25, 2.0), strict=True):
        merge(merged, lora, weight)
    experts.weigher = Numbers(torch.tensor([0.5, -0.25, 2.0]))
    torch.testing.assert_close(run_unet(components), run_unet(merged), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(run_text(components), run_text(merged), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_engines_agree_bit_for_bit(components: dict[str, Any], loras: list[LoRA]) -> None:
    outputs = []
    for engine in ("hooks", "processors"):
        experts = Experts(loras)
        experts.attach(models(components), engine)  # type: ignore[arg-type]
        ours = [type(p) is MoLEAttnProcessor for p in components["unet"].attn_processors.values()]
        assert all(ours) if engine == "processors" else not any(ours)
        experts.weigher = Numbers(torch.tensor([0.3, 0.3, 0.4]))
        outputs.append(run_unet(components))
        experts.detach()
    assert torch.equal(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["auto", "hooks"])
def test_no_weigher_and_nothing_kept_are_the_base_bit_for_bit(
    components: dict[str, Any], loras: list[LoRA], engine: Any
) -> None:
    base_unet, base_text = run_unet(components), run_text(components)
    experts = Experts(loras)
    experts.attach(models(components), engine)
    assert torch.equal(run_unet(components), base_unet)
    experts.weigher = Numbers(torch.ones(3))
    with experts.using(keep=torch.zeros(3)):
        assert torch.equal(run_unet(components), base_unet)
        assert torch.equal(run_text(components), base_text)
    with experts.using(scale=torch.zeros(3)):
        assert torch.equal(run_unet(components), base_unet)
        assert experts.run("unet").active is False  # left out, not multiplied by zero
    assert not torch.equal(run_unet(components), base_unet)
    experts.weigher = None
    assert torch.equal(run_unet(components), base_unet)


@torch.no_grad()
def test_a_masked_lora_equals_its_absence(components: dict[str, Any], experts: Experts, loras: list[LoRA]) -> None:
    in_float64(components)
    experts.weigher = Numbers(torch.ones(3), renormalize=True)
    with experts.using(keep=torch.tensor([1, 0, 1])):
        masked = run_unet(components)
    experts.detach()
    two = Experts([loras[0], loras[2]])
    two.attach(models(components))
    two.weigher = Numbers(torch.ones(2), renormalize=True)
    torch.testing.assert_close(masked, run_unet(components), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_rows_of_keep_and_scale_equal_separate_runs(components: dict[str, Any], experts: Experts) -> None:
    experts.weigher = Numbers(torch.ones(3), renormalize=True)
    keep, scale = torch.tensor([[1, 1, 0], [0, 1, 1]]), torch.tensor([[1.0, 0.5, 1.0], [1.0, 1.0, 0.2]])
    with experts.using(keep=keep, scale=scale):
        together = run_unet(components)
    for row in range(2):
        with experts.using(keep=keep[row], scale=scale[row]):
            torch.testing.assert_close(together[row], run_unet(components)[row], atol=1e-5, rtol=1e-4)


def test_using_nests_restores_and_survives_exceptions(experts: Experts) -> None:
    with experts.using(keep=torch.tensor([1, 1, 0])):
        with experts.using(scale=torch.tensor([2.0, 1.0, 1.0])):
            assert experts.keep.tolist() == [[1, 1, 0]]  # what is not given stays
        with pytest.raises(RuntimeError), experts.using(scale=torch.tensor([2.0, 1.0, 1.0])):
            raise RuntimeError
        assert experts.scale.tolist() == [[1, 1, 1]]
    assert experts.keep.tolist() == [[1, 1, 1]]


@torch.no_grad()
@pytest.mark.parametrize("engine", ["auto", "hooks"])
def test_detach_gives_the_model_back(components: dict[str, Any], loras: list[LoRA], engine: Any) -> None:
    unet, text_encoder = components["unet"], components["text_encoder"]
    processors, before = unet.attn_processors, (run_unet(components), run_text(components))
    keys = list(unet.state_dict())
    experts = Experts(loras)
    experts.attach(models(components), engine)
    assert list(unet.state_dict()) == keys
    experts.weigher = Numbers(torch.ones(3))
    run_unet(components)
    experts.detach()
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in (unet, text_encoder) for m in model.modules())
    assert torch.equal(run_unet(components), before[0])
    assert torch.equal(run_text(components), before[1])


@torch.no_grad()
def test_a_processor_set_afterwards_is_still_weighed(components: dict[str, Any], experts: Experts) -> None:
    unet = components["unet"]
    experts.weigher = Numbers(torch.ones(3))
    expected = run_unet(components)
    ours = unet.attn_processors
    unet.set_attention_slice(1)
    torch.testing.assert_close(run_unet(components), expected, atol=1e-5, rtol=1e-4)
    # As loading an IP-Adapter does: self-attention processors are made anew from their class, without arguments.
    unet.set_attn_processor({name: type(processor)() for name, processor in ours.items()})
    torch.testing.assert_close(run_unet(components), expected, atol=1e-6, rtol=1e-5)
    unet.set_attn_processor(ours)  # and back: not counted twice
    assert torch.equal(run_unet(components), expected)
    unet.set_attention_slice(1)
    sliced = unet.attn_processors
    experts.detach()
    assert all(unet.attn_processors[name] is processor for name, processor in sliced.items())  # theirs stay


def test_fused_projections_are_set_aside_and_come_back(
    components: dict[str, Any], loras: list[LoRA], experts: Experts
) -> None:
    unet = components["unet"]
    experts.weigher = Numbers(torch.ones(3))
    expected = run_unet(components)
    unet.fuse_qkv_projections()  # after attaching
    torch.testing.assert_close(run_unet(components), expected)
    experts.detach()
    assert all(type(p) is FusedAttnProcessor2_0 for p in unet.attn_processors.values())
    again = Experts(loras)
    again.attach(models(components))  # before
    again.weigher = Numbers(torch.ones(3))
    torch.testing.assert_close(run_unet(components), expected)
    unet.unfuse_qkv_projections()
    torch.testing.assert_close(run_unet(components), expected)


def test_processors_of_ours_that_somebody_kept_are_stock_ones_afterwards(
    components: dict[str, Any], loras: list[LoRA], experts: Experts
) -> None:
    unet = components["unet"]
    experts.weigher = Numbers(torch.ones(3))
    run_unet(components)
    kept = unet.attn_processors
    experts.detach()
    base = run_unet(components)
    unet.set_attn_processor(kept)
    assert torch.equal(run_unet(components), base)


@torch.no_grad()
def test_diffusers_may_set_its_default_processors(components: dict[str, Any], experts: Experts) -> None:
    experts.weigher = Numbers(torch.ones(3))
    expected = run_unet(components)
    components["unet"].set_default_attn_processor()
    torch.testing.assert_close(run_unet(components), expected)


@torch.no_grad()
def test_experts_follow_modules_that_are_exchanged(components: dict[str, Any], experts: Experts) -> None:
    unet = components["unet"]
    experts.weigher = Numbers(torch.ones(3))
    expected = run_unet(components)
    for name in ("mid_block.attentions.0.transformer_blocks.0.ff.net.2", "conv_out"):
        parent, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(parent), leaf, copy.deepcopy(bare(unet.get_submodule(name))))
    assert torch.equal(run_unet(components), expected)
    unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2] = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"ff\.net\.2 map .* They were trained for another base model"):
        run_unet(components)


@torch.no_grad()
def test_a_block_that_is_exchanged_is_missed(components: dict[str, Any], experts: Experts) -> None:
    unet = components["unet"]
    experts.weigher = Numbers(torch.ones(3))
    expected = run_unet(components)
    block = unet.mid_block
    unet.mid_block = tiny_components(seed=1)["unet"].mid_block
    with pytest.raises(AttachError, match=r"unet\.mid_block, in which LoRAs act, was exchanged after they were loaded"):
        run_unet(components)
    unet.mid_block = block
    assert torch.equal(run_unet(components), expected)


def bare(module: nn.Module) -> nn.Module:
    """A module like it, without hooks."""
    module._forward_hooks.clear()
    return module


@torch.no_grad()
def test_padding_that_changed_since_is_noticed(components: dict[str, Any], experts: Experts) -> None:
    experts.weigher = Numbers(torch.ones(3))
    components["unet"].mid_block.resnets[0].conv1.padding_mode = "circular"
    with pytest.raises(ValueError, match=r"conv1 pads with padding_mode='circular' now"):
        run_unet(components)
    components["unet"].mid_block.resnets[0].conv1.padding_mode = "zeros"
    assert run_unet(components).isfinite().all()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_model_with_experts_is_not_copied_as_a_whole(
    components: dict[str, Any], experts: Experts, how: str, tmp_path: Path
) -> None:
    unet = components["unet"]
    ways: dict[str, Any] = {
        "deepcopy": copy.deepcopy,
        "pickle": pickle.dumps,
        "save": lambda model: torch.save(model, tmp_path / "unet.pt"),
    }
    with pytest.raises(AttachError, match=r"cannot be copied, pickled or saved as a whole\. Call `pipe.unload_loras"):
        ways[how](unet)
    state = unet.state_dict()
    assert not any("lora" in key for key in state)
    experts.detach()
    ways[how](unet)


def test_compiled_models_are_refused(
    components: dict[str, Any], loras: list[LoRA], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # marks the module without seconds of compiling
    components["unet"].mid_block.compile()
    with pytest.raises(AttachError, match=r"unet\.mid_block is compiled.*before `torch.compile`"):
        Experts(loras).attach(models(components))
    assert not any(module._forward_hooks for module in components["text_encoder"].modules())


@torch.no_grad()
def test_modules_that_do_not_fire_are_named(components: dict[str, Any], experts: Experts) -> None:
    feed_forward = components["unet"].mid_block.attentions[0].transformer_blocks[0].ff
    feed_forward.forward = lambda hidden_states, *_, **__: hidden_states
    with pytest.raises(AttachError, match=r"2 of \d+ adapted modules of unet.*mid_block\S*ff\.net\.0\.proj"):
        run_unet(components)
    del feed_forward.forward
    run_unet(components)


def test_a_copy_with_experts_is_refused(components: dict[str, Any], experts: Experts) -> None:
    with pytest.raises(AttachError, match="detach"):
        copy.deepcopy(components["unet"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_model(components: dict[str, Any], experts: Experts, dtype: torch.dtype) -> None:
    experts.weigher = Numbers(torch.tensor([0.3, 0.3, 0.4]))
    expected = run_unet(components)
    components["unet"].to(dtype)
    inputs = unet_inputs(dtype=dtype)
    output = components["unet"](**inputs).sample
    assert output.dtype == dtype
    assert (output.float() - expected).norm() / expected.norm() < 0.05
    experts.weigher = None
    base = components["unet"](**inputs).sample
    assert (output - base).norm() / expected.norm() > 0.2


@pytest.mark.parametrize("engine", ["auto", "hooks"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(
    components: dict[str, Any], loras: list[LoRA], engine: Any, reentrant: bool
) -> None:
    experts = Experts(loras)
    experts.attach(models(components), engine)
    unet = components["unet"].requires_grad_(False).train()
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            unet.enable_gradient_checkpointing(
                lambda module, *args: torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=reentrant)
            )
        values = torch.tensor([0.3, 0.3, 0.4], requires_grad=True)
        experts.weigher = Numbers(values)
        sample = unet_inputs()["sample"].requires_grad_()
        with experts.using(scale=torch.tensor([1.0, 2.0, 1.0])):
            output = run_unet(components, sample=sample)
        output.square().mean().backward()  # recomputes outside `using`
        results.append((output.detach(), sample.grad, values.grad))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-7, rtol=1e-5)
    assert results[0][2].abs().min() > 0


def test_gradients_reach_the_weights_and_nothing_frozen(components: dict[str, Any], experts: Experts) -> None:
    components["unet"].requires_grad_(False)
    values = torch.ones(3, requires_grad=True)
    experts.weigher = Numbers(values)
    run_unet(components).sum().backward()
    assert values.grad is not None
    assert values.grad.abs().min() > 0
    assert not any(site.stack.up.requires_grad or site.stack.down.requires_grad for site in experts.sites.values())


@torch.no_grad()
def test_context_brings_what_the_denoiser_was_told(components: dict[str, Any], experts: Experts) -> None:
    assert experts.context is None
    run_text(components)
    assert experts.context is None
    inputs = unet_inputs()
    components["unet"](inputs["sample"], 123, encoder_hidden_states=inputs["encoder_hidden_states"])
    context = experts.context
    assert context is not None
    assert context.timestep == 123
    assert context.encoder_hidden_states is inputs["encoder_hidden_states"]
    assert context.sample_size == (16, 16)


def test_bad_calls_say_what_is_wrong(components: dict[str, Any], loras: list[LoRA], experts: Experts) -> None:
    with pytest.raises(ValueError, match="at least one LoRA"):
        Experts([])
    with pytest.raises(ValueError, match=r"\['cat'\] come more than once"):
        Experts([loras[0], loras[0]])
    with pytest.raises(ValueError, match="attached already"):
        experts.attach(models(components))
    with pytest.raises(ValueError, match="must be one of"):
        Experts(loras).attach(models(components), "magic")  # type: ignore[arg-type]
    with pytest.raises(AttachError, match=r"touch \['text_encoder'\]"):
        Experts(loras).attach({"unet": components["unet"]})
    with pytest.raises(AttachError, match="not in this unet"):
        Experts(loras).attach({**models(components), "unet": components["vae"]})
    with pytest.raises(ValueError, match="0 and 1 only"), experts.using(keep=torch.tensor([0.5, 1, 1])):
        pass
    with pytest.raises(ValueError, match=r"shape \(3,\)"), experts.using(scale=torch.ones(2)):
        pass
    with pytest.raises(TypeError, match="method `weigh"):
        experts.weigher = 0.5  # type: ignore[assignment]
    experts.weigher = Numbers(torch.ones(3))
    with pytest.raises(ValueError, match="runs a batch of 2"), experts.using(keep=torch.ones(3, 3)):
        run_unet(components)


def test_report_counts_modules(experts: Experts) -> None:
    lines = experts.report().splitlines()
    assert lines[0].startswith("cat   rank 4: ")
    assert "12 modules of text_encoder" in lines[0]
    assert "text_encoder" not in lines[1]
    assert experts.matches()["boot"] == {"unet": len(experts.loras[1].factors["unet"])}
