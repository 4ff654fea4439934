"""What a config may call, and what it may refer to."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import yaml

from ldm import cli, trust, util
from ldm.checkpoint import build_on_meta
from ldm.configs import read_yaml
from ldm.inference import read_config
from ldm.trust import allowlist_only
from ldm.util import get_obj_from_str, instantiate_from_config
from scripts import txt2img
from tests.tiny import tiny_config
from tests.training.toys import run, write

HERE = __name__


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _nothing_added(monkeypatch):
    monkeypatch.setattr(trust, "_added", set())
    monkeypatch.delenv("LDM_TRUST", raising=False)


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
    ("torch.nn.functional.boolean_dispatch", "and only imported there|not a class"),
    # functions of our own: they register, load, write
    ("ldm.util.trust", "is not a class"),
    ("ldm.util.get_obj_from_str", "is not a class"),
    ("ldm.util.instantiate_from_config", "is not a class"),
    ("ldm.images.save_png", "is not a class"),
    ("torch.nn.init.zeros_", "is not a class"),
    ("ldm.util.ALIASES", "is not a class: it leads to a dict"),
]


@pytest.mark.parametrize("target, message", REFUSED)
def test_targets_that_are_refused(target, message):
    for mode in (contextlib.nullcontext, allowlist_only):  # a program's own call, and the configs of scripts
        with mode(), pytest.raises(ImportError, match=message) as caught:
            instantiate_from_config({"target": target, "params": {}})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 450


def test_refused_modules_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="--trust-config trap "):
        get_obj_from_str("trap.Thing")


def test_nested_target_is_refused():
    config = {
        "target": "ldm.data.masks.MaskedImages",
        "params": {"dataset": {"target": "os.getcwd"}},
    }
    with pytest.raises(ImportError, match="'os.getcwd'"):
        instantiate_from_config(config)


@pytest.mark.parametrize("how", ["trust", "environment"])
@allowlist_only()
def test_added_packages_are_trusted(how, monkeypatch):
    with pytest.raises(ImportError, match=f"--trust-config {HERE} "):
        get_obj_from_str(f"{HERE}.Answer")
    if how == "trust":
        util.trust(HERE)
    else:
        monkeypatch.setenv("LDM_TRUST", f"nothing, {HERE},")
    assert get_obj_from_str(f"{HERE}.Answer") is Answer
    assert get_obj_from_str(f"{HERE}.answer") is answer  # a function, since its owner was asked
    with pytest.raises(ImportError, match="which is pathlib.* only imported there"):
        get_obj_from_str(f"{HERE}.Path")
    with pytest.raises(ImportError, match="leads to a module"):
        get_obj_from_str(f"{HERE}.yaml")


@pytest.mark.parametrize("prefix", ["", "a b", ".", "a..b", "1a", "--x", None])
def test_prefixes_that_are_no_names(prefix, monkeypatch):
    with pytest.raises(ValueError, match="is not the name of a module"):
        util.trust(prefix)
    if prefix and not prefix.isspace():
        monkeypatch.setenv("LDM_TRUST", prefix)
        with pytest.raises(ValueError, match="LDM_TRUST: .* is not the name of a module"):
            instantiate_from_config({"target": "torch.nn.Identity"})


def test_train_script_refuses_a_target_and_a_malformed_trust_option(tmp_path, capsys):
    base = write(tmp_path, {"model": {"target": "os.getcwd"}, "data": {"target": "torch.nn.Identity"}})
    assert run("--base", base, "-t", "-l", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the config names 'os.getcwd'" in error and "--trust-config os " in error
    with pytest.raises(SystemExit):
        run("--base", base, "--trust-config", "a b")
    assert "'a b' is not the name of a module or package" in capsys.readouterr().err


# ---- a program's own classes ----

PROJECT = {
    "cldm/cldm.py": """
        import torch
        from subprocess import Popen
        from ldm.models.diffusion.ddpm import LatentDiffusion
        from ldm.modules.diffusionmodules.openaimodel import UNetModel
        from ldm.util import instantiate_from_config

        class ControlNet(torch.nn.Module):
            def __init__(self, width):
                super().__init__()
                self.zero_conv = torch.nn.Conv2d(width, width, 1)

        class ControlledUnetModel(UNetModel):
            pass

        class ControlLDM(LatentDiffusion):
            def __init__(self, control_stage_config, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.control_model = instantiate_from_config(control_stage_config)
        """,
    "cldm/model.py": """
        from omegaconf import OmegaConf
        from ldm.util import instantiate_from_config

        def create_model(config_path):
            return instantiate_from_config(OmegaConf.load(config_path).model).cpu()
        """,
    "tool.py": """
        import sys
        import ldm.inference, ldm.training.run, ldm.trust
        from cldm.model import create_model

        print("added by importing:", sorted(ldm.trust._added))
        model = create_model("models/cldm.yaml")
        print(type(model).__module__, type(model.control_model).__name__, type(model.model.diffusion_model).__name__)
        for read in (lambda: create_model("models/popen.yaml"), lambda: ldm.inference.load_model("models/cldm.yaml")):
            try:
                print(read())
            except ImportError as error:
                print(error)
        """,
}


def project(folder, files=PROJECT):
    """Write a project's files, without the `__init__.py` that ControlNet lacks too."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))


def controlled(**changes):
    config = tiny_config()
    params = config["params"] | {"control_stage_config": {"target": "cldm.cldm.ControlNet", "params": {"width": 4}}}
    params["unet_config"] = params["unet_config"] | {"target": "cldm.cldm.ControlledUnetModel"}
    return {"model": {"target": "cldm.cldm.ControlLDM", "params": params | changes}}


def python(*argv, cwd, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.subprocess
def test_own_classes_of_a_program(tmp_path):
    """ControlNet's `create_model("models/cldm.yaml")`, with classes at every depth of the config."""
    project(tmp_path)
    write(tmp_path / "models", controlled(), "cldm.yaml")
    write(tmp_path / "models", controlled(control_stage_config={"target": "cldm.cldm.Popen"}), "popen.yaml")
    done = python("tool.py", cwd=tmp_path)
    added, built, popen, loaded = done.stdout.splitlines()[-4:]
    assert added == "added by importing: []"
    assert built.split() == ["cldm.cldm", "ControlNet", "ControlledUnetModel"], done.stderr
    assert "which is subprocess.Popen and only imported there" in popen
    assert "the config names 'cldm.cldm.ControlLDM', and only" in loaded


EVIL = {"evil.py": "open('trap', 'w')\nclass Thing:\n    pass\n"}


@pytest.mark.subprocess
def test_a_script_refuses_classes_of_the_working_directory(tmp_path):
    project(tmp_path, EVIL)
    write(tmp_path, {"model": {"target": "evil.Thing"}}, "x.yaml")
    arguments = ["--config", "x.yaml", "--prompt", "x", "--outdir", "out"]
    done = python(ROOT / "scripts/txt2img.py", *arguments, cwd=tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 2 and not (tmp_path / "trap").exists()
    assert "the config names 'evil.Thing', and only what is in ldm" in done.stderr


@pytest.mark.parametrize("nested", [False, True])
def test_scripts_refuse_targets_unless_the_environment_trusts_them(tmp_path, monkeypatch, capsys, nested):
    project(tmp_path, EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    evil = {"target": "evil.Thing"}
    config = write(tmp_path, {"model": tiny_config(unet_config=evil) if nested else evil}, "x.yaml")
    arguments = ["--config", str(config), "--prompt", "x", "--outdir", "out", "--device", "cpu"]
    assert cli.run(txt2img.main, arguments) == 2 and not Path("trap").exists()
    assert "the config names 'evil.Thing', and only what is in ldm" in capsys.readouterr().err
    monkeypatch.setenv("LDM_TRUST", "other,evil")
    assert cli.run(txt2img.main, arguments) == 2 and Path("trap").exists()  # called, and of no use as a model


@pytest.fixture
def place_module(tmp_path, monkeypatch):
    """Return a function that puts a module `mine` with a class in a folder on the path."""

    def place(where, folder):
        project(tmp_path / folder, {"mine.py": "class Thing:\n    pass\n"})
        monkeypatch.syspath_prepend(tmp_path / folder)
        if where == "imported":
            importlib.import_module("mine")
        elif where == "working directory":
            monkeypatch.chdir(tmp_path)
        elif where == "main script":
            monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "tool.py"), raising=False)

    yield place
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("where", ["imported", "working directory", "main script", "elsewhere"])
@pytest.mark.parametrize("folder", [".", "lib", "venv/lib/python3.12/site-packages"])
def test_which_packages_are_the_programs_own(place_module, where, folder):
    place_module(where, folder)
    own = where != "elsewhere" and "site-packages" not in folder
    with contextlib.nullcontext() if own else pytest.raises(ImportError, match="the config names 'mine.Thing'"):
        assert get_obj_from_str("mine.Thing").__name__ == "Thing"
    with pytest.raises(ImportError, match="the config names 'mine.Thing'"), allowlist_only():
        get_obj_from_str("mine.Thing")


class Building:
    """Follows the mode of whoever builds it, and may end in an error."""

    def __init__(self, fail=False, strict=False):
        self.part = (build_on_meta if strict else instantiate_from_config)({"target": f"{HERE}.Answer"})
        if fail:
            raise RuntimeError("no")


def test_nested_calls_follow_the_outer_call():
    config = {"target": f"{HERE}.Building"}
    assert isinstance(instantiate_from_config(config).part, Answer)
    with pytest.raises(ImportError, match="only what is in ldm"):
        build_on_meta(config)
    with pytest.raises(ImportError, match=f"{HERE}.Answer"):  # a part that is read as scripts read it
        instantiate_from_config({**config, "params": {"strict": True}})
    with pytest.raises(RuntimeError), allowlist_only():
        util.trust(HERE)
        instantiate_from_config({**config, "params": {"fail": True}})
    trust._added.clear()
    assert isinstance(instantiate_from_config(config).part, Answer)  # nothing stays refused
    assert get_obj_from_str(f"{HERE}.Answer") is Answer
    with pytest.raises(ImportError, match="functions of trusted packages only"):
        get_obj_from_str(f"{HERE}.answer")


def test_threads_of_a_script_are_covered():
    errors = []

    def work():
        with contextlib.suppress(ImportError):
            errors.append(get_obj_from_str(f"{HERE}.Answer"))

    with allowlist_only():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert not errors


# ---- references, and YAML itself ----

REFERENCES = [
    ("${oc.env:HOME}", "'oc.env' for a value, which reaches beyond the config: .* --trust-config oc.env "),
    ("x ${ oc.env : HOME} y", "'oc.env'"),
    ("${oc.decode:'${oc.env:HOME}'}", "'oc.decode'"),
    ("${${kind}:HOME}", "computes the name of a reference"),
    ("${oc.${kind}:HOME}", "computes the name of a reference"),
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
    "model: " + "[" * 3000 + "]" * 3000,
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
