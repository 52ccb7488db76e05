"""The process group, and the few collectives the rest needs. One process without torchrun is a group of one."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def init(device: str = "cpu", *, timeout_minutes: float = 30.0) -> torch.device:
    """Join the group that torchrun describes (gloo on CPU, nccl on GPU); a lone process joins none.

    The store is prefixed by the restart attempt: under torch 2.13 a restarted gloo worker otherwise
    reads the dead attempt's addresses from the agent's shared store and never connects.
    """
    if device == "cuda":
        torch.cuda.set_device(local_rank())
    where = torch.device(device, local_rank()) if device == "cuda" else torch.device(device)
    if "RANK" not in os.environ or dist.is_initialized():
        return where
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    size, me = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    limit = timedelta(minutes=timeout_minutes)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size,
        is_master=not agent_store and me == 0, timeout=limit,
    )  # fmt: skip
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=dist.PrefixStore(f"attempt_{attempt}", store),
        rank=me, world_size=size, timeout=limit,
    )  # fmt: skip
    return where


def on() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if on() else 0


def world_size() -> int:
    return dist.get_world_size() if on() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if on():
        dist.barrier()


def sum_tensor(x: torch.Tensor) -> torch.Tensor:
    """`x` summed over ranks, in place; returned for convenience."""
    if on():
        dist.all_reduce(x)
    return x


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank (between our own processes only: it pickles)."""
    if not on():
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not on():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shutdown() -> None:
    if on():
        dist.destroy_process_group()
