"""Configurations from YAML and ``a.b=c`` overrides; all errors of a configuration come at once, before any work."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from mae_core.config.recipes import find_recipe, which_recipe
from mae_core.config.schema import ConfigError, Schema, is_path, leaf_names, section_of, takes_paths
from mae_core.errors import UserError, first_line
from mae_core.texts import read_text

BASE = "base"
"""Key of a configuration file that names the file it builds on."""
DEEPEST, MOST_NODES, LONGEST = 30, 100_000, 1 << 20
"""What a YAML text may have: nested levels; values, those that aliases repeat counted each time; characters."""


PLAIN = {
    "tuple_type": "give a list, such as [1,2]",
    "path_type": "give a path",
    "missing": "a value is missing",
}
"""What pydantic says in terms of Python's types, by the type of its error."""

Config = TypeVar("Config", bound=Schema)


def load_config(schema: type[Config], path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``a.b=c`` overrides, validate. Without a file: the defaults, or what
    ``schema.without_file`` puts in their place.

    A file may name another with ``base: other.yaml``, relative to itself, and then states what differs from it.

    ``path`` may also be the name of a recipe of the schema's kind.

    Raises ``ConfigError`` with every unknown key (and a guess at the one meant) and every bad value, each with its
    origin.
    """
    if path is not None:
        path = named_config(schema, path)
    layers = {} if path is None else read_layers(Path(path))
    typed = read_overrides(schema, overrides)
    below = [schema.without_file(typed)] if path is None else layers.values()
    given: dict[str, Any] = {}
    try:
        given = OmegaConf.to_container(OmegaConf.merge({}, *below))  # type: ignore[assignment]
        for key in schema.gives_way(typed):
            section, _, name = key.partition(".")
            if isinstance(given.get(section), dict):
                given[section].pop(name, None)
        merged = OmegaConf.to_container(OmegaConf.merge(given, typed), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path or 'overrides'}: {first_line(error)}") from None
    try:
        return schema.model_validate(merged)
    except ValidationError as error:
        problems = _of_the_kind_given(schema, error.errors())
    in_file = _messages_of(schema, given) if path is not None else set()
    lines = list(dict.fromkeys(_explain(schema, problem, layers, typed, in_file) for problem in problems))
    raise ConfigError("; ".join(lines) if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems:", *lines]))


def named_config(schema: type[Schema], given: Path | str) -> Path:
    """The file that ``given`` is, or whose name it is. Raises ``ConfigError``, with a guess, where there is none."""
    path = find_recipe(given, schema.recipes)
    if path.is_file():
        return path
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
    told = f"did you mean {path.parent / near[0]}?" if near else which_recipe(path, schema.recipes)
    raise ConfigError(f"config file {path} does not exist; {told}")


def dump_config(config: Schema) -> str:
    """The configuration as YAML that ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_differences(one: Schema, other: Schema) -> list[str]:
    """``key: value -> value`` for every leaf that differs."""
    left, right = flattened(one.model_dump(mode="json")), flattened(other.model_dump(mode="json"))
    return [
        f"{key}: {left.get(key)} -> {right.get(key)}" for key in {**left, **right} if left.get(key) != right.get(key)
    ]


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def read_layers(path: Path, named_by: tuple[Path, ...] = ()) -> dict[Path, dict[str, Any]]:
    """The content of a file by its path, after that of the base it names, and of the base's base.

    Raises ``ConfigError`` where files name each other in a circle.
    """
    if path.resolve() in [other.resolve() for other in named_by]:
        raise ConfigError(f"{path} is its own base, by way of {', '.join(map(str, named_by))}; name another base")
    content = _read_yaml(path)
    base = content.pop(BASE, None)
    if base is None:
        return {path: content}
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the path of another configuration file, not {base!r}")
    try:
        beside = path.parent / Path(base).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no home folder for its base {base}") from None
    below = beside if beside.is_file() else find_recipe(base, "")
    if not below.is_file():
        raise ConfigError(f"{path}: its base {beside} does not exist; the path is relative to {path.parent}")
    return {**read_layers(below, (*named_by, path)), path: content}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
        check_size(text)
        content = OmegaConf.to_container(OmegaConf.create(text or "{}"))
    except UserError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except Exception as error:  # dates and numbers that are none fail in every way there is
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def read_overrides(schema: type[BaseModel], overrides: Sequence[str]) -> dict[str, Any]:
    """``a.b=c`` texts as nested keys and values; paths stay as they were typed. Raises ``ConfigError``, also where one
    gives an option a value and another an option below it, of which one would be lost."""
    keys = [override.partition("=")[0] for override in overrides]
    for key in keys:
        below = next((other for other in keys if other.startswith(f"{key}.")), None)
        if below is not None and key:
            raise ConfigError(f"{key} and {below} exclude each other: {key} is a section; leave {key}=... out")
    typed = _read_values([override for override in overrides if not _names_path(schema, override)])
    for override in overrides:
        if _names_path(schema, override):
            _set_path(schema, typed, override)
    return typed


def check_size(text: str) -> None:
    """Raise ``UserError`` for YAML that is nested without reason, or that aliases make much larger than it is: to read
    it would take memory and time without bound."""
    if len(text) > LONGEST:
        raise UserError(f"it has {len(text)} characters, and a configuration has at most {LONGEST}")
    try:
        _count_nodes(text)
    except yaml.YAMLError:
        return  # whoever reads it says what is wrong


def _count_nodes(text: str) -> None:
    open_nodes: list[tuple[str | None, int]] = []  # anchor of an open node, and the count when it was opened
    sizes: dict[str, int] = {}
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if any(name == event.anchor for name, _ in open_nodes):
                raise UserError(f"the alias *{event.anchor} contains itself; write the values out")
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            name, before = open_nodes.pop()
            if name is not None:
                sizes[name] = count - before
        else:
            count += isinstance(event, yaml.ScalarEvent)
            if anchor is not None:
                sizes[anchor] = 1
        if len(open_nodes) > DEEPEST:
            raise UserError(f"it is nested more than {DEEPEST} levels deep; no configuration is")
        if count > MOST_NODES:
            raise UserError(f"it holds more than {MOST_NODES} values, those repeated by aliases counted; write fewer")


def _read_values(overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        if "=" not in override or override.startswith(("=", "-")):
            raise ConfigError(f"{override!r} is not an override; write key=value, such as optim.epochs=100")
    try:
        for override in overrides:
            check_size(override.partition("=")[2])
        return dict(OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides))))  # type: ignore[arg-type]
    except Exception as error:  # dates and numbers that are none fail in every way there is
        raise ConfigError(f"overrides {' '.join(overrides)[:300]}: {' '.join(str(error).split())}") from None


def _field_of(schema: type[BaseModel], key: str) -> tuple[type[BaseModel], str] | None:
    """The section and the name of the option ``key`` (``a.b``); None where there is none."""
    *way, name = key.split(".")
    section: type[BaseModel] | None = schema
    for part in way:
        known = section is not None and part in section.model_fields
        section = section_of(section.model_fields[part].annotation) if section is not None and known else None
    return (section, name) if section is not None and name in section.model_fields else None


def _names_path(schema: type[BaseModel], override: str) -> bool:
    field = _field_of(schema, override.partition("=")[0])
    return field is not None and "=" in override and is_path(*field)


def _set_path(schema: type[BaseModel], tree: Any, override: str) -> None:
    """Put the path of ``key=path`` into ``tree`` as it was typed: in YAML ``#``, ``: `` and a leading zero mean
    something, in the name of a folder they do not.

    null and nothing are no path. ``[a, b]`` are several where the option takes several and nothing is called so.
    Quotes around the whole are left out, which a shell may have left there.
    """
    key, _, text = override.partition("=")
    field = _field_of(schema, key)
    assert field is not None
    value: str | list[str] | None = _unquoted(text)
    if text in ("", "null", "~"):
        value = None
    elif takes_paths(*field) and text.startswith("[") and text.endswith("]") and not Path(text).exists():
        value = [_unquoted(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    *way, name = key.split(".")
    for part in way:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[name] = value


def _unquoted(text: str) -> str:
    """Without the quotes, and with what OmegaConf would replace escaped."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return (text[1:-1] if quoted and not Path(text).exists() else text).replace("${", r"\${")


def _messages_of(schema: type[BaseModel], given: Mapping[str, Any]) -> set[tuple[Any, str]]:
    """(place, message) of every problem that a file has on its own."""
    try:
        schema.model_validate(OmegaConf.to_container(OmegaConf.create(dict(given)), resolve=True))
    except ValidationError as error:
        return {(problem["loc"], problem["msg"]) for problem in error.errors()}
    except OmegaConfBaseException:
        pass
    return set()


def _depth(schema: type[BaseModel], place: Sequence[Any]) -> tuple[type[BaseModel] | None, int]:
    """How many of the names in the place of a problem are sections and options, and the section of the last, if it is
    one; what follows is pydantic's name for one of several kinds of value."""
    section: type[BaseModel] | None = schema
    depth = 0
    for part in place:
        if section is None or part not in section.model_fields:
            break
        section, depth = section_of(section.model_fields[part].annotation), depth + 1
    return section, depth


def _of_the_kind_given(schema: type[BaseModel], problems: Sequence[Any]) -> list[Any]:
    """``problems`` without those that say of a list that it is no number, or of a number that it is no list, where the
    option takes either and another problem is about the kind that was given."""
    kept = []
    for problem in problems:
        place = problem["loc"]
        _, depth = _depth(schema, place)
        rivals = [other for other in problems if other is not problem and other["loc"][:depth] == place[:depth]]
        is_list = isinstance(problem["input"], list | tuple) and len(place) == depth + 1
        about_list = problem["type"] in ("tuple_type", "too_long", "too_short", "missing")
        of_other_kind = len(place) == depth + 1 and about_list != is_list
        if not (rivals and of_other_kind):
            kept.append(problem)
    return kept or list(problems)


def _explain(
    schema: type[BaseModel],
    problem: Any,
    layers: Mapping[Path, Mapping[str, Any]],
    typed: Mapping[str, Any],
    in_file: set[tuple[Any, str]],
) -> str:
    """One problem of pydantic's as one sentence with its origin.

    A problem between options, which has no key of its own, comes from the command line where the file alone lacks it.
    """
    place = [str(part) for part in problem["loc"] if not isinstance(part, int)]  # a list's entries have one schema
    section, depth = _depth(schema, place)
    key = ".".join(place[: max(depth, 1)]) if problem["type"] != "extra_forbidden" else ".".join(place)
    between = section is not None and problem["type"] == "value_error"
    if between:
        blamed = bool(typed) and (problem["loc"], problem["msg"]) not in in_file
    else:
        blamed = _holds(typed, key)
    holding = [str(path) for path, content in layers.items() if _holds(content, key)]
    where = "command line" if blamed else [*map(str, layers), *holding][-1] if layers else "defaults"
    if problem["type"] == "extra_forbidden":
        known = leaf_names(schema)
        siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
        guess = [n for n in known if n.rpartition(".")[2] == key.rpartition(".")[2]]
        near = difflib.get_close_matches(key.rpartition(".")[2], [s.rpartition(".")[2] for s in siblings], n=1)
        guess = guess or [s for s in siblings if near and s.rpartition(".")[2] == near[0]]
        if not guess and not ("." in key and siblings):
            guess = difflib.get_close_matches(key, known + list(schema.model_fields), n=1)
        told = f"did you mean {guess[0]!r}?" if guess else f"known here: {', '.join(siblings or schema.model_fields)}"
        return f"{where}: unknown key {key!r}; {told}"
    message = PLAIN.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    message = message[:1].lower() + message[1:]
    value = problem["input"]
    if problem["type"] in ("model_type", "model_attributes_type") and section is not None:
        message = f"it is a section; set its options, such as {key}.{next(iter(section.model_fields))}"
    got = f" (got {value!r})" if not isinstance(value, Mapping) and "ratio" not in message else ""
    return f"{where}: {key or schema.__name__}: {message}{got}" if key else f"{where}: {message}"


def _holds(tree: Mapping[str, Any], key: str) -> bool:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True
