"""``mae map``: the images of a folder as an encoder sees them, on one page of HTML that needs nothing else."""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mae_core.atomic import write_text
from mae_core.data.contact_sheet import thumbnail
from mae_core.data.decoding import Unreadable, UnreadableImage, to_picture, usable
from mae_core.data.images import ImageSource, in_threads, spread_indices
from mae_core.data.sources import open_places
from mae_core.data.views import View
from mae_core.errors import UserError
from mae_core.measures.knn import nearest_others
from mae_core.models.encoder import ViTEncoder
from mae_core.models.sizes import Pooling
from mae_core.templates import fill
from mae_core.training.distributed import join
from mae_core.training.embedding import pca, pooled, refuse_own_pooling
from mae_core.weights.load import load_encoder, read_encoder, view_for

BATCH = 32
SIDE = 64
"""Pixels of a thumbnail's longer side."""
SHOWN = 12
"""Images of a group, pairs, and images far from all others, that the page lists."""
PLANE = (1100, 720)
"""Width and height of the drawn plane; see ``_places``."""


class Embedded(NamedTuple):
    """Images that could be read: names, features (N, D) float32, thumbnails as JPEG; and those that could not."""

    names: list[str]
    features: Tensor
    thumbnails: list[bytes]
    unreadable: list[Unreadable]


class Map(NamedTuple):
    """What is drawn of N images.

    points      (N, 2), the first two principal components, and their ``shares`` of the variance
    groups      (N,) int64, from 0, the largest group first
    central     of each group its images, those nearest to its centre first
    similarity  (N, k) cosine similarity of the nearest others, falling, and which they are: ``neighbours`` (N, k)
    """

    points: Tensor
    shares: tuple[float, float]
    groups: np.ndarray
    central: list[list[int]]
    similarity: Tensor
    neighbours: Tensor


def write_map(
    weights: Path | str,
    images: Sequence[Path | str],
    out: Path | str,
    *,
    pooling: Pooling = "cls",
    groups: int = 8,
    neighbours: int = 6,
    most: int = 1000,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    branch: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Draw the features of images under the encoder of ``weights`` into the new HTML file ``out``.

    images      folders, lists or shards; of more than ``most`` that many, spread over the set, are drawn
    groups      of k-means on features of length 1; fewer where there are fewer images
    neighbours  nearest others of each image, by cosine similarity
    branch      which encoder of a file that holds several

    Raises ``UserError`` for a file that exists, an encoder that cannot be loaded, fewer than two readable images, and
    without scikit-learn.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists; choose another file with --out")
    _require_kmeans()
    file = read_encoder(weights, branch=branch, asked_as="--branch {}")
    if file.info.timm is not None:
        refuse_own_pooling(file.info.timm)
    encoder = load_encoder(file).to(join(device).device)
    source = open_places([Path(place) for place in images], encoder.in_channels)
    places = spread_indices(len(source), most)
    found = embed_source(encoder, source, places, view_for(encoder, file.info).of_pixels(), pooling)
    for path, reason in found.unreadable:
        say(f"skipped {path}: {reason}")
    if len(found.names) < 2:
        raise UserError(
            f"a map needs two readable images or more, {', '.join(map(str, images))} has {len(found.names)}"
        )
    drawn = lay_out(found.features, groups=groups, neighbours=neighbours, seed=seed)
    about = f"{len(found.names)} images"
    if len(places) < len(source):
        about = f"{len(found.names)} of {len(source)} images (spread over the set)"
    write_text(out, page(found, drawn, title=f"{about}: {', '.join(map(str, images))}", encoder=str(weights)))
    say(f"drew {about} in {len(drawn.central)} groups, with {drawn.neighbours.shape[1]} neighbours each, into {out}")
    return out


def _require_kmeans() -> None:
    """Raise ``UserError`` where scikit-learn is not installed."""
    try:
        import sklearn.cluster  # noqa: F401
    except ImportError:
        raise UserError("mae map needs scikit-learn; pip install scikit-learn") from None


def embed_source(
    encoder: ViTEncoder, source: ImageSource, places: Sequence[int], view: View, pooling: Pooling
) -> Embedded:
    """The images at ``places``, each read once, for its features and its thumbnail."""

    def look(number: int) -> tuple[str, bytes, Tensor] | Unreadable:
        name = source.names[places[number]]
        try:
            pixels = source.read(places[number])
            return name, _as_jpeg(thumbnail(to_picture(pixels), SIDE)), usable(view(pixels), name)
        except UnreadableImage as error:
            return error.unreadable

    names, features, thumbnails, unreadable = [], [], [], []
    waiting: Iterator[Any] = in_threads(look, len(places), chunk=2 * BATCH)
    while seen := list(islice(waiting, BATCH)):
        unreadable += [entry for entry in seen if isinstance(entry, Unreadable)]
        read = [entry for entry in seen if not isinstance(entry, Unreadable)]
        if read:
            names += [name for name, _, _ in read]
            thumbnails += [content for _, content, _ in read]
            features.append(pooled(encoder, torch.stack([pixels for _, _, pixels in read]), pooling))
    return Embedded(names, torch.cat(features) if features else torch.empty(0, 0), thumbnails, unreadable)


def _as_jpeg(picture: Any) -> bytes:
    file = BytesIO()
    picture.save(file, format="JPEG", quality=80)
    return file.getvalue()


def lay_out(features: Tensor, *, groups: int = 8, neighbours: int = 6, seed: int = 0) -> Map:
    """(N, D) features of two images or more -> their principal components, groups and neighbours."""
    from sklearn.cluster import KMeans

    points, shares = pca(features)
    unit = functional.normalize(features, dim=1).numpy()
    means = KMeans(min(groups, len(unit)), n_init=4, random_state=seed).fit(unit)
    order = np.argsort(-np.bincount(means.labels_, minlength=means.n_clusters), kind="stable")
    order = order[np.isin(order, means.labels_)]  # equal images leave groups empty
    distance = means.transform(unit)
    central = []
    for label in order:
        mine = np.flatnonzero(means.labels_ == label)
        central.append(mine[np.argsort(distance[mine, label], kind="stable")].tolist())
    grouped: np.ndarray = np.empty(len(unit), dtype=np.int64)
    for number, mine in enumerate(central):
        grouped[mine] = number
    similarity, indices = nearest_others(features, min(neighbours, len(features) - 1))
    return Map(points, shares, grouped, central, similarity, indices)


def alike(drawn: Map, most: int = SHOWN) -> list[tuple[int, int, float]]:
    """The pairs of images that are most alike, and their similarity: copies of one another stand first."""
    pairs = {}
    for one, (others, values) in enumerate(zip(drawn.neighbours.tolist(), drawn.similarity.tolist(), strict=True)):
        for other, value in zip(others, values, strict=True):
            pairs[min(one, other), max(one, other)] = value
    best = sorted(pairs.items(), key=lambda entry: (-entry[1], entry[0]))[:most]
    return [(one, other, value) for (one, other), value in best]


def apart(drawn: Map, most: int = SHOWN) -> list[tuple[int, float]]:
    """The images that are least like their nearest neighbour, and that similarity."""
    order = drawn.similarity[:, 0].argsort(stable=True)[:most].tolist()
    return [(place, float(drawn.similarity[place, 0])) for place in order]


def usual_similarity(features: Tensor) -> float:
    """The mean cosine similarity of two images of (N, D) features: what other similarities are read against, since the
    features of an encoder have much in common."""
    unit, number = functional.normalize(features.double(), dim=1), len(features)
    return float((unit.sum(dim=0).square().sum() - number) / (number * (number - 1)))


def _share_of_pairs(sizes: Sequence[int]) -> float:
    """How often two images lie in the same of folders of these sizes."""
    number = sum(sizes)
    return sum(size * (size - 1) for size in sizes) / (number * (number - 1))


def _places(points: Tensor, side: float) -> list[tuple[float, float]]:
    """Points (N, 2) -> the upper left corners of pictures of ``side`` within ``PLANE``, both axes in one scale."""
    low, span = points.amin(dim=0), (points.amax(dim=0) - points.amin(dim=0)).clamp(min=1e-9)
    room = torch.tensor(PLANE) - side
    scale = (room / span).min()
    margin = (room - span * scale) / 2
    corners = (points - low) * scale + margin
    corners[:, 1] = PLANE[1] - side - corners[:, 1]  # SVG counts from above
    return [(round(x, 1), round(y, 1)) for x, y in corners.tolist()]


def page(found: Embedded, drawn: Map, *, title: str, encoder: str) -> str:
    """The HTML of a map. Each thumbnail is in it once; nothing is fetched, and no script runs."""
    folders = [str(Path(name).parent) if Path(name).parent != Path() else "" for name in found.names]
    side = min(48.0, max(14.0, 0.6 * (PLANE[0] * PLANE[1] / len(found.names)) ** 0.5))
    same = [folders[i] == folders[j] for i, j in enumerate(drawn.neighbours[:, 0].tolist())]
    return fill(
        Path(__file__).with_name("feature_map.html"),
        title=title,
        encoder=encoder,
        dimensions=found.features.shape[1],
        names=[os.fsencode(name).decode("utf-8", "replace") for name in found.names],
        thumbnails=[base64.b64encode(content).decode("ascii") for content in found.thumbnails],
        side=SIDE,
        scale=round(side / SIDE, 4),
        plane=PLANE,
        places=_places(drawn.points, side),
        shares=drawn.shares,
        groups=drawn.groups.tolist(),
        colours=[f"hsl({360 * number // len(drawn.central)} 65% 50%)" for number in range(len(drawn.central))],
        central=[mine[:SHOWN] for mine in drawn.central],
        sizes=[len(mine) for mine in drawn.central],
        held=[_counted([folders[place] for place in mine]) for mine in drawn.central],
        agreement=sum(same) / len(same) if len(set(folders)) > 1 else None,
        by_chance=_share_of_pairs(list(Counter(folders).values())),
        usual=usual_similarity(found.features),
        pairs=alike(drawn),
        loners=apart(drawn),
        neighbours=[
            list(zip(*columns, strict=True))
            for columns in zip(drawn.neighbours.tolist(), drawn.similarity.tolist(), strict=True)
        ],
        unreadable=[entry._asdict() for entry in found.unreadable],
    )


def _counted(folders: Sequence[str], most: int = 4) -> str:
    """The folders that most images of a group lie in, with their numbers; empty where there are no folders."""
    counts = Counter(folders).most_common()
    if [name for name, _ in counts] == [""]:
        return ""
    shown = ", ".join(f"{name or '(no folder)'} {count}" for name, count in counts[:most])
    return shown + (f", and {len(counts) - most} more folders" if len(counts) > most else "")
