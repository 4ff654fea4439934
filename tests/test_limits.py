"""Configs that would fill the memory are refused before they do."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm import limits
from ldm.configs import read_yaml
from ldm.inference.loading import read_config
from ldm.limits import building, check_growth, check_yaml
from ldm.training.settings import merge

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(
    str(path.relative_to(ROOT)) for place in ("configs", "models") for path in (ROOT / place).rglob("*.yaml")
)


def laughs(levels: int, entry: str = "${{{0}}}${{{0}}}") -> dict[str, str]:
    """A value that is twice the one before, and so on."""
    return {"a0": "ha", **{f"a{level}": entry.format(f"a{level - 1}") for level in range(1, levels)}}


def lists(levels: int) -> dict[str, list[object]]:
    return {"a0": [0, 1], **{f"a{level}": [f"${{a{level - 1}}}"] * 2 for level in range(1, levels)}}


TOO_LONG = {
    "text": laughs(40),
    "text by way of sections": {"m": laughs(40, "${{m.{0}}}${{ m.{0} }}")},
    "text of siblings": {"m": laughs(40, "${{.{0}}}${{.{0}}}")},
    "lists": lists(40),
    "one long text, often": {"a": "x" * 50_000, "b": ["${a}${a}${a}"]},
    "sections": {"a0": {"x": 1}, **{f"a{n}": {"x": f"${{a{n - 1}}}", "y": f"${{a{n - 1}}}"} for n in range(1, 40)}},
    "in itself": {"a": "${b}", "b": ["${a}"]},
    "computed": {"n": "a", "a": "x" * 60_000, "b": "${${n}}${${n}}"},
    "by way of a reference": {
        "l0": {"x": [0] * 10},
        **{f"r{n}": f"${{l{n - 1}}}" for n in range(1, 8)},
        **{f"l{n}": {"x": [f"${{r{n}.x}}"] * 10} for n in range(1, 8)},
    },
    "by way of two, computed": {
        "l0": {"x": [0] * 10},
        **{f"n{n}": f"l{n - 1}" for n in range(1, 8)},
        **{f"r{n}": f"${{${{n{n}}}}}" for n in range(1, 8)},
        **{f"l{n}": {"x": [f"${{..q{n}.x}}"] * 10, f"q{n}": f"${{..r{n}}}"} for n in range(1, 8)},
    },
    "in a circle by way of a reference": {"a": "${b.x}", "b": "${a.x}"},
    "by way of what is not there": {"a": {"x": 1}, "b": "${none}", "c": "${b.x}"},
    "after a backslash": {"s": "\\", **laughs(40, "${{s}}${{{0}}}${{{0}}}")},
    "after two": laughs(40, r"\\${{{0}}}${{{0}}}"),
    "by odd numbers": {
        "a0": [0, 1],
        **{f"a{n}": [0, [f"${{a{n - 1}[{k}]}}" for k in ("+1", "0_1")]] for n in range(1, 40)},
    },
    "by odd names": {"$a\nb0": [0], **{f"$a\nb{n}": [f"${{$a\nb{n - 1}}}"] * 2 for n in range(1, 40)}},
    "by escaped names": {"${a0": [0], "e": r"\${", **{f"${{a{n}": [f"${{${{e}}a{n - 1}}}"] * 2 for n in range(1, 40)}},
    "a long row": {f"a{n}": f"${{a{n + 1}}}" for n in range(100_000)} | {"a100000": 1},
}


@pytest.mark.parametrize("key", TOO_LONG)
def test_references_that_grow(key):
    with pytest.raises(ValueError, match="config x is refused: .*(too long|itself|too deep|does not hold)"):
        check_growth(TOO_LONG[key], "x")


FINE = {
    "used often": {"a": 64, "b": ["${a}"] * 1000, "c": "${a}x${a}"},
    "relative": {"m": {"size": 3, "n": {"size": "${..size}", "list": [1, "${.0}"]}}},
    "brackets": {"m": [{"x": 1}], "y": "${m[0].x}", "z": "${m.0.x}"},
    "a section again": {"a": {"b": {"c": 1}, "d": "${a.b}"}},
    "nothing": {"a": "${none.of[7].these}", "b": None, "c": "${b.x}"},
    "of resolvers": {"a": "${oc.env:HOME}"},
    "by way of a reference": {"a": {"b": [1, "${..c}"], "c": 2}, "d": "${a}", "e": ["${d.b}", "${d.b[0]}"] * 9},
    "a part of itself by way of a reference": {"a": {"b": 1, "c": "${d.b}"}, "d": "${a}"},
    "of resolvers, by way of a reference": {"a": "${oc.env:HOME}", "b": "${a.x}", "c": "x ${none}", "d": "${c.x}"},
    "escaped": {"a": r"\${a}", "b": r"x\\\${b}"},
    "no reference": {"a": "$x {y} ${", "b": "${}"},
}


@pytest.mark.parametrize("key", FINE)
def test_references_that_stay_small(key):
    check_growth(FINE[key], "x")


@pytest.mark.parametrize("path", CONFIGS)
def test_public_configs_are_far_from_every_limit(path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_ENTRIES", limits.MAX_ENTRIES // 100)
    monkeypatch.setattr(limits, "MAX_TEXT", limits.MAX_TEXT // 10)
    check_yaml(ROOT / path)
    check_growth(OmegaConf.to_container(OmegaConf.load(ROOT / path)), path)


def aliases(levels: int, kind: str = "[{0}, {0}]") -> str:
    return "a0: &a0 [x, y]\n" + "".join(f"a{n}: &a{n} {kind.format(f'*a{n - 1}')}\n" for n in range(1, levels))


@pytest.mark.parametrize("read", [read_config, read_yaml])
@pytest.mark.parametrize("kind", ["[{0}, {0}]", "{{x: {0}, y: {0}}}"])
def test_aliases_that_grow(tmp_path, read, kind):
    path = tmp_path / "x.yaml"
    path.write_text("model: {}\n" + aliases(60, kind))
    with pytest.raises(ValueError, match="x.yaml is refused: its aliases make it too long"):
        read(path)
    path.write_text("model: {}\n" + aliases(8, kind))
    read(path)


def test_too_large_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_FILE", 10)
    (tmp_path / "x.yaml").write_text("model: {}  # and so on")
    with pytest.raises(ValueError, match="x.yaml is too large: 22 bytes, at most 10"):
        read_config(tmp_path / "x.yaml")


def test_both_readers_refuse_references_that_grow(tmp_path):
    (tmp_path / "x.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"model": {}, **laughs(40)})))
    with pytest.raises(ValueError, match="x.yaml is refused"):
        read_config(tmp_path / "x.yaml")
    halves = [OmegaConf.create({"a": "${b}${b}"}), OmegaConf.create({"b": "x" * 60_000})]
    with pytest.raises(ValueError, match="config of this run is refused"):
        merge(halves)  # what no file shows alone


@pytest.mark.parametrize("text", ["\\", "}", "${", r"\${", "${}", "${${", "\\}", r"\\${"])
def test_long_texts_are_checked_in_linear_time(text):
    """Seconds, where work that goes by the square of the length would take hours."""
    started = time.process_time()
    with contextlib.suppress(ValueError):
        check_growth({"a": text * 500_000}, "x")
    assert time.process_time() - started < 60


# ---- numbers ----


def test_networks_of_too_many_modules():
    with pytest.raises(ValueError, match="more than 50000 modules"), building():
        nn.ModuleList(nn.Identity() for _ in range(10**9))
    nn.ModuleList(nn.Identity() for _ in range(limits.MAX_MODULES + 1))  # nothing counts any more


def test_networks_of_too_much_memory(monkeypatch):
    monkeypatch.setattr(limits, "total_memory", lambda: 2**20)
    with pytest.raises(ValueError, match=r"more than the 0.000977 GiB .*\(weight alone is 1000x300\)"), building():
        nn.Linear(300, 1000)
    with building():
        nn.Linear(10**6, 10**6, device="meta")
        nn.Linear(300, 100)


CGROUPS = {
    "version 2": ("0::/user/job", {"user/job/memory.max": 3000, "user/memory.max": 2000, "memory.max": "max"}, 2000),
    "version 2, in a container": ("0::/", {"memory.max": 1000}, 1000),
    "version 1": ("5:cpu:/x\n4:memory,hugetlb:/job", {"memory/job/memory.limit_in_bytes": 500}, 500),
    "version 1, in a container": ("4:memory:/docker/1", {"memory/memory.limit_in_bytes": 700}, 700),
    "version 1, no limit": ("4:memory:/", {"memory/memory.limit_in_bytes": 2**63 - 4096}, None),
    "no limit": ("0::/", {"memory.max": "max"}, None),
    "unreadable": ("nonsense", {}, None),
}


@pytest.mark.parametrize("key", CGROUPS)
def test_memory_of_containers(tmp_path, key):
    groups, sizes, expected = CGROUPS[key]
    machine = limits.total_memory(tmp_path)  # without /proc
    for name, content in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": v for k, v in sizes.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert limits.total_memory(tmp_path) == (expected or machine) and machine > 2**20


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_networks_that_fit_into_memory(monkeypatch):
    """Shared weights count once, replaced ones no longer, and sparse ones not at all."""
    monkeypatch.setattr(limits, "total_memory", lambda: 2**20)
    with building():
        net = nn.Linear(300, 800, bias=False)  # 0.92 of the room
        tied = nn.ModuleList(nn.Linear(1, 1) for _ in range(5))
        for part in tied:
            part.weight = net.weight
        net.register_buffer("sparse", torch.eye(3).to_sparse())
        net.register_buffer("compressed", torch.eye(3).to_sparse_csr())
        net.register_buffer("none", torch.zeros(0))
        nn.LazyLinear(10**6)
        with pytest.raises(ValueError, match=r"\(weight alone is 300x300\)"):
            nn.Linear(300, 300)
    with building():
        net = nn.Linear(300, 300)
        for _ in range(9):
            net.load_state_dict({"weight": torch.zeros(300, 300), "bias": torch.zeros(300)}, assign=True)


BUILD = """
import gc, json, resource, sys
from omegaconf import OmegaConf
from ldm import limits
from ldm.inference.loading import _build
limits.MAX_MODULES = int(sys.argv[1])
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for line in sys.stdin:
    try:
        _build(OmegaConf.create(json.loads(line)))
        result = "built"
    except ValueError as error:
        result = f"refused: {error}"
    except BaseException as error:
        result = f"raised {type(error).__name__}: {error}"
    gc.collect()
    print(json.dumps(result), flush=True)
"""


def numbers(value: object, path: tuple = ()) -> list[tuple]:
    if isinstance(value, dict):
        return [found for key, entry in value.items() for found in numbers(entry, (*path, key))]
    if isinstance(value, list):
        return [found for key, entry in enumerate(value) for found in numbers(entry, (*path, key))]
    return [path] if type(value) is int else []


def changed(config: dict, path: tuple, value: int) -> dict:
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


SOME = ["models/ldm/shapes64/config.yaml", "configs/stable-diffusion/v1-inference.yaml"]
MORE = [f"configs/{name}.yaml" for name in ("stable-diffusion/v2-1-stable-unclip-l-inference",)]
MORE += ["configs/stable-diffusion/v2-midas-inference.yaml", "configs/latent-diffusion/txt2img-1p4B-eval.yaml"]
MORE += [f"models/ldm/{name}/config.yaml" for name in ("layout2img-openimages256", "bsr_sr", "semantic_synthesis256")]


@pytest.mark.subprocess
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc and limits of memory")
@pytest.mark.parametrize("path", [SOME[0], *(pytest.param(path, marks=pytest.mark.slow) for path in [SOME[1], *MORE])])
def test_huge_numbers(path):
    """Every number of a config in turn, of the sizes that memory just fails at and far beyond."""
    base = OmegaConf.to_container(OmegaConf.load(ROOT / path))
    cases = [(place, value) for place in numbers(base["model"], ("model",)) for value in (3 * 10**9, 10**12)]
    lines = "".join(json.dumps(changed(base, place, value)) + "\n" for place, value in cases)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    most = 5_000 if path == SOME[0] else limits.MAX_MODULES  # for speed: the network has fewer than 1,000
    command = [sys.executable, "-c", BUILD, str(most)]
    done = subprocess.run(command, cwd=ROOT, env=environment, input=lines, capture_output=True, text=True, timeout=1800)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(results) == len(cases), done.stderr[-2000:]
    raised = {f"{place}={value}": what for (place, value), what in zip(cases, results) if what.startswith("raised")}
    assert not raised
    assert sum(what.startswith("refused") for what in results) > len(cases) / 10
