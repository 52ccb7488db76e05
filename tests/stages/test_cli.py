"""The mm command: help with examples, a user's mistakes in one line and exit code 2, full and read-only disks."""

import errno
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_mix.shards import ShardWriter, Source
from mm import formats
from mm.common.files import read_json, read_jsonl
from mm.keye import Keye
from mm.sizes import PROCESSORS, SIZES
from mm.tokenizer import Tokenizer
from stages import cli
from stages.keye.recipe import STAGES, TINY_ONLY, graph

COMMANDS = ("run", "show", "plan", "eval", "chat", "data", "claim", "env", "data make-world", "data import",
            "data lint", "data stats", "data view")  # fmt: skip


@pytest.fixture
def mm(capsys, monkeypatch):
    """Run a command line here; (exit code, all that was printed)."""
    monkeypatch.delenv("RANK", raising=False)

    def run(*arguments):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as e:  # argparse
            code = e.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with random weights."""
    tokenizer = Tokenizer.train(["a red circle moves left. 一个红色的圆。 0123456789"] * 3, 512)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli") / "model"
    formats.save(folder, Keye(SIZES["tiny"].bound(tokenizer)), PROCESSORS["tiny"], tokenizer)
    return folder


# ---- help, plan, show


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_shows_an_example(mm, command):
    code, said = mm(*command.split(), "--help")
    assert code == 0 and "example:  mm " in said


def test_the_examples_can_be_parsed(mm):
    """What help shows is a command that the parser takes."""
    for command in COMMANDS:
        lines = mm(*command.split(), "--help")[1].partition("example:")[2].splitlines()
        for line in (x.strip() for x in lines if x.strip().startswith("mm ")):
            words = shlex.split(line)[1:]
            assert cli._parse(words).command == words[0]


@pytest.mark.parametrize("size", ["tiny", "small", "8b"])
def test_every_stage_has_a_plan_and_a_page_at_every_size(mm, size):
    for name in STAGES:
        if name in TINY_ONLY and size != "tiny":
            for command in ("plan", "show", "run"):
                code, said = mm(command, name, "--size", size)
                assert code == 2 and f"{name} is a stage of --size tiny alone" in said, said
            continue
        code, said = mm("plan", name, "--size", size, "--gpus", 8)
        assert code == 0 and "parameters" in said and "FLOPs per step" in said, (name, said)
        code, said = mm("show", name, "--size", size)
        assert code == 0 and f"'{name}'" in said
    code, said = mm("show", "keye", "--size", size)
    assert code == 0 and "s3_merge" in said and "to do" in said


def test_long_runs_practise_before_stage_3(mm, model, micro_world, tmp_path):
    graphs = {}
    for scale in (1, 2):
        line = ["run", "keye", "--to", "s3", "--scale", scale, "--world", micro_world, "--out", tmp_path / "x"]
        nodes = graph(cli._parse([str(word) for word in line]), "cpu").nodes
        graphs[scale] = {n: nodes[n].inputs[0] for n in ("s3_anneal_image", "s3_anneal_video")}
        assert ("s2_practice" in nodes) == (scale == 2)
    assert set(graphs[1].values()) == {"s2_multitask"} and set(graphs[2].values()) == {"s2_practice"}
    for scale, start in ((1, "s2_multitask"), (2, "s2_practice")):  # one of them by itself goes on from the same
        assert f"'{start}'" in mm("show", "keye.s3_anneal_video", "--scale", scale)[1]
    code, said = mm("run", "keye.s2_practice", "--from", model, "--world", micro_world, "--out", tmp_path / "run",
                    "--ranks", 1, "--workers", 0, "--set", "budget.steps=2")  # fmt: skip
    assert code == 0 and "2/2 100%" in said and (tmp_path / "run/s2_practice/model/config.json").exists(), said


def test_the_plan_says_what_does_not_fit(mm):
    for name, fits in (("s2_multitask", True), ("s3_anneal_image", False)):
        said = mm("plan", f"keye.{name}", "--size", "8b", "--gpus", 64)[1]
        assert "one H100 has" in said and ("does not fit" not in said) == fits


def test_the_commands_of_the_launch_page_name_sources_that_there_are():
    page = (Path(__file__).parents[2] / "docs/launch.md").read_text(encoding="utf-8")
    shown = [block.split("```")[0].replace("\\\n", "") for block in page.split("```bash\n")[1:]]
    found = 0
    for words in (line.split() for block in shown for line in block.splitlines() if " run keye." in line):
        stage = STAGES[next(w for w in words if w.startswith("keye."))]("8b")
        named = {words[i + 1].split("=")[0] for i, w in enumerate(words) if w == "--data"}
        known = {str(s.path) for s in stage.mix}
        assert named == known or (named - {"..."} <= known and "..." in named), (named, known)
        found += 1
    assert found >= 2


def test_samples_that_give_no_data_are_named(mm, model, micro_world, tmp_path):
    """As they are met, one line each, over two starts of one run; and counted in the end."""
    broken = tmp_path / "broken"
    regions = Source(micro_world / "sources" / "regions")
    with ShardWriter(broken, "regions") as out:
        for i in range(len(regions)):
            at = regions.locate(i, "0.jpg")
            jpg = Path(at.path).read_bytes()[at.offset : at.offset + (at.size // 2 if i % 2 else at.size)]
            out.write(f"named-{i}", regions.sample(i), {"0.jpg": jpg})
    run = tmp_path / "run" / "s1_align"
    command = ["run", "keye.s1_align", "--from", model, "--world", micro_world, "--out", run.parent, "--ranks", 1,
               "--workers", 0, "--data", f"regions={broken}", "--set", "budget.steps=3"]  # fmt: skip
    code, said = mm(*command, "--set", "data.max_bad=0.0")
    assert code == 2 and "samples are bad" in said and "raise data.max_bad" in said, said
    first = read_jsonl(run / "skipped-rank0.jsonl")
    assert first and all("named-" in row["sample"] and row["reason"] for row in first)
    code, said = mm(*command, "--set", "data.max_bad=1.0")
    assert code == 0 and "attention sdpa" in said, said
    rows = read_jsonl(run / "skipped-rank0.jsonl")
    assert rows[: len(first)] == first and len(rows) > len(first)
    assert sum(read_json(run / "skipped.json").values()) == len({row["sample"] for row in rows})


def test_a_world_that_lacks_what_a_stage_draws_from(mm, micro_world, tmp_path):
    """As one of an older version does: said before anything is made."""
    old = tmp_path / "old"
    shutil.copytree(micro_world, old)
    shutil.rmtree(old / "sources" / "video_qa")
    code, said = mm("run", "keye", "--to", "s3", "--world", old, "--out", tmp_path / "run")
    assert code == 2 and "has no source video_qa; it may be of another version" in said, said
    assert not (tmp_path / "run").exists()
    graph(cli._parse(["run", "keye", "--to", "s1", "--world", str(old)]), "cpu")  # nothing up to there draws from it


def test_the_published_counts(mm):
    said = mm("plan", "keye.s2_multitask", "--size", "8b", "--gpus", 64)[1]
    assert all(n in said for n in ("8,190,735,360", "412,987,248", "40,119,040"))


def test_env_says_what_a_bug_report_needs(mm):
    code, said = mm("env")
    assert code == 0 and all(word in said for word in ("torch", "python", "cores", "memory", "GPUs"))


# ---- mistakes


MISTAKES = [
    ("run kye", "'kye' is not a stage; did you mean 'keye'"),
    ("run keye.s2_multitsk", "did you mean 'keye.s2_multitask'"),
    ("plan s1_aling", "did you mean 'keye.s1_align'"),
    ("show keye.s9", "is not a stage"),
    ("run keye --to s9", "did you mean 's3'"),
    ("run keye --scale 0", "must be above 0"),
    ("run keye --scale nan", "must be above 0"),
    ("run keye --workers -1", "must be above -1"),
    ("run keye.text --set optim.lrr=1", "did you mean 'lr'"),
    ("run keye.text --set optm.lr=1", "did you mean 'optim'"),
    ("run keye.text --set optim.lr", "write it as key=value"),
    ("run keye.text --set budget.steps=[", "cannot be read as YAML"),
    ("run keye.text --set budget.steps=1.5", "wanted int, got 1.5"),
    ("run keye.text --set budget.steps=0", "must be above 0"),
    ("run keye.text --set precision=fp8", "wanted"),
    ("run keye --set optim.lr=1", "begin with one of its stages"),
    ("run keye --set s2_multitask=3", "begin with one of its stages"),
    ("run keye --size 8b --set s2_practice.optim.lr=1", "begin with one of its stages (s0_vit, s1_align"),
    ("run keye --data vqq=x", "--data vqq: no stage has such a source; did you mean 'vqa'"),
    ("run keye --set text.optim.lrr=1", "did you mean 'lr'"),
    ("run keye --size 8b", "--qwen3 FOLDER and --siglip FOLDER"),
    ("run keye --from nowhere", "--from nowhere is for one stage"),
    ("run keye.text --set data.deadline=0", "data.deadline=0.0 must be above 0"),
    ("run keye --world nowhere", "--world nowhere is not a world"),
    ("run keye --size 8b --qwen3 nowhere --siglip nowhere", "--qwen3 nowhere is not a Hugging Face folder"),
    ("run keye.s2_multitask --from nowhere", "nowhere has not made 's1_align'"),
    ("run keye.s2_multitask", "no run below runs has made 's1_align'"),
    ("run keye.text --data text", "write it as NAME=FOLDER"),
    ("eval world nowhere", "neither a model folder nor a run"),
    ("eval world nowhere --limit 0", "must be above 0"),
    ("eval world nowhere --batch-size 0", "must be above 0"),
    ("eval wrld nowhere", "invalid choice"),
    ("chat nowhere hello", "neither a model folder nor a run"),
    ("data make-world x --size huge", "invalid choice"),
    ("data import llava nowhere.json x", "does not exist"),
    ("data import foldr . x", "invalid choice"),
    ("data lint nowhere", "holds no source.json"),
    ("data stats nowhere", "holds no source.json"),
    ("data view nowhere", "holds no source.json"),
    ("plan keye.text --gpus 0", "must be above 0"),
    ("plan keye.text --gpu B9000", "B9000"),
    ("nonsense", "invalid choice"),
    ("run keye.text --nonsense", "unrecognized arguments: --nonsense"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_2(mm, tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    code, printed = mm(*line.split())
    assert code == 2 and said in printed, printed
    assert "Traceback" not in printed and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("line", ["run keye.text", "eval world {model} --data {micro_world}", "chat {model} hello"])
def test_a_gpu_that_is_not_there(mm, model, micro_world, line):
    code, printed = mm(*line.format(model=model, micro_world=micro_world).split(), "--device", "cuda")
    assert code == 2 and "torch finds no GPU" in printed


def test_chat_takes_its_question_after_the_media(mm, model, micro_world):
    picture = next(micro_world.glob("kc/images/*/*.jpg"))
    code, said = mm("chat", model, "--image", picture, "--max-new-tokens", 2, "What is it?")
    assert code == 0, said
    code, said = mm("chat", model, "--image", micro_world / "world.json", "What is it?")
    assert code == 2 and "is no image that can be read" in said
    code, said = mm("chat", model, "one", "two")
    assert code == 2 and "unrecognized arguments: two" in said


# ---- weights


def copied(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "broken"))


def test_a_checkpoint_that_cannot_be_read(mm, model, tmp_path):
    weights = copied(model, tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"not weights", bytes(4000)):
        weights.write_bytes(data)
        code, said = mm("chat", tmp_path / "broken", "hello")
        assert code == 2 and "model.safetensors" in said and "copy it again" in said
    weights.unlink()
    code, said = mm("chat", tmp_path / "broken", "hello")
    assert code == 2 and "model.safetensors" in said
    (tmp_path / "broken/config.json").write_text("{")
    code, said = mm("chat", tmp_path / "broken", "hello")
    assert code == 2 and "config.json is not JSON" in said


def test_weights_that_do_not_fit(mm, model, micro_world, tmp_path):
    """A stage whose model is not that of the weights it starts from."""
    setting = "model.decoder.intermediate_size=100"
    code, said = mm("run", "keye.s2_multitask", "--from", model, "--world", micro_world, "--out", tmp_path / "run",
                    "--ranks", 1, "--workers", 0, "--set", setting)  # fmt: skip
    assert code == 2 and "does not fit the model" in said and "mlp" in said, said


def test_a_name_pattern_that_matches_nothing(mm, model, micro_world, tmp_path):
    code, said = mm("run", "keye.s2_multitask", "--from", model, "--world", micro_world, "--out", tmp_path / "run",
                    "--ranks", 1, "--workers", 0, "--set", 'train={"modle.*": 1.0}')  # fmt: skip
    assert code == 2 and "'modle.*' matches no parameter; did you mean 'model'" in said, said


# ---- data


def test_data_of_others_goes_in_is_checked_counted_and_shown(mm, tmp_path, monkeypatch):
    from tests.data_mix.test_index import hostile

    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    hostile(Path("in/a.tar"))
    code, said = mm("data", "lint", "in")
    assert code == 1 and "member name leaves the shard: a.tar/../evil.json" in said
    code, said = mm("data", "import", "webdataset", "in", "mine")
    assert code == 0 and "2 samples" in said and "member is a link: a.tar/link.json" in said
    assert not Path("evil.json").exists() and set(os.listdir()) == {"in", "mine"}
    assert mm("data", "lint", "mine", "--decode")[0] == 0
    assert "packing" in mm("data", "stats", "mine")[1]
    code, said = mm("data", "view", "mine", "--out", "page.html", "-n", 1)
    assert code == 0 and "page.html" in said and Path("page.html").stat().st_size > 5000
    code, said = mm("data", "import", "webdataset", "in", "mine")
    assert code == 2 and "not empty" in said
    Path("bad").mkdir()
    Path("bad/x.jsonl").write_text('{"messages": [')
    code, said = mm("data", "import", "llava", "bad/x.jsonl", "none")
    assert code == 2 and "no sample can be used" in said and "broken JSON" in said and not Path("none").exists()


# ---- disks


def limited(*arguments, most=None):
    """A command in a process of its own that may write no file longer than `most` bytes, as on a full disk."""
    def limit():
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    done = subprocess.run(
        [sys.executable, "-m", "stages.cli", *map(str, arguments)], text=True, timeout=120, preexec_fn=limit,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout


def test_a_full_disk_while_saving_loses_nothing(micro_world, model, tmp_path):
    out = tmp_path / "run"
    command = ["run", "keye.s1_align", "--from", model, "--world", micro_world, "--out", out, "--ranks", 1,
               "--workers", 0, "--threads", 1, "--set", "budget.steps=3", "--set", "optim.warmup_steps=0",
               "--set", "budget.tokens=512", "--set", "budget.visual_tokens=384"]  # fmt: skip
    code, said = limited(*command, most=2_000_000)  # the frozen weights do not fit
    assert code == 2 and "frozen weights could not be written" in said and "Free some space" in said, said
    assert "Traceback" not in said and not list(out.glob("*/checkpoints/*.tmp"))
    code, said = limited(*command, most=14_000_000)  # these do, the model handed on does not
    assert code == 2 and "cannot write" in said and "free some space" in said, said
    assert "Traceback" not in said and not (out / "s1_align/model/model.safetensors").exists()
    code, said = limited(*command)
    assert code == 0 and "going on from step 3 of 3" in said, said
    assert (out / "s1_align/model/model.safetensors").exists()


def test_a_disk_that_cannot_be_written(mm, model, micro_world, tmp_path, monkeypatch):
    """As on a read-only disk (root may write everywhere, so permissions would not do): no folder can be made."""
    real = os.mkdir

    def refuse(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)
    for line in (
        f"run keye.text --world {micro_world} --from {model} --ranks 1 --out {tmp_path}/run",
        f"data make-world {tmp_path}/w --size micro",
        f"data import folder {micro_world}/kc {tmp_path}/s --captions name",
        f"eval world {model} --data {micro_world} --limit 1 --tasks ocr --out {tmp_path}/e",
    ):  # fmt: skip
        code, said = mm(*line.split())
        assert code == 2 and "Read-only file system; choose another folder" in said, said


# ---- ranks


def test_two_ranks_under_torchrun(micro_world, model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "stages.cli", "run", "keye.text", "--world", micro_world, "--from", model, "--workers", "0",
               "--threads", "1", "--set", "budget.steps=2", "--set", "optim.warmup_steps=0", "--set",
               "budget.tokens=256", "--out", tmp_path / "run"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], text=True, timeout=120, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "keye.text: 2 steps" in done.stdout and (tmp_path / "run/report.html").exists()
    assert json.loads((tmp_path / "run/pipeline.json").read_text())["nodes"][-1]["status"] == "done"
