"""Checkpoints as folders: safetensors and a config.json in the published layouts.

A folder of ours is a Keye folder (or, after contrastive training, a SigLIP folder) that other tools can
read, plus processor.json and tokenizer.json. Weights are read strictly: every parameter must be there,
nothing else may be, shapes must agree.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mm.common.errors import UserError
from mm.common.files import atomic_folder, read_json, write_json
from mm.decoder import DecoderConfig
from mm.keye import Keye, KeyeConfig
from mm.processor import Processor
from mm.tokenizer import Tokenizer
from vision.text_tower import ContrastiveModel, TextConfig, TextTower
from vision.vit import VisionConfig, VisionTower

Model = Keye | ContrastiveModel
SHARD_BYTES = 5_000_000_000
# Parts of the published checkpoints that the model never uses.
UNUSED = re.compile(r"visual\.vision_model\.(embeddings\.packing_position_embedding\.|head\.)")
HEAD = re.compile(r"vision_model\.head\.|text_model\.|logit_scale$|logit_bias$")


# --- configurations -----------------------------------------------------------------------------------


def _plain(config: Any) -> dict[str, Any]:
    """Fields of a config that change what is computed (how it is computed is the run's business)."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("attention", "activation_checkpointing")}


def config_to_hf(config: KeyeConfig) -> dict[str, Any]:
    """config.json as Keye's own: text numbers at the top, `vision_config` below."""
    text = _plain(config.decoder)
    section = list(text.pop("mrope_section"))
    version = "KeyeVL1_5" if config.projector_norm == "post" else "Keye"
    return {
        "architectures": [f"{version}ForConditionalGeneration"],
        "model_type": version,
        **text,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "projector_norm": config.projector_norm,
        "vision_config": {
            "model_type": "siglip_vision_model",
            **_plain(config.vision),
            "spatial_merge_size": config.merge_size,
            "temporal_patch_size": 1,
        },
    }


def config_from_hf(data: dict[str, Any], *, where: str = "config.json") -> KeyeConfig:
    """The other way; what the published files leave out follows from their version (Preview or 1.5)."""
    newer = data.get("model_type") == "KeyeVL1_5"
    vision = data.get("vision_config", {})
    try:
        return KeyeConfig(
            decoder=_pick(DecoderConfig, data, mrope_section=tuple(data["rope_scaling"]["mrope_section"])),
            vision=_pick(VisionConfig, vision, segments=vision.get("segments", "frame" if newer else "clip")),
            projector_norm=data.get("projector_norm", "post" if newer else "pre"),
            image_token_id=data["image_token_id"],
            video_token_id=data["video_token_id"],
            merge_size=vision.get("spatial_merge_size", 2),
        )
    except (KeyError, TypeError) as e:
        raise UserError(f"{where} is not a Keye configuration: {e} is missing or wrong") from e


def _pick(cls: Any, data: dict[str, Any], **more: Any) -> Any:
    names = {f.name for f in dataclasses.fields(cls)} - {"attention", "activation_checkpointing"}
    return cls(**{k: v for k, v in data.items() if k in names} | more)


def _contrastive_to_hf(model: ContrastiveModel) -> dict[str, Any]:
    text = _plain(model.text_model.config)
    text["max_position_embeddings"] = text.pop("max_positions")
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", **text},
        "vision_config": {"model_type": "siglip_vision_model", **_plain(model.vision_model.config)},
    }


def contrastive_from_hf(data: dict[str, Any], *, where: str = "config.json") -> ContrastiveModel:
    """A ContrastiveModel with the numbers of a SigLIP config.json (a published one has no rotary embedding)."""
    text, vision = data.get("text_config", {}), data.get("vision_config", {})
    try:
        size = text.get("projection_size", text["hidden_size"])
        return ContrastiveModel(
            VisionTower(_pick(VisionConfig, vision, rope=vision.get("rope", False))),
            TextTower(
                _pick(TextConfig, text, max_positions=text["max_position_embeddings"], projection_size=size)
            ),
        )
    except (KeyError, TypeError) as e:
        raise UserError(f"{where} is not a SigLIP configuration: {e} is missing or wrong") from e


# --- reading ------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those its index names."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a checkpoint")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        gone = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
        if gone or not names:
            raise UserError(f"{index} names files that are not there: {_some(gone)}; copy the whole folder")
        return [folder / n for n in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(
            f"{folder} holds pickled weights (.bin/.pt) only; loading them can run code, so they are refused: "
            "convert them to model.safetensors first"
        )
    raise UserError(f"{folder} holds no model.safetensors")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} cannot be read (cut short or not safetensors): {e}; copy it again") from e


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


@torch.no_grad()
def _fill(
    model: nn.Module, folder: Path, theirs: Callable[[str], str | None], skip: Callable[[str], bool]
) -> None:
    """Copy every parameter for which `theirs` names a tensor; all is checked before anything is copied."""
    wanted = {t: p for n, p in model.named_parameters() if (t := theirs(n)) is not None}
    found: dict[str, tuple[Path, list[int]]] = {}
    for path in _files(folder):
        with _open(path) as f:
            found |= {name: (path, f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    wrong = [
        f"{n} in {found[n][0].name} is {found[n][1]}, the model has {list(p.shape)}"
        for n, p in wanted.items() if n in found and found[n][1] != list(p.shape)
    ]  # fmt: skip
    missing = wanted.keys() - found.keys()
    unexpected = {n for n in found.keys() - wanted.keys() if not skip(n)}
    if wrong or missing or unexpected:
        parts = [f"missing: {_some(missing)}"] if missing else []
        parts += [f"unexpected: {_some(f'{n} ({found[n][0].name})' for n in unexpected)}"] if unexpected else []
        parts += [f"wrong shape: {_some(wrong)}"] if wrong else []
        raise UserError(f"{folder} does not fit the model; {'; '.join(parts)}")
    for path in {found[n][0] for n in wanted}:
        with _open(path) as f:
            for name in [n for n in wanted if found[n][0] == path]:
                wanted[name].copy_(f.get_tensor(name))


def load_qwen3(model: Keye, folder: str | Path) -> None:
    """Fill the decoder (and head) of `model` from a Hugging Face Qwen3 folder, in place.

    Raises: UserError naming what differs: rotary base, heads, tying, names or shapes.
    """
    folder, config = Path(folder), model.config.decoder
    data = read_json(folder / "config.json")
    rope = (data.get("rope_parameters") or {}).get("rope_theta", data.get("rope_theta"))
    theirs = {**data, "rope_theta": rope, "tie_word_embeddings": data.get("tie_word_embeddings", False)}
    names = (
        "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
    )  # fmt: skip
    ours = dataclasses.asdict(config)
    odd = [f"{n} is {theirs.get(n)} there, {ours[n]} here" for n in names if theirs.get(n) != ours[n]]
    if odd:
        raise UserError(f"{folder}/config.json differs from the model's decoder: {'; '.join(odd)}")
    # Tied checkpoints often store the head a second time.
    tied = config.tie_word_embeddings
    _fill(
        model, folder, lambda n: n if n.startswith(("model.", "lm_head.")) else None,
        lambda n: tied and n == "lm_head.weight",
    )  # fmt: skip


def load_siglip(model: Keye | ContrastiveModel, folder: str | Path) -> None:
    """Fill the vision tower of a Keye, or all of a ContrastiveModel, from a SigLIP folder, in place."""
    if isinstance(model, ContrastiveModel):
        return _fill(model, Path(folder), lambda n: n, lambda n: False)
    prefix = "visual."
    return _fill(
        model, Path(folder), lambda n: n.removeprefix(prefix) if n.startswith(prefix) else None,
        lambda n: HEAD.match(n) is not None,
    )  # fmt: skip


def fill_keye(model: Keye, folder: str | Path) -> None:
    """Fill all of `model` from a Keye folder, published or ours, in place; strictly, as `load_keye`."""
    _fill(model, Path(folder), lambda n: n, lambda n: UNUSED.match(n) is not None)


def load_keye(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Keye:
    """A Keye from a published folder (Preview or 1.5) or from ours. The published checkpoints carry two
    tables that the model never uses; they alone are skipped. `dtype`: the stored one by default."""
    return _load_model(Path(folder), device, dtype, kinds=("Keye", "KeyeVL1_5"))


def load(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Any, Processor, Tokenizer]:
    """(model, processor, tokenizer) of a folder written by `save`: a Keye, or a ContrastiveModel."""
    folder = Path(folder)
    model = _load_model(folder, device, dtype, kinds=("Keye", "KeyeVL1_5", "siglip"))
    processor, tokenizer = Processor.load(folder), Tokenizer.load(folder)
    _agree(model, processor, tokenizer, where=str(folder))
    return model, processor, tokenizer


def _agree(model: Model, processor: Processor, tokenizer: Tokenizer, *, where: str) -> None:
    """The three belong together: patches, merging, placeholder ids."""
    vision = model.config.vision if isinstance(model, Keye) else model.vision_model.config
    pairs = [("patch_size", vision.patch_size, processor.patch_size)]
    if isinstance(model, Keye):
        c = model.config
        pairs += [
            ("merge_size", c.merge_size, processor.merge_size),
            ("id of <|image_pad|>", c.image_token_id, tokenizer.id("<|image_pad|>")),
            ("id of <|video_pad|>", c.video_token_id, tokenizer.id("<|video_pad|>")),
        ]
    odd = [f"{what} is {a} in the model, {b} beside it" for what, a, b in pairs if a != b]
    if odd:
        raise UserError(f"{where}: {'; '.join(odd)}; use KeyeConfig.bound(tokenizer) and the model's processor")


def _load_model(folder: Path, device: Any, dtype: torch.dtype | None, *, kinds: tuple[str, ...]) -> Any:
    path = folder / "config.json"
    data = read_json(path)
    kind = data.get("model_type")
    if kind not in kinds:
        raise UserError(f"{path}: model_type {kind!r} is not one of {', '.join(kinds)}")
    stored = data.get("torch_dtype") or data.get("dtype") or "float32"
    with torch.device("meta"):
        model: Model
        if kind == "siglip":
            model = contrastive_from_hf(data, where=str(path))
        else:
            model = Keye(config_from_hf(data, where=str(path)))
    model = model.to(dtype or getattr(torch, stored)).to_empty(device=device)
    _fill(model, folder, lambda n: n, lambda n: UNUSED.match(n) is not None)
    return model


# --- writing ------------------------------------------------------------------------------------------


def save(
    folder: str | Path, model: Model, processor: Processor, tokenizer: Tokenizer, *,
    state: dict[str, torch.Tensor] | None = None, shard_bytes: int = SHARD_BYTES,
) -> None:  # fmt: skip
    """Write a checkpoint folder; it appears whole or not at all, replacing an older one.

    Args:
        state: full tensors by parameter name, where the model's own are sharded; else its state_dict.
        shard_bytes: above this the weights are cut into several files with an index.
    """
    _agree(model, processor, tokenizer, where=str(folder))
    state = model.state_dict() if state is None else state
    config = config_to_hf(model.config) if isinstance(model, Keye) else _contrastive_to_hf(model)
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    with atomic_folder(folder) as temporary:
        write_json(temporary / "config.json", {**config, "torch_dtype": dtype})
        processor.save(temporary)
        tokenizer.save(temporary)
        _write(temporary, state, shard_bytes)


def _write(folder: Path, state: dict[str, torch.Tensor], limit: int) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    total = len(shards)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = "model.safetensors" if total == 1 else f"model-{i:05d}-of-{total:05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {n: state[n].detach().to("cpu").contiguous() for n in names}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except (SafetensorError, OSError) as e:
            raise UserError(f"cannot write {folder / file}: {e}; free some space or choose another folder") from e
    if total > 1:
        size = sum(t.nbytes for t in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
