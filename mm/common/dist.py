"""The process group, and the few collectives the rest needs. One process without torchrun is a group of one."""

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def init(device: str = "cpu", *, timeout_minutes: float = 30.0) -> torch.device:
    """Join the group that torchrun describes (gloo on CPU, nccl on GPU); a lone process joins none.

    torchrun's agents keep one store over restarts, in which a new gloo worker would find the addresses of the
    dead (torch 2.13): so each attempt gets a prefix of its own (`_fresh_prefix`).
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
    prefix = _fresh_prefix(store, me, size, limit) if agent_store else "first"
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=dist.PrefixStore(prefix, store),
        rank=me, world_size=size, timeout=limit,
    )  # fmt: skip
    return where


def _fresh_prefix(store: dist.Store, me: int, size: int, limit: timedelta) -> str:
    """A name that all ranks of this attempt, and none of an earlier one, agree on.

    TORCHELASTIC_RESTART_COUNT is no such name: an agent whose own worker lives counts no restart when another
    node's dies. Each rank asks under a name of its own; rank 0 answers all it finds, until each has confirmed.
    Raises TimeoutError.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + limit.total_seconds()
    if me != 0:
        store.set(f"join/{me}", mine)
        prefix = store.get(f"join/{mine}").decode()
        store.set(f"joined/{prefix}/{me}", "yes")
        return prefix
    missing, answered = set(range(1, size)), dict[int, str]()
    while missing:
        for r in sorted(missing):
            if store.check([f"joined/{mine}/{r}"]):
                missing.remove(r)
            elif store.check([f"join/{r}"]) and (who := store.get(f"join/{r}").decode()) != answered.get(r):
                store.set(f"join/{who}", mine)  # it may be of the dead: then nobody reads it
                answered[r] = who
        if time.monotonic() > until:
            raise TimeoutError(f"ranks {sorted(missing)} did not join within {limit}")
        time.sleep(0.02)
    return mine


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
