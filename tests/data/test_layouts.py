"""Layouts as tokens, against ids computed by hand, and the files that they come from."""

from __future__ import annotations

import json

import pytest
import torch

from ldm.data.layouts import Box, LayoutTokens, read_layouts

PUBLISHED = LayoutTokens()  # 8192 ids, 92 tokens: cells of 90 x 90, 30 objects
NONE = 8191


def test_the_published_tokens():
    """0.1 * 89 = 8.9 is column 9, 0.2 * 89 = 17.8 row 18: cell 18 * 90 + 9. The other corner: 53.4 and 71.2."""
    tokens = PUBLISHED.encode([Box(3, 0.1, 0.2, 0.5, 0.6), Box(600, 0, 0, 1, 1)])
    assert tokens[:6] == [3, 18 * 90 + 9, 71 * 90 + 53, 600, 0, 8099]
    assert tokens[6:90] == [NONE] * 84 and tokens[90:] == [0, 8099]  # the whole picture
    assert PUBLISHED.encode([], crop=(0.5, 0.0, 0.5, 0.25))[88:] == [NONE, NONE, 44, 22 * 90 + 89]  # 44.5 to even


def test_other_vocabularies():
    tokens = LayoutTokens(vocab_size=101, length=8)  # 10 x 10 cells, two objects
    assert tokens.tensor([[Box(7, 0.25, 0.5, 0.5, 0.5)], []]).tolist() == [
        [7, 42, 97, 100, 100, 100, 0, 99],  # 2.25, 4.5 to even; 6.75, 9
        [100] * 6 + [0, 99],
    ]
    assert tokens.tensor([[]]).dtype == torch.long
    with pytest.raises(ValueError, match="2 for the crop, not 93"):
        LayoutTokens(length=93)


def test_invalid_layouts_are_refused():
    with pytest.raises(ValueError, match="at most 30 objects, not 31"):
        PUBLISHED.encode([Box(0, 0, 0, 1, 1)] * 31)
    for label in (-1, NONE):
        with pytest.raises(ValueError, match=f"0 to 8190, not {label}"):
            PUBLISHED.encode([Box(label, 0, 0, 1, 1)])
    for box in ((0.5, 0, 0.6, 1), (-0.1, 0, 0.5, 0.5), (0, 0, 0, 1), (10, 20, 100, 50), (0, 0, float("nan"), 1)):
        with pytest.raises(ValueError, match="not inside of the image: it must be"):
            PUBLISHED.encode([Box(0, *box)])
    assert PUBLISHED.encode([Box(0, 0.7, 0.7, 0.3 + 1e-9, 0.3)])[2] == 8099  # a rounding error is none


def written(tmp_path, content: object) -> str:
    path = tmp_path / "layout.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


CAT = {"class": "cat", "box": [0.1, 0.2, 0.3, 0.4]}
NUMBER = {"class": 2, "box": [0, 0, 1, 1]}


def test_files(tmp_path):
    (tmp_path / "names.txt").write_text("dog\ncat\nfish\n")
    box, whole = Box(1, 0.1, 0.2, 0.3, 0.4), Box(2, 0, 0, 1, 1)
    assert read_layouts(written(tmp_path, [CAT, NUMBER]), tmp_path / "names.txt") == [[box, whole]]
    assert read_layouts(written(tmp_path, [[NUMBER], [], [NUMBER]])) == [[whole], [], [whole]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is not JSON"),
        ([], "has no layout: it must be a list such as"),
        ({"class": 1}, "has no layout"),
        ([CAT], "has the class 'cat': pass the list of names with --categories"),
        ([{"class": 1}], r'"class": 1} is no object of a layout, such as {"class"'),
        ([{"class": 1, "box": [0, 0, 1]}], "is no object of a layout"),
        ([{"class": 1.5, "box": [0, 0, 1, 1]}], "1.5 is neither an integer nor a name"),
        ([[NUMBER], NUMBER], "is no object of a layout"),
        ([{"class": 1, "box": "0011"}], "is no object of a layout"),
        ([{"class": 1, "box": {"0": 0, "1": 0, "2": 1, "3": 1}}], "is no object of a layout"),
        ([{"class": 1, "box": [0, float("nan"), 1, 1]}], "is no object of a layout"),
        ("[" * 5000, "is not JSON"),
    ],
)
def test_files_with_other_content_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_layouts(written(tmp_path, content))


def test_names_that_are_unknown(tmp_path):
    (tmp_path / "names.txt").write_text("dog\n\nfish\n")
    with pytest.raises(ValueError, match="'cat', which is not among the 2 categories"):
        read_layouts(written(tmp_path, [CAT]), tmp_path / "names.txt")
    fish = {"class": "fish", "box": [0, 0, 1, 1]}
    assert read_layouts(written(tmp_path, [fish]), tmp_path / "names.txt")[0][0].label == 2  # lines are numbers
    with pytest.raises(FileNotFoundError):
        read_layouts(tmp_path / "not-there.json")
