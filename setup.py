"""Installs `mae_core`, `transfer` and the `mae` command. Lower bounds are here, the tested set in constraints.txt."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


def read_version() -> str:
    """Return `__version__` of mae_core as written in its source: importing it would need torch at build time."""
    source = (HERE / "mae_core" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('mae_core/__init__.py holds no line of the form __version__ = "x.y.z"')
    return match.group(1)


def read_description() -> str:
    """Return the README's text, or an empty text where a source archive lacks it."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


class WithRecipes(build_py):
    """Puts ``configs/`` into the package, where ``mae_core.config.recipes`` finds it when there is no clone."""

    def run(self) -> None:
        """Build, then copy; an editable install uses the clone's own."""
        super().run()
        if not self.editable_mode:
            without = shutil.ignore_patterns("__pycache__")
            shutil.copytree(
                HERE / "configs", Path(self.build_lib, "mae_core/configs"), ignore=without, dirs_exist_ok=True
            )


CORE = [
    "torch>=2.8",
    "torchvision>=0.23",
    "timm>=1.0.20",
    "pydantic>=2.7",
    "omegaconf>=2.3",
    "typer>=0.12",
    "rich>=13.0",
    "safetensors>=0.4.5",
    "tensorboard>=2.15",
    "numpy>=1.26",
    "Pillow>=10.1",
    "matplotlib>=3.8",
    "tifffile>=2024.1.30",
    "PyYAML>=6.0",
    "jinja2>=3.1",
]
DETECTION = ["pycocotools>=2.0.8"]
# mmseg does not depend on mmcv and mmengine, so all three are named; what else it imports it pulls in itself.
SEGMENTATION = ["onedl-mmcv>=2.3.6", "onedl-mmengine>=0.10.12", "onedl-mmsegmentation>=1.4.2"]
# Tar shards and Hugging Face data sets; folders and file lists need neither.
DATA = ["webdataset>=1.0", "datasets>=3.0"]
# Tar shards at an address: data.path=https://... or s3://...
REMOTE = ["fsspec[http]>=2024.2", "s3fs>=2024.2"]
# JPEG straight from libjpeg-turbo: a third less time than Pillow for the same pixels.
FAST = ["simplejpeg>=1.7"]
# TIFF and JPEG 2000 that neither Pillow nor tifffile decodes alone: LZW of 16-bit colours, 12 bits, predictors.
TIFF = ["imagecodecs>=2024.1.1"]
# Adapters of low rank for pre-training that starts from weights: adapt.mode=lora.
LORA = ["peft>=0.15"]
# Services that show runs: log.to=[tensorboard,wandb,mlflow].
WANDB = ["wandb>=0.16"]
MLFLOW = ["mlflow>=2.10"]
DEMO = ["scikit-learn>=1.4", *DETECTION, *SEGMENTATION]
ONNX = ["onnx>=1.16", "onnxscript>=0.3", "onnxruntime>=1.18"]
# Of Python 3.11 on: what Sphinx needs for 3.10 does not go with rich's markdown-it-py.
DOCS = [f'{name} ; python_version >= "3.11"' for name in ("sphinx>=8.1", "myst-parser>=5.0", "furo>=2024.8")]
DEV = [
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "websocket-client>=1.7",
    "fsspec[http]>=2024.2",
    "transformers>=5.0",
    "fvcore>=0.1.5.post20221221",
    "ruff>=0.14",
    "mypy>=1.11",
    "pre-commit>=3.7",
]

setup(
    name="mae-transfer",
    version=read_version(),
    description="Pre-train a ViT with a masked autoencoder, then turn it into a classifier, a detector and a segmenter",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=[
        "masked autoencoder",
        "MAE",
        "vision transformer",
        "self-supervised learning",
        "detection",
        "segmentation",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    license_files=["LICENSE"],
    packages=find_packages(include=["mae_core", "mae_core.*", "transfer", "transfer.*"]),
    package_data={
        "mae_core": ["**/*.yaml", "training/*.html"],
        "transfer": ["**/*.yaml", "report/*.html", "report/*.md"],
    },
    cmdclass={"build_py": WithRecipes},
    python_requires=">=3.10",
    install_requires=CORE,
    extras_require={
        "detection": DETECTION,
        "segmentation": SEGMENTATION,
        "data": DATA,
        "remote": [*DATA, *REMOTE],
        "fast": FAST,
        "tiff": TIFF,
        "lora": LORA,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "demo": DEMO,
        "onnx": ONNX,
        "docs": DOCS,
        "dev": DEV,
        "all": [*DEMO, *DATA, *FAST, *TIFF, *LORA, *ONNX, *DOCS, *DEV],
    },
    entry_points={
        "console_scripts": ["mae = mae_core.cli.main:main"],
        "mae_core.checks": [
            "coco = transfer.detection.check_data:main",
            "labels = transfer.segmentation.check_data:main",
        ],
        "mae_core.feature_readers": ["mmseg = transfer.segmentation.engine_mmseg.published:run_backbone"],
    },
)
