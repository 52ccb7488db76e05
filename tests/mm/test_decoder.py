"""The decoder against transformers' Qwen3, mRoPE against its Qwen2.5-VL, segments and causality by perturbation."""

import importlib
import json

import pytest
import torch

from mm.common.attention import Segments, rotate, varlen_attention
from mm.common.errors import UserError
from mm.decoder import DecoderConfig
from mm.formats import load_qwen3

HF = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
}  # fmt: skip


def qwen3(tied: bool):
    hf = importlib.import_module("transformers")
    config = hf.Qwen3Config(
        **HF, tie_word_embeddings=tied, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}
    )
    model = hf.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_transformers_qwen3(tied, make_keye, make_batch, tmp_path):
    """Two texts in one row give each text's own logits; the folder is the one transformers writes."""
    theirs = qwen3(tied)
    theirs.save_pretrained(tmp_path)
    ours = make_keye(tie_word_embeddings=tied, rope_theta=1e6)
    load_qwen3(ours, tmp_path)
    batch = make_batch([[23], [17]])
    got = ours.logits(ours(batch))
    for a, b in ((0, 23), (23, 40)):
        want = theirs(batch.input_ids[None, a:b]).logits[0]
        assert torch.allclose(got[a:b], want, atol=1e-5, rtol=1e-5), (got[a:b] - want).abs().max()


def test_the_reference_files(shared_data, make_keye):
    """Logits, loss and greedy continuation of another run of Qwen3 on fixed inputs."""
    import numpy as np

    folder = shared_data / "oracles" / "generated" / "qwen3_tiny"
    hf = json.loads((folder / "config.json").read_text())
    names = DecoderConfig.__dataclass_fields__.keys() - {"mrope_section"}
    model = make_keye(
        **{k: v for k, v in hf.items() if k in names}, rope_theta=1e6, mrope_section=(2, 3, 3)
    )
    load_qwen3(model, folder)
    io = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(folder / "io.npz").items()}
    length = io["input_ids"].shape[1]
    position = torch.arange(length).expand(3, -1)
    hidden = model.model(
        model.model.embed_tokens(io["input_ids"][0]), position, torch.tensor([0, length], dtype=torch.int32)
    )
    assert torch.allclose(model.logits(hidden), io["logits_nomask_row0"][0], atol=1e-5, rtol=1e-5)
    ids = io["input_ids"][0]
    for want in io["greedy_12"][0, length:].tolist():
        cu = torch.tensor([0, len(ids)], dtype=torch.int32)
        h = model.model(model.model.embed_tokens(ids), torch.arange(len(ids)).expand(3, -1), cu)
        assert int(model.logits(h[-1]).argmax()) == want
        ids = torch.cat([ids, torch.tensor([want])])


def test_mrope_is_qwens(make_keye):
    """Three different ids a token, sections of unequal size."""
    hf = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    from transformers import Qwen2_5_VLTextConfig

    section = [2, 3, 3]
    config = Qwen2_5_VLTextConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=1,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default", "mrope_section": section},
    )  # fmt: skip
    q, k = torch.randn(1, 4, 30, 16), torch.randn(1, 2, 30, 16)
    ids = torch.randint(0, 500, (3, 1, 30))
    cos, sin = hf.Qwen2_5_VLRotaryEmbedding(config)(q, ids)
    older = getattr(hf, "apply_multimodal_rotary_pos_emb", None)  # newer versions mix the sections above
    want = older(q, k, cos, sin, section) if older else hf.apply_rotary_pos_emb(q, k, cos, sin)
    rope = make_keye().model._rope(ids[:, 0])
    for x, w in zip((q, k), want, strict=True):
        got = rotate(x[0].transpose(0, 1), *rope).transpose(0, 1)
        assert torch.allclose(got, w[0], atol=1e-5, rtol=0), (got - w[0]).abs().max()


def test_text_positions_make_plain_rope(make_keye):
    """Equal ids on all axes: the sections do not matter."""
    ids = torch.arange(50).expand(3, -1)
    a, b = (make_keye(mrope_section=s).model._rope(ids) for s in ((2, 3, 3), (8, 0, 0)))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_a_token_sees_its_past_in_its_segment_alone(make_keye, make_batch):
    model, batch = make_keye(), make_batch([[7], [9], [9], [4]])
    other = batch.input_ids.clone()
    other[11] = (other[11] + 1) % 90  # the fifth token of the second segment
    base = model(batch)
    batch.input_ids = other
    moved = (model(batch) - base).abs().amax(1) > 0
    assert moved.nonzero()[:, 0].tolist() == list(range(11, 16))


@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_is_each_segment_alone(causal):
    """Equal lengths side by side, apart, of one token, and none at all."""
    lengths = [5, 5, 1, 0, 7, 5, 7, 7]
    cu = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    q, k, v = torch.randn(37, 4, 8), torch.randn(37, 2, 8), torch.randn(37, 2, 8)
    got = varlen_attention(q, k, v, cu, causal=causal, scale=0.3)
    for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        score = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b].repeat_interleave(2, 1)) * 0.3
        if causal:
            score = score + torch.full(score.shape[1:], -torch.inf).triu(1)
        want = torch.einsum("hqk,khd->qhd", score.softmax(-1), v[a:b].repeat_interleave(2, 1))
        assert torch.allclose(got[a:b], want, atol=1e-6)
    assert varlen_attention(q[:0], k[:0], v[:0], cu[:1], causal=causal).shape == (0, 4, 8)


def test_half_precision_attention_is_the_fp32_one_rounded():
    q, k, v = (torch.randn(20, 2, 8).bfloat16() for _ in range(3))
    cu = torch.tensor([0, 12, 20], dtype=torch.int32)
    want = varlen_attention(q.float(), k.float(), v.float(), cu, causal=True).bfloat16()
    got = varlen_attention(q, k, v, cu, causal=True)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(varlen_attention(q, k, v, cu, causal=True), want)


def test_segments():
    s = Segments.of(torch.tensor([0, 3, 3, 10], dtype=torch.int32))
    assert (s.lengths, s.longest) == ([3, 0, 7], 7)


def test_checkpointing_changes_nothing(make_keye, make_batch, mixed):
    plain, batch = make_keye(), make_batch(mixed)
    saving = make_keye(activation_checkpointing=True, vision={"activation_checkpointing": True})
    saving.load_state_dict(plain.state_dict())
    losses = [m.loss(batch)[0] for m in (plain, saving)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_bfloat16_follows_fp32(make_keye, make_batch, mixed):
    """Weights in bf16, or fp32 weights under autocast (as one-rank training runs): near, finite, in bf16."""
    model, batch = make_keye(), make_batch(mixed)
    want = model.loss(batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = model.loss(batch)
    low = model.bfloat16().loss(batch)[0]
    assert half.dtype == low.dtype == torch.float32
    assert half.item() == pytest.approx(want.item(), rel=0.02)
    assert low.item() == pytest.approx(want.item(), rel=0.02)
    assert model(batch).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [
    {"mrope_section": (2, 3, 4)}, {"num_key_value_heads": 3}, {"attention": "fast"},
])  # fmt: skip
def test_impossible_numbers(bad, make_keye):
    with pytest.raises(UserError):
        make_keye(**bad)
