"""The published MAE weights: what they are, where they lie, and a download that can be resumed and is checked."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mae_core.atomic import fsync_path
from mae_core.errors import UserError

BASE_URL = "https://dl.fbaipublicfiles.com/mae"
LICENCE = "CC BY-NC 4.0"
NOTICE = (
    "These weights are published by Meta under CC BY-NC 4.0 (https://creativecommons.org/licenses/by-nc/4.0/): "
    "no commercial use. The licence goes with everything trained or converted from them."
)
CHUNK = 1 << 20


@dataclass(frozen=True)
class Published:
    """A published file: ``md5`` is the prefix that its authors print, where they do."""

    name: str
    url: str
    content: str
    target: str | None
    md5: str | None = None
    licence: str = LICENCE

    @property
    def filename(self) -> str:
        """Last part of the URL."""
        return self.url.rsplit("/", 1)[-1]


KINDS = {
    "pretrain_{}": ("pretrain/mae_pretrain_vit_{}.pth", "encoder, 1600 epochs on ImageNet-1K", "normalized_pixels"),
    "full_{}": ("pretrain/mae_pretrain_vit_{}_full.pth", "encoder and decoder of pretrain_{}", "normalized_pixels"),
    "visualize_{}": ("visualize/mae_visualize_vit_{}.pth", "encoder and decoder, for pictures", "pixels"),
    "visualize_{}_gan": (
        "visualize/mae_visualize_vit_{}_ganloss.pth",
        "encoder and decoder trained with a GAN loss too, for pictures only",
        "pixels",
    ),
    "finetuned_{}": ("finetune/mae_finetuned_vit_{}.pth", "classifier of ImageNet-1K on mean-pooled patches", None),
}
"""Name of a row -> (the file, what it holds, its pixel target); ``{}`` stands for the size."""
MD5 = {
    **{"pretrain_base": "8cad7c", "pretrain_large": "b8b06e", "pretrain_huge": "9bdbb0"},
    **{"finetuned_base": "1b25e9", "finetuned_large": "51f550", "finetuned_huge": "2541f2"},
}
CATALOGUE = {
    name: Published(name, f"{BASE_URL}/{url.format(size)}", content.format(size), target, MD5.get(name))
    for size in ("base", "large", "huge")
    for pattern, (url, content, target) in KINDS.items()
    if (name := pattern.format(size)) not in ("visualize_base_gan", "visualize_huge_gan")
}
"""Name on the command line -> file."""


def published_target(filename: str) -> str | None:
    """The pixel target of a published file of that name; None for any other."""
    return next((row.target for row in CATALOGUE.values() if row.filename == filename), None)


def get_weights(
    name: str, folder: Path, *, url: str | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Path:
    """Download a row of the catalogue into ``folder`` and return its path; a download that was cut off goes on where
    it ended, and a file that is there already is checked.

    ``url`` is a mirror to take it from. Raises ``UserError`` for an unknown name, a server that does not answer, and a
    file whose hash is not the published one.
    """
    if name not in CATALOGUE:
        raise UserError(f"no published weights {name!r}; known: {', '.join(CATALOGUE)}")
    row = CATALOGUE[name]
    final = folder / row.filename
    if final.exists():
        check_hash(final, row)
        return final
    folder.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(final.name + ".part")
    _download(url or row.url, partial, on_progress)
    try:
        check_hash(partial, row)
    except UserError:
        partial.unlink()
        raise
    fsync_path(partial)
    os.replace(partial, final)
    return final


def check_hash(path: Path, row: Published) -> None:
    """Raise ``UserError`` unless the md5 of ``path`` begins as published; rows without a published hash pass."""
    if row.md5 is None:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if not digest.hexdigest().startswith(row.md5):
        raise UserError(
            f"{path} is not the published {row.name}: its md5 begins {digest.hexdigest()[:6]}, not {row.md5}; "
            "delete it and get it again"
        )


def _download(url: str, partial: Path, on_progress: Callable[[int, int], None] | None) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            resumed = answer.status == 206
            have = have if resumed else 0
            left = int(answer.headers.get("Content-Length") or 0)
            total = have + left
            with partial.open("ab" if resumed else "wb") as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    if on_progress is not None:
                        on_progress(have, total)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the part on disk is the whole file
            return
        raise UserError(f"{url} answered {error.code} {error.reason}; try again later, or another --url") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"cannot download {url} ({reason}); the part downloaded so far is kept; run the command again to continue"
        ) from None
    if left and have < total:
        raise UserError(f"{url} ended after {have} of {total} bytes; run the command again to continue")
