"""``mae config``: which options there are, what a configuration holds, and which recipes are installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any

import typer

from mae_core.cli.arguments import ConfigAndOverrides, Configured, split_arguments
from mae_core.errors import UserError, user_errors

config = typer.Typer(no_args_is_help=True, help="Options of the commands, resolved configurations, recipes.")

SCHEMAS = {
    "pretrain": "mae_core.training.pretrain_config:PretrainConfig",
    "finetune": "mae_core.training.finetune_config:FinetuneConfig",
    "linprobe": "mae_core.training.frozen_config:LinprobeConfig",
    "knn": "mae_core.training.frozen_config:KnnConfig",
    "features": "mae_core.training.frozen_config:FeaturesConfig",
    "evaluate": "mae_core.training.frozen_config:EvaluateConfig",
    "train-tokenizer": "mae_core.training.tokenizer_config:TokenizerConfig",
    "detect": "transfer.detection.config:DetectionConfig",
    "compare": "transfer.compare.config:CompareConfig",
}
"""Commands with a configuration -> the schema."""
SAME = {"classify": "finetune", "detection": "detect", "segmentation": "segment"}
PAPER = {"pretrain": "base", "finetune": "base_table9", "linprobe": "base", "detect": "mask_rcnn_vit_base"}
"""Commands -> the recipe with the paper's values of ViT-B."""
KINDS = ("pretrain", "finetune", "linprobe", "evaluate", "detection", "segmentation", "compare")


def published(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Which command a run's options, by dotted key, are of, and the values of the paper's recipe for its ViT; none
    where the paper has none."""
    from mae_core.config.load import flattened, load_config
    from mae_core.config.recipes import recipe_names
    from mae_core.config.schema import leaf_names

    shares = {}
    for name in SCHEMAS:
        options = {*leaf_names(schema_of(name))}
        shares[name] = len(options & config.keys()) / max(len(options | config.keys()), 1)
    command = max(shares, key=lambda name: shares[name])
    if shares[command] < 0.5:
        return ("segment", {}) if "optim_wrapper.type" in config else ("unknown", {})
    schema = schema_of(command)
    if command not in PAPER:
        return command, {}
    sized = PAPER[command].replace("base", str(config.get("model.size", "base")))
    recipe = sized if sized in recipe_names(schema.recipes) else PAPER[command]
    needed = ["from_scratch=true"] if "from_scratch" in schema.model_fields else []
    needed += ["weights=FILE"] if "weights" in needed else []
    return command, flattened(load_config(schema, recipe, needed).model_dump(mode="json"))


Command = Annotated[str, typer.Argument(metavar="COMMAND", help=", ".join(SCHEMAS))]


def schema_of(command: str) -> Any:
    """The schema of a command's configuration. Raises ``UserError`` for a command that has none."""
    from mae_core.config.schema import hint

    command = SAME.get(command, command)
    if command == "segment":
        raise UserError(
            "mae segment reads mmseg configs; the variables that a recipe can be given stand at its top, with their "
            "meaning: mae config show segmentation/own_data"
        )
    if command not in SCHEMAS:
        raise UserError(f"{command!r} is no command with a configuration; {hint(command, SCHEMAS)}")
    return resolve_name(SCHEMAS[command])


@config.command()
def keys(
    command: Command,
    part: Annotated[str, typer.Argument(help="Only keys and meanings that contain this.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Every option of a command: key, type, default, the value of the paper's ViT-B recipe, meaning.

    Example: mae config keys pretrain optim
    """
    with user_errors():
        from mae_core.config.describing import options_of, values_with_origins

        schema, name = schema_of(command), SAME.get(command, command)
        needed = ["from_scratch=true"] if "from_scratch" in schema.model_fields else []
        paper = values_with_origins(schema, PAPER[name], needed) if name in PAPER else {}
        found = [option for option in options_of(schema) if part.lower() in f"{option.key} {option.meaning}".lower()]
        if not found:
            raise UserError(f"no option of mae {command} contains {part!r}; mae config keys {command} lists all")
        if as_json:
            rows = [{**option._asdict(), "paper": paper.get(option.key, (None,))[0]} for option in found]
            typer.echo(json.dumps(rows, indent=2))
            return
        for option in found:
            differs = option.key in paper and paper[option.key][0] != option.default
            published = f"; paper, ViT-B: {paper[option.key][0]}" if differs else ""
            typer.echo(f"{option.key}={option.default}  ({option.type}{published})")
            if option.meaning:
                typer.echo(f"    {option.meaning}")


@config.command(cls=Configured)
def show(
    arguments: ConfigAndOverrides = None,
    command: Annotated[
        str | None, typer.Option("--for", help="The command that it is for, where its folder does not say that.")
    ] = None,
) -> None:
    """A configuration with its bases and options resolved, and where each value comes from.

    Example: mae config show pretrain/tiny_96 data.path=images
    """
    with user_errors():
        from mae_core.config.describing import values_with_origins

        given, overrides = split_arguments(arguments)
        path = locate(given, command)
        if path.suffix == ".py":
            typer.echo(path.read_text(encoding="utf-8"), nl=False)
            return
        schema = schema_of(command_of(path, command))
        free = "from_scratch" in schema.model_fields and not any(
            word.startswith(("weights=", "from_scratch=")) for word in overrides
        )
        try:
            rows = values_with_origins(schema, path, overrides)
        except UserError:
            if not free:
                raise
            rows = values_with_origins(schema, path, [*overrides, "weights=FILE"])
        wide = max(len(f"{key}: {value}") for key, (value, _) in rows.items())
        for key, (value, origin) in rows.items():
            typer.echo(f"{f'{key}: {value}':<{min(wide, 60)}}  # {origin}")


def locate(given: str | None, command: str | None) -> Path:
    """The file of a recipe: a path, ``kind/name``, or a name that one kind alone has, or ``command``'s kind.

    Raises ``UserError`` where there is none.
    """
    from mae_core.config.recipes import find_recipe, recipe_names
    from mae_core.config.schema import hint

    if given is None:
        raise UserError("name a recipe, such as pretrain/tiny_96, or a file; mae config recipes lists them")
    kind, _, name = given.rpartition("/")
    path = find_recipe(name, kind) if kind in KINDS else find_recipe(given, _kind_of(given, command))
    if not path.is_file():
        known = [f"{kind}/{name}" for kind in KINDS for name in recipe_names(kind)]
        raise UserError(f"there is no file {given}; as a recipe's name: {hint(given, known)}")
    return path


def command_of(path: Path, asked: str | None) -> str:
    """The command that a recipe is for: the one asked for, or what the folder says that it, or a base of it, is in.

    Raises ``UserError`` where nothing says so.
    """
    from mae_core.config.load import read_layers
    from mae_core.config.recipes import recipes_folder

    if asked is not None:
        return SAME.get(asked, asked)
    if path.suffix == ".py":
        return SAME["segmentation"]
    for layer in reversed(read_layers(path)):
        inside = layer.resolve().is_relative_to(recipes_folder().resolve())
        kind = layer.resolve().relative_to(recipes_folder().resolve()).parts[0] if inside else layer.parent.name
        if kind in KINDS:
            return SAME.get(kind, kind)
    raise UserError(f"say which command {path} is for: --for {' or '.join(SCHEMAS)}")


def _kind_of(name: str, command: str | None) -> str:
    """Which folder a recipe's name is looked for in. Raises ``UserError`` for a name that several folders have."""
    from mae_core.config.recipes import recipe_names

    if command in ("segment", "segmentation"):
        return "segmentation"
    if command is not None:
        return str(schema_of(command).recipes)
    kinds = [kind for kind in KINDS if name in recipe_names(kind)]
    if len(kinds) > 1:
        raise UserError(f"{name} is a recipe of {' and of '.join(kinds)}; write {kinds[0]}/{name}")
    return kinds[0] if kinds else ""


@config.command()
def schema(command: Command) -> None:
    """The JSON schema of a command's configuration, with which editors complete and check YAML files.

    Example: mae config schema pretrain > pretrain.schema.json
    """
    with user_errors():
        typer.echo(json.dumps(schema_of(command).model_json_schema(), indent=2))


@config.command()
def recipes(kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=", ".join(KINDS))] = None) -> None:
    """Recipes that are installed, by the name that a command takes, and what each is for.

    Example: mae config recipes detection
    """
    with user_errors():
        from mae_core.config.recipes import recipe_names
        from mae_core.config.schema import hint

        if kind is not None and kind not in KINDS:
            raise UserError(f"{kind!r} is no kind of recipe; {hint(kind, KINDS)}")
        for each in KINDS if kind is None else (kind,):
            for name in recipe_names(each):
                typer.echo(f"{each}/{name}: {_purpose(each, name)}")


def _purpose(kind: str, name: str) -> str:
    """The first sentence of the comment that begins a recipe."""
    from mae_core.config.recipes import find_recipe

    text = find_recipe(name, kind).read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.strip("# "))
    return " ".join(lines).partition(". ")[0].rstrip(".:")
