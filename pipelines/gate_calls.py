"""How the LoRAs of a pipeline share its pictures: gates, and the method."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..composition import COMPOSITIONS, Budget, Composition, MaskedGates, Masks, MoLE
from ..errors import MoLEError
from ..experts import Experts
from ..gating import GateConfig, MoLEModel
from ..methods import check_method
from .loaded import OPEN, changing
from .lora_calls import LoRACalls


class GateCalls(LoRACalls):
    """The part of `MoLEPipelineMixin` about gates and methods."""

    @property
    def gates(self) -> MoLEModel | None:
        """The gates, or `None` as long as none are loaded."""
        return self._loaded.gates

    @property
    def composition(self) -> Composition:
        """The composition method in use: what was chosen, or what a call with all LoRAs would take by default."""
        return self._loaded.composition or self._default(tuple(self._loaded.loras), has_prompt=True)

    def init_gates(self, config: GateConfig | None = None) -> MoLEModel:
        """Hangs fresh, untrained gates on the loaded LoRAs and returns them.

        The composition becomes `"mole"`, or `"masked_gates"` for gates with `residual=True`.
        """
        return self._use_gates(MoLEModel.from_experts(self._need_experts("init_gates"), config))

    def load_gates(self, source: str | os.PathLike[str], **kwargs: Any) -> MoLEModel:
        """Loads trained gates from a folder or the Hub.

        The composition becomes `"mole"`, or `"masked_gates"` if they were trained to correct masks.

        Args:
            source: Folder or Hub id.
            **kwargs: Passed on to `MoLEModel.from_pretrained` (`revision`, `token`, `cache_dir`, …).

        Raises:
            MoLEError: No LoRAs are loaded, or they are not those the gates were trained with, in that order.
        """
        self._need_experts("load_gates")
        return self._use_gates(MoLEModel.from_pretrained(source, **kwargs))

    def save_gates(self, folder: str | os.PathLike[str], **kwargs: Any) -> Path:
        """Saves the gates, with names, hashes and ranks of their LoRAs, as a folder that `load_gates` reads.

        Raises:
            MoLEError: There are no gates, or the folder holds another model.
            NotWrittenError: It cannot be written.
        """
        if self.gates is None:
            raise MoLEError("there are no gates to save. Load some with `load_gates`, or start with `init_gates`.")
        self.gates.save_pretrained(folder, **kwargs)
        return Path(folder)

    def unload_gates(self) -> None:
        """Removes the gates; a composition that needs them goes too, and each call chooses for itself again."""
        with changing(self.lora_components, "unload gates"):
            self._loaded.drop_gates()

    def set_composition(self, method: str | Composition | None) -> None:
        """Chooses how the LoRAs share the picture.

        Args:
            method: A name in `mole_diffusion.composition.COMPOSITIONS`, or a method of your own. `None` leaves it to
                each call: `"masks"` where several LoRAs take part whose trigger words are known (given, or told by
                their files), and otherwise `"budget"`.

        Raises:
            MoLEError: The name is unknown; the method needs gates and none are loaded; or a call of this thread is
                running, or a `composing`, which keeps the method it began with.
        """
        if OPEN.holding(self._loaded) is not None:
            raise MoLEError(
                "cannot choose a composition in a call that is running, or inside of `composing`, which keep the one "
                "they began with. Do it before; to change which LoRAs draw from a step on, call `use_loras`."
            )
        if isinstance(method, str):
            check_method(method, COMPOSITIONS)
            method = COMPOSITIONS[method]()
        if not (method is None or isinstance(method, Composition)):
            raise TypeError(f"`method` must be a name or a Composition, got {method!r} ({type(method).__name__}).")
        if method is not None and "gates" in method.needs and method.gates is None:
            if self.gates is None:
                raise MoLEError(
                    f"composition {method.name!r} needs gates, and none are loaded. Load some with `load_gates`, start "
                    'fresh ones with `init_gates`, or use a method without gates, such as "normalized".'
                )
            method.gates = self.gates
        if method is None or not method.constant:
            self._loaded.refuse_fused("choose a composition whose weights change")
        self._loaded.composition = method
        self._loaded.set_weigher()

    def _need_experts(self, method: str) -> Experts:
        if self.experts is None:
            raise MoLEError(f"`{method}` needs LoRAs, and none are loaded. Call `load_loras` first.")
        return self.experts

    def _use_gates(self, gates: MoLEModel) -> MoLEModel:
        self._loaded.refuse_fused("choose a composition whose weights change")
        with changing(self.lora_components, "load gates"):
            # Binding compares the gates with the LoRAs and the model; nothing has changed if it refuses.
            gates.bind(self._need_experts("gates"))
            self._loaded.gates = gates
        self.set_composition(MaskedGates(gates=gates) if gates.gate_config.residual else MoLE(gates))
        return gates

    def _default(self, taking_part: Sequence[str], *, has_prompt: bool, regions: bool = False) -> Composition:
        """The method of a call for which none was chosen: binds LoRAs to their subjects wherever words allow it."""
        loaded = self._loaded
        subjects = [name for name in taking_part if loaded.roles[name] == "subject"]
        told = has_prompt and not loaded.called_by_name & set(subjects)
        several = sum(loaded.roles[name] != "utility" for name in taking_part) > 1
        return Masks() if regions or (told and several and subjects) else Budget()
