"""FLUX, FLUX.2, Z-Image, Krea 2 and Qwen-Image: what LoRAs add in a call of their pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from PIL import Image
from torch import Tensor, nn

import mole_diffusion
from mole_diffusion.composition import Composite, Linear, Switch
from mole_diffusion.errors import MoLEError
from mole_diffusion.families import architecture_of
from mole_diffusion.pipelines import MoLEPipelineMixin
from tests.families.transformers import CAPTIONS, FAMILIES, loaded, rows_of
from tests.merging import merge_state
from tests.tiny import random_lora
from tests.tiny.dits import MADE, denoiser_call, draw, tiny_dit


@pytest.fixture
def pipe(family: str) -> Any:
    pipe = loaded(family)
    pipe.set_composition("linear")
    return pipe


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("several", [False, True])
def test_modules_are_given_what_is_said_of_them(family: str, several: bool) -> None:
    prompt = CAPTIONS if several else CAPTIONS[0]
    model, given = denoiser_call(family, prompt=prompt, height=32, width=16)
    known = architecture_of(model)
    told = known.told(model, given)
    assert told.sample_size == (8, 4)
    assert told.joint is not None
    text, pixels = told.joint
    assert pixels.stop - pixels.start == 32
    assert told.encoder_hidden_states is not None
    assert told.encoder_hidden_states.shape[:2] == (told.rows, text.stop - text.start)
    if told.words is not None:
        assert told.words.shape == told.encoder_hidden_states.shape[:2]
        assert told.words.any(dim=1).all()
    sequence = max(text.stop, pixels.stop)
    seen: set[str] = set()

    def look(name: str, tokens: Tensor) -> None:
        lengths = known.lengths(name, told)
        assert len(tokens) == told.rows or lengths is not None, name
        count = max(lengths) if lengths is not None else tokens[0, ..., 0].numel()
        reads = known.reads(model, name)
        seen.add(reads)
        if lengths is not None:
            assert sum(lengths) == tokens[..., 0].numel()
        if reads == "vector":
            assert count == 1, name
        elif reads == "text":
            assert count % (text.stop - text.start) == 0, name
        elif reads == "both":
            assert count == sequence, name
        else:
            assert 32 <= count < sequence, name

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, args, __, name=name: look(name, args[0]))
    with torch.no_grad():
        model(**given)
    assert seen >= {"vector", "text", "pixels"}
    assert ("both" in seen) == (family != "qwen_image")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_on_every_linear_is_its_weights_merged(family: str, pipe: Any) -> None:
    bare = tiny_dit(family)
    base = draw(bare, family, CAPTIONS[:])
    merge_state(bare, random_lora({"transformer": bare.transformer}, rank=2, targets=".", seed=1))
    merged = draw(bare, family, CAPTIONS[:])
    assert (merged - base).abs().max() > 0.1
    torch.testing.assert_close(draw(pipe, family, CAPTIONS[:], loras=["b"]), merged, rtol=0, atol=1e-4)
    assert torch.equal(draw(pipe, family, CAPTIONS[:], loras=[]), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_picture_of_a_batch_may_keep_other_loras(family: str, pipe: Any) -> None:
    alone = draw(pipe, family, CAPTIONS[:], loras=["a"])
    with pipe.composing():
        _, given = denoiser_call(family, prompt=CAPTIONS[:])
    model, experts = pipe.transformer, pipe.experts
    rows = architecture_of(model).told(model, given).rows
    keep = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(rows // 2, 1)
    with torch.no_grad():
        with experts.using(keep=keep, weigher=Linear()):
            both = rows_of(model(**given))
        for row, kept in enumerate(keep):
            with experts.using(keep=kept, weigher=Linear()):
                torch.testing.assert_close(both[row], rows_of(model(**given))[row], rtol=0, atol=1e-5)
    assert alone.isfinite().all()


def test_switch_follows_the_scheduler_and_not_what_the_model_is_told() -> None:
    """In half precision the transformer is told the same number in several steps."""
    pipe = tiny_dit("flux", mole_diffusion.MoLEFluxPipeline).to(torch.bfloat16)
    parts = {"transformer": pipe.transformer}
    pipe.load_loras({name: random_lora(parts, rank=2, targets="to_q$", seed=seed) for seed, name in enumerate("ab")})
    pipe.scheduler.set_shift(300.0)
    pipe.scheduler.register_to_config(use_dynamic_shifting=False)
    told: list[float] = []
    turns: list[int] = []

    class Spy(Switch):
        def weights(self, keep: Tensor, step: Any) -> Tensor:
            if step is not None:
                turns.append(step.index)
            return super().weights(keep, step)

    pipe.set_composition(Spy(every=1))
    pipe.transformer.register_forward_pre_hook(lambda _, __, k: told.append(float(k["timestep"])), with_kwargs=True)
    draw(pipe, "flux", num_inference_steps=4)
    assert turns == [0, 1, 2, 3]
    assert len(set(told)) < 4


def test_the_pipeline_that_keeps_keys_of_pictures_draws_with_weights_that_stay() -> None:
    """As with the LoRA merged into the weights; with others, and a picture to keep, it is refused."""
    kept = diffusers.Flux2KleinKVPipeline
    merged, pipe = tiny_dit("flux2_klein", kept), tiny_dit("flux2_klein", type("MoLEKV", (MoLEPipelineMixin, kept), {}))
    state = random_lora({"transformer": pipe.transformer}, rank=2, targets=r"attn\.", seed=0)
    given = {"image": Image.new("RGB", (64, 64), "red"), "height": 32, "width": 32, "num_inference_steps": 2}
    given |= {"max_sequence_length": 48, "output_type": "latent"}

    def drawn(which: Any) -> Tensor:
        latents: Tensor = which(prompt="a cat", generator=torch.manual_seed(0), **given).images
        return latents

    merge_state(merged, state)
    pipe.load_loras({"a": state})
    pipe.set_composition("linear")
    torch.testing.assert_close(drawn(pipe), drawn(merged), rtol=0, atol=1e-4)
    pipe.set_composition("switch")
    with pytest.raises(MoLEError, match=r"kv_cache_mode='extract'.*`set_composition\(\"linear\"\)`"):
        drawn(pipe)


class Int8Linear(nn.Linear):
    """A quantised layer: whole numbers and one scale a row, turned into numbers when it runs."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        scale = layer.weight.abs().amax(dim=1, keepdim=True) / 127
        self.bias = layer.bias
        self.weight = nn.Parameter((layer.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale.detach(), requires_grad=False)

    def numbers(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.linear(hidden_states, self.numbers(), self.bias)


def test_experts_run_beside_quantised_layers() -> None:
    pipe = tiny_dit("z_image", mole_diffusion.MoLEZImagePipeline)
    for name, module in list(pipe.transformer.layers.named_modules()):
        if type(module) is nn.Linear and "adaLN" not in name:
            parent, _, leaf = name.rpartition(".")
            setattr(pipe.transformer.layers.get_submodule(parent), leaf, Int8Linear(module))
    state = random_lora({"transformer": pipe.transformer}, rank=2, targets=r"layers.*(to_q|to_k|to_v|w1)$")
    base = draw(pipe, "z_image")
    pipe.load_loras({"a": state})
    beside = draw(pipe, "z_image")
    pipe.unload_loras()
    for key, down in state.items():
        if key.endswith("lora_A.weight"):
            path = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            parent, _, leaf = path.rpartition(".")
            layer = pipe.transformer.get_submodule(path)
            merged = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            merged.bias = layer.bias
            merged.weight = nn.Parameter(layer.numbers() + state[key.replace("lora_A", "lora_B")] @ down)
            setattr(pipe.transformer.get_submodule(parent), leaf, merged)
    expected = draw(pipe, "z_image")
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(beside, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "name"),
    [("flux", "Flux"), ("flux2_klein", "Flux2Klein"), ("z_image", "ZImage"), ("qwen_image", "QwenImage")],
)
def test_diffusers_goes_from_a_pipeline_of_a_family_to_the_next(family: str, name: str) -> None:
    pipe = loaded(family)
    for auto, task in ((AutoPipelineForImage2Image, "Img2Img"), (AutoPipelineForInpainting, "Inpaint")):
        # FLUX.2's pipelines for text take a picture too.
        same = family == "flux2_klein" and task == "Img2Img"
        other = auto.from_pipe(pipe)
        assert type(other) is (type(pipe) if same else getattr(mole_diffusion, f"MoLE{name}{task}Pipeline"))
        assert other.experts is pipe.experts
        assert type(AutoPipelineForText2Image.from_pipe(other)) is type(pipe)


def test_diffusers_stays_in_the_pipeline_that_has_several_tasks_or_one() -> None:
    looking = loaded("flux2")
    assert type(AutoPipelineForImage2Image.from_pipe(looking)) is type(looking)
    drawing = loaded("krea2")
    assert AutoPipelineForText2Image.from_pipe(drawing).experts is drawing.experts


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # Krea 2's own norms
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("same_noise_in_half_precision")
def test_half_precision_finds_masks_and_draws_near_what_float32_draws(family: str) -> None:
    """Every transformer as `dtype=torch.bfloat16` loads it."""
    wide = tiny_dit(family, getattr(mole_diffusion, f"MoLE{MADE[family][0].__name__}"))
    states = {
        name: random_lora({"transformer": wide.transformer}, rank=2, targets=".", seed=s) for s, name in [(0, "a")]
    }
    narrow = tiny_dit(family, type(wide)).to(torch.bfloat16)
    drawn = []
    for pipe in (wide, narrow):
        pipe.load_loras({**states, "b": states["a"]}, triggers={"a": "cat", "b": "dog"})
        drawn.append(draw(pipe, family, num_inference_steps=2).float())
        assert pipe.masks is not None
    assert (drawn[1] - drawn[0]).norm() < 0.25 * drawn[0].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_composite_is_the_mean_of_what_each_lora_predicts(family: str, pipe: Any) -> None:
    """One widened batch, whatever a transformer is given: lists, packed tokens, masks, places."""
    model, given = pipe.transformer, denoiser_call(family, prompt=CAPTIONS[:])[1]
    experts = pipe.experts
    with torch.no_grad():
        with experts.using(weigher=Composite()):
            composed = rows_of(model(**given))
        alone = []
        for keep in torch.eye(2):
            with experts.using(keep=keep, weigher=Linear()):
                alone.append(rows_of(model(**given)))
    assert (alone[0] - alone[1]).abs().max() > 0.1
    torch.testing.assert_close(composed, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-5)
