"""Every public config: present under its public name, with its values, and its model has the published state dict."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import setuptools
from omegaconf import OmegaConf
from torch import nn

from ldm.checkpoint import build_on_meta
from ldm.checkpoint.families import family_of
from ldm.util import MARKERS, get_obj_from_str
from tests.golden import REFERENCE

pytestmark = pytest.mark.family

ROOT = REFERENCE.parents[1]
PUBLIC = json.loads((REFERENCE / "public_configs.json").read_text())
SECTIONS = json.loads((REFERENCE / "public_data_sections.json").read_text())  # data: and lightning: of 28 of them
UNLISTED = {"configs/stable-diffusion/v2-midas-inference.yaml", *(name for name in PUBLIC if "unclip-l" in name)}


def list_name(config: str) -> str:
    """The name of the key list of a public config: "configs/stable-diffusion/v1-inference.yaml", ..."""
    return config.removesuffix(".yaml").removesuffix("/config").partition("/")[2].replace("/", ".")


def config_of(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(ROOT / name))


@cache
def model_of(name: str) -> nn.Module:
    return build_on_meta(config_of(name)["model"])


def targets(config: Any) -> Iterator[str]:
    """Every `target:` in a config."""
    children = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
    if isinstance(config, dict) and "target" in config:
        yield config["target"]
    for child in children:
        yield from targets(child)


def test_there_are_lists_for_all_but_two():
    assert len(PUBLIC) == 41 and len(UNLISTED) == 2 and SECTIONS.keys() < PUBLIC.keys()
    lists = {path.stem for path in (REFERENCE / "keys").glob("*.tsv")}
    assert lists == {list_name(name) for name in PUBLIC if name not in UNLISTED}


@pytest.mark.parametrize("name", PUBLIC)
def test_values_are_the_public_ones(name):
    config = config_of(name)
    own = config.pop("sampling", {})
    assert config == PUBLIC[name] | SECTIONS.get(name, {})
    assert own.keys() <= {"scale", "sampler", "steps", "size"}
    assert not own or "v1-" not in name  # Stable Diffusion v1 has the command line's defaults
    first = (ROOT / name).read_text().splitlines()[0]
    assert first.startswith("# ") and first.endswith(".")


CONFIGS = sorted(
    path.relative_to(ROOT).as_posix() for place in ("configs", "models") for path in (ROOT / place).rglob("*.yaml")
)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_target_resolves(name):
    found = set(targets(config_of(name)))
    assert found or name not in PUBLIC  # overlays of other configs may have none
    assert all(callable(get_obj_from_str(target)) for target in found - set(MARKERS))


@pytest.mark.parametrize("name", PUBLIC)
def test_model_is_built_without_memory(name):
    model = model_of(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    saved = model.state_dict()
    assert not [key for key, buffer in model.named_buffers() if buffer.is_meta and key not in saved]


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in UNLISTED])
def test_state_dict_is_the_published_one(name):
    rows = [
        f"{key}\t{'x'.join(map(str, value.shape)) or '-'}\t{str(value.dtype).removeprefix('torch.')}"
        for key, value in model_of(name).state_dict().items()
        if not key.startswith("loss.")
    ]
    published = (REFERENCE / "keys" / f"{list_name(name)}.tsv").read_text().splitlines()
    assert sorted(rows) == sorted(published)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_chooser_finds_the_config(name):
    shapes = {key: tuple(value.shape) for key, value in model_of(name).state_dict().items()}
    family = family_of(shapes)
    assert name in family.configs
    assert family.complete == ("first_stage_models" not in name and "autoencoder" not in name)


def test_an_installation_finds_every_config(monkeypatch):
    said = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **settings: said.update(settings))
    runpy.run_path("setup.py")
    places = {f"{folder}/{file.rpartition('/')[2]}" for folder, files in said["data_files"] for file in files}
    wanted = {*PUBLIC, "models/ldm/shapes64/config.yaml", "models/ldm/shapes64/model.ckpt"}
    assert {f"share/latent-diffusion/{name}" for name in wanted} <= places
