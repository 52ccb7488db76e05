"""One rank is left alone; blocks are found; a shell takes a gathered state. Many ranks: tests/stages."""

import torch

from mm.decoder import DecoderConfig
from mm.keye import Keye, KeyeConfig
from mm.parallelize import blocks, gathered, parallelize, shell
from vision.vit import VisionConfig

CONFIG = KeyeConfig(
    decoder=DecoderConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, mrope_section=(2, 1, 1),
    ),
    vision=VisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=8
    ),
    image_token_id=30, video_token_id=31,
)  # fmt: skip


def model():
    made = Keye(CONFIG)
    made.init_weights(0)
    return made


def test_one_rank_gets_its_module_back_untouched():
    made = model()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    same = parallelize(made, device=torch.device("cpu"), precision="bf16")
    assert same is made and type(same) is Keye
    assert all(torch.equal(before[k], v) for k, v in same.state_dict().items())
    assert gathered(same, shell(same)) is same


def test_every_block_of_tower_and_decoder_is_a_group():
    assert len(blocks(model())) == 2 + 3


def test_a_shell_has_no_memory_and_takes_a_whole_state():
    made = model()
    made.mlp_AR.requires_grad_(False)
    empty = shell(made)
    assert all(p.is_meta for p in empty.parameters()) and not any(p.is_meta for p in made.parameters())
    assert [p.requires_grad for p in empty.parameters()] == [p.requires_grad for p in made.parameters()]
    assert type(empty) is Keye and empty.config == made.config
    empty.load_state_dict(made.state_dict(), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(empty.parameters(), made.parameters(), strict=True))
