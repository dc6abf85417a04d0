"""What is known of one kind of model: how it is built, in which order it runs, what its modules read, how it is called.

The other rooms ask here instead of looking at the names of modules.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .norms import is_norm

_GRIDS: Any = WeakIdKeyDictionary()

Reads = Literal["pixels", "text", "both", "vector", "own"]
"""What a module is given: tokens of the picture; tokens of a text that another network read, as a denoiser is given the
prompt; words and pixels in one sequence; one vector for each sample (time, modulation); or the tokens of a text that
its own network reads or writes."""


class Joint(NamedTuple):
    """Where words and pixels stand in the sequences that hold both.

    Attributes:
        text: Positions of the prompt's tokens.
        pixels: Positions of the picture's tokens, row after row of its grid.
    """

    text: slice
    pixels: slice


class Original(NamedTuple):
    """What one module of a model is in the code of the model's authors, or a part of it.

    Attributes:
        module: Name as in `named_modules()` of the diffusers model.
        rows: Which output rows of the authors' module it has, in its order; `None`: all as they are. (A fused `qkv`
            has three such parts.)
    """

    module: str
    rows: tuple[slice, ...] | None = None


@dataclass(frozen=True, eq=False)
class Told:
    """What a model was told when it was called.

    Attributes:
        rows: Size of the batch.
        timestep: Which step, in the units of the scheduler's `timesteps`; `None` for a text encoder.
        encoder_hidden_states: Prompt embeddings `(rows, tokens, width)` that a denoiser was given.
        input_ids: Tokens that a text encoder was given, `(rows, tokens)`.
        sample_size: `(height, width)` of the picture in tokens, at the finest level of the denoiser.
        joint: Where words and pixels stand in sequences of both; `None` where the model has none.
        words: Which of the prompt's tokens are there, `(rows, tokens)` bool, and which fill up; `None`: all are.
        prompt_lengths: How many are there in each row, where rows may differ and the model packs them.
        cache: What keeps keys and values of an earlier pass, for an error; `None`: nothing does.
    """

    rows: int
    timestep: Tensor | float | None = None
    encoder_hidden_states: Tensor | None = None
    input_ids: Tensor | None = None
    sample_size: tuple[int, int] | None = None
    joint: Joint | None = None
    words: Tensor | None = None
    prompt_lengths: tuple[int, ...] = ()
    cache: str | None = None

    def there(self, reads: Reads, tokens: int) -> Tensor | None:
        """Which tokens of a sequence are there, `(rows, tokens)` bool, and which fill it up; `None`: all are.

        Args:
            reads: What the module that is given the sequence reads.
            tokens: How many it has.
        """
        if self.words is None or tokens < self.words.shape[1]:
            return None
        if reads == "text":  # a module may be given each word several times over
            return self.words.repeat_interleave(tokens // self.words.shape[1], dim=1)
        if reads != "both" or self.joint is None:
            return None
        found = self.words.new_ones(len(self.words), tokens)
        found[:, self.joint.text] = self.words
        return found


def unit(names: str) -> re.Pattern[str]:
    """Matches a module's name up to the last of its parts that is one of `names`, a regular expression."""
    return re.compile(rf"^(.*\b(?:{names}))(?:\.|$)")


class Architecture:
    """One kind of model. A subclass sets what differs; an instance has no state.

    Names of modules are given as in `named_modules()`, less what `canonical_name` takes off.

    Attributes:
        classes: Names of the classes of such models. By name, since not every version of a library has them all.
        denoiser: Whether it predicts noise (else it reads text).
        tokens: What most of its modules are given.
        vectors: Parts of the names of modules that are given one vector for each sample: time, modulation.
        words: Parts of the names of modules that are given the prompt's tokens.
        both: Parts of the names of modules that are given words and pixels in one sequence.
        blocks: What runs as a whole: transformer blocks, layers of a text encoder, residual blocks.
        layers: Attention and feed-forward layers.
        order: Parts of names in the order in which a forward pass reaches them.
        siblings: Names, below one parent, of modules that are given the very same tensor: `to_q, to_k, to_v`.
        targets: Last parts of the names of modules that a LoRA is trained on where nobody says otherwise.
        meeting: Attention layers in which words and pixels attend to each other, in one sequence.
        refining: Attention layers in which words attend to each other alone.
        heads: Axis of the heads where norms of queries and keys are given these one by one: 1 before the tokens, 2
            behind them. `None`: it has no such norms, or nobody looked.
        lists: Whether the model takes and returns lists with one tensor for each sample.
        originals: The authors' names of modules that have another here, to ours; several where one of theirs is fused
            of ours, in the order of its rows. `*` is any one part of a name.
        exchanged: Those of our names in `originals` whose two halves, scale and shift, are exchanged.
    """

    classes: ClassVar[tuple[str, ...]] = ()
    denoiser: ClassVar[bool] = False
    tokens: ClassVar[Reads] = "own"
    vectors: ClassVar[frozenset[str]] = frozenset()
    words: ClassVar[frozenset[str]] = frozenset()
    both: ClassVar[frozenset[str]] = frozenset()
    blocks: ClassVar[re.Pattern[str]]
    layers: ClassVar[re.Pattern[str]]
    order: ClassVar[tuple[str, ...]] = ()
    siblings: ClassVar[tuple[tuple[str, ...], ...]] = ()
    targets: ClassVar[tuple[str, ...]] = ()
    meeting: ClassVar[re.Pattern[str] | None] = None
    refining: ClassVar[re.Pattern[str] | None] = None
    heads: ClassVar[int | None] = None
    lists: ClassVar[bool] = False
    originals: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    exchanged: ClassVar[frozenset[str]] = frozenset()

    def reads(self, model: nn.Module, module: str) -> Reads:
        """What a module is given.

        Args:
            model: The model.
            module: Name of the module.
        """
        parts = set(module.split("."))
        if parts & self.vectors:
            return "vector"
        if parts & self.words:
            return "text"
        return "both" if parts & self.both else self.tokens

    def is_read(self, model: nn.Module, module: str) -> bool:
        """Whether what the model returns depends on what a module computes.

        Args:
            model: The model.
            module: Name of the module.
        """
        return True

    def told(self, model: nn.Module, given: Mapping[str, Any]) -> Told:
        """Reads a call of the model.

        Args:
            model: The model.
            given: The arguments of the call by name, as from `arguments`.
        """
        ids = given.get("input_ids")
        embeds = given.get("inputs_embeds")
        first = ids if isinstance(ids, Tensor) else embeds
        return Told(rows=len(first) if isinstance(first, Tensor) else 1, input_ids=ids)

    def halvings(self, model: nn.Module, module: str) -> int:
        """How often a picture has been halved, rounding up, on its way to a module.

        Args:
            model: The model.
            module: Name of the module.
        """
        return 0

    def packs(self, module: str) -> bool:
        """Whether a module is given the tokens of all samples one after another; `lengths` is asked of no other."""
        return False

    def lengths(self, module: str, told: Told) -> tuple[int, ...] | None:
        """How many tokens each sample has where a module is given those of all samples one after another.

        `None`: the first axis of what it is given are the samples.
        """
        return None

    def network(self, module: str) -> str:
        """Which of several networks in the model a module is in; `""` where there is one."""
        return ""

    def block(self, module: str) -> str | None:
        """The block around a module."""
        found = self.blocks.match(module)
        return found[1] if found else None

    def transformer_block(self, module: str) -> str | None:
        """The block around a module where that is a transformer block, with one tensor in and one out."""
        return self.block(module)

    def transformer(self, module: str) -> str | None:
        """The spatial transformer around a module: blocks with projections into and out of them."""
        return None

    def layer(self, module: str) -> str | None:
        """The attention or feed-forward layer around a module."""
        found = self.layers.match(module)
        return found[1] if found and found[1] != module else None

    def firing_order(self, module: str) -> tuple[int, ...]:
        """Sort key: modules sorted by it come in the order of a forward pass."""
        rank = {name: index for index, name in enumerate(self.order)}
        return tuple(int(part) if part.isdigit() else rank.get(part, len(rank)) for part in module.split("."))

    def by_authors(self, module: str) -> bool:
        """Whether only the authors' own code calls a module so, in a model of any size.

        Args:
            module: Name as a file spells it, with dots or with underscores in their place.
        """
        name = module.replace(".", "_")
        patterns = (re.escape(theirs.replace(".", "_")).replace(r"\*", r"\d+") for theirs in self.originals)
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    def original_names(self, model: nn.Module) -> dict[str, tuple[Original, ...]]:
        """What the authors' own code calls the modules of this model, as LoRA files for other programs do.

        Only names that differ from diffusers' are in it. Made from the model, so of any size of it.
        """
        sides = {name: _outputs(module) for name, module in model.named_modules()}
        found: dict[str, tuple[Original, ...]] = {}
        for theirs, ours in self.originals.items():
            first = re.compile(re.escape(ours[0]).replace(r"\*", r"([^.]+)"))
            for match in filter(None, map(first.fullmatch, sides)):
                names = [_fill(name, match.groups()) for name in ours]
                rows = [side for name in names if (side := sides.get(name)) is not None]
                if len(rows) == len(names):
                    found[_fill(theirs, match.groups())] = self._parts(names, rows, ours)
        return found

    def _parts(self, names: Sequence[str], sides: Sequence[int], patterns: Sequence[str]) -> tuple[Original, ...]:
        if len(names) == 1:
            half = sides[0] // 2
            exchanged = patterns[0] in self.exchanged
            return (Original(names[0], (slice(half, 2 * half), slice(0, half)) if exchanged else None),)
        ends = list(itertools.accumulate(sides))
        return tuple(
            Original(name, (slice(end - side, end),)) for name, side, end in zip(names, sides, ends, strict=True)
        )


def _outputs(module: Any) -> int | None:
    """How many features a module gives; `None` where it has no weight to tell by."""
    side = getattr(module, "out_features", getattr(module, "out_channels", None))
    if side is None and is_norm(module):
        side = module.weight.shape[0]
    return side if isinstance(side, int) else None


def _fill(pattern: str, parts: Sequence[str]) -> str:
    """A pattern with parts of a name in the places of its stars."""
    for part in parts:
        pattern = pattern.replace("*", part, 1)
    return pattern


def arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names they have in `forward`."""
    return {**dict(zip(parameters(type(model)), args, strict=False)), **kwargs}


_PARAMETERS: WeakKeyDictionary[type[nn.Module], tuple[str, ...]] = WeakKeyDictionary()


def parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the parameters of a model's `forward`, looked up once, which takes longer than a small layer.

    Of its class: what is put in the place of one model's `forward`, by DeepCache or accelerate say, often is a
    `forward(*args, **kwargs)`, and so it is in some classes derived from it.
    """
    names = _PARAMETERS.get(kind)
    if names is None:
        written = [inspect.signature(vars(one)["forward"]).parameters for one in kind.__mro__ if "forward" in vars(one)]
        named = [found for found in written if all(one.kind is not one.VAR_POSITIONAL for one in found.values())]
        _PARAMETERS[kind] = names = tuple((named or written)[0])[1:]
    return names


def last_of(model: nn.Module, blocks: str = "transformer_blocks") -> int:
    """The number of the last of a model's blocks.

    Args:
        model: The model.
        blocks: What they are called.
    """
    found: Any = model.get_submodule(blocks)
    return len(found) - 1


def packed_grid(places: Any, first: int = 0) -> tuple[int, int] | None:
    """`(height, width)` of a picture from the place of each of its tokens, `(tokens, axes)`.

    Axes 1 and 2 are row and column. Pictures to look at may follow; they have another number on axis 0.

    Args:
        places: Of one sample, or `(rows, tokens, axes)` of all, which are alike.
        first: The picture's first token.
    """
    if not isinstance(places, Tensor):
        return None
    if places not in _GRIDS:  # a pipeline gives the same tensor in every step, and to look at it may stall a GPU
        own = (places[0] if places.ndim == 3 else places)[first:]
        own = own[own[:, 0] == own[0, 0], 1:3]
        height, width = (own.amax(dim=0) - own.amin(dim=0) + 1).tolist()
        _GRIDS[places] = int(height), int(width)
    grid: tuple[int, int] = _GRIDS[places]
    return grid


def spatial_size(sample: Any) -> tuple[int, int] | None:
    """`(height, width)` of a sample `(rows, channels, height, width)`; `None` of anything else."""
    is_picture = isinstance(sample, Tensor) and sample.ndim == 4
    return (sample.shape[-2], sample.shape[-1]) if is_picture else None
