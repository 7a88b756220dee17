"""All that can only be measured on a GPU, in one command without network: each section within its own time limit.

    python -m benchmarks.gpu --out runs/gpu --minutes 8 --data imagenette_full
    python -m benchmarks.gpu --out runs/gpu --device cpu --scale tiny             # the rehearsal

Each section of ``benchmarks.gpu_sections`` is a process of its own: one that fails or runs out of time says so, keeps
what it has measured, and the next one starts. Time that a section leaves goes to those after it. Writes a JSON and a
log for each section as they come, ``gpu.json`` with all of them, from which ``benchmarks.page`` makes its part of the
page, and ``summary.md``. ``--data``: photos to train on, a folder of classes or tar shards with a folder for each
class; ``--validation``: photos of the same classes for k-NN and probes, where empty ``../imagenette/val`` beside
``--data`` if that exists. Without ``--data``, noise is trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_sections import SCALES, SECTIONS, Record, Setting
from mae_core.atomic import write_json, write_text
from mae_core.errors import UserError, user_errors

SUMMARY, RESULTS = "summary.md", "gpu.json"
LEAST_SECONDS = 10.0
"""A section is not started with less."""


def limits(left: float, waiting: Sequence[str]) -> float:
    """Seconds for the first of the sections that wait: its share of what is left."""
    return left * SECTIONS[waiting[0]].weight / sum(SECTIONS[name].weight for name in waiting)


def run_section(name: str, setting: Setting, seconds: float) -> dict[str, Any]:
    """A section in a process of its own, ended after ``seconds`` -> what its file holds, with how it ended."""
    log, file = setting.out / f"{name}.log", setting.out / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks.gpu", *setting.arguments(), "--section", name]
    command += ["--seconds", f"{seconds:.1f}"]
    began = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            try:  # loader workers too
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    state = (
        "done" if code == 0 else f"stopped: its {seconds:.0f} s were over" if code is None else f"failed: {why(log)}"
    )
    measured = json.loads(file.read_text())["measured"] if file.is_file() else []
    found = {"section": name, "state": state, "seconds": round(time.monotonic() - began, 1), "measured": measured}
    write_json(file, found)
    return found


def why(log: Path) -> str:
    """The last line of a log that says anything."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"


def page(results: Mapping[str, Any]) -> str:
    """What is measured so far as Markdown: a table for each kind of entry of each section."""
    lines = [f"# Measured on {results['device']}, scale {results['scale']}", ""]
    for section in results["sections"]:
        lines += [f"## {section['section']}: {section['state']} ({section['seconds']:.0f} s)", ""]
        lines += [SECTIONS[section["section"]].about, ""]
        kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for entry in section["measured"]:
            kinds.setdefault(tuple(entry), []).append(entry)
        for columns, entries in kinds.items():
            lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(cell(entry[column]) for column in columns)} |" for entry in entries]
            lines.append("")
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value in a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all sections together")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--data", type=Path, help="photos for the loader and the training")
    parser.add_argument("--validation", type=Path, help="photos for k-NN and probes, <class>/*")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="sections; all when left out")
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    began = time.monotonic()
    with user_errors():
        setting = Setting.of(given.out, given.device, given.scale, given.data, given.validation)
        if given.section:
            setting = replace(setting, deadline=began + given.seconds)
            SECTIONS[given.section].measure(setting, Record(setting.out / f"{given.section}.json"))
            return
        if (setting.out / SUMMARY).exists():
            raise UserError(f"{setting.out} holds the results of another run; give another --out")
        setting.out.mkdir(parents=True, exist_ok=True)
        waiting = [name for name in SECTIONS if name in (given.only or SECTIONS)]
        found: list[dict[str, Any]] = []
        while waiting:
            left = 60 * given.minutes - (time.monotonic() - began)
            seconds, name = limits(left, waiting), waiting.pop(0)
            if seconds < LEAST_SECONDS:
                found.append({"section": name, "state": "not started: no time was left", "seconds": 0, "measured": []})
            else:
                print(f"{name}: at most {seconds:.0f} s", flush=True)
                found.append(run_section(name, setting, seconds))
            print(f"{name}: {found[-1]['state']}", flush=True)
            results = {"device": str(setting.device), "scale": setting.scale, "sections": found}
            write_json(setting.out / RESULTS, results)
            write_text(setting.out / SUMMARY, page(results))
        print(f"wrote {setting.out / SUMMARY}")


if __name__ == "__main__":
    main()
