"""Sixteen real clips are learned by heart: importer, packer, engine, checkpoint and generation on what nobody made
for them."""

import json
from pathlib import Path

import pytest
import torch

from data_mix.importers import import_data
from data_mix.mix import SourceSpec
from data_mix.shards import Source
from eval.answer import Checkpoint
from mm.common.files import read_jsonl
from mm.generate import generate
from mm.sizes import SIZES
from stages.keye.run import Means, run_stage, texts_of, train_tokenizer
from stages.stage import Budget, Checkpoints, Optim, Stage

STEPS, CLIPS = 80, 16


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_sixteen_real_clips_are_learned_by_heart(shared_data, tmp_path, one_thread):
    rows = read_jsonl(shared_data / "videos/clips_dev.jsonl")[:CLIPS]
    lines = [json.dumps({"file": row["lite"], "caption": row["caption"]}) for row in rows]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    lite = shared_data / "videos/lite"
    report = import_data("folder", lite, tmp_path / "clips", captions=tmp_path / "captions.jsonl", quiet=True)
    others = len(list(lite.glob("*.mp4"))) - CLIPS
    assert report.samples == CLIPS and report.reasons() == {"no caption": others}

    stage = Stage(
        name="keye.by_heart", size="tiny", model=SIZES["tiny"], train={"*": 1.0},
        mix=[SourceSpec("clips", 1.0, "samples")],
        optim=Optim(name="muon", lr=3e-3, weight_decay=0.0, schedule="wsd", warmup_steps=8, decay_share=0.5,
                    min_lr_ratio=0.02),
        budget=Budget(tokens=2048, visual_tokens=1792, packs_per_step=1, steps=STEPS), precision="auto",
        checkpoint=Checkpoints(every_steps=0),
    )  # fmt: skip
    tokenizer = train_tokenizer(texts_of([tmp_path / "clips"]), tmp_path / "tokenizer")
    means = Means({"tokenizer": tokenizer}, {"clips": tmp_path / "clips"}, cache=tmp_path / "cache", quiet=True)
    made = run_stage(stage, tmp_path / "run", means)

    losses = [row["loss"]["next_token"] for row in read_jsonl(tmp_path / "run/log.jsonl")]
    assert losses[0] > 6 and max(losses[-6:]) < 0.05, losses[-6:]
    assert json.loads((tmp_path / "run/skipped.json").read_text()) == {}

    model, source = Checkpoint(made), Source(tmp_path / "clips")
    talks = [source.sample(i) for i in range(CLIPS)]
    clips = {talk["meta"]["file"]: talk["messages"] for talk in talks}
    examples = [_asked(model, lite / name, messages[0]) for name, messages in clips.items()]
    said = generate(model.model, examples, model.tokenizer, max_new_tokens=80)
    wanted = [messages[1]["content"] for messages in clips.values()]
    assert len(set(wanted)) == CLIPS and said == wanted


def _asked(model: Checkpoint, clip: Path, question: dict):
    parts = [{**p, "video": clip.name} if p["type"] == "video" else p for p in question["content"]]
    return model.example([{**question, "content": parts}], clip.parent)
