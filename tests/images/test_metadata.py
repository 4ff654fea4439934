"""ldm/images/writing.py: metadata that other tools read."""

from __future__ import annotations

import json

from ldm import images


def test_parameters_text_is_what_other_tools_read():
    settings = {
        "prompt": "a cat, sitting",
        "negative_prompt": "dogs",
        "steps": 20,
        "sampler": "dpm_solver",
        "scale": 7.5,
        "seed": 42,
        "size": "512x512",
        "model": "cats: v1, pruned",
        "strength": 0.75,
        "index": 0,
        "version": "ldm 1.0",
    }
    assert images.parameters_text(settings) == (
        "a cat, sitting\n"
        "Negative prompt: dogs\n"
        'Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 42, Size: 512x512, Model: "cats: v1, pruned", '
        "Denoising strength: 0.75, Image index: 0, Version: ldm 1.0"
    )


def test_parameters_text_leaves_out_what_is_not_there():
    settings = {"prompt": "", "negative_prompt": "", "steps": 5, "sampler": "ddim", "eta": 0.0, "seed": 0}
    assert images.parameters_text(settings) == "\nSteps: 5, Sampler: DDIM, Eta: 0, Seed: 0"


def test_png_metadata_holds_everything_as_json():
    settings = {"prompt": "猫", "steps": 5, "init_image": "photo.jpg"}
    metadata = images.png_metadata(settings)
    assert json.loads(metadata["ldm"]) == settings
    assert metadata["parameters"] == "猫\nSteps: 5"
