"""Keye as a whole: exact sizes, packed = unpacked, holes for pictures, the loss."""

import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F

from mm.common.errors import UserError
from mm.keye import Keye, Projector, merge_order, token_logprobs
from mm.processor import Processor
from mm.sizes import PROCESSORS, SIZES
from vision.vit import normalise


def count(model: torch.nn.Module, *prefixes: str) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefixes))


def test_8b_is_the_published_model():
    """Parameter counts of the published checkpoint, without its two unused tables; its published names."""
    with torch.device("meta"):
        model = Keye(SIZES["8b"])
    assert count(model, "model.", "lm_head.") == 8_190_735_360
    assert count(model, "visual.") == 412_987_248
    assert count(model, "mlp_AR.") == 40_119_040
    shapes = {n: list(p.shape) for n, p in model.named_parameters()}
    for name, shape in {
        "model.embed_tokens.weight": [151936, 4096], "lm_head.weight": [151936, 4096], "model.norm.weight": [4096],
        "model.layers.35.self_attn.k_norm.weight": [128], "model.layers.0.mlp.down_proj.weight": [4096, 12288],
        "visual.vision_model.embeddings.patch_embedding.weight": [1152, 3, 14, 14],
        "visual.vision_model.embeddings.position_embedding.weight": [729, 1152],
        "visual.vision_model.encoder.layers.26.mlp.fc1.bias": [4304],
        "visual.vision_model.post_layernorm.bias": [1152], "mlp_AR.pre_norm.weight": [1152],
        "mlp_AR.linear_1.weight": [4608, 4608], "mlp_AR.linear_2.weight": [4096, 4608],
    }.items():  # fmt: skip
        assert shapes[name] == shape, name


def test_version_1_5_norms_after_the_merge():
    with torch.device("meta"):
        model = Keye(dataclasses.replace(SIZES["8b"], projector_norm="post"))
    assert count(model, "mlp_AR.") == 40_125_952


def test_small_has_qwen3_0_6b():
    with torch.device("meta"):
        model = Keye(SIZES["small"])
    assert count(model, "model.") == 596_049_920
    assert not hasattr(model, "lm_head")


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_processors_go_together(size):
    config, processor = SIZES[size], PROCESSORS[size]
    assert processor.patch_size == config.vision.patch_size
    assert processor.merge_size == config.merge_size
    assert isinstance(processor, Processor)


@pytest.mark.parametrize("grids", [[(1, 4, 6)], [(2, 2, 4), (1, 6, 2), (3, 4, 4)]])
def test_merge_is_rows_then_columns_of_a_block(grids):
    """Facts 2.2: (t h p1 w p2) d -> (t h w) (p1 p2 d)."""
    grid = torch.tensor(grids)
    x = torch.arange(int(grid.prod(1).sum()))
    want = torch.cat([
        p.view(t, h // 2, 2, w // 2, 2).permute(0, 1, 3, 2, 4).flatten()
        for p, (t, h, w) in zip(x.split(grid.prod(1).tolist()), grids, strict=True)
    ])  # fmt: skip
    assert torch.equal(x[merge_order(grid, 2)], want)


def test_the_projector_is_paddleocrs(keye_config):
    hf = importlib.import_module("transformers.models.paddleocr_vl.modeling_paddleocr_vl")
    from types import SimpleNamespace as N

    theirs = hf.PaddleOCRProjector(
        N(vision_config=N(spatial_merge_size=2, hidden_size=32), text_config=N(hidden_size=48))
    )
    ours = Projector(keye_config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    grid = torch.tensor([[1, 4, 6], [2, 2, 8]])
    x = torch.randn(56, 32)
    assert torch.allclose(ours(x, grid), theirs(x, grid), atol=1e-6)


def test_the_projector_of_1_5(keye_config):
    ours = Projector(dataclasses.replace(keye_config, projector_norm="post"))
    x, grid = torch.randn(24, 32), torch.tensor([[1, 4, 6]])
    merged = x[merge_order(grid, 2)].view(6, 128)
    want = ours.linear_2(F.gelu(ours.linear_1(F.layer_norm(merged, (128,), eps=1e-5))))
    assert torch.allclose(ours(x, grid), want, atol=1e-6)


@pytest.mark.parametrize("vision", [{}, {"segments": "frame"}])
def test_packed_is_unpacked(make_keye, make_batch, unpack, mixed, vision):
    """Logits, loss and every gradient, over text, pictures, clips and all of them in one conversation."""
    model, batch = make_keye(vision=vision), make_batch(mixed)
    alone = make_keye(vision=vision)
    alone.load_state_dict(model.state_dict())
    logits = model.logits(model(batch))
    assert torch.allclose(logits, torch.cat([alone.logits(alone(b)) for b in unpack(batch)]), atol=1e-5, rtol=1e-5)
    loss, n = model.loss(batch)
    parts = [alone.loss(b) for b in unpack(batch)]
    assert n == sum(p[1] for p in parts) > 20
    assert torch.allclose(loss, sum(p[0] for p in parts), rtol=1e-5)
    loss.backward()
    for part, _ in parts:
        part.backward()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5 * max(1.0, float(b.grad.abs().max()))), name


def test_nothing_leaks_between_segments(make_keye, make_batch, mixed):
    """New words and new pixels in one segment; all others keep their hidden states to the last bit."""
    model, base, other = make_keye(), make_batch(mixed), make_batch(mixed, seed=1)
    cu = base.cu_seqlens.tolist()
    patches = base.grid_thw.prod(1).cumsum(0).tolist()
    mid = dataclasses.replace(base, input_ids=base.input_ids.clone(), pixel_values=base.pixel_values.clone())
    mid.input_ids[cu[3] : cu[4]] = other.input_ids[cu[3] : cu[4]]
    mid.pixel_values[patches[1] : patches[4]] = other.pixel_values[patches[1] : patches[4]]
    moved = (model(mid) - model(base)).abs().amax(1) > 0
    assert moved[cu[3] : cu[4]].all()
    assert not moved[: cu[3]].any()
    assert not moved[cu[4] :].any()


def test_a_picture_lies_at_its_placeholders(make_keye, make_batch, mixed):
    model, batch = make_keye(), make_batch(mixed)
    x = model.embed(batch)
    holes = (batch.input_ids == 90) | (batch.input_ids == 91)
    assert torch.equal(x[~holes], model.model.embed_tokens(batch.input_ids[~holes]))
    assert torch.equal(x[holes], model.visual_features(batch.pixel_values, batch.grid_thw))
    pixels = normalise(batch.pixel_values, torch.float32)
    tower = model.visual["vision_model"]
    assert torch.equal(x[holes], model.mlp_AR(tower(pixels, batch.grid_thw), batch.grid_thw))


def test_the_loss_is_plain_cross_entropy(make_keye, make_batch, mixed):
    """Only tokens of the mask, never a segment's first, each from the token before."""
    model, batch = make_keye(), make_batch(mixed)
    logits, firsts = model.logits(model(batch)), set(batch.cu_seqlens.tolist())
    rows = [i for i in range(1, len(batch.input_ids)) if batch.loss_mask[i] and i not in firsts]
    want = F.cross_entropy(logits[[i - 1 for i in rows]], batch.input_ids[rows], reduction="sum")
    loss, n = model.loss(batch)
    assert n == len(rows)
    assert torch.allclose(loss, want, rtol=1e-6)
    logprobs, at = model.logprobs(batch)
    assert at.tolist() == rows
    assert torch.allclose(-logprobs.sum(), want, rtol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 30])
def test_chunks_of_the_head_change_nothing(rows):
    hidden, weight = torch.randn(rows, 12, requires_grad=True), torch.randn(20, 12, requires_grad=True)
    targets = torch.randint(0, 20, (rows,))
    got = token_logprobs(hidden, weight, targets, chunk=8)
    want = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(got, want, atol=1e-6)
    scale = torch.randn(rows)
    a = torch.autograd.grad((got * scale).sum(), (hidden, weight))
    b = torch.autograd.grad((want * scale).sum(), (hidden, weight))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("trained", [True, False])
def test_text_alone_still_touches_every_parameter(make_keye, make_batch, trained):
    """A rank whose pack has no picture, or nothing to learn, still has a gradient everywhere."""
    model, batch = make_keye(), make_batch([[9], [5]])
    batch.loss_mask.fill_(trained)
    loss, n = model.loss(batch)
    assert n == (12 if trained else 0)
    assert loss.isfinite()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(not p.grad.any() for name, p in model.named_parameters() if name.startswith(("visual.", "mlp_AR.")))
    assert model.lm_head.weight.grad.any() == trained


def test_a_dummy_picture_adds_nothing(make_keye, make_batch):
    model, batch = make_keye(), make_batch([[9]])
    assert torch.equal(model.embed(batch), model.model.embed_tokens(batch.input_ids))


def test_counts_that_disagree_stop_before_any_compute(make_keye, make_batch, monkeypatch):
    model, batch = make_keye(), make_batch([[3, (1, 4, 6), 9], [4]])
    monkeypatch.setattr(Keye, "visual_features", lambda *a: pytest.fail("computed"))
    short = dataclasses.replace(batch, input_ids=batch.input_ids.clone())
    short.input_ids[4] = 5
    with pytest.raises(UserError, match=r"5 placeholder tokens but 6 visual features.*test/0/0#0, test/0/1#0"):
        model(short)
    with pytest.raises(UserError, match="23 patches given, the grids speak of 24"):
        model(dataclasses.replace(batch, pixel_values=batch.pixel_values[1:]))
    with pytest.raises(UserError, match="whole 2x2 blocks"):
        model(dataclasses.replace(batch, grid_thw=torch.tensor([[1, 3, 8]])))


def test_fresh_weights_depend_on_seed_and_names_alone(keye_config):
    with torch.device("meta"):
        a = Keye(keye_config)
    a.to_empty(device="cpu").init_weights(7)
    b, c = Keye(keye_config), Keye(keye_config)
    b.init_weights(7)
    c.init_weights(8)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(b.lm_head.weight, c.lm_head.weight)


def test_fresh_weights_have_the_published_scale():
    """The tower as SigLIP but for its places, the decoder N(0, 0.02), smaller where it writes to the stream; pictures
    begin no louder than words."""
    model = Keye(SIZES["tiny"])
    model.init_weights(0)
    std = {n: p.std().item() for n, p in model.named_parameters() if p.numel() > 1}
    layers = SIZES["tiny"].decoder.num_hidden_layers
    wide = SIZES["tiny"].decoder.initializer_range
    assert std["model.embed_tokens.weight"] == pytest.approx(wide, rel=0.05)
    assert std["model.layers.1.self_attn.o_proj.weight"] == pytest.approx(wide / (2 * layers) ** 0.5, rel=0.05)
    tower = "visual.vision_model."
    assert std[f"{tower}embeddings.position_embedding.weight"] == pytest.approx(0.35 * 0.5**0.5, rel=0.05)
    assert std[f"{tower}embeddings.patch_embedding.weight"] == pytest.approx(588**-0.5, rel=0.05)
    assert std[f"{tower}encoder.layers.0.self_attn.q_proj.weight"] == pytest.approx(128**-0.5, rel=0.05)
    assert 0 < std[f"{tower}encoder.layers.0.mlp.fc1.bias"] < 1e-5
    assert std["mlp_AR.linear_1.weight"] == pytest.approx(512**-0.5, rel=0.05)
    assert std["mlp_AR.linear_2.weight"] == pytest.approx(512**-0.5 * wide, rel=0.05)


def test_bound_takes_the_tokenizers_ids(keye_config):
    class Fake:
        vocab_size = 97

        def id(self, name: str) -> int:
            return {"<|image_pad|>": 3, "<|video_pad|>": 4}[name]

    bound = keye_config.bound(Fake())
    assert (bound.image_token_id, bound.video_token_id) == (3, 4)
    Fake.vocab_size = 98
    with pytest.raises(UserError, match="98 entries, the model's table 97"):
        keye_config.bound(Fake())


def test_a_tied_head_is_one_parameter(make_keye, make_batch):
    model, batch = make_keye(tie_word_embeddings=True), make_batch([[9]])
    assert not any(n.startswith("lm_head") for n, _ in model.named_parameters())
    model.loss(batch)[0].backward()
    unused = [i for i in range(97) if i not in batch.input_ids]
    assert model.model.embed_tokens.weight.grad[unused].abs().sum() > 0  # as the head, every row learns
