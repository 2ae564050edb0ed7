"""The search space of a study: parameters of an agent, encoded into the unit cube.

    qf_lr=log:1e-4:3e-3   batch_size=int:64:512   qf_width=logint:64:1024   gamma=0.95:0.999
    policy_delay=cat:1,2,3   tune_alpha=cat:true,false

Each integer and each choice takes an equal share of its axis. Numeric choices are sorted on one
axis; three or more choices of other types are one-hot.
"""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
import typeguard

from lab.command_line import whole as integer
from lab.errors import UserError

KINDS = {"": (False, False), "log": (True, False), "int": (False, True), "logint": (True, True)}
WORDS = {"true": True, "false": False, "none": None}
FORMS = "NAME=LOW:HIGH, log:LOW:HIGH, int:LOW:HIGH, logint:LOW:HIGH or cat:A,B,C"


@dataclass(frozen=True)
class Parameter:
    """One tuned field of the agent's Config. With choices, low and high bound the index."""

    name: str
    text: str  # as in --space
    low: float
    high: float
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def one_hot(self) -> bool:
        return len(self.choices) > 2 and not self.ordered

    @property
    def ordered(self) -> bool:
        return all(type(choice) in (int, float) for choice in self.choices)

    @property
    def size(self) -> int:
        """Number of axes in the cube."""
        return len(self.choices) if self.one_hot else 1

    def _ends(self) -> tuple[float, float]:
        margin = 0.5 if self.whole else 0.0
        low, high = self.low - margin, self.high + margin
        return (math.log(low), math.log(high)) if self.log else (low, high)

    def numbers(self, x: np.ndarray) -> np.ndarray:
        """x in [0, 1], any shape -> values, or indices of choices."""
        start, end = self._ends()
        values = start + x * (end - start)
        values = np.exp(values) if self.log else values
        return np.clip(np.round(values) if self.whole else values, self.low, self.high)

    def positions(self, values: np.ndarray) -> np.ndarray:
        """The inverse of numbers()."""
        start, end = self._ends()
        return ((np.log(values) if self.log else values) - start) / (end - start)

    def encode(self, value: Any) -> np.ndarray:
        """-> (size,) in the unit cube."""
        if self.one_hot:
            return np.array([float(choice == value) for choice in self.choices])
        number = self.choices.index(value) if self.choices else value
        return self.positions(np.array([float(number)]))

    def decode(self, x: np.ndarray) -> Any:
        """(size,) -> the value; floats are rounded to six significant digits."""
        if self.one_hot:
            return self.choices[int(x.argmax())]
        number = float(self.numbers(x)[0])
        if self.choices:
            return self.choices[int(number)]
        return int(number) if self.whole else min(max(float(f"{number:.6g}"), self.low), self.high)

    def bounds(self) -> tuple[Any, ...]:
        """Both ends of the range, or all choices: values that the agent must accept."""
        ends = (int(self.low), int(self.high)) if self.whole else (self.low, self.high)
        return self.choices or ends


@dataclass(frozen=True)
class Space:
    parameters: tuple[Parameter, ...]

    @property
    def size(self) -> int:
        """Number of axes of the cube."""
        return sum(parameter.size for parameter in self.parameters)

    def _split(self, x: np.ndarray) -> list[np.ndarray]:
        ends = np.cumsum([parameter.size for parameter in self.parameters])
        return np.split(x, ends[:-1], axis=-1)

    def encode(self, settings: dict[str, Any]) -> np.ndarray:
        """-> the settings' vector, (size,)."""
        return np.concatenate([p.encode(settings[p.name]) for p in self.parameters])

    def decode(self, x: np.ndarray) -> dict[str, Any]:
        """(size,) in the cube -> settings; integers and choices are rounded."""
        parts = zip(self.parameters, self._split(x), strict=True)
        return {parameter.name: parameter.decode(part) for parameter, part in parts}

    def snap(self, x: np.ndarray) -> np.ndarray:
        """(..., size) -> the vectors of the settings that they decode to."""
        parts = []
        for parameter, part in zip(self.parameters, self._split(x), strict=True):
            if parameter.one_hot:
                part = np.eye(parameter.size)[part.argmax(-1)]
            elif parameter.whole:
                part = parameter.positions(parameter.numbers(part))
            parts.append(part)
        return np.concatenate(parts, axis=-1)

    def texts(self) -> dict[str, str]:
        """The space as the journal records it: name -> text."""
        return {parameter.name: parameter.text for parameter in self.parameters}


def read(texts: Sequence[str], config: type[Any], agent: str) -> Space:
    """The texts of --space -> the space. UserError if one does not fit the agent's Config."""
    if not texts:
        raise UserError(f"--space is empty: give at least one {FORMS}")
    parameters = [_read_one(text, config, agent) for text in texts]
    names = [parameter.name for parameter in parameters]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate:
        raise UserError(f"--space names {duplicate!r} twice")
    return Space(tuple(sorted(parameters, key=lambda parameter: parameter.name)))


def _read_one(text: str, config: type[Any], agent: str) -> Parameter:
    def refuse(reason: str) -> UserError:
        return UserError(f"--space {text}: {reason}")

    name, equals, rest = text.partition("=")
    name = name.replace("-", "_")
    fields = [field.name for field in dataclasses.fields(config)]
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"settings: {', '.join(fields)}"
        raise refuse(f"{agent} has no setting {name!r}; {hint}")
    hint, words = get_type_hints(config)[name], rest.split(":")
    if words[0] == "cat" and len(words) > 1:
        parameter = _read_choices(name, rest)
        if parameter is None:
            raise refuse("cat needs at least two different choices, cat:A,B")
    else:
        kind = words.pop(0) if len(words) == 3 else ""
        if not equals or kind not in KINDS or len(words) != 2:
            raise refuse(f"expected {FORMS}")
        log, whole = KINDS[kind]
        try:
            low, high = (integer(word) if whole else float(word) for word in words)
        except ValueError as error:
            wanted = "whole numbers" if whole else "numbers"
            raise refuse(f"the bounds must be {wanted}, not {':'.join(words)}") from error
        if not low < high or not math.isfinite(high - low):
            raise refuse(f"LOW must be below HIGH, not {words[0]} and {words[1]}")
        if log and low <= 0:
            raise refuse(f"a log scale needs LOW above 0, not {words[0]}")
        parameter = Parameter(name, rest, low, high, log, whole)
    for value in parameter.bounds():
        try:
            typeguard.check_type(value, hint)
        except typeguard.TypeCheckError as error:
            wanted = hint.__name__ if isinstance(hint, type) else str(hint)
            raise refuse(f"{name} must be {wanted}, not {value!r}") from error
    return parameter


def _read_choices(name: str, text: str) -> Parameter | None:
    choices = [_read_choice(word) for word in text.removeprefix("cat:").split(",")]
    if len(choices) < 2 or len({(type(choice), choice) for choice in choices}) < len(choices):
        return None
    if all(type(choice) in (int, float) for choice in choices):
        choices.sort()
    return Parameter(name, text, 0, len(choices) - 1, whole=True, choices=tuple(choices))


def _read_choice(word: str) -> Any:
    if word.lower() in WORDS:
        return WORDS[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
