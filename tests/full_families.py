"""Runs the script of every family on a full-size model with deterministic weights; prints the rows of README's table.

python -m tests.full_families FOLDER [NAME ...]

By hand, for it takes tens of minutes, and 12 GB of memory. FOLDER holds one filled checkpoint at a time and the
pictures. Weights are noise, so the pictures are too: what is shown is that the path runs, in what time and memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm.checkpoint import build_on_meta, save_checkpoint
from ldm.inference import read_config
from tests.reference.fill import SKIP, values

ROOT = Path(__file__).resolve().parents[1]
SD = "configs/stable-diffusion/"


@dataclass(frozen=True)
class Case:
    """A public config, the script that draws with it, and what the run does in words."""

    config: str
    script: str
    options: str
    does: str


CASES = {
    "kl-f32": Case("models/first_stage_models/kl-f32/config.yaml", "reconstruct", "{photo}", "512x512"),
    "vq-f16": Case("models/first_stage_models/vq-f16/config.yaml", "reconstruct", "{photo}", "512x512"),
    "celeba256": Case(
        "models/ldm/celeba256/config.yaml", "sample_diffusion", "-r {ckpt} -l {out} -n 1 -c 2", "256x256, 2 steps"
    ),
    "lsun_churches256": Case(
        "models/ldm/lsun_churches256/config.yaml",
        "sample_diffusion",
        "-r {ckpt} -l {out} -n 1 -c 2",
        "256x256, 2 steps",
    ),
    "cin256-v2": Case(
        "configs/latent-diffusion/cin256-v2.yaml",
        "sample_diffusion",
        "-r {ckpt} -l {out} -n 1 -c 2 --classes 1 --scale 3",
        "256x256, 2 steps, guided",
    ),
    "semantic_synthesis256": Case(
        "models/ldm/semantic_synthesis256/config.yaml",
        "sample_diffusion",
        "-r {ckpt} -l {out} -n 1 -c 2 --segmentation {segmentation}",
        "256x256, 2 steps",
    ),
    "layout2img-openimages256": Case(
        "models/ldm/layout2img-openimages256/config.yaml",
        "sample_diffusion",
        "-r {ckpt} -l {out} -n 1 -c 2 --layout {layout}",
        "256x256, 2 steps",
    ),
    "inpainting_big": Case(
        "models/ldm/inpainting_big/config.yaml",
        "inpaint",
        "--ckpt {ckpt} --indir {pairs} --outdir {out} --steps 2",
        "512x512, 2 steps",
    ),
    "bsr_sr": Case(
        "models/ldm/bsr_sr/config.yaml",
        "upscale",
        "--ckpt {ckpt} --init-img {small} --outdir {out} --steps 2",
        "128 to 512, 2 steps",
    ),
    "txt2img-1p4B": Case(
        "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
        "txt2img",
        "--ckpt {ckpt} --outdir {out} --n_samples 1 --n_iter 1 --steps 2 --scale 5",
        "256x256, 2 steps, guided",
    ),
    "text2img256": Case(
        "models/ldm/text2img256/config.yaml",
        "txt2img",
        "--ckpt {ckpt} --outdir {out} --n_samples 1 --n_iter 1 --steps 2 --scale 5",
        "256x256, 2 steps, guided",
    ),
    "rdm768x768": Case(
        "configs/retrieval-augmented-diffusion/768x768.yaml",
        "knn2img",
        "--ckpt {ckpt} --outdir {out} --n_samples 1 --steps 2 --clip {clip}",
        "768x768, 2 steps, guided",
    ),
    "v1-inpainting": Case(
        SD + "v1-inpainting-inference.yaml",
        "inpaint",
        "--ckpt {ckpt} --outdir {out} --n_samples 1 --steps 2 --init-img {photo} --mask {mask}",
        "512x512, 2 steps, guided",
    ),
    "v2": Case(
        SD + "v2-inference.yaml",
        "txt2img",
        "--ckpt {ckpt} --config " + SD + "v2-inference.yaml --outdir {out} --n_samples 1 --n_iter 1 --steps 2",
        "512x512, 2 steps, guided",
    ),
    "v2-768": Case(
        SD + "v2-inference-v.yaml",
        "txt2img",
        "--ckpt {ckpt} --outdir {out} --n_samples 1 --n_iter 1 --steps 2 --H 768 --W 768",
        "768x768, 2 steps, guided",
    ),
    "v2-inpainting": Case(
        SD + "v2-inpainting-inference.yaml",
        "inpaint",
        "--ckpt {ckpt} --outdir {out} --n_samples 1 --steps 2 --init-img {photo} --mask {mask}",
        "512x512, 2 steps, guided",
    ),
    "v2-depth": Case(
        SD + "v2-midas-inference.yaml",
        "img2img",
        "--ckpt {ckpt} --outdir {out} --n_samples 1 --steps 3 --strength 0.7 --init-img {photo}",
        "512x512, 2 of 3 steps, guided",
    ),
    "x4-upscaling": Case(
        SD + "x4-upscaling.yaml",
        "upscale",
        "--ckpt {ckpt} --outdir {out} --n_samples 1 --steps 2 --init-img {small}",
        "128 to 512, 2 steps, guided",
    ),
    "unclip-h": Case(
        SD + "v2-1-stable-unclip-h-inference.yaml",
        "variations",
        "--ckpt {ckpt} --outdir {out} --n_samples 1 --steps 2 --init-img {photo}",
        "768x768, 2 steps, guided",
    ),
}


def write_checkpoint(config: str, path: Path) -> int:
    """A filled checkpoint of a public config, in published names; how many parameters the model has."""
    model = build_on_meta(read_config(config)["model"])
    state = {}
    for key, tensor in model.state_dict().items():
        keep = not tensor.is_meta or key.split(".")[-1].startswith(SKIP)
        value = torch.zeros(tensor.shape) if keep and tensor.is_meta else tensor
        state[key] = value if keep or tensor.ndim == 0 else torch.from_numpy(values(key, tuple(tensor.shape)))
        if state[key].is_meta:
            state[key] = torch.ones(tensor.shape)
    save_checkpoint(path, state, overwrite=True)
    return sum(parameter.numel() for parameter in model.parameters())


def write_inputs(folder: Path) -> dict[str, Path]:
    """Pictures, masks, maps and the other things that scripts take, by the names that options use."""
    y, x = np.mgrid[0:512, 0:512] / 511
    photo = Image.fromarray((255 * np.stack([x, y, 0.5 + 0.5 * np.sin(20 * x * y)], -1)).astype(np.uint8))
    hole = Image.fromarray(np.where((abs(x - 0.5) < 0.2) & (abs(y - 0.5) < 0.2), 255, 0).astype(np.uint8))
    pairs = folder / "pairs"
    pairs.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.png" for name in ("photo", "mask", "small", "segmentation")}
    for name, image in (("photo", photo), ("mask", hole), ("small", photo.resize((128, 128)))):
        image.save(files[name])
    photo.save(pairs / "photo.png")
    hole.save(pairs / "photo_mask.png")
    Image.fromarray((181 * x[:256, :256]).astype(np.uint8)).save(files["segmentation"])
    files |= {"pairs": pairs, "layout": folder / "layout.json", "clip": folder / "clip"}
    files["layout"].write_text('[{"class": 5, "box": [0.1, 0.1, 0.5, 0.5]}, {"class": 7, "box": [0.5, 0.2, 0.4, 0.7]}]')
    return files


def write_clip(folder: Path) -> None:
    """ViT-L/14, untrained, as transformers saves it."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)).save_pretrained(folder)


def write_bert_vocabulary(home: Path) -> None:
    """Something of the form of BERT's vocabulary, where a Hugging Face cache has it."""
    tokens = [f"[unused{i}]" for i in range(30522)]
    tokens[0], tokens[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    snapshot = home / "hub/models--bert-base-uncased/snapshots/0"
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot / "vocab.txt").write_text("\n".join(tokens) + "\n")


def run(name: str, folder: Path) -> str:
    """One row of the table."""
    case, files = CASES[name], write_inputs(folder)
    home = folder / "huggingface"
    write_bert_vocabulary(home)
    if "{clip}" in case.options:
        write_clip(files["clip"])
    files |= {"ckpt": folder / "model.ckpt", "out": folder / "out" / name}
    count = write_checkpoint(case.config, files["ckpt"])
    options = case.options.format(**files) + (f" --ckpt {files['ckpt']}" if "{ckpt}" not in case.options else "")
    options += f" --outdir {files['out']}" if "{out}" not in case.options else ""
    command = [sys.executable, "-c", MEASURED, f"scripts/{case.script}.py", *options.split()]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HOME": str(home)}, capture_output=True, text=True)
    used = re.search(r"USED (\d+) (\d+)", done.stderr)
    (folder / f"{name}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        return f"| {name} | failed: {done.stderr.strip().splitlines()[-2:]} |"
    sizes = f"{count / 1e6:.0f} M, {files['ckpt'].stat().st_size / 1e9:.1f} GB"
    return f"| {name} | {sizes} | `{case.script}.py` | {case.does} | {used[1]} s | {int(used[2]) / 1e6:.1f} GB |"


# Runs a script in a process of its own, and says how much it took: seconds of all cores together, which other work on
# the machine hardly changes, and memory at its peak, mapped files included.
MEASURED = """
import re, resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    # not ru_maxrss, which knows what the parent had before this process became another
    peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
    print("USED", round(used.ru_utime + used.ru_stime), peak, file=sys.stderr)
"""


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or CASES:
        print(run(name, folder), flush=True)


if __name__ == "__main__":
    main()
