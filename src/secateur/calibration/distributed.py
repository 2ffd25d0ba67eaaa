"""Several processes, one result: each takes every N-th batch, and the sums are added up at the end."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; joins the group that torchrun or accelerate started."""
    import torch.distributed as dist

    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return 0, 1
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def add_over_ranks(tensor: Tensor) -> None:
    """Sum a tensor over all processes, in place."""
    import torch.distributed as dist

    dist.all_reduce(tensor)


def merge_over_ranks(mapping: dict[str, str]) -> dict[str, str]:
    """The union of every process's dictionary."""
    import torch.distributed as dist

    gathered: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, mapping)
    return {k: v for part in gathered for k, v in part.items()}
