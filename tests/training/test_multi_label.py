"""Several labels an image: reading the lists, the measure against scikit-learn's, the loss, and a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mae_core.config.load import load_config
from mae_core.data.config import FinetuneData
from mae_core.data.labelled import LabelledBatch, read_label_lists
from mae_core.errors import UserError
from mae_core.measures.average_precision import average_precision
from mae_core.training.finetune import finetune, multi_label_loss
from mae_core.training.finetune_config import FinetuneConfig

average_precision_score = pytest.importorskip("sklearn.metrics", reason="the reference").average_precision_score


@pytest.fixture
def lists(tmp_path, write_images) -> Path:
    root = tmp_path / "data"
    write_images(root / "images", 6)
    labels = ["sky;sea", "sea", "", "sky", "tree;sea", "sky"]
    rows = [f"images/{number:03d}.png,{label}" for number, label in enumerate(labels)]
    (root / "train.csv").write_text("\n".join(["file,labels", *rows]))
    (root / "val.csv").write_text("\n".join(["file,labels", *rows[:5]]))
    return root


def test_lists_become_targets(lists):
    train, val = read_label_lists(lists)
    assert train.classes == val.classes == ["sea", "sky", "tree"]
    assert [train.target(index).tolist() for index in range(5)] == [
        [1, 1, 0],
        [1, 0, 0],
        [0, 0, 0],
        [0, 1, 0],
        [1, 0, 1],
    ]
    assert len(val.paths) == 5 and val.paths[0] == lists / "images" / "000.png"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
def test_lists_of_other_systems_are_read(lists, encoding):
    wanted = read_label_lists(lists)
    for split in ("train", "val"):
        text = (lists / f"{split}.csv").read_text().replace("images/", "Images\\").replace("\n", "\r\n")
        (lists / f"{split}.csv").write_bytes(text.encode(encoding))
    assert read_label_lists(lists) == wanted


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("train.csv", None, "train.csv does not exist; data.multi_label=true needs it"),
        ("train.csv", "name,label\na,b\n", "needs a header file,labels and a row for each image (its header is name"),
        ("val.csv", "file,labels\n", "(it has no rows)"),
        ("val.csv", "file,labels\nimages/000.png,fish\n", "val.csv has labels that train.csv does not have: fish"),
        ("val.csv", "file,labels\nimages/9.png,sea\n", "images/9.png, which does not exist"),
        ("train.csv", "file,labels\nimages/000.png,sea\n", "names 1 classes"),
        ("train.csv", b"\xff\xfe\x00", "is in UTF-16, not in UTF-8"),
    ],
)
def test_wrong_lists_are_refused(lists, file, content, message):
    if content is None:
        (lists / file).unlink()
    else:
        (lists / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_label_lists(lists)
    assert message in str(caught.value)


@pytest.mark.parametrize("decimals", [6, 1])
def test_average_precision_is_scikit_learns(decimals):
    """With one decimal many scores are equal."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 4, generator=generator).round(decimals=decimals)
    targets = (torch.rand(50, 4, generator=generator) < 0.3).float()
    targets[:, 3] = 0
    found = average_precision(scores, targets)
    for place in range(3):
        reference = average_precision_score(targets[:, place].numpy(), scores[:, place].numpy())
        assert float(found[place]) == pytest.approx(reference, abs=1e-9)
    assert found[3].isnan()


class _First(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, :, 0, 0]


def test_the_loss_smooths_towards_a_half_and_mixes_targets_with_their_images():
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    batch = LabelledBatch(logits[:, :, None, None], torch.tensor([[1.0, 0.0], [0.0, 0.0]]), [])
    plain = multi_label_loss(FinetuneData(multi_label=True, mixup=0, cutmix=0, label_smoothing=0.2))
    smooth = torch.tensor([[0.9, 0.1], [0.1, 0.1]])
    expected = nn.functional.binary_cross_entropy_with_logits(logits, smooth)
    torch.testing.assert_close(plain(_First(), batch)["loss"], expected)

    # Pixels that are their targets: however they are mixed, mixed pixels and mixed targets stay equal.
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    seen = {}

    class Spy(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            seen["pixels"] = pixels
            return torch.zeros(4, 2)

    def bce(_logits: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        seen["targets"] = mixed
        return torch.tensor(0.0)

    mixing = multi_label_loss(FinetuneData(multi_label=True, mixup=0.8, cutmix=0, label_smoothing=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "binary_cross_entropy_with_logits", bce)
        mixing(Spy(), LabelledBatch(targets[:, :, None, None].expand(4, 2, 8, 8).clone(), targets, []))
    torch.testing.assert_close(seen["pixels"][:, :, 0, 0], seen["targets"])
    assert not torch.equal(seen["targets"], targets)


def test_a_run_measures_mean_average_precision(lists, tmp_path):
    run = tmp_path / "run"
    options = ["from_scratch=true", "model.size=nano", "model.patch_size=8", "data.image_size=32", "data.workers=0"]
    options += ["data.multi_label=true", "optim.batch_size=2", "optim.epochs=1", "device=cpu", "evaluation_batch=2"]
    metrics = finetune(load_config(FinetuneConfig, None, [*options, f"data.path={lists}", f"output={run}"]))
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert metrics["images"] == 5 and 0 < metrics["mAP"] <= 100 and set(metrics["per_class"]) == {"sea", "sky", "tree"}
    assert set(metrics["without_ema"]) == {"mAP"}
