"""``mae map``: what the page says is what scikit-learn says of the same features, and the page needs nothing else."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mae_core import embed, load_encoder
from mae_core.cli.main import app
from mae_core.errors import UserError
from mae_core.training.feature_map import alike, apart, lay_out, write_map

sklearn = pytest.importorskip("sklearn.neighbors", reason="k-means, and the independent reference")
sklearn_pairwise = pytest.importorskip("sklearn.metrics.pairwise")


class Balanced(HTMLParser):
    """Fails where an element is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def photos(tmp_path_factory, write_images) -> Path:
    """Three folders; a picture that is in two of them, one that is no picture."""
    root = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("ash", "birch", "a & <b>")):
        write_images(root / name, 5, seed=number)
    Image.open(root / "ash" / "002.png").save(root / "birch" / "copy.png")
    (root / "ash" / "broken.png").write_bytes(b"no image")
    return root


def test_the_page_holds_every_image_once_and_what_is_near_to_it(tmp_path, photos, pretrained):
    out = tmp_path / "map.html"
    result = CliRunner().invoke(app, ["map", str(pretrained), str(photos), "--out", str(out), "--neighbours", "3"])
    assert result.exit_code == 0 and "broken.png: " in result.output and "drew 16 images in 8 groups" in result.output
    text = out.read_text("utf-8")
    parser = Balanced()
    parser.feed(text)
    assert not parser.open and "<b>" not in text and "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text) and "http:" not in text and "https:" not in text

    contents = re.findall(r'<image id="t\d+" [^>]*href="data:image/jpeg;base64,([^"]+)"', text)
    assert len(contents) == 16
    assert {max(Image.open(BytesIO(base64.b64decode(content))).size) for content in contents} == {64}

    paths = sorted(path for path in photos.rglob("*.png") if path.name != "broken.png")
    features = embed(load_encoder(pretrained), paths).numpy()
    reference = sklearn.NearestNeighbors(n_neighbors=4, metric="cosine").fit(features)
    distances, _ = reference.kneighbors(features)
    pairs = np.triu_indices(16, k=1)
    usual = sklearn_pairwise.cosine_similarity(features)[pairs].mean()
    assert f"two images of this set at {usual:.3f} on average" in text
    folders = np.array([path.parent.name for path in paths])
    by_chance = 100 * np.mean(folders[pairs[0]] == folders[pairs[1]])
    assert f"an image drawn at random does for {by_chance:.0f} %" in text
    shown = re.findall(r'<section class="near" id="n(\d+)">(.*?)</section>', text, flags=re.DOTALL)
    assert len(shown) == 16
    for number, block in shown:
        values = [float(value) for value in re.findall(r"<figcaption>(\d\.\d+)<br>", block)]
        assert values == pytest.approx(1 - distances[int(number), 1:], abs=2e-3)
    ash, copy = (paths.index(photos / name) for name in ("ash/002.png", "birch/copy.png"))
    assert "ash/002.png and birch/copy.png" in text[text.index("Most alike") :]
    assert f'#n{min(ash, copy)}"' in text and "1.000 ash/002.png, birch/copy.png" in text


def test_groups_are_those_that_were_made(tmp_path):
    """Three directions, of different sizes; one image on its own, and one pair."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 8)
    features = torch.cat(
        [centres[n] + 0.05 * torch.randn(count, 8, generator=generator) for n, count in enumerate((9, 6, 3))]
    )
    features[4] = features[2] * 3  # the angle counts
    drawn = lay_out(features, groups=3, neighbours=2)
    assert drawn.groups.tolist() == [0] * 9 + [1] * 6 + [2] * 3
    assert [sorted(mine) for mine in drawn.central] == [list(range(9)), list(range(9, 15)), list(range(15, 18))]
    assert alike(drawn, 1)[0][:2] == (2, 4) and alike(drawn, 1)[0][2] == pytest.approx(1)
    lonely = torch.cat([features, -torch.ones(1, 8)])
    assert apart(lay_out(lonely, groups=3, neighbours=2), 1)[0][0] == 18
    assert lay_out(torch.ones(3, 4), groups=8, neighbours=6).similarity.shape == (3, 2)
    assert np.unique(lay_out(torch.ones(3, 4)).groups).tolist() == [0]


def test_of_many_images_some_are_drawn_and_it_is_said(tmp_path, photos, pretrained):
    told: list[str] = []
    write_map(pretrained, [photos / "birch"], tmp_path / "map.html", most=4, groups=2, say=told.append)
    assert told[-1].startswith("drew 4 of 6 images (spread over the set) in 2 groups, with 3 neighbours each")


def test_what_cannot_be_drawn_is_refused(tmp_path, photos, pretrained, write_images):
    (tmp_path / "there.html").write_text("kept")
    with pytest.raises(UserError, match=r"there.html exists; choose another file with --out"):
        write_map(pretrained, [photos], tmp_path / "there.html")
    assert (tmp_path / "there.html").read_text() == "kept"
    write_images(tmp_path / "one", 1)
    for place, message in (
        ("none", "none does not exist; name"),
        ("one", "needs two readable images or more"),
    ):
        with pytest.raises(UserError, match=message):
            write_map(pretrained, [tmp_path / place], tmp_path / "map.html")
    assert not (tmp_path / "map.html").exists()
