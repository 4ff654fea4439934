"""What a config may call, and what it may refer to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ldm import trust, util
from ldm.configs import read_yaml
from ldm.inference import read_config
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.training.toys import run, write

HERE = __name__


@pytest.fixture(autouse=True)
def _nothing_added(monkeypatch):
    monkeypatch.setattr(trust, "_added", set())


def answer(text: str) -> str:
    return text


class Answer:
    pass


REFUSED = [
    ("os.system", "the config names 'os.system', and only what is in ldm, torch.nn, .* add --trust-config os "),
    ("builtins.eval", "add --trust-config builtins "),
    ("subprocess.Popen", "add --trust-config subprocess "),
    ("torch.load", "add --trust-config torch "),
    ("torch.nnx.Thing", "add --trust-config torch.nnx "),
    ("ldmx.Thing", "add --trust-config ldmx "),
    ("pytorch_lightning.loggers.WandbLogger", "add --trust-config pytorch_lightning.loggers "),
    # what allowed modules import
    ("ldm.util.importlib", "it leads to a module"),
    ("ldm.util.Path", "which is pathlib.* and only imported there"),
    ("ldm.distributed.timedelta", "which is datetime.timedelta and only imported there"),
    ("torch.nn.modules.module.OrderedDict", "which is collections.OrderedDict and only"),
    ("torch.nn.modules.module.functools.partial", "there is no module"),
    ("torch.nn.functional.boolean_dispatch", "and only imported there|no class"),
    # functions of our own: they register, load, write
    ("ldm.util.trust", "is no class"),
    ("ldm.util.get_obj_from_str", "is no class"),
    ("ldm.util.instantiate_from_config", "is no class"),
    ("ldm.images.save_png", "is no class"),
    ("torch.nn.init.zeros_", "is no class"),
    ("ldm.util.ALIASES", "is no class: it leads to a dict"),
]


@pytest.mark.parametrize("target, message", REFUSED)
def test_targets_that_are_refused(target, message):
    with pytest.raises(ImportError, match=message) as caught:
        instantiate_from_config({"target": target, "params": {}})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_refused_modules_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="--trust-config trap "):
        get_obj_from_str("trap.Thing")


def test_a_target_deep_in_a_config_is_refused_too():
    config = {
        "target": "ldm.data.masks.MaskedImages",
        "params": {"dataset": {"target": "os.getcwd"}},
    }
    with pytest.raises(ImportError, match="'os.getcwd'"):
        instantiate_from_config(config)


def test_what_is_trusted():
    with pytest.raises(ImportError, match=f"--trust-config {HERE} "):
        get_obj_from_str(f"{HERE}.Answer")
    util.trust(HERE)
    assert get_obj_from_str(f"{HERE}.Answer") is Answer
    assert get_obj_from_str(f"{HERE}.answer") is answer  # a function, since its owner was asked
    with pytest.raises(ImportError, match="which is pathlib.* only imported there"):
        get_obj_from_str(f"{HERE}.Path")
    with pytest.raises(ImportError, match="leads to a module"):
        get_obj_from_str(f"{HERE}.yaml")


@pytest.mark.parametrize("prefix", ["", "a b", ".", "a..b", "1a", "--x", None])
def test_prefixes_that_name_nothing(prefix):
    with pytest.raises(ValueError, match="is not the name of a module"):
        util.trust(prefix)


def test_the_command_line_asks_and_is_told(tmp_path, capsys):
    base = write(tmp_path, {"model": {"target": "os.getcwd"}, "data": {"target": "torch.nn.Identity"}})
    assert run("--base", base, "-t", "-l", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the config names 'os.getcwd'" in error and "--trust-config os " in error
    with pytest.raises(SystemExit):
        run("--base", base, "--trust-config", "a b")
    assert "'a b' is not the name of a module or package" in capsys.readouterr().err


# ---- references, and YAML itself ----

REFERENCES = [
    ("${oc.env:HOME}", "'oc.env' for a value, which reaches beyond the config: .* --trust-config oc.env "),
    ("x ${ oc.env : HOME} y", "'oc.env'"),
    ("${oc.decode:'${oc.env:HOME}'}", "'oc.decode'"),
    ("${${kind}:HOME}", "computes what it refers to"),
    ("${oc.${kind}:HOME}", "computes what it refers to"),
]


@pytest.mark.parametrize("text, message", REFERENCES)
def test_references_beyond_the_config_are_refused(tmp_path, text, message):
    for read, content in ((read_config, {"model": {"deep": [{"a": text}]}}), (read_yaml, {text: 1})):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match=message):
            read(path)


def test_references_within_the_config_and_those_that_are_trusted(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("kind: b\nb: 2\nmodel: {x: '${b}', y: '${${kind}}/z'}\n")
    assert dict(read_config(path)["model"]) == {"x": 2, "y": "2/z"}
    util.trust("oc.env")
    monkeypatch.setenv("LDM_TEST_PLACE", "here")
    path.write_text("model: {x: '${oc.env:LDM_TEST_PLACE}'}\n")
    assert read_config(path)["model"]["x"] == "here"


HOSTILE = [
    "model: !!python/object/apply:os.system ['touch {trap}']",
    "model: !!python/object/new:pathlib.Path ['x']",
    "model: &a [*a]",
    "model: " + "[" * 20000 + "]" * 20000,
    "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)) + "model: 1",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_yaml_that_is_more_than_values_is_refused(tmp_path, text):
    path, trap = tmp_path / "config.yaml", tmp_path / "trap"
    path.write_text(text.replace("{trap}", str(trap)))
    for read in (read_config, read_yaml):
        with pytest.raises(ValueError, match="is not valid YAML|its aliases make it too long"):
            read(path)
    assert not trap.exists()


def test_nothing_is_trusted_by_importing(tmp_path):
    code = "import ldm.inference, ldm.training.run, ldm.trust; print(sorted(ldm.trust._added))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]", done.stderr
