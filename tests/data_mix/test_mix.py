"""The order of draws: pure, fair to weights, once an epoch, in long runs."""

from collections import Counter

import numpy as np
import pytest

from data_mix.mix import BLOCK, PERIOD, WINDOW, Mix, SourceSpec, _per_period
from data_mix.shards import ShardWriter
from mm.common.errors import UserError


def make(folder, n):
    with ShardWriter(folder, folder.name) as w:
        for i in range(n):
            w.write(f"k{i}", {"messages": [{"role": "text", "content": str(i)}]}, {})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mix")
    return [make(root / "a", 1000), make(root / "b", 37), make(root / "c", 700)]


def specs(folders, weights=(1, 1, 1), unit="samples"):
    return [SourceSpec(f, w, unit) for f, w in zip(folders, weights, strict=True)]


def test_draw_is_a_pure_function_of_position(folders):
    a, b = Mix(specs(folders), seed=3), Mix(specs(folders), seed=3)
    forward = [a.draw(i) for i in range(3000)]
    some = np.random.default_rng(0).permutation(3000)[:500]
    assert all(b.draw(int(i)) == forward[i] for i in some)
    assert b.draw(PERIOD * 5 + 17) == a.draw(PERIOD * 5 + 17)
    assert [Mix(specs(folders), seed=4).draw(i) for i in range(50)] != forward[:50]


def test_each_epoch_has_every_sample_once_in_a_new_order(folders):
    mix = Mix(specs(folders), seed=1)
    draws = [mix.draw(i) for i in range(4000)]
    for source, length in enumerate((1000, 37, 700)):
        own = [d for d in draws if d.source == source]
        first = [d.sample for d in own if d.epoch == 0]
        second = [d.sample for d in own if d.epoch == 1]
        assert sorted(first) == list(range(length))
        assert len(second) == len(set(second)) and second[:20] != first[:20]


def test_reads_come_in_long_runs(folders):
    mix = Mix([SourceSpec(folders[0], 1, "samples")], seed=0)
    samples = np.array([mix.draw(i).sample for i in range(BLOCK * (WINDOW - 1))])
    assert len(np.unique(samples // BLOCK)) <= WINDOW


@pytest.mark.parametrize("weights", [(1, 2, 7), (0.5, 0.001, 3)])
def test_shares_in_samples(folders, weights):
    mix = Mix(specs(folders, weights), seed=2)
    count = Counter(mix.draw(i).source for i in range(PERIOD // 4))
    for source, weight in enumerate(weights):
        assert count[source] == pytest.approx(PERIOD / 4 * weight / sum(weights), rel=0.01, abs=2)


def test_shares_in_tokens(folders):
    random, weights = np.random.default_rng(0), (2, 1, 1)
    lengths = [random.integers(*b, n) for b, n in (((10, 50), 1000), ((400, 900), 37), ((5, 3000), 700))]
    mix = Mix(specs(folders, weights, "tokens"), seed=2)
    with pytest.raises(UserError, match="PackPlan"):
        mix.draw(0)
    mix.bind([np.arange(len(x)) for x in lengths], [x.mean() for x in lengths])
    tokens = np.zeros(3)
    for d in map(mix.draw, range(PERIOD)):
        tokens[d.source] += lengths[d.source][d.sample]
    assert tokens / tokens.sum() == pytest.approx(np.array(weights) / 4, rel=0.02)


def test_only_usable_samples_are_drawn(folders):
    mix = Mix(specs(folders), seed=2)
    before = mix.fingerprint
    mix.bind([np.arange(0, 1000, 7), np.arange(37), np.arange(700)], [1, 1, 1])
    drawn = {d.sample for d in map(mix.draw, range(1000)) if d.source == 0}
    assert drawn == set(range(0, 1000, 7)) and mix.fingerprint != before


def test_fingerprint_covers_weights_unit_seed_and_data(folders):
    prints = {
        Mix(specs(folders), seed=0).fingerprint, Mix(specs(folders), seed=1).fingerprint,
        Mix(specs(folders, (1, 1, 2)), seed=0).fingerprint, Mix(specs(folders[:2], (1, 1)), seed=0).fingerprint,
        Mix(specs(folders, unit="tokens"), seed=0).fingerprint,
    }  # fmt: skip
    assert len(prints) == 5
    assert Mix(specs(folders), seed=0).fingerprint in prints


def test_mistakes_are_named(folders, tmp_path):
    with pytest.raises(UserError, match="no source"):
        Mix([])
    with pytest.raises(UserError, match="above 0"):
        Mix([SourceSpec(folders[0], 0)])
    with pytest.raises(UserError, match="share a unit"):
        Mix([SourceSpec(folders[0], 1, "tokens"), SourceSpec(folders[1], 1, "samples")])
    with pytest.raises(UserError, match="no sample"):
        Mix([SourceSpec(make(tmp_path / "empty", 0))])


def test_whole_draws_per_period():
    for shares in ([1.0], [1 / 3] * 3, [0.999999, 0.000001], np.random.default_rng(0).dirichlet(np.ones(50))):
        counts = _per_period(np.asarray(shares))
        assert counts.sum() == PERIOD and counts.min() >= 1
        assert np.abs(counts - np.asarray(shares) * PERIOD).max() <= 1.01
