"""The report: its numbers, its honesty, and that the page needs nothing from outside."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from transfer.report import Curve, Picture, Report, TaskResult, compare, headline, write_report
from transfer.report.page import chart
from transfer.report.results import duration, signed

CLASSIFICATION = TaskResult("top-1 accuracy (%)", [60.0, 62.0], [80.0, 83.0], "400 images")
DETECTION = TaskResult("COCO box AP", [0.100, 0.140], [0.260, 0.250])
SEGMENTATION = TaskResult("mIoU (%)", [31.0, 33.0], [45.0, 46.0])
TASKS = {"classification": CLASSIFICATION, "detection": DETECTION, "segmentation": SEGMENTATION}


@pytest.fixture
def report(tmp_path: Path) -> Report:
    pictures = []
    for index, size in enumerate([(64, 64), (600, 100)]):
        path = tmp_path / "pictures" / f"picture {index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (40 * index, 90, 160)).save(path)
        pictures.append(Picture(f"Picture {index}", "input | truth", path))
    return Report(
        title="A <demo> & more",
        seconds=372.4,
        tasks=TASKS,
        curves=[Curve("Pre-training", "loss", {"train": [(0, 1.0), (10, 0.5)]})],
        pictures=pictures,
        timings={"pre-training": 200.0, "classification": 100.0},
        environment={"torch": "2.8.0"},
        commands=[("Pre-train", 'mae pretrain data.folder="<yours>" && echo $HOME')],
        loading_reports="loaded 62 tensors\n  new: head.weight",
    )


class Elements(HTMLParser):
    """Collects every start tag with its attributes, and the text of every table row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_json_has_the_promised_shape(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert numbers["seconds"] == 372.4
    assert numbers["tasks"] == {
        "classification": {"metric": "top-1 accuracy (%)", "scratch": [60.0, 62.0], "pretrained": [80.0, 83.0]},
        "detection": {"metric": "COCO box AP", "scratch": [0.1, 0.14], "pretrained": [0.26, 0.25]},
        "segmentation": {"metric": "mIoU (%)", "scratch": [31.0, 33.0], "pretrained": [45.0, 46.0]},
    }
    assert numbers["comparisons"]["classification"] == {"difference": 20.5, "spread": 3.0, "verdict": "ahead"}
    assert numbers["environment"] == {"torch": "2.8.0"}


def test_page_needs_nothing_from_outside(report: Report, tmp_path: Path) -> None:
    page = write_report(report, tmp_path / "out").read_text(encoding="utf-8")
    elements = Elements(page)
    loading = ("src", "href", "srcset", "poster", "data", "action", "xlink:href", "background")
    addresses = [value for _, attributes in elements.found for key, value in attributes.items() if key in loading]
    assert len(addresses) == 3, "the icon and two pictures"
    assert all(address and address.startswith("data:image/png;base64,") for address in addresses)
    assert not elements.of("script") and not elements.of("iframe")
    assert not re.search(r"url\(|@import", page)
    assert [link["rel"] for link in elements.of("link")] == ["icon"]
    policy = next(meta["content"] for meta in elements.of("meta") if meta.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy
    assert not {key for _, attributes in elements.found for key in attributes if key.startswith("on")}


def test_every_picture_is_embedded_whole(report: Report, tmp_path: Path) -> None:
    page = write_report(report, tmp_path / "out").read_text(encoding="utf-8")
    images = Elements(page).of("img")
    for picture, image in zip(report.pictures, images, strict=True):
        assert image["src"] is not None
        assert base64.b64decode(image["src"].partition(",")[2]) == picture.path.read_bytes()
        assert image["alt"] == picture.title
    small, wide = images
    assert (small["width"], small["height"], small["class"]) == ("512", "512", "pixelated")
    assert (wide["width"], wide["height"], wide["class"]) == ("600", "100", "smooth")


def test_table_numbers(report: Report, tmp_path: Path) -> None:
    page = write_report(report, tmp_path / "out").read_text(encoding="utf-8")
    rows = Elements(page).rows
    assert rows[0][:4] == ["Task", "Metric", "Scratch", "Pre-trained"]
    assert rows[1:4] == [
        [
            "classification",
            "top-1 accuracy (%)",
            "61.0 ± 1.060.0 · 62.0",
            "81.5 ± 1.580.0 · 83.0",
            "+20.5",
            "3.0",
            "yes",
        ],
        [
            "detection",
            "COCO box AP",
            "0.120 ± 0.0200.100 · 0.140",
            "0.255 ± 0.0050.260 · 0.250",
            "+0.135",
            "0.040",
            "yes",
        ],
        ["segmentation", "mIoU (%)", "32.0 ± 1.031.0 · 33.0", "45.5 ± 0.545.0 · 46.0", "+13.5", "2.0", "yes"],
    ]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| classification | top-1 accuracy (%) | 61.0 ± 1.0 | 81.5 ± 1.5 | +20.5 | 3.0 | yes |" in text


def test_page_is_accessible(report: Report, tmp_path: Path) -> None:
    page = write_report(report, tmp_path / "out").read_text(encoding="utf-8")
    elements = Elements(page)
    assert elements.of("html")[0]["lang"] == "en"
    assert all(cell.get("scope") in ("row", "col") for cell in elements.of("th"))
    assert all(image.get("alt") for image in elements.of("img"))
    charts = [svg for svg in elements.of("svg") if svg.get("role") == "img"]
    assert [chart["aria-label"] for chart in charts] == ["Pre-training, loss over step: train ends at 0.5"]
    assert len(elements.of("h1")) == 1


def test_texts_are_escaped_and_dollars_survive(report: Report, tmp_path: Path) -> None:
    page = write_report(report, tmp_path / "out").read_text(encoding="utf-8")
    assert "<title>A &lt;demo&gt; &amp; more</title>" in page
    assert "data.folder=&#34;&lt;yours&gt;&#34; &amp;&amp; echo $HOME" in page


def test_markdown_links_pictures_from_its_own_folder(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "![Picture 0](../pictures/picture%200.png)" in text
    assert headline(TASKS) in text
    assert 'mae pretrain data.folder="<yours>" && echo $HOME' in text


def test_a_picture_that_is_no_png_leaves_nothing_behind(report: Report, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\xff\xd8\xff not a png at all, but long enough")
    for path, error in ((broken, ValueError), (tmp_path / "missing.png", FileNotFoundError)):
        bad = replace(report, pictures=[Picture("bad", "", path)])
        with pytest.raises(error, match=path.name):
            write_report(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_headline_claims_all_tasks_only_when_all_are_ahead() -> None:
    assert headline(TASKS) == (
        "Yes: the pre-trained encoder beats the same network from scratch in all three tasks, classification (+20.5), "
        "detection (+0.135) and segmentation (+13.5), by more than the spread over seeds."
    )


@pytest.mark.parametrize(
    ("scratch", "pretrained", "verdict", "words"),
    [
        ([60.0, 62.0], [62.0, 63.0], "within spread", "Classification (+1.5) is within the spread over seeds."),
        ([60.0, 62.0], [63.0, 63.0], "within spread", "Classification (+2.0) is within the spread over seeds."),
        ([70.0, 71.0], [60.0, 61.0], "behind", "Classification (−10.0) is behind."),
        ([60.0], [80.0], "one seed", "Classification (+20.0) is open, with one seed."),
    ],
)
def test_a_task_that_is_not_ahead_is_said_so(
    report: Report, tmp_path: Path, scratch: list[float], pretrained: list[float], verdict: str, words: str
) -> None:
    result = replace(CLASSIFICATION, scratch=scratch, pretrained=pretrained)
    assert compare(result).verdict == verdict
    tasks = {**TASKS, "classification": result}
    answer = headline(tasks)
    assert answer.startswith("In two of three tasks: ") and answer.endswith(words)
    page = write_report(replace(report, tasks=tasks), tmp_path / "out").read_text(encoding="utf-8")
    assert page.count('<span class="verdict good">yes</span>') == 2
    assert page.count('<span class="verdict plain">') == 1
    assert '<span class="mixed">In two of three tasks:</span>' in page


def test_no_task_ahead_is_a_no() -> None:
    swapped = {name: replace(task, scratch=task.pretrained, pretrained=task.scratch) for name, task in TASKS.items()}
    assert headline(swapped).startswith("No: in no task is the pre-trained encoder ahead")
    assert "are behind" in headline(swapped)
    single = {name: replace(task, scratch=task.scratch[:1]) for name, task in TASKS.items()}
    assert headline(single).startswith("Cannot tell: ")
    assert headline({}) == "No task was run, so there is nothing to compare."


def test_lower_can_be_better() -> None:
    error = TaskResult("error (%)", [30.0, 31.0], [20.0, 21.0], higher_is_better=False)
    assert compare(error).verdict == "ahead"
    assert compare(replace(error, higher_is_better=True)).verdict == "behind"


@given(
    st.lists(st.floats(0, 100), min_size=2, max_size=5),
    st.lists(st.floats(0, 100), min_size=2, max_size=5),
)
def test_ahead_is_never_claimed_within_the_spread(scratch: list[float], pretrained: list[float]) -> None:
    found = compare(TaskResult("m", scratch, pretrained))
    assert found.spread is not None
    assert found.spread >= max(scratch) - min(scratch) and found.spread >= max(pretrained) - min(pretrained)
    assert (found.verdict == "ahead") == (found.difference > found.spread)
    swapped = compare(TaskResult("m", pretrained, scratch)).verdict
    assert (swapped == "behind") == (found.verdict == "ahead")


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_an_arm_without_finite_values_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="arm 'pretrained'"):
        TaskResult("mIoU (%)", [1.0], values)


def drawn_lines(svg: str) -> list[tuple[str, str]]:
    """(colour, dashes) of every series of a chart, in their order."""
    groups = re.findall(r'<g class="series">(.*?)</g>', svg, flags=re.DOTALL)
    assert all("<path d=" in group for group in groups)
    dashes = [re.search(r"stroke-dasharray: ([\d., ]+)", group) for group in groups]
    colours = [re.search(r"stroke: var\(--(\w+)\)", group) for group in groups]
    return [(c[1] if c else "", d[1] if d else "") for c, d in zip(colours, dashes, strict=True)]


def test_chart_colours_by_arm_and_dashes_by_seed() -> None:
    points = [(0.0, 1.0), (1.0, 0.5)]
    names = ["pre-trained, seed 0", "pre-trained, seed 1", "scratch, seed 0", "scratch, seed 1"]
    svg = chart(Curve("Loss", "loss", {name: points for name in names}))
    lines = drawn_lines(svg)
    assert [colour for colour, _ in lines] == ["pretrained", "pretrained", "scratch", "scratch"]
    assert lines[0][1] == lines[2][1] == "" and lines[1][1] == lines[3][1] != ""
    assert all(f">{name}</text>" in svg for name in names)


def test_chart_survives_what_training_can_produce() -> None:
    nan, inf = float("nan"), float("inf")
    svg = chart(Curve("Loss", "loss", {"a": [(0, nan), (1, inf), (2, 0.5), (3, 0.25)], "b": [(1, 0.3)], "c": []}))
    assert "nan" not in svg and "inf" not in svg
    assert len(drawn_lines(svg)) == 2 and 'aria-label="Loss, loss over step: a ends at 0.25; b ends at 0.3"' in svg
    assert chart(Curve("Loss", "loss", {"a": [(0, nan)]})) == ""
    assert len(drawn_lines(chart(Curve("Flat", "loss", {"a": [(0, 2.0), (5, 2.0)]})))) == 1


def test_a_page_says_that_a_curve_has_no_points(report: Report, tmp_path: Path) -> None:
    empty = replace(report, curves=[Curve("Loss", "loss", {"a": []})])
    assert "no points were recorded" in write_report(empty, tmp_path / "out").read_text(encoding="utf-8")


def test_charts_share_a_page_without_sharing_names(report: Report, tmp_path: Path) -> None:
    curve = Curve("Loss", "loss", {"a": [(0.0, 1.0), (1.0, 0.5)]})
    page = write_report(replace(report, curves=[curve, curve]), tmp_path / "out").read_text(encoding="utf-8")
    assert page.count("<svg ") == 2 and " id=" not in page and "<?xml" not in page


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.44, "8.4 s"), (59.97, "1 min 00 s"), (372.4, "6 min 12 s"), (3599.8, "1 h 00 min"), (3900, "1 h 05 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_carry_their_sign() -> None:
    assert [signed(value, 1) for value in (1.25, -3.0, 0.04, -0.04)] == ["+1.2", "−3.0", "0.0", "0.0"]
