"""A checkpoint that answers: media to frames once, frames to an example, examples to text."""

import functools
import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_mix.decode import Apart, decode_file
from eval.task import media_parts
from mm import formats, generate, prompt
from mm.common.errors import BadSample, UserError
from mm.keye import Keye


class Media:
    """Frames as the processor makes them, decoded apart; the last few clips stay decoded, several questions ask about
    each."""

    def __init__(self, processor: Any, keep: int = 48, deadline: float = 60.0):
        self.decode, self.keep = Apart(functools.partial(decode_file, processor), deadline), keep
        self._frames: OrderedDict[str, tuple[np.ndarray, Any]] = OrderedDict()

    def load(self, root: Path, part: dict) -> tuple[np.ndarray, Any]:
        """(uint8 [T, H, W, 3], video plan or None). Raises BadSample naming the file."""
        kind = part["type"]
        name = str(part[kind])
        path = root / name
        known = self._frames.get(str(path))
        if known is None:
            known = self._read(kind, root, path, name)
            self._frames[str(path)] = known
            while len(self._frames) > self.keep:
                self._frames.popitem(last=False)
        self._frames.move_to_end(str(path))
        return known

    def _read(self, kind: str, root: Path, path: Path, name: str) -> tuple[np.ndarray, Any]:
        if not os.path.normpath(path).startswith(os.path.join(os.path.normpath(root), "")):
            raise BadSample("media path leads out of its folder", key=name)
        if not path.is_file():
            raise BadSample("media file is missing", key=name)
        try:
            return self.decode(str(path), kind)
        except BadSample as e:
            raise BadSample(e.reason, shard=e.shard, key=name) from e


class Checkpoint:
    """What the runner and the chat need of a model folder written by `mm.formats.save`."""

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None):
        self.folder, self.device = Path(folder), torch.device(device)
        model, self.processor, self.tokenizer = formats.load(self.folder, device=self.device, dtype=dtype)
        if not isinstance(model, Keye):
            raise UserError(f"{folder} holds a {type(model).__name__}, which answers nothing; give a stage after s0")
        self.model = model.eval()
        self.media = Media(self.processor)

    def example(self, messages: list[dict], root: Path) -> Any:
        """Tensors of one prompt, ready to be answered. Raises BadSample for media that cannot be read."""
        return prompt.prepare(
            messages, self.processor, self.tokenizer, lambda part: self.media.load(root, part), generate=True
        )

    def frames(self, messages: list[dict], root: Path) -> list[np.ndarray]:
        """The frames of every medium, in order, uint8 [T, H, W, 3] each."""
        return [np.asarray(self.media.load(root, part)[0]) for part in media_parts(messages)]

    def answer(self, examples: list[Any], max_new_tokens: int) -> list[str]:
        return generate.generate(
            self.model, examples, self.tokenizer, max_new_tokens=max_new_tokens, batch_size=len(examples)
        )

    def fingerprint(self) -> str:
        """Changes with any file of the folder; reads samples of large files, not all of them."""
        digest = hashlib.sha256()
        for path in sorted(p for p in self.folder.iterdir() if p.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with open(path, "rb") as f:
                for i in range(65):
                    f.seek(i * max(0, size - 65536) // 64)
                    digest.update(f.read(65536))
                    if size <= 65536:
                        break
        return digest.hexdigest()[:16]
