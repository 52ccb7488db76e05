"""The tower against transformers' SigLIP and PaddleOCR-VL towers, and its segments by perturbation."""

import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F

from mm.common.attention import rotate
from mm.common.errors import UserError
from vision.init import LESS, NEAR
from vision.init import siglip as siglip_start
from vision.vit import VisionConfig, VisionTower, normalise, row_column

CONFIG = VisionConfig(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, patch_size=4, image_size=20
)
NUMBERS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size",
)  # fmt: skip
GRIDS = torch.tensor([[1, 4, 6], [1, 7, 3], [1, 5, 5], [1, 5, 5], [1, 2, 9]])


def noisy(module: torch.nn.Module) -> torch.nn.Module:
    """Weights, biases and norms all away from their start, so that none can be left out unnoticed."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * 0.15)
    return module.eval()


def patches(image: torch.Tensor, size: int) -> torch.Tensor:
    """[3, H, W] -> [N, 3 * size * size] in raster order."""
    x = image.unfold(1, size, size).unfold(2, size, size)  # [3, h, w, size, size]
    return x.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)


def siglip(config: VisionConfig):
    hf = importlib.import_module("transformers")
    numbers = {n: getattr(config, n) for n in NUMBERS}
    return noisy(hf.SiglipVisionModel(hf.SiglipVisionConfig(**numbers, vision_use_head=False)))


def test_without_rope_it_is_siglip_on_the_square_grid():
    theirs = siglip(CONFIG)
    ours = VisionTower(dataclasses.replace(CONFIG, rope=False))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(3, 3, 20, 20)
    want = theirs(images).last_hidden_state.flatten(0, 1)
    got = ours(torch.cat([patches(i, 4) for i in images]), torch.tensor([[1, 5, 5]] * 3))
    assert torch.allclose(got, want, atol=1e-5, rtol=0), (got - want).abs().max()


def test_positions_are_interpolated_as_torch_does(monkeypatch):
    """SigLIP's interpolate_pos_encoding, with Keye's bilinear in place of its bicubic."""
    theirs = siglip(CONFIG)
    ours = VisionTower(dataclasses.replace(CONFIG, rope=False))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    original = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: original(*a, **{**k, "mode": "bilinear"}))
    image = torch.randn(3, 16, 24)
    want = theirs(image[None], interpolate_pos_encoding=True).last_hidden_state[0]
    got = ours(patches(image, 4), torch.tensor([[1, 4, 6]]))
    assert torch.allclose(got, want, atol=1e-5, rtol=0), (got - want).abs().max()


def paddle(config: VisionConfig):
    importlib.import_module("transformers")
    from transformers.models.paddleocr_vl import modeling_paddleocr_vl as paddleocr
    from transformers.models.paddleocr_vl.configuration_paddleocr_vl import PaddleOCRVisionConfig

    theirs = PaddleOCRVisionConfig(**{n: getattr(config, n) for n in NUMBERS})
    return noisy(paddleocr.PaddleOCRVisionModel(theirs))


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1], torch.tensor([[3, 4, 2], [1, 3, 4], [2, 5, 5]])])
def test_with_rope_it_is_the_paddleocr_tower(grids):
    """Several pictures packed; for clips that tower attends frame by frame, as our segments="frame" does."""
    theirs = paddle(CONFIG)
    ours = VisionTower(dataclasses.replace(CONFIG, segments="frame"))
    ours.load_state_dict({k.removeprefix("vision_model."): v for k, v in theirs.state_dict().items()}, strict=True)
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 16)
    want = theirs(pixels.view(1, -1, 3, 4, 4), grid_thw=grids).last_hidden_state
    got = ours(pixels, grids)
    assert torch.allclose(got, want.view_as(got), atol=1e-5, rtol=0), (got - want).abs().max()


def test_the_reference_files(shared_data):
    """Outputs of another project's SigLIP on fixed inputs."""
    np = importlib.import_module("numpy")
    from safetensors.torch import load_file

    folder = shared_data / "oracles" / "generated" / "siglip_tiny"
    tensors, io = load_file(folder / "model.safetensors"), np.load(folder / "io.npz")
    tower = VisionTower(VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=8,
        image_size=32, rope=False,
    ))  # fmt: skip
    prefix = "vision_model."
    tower.load_state_dict({
        k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix) and ".head." not in k
    })  # fmt: skip
    images = torch.from_numpy(io["pixel_values"])
    want = torch.from_numpy(io["vision_last_hidden"]).flatten(0, 1)
    pixels, grids = torch.cat([patches(i, 8) for i in images]), torch.tensor([[1, 4, 4]] * 4)
    # This checkpoint amplifies rounding: the file itself lies 1.6e-5 from what float64 gives, we too.
    assert torch.allclose(tower(pixels, grids), want, atol=4e-5, rtol=0)
    assert torch.allclose(tower.double()(pixels.double(), grids).float(), want, atol=2e-5, rtol=0)


def moved(tower: VisionTower, grid: torch.Tensor, patch: int) -> torch.Tensor:
    """bool [N]: whose features change when one patch does."""
    pixels = torch.randn(int(grid.prod(1).sum()), 48)
    other = pixels.clone()
    other[patch] += 1.0
    return (tower(pixels, grid) - tower(other, grid)).abs().amax(1) > 1e-7


@pytest.mark.parametrize(("segments", "reach"), [("clip", (24, 48)), ("frame", (32, 40))])
def test_segments_by_perturbation(segments, reach):
    """A clip of 3 frames of 2x4 between two pictures; patch 35 lies in its second frame."""
    tower = noisy(VisionTower(dataclasses.replace(CONFIG, segments=segments)))
    seen = moved(tower, torch.tensor([[1, 4, 6], [3, 2, 4], [1, 2, 2]]), 35)
    want = torch.zeros(52, dtype=torch.bool)
    want[slice(*reach)] = True
    assert torch.equal(seen, want)


def test_segments_agree_on_pictures():
    clip, frame = (VisionTower(dataclasses.replace(CONFIG, segments=s)) for s in ("clip", "frame"))
    frame.load_state_dict(noisy(clip).state_dict())
    pixels = torch.randn(int(GRIDS.prod(1).sum()), 48)
    assert torch.equal(clip(pixels, GRIDS), frame(pixels, GRIDS))


def test_packed_is_each_alone():
    tower = noisy(VisionTower(CONFIG))
    grids = torch.cat([GRIDS, torch.tensor([[3, 2, 4]])])
    pixels = torch.randn(int(grids.prod(1).sum()), 48)
    alone = [tower(p, g[None]) for p, g in zip(pixels.split(grids.prod(1).tolist()), grids, strict=True)]
    assert torch.allclose(tower(pixels, grids), torch.cat(alone), atol=1e-5)


def test_checkpointing_changes_nothing():
    plain = noisy(VisionTower(CONFIG))
    saving = VisionTower(dataclasses.replace(CONFIG, activation_checkpointing=True))
    saving.load_state_dict(plain.state_dict())
    pixels = torch.randn(int(GRIDS.prod(1).sum()), 48)
    for tower in (plain, saving):
        tower(pixels, GRIDS).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_rows_and_columns():
    row, column = row_column(torch.tensor([[2, 2, 3], [1, 1, 2]]))
    assert row.tolist() == [0, 0, 0, 1, 1, 1] * 2 + [0, 0]
    assert column.tolist() == [0, 1, 2, 0, 1, 2] * 2 + [0, 1]


def test_normalise():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    assert torch.allclose(normalise(bytes_, torch.float32), (torch.arange(256) / 255 - 0.5) / 0.5, atol=1e-7)
    assert torch.equal(normalise(torch.tensor([0.25]), torch.float32), torch.tensor([0.25]))


@pytest.mark.parametrize("bad", [
    {"hidden_size": 50}, {"num_attention_heads": 8, "rope": True}, {"segments": "video"}, {"attention": "fast"},
])  # fmt: skip
def test_impossible_numbers(bad):
    with pytest.raises(UserError):
        VisionTower(dataclasses.replace(CONFIG, **bad))


def test_patches_and_grids_must_agree():
    with pytest.raises(UserError, match="23 patches given, the grids speak of 24"):
        VisionTower(CONFIG)(torch.zeros(23, 48), torch.tensor([[1, 4, 6]]))


def test_attention_starts_by_looking_at_what_is_alike_and_near():
    """Fresh towers: queries are keys, values and output cancel to -LESS, half the heads prefer their own place;
    nothing is shared between layers."""
    tower = VisionTower(CONFIG)
    with torch.no_grad():
        for name, p in tower.named_parameters():
            p.copy_(siglip_start(f"vision_model.{name}", p.shape, 5))
    attention = [layer.self_attn for layer in tower.encoder.layers]
    half = CONFIG.hidden_size // 2
    for a in attention:
        assert torch.equal(a.q_proj.weight, a.k_proj.weight) and torch.equal(a.q_proj.bias, a.k_proj.bias)
        assert (a.q_proj.bias[:half] == NEAR).all() and not a.q_proj.bias[half:].any()
        assert torch.allclose(a.out_proj.weight @ a.v_proj.weight, -LESS * torch.eye(CONFIG.hidden_size), atol=1e-5)
    first, second = attention[:2]
    assert not torch.allclose(first.q_proj.weight, second.q_proj.weight, atol=1e-2)
    assert not torch.allclose(first.v_proj.weight, second.v_proj.weight, atol=1e-2)
    grid = torch.tensor([[1, 6, 6]])
    q = attention[0].q_proj.bias.view(1, CONFIG.num_attention_heads, -1).expand(36, -1, -1)
    q = rotate(q, *tower._rope(grid))
    scores = torch.einsum("ihd,jhd->hij", q, q)
    near = scores[: CONFIG.num_attention_heads // 2]
    assert (near.argmax(-1) == torch.arange(36)).all() and not scores[CONFIG.num_attention_heads // 2 :].any()


def test_places_start_alike_where_they_are_near():
    """Of every place of the table its four neighbours are the likest, and rows and columns tell it apart."""
    table = siglip_start("vision_model.embeddings.position_embedding.weight", torch.Size([64, 128]), 0)
    assert table.unique(dim=0).shape[0] == 64
    alike = F.normalize(table - table.mean(0), dim=1) @ F.normalize(table - table.mean(0), dim=1).T
    row, column = torch.arange(64) // 8, torch.arange(64) % 8
    steps = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    means = [alike[steps == k].mean().item() for k in range(5)]
    assert means == sorted(means, reverse=True) and means[1] > 0.7 > 0.3 > means[4]
    text = siglip_start("text_model.embeddings.position_embedding.weight", torch.Size([64, 128]), 0)
    assert text.std().item() == pytest.approx(128**-0.5, rel=0.05)
