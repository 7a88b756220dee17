"""Published weights of MAE and of the encoders that its paper is compared with: what they are, where they lie, and a
download that can be resumed and is checked."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mae_core.atomic import fsync_path
from mae_core.errors import UserError

META_URL = "https://dl.fbaipublicfiles.com"
BASE_URL = f"{META_URL}/mae"
LICENCE = "CC BY-NC 4.0"
APACHE, MIT = "Apache 2.0", "MIT"
NOTICE = (
    "These weights are published by Meta under CC BY-NC 4.0 (https://creativecommons.org/licenses/by-nc/4.0/): "
    "no commercial use. The licence goes with everything trained or converted from them."
)
CHUNK = 1 << 20


@dataclass(frozen=True)
class Published:
    """A published file. ``md5``: the prefix that its authors print, where they do. ``by_hand``: ``url`` is a page, and
    no program gets the file from it."""

    name: str
    url: str
    content: str
    target: str | None
    md5: str | None = None
    licence: str = LICENCE
    by_hand: bool = False

    @property
    def filename(self) -> str:
        """Last part of the URL."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def hashed(self) -> tuple[str, str] | None:
        """(algorithm, beginning of the hash): as printed, or in the file's name by the custom of torch.hub; None where
        neither tells."""
        if self.md5 is not None:
            return "md5", self.md5
        found = re.search(r"-([0-9a-f]{8})\.pth$", self.filename)
        return None if found is None else ("sha256", found[1])

    @property
    def notice(self) -> str:
        """What to say of its licence."""
        return NOTICE if self.licence == LICENCE else f"Licence of {self.name}: {self.licence}."


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
OF_MAE = {
    name: Published(name, f"{BASE_URL}/{url.format(size)}", content.format(size), target, MD5.get(name))
    for size in ("base", "large", "huge")
    for pattern, (url, content, target) in KINDS.items()
    if (name := pattern.format(size)) not in ("visualize_base_gan", "visualize_huge_gan")
}
OTHERS = (
    Published("moco_v3_small", f"{META_URL}/moco-v3/vit-s-300ep/vit-s-300ep.pth.tar", "MoCo v3 ViT-S/16, 12 heads, 300 "
              "epochs on ImageNet-1K: base_encoder and momentum_encoder", None),
    Published("moco_v3_base", f"{META_URL}/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar", "MoCo v3 ViT-B/16, 300 epochs on "
              "ImageNet-1K: base_encoder and momentum_encoder", None),
    *(
        Published(f"dino_{name}{full}", f"{META_URL}/dino/{file}_pretrain/{file}_pretrain{ending}.pth",
                  f"DINO {model} on ImageNet-1K{content}", None, licence=APACHE)
        for name, file, model in (("small", "dino_deitsmall16", "ViT-S/16"), ("small_8", "dino_deitsmall8", "ViT-S/8"),
                                  ("base", "dino_vitbase16", "ViT-B/16"), ("base_8", "dino_vitbase8", "ViT-B/8"))
        for full, ending, content in (("", "", ""), ("_full", "_full_checkpoint", ": student and teacher, with heads"))
    ),
    *(
        Published(f"ibot_{name}", "https://github.com/bytedance/ibot#pre-trained-models", f"iBOT {model}: one encoder, "
                  "or student and teacher in the full checkpoint", None, licence=APACHE, by_hand=True)
        for name, model in (("small", "ViT-S/16"), ("base", "ViT-B/16"), ("large", "ViT-L/16, ImageNet-22K"))
    ),
    *(
        Published(f"dinov2_{name}", f"{META_URL}/dinov2/{file}/{file}_pretrain.pth", f"DINOv2 {model}, no registers, "
                  "layer scale, 518 x 518", None, licence=APACHE)
        for name, file, model in (("small", "dinov2_vits14", "ViT-S/14"), ("base", "dinov2_vitb14", "ViT-B/14"),
                                  ("large", "dinov2_vitl14", "ViT-L/14"))
    ),
    *(
        Published(f"deit_{size}", f"{META_URL}/deit/deit_{size}_patch16_224-{hashed}.pth", f"DeiT ViT-{size[0].upper()}"
                  "/16, supervised on ImageNet-1K", None, licence=APACHE)
        for size, hashed in (("tiny", "a1311bcf"), ("small", "cd65a155"), ("base", "b5f2ef4d"))
    ),
    *(
        Published(f"deit_3_{size}", f"{META_URL}/deit/deit_3_{size}_224_1k.pth", f"DeiT III ViT-{size[0].upper()}, "
                  "supervised on ImageNet-1K, layer scale", None, licence=APACHE)
        for size in ("small", "base", "large", "huge")
    ),
    *(
        Published(f"torchvision_{name}", f"https://download.pytorch.org/models/{file}.pth", f"torchvision {model}, "
                  "supervised on ImageNet-1K", None, licence="not stated by torchvision")
        for name, file, model in (("base", "vit_b_16-c867db91", "ViT-B/16"), ("large", "vit_l_16-852ce7e3", "ViT-L/16"))
    ),
    *(
        Published(f"{kind}_{size}", f"https://{url}_{size}_patch16_224_{data}.pth", f"{told} ViT-{size[0].upper()}/16, "
                  "pre-trained, for timm's class", None, licence=MIT)
        for kind, url, data, told in (
            ("beit", "unilm.blob.core.windows.net/beit/beit", "pt22k", "BEiT"),
            ("beitv2", "conversationhub.blob.core.windows.net/beit-share-public/beitv2/beitv2", "pt1k", "BEiT v2"),
        )
        for size in ("base", "large")
    ),
)  # fmt: skip
"""As their authors' pages state them: READMEs of facebookresearch/moco-v3 (CONFIG.md), dino, dinov2 and deit, of
bytedance/ibot and microsoft/unilm, and torchvision's own table."""
CATALOGUE = {**OF_MAE, **{row.name: row for row in OTHERS}}
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
    if row.by_hand:
        raise UserError(f"{name} has no address for programs; get the file by hand from {row.url}")
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
    """Raise ``UserError`` unless the hash of ``path`` begins as published; rows without a published hash pass."""
    if row.hashed is None:
        return
    kind, wanted = row.hashed
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if not digest.hexdigest().startswith(wanted):
        raise UserError(
            f"{path} is not the published {row.name}: its {kind} begins {digest.hexdigest()[: len(wanted)]}, not "
            f"{wanted}; delete it and get it again"
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
