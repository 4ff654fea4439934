"""The training of the bundled model, all stages of it, on a handful of pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ldm.inference import load_model, txt2img

ROOT = Path(__file__).resolve().parent.parent.parent
FEW = {
    "pictures": 12,
    "first-stage-steps": 3,
    "first-stage-batch": 2,
    "diffusion-steps": 3,
    "diffusion-batch": 2,
    "eval-prompts": 3,
}


def test_one_command_trains_saves_and_scores(tmp_path):
    flags = [text for name, value in FEW.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "scripts/train_shapes.py"), "--out", str(tmp_path / "run"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert set(results) == {"first stage", "plain", "held-out pairs", "one object", "two objects"}
    model = load_model(ckpt=tmp_path / "run/model.ckpt", device="cpu")
    assert txt2img(model, ["a red circle"], steps=2, progress=False)[0].size == (64, 64)
