"""The rules of the house: imports point one way, an engine has one door, every option is read, nothing is copied."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_core.config.schema import Schema, leaf_names

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mae_core", "transfer")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
OTHERS = [path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
CODE = sorted({*SOURCES, *OTHERS, ROOT / "setup.py"})
"""All Python but mmseg's configs, which are data: there a base cannot use what its child sets, so pipelines repeat."""
SCRIPT_FOLDERS = ("mae_core/cli", "transfer", "transfer/detection", "transfer/segmentation")

LAYERS = (
    ("errors", "atomic", "seeds", "layout", "texts", "resuming", "dialects", "templates", "counting"),
    ("patches", "pos_embed", "masking", "tokenizers", "targets"),
    ("models",),
    ("config",),
    ("data", "weights", "measures"),
    ("training",),
    ("cli",),
)
"""Parts of mae_core, lowest first. A part may import its own layer and the ones below."""

DOORS = {
    "torchvision.models.detection": "engine_torchvision",
    "mmseg": "engine_mmseg",
    "mmengine": "engine_mmseg",
    "mmcv": "engine_mmseg",
    "detectron2": "engine_detectron2",
}
"""A framework, and the only file (or folder) that may import it."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


parsed = functools.cache(ast.parse)
"""Each file is asked about by many rules."""


@functools.cache
def imports_of(source: str) -> set[str]:
    """Dotted names of all that a file imports, wherever in it; for ``from a import b`` both ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def imports(source: str, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports_of(source))


def layer_of(part: str) -> int:
    (layer,) = [number for number, parts in enumerate(LAYERS) if part in parts]
    return layer


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "mae_core")], ids=name_of)
def test_imports_point_one_way(path):
    source = path.read_text()
    assert not imports(source, "transfer"), "mae_core knows nothing of transfer"
    relative = path.relative_to(ROOT / "mae_core").with_suffix("").parts
    if relative == ("__init__",):
        return  # its names load on first use
    mine = layer_of(relative[0])
    for name in imports_of(source):
        parts = name.split(".")
        if parts[0] == "mae_core" and len(parts) > 1 and not parts[1].startswith("__"):
            assert layer_of(parts[1]) <= mine, f"{relative[0]} must not import {name}"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_imports_itself_through_others():
    """At module level; what a package's ``__init__`` imports counts for the package alone."""
    modules = {module_of(path): path for path in SOURCES}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = parsed(path.read_text())
        top = "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        edges[module] = {name for name in imports_of(top) if name in modules} - {module}
    while free := [module for module in edges if not edges[module] & edges.keys()]:
        for module in free:
            del edges[module]
    assert not edges, f"these import each other in a circle: {sorted(edges)}"


@pytest.mark.parametrize("framework, door", DOORS.items())
def test_an_engine_has_one_door(framework, door):
    users = [path for path in SOURCES if imports(path.read_text(), framework)]
    assert all(door in path.relative_to(ROOT).with_suffix("").parts for path in users), list(map(name_of, users))
    assert all(path.is_relative_to(ROOT / "transfer") for path in users)


def test_the_doors_are_in_use():
    """So that the rule above does not hold because nobody looks."""
    for door in sorted({*DOORS.values()} & {part for path in SOURCES for part in path.with_suffix("").parts}):
        inside = [path for path in SOURCES if door in path.with_suffix("").parts]
        behind = [framework for framework in DOORS if DOORS[framework] == door]
        assert any(imports(path.read_text(), framework) for path in inside for framework in behind), door
    assert {"engine_torchvision", "engine_mmseg"} <= {part for path in SOURCES for part in path.with_suffix("").parts}


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_engines_are_loaded_on_demand_and_never_import_the_script(task):
    for path in (ROOT / "transfer" / task).rglob("*.py"):
        tree = parsed(path.read_text())
        top = "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        behind = "engine_" in name_of(path)
        assert not re.search(r"\bengine_", top) or behind, f"{name_of(path)}: not at its top"
        if behind:
            assert not imports(path.read_text(), f"transfer.{task}.train_net"), name_of(path)


@functools.cache
def required_modules() -> set[str]:
    """Top-level modules of everything the package needs, directly or not, and of engines it knows."""
    modules: dict[str, set[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            modules.setdefault(canonical(distribution), set()).add(module)
    queue, seen = ["mae-transfer"], set()
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        extras_of_others = [line for line in wanted if "extra ==" not in line or name == "mae-transfer"]
        queue += [canonical(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in extras_of_others]
    assert {"torch", "timm", "onedl-mmsegmentation"} <= seen
    needed = set().union(*(found for name, found in modules.items() if name in seen and name != "mae-transfer"))
    return needed | {"detectron2", "datasets", "evaluate", "tensorboard", "pycocotools", "torch", "PIL", "yaml"}


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_no_file_beside_a_script_shadows_a_module(folder):
    """``python transfer/detection/train_net.py`` puts that folder first on sys.path."""
    taken = sys.stdlib_module_names | required_modules()
    found = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"}
    assert found - {"__init__"}, folder
    assert not found & taken


def schemas() -> list[type[Schema]]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*config.py"):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))

    def below(schema: type[Schema]) -> Iterator[type[Schema]]:
        for child in schema.__subclasses__():
            yield child
            yield from below(child)

    found = [schema for schema in below(Schema) if schema.__module__.split(".")[0] in PACKAGES]
    names = {schema.__name__ for schema in found}
    assert {"PretrainConfig", "FinetuneConfig", "LogConfig", "DetectionConfig"} <= names
    return found


def attributes_read() -> set[str]:
    """Names read as ``.name`` anywhere, and in a schema's file in methods and properties, but not in validators."""
    names: set[str] = set()
    for path in SOURCES:
        tree = parsed(path.read_text())
        nodes: list[ast.AST] = [tree]
        if path.name.endswith("config.py") or path.parent.name == "config":
            functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            nodes = [f for f in functions if not any("validator" in ast.unparse(d) for d in f.decorator_list)]
        for node in nodes:
            inside = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
            names |= {attribute.attr for attribute in inside}
    return names


def test_every_option_is_read():
    read = attributes_read()
    options = {name for schema in schemas() for name in leaf_names(schema)}
    unread = sorted(name for name in options if name.rpartition(".")[2] not in read)
    assert not unread, f"nobody reads {unread}: delete the option or use it"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_partial_loading(path):
    for node in ast.walk(parsed(path.read_text())):
        if isinstance(node, ast.Call) and "load" in ast.unparse(node.func):
            loose = any(word.arg == "strict" and ast.unparse(word.value) == "False" for word in node.keywords)
            assert not loose, f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "mae_core")], ids=name_of)
def test_the_keys_of_an_encoders_metadata_have_one_home(path):
    """Other files have metadata of their own kind: a fitted PCA's, a tokenizer's."""
    from mae_core.weights.encoder_file import KEYS

    if path.name in ("encoder_file.py", "target_files.py"):
        return
    for node in ast.walk(parsed(path.read_text())):
        key = None
        if isinstance(node, ast.Subscript) and "metadata" in ast.unparse(node.value):
            key = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("metadata.get"):
            key = node.args[0]
        assert not (isinstance(key, ast.Constant) and key.value in KEYS), (
            f"{name_of(path)}:{node.lineno} spells {key.value}"
        )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_commands_import_the_tools_on_weights(path):
    inside = path.is_relative_to(ROOT / "mae_core/weights/tools") or path.is_relative_to(ROOT / "mae_core/cli")
    assert inside or not imports(path.read_text(), "mae_core.weights.tools")


def test_no_file_is_named_after_nothing():
    for path in SOURCES:
        assert not {"utils", "util", "misc", "helpers", "helper", "common"} & set(path.with_suffix("").parts[-3:])


def test_every_public_function_and_class_says_what_it_is():
    silent = []
    for path in SOURCES:
        tree = parsed(path.read_text())
        assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
        scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
        for scope in scopes:
            for node in scope.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_" and not said(node, scope):
                    silent.append(f"{name_of(path)}: {node.name}")
    assert not silent


def said(node: ast.FunctionDef | ast.ClassDef, scope: ast.AST) -> bool:
    """A docstring, or the method of a protocol or an override that its base describes; overloads share one."""
    if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
        return True
    inherits = isinstance(scope, ast.ClassDef) and bool(scope.bases)
    return ast.get_docstring(node) is not None or inherits


PUBLIC_NAMES = """
import sys, time
import torch, timm
before = time.process_time()
import mae_core
assert time.process_time() - before < 0.5, "import mae_core is slow"
for name in mae_core.__all__:
    getattr(mae_core, name)
assert time.process_time() - before < 2, "the public names take more than 2 s beyond torch and timm"
loaded = [name for name in ("detectron2", "mmseg", "mmcv", "mmengine", "transfer") if name in sys.modules]
assert not loaded, loaded
"""


CONFIGURATIONS = """
import sys
import mae_core, mae_core.cli.main, mae_core.training.finetune_config
assert "torch" not in sys.modules
import mae_core.training.frozen_config, mae_core.training.pretrain_config, mae_core.training.tokenizer_config
assert not {"timm", "torchvision"} & set(sys.modules)
"""
"""Commands read their configuration before they import what they run, so that a typo is answered soon."""


def test_importing_mae_core_is_fast_and_loads_no_engine(run_python, run_forked):
    for run, program in ((run_forked, PUBLIC_NAMES), (run_python, CONFIGURATIONS)):
        result = run(["-c", program])
        assert result.returncode == 0, result.stderr


def test_importing_transfer_loads_no_engine(run_forked):
    files = [p for p in SOURCES if p.is_relative_to(ROOT / "transfer") and "engine_" not in str(p)]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    assert {"transfer", "transfer.backbone", "transfer.engines", "transfer.detection"} <= set(names)
    program = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    # torchvision's package itself loads its models, so its detection engine is checked by who imports it, above.
    program += "loaded = {'detectron2', 'mmseg', 'mmcv', 'mmengine'} & set(sys.modules)\nassert not loaded, loaded"
    result = run_forked(["-c", program])
    assert result.returncode == 0, result.stderr


def test_every_module_is_reachable_as_an_installed_package():
    """setuptools finds packages by their __init__.py; a file beside none would be left out of an install."""
    for path in SOURCES:
        for folder in path.parents[: len(path.relative_to(ROOT).parts) - 1]:
            assert (folder / "__init__.py").is_file(), f"{name_of(folder)} has no __init__.py"


BLOCK = 12


def significant_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank, comments or imports."""
    lines = [(number, line.strip()) for number, line in enumerate(path.read_text().splitlines(), start=1)]
    imported: set[int] = set()
    for node in ast.walk(parsed(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#") and number not in imported]


def test_no_block_of_code_is_written_twice():
    seen: dict[tuple[str, ...], str] = {}
    copies = []
    for path in CODE:
        lines = significant_lines(path)
        for start in range(len(lines) - BLOCK + 1):
            block = tuple(text for _, text in lines[start : start + BLOCK])
            here = f"{name_of(path)}:{lines[start][0]}"
            if block in seen:
                copies.append(f"{here} repeats {seen[block]}")
            seen.setdefault(block, here)
    assert not copies, f"share it at its second use: {copies[:5]}"
