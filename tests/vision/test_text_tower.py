"""Contrastive model and sigmoid loss against transformers' SiglipModel."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from mm.common.errors import UserError
from vision.text_tower import ContrastiveModel, TextConfig, TextTower, region_patches, sigmoid_loss
from vision.vit import VisionConfig, VisionTower


def model(**vision) -> ContrastiveModel:
    numbers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ContrastiveModel(
        VisionTower(VisionConfig(**numbers, patch_size=8, image_size=32, **vision)),
        TextTower(TextConfig(**numbers, vocab_size=64, max_positions=12, projection_size=32)),
    )


def patches(images: torch.Tensor) -> torch.Tensor:
    x = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5)  # [B, h, w, 3, 8, 8]
    return x.flatten(3).flatten(0, 2)


def test_it_is_siglip(shared_data):
    """Embeddings, pooled features and loss of another project's SigLIP on fixed inputs."""
    import numpy as np
    from safetensors.torch import load_file

    folder = shared_data / "oracles" / "generated" / "siglip_tiny"
    io = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(folder / "io.npz").items()}
    ours = model(rope=False)
    ours.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    compare(ours, io["pixel_values"], io["input_ids"], io["image_embeds"], io["text_embeds"], io["loss"])


def test_it_is_transformers_siglip_model():
    hf = importlib.import_module("transformers")
    numbers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = hf.SiglipModel(hf.SiglipConfig(
        text_config={**numbers, "vocab_size": 64, "max_position_embeddings": 12},
        vision_config={**numbers, "patch_size": 8, "image_size": 32},
    )).eval()  # fmt: skip
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    ours = model(rope=False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images, ids = torch.randn(5, 3, 32, 32), torch.randint(0, 64, (5, 12))
    want = theirs(pixel_values=images, input_ids=ids, return_loss=True)
    compare(ours, images, ids, want.image_embeds, want.text_embeds, want.loss)


def compare(ours, images, ids, image_embeds, text_embeds, loss):
    n, length = ids.shape
    image = ours.image_embeds(patches(images), torch.tensor([[1, 4, 4]] * n))
    text = ours.text_embeds(ids.flatten(), torch.arange(0, n * length + 1, length, dtype=torch.int32))
    assert torch.allclose(image, image_embeds, atol=1e-5), (image - image_embeds).abs().max()
    assert torch.allclose(text, text_embeds, atol=1e-5), (text - text_embeds).abs().max()
    total, count = sigmoid_loss(image, text, ours.logit_scale, ours.logit_bias)
    assert count == n
    assert torch.allclose(total / count, loss, atol=1e-5), (total / count, loss)


def test_packed_pairs_are_each_alone():
    """Texts and clips of many lengths in one row; one vector a clip; bytes are normalised."""
    ours = model()
    ours.init_weights(0)
    grids = torch.tensor([[1, 4, 4], [3, 2, 2], [1, 6, 3]])
    pixels = torch.randint(0, 256, (int(grids.prod(1).sum()), 192), dtype=torch.uint8)
    together = ours.image_embeds(pixels, grids)
    sizes = grids.prod(1).tolist()
    alone = [ours.image_embeds(p, g[None]) for p, g in zip(pixels.split(sizes), grids, strict=True)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-6)
    ids, lengths = torch.randint(0, 64, (12,)), [5, 1, 6]
    cu = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    alone = [ours.text_embeds(t, torch.tensor([0, len(t)], dtype=torch.int32)) for t in ids.split(lengths)]
    assert torch.allclose(ours.text_embeds(ids, cu), torch.cat(alone), atol=1e-5)


def test_every_parameter_learns():
    ours = model()
    ours.init_weights(0)
    grids = torch.tensor([[1, 2, 2], [2, 2, 2]])
    image = ours.image_embeds(torch.randint(0, 256, (12, 192), dtype=torch.uint8), grids)
    text = ours.text_embeds(torch.randint(0, 64, (7,)), torch.tensor([0, 3, 7], dtype=torch.int32))
    sigmoid_loss(image, text, ours.logit_scale, ours.logit_bias)[0].backward()
    assert [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_fresh_model_depends_on_seed_and_names_alone():
    with torch.device("meta"):
        a = model()
    a.to_empty(device="cpu").init_weights(3)
    b, c = model(), model()
    b.init_weights(3)
    c.init_weights(4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(b.vision_model.head.probe, c.vision_model.head.probe)
    assert b.logit_scale.exp().item() == pytest.approx(10.0)
    assert b.logit_bias.item() == -10.0


def test_user_mistakes():
    ours = model()
    ours.init_weights(0)
    with pytest.raises(UserError, match="1 to 12 tokens"):
        ours.text_embeds(torch.zeros(13, dtype=torch.int64), torch.tensor([0, 13], dtype=torch.int32))
    with pytest.raises(UserError, match="projection_size"):
        numbers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        ContrastiveModel(
            VisionTower(VisionConfig(**numbers, image_size=28)),
            TextTower(TextConfig(**numbers, vocab_size=8, projection_size=16)),
        )


def named(regions, texts, grids, rivals=None):
    """The arguments of region_losses, over the words 3 to 32; every word is every other's rival unless given."""
    pixels = torch.randint(0, 256, (int(grids.prod(1).sum()), 192), dtype=torch.uint8)
    starts = torch.tensor([0, *map(len, texts)]).cumsum(0).to(torch.int32)
    ids = torch.tensor([i for t in texts for i in t])
    words = torch.arange(3, 33)
    rivals = torch.ones(len(ids), 30, dtype=torch.bool) if rivals is None else rivals
    return pixels, grids, torch.tensor(regions), ids, starts, words, rivals


def test_a_region_is_the_patches_of_its_rectangle():
    grids = torch.tensor([[1, 4, 6], [3, 2, 3]])
    regions = torch.tensor([[0, 0, 1, 2, 3, 5], [1, 0, 0, 0, 2, 3], [0, 0, 3, 5, 4, 6], [1, 2, 0, 1, 2, 3]])
    rows, of = region_patches(regions, grids)
    picture = [torch.arange(24).view(1, 4, 6), 24 + torch.arange(18).view(3, 2, 3)]
    want = [picture[p][f, top:bottom, a:b].flatten() for p, f, top, a, bottom, b in regions.tolist()]
    assert [rows[of == k].tolist() for k in range(4)] == [w.tolist() for w in want]


def test_word_loss_tells_each_word_of_a_region_from_its_rivals_and_asks_the_rest_for_none():
    """Against torch's cross entropy over the rivals alone, patch by patch and token by token; a picture that is
    covered whole has nothing to be silent about."""
    ours = model()
    ours.init_weights(0)
    grids = torch.tensor([[1, 4, 4], [2, 2, 6], [1, 2, 2]])
    regions = [[0, 0, 0, 0, 2, 3], [1, 1, 1, 2, 2, 6], [0, 0, 1, 1, 4, 4], [2, 0, 0, 0, 2, 2]]
    texts = [[5, 7], [9, 32, 3], [11], [12]]
    rivals = torch.rand(7, 30) < 0.4
    rivals.scatter_(1, torch.tensor([[i - 3] for t in texts for i in t]), True)
    batch = named(regions, texts, grids, rivals)
    losses = ours.region_losses(*batch)
    table = ours.text_model.embeddings.token_embedding.weight[3:33]
    features = ours.vision_model(batch[0].float() / 127.5 - 1, grids).split([16, 24, 4])
    bare = [torch.ones(*g, dtype=torch.bool) for g in grids.tolist()]
    want, silence, row = 0.0, 0.0, iter(rivals)
    for (p, frame, top, left, bottom, right), text in zip(regions, texts, strict=True):
        inside = features[p].view(*grids[p].tolist(), -1)[frame, top:bottom, left:right].flatten(0, 1) @ table.T
        for word in text:
            among = next(row)
            target = torch.tensor(int(among[: word - 3].sum())).expand(len(inside))
            want = want + F.cross_entropy(inside[:, among], target, reduction="sum") / len(text)
        bare[p][frame, top:bottom, left:right] = False
    assert [int(b.sum()) for b in bare] == [3, 20, 0]
    for p, frame in ((0, 0), (1, 0), (1, 1)):
        shown = features[p].view(*grids[p].tolist(), -1)[frame][bare[p][frame]]
        logprobs = F.log_softmax(shown @ table.T, dim=-1)
        alike = torch.full_like(logprobs, 1 / 30)
        silence = silence + F.kl_div(logprobs, alike, reduction="sum")
    for name, number, loss in (("words", 6 + 4 + 9 + 4, want), ("silence", 23, silence)):
        assert losses[name][1] == number and torch.allclose(losses[name][0], loss, rtol=1e-5)


def test_place_loss_tells_the_places_of_a_region_from_all_of_its_frame():
    """Against torch's divergence, patch by patch, the position table interpolated to each picture's own grid."""
    ours = model()
    ours.init_weights(0)
    table = ours.vision_model.embeddings.position_embedding
    torch.nn.init.normal_(table.weight)
    grids = torch.tensor([[1, 4, 4], [2, 2, 6]])
    regions = [[0, 0, 0, 0, 2, 3], [1, 1, 1, 2, 2, 6], [0, 0, 1, 1, 4, 4], [1, 0, 0, 0, 1, 1]]
    batch = named(regions, [[5, 7], [9], [11], [12]], grids)
    loss, n = ours.region_losses(*batch)["places"]
    features = ours.vision_model(batch[0].float() / 127.5 - 1, grids).split([16, 24])
    side = int(len(table.weight) ** 0.5)
    square = table.weight.view(side, side, -1).permute(2, 0, 1)[None]
    want = torch.zeros(())
    for p, frame, top, left, bottom, right in regions:
        _, h, w = grids[p].tolist()
        places = F.interpolate(square, size=(h, w), mode="bilinear")[0].flatten(1)  # [D, h * w]
        inside = features[p].view(*grids[p].tolist(), -1)[frame, top:bottom, left:right].flatten(0, 1)
        target = torch.zeros(h, w)
        target[top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
        target = target.flatten().expand(len(inside), -1)
        want = want + F.kl_div(F.log_softmax(inside @ places, dim=-1), target, reduction="batchmean")
    assert n == 4 and loss.item() > 0 and torch.allclose(loss, want, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.region_losses(*batch)["places"][0].item() == pytest.approx(loss.item(), rel=0.05)


def test_what_is_no_rival_is_not_unlearned():
    """Of a region that covers its picture only its name and their rivals move; no other word has a gradient."""
    ours = model()
    ours.init_weights(0)
    rivals = torch.zeros(2, 30, dtype=torch.bool)
    rivals[0, [2, 9]] = rivals[1, [4, 11, 12]] = True
    batch = named([[0, 0, 0, 0, 4, 4]], [[5, 7]], torch.tensor([[1, 4, 4]]), rivals)
    ours.region_losses(*batch)["words"][0].backward()
    moved = ours.text_model.embeddings.token_embedding.weight.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [5, 7, 12, 14, 15]


def test_silence_is_where_all_words_are_alike():
    """Features of nothing cost nothing outside the regions and the log of the rivals inside."""
    ours = model()
    ours.init_weights(0)
    ours.text_model.embeddings.token_embedding.weight.data.zero_()
    losses = ours.region_losses(*named([[0, 0, 0, 0, 2, 2]], [[5]], torch.tensor([[1, 4, 4]])))
    assert losses["words"][1] == 4 and losses["words"][0].item() == pytest.approx(4 * math.log(30), abs=1e-4)
    assert losses["silence"][1] == 12 and losses["silence"][0].item() == pytest.approx(0, abs=1e-4)
