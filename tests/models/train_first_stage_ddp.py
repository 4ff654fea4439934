"""What `test_processes_share_a_batch` runs: two processes train a first stage, then one with a discriminator."""

import sys

import torch

from tests.models.test_first_stage_training import PLAIN, SGD, Seed, build, fit

if __name__ == "__main__":
    torch.set_num_threads(1)
    options = {"devices": 2, "strategy": "ddp", "callbacks": [Seed()]}
    model = build("kl", PLAIN, lr=0.1, optimizer_config=SGD)
    trainer, _ = fit(model, 2, sys.argv[1], **options)
    if trainer.is_global_zero:
        torch.save(model.state_dict(), f"{sys.argv[1]}/weights.pt")
    model = build("vq", {"disc_start": 1})
    model.accumulate_grad_batches = 2
    fit(model, 2, sys.argv[1], **options)
