"""The three sizes. A size is numbers; no code asks which size it is."""

from mm.decoder import DecoderConfig
from mm.keye import KeyeConfig
from mm.processor import Processor
from vision.vit import VisionConfig

# Trains from nothing on two CPU cores in minutes, with a tokenizer of its own. The placeholder ids are those of
# a full tokenizer of 2048 entries; `bound` takes them from the one at hand.
TINY = KeyeConfig(
    vision=VisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=112,
    ),
    decoder=DecoderConfig(
        vocab_size=2048, hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, rope_theta=1e4, mrope_section=(4, 6, 6),
    ),
    image_token_id=2025, video_token_id=2026,
)  # fmt: skip

# One GPU, hours: SigLIP-base-patch16-384 and Qwen3-0.6B.
SMALL = KeyeConfig(
    vision=VisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16,
        image_size=384,
    ),
    decoder=DecoderConfig(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
)  # fmt: skip

# As published: Keye-VL-8B-Preview (SigLIP-so400m-384-14 and Qwen3-8B).
PUBLISHED = KeyeConfig(
    vision=VisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        activation_checkpointing=True,
    ),
    decoder=DecoderConfig(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, activation_checkpointing=True,
    ),
)  # fmt: skip

SIZES: dict[str, KeyeConfig] = {"tiny": TINY, "small": SMALL, "8b": PUBLISHED}

PROCESSORS: dict[str, Processor] = {
    "tiny": Processor(
        image_max_tokens=25, video_max_frames=8, frame_min_tokens=4, frame_max_tokens=30, video_max_tokens=240
    ),
    "small": Processor(
        patch_size=16, image_max_tokens=1280, video_max_frames=64, frame_min_tokens=16, frame_max_tokens=256,
        video_max_tokens=4096,
    ),
    "8b": Processor(),
}  # fmt: skip
