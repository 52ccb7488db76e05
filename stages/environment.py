"""What a bug report needs: versions, cores, memory, GPUs, codecs, and which optional parts are here."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from mm.common.errors import UserError
from mm.common.precision import has_bf16

PACKAGES = ("mmstack", "torch", "numpy", "safetensors", "tokenizers", "pillow", "av", "decord", "scikit-learn",
            "matplotlib", "tensorboard", "transformers", "flash-attn", "wandb", "trackio")  # fmt: skip


def device_of(name: str) -> str:
    """"auto" -> a GPU where there is one. Raises UserError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here (mm env shows what it finds); leave --device out")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The checkout's commit, with '+changes' when the tree differs from it."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return "git not installed"
    if head.returncode:
        return "not a git checkout"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def environment() -> dict[str, str]:
    """Facts about this machine and installation, as text; nothing personal, no paths."""
    memory = psutil.virtual_memory()
    facts = {
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": f"{os.cpu_count()} ({cores()} usable)",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free",
        "disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free",
        "threads": f"torch {torch.get_num_threads()}, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}",
        "GPUs": ", ".join(
            f"{torch.cuda.get_device_name(i)} {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
            for i in range(torch.cuda.device_count())
        ) or "none",
        "CUDA of torch": str(torch.version.cuda or "none (CPU build)"),
        "bf16 arithmetic": "yes" if has_bf16(torch.device(device_of("auto"))) else "no (auto takes fp32)",
        "attention": "flash-attn" if importlib.util.find_spec("flash_attn") else "SDPA (flash-attn is not installed)",
    }  # fmt: skip
    return facts | {name: version(name) for name in PACKAGES}


def show(_: object = None) -> None:
    table = Table("what", "found", title="mm env")
    for key, value in environment().items():
        table.add_row(key, value)
    Console().print(table)
