"""Prompts from the command line and from files: options of their own, matrices, batches; mistakes in one sentence."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ldm import cli
from ldm.inference import PromptOptions


def parse(*argv: str):
    options = cli.sampling_parser("test", scale=7.5, outdir="out", n_iter=1, n_samples=2)
    return cli.parse(options, [str(arg) for arg in argv])


def sampled(*argv: str) -> list[tuple[list[str], dict]]:
    """The prompts and options of every batch."""
    return [(batch.prompts, batch.overrides("not this")) for batch in cli.batches(parse(*argv))]


def jsonl(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_plain_prompts_have_no_options(tmp_path):
    assert sampled("--prompt", "{a|b}", "--n_iter", 2) == [(["{a|b}"] * 2, {})] * 2
    file = tmp_path / "p.txt"
    file.write_text('a --seed 3\n{"prompt": "b"}\nc')
    expected = [(["a --seed 3", '{"prompt": "b"}'], {}), (["c"], {})]
    assert sampled("--from-file", file, "--n_iter", 2) == expected * 2
    assert all(batch.image_settings == [{}] * len(batch.prompts) for batch in cli.batches(parse("--from-file", file)))


def test_lines_with_options_are_batched_with_their_like(tmp_path):
    file = jsonl(
        tmp_path,
        '{"prompt": "a"}',
        '{"prompt": "b", "negative_prompt": "n"}',
        "",
        '{"prompt": "c", "steps": 9}',
        '{"prompt": "d", "steps": 9, "scale": 2}',
        '{"prompt": "e", "steps": 9, "scale": 2.0}',
        '{"prompt": "f"}',
    )
    assert sampled("--from-file", file) == [
        (["a", "b"], {"negative_prompt": ["not this", "n"]}),
        (["c"], {"steps": 9}),
        (["d", "e"], {"steps": 9, "scale": 2.0}),
        (["f"], {}),
    ]
    first, second, *_ = cli.batches(parse("--from-file", file))
    assert first.image_settings == [{}, {"negative_prompt": "n"}] and second.image_settings == [{"steps": 9}]


def test_a_line_drawn_again_counts_on_from_its_seed(tmp_path):
    file = jsonl(tmp_path, '{"prompt": "a", "seed": 5}', '{"prompt": "b"}', '{"prompt": "c", "seed": 4294967295}')
    batches = sampled("--from-file", file, "--repeat", 2, "--n_iter", 2)
    assert batches == [
        (["a", "a"], {"seed": [5, 6]}),
        (["b", "b"], {}),
        (["c", "c"], {"seed": [4294967295, 0]}),
        (["a", "a"], {"seed": [7, 8]}),
        (["b", "b"], {}),
        (["c", "c"], {"seed": [1, 2]}),
    ]
    alone = {"seed_mode": "image", "batch_size": None, "index": None}
    assert cli.batches(parse("--from-file", file))[0].image_settings == [{"seed": 5, **alone}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"line 2 is not JSON: Expecting ',' delimiter"),
        ('"a"', 'line 2 must be like {"prompt": "a cat", "seed": 1}, not "a"'),
        ('{"seed": 1}', 'must be like {"prompt"'),
        ('{"prompt": 3}', "line 2: prompt: 3 is not a text"),
        ('{"prompt": "a", "negative_prompt": null}', "negative_prompt: null is not a text"),
        ('{"prompt": "a", "step": 9}', "no option 'step', only prompt, negative_prompt, seed, steps, scale"),
        ('{"prompt": "a", "steps": 0}', "steps: must be an integer from 1 to 1000, not '0'"),
        ('{"prompt": "a", "steps": true}', "steps: must be an integer"),
        ('{"prompt": "a", "seed": 1.5}', "seed: must be an integer from 0 to 4294967295, not '1.5'"),
        ('{"prompt": "a", "scale": NaN}', "scale: must be a finite number, not 'NaN'"),
        ('{"prompt": "a", "scale": "5"}', "must be a finite number"),
        ('{"prompt": "caf\\udce9"}', "is not valid text"),
        ('{"prompt": "a", "negative_prompt": "caf\\udce9"}', "is not valid text"),
    ],
)
def test_mistakes_in_lines(tmp_path, line, message):
    file = jsonl(tmp_path, '{"prompt": "fine"}', line)
    with pytest.raises(ValueError) as error:
        cli.batches(parse("--from-file", file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_scripts_without_options_of_lines_say_so(tmp_path):
    file = jsonl(tmp_path, '{"prompt": "a"}', '{"prompt": "b"}')
    assert cli.prompt_batches(parse("--from-file", file, "--n_iter", 3)) == [["a", "b"]]
    file = jsonl(tmp_path, '{"prompt": "a", "seed": 1}')
    with pytest.raises(ValueError, match="this script takes only prompts"):
        cli.prompt_batches(parse("--from-file", file))


# ---- matrices ----


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", ["a cat"]),
        ("a {red|blue} cat", ["a red cat", "a blue cat"]),
        ("{a|b}{1|2|3}", ["a1", "a2", "a3", "b1", "b2", "b3"]),
        ("a {large |}cat", ["a large cat", "a cat"]),
        ("{a} {b|c", ["{a} {b|c"]),  # no groups
        ("{x {a|b}}", ["{x a}", "{x b}"]),
        ("({red|blue}:1.2)", ["(red:1.2)", "(blue:1.2)"]),
    ],
)
def test_combinations(prompt, expected):
    assert cli.combinations(prompt) == expected


def test_a_matrix_is_drawn_in_order_and_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = sampled("--prompt", "{a|b|c}", "--matrix", "--repeat", 2, "--n_samples", 4, "--n_iter", 2)
    assert found == [(["a", "a", "b", "b"], {}), (["c", "c"], {})] * 2
    assert "--matrix makes 3 prompts: 12 images in 4 batches" in caplog.text
    file = jsonl(tmp_path, '{"prompt": "{a|b} {c|d}", "seed": 1, "scale": 3}', '{"prompt": "e"}')
    assert sampled("--from-file", file, "--matrix", "--n_samples", 3) == [
        (["a c", "a d", "b c"], {"seed": [1, 1, 1], "scale": 3.0}),
        (["b d"], {"seed": [1], "scale": 3.0}),
        (["e"], {}),
    ]


def test_a_matrix_without_end_is_refused():
    with pytest.raises(ValueError, match="makes 1048576 prompts of"):
        cli.batches(parse("--prompt", "{a|b}" * 20, "--matrix"))


# ---- prompt options ----


def test_prompt_options_are_off():
    assert cli.sampling_options(parse()).prompt_options == PromptOptions()
    everything = cli.sampling_options(parse("--emphasis", "--long-prompt", "--clip_skip", 2)).prompt_options
    assert everything == PromptOptions(emphasis=True, long_prompt=True, clip_skip=2)
