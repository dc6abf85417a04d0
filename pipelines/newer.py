"""Pipelines that older versions of diffusers do not have."""

from __future__ import annotations

from typing import Any, NoReturn

import diffusers

from ..errors import MoLEError


class OlderDiffusersError(MoLEError, ImportError):
    """The installed diffusers is older than the pipeline that is asked for."""


def newer(name: str, since: str) -> Any:
    """A pipeline class of diffusers; where the installed version has none, one that says so when it is opened.

    Args:
        name: Of the class.
        since: The first version that has it, such as "0.39".
    """
    return getattr(diffusers, name, None) or type(name, (_Missing,), {"since": since})


class _Missing:
    """In place of a pipeline of diffusers: whoever makes one is told which version has it."""

    since: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._refuse()

    def __call__(self) -> NoReturn:
        self._refuse()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        cls._refuse()

    @classmethod
    def from_single_file(cls, *args: Any, **kwargs: Any) -> NoReturn:
        cls._refuse()

    @classmethod
    def from_pipe(cls, *args: Any, **kwargs: Any) -> NoReturn:
        cls._refuse()

    @classmethod
    def _refuse(cls) -> NoReturn:
        raise OlderDiffusersError(
            f"{cls.__name__} needs diffusers {cls.since} or newer, and this is {diffusers.__version__}. "
            f"Upgrade it: pip install 'diffusers>={cls.since}'"
        )
