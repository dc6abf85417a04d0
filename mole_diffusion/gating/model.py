"""The gates of a model: made for some LoRAs, bound to them, asked for weights, saved and loaded."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import hub_utils
from torch import Tensor, nn

from mole_diffusion.errors import MoLEError
from mole_diffusion.files import atomic_files

from ..experts import Experts, Projections, Run, Site
from ..experts.blocks import Blocks
from ..experts.rules import Ruled
from ..experts.uncast import is_cast
from ..lora import LoRA
from .binding import Binding, Current, up_blocks
from .block import BlockExperts
from .card import CARD, card_of, own_card
from .config import GateConfig
from .features import feature_grid, read_features, without_filling
from .folder import key_of, read_gates, refuse_others
from .gate import Gate, divisors
from .identity import check_loras, lora_identity
from .in_graphs import follow, rule_of, together
from .record import GateRecord
from .routing import Routing
from .spec import GateSpec, plan_gates, with_positions
from .tokens import token_grid

# Each of the gates that it is about.
_RECORDS: Blocks[GateRecord] = Blocks("mole_diffusion.records")


class MoLEModel(ModelMixin, ConfigMixin):
    """The gates of MoLE for one set of LoRAs; weighs the experts of a model.

    "Mixture of LoRA Experts", eqs. 9-13 (https://openreview.net/forum?id=uWvKBCYh4S). The gates are its only
    parameters. They are no part of the UNet or the pipeline, stay fp32 whatever those are cast to, and compute where
    the hidden states are. Saved with them are the names, order, hashes and ranks of the LoRAs, and the table of gates.

    Make one with `from_experts` or `from_pretrained`, then set `experts.weigher = model`.

    Args:
        gate_config: What `GateConfig.to_dict()` gives.
        loras: One dictionary per LoRA: `name`, `sha256`, `ranks`.
        gate_table: One `GateSpec.to_dict()` per gate.

    Raises:
        MoLEError: The configuration is not one this version knows.
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
        self._routing = Routing(self.gate_config, self.num_experts)
        config = self.gate_config
        hidden_tokens = config.token_axis == "token" and config.input == "hidden"
        self._plain = hidden_tokens and config.normalization != "layer_norm" and not config.residual
        self._binding: Binding | None = None
        self._card: str | None = None

    @classmethod
    def from_experts(cls, experts: Experts, config: GateConfig | None = None) -> MoLEModel:
        """Untrained gates (uniform) for attached experts.

        Raises:
            MoLEError: The experts are not attached, or `token_axis="flatten"` and the model was never run.
        """
        config = config or GateConfig()
        _need_attached(experts)
        specs = [with_positions(spec, config, experts) for spec in plan_gates(experts, config)]
        loras = [lora_identity(lora) for lora in experts.loras]
        return cls(gate_config=config.to_dict(), loras=loras, gate_table=[spec.to_dict() for spec in specs])

    @property
    def num_gates(self) -> int:
        """How many gates there are."""
        return len(self.specs)

    @property
    def num_experts(self) -> int:
        """How many LoRAs the gates weigh, N."""
        return len(self.lora_names)

    def gate_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to train, all of them gates."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def check_loras(self, loras: Sequence[LoRA]) -> None:
        """Checks that these are the LoRAs the gates were made for, in their order.

        Raises:
            GatesError: They are not; the message names every difference in number, names, order, ranks and factors.
        """
        check_loras(self.config.loras, loras)

    def bind(self, experts: Experts) -> None:
        """Gets ready to weigh these experts; setting `experts.weigher` does it.

        Raises:
            MoLEError: They are not attached, are not those of the LoRAs the gates were made for, or sit in a model
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
        binding = Binding(experts, self.specs, [self.gate(spec) for spec in self.specs])
        for spec in self.specs:
            if spec.block is not None:
                self._hook_block(binding, spec, experts)
            elif spec.hidden_features is None:
                self.gate(spec).set_up(up_blocks(spec, experts, self.gate(spec).weight.dtype))
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
            MoLEError: A module runs before those its gate reads, a flattened gate meets another resolution, or there
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
            features = read_features(spec, site, projections, self.gate_config.token_axis)
            if self.gate_config.token_axis == "pooled":
                features = without_filling(features, run.told.there(site.reads, features.shape[1]))
            size = None
            if spec.spatial and isinstance(self.gate_config.token_axis, int):
                size = feature_grid(spec, site, projections) or token_grid(features.shape[1], run.sample_size, site)
            lean = self._divisors(binding, run, features.device).get(spec.name)
            record = self._record if lean is None else None  # nobody records where there is one
            weights = self._routing.weigh(binding.gates[spec.name], spec, features, size, run, masks, record, lean)
            current = Current(weakref.ref(projections), weights)
            run.notes[spec.name] = current
        elif current is None:
            raise MoLEError(
                f"{site.name} ran before {list(spec.entry_sites)}, which its gate reads. This model runs its modules "
                "in an order the scope does not expect; use scope='matrix'."
            )
        return current.weights

    @property
    def of_groups(self) -> Collection[str]:
        """Modules that share a gate, which reads nothing of LoRAs, with all others that read the same tensor."""
        own = type(self).weigh is MoLEModel.weigh and self._plain
        return self._binding.of_groups if own and self._binding is not None else ()

    @property
    def has_rules(self) -> bool:
        """Whether a compiled graph can weigh as these gates do, without asking them: nobody records what they give."""
        own = type(self).weigh is MoLEModel.weigh
        return own and self._plain and self._binding is not None and self._record is None

    def rules(self, parts: Mapping[Site, str]) -> dict[str, Ruled]:
        """What a compiled graph has of the gates, by module.

        Args:
            parts: The modules that can be in a graph with their LoRAs, and the compiled part that each lies in.

        Returns:
            What those modules have whose gate reads a hidden state and weighs no module in another part.
        """
        binding = self._binding
        assert binding is not None
        found: dict[str, Ruled] = {}
        null_expert, exponent = self.gate_config.null_expert, self._routing.sum_exponent
        named = {site.name: part for site, part in parts.items()}
        modules: dict[str, Any] = {site.name: site.module for site in parts}
        for spec in self.specs:
            if spec.block is None and spec.hidden_features and together(spec, named):
                gate, first = binding.gates[spec.name], spec.sites[0]
                device = modules[first].weight.device
                ruled = rule_of(spec, gate, named[first], device, null_expert, exponent)
                binding.ruled[spec.name] = ruled
                others = ruled._replace(tensors=(), numbers=(), reads=False)  # a graph looks at all it has, every time
                found |= {site: ruled if site in spec.entry_sites else others for site in spec.sites}
        return found

    def rules_now(self, run: Run) -> None:
        """Nothing is told beside `keep` and `scale`.

        Raises:
            MoLEError: Somebody records what a compiled graph does not tell.
        """
        if self._record is not None:
            raise MoLEError(
                "these gates are recorded, but the compiled graph that runs tells nobody what they give. Open "
                "`gates.record()` around the whole call of the pipeline, or around `using(...)`."
            )
        binding, known = self._binding, run.notes if run.call is None else run.call.state
        assert binding is not None
        if known.get((binding, "followed")) is None:  # once a call
            known[binding, "followed"] = True
            for name, ruled in binding.ruled.items():
                follow(binding.gates[name], ruled)

    def _divisors(self, binding: Binding, run: Run, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """By name, what gates of this pass divide by that can be asked in few operators.

        None where somebody wants a gradient or records, or where products are cast: looked at once a pass.
        """
        if not self._plain or torch.is_grad_enabled():
            return {}
        key = binding, "divisors", device
        found: dict[str, tuple[Tensor, Tensor]] | None = run.notes.get(key)
        if found is None:
            lean = self._record is None and not is_cast(device.type)
            run.notes[key] = found = self._made_divisors(binding, run, device) if lean else {}
        return found

    def _made_divisors(self, binding: Binding, run: Run, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Worked out once for all passes of a call."""
        known = run.notes if run.call is None else run.call.state
        key = binding, "divisors of", run.component, device
        made: dict[str, tuple[Tensor, Tensor]] | None = known.get(key)
        if made is None:
            gates = {spec.name: binding.gates[spec.name] for spec in self.specs if spec.component == run.component}
            known[key] = made = dict(zip(gates, divisors(list(gates.values()), device), strict=True))
        return made

    @contextmanager
    def record(self, accumulate: bool = False) -> Iterator[GateRecord]:
        """Notes what the gates give inside a `with` block, to calls of this thread.

        Args:
            accumulate: Whether to keep all passes (denoising steps), not only the latest of each model.
        """
        record = GateRecord(self.specs, self.lora_names, accumulate)
        with _RECORDS.open(record, of=self):
            yield record

    @property
    def _record(self) -> GateRecord | None:
        return _RECORDS.holding(self)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `config.json` and the gates as safetensors into a folder.

        Args:
            save_directory: The folder; made if it does not exist. Each file is replaced in one step.
            push_to_hub: Also upload to the Hugging Face Hub.
            kwargs: For `push_to_hub`: `repo_id` (else the folder's name), `token`, `private` ...

        Raises:
            GatesError: The folder holds another model.
            NotWrittenError: It cannot be written.
        """
        folder = Path(save_directory)
        with atomic_files(folder) as temporary:
            refuse_others(folder)
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
        """Uploads the gates with their model card: the one they came with, or one of what they are made for.

        The arguments are those of diffusers' `push_to_hub`.
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
            GatesError: The folder holds something else than `save_pretrained` writes.
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
            num_experts=len(spec.indices) + config.null_expert,
            positions=spec.positions,
            width=spec.width,
            num_features=spec.num_features,
            # A gate that reads nothing is given a 1, which only these two norms leave as it is.
            normalization="l2" if spec.hidden_features == 0 else config.normalization,
            temperature=config.temperature,
            learn_temperature=config.learn_temperature,
            beside=len(spec.indices) if config.residual else 0,
        )

    def gate(self, spec: GateSpec) -> Gate:
        """The gate of an entry in the table."""
        gate = self.gates[key_of(spec.name)]
        assert isinstance(gate, Gate)
        return gate

    def _hook_block(self, binding: Binding, spec: GateSpec, experts: Experts) -> None:
        """Makes a block run once more under each LoRA whenever these gates weigh it."""
        binding.blocks[spec.name] = mixer = BlockExperts(spec.indices, self.num_experts)

        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            run = experts.run(spec.component)
            if not run.active or self not in (run.weigher, getattr(run.weigher, "gates", None)):
                return output

            def weigh(expert_outputs: Tensor) -> Tensor:
                features = expert_outputs.flatten(2)
                weights = self._routing.weigh(self.gate(spec), spec, features, None, run, None, self._record)
                return weights[:, 0, list(spec.indices)]

            return mixer.mix(run, block, args, kwargs, output, weigh)

        block = experts.component(spec.component).get_submodule(spec.block or "")
        experts.on_detach(block.register_forward_hook(hook, with_kwargs=True).remove)


def _need_attached(experts: Experts) -> None:
    if not experts.attached:
        raise MoLEError("These experts hang on no model; call `experts.attach(components)` first.")
