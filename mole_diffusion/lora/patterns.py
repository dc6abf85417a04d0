"""`rank_pattern` and `alpha_pattern` of a PEFT config: which modules have a value of their own.

PEFT writes names of modules there, and takes regular expressions that match the end of a name, `(.*\\.)?(pattern)$`.
One from a file is never given to `re`, which some expressions keep busy for ever. Names are looked up; of expressions
what people use is read and followed in bounded time: `.`, `*`, `+`, `?`, `[0-9]`, `\\d`, `\\w`, `(a|b)`, `^`, `$`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

LONGEST_PATTERN, MOST_EXPRESSIONS, DEEPEST, MOST_STEPS = 500, 200, 2, 1_000_000
_NAME = re.compile(r"[\w.\-]+")
# A set of positions in a name to those that can be reached from there.
_Step = Callable[[str, frozenset[int]], frozenset[int]]


class PatternError(ValueError):
    """A pattern that is not read; the message says why."""


class Patterns:
    """A table of patterns.

    Args:
        table: Pattern to value, in the order in which they count.

    Raises:
        PatternError: It is no such table, or has an expression beyond what is read.
    """

    def __init__(self, table: Any) -> None:
        if not isinstance(table, Mapping) or not all(isinstance(pattern, str) for pattern in table):
            raise PatternError("is no table of regular expressions")
        self._steps = 0
        self._names: dict[str, tuple[int, Any]] = {}
        self._whole_names: dict[str, tuple[int, Any]] = {}
        self._expressions: list[tuple[int, bool, _Step, Any]] = []
        for index, (pattern, value) in enumerate(table.items()):
            whole, plain = pattern.startswith("^"), pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if _NAME.fullmatch(plain):
                names = self._whole_names if whole else self._names
                names.setdefault(plain, (index, value))
            elif whole and "|" in pattern:
                raise PatternError("has a regular expression with both '^' and '|', which is not read")
            elif len(self._expressions) < MOST_EXPRESSIONS:
                self._expressions.append((index, whole, _Parser(pattern, self._count).parse(), value))
            else:
                raise PatternError(f"has more than {MOST_EXPRESSIONS} regular expressions")

    def find(self, names: Sequence[str], default: Any) -> Any:
        """The value of the first pattern that matches the end of one of the names, else `default`: PEFT's rule.

        Raises:
            PatternError: The expressions take too long.
        """
        tails = (self._names.get(name[start:]) for name in names for start in _starts(name))
        found = [entry for entry in (*tails, *map(self._whole_names.get, names)) if entry is not None]
        best = min(found, key=lambda entry: entry[0], default=None)
        for index, whole, step, value in self._expressions:
            if best is not None and best[0] < index:
                break
            if any(len(name) in step(name, frozenset([0] if whole else _starts(name))) for name in names):
                return value
        return default if best is None else best[1]

    def _count(self, number: int) -> None:
        self._steps += number
        if self._steps > MOST_STEPS:
            raise PatternError("has regular expressions that take too long")


def _starts(name: str) -> Iterator[int]:
    """Where PEFT lets a pattern begin: at the beginning, and after every dot."""
    yield 0
    yield from (position + 1 for position, character in enumerate(name) if character == ".")


class _Parser:
    """Reads one expression into steps over sets of positions: no way is tried twice, so no expression explodes."""

    def __init__(self, pattern: str, count: Callable[[int], None]) -> None:
        if len(pattern) > LONGEST_PATTERN:
            raise PatternError(f"has a regular expression of {len(pattern)} characters; {LONGEST_PATTERN} are read")
        self.rest = pattern.removeprefix("^")
        self.rest = self.rest[:-1] if self.rest.endswith("$") and not self.rest.endswith("\\$") else self.rest
        self.count = count

    def parse(self) -> _Step:
        step = self._alternatives(0)
        if self.rest:
            raise PatternError(f"has a regular expression with {self.rest[0]!r} where it is not read")
        return step

    def _alternatives(self, depth: int) -> _Step:
        ways = [self._sequence(depth)]
        while self._take("|"):
            ways.append(self._sequence(depth))
        if len(ways) == 1:
            return ways[0]
        return lambda text, at: frozenset().union(*(way(text, at) for way in ways))

    def _sequence(self, depth: int) -> _Step:
        steps = []
        while self.rest and self.rest[0] not in "|)":
            steps.append(self._repeated(self._atom(depth)))

        def follow(text: str, at: frozenset[int]) -> frozenset[int]:
            for step in steps:
                at = step(text, at) if at else at
            return at

        return follow

    def _atom(self, depth: int) -> _Step:
        if self._take("("):
            if self.rest.startswith("?") and not self._take("?:"):
                raise PatternError("has a regular expression with a group '(?…', which is not read")
            if depth == DEEPEST:
                raise PatternError(f"has a regular expression with groups more than {DEEPEST} deep")
            group = self._alternatives(depth + 1)
            if not self._take(")"):
                raise PatternError("has a regular expression with a '(' that is not closed")
            return group
        allowed = self._characters()

        def step(text: str, at: frozenset[int]) -> frozenset[int]:
            self.count(len(at))
            return frozenset(p + 1 for p in at if p < len(text) and allowed(text[p]))

        return step

    def _characters(self) -> Callable[[str], bool]:
        """Which characters may stand at a place of one."""
        first, self.rest = self.rest[0], self.rest[1:]
        if first == "[":
            end = self.rest.find("]", 1)
            inside, self.rest = self.rest[:end], self.rest[end + 1 :]
            if end < 0 or not re.fullmatch(r"(?:\w-\w|[\w.\-])+", inside):
                raise PatternError("has a regular expression with a '[' that is not read")
            ranges = [(low, high) for low, high in re.findall(r"(\w)-(\w)", inside)]
            single = re.sub(r"\w-\w", "", inside)
            return lambda c: c in single or any(low <= c <= high for low, high in ranges)
        if first == "\\":
            if not self.rest:
                raise PatternError("has a regular expression that ends in a backslash")
            first, self.rest = self.rest[0], self.rest[1:]
            if first in "dw":
                return str.isdigit if first == "d" else lambda c: c.isalnum() or c == "_"
            if first.isalnum():
                raise PatternError(f"has a regular expression with '\\{first}', which is not read")
            return lambda c: c == first
        if first in "*+?{}^$":
            raise PatternError(f"has a regular expression with {first!r} where it is not read")
        return (lambda c: True) if first == "." else (lambda c: c == first)

    def _repeated(self, once: _Step) -> _Step:
        sign = next((sign for sign in "*+?" if self._take(sign)), None)
        if sign is None:
            return once
        self._take("?")  # lazy: the same names match

        def many(text: str, at: frozenset[int]) -> frozenset[int]:
            reached = new = once(text, at) if sign == "+" else at
            while new:
                self.count(len(new))
                new = once(text, new) - reached
                reached |= new
            return reached

        return many if sign != "?" else lambda text, at: at | once(text, at)

    def _take(self, text: str) -> bool:
        found = self.rest.startswith(text)
        self.rest = self.rest[len(text) :] if found else self.rest
        return found
