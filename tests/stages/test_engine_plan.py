"""Figures of `mm plan` held against torch's own counters and real objects."""

import dataclasses

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mm.common.errors import UserError
from mm.keye import Keye
from mm.sizes import SIZES
from stages.engine import flops, optim
from stages.engine.plan import activations, optimizer_bytes, plan, shard_numel, table
from stages.objectives import make
from stages.stage import Budget, ObjectiveSpec, Optim
from tests.stages import engine_toy as toy

DECODER = dataclasses.replace(
    toy.KEYE.decoder, hidden_size=64, intermediate_size=160, head_dim=16, mrope_section=(4, 2, 2)
)
VISION = dataclasses.replace(toy.VISION, hidden_size=64, intermediate_size=96)
CONFIG = dataclasses.replace(toy.KEYE, decoder=DECODER, vision=VISION)


def big_pack(seed=1):
    """Two segments of 90 tokens, one with a picture of 6x8 patches."""
    batch = toy.pack(seed)
    ids = torch.randint(0, 59, (180,))
    ids[10:22] = toy.IMAGE
    return dataclasses.replace(
        batch, input_ids=ids, loss_mask=torch.ones(180, dtype=torch.bool),
        position_ids=torch.arange(180).expand(3, -1),
        cu_seqlens=torch.tensor([0, 90, 180], dtype=torch.int32), grid_thw=torch.tensor([[1, 6, 8]]),
        pixel_values=torch.randint(0, 256, (48, 48), dtype=torch.uint8),
    )  # fmt: skip


def counted(function):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("train", [{"*": 1.0}, {"mlp_AR.*": 1.0}, {"model.*": 1.0, "lm_head.*": 1.0}])
def test_flops_of_keye_agree_with_torchs_counter(train):
    model, batch = toy.keye(config=CONFIG), big_pack()
    optim.select(model, train)
    ours = flops.of_batch(model, batch)
    with torch.no_grad():
        forward = counted(lambda: model.loss(batch))
    assert sum(ours.forward.values()) == pytest.approx(forward, rel=0.02)
    both = counted(lambda: model.loss(batch)[0].backward())
    head = 2.0 * 178 * 64 * 64  # the chunked loss computes its logits a second time: no model FLOPs
    assert ours.training == pytest.approx(both - head, rel=0.02)


def test_flops_of_two_towers_agree_with_torchs_counter():
    model, batch = toy.contrastive(), toy.pairs(0, 12)
    ours = flops.of_pairs(model, batch)

    def forward():
        return model.image_embeds(batch.pixel_values, batch.grid_thw), model.text_embeds(
            batch.input_ids, batch.cu_seqlens
        )

    assert sum(ours.forward.values()) == pytest.approx(counted(forward), rel=0.02)
    both = counted(lambda: sum(x.sum() for x in forward()).backward())
    assert ours.training == pytest.approx(both, rel=0.02)


def test_flops_of_regions_agree_with_torchs_counter():
    model, batch = toy.contrastive(), toy.regions(0, 12)
    ours = flops.of_regions(model, batch)
    fields = ("pixel_values", "grid_thw", "regions", "input_ids", "cu_seqlens", "words", "rivals")
    with torch.no_grad():
        forward = counted(lambda: model.region_losses(*(getattr(batch, f) for f in fields)))
    assert sum(ours.forward.values()) == pytest.approx(forward, rel=0.02)


def test_flops_of_learning_what_is_told_agree_with_torchs_counter():
    """But for the products with the words' embeddings, which are left out as they are few."""
    model, batch = toy.aligned(), toy.regions(0, 12)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("mlp_AR."))
    ours = flops.of_aligned(model, batch)

    def features():
        return model.visual_features(batch.pixel_values, batch.grid_thw)

    assert sum(ours.forward.values()) == pytest.approx(counted(features), rel=0.02)
    assert ours.training == pytest.approx(counted(lambda: features().sum().backward()), rel=0.02)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_and_optimizer_bytes_are_exact(name):
    stage = toy.stage(train={"*": 1.0, "visual.*": 0.0}, optim=Optim(name=name))
    model = toy.keye()
    selection = optim.select(model, stage.train)
    optimizer = optim.build(model, selection, stage.train, stage.optim)
    real = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
    assert optimizer_bytes(stage, model, selection, 1) == real
    with torch.device("meta"):
        p = plan(stage, Keye(toy.KEYE))
    assert p.memory["weights (fp32)"] == sum(x.numel() * 4 for x in model.parameters())
    assert p.memory["gradients (fp32)"] == sum(x.numel() * 4 for x in model.parameters() if x.requires_grad)
    assert p.memory["optimizer"] == real


@pytest.mark.parametrize(("shape", "ranks", "want"), [((10, 3), 4, 9), ((2, 5), 4, 5), ((7,), 2, 4), ((), 4, 1)])
def test_a_shard_is_a_chunk_of_the_first_dimension(shape, ranks, want):
    x = torch.zeros(shape)
    assert shard_numel(x, ranks) == want == (torch.chunk(x, ranks)[0].numel() if shape else 1)


@pytest.mark.parametrize("recompute", [False, True])
def test_activation_estimate_is_near_what_autograd_keeps(recompute):
    """Within a quarter of the bytes really saved (wide pack, so that the blocks outweigh the rest)."""
    on = {"activation_checkpointing": recompute, "num_hidden_layers": 6}
    config = dataclasses.replace(
        CONFIG, decoder=dataclasses.replace(DECODER, **on), vision=dataclasses.replace(VISION, **on)
    )
    model, batch, kept = toy.keye(config=config), big_pack(), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model(batch)
    ours = sum(v for k, v in activations(model, batch, 4).items() if "logits" not in k)
    if recompute:  # what one recomputed block holds is not there yet after the forward
        flat = [dataclasses.replace(c, activation_checkpointing=True) for c in (config.decoder, config.vision)]
        ours = 4.0 * 6 * (180 * flat[0].hidden_size + 48 * flat[1].hidden_size)
        assert sum(n for _, n in kept.values()) < 2 * ours + 4 * 180 * 64 * 12
    else:
        assert ours == pytest.approx(sum(n for _, n in kept.values()), rel=0.25)
    assert hidden.shape == (180, 64)


def test_a_frozen_decoder_keeps_what_the_projectors_gradient_needs():
    model = toy.aligned()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("mlp_AR."))
    got = activations(model, big_pack(), 4)
    assert got["activations, tower"] == 0 < got["activations, decoder"]
    assert activations(model, toy.regions(0, 4), 4) == {"activations, tower": 0}


def test_the_published_size_prints_its_published_counts():
    stage = toy.stage(model=SIZES["8b"], budget=Budget(tokens=8192, visual_tokens=6144, packs_per_step=512))
    with torch.device("meta"):
        p = plan(stage, Keye(SIZES["8b"]), 64)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(p))
    text = captured.get()
    for count in ("8,190,735,360", "412,987,248", "40,119,040"):
        assert count in text
    assert "40% of peak (an assumption)" in text and "memory of one rank of 64" in text
    # 6 FLOPs per parameter and token, the rest is attention and the tower's four patches per visual token
    assert 6 * 8.19e9 * 0.8 < p.flops_per_token < 6 * 8.19e9 * 1.4
    assert p.seconds == pytest.approx(p.flops_total / (64 * 989e12 * 0.4))
    assert p.memory_total < p.memory_other  # 8b checkpoints activations; this is what it would take without


def test_plan_of_a_contrastive_stage_and_mistakes():
    stage = toy.stage(objective=ObjectiveSpec("contrastive"), train={"vision_model.*": 1.0})
    model = toy.contrastive().to("meta")
    p = plan(stage, model, 2, device="A100")
    assert p.modules["text"][1] == 0 and p.modules["tower"][1] > 0
    assert p.memory["activations, text tower"] == 0 and p.flops_total > 0
    with pytest.raises(UserError, match=r"device='H900' \(known: .*H100"):
        plan(stage, model, device="H900")
    assert plan(stage, model, peak=1e12).seconds > 0


def test_told_pictures_cost_the_decoder_alone():
    model, batch = toy.keye(), toy.pack(1, pictures=True)
    bare = dataclasses.replace(batch, input_ids=batch.input_ids.clamp(max=toy.IMAGE - 1), grid_thw=batch.grid_thw[:0],
                               pixel_values=batch.pixel_values[:0])  # fmt: skip
    seen, told = (make(ObjectiveSpec(name)).flops(model, [batch]) for name in ("next_token", "told"))
    assert told == make(ObjectiveSpec("next_token")).flops(model, [bare]) < seen
