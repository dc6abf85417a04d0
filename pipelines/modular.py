"""Composing in diffusers' modular pipelines: blocks that load LoRAs and gates, and blocks of a family with them inside.

::

    pipe = MoLEStableDiffusionXLBlocks().init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
    pipe.load_components()
    files = {"cat": "cat.safetensors", "boot": "boot.safetensors"}
    state = pipe(prompt="a <v1> cat in a boot", lora_files=files, triggers={"cat": "<v1> cat", "boot": "boot"})
    state.get("images")[0], state.get("masks")

Everything else is that of the modular pipeline: `MoLEStableDiffusionXLBlocks().sub_blocks` may be exchanged, and
`pipe.blocks.doc` tells all inputs.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import diffusers
import torch

from ..composition import Call
from ..errors import MoLEError
from ..files import atomic_files
from ..lora import LoRA, load_lora
from ..reading import read_text
from .clip_skip import refuse_clip_skip
from .flux import MoLEFluxPipeline
from .flux2 import MoLEFlux2KleinPipeline, MoLEFlux2Pipeline
from .krea2 import MoLEKrea2Pipeline
from .loaded import drawing
from .mixin import MoLEPipelineMixin
from .naming import choose_roles, choose_triggers, named_sources
from .newer import OlderDiffusersError
from .prior import drawing_prior
from .qwen_image import MoLEQwenImagePipeline
from .read_wrongly import refuse_random_weights
from .reading import prompt_words, split_prompts
from .refusals import refuse_not_finite, refuse_unheard
from .selection import read_scale
from .size import picture_count, picture_size
from .stable_diffusion_3 import MoLEStableDiffusion3Pipeline
from .stable_diffusion_xl import MoLEStableDiffusionXLPipeline
from .turns import call_turn
from .z_image import MoLEZImagePipeline

try:
    from diffusers import (
        Flux2AutoBlocks,
        Flux2KleinAutoBlocks,
        Flux2KleinBaseAutoBlocks,
        FluxAutoBlocks,
        Krea2AutoBlocks,
        ModularPipelineBlocks,
        QwenImageAutoBlocks,
        SequentialPipelineBlocks,
        StableDiffusion3AutoBlocks,
        StableDiffusionXLAutoBlocks,
        ZImageAutoBlocks,
    )
    from diffusers.modular_pipelines.flux2.encoders import Flux2TextEncoderStep
    from diffusers.modular_pipelines.modular_pipeline import PipelineState
    from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, InsertableDict, OutputParam
except ImportError as error:
    raise OlderDiffusersError(
        f"blocks for modular pipelines need diffusers 0.40 or newer, and this is {diffusers.__version__} ({error}). "
        "Upgrade it: pip install 'diffusers>=0.40'"
    ) from None

_LOOKED_AT: WeakSet[torch.nn.Module] = WeakSet()
"""Models that hold what their files do."""

PUBLISHED = '''"""LoRAs composed in diffusers' modular pipelines, by the installed mole_diffusion."""

from mole_diffusion.pipelines.modular import {name}
'''


class _Loading(ModularPipelineBlocks):
    """A block that loads something for the models of the pipeline it stands in.

    Args:
        task: The pipeline of ours for the same models.
    """

    def __init__(self, task: type[MoLEPipelineMixin]) -> None:
        super().__init__()
        self._task = task


class LoadLoRAs(_Loading):
    """Loads LoRAs as experts. They stay on the models until a call names other files."""

    @property
    def description(self) -> str:
        """What the block is for."""
        return "Loads LoRAs as experts beside the layers; they stay until a call names other files, {} for none."

    @property
    def inputs(self) -> list[InputParam]:
        """As `load_loras` takes them."""
        return [
            InputParam("lora_files", description="Name to file, state dict or LoRA; {} takes all off"),
            InputParam("triggers", type_hint=dict, description="Name to the words that call the LoRA"),
            InputParam("roles", type_hint=dict, description='Name to "subject", "style" or "utility"'),
        ]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Replaces what is loaded, if a call names files.

        Raises:
            MoLEError: A file does not fit; or words or roles are given without files.
        """
        given = self.get_block_state(state)
        if given.lora_files is None:
            if given.triggers or given.roles:
                raise MoLEError("`triggers` and `roles` belong to `lora_files`, and none are given. Give all of them.")
            return components, state
        pipe: Any = on_models(self._task, components)
        read: dict[str, LoRA] = {}
        if given.lora_files:
            for name, source in named_sources(given.lora_files).items():
                read[name] = source if isinstance(source, LoRA) else load_lora(source, pipe.lora_components, name=name)
        choose_triggers(given.triggers, read)  # so that nothing is taken off for what will be refused
        choose_roles(given.roles, read)
        pipe.unload_loras()
        if read:
            pipe.load_loras(read, triggers=given.triggers, roles=given.roles)
        return components, state


class LoadGates(_Loading):
    """Loads trained gates, and chooses how LoRAs share the picture. Both stay until a call names others."""

    @property
    def description(self) -> str:
        """What the block is for."""
        return "Loads gates for the loaded LoRAs and chooses how these share the picture; both stay."

    @property
    def inputs(self) -> list[InputParam]:
        """As `load_gates` and `set_composition` take them."""
        return [
            InputParam("gates", type_hint=str, description="Folder or Hub id of gates for these LoRAs"),
            InputParam("composition", description="A method or its name: masks, budget, mole …"),
        ]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Loads and chooses what a call names.

        Raises:
            MoLEError: The gates are for other LoRAs, or there is no such method.
        """
        given = self.get_block_state(state)
        pipe: Any = on_models(self._task, components)
        if given.gates is not None:
            pipe.load_gates(given.gates)
        if given.composition is not None:
            pipe._need_experts("composition")
            pipe.set_composition(given.composition)
        return components, state


class MoLEBlocks(SequentialPipelineBlocks):
    """Blocks of diffusers for one family, inside of which LoRAs are composed.

    The blocks are `loras` (:class:`LoadLoRAs`), `gates` (:class:`LoadGates`) and then those of diffusers; words are
    looked for where `text_encoder` encodes them, and where a method finds masks first, `denoise` runs its first steps
    without LoRAs. A call also takes `loras` and `regions`, as a call of our pipelines does, and its state has
    `masks`: which pixels were whose.

    `save_pretrained` writes what `ModularPipeline.from_pretrained(folder, trust_remote_code=True)` reads, also into
    the folder of a base model.

    Attributes:
        stock: The blocks of diffusers.
        task: The pipeline of ours for the same models.
    """

    stock: ClassVar[type[SequentialPipelineBlocks]]
    task: ClassVar[type[MoLEPipelineMixin]]

    def __init__(self) -> None:
        super().__init__()
        blocks = {"loras": LoadLoRAs(self.task), "gates": LoadGates(self.task), **self.stock().sub_blocks}
        self.sub_blocks = InsertableDict(blocks)

    @property
    def description(self) -> str:
        """What the blocks are for."""
        return f"{self.stock.__name__} with several LoRAs composed in one picture."

    @property
    def inputs(self) -> list[InputParam]:
        """Those of all blocks, and what a call of our pipelines takes."""
        return [
            *super().inputs,
            InputParam("loras", description="Of the loaded ones: a list of names, or name to strength; [] is the base"),
            InputParam("regions", description="Name to a box, polygon or painted mask; or the masks of a call before"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """Those of all blocks, and the masks."""
        return [*super().intermediate_outputs, OutputParam("masks", description="Which pixels were whose")]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Runs the blocks.

        Raises:
            MoLEError: As a call of our pipelines; or a region has a prompt of its own, for which there is no block.
        """
        blocks = dict(self.sub_blocks)
        for name in ("loras", "gates"):
            components, state = blocks.pop(name)(components, state)
        given: Mapping[str, Any] = state.values
        pipe = self.on(components)
        refuse_not_finite(given)
        refuse_clip_skip(pipe, given.get("clip_skip"))
        regions = given.get("regions")
        _, prompts = split_prompts(regions)
        if prompts:
            raise MoLEError(
                f"regions of {', '.join(prompts)} have prompts of their own, which no block here reads. Write all "
                f"words into the one prompt, or draw with {self.task.__name__}."
            )
        with drawing(pipe.lora_components):
            loras, taking_part, method = pipe._chosen(given.get("loras"), regions, given, has_prompt=True)
            settings = {
                "scale": read_scale(given),
                "regions": regions,
                "scheduler": components.scheduler,
                "size": None if regions is None else picture_size(pipe, given),
                "count": picture_count(given),
            }
            with call_turn(components, components.scheduler), pipe._composing(loras, method, **settings) as call:
                if pipe.experts is not None:
                    refuse_unheard(pipe, given)
                for name, block in blocks.items():
                    if name == "text_encoder" and "words" in method.needs and pipe.experts is not None:
                        call.words = prompt_words(pipe, given["prompt"], pipe._loaded, call, given)
                    if name == "denoise" and pipe._looks_first(method, call, taking_part):
                        with drawing_prior(pipe, method, call, {"generator": given.get("generator")}):
                            block(components, _copied(state))
                    components, state = block(components, state)
                    if name == "text_encoder":
                        _tell_embeddings(pipe, call, given)
                state.set("masks", call.found or call.regions)
        return components, state

    def on(self, components: Any) -> Any:
        """The pipeline of ours that reads prompts as the blocks do, on the same models.

        Args:
            components: The modular pipeline.
        """
        return on_models(self.task, components)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `modular_config.json` and `block.py`, which takes the blocks from the installed package.

        Args:
            save_directory: A folder, of its own or of a base model.
            push_to_hub: Whether to upload it, as in diffusers.
            kwargs: As in diffusers.

        Raises:
            MoLEError: The folder holds other blocks.
            NotWrittenError: It cannot be written.
        """
        name, file = type(self).__name__, Path(save_directory) / "block.py"
        if file.exists() and "mole_diffusion" not in read_text(file):
            raise MoLEError(f"{file} is of other blocks, and would be replaced. Choose another folder.")
        self.register_to_config(auto_map={"ModularPipelineBlocks": f"block.{name}"})
        with atomic_files(save_directory) as temporary:
            (temporary / "block.py").write_text(PUBLISHED.format(name=name), encoding="utf-8")
            self.save_config(save_directory=temporary)
        if push_to_hub:
            self.save_config(save_directory=save_directory, push_to_hub=True, **kwargs)


def on_models(task: type[MoLEPipelineMixin], components: Any) -> MoLEPipelineMixin:
    """A pipeline of ours on the models of a modular one, with the LoRAs that hang there.

    Args:
        task: Its class.
        components: The modular pipeline.

    Raises:
        LoadingError: A model holds other weights than its files, which `load_components` of diffusers does not say.
    """
    loaded = {name: part for name, part in components.components.items() if isinstance(part, torch.nn.Module)}
    refuse_random_weights({name: part for name, part in loaded.items() if part not in _LOOKED_AT})
    _LOOKED_AT.update(loaded.values())
    parts: dict[str, Any] = {}
    for one in list(inspect.signature(task.__init__).parameters.values())[1:]:
        part = components.components.get(one.name)
        if part is not None or one.default is one.empty:
            parts[one.name] = part
    return task(**parts)


def _tell_embeddings(pipe: MoLEPipelineMixin, call: Call, given: Mapping[str, Any]) -> None:
    """Says what the prompts became, so that the denoiser's rows are known."""
    if call.words is not None:
        embeds = pipe.family.embedded((given["prompt_embeds"],), 1)
        call.words.encoded(embeds.repeat_interleave(int(given.get("num_images_per_prompt") or 1), dim=0))


def _copied(state: PipelineState) -> PipelineState:
    """A state whose changes are not the other's; tensors are shared."""
    return PipelineState(dict(state.values), {kind: list(names) for kind, names in state.kwargs_mapping.items()})


class MoLEStableDiffusionXLBlocks(MoLEBlocks):
    """Stable Diffusion XL: `diffusers.StableDiffusionXLAutoBlocks` with LoRAs composed."""

    stock = StableDiffusionXLAutoBlocks
    task = MoLEStableDiffusionXLPipeline


class MoLEStableDiffusion3Blocks(MoLEBlocks):
    """Stable Diffusion 3 and 3.5: `diffusers.StableDiffusion3AutoBlocks` with LoRAs composed."""

    stock = StableDiffusion3AutoBlocks
    task = MoLEStableDiffusion3Pipeline


class MoLEFluxBlocks(MoLEBlocks):
    """FLUX.1: `diffusers.FluxAutoBlocks` with LoRAs composed."""

    stock = FluxAutoBlocks
    task = MoLEFluxPipeline


class MoLEFlux2Blocks(MoLEBlocks):
    """FLUX.2 dev: `diffusers.Flux2AutoBlocks` with LoRAs composed."""

    stock = Flux2AutoBlocks
    task = MoLEFlux2Pipeline

    def on(self, components: Any) -> Any:
        """As for the others; diffusers' block has another line break in its system message than its pipeline."""
        pipe = super().on(components)
        encode = inspect.signature(Flux2TextEncoderStep._get_mistral_3_prompt_embeds)
        pipe.system_message = encode.parameters["system_message"].default
        return pipe


class MoLEFlux2KleinBlocks(MoLEBlocks):
    """FLUX.2 klein, distilled: `diffusers.Flux2KleinAutoBlocks` with LoRAs composed."""

    stock = Flux2KleinAutoBlocks
    task = MoLEFlux2KleinPipeline


class MoLEFlux2KleinBaseBlocks(MoLEBlocks):
    """FLUX.2 klein, not distilled: `diffusers.Flux2KleinBaseAutoBlocks` with LoRAs composed."""

    stock = Flux2KleinBaseAutoBlocks
    task = MoLEFlux2KleinPipeline


class MoLEZImageBlocks(MoLEBlocks):
    """Z-Image: `diffusers.ZImageAutoBlocks` with LoRAs composed."""

    stock = ZImageAutoBlocks
    task = MoLEZImagePipeline


class MoLEKrea2Blocks(MoLEBlocks):
    """Krea 2: `diffusers.Krea2AutoBlocks` with LoRAs composed."""

    stock = Krea2AutoBlocks
    task = MoLEKrea2Pipeline


class MoLEQwenImageBlocks(MoLEBlocks):
    """Qwen-Image: `diffusers.QwenImageAutoBlocks` with LoRAs composed."""

    stock = QwenImageAutoBlocks
    task = MoLEQwenImagePipeline
