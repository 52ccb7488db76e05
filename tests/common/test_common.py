"""Ground floor: seeds, files, configs, packed attention, progress."""

import io
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed import TCPStore

from mm.batch import Batch
from mm.common import dist
from mm.common.attention import resolve, varlen_attention
from mm.common.config import from_dict, override, to_dict
from mm.common.errors import BadSample, UserError
from mm.common.files import atomic_folder, read_json, read_jsonl, write_atomic
from mm.common.progress import Progress, duration
from mm.common.seeds import derive, rng


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    steps: int = 10
    optim: Inner = field(default_factory=Inner)
    train: dict = field(default_factory=lambda: {"visual.*": 1.0})


@dataclass(frozen=True)
class Pair:
    width: int = 8
    heads: int = 4

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError("heads do not fit the width")


def test_streams_are_stable_and_independent():
    assert derive(0, "motion", 3) == 7964518731097404220
    assert derive(0, "a", 1) != derive(0, "a", "1") != derive(1, "a", "1")
    assert np.array_equal(rng(5, "x").random(4), rng(5, "x").random(4))


def test_overrides_reach_in_and_name_the_nearest():
    new = override(Outer(), ["optim.lr=1e-4", "steps=3", "optim.betas=[0.8, 0.9]"])
    assert (new.optim.lr, new.steps, new.optim.betas) == (1e-4, 3, (0.8, 0.9))
    pair = override(Pair(), ["heads=3", "width=6"])  # each alone would not fit the other as it was
    assert (pair.width, pair.heads) == (6, 3) and override(Pair(), ["width=6", "heads=3"]) == pair
    with pytest.raises(UserError, match="did you mean 'lr'"):
        override(Outer(), ["optim.lrr=1"])
    with pytest.raises(UserError, match="wanted"):
        override(Outer(), ["steps=many"])
    with pytest.raises(UserError, match="key=value"):
        override(Outer(), ["steps"])


def test_config_round_trip_is_strict():
    assert from_dict(Outer, json.loads(json.dumps(to_dict(Outer())))) == Outer()
    with pytest.raises(UserError, match="stepz"):
        from_dict(Outer, {"stepz": 1})


def test_files_are_whole_or_absent(tmp_path):
    write_atomic(tmp_path / "a.json", "{}")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "f") as f:
        (f / "half").write_text("x")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["a.json"]
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_jsonl(tmp_path / "b.jsonl") == [{"a": 1}, {"a": 2}]
    (tmp_path / "c.jsonl").write_text('{"a"\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"c.jsonl line 1"):
        read_jsonl(tmp_path / "c.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("lengths", [[5, 5, 3, 7, 7, 7, 1], [4], [0, 3, 3], [9, 1, 9, 1]])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_equals_one_masked_call(lengths, causal):
    n, heads, kv, d = sum(lengths), 4, 2, 8
    q, k, v = torch.randn(n, heads, d), torch.randn(n, kv, d), torch.randn(n, kv, d)
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    seg = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = seg[:, None] == seg[None]
    if causal:
        mask &= torch.ones(n, n, dtype=torch.bool).tril()
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = varlen_attention(*inputs, cu, causal=causal)
    reference = [x.clone().requires_grad_() for x in (q, k, v)]
    rq, rk, rv = reference
    want = F.scaled_dot_product_attention(
        rq.transpose(0, 1), rk.repeat_interleave(2, 1).transpose(0, 1), rv.repeat_interleave(2, 1).transpose(0, 1),
        attn_mask=mask,
    ).transpose(0, 1)  # fmt: skip
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    for a, b in zip(inputs, reference, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


def test_a_missing_backend_is_an_error_not_a_fallback():
    assert resolve("sdpa") == "sdpa"
    with pytest.raises(UserError, match="not known"):
        resolve("fast")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="attention=sdpa"):
            resolve("flash")
        assert resolve("auto") == "sdpa"


def test_targets_never_cross_a_segment():
    batch = Batch(
        input_ids=torch.arange(6), loss_mask=torch.tensor([True, True, False, True, True, True]),
        position_ids=torch.zeros(3, 6, dtype=torch.long), cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32),
        pixel_values=torch.zeros(0, 588, dtype=torch.uint8), grid_thw=torch.zeros(0, 3, dtype=torch.long),
    )  # fmt: skip
    assert batch.target_mask().tolist() == [True, False, False, True, True, False]


def test_bad_samples_survive_a_process_border():
    import pickle

    e = pickle.loads(pickle.dumps(BadSample("no video stream", shard="s", key="k")))
    assert str(e) == "s/k: no video stream"


def test_progress_says_rate_and_time_left():
    out = io.StringIO()
    with Progress(4, "clips", stream=out) as p:
        p.update(2, note="fine")
    assert "2/4" in out.getvalue() and "fine" in out.getvalue() and duration(3725) == "1h02m"


def test_ranks_of_one_attempt_agree_on_a_prefix_and_never_on_a_dead_ones():
    """What torchrun's shared store looks like after a restart: the keys of the dead attempt are still there."""
    limit = timedelta(seconds=20)
    host = TCPStore("127.0.0.1", 0, is_master=True, timeout=limit)

    def join(rank: int) -> str:
        return dist._fresh_prefix(TCPStore("127.0.0.1", host.port, timeout=limit), rank, 3, limit)

    def attempt(order: list[int]) -> str:
        with ThreadPoolExecutor(3) as pool:
            names = list(pool.map(lambda r: (time.sleep(0.2 * order.index(r)), join(r))[1], range(3)))
        assert len(set(names)) == 1
        return names[0]

    assert len({attempt([0, 1, 2]), attempt([0, 2, 1]), attempt([1, 2, 0])}) == 3
