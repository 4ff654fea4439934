"""Training checkpoints come back exactly; those that are hostile or damaged raise one sentence, and run nothing."""

from __future__ import annotations

import datetime
import enum
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ldm.checkpoint import CheckpointError, trainer_state
from ldm.training.checkpoints import AtomicCheckpointIO, read_training_state
from tests.checkpoint.hostile import START, call, name, number, pair, storage, tensor, text
from tests.training.toys import TwoPlayers, assert_same_weights, config, run, start, two_players, weights

ROOT = Path(__file__).resolve().parents[2]


def trained() -> dict:
    """The state of a run with everything that one may hold."""
    net = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(3):
        net(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        schedule.step()
    legacy, generator = np.random.RandomState(3), np.random.default_rng(5)
    legacy.standard_normal(3)
    states = {
        "python": random.Random(1).getstate(),
        "numpy": legacy.get_state(),
        "generator": generator.bit_generator.state,
        "torch": torch.get_rng_state(),
    }
    odd = {
        "arrays": [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 3)), np.array([True, False])],
        "more": [np.arange(3, dtype=kind) for kind in ("i1", "u2", "<i8", "f2", "f4", "c16")],
        "bytes": [b"\0\xff", b"", bytearray(b"x\xfe")],
        "numbers": [2**300, -5, float("inf"), 1 + 2j, True, None],
        "set": {1, "a", (2, 3)},
        "torch": [torch.Size([1, 2]), torch.float16, torch.device("cpu"), torch.ones(2, dtype=torch.bfloat16)],
        "keys": {(1, 2): 3, 4: 5, 0.5: 6, None: 7, b"\0\xff": 8},
    }
    return {
        "state_dict": net.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "callbacks": {"Odd": odd, "RNG": states},
        "loops": {"fit_loop": {"epoch_progress": {"total": {"ready": 1}}}},
        "place": {"epoch": 0, "batch": 3, "total": 3, "logged": 3, "batches": 10, "processes": 1},
        "epoch": 0,
        "global_step": 3,
    }


def same(one: object, other: object) -> bool:
    """Equal to the bit, and of one type; a dictionary of another class counts as one."""
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        order = one.flags.f_contiguous == other.flags.f_contiguous
        return one.dtype == other.dtype and order and other.flags.writeable and np.array_equal(one, other)
    return one == other


@pytest.fixture(scope="module")
def state() -> dict:
    return trained()


@pytest.fixture(scope="module")
def good(state, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(state, path)
    return path.read_bytes()


def test_everything_comes_back(state, tmp_path, good):
    (tmp_path / "a.ckpt").write_bytes(good)
    found = read_training_state(tmp_path / "a.ckpt")
    assert same(state, found)
    random.Random().setstate(found["callbacks"]["RNG"]["python"])
    again = np.random.RandomState()
    again.set_state(found["callbacks"]["RNG"]["numpy"])
    assert again.get_state()[2:] == state["callbacks"]["RNG"]["numpy"][2:]


def test_shared_storage_stays_shared(tmp_path):
    base = torch.randn(6)
    listed = [base]
    shared = {"a": base, "b": base[2:4], "turned": base.view(2, 3).T, "one": listed, "two": listed}
    AtomicCheckpointIO().save_checkpoint(trained() | {"callbacks": shared}, tmp_path / "a.ckpt")
    found = read_training_state(tmp_path / "a.ckpt")["callbacks"]
    assert same(shared, found) and found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


def test_lazy_views_are_saved_by_value(tmp_path):
    waves = torch.randn(2, 3, dtype=torch.complex64)
    views = {
        "expanded": torch.arange(2.0)[:, None].expand(2, 2**16),
        "one": torch.ones(()).expand(70_000),
        "conjugated": waves.conj(),
        "negated": waves.clone().conj().imag,
    }
    AtomicCheckpointIO().save_checkpoint(trained() | {"callbacks": views}, tmp_path / "a.ckpt")
    found = read_training_state(tmp_path / "a.ckpt")["callbacks"]
    assert all(torch.equal(found[key], value) for key, value in views.items())


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.subprocess
def test_unreadable_objects_are_named_once(tmp_path, caplog):
    files = AtomicCheckpointIO()
    files.save_checkpoint(trained(), tmp_path / "a.ckpt")
    assert not caplog.text
    odd = {"Mine": {"when": datetime.date(2020, 1, 1), "list": [Colour.RED], "names": np.array(["a"])}}
    for _ in range(2):
        files.save_checkpoint(trained() | {"callbacks": odd}, tmp_path / "a.ckpt")
    (record,) = caplog.records
    message = "a date in callbacks.Mine.when, a Colour in callbacks.Mine.list, a ndarray in callbacks.Mine.names"
    assert message in record.getMessage()
    with pytest.raises(CheckpointError):
        read_training_state(tmp_path / "a.ckpt")


# ---- hostile ----

KEPT = {"epoch": 1, "batch": 2, "total": 7, "logged": 7, "batches": 5, "processes": 1}
PLACE = b"}(" + b"".join(text(key) + number(value) for key, value in KEPT.items()) + b"u"
NEEDED = text("place") + PLACE + text("loops") + b"}" + text("optimizer_states") + b"]"
DTYPE = call("numpy.dtype", text("u4"), b"\x89", b"\x88") + b"(" + number(3) + text("<") + b"NNN" + b"tb"
ENDLESS = tensor((2**60, 0), (1, 1))  # its rows are without end, though it is empty
EMPTY = call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), pair([0]), call("_codecs.encode", text("b")))


def array(shape: bytes, kind: bytes = DTYPE, raw: bytes = b"\0" * 8) -> bytes:
    content = call("_codecs.encode", text(raw.decode("latin-1")), text("latin1"))
    return EMPTY + b"(" + number(1) + shape + kind + b"\x89" + content + b"tb"


def nested(depth: int) -> bytes:
    return b"]" * depth + b"a" * (depth - 1)


def doubled(levels: int) -> bytes:
    """Lists of the list before, twice."""
    made = b"]q\0"
    for level in range(1, levels):
        made += b"h" + bytes([level - 1]) + b"\x86q" + bytes([level])
    return made


def marked(mark: bytes) -> bytes:
    parts = (storage(), number(0), pair([4]), pair([1]), b"\x89", b"}", mark)
    return call("torch._utils._rebuild_tensor_v2", *parts)


def dtyped(dtype: bytes) -> bytes:
    parts = (storage(kind="torch.storage.UntypedStorage", count=16), number(0), pair([4]), pair([1]), b"\x89", b"}")
    return call("torch._utils._rebuild_tensor_v3", *parts, dtype)


PLAIN = "damaged, or holds what no run writes"
MORE = "references names outside the allowlist"
HOSTILE = {
    "a program": (call("os.system", text("touch ran")), MORE + r" \(os\.system\)"),
    "what torch would call": (call("torch._utils._rebuild_sparse_tensor", name("torch.sparse_coo"), b")"), MORE),
    "a class of ours": (call("ldm.files.atomic_write", text("x")), MORE),
    "a class without a call": (name("collections.OrderedDict"), PLAIN + ".*is not a plain value"),
    "a storage": (storage(), PLAIN + ".*is not a plain value"),
    "a list in itself": (b"]q\0h\0a", PLAIN + r" \(it holds a list that contains itself"),
    "a dictionary in itself": (b"}q\0" + text("x") + b"h\0s", PLAIN + r" \(it holds a list that contains itself"),
    "many lists in each other": (nested(200_000), PLAIN + ".*too deeply nested"),
    "a billion lists": (doubled(40), PLAIN + ".*too many values"),
    "bytes again and again": (
        b"](" + text("x" * 10**6) + b"q\0" + (call("_codecs.encode", b"h\0") + b"") * 2000 + b"e",
        PLAIN + ".*more beside tensors",
    ),
    "an array of objects": (
        array(pair([2]), call("numpy.dtype", text("O8"), b"\x89", b"\x88")),
        "something other than numbers",
    ),
    "an array of records": (
        array(pair([2]), call("numpy.dtype", text("V8"), b"\x89", b"\x88")),
        "something other than numbers",
    ),
    "an array of no numbers": (
        array(pair([2]), call("numpy.dtype", text("f3"), b"\x89", b"\x88")),
        "something other than numbers",
    ),
    "an array of other bytes": (array(pair([2]), DTYPE.replace(text("<"), text(">"))), "another byte order"),
    "a huge array": (array(pair([2**40])), "array of shape"),
    "an array below nothing": (array(pair([-2, -1])), "impossible shape"),
    "an array of many axes": (array(pair([1] * 40)), "impossible shape"),
    "an array of an endless shape": (array(pair([2**61, 2**61, 0]), raw=b""), "impossible shape"),
    "an array of an endless shape, in bytes": (array(pair([2**61, 0]), raw=b""), "impossible shape"),
    "an array whose shape is a tensor": (array(tensor()), "impossible shape"),
    "an array built of a tensor": (EMPTY + ENDLESS + b"b", "something other than numbers"),
    "an array of a tensor's byte order": (array(pair([2]), DTYPE.replace(text("<"), tensor())), "another byte order"),
    "an array of another class": (EMPTY.replace(name("numpy.ndarray"), name("numpy.dtype")), "of another class"),
    "a set of lists": (call("builtins.set", b"](]e"), "key of type list"),
    "a key of lists": (b"}" + b"]" + b"Ns", "key of type list"),
    "a key that is a class": (b"}" + name("collections.OrderedDict") + b"Ns", "not a plain value"),
    "a device": (call("torch.device", text("cuda:" + "9" * 50)), "unknown device"),
    **{
        f"a device, {kind}": (call("torch.device", text(kind)), "unknown device")
        for kind in ("mps:007", "cpu:01", "cuda:999", "cuda:100", "cuda:\u0661")
    },
    "a device that is a tensor": (call("torch.device", tensor(), number(1)), "unknown device"),
    "a size": (call("torch.Size", pair([-1])), "impossible shape"),
    "attributes of a plain": (tensor() + b"}" + text("x") + b"Nsb", "attributes of a plain"),
    "a tensor as attributes": (call("collections.OrderedDict") + tensor() + b"b", "attributes of a plain"),
    "a tensor of endless axes": (tensor((2**61, 2**61, 0), (1, 1, 1)), PLAIN + ".*no tensor can have"),
    "a tensor marked by a tensor": (marked(tensor()), "conjugated or negated"),
    "a tensor whose dtype is a tensor": (
        dtyped(tensor(of=storage(kind="torch.storage.UntypedStorage", count=16))),
        "without a dtype",
    ),
    "entries of an endless tensor": (call("collections.OrderedDict", b"]" + ENDLESS + b"a"), "other than pairs"),
    "a set of an endless tensor": (call("builtins.set", b"]" + ENDLESS + b"a"), "key of type Tensor"),
    "a tensor beyond its storage": (tensor(size=(5,)), PLAIN + ".*needs number 4"),
    "a tensor of nothing": (tensor(of=storage("7")), PLAIN + ".*no bytes where 16"),
    "an expanded tensor": (tensor(size=(2**40,), stride=(0,)), PLAIN + ".*expands them to 1099511627776"),
    "a tensor too few": (call("torch._utils._rebuild_tensor_v2"), PLAIN),
}


def archive(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a/data.pkl", content)
        made.writestr("a/data/0", struct.pack("<4f", 1, 2, 3, 4))
        made.writestr("a/version", "3")
    return file.getvalue()


def beside(value: bytes) -> bytes:
    return archive(START + b"}(" + NEEDED + text("x") + value + b"u.")


READER = """
import json, resource, sys
from pathlib import Path
from ldm.training.checkpoints import read_training_state
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        message = f"loads: {sorted(read_training_state(path))}"
    except ValueError as error:
        message = str(error)
    except BaseException as error:
        message = f"raised {type(error).__name__}: {error}"
    print(json.dumps([path.name, message]), flush=True)
"""


@pytest.fixture(scope="module")
def message(tmp_path_factory) -> dict[str, str]:
    """What reading each hostile file came to, in a process with little memory."""
    folder, here = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("here")
    for index, (value, _) in enumerate(HOSTILE.values()):
        (folder / f"{index:03}").write_bytes(beside(value))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READER, str(folder), str(600 * 2**20)]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(here.iterdir()), "something ran"
    lines = dict(json.loads(line) for line in done.stdout.splitlines())
    return {key: lines[f"{index:03}"] for index, key in enumerate(HOSTILE)}


@pytest.mark.subprocess
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc and limits of memory")
@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_states(message, key):
    assert re.search(HOSTILE[key][1], message[key]), message[key]
    assert message[key].isprintable() and len(message[key]) < 500


def test_hostile_files_differ_from_good_ones_in_one_thing(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(beside(array(pair([2])) + b""))
    assert read_training_state(tmp_path / "a.ckpt")["x"].tolist() == [0, 0]
    (tmp_path / "a.ckpt").write_bytes(beside(tensor()))
    assert read_training_state(tmp_path / "a.ckpt")["x"].tolist() == [1, 2, 3, 4]
    (tmp_path / "a.ckpt").write_bytes(beside(nested(50)))
    read_training_state(tmp_path / "a.ckpt")


def test_the_number_of_tensors_is_limited(tmp_path, monkeypatch, good):
    monkeypatch.setattr(trainer_state, "MAX_TENSORS", 3)
    (tmp_path / "a.ckpt").write_bytes(good)
    with pytest.raises(CheckpointError, match="more tensors than any run"):
        read_training_state(tmp_path / "a.ckpt")


# ---- mutated ----


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=6)),
            st.tuples(st.just("remove"), st.floats(0, 1, exclude_max=True), st.integers(1, 60)),
        ),
        min_size=1,
        max_size=3,
    ),
    inside=st.booleans(),
)
def test_mutated_states(good, tmp_path, changes, inside):
    """Of the pickle inside, with its checksum corrected, or of the complete file."""
    with zipfile.ZipFile(io.BytesIO(good)) as old:
        parts = {entry.filename: old.read(entry) for entry in old.infolist()}
    (pickled,) = (key for key in parts if key.endswith("data.pkl"))
    content = bytearray(parts[pickled] if inside else good)
    for kind, place, what in changes:
        at = int(place * len(content))
        content[at : at + (len(what) if kind == "write" else what)] = what if kind == "write" else b""
    if inside:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as new:
            for key, part in (parts | {pickled: content}).items():
                new.writestr(key, bytes(part))
        content = file.getvalue()
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    try:
        read_training_state(path)
    except ValueError as error:
        assert str(error).isprintable() and str(path) in str(error)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    code, folder = start(tmp_path_factory.mktemp("run"), config(two_players(), length=6), "--max_steps", 6)
    assert code == 0
    return folder


STRANGE = [
    ("optimizer_states", [], "had 0 optimizers, and would now have 2"),
    ("optimizer_states", [{"state": {}, "param_groups": []}] * 2, None),
    ("optimizer_states", [1, 2], None),
    ("optimizer_states", "xy", "its optimizer_states is of type str"),
    ("loops", {"fit_loop": {}}, "counters contradict its position"),
    ("loops", {"fit_loop": 3}, "not a checkpoint of such a run"),
    ("loops", {}, "not a checkpoint of such a run"),
    ("callbacks", 3, "its callbacks is of type int"),
    ("callbacks", {"Checkpoints": None}, "not a checkpoint of such a run"),
    ("state_dict", {"net.weight": 1}, None),
    ("place", {"epoch": -1, "batch": 0, "total": 0, "logged": 0}, "invalid position"),
    ("place", {"epoch": 0}, "invalid position"),
    ("global_step", None, "its global_step is of type NoneType"),
]


@pytest.mark.parametrize("key, value, expected", STRANGE)
def test_incompatible_states_end_in_a_sentence(finished_run, tmp_path, capsys, key, value, expected):
    state = read_training_state(finished_run / "checkpoints/last.ckpt")
    before = weights(finished_run)
    if value == {"Checkpoints": None}:
        value = dict.fromkeys(state["callbacks"], 3)
    path = finished_run / "checkpoints/strange.ckpt"
    torch.save(state | {key: value}, path)
    try:
        code = run("--resume", path, "-t", "--max_steps", 12)
    finally:
        path.unlink()
        for kept in (finished_run / "checkpoints").glob("last-until-*.ckpt"):
            os.replace(kept, finished_run / "checkpoints/last.ckpt")
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert code in (1, 2) and complaint.startswith("error: ") and re.search(expected or "", complaint), complaint
    assert_same_weights(weights(finished_run), before)


@pytest.mark.parametrize("hook", ["setup", "configure_optimizers", "on_train_start"])
def test_mistakes_in_code_are_not_the_checkpoints(finished_run, monkeypatch, hook):
    """On resuming, too, an error of a model's or a data set's own code ends with its traceback."""

    def mistaken(*_, **__):
        raise KeyError("caption")

    monkeypatch.setattr(TwoPlayers, hook, mistaken)
    with pytest.raises(KeyError, match="caption"):
        run("--resume", finished_run, "-t", "--max_steps", 12)
