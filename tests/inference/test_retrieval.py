"""Retrieval-augmented diffusion: neighbours against brute force, what a model is shown, what is refused."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldm import inference
from ldm.inference import EmbeddingDatabase, load_database, with_neighbors
from ldm.inference.retrieval import clip_image, embed_images
from ldm.modules.encoders.modules import FrozenClipImageEmbedder
from tests.tiny import RETRIEVAL, write_clip, write_tiny

WIDTH = 24  # of the small model's context
RNG = np.random.default_rng(0)


def embeddings(count: int, dtype=np.float32, width: int = WIDTH) -> np.ndarray:
    return (RNG.standard_normal((count, width)) * RNG.uniform(0.1, 9, (count, 1))).astype(dtype)


def by_brute_force(queries, database, k) -> np.ndarray:
    cosines = np.array([[q @ e / np.linalg.norm(q) / np.linalg.norm(e) for e in database] for q in queries])
    return np.argsort(-cosines, axis=1)[:, :k], -np.sort(-cosines, axis=1)[:, :k]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_tiny(tmp_path_factory.mktemp("model"), **RETRIEVAL)
    return inference.load_model(ckpt=path, device="cpu")


# ---- neighbours ----


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@pytest.mark.parametrize("k", [1, 9, 60])
def test_neighbours_are_those_of_brute_force(dtype, chunk, k):
    parts = [embeddings(count, dtype) for count in (40, 3, 17)]
    queries = embeddings(4)
    cosines, indices = EmbeddingDatabase(parts).nearest(torch.from_numpy(queries), k, chunk)
    expected, values = by_brute_force(queries, np.concatenate(parts).astype(np.float64), k)
    assert indices.tolist() == expected.tolist()
    np.testing.assert_allclose(cosines, values, atol=1e-6)


def test_embeddings_come_from_their_parts_at_length_one():
    parts = [embeddings(count, np.float16) for count in (5, 1, 4)]
    expected = np.concatenate(parts).astype(np.float64)[[9, 0, 5, 4, 6]]
    found = EmbeddingDatabase(parts).embeddings([9, 0, 5, 4, 6])
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


def test_a_context_is_the_query_and_then_its_neighbours(caplog):
    caplog.set_level(logging.INFO, logger="ldm")
    data = embeddings(30)
    database = EmbeddingDatabase([data], [f"{i}.png" for i in range(30)])
    queries = F.normalize(torch.from_numpy(data[[3, 11]]) + 0.01, dim=-1)
    context = with_neighbors(queries[:, None].repeat(1, 2, 1), database, 5)
    assert context.shape == (2, 2 + 5, WIDTH)
    assert torch.equal(context[:, 0], queries) and torch.equal(context[:, 1], queries)
    torch.testing.assert_close(context[:, 2], database.embeddings([3, 11]))
    similarity = (context[:, 2:] @ queries[:, :, None]).squeeze(-1)
    assert (similarity.diff(dim=1) <= 0).all()
    assert re.search(r"Neighbors: 3\.png, \d+\.png, \d+\.png, \.\.\.", caplog.text)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (embeddings(1), 11, "the database has 10 embeddings: ask for 1 to 10 neighbours, not 11"),
        (embeddings(1, width=5), 2, "embeddings have 24 numbers, the query has 5"),
    ],
)
def test_queries_that_do_not_fit_are_refused(queries, k, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingDatabase([embeddings(10)]).nearest(torch.from_numpy(queries), k)


def test_embeddings_that_are_not_finite_are_named():
    data = embeddings(10)
    data[7, 3] = np.nan
    with pytest.raises(ValueError, match="embeddings 6 to 8 hold NaN"):
        EmbeddingDatabase([data]).nearest(torch.from_numpy(embeddings(1)), 2, chunk=3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([np.zeros((3, 4, 5), np.float32)], r"floats of shape \(N, D\), not float32 of shape \(3, 4, 5\)"),
        ([np.zeros((3, 4), np.int64)], "not int64"),
        ([np.zeros((0, 4), np.float32)], "it holds no embeddings"),
        ([embeddings(2), embeddings(2, width=7)], "must be of one width, not of 7, 24"),
    ],
)
def test_databases_of_other_shapes_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingDatabase(parts)


# ---- files ----


def test_files_and_folders_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = embeddings(9)
    folder = tmp_path / "data/rdm/retrieval_databases/artbench-realism"
    folder.mkdir(parents=True)
    np.savez(folder / "0.npz", embedding=data[:4], img_id=np.arange(4))  # as the public ones call them
    np.save(folder / "1.npy", data[4:])
    np.savez("mine.npz", embeddings=data, paths=np.array(list("abcdefghi")))
    for place in ("artbench-realism", str(folder), "mine.npz"):
        database = load_database(place)
        assert np.array_equal(np.concatenate(database.parts), data)
        assert database.name(4) == ("e" if place == "mine.npz" else "no. 4")
    assert isinstance(load_database(str(folder / "1.npy")).parts[0], np.memmap)


def test_a_database_is_written_once(tmp_path):
    data = embeddings(3, np.float16)
    inference.save_database(tmp_path / "mine.npz", data, ["a.png", "sub/b.png", "ü.png"])
    database = load_database(str(tmp_path / "mine.npz"))
    assert np.array_equal(database.parts[0], data) and database.name(2) == "ü.png"
    with pytest.raises(FileExistsError, match="exists already"):
        inference.save_database(tmp_path / "mine.npz", data, ["a", "b", "c"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.npz"]


def test_missing_and_other_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for place in ("openimages", "no.npz", "empty"):
        with pytest.raises(FileNotFoundError, match=f"no database {place}, .*retrieval_databases/.*embed_images.py"):
            load_database(place)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    np.savez("other.npz", latents=np.zeros(3))
    np.savez("names.npz", embeddings=embeddings(3), paths=np.array(["a"]))
    np.savez("flat.npz", embeddings=np.zeros(3))
    np.savez("objects.npz", embeddings=np.array([{}]))
    for name, message in {
        "text": "no file of embeddings: it holds no plain arrays$",
        "cut": "no file of embeddings",
        "other": "it holds latents, but no embeddings",
        "names": "3 embeddings and 1 names",
        "flat": r"database flat.npz: .*not float64 of shape \(3,\)",
        "objects": "no file of embeddings",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_database(f"{name}.npz")


def test_a_folders_pictures(tmp_path, caplog):
    embedder = FrozenClipImageEmbedder(str(write_clip(tmp_path / "clip", WIDTH)))
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name, colour in {"b.png": "red", "a.png": "blue", "sub/c.jpg": "green"}.items():
        Image.new("RGB", (40, 30), colour).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    found, names = inference.embed_folder(embedder, folder, batch_size=2)
    assert names == ["a.png", "b.png", "sub/c.jpg"] and found.dtype == np.float16 and found.shape == (3, WIDTH)
    assert "broken.png is not an image" in caplog.text
    alone = embed_images(embedder, [clip_image(folder / "b.png", 28)])
    np.testing.assert_allclose(found[1], alone[0], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    for name in names:
        (folder / name).unlink()
    with pytest.raises(ValueError, match="none of the 1 images"):
        inference.embed_folder(embedder, folder)


# ---- drawing ----


def contexts(count: int, neighbours: int = 3) -> torch.Tensor:
    return F.normalize(torch.from_numpy(np.random.default_rng(1).standard_normal((count, neighbours, WIDTH))), dim=-1)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_guidance_leads_away_from_zeros(model, monkeypatch):
    seen = []
    apply_model = model.apply_model
    monkeypatch.setattr(model, "apply_model", lambda x, t, c: seen.append(c) or apply_model(x, t, c))
    context = contexts(2).float()
    inference.knn2img(model, context, steps=1, seed=1, progress=False)  # the config's own scale is none: 5
    assert torch.equal(seen[0], torch.cat([torch.zeros_like(context), context]))
    inference.knn2img(model, context, steps=1, seed=1, scale=1.0, progress=False)
    assert torch.equal(seen[-1], context)


def test_a_seed_gives_the_same_pictures_and_neighbours_change_them(model):
    draw = {"steps": 2, "progress": False, "width": 48}
    first = inference.knn2img(model, contexts(2).float(), seed=3, **draw)
    assert [image.size for image in first] == [(48, 32)] * 2
    assert np.array_equal(pixels(first), pixels(inference.knn2img(model, contexts(2).float(), seed=3, **draw)))
    assert not np.array_equal(pixels(first), pixels(inference.knn2img(model, contexts(2).float(), seed=4, **draw)))
    alone = inference.knn2img(model, contexts(2).float()[:, :1], seed=3, **draw)
    assert not np.array_equal(pixels(first), pixels(alone))


@pytest.mark.parametrize("context", [torch.zeros(2, 3, 768), torch.zeros(2, WIDTH)])
def test_embeddings_of_another_clip_are_refused(model, context):
    with pytest.raises(
        ValueError, match=rf"takes embeddings \(B, n, {WIDTH}\), not {re.escape(str(tuple(context.shape)))}"
    ):
        inference.knn2img(model, context)


def test_other_models_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"on text, not on embeddings of text and neighbors: use .*txt2img"):
        inference.knn2img(inference.load_model(ckpt=write_tiny(tmp_path), device="cpu"), contexts(1).float())
    with pytest.raises(ValueError, match=r"on embeddings of text and neighbors, not on text: use .*knn2img"):
        inference.txt2img(model, ["a red circle"])
