"""Packed training on several devices: every rank gets packs of about equal cost, whatever its images' sizes.

    torchrun --nproc-per-node 2 examples/packed_training.py photos/ --ckpt CKPT

The task is a toy: say a hidden patch's mean colour from its features. Replace `Task`.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from siglip2_packed import Siglip2PackedImageProcessor, Siglip2PackedVisionModel
from siglip2_packed.data import PatchBudgetBatchSampler, image_grids
from siglip2_packed.parallel import mean_over_ranks


class Task(torch.nn.Module):
    def __init__(self, ckpt):
        super().__init__()
        self.tower = Siglip2PackedVisionModel.from_pretrained(ckpt, vision_use_head=False, dtype=torch.float32)
        self.colour = torch.nn.Linear(self.tower.config.hidden_size, 3)

    def forward(self, packed):
        """-> (sum of the losses of hidden patches, how many there are)."""
        patches = packed["pixel_values"]
        target = patches.view(len(patches), -1, 3).mean(dim=1)
        hidden = torch.rand(len(patches), device=patches.device) < 0.25
        packed["pixel_values"] = patches.masked_fill(hidden[:, None], 0)
        guess = self.colour(self.tower(**packed).last_hidden_state)
        return ((guess - target).square().mean(dim=1) * hidden).sum(), int(hidden.sum())


def train(args, device):
    files = sorted(args.folder.rglob("*.jpg")) or sys.exit(f"no .jpg files in {args.folder}")
    processor = Siglip2PackedImageProcessor.from_pretrained(args.ckpt)
    sampler = PatchBudgetBatchSampler(image_grids(files, processor), args.budget)
    loader = DataLoader(files, batch_sampler=sampler, collate_fn=processor)
    model = DistributedDataParallel(Task(args.ckpt).to(device))
    half = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda" and torch.cuda.is_bf16_supported(False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for step, packed in enumerate(loader, start=1):
            with half:
                loss = mean_over_ranks(*model(packed.to(device)))  # ranks hold unequal numbers of patches
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"rank {dist.get_rank()}, epoch {epoch}, step {step}: {packed}, loss {loss.item():.3f}\n", end="")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="JPEG files, in all folders inside too")
    parser.add_argument("--ckpt", default="google/siglip2-so400m-patch16-naflex", help="folder or hub id")
    parser.add_argument("--budget", type=int, default=16384, help="patches of a batch (16384)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over all photographs (1)")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    train(args, device)
    dist.destroy_process_group()  # once the model is gone: a group that DDP frees last can stop at the end


if __name__ == "__main__":
    main()
