"""Generation: batched, cached and sampled answers are those of the plain model, one by one."""

import dataclasses
import importlib

import pytest
import torch

from mm.common.errors import UserError
from mm.generate import generate, generate_ids, sample
from mm.prompt import Example
from mm.tokenizer import Tokenizer

PROMPTS = [[11], [3, (1, 4, 6), 9], [7, (3, 4, 4), 6], [1], [2, (1, 2, 2), 3, (2, 6, 4), 5], [30]]


def plain(model, batch, steps: int) -> list[int]:
    """Greedy without a cache: the whole row again for every token."""
    ids, position, out = batch.input_ids, batch.position_ids, []
    for _ in range(steps):
        cu = torch.tensor([0, len(ids)], dtype=torch.int32)
        row = dataclasses.replace(batch, input_ids=ids, position_ids=position, cu_seqlens=cu)
        logits = model.logits(model(row))[-1]
        logits[[90, 91]] = -torch.inf
        out.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor(out[-1:])])
        position = torch.cat([position, (position.max() + 1).expand(3, 1)], dim=1)
    return out


def until(ids: list[int], stop: set[int]) -> list[int]:
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in stop), ids)


def test_batched_is_one_by_one_is_uncached(make_keye, make_batch, unpack):
    model, batch = make_keye(), make_batch(PROMPTS)
    together = generate_ids(model, batch, max_new_tokens=12, stop_ids=())
    for alone, got in zip(unpack(batch), together, strict=True):
        assert generate_ids(model, alone, max_new_tokens=12, stop_ids=()) == [got]
        assert plain(model, alone, 12) == got
    assert len({tuple(t) for t in together}) > 1


def test_rows_that_stop_leave_the_others_alone(make_keye, make_batch):
    model, batch = make_keye(), make_batch(PROMPTS)
    full = generate_ids(model, batch, max_new_tokens=12, stop_ids=())
    stop = {full[0][2], full[3][0], full[4][5]}
    got = generate_ids(model, batch, max_new_tokens=12, stop_ids=stop)
    assert got == [until(ids, stop) for ids in full]
    assert len({len(ids) for ids in got}) > 2


def test_it_is_transformers_generate(make_keye, make_batch, tmp_path):
    hf = importlib.import_module("transformers")
    from mm.formats import load_qwen3

    theirs = hf.Qwen3ForCausalLM(hf.Qwen3Config(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        initializer_range=0.5,
    )).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    model, batch = make_keye(), make_batch([[13]])
    load_qwen3(model, tmp_path)
    want = theirs.generate(
        batch.input_ids[None], max_new_tokens=10, do_sample=False, suppress_tokens=[90, 91], pad_token_id=0
    )[0, 13:].tolist()
    assert generate_ids(model, batch, max_new_tokens=10, stop_ids=()) == [want]


def test_sampling_depends_on_its_own_seed_alone(make_keye, make_batch, unpack):
    model, batch = make_keye(), make_batch(PROMPTS)
    settings = {"max_new_tokens": 10, "stop_ids": (), "temperature": 1.0, "top_p": 0.95, "top_k": 50}
    seeds = list(range(len(PROMPTS)))
    together = generate_ids(model, batch, seeds=seeds, **settings)
    alone = [generate_ids(model, b, seeds=[s], **settings)[0] for b, s in zip(unpack(batch), seeds, strict=True)]
    assert together == alone
    assert together != generate_ids(model, batch, seeds=[s + 1 for s in seeds], **settings)


def draws(logits, n=4000, **settings):
    """Shares of each token over n draws from one row of logits."""
    streams = [torch.Generator().manual_seed(0)] * n
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **settings}
    got = sample(torch.tensor(logits).expand(n, -1), streams, **settings)
    return torch.bincount(got, minlength=len(logits)) / n


def test_sampling_follows_the_probabilities():
    logits = [1.0, 3.0, 2.0, 0.0]
    assert torch.allclose(draws(logits), torch.tensor(logits).softmax(0), atol=0.03)
    assert torch.allclose(draws(logits, temperature=2.0), (torch.tensor(logits) / 2).softmax(0), atol=0.03)
    kept = torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf]).softmax(0)
    assert torch.allclose(draws(logits, top_k=2), kept, atol=0.03)
    assert torch.allclose(draws(logits, top_p=0.8), kept, atol=0.03)  # 0.64 + 0.24 is the first sum >= 0.8
    assert draws(logits, top_p=0.01)[1] == 1.0
    assert draws(logits, top_k=1)[1] == 1.0
    assert draws([0.0, -torch.inf, 0.0])[1] == 0.0


def test_no_token_beyond_the_tokenizer_and_no_placeholder(make_keye, make_batch):
    model, batch = make_keye(), make_batch([[5]] * 8)
    with torch.no_grad():  # a model that wants nothing else
        model.lm_head.weight[[90, 91, 96]] += 100 * model.lm_head.weight[[90, 91, 96]].abs()
    got = generate_ids(
        model, batch, max_new_tokens=20, stop_ids=(), temperature=2.0, seeds=range(8), vocab_size=95
    )
    tokens = {t for ids in got for t in ids}
    assert len(tokens) > 20
    assert not tokens & {90, 91, 95, 96}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red ball rolls to the left", "two green cubes"] * 4, 300)


@pytest.fixture()
def talker(make_keye, keye_config, tokenizer):
    """A model bound to a real tokenizer, and prompts for it; two of them are the same."""
    config = dataclasses.replace(keye_config, decoder=dataclasses.replace(keye_config.decoder, vocab_size=310))
    texts = ["a red ball", "two", "a red ball", "the left cubes roll"]
    return make_keye(config=config.bound(tokenizer)), [prompt(tokenizer.encode(t)) for t in texts]


def prompt(ids: list[int]) -> Example:
    length = len(ids)
    return Example(
        input_ids=torch.tensor(ids), loss_mask=torch.zeros(length, dtype=torch.bool),
        position_ids=torch.arange(length).expand(3, -1), pixel_values=torch.zeros(0, 48, dtype=torch.uint8),
        grid_thw=torch.zeros(0, 3, dtype=torch.int64), turns=1,
    )  # fmt: skip


def test_texts_do_not_depend_on_their_neighbours(talker, tokenizer):
    model, prompts = talker
    for settings in ({}, {"temperature": 1.0, "seed": 5}):
        together = generate(model, prompts, tokenizer, max_new_tokens=8, **settings)
        assert together == generate(model, prompts, tokenizer, max_new_tokens=8, batch_size=1, **settings)
        backwards = generate(model, prompts[::-1], tokenizer, max_new_tokens=8, **settings)
        assert [backwards[2], backwards[0]] == [together[1], together[3]]
        if settings:  # equal prompts are asked twice, not answered twice
            assert together[0] != together[2]
            assert sorted([backwards[1], backwards[3]]) == sorted([together[0], together[2]])
        else:
            assert together[0] == together[2]


def test_answers_end_before_the_stop_token_and_keep_grounding(talker, tokenizer, monkeypatch):
    model, prompts = talker
    ids = tokenizer.encode_special("<|box_start|>ball<|box_end|><|im_end|>")
    monkeypatch.setattr("mm.generate.generate_ids", lambda *a, **k: [ids, ids[:-1], [ids[-1]], []])
    got = generate(model, prompts, tokenizer, max_new_tokens=8)
    assert got == ["<|box_start|>ball<|box_end|>"] * 2 + ["", ""]


def test_seeds_must_fit(talker, tokenizer, make_keye, make_batch):
    model, prompts = talker
    with pytest.raises(UserError, match="3 seeds for 4 examples"):
        generate(model, prompts, tokenizer, max_new_tokens=2, seed=[1, 2, 3])
    with pytest.raises(UserError, match="one seed per prompt"):
        generate_ids(make_keye(), make_batch([[4]]), max_new_tokens=2, stop_ids=(), temperature=1.0)
    assert generate(model, [], tokenizer, max_new_tokens=2) == []
