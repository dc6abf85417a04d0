"""The words that call a LoRA, as its file names them.

Metadata is written by anybody: what is too long, malformed or of another kind than expected is passed over, never an
error, as a LoRA draws without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

TRIGGERS_KEY = "mole_diffusion.triggers"  # a JSON list of phrases
MODELSPEC_KEY = "modelspec.trigger_phrase"  # of the Stability AI model specification; kohya's --metadata_trigger_phrase
TAGS_KEY, DIRS_KEY, REGULARISATION_KEY = "ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs"  # kohya's

LONGEST_JSON = 4_000_000  # characters; kohya lists every tag of every caption
LONGEST_PHRASE = 100  # characters; a longer one is a caption
MOST_PHRASES = 8
MOST_PICTURES = 1_000_000_000
NEARLY_ALL = 0.9  # of the captions must have a tag that is taken for a trigger


def read_triggers(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The phrases that call a LoRA, from the metadata of its safetensors file.

    The first of these that names any is taken:

    - `mole_diffusion.triggers`, which `save_lora` and `train_lora` write;
    - `modelspec.trigger_phrase`, phrases between commas;
    - kohya's `ss_tag_frequency`: the most frequent tag, if it is in nearly all captions. ai-toolkit writes its trigger
      word there too, as the only tag of a data set.

    Returns:
        At most eight different phrases of at most 100 characters; empty where the file names none.
    """
    for read in (_own, _modelspec, _kohya):
        if phrases := read(metadata):
            return phrases
    return ()


def write_triggers(triggers: Sequence[str]) -> dict[str, str]:
    """The metadata that `read_triggers` reads as `triggers`; none for none."""
    return {TRIGGERS_KEY: json.dumps(list(triggers), ensure_ascii=False)} if triggers else {}


def _own(metadata: Mapping[str, str]) -> tuple[str, ...]:
    phrases = _json(metadata, TRIGGERS_KEY)
    return _phrases(phrases) if isinstance(phrases, list) else ()


def _modelspec(metadata: Mapping[str, str]) -> tuple[str, ...]:
    return _phrases(metadata.get(MODELSPEC_KEY, "")[:LONGEST_JSON].split(","))


def _kohya(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """`{data set: {tag: captions that have it}}`, beside the number of pictures of each data set."""
    sets, sizes, skipped = (_json(metadata, key) for key in (TAGS_KEY, DIRS_KEY, REGULARISATION_KEY))
    if not isinstance(sets, dict):
        return ()
    totals: dict[str, int] = {}
    captions = 0
    for name, tags in sets.items():
        if isinstance(skipped, dict) and name in skipped:  # pictures of the class, without the subject
            continue
        counts: dict[str, int] = {}
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if _is_count(count):  # old versions keep the space after a comma: " sks" beside "sks"
                counts[tag.strip()] = counts.get(tag.strip(), 0) + count
        size = sizes.get(name) if isinstance(sizes, dict) else None
        pictures = size.get("img_count") if isinstance(size, dict) else None
        if _is_count(pictures):
            captions += pictures
        elif len(counts) == 1:
            captions += sum(counts.values())
        else:
            return ()  # nobody says how many captions there are, so no tag is known to be in all
        for tag, count in counts.items():
            totals[tag] = totals.get(tag, 0) + count
    if not totals:
        return ()
    best = max(totals, key=lambda tag: totals[tag])  # of several, the first: trainers keep triggers in front
    return _phrases([best]) if totals[best] >= NEARLY_ALL * captions else ()


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST_PICTURES


def _json(metadata: Mapping[str, str], key: str) -> Any:
    """The value of `key`, or None for one that is missing, too long or no JSON."""
    text = metadata.get(key, "")
    if len(text) > LONGEST_JSON:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _phrases(candidates: Sequence[Any]) -> tuple[str, ...]:
    """Those that can be phrases of a prompt, each once, spaces set right."""
    texts = [" ".join(text.split()) for text in candidates if isinstance(text, str) and len(text) <= LONGEST_PHRASE]
    return tuple(dict.fromkeys(text for text in texts if text and text.isprintable()))[:MOST_PHRASES]
