"""The road of small and 8b: from Hugging Face folders of SigLIP and Qwen3 as published, with small numbers."""

import importlib
import json

import pytest
import torch
from tokenizers import Tokenizer as Bpe
from tokenizers import models, normalizers, pre_tokenizers, trainers

from mm.common.files import read_json, write_json
from mm.formats import load
from mm.tokenizer import SIGLIP_END, Tokenizer
from stages import cli

TEXTS = ["a red ball slides left", "a large blue glass ring falls. the sign says SALE.", "How many? 0123456789"] * 20
NUMBERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PIECES = 90


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """Weights by transformers; a Unigram tokenizer in lower case whose only added tokens are </s> and <unk>."""
    folder, hf = tmp_path_factory.mktemp("siglip"), importlib.import_module("transformers")
    unigram = Bpe(models.Unigram())
    unigram.normalizer = normalizers.Lowercase()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.train_from_iterator(TEXTS, trainers.UnigramTrainer(
        vocab_size=PIECES, special_tokens=["<pad>", SIGLIP_END, "<unk>"], unk_token="<unk>", show_progress=False,
    ))  # fmt: skip
    data = json.loads(unigram.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<pad>"]
    write_json(folder / "tokenizer.json", data)
    torch.manual_seed(0)
    hf.SiglipModel(hf.SiglipConfig(
        text_config={**NUMBERS, "vocab_size": unigram.get_vocab_size(), "max_position_embeddings": 64},
        vision_config={**NUMBERS, "patch_size": 16, "image_size": 64},
    )).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder, hf = tmp_path_factory.mktemp("qwen3"), importlib.import_module("transformers")
    tokenizer = Tokenizer.train(TEXTS, 400)
    tokenizer.save(folder)
    torch.manual_seed(0)
    hf.Qwen3ForCausalLM(hf.Qwen3Config(
        **{**NUMBERS, "vocab_size": 512, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
           "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    )).save_pretrained(folder)  # fmt: skip
    return folder


def test_captions_for_siglips_text_tower_are_as_it_was_trained(siglip, tmp_path):
    """As transformers' processor makes them with padding="max_length": all places filled, no token that the tower has
    no row for; and still so when saved and loaded again."""
    hf = importlib.import_module("transformers")
    theirs = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(siglip / "tokenizer.json"), eos_token=SIGLIP_END, pad_token=SIGLIP_END, unk_token="<unk>"
    )
    tokenizer = Tokenizer.load(siglip)
    assert tokenizer.vocab_size == len(theirs) == read_json(siglip / "config.json")["text_config"]["vocab_size"]
    tokenizer.save(tmp_path)
    for text in ("A red BALL falls", "the sign says SALE. " * 30, ""):
        end = [theirs.eos_token_id]
        want = theirs.encode(text, add_special_tokens=False)[:63] + end
        want += end * (64 - len(want))
        assert tokenizer.caption(text, 64) == Tokenizer.load(tmp_path).caption(text, 64) == want
    ours = Tokenizer.train(TEXTS, 400)
    assert ours.caption("a red ball", 64) == [*ours.encode("a red ball"), ours.id("<|im_end|>")]


def test_from_siglip_and_qwen3_to_an_aligned_model(micro_world, siglip, qwen3, tmp_path, capsys):
    """Two steps of each stage at --size small, its numbers made small, its data given by name."""
    tower = {**NUMBERS, "image_size": 64}
    text = {**NUMBERS, "vocab_size": read_json(siglip / "config.json")["text_config"]["vocab_size"]}
    decoder = {**NUMBERS, "vocab_size": 512, "num_key_value_heads": 2, "head_dim": 16}
    settings = [f"s0_vit.model.text.{k}={v}" for k, v in {**text, "projection_size": 32}.items()]
    settings += [f"{s}.{k}={v}" for s in ("s0_vit.model.vision", "s1_align.model.vision") for k, v in tower.items()]
    settings += [f"s1_align.model.decoder.{k}={v}" for k, v in decoder.items()]
    settings += ["s1_align.model.decoder.mrope_section=[2, 3, 3]"]
    budget = {"tokens": 2048, "visual_tokens": 1536, "packs_per_step": 2, "steps": 2}
    settings += [f"{s}.budget.{k}={v}" for s in ("s0_vit", "s1_align") for k, v in budget.items()]
    data = [f"--data={name}={micro_world}/sources/{name}" for name in ("vit_pairs", "caption", "video_caption")]
    code = cli.main([
        "run", "keye", "--size", "small", "--to", "s1", f"--siglip={siglip}", f"--qwen3={qwen3}", *data, "--ranks=1",
        "--workers=0", f"--out={tmp_path / 'run'}", *(f"--set={s}" for s in settings),
    ])  # fmt: skip
    said = "".join(capsys.readouterr())
    assert code == 0 and said.count("2/2 100%") == 2, said
    model, processor, tokenizer = load(tmp_path / "run/s1_align/model")
    assert processor.patch_size == model.config.vision.patch_size == 16
    assert tokenizer.hash == Tokenizer.load(qwen3).hash  # the decoder's, not the text tower's
    towers = load(tmp_path / "run/s0_vit/model")
    assert towers[2].vocab_size == text["vocab_size"]
    ours, theirs = dict(model.named_parameters()), dict(towers[0].named_parameters())
    assert all(torch.equal(p, theirs[name.removeprefix("visual.")]) for name, p in ours.items()
               if name.startswith("visual."))  # fmt: skip
