"""What the README, the pages and the configurations print can be typed: commands and options exist, keys validate."""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import mae_core
import mae_core.config.load as config_load
from mae_core.cli.main import app
from mae_core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = [path for ending in ("yaml", "py") for path in sorted((ROOT / "configs").rglob(f"*.{ending}"))]
TOLD_ELSEWHERE = ("pip", "source", "cd", "git", "ls", "docker", "sbatch", "srun")
"""Programs that are not ours."""


class Parsed(Exception):
    """Ends a command once it has read its command line, before it does anything."""


def page_commands(text: str) -> Iterator[str]:
    """Every command of the console blocks of a page, its continuation lines joined."""
    for block in re.findall(r"```(?:console|bash|sh)\n(.*?)```", text, flags=re.DOTALL):
        for command in re.findall(r"^ *\$ ((?:.*\\\n)*.*)$", block, flags=re.MULTILINE):
            yield re.sub(r"\\\n\s*", " ", command)
    yield from re.findall(r"`((?:mae|python|make|torchrun) [^`\n]+)`", text)


def header_commands(text: str) -> Iterator[str]:
    """Every command in the comments that begin a configuration."""
    header = "\n".join(line[1:] for line in text.partition("\n\n")[0].splitlines() if line.startswith("#"))
    for command in re.findall(r"^ {2,}((?:mae|python|torchrun) (?:.*\\\n)*.*)$", header, flags=re.MULTILINE):
        yield re.sub(r"\\\n\s*", " ", command)


PRINTED = [
    *((path, command) for path in PAGES if path.exists() for command in page_commands(path.read_text("utf-8"))),
    *((path, command) for path in CONFIGS for command in header_commands(path.read_text("utf-8"))),
]


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """Every command ends with ``Parsed`` once its options are read and its configuration is valid."""
    real_load, real_parse = config_load.load_config, argparse.ArgumentParser.parse_args
    real_intermixed = argparse.ArgumentParser.parse_intermixed_args

    def load(*args: Any, **kwargs: Any) -> None:
        real_load(*args, **kwargs)
        raise Parsed

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", real_parse)  # mmengine's options use it too
        raise Parsed(real_parse(self, *args, **kwargs))

    def parse_intermixed(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise Parsed(real_intermixed(self, *args, **kwargs))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("transfer.detection.train_net.load_config", load)  # imports it, so before the next but one
    monkeypatch.setattr("mae_core.config.describing.load_config", load)
    monkeypatch.setattr(config_load, "load_config", load)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse_intermixed)
    yield
    for module in list(sys.modules.values()):  # what was imported meanwhile has taken the stand-in
        if getattr(module, "load_config", None) is load:
            module.load_config = real_load  # type: ignore[attr-defined]


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise or fail where a command line is wrong."""
    if words[0] == "torchrun":
        start = next(i for i, word in enumerate(words) if word.endswith(".py") or word.endswith("mae)"))
        words = ["mae" if words[start].endswith("mae)") else "python", *words[start + (words[start][-1] == ")") :]]
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert all(word in targets or "=" in word for word in words[1:]), words
    elif words[0] == "mae":
        check_mae(words[1:])
    elif words[1] == "-c":
        compile(words[2], "<command>", "exec")
    else:
        check_script(words[1:], monkeypatch)


def check_mae(words: list[str]) -> None:
    """A command of ``mae``: its options, and its configuration where it takes one."""
    command: Any = typer.main.get_command(app)
    context = None
    if words[0].startswith("--"):
        assert words[0] in {option for parameter in command.params for option in parameter.opts}
        return
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"mae has no command {words[0] if words else ''!r}"
        context, command, words = command, command.commands[words[0]], words[1:]
    context = command.make_context(command.name, list(words))
    if any(parameter.name == "arguments" for parameter in command.params):
        with pytest.raises(Parsed):
            context.invoke(command.callback, **context.params)
    elif context.args:  # `mae check coco` hands its words to a parser of its own
        with pytest.raises(Parsed):
            command.invoke(context)


def check_mentioned(words: list[str]) -> None:
    """A command that is named, or shortened by ``...``: it exists, and so do the options that are shown."""
    if words[0] == "mae":
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands") and len(words) > 1 and not words[1].startswith("--"):
            assert words[1] in command.commands, f"mae has no command {words[1]!r}"
            command, words = command.commands[words[1]], words[1:]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words
    for word in words:
        assert not word.endswith((".py", ".yaml")) or (ROOT / word).is_file(), f"{word} does not exist"


def check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of a script, or of a module of ours."""
    if words[0] == "-m":
        assert words[1].partition(".")[0] in ("transfer", "mae_core", "benchmarks", "pip", "mypy", "pytest", "ruff"), (
            words
        )
        return
    script = ROOT / words[0]
    assert script.is_file(), f"{words[0]} does not exist"
    monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
    if script.match("transfer/detection/train_net.py"):
        from transfer.detection import train_net

        with pytest.raises(Parsed):
            train_net.main(words[1:])
        return
    with pytest.raises(Parsed) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    given = vars(stopped.value.args[0])
    config = given.get("config")
    if config is not None:
        assert Path(config).is_file(), f"{config} does not exist"
        check_segmentation_config(Path(config), given.get("cfg_options") or [])
    if given.get("config_file") is not None:
        config_load_file = Path(given["config_file"])
        assert config_load_file.is_file(), f"{config_load_file} does not exist"


def check_segmentation_config(config: Path, options: list[str]) -> None:
    """The options of an mmseg config, as a training reads them."""
    if not options:
        return
    pytest.importorskip("mmengine")
    from transfer.segmentation.engine_mmseg.options import parse_options, read_config

    read_config(config, parse_options(options))


def ids(printed: list[tuple[Path, str]]) -> list[str]:
    return [f"{path.name}-{number}" for number, (path, _) in enumerate(printed)]


@pytest.mark.parametrize(("page", "command"), PRINTED, ids=ids(PRINTED))
def test_a_printed_command_can_be_typed(page, command, stop_after_parsing, monkeypatch, capsys):
    words = [re.sub(r"=N$", "=2", word) for word in shlex.split(command, comments=True)]  # a reader's own number
    words = words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :]
    words = words[: words.index(">")] if ">" in words else words  # into a file
    if words[0] in TOLD_ELSEWHERE:
        return
    try:
        if any("|" in word for word in words):  # `mae check images|folders`
            for choice in next(word for word in words if "|" in word).split("|"):
                check_mentioned([choice if "|" in word else word for word in words])
        elif "..." in words or (words[0] == "mae" and len(words) < 4 and "=" not in command):
            check_mentioned([word for word in words if word != "..."])
        else:
            check(words, monkeypatch)
    except (UserError, SystemExit, typer.Exit, Exception) as error:
        pytest.fail(f"{page.name}: {command}\n{type(error).__name__}: {error}\n{capsys.readouterr().err}")


def test_the_pages_print_commands():
    counted = {page.name: sum(path == page for path, _ in PRINTED) for page in PAGES if page.exists()}
    assert counted["README.md"] >= 4 and sum(counted.values()) >= 40, counted


def python_blocks() -> list[tuple[Path, str]]:
    return [
        (path, block)
        for path in PAGES
        if path.exists()
        for block in re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL)
    ]


@pytest.mark.parametrize(("page", "code"), python_blocks(), ids=ids(python_blocks()))
def test_printed_python_names_what_exists(page, code):
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mae_core":
            assert node.attr in mae_core.__all__, f"{page.name}: mae_core.{node.attr} does not exist"


def test_the_python_of_the_readme_runs(pretrained, write_images, tmp_path, monkeypatch):
    (code,) = [code for page, code in python_blocks() if page.name == "README.md"]
    for number, name in enumerate("ab"):
        write_images(tmp_path, 1, seed=number)[0].rename(tmp_path / f"{name}.png")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(pretrained)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["vectors"].shape == (2, 128) and -1 <= float(names["similarity"]) <= 1


@pytest.mark.parametrize("page", [page for page in PAGES if page.exists()], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links {target}, which does not exist"
