"""What keeps our pipelines diffusers pipelines: signature, `from_pipe`, saving under a name that diffusers knows."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Mapping
from functools import reduce, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import MoLEError, printable
from ..files import atomic_files
from ..loading import LoadingError, loading
from ..reading import regular_size
from .read_wrongly import refuse_random_weights
from .saving import remove_older_weights

if TYPE_CHECKING:
    from typing import Self

    from diffusers import DiffusionPipeline

    class Base(DiffusionPipeline):
        """What stands after the mixin in a class statement."""
else:
    Base = object  # at run time the mixin stands before the diffusers class and has no ancestor of its own


HUB = ("repo_id", "commit_message", "private", "token", "create_pr")
SINGLE_FILE_HINT = (
    "How such a model is built diffusers looks up on the Hub; without a network say config=FOLDER, a model of the same "
    "kind as a folder (--base-config on the command line)."
)


class DiffusersContract(Base):
    """Mixin for pipelines that add arguments to the call of a diffusers pipeline and change nothing else of it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls) or not any("__call__" in vars(ancestor) for ancestor in cls.__mro__):
            return  # a call of its own, or a mixin that stands before none yet

        # A __call__ per pipeline, so that editors and notebooks show the arguments of its diffusers pipeline.
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return super(cls, self).__call__(*args, **kwargs)

        def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
            return super(cls, self).encode_prompt(*args, **kwargs)

        if hasattr(_stock_class(cls), "encode_prompt"):  # its arguments are looked at too, and its source
            cls.encode_prompt = wraps(_stock_class(cls).encode_prompt)(encode_prompt)
        ours, stock = super(cls, cls).__call__, _stock_class(cls).__call__
        parameters = list(inspect.signature(stock).parameters.values())
        catch_all = parameters.pop() if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else None
        parameters += [p for p in inspect.signature(ours).parameters.values() if p.kind is p.KEYWORD_ONLY]
        parameters += [catch_all] if catch_all else []
        call.__name__, call.__qualname__ = "__call__", f"{cls.__qualname__}.__call__"
        call.__doc__ = f"{inspect.getdoc(ours)}\n\n{inspect.getdoc(stock)}"
        call.__signature__ = inspect.signature(stock).replace(parameters=parameters)  # type: ignore[attr-defined]
        cls.__call__ = call

    def _refuse_unknown_arguments(self, kwargs: Mapping[str, Any]) -> None:
        """Raises TypeError for an argument that a pipeline with a catch-all `**kwargs` would drop in silence."""
        kind: Any = type(self)
        known = _arguments(kind)
        for name in kwargs:
            # The two that diffusers still takes out of its catch-all.
            if name not in known and name not in ("callback", "callback_steps"):
                raise TypeError(f"{type(self).__name__} has no argument {name!r}. LoRAs are chosen with `loras`.")

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], method: str = "__call__") -> dict[str, Any]:
        """The arguments that a method of the diffusers pipeline was called with, by their names."""
        kind: Any = type(self)
        return {**dict(zip(_arguments(kind, method)[1:], args, strict=False)), **kwargs}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """As in diffusers, but weights are read from safetensors only, unless `use_safetensors=False` is given.

        Raises:
            LoadingError: The folder or repository is not there, or cannot be read.
        """
        with loading(f"the base model {pretrained_model_name_or_path}"):
            pipe = super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **kwargs})
        refuse_random_weights({name: part for name, part in pipe.components.items() if name not in kwargs})
        return pipe

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path: Any, **kwargs: Any) -> Self:
        """As in diffusers, but from a .safetensors file only.

        Raises:
            LoadingError: It is of another kind, is not there, or cannot be read.
        """
        file = str(pretrained_model_link_or_path)
        if not file.endswith(".safetensors"):
            raise LoadingError(
                f"{printable(file)} is no .safetensors file, and pickles, which can run any code, are not read. Most "
                "models are there as both."
            )
        if os.path.lexists(file):
            try:
                regular_size(file)
            except MoLEError as error:
                raise LoadingError(f"{printable(file)}: {error}.") from None
        with loading(f"the model {file}", SINGLE_FILE_HINT):
            return super().from_single_file(pretrained_model_link_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """As in diffusers, but the models, which both pipelines share, keep their precision unless `dtype` is given.

        diffusers casts them to float32 otherwise.
        """
        if "dtype" in kwargs or "torch_dtype" in kwargs:
            return super().from_pipe(pipeline, **kwargs)
        models: list[Any] = [model for model in pipeline.components.values() if isinstance(model, nn.Module)]
        dtypes: list[torch.dtype] = [model.dtype for model in models]
        # Casting up and back loses nothing, and is no cast at all where all have one precision.
        widest = reduce(torch.promote_types, dtypes)
        new = super().from_pipe(pipeline, dtype=widest, **kwargs)
        for model, dtype in zip(models, dtypes, strict=True):
            if dtype != widest:
                model.to(dtype)
        return new

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in diffusers, but what is in the folder stays as it is until everything has been written beside it.

        Raises:
            NotWrittenError: It cannot be written.
        """
        settings: dict[str, Any] = {"safe_serialization": safe_serialization, "variant": variant}
        hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
        folder = Path(save_directory)
        with atomic_files(folder) as temporary:
            super().save_pretrained(temporary, max_shard_size=max_shard_size, **settings, **kwargs)
            written = [file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file()]
        remove_older_weights(folder, written)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", folder.resolve().name), **hub, **settings)

    def to_json_string(self) -> str:
        """The configuration as JSON, under the name of the diffusers class, so that stock diffusers opens it."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = _stock_class(type(self)).__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


@functools.cache  # asked in every call
def _arguments(cls: type, method: str = "__call__") -> tuple[str, ...]:
    """Names of the arguments that a method of the diffusers pipeline takes, `self` first."""
    return tuple(inspect.signature(getattr(_stock_class(cls), method)).parameters)


def _stock_class(cls: type) -> Any:
    """The diffusers pipeline that a class of ours stands on."""
    for ancestor in cls.__mro__:
        if not issubclass(ancestor, DiffusersContract) and "__call__" in vars(ancestor):
            return ancestor
    raise TypeError(f"{cls.__name__} has no diffusers pipeline; write `class {cls.__name__}(MoLEPipelineMixin, …)`.")
