"""Configurations of the commands that measure an encoder or a classifier: linear probe, k-NN, features, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from mae_core.config.schema import Beta, Count, CropScale, Fraction, Schema, row_of
from mae_core.config.sections import Branch, JobConfig, RunConfig, ScheduleConfig, Trunk
from mae_core.data.config import EvaluationData, LabelledData
from mae_core.measures.knn import NEIGHBOURS, TEMPERATURE
from mae_core.measures.robustness import KINDS
from mae_core.models.sizes import Pooling


def _as_several(given: Any) -> Any:
    """A number alone is a list of one."""
    return (given,) if isinstance(given, int | float) and not isinstance(given, bool) else given


Positive = Annotated[float, Field(gt=0)]
Rates = Annotated[tuple[Positive, ...], BeforeValidator(_as_several)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_as_several)]
Encoder = Annotated[Path | None, Field(description="an encoder.safetensors, a run that has one, or an official file")]


class FrozenModel(Schema):
    """The frozen trunk; its size is that of the weights file."""

    trunk: Trunk = None
    pooling: Pooling = Field(
        "cls",
        description="cls: the normalised cls token; mean: of the patch tokens, normalised; map: attention pooling of a "
        "trunk of timm; such a trunk's own where none is set",
    )
    heads: Count | None = Field(None, description="attention heads, if the weights file does not state them")


class ClassifierModel(Schema):
    """The classifier, which is the weights file's."""

    trunk: Trunk = None
    heads: Count | None = Field(None, description="attention heads, if the weights file does not state them")


class ProbeData(LabelledData):
    """``path/train/<class>/*`` and ``path/val/<class>/*``. Augmentation: a crop of a single draw, and a flip (paper,
    Table 10)."""

    crop_scale: CropScale = Field((0.08, 1.0), description="area of the random crop")
    hflip: Fraction = Field(0.5, description="probability of a horizontal flip")


class ProbeConfig(Schema):
    """What learns on the frozen trunk."""

    kind: Literal["linear", "attentive"] = Field(
        "linear",
        description="linear: on one feature, as in the paper; attentive: learned queries pool the patch tokens",
    )
    queries: Count = Field(
        8, description="number of queries of kind attentive; each pools its own share of the channels"
    )
    batch_norm: bool = Field(True, description="standardise by the batch before the linear layer (paper, A.1)")


class ProbeOptim(ScheduleConfig):
    """LARS (paper, Table 10), or SGD with momentum."""

    kind: Literal["lars", "sgd"] = Field("lars", description="the optimiser")
    epochs: Positive = 90
    warmup_epochs: Annotated[float, Field(ge=0)] = 10
    batch_size: Count = 16384
    base_lr: Positive = 0.1
    sweep: Rates = Field((), description="further base learning rates, tried in the same pass")
    momentum: Beta = Field(0.9, description="of the optimiser")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of the linear layer")
    trust_coefficient: Positive = Field(0.001, description="of the layer-wise rates of LARS")


class LinprobeConfig(RunConfig):
    """``mae linprobe``."""

    recipes: ClassVar[str] = "linprobe"
    output: Path = Path("runs/linprobe")
    weights: Encoder = None
    branch: Branch = None
    cache: Path | None = Field(
        None, description="folder for cached features: computed once, without augmentation, then reused"
    )
    probe: ProbeConfig = ProbeConfig()
    model: FrozenModel = FrozenModel()
    data: ProbeData = ProbeData()
    optim: ProbeOptim = ProbeOptim()
    evaluate_every: Positive = Field(10, description="epochs between evaluations; also at the end")
    evaluation_batch: Count = Field(64, description="images at once when measuring")

    @model_validator(mode="after")
    def _pools_one_way(self) -> LinprobeConfig:
        if self.probe.kind == "attentive" and self.model.pooling == "mean":
            raise ValueError("probe.kind=attentive pools the patch tokens itself; leave model.pooling out")
        if self.probe.kind == "linear" and self.probe.queries != ProbeConfig().queries:
            raise ValueError(
                "probe.queries applies only to probe.kind=attentive; set that too, or leave probe.queries out"
            )
        return self


class KnnConfig(JobConfig):
    """``mae knn``."""

    output: Path = Path("runs/knn")
    weights: Encoder = None
    branch: Branch = None
    k: Counts = Field(NEIGHBOURS, min_length=1, description="numbers of neighbours k; each is evaluated")
    temperature: Positive = Field(
        TEMPERATURE, description="a neighbour with cosine similarity s has weight exp(s / temperature)"
    )
    cache: Path | None = Field(None, description="folder for cached features, which later runs reuse")
    model: FrozenModel = FrozenModel()
    data: LabelledData = LabelledData()
    evaluation_batch: Count = Field(64, description="images at once when measuring")


class FeaturesConfig(JobConfig):
    """``mae features``."""

    output: Path = Path("runs/features")
    weights: Encoder = None
    branch: Branch = None
    picture: Literal["pca", "tsne", "none"] = Field(
        "pca", description="how the embeddings are projected to two dimensions"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of t-SNE")
    cache: Path | None = Field(None, description="folder for cached features, which later runs reuse")
    model: FrozenModel = FrozenModel()
    data: EvaluationData = EvaluationData()
    evaluation_batch: Count = Field(64, description="images at once when measuring")


class EvaluateConfig(JobConfig):
    """``mae evaluate``."""

    recipes: ClassVar[str] = "evaluate"
    output: Path = Path("runs/evaluate")
    weights: Path | None = Field(None, description="a classifier.safetensors, a run, or an official fine-tuned file")
    branch: Branch = None
    kind: Annotated[str, row_of(KINDS)] = Field("folder", description="a row of mae_core.measures.robustness.KINDS")
    model: ClassifierModel = ClassifierModel()
    save_logits: bool = Field(False, description="write logits.npz too: all scores of every image")
    data: EvaluationData = EvaluationData()
    evaluation_batch: Count = Field(64, description="images at once when measuring")
