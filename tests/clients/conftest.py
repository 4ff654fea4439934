"""A torchvision built for CUDA beside a torch built for the CPU cannot be imported: its operators are declared here.

None of them is called. k-diffusion imports torchvision, and so does torchmetrics where it is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys

import torch

if importlib.util.find_spec("torchvision") is not None and "torchvision" not in sys.modules:
    for _name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # declared already, by a torchvision that is complete
            torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou) -> Tensor")
