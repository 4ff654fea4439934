"""Options, choices and reports that the scripts share."""

from __future__ import annotations

import io
import logging
import sys
from argparse import Namespace

import pytest
import torch

from ldm import cli, devices, util
from ldm.cli import options
from ldm.inference import SamplingOptions
from ldm.models.diffusion.guidance import TERMS
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.models.diffusion.schedules import SCHEDULES


def parser() -> cli.ArgumentParser:
    return cli.sampling_parser("test", scale=5.0, outdir="out", n_iter=1, n_samples=2)


def parse(*argv: str) -> Namespace:
    return cli.parse(parser(), argv)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--ddim_steps", "7"], {"ddim_steps": 7}),
        (["--steps", "1000"], {"ddim_steps": 1000}),
        (["--ddim-steps=1"], {"ddim_steps": 1}),
        (["--from-file", "a-b_c"], {"from_file": "a-b_c"}),
        (["--from_file=a-b_c"], {"from_file": "a-b_c"}),
        (["--negative-prompt", "--bad_start"], None),
        (["--negative-prompt=-bad_start"], {"negative_prompt": "-bad_start"}),
        (["--prompt", "two-part_words"], {"prompt": "two-part_words"}),
        (["--skip-grid", "--no-metadata"], {"skip_grid": True, "no_metadata": True}),
        (["--n_sam", "4"], None),  # no abbreviations
        (["--height", "64", "--width", "128", "--cfg", "3"], {"H": 64, "W": 128, "scale": 3.0}),
        (["--bf16"], {"precision": "bf16"}),
        (
            [],
            {
                "precision": "autocast",
                "device": "auto",
                "sampler": None,
                "scale": None,
                "seed": 42,
                "n_rows": 0,
                "H": None,
            },
        ),
        (["--seed", "4294967295", "--scale", "-1.5"], {"seed": 2**32 - 1, "scale": -1.5}),
    ],
)
def test_spellings(argv, expected):
    if expected is None:
        with pytest.raises(SystemExit):
            parse(*argv)
    else:
        options = vars(parse(*argv))
        assert options | expected == options


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n_samples", "0"], "must be an integer of at least 1, not '0'"),
        (["--n_iter", "x"], "must be an integer of at least 1, not 'x'"),
        (["--steps", "1001"], "must be an integer from 1 to 1000, not '1001'"),
        (["--ddim_steps", "0"], "must be an integer from 1 to 1000, not '0'"),
        (["--seed", "4294967296"], "must be an integer from 0 to 4294967295"),
        (["--scale", "inf"], "must be a finite number, not 'inf'"),
        (["--scale", "nan"], "must be a finite number, not 'nan'"),
        (["--scale_schedule", "9,x"], "'9,x' is not a list of numbers such as 9,3"),
        (["--guidance", "rescale"], "'rescale' is not like rescale=0.7"),
        (["--guidance_interval", "-1", "5"], "must be a finite number of at least 0, not '-1'"),
        (["--ddim_eta", "-0.1"], "must be a finite number of at least 0, not '-0.1'"),
        (["--H", "-64"], "must be an integer of at least 1"),
        (["--n_rows", "-1"], "must be an integer of at least 0"),
        (["--precision", "fp8"], "invalid choice"),
        (["--prompt"], "expected one argument"),
        (["--prompt", "a", "cat"], "unrecognized arguments: cat"),
        (["--num_inference_steps", "20"], "did you mean --steps for --num_inference_steps?"),
        (["--guidance-scale=3"], "did you mean --scale for --guidance-scale=3?"),
        (["--n_sampels", "4"], "did you mean --n_samples for --n_sampels?"),
    ],
)
def test_bad_values_are_refused_in_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_random_seed(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "ldm")
    seed = parse("--seed", "-1").seed
    assert 0 <= seed < 2**32 and f"Seed: {seed}" in caplog.text
    with pytest.raises(ValueError, match="--resume needs the seed of the run"):
        parse("--seed", "-1", "--resume")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="several processes need the same seed"):
        parse("--seed", "-1")


def test_sampler_precedence(caplog):
    assert parse("--plms", "--ddim_eta", "0").sampler == "plms"
    assert parse("--plms", "--dpm_solver").sampler == "dpm_solver"
    assert "using DPM-Solver" in caplog.text
    assert parse("--ddim", "--dpm_solver").sampler == "dpm_solver"
    assert parse("--ddim").sampler == "ddim"
    with pytest.raises(ValueError, match="--plms needs --ddim_eta 0"):
        parse("--plms", "--ddim_eta", "0.2")
    with pytest.raises(ValueError, match="--plms and --ddim are both given"):
        parse("--plms", "--ddim")
    assert parse("--dpm_solver", "--ddim_eta", "0.5").ddim_eta == 0 and "--ddim_eta 0.5 has no effect" in caplog.text


def test_names_in_the_help_are_those_of_the_registries():
    assert sorted(options.SAMPLERS) == sorted(SAMPLERS)
    assert sorted(options.TERMS) == sorted(TERMS)
    assert list(options.SCHEDULES) == list(SCHEDULES)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_by_name(name):
    assert parse("--sampler", name).sampler == name
    if not SAMPLERS[name].func.supports_eta:
        with pytest.raises(ValueError, match=f"--sampler {name} needs --ddim_eta 0, not 0.5"):
            parse("--sampler", name, "--ddim_eta", "0.5")
    elif name != "ddim":
        assert parse("--sampler", name, "--ddim_eta", "0.5").ddim_eta == 0.5


GUIDED = [
    ("", {}),
    ("--sampler plms --plms", {"sampler": "plms"}),
    ("--schedule karras", {"schedule": "karras"}),
    ("--schedule 999,500.5,1", {"schedule": [999.0, 500.5, 1.0]}),
    ("--scale_schedule 9,3", {"scale": [9.0, 3.0]}),
    ("--guidance pag=3 --guidance rescale=.7", {"terms": {"pag": 3.0, "rescale": 0.7}}),
    ("--guidance_interval 0.3 5", {"interval": [0.3, 5.0]}),
    ("--cfg_pp --sampler euler", {"sampler": "euler", "cfg_pp": True}),
]


@pytest.mark.parametrize(("argv", "expected"), GUIDED)
def test_sampling_options(argv, expected):
    assert cli.sampling_options(parse(*argv.split())) == SamplingOptions(seed=42, **expected)


AT_ODDS = [
    ("--sampler eular", "--sampler eular is not one of ddim, "),
    ("--schedule caras", "--schedule caras is not one of uniform, "),
    ("--guidance magic=1", "guidance 'magic' is not one of pag, "),
    ("--sampler euler --plms", "--sampler euler and --plms are both given"),
    ("--sampler ddim --dpm_solver", "--sampler ddim and --dpm_solver are both given"),
    ("--scale 3 --scale_schedule 9,3", "--scale and --scale_schedule are both given"),
    ("--guidance pag=1 --guidance pag=2", "--guidance names one term twice"),
    ("--guidance_interval 5 1", "a low and a high sigma"),
    ("--guidance rescale=0.7 --scale 1", "at scale 1 there is none: leave rescale out"),
    ("--cfg_pp --scale 7.5", "takes scales from 0 to 1"),
    ("--cfg_pp --sampler heun", "--cfg_pp is for the samplers ddim, .*, not for heun"),
    ("--cfg_pp --guidance rescale=0.7", "needs no rescaling"),
]


@pytest.mark.parametrize(("argv", "message"), AT_ODDS)
def test_sampling_that_has_no_meaning_is_refused_before_a_model_is_loaded(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv.split())


def test_metadata_of_sampling():
    argv = "--guidance pag=3 --guidance rescale=.7 --guidance_interval 0.3 5 --schedule karras --sampler euler"
    said = cli.sampling_options(parse(*argv.split())).metadata()
    assert {name: said[name] for name in ("guidance", "guidance_interval", "schedule", "sampler")} == {
        "guidance": "pag=3, rescale=0.7",
        "guidance_interval": [0.3, 5.0],
        "schedule": "karras",
        "sampler": "euler",
    }
    assert "eta" not in said and "cfg_pp" not in said
    assert cli.sampling_options(parse("--cfg_pp", "--sampler", "ddim")).metadata()["cfg_pp"] is True
    plain = {"steps": None, "sampler": "ddim", "eta": 0.0, "scale": None}
    assert cli.sampling_options(parse("--ddim")).metadata() == plain


# ------------------------------------------------------------------------------------------------------------- prompts


def test_prompt_is_repeated():
    assert cli.prompt_batches(parse("--prompt", "cat", "--n_samples", "3")) == [["cat"] * 3]
    assert cli.prompt_batches(parse("--prompt", "")) == [["", ""]]


def test_prompts_from_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat, sitting\r\n\r\nein Kätzchen 🐈\r\n\r\n \n".encode())
    assert cli.prompt_batches(parse("--from-file", str(file))) == [["a cat, sitting", ""], ["ein Kätzchen 🐈"]]
    batches = cli.prompt_batches(parse("--from-file", str(file), "--repeat", "2", "--n_samples", "5"))
    assert batches == [["a cat, sitting"] * 2 + [""] * 2 + ["ein Kätzchen 🐈"], ["ein Kätzchen 🐈"]]


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n\n", "holds no prompts"), (b"\xff\xfe\x00", "is not UTF-8 text")]
)
def test_files_without_prompts(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        cli.prompt_batches(parse("--from-file", str(tmp_path / "p.txt")))
    with pytest.raises(ValueError, match="is a folder"):
        cli.prompt_batches(parse("--from-file", str(tmp_path)))


def test_broken_terminal_encoding_is_found_before_sampling():
    with pytest.raises(ValueError, match="not valid text"):
        cli.prompt_batches(parse("--prompt", "caf\udce9"))


def test_public_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert util.public_path("setup.py") == util.REPOSITORY / "setup.py"
    assert util.public_path("no/such.file") is None
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/installed.yaml").touch()
    monkeypatch.setattr(util, "BESIDE", tmp_path / "beside")
    assert util.public_path("installed.yaml") == tmp_path / "beside/installed.yaml"
    (tmp_path / "setup.py").touch()
    assert util.public_path("setup.py").resolve() == tmp_path / "setup.py"


# ------------------------------------------------------------------------------------------------ device and precision


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")],
)
def test_auto_device(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert devices.choose_device("auto").type == expected
    assert devices.choose_device("cpu").type == "cpu"


def test_absent_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda' is not available .* use 'cpu' or 'auto'"):
        devices.choose_device("cuda")
    with pytest.raises(ValueError, match="'abacus' is not one of auto, cpu"):
        devices.choose_device("abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.choose_device("cuda:1") == torch.device("cuda", 1)


def test_precision(caplog, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert [devices.choose_precision(name, cuda) for name in devices.PRECISIONS] == list(devices.PRECISIONS)
    assert devices.choose_precision("autocast", cpu) == devices.choose_precision("full", cpu) == "full"
    assert not caplog.records
    assert devices.choose_precision("bf16", cpu) == "bf16" and "slower" in caplog.text
    with pytest.raises(ValueError, match="precision 'half' is not one of"):
        devices.choose_precision("half", cpu)


def test_what_a_device_cannot_do_gives_way(caplog, monkeypatch):
    assert devices.choose_precision("fp16", torch.device("cpu")) == "full"
    assert "fp16 does not work on a CPU: using full" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert devices.choose_precision("bf16", torch.device("cuda")) == "fp16"
    assert "this CUDA device has no bf16: using fp16" in caplog.text
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: major < 14)
    assert devices.choose_precision("bf16", torch.device("mps")) == "fp16"
    assert devices.choose_precision("fp16", torch.device("mps")) == "fp16"


# ----------------------------------------------------------------------------------------------------------- reporting


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("a bad\n  value"), 2, "error: a bad value"),
        (FileNotFoundError("there is no model x"), 2, "error: there is no model x"),
        (FileNotFoundError(2, "No such file or directory", "x.ckpt"), 2, "error: x.ckpt: No such file or directory"),
        (PermissionError(13, "Permission denied", "out"), 2, "error: out: Permission denied"),
        (ModuleNotFoundError("No module named 'torch'"), 2, "error: No module named 'torch': install the requirements"),
        (ImportError("target 'a.B': there is no module 'a'"), 2, "error: target 'a.B': there is no module 'a'"),
        (RuntimeError("the picture is not finite"), 1, "error: the picture is not finite"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "error: out of memory. Try --n_samples 1"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 1, "error: out of memory"),
        (MemoryError(), 1, "error: out of memory. Try --n_samples 1"),
        (KeyboardInterrupt(), 130, "interrupted; nothing written"),
        (cli.Interrupted("interrupted; 3 images"), 130, "interrupted; 3 images"),
    ],
)
def test_errors_become_one_line_and_a_code(capsys, error, code, message):
    assert cli.run(raising(error)) == code
    written = capsys.readouterr().err
    assert written.startswith(message) and written.count("\n") == 1


def test_bugs_keep_their_traceback():
    with pytest.raises(KeyError):
        cli.run(raising(KeyError("oops")))


def test_messages_of_the_library(capsys):
    def main(argv):
        logging.getLogger("ldm.inference").info("Loading model from %s", "x.ckpt")
        logging.getLogger("ldm.inference").warning("the prompt is cut")
        logging.getLogger("ldm.inference").debug("unseen")

    assert cli.run(main) == 0
    assert cli.run(main) == 0  # a second run does not print everything twice
    output = capsys.readouterr()
    assert output.out == "Loading model from x.ckpt\n" * 2
    assert output.err == "warning: the prompt is cut\n" * 2


def test_outdir_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file, not a folder"):
        cli.SampleWriter(Namespace(outdir=tmp_path / "file"))


def test_paths_expand_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse("--outdir=~/pictures", "--ckpt=~/m.ckpt")
    assert (args.outdir, args.ckpt) == (str(tmp_path / "pictures"), str(tmp_path / "m.ckpt"))
    with pytest.raises(SystemExit):
        parse("--ckpt", "")


def test_lost_output_does_not_stop_the_work():
    tried = []

    class Full:
        def write(self, text):
            tried.append(text)
            raise OSError(28, "No space left on device")

    cli.say("text", Full())
    cli.say("text", None)
    assert tried == ["text\n"]


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 480000000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "447 GiB",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total ..."), "3.5 GiB"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB). Tried to allocate 256.00 MB on"), "256 MB"),
        (MemoryError("Unable to allocate 64.0 MiB for an array with shape (1, 4096, 4096)"), "64 MiB"),
    ],
)
def test_memory_errors_say_how_much(capsys, error, amount):
    assert cli.run(raising(error)) == 1
    assert capsys.readouterr().err.startswith(
        f"error: out of memory (needs another {amount}). Try --n_samples 1, --tile 512, a smaller --H and --W"
    )


def test_lines_of_a_prompt_file(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa\r\nb\u2028c\x0cd\r\n".encode())
    assert cli.prompt_batches(parse("--from-file", str(tmp_path / "p.txt"))) == [["a", "b\u2028c\x0cd"]]


def test_messages_and_errors_have_lines_of_their_own_beside_a_progress_bar(monkeypatch):
    from tqdm import tqdm

    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)

    def main(argv):
        bar = tqdm(total=2, file=terminal)
        bar.update()
        logging.getLogger("ldm").warning("a picture is broken")
        raise ValueError("no more pictures")

    assert cli.run(main) == 2
    lines = [line.rstrip().rpartition("\r")[2] for line in terminal.getvalue().split("\n")]
    assert "warning: a picture is broken" in lines and "error: no more pictures" in lines
