"""A trained classifier from Python, and its answers on a folder of images without labels."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mae_core.atomic import atomic_folder, check_new_folder
from mae_core.data.contact_sheet import MOST, contact_sheet, thumbnail
from mae_core.data.decoding import Pixels, Unreadable, UnreadableImage, to_picture
from mae_core.data.given import AnyImage, as_list, name_of, named_images, pixels_of, refusal
from mae_core.data.images import Statistics, statistics_of
from mae_core.data.views import evaluation_view
from mae_core.errors import UserError
from mae_core.layout import PREDICTIONS
from mae_core.patches import as_pair
from mae_core.training import distributed
from mae_core.training.frozen_config import EvaluateConfig
from mae_core.training.frozen_trunk import classifier_file
from mae_core.training.run import Run
from mae_core.weights.classifier import classifier_of
from mae_core.weights.load import with_file

CONTACT_SHEET = "contact_sheet.png"
BATCH = 32
LEAST_SIDE = 320
SURE = 0.5
"""Probability from which on a classifier with several labels per image names a class."""


@dataclass(frozen=True)
class Classified:
    """What a classifier says of one image.

    classes        the names of all classes
    probabilities  (classes,) float32; they add up to 1, unless ``multi_label``
    multi_label    every class has a probability of its own
    pixels         the image as it was read
    """

    classes: list[str]
    probabilities: np.ndarray
    multi_label: bool
    pixels: Pixels = field(repr=False, compare=False)

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` likeliest classes with their probabilities, likeliest first."""
        order = np.argsort(-self.probabilities, kind="stable")[:k]
        return [(self.classes[place], float(self.probabilities[place])) for place in order]

    @property
    def name(self) -> str:
        """The likeliest class."""
        return self.top(1)[0][0]

    @property
    def probability(self) -> float:
        """Of the likeliest class."""
        return self.top(1)[0][1]

    @property
    def names(self) -> list[str]:
        """The classes that the image has: the likeliest one, or with ``multi_label`` all with 0.5 or more."""
        return (
            [name for name, value in self.top(len(self.classes)) if value >= SURE] if self.multi_label else [self.name]
        )

    def draw(self, k: int = 3) -> Image.Image:
        """The image above its ``k`` likeliest classes, RGB."""
        picture = to_picture(self.pixels).convert("RGB")
        side = max(LEAST_SIDE, *picture.size)
        return contact_sheet([picture], ["\n".join(f"{name} {value:.1%}" for name, value in self.top(k))], side=side)


class Classifier:
    """A trained classifier that answers as ``mae evaluate`` measures it: same view, same precision."""

    def __init__(
        self, model: nn.Module, config: EvaluateConfig, statistics: Statistics, classes: list[str], multi_label: bool
    ) -> None:
        self._run = Run(config, distributed.join(config.device, config.rank_timeout))
        self.model = model.to(self._run.device).eval()
        self.classes, self.multi_label = classes, multi_label
        self._reading = config.data.reading
        self._view = evaluation_view(config.data.test_crop, as_pair(config.data.image_size), statistics)

    @overload
    def predict(self, images: Sequence[AnyImage]) -> list[Classified]: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, images: AnyImage) -> Classified: ...

    def predict(self, images: AnyImage | Sequence[AnyImage]) -> Classified | list[Classified]:
        """What the classifier says of an image, or of each of a list, of any sizes; see ``AnyImage``.

        Raises ``UserError`` for an image that cannot be read or has other channels.
        """
        given, several = as_list(images)
        found: list[Classified] = []
        for _, answer in self.answers((name_of(image, number), image) for number, image in enumerate(given)):
            if isinstance(answer, Unreadable):
                raise refusal(answer)
            found.append(answer)
        return found if several else found[0]

    def answers(self, images: Iterable[tuple[str, AnyImage]]) -> Iterator[tuple[str, Classified | Unreadable]]:
        """(name, image) -> (name, what the classifier says of it, or why it could not be read), in order."""
        waiting = iter(images)
        while batch := list(islice(waiting, BATCH)):
            read = [self._read(name, image) for name, image in batch]
            views = [view for _, view in read if view is not None]
            chances = iter(self._chances(torch.stack(views)) if views else ())
            for (name, _), (pixels, view) in zip(batch, read, strict=True):
                if isinstance(pixels, Unreadable) or view is None:
                    assert isinstance(pixels, Unreadable)
                    yield name, pixels
                else:
                    yield name, Classified(self.classes, next(chances), self.multi_label, pixels)

    def _read(self, name: str, image: AnyImage) -> tuple[Pixels | Unreadable, Tensor | None]:
        try:
            pixels = pixels_of(image, self._reading, name)
        except UnreadableImage as error:
            return error.unreadable, None
        return pixels, self._view(pixels)

    @torch.inference_mode()
    def _chances(self, views: Tensor) -> np.ndarray:
        with self._run.autocast():
            logits = self.model(views.to(self._run.device)).float().cpu()
        return (logits.sigmoid() if self.multi_label else logits.softmax(dim=1)).numpy()


def load_classifier(
    weights: Path | str, *, device: Literal["auto", "cpu", "cuda"] = "auto", classes: Sequence[str] | None = None
) -> Classifier:
    """The classifier of a run (fine-tuned or probed), its classifier.safetensors, or an official fine-tuned file.

    classes  names, for a file that does not state them; "class 0", "class 1", ... where none are given

    Raises ``UserError`` where the file holds no classifier, or another number of classes than are named.
    """
    config = EvaluateConfig(weights=Path(weights), device=device)
    source = classifier_file(config)
    config = with_file(source, config, frozen=True)
    model, _ = classifier_of(source, image_size=config.data.image_size)
    number = source.num_classes
    names = list(source.info.classes or classes or [f"class {place}" for place in range(number)])
    if len(names) != number:
        raise UserError(f"{source.path} has {number} classes, and {len(names)} names were given; give one for each")
    statistics = statistics_of(config.data, source.metadata)
    return Classifier(model, config, statistics, names, bool(source.info.multi_label))


def predict_folder(
    weights: Path | str,
    images: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    top: int = 3,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    on_error: Literal["skip", "raise"] = "skip",
    say: Callable[[str], None] = print,
) -> Path:
    """Classify files, or folders of them, into the new folder ``out`` -> its predictions.csv.

    A row for each image: file, name and probability of the likeliest class (of a classifier with several labels per
    image: all classes with 0.5 or more, and the highest probability), and the ``top`` likeliest with their
    probabilities. contact_sheet.png shows the images whose answers are least certain.

    on_error  ``skip`` names an unreadable image and goes on, ``raise`` stops

    Raises ``UserError`` for a folder that is not empty, and where no image can be read.
    """
    out = Path(out)
    check_new_folder(out)
    if top < 1:
        raise UserError(f"top is {top}; give the number of likeliest classes to list, 1 or more")
    given = [images] if isinstance(images, Path | str) else list(images)
    files = {path: f"{name}{path.suffix}" for name, path in named_images(given)}
    classifier = load_classifier(weights, device=device)
    shown: list[tuple[float, str, Image.Image]] = []
    read = 0
    with atomic_folder(out) as folder:
        with (folder / PREDICTIONS).open("w", newline="", encoding="utf-8") as lines:
            table = csv.writer(lines)
            table.writerow(("file", "name", "probability", f"top{top}"))
            for path, answer in classifier.answers((str(path), path) for path in files):
                if isinstance(answer, Unreadable):
                    if on_error == "raise" or len(files) == 1:
                        raise UserError(f"image {answer.path} cannot be read ({answer.reason}); repair or remove it")
                    say(f"skipped {answer.path}: {answer.reason}")
                    continue
                read += 1
                best = ";".join(f"{name} {value:.4f}" for name, value in answer.top(top))
                name = files[Path(path)]
                table.writerow((name, ";".join(answer.names), f"{answer.probability:.6f}", best))
                caption = f"{answer.name} {answer.probability:.1%}\n{name}"
                shown.append((answer.probability, caption, thumbnail(to_picture(answer.pixels))))
                shown = sorted(shown, key=lambda entry: entry[0])[:MOST]
        if not read:
            raise UserError(f"none of the {len(files)} images could be read; give image files or folders of them")
        contact_sheet([x for _, _, x in shown], [x for _, x, _ in shown]).save(folder / CONTACT_SHEET)
    say(f"classified {read} images in {out}/: {PREDICTIONS}, {CONTACT_SHEET}")
    return out / PREDICTIONS
