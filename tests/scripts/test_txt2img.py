"""scripts/txt2img.py: flags to calls, images to files. Sampling itself is a stand-in (see conftest.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.inference import PromptOptions

ROOT = Path(__file__).resolve().parent.parent.parent


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def reds(folder: Path) -> list[int]:
    """The number of the image in each file of a folder: the stand-in counts them in the red channel."""
    return [Image.open(path).getpixel((0, 0))[0] for path in sorted(folder.iterdir())]


def test_defaults_are_those_of_the_public_script(script, inference, capsys):
    assert script() == 0
    assert [name for name, _ in inference.calls] == ["load_model", "txt2img", "txt2img"]
    assert inference.named("load_model") == [{"config": None, "ckpt": None, "device": "auto", "precision": "autocast"}]
    assert [noise.seed for noise in inference.noises] == [42, 42] and inference.noises[0] is inference.noises[1]
    first, second = inference.named("txt2img")
    assert (
        first
        == second
        == {
            "prompts": ["a painting of a virus monster playing guitar"] * 3,
            "negative_prompt": "",
            "height": 32,  # what the model draws by default
            "width": 32,
            "steps": 50,
            "sampler": "ddim",
            "eta": 0.0,
            "scale": 7.5,
            "start_code": None,
        }
    )
    outdir = Path("outputs/txt2img-samples")
    assert names(outdir) == ["grid-0000.png", "samples"]
    assert names(outdir / "samples") == [f"0000{i}.png" for i in range(6)]
    assert reds(outdir / "samples") == [0, 1, 2, 3, 4, 5]
    assert Image.open(outdir / "grid-0000.png").size == (3 * 34 + 2, 2 * 34 + 2)
    farewell = "Your samples are ready and waiting for you here: \noutputs/txt2img-samples \n \nEnjoy.\n"
    assert capsys.readouterr().out == farewell


def test_every_flag_arrives(script, inference):
    flags = "--prompt cat --negative_prompt dog --ddim_steps 7 --ddim_eta 0.5 --scale 3 --n_samples 2 --n_iter 1 --H 16"
    more = "--W 48 --C 4 --f 8 --seed 7 --config c.yaml --ckpt m.ckpt --device cpu --precision full --outdir here"
    assert script(*flags.split(), *more.split()) == 0
    assert inference.named("load_model") == [
        {"config": "c.yaml", "ckpt": "m.ckpt", "device": "cpu", "precision": "full"}
    ]
    assert [noise.seed for noise in inference.noises] == [7]
    assert inference.named("txt2img") == [
        {
            "prompts": ["cat", "cat"],
            "negative_prompt": "dog",
            "height": 16,
            "width": 48,
            "steps": 7,
            "sampler": "ddim",
            "eta": 0.5,
            "scale": 3.0,
            "start_code": None,
        }
    ]
    assert names(Path("here/samples")) == ["00000.png", "00001.png"]


@pytest.mark.parametrize(
    ("flags", "sampler"),
    [
        (["--plms"], "plms"),
        (["--dpm_solver"], "dpm_solver"),
        (["--dpm"], "dpm_solver"),
        (["--dpm-solver"], "dpm_solver"),
        (["--plms", "--dpm_solver"], "dpm_solver"),
        (["--plms", "--dpm_solver", "--ddim_eta", "1"], "dpm_solver"),
    ],
)
def test_sampler_flags(script, inference, flags, sampler):
    assert script(*flags) == 0
    assert {call["sampler"] for call in inference.named("txt2img")} == {sampler}


def test_ragged_file_of_prompts(script, inference):
    Path("prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(7)))
    assert script("--from-file", "prompts.txt", "--n_samples", 3, "--n_iter", 2, "--fixed_code") == 0
    calls = inference.named("txt2img")
    assert [len(call["prompts"]) for call in calls] == [3, 3, 1, 3, 3, 1]
    assert sum((call["prompts"] for call in calls[3:]), []) == [f"prompt {i}" for i in range(7)]
    outdir = Path("outputs/txt2img-samples")
    assert reds(outdir / "samples") == list(range(14))
    assert Image.open(outdir / "grid-0000.png").size == (3 * 34 + 2, 5 * 34 + 2)  # 14 pictures in rows of 3
    assert Image.open(outdir / "samples" / "00006.png").text["parameters"].startswith("prompt 6\n")


def test_lines_with_options_of_their_own(script, inference):
    lines = [
        {"prompt": "a", "seed": 5, "steps": 9},
        {"prompt": "b"},
        {"prompt": "c", "negative_prompt": "n", "scale": 1},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert script("--from-file", "p.jsonl", "--n_iter", 1, "--negative_prompt", "dog", "--fixed_code") == 0
    names = ("prompts", "negative_prompt", "steps", "scale", "seed")
    assert [{name: call[name] for name in names if name in call} for call in inference.named("txt2img")] == [
        {"prompts": ["a"], "negative_prompt": "dog", "steps": 9, "scale": 7.5, "seed": [5]},
        {"prompts": ["b"], "negative_prompt": "dog", "steps": 50, "scale": 7.5},
        {"prompts": ["c"], "negative_prompt": ["n"], "steps": 50, "scale": 1.0},
    ]
    assert [call["start_code"] is None for call in inference.named("txt2img")] == [True, False, False]
    texts = [Image.open(path).text for path in sorted(Path("outputs/txt2img-samples/samples").iterdir())]
    first, second, third = (json.loads(text["ldm"]) for text in texts)
    assert (first["seed"], first["steps"], first["negative_prompt"]) == (5, 9, "dog")
    assert "index" not in first and "batch_size" not in first  # of no effect on it
    assert (second["seed"], second["steps"], second["index"]) == (42, 50, 1)
    assert third["scale"] == 1.0 and "negative_prompt" not in third


def test_prompt_options_arrive_and_are_written(script, inference):
    flags = ["--prompt", "a {red|(red:1.2)} cat", "--n_iter", 1, "--matrix", "--emphasis", "--long_prompt"]
    assert script(*flags, "--clip_skip", 2) == 0
    (call,) = inference.named("txt2img")
    assert call["prompts"] == ["a red cat", "a (red:1.2) cat"]
    assert call["prompt_options"] == PromptOptions(emphasis=True, long_prompt=True, clip_skip=2)
    text = Image.open("outputs/txt2img-samples/samples/00001.png").text
    assert text["parameters"].startswith("a (red:1.2) cat\n") and "Clip skip: 2, " in text["parameters"]
    assert json.loads(text["ldm"])["emphasis"] is True


def test_fixed_code_is_sampled_once_and_cut_to_the_batch(script, inference):
    Path("p.txt").write_text("a\nb\nc\n")
    assert script("--from-file", "p.txt", "--n_samples", 2, "--fixed_code", "--H", 64) == 0
    codes = [call["start_code"] for call in inference.named("txt2img")]
    expected = torch.randn(2, 4, 8, 4, generator=torch.Generator().manual_seed(42))
    assert [len(code) for code in codes] == [2, 1, 2, 1]
    assert all(torch.equal(code, expected[: len(code)]) for code in codes)


def test_numbers_go_on_after_the_highest(script):
    samples = Path("out/samples")
    samples.mkdir(parents=True)
    (samples / "00041.png").write_text("kept")
    Path("out/grid-0007.png").touch()
    assert script("--outdir", "out", "--n_iter", 1, "--n_samples", 2) == 0
    assert names(samples) == ["00041.png", "00042.png", "00043.png"]
    assert names(Path("out")) == ["grid-0007.png", "grid-0008.png", "samples"]
    assert (samples / "00041.png").read_text() == "kept"


def test_what_is_written(script):
    assert script("--outdir", "a", "--skip_grid") == 0
    assert names(Path("a")) == ["samples"] and len(names(Path("a/samples"))) == 6
    assert script("--outdir", "b", "--skip_save", "--n_rows", 2) == 0
    assert names(Path("b/samples")) == []
    assert Image.open("b/grid-0000.png").size == (2 * 34 + 2, 3 * 34 + 2)


def test_metadata(script):
    flags = (
        "--prompt cat --negative_prompt dog --n_iter 1 --n_samples 2 --steps 9 --seed 3 --W 64 --ckpt dir/sd-v1-4.ckpt"
    )
    assert script(*flags.split()) == 0
    text = Image.open("outputs/txt2img-samples/samples/00001.png").text
    assert text["parameters"].startswith(
        "cat\nNegative prompt: dog\nSteps: 9, Sampler: DDIM, CFG scale: 7.5, Eta: 0, Seed: 3, Size: 64x32, "
        "Model: sd-v1-4, Batch size: 2, Image index: 1, Version: ldm "
    )
    settings = json.loads(text["ldm"])
    assert settings["scale"] == 7.5 and settings["index"] == 1 and "strength" not in settings
    assert script(*flags.split(), "--no_metadata", "--dpm") == 0
    assert Image.open("outputs/txt2img-samples/samples/00003.png").text == {}


def test_metadata_names_models_with_the_public_file_name_by_their_folder(script):
    assert script("--n_iter", 1, "--n_samples", 1, "--plms") == 0
    text = Image.open("outputs/txt2img-samples/samples/00000.png").text["parameters"]
    assert "Model: shapes64," in text and "Sampler: PLMS," in text and "Eta" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plms", "--ddim_eta", "0.1"], "--plms needs --ddim_eta 0, not 0.1"),
        (["--from-file", "none.txt"], "--from-file none.txt: no such file"),
        (["--prompt", "{a|b}" * 20, "--matrix"], "--matrix makes 1048576 prompts of"),
        (["--laion400m"], "--laion400m needs models/ldm/text2img-large/model.ckpt, which is not there"),
        (["--C", "8"], "--C 8 does not fit this model, which has 4"),
        (["--f", "4"], "--f 4 does not fit this model, which has 8"),
        (["--H", "100"], "height 100 does not fit: the nearest are 96 and 104"),
    ],
)
def test_mistakes_are_one_line(script, inference, capsys, flags, message):
    assert script(*flags) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {message}") and output.err.count("\n") == 1
    assert output.out == "" and inference.sampled == 0 and not Path("outputs").exists()


def test_laion400m_sets_the_public_paths(script, inference, monkeypatch):
    for name in ("configs/latent-diffusion/txt2img-1p4B-eval.yaml", "models/ldm/text2img-large/model.ckpt"):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
    assert script("--laion400m", "--outdir", "unused") == 0
    (call,) = inference.named("load_model")
    assert str(call["config"]) == "configs/latent-diffusion/txt2img-1p4B-eval.yaml"
    assert str(call["ckpt"]) == "models/ldm/text2img-large/model.ckpt"
    assert names(Path("outputs")) == ["txt2img-samples-laion400m"]


def test_interrupt_keeps_what_is_done(script, inference, capsys):
    inference.fail_at, inference.failure = 2, KeyboardInterrupt()
    assert script("--outdir", "out") == 130
    assert capsys.readouterr().err == "interrupted; 3 images written to out/samples\n"
    assert names(Path("out")) == ["grid-0000.png", "samples"] and len(names(Path("out/samples"))) == 3


def test_failure_keeps_what_is_done(script, inference, capsys):
    inference.fail_at, inference.failure = 2, RuntimeError("CUDA out of memory. Tried to allocate 3 GiB. GPU 0 ...")
    assert script("--outdir", "out") == 1
    stopped, error = capsys.readouterr().err.splitlines()
    assert stopped == "warning: stopped early; 3 images written to out/samples"
    assert error.startswith("error: out of memory (needs another 3 GiB). Try --n_samples 1, --tile 512")
    assert len(names(Path("out/samples"))) == 3


@pytest.mark.subprocess
@pytest.mark.parametrize("name", ["txt2img", "img2img", "evaluate"])
def test_help_imports_nothing_heavy_and_runs_anywhere(name, tmp_path):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'scripts' / f'{name}.py')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'omegaconf', 'transformers', 'pytorch_lightning'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    # -I: neither the current folder nor PYTHONPATH helps to find the package
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout


def test_a_failure_before_the_first_image_leaves_no_folders(script, inference):
    inference.fail_at, inference.failure = 1, FileNotFoundError("there is no vocabulary")
    Path("mine").mkdir()
    assert script("--outdir", "mine/new/out") == 2
    assert list(Path("mine").iterdir()) == []
    inference.fail_at = 2
    assert script("--outdir", "mine") == 2
    assert Path("mine").is_dir() and list(Path("mine").iterdir()) == []
