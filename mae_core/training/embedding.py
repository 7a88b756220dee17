"""``mae knn`` and ``mae features``: a frozen encoder measured and shown without training anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from mae_core.atomic import atomic_path
from mae_core.data.config import EvaluationData
from mae_core.data.given import AnyImage, as_list
from mae_core.data.images import statistics_of
from mae_core.data.labelled import LabelledPaths
from mae_core.data.sources import open_files
from mae_core.errors import UserError
from mae_core.layout import FEATURES, PICTURES
from mae_core.measures.knn import check_neighbours, knn_scores
from mae_core.models.sizes import Pooling
from mae_core.models.timm_trunk import Encoder, TimmTrunk
from mae_core.training.classification import check_all_if_asked, read_splits, tell_of_weights
from mae_core.training.features import Rows, Viewer, check_cache, features_of
from mae_core.training.frozen_config import FeaturesConfig, KnnConfig
from mae_core.training.frozen_trunk import trunk_from, weights_of
from mae_core.training.plots import scatter_picture
from mae_core.training.run import check_output, open_run
from mae_core.training.same_data import Data
from mae_core.weights.encoder_file import EncoderFile
from mae_core.weights.load import with_file
from mae_core.weights.report import LoadReport


def frozen_trunk(source: EncoderFile, data: EvaluationData, pooling: Pooling, batch: int) -> tuple[Viewer, LoadReport]:
    """The trunk of a file with the view its images need, and the report of its weights."""
    model, report = trunk_from(source, pooling=pooling, image_size=data.image_size)
    return Viewer(model, data, statistics_of(data, source.metadata), batch), report


def knn(config: KnnConfig) -> dict[str, Any]:
    """Classify val images by their nearest train images; returns what metrics.json holds: the share of right answers,
    in per cent, for each k. Raises ``UserError`` for what a user can get wrong."""
    source = weights_of(config)
    config = with_file(source, config, frozen=True)
    check_output(config, resume=False)
    check_cache(config.cache)
    splits = read_splits(config.data)
    check_neighbours(config.k, len(splits.train.paths))
    trunk, report = frozen_trunk(source, config.data, config.model.pooling, config.evaluation_batch)

    run = open_run(config, resume=False, data=splits.data)
    tell_of_weights(run, report)
    trunk.model.to(run.device)

    def embedded(files: LabelledPaths) -> tuple[Tensor, Tensor]:
        found = features_of(files.paths, trunk, run, cache=config.cache)
        labels = torch.tensor([files.labels[index] for index in found.indices.tolist()])
        return found.values.to(run.device), labels.to(run.device)

    (bank, bank_labels), (queries, labels) = embedded(splits.train), embedded(splits.val)
    votes = knn_scores(
        queries, bank, bank_labels, len(splits.classes), neighbours=config.k, temperature=config.temperature
    )
    right = {k: 100 * float((of_k.argmax(dim=1) == labels).float().mean()) for k, of_k in votes.items()}
    metrics = {
        "top1": {str(k): round(share, 3) for k, share in right.items()},
        "images": len(queries),
        "bank": len(bank),
        "pooling": config.model.pooling,
        "temperature": config.temperature,
    }
    for k, share in right.items():
        run.say(f"k-NN with k={k}: top-1 {share:.2f} % on {len(queries)} images; the bank holds {len(bank)} images")
    run.close(metrics)
    return metrics


@torch.inference_mode()
def embed(
    encoder: Encoder, images: AnyImage | Sequence[AnyImage], *, pooling: Pooling = "cls", batch: int = 32
) -> Tensor:
    """Images, of any sizes, under an encoder of ``load_encoder`` -> their features (n, D) float32, a row each.

    ``cls``: the normalised cls token; ``mean``: of the patch tokens, normalised after. The same as ``mae features``
    with ``data.test_crop=1``. Raises ``UserError`` for an image that cannot be read.
    """
    given, _ = as_list(images)
    parts = (given[first : first + batch] for first in range(0, len(given), batch))
    return torch.cat([pooled(encoder, torch.stack([encoder.transform(x) for x in part]), pooling) for part in parts])


def refuse_own_pooling(trunk: str) -> NoReturn:
    """Raise ``UserError``: what pools the tokens of the toolkit's own ViT does not pool those of ``timm:NAME``."""
    raise UserError(
        f"{trunk} pools in its own way, and here the toolkit's own ViT is pooled; use mae features with "
        f"model.trunk={trunk}"
    )


@torch.inference_mode()
def pooled(encoder: Encoder, pixels: Tensor, pooling: Pooling) -> Tensor:
    """(B, C, H, W), as the encoder expects them -> features (B, D) float32 on the CPU, see ``embed``. Raises
    ``UserError`` where the cls token is asked of an encoder without one, and for a trunk of timm."""
    if isinstance(encoder, TimmTrunk):
        refuse_own_pooling(encoder.trunk)
    if pooling == "cls" and not encoder.prefix:
        raise UserError("this encoder has no cls token; ask for pooling='mean'")
    (tokens,) = encoder.forward_intermediates(
        pixels.to(encoder.pos_embed.device),
        indices=1,
        norm=False,
        output_fmt="NLC",
        intermediates_only=True,
        return_prefix_tokens=True,
    )
    patches, prefix = tokens if encoder.prefix else (tokens, None)
    return encoder.norm(patches.mean(dim=1) if prefix is None or pooling == "mean" else prefix[:, 0]).float().cpu()


def write_features(config: FeaturesConfig) -> Path:
    """Embed every image of ``data.path``: a folder, a list of files, or one image. Returns the file with their
    ``features`` (N, D), ``files`` (relative to data.path) and ``folders``, which ``numpy.load`` reads. Draws them in
    the plane.

    Raises ``UserError`` for what a user can get wrong.
    """
    source = weights_of(config)
    config = with_file(source, config, frozen=True)
    check_output(config, resume=False)
    check_cache(config.cache)
    images = open_files(config.data.path, config.data.reading)
    if config.picture == "tsne":
        check_tsne(len(images))
    trunk, report = frozen_trunk(source, config.data, config.model.pooling, config.evaluation_batch)

    check_all_if_asked(images, config.data)
    run = open_run(config, resume=False, data=Data(images.names, images.content))
    tell_of_weights(run, report)
    trunk.model.to(run.device)
    found = features_of(images.paths, trunk, run, cache=config.cache)
    file = run.folder / FEATURES
    if run.is_main:
        names = [images.names[index] for index in found.indices.tolist()]
        folders = [Path(name).parent.name for name in names]
        with atomic_path(file) as temporary:
            np.savez(temporary, features=found.values.numpy(), files=np.array(names), folders=np.array(folders))
        run.say(f"{len(names)} embedding{'s' * (len(names) != 1)} of {found.values.shape[1]} numbers in {file}")
        if config.picture != "none":
            draw_features(config, found, folders, run.folder / PICTURES / f"{config.picture}.png")
            run.say(f"drew the picture {run.folder / PICTURES / f'{config.picture}.png'}")
    run.close()
    return file


def draw_features(config: FeaturesConfig, found: Rows, folders: list[str], file: Path) -> None:
    """The embeddings in the plane, coloured by the folder they are in."""
    if config.picture == "tsne":
        points, axes = tsne(found.values, config.seed), ["t-SNE 1", "t-SNE 2"]
    else:
        points, shares = pca(found.values)
        axes = [f"PC {number} ({share:.0%} of the variance)" for number, share in enumerate(shares, start=1)]
    picture = scatter_picture(points, folders, axes, title=f"{len(folders)} images, {config.model.pooling} features")
    with atomic_path(file) as temporary:
        picture.save(temporary)


def pca(features: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """(N, D) -> (N, 2): the two principal components, and their shares of the variance. Signs are chosen so that the
    largest entry of a component is positive."""
    centred = (features - features.mean(dim=0)).double()
    _, strengths, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = torch.nn.functional.pad(directions[:2], (0, 0, 0, 2 - len(directions[:2])))
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)
    shares = torch.nn.functional.pad(strengths**2, (0, 2))[:2] / (strengths**2).sum().clamp(min=1e-30)
    return (centred @ directions.T).float(), (float(shares[0]), float(shares[1]))


def check_tsne(num_images: int) -> None:
    """Raise ``UserError`` where t-SNE cannot be had."""
    if num_images < 4:
        raise UserError(f"picture=tsne needs four images or more, got {num_images}; set picture=pca")
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError:
        raise UserError("picture=tsne needs scikit-learn; pip install scikit-learn, or set picture=pca") from None


def tsne(features: Tensor, seed: int) -> Tensor:
    """(N, D) -> (N, 2), by scikit-learn, from a start at the principal components."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return torch.from_numpy(model.fit_transform(features.numpy()))
