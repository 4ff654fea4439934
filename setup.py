"""Installs configs and the bundled model beside the package; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

# every config, and the bundled model; not the weights that a user has put beside configs
SHARED = {
    *Path("configs").rglob("*.yaml"),
    *Path("models").rglob("config.yaml"),
    *Path("models/ldm/shapes64").glob("*.*"),
}

setup(
    data_files=[  # where ldm.util.public_path finds them
        (f"share/latent-diffusion/{folder.as_posix()}", sorted(str(path) for path in SHARED if path.parent == folder))
        for folder in sorted({path.parent for path in SHARED})
    ]
)
