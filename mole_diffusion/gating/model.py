"""The gates of a model: made for some LoRAs, trained, saved, loaded, and asked for weights."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import hub_utils
from torch import Tensor, nn
from torch.nn import functional as F

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import atomic_files

from ..experts import Experts, Projections, Run, Site
from ..lora import LoRA
from .binding import Binding, Current, up_blocks
from .block import BlockExperts
from .config import GateConfig, TokenAxis
from .gate import Gate, masked_softmax
from .record import GateRecord
from .saving import CARD, card_of, check_loras, fingerprint, key_of, own_card, read_gates
from .spec import GateSpec, plan_gates, with_positions
from .tokens import reduce_tokens, token_grid


class MoLEModel(ModelMixin, ConfigMixin):
    """The gates of MoLE for one set of LoRAs; weighs the experts of a model.

    "Mixture of LoRA Experts", eqs. 9-13 (https://openreview.net/forum?id=uWvKBCYh4S). The gates are its only
    parameters. They are no part of the UNet or the pipeline, stay fp32 whatever those are cast to, and compute where
    the hidden states are. Saved with them are the names, order, hashes and ranks of the LoRAs, and the table of gates.

    Make one with `from_experts` or `from_pretrained`, then set `experts.weigher = model`.

    Args:
        gate_config: As from `GateConfig.to_dict()`.
        loras: One dictionary per LoRA: `name`, `sha256`, `ranks`.
        gate_table: One `GateSpec.to_dict()` per gate.

    Raises:
        MoLEError: If the configuration is not one this version knows.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        gate_config: dict[str, Any],
        loras: list[dict[str, Any]],
        gate_table: list[dict[str, Any]],
    ) -> None:
        super().__init__()
        self.gate_config = GateConfig.from_dict(gate_config)
        self.specs = tuple(GateSpec.from_dict(spec) for spec in gate_table)
        self.lora_names = tuple(lora["name"] for lora in loras)
        self.gates = nn.ModuleDict({key_of(spec.name): self._make_gate(spec) for spec in self.specs})
        many = self.num_experts > 1
        self._sum_exponent = math.log(self.gate_config.gate_sum) / math.log(self.num_experts) if many else 0.0
        self._binding: Binding | None = None
        self._record: GateRecord | None = None
        self._card: str | None = None

    @classmethod
    def from_experts(cls, experts: Experts, config: GateConfig | None = None) -> MoLEModel:
        """Untrained gates (uniform) for attached experts.

        Raises:
            MoLEError: If the experts are not attached, or `token_axis="flatten"` and the model was never run.
        """
        config = config or GateConfig()
        _need_attached(experts)
        specs = [with_positions(spec, config, experts) for spec in plan_gates(experts, config)]
        loras = [fingerprint(lora) for lora in experts.loras]
        return cls(gate_config=config.to_dict(), loras=loras, gate_table=[spec.to_dict() for spec in specs])

    @property
    def num_gates(self) -> int:
        """How many gates there are."""
        return len(self.specs)

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.lora_names)

    def gate_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to train, all of them gates."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def check_loras(self, loras: Sequence[LoRA]) -> None:
        """Check that these are the LoRAs the gates were made for, in their order.

        Raises:
            GatesError: Naming every difference in number, names, order, ranks and factors.
        """
        check_loras(self.config.loras, loras)

    def bind(self, experts: Experts) -> None:
        """Get ready to weigh these experts; setting `experts.weigher` does it.

        Raises:
            MoLEError: If they are not attached, are not those of the LoRAs the gates were made for, or sit in a model
                with other modules.
        """
        if self._binding is not None and self._binding.sites is experts.sites:
            return
        _need_attached(experts)
        self.check_loras(experts.loras)
        found = {spec.name: spec for spec in plan_gates(experts, self.gate_config)}
        specs = []
        for spec in self.specs:
            here = found.pop(spec.name, None)
            if here is None or here.to_dict() != dataclasses.replace(spec, positions=1).to_dict():
                raise MoLEError(
                    f"The gate at {spec.name} was made for other adapted modules than this model has there. Load the "
                    "base model the gates were trained with."
                )
            specs.append(dataclasses.replace(here, positions=spec.positions))
        if found:
            raise MoLEError(f"The model has adapted places without a gate: {sorted(found)[:3]}. Train new gates.")
        self.specs = tuple(specs)  # with the names of modules that this version of transformers has
        binding = Binding(experts, self.specs)
        for spec in self.specs:
            if spec.block is not None:
                self._hook_block(binding, spec, experts)
            elif spec.hidden_features is None:
                self._gate(spec).set_up(up_blocks(spec, experts, self._gate(spec).weight.dtype))
        self._binding = binding

    def reads_left_out(self, site: Site) -> bool:
        """Whether a gate reads what all LoRAs add at a module, also those that are left out.

        The paper's gates look at the outputs of all their experts; masking one takes its share and changes no logit.
        """
        spec = None if self._binding is None else self._binding.spec_of.get(site.name)
        if spec is None or spec.hidden_features is not None:
            return False
        return spec.block is not None or site.name in spec.entry_sites

    def weigh(self, site: Site, projections: Projections, run: Run, masks: Tensor | None = None) -> Tensor | None:
        """Final weights of one module, `(batch, 1, N)`, or `(batch, tokens, N)` with `token_axis="token"`.

        The first of a scope to run sets them for the whole scope.

        Args:
            site: The module.
            projections: `A x` of this module and of those that read the same tensor.
            run: The forward pass.
            masks: What `residual` gates correct: the weights of a rule here, `(batch | 1, tokens | 1, N)`, with
                `run.keep` worked in and `run.scale` not.

        Raises:
            MoLEError: If a module runs before those its gate reads, a flattened gate meets another resolution, or there
                are masks for gates that correct none, or none for gates that do.
        """
        if (masks is not None) != self.gate_config.residual:
            raise MoLEError(
                f"the gates for {', '.join(self.lora_names)} were trained "
                + ("to correct masks" if self.gate_config.residual else "to weigh LoRAs alone")
                + f'. Use `set_composition("{"masked_gates" if self.gate_config.residual else "mole"}")`.'
            )
        binding = self._binding
        if binding is None or site.name not in binding.spec_of:
            raise MoLEError(f"These gates do not weigh {site.name}. Set `experts.weigher = model` to bind them.")
        spec = binding.spec_of[site.name]
        if spec.block is not None:
            return binding.blocks[spec.name].weights(run)
        current: Current | None = run.notes.get(spec.name)
        if site.name in spec.entry_sites and not (current is not None and current.source() is projections):
            features = _read(spec, site, projections, self.gate_config.token_axis)
            if self.gate_config.token_axis == "pooled":
                features = _without_filling(features, run.told.there(site.reads, features.shape[1]))
            size = None
            if spec.spatial and isinstance(self.gate_config.token_axis, int):
                size = _grid(spec, site, projections) or token_grid(features.shape[1], run.sample_size, spec.name)
            current = Current(weakref.ref(projections), self._weigh(spec, features, size, run, masks))
            run.notes[spec.name] = current
        elif current is None:
            raise MoLEError(
                f"{site.name} ran before {list(spec.entry_sites)}, which its gate reads. This model runs its modules "
                "in an order the scope does not expect; use scope='matrix'."
            )
        return current.weights

    @contextmanager
    def record(self, accumulate: bool = False) -> Iterator[GateRecord]:
        """Note what the gates give inside a `with` block.

        Args:
            accumulate: Keep all passes (denoising steps), not only the latest of each model.
        """
        before, self._record = self._record, GateRecord(self.specs, self.lora_names, accumulate)
        try:
            yield self._record
        finally:
            self._record = before

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json` and the gates as safetensors into a folder.

        Args:
            save_directory: Made if it does not exist. Each file is replaced in one step.
            push_to_hub: Also upload to the Hugging Face Hub.
            kwargs: For `push_to_hub`: `repo_id` (else the folder's name), `token`, `private` ...
        """
        folder = Path(save_directory)
        with atomic_files(folder) as temporary:
            super().save_pretrained(temporary)
        if push_to_hub:
            self._card = own_card(folder) or self._card  # a training leaves its card beside the gates
            self.push_to_hub(kwargs.pop("repo_id", folder.resolve().name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Upload the gates with their model card: the one they came with, or one of what they are made for.

        Args are those of diffusers' `push_to_hub`.
        """
        repo_id = hub_utils.create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
        with tempfile.TemporaryDirectory() as temporary:
            self.save_pretrained(temporary)
            card = self._card or card_of(self.config.loras, self.gate_config)
            (Path(temporary) / CARD).write_text(card, encoding="utf-8")
            return self._upload_folder(
                temporary, repo_id, token=token, commit_message=commit_message, create_pr=create_pr
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> MoLEModel:
        """Gates from a folder or the Hub, strictly: safetensors only, every key in its place, every number finite.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            kwargs: `subfolder`; of the Hub: `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`.

        Raises:
            GatesError: If the folder holds something else than `save_pretrained` writes.
        """
        saved = read_gates(pretrained_model_name_or_path, **kwargs)
        model = cls(**saved.settings)
        model.load_state_dict(saved.tensors)
        model._card = saved.card
        return model.eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoLEModel:
        # `.to(bfloat16)` and `.half()` move the gates but leave them fp32: a softmax over small logits needs it.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            halved = moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if halved else moved

        return super()._apply(keep_precision, recurse)

    def _make_gate(self, spec: GateSpec) -> Gate:
        config = self.gate_config
        return Gate(
            num_experts=len(spec.experts) + config.null_expert,
            positions=spec.positions,
            width=spec.width,
            num_features=spec.num_features,
            # A gate that reads nothing is given a 1, which only these two norms leave as it is.
            normalization="l2" if spec.hidden_features == 0 else config.normalization,
            temperature=config.temperature,
            learn_temperature=config.learn_temperature,
            beside=len(spec.experts) if config.residual else 0,
        )

    def _gate(self, spec: GateSpec) -> Gate:
        gate = self.gates[key_of(spec.name)]
        assert isinstance(gate, Gate)
        return gate

    def _weigh(
        self,
        spec: GateSpec,
        features: Tensor,
        size: tuple[int, int] | None,
        run: Run,
        masks: Tensor | None = None,
    ) -> Tensor:
        """Eqs. 9-11 and the mask: expert outputs or their coordinates to final weights `(batch, tokens | 1, N)`."""
        gate = self._gate(spec)
        if gate.weight.device != features.device:
            gate.to(features.device)
        device = features.device.type
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            features = features.to(gate.weight.dtype)
            reduced = reduce_tokens(features, self.gate_config.token_axis, spec.positions, size, spec.name)
            keep, shares, final = self._factors(spec.experts, features.device, run)
            if masks is not None:
                index = list(spec.experts)
                gates = masks.to(features.device, features.dtype).expand(*features.shape[:2], -1)
                beside = gates[..., index].flatten(0, 1)[:, None]
                logits = gate(reduced, beside).unflatten(0, (len(features), -1))
                added = logits.tanh() * run.keep.to(features.device)[:, None, index]
                gates = gates.index_add(-1, torch.tensor(index, device=gates.device), added)
                if self._record is not None:
                    self._record.add(spec.name, run, gates)
                return gates * run.scale.to(gates.device)[:, None]
            logits = gate(reduced).unflatten(0, (len(features), -1))  # (batch, tokens | 1, experts here)
            kept = masked_softmax(logits, keep, self.gate_config.null_expert)
            # With a graph also where nobody records: a checkpoint's recomputation, which may come when the recording is
            # over, must keep as many tensors as the pass it repeats.
            if self._record is not None or torch.is_grad_enabled():
                shown = self._spread(kept * shares, spec.experts)
                if self._record is not None:
                    self._record.add(spec.name, run, shown)
            return self._spread(kept * final, spec.experts)

    def _factors(
        self, experts: tuple[int, ...], device: torch.device, run: Run
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """What the softmax over these LoRAs is masked with, multiplied by, and multiplied by with the user's scale.

        The same in all scopes of a pass that the same LoRAs touch. `(rows | 1, 1, n)` each; no mask where every row
        keeps all.
        """
        key = self, experts, device
        if key not in run.notes:
            index = slice(None) if len(experts) == self.num_experts else list(experts)
            keep = run.keep.to(device)[:, None, index]
            shares = keep * keep.sum(dim=-1, keepdim=True).clamp_min(1) ** self._sum_exponent
            everybody = run.kept is None and len(keep) == 1
            run.notes[key] = (
                None if everybody else keep,
                shares,
                shares * run.scale.to(device)[:, None, index],
            )
        factors: tuple[Tensor | None, Tensor, Tensor] = run.notes[key]
        return factors

    def _spread(self, gates: Tensor, experts: tuple[int, ...]) -> Tensor:
        """Gates of some LoRAs as those of all: one that does not touch a scope has no share there."""
        if len(experts) == self.num_experts:
            return gates
        spread = gates.new_zeros(*gates.shape[:2], self.num_experts)
        spread[..., list(experts)] = gates
        return spread

    def _hook_block(self, binding: Binding, spec: GateSpec, experts: Experts) -> None:
        """Have a block run once more under each LoRA whenever these gates weigh it."""
        binding.blocks[spec.name] = mixer = BlockExperts(spec.experts, self.num_experts)

        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            run = experts.run(spec.component)
            if not run.active or self not in (run.weigher, getattr(run.weigher, "gates", None)):
                return output

            def weigh(expert_outputs: Tensor) -> Tensor:
                weights = self._weigh(spec, expert_outputs.flatten(2), None, run)
                return weights[:, 0, list(spec.experts)]

            return mixer.mix(run, block, args, kwargs, output, weigh)

        block = experts.component(spec.component).get_submodule(spec.block or "")
        experts.on_detach(block.register_forward_hook(hook, with_kwargs=True).remove)


def _need_attached(experts: Experts) -> None:
    if not experts.attached:
        raise MoLEError("These experts hang on no model; call `experts.attach(components)` first.")


def _read(spec: GateSpec, site: Site, projections: Projections, axis: TokenAxis) -> Tensor:
    """What a gate is given, `(batch, tokens, width)`: expert outputs in rank space, a hidden state, or a constant."""
    if spec.hidden_features is None:
        return torch.cat([projections.tensors[name] for name in spec.entry_sites], dim=-1)
    hidden_states = projections.hidden_states
    if spec.hidden_features == 0:
        return torch.ones(len(hidden_states), 1, 1, device=hidden_states.device)
    if axis == "token" and site.stack.is_convolution:  # a stride leaves fewer positions to weigh than there are to read
        hidden_states = F.adaptive_avg_pool2d(hidden_states, projections.spatial)
    return site.positions(hidden_states)


def _without_filling(features: Tensor, there: Tensor | None) -> Tensor:
    """`(batch, tokens, width)` whose mean over tokens is that over those which are there.

    A prompt must not look different in a batch with longer ones.
    """
    if there is None or len(there) != len(features):
        return features
    there = there.to(features.device, features.dtype)
    return features * (there * (there.shape[1] / there.sum(dim=1, keepdim=True)))[..., None]


def _grid(spec: GateSpec, site: Site, projections: Projections) -> tuple[int, int] | None:
    """Height and width of what a gate reads at a convolution; `None` elsewhere."""
    if spec.hidden_features is None or not site.stack.is_convolution:
        return projections.spatial
    height, width = projections.hidden_states.shape[-2:]
    return height, width
