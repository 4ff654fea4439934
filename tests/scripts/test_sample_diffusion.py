"""scripts/sample_diffusion.py end to end, with toys of every kind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import tests.training.toys as toys_of_training
from ldm import cli, inference
from ldm.checkpoint import save_checkpoint
from ldm.cli import writing
from ldm.inference import Pipeline
from scripts.sample_diffusion import main, parser
from tests.tiny import write_tiny
from tests.unprompted import TOYS, toy, toy_config, write_toy

ROOT = Path(__file__).resolve().parent.parent.parent
QUICK = ("--device", "cpu", "-c", "2", "--batch_size", "2")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    for name in TOYS:
        write_toy(folder / name, name)
    return folder


def run(*argv: object, out: Path | None = None) -> int:
    logdir = () if out is None else ("-l", out)
    return cli.run(main, [str(arg) for arg in (*QUICK, *logdir, *argv)])


def only_run(logdir: Path) -> Path:
    (step,) = (logdir / "samples").iterdir()
    (folder,) = step.iterdir()
    return folder


def images(folder: Path) -> np.ndarray:
    """The pictures of a run, in the order of their numbers, which must be 0, 1, ..."""
    paths = sorted((folder / "img").iterdir())
    assert [path.name for path in paths] == [f"sample_{number:06}.png" for number in range(len(paths))]
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def array(folder: Path) -> np.ndarray:
    (path,) = (folder / "numpy").iterdir()
    with np.load(path) as file:
        found = file["arr_0"]
    assert path.name == "x".join(map(str, found.shape)) + "-samples.npz" and file.files == ["arr_0"]
    return found


def settings(path: Path) -> dict:
    return json.loads(Image.open(path).text["ldm"])


def test_what_a_run_leaves(toys, tmp_path, capsys):
    assert run("-r", toys / "nothing", "-n", 5, out=tmp_path) == 0
    folder = only_run(tmp_path)
    assert folder.parent.name == "00000007" and re.fullmatch(r"\d{4}(-\d\d){5}", folder.name)
    assert sorted(path.name for path in folder.iterdir()) == ["grid-0000.png", "img", "numpy", "sampling_config.yaml"]
    pictures = images(folder)
    assert pictures.shape == (5, 32, 32, 3)  # two batches of 2, and the remainder
    assert array(folder).dtype == np.uint8 and np.array_equal(array(folder), pictures)
    assert Image.open(folder / "grid-0000.png").size == (5 * 34 + 2, 36)
    config = yaml.safe_load((folder / "sampling_config.yaml").read_text())
    assert (config["n_samples"], config["eta"], config["custom_steps"], config["seed"]) == (5, 1.0, 2, 42)
    told = settings(folder / "img/sample_000003.png")
    assert told["sampler"] == "ddim" and told["eta"] == 1.0 and told["index"] == 3 and told["model"] == "nothing"
    assert str(folder) in capsys.readouterr().out


def test_a_seed_decides(toys, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("-r", toys / "nothing", "-n", 3, "--seed", seed, out=tmp_path / name) == 0
    a, b, c = (images(only_run(tmp_path / name)) for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    model = inference.load_model(ckpt=toys / "nothing/model.ckpt", device="cpu")
    inference.seed_everything(1)
    by_hand = [image for count in (2, 1) for image in inference.noise2img(model, count, steps=2, eta=1.0)]
    assert np.array_equal(a, np.stack(by_hand))


def test_flags_of_the_output(toys, tmp_path):
    assert run("-r", toys / "nothing", "-n", 1, "--skip_grid", "--skip_npz", "--no_metadata", out=tmp_path) == 0
    folder = only_run(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["img", "sampling_config.yaml"]
    assert Image.open(folder / "img/sample_000000.png").text == {}


@pytest.mark.parametrize(
    ("flags", "sampler"), [(["--plms"], "plms"), (["--dpm"], "dpm_solver"), (["--ddim", "-e", "0"], "ddim")]
)
def test_samplers(toys, tmp_path, flags, sampler):
    assert run("-r", toys / "nothing", "-n", 1, *flags, out=tmp_path) == 0
    assert settings(only_run(tmp_path) / "img/sample_000000.png")["sampler"] == sampler


def test_vanilla_sampling(tmp_path):
    write_toy(tmp_path / "toy", "nothing", timesteps=15)
    assert run("-r", tmp_path / "toy", "-n", 1, "-v") == 0
    folder = only_run(tmp_path / "toy")  # beside the model
    told = settings(folder / "img/sample_000000.png")
    assert told["sampler"] == "ancestral" and told["steps"] == 15 and "eta" not in told
    (by_hand,) = inference.noise2img(toy("nothing", timesteps=15), 1, sampler="ancestral", seed=42, progress=False)
    # a model that is loaded has other kernels than one by hand: a level may round the other way
    assert np.abs(images(folder)[0].astype(int) - np.asarray(by_hand, dtype=int)).max() <= 1


def test_classes(toys, tmp_path):
    assert run("-r", toys / "classes", "-n", 2, "--classes", "7,3-4", "--scale", 3, out=tmp_path) == 0
    folder = only_run(tmp_path)
    told = [settings(path) for path in sorted((folder / "img").iterdir())]
    assert [one["class"] for one in told] == [7, 7, 3, 3, 4, 4] and told[0]["scale"] == 3.0
    assert Image.open(folder / "grid-0000.png").size == (2 * 34 + 2, 3 * 34 + 2)  # a row a class
    model = inference.load_model(ckpt=toys / "classes/model.ckpt", device="cpu")
    options = {"scale": 3.0, "steps": 2, "eta": 1.0, "progress": False}
    inference.seed_everything(42)
    by_hand = [image for labels in ([7, 7], [3, 3]) for image in inference.class2img(model, labels, **options)]
    assert np.array_equal(images(folder)[:4], np.stack(by_hand))


def test_null_class(toys, tmp_path, capsys):
    guided = ("-r", toys / "classes_only", "-n", 1, "--classes", 1, "--scale", 2)
    assert run(*guided, out=tmp_path / "none") == 2
    assert "is known to mean no class" in capsys.readouterr().err
    assert list((tmp_path / "none").rglob("*.*")) == []  # a run that drew nothing leaves nothing
    assert run(*guided, "--null_class", 9, out=tmp_path / "given") == 0
    assert run("-r", toys / "labels", "-n", 1, "--classes", "0,4", out=tmp_path / "labels") == 0
    assert len(images(only_run(tmp_path / "labels"))) == 2


def test_layouts(toys, tmp_path):
    one, other = {"class": "cat", "box": [0.25, 0.5, 0.5, 0.5]}, {"class": 3, "box": [0, 0, 1, 1]}
    (tmp_path / "layouts.json").write_text(json.dumps([[one], [one, other]]))
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    flags = ("--layout", tmp_path / "layouts.json", "--categories", tmp_path / "names.txt")
    assert run("-r", toys / "layout", "-n", 2, *flags, out=tmp_path) == 0
    folder = only_run(tmp_path)
    told = [settings(path)["layout_number"] for path in sorted((folder / "img").iterdir())]
    assert told == [0, 0, 1, 1]
    model = inference.load_model(ckpt=toys / "layout/model.ckpt", device="cpu")
    first = [1, 42, 97, 100, 100, 100, 0, 99]
    options = {"steps": 2, "eta": 1.0, "seed": 42, "progress": False}
    by_hand = inference.layout2img(model, torch.tensor([first, first]), **options)
    assert np.array_equal(images(folder)[:2], np.stack(by_hand))


def test_segmentation(toys, tmp_path):
    Image.fromarray((np.arange(40 * 50).reshape(40, 50) // 400).astype(np.uint8)).save(tmp_path / "map.png")
    assert run("-r", toys / "segmentation", "-n", 3, "--segmentation", tmp_path / "map.png", out=tmp_path) == 0
    assert array(only_run(tmp_path)).shape == (3, 40, 48, 3)


def run_folder(folder: Path, toys: Path) -> Path:
    """A training's folder, resumed once, with other settings the second time."""
    for name in ("checkpoints", "configs"):
        (folder / name).mkdir(parents=True)
    shutil.copy(toys / "nothing/model.ckpt", folder / "checkpoints/last.ckpt")
    for time, own in (("2024-01-01T00-00-00", {"image_size": 4}), ("2024-01-02T00-00-00", {})):
        (folder / f"configs/{time}-project.yaml").write_text(json.dumps({"model": toy_config("nothing", **own)}))
        (folder / f"configs/{time}-lightning.yaml").write_text("lightning: {}")
    return folder


@pytest.mark.parametrize(
    "form", ["-r FOLDER", "-r FOLDER/model.ckpt", "--ckpt FOLDER/model.ckpt", "-r RUN", "-r RUN/checkpoints/last.ckpt"]
)
def test_what_resume_takes(toys, tmp_path, form):
    shutil.copytree(toys / "nothing", tmp_path / "folder", ignore=shutil.ignore_patterns("samples"))
    run_folder(tmp_path / "run", toys)
    home = tmp_path / ("run" if "RUN" in form else "folder")
    flag, path = form.replace("FOLDER", str(home)).replace("RUN", str(home)).split()
    assert run(flag, path, "-n", 1) == 0
    assert images(only_run(home)).shape == (1, 32, 32, 3)


def test_a_training_draws(tmp_path):
    """From its own folder alone: the first stage that it started from may be gone."""
    first_stage = tmp_path / "first_stage.ckpt"
    save_checkpoint(first_stage, toy("nothing").first_stage_model.state_dict())
    model = toy_config("nothing", first_stage_key="jpg", image_size=4, use_ema=True) | {"base_learning_rate": 1e-4}
    model["params"]["first_stage_config"]["params"]["ckpt_path"] = str(first_stage)
    code, trained = toys_of_training.start(tmp_path, toys_of_training.config(model), "--max_steps", 2)
    first_stage.unlink()
    assert code == 0 and run("-r", trained, "-n", 1) == 0
    assert only_run(trained).parent.name == "00000002" and images(only_run(trained)).shape == (1, 16, 16, 3)


def test_a_bare_state_dict_and_a_config_elsewhere(toys, tmp_path):
    torch.save(toy("nothing").state_dict(), tmp_path / "bare.ckpt")
    assert run("-r", tmp_path / "bare.ckpt", "--config", toys / "nothing/config.yaml", "-n", 1) == 0
    assert only_run(tmp_path).parent.name == "00000000"  # it says nothing of steps


def test_settings_are_laid_over_the_config(toys, tmp_path, capsys):
    assert run("-r", toys / "nothing", "-n", 1, "model.params.image_size=16", out=tmp_path) == 0
    assert images(only_run(tmp_path)).shape == (1, 64, 64, 3)
    for setting, message in (
        ("model.params.imagesize=16", "unexpected keyword argument 'imagesize'"),
        ("modle.params.x=1", "no section 'modle' to change, only model"),
        ("model.params.timesteps=abc", "the config describes no model (TypeError: '<' not supported between"),
        ("model.params=3", "the params of ldm.models.diffusion.ddpm.LatentDiffusion must be a mapping, not 3"),
    ):
        assert run("-r", toys / "nothing", "-n", 1, setting, out=tmp_path / "none") == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "name one model, with --resume PATH or --ckpt FILE"),
        ("-r {}/nothing --ckpt {}/nothing/model.ckpt", "name one model"),
        ("-r {}/no-such", "--resume .*no-such: no such checkpoint or folder"),
        ("-r {}", "is a folder without model.ckpt, and no run folder"),
        ("-r {}/nothing -v --plms", "--vanilla_sample and --plms are both given"),
        ("-r {}/nothing --plms -e 0.5", "--plms needs --ddim_eta 0"),
        ("-r {}/nothing --scale 3", "--scale 3 leads towards a class, and this model has none: leave --scale out"),
        ("-r {}/nothing --classes 1", "is conditioned on nothing but noise: leave --classes out"),
        ("-r {}/classes", "is conditioned on class labels: use --classes$"),
        ("-r {}/segmentation --classes 1", "a segmentation map: use --segmentation, not --classes"),
        ("-r {}/classes --classes 0-1001", "classes are 0 to 1000; there is no class 1001"),
        ("-r {}/layout --categories x.txt", "--categories has no effect without --layout"),
        ("-r {}/nothing --null_class 3", "--null_class has no effect without --classes"),
        ("-r {}/layout --layout {}/no.json", "No such file"),
    ],
)
def test_mistakes_are_one_sentence(toys, tmp_path, capsys, argv, message):
    assert run(*argv.replace("{}", str(toys)).split(), out=tmp_path) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.strip()) and error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--classes", "3-1"], "'3-1' is not a list of classes such as 1,5,10-12"),
        (["--classes", "cat"], "is not a list of classes"),
        (["--classes", "1", "--layout", "x.json"], "not allowed with argument --classes"),
        (["-n", "0"], "must be an integer of at least 1"),
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["file.ckpt"], "unrecognized arguments: file.ckpt"),
    ],
)
def test_options_that_are_refused(capsys, argv, message):
    with pytest.raises(SystemExit):
        run(*argv)
    assert message in capsys.readouterr().err


def test_models_of_text_are_named(tmp_path, capsys):
    assert run("-r", write_tiny(tmp_path), "-n", 1) == 2
    error = capsys.readouterr().err
    assert (
        "is conditioned on text, not on nothing but noise, class labels, a layout of boxes or a segmentation map"
        in error
    )
    assert "use scripts/txt2img.py" in error


def test_ctrl_c_keeps_what_is_there(toys, tmp_path, monkeypatch, capsys):
    real, calls = Pipeline.decode, []

    def interrupted(model, latents):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, latents)

    monkeypatch.setattr(Pipeline, "decode", interrupted)
    assert run("-r", toys / "nothing", "-n", 50000, out=tmp_path) == 130
    folder = only_run(tmp_path)
    assert f"interrupted; 4 images written to {folder / 'img'}" in capsys.readouterr().err
    assert array(folder).shape == (4, 32, 32, 3) and (folder / "grid-0000.png").exists()


def test_ctrl_c_while_the_array_is_written(toys, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", interrupted)
    assert run("-r", toys / "nothing", "-n", 1, out=tmp_path) == 130
    assert "interrupted; 1 images written" in capsys.readouterr().err
    assert list((only_run(tmp_path) / "numpy").iterdir()) == []


def test_runs_of_one_second_have_folders_of_their_own(toys, tmp_path, monkeypatch):
    class Frozen(writing.datetime):
        @classmethod
        def now(cls):
            return cls(2024, 5, 6, 7, 8, 9)

    monkeypatch.setattr(writing, "datetime", Frozen)
    for _ in range(2):
        assert run("-r", toys / "nothing", "-n", 1, out=tmp_path) == 0
    folders = sorted(path.name for path in (tmp_path / "samples/00000007").iterdir())
    assert folders == ["2024-05-06-07-08-09", "2024-05-06-07-08-09-2"]


def test_the_grid_has_an_end(tmp_path):
    args = cli.parse(parser(), ["--skip_npz"])
    with cli.RunWriter(args, tmp_path, None, {"sampler": "ddim", "eta": 1.0}) as writer:
        writer.write([Image.new("RGB", (4, 4))] * 130, [{}] * 130)
    assert Image.open(writer.folder / "grid-0000.png").size == (10 * 6 + 2, 10 * 6 + 2)


@pytest.mark.subprocess
def test_help_is_instant():
    code = "import sys; from scripts.sample_diffusion import parser; parser(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_ancestral_sampling_says_that_it_takes_all_steps(toys, tmp_path, caplog):
    assert run("-r", toys / "classes", "-n", 1, "-v", "-c", 20, out=tmp_path) == 2  # for want of --classes
    assert "--vanilla_sample takes all timesteps, so -c 20 has no effect" in caplog.text


def test_the_class_that_means_none_is_in_the_metadata(toys, tmp_path):
    assert run("-r", toys / "classes_only", "-n", 1, "--classes", 1, "--scale", 2, "--null_class", 9, out=tmp_path) == 0
    (path,) = (only_run(tmp_path) / "img").iterdir()
    assert json.loads(Image.open(path).text["ldm"])["null_class"] == 9
