"""FLUX, FLUX.2, Z-Image, Krea 2 and Qwen-Image: what is known of them holds in a call of their pipelines."""

from __future__ import annotations

import functools
import re
from typing import Any

import diffusers
import pytest
import torch
import torch._dynamo
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image, hooks
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from PIL import Image
from torch import Tensor, nn

import mole_diffusion
from mole_diffusion.composition import Composite, FreeFuse, Linear, Masks, Switch
from mole_diffusion.errors import MoLEError
from mole_diffusion.experts import Run
from mole_diffusion.experts.seam import LayerSeam
from mole_diffusion.families import architecture_of
from mole_diffusion.gating import GateConfig
from mole_diffusion.pipelines import MoLEPipelineMixin
from tests.merging import merge_state
from tests.tiny import random_lora
from tests.tiny.dits import MADE, denoiser_call, draw, stock, tiny_dit

FAMILIES = list(MADE)
CAPTIONS = ["a cat and a dog", "a red mug and a green boot in the grass with a clock"]


UNGUIDED = {"z_image": {"guidance_scale": 0.0}, "krea2": {"guidance_scale": 0.0}, "qwen_image": {"true_cfg_scale": 1.0}}
REGIONS = {"a": (0, 0, 0.5, 1.0), "b": (0.5, 0, 1.0, 1.0)}


@functools.cache
def loaded(family: str) -> Any:
    """A pipeline of ours with two LoRAs on every Linear of its transformer."""
    pipe = tiny_dit(family, getattr(mole_diffusion, f"MoLE{stock(family).__name__}"))
    parts = {"transformer": pipe.transformer}
    pipe.load_loras({name: random_lora(parts, rank=2, targets=".", seed=seed) for seed, name in enumerate("ab")})
    return pipe


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


def rows_of(output: Any) -> Tensor:
    """What a transformer predicts, a row for each sample."""
    sample = output[0]
    return torch.stack(list(sample)) if isinstance(sample, list) else sample


class Blind(Linear):
    """Adds nothing, and keeps every pixel from every word; notes what it is shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[LayerSeam, Tensor, Tensor, Tensor]] = []

    def weigh(self, *_: Any) -> Any:
        return None

    def attention_bias(self, layer: LayerSeam, query: Tensor, key: Tensor, run: Run) -> Tensor:
        return query.new_full((len(query), 1, query.shape[2], key.shape[2]), float("-inf"))

    def watches(self, run: Run) -> bool:
        return True

    def attended(self, layer: LayerSeam, query: Tensor, key: Tensor, output: Tensor, run: Run) -> None:
        self.shown.append((layer, query, key, output))


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_that_may_not_look_at_words_do_not_know_the_prompt(family: str, pipe: Any) -> None:
    pipe.set_composition(blind := Blind())
    said = {"prompt": CAPTIONS[0]}
    other = {"prompt": CAPTIONS[1]}
    if family == "qwen_image":  # a negative prompt has a call of its own, and fewer words
        said, other = {**said, "true_cfg_scale": 1.0}, {**other, "true_cfg_scale": 1.0}
    if family == "flux":  # CLIP's vector of the prompt goes another way
        said, other = {**said, "prompt_2": CAPTIONS[0]}, {**said, "prompt_2": CAPTIONS[1]}
    if family == "z_image":  # places of the pixels follow the length of the prompt, filled up to 32
        other = {"prompt": "a green boot"}
    one = draw(pipe, family, **said, num_inference_steps=1)
    layers = [name for name, _ in pipe.transformer.named_modules() if meets(pipe.transformer, name)]
    crossed = [shown for shown in blind.shown if shown[0].crossed]
    assert {shown[0].name for shown in crossed} == set(layers)
    told = pipe.experts.context.told
    for layer, query, key, output in crossed:
        heads = query.shape[1]
        assert query.shape[2] == told.sample_size[0] * told.sample_size[1] == 64
        assert key.shape[1:3] == (heads, told.joint.text.stop - told.joint.text.start)
        assert output.shape[1:] == (64, heads * query.shape[-1])
        assert layer.scale == pytest.approx(query.shape[-1] ** -0.5)
    torch.testing.assert_close(draw(pipe, family, **other, num_inference_steps=1), one, rtol=0, atol=1e-5)
    base = [draw(pipe, family, **which, num_inference_steps=1, loras=[]) for which in (said, other)]
    assert (base[0] - base[1]).abs().max() > 1e-3


def meets(model: nn.Module, name: str) -> bool:
    pattern = architecture_of(model).meeting
    assert pattern is not None
    found = pattern.match(name)
    return found is not None and found[1] == name


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


CACHES: dict[str, Any] = {
    "FirstBlockCacheConfig": {"threshold": 0.0},
    "FasterCacheConfig": {
        "is_guidance_distilled": True,
        "tensor_format": "BCHW",
        "current_timestep_callback": lambda: 900,
    },
    "MagCacheConfig": {"calibrate": True},
    "PyramidAttentionBroadcastConfig": {
        "spatial_attention_block_skip_range": 2,
        "current_timestep_callback": lambda: 900,
    },
    "SeaCacheConfig": {},
    "TaylorSeerCacheConfig": {},
    "TextKVCacheConfig": {},
}


def test_every_cache_of_diffusers_is_known_here() -> None:
    names = [name for name in dir(hooks) if name.endswith(("CacheConfig", "BroadcastConfig"))]
    assert sorted(names) == sorted(CACHES)


@pytest.mark.parametrize("name", CACHES)
def test_caches_are_refused_where_weights_change(name: str) -> None:
    """And the remedy of the error is one. (Only Cosmos' transformers can have SeaCache, only Nucleus' TextKVCache.)"""
    pipe = loaded("flux")
    pipe.set_composition("switch")
    expected = draw(pipe, "flux", num_inference_steps=1)
    try:
        pipe.transformer.enable_cache(getattr(hooks, name)(**CACHES[name]))
        refused = rf"{name}.*composition 'switch'.*`transformer.disable_cache\(\)`"
        with pytest.raises(MoLEError, match=refused):
            draw(pipe, "flux")
        assert draw(pipe, "flux", loras=[], num_inference_steps=1).isfinite().all()
        pipe.set_composition("linear")
        assert draw(pipe, "flux", num_inference_steps=1).isfinite().all()
        pipe.set_composition("switch")
    finally:
        if pipe.transformer.is_cache_enabled:
            pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe, "flux", num_inference_steps=1), expected)


def test_a_cache_that_was_put_on_by_hand_is_refused_and_taken_off_as_the_error_says() -> None:
    """Z-Image's transformer, as the UNet, has no `enable_cache`."""
    pipe = loaded("z_image")
    pipe.set_composition("switch")
    expected = draw(pipe, "z_image", num_inference_steps=1)
    hooks.apply_pyramid_attention_broadcast(
        pipe.transformer, hooks.PyramidAttentionBroadcastConfig(**CACHES["PyramidAttentionBroadcastConfig"])
    )
    with pytest.raises(MoLEError, match=r"pyramid_attention_broadcast of diffusers.*switch") as refused:
        draw(pipe, "z_image")
    (remedy,) = re.findall("Take them off: `(.*?)`", str(refused.value))
    exec(remedy, {"diffusers": diffusers, "pipe": pipe})
    assert torch.equal(draw(pipe, "z_image", num_inference_steps=1), expected)


@pytest.mark.parametrize("family", ["flux2_klein"])
def test_keys_and_values_kept_from_an_earlier_step_are_refused(family: str, pipe: Any) -> None:
    model, given = pipe.transformer, denoiser_call(family)[1]
    with pipe.experts.using(weigher=Switch()), pytest.raises(MoLEError, match="kv_cache_mode='extract'"):
        model(**{**given, "kv_cache_mode": "extract"})


@pytest.mark.skipif(not hasattr(diffusers, "Flux2KleinKVPipeline"), reason="an older diffusers")
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


@pytest.mark.parametrize("family", ["flux"])
def test_projections_fused_after_loading_are_refused(family: str, pipe: Any) -> None:
    draw(pipe, family)
    pipe.transformer.fuse_qkv_projections()
    try:
        with pytest.raises(MoLEError, match="fused query, key and value projections"):
            draw(pipe, family)
    finally:
        pipe.transformer.unfuse_qkv_projections()
    assert draw(pipe, family).isfinite().all()


class Reader(Masks):
    """Masks that keep whose words they were told, and the embeddings, of each call of the transformer."""

    def __init__(self) -> None:
        super().__init__(given_own_words=0, given_others_words=0)
        self.read: list[tuple[Tensor, Tensor]] = []

    def regions(self, run: Run) -> Any:
        text = run.encoder_hidden_states
        assert text is not None
        self.read.append((self.words(self.call(run)).of_embeddings(text), text))
        return super().regions(run)


def read(pipe: Any, family: str, prompt: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    pipe.set_composition(reader := Reader())
    draw(pipe, family, prompt, num_inference_steps=1, regions=REGIONS, **kwargs)
    return reader.read


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_found_where_their_embeddings_are(family: str, pipe: Any) -> None:
    """Language models read from left to right: the first embedding that another word changes is the word's own."""
    prompt = "a photo of a red cat and a dog"
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    ((owned, text), *_) = read(pipe, family, prompt)
    with_triggers(pipe, {"a": "mug", "b": "dog"})
    ((_, other), *_) = read(pipe, family, prompt.replace("cat", "mug"))
    row = 0  # the prompt comes first in every family, where it shares a batch too
    marked = owned[row, 0].nonzero().flatten().tolist()
    assert len(marked) == 1
    assert owned[row, 1].sum() == 1
    assert not (owned[row, 0] & owned[row, 1]).any()
    if family == "flux":  # T5 reads both ways; its tokens are known
        ids = pipe.tokenizer_2(prompt).input_ids
        assert marked == [ids.index(pipe.tokenizer_2("cat").input_ids[0])]
        return
    changed = (text[row] != other[row]).flatten(1).any(dim=1).nonzero().flatten()
    assert changed[0] == marked[0]


def with_triggers(pipe: Any, words: dict[str, str]) -> None:
    pipe._loaded.triggers |= {name: (word,) for name, word in words.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_pictures_and_negative_prompts_are_told_apart(family: str, pipe: Any) -> None:
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    prompts = ["a cat and a dog", "a green boot in the grass with a dog and a cat"]
    given = prompts[:]
    beside = {"negative_prompt": ["sand", "sand"]} if family == "qwen_image" else {}
    calls = read(pipe, family, given, num_images_per_prompt=2, **beside)
    assert given == prompts  # nobody wrote into the caller's list
    (positive, _), *others = calls
    assert all(positive[row].any(dim=1).all() for row in range(4))
    assert torch.equal(positive[0], positive[1])
    assert torch.equal(positive[2], positive[3])
    assert not torch.equal(positive[0], positive[2])
    assert not positive[4:].any()  # Z-Image's negative prompts are in the same batch
    assert len(others) == (family in ("flux2_klein", "krea2", "qwen_image"))
    assert not any(owned.any() for owned, _ in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_found_and_act(family: str, pipe: Any) -> None:
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    pipe.set_composition("masks")
    picture = draw(pipe, family, num_inference_steps=3)
    found = pipe.masks
    assert found is not None
    assert found.values.shape[2:] == (8, 8)
    assert found.values.amax(dim=(0, 2, 3)).min() > 0  # each has some pixel of its own
    again = draw(pipe, family, num_inference_steps=3)
    assert torch.equal(picture, again)
    pipe.set_composition(FreeFuse())
    draw(pipe, family, num_inference_steps=3)
    assert pipe.masks is not None


def test_words_of_the_template_are_nobodys() -> None:
    pipe = loaded("qwen_image")
    with_triggers(pipe, {"a": "image", "b": "dog"})
    ((owned, _), *_) = read(pipe, "qwen_image", "a dog in an image")
    assert owned[0, 0].nonzero().flatten().tolist() == [4]


def test_embeddings_of_z_image_are_listed_and_their_words_told() -> None:
    pipe = loaded("z_image")
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    embeds, negative = pipe.encode_prompt(["a cat and a dog"], max_sequence_length=48)
    kwargs = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "spans": {"a": [5], "b": [7]}}
    ((owned, _), *_) = read(pipe, "z_image", None, num_images_per_prompt=2, **kwargs)
    assert owned[:2, :, :8].nonzero().tolist() == [[0, 0, 5], [0, 1, 7], [1, 0, 5], [1, 1, 7]]
    assert owned.sum() == 4


@pytest.mark.parametrize(("modulation", "weights"), [("share", [0.5, 0.5]), ("first", [1.0, 0.0]), ("off", [0.0, 0.0])])
def test_modulation_that_no_mask_reaches_is_a_setting(modulation: Any, weights: list[float]) -> None:
    pipe = loaded("flux2_klein")
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    seen: list[list[float]] = []

    class Spy(Masks):
        def weigh(self, site: Any, projections: Any, run: Run) -> Tensor | None:
            given = super().weigh(site, projections, run)
            if given is not None and site.reads == "vector":
                seen.append(given[0, 0].tolist())
            return given

    pipe.set_composition(Spy(modulation=modulation))
    draw(pipe, "flux2_klein", num_inference_steps=1, regions=REGIONS)
    assert seen
    assert all(one == weights for one in seen)
    with pytest.raises(MoLEError, match="`modulation` must be one of"):
        Masks(modulation="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["krea2"])
def test_compiled_blocks_draw_the_same_or_say_why_not(family: str, pipe: Any) -> None:
    """Regional compilation; attention inside of a graph is neither seen nor drawn to words."""
    with_triggers(pipe, {"a": "cat", "b": "dog"})
    once = {"num_inference_steps": 1, **UNGUIDED[family]}
    expected = draw(pipe, family, **once)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    try:
        torch.testing.assert_close(draw(pipe, family, **once), expected, rtol=0, atol=1e-4)
        pipe.set_composition("masks")
        for asked in ({}, {"regions": REGIONS}):
            with pytest.raises(
                MoLEError, match=r"'masks' reads the attention.*compile_repeated_blocks.*such as budget"
            ):
                draw(pipe, family, **once, **asked)
        pipe.set_composition("budget")
        assert draw(pipe, family, **once).isfinite().all()
    finally:
        for part in pipe.transformer.modules():
            part._compiled_call_impl = None
        torch._dynamo.reset()
    pipe.set_composition("masks")
    assert draw(pipe, family, **once, regions=REGIONS).isfinite().all()


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
def test_half_precision_finds_masks_and_draws_near_what_float32_draws(family: str) -> None:
    """Every transformer as `dtype=torch.bfloat16` loads it."""
    wide = tiny_dit(family, getattr(mole_diffusion, f"MoLE{stock(family).__name__}"))
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


@pytest.mark.parametrize("family", ["z_image", "krea2", "qwen_image"])
@pytest.mark.parametrize("method", ["mole", "norm_router"])
def test_what_fills_up_a_short_prompt_is_not_read(family: str, method: str) -> None:
    """In a batch with a longer prompt, a picture is what it is alone."""
    pipe = loaded(family)
    if method == "mole":
        gates = pipe.init_gates(GateConfig(scope="matrix"))
        with torch.no_grad():
            for number, parameter in enumerate(gates.gate_parameters()):
                parameter.copy_(3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    pipe.set_composition(method)
    prompts = ["a cat", "a dog in the grass with a mug and a boot and a clock " * 4]
    given = {"num_inference_steps": 1, "max_sequence_length": 128, **UNGUIDED[family]}
    try:
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        both = draw(pipe, family, prompts, generator=seeds, **given)
        alone = draw(pipe, family, prompts[0], generator=torch.Generator().manual_seed(1), **given)
    finally:
        pipe.unload_gates()
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=1e-4)


class ByHand(FluxAttnProcessor):
    """An attention of somebody else's, which calls nothing that others call."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return attn.to_v(hidden_states)


def test_attention_that_nobody_sees_is_an_error_where_it_must_be_seen() -> None:
    pipe = tiny_dit("flux", mole_diffusion.MoLEFluxPipeline)
    parts = {"transformer": pipe.transformer}
    pipe.load_loras(
        {name: random_lora(parts, rank=2, targets="to_v$", seed=s) for s, name in enumerate(["cat", "dog"])}
    )
    pipe.transformer.single_transformer_blocks[1].attn.set_processor(ByHand())
    pipe.set_composition("masks")
    where = r"single_transformer_blocks.1.attn \(ByHand\).*set_attention_backend\(\"native\"\).*norm_router"
    with pytest.raises(MoLEError, match=where):
        draw(pipe, "flux")
    pipe.transformer.single_transformer_blocks[1].attn.set_processor(FluxAttnProcessor())
    assert draw(pipe, "flux").isfinite().all()  # nothing is left of the first try


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
