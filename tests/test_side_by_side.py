"""The comparisons side by side: turns, medians, one that fails; what their steps compute; the page of their results."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest
import torch

from benchmarks import dense, page, scaling, table2
from benchmarks.side_by_side import MATMUL, Contestant, Prepared, compare, counted, serve, table

CPU = torch.device("cpu")
STEPS = (
    """while read line; do echo '{"seconds": %s, "cpu_seconds": 2.0}'; done; echo '{"peak_bytes": 1, "flops": %s}'"""
)


def shell(name: str, script: str, images: int | None = 8) -> Contestant:
    return Contestant(name, ["sh", "-c", script], images, {"GREETING": "hello"})


def test_contestants_take_turns_and_one_that_ends_is_named():
    found = compare(
        [
            shell(MATMUL, STEPS % (0.5, 100), None),
            shell("ours", STEPS % (4.0, 400)),
            shell("gone", 'test "$GREETING" = hello && exit 7'),
        ],
        rounds=3,
        deadline=time.monotonic() + 60,
    )
    assert found["rounds"] == 3 and found["matmul_gflops"] == pytest.approx(200e-9)
    ours = found["contestants"]["ours"]
    assert (ours["seconds"], ours["cpu_seconds"], ours["images_per_second"]) == (4.0, 2.0, 2.0)
    assert ours["share_of_matmul_peak"] == pytest.approx(0.5)
    assert list(found["failed"]) == ["gone"] and "exit code 7" in found["failed"]["gone"]
    lines = table("a step", found, "ours")
    assert "| ours | 4 (4 to 4) | 2 | 2 | 1.00 | 0.00 | 50% |" in lines
    assert any(line.startswith("gone ended with exit code 7") for line in lines)


def test_what_a_library_prints_is_no_answer():
    (asked, questions), (answers, said) = os.pipe(), os.pipe()
    if not (child := os.fork()):
        os.dup2(said, 1)
        sys.stdin, sys.stdout = os.fdopen(asked), os.fdopen(1, "w")
        os.close(questions)
        serve(lambda: Prepared(lambda: os.write(1, b"a greeting\n")), CPU)
        os._exit(0)
    os.close(said)
    os.write(questions, b"step\n")
    os.close(questions)
    with os.fdopen(answers) as lines:
        took, cost = (json.loads(line) for line in lines)
    os.waitpid(child, 0)
    assert took["seconds"] >= 0 and set(cost) == {"peak_bytes", "flops"}


def test_no_round_begins_after_the_deadline():
    found = compare([shell("ours", STEPS % (1.0, 1))], rounds=50, deadline=time.monotonic())
    assert found["rounds"] == 1


def test_table2_compares_an_encoder_with_and_without_mask_tokens():
    steps = {
        name: table2.step_of(name, table2.ROWS["nano_1"], 2, torch.float32, CPU)
        for name in (table2.WITH, table2.WITHOUT)
    }
    with_tokens, without = (counted(step) for step in steps.values())
    assert 2.5 < with_tokens / without < 4.5, "16 patches and cls against 4 and cls"
    rows = {name: {"seconds": s, "fastest": s, "slowest": s, "cpu_seconds": s, "images_per_second": 1.0, "flops": f}
            for name, s, f in ((table2.WITH, 6.0, with_tokens), (table2.WITHOUT, 2.0, without))}  # fmt: skip
    entry = {"row": "nano_1", "size": "nano", "depth": 1, "published": 2.8, "batch": 2, "dtype": "fp32", "rounds": 1}
    for row in rows.values():
        row["peak_bytes"] = 0
    text = table2.page({"machine": {}, "measured": [{**entry, "contestants": rows, "failed": {}}]})
    assert f"| nano | 1 | 3.00x | {with_tokens / without:.2f}x | 2.8x |  |" in text


def test_scaling_grows_with_the_image_and_shrinks_with_what_is_hidden():
    small, larger, more_seen = (counted(scaling.step_of(point, torch.float32, CPU)) for point in scaling.AXES["small"])
    assert small < more_seen < larger


def test_a_copy_of_a_coco_set_shares_its_images_and_has_few_to_validate(tmp_path):
    whole = tmp_path / "whole"
    for name in ("train", "val", "annotations"):
        (whole / name).mkdir(parents=True)
    images = [{"id": number} for number in range(5)]
    truth = {"images": images, "annotations": [{"image_id": number} for number in range(5)], "categories": []}
    for name in ("train", "val"):
        (whole / "annotations" / f"instances_{name}.json").write_text(json.dumps(truth))
    copy = dense.small_copy(whole, tmp_path / "copy", images=2)
    found = {
        name: json.loads((copy / "annotations" / f"instances_{name}.json").read_text()) for name in ("train", "val")
    }
    assert found["train"] == truth
    assert found["val"] == {**truth, "images": images[:2], "annotations": truth["annotations"][:2]}
    assert (copy / "val").resolve() == whole / "val"


def test_the_page_is_what_its_command_writes():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python -m benchmarks.page"
