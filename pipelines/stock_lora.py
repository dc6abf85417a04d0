"""What diffusers' own LoRA calls do where LoRAs of ours are loaded: the same for ours, or a refusal that says how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from ..errors import MoLEError
from .contract import DiffusersContract

if TYPE_CHECKING:
    from collections.abc import Sequence


class StockLoRACalls(DiffusersContract):
    """diffusers' calls about LoRAs know only the adapters of PEFT; without these they would return in silence.

    `load_lora_weights` goes on working: its adapters act beside the LoRAs of `load_loras`.
    """

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers: an adapter of PEFT, beside ours and under a name that none of them has."""
        name = args[1] if len(args) > 1 else kwargs.get("adapter_name")
        if name in self._loaded.loras:
            raise MoLEError(
                f"`adapter_name={name!r}` is the name of a LoRA that `load_loras` loaded. Choose another, or call "
                f"`unload_loras([{name!r}])` first."
            )
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
        if any(name in self._loaded.loras for name in adapter_names):
            self._refuse("set_lora_device", "they are where the model is; `unload_loras` frees their memory")
        super().set_lora_device(adapter_names, *args, **kwargs)

    def disable_lora(self) -> None:
        """Draws without LoRAs, ours and PEFT's, until `enable_lora`."""
        self._loaded.disabled = True
        if self._adapters():
            super().disable_lora()

    def enable_lora(self) -> None:
        """Undoes `disable_lora`."""
        self._loaded.disabled = False
        if self._adapters():
            super().enable_lora()

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Takes off the adapters that `load_lora_weights` loaded; where there are none, ours."""
        if self._adapters() or not self._loaded.loras:
            super().unload_lora_weights(*args, **kwargs)
        else:
            self.unload_loras()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Unloads the named ones, ours or PEFT's."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        ours = [name for name in names if name in self._loaded.loras]
        theirs = [name for name in names if name not in ours]
        if ours:
            self.unload_loras(ours)
        if theirs:
            super().delete_adapters(theirs)

    def set_adapters(self, adapter_names: str | Sequence[str], *args: Any, **kwargs: Any) -> None:
        """Of PEFT's adapters; ours are chosen and weighed in each call."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if any(name in self._loaded.loras for name in names):
            self._refuse("set_adapters", 'choose and weigh them in each call: `pipe(prompt, loras={"cat": 0.8})`')
        super().set_adapters(adapter_names, *args, **kwargs)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Merges PEFT's adapters into the weights; ours stay beside them."""
        if self._loaded.loras and not self._adapters():
            self._refuse("fuse_lora", "they draw as fast beside the weights; to merge a file, `load_lora_weights` it")
        super().fuse_lora(*args, **kwargs)

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Undoes `fuse_lora`."""
        if self._loaded.loras and not self._adapters() and not self.num_fused_loras:
            self._refuse("unfuse_lora", "nothing of them was merged; `unload_loras` takes them off")
        super().unfuse_lora(*args, **kwargs)

    def _refuse(self, call: str, instead: str) -> NoReturn:
        raise MoLEError(
            f"`{call}` is about adapters of `load_lora_weights`, and the LoRAs {', '.join(self._loaded.loras)} were "
            f"loaded by `load_loras`: {instead}."
        )

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
            for module in model.modules():
                if _is_adapter(module) and not module.disable_adapters and not module.merged:
                    active |= dict.fromkeys(module.active_adapters)
        return list(active)


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and type(module).__module__.startswith("peft.")
