"""Parts of a module in the words of the file they come from, for messages."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .layouts.slot import KOHYA_ENDINGS, PEFT_ENDINGS, take_ending

_OLD_ENDINGS = {"down": "down.weight", "up": "up.weight"}
_PART = re.compile(r"<(\w+)>")


def spoken(message: str, keys: Mapping[str, str], layout: str) -> str:
    """A message in which parts stand as `<down>`, with what the file calls them: `lora_A.weight`.

    Args:
        message: The message.
        keys: Key of every part of the module that the file has. Others are said as it would write them.
        layout: Of the file.
    """
    return _PART.sub(lambda match: _ending(match[1], keys, layout), message)


def _ending(part: str, keys: Mapping[str, str], layout: str) -> str:
    if part in keys:
        found = take_ending(keys[part])
        return keys[part][len(found[0]) + 1 :] if found else ".".join(keys[part].split(".")[-2:])
    if layout == "diffusers-old":
        endings = _OLD_ENDINGS
    else:
        # Programs mix: module names of kohya's with endings of PEFT's, and the other way round.
        words = " ".join(keys.values())
        kohyas = ".lora_down." in words or ".lora_up." in words
        theirs = ".lora_A." in words or ".lora_B." in words or ".lora_magnitude_vector" in words
        endings = KOHYA_ENDINGS if kohyas or (layout == "kohya" and not theirs) else PEFT_ENDINGS
    return endings.get(part, part)
