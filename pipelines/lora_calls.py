"""Which LoRAs are loaded into a pipeline: loading them, taking them off, and what is known of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..choices import Role, check_names
from ..errors import MoLEError
from ..experts import Experts
from ..experts.refusals import refuse_adapters
from ..families import COMPONENTS, Family, family_of
from ..lora import LoRA, load_lora
from .embeddings import add_embeddings, check_embeddings, remove_embeddings
from .loaded import Loaded, changing, loaded_into
from .naming import LoRASource, choose_roles, choose_triggers, named_sources
from .stock_lora import StockLoRACalls


class LoRACalls(StockLoRACalls):
    """The part of `MoLEPipelineMixin` about loaded LoRAs."""

    @property
    def family(self) -> Family:
        """What is known of the models of this pipeline.

        Raises:
            MoLEError: Nothing is, or they are models that no LoRAs are composed on.
        """
        return family_of({name: getattr(self, name, None) for name in COMPONENTS})

    @property
    def lora_components(self) -> dict[str, nn.Module]:
        """The models LoRAs can touch, by their names in the pipeline."""
        found = {name: getattr(self, name, None) for name in self.family.architectures}
        return {name: model for name, model in found.items() if isinstance(model, nn.Module)}

    @property
    def experts(self) -> Experts | None:
        """The loaded LoRAs as experts on the models, or `None` without LoRAs."""
        return self._loaded.experts

    @property
    def triggers(self) -> dict[str, tuple[str, ...]]:
        """The words that call each LoRA."""
        return dict(self._loaded.triggers)

    @property
    def roles(self) -> dict[str, Role]:
        """The role of each LoRA: `"subject"`, `"style"` or `"utility"`."""
        return dict(self._loaded.roles)

    @property
    def _loaded(self) -> Loaded:
        own: Loaded | None = self.__dict__.get("_mole_loaded")
        if own is None or not own.loras:  # else the models need not be asked; a call asks often
            self.__dict__["_mole_loaded"] = own = loaded_into(self.lora_components, own)
        return own

    def load_loras(
        self,
        loras: Mapping[str, LoRASource] | Sequence[str | os.PathLike[str] | LoRA],
        *,
        triggers: Mapping[str, str | Sequence[str]] | None = None,
        roles: Mapping[str, Role] | None = None,
    ) -> None:
        """Loads LoRAs, in addition to those already loaded. If one is refused, nothing changes.

        Where a file brings embeddings of words of its own, these are loaded too, as textual inversion, and go with it.

        Args:
            loras: Name to file, state dict or `LoRA`; or a list of files, named by their stems.
            triggers: Name to the words in a prompt that call the LoRA, one phrase or several. By default those that
                its file tells (`mole train-lora` and kohya's trainers write them), else its name.
            roles: Name to `"subject"`, the default: a thing in the picture; `"style"`: everywhere but on subjects'
                words; or `"utility"`, such as LCM: everywhere, at its own weight.

        Raises:
            TypeError: `loras` or a name is of another type.
            MoLEError: A name is taken; a file does not fit (`LoRAError`); or gates are loaded, which know only the
                LoRAs they were trained for.
        """
        sources, components = named_sources(loras), self.lora_components
        with changing(components, "load LoRAs"):
            self._check_names(sources)  # before files are read
        read = {
            name: replace(source, name=name) if isinstance(source, LoRA) else load_lora(source, components, name=name)
            for name, source in sources.items()
        }
        words, called_by_name = choose_triggers(triggers, read)
        of_roles = choose_roles(roles, read)
        with changing(components, "load LoRAs"):
            self._check_names(read)  # another thread may have loaded some meanwhile
            loaded = self._loaded
            check_embeddings(self, read)
            loaded.hang(components, {**loaded.loras, **read})
            add_embeddings(self, read)
            loaded.triggers |= words
            loaded.called_by_name |= called_by_name
            loaded.roles |= of_roles

    def _check_names(self, names: Collection[str]) -> None:
        """Raises MoLEError where LoRAs of these names cannot be loaded, whatever they are."""
        loaded = self._loaded
        taken = [name for name in names if name in loaded.loras]
        if taken:
            raise MoLEError(
                f"a LoRA named {taken[0]!r} is loaded already. Loaded are: {', '.join(loaded.loras)}. "
                f"Choose another name, or call `unload_loras([{taken[0]!r}])` first."
            )
        self._refuse_under_gates("load more LoRAs")
        for name, model in self.lora_components.items():
            refuse_adapters(name, model)

    def unload_loras(self, names: Sequence[str] | None = None) -> None:
        """Takes the named LoRAs, or all, off the models. Without LoRAs the models are as before, bit for bit.

        Unloading all also removes the gates. With gates, single LoRAs are masked in a call instead:
        `pipe(prompt, loras=[...])`.

        Raises:
            MoLEError: A name is not loaded, gates are loaded and not all LoRAs go, or a picture is being drawn.
        """
        with changing(self.lora_components, "unload LoRAs"):
            self._unload(names)

    def _unload(self, names: Sequence[str] | None) -> None:
        loaded = self._loaded
        if names is None:
            names = list(loaded.loras)
        elif not isinstance(names, list | tuple):
            raise TypeError(f"`names` must be None (all) or a list of names, got {names!r} ({type(names).__name__}).")
        check_names(names, list(loaded.loras), "names")
        rest = {name: lora for name, lora in loaded.loras.items() if name not in names}
        if not rest:
            loaded.drop_gates()
        elif len(rest) < len(loaded.loras):
            self._refuse_under_gates("unload single LoRAs")
        remove_embeddings(self, {name: loaded.loras[name] for name in names})
        loaded.hang(self.lora_components if rest else {}, rest)
        for name in names:
            del loaded.triggers[name], loaded.roles[name]
        loaded.called_by_name -= set(names)

    def _refuse_under_gates(self, wish: str) -> None:
        if self._loaded.gates is not None:
            raise MoLEError(
                f"cannot {wish} while gates for {', '.join(self._loaded.loras)} are loaded, for gates weigh exactly "
                "the LoRAs they were trained with. Mask LoRAs with `pipe(..., loras=[...])`, or call "
                "`unload_gates()` first."
            )
