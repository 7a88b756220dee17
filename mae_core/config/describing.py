"""What can be set, what it means, and where the values of a configuration come from."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mae_core.config.load import flattened, load_config, named_config, read_layers, read_overrides
from mae_core.config.schema import Schema, section_of


class Option(NamedTuple):
    """A leaf of a configuration: its dotted key, the values it takes, its default, and what it means."""

    key: str
    type: str
    default: str
    meaning: str


def options_of(schema: type[BaseModel], prefix: str = "", defaults: Any = None) -> Iterator[Option]:
    """All options of a schema, in its order; a section's own defaults win over its schema's."""
    for name, field in schema.model_fields.items():
        value = getattr(defaults, name) if defaults is not None else field.get_default(call_default_factory=True)
        section = section_of(field.annotation)
        if section is not None:
            listed = typing.get_origin(field.annotation) is tuple
            stated = None if listed or value is PydanticUndefined else value
            yield from options_of(section, f"{prefix}{name}{'[]' if listed else ''}.", stated)
            continue
        default = "required" if value is PydanticUndefined else as_typed(value)
        yield Option(prefix + name, in_words(field.annotation, field), default, _meaning(schema, name))


def _meaning(schema: type[BaseModel], name: str) -> str:
    """The description of a field; where a schema changes its default alone, that of the schema it builds on."""
    fields = (parent.model_fields.get(name) for parent in schema.__mro__ if issubclass(parent, BaseModel))
    return next((field.description for field in fields if field is not None and field.description), "")


def as_typed(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def in_words(annotation: Any, field: FieldInfo | None = None) -> str:
    """A type in a few words: ``integer >= 1``, ``a | b | null``, ``list of number``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    limits = _limits(field.metadata if field is not None else [])
    if origin is Annotated:
        return in_words(arguments[0]) + _limits(arguments[1:])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, UnionType):
        return " | ".join("null" if kind is type(None) else in_words(kind) for kind in arguments) + limits
    if origin is tuple:
        kinds = [in_words(kind) for kind in arguments if kind is not Ellipsis]
        return f"list of {kinds[0]}" if Ellipsis in arguments else f"[{', '.join(kinds)}]"
    names = {bool: "true | false", int: "integer", float: "number", str: "name", Path: "path", dict: "keys and values"}
    return names.get(origin or annotation, getattr(annotation, "__name__", str(annotation))) + limits


def _limits(metadata: Sequence[Any]) -> str:
    words = []
    for limit in metadata:
        for inner in getattr(limit, "metadata", [limit]):
            for sign, kind, name in (
                (">=", annotated_types.Ge, "ge"),
                (">", annotated_types.Gt, "gt"),
                ("<=", annotated_types.Le, "le"),
                ("<", annotated_types.Lt, "lt"),
            ):
                if isinstance(inner, kind):
                    words.append(f"{sign} {getattr(inner, name)}")
    return f" {' and '.join(words)}" if words else ""


def values_with_origins(
    schema: type[Schema], path: Path | str | None, overrides: Sequence[str] = ()
) -> dict[str, tuple[str, str]]:
    """Key -> (value as it would be typed, where it comes from: a file, the command line or the defaults).

    Raises ``ConfigError`` as ``load_config`` does.
    """
    config = load_config(schema, path, overrides)
    layers: Mapping[Any, Any] = {} if path is None else read_layers(named_config(schema, path))
    origins = dict.fromkeys(_leaves_of(config), "default")
    for file, content in layers.items():
        origins |= dict.fromkeys(flattened(content), str(file))
    origins |= dict.fromkeys(flattened(read_overrides(schema, overrides)), "command line")
    return {key: (as_typed(value), _origin(key, origins)) for key, value in _leaves_of(config).items()}


def _leaves_of(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        leaves |= _leaves_of(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name: value}
    return leaves


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """An option that is a mapping itself comes from where any key in it does."""
    inside = [origin for other, origin in origins.items() if other.startswith(f"{key}.")]
    return inside[-1] if inside else origins[key]
