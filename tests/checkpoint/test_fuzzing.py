"""Files mutated at random are read completely or refused in one sentence; no model is half filled."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from ldm.checkpoint import CheckpointError, fill_model, read_checkpoint
from tests.lightning1 import save_lightning1

STATE = {"weight": torch.linspace(-1, 1, 12).view(4, 3), "bias": torch.linspace(0, 1, 4)}
KINDS = ("zip", "packed", "legacy", "lightning", "safetensors")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    """A small file of each layout."""
    import zipfile

    made = {"safetensors": save(STATE, {"global_step": "7"})}
    for kind in ("zip", "legacy"):
        file = io.BytesIO()
        torch.save({"state_dict": STATE, "global_step": 7}, file, _use_new_zipfile_serialization=kind == "zip")
        made[kind] = file.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(made["zip"])) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    made["packed"] = packed.getvalue()
    made["lightning"] = save_lightning1(tmp_path_factory.mktemp("good") / "a.ckpt", STATE).read_bytes()
    return made


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple]:
    """What to do to a file, places as parts of its length: one to four of flips, new bytes, cuts and splices."""
    place = st.floats(0, 1, exclude_max=True)
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("flip"), place, st.integers(0, 7)),
                st.tuples(st.just("write"), place, st.binary(min_size=1, max_size=9)),
                st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=9)),
                st.tuples(st.just("cut"), place),
                st.tuples(st.just("remove"), place, st.integers(1, 300)),
                st.tuples(st.just("splice"), place, place, st.integers(1, 300), st.sampled_from(KINDS)),
            ),
            min_size=1,
            max_size=4,
        )
    )


def mutated(content: bytes, steps: list[tuple], good: dict[str, bytes]) -> bytes:
    for what, part, *more in steps:
        raw, at = bytearray(content), int(part * len(content))
        if not raw:
            break
        if what == "flip":
            raw[at] ^= 1 << more[0]
        elif what == "write":
            raw[at : at + len(more[0])] = more[0]
        elif what == "insert":
            raw[at:at] = more[0]
        elif what == "cut":
            del raw[at:]
        elif what == "remove":
            del raw[at : at + more[0]]
        else:
            other = good[more[2]]
            start = int(more[0] * len(other))
            raw[at : at + more[1]] = other[start : start + more[1]]
        content = bytes(raw)
    return content


def check(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    model = nn.Linear(3, 4, device="meta")
    try:
        checkpoint = read_checkpoint(path)
        for value in checkpoint.state.values():
            value.clone()  # all of it is there
        fill_model(model, checkpoint)
    except CheckpointError as error:
        outcome = str(error)
        assert str(path) in outcome
        assert outcome.isprintable()
        assert len(outcome) < 1000
        assert all(parameter.is_meta for parameter in model.parameters()), "half filled"
    else:
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert model(torch.ones(3)).shape == (4,)


def fuzz(good: dict[str, bytes], folder: Path, number: int) -> None:
    @settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(KINDS), mutations())
    def run(kind: str, steps: list[tuple]) -> None:
        check(mutated(good[kind], steps, good), folder / "a.ckpt")

    run()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unmutated_files_load(good, tmp_path):
    for content in good.values():
        (tmp_path / "a.ckpt").write_bytes(content)
        found = read_checkpoint(tmp_path / "a.ckpt").state
        assert all(torch.equal(found[key], value) for key, value in STATE.items())


def test_some_mutations(good, tmp_path):
    fuzz(good, tmp_path, 300)


@pytest.mark.slow
def test_thousands_of_mutations(good, tmp_path):
    fuzz(good, tmp_path, 5_000)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes_at_both_ends(good, tmp_path, kind):
    content = good[kind]
    for at in {*range(0, len(content), 23), *range(40), *range(len(content) - 40, len(content))}:
        raw = bytearray(content)
        raw[at] ^= 1 << at % 8
        check(bytes(raw), tmp_path / "a.ckpt")
