"""Installs the `ldm` package, with the ranges it works with; requirements.txt pins what the tests ran with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = (Path(__file__).parent / "ldm" / "__init__.py").read_text(encoding="utf-8")
# all configs, and the bundled model; not the weights that a user has put beside configs
SHARED = sorted(
    {*Path("configs").rglob("*.yaml"), *Path("models").rglob("config.yaml"), *Path("models/ldm/shapes64").glob("*.*")}
)

setup(
    name="latent-diffusion",
    version=re.search(r'__version__ = "(.+?)"', INIT)[1],
    description="Latent diffusion and Stable Diffusion v1 and v2: the CompVis `ldm` system, reimplemented",
    long_description="See README.md in the repository.",
    license="MIT",
    packages=find_packages(include=["ldm", "ldm.*"]),
    package_data={"ldm.modules.encoders": ["data/*"]},
    # where ldm.util.public_path looks for them in an installation
    data_files=[
        (f"share/latent-diffusion/{folder.as_posix()}", [str(path) for path in SHARED if path.parent == folder])
        for folder in sorted({path.parent for path in SHARED})
    ],
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.10",  # older releases have known holes in weights_only loading
        "pytorch-lightning>=2.5",  # 2.4 goes on with accumulated gradients otherwise than it stopped
        "omegaconf>=2.3",
        "pyyaml>=6",
        "einops>=0.8",
        "tokenizers>=0.19",
        "ftfy>=6.1",
        "safetensors>=0.4.3",
        "numpy>=1.26",
        "pillow>=10.3",
        "tqdm>=4.66",
        "torchmetrics>=1.4",  # distances between folders of pictures
        "matplotlib>=3.8",  # the curves of a training
        "transformers>=4.40",  # CLIP's embeddings, for retrieval
    ],
    extras_require={
        "tensorboard": ["tensorboard>=2.14"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pytest-cov>=7.0",
            "hypothesis>=6.100",
            "diffusers>=0.30",
            "ruff>=0.6",
            "mypy>=2.0",
        ],
    },
)
