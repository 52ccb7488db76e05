"""`mm data ...`: make the bundled world, import, check, count and look at data."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm.common.errors import UserError

Add = Callable[[str, str, str, Callable[[argparse.Namespace], int | None]], argparse.ArgumentParser]


def add(add: Add) -> None:
    """Hang the subcommands into the parser."""
    p = add("make-world", "make the bundled short-video world", "mm data make-world world --size tiny", make_world)
    p.add_argument("out", type=Path)
    p.add_argument("--size", default="tiny", choices=("micro", "tiny", "full"))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, help="processes (default: all cores)")
    p = add("import", "turn media and conversations into a source folder",
            "mm data import llava conversations.json sources/mine --media-root media", import_data)  # fmt: skip
    p.add_argument("kind", choices=("llava", "folder", "datasets", "webdataset"))
    p.add_argument("src", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--name")
    p.add_argument("--captions", help="for a folder: a table of captions, or 'name' for the files' own names")
    p.add_argument("--media-root", type=Path, help="folder below which the media lie")
    p.add_argument("--no-check", action="store_true", help="do not decode every medium once")
    p = add("lint", "open every sample and name what is wrong (exit 1 if anything is)",
            "mm data lint sources/mine", lint)  # fmt: skip
    p.add_argument("source", type=Path, help="a source folder, or a folder of them")
    p.add_argument("--decode", action="store_true", help="decode the media too")
    p = add("stats", "count samples, tokens, visual tokens and packing", "mm data stats world/sources", stats)
    p.add_argument("source", type=Path, help="a source folder, or a folder of them")
    _reading_options(p)
    p = add("view", "write a page with the very tensors the model gets; or look at a world",
            "mm data view world/sources/video_qa --out view.html", view)  # fmt: skip
    p.add_argument("source", type=Path, help="a source folder, a folder of them, or a world")
    p.add_argument("--out", type=Path, default=Path("view.html"))
    p.add_argument("-n", type=int, default=4, help="packs, or clips of a world, to show")
    p.add_argument("--start", type=int, default=0, help="number of the first pack")
    _reading_options(p)


def _reading_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--checkpoint", type=Path, help="whose processor and tokenizer to use")
    p.add_argument("--size", default="tiny", choices=("tiny", "small", "8b"), help="processor, without a checkpoint")
    p.add_argument("--tokens", type=int, default=2048, help="tokens of a pack")
    p.add_argument("--visual-tokens", type=int, default=1536, help="visual tokens of a pack")


def make_world(a: argparse.Namespace) -> None:
    from data_mix.world.make import make_world

    facts = make_world(a.out, size=a.size, seed=a.seed, workers=a.workers)
    print(f"{a.out}: world of size {facts['size']}, seed {facts['seed']}; look at it: mm data view {a.out}")


def import_data(a: argparse.Namespace) -> None:
    from data_mix.importers import import_data

    print(import_data(a.kind, a.src, a.out, name=a.name, captions=a.captions, media_root=a.media_root,
                      check=not a.no_check))  # fmt: skip


def lint(a: argparse.Namespace) -> int:
    from data_mix.lint import lint

    report = lint(a.source, decode=a.decode)
    print(report)
    return report.exit_code


def stats(a: argparse.Namespace) -> None:
    from data_mix.stats import stats

    processor, tokenizer = reading(a)
    print(stats(a.source, processor, tokenizer, token_budget=a.tokens, visual_budget=a.visual_tokens))


def view(a: argparse.Namespace) -> None:
    if (a.source / "world.json").exists():
        from data_mix.world.view import view_world

        print(view_world(a.source, a.out, clips=max(a.n, 12)))
        return
    from data_mix.view import view

    processor, tokenizer = reading(a)
    print(view(a.source, a.out, n=a.n, start=a.start, processor=processor, tokenizer=tokenizer,
               token_budget=a.tokens, visual_budget=a.visual_tokens))  # fmt: skip


def reading(a: argparse.Namespace) -> tuple[Any, Any]:
    """Processor and tokenizer: a checkpoint's, or those of a size with a tokenizer made from this very data."""
    from data_mix.stats import source_folders
    from mm.processor import Processor
    from mm.sizes import PROCESSORS
    from mm.tokenizer import Tokenizer
    from stages.keye.run import texts_of, train_tokenizer

    if a.checkpoint is not None:
        return Processor.load(a.checkpoint), Tokenizer.load(a.checkpoint)
    if a.size != "tiny":
        raise UserError(f"--size {a.size} has no tokenizer of its own; name a model folder with --checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(texts_of(source_folders(a.source)), Path(folder) / "tokenizer")
        return PROCESSORS[a.size], Tokenizer.load(Path(folder) / "tokenizer")
