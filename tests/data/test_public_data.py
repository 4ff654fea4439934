"""The data sets that public configs name, on tiny folders in their layouts."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from ldm.data import faceshq, imagenet, landscapes, lsun, openimages, simple
from ldm.data.base import CustomTest, CustomTrain, ImagePaths, Txt2ImgIterableBaseDataset
from ldm.data.layouts import Box, LayoutTokens
from ldm.data.loading import DataModuleFromConfig
from ldm.util import get_obj_from_str
from tests.data import public_layouts as layouts

HEIGHT, WIDTH = layouts.HEIGHT, layouts.WIDTH


def is_image(value: np.ndarray, height: int, width: int | None = None) -> bool:
    shape = (height, width or height, 3)
    return value.dtype == np.float32 and value.shape == shape and -1 <= value.min() < value.max() <= 1


# ---- ImageNet ----


def test_imagenet(tmp_path):
    folder = layouts.imagenet(tmp_path)
    data = imagenet.ImageNetTrain(data_root=str(tmp_path), config={"size": 32})
    assert len(data) == 4 and data.random_crop
    item = data[2]
    assert is_image(item.pop("image"), 32)
    assert item == {
        "file_path_": str(folder / "data/n01443537/n01443537_0.JPEG"),
        "relpath": "n01443537/n01443537_0.JPEG",
        "synsets": "n01443537",
        "class_label": 1,
        "human_label": "goldfish, Carassius auratus",
    }
    listed = (folder / "filelist.txt").read_text().splitlines()
    assert len(listed) == 5 and listed == sorted(listed) and (folder / ".ready").exists()
    assert data.human2integer_dict == {name: k for k, name in enumerate(layouts.SYNSETS.values())}


def test_imagenet_by_a_filelist(tmp_path):
    folder = layouts.imagenet(tmp_path)
    (folder / "filelist.txt").write_text("n01443537/n01443537_1.JPEG\n")
    data = imagenet.ImageNetTrain(root=str(folder), process_images=False)
    assert [item["relpath"] for item in (data[0],)] == ["n01443537/n01443537_1.JPEG"] and len(data) == 1
    assert data[0]["class_label"] == 0 and "image" not in data[0]


def test_imagenet_labels_and_classes(tmp_path):
    folder = str(layouts.imagenet(tmp_path))
    (tmp_path / "ILSVRC2012_train" / "index_synset.yaml").write_text("7: n01440764\n5: n01443537\n6: n01484850\n")
    assert imagenet.synset2idx(f"{folder}/index_synset.yaml") == {"n01440764": 7, "n01443537": 5, "n01484850": 6}
    data = imagenet.ImageNetTrain(root=folder, config={"size": 32, "keep_orig_class_label": True})
    assert data.class_labels == [7, 7, 5, 5]
    for chosen in ("5", "5-6", "n01443537"):
        only = imagenet.ImageNetTrain(root=folder, config={"sub_indices": chosen})
        assert only.synsets == ["n01443537"] * 2 and only.class_labels == [0, 0]
    with pytest.raises(ValueError, match="'5-9' is no class of"):
        imagenet.ImageNetTrain(root=folder, config={"sub_indices": "5-9"})


def test_imagenet_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layouts.imagenet(tmp_path / "autoencoders/data", "validation")
    data = imagenet.ImageNetValidation(config={"size": 32})
    assert len(data) == 4 and not data.random_crop
    assert (data[0]["image"] == data[0]["image"]).all()
    with pytest.raises(FileNotFoundError, match="ILSVRC2012_train/data.*put the images of ILSVRC2012_train"):
        imagenet.ImageNetTrain()


def test_imagenet_without_its_lists(tmp_path, caplog):
    folder = layouts.imagenet(tmp_path)
    for name in ("synset_human.txt", "index_synset.yaml", "imagenet1000_clsidx_to_labels.txt"):
        (folder / name).unlink()
    data = imagenet.ImageNetTrain(root=str(folder), config={"size": 32})
    assert data[0]["human_label"] == "n01440764" and "synset_human.txt" in caplog.text
    with pytest.raises(FileNotFoundError, match="index_synset.yaml"):
        imagenet.ImageNetTrain(root=str(folder), config={"keep_orig_class_label": True})


def test_a_subclass_takes_effect_in_a_loader(tmp_path):
    folder = layouts.imagenet(tmp_path)
    params = {"root": str(folder), "config": {"size": 32}}
    module = DataModuleFromConfig(2, {"target": "tests.data.test_public_data.Captioned", "params": params})
    module.num_workers = 0
    module.setup()
    assert next(iter(module.train_dataloader()))["caption"][0].startswith("a photo of")


class Captioned(imagenet.ImageNetTrain):
    def __getitem__(self, i):
        item = super().__getitem__(i)
        return {**item, "caption": f"a photo of {item['human_label']}"}


DEGRADATIONS = [
    *("bsrgan", "bsrgan_light"),
    *(f"cv_{name}" for name in ("nearest", "bilinear", "bicubic", "area", "lanczos")),
    *(f"pil_{name}" for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")),
]


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_super_resolution(tmp_path, name):
    folder = str(layouts.imagenet(tmp_path))
    data = imagenet.ImageNetSRTrain(size=32, degradation=name, root=folder)
    item = data[0]
    assert len(data) == 4 and is_image(item["image"], 32) and is_image(item["LR_image"], 8)
    assert item["class_label"] == 0
    small = item["image"].reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(small - item["LR_image"]).mean() < 0.25


def test_super_resolution_crops(tmp_path):
    folder = str(layouts.imagenet(tmp_path, "validation"))
    same = {"degradation": "pil_nearest", "root": folder, "min_crop_f": 1.0}
    data = imagenet.ImageNetSRValidation(size=HEIGHT, downscale_f=2, random_crop=False, **same)
    assert data.LR_size == HEIGHT // 2
    from ldm.images import load_image

    pixels = np.asarray(load_image(data[0]["file_path_"]))[:, 4 : 4 + HEIGHT]  # the middle of 80 x 72
    assert np.allclose(data[0]["image"], pixels / 127.5 - 1, atol=1e-6)


def test_super_resolution_indices(tmp_path, monkeypatch):
    folder = str(layouts.imagenet(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    place = Path("data/imagenet_train_hr_indices.p")
    place.write_bytes(pickle.dumps([3, 1]))
    data = imagenet.ImageNetSRTrain(size=32, degradation="pil_box", root=folder)
    assert len(data) == 2 and data[0]["relpath"].endswith("n01443537_1.JPEG")
    place.write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(ValueError, match="is not a pickled list.*getcwd"):
        imagenet.ImageNetSRTrain(size=32, degradation="pil_box", root=folder)


def test_super_resolution_mistakes(tmp_path):
    folder = str(layouts.imagenet(tmp_path))
    for wrong in ("pil_cubic", "cv_box", "blur", None):
        with pytest.raises(ValueError, match="is not one of bsrgan"):
            imagenet.ImageNetSRTrain(size=32, degradation=wrong, root=folder)
    with pytest.raises(ValueError, match="size is the side"):
        imagenet.ImageNetSRTrain(degradation="bsrgan", root=folder)


# ---- LSUN, faces, own lists ----

KINDS = [
    ("Churches", "church_outdoor", "churches"),
    ("Bedrooms", "bedrooms", "bedrooms"),
    ("Cats", "cat", "cats"),
]


@pytest.mark.parametrize("name, kind, folder", KINDS)
def test_lsun(tmp_path, monkeypatch, name, kind, folder):
    layouts.lsun(tmp_path / "data/lsun", kind, folder)
    train = get_obj_from_str(f"ldm.data.lsun.LSUN{name}Train")
    validation = get_obj_from_str(f"ldm.data.lsun.LSUN{name}Validation")
    monkeypatch.chdir(tmp_path)
    item = train(size=32)[1]
    assert is_image(item["image"], 32) and item["relative_file_path_"] == "a/1.jpg"
    assert item["file_path_"] == os.path.join("data/lsun", folder, "a/1.jpg")
    monkeypatch.chdir("/")
    data = validation(size=32, root=str(tmp_path / "data/lsun"))
    assert data.flip.p == 0 and (data[0]["image"] == data[0]["image"]).all()
    assert validation(root=str(tmp_path / "data/lsun"))[0]["image"].shape == (HEIGHT, HEIGHT, 3)


def test_lsun_flips_half_of_the_time(tmp_path):
    data = lsun.LSUNChurchesTrain(size=32, root=str(layouts.lsun(tmp_path)))
    np.random.seed(0)
    first = [data[0]["image"][0, 0, 1] < 0 for _ in range(40)]  # green grows to the right
    assert 10 < sum(first) < 30


def test_lsun_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*churches.*put the images of LSUN there"):
        lsun.LSUNChurchesTrain(size=32, root=str(tmp_path))
    (tmp_path / "churches").mkdir()
    with pytest.raises(FileNotFoundError, match="no list of images .*church_outdoor_train.txt"):
        lsun.LSUNChurchesTrain(size=32, root=str(tmp_path))


@pytest.mark.parametrize("home", ["taming.data.faceshq", "ldm.data.faceshq"])
@pytest.mark.parametrize("name, suffix", [("CelebAHQ", ".npy"), ("FFHQ", ".png")])
def test_faces(tmp_path, monkeypatch, home, name, suffix):
    layouts.faces(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for part, number in {"Train": 0, "Validation": 2}.items():
        data = get_obj_from_str(f"{home}.{name}{part}")(size=32)
        assert len(data) == 2 and set(data[0]) == {"image", "file_path_"}
        assert is_image(data[0]["image"], 32) and data[0]["file_path_"].endswith(f"{number}{suffix}")
    assert set(get_obj_from_str(f"{home}.{name}Train")(size=32, keys=["image"])[0]) == {"image"}


def test_both_sets_of_faces(tmp_path):
    root = str(layouts.faces(tmp_path))
    data = faceshq.FacesHQValidation(32, crop_size=16, coord=True, root=root)
    assert [data[k]["class"] for k in range(len(data))] == [0, 0, 1, 1]
    assert is_image(data[0]["image"], 16)
    expected = np.arange(32 * 32, dtype=np.float32).reshape(32, 32, 1) / 32**2
    assert (data[0]["coord"] == expected[8:24, 8:24]).all()
    np.random.seed(0)
    places = {float(faceshq.FacesHQTrain(32, crop_size=16, coord=True, root=root)[0]["coord"][0, 0, 0]) for _ in "1234"}
    assert len(places) > 1


def test_own_lists(tmp_path):
    for number in range(2):
        layouts.save(tmp_path / f"{number}.png", number)
    (tmp_path / "list.txt").write_text("".join(f"{tmp_path}/{number}.png\n" for number in range(2)))
    for item in (CustomTrain(16, f"{tmp_path}/list.txt")[1], CustomTest(16, f"{tmp_path}/list.txt")[1]):
        assert is_image(item["image"], 16) and item["file_path_"].endswith("1.png")
    assert get_obj_from_str("taming.data.custom.CustomTrain") is CustomTrain


def test_image_paths(tmp_path):
    layouts.save(tmp_path / "0.png", 0)
    path = str(tmp_path / "0.png")
    assert is_image(ImagePaths([path])[0]["image"], HEIGHT, WIDTH)
    assert is_image(ImagePaths([path], crop_size=100)[0]["image"], 100)  # enlarged
    resized = ImagePaths([path], size=36)[0]["image"]
    assert is_image(resized, 36)
    assert ImagePaths([path], labels={"caption": ["x"]})[0]["caption"] == "x"


def test_iterable_base():
    class Numbers(Txt2ImgIterableBaseDataset):
        def __iter__(self):
            yield from self.sample_ids

    data = Numbers(3, [4, 5, 6], size=64)
    assert (len(data), data.sample_ids, data.size, list(data)) == (3, [4, 5, 6], 64, [4, 5, 6])
    assert [len(batch) for batch in DataLoader(data, batch_size=2)] == [2, 1]


class Records(Txt2ImgIterableBaseDataset):
    """Numbers, as records of an iterable data set."""

    def __init__(self, length=8):
        super().__init__(length, list(range(length)))

    def __iter__(self):
        for number in self.sample_ids:
            yield {"image": np.full((16, 16, 3), number / 10, np.float32), "number": number}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterable_data_in_a_data_module(num_workers):
    config = {"target": "tests.data.test_public_data.Records"}
    module = DataModuleFromConfig(2, config, num_workers=num_workers)
    module.setup()
    module.check_batch_size(1)
    seen = [number for batch in module.train_dataloader() for number in batch["number"].tolist()]
    assert sorted(seen) == list(range(8))


def test_processes_divide_iterable_data():
    data = Records()
    parts = []
    for part in range(3):
        data.select_part(part, 3)
        parts += data.sample_ids
    assert parts == list(range(8))


# ---- Open Images, landscapes ----


def test_full_openimages(tmp_path):
    root = str(layouts.openimages(tmp_path))
    train = openimages.FullOpenImagesTrain(size=48, crop_size=32, root=root)
    assert len(train) == 2 and is_image(train[0]["image"], 32) and train[0]["file_path_"].endswith("t0.jpg")
    assert is_image(openimages.FullOpenImagesTrain(crop_size=32, root=root)[0]["image"], 32)
    validation = openimages.FullOpenImagesValidation(size=48, crop_size=32, root=root)
    assert (validation[1]["image"] == validation[1]["image"]).all()


def test_openimages_boxes(tmp_path):
    data = openimages.OpenImagesBBoxValidation(size=32, root=str(layouts.openimages(tmp_path)))
    item = data[0]
    assert is_image(item["image"], 32) and item["coordinates_bbox"].shape == (92,)
    expected = [Box(0, 0.0, 0.0, 0.5, 1.0), Box(1, 0.5, 0.5, 0.25, 0.25)]  # the largest first
    crop = (4 / WIDTH, 0.0, HEIGHT / WIDTH, 1.0)
    assert item["coordinates_bbox"].tolist() == LayoutTokens().encode(expected, crop)
    (tmp_path / "class-descriptions-boxable.csv").unlink()
    with pytest.raises(FileNotFoundError, match="class-descriptions-boxable.csv: put Open Images' file"):
        openimages.OpenImagesBBoxValidation(root=str(tmp_path))


def test_openimages_super_resolution(tmp_path):
    root = str(layouts.openimages(tmp_path))
    data = openimages.SuperresOpenImagesAdvancedTrain(size=32, degradation="bsrgan_light", root=root)
    assert len(data) == 2 and is_image(data[0]["image"], 32) and is_image(data[0]["LR_image"], 8)


def test_landscapes(tmp_path):
    root = str(layouts.landscapes(tmp_path))
    data = landscapes.RFWValidation(size=HEIGHT, crop_size=64, segmentation_to_float32=True, root=root)
    item = data[0]
    assert is_image(item["image"], 64) and item["segmentation"].shape == (64, 64, 182)
    assert item["segmentation"].dtype == np.float32 and (item["segmentation"].sum(-1) == 1).all()
    assert item["segmentation"].argmax(-1)[0].tolist() == list(range(108, 172))
    np.random.seed(0)
    train = landscapes.RFWTrain(size=HEIGHT, crop_size=32, root=root)[0]
    column = train["segmentation"].argmax(-1)[0, 0] - 100
    assert train["segmentation"].dtype == bool
    green = (train["image"][0, 0, 1] + 1) * 127.5  # 3 for each column of the uncropped image
    assert abs(green - 3 * column) < 9
    (tmp_path / "segmentation/1.png").unlink()
    with pytest.raises(FileNotFoundError, match="no segmentation map of 1.jpg"):
        landscapes.RFWTrain(size=64, root=root)


# ---- captions ----


def test_folder_data(tmp_path):
    for number in range(2):
        layouts.save(tmp_path / f"{number}.jpg", number)
    plain = simple.FolderData(str(tmp_path), default_caption="x", return_paths=True)
    assert len(plain) == 2 and plain[0]["txt"] == "x" and plain[0]["path"].endswith("0.jpg")
    assert is_image(plain[0]["image"], HEIGHT, WIDTH)
    transforms = [
        {"target": "torchvision.transforms.Resize", "params": {"size": 40, "interpolation": 3}},
        {"target": "torchvision.transforms.RandomCrop", "params": {"size": 32}},
        {"target": "torchvision.transforms.RandomHorizontalFlip"},
    ]
    (tmp_path / "captions.jsonl").write_text('{"file_name": "1.jpg", "text": "one"}\n')
    listed = simple.FolderData(str(tmp_path), "captions.jsonl", transforms, postprocess=dict)
    assert len(listed) == 1 and listed[0]["txt"] == "one" and is_image(listed[0]["image"], 32)
    (tmp_path / "captions.json").write_text('{"0.jpg": "zero", "1.jpg": "one"}')
    assert simple.FolderData(str(tmp_path), "captions.json")[0]["txt"] == "zero"


def test_folder_data_mistakes(tmp_path):
    layouts.save(tmp_path / "0.jpg", 0)
    with pytest.raises(FileNotFoundError, match="no caption_file"):
        simple.FolderData(str(tmp_path), "captions.json")
    (tmp_path / "captions.json").write_text('[{"name": "0.jpg"}]')
    with pytest.raises(ValueError, match="must hold entries such as"):
        simple.FolderData(str(tmp_path), "captions.json")
    with pytest.raises(ValueError, match="no images .*png"):
        simple.FolderData(str(tmp_path), ext="png")
    with pytest.raises(FileNotFoundError, match="no folder"):
        simple.FolderData(str(tmp_path / "none"))


def test_hugging_face_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        simple.hf_dataset("lambdalabs/pokemon-blip-captions")
    datasets = pytest.importorskip("datasets", reason="hf_dataset reads the files of the package datasets")
    from PIL import Image

    rows = {"image": [Image.fromarray(layouts.pixels(0))], "text": ["a red circle"]}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk(str(tmp_path / "saved"))
    item = simple.hf_dataset(str(tmp_path / "saved"))[0]
    assert is_image(item["image"], HEIGHT, WIDTH) and item["txt"] == "a red circle"


def test_previews(tmp_path, monkeypatch):
    layouts.previews(tmp_path / "data/previews")
    monkeypatch.chdir(tmp_path)
    data = get_obj_from_str("ldm.data.previews.pytorch_dataset.PreviewsTrain")(size=32)
    assert is_image(data[0]["image"], 32) and data[0]["caption"] == "a red circle"
