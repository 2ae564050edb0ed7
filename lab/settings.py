"""The settings of an agent: its Config, and the same in plain values, which JSON can hold.

Harness, processes and config.json hold the plain values; only building an agent makes its Config.
Plain are numbers, strings, booleans, None, and tuples, lists and dictionaries of them. A Path
becomes a string, a member of an Enum its name, a dataclass a dictionary.
"""

import dataclasses
import enum
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def tuned_file(agent: Path, env_id: str) -> Path:
    """Where the settings that ship lie, of all agents beside this one, for the environment."""
    return agent.parent / "tuned" / (re.sub(r"[^\w.-]+", "_", env_id) + ".json")


def plain_config(config: Any) -> dict[str, Any]:
    """The Config in plain values. ValueError names a setting that would not come back from JSON
    as it is."""
    result, hints = {}, get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        try:
            result[field.name] = plain(value)
            back = _build(hints[field.name], json.loads(json.dumps(result[field.name])))
        except TypeError as error:
            raise ValueError(f"the setting {field.name} cannot be written to config.json: "
                             f"{error}") from error
        if back != value and repr(back) != repr(value):  # NaN is not equal to itself
            raise ValueError(f"the setting {field.name} would change in config.json: {value!r} is "
                             f"read back as {back!r}")
    return result


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name))
                for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if type(value) in (tuple, list):
        return type(value)(plain(x) for x in value)
    if type(value) is dict:
        return {key: plain(x) for key, x in value.items()}
    return value


def build(kind: type[Any], values: dict[str, Any]) -> Any:
    """A dataclass from plain values, which may come from JSON. TypeError if it has no such
    field."""
    hints = get_type_hints(kind)
    return kind(**{name: _build(hints.get(name, Any), value) for name, value in values.items()})


def _build(hint: Any, value: Any) -> Any:
    """The plain value as its type says. A value that does not fit the type stays as it is."""
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        built = [(part, _build(part, value)) for part in parts]
        return next((x for part, x in built if _is(x, part)), value)
    if isinstance(value, list | tuple) and origin in (list, tuple):
        each = parts if origin is tuple and parts[-1:] != (...,) else parts[:1] * len(value)
        each = each if len(each) == len(value) else (Any,) * len(value)
        return origin(_build(part, x) for part, x in zip(each, value, strict=True))
    if isinstance(value, dict):
        if isinstance(origin, type) and dataclasses.is_dataclass(origin):
            return build(origin, value)
        return {key: _build(parts[1] if len(parts) > 1 else Any, x) for key, x in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(value, str) and isinstance(origin, type):
        if issubclass(origin, enum.Enum):
            return origin.__members__.get(value, value)
        if issubclass(origin, Path):
            return Path(value)
    return value


def _is(value: Any, hint: Any) -> bool:
    """Whether the value is of the type, without a look at the types of its parts."""
    origin = get_origin(hint) or hint
    return not isinstance(origin, type) or isinstance(value, origin)


def names(config: Any) -> Iterator[str]:
    """The names of its settings, those of nested dataclasses among them."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from names(value)
        else:
            yield field.name
