"""Checkpoints: round trips, published layouts, and every way a folder can be wrong."""

import dataclasses
import importlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm.common.errors import UserError
from mm.formats import config_from_hf, config_to_hf, load, load_keye, load_qwen3, load_siglip, save
from mm.keye import Keye
from mm.processor import Processor
from mm.sizes import SIZES
from mm.tokenizer import Tokenizer
from vision.text_tower import ContrastiveModel, TextConfig, TextTower
from vision.vit import VisionConfig, VisionTower

PROCESSOR = Processor(patch_size=4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red ball rolls to the left"] * 4, 300)


@pytest.fixture()
def keye(make_keye, keye_config, tokenizer) -> Keye:
    config = dataclasses.replace(keye_config, decoder=dataclasses.replace(keye_config.decoder, vocab_size=310))
    return make_keye(config=config.bound(tokenizer))


@pytest.fixture()
def folder(tmp_path, keye, tokenizer):
    save(tmp_path / "model", keye, PROCESSOR, tokenizer)
    return tmp_path / "model"


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = dict(a.named_parameters()), dict(b.named_parameters())
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x)


def edit(folder, change) -> None:
    """Rewrite the weights of a folder after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, keye, tokenizer, dtype):
    keye = keye.to(dtype)
    save(tmp_path / "a", keye, PROCESSOR, tokenizer)
    model, processor, words = load(tmp_path / "a")
    assert same(model, keye)
    assert model.config == keye.config
    assert processor == PROCESSOR
    assert words.encode("a red ball") == tokenizer.encode("a red ball")
    half = load_keye(tmp_path / "a", dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("change", [
    {"projector_norm": "post"}, {"vision": {"segments": "frame"}}, {"vision": {"rope": False}},
    {"decoder": {"tie_word_embeddings": True}}, {"decoder": {"rope_theta": 8e6}},
])  # fmt: skip
def test_every_number_survives(tmp_path, make_keye, keye, tokenizer, change):
    config = dataclasses.replace(
        keye.config, projector_norm=change.get("projector_norm", "pre"),
        vision=dataclasses.replace(keye.config.vision, **change.get("vision", {})),
        decoder=dataclasses.replace(keye.config.decoder, **change.get("decoder", {})),
    )  # fmt: skip
    model = make_keye(config=config)
    save(tmp_path / "a", model, PROCESSOR, tokenizer)
    back = load_keye(tmp_path / "a")
    assert back.config == config
    assert same(back, model)


def test_shards_and_their_index(tmp_path, keye, tokenizer):
    save(tmp_path / "a", keye, PROCESSOR, tokenizer, shard_bytes=50_000)
    files = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["weight_map"].keys() == keye.state_dict().keys()
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in keye.parameters())
    assert same(load(tmp_path / "a")[0], keye)
    (tmp_path / "a" / files[1]).unlink()
    with pytest.raises(UserError, match=files[1]):
        load(tmp_path / "a")


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path, keye, tokenizer):
    save(tmp_path / "a", keye, PROCESSOR, tokenizer, shard_bytes=50_000)
    keye.init_weights(5)
    save(tmp_path / "a", keye, PROCESSOR, tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json", "model.safetensors", "processor.json", "tokenizer.json"
    ]  # fmt: skip
    assert same(load(tmp_path / "a")[0], keye)


def test_a_failed_save_keeps_the_old_folder(folder, keye, tokenizer, monkeypatch):
    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mm.formats.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save(folder, keye, PROCESSOR, tokenizer)
    assert same(load(folder)[0], keye)


def test_gathered_state_is_written_instead_of_the_models(tmp_path, keye, tokenizer):
    state = {n: t + 1 for n, t in keye.state_dict().items()}
    save(tmp_path / "a", keye, PROCESSOR, tokenizer, state=state)
    assert torch.equal(load(tmp_path / "a")[0].lm_head.weight, keye.lm_head.weight + 1)


def test_the_published_config(shared_data):
    """Keye-VL-8B-Preview's own config.json is the size 8b; ours has the same numbers under the same names."""
    data = json.loads((shared_data / "oracles/official/keye_vl_8b_preview/config.json").read_text())
    config = config_from_hf(data)
    published = SIZES["8b"]  # how it is computed (checkpointing, attention) is the stage's, not the checkpoint's
    plain = {part: dataclasses.replace(getattr(published, part), activation_checkpointing=False)
             for part in ("vision", "decoder")}  # fmt: skip
    assert config == dataclasses.replace(published, **plain)
    ours = config_to_hf(config)
    shared = ours.keys() & data.keys() - {"vision_config", "rope_scaling"}
    assert {k: ours[k] for k in shared} == {k: data[k] for k in shared}
    assert ours["rope_scaling"] == data["rope_scaling"]
    shared = ours["vision_config"].keys() & data["vision_config"].keys() - {"temporal_patch_size"}
    assert {k: ours["vision_config"][k] for k in shared} == {k: data["vision_config"][k] for k in shared}
    newer = config_from_hf({**data, "model_type": "KeyeVL1_5"})
    assert (newer.projector_norm, newer.vision.segments) == ("post", "frame")


def test_the_unused_tables_alone_are_skipped(folder, keye):
    unused = {
        "visual.vision_model.embeddings.packing_position_embedding.weight": torch.zeros(4, 32),
        "visual.vision_model.head.probe": torch.zeros(1, 1, 32),
        "visual.vision_model.head.attention.in_proj_weight": torch.zeros(96, 32),
    }
    edit(folder, lambda t: t.update(unused))
    assert same(load_keye(folder), keye)
    edit(folder, lambda t: t.update({"visual.vision_model.heads.x": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"unexpected: visual.vision_model.heads.x \(model.safetensors\)"):
        load_keye(folder)


def test_what_differs_is_named(folder):
    def change(t):
        del t["mlp_AR.linear_1.bias"]
        t["model.norm.weight"] = torch.zeros(47)
        t["extra.weight"] = torch.zeros(2)

    edit(folder, change)
    with pytest.raises(UserError) as e:
        load(folder)
    for words in (str(folder), "missing: mlp_AR.linear_1.bias", "unexpected: extra.weight",
                  "model.norm.weight in model.safetensors is [47], the model has [48]"):  # fmt: skip
        assert words in str(e.value)


@pytest.mark.parametrize("keep", [0, 5, 200, -40])
def test_a_file_cut_short(folder, keep):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:keep])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        load(folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="refused"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"holds no model.safetensors"):
        load(folder)


def test_an_index_cannot_lead_out_of_its_folder(folder, tmp_path):
    shutil.copy(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="elsewhere"):
        load(folder)


def test_other_mistakes(folder, tmp_path, keye, tokenizer):
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(UserError, match="model_type 'llama'"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "hidden_size"}))
    with pytest.raises(UserError, match="hidden_size"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "image_token_id": 5}))
    with pytest.raises(UserError, match=r"image_pad.*is 5 in the model"):
        load(folder)
    with pytest.raises(UserError, match="patch_size is 4 in the model, 14 beside it"):
        save(tmp_path / "b", keye, Processor(), tokenizer)


def contrastive(**vision) -> ContrastiveModel:
    numbers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ContrastiveModel(
        VisionTower(VisionConfig(**numbers, patch_size=4, image_size=16, **vision)),
        TextTower(TextConfig(**numbers, vocab_size=64, max_positions=12, projection_size=32)),
    )
    model.init_weights(1)
    return model


def test_a_contrastive_model_goes_round_and_hands_its_tower_on(tmp_path, keye, tokenizer):
    model = contrastive()
    save(tmp_path / "a", model, PROCESSOR, tokenizer)
    back = load(tmp_path / "a")[0]
    assert isinstance(back, ContrastiveModel)
    assert same(back, model)
    assert back.vision_model.config == model.vision_model.config
    before = keye.lm_head.weight.clone()
    load_siglip(keye, tmp_path / "a")
    state = model.vision_model.state_dict()
    for name, p in keye.visual["vision_model"].named_parameters():
        assert torch.equal(p, state[name]), name
    assert torch.equal(keye.lm_head.weight, before)


def test_a_siglip_folder_of_transformers(tmp_path, keye):
    hf = importlib.import_module("transformers")
    numbers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = hf.SiglipModel(hf.SiglipConfig(
        text_config={**numbers, "vocab_size": 64, "max_position_embeddings": 12},
        vision_config={**numbers, "patch_size": 4, "image_size": 16},
    ))  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = contrastive(rope=False)
    load_siglip(ours, tmp_path)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert all(torch.equal(p, theirs.get_parameter(n)) for n, p in ours.named_parameters())
    load_siglip(keye, tmp_path)
    weight = "embeddings.position_embedding.weight"
    assert torch.equal(keye.visual["vision_model"].get_parameter(weight), theirs.vision_model.get_parameter(weight))


def test_transformers_reads_what_we_write(tmp_path, tokenizer):
    """A contrastive model without rotary embedding is a SigLIP folder."""
    hf = importlib.import_module("transformers")
    model = contrastive(rope=False)
    save(tmp_path / "a", model, PROCESSOR, tokenizer)
    theirs, report = hf.SiglipModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in theirs.named_parameters())


def qwen3(folder, **change) -> None:
    hf = importlib.import_module("transformers")
    numbers = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    }  # fmt: skip
    hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**numbers, **change})).save_pretrained(folder, max_shard_size="60KB")


def test_a_sharded_qwen3_folder(tmp_path, make_keye):
    qwen3(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = make_keye()
    tower = model.mlp_AR.linear_1.weight.clone()
    load_qwen3(model, tmp_path)
    found = {n: t for f in tmp_path.glob("*.safetensors") for n, t in load_file(f).items()}
    assert all(torch.equal(model.get_parameter(n), t) for n, t in found.items())
    assert torch.equal(model.mlp_AR.linear_1.weight, tower)


def test_qwen3_numbers_that_shapes_do_not_show(tmp_path, make_keye):
    qwen3(tmp_path)
    with pytest.raises(UserError, match=r"rope_theta is 10000.0 there, 1000000.0 here"):
        load_qwen3(make_keye(rope_theta=1e6), tmp_path)
    with pytest.raises(UserError, match="tie_word_embeddings is False there, True here"):
        load_qwen3(make_keye(tie_word_embeddings=True), tmp_path)
    with pytest.raises(UserError, match="num_key_value_heads is 2 there, 4 here"):
        load_qwen3(make_keye(num_key_value_heads=4), tmp_path)


def test_a_tied_folder_that_stores_its_head_twice(tmp_path, make_keye):
    qwen3(tmp_path, tie_word_embeddings=True)
    for name in tmp_path.glob("*.safetensors"):
        tensors = load_file(name)
        if "model.embed_tokens.weight" in tensors:
            save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, name)
    model = make_keye(tie_word_embeddings=True)
    load_qwen3(model, tmp_path)
    assert not hasattr(model, "lm_head")
