"""Web data sets: local tars, filters, masks and small images."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from ldm.data.laion import AddBW, AddLR, AddMask, WebDataModuleFromConfig, accepts, expand_shards
from ldm.data.util import AddMiDaS
from tests.data import public_layouts as layouts

CROP = {"target": "torchvision.transforms.CenterCrop", "params": {"size": 64}}


def module(root, shards="{00000..00001}.tar", shuffle=0, **given) -> WebDataModuleFromConfig:
    split = {"shards": shards, "shuffle": shuffle, "image_key": "jpg", "image_transforms": [CROP]}
    options = {"batch_size": 2, "num_workers": 0} | given
    data = WebDataModuleFromConfig(str(root), train=split, validation=split, **options)
    data.setup()
    return data


def keys(loader) -> list[str]:
    return [key for batch in loader for key in batch["__key__"]]


def test_batches(tmp_path):
    data = module(layouts.tars(tmp_path))
    batches = list(data.val_dataloader())
    assert len(batches) == 3
    batch = batches[0]
    assert batch["jpg"].shape == (2, 64, 64, 3) and batch["jpg"].dtype == torch.float32
    assert -1 <= batch["jpg"].min() < batch["jpg"].max() <= 1
    assert batch["txt"] == ["a red circle"] * 2 and batch["json"][0]["similarity"] == 0.3
    assert keys(data.val_dataloader()) == [f"0000{shard}000{k}" for shard in range(2) for k in range(3)]


def test_order(tmp_path):
    data = module(layouts.tars(tmp_path, samples=8), shuffle=4)
    first = keys(data.train_dataloader())
    assert first == keys(data.train_dataloader()) and len(set(first)) == 16
    data.start_at(1, 0)
    second = keys(data.train_dataloader())
    assert second != first and set(second) == set(first)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_processes_divide_the_samples(tmp_path, shards):
    layouts.tars(tmp_path, shards=shards)
    seen = []
    for rank in range(2):
        data = module(tmp_path, shards="*.tar")
        dataset = data.datasets["validation"]
        dataset.rank, dataset.world = rank, 2
        seen += [sample["__key__"] for sample in dataset]
    assert len(seen) == len(set(seen)) == 3 * shards


def test_loading_processes(tmp_path):
    data = module(layouts.tars(tmp_path), num_workers=2)
    assert sorted(keys(data.val_dataloader())) == [f"0000{shard}000{k}" for shard in range(2) for k in range(3)]


@pytest.mark.parametrize(
    "facts, filters",
    [
        ({"original_width": 300}, {"min_size": 512}),
        ({"pwatermark": 0.5}, {"max_pwatermark": 0.45}),
        ({"pwatermark": None}, {"max_pwatermark": 0.45}),
        ({"punsafe": 0.2}, {"p_unsafe_threshold": 0.1}),
        ({}, {"words": ["Circle"]}),
    ],
)
def test_filters(tmp_path, facts, filters):
    layouts.tars(tmp_path, **facts)
    words = filters.pop("words", None)
    if words:
        (tmp_path / "words.yaml").write_text("[circle, triangle]")
        filters["filter_word_list"] = str(tmp_path / "words.yaml")
    assert keys(module(tmp_path, **filters).val_dataloader()) == []
    assert len(keys(module(tmp_path).val_dataloader())) == 6
    assert accepts({"json": {}, "txt": "encircled"}, words=["circle"])


def test_missing_word_list(tmp_path):
    with pytest.raises(FileNotFoundError, match="no filter_word_list data/filters.yaml.*filter_word_list=null"):
        module(layouts.tars(tmp_path), filter_word_list="data/filters.yaml")


def test_damaged_images_are_left_out(tmp_path, caplog):
    layouts.tars(tmp_path, shards=1)
    content = (tmp_path / "00000.tar").read_bytes()
    start = content.index(b"\xff\xd8\xff")
    (tmp_path / "00000.tar").write_bytes(content[: start + 2] + bytes(300) + content[start + 302 :])
    with caplog.at_level(logging.WARNING):
        assert keys(module(tmp_path, "*.tar").val_dataloader()) == ["000000001", "000000002"]
    assert "000000000" in caplog.text and "is left out" in caplog.text


def test_shards(tmp_path):
    layouts.tars(tmp_path, shards=3)
    names = [str(tmp_path / f"0000{k}.tar") for k in range(3)]
    assert expand_shards("{00000..00002}.tar -", str(tmp_path)) == names
    assert expand_shards(["*0.tar", "0000{1,2}.tar"], str(tmp_path)) == names
    assert expand_shards(f"{tmp_path}/*.tar") == names
    with pytest.raises(FileNotFoundError, match="no tar .*00003.tar"):
        expand_shards("{00000..00003}.tar", str(tmp_path))
    for remote in ("pipe:aws s3 cp s3://bucket/{0..9}.tar -", "https://host/0.tar"):
        with pytest.raises(ValueError, match="nothing is downloaded.*tar_base"):
            expand_shards([remote])


# ---- postprocessing ----


@pytest.mark.parametrize("mode", ["512train", "512train-large"])
def test_add_mask(mode):
    np.random.seed(0)
    image = np.ones((48, 64, 3), np.float32)
    samples = [AddMask(mode)({"jpg": image}) for _ in range(30)]
    for sample in samples:
        mask = sample["mask"]
        assert mask.shape == (48, 64, 1) and set(np.unique(mask)) <= {0, 1}
        assert (sample["masked_image"] == 1 - mask).all()
    covered = np.mean([sample["mask"].mean() for sample in samples])
    assert (0.2 < covered < 0.6) if mode == "512train" else (0.4 < covered < 0.9)
    assert all(AddMask(mode, p_drop=1.0)({"jpg": image})["mask"].all() for _ in range(5))
    with pytest.raises(ValueError, match="mode"):
        AddMask("large")


def test_add_lr():
    image = np.linspace(-1, 1, 64 * 64 * 3, dtype=np.float32).reshape(64, 64, 3)
    assert AddLR(4, 16)({"jpg": image})["lr"].shape == (16, 16, 3)
    sample = AddLR(2, 24, initial_size=32, image_key="x")({"x": image})
    assert sample["lr"].shape == (24, 24, 3) and np.abs(sample["lr"]).max() <= 1
    flat = AddLR(4, 16)({"jpg": np.full((64, 64, 3), 0.25, np.float32)})["lr"]
    assert np.allclose(flat, 0.25, atol=1e-5)


def test_add_bw():
    image = np.zeros((4, 4, 3), np.float32)
    image[..., 1] = 1.0
    assert np.allclose(AddBW()({"jpg": image})["lr"], 0.587)


def test_add_midas():
    sample = AddMiDaS("dpt_hybrid")({"jpg": torch.zeros(512, 768, 3)})
    assert sample["midas_in"].shape == (3, 384, 576) and sample["midas_in"].dtype == np.float32
    add = AddMiDaS("dpt_hybrid")
    x = torch.tensor([-1.0, 0.0, 1.0])
    assert add.pt2np(x).tolist() == [0.0, 0.5, 1.0] and torch.equal(add.np2pt(add.pt2np(x)), x)
    with pytest.raises(ValueError, match="dpt_large"):
        AddMiDaS("dpt_large")
