"""The strict base of all configurations: unknown keys are refused with a guess at the one meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)

from mae_core.errors import UserError

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Size = Count | tuple[Count, Count]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _ascending(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("the smaller number must come first")
    return values


CropScale = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]


class ConfigError(UserError):
    """A configuration that does not validate; lists every problem."""


class Schema(BaseModel):
    """Base of all configuration sections: frozen, unknown keys and infinite numbers refused, ``~`` is the home."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    recipes: ClassVar[str] = ""
    """Folder of ``configs/`` that holds recipes of this kind."""

    @classmethod
    def without_file(cls, typed: Mapping[str, Any]) -> dict[str, Any]:
        """What stands in for a configuration file where none is given, before ``typed``, the command line's options."""
        return {}

    @classmethod
    def gives_way(cls, typed: Mapping[str, Any]) -> Collection[str]:
        """Keys (``section.name``) of a configuration file that do not go with ``typed``, the command line's options,
        and are left out for them."""
        return ()

    @field_validator("*", mode="before")
    @classmethod
    def _name_of_digits(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads a folder that is called 2024 as a number."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if number and info.field_name and is_path(cls, info.field_name) else value

    @field_validator("*", mode="after")
    @classmethod
    def _home(cls, value: Any) -> Any:
        try:
            if isinstance(value, tuple) and value and isinstance(value[0], Path):
                return tuple(path.expanduser() for path in value)
            return value.expanduser() if isinstance(value, Path) else value
        except RuntimeError:
            raise ValueError(f"there is no home folder for {value}") from None


def is_path(schema: type[BaseModel], name: str) -> bool:
    """Whether the option ``name`` of ``schema`` is a path, or several."""
    annotation = schema.model_fields[name].annotation
    return Path in (annotation, *get_args(annotation)) or takes_paths(schema, name)


def takes_paths(schema: type[BaseModel], name: str) -> bool:
    """Whether the option ``name`` of ``schema`` may be several paths."""
    annotation = schema.model_fields[name].annotation
    lists = [get_args(kind) for kind in (annotation, *get_args(annotation)) if get_origin(kind) is tuple]
    return any(Path in (item, *get_args(item)) for items in lists for item in items)


def row_of(table: Mapping[str, Any]) -> AfterValidator:
    """Validates that a string names a row of ``table``; the error guesses which row was meant."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown name {name!r}; {hint(name, list(table))}")
        return name

    return AfterValidator(check)


def checked_options(row: Callable[..., Any], names: Collection[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, options of a row of a table, with the types and the defaults of the arguments ``names`` of ``row``.

    Raises ``ValueError`` with everything that is unknown, missing or of another type.
    """
    arguments = inspect.signature(row).parameters
    try:
        types = get_type_hints(getattr(row, "__init__", row) if isinstance(row, type) else row)
    except NameError:  # a type that is imported for type checkers alone
        types = {}
    required = inspect.Parameter.empty
    wanted: dict[str, Any] = {
        name: (types.get(name, Any), ... if arguments[name].default is required else arguments[name].default)
        for name in names
    }
    try:
        checked = create_model("Options", __base__=Schema, **wanted).model_validate(dict(given))
    except ValidationError as error:
        raise ValueError("; ".join(_option_problem(problem, names) for problem in error.errors())) from None
    return {name: getattr(checked, name) for name in names}


def _option_problem(problem: Any, names: Collection[str]) -> str:
    name = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return f"unknown option {name!r}; {hint(name, names)}"
    return f"{name}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def hint(given: str, known: Collection[str]) -> str:
    """What may have been meant: the nearest of ``known``, or all of them."""
    near = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'nothing'}"


def leaf_names(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all leaf options of a schema."""
    names: list[str] = []
    for name, field in schema.model_fields.items():
        section = section_of(field.annotation)
        names += leaf_names(section, f"{prefix}{name}.") if section else [prefix + name]
    return names


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The schema of a nested section; None for a leaf."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
