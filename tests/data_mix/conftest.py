"""A small tokenizer, a small processor and a small source whose media can be decoded."""

import pytest

from data_mix.shards import ShardWriter
from mm.processor import Processor
from mm.tokenizer import Tokenizer
from tests.data_mix.made import clip, picture, turn


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(["what is it? a red circle moves left. 一个红色的圆。 0123456789"] * 3, 600)


@pytest.fixture(scope="session")
def processor():
    return Processor(
        image_max_tokens=25, video_max_frames=8, frame_min_tokens=4, frame_max_tokens=16, video_max_tokens=128
    )


@pytest.fixture(scope="session")
def real_source(tmp_path_factory):
    """24 samples: pictures, clips (one with its frames in another order) and text, all decodable."""
    folder = tmp_path_factory.mktemp("real") / "mixed"
    with ShardWriter(folder, "mixed", max_samples=10) as w:
        for i in range(24):
            if i % 4 == 3:
                w.write(f"t{i:02d}", {"messages": turn("only text " * (i % 5 + 1)), "family": "text"}, {})
            elif i % 4 == 2:
                messages = turn("a clip", "mp4")
                if i == 2:
                    messages[0]["content"][0]["frames"] = [3, 1, 0, 2]
                w.write(f"v{i:02d}", {"messages": messages, "family": "video_caption"}, {"mp4": clip(i)})
            else:
                media = {"0.png": picture(i), "1.png": picture(i + 100, (30, 90))}
                messages = turn("a red circle", "0.png") + turn("a blue one", "1.png")
                w.write(f"i{i:02d}", {"messages": messages, "family": "vqa"}, media)
    return folder
