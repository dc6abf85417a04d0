"""What diffusers' own LoRA calls do where LoRAs of ours are loaded: the same for ours, or a refusal that says how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..experts.adapter_calls import CHOOSE, FUSE, HOTSWAP, UNFUSE, UNLOAD, answered, refuse
from .contract import DiffusersContract
from .loaded import changing

if TYPE_CHECKING:
    from collections.abc import Sequence


class StockLoRACalls(DiffusersContract):
    """diffusers' calls about LoRAs know only the adapters of PEFT; without these they would return in silence.

    `load_lora_weights` goes on working: its adapters act beside the LoRAs of `load_loras`.
    """

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers: an adapter of PEFT, beside ours and under a name that none of them has."""
        name: Any = args[1] if len(args) > 1 else kwargs.get("adapter_name")
        if name in self._loaded.loras:
            refuse("load_lora_weights", [name], f"choose another name, or call `unload_loras([{name!r}])` first")
        super().load_lora_weights(*args, **kwargs)

    def get_active_adapters(self) -> list[str]:
        """The names of what draws in a call with `loras=None`, ours and PEFT's."""
        if not self._loaded.loras:
            active: list[str] = super().get_active_adapters()
            return active
        return [*([] if self._loaded.disabled else self._loaded.loras), *self._active_adapters()]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """By model, the names of what is loaded into it, ours and PEFT's."""
        listed = super().get_list_adapters() if self._adapters() else {}
        for name, lora in self._loaded.loras.items():
            for component in lora.factors:
                listed.setdefault(component, []).append(name)
        return listed

    def set_lora_device(self, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> None:
        """Moves PEFT's adapters; ours are where the model is."""
        self._refuse_ours("set_lora_device", adapter_names, "they are where the model is; `unload_loras` frees memory")
        super().set_lora_device(adapter_names, *args, **kwargs)

    def enable_lora_hotswap(self, **kwargs: Any) -> None:
        """Prepares for adapters of PEFT; ours need none of it."""
        if self._loaded.loras:
            refuse("enable_lora_hotswap", list(self._loaded.loras), HOTSWAP)
        super().enable_lora_hotswap(**kwargs)

    def disable_lora(self) -> None:
        """Draws without LoRAs, ours and PEFT's, until `enable_lora`."""
        self._disable(True)
        if self._adapters():
            with answered():
                super().disable_lora()

    def enable_lora(self) -> None:
        """Undoes `disable_lora`."""
        self._disable(False)
        if self._adapters():
            with answered():
                super().enable_lora()

    def _disable(self, disabled: bool) -> None:
        if self._loaded.loras:
            with changing(self.lora_components, f"{'disable' if disabled else 'enable'} LoRAs"):
                self._loaded.disable(disabled)

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Takes off the adapters that `load_lora_weights` loaded; where there are none, ours."""
        if self._adapters() or not self._loaded.loras:
            with answered():
                super().unload_lora_weights(*args, **kwargs)
        else:
            self.unload_loras()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Unloads the named ones, ours or PEFT's."""
        names = _listed(adapter_names)
        ours = [name for name in names if name in self._loaded.loras]
        theirs = [name for name in names if name not in ours]
        if theirs:
            self._refuse_unknown("delete_adapters", theirs, UNLOAD)
        if ours:
            self.unload_loras(ours)
        if theirs:
            with answered():
                super().delete_adapters(theirs)

    def set_adapters(self, adapter_names: str | Sequence[str], *args: Any, **kwargs: Any) -> None:
        """Of PEFT's adapters; ours are chosen and weighed in each call."""
        self._refuse_ours("set_adapters", adapter_names, CHOOSE)
        with answered():
            super().set_adapters(adapter_names, *args, **kwargs)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Merges LoRAs into weights, for speed: PEFT's adapters as in diffusers, and where there are none, ours.

        Ours need a composition whose weights stay the same, such as `"linear"`, `"merge"`, `"normalized"` or
        `"budget"`, and models in float32. Each call still says with which of them it draws: what it asks for is merged
        when it is asked for first and kept until another choice is. The weights of the models stay as they are, and
        merged ones lie beside them; `loras=[]` and `unfuse_lora()` draw with the base bit for bit.

        Raises:
            MoLEError: The composition weighs anew at every place or step, a model is quantised or in half precision,
                adapters of PEFT are there too, or arguments say what a call's `loras` says.
        """
        loaded = self._loaded
        if not loaded.loras or self._adapters():
            self._refuse_ours("fuse_lora", kwargs.get("adapter_names") or self._adapters(), FUSE)
            loaded.refuse_fused("fuse adapters of `load_lora_weights`")
            with answered():
                super().fuse_lora(*args, **kwargs)
            return
        if args or kwargs:
            refuse("fuse_lora", list(loaded.loras), f"{FUSE}; {CHOOSE}")
        with changing(self.lora_components, "fuse LoRAs"):
            loaded.fuse()

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Undoes `fuse_lora`."""
        loaded = self._loaded
        if loaded.fused:
            with changing(self.lora_components, "unfuse LoRAs"):
                loaded.unfuse()
        elif loaded.loras and not self._adapters() and not self.num_fused_loras:
            refuse("unfuse_lora", list(loaded.loras), UNFUSE)
        else:
            with answered():
                super().unfuse_lora(*args, **kwargs)

    def _refuse_ours(self, call: str, given: str | Sequence[str], instead: str) -> None:
        """Raises MoLEError where a call of diffusers would not do for ours what it says."""
        names = _listed(given)
        ours = [name for name in names if name in self._loaded.loras]
        if ours or (self._loaded.loras and not names):
            refuse(call, ours or list(self._loaded.loras), instead)
        self._refuse_unknown(call, names, instead)

    def _refuse_unknown(self, call: str, names: Sequence[str], instead: str) -> None:
        """Raises MoLEError where nothing has one of these names, and ours would go on drawing."""
        if self._loaded.loras and set(names) - set(self._adapters()):
            refuse(call, list(self._loaded.loras), instead)

    def _adapters(self) -> list[str]:
        """The adapters that `load_lora_weights` left on the models."""
        found: dict[str, None] = {}
        for model in self.lora_components.values():
            found |= dict.fromkeys(getattr(model, "peft_config", None) or {})
        return list(found)

    def _active_adapters(self) -> list[str]:
        """Those of them that draw now."""
        active: dict[str, None] = {}
        for model in self.lora_components.values():
            if not getattr(model, "peft_config", None):
                continue  # a walk over all modules, for nothing
            for module in model.modules():
                if _is_adapter(module) and not module.disable_adapters and not module.merged:
                    active |= dict.fromkeys(module.active_adapters)
        return list(active)


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and type(module).__module__.startswith("peft.")
