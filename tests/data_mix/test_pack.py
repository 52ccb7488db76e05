"""Plans: pure, full, fair, and nothing is lost without a name."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from data_mix.mix import Mix, SourceSpec
from data_mix.pack import PackPlan, best_fit
from data_mix.shards import ShardWriter
from mm.common.errors import UserError
from mm.prompt import sample_tokens
from mm.tokenizer import Tokenizer
from tests.data_mix.made import image_facts, planned_source, turn


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("pack"), np.random.default_rng(0)
    long = np.clip(random.lognormal(4.6, 0.8, 900), 5, 900)
    return [planned_source(root / "short", random.integers(3, 60, 700)), planned_source(root / "long", long, seed=1)]


@pytest.fixture(scope="module")
def plan(folders, processor, tokenizer):
    mix = Mix([SourceSpec(folders[0], 1), SourceSpec(folders[1], 3)], seed=5)
    return PackPlan(mix, processor, tokenizer, 2048, 400, seed=5)


def again(plan, **changes):
    specs = [SourceSpec(s.path, s.weight) for s in plan.mix.specs]
    facts = {"token_budget": plan.token_budget, "visual_budget": plan.visual_budget, "seed": plan.seed, **changes}
    return PackPlan(Mix(specs, plan.mix.seed), plan.processor, plan.tokenizer, **facts)


def test_packs_are_full_and_within_both_budgets(plan):
    assert plan.efficiency(300)["tokens"] >= 0.97
    for i in range(300):
        sizes = np.array([plan.size(d) for d in plan.pack(i)])
        assert (sizes.sum(0) <= [plan.token_budget, plan.visual_budget]).all()


def test_token_weights_are_realised(plan):
    tokens = np.zeros(2)
    for i in range(800):
        for d in plan.pack(i):
            tokens[d.source] += plan.size(d)[0]
    assert tokens / tokens.sum() == pytest.approx([0.25, 0.75], abs=0.01)


def test_every_draw_is_in_exactly_one_pack(plan):
    first, _ = plan.anchor(10**3)
    packs = [d for i in range(first) for d in plan.pack(i)]
    drawn = [plan.mix.draw(p) for p in range(len(packs))]
    assert Counter(packs) == Counter(drawn)


def test_packs_of_a_step_are_alike_and_none_is_lost(plan):
    """Also across windows whose number of packs does not divide by the packs of a step."""

    def spread(p, n=600):
        visual = np.array([sum(p.size(d)[1] for d in p.pack(i)) for i in range(n)]).reshape(-1, 3)
        return (visual.max(1) - visual.min(1)).mean()

    alike = again(plan, alike=3)
    assert spread(alike) < 0.25 * spread(plan)
    first, _ = alike.anchor(900)
    assert Counter(tuple(alike.pack(i)) for i in range(first)) == Counter(tuple(plan.pack(i)) for i in range(first))
    steps = {alike.anchor(i)[0] % 3 for i in range(900)}
    assert len(steps) > 1  # windows did begin inside steps
    late = again(plan, alike=3)
    late.trust(alike.anchor(700))
    assert [late.pack(i) for i in range(700, 720)] == [alike.pack(i) for i in range(700, 720)]
    assert alike.fingerprint != plan.fingerprint
    # neither the lightest nor the heaviest come first: steps are shuffled
    cost = [sum(alike.size(d)[1] for k in range(3) for d in alike.pack(3 * s + k)) for s in range(60)]
    assert abs(np.corrcoef(cost, range(60))[0, 1]) < 0.5


def test_pack_is_a_pure_function_of_its_number(plan):
    other = again(plan)
    assert other.fingerprint == plan.fingerprint
    numbers = [700, 3, 250, 251, 4, 699]
    assert [other.pack(i) for i in numbers] == [plan.pack(i) for i in numbers]
    resumed = again(plan)
    resumed.trust(plan.anchor(700))
    assert resumed.pack(700) == plan.pack(700) and len(resumed._first) <= 3


def test_counts_are_those_of_the_prompt_and_are_cached(plan, folders, tokenizer):
    source = plan.mix.sources[1]
    for i in (0, 17, 450):
        wanted = sample_tokens(source.sample(i), plan.processor, tokenizer)
        assert (plan.counts[1].tokens[i], plan.counts[1].visual[i]) == wanted
    assert len(list(folders[0].glob("*.counts-*.npy"))) == len(source.shards)


def test_fingerprint_covers_what_decides_a_pack(plan, processor, tokenizer):
    changes = ({}, {"token_budget": 2049}, {"visual_budget": 401}, {"seed": 6})
    prints = {again(plan, **change).fingerprint for change in changes}
    specs = plan.mix.specs
    for p, t in ((dataclasses.replace(processor, image_max_tokens=24), tokenizer),
                 (processor, Tokenizer.train(["b"], 400))):  # fmt: skip
        prints.add(PackPlan(Mix(specs, 5), p, t, 2048, 400, seed=5).fingerprint)
    prints.add(PackPlan(Mix([SourceSpec(s.path, s.weight, "samples") for s in specs], 5), processor, tokenizer,
                        2048, 400, seed=5).fingerprint)  # fmt: skip
    assert len(prints) == 7


def test_too_large_samples_are_shortened_by_whole_exchanges_or_refused_by_name(tmp_path, processor, tokenizer):
    big = {"0.jpg": b"x", "1.jpg": b"x"}
    facts = {s: image_facts(300, 300) for s in big}
    with ShardWriter(tmp_path / "s", "s") as w:
        w.write("fits", {"messages": turn("ok")}, {})
        w.write("long", {"messages": turn("a " * 500)}, {})
        w.write("two", {"messages": turn("ok") + turn("a " * 500)}, {})
        w.write("visual", {"messages": turn("ok", "0.jpg", "1.jpg"), "media": facts}, big)
        w.write("cut", {"messages": turn("ok", "0.jpg") + turn("b", "1.jpg"), "media": facts}, big)
        w.write("facts", {"messages": turn("ok", "0.jpg"), "media": {"0.jpg": {"kind": "image"}}}, {"0.jpg": b"x"})
    plan = PackPlan(Mix([SourceSpec(tmp_path / "s")]), processor, tokenizer, 200, 30)
    assert {b.key: b.reason for b in plan.refused} == {
        "long": "longer than the token budget 200", "visual": "above the visual-token budget 30",
        "facts": "media facts lack 'width'",
    }  # fmt: skip
    assert {b.shard for b in plan.refused} == {"s/shard-00000.tar"}
    assert plan.refused_by_reason()["longer than the token budget 200"] == 1
    draws, source = [d for i in range(9) for d in plan.pack(i)], plan.mix.sources[0]
    shown = {source.keys[d.sample]: len(plan.sample(d)["messages"]) for d in draws}
    assert shown == {"fits": 2, "two": 2, "cut": 2}


def test_a_source_with_nothing_usable_is_a_clear_error(tmp_path, processor, tokenizer):
    planned_source(tmp_path / "s", [500] * 4)
    with pytest.raises(UserError, match="4 x longer than the token budget 100"):
        PackPlan(Mix([SourceSpec(tmp_path / "s")]), processor, tokenizer, 100, 30)
    with pytest.raises(UserError, match="at least 1"):
        PackPlan(Mix([SourceSpec(tmp_path / "s")]), processor, tokenizer, 0, 30)


def test_pairs_are_planned_by_caption_and_first_picture(folders, processor, tokenizer, tmp_path):
    planned_source(tmp_path / "p", [5, 50, 500], images=(1,))
    plan = PackPlan(Mix([SourceSpec(tmp_path / "p")]), processor, tokenizer, 4096, 60, kind="pairs", max_text=16)
    assert plan.counts[0].tokens.tolist() == [11, 16, 16] or max(plan.counts[0].tokens) == 16
    with_text = PackPlan(Mix([SourceSpec(folders[0])]), processor, tokenizer, 4096, 60, kind="pairs")
    assert set(with_text.refused_by_reason()) == {"no media to pair with the caption"}


def fit(sizes, budget):
    return best_fit(sizes, budget, np.random.default_rng(0))


def test_best_fit_edge_cases():
    assert fit([], (10, 10)) == []
    assert sorted(map(sorted, fit([(10, 0), (0, 10), (10, 10)], (10, 10)))) == [[0, 1], [2]]
    assert sorted(map(sorted, fit([(6, 0), (5, 0), (4, 0), (5, 0)], (10, 1)))) == [[0, 2], [1, 3]]


def test_packs_mix_lengths_instead_of_sorting_them():
    """Plain best fit decreasing gives packs whose samples are all alike (0.4 here)."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, 1000).astype(int), 20, 2048)
    packs = fit([(n, 0) for n in lengths], (2048, 1))
    spread = np.mean([np.log(lengths[p]).std() for p in packs]) / np.log(lengths).std()
    assert spread > 0.6 and lengths.sum() / (len(packs) * 2048) > 0.985


def test_a_handful_of_samples_share_packs_evenly(tmp_path, processor, tokenizer):
    """16 samples of 16 lengths: a wide window would put dozens of copies of one sample side by side."""
    folder = planned_source(tmp_path / "few", range(20, 180, 10), images=(0,))
    plan = PackPlan(Mix([SourceSpec(folder)]), processor, tokenizer, 1500, 100)
    packs = [plan.pack(i) for i in range(60)]
    assert max(max(Counter(d.sample for d in p).values()) for p in packs) <= 6
    drawn = Counter(d.sample for p in packs for d in p)
    assert len(drawn) == 16 and max(drawn.values()) - min(drawn.values()) <= 8
    assert plan.efficiency(60)["tokens"] > 0.8
