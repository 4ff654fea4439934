"""Caches: their contents, building and resuming, and which are refused."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from ldm.data import cache
from ldm.data.cache import CachedDataset, CacheError, build_cache, ensure_caches
from ldm.data.folder import ImageFolder
from ldm.util import instantiate_from_config
from tests.golden import filled
from tests.tiny import tiny_config

KEYS = {"first_stage_key": "image", "cond_stage_key": "caption"}
TWO_A_SHARD = 2 * 8 * 16 * 16 * 4  # bytes


def tiny_model(**changes) -> torch.nn.Module:
    return filled(instantiate_from_config(tiny_config(**KEYS, **changes)))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """f = 2: pictures 32x32 to moments (8, 16, 16); contexts (12, 24)."""
    return tiny_model()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Five pictures of noise 40x32 with two captions each."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in "abcde":
        Image.fromarray(rng.integers(0, 255, (32, 40, 3), np.uint8)).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"a red {name}\na blue {name}")
    return root


@pytest.fixture(scope="module")
def finished(model, pictures, tmp_path_factory) -> Path:
    """A cache with text, in three shards."""
    folder = tmp_path_factory.mktemp("caches") / "one"
    return build_cache(model, ImageFolder(pictures, 32), folder, text=True, batch_size=3, shard_bytes=20_000)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The same cache, to be damaged."""
    return shutil.copytree(finished, tmp_path / "copy")


def test_where_mapping_is_not_safe_shards_are_read(copy, monkeypatch) -> None:
    mapped = CachedDataset(copy)
    expected = [mapped.get(i, rng(i)) for i in range(len(mapped))]
    monkeypatch.setattr(cache, "may_map", lambda path: False)
    read = CachedDataset(copy)
    for i, item in enumerate(expected):
        found = read.get(i, rng(i))
        assert found.keys() == item.keys()
        for key, value in item.items():
            same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
            assert same and type(found[key]) is type(value), key
    (shard, *_) = sorted(copy.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:4096])
    with pytest.raises(CacheError, match="was cut short or changed while it was in use"):
        read.get(1, rng())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
@pytest.mark.parametrize("mapped", [True, False])
def test_shards_are_not_held_open(finished, monkeypatch, mapped) -> None:
    """A large cache has more shards than a process may have open files."""
    monkeypatch.setattr(cache, "may_map", lambda path: mapped)
    read = CachedDataset(finished)
    items = [read.get(i, rng(i)) for i in range(len(read))]
    held = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert len(items) == 5 and not [path for path in held if str(finished) in path]


def test_a_shard_that_became_another_file_is_not_read(copy, monkeypatch) -> None:
    monkeypatch.setattr(cache, "may_map", lambda path: False)
    read = CachedDataset(copy)
    read.get(0, rng())
    (shard, *_) = sorted(copy.glob("shard-*"))
    shard.write_bytes(shard.read_bytes() + b"more")
    with pytest.raises(CacheError, match="was cut short or changed while it was in use"):
        read.get(0, rng())


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def encode(model, image: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_first_stage(torch.from_numpy(image)[None].movedim(-1, 1)).parameters[0]


def embed(model, caption: str) -> torch.Tensor:
    with torch.no_grad():
        return model.get_learned_conditioning([caption])[0]


# ------------------------------------------------------------------------------------------------------------- contents


def test_a_cache_holds_what_the_model_makes_of_the_items(model, pictures, finished) -> None:
    plain, cached = ImageFolder(pictures, 32), CachedDataset(finished)
    assert len(cached) == 5 and len(cached.index["shards"]) == 3
    for i in range(5):
        item = cached[i]
        assert item.keys() == {"moments", "caption", "context"}
        assert item["moments"].dtype == item["context"].dtype == torch.float32
        torch.testing.assert_close(item["moments"], encode(model, plain[i]["image"]), rtol=1e-4, atol=1e-5)
        assert item["caption"] in (f"a red {'abcde'[i]}", f"a blue {'abcde'[i]}")
        torch.testing.assert_close(item["context"], embed(model, item["caption"]), rtol=1e-4, atol=1e-5)
    cached.check(model)


def test_training_on_a_cache_is_training_on_the_pictures(model, pictures, finished) -> None:
    plain, cached = ImageFolder(pictures, 32), CachedDataset(finished)
    batch = default_collate([cached[i] for i in range(3)])
    uncached = default_collate([{**plain[i], "caption": cached[i]["caption"]} for i in range(3)])
    losses = []
    for one in (batch, uncached):
        torch.manual_seed(5)
        losses.append(model.shared_step(one)[0])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_variants_and_flips(model, pictures, tmp_path) -> None:
    plain = ImageFolder(pictures, 32, crop="random", captions="none")
    folder = build_cache(
        tiny_model(cond_stage_config="__is_unconditional__"), plain, tmp_path / "c", variants=3, flips=True
    )
    cached = CachedDataset(folder)
    expected = [plain.get(2, np.random.default_rng((0, variant, 2)))["image"] for variant in range(3)]
    expected += [image[:, ::-1].copy() for image in expected]
    expected = torch.stack([encode(model, image) for image in expected])
    seen = set()
    for seed in range(60):
        distances = (cached.get(2, rng(seed))["moments"] - expected).flatten(1).abs().amax(1)
        assert distances.min() < 1e-4
        seen.add(int(distances.argmin()))
    assert seen == set(range(6))
    assert torch.equal(cached.get(2, rng(1))["moments"], cached.get(2, rng(1))["moments"])


def test_captions_of_variants_belong_to_their_contexts(model, pictures, tmp_path) -> None:
    cached = CachedDataset(build_cache(model, ImageFolder(pictures, 32), tmp_path / "c", text=True, variants=4))
    items = [cached.get(0, rng(seed)) for seed in range(30)]
    assert {item["caption"] for item in items} == {"a red a", "a blue a"}
    for item in items[:6]:
        torch.testing.assert_close(item["context"], embed(model, item["caption"]), rtol=1e-4, atol=1e-5)


def test_half_precision_on_disk(model, pictures, finished, tmp_path) -> None:
    half = CachedDataset(build_cache(model, ImageFolder(pictures, 32), tmp_path / "c", text=True, dtype="float16"))
    one, other = half[3], CachedDataset(finished)[3]
    assert one["moments"].dtype == torch.float32
    torch.testing.assert_close(one["moments"], other["moments"], rtol=1e-3, atol=1e-3)
    files = [sum(shard["bytes"] for shard in CachedDataset(f).index["shards"]) for f in (tmp_path / "c", finished)]
    assert files[0] < 0.6 * files[1]
    half.check(model)


def test_stages_without_a_posterior_give_latents(pictures, tmp_path) -> None:
    identity = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    model = tiny_model(first_stage_config=identity, cond_stage_config="__is_unconditional__")
    plain = ImageFolder(pictures, 8, captions="none")
    item = CachedDataset(build_cache(model, plain, tmp_path / "c"))[1]
    assert item.keys() == {"latents"}
    np.testing.assert_allclose(item["latents"].movedim(0, -1), plain[1]["image"], atol=1e-6)


def test_class_labels_are_kept(model, tmp_path) -> None:
    for name in ("ant/a.png", "bee/b.png"):
        (tmp_path / "p" / name).parent.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "p" / name)
    cached = CachedDataset(build_cache(model, ImageFolder(tmp_path / "p", 32), tmp_path / "c"))
    batch = default_collate([cached[0], cached[1]])
    assert (batch["class_label"].tolist(), batch["caption"]) == ([0, 1], ["a photo of a ant", "a photo of a bee"])
    assert batch["class_label"].dtype == torch.int64


def test_captions_come_anew_from_the_data_set(model, pictures, finished, tmp_path) -> None:
    plain = ImageFolder(pictures, 32)
    folder = build_cache(model, plain, tmp_path / "c")
    fixed, fresh = CachedDataset(folder), CachedDataset(folder, plain)
    assert len({fixed.get(0, rng(seed))["caption"] for seed in range(20)}) == 1
    assert {fresh.get(0, rng(seed))["caption"] for seed in range(20)} == {"a red a", "a blue a"}
    embedded = CachedDataset(finished, plain)  # here the caption must stay the one that was embedded
    assert len({embedded.get(0, rng(seed))["caption"] for seed in range(20)}) == 1


def test_the_caption_is_of_the_picture_that_stood_in_for_a_broken_one(model, pictures, tmp_path) -> None:
    root = shutil.copytree(pictures, tmp_path / "p")
    (root / "b.png").write_text("broken")
    folder = build_cache(model, ImageFolder(root, 32), tmp_path / "c")
    cached = CachedDataset(folder, ImageFolder(root, 32))
    assert cached[1]["caption"].endswith(" c")
    torch.testing.assert_close(cached[1]["moments"], cached[2]["moments"], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- building


def test_building_leaves_random_numbers_and_the_model_alone(pictures, tmp_path) -> None:
    model = tiny_model().train()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    build_cache(model, ImageFolder(pictures, 32), tmp_path / "c", num_workers=1)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert model.training and not model.first_stage_model.training


def test_a_stopped_build_goes_on(model, pictures, tmp_path, monkeypatch) -> None:
    plain, whole, stopped = ImageFolder(pictures, 32), tmp_path / "whole", tmp_path / "stopped"
    build_cache(model, plain, whole, shard_bytes=TWO_A_SHARD)
    write = cache._write_shard

    def stop_at_the_third(folder, number, *args):
        if number == 2:
            raise KeyboardInterrupt
        return write(folder, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write_shard", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            build_cache(model, plain, stopped, shard_bytes=TWO_A_SHARD)
    with pytest.raises(CacheError, match="is unfinished: repeat the command"):
        CachedDataset(stopped)
    with pytest.raises(CacheError, match=r"unfinished cache with other settings \(.*dtype.*\): delete it"):
        build_cache(model, plain, stopped, shard_bytes=TWO_A_SHARD, dtype="float16")
    with pytest.raises(CacheError, match=r"other settings \(first_stage\)"):
        build_cache(instantiate_from_config(tiny_config(**KEYS)), plain, stopped, shard_bytes=TWO_A_SHARD)

    (stopped / "shard-00001.safetensors").write_bytes(b"spoilt")
    made = []
    monkeypatch.setattr(cache, "_write_shard", lambda *args: made.append(args[1]) or write(*args))
    build_cache(model, plain, stopped, shard_bytes=TWO_A_SHARD)
    assert made == [1, 2]  # the first was kept, the spoilt one made again
    assert (stopped / "index.json").read_bytes() == (whole / "index.json").read_bytes()  # checksums too


def test_a_full_disk(model, pictures, tmp_path, monkeypatch) -> None:
    plain = ImageFolder(pictures, 32)
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(
            OSError, match="the cache needs 4.1e-05 GB more, and 1e-09 GB are free: choose another disk"
        ):
            build_cache(model, plain, tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left on device"):
            build_cache(model, plain, tmp_path / "d")
    assert not list(tmp_path.rglob("*.safetensors*"))
    CachedDataset(build_cache(model, plain, tmp_path / "c"))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"dtype": "int8"}, "dtype 'int8' is not one of float32, float16"),
        ({}, {"variants": 0}, "variants must be at least 1, not 0"),
        ({"first_stage_key": "jpg"}, {}, "entries image, caption, but the model trains on 'jpg'"),
        (
            {"cond_stage_key": "txt"},
            {},
            r"conditioned on 'txt', .* \(its texts and labels: caption\): configure its captions",
        ),
        ({"cond_stage_trainable": True}, {"text": True}, "the model trains its text encoder; leave text out"),
        ({"cond_stage_config": "__is_unconditional__"}, {"text": True}, "the model has no text encoder"),
    ],
)
def test_what_cannot_be_cached(pictures, tmp_path, change, options, message) -> None:
    model = instantiate_from_config(tiny_config(**KEYS | change))
    with pytest.raises(ValueError, match=message):
        build_cache(model, ImageFolder(pictures, 32), tmp_path / "c", **options)


def test_nan_is_not_cached(pictures, tmp_path) -> None:
    model = tiny_model()
    model.first_stage_model.quant_conv.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="values that are not finite"):
        build_cache(model, ImageFolder(pictures, 32), tmp_path / "c")


def test_nothing_is_overwritten(model, pictures, copy, tmp_path) -> None:
    with pytest.raises(FileExistsError, match="holds a finished cache: delete it first"):
        build_cache(model, ImageFolder(pictures, 32), copy)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    with pytest.raises(CacheError, match="is not empty and holds no cache"):
        build_cache(model, ImageFolder(pictures, 32), tmp_path / "photos")


# ------------------------------------------------------------------------------------------------------------- refusals


def test_no_cache(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no cache in .*nowhere: make it with scripts/cache_latents.py"):
        CachedDataset(tmp_path / "nowhere")


def test_a_flipped_bit_is_found_by_verifying(copy) -> None:
    path = copy / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"shard-00001.safetensors is damaged \(its checksum differs\); delete it"):
        CachedDataset(copy)
    assert len(CachedDataset(copy, verify=False)) == 5


def test_missing_and_short_shards_are_found_always(copy) -> None:
    path = copy / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CacheError, match=r"shard-00002.safetensors is cut short or changed \(\d+ of \d+ bytes\)"):
        CachedDataset(copy, verify=False)
    path.unlink()
    with pytest.raises(CacheError, match="shard-00002.safetensors is missing"):
        CachedDataset(copy, verify=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged: delete"),
        ('{"format": "ldm-latent-cache", "version": 9}', "of another format .*latent-cache 9"),
    ],
)
def test_bad_index(copy, text, message) -> None:
    (copy / "index.json").write_text(text)
    with pytest.raises(CacheError, match=message):
        CachedDataset(copy)


def test_a_cache_of_another_data_set_is_refused(copy, pictures, tmp_path) -> None:
    moved = shutil.copytree(pictures, tmp_path / "moved")
    CachedDataset(copy, ImageFolder(moved, 32))
    CachedDataset(copy, {"target": "ldm.data.folder.ImageFolder", "params": {"root": str(moved), "size": 32}})
    with pytest.raises(CacheError, match=r"another data set: size differ \(size was 32 and is 16\); delete"):
        CachedDataset(copy, ImageFolder(moved, 16))
    (moved / "f.png").touch()
    (moved / "f.txt").touch()
    with pytest.raises(CacheError, match=r"files, number differ"):
        CachedDataset(copy, ImageFolder(moved, 32))


def test_a_cache_of_another_model_is_refused(finished) -> None:
    cached, model = CachedDataset(finished), tiny_model()
    model.model.diffusion_model.out[2].bias.data += 1  # what is trained does not matter
    model.first_stage_model.loss = torch.nn.Linear(2, 2)  # nor what does not encode
    cached.check(model)
    model.cond_stage_model.max_length = 11  # the same weights, other tokens
    with pytest.raises(CacheError, match="text embeddings .* by another text encoder .*: delete the cache"):
        cached.check(model)
    model.cond_stage_model.max_length = 12
    model.cond_stage_model.transformer.text_model.final_layer_norm.bias.data += 1e-3
    with pytest.raises(CacheError, match="by another text encoder"):
        cached.check(model)
    model.first_stage_model.encoder.conv_in.bias.data += 1e-3
    with pytest.raises(CacheError, match="by another first stage than this model's: delete it and make it again"):
        cached.check(model)
    with pytest.raises(CacheError, match="this model trains its text encoder: make a cache without text"):
        cached.check(tiny_model(cond_stage_trainable=True))
    with pytest.raises(CacheError, match="holds latents, but AutoencoderKL trains on images"):
        cached.check(model.first_stage_model)


# ---------------------------------------------------------------------------------------------------- from the config


def section(pictures: Path, folder: Path, make: object = True) -> dict:
    dataset = {"target": "ldm.data.folder.ImageFolder", "params": {"root": str(pictures), "size": 32}}
    params = {"folder": str(folder), "make_if_missing": make, "dataset": dataset}
    train = {"target": "ldm.data.cache.CachedDataset", "params": params}
    return {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "train": train, "validation": dataset}}


def test_missing_caches_are_made(model, pictures, tmp_path, monkeypatch) -> None:
    data = section(pictures, tmp_path / "c", {"text": True, "batch_size": 2})
    ensure_caches(model, data)
    cached = instantiate_from_config(data["params"]["train"])
    assert cached[0].keys() == {"moments", "caption", "context"}
    monkeypatch.setattr(cache, "build_cache", lambda *_, **__: pytest.fail("it is there already"))
    ensure_caches(model, data)
    ensure_caches(model, section(pictures, tmp_path / "d", make=False))
    assert not (tmp_path / "d").exists()


def test_of_several_processes_one_makes_the_cache(model, pictures, tmp_path, monkeypatch) -> None:
    made = []
    write = cache._write_shard
    monkeypatch.setattr(cache, "_write_shard", lambda *args: made.append(args[1]) or write(*args))
    args = (model, section(pictures, tmp_path / "c"))
    threads = [threading.Thread(target=ensure_caches, args=args) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [0] and len(CachedDataset(tmp_path / "c")) == 5


def test_mistakes_in_the_section(model, pictures, tmp_path) -> None:
    with pytest.raises(ValueError, match="make_if_missing .* unknown option 'colour': there are batch_size, dtype"):
        ensure_caches(model, section(pictures, tmp_path / "c", {"colour": 1}))
    data = section(pictures, tmp_path / "c")
    del data["params"]["train"]["params"]["dataset"]
    with pytest.raises(ValueError, match="cannot be made: its section has no `dataset`"):
        ensure_caches(model, data)


def test_the_index_is_open_to_reading(finished) -> None:
    index = json.loads((finished / "index.json").read_text())
    assert index["dataset"]["size"] == 32 and index["dataset"]["number"] == 5
    assert {"first_stage", "text_encoder", "shape", "context", "seed"} <= index.keys()
    assert all(len(shard["sha256"]) == 64 for shard in index["shards"])
