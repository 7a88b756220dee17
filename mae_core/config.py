"""Run configurations: strict schemas, YAML files and ``a.b=c`` overrides.

A key nobody knows is an error with a guess at what was meant; all errors of a configuration come at once, before any
work.
The defaults are the paper's (He et al. 2022, Tables 8 and 9; the released models' fine-tuning recipe).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mae_core.errors import UserError
from mae_core.masking import MASKERS, num_visible
from mae_core.models.sizes import SIZES
from mae_core.patches import PatchGrid
from mae_core.targets import TARGETS

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Size = Count | tuple[Count, Count]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _ascending(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("the smaller number comes first")
    return values


CropScale = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]


BASE = "base"
"""Key of a configuration file that names the file it builds on."""


class ConfigError(UserError):
    """A configuration that does not validate; lists every problem."""


class Schema(BaseModel):
    """Base of all configuration sections: frozen, unknown keys and infinite numbers refused, ``~`` is the home."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _name_of_digits(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads a folder that is called 2024 as a number."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if number and info.field_name and _is_path(cls, info.field_name) else value

    @field_validator("*", mode="after")
    @classmethod
    def _home(cls, value: Any) -> Any:
        try:
            if isinstance(value, tuple) and value and isinstance(value[0], Path):
                return tuple(path.expanduser() for path in value)
            return value.expanduser() if isinstance(value, Path) else value
        except RuntimeError:
            raise ValueError(f"there is no home folder for {value}") from None


def _is_path(schema: type[BaseModel], name: str) -> bool:
    annotation = schema.model_fields[name].annotation
    return Path in (annotation, *get_args(annotation))


def row_of(table: Mapping[str, Any]) -> AfterValidator:
    """Validates that a string names a row of ``table``; the error guesses which row was meant."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"unknown name {name!r}; {hint(name, list(table))}")
        return name

    return AfterValidator(check)


def hint(given: str, known: Collection[str]) -> str:
    """What may have been meant: the nearest of ``known``, or all of them."""
    near = difflib.get_close_matches(given, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'nothing'}"


class ModelConfig(Schema):
    """The encoder."""

    size: Annotated[str, row_of(SIZES)] = Field("base", description="a row of mae_core.models.sizes.SIZES")
    patch_size: Count | None = Field(None, description="pixels; the size's own (14 for huge, else 16) when empty")


class DecoderConfig(Schema):
    """The pre-training decoder (paper, Table 1a and 1b)."""

    width: Count = 512
    depth: Count = 8
    heads: Count = 16


class MaskingConfig(Schema):
    """What the encoder may not see (paper, Table 1f and Figure 5)."""

    kind: Annotated[str, row_of(MASKERS)] = Field("random", description="a row of mae_core.masking.MASKERS")
    ratio: float = Field(0.75, gt=0, lt=1)
    mask_tokens_in_encoder: bool = Field(
        False, description="the encoder runs on all patches, with mask tokens (paper, Table 1c: worse, and slower)"
    )


class TargetConfig(Schema):
    """What the decoder predicts (paper, Table 1d)."""

    kind: Annotated[str, row_of(TARGETS)] = Field("normalized_pixels", description="a row of mae_core.targets.TARGETS")
    pca: Path | None = Field(None, description="of kind pca: the file that `mae fit-pca` writes")
    tokenizer: Path | None = Field(
        None, description="of kind tokens: a run of `mae train-tokenizer`, its file, or DALL-E's published encoder.pkl"
    )
    tokenizer_image_size: Size | None = Field(
        None, description="size at which the tokenizer sees the images, such as 112 for DALL-E's at 224 with patch 16"
    )
    loss_on_all_patches: bool = Field(False, description="count visible patches too (paper, footnote 1: worse)")

    @model_validator(mode="after")
    def _file_is_named(self) -> TargetConfig:
        for kind, option, command in (("pca", "pca", "fit-pca"), ("tokens", "tokenizer", "train-tokenizer")):
            if self.kind == kind and getattr(self, option) is None:
                raise ValueError(f"target.kind={kind} needs target.{option}=FILE; `mae {command}` writes one")
        return self


class ImagesConfig(Schema):
    """How images are read, in every task."""

    path: Path | None = Field(None, description="the folder; see each command for the layout it expects")
    image_size: Size = 224
    channels: Annotated[int, Field(ge=1, le=16)] = Field(
        3, description="1 reads images as greyscale, 3 as RGB, any other number as stored (TIFF, .npy)"
    )
    mean: tuple[float, ...] | None = Field(None, description="per channel, of pixels in 0..1; ImageNet's when empty")
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    workers: Annotated[int, Field(ge=0)] = Field(2, description="processes that read images, per rank")
    on_error: Literal["skip", "raise"] = Field(
        "skip", description="an unreadable image is named, skipped and counted; or, read through first, refuses the run"
    )

    @model_validator(mode="after")
    def _one_statistic_per_channel(self) -> ImagesConfig:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        return self


Augmentation = Literal["none", "fixed_crop", "random_crop"]
"""Rows of mae_core.data.augmentation.AUGMENTATIONS, which needs torchvision."""


class PretrainData(ImagesConfig):
    """Unlabelled images, from a folder (nested as it likes), a list of files, tar shards or a Hugging Face data set,
    or several of them; and what is done to them (paper, Table 1e)."""

    path: Path | tuple[Path, ...] | None = Field(  # type: ignore[assignment]  # several, where no labels must agree
        None, description="a folder, a .txt list of files, .tar shards, a data set on disk; or [several, of, them]"
    )
    source: Literal["auto", "files", "list", "shards", "huggingface"] = Field(
        "auto", description="how to read path: a row of mae_core.data.sources.SOURCES; auto looks at what is there"
    )
    split: str | None = Field(None, description="of a Hugging Face data set; train, or the first, when empty")
    augmentation: Augmentation = Field(
        "random_crop", description="the crop: none is the centre, without flips; fixed_crop; random_crop (bicubic)"
    )
    crop_scale: CropScale = Field((0.2, 1.0), description="area of a random_crop")
    hflip: Fraction | None = Field(
        None, description="probability of a horizontal flip; when empty 0.5, or 0 with augmentation=none"
    )
    vflip: Fraction = Field(0.0, description="probability of a vertical flip: where images have no up and down")
    quarter_turns: bool = Field(False, description="turn by 0, 90, 180 or 270 degrees: where images have no up")
    color_jitter: Fraction = Field(
        0.0, description="strength of brightness, contrast and saturation jitter, hue by a quarter of it; hurts (1e)"
    )

    @property
    def flip_probability(self) -> float:
        """Of a horizontal flip."""
        if self.hflip is None:
            return 0.0 if self.augmentation == "none" else 0.5
        return self.hflip

    @model_validator(mode="after")
    def _jitter_has_colours(self) -> PretrainData:
        if self.color_jitter and self.channels not in (1, 3):
            raise ValueError(f"color_jitter is for 1 or 3 channels, not {self.channels}; set it to 0")
        if isinstance(self.path, tuple) and not self.path:
            raise ValueError("path is an empty list; name a folder")
        return self


class ScheduleConfig(Schema):
    """Linear warm-up, half-cosine decay. lr = base_lr * batch_size / 256."""

    epochs: Annotated[float, Field(gt=0)]
    warmup_epochs: Annotated[float, Field(ge=0)]
    batch_size: Count = Field(description="images per step, over all ranks and accumulation rounds")
    micro_batch: Count | None = Field(None, description="most images a device takes at once; the rest is accumulated")
    base_lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(
        None, description="largest gradient norm; none in the paper"
    )

    @property
    def lr(self) -> float:
        """Peak learning rate, by the linear scaling rule (paper, Table 8)."""
        return self.base_lr * self.batch_size / 256


class OptimConfig(ScheduleConfig):
    """AdamW."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Beta, Beta]


class PretrainOptim(OptimConfig):
    """Paper, Table 8."""

    epochs: Annotated[float, Field(gt=0)] = 800
    warmup_epochs: Annotated[float, Field(ge=0)] = 40
    batch_size: Count = 4096
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)


class LogConfig(Schema):
    """How often a run writes what; in steps."""

    every: Count = Field(20, description="a line in log.jsonl, TensorBoard and on the screen")
    pictures_every: Count = Field(1000, description="reconstruction strips, or drawn predictions")
    checkpoint_every: Count = 1000
    keep_checkpoints: Count = Field(2, description="older ones are deleted")


class JobConfig(Schema):
    """What every command has that computes and writes a folder."""

    output: Path = Field(description="the run directory; never overwritten")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 on a GPU that has it, else fp32")
    device: Literal["auto", "cpu", "cuda"] = "auto"


class RunConfig(JobConfig):
    """What every training has."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    log: LogConfig = LogConfig()


class TransferConfig(RunConfig):
    """A training that starts from an encoder, or, by request, from nothing."""

    weights: Path | None = Field(
        None, description="an encoder.safetensors, a run that has one, or an official MAE file"
    )
    from_scratch: bool = Field(False, description="random initialisation instead of weights")
    allow_missing: tuple[str, ...] = Field(
        (), description="patterns of encoder tensors that may be missing from the weights and start anew, as cls_token"
    )

    @model_validator(mode="after")
    def _weights_or_scratch(self) -> TransferConfig:
        if (self.weights is None) != self.from_scratch:
            raise ValueError("give either weights=FILE or from_scratch=true")
        return self


class WatchConfig(Schema):
    """What is measured while a pre-training runs, besides its loss: on images kept out of it, and by labels."""

    every_epochs: Annotated[float, Field(gt=0)] = Field(20, description="between measurements; also at the end")
    share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of data.path, kept out of training for the held-out loss (its masks never change)"
    )
    path: Path | None = Field(None, description="other images for the held-out loss, in place of a share")
    labelled: Path | None = Field(None, description="train/<class>/* and val/<class>/*, for k-NN top-1")
    neighbours: Count = 20
    most_images: Count = Field(5000, description="of each kind, spread over all")
    batch: Count = Field(64, description="images at once")

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> WatchConfig:
        if self.share and self.path is not None:
            raise ValueError("give either share or path, not both")
        return self


class PretrainConfig(RunConfig):
    """``mae pretrain``."""

    output: Path = Path("runs/pretrain")
    model: ModelConfig = ModelConfig()
    decoder: DecoderConfig = DecoderConfig()
    masking: MaskingConfig = MaskingConfig()
    target: TargetConfig = TargetConfig()
    data: PretrainData = PretrainData()
    optim: PretrainOptim = PretrainOptim()
    watch: WatchConfig = WatchConfig()

    @model_validator(mode="after")
    def _patches_fit(self) -> PretrainConfig:
        grid = PatchGrid.of(self.data.image_size, self.model.patch_size or SIZES[self.model.size].patch_size)
        num_visible(grid.num_patches, self.masking.ratio)
        return self


class TokenizerModel(Schema):
    """A small discrete VAE, one token a patch (our own recipe; the paper uses DALL-E's)."""

    vocabulary: Count = Field(8192, description="how many tokens there are; DALL-E's number")
    patch_size: Count = Field(16, description="side, in pixels, of what a token stands for: the autoencoder's patch")
    width: Count = Field(256, description="channels of its convolutions")
    depth: Annotated[int, Field(ge=0)] = Field(2, description="residual blocks, in the encoder and in the decoder")


class TokenizerOptim(OptimConfig):
    """AdamW and a temperature that falls to that of DALL-E's dVAE; the rest is our own."""

    epochs: Annotated[float, Field(gt=0)] = 100
    warmup_epochs: Annotated[float, Field(ge=0)] = 2
    batch_size: Count = 256
    micro_batch: Count | None = Field(
        32, description="most images a device takes at once: their logits alone are patches x vocabulary x 4 bytes each"
    )
    base_lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    temperature: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (1.0, 0.0625), description="of the relaxed choice of a token, at the start and at the end"
    )
    divergence_weight: Annotated[float, Field(ge=0)] = Field(
        0.05, description="weight of what sets the use of tokens in a batch apart from a uniform one, in nats"
    )


class TokenizerConfig(RunConfig):
    """``mae train-tokenizer``."""

    output: Path = Path("runs/tokenizer")
    model: TokenizerModel = TokenizerModel()
    data: PretrainData = PretrainData()
    optim: TokenizerOptim = TokenizerOptim()

    @model_validator(mode="after")
    def _patches_fit(self) -> TokenizerConfig:
        PatchGrid.of(self.data.image_size, self.model.patch_size)
        return self


def usual_test_crop(image_size: tuple[int, int]) -> float:
    """Centre crop as a share of the resized image: 0.875 (224 of 256) up to 224 pixels, all above (FINETUNE.md)."""
    return 0.875 if max(image_size) <= 224 else 1.0


class EvaluationData(ImagesConfig):
    """Images as they are measured: shorter side resized (bicubic), centre crop."""

    test_crop: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="centre crop as a share of the resized image; 0.875 up to 224 pixels and 1.0 above when empty"
    )


class LabelledData(EvaluationData):
    """``path/train/<class>/*`` and ``path/val/<class>/*`` (ImageFolder)."""


class FinetuneData(LabelledData):
    """Augmentation, through timm: the paper's Table 9, and the random erasing of the released recipe (FINETUNE.md of
    the official code)."""

    multi_label: bool = Field(
        False, description="any number of classes an image, from path/train.csv and path/val.csv: file,labels"
    )
    auto_augment: str | None = Field("rand-m9-mstd0.5-inc1", description="timm's auto-augment string; null for none")
    crop_scale: CropScale = (0.08, 1.0)
    hflip: Fraction = 0.5
    random_erasing: Fraction = 0.25
    mixup: Annotated[float, Field(ge=0)] = 0.8
    cutmix: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Fraction = 0.1


class FinetuneOptim(OptimConfig):
    """The released ViT-B's fine-tuning recipe (for normalised-pixel models)."""

    epochs: Annotated[float, Field(gt=0)] = 100
    warmup_epochs: Annotated[float, Field(ge=0)] = 5
    batch_size: Count = 1024
    base_lr: Annotated[float, Field(gt=0)] = 5e-4
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65


class ClassifierConfig(ModelConfig):
    """The classifier; the trunk's size comes from the weights file where one is given."""

    pooling: Literal["mean", "cls"] = "mean"
    drop_path: Fraction = 0.1


SCRATCH_RECIPE: dict[str, Any] = {
    "ema": 0.9999,
    "model": {"drop_path": 0.1},
    "data": {"random_erasing": 0.0},
    "optim": {
        "epochs": 300,
        "warmup_epochs": 20,
        "batch_size": 4096,
        "base_lr": 1e-4,
        "weight_decay": 0.3,
        "betas": (0.9, 0.95),
        "layer_decay": 1.0,
    },
}
"""Supervised training from scratch (paper, Table 11): what ``from_scratch=true`` means for options that are not set."""
LARGE_SCRATCH_RECIPE: dict[str, Any] = {"model": {"drop_path": 0.2}, "optim": {"epochs": 200}}
"""Where Table 11 differs for ViT-L and ViT-H."""


class FinetuneConfig(TransferConfig):
    """``mae finetune``."""

    output: Path = Path("runs/finetune")
    trainable_blocks: float | None = Field(
        None, description="tune the last so many blocks alone; 0.5 is the MLP of the last one; all when empty"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of an average of the weights, which is then what is evaluated and saved"
    )
    model: ClassifierConfig = ClassifierConfig()
    data: FinetuneData = FinetuneData()
    optim: FinetuneOptim = FinetuneOptim()
    evaluate_every: Annotated[float, Field(gt=0)] = Field(10, description="epochs between evaluations; also at the end")
    evaluation_batch: Count = 64

    @model_validator(mode="before")
    @classmethod
    def _scratch_recipe(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("from_scratch") is not True:
            return given
        model = given.get("model")
        size = model.get("size") if isinstance(model, Mapping) else None
        recipe = _filled(LARGE_SCRATCH_RECIPE, SCRATCH_RECIPE) if size in ("large", "huge") else SCRATCH_RECIPE
        return _filled(given, recipe)

    @field_validator("trainable_blocks")
    @classmethod
    def _whole_or_half(cls, value: float | None) -> float | None:
        if value is not None and value != 0.5 and (value < 1 or value % 1):
            raise ValueError(
                "tune a whole number of blocks from 1 on, or 0.5 for the MLP of the last one; mae linprobe tunes none"
            )
        return value

    @model_validator(mode="after")
    def _frozen_blocks_come_from_weights(self) -> FinetuneConfig:
        if self.from_scratch and self.trainable_blocks is not None:
            raise ValueError(
                "trainable_blocks keeps the other blocks as weights=FILE has them, and from_scratch=true would leave "
                "them random; give weights, or drop trainable_blocks"
            )
        return self


def _filled(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with ``defaults`` where it sets nothing, section by section."""
    filled = {**defaults, **given}
    for name in defaults.keys() & given.keys():
        if isinstance(defaults[name], Mapping) and isinstance(given[name], Mapping):
            filled[name] = _filled(given[name], defaults[name])
    return filled


Config = TypeVar("Config", bound=Schema)


def load_config(schema: type[Config], path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (or none: the defaults), apply ``a.b=c`` overrides, validate.

    A file may name another with ``base: other.yaml``, relative to itself, and then states what differs from it.

    Raises ``ConfigError`` with every unknown key (and a guess at the one meant) and every bad value, each with its
    origin.
    """
    layers = {} if path is None else _read_layers(Path(path))
    given: dict[str, Any] = {}
    typed = _read_overrides(overrides)
    _keep_names_as_typed(schema, typed, overrides)
    try:
        given = OmegaConf.to_container(OmegaConf.merge({}, *layers.values()))  # type: ignore[assignment]
        merged = OmegaConf.to_container(OmegaConf.merge(given, typed), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path or 'overrides'}: {error}") from None
    try:
        return schema.model_validate(merged)
    except ValidationError as error:
        problems = error.errors()
    in_file = _messages_of(schema, given) if path is not None else set()
    lines = [_explain(schema, problem, layers, typed, in_file) for problem in problems]
    raise ConfigError("; ".join(lines) if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems:", *lines]))


def dump_config(config: Schema) -> str:
    """The configuration as YAML that ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_differences(one: Schema, other: Schema) -> list[str]:
    """``key: value -> value`` for every leaf that differs."""
    left, right = _leaves(one.model_dump(mode="json")), _leaves(other.model_dump(mode="json"))
    return [
        f"{key}: {left.get(key)} -> {right.get(key)}" for key in {**left, **right} if left.get(key) != right.get(key)
    ]


def leaf_names(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all leaf options of a schema."""
    names: list[str] = []
    for name, field in schema.model_fields.items():
        section = _section(field.annotation)
        names += leaf_names(section, f"{prefix}{name}.") if section else [prefix + name]
    return names


def _section(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _read_layers(path: Path, named_by: tuple[Path, ...] = ()) -> dict[Path, dict[str, Any]]:
    """The content of a file by its path, after that of the base it names, and of the base's base.

    Raises ``ConfigError`` where files name each other in a circle.
    """
    if path.resolve() in [other.resolve() for other in named_by]:
        raise ConfigError(f"{path} is its own base, through {', '.join(map(str, named_by))}; name another")
    content = _read_yaml(path)
    base = content.pop(BASE, None)
    if base is None:
        return {path: content}
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base is the path of another configuration file, not {base!r}")
    below = path.parent / Path(base).expanduser()
    if not below.is_file():
        raise ConfigError(f"{path}: its base {below} does not exist; the path is relative to {path.parent}")
    return {**_read_layers(below, (*named_by, path)), path: content}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise ConfigError(
            f"config file {path} does not exist" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        if "=" not in override or override.startswith(("=", "-")):
            raise ConfigError(f"{override!r} is not an override; write key=value, such as optim.epochs=100")
    try:
        return dict(OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides))))  # type: ignore[arg-type]
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"overrides {' '.join(overrides)}: {' '.join(str(error).split())}") from None


def _keep_names_as_typed(schema: type[BaseModel], typed: dict[str, Any], overrides: Sequence[str]) -> None:
    """Paths that YAML took for numbers: ``output=007`` is a folder 007."""
    for override in overrides:
        key, _, text = override.partition("=")
        *way, name = key.split(".")
        section: type[BaseModel] | None = schema
        node: Any = typed
        for part in way:
            known = section is not None and part in section.model_fields
            section = _section(section.model_fields[part].annotation) if section is not None and known else None
            node = node.get(part) if isinstance(node, Mapping) else None
        if section is not None and name in section.model_fields and _is_path(section, name) and node is not None:
            if isinstance(node[name], int | float):
                node[name] = text


def _messages_of(schema: type[BaseModel], given: Mapping[str, Any]) -> set[tuple[Any, str]]:
    """(place, message) of every problem that a file has on its own."""
    try:
        schema.model_validate(OmegaConf.to_container(OmegaConf.create(dict(given)), resolve=True))
    except ValidationError as error:
        return {(problem["loc"], problem["msg"]) for problem in error.errors()}
    except OmegaConfBaseException:
        pass
    return set()


def _explain(
    schema: type[BaseModel],
    problem: Any,
    layers: Mapping[Path, Mapping[str, Any]],
    typed: Mapping[str, Any],
    in_file: set[tuple[Any, str]],
) -> str:
    """One problem of pydantic's as one sentence with its origin.

    A problem between options, which has no key of its own, comes from the command line where the file alone lacks it.
    """
    place = [str(part) for part in problem["loc"]]
    section: type[BaseModel] | None = schema
    depth = 0
    for part in place:
        if section is None or part not in section.model_fields:
            break
        section, depth = _section(section.model_fields[part].annotation), depth + 1
    key = ".".join(place[: max(depth, 1)]) if problem["type"] != "extra_forbidden" else ".".join(place)
    between = section is not None and problem["type"] == "value_error"
    if between:
        blamed = bool(typed) and (problem["loc"], problem["msg"]) not in in_file
    else:
        blamed = _holds(typed, key)
    holding = [str(path) for path, content in layers.items() if _holds(content, key)]
    where = "command line" if blamed else [*map(str, layers), *holding][-1] if layers else "defaults"
    if problem["type"] == "extra_forbidden":
        known = leaf_names(schema)
        siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
        guess = [n for n in known if n.rpartition(".")[2] == key.rpartition(".")[2]]
        near = difflib.get_close_matches(key.rpartition(".")[2], [s.rpartition(".")[2] for s in siblings], n=1)
        guess = guess or [s for s in siblings if near and s.rpartition(".")[2] == near[0]]
        if not guess and not ("." in key and siblings):
            guess = difflib.get_close_matches(key, known + list(schema.model_fields), n=1)
        told = f"did you mean {guess[0]!r}?" if guess else f"known here: {', '.join(siblings or schema.model_fields)}"
        return f"{where}: unknown key {key!r}; {told}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    value = problem["input"]
    got = f" (got {value!r})" if not isinstance(value, Mapping) and "ratio" not in message else ""
    return f"{where}: {key or schema.__name__}: {message}{got}" if key else f"{where}: {message}"


def _holds(tree: Mapping[str, Any], key: str) -> bool:
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True
