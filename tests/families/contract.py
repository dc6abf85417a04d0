"""What composing must keep on every family and pipeline: a config and mixins, as diffusers' newer tests are built.

A family's test file has a class for each pipeline, with a `Case` and the mixins that fit it::

    class TestFlux(WholeContract):
        case = Case(MoLEFluxPipeline, FluxPipeline, flux, {"max_sequence_length": 32, "guidance_scale": 3.5})

    class TestImg2Img(PipelineContract):
        case = Case(MoLEFluxImg2ImgPipeline, FluxImg2ImgPipeline, flux, {..., "image": picture, "strength": 0.9})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mole_diffusion.clip import DifferentiableCLIP
from mole_diffusion.composition import Linear, MaskedGates, Masks, Switch
from mole_diffusion.experts import Run, Site
from mole_diffusion.gating import GateConfig
from mole_diffusion.training import GateTrainingConfig, train_gates
from mole_diffusion.training.gates.walk import Walker
from tests import reference
from tests.merging import merge_state

PROMPT = "a cat and a dog"
PICTURE = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
MASK = Image.fromarray(np.uint8(np.eye(32) * 255))
NAMES = ("cat", "dog")
TOLERANCE = 1e-5  # of the largest number: rounding of fp32 through a whole picture


@dataclass(frozen=True)
class Case:
    """One pipeline.

    Attributes:
        ours: The composing pipeline.
        stock: The pipeline of diffusers that it stands on.
        components: Makes the components, the same at every call.
        call: What a call is given beside the prompt, the number of steps and the generator.
        beside: What the pipeline is made with beside the components.
        scale: Name of the argument that has the `scale` of LoRAs.
    """

    ours: type
    stock: type
    components: Callable[[], dict[str, Any]]
    call: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    scale: str = "cross_attention_kwargs"

    def pipe(self, *, stock: bool = False) -> Any:
        """A fresh pipeline."""
        made: Any = (self.stock if stock else self.ours)(**self.components(), **self.beside)
        made.set_progress_bar_config(disable=True)
        return made


def draw(case: Case, pipe: Any, prompt: Any = PROMPT, *, seed: int = 0, **kwargs: Any) -> Tensor:
    """Latents of a short run."""
    given = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.manual_seed(seed), **case.call}
    images: Tensor = pipe(prompt=prompt, **{**given, **kwargs}).images
    return images


def lora_state(pipe: Any, seed: int, rank: int = 2) -> dict[str, Tensor]:
    """A random LoRA on all attention and feed-forward layers of the family's components, and on what is trained by
    default, in diffusers' layout."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for component, architecture in pipe.family.architectures.items():
        model: nn.Module = getattr(pipe, component)
        for name, module in model.named_modules():
            targeted = any(f".{name}".endswith(f".{target}") for target in architecture.targets)
            if not targeted and not (isinstance(module, nn.Linear) and architecture.layer(name)):
                continue
            assert isinstance(module, nn.Linear), f"{component}.{name}"
            down = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            up = torch.randn(module.out_features, rank, generator=generator) / rank**0.5
            state[f"{component}.{name}.lora_A.weight"] = down
            state[f"{component}.{name}.lora_B.weight"] = 0.5 * up
    return state


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums in fp32."""
    assert expected.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def assert_other(actual: Tensor, expected: Tensor) -> None:
    """Different by far more than rounding."""
    assert (actual - expected).abs().max() > 1e-2 * expected.abs().max()


class WithLoRAs:
    """Fixtures: a pipeline with two LoRAs, shared by the tests of a class, which leave it as it was."""

    case: ClassVar[Case]

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls) -> Any:
        pipe = cls.case.pipe()
        pipe.load_loras({name: lora_state(pipe, seed) for seed, name in enumerate(NAMES)})
        return pipe

    @pytest.fixture
    def pipe(self, loaded: Any) -> Iterator[Any]:
        yield loaded
        loaded.unload_gates()
        loaded.set_composition(None)


class PipelineContract(WithLoRAs):
    """What holds for every pipeline."""

    @pytest.fixture(scope="class")
    @classmethod
    def with_cat(cls, loaded: Any) -> Tensor:
        """What is drawn with the first LoRA."""
        return draw(cls.case, loaded, loras=["cat"])

    @pytest.fixture(scope="class")
    @classmethod
    def with_none(cls, loaded: Any) -> Tensor:
        """What is drawn without LoRAs."""
        return draw(cls.case, loaded, loras=[])

    def test_one_lora_is_its_weights_merged(self, pipe: Any, with_cat: Tensor, with_none: Tensor) -> None:
        stock = self.case.pipe(stock=True)
        base = draw(self.case, stock)
        merge_state(stock, lora_state(pipe, 0))
        merged = draw(self.case, stock)
        assert_other(merged, base)
        assert_same(with_cat, merged)
        assert torch.equal(with_none, base)

    def test_a_lora_masked_out_is_a_lora_not_loaded(self, pipe: Any, with_none: Tensor) -> None:
        alone = self.case.pipe()
        alone.load_loras({"dog": lora_state(alone, 1)})
        assert_same(draw(self.case, pipe, loras=["dog"]), draw(self.case, alone))
        alone.unload_loras()
        assert torch.equal(draw(self.case, alone), with_none)

    def test_the_scale_of_diffusers_scales_loras(self, pipe: Any, with_cat: Tensor) -> None:
        halved = draw(self.case, pipe, loras=["cat"], **{self.case.scale: {"scale": 0.5}})
        assert_same(halved, draw(self.case, pipe, loras={"cat": 0.5}))
        assert_other(halved, with_cat)


class BatchContract(WithLoRAs):
    """Prompts and pictures of a batch do not know of one another."""

    def test_a_batch_is_its_pictures_one_by_one(self, pipe: Any) -> None:
        pipe.set_composition(Linear())
        prompts = [PROMPT, "a red cat on the grass"]
        seeds = [1, 2, 3, 4]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        several = draw(self.case, pipe, prompts, num_images_per_prompt=2, generator=generators)
        assert len(several) == 4
        for row in (1, 2):
            alone = draw(self.case, pipe, prompts[row // 2], generator=torch.Generator().manual_seed(seeds[row]))
            assert_same(several[row : row + 1], alone)


class GateContract(WithLoRAs):
    """Gates: made, trained, saved, loaded."""

    @pytest.mark.parametrize(
        "config",
        [{"scope": "network"}, {"scope": "layer", "token_axis": "token", "input": "hidden", "null_expert": True}],
    )
    def test_gates_train_and_are_saved(self, pipe: Any, tmp_path: Path, config: dict[str, Any]) -> None:
        gates = pipe.init_gates(GateConfig(**config))
        before = draw(self.case, pipe)
        denoiser = getattr(pipe, pipe.family.denoiser)
        calls: list[Any] = []
        handle = denoiser.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
        draw(self.case, pipe, num_inference_steps=1)
        handle.remove()
        args, kwargs = calls[0]
        with gates.record() as record, pipe.composing():
            output = denoiser(*args, **{**kwargs, "return_dict": False})[0]
        rows = torch.stack(list(output)) if isinstance(output, list) else output
        optimizer = torch.optim.SGD(gates.gate_parameters(), lr=1.0)
        rows.float().square().mean().backward()
        gradients = [p.grad for p in gates.parameters() if p.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
        optimizer.param_groups[0]["lr"] = float(3 / max(gradient.abs().max() for gradient in gradients))
        optimizer.step()
        assert record.names
        after = draw(self.case, pipe)
        assert_other(after, before)
        pipe.save_gates(tmp_path / "gates")
        pipe.unload_gates()
        pipe.load_gates(tmp_path / "gates")
        assert torch.equal(draw(self.case, pipe), after)


class RegionContract(WithLoRAs):
    """LoRAs where a user says that they belong: on pixels and words, as far as modules can tell them apart."""

    def test_a_lora_that_has_the_whole_picture_is_that_lora(self, pipe: Any) -> None:
        prompt = "a cat on the grass"  # another LoRA's words would be left alone
        plain = draw(self.case, pipe, prompt, loras=["cat"])
        pipe.set_composition(Masks(given_own_words=0, given_others_words=0))
        assert_same(draw(self.case, pipe, prompt, loras=["cat"], regions={"cat": (0, 0, 1.0, 1.0)}), plain)

    def test_loras_act_on_their_pixels_and_words(self, pipe: Any) -> None:
        method = Noting(given_own_words=0, given_others_words=0)
        pipe.set_composition(method)
        draw(self.case, pipe, regions={"cat": (0, 0, 0.5, 1.0), "dog": (0.5, 0, 1.0, 1.0)})
        reads = {site.reads for site, _, _ in method.noted}
        assert reads & {"pixels", "both"}
        for site, run, weights in method.noted:
            if run.timestep is None:
                continue
            if site.reads in ("pixels", "both"):
                pixels = weights if site.reads == "pixels" else weights[:, run.told.joint.pixels]
                height, width = _grid(pixels.shape[1], run.sample_size)
                grid = pixels.unflatten(1, (height, width))
                cat, dog = grid[..., 0], grid[..., 1]
                assert torch.equal(cat[:, :, 0], torch.ones_like(cat[:, :, 0])), site.name
                assert torch.equal(cat[:, :, -1], torch.zeros_like(cat[:, :, 0])), site.name
                assert torch.equal(cat, dog.flip(-1)), site.name
            if site.reads in ("text", "both"):
                words = weights if site.reads == "text" else weights[:, run.told.joint.text]
                # The last rows have the prompt: one token calls each, and the others are shared.
                own = [sorted(set(words[-1, :, index].tolist())) for index in (0, 1)]
                assert own == [[0.0, 0.5, 1.0]] * 2, site.name
                called = words[-1] == 1.0
                assert called.any(dim=0).all()
                assert not called.all(dim=1).any()


def _grid(tokens: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of square pictures' tokens at any level."""
    assert size is not None
    assert size[0] == size[1]
    side = int(tokens**0.5)
    assert side * side == tokens
    return side, side


class Noting(Masks):
    """Masks that keep what they answered."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.noted: list[tuple[Site, Run, Tensor]] = []

    def weigh(self, site: Site, projections: Any, run: Run) -> Tensor | None:
        weights = super().weigh(site, projections, run)
        if weights is not None:
            self.noted.append((site, run, weights))
        return weights


class MasksContract(WithLoRAs):
    """LoRAs where the base model's own attention says that their subjects are."""

    def test_masks_are_found_and_used(self, pipe: Any) -> None:
        method = Noting()
        pipe.set_composition(method)
        draw(self.case, pipe, num_inference_steps=6)
        assert pipe.masks is not None
        owned = pipe.masks.values.sum(dim=(-2, -1))
        assert (owned > 0).all(), "each subject has some pixels"
        last = method.noted[-1][1]
        pixels = [
            weights if site.reads == "pixels" else weights[:, run.told.joint.pixels]
            for site, run, weights in method.noted
            if run is last and site.reads in ("pixels", "both")
        ]
        assert all(weights.sum(dim=-1).max() <= 1 for weights in pixels)
        assert any((weights[..., 0] != weights[..., 1]).any() for weights in pixels)


class MaskedGatesContract(WithLoRAs):
    """Gates that correct masks, wherever words and pixels stand."""

    KIND = GateConfig(input="hidden", token_axis="token", scope="layer", residual=True)
    ASKED: ClassVar[dict[str, Any]] = {
        "regions": {"cat": (0, 0, 0.5, 1.0), "dog": (0.5, 0, 1.0, 1.0)},
        "num_inference_steps": 2,
    }

    def test_untrained_they_are_the_masks_and_trained_they_read_state_and_mask(self, pipe: Any) -> None:
        masks = Noting(given_own_words=0, given_others_words=0)
        pipe.set_composition(masks)
        rule = draw(self.case, pipe, **self.ASKED)
        gates = pipe.init_gates(self.KIND)
        pipe.set_composition(MaskedGates(masks))
        assert torch.equal(draw(self.case, pipe, **self.ASKED), rule)

        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in gates.gate_parameters():
                parameter += torch.randn(parameter.shape, generator=generator) / 2
        read: dict[str, Tensor] = {}
        handles = [
            pipe.experts.sites[spec.entry_sites[0]].module.register_forward_pre_hook(
                lambda _, args, name=spec.name: read.update({name: args[0]})
            )
            for spec in gates.specs
        ]
        masks.noted.clear()
        with gates.record() as record:
            corrected = draw(self.case, pipe, **self.ASKED)
        for handle in handles:
            handle.remove()
        assert_other(corrected, rule)
        given = {site.name: (site, run, weights) for site, run, weights in masks.noted}
        seen = set()
        for spec in gates.specs:
            site, run, mask = given[spec.entry_sites[0]]
            lengths = pipe.experts._attachments[site.component].architecture.lengths(site.module_name, run.told)
            if lengths is not None:  # all samples in one row
                continue
            seen.add(site.reads)
            found, hidden = record.tokens[spec.name], read[spec.name]
            hidden = hidden.flatten(1, -2) if hidden.ndim > 2 else hidden[:, None]
            mask = mask.expand(*found.shape)
            gate: Any = gates.gates[spec.name.replace(".", "/")]
            e, c = gate.weight[:, 0, :-2].double(), gate.weight[:, 0, -2:].double()
            for token in {0, found.shape[1] // 2, found.shape[1] - 1}:
                state = hidden[-1, min(token, hidden.shape[1] - 1)].double().tolist()
                told = mask[-1, token].double().tolist()
                expected = reference.corrected_mask(told, state, e, c, float(gate.temperature.detach()))
                assert found[-1, token].tolist() == pytest.approx(expected, abs=1e-4), (spec.name, token)
        assert seen & {"pixels", "both"}


class TrainingContract(WithLoRAs):
    """Gates trained on a walk down the family's own noise schedule.

    Attributes:
        descent: A scheduler, and what a call is given, so that it goes down the four steps of a walk.
        guidance: Of the walk; `None`: as the case's call says.
    """

    descent: ClassVar[tuple[Any, Mapping[str, Any]]]
    guidance: ClassVar[float | None] = None

    @torch.no_grad()
    def test_a_walk_ends_where_a_call_of_the_pipeline_does(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the same noise, gates, guidance and all."""
        scheduler, given = self.descent
        monkeypatch.setattr(pipe, "scheduler", scheduler)
        pipe.init_gates()
        guidance = self.case.call["guidance_scale"] if self.guidance is None else self.guidance
        walker = Walker(pipe, GateTrainingConfig(rollout_steps=4, guidance_scale=guidance, batch_size=1))
        plan = walker.plan(torch.Generator().manual_seed(0))
        latents = plan.noise
        with pipe.composing():
            for now, after in zip(plan.timesteps, plan.timesteps[1:], strict=False):
                prediction = walker.predict(latents, now, walker.encode([PROMPT]))
                latents = walker.advance(prediction, latents, now, after, None)
        assert_same(latents, draw(self.case, pipe, latents=plan.noise, num_inference_steps=4, **given))

    def test_a_training_changes_the_gates(self, pipe: Any, clip: DifferentiableCLIP) -> None:
        settings = GateTrainingConfig(identity_weight=0.0, steps=1, batch_size=1, warmup_steps=0, rollout_steps=2)
        gates = train_gates(pipe, settings, prompts=[PROMPT], clip=clip, progress=False)
        assert any(parameter.abs().max() > 0 for parameter in gates.parameters())


class StepContract(WithLoRAs):
    """Methods that know which step a call of the denoiser belongs to."""

    def test_switch_draws_with_one_after_the_other(self, pipe: Any) -> None:
        turns: list[list[float]] = []

        class Spy(Switch):
            def weights(self, keep: Tensor, step: Any) -> Tensor:
                weights = super().weights(keep, step)
                if step is not None:
                    turns.append(weights[0].tolist())
                return weights

        pipe.set_composition(Spy(every=1))
        draw(self.case, pipe, num_inference_steps=4)
        calls = len(turns) // 4
        assert turns == [turn for turn in ([1.0, 0.0], [0.0, 1.0]) * 2 for _ in range(calls)]


class WholeContract(
    PipelineContract,
    BatchContract,
    GateContract,
    RegionContract,
    StepContract,
    TrainingContract,
    MasksContract,
    MaskedGatesContract,
):
    """All of it, for the text-to-image pipeline of a family."""
