"""The `mm` command. Each subcommand imports what it needs when it runs, so that `mm --help` answers at once."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = ("tiny", "small", "8b")


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn a user's mistake into one clear line (exit 2) and an interrupt into exit 130."""
    from mm.common.errors import UserError
    from mm.common.files import disk_trouble
    from stages.stage import FailedElsewhere, Stopped

    args = _parse(argv)
    try:
        return args.call(args) or 0
    except UserError as e:
        return _complain(str(e), 2)
    except Stopped:  # it has said so
        return 130
    except FailedElsewhere as e:  # rank 0 says why
        return e.code
    except KeyboardInterrupt:
        return _complain("stopped; the same command goes on from what is saved", 130)
    except BrokenPipeError:
        return 0
    except OSError as e:
        if (trouble := disk_trouble(e)) is None:
            raise
        return _complain(str(trouble), 2)


def _complain(text: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"mm: {text}" if rank == "0" else f"mm (rank {rank}): {text}", file=sys.stderr)
    return code


def _parse(argv: list[str] | None) -> argparse.Namespace:
    top = parser()
    args, rest = top.parse_known_args(argv)
    # argparse settles an optional positional before the options: `mm chat MODEL --image X "question"` leaves it over.
    if args.command == "chat" and args.question is None and len(rest) == 1 and not rest[0].startswith("-"):
        args.question, rest = rest[0], []
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mm", description="Train short-video foundation models, stage by stage.",
                                  epilog="example:  mm run keye --size tiny --to s3 --out runs/first",
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_run, _show, _plan, _eval, _chat, _data, _claim, _env):
        add(commands)
    return top


def above(low: float, kind: type = int) -> Callable[[str], Any]:
    """A type for argparse: a number of this kind above `low`."""

    def number(text: str) -> Any:
        value = kind(text)
        if not low < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be above {low}")
        return value

    number.__name__ = "whole number" if kind is int else "number"  # for argparse's message
    return number


def _lazy(module: str, function: str) -> Any:
    """`function` of `module`, imported when it is called."""
    return lambda args: getattr(importlib.import_module(module), function)(args)


def _add(commands: Any, name: str, help: str, example: str, call: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"example:  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.set_defaults(call=call)
    return p


def _stage_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--size", choices=SIZES, default="tiny", help="numbers to use (default tiny)")
    p.add_argument("--scale", type=above(0, float), default=1.0, metavar="F", help="multiply every stage's steps")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                   help="override any field of the stage, e.g. --set optim.lr=1e-4 (repeat)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0)


def _run(commands: Any) -> None:
    p = _add(commands, "run", "run a pipeline or one stage", "mm run keye --size tiny --to s3 --out runs/first\n"
             "          torchrun --nproc-per-node 2 -m stages.cli run keye.s2_multitask --from runs/first",
             _lazy("stages.keye.recipe", "run"))  # fmt: skip
    p.add_argument("what", help="keye, or one stage such as keye.s2_multitask")
    _stage_options(p)
    p.add_argument("--to", default="s3", metavar="STAGE", help="last stage of the pipeline (s0, s1, s2, s3)")
    p.add_argument("--out", type=Path, metavar="DIR", help="run folder (default runs/NAME)")
    p.add_argument("--from", dest="source", type=Path, metavar="RUN",
                   help="run that made the inputs of a single stage (default: the newest that has them)")  # fmt: skip
    p.add_argument("--world", type=Path, metavar="DIR", help="a bundled world made before")
    p.add_argument("--qwen3", type=Path, metavar="DIR", help="local Hugging Face folder the decoder starts from")
    p.add_argument("--siglip", type=Path, metavar="DIR", help="local Hugging Face folder the tower starts from")
    p.add_argument("--data", action="append", default=[], metavar="NAME=DIR", help="source folder of a mix (repeat)")
    p.add_argument("--workers", type=above(-1), default=1, help="decode processes per rank (default 1)")
    p.add_argument("--ranks", type=above(0), help="processes on this machine, no torchrun (default: by cores on CPU)")
    p.add_argument("--threads", type=above(0), help="torch threads per rank")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    p.add_argument("--no-eval", action="store_true", help="train only")
    p.add_argument("--quiet", action="store_true")


def _show(commands: Any) -> None:
    p = _add(commands, "show", "print a pipeline's graph or a stage's settings", "mm show keye",
             _lazy("stages.keye.recipe", "show"))  # fmt: skip
    p.add_argument("what", help="keye, or one stage such as keye.s1_align")
    _stage_options(p)
    p.add_argument("--out", type=Path, metavar="RUN", help="also say what is done in this run")


def _plan(commands: Any) -> None:
    p = _add(commands, "plan", "say what a stage costs before anything is built",
             "mm plan keye.s2_multitask --size 8b --gpus 64",
             _lazy("stages.keye.recipe", "plan"))  # fmt: skip
    p.add_argument("what", help="a stage such as keye.s2_multitask")
    _stage_options(p)
    p.add_argument("--gpus", type=above(0), default=1, help="ranks the weights are sharded over (default 1)")
    p.add_argument("--utilisation", type=above(0, float), default=0.4, help="share of the peak assumed (default 0.4)")
    p.add_argument("--gpu", default="H100", help="whose peak and memory to assume (default H100)")


def _eval(commands: Any) -> None:
    p = _add(commands, "eval", "score a checkpoint", "mm eval world runs/quickstart --limit 40\n"
             "          mm eval kc-mmbench CHECKPOINT --data KC-MMbench --judge-url http://localhost:8000/v1",
             _lazy("stages.evaluate", "evaluate"))  # fmt: skip
    p.add_argument("benchmark", choices=("world", "kc-mmbench"))
    p.add_argument("checkpoint", type=Path, help="a model folder, or a run folder (its last model)")
    p.add_argument("--data", type=Path, metavar="DIR", help="world folder, or KC-MMBench folder (subsets/, images/)")
    p.add_argument("--out", type=Path, metavar="DIR", help="where responses.jsonl and scores.json go")
    p.add_argument("--tasks", help="names, separated by commas")
    p.add_argument("--limit", type=above(0), help="items per task and split")
    p.add_argument("--batch-size", type=above(0), default=32)
    p.add_argument("--max-new-tokens", type=above(0))
    p.add_argument("--no-blind", action="store_true", help="leave out the pass with grey frames")
    p.add_argument("--judge-url", help="an OpenAI-compatible address; without one, exact match")
    p.add_argument("--judge-model", default="gpt-4o-mini")
    p.add_argument("--judge-key", default=os.environ.get("MM_JUDGE_KEY", ""), help="default: $MM_JUDGE_KEY")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def _chat(commands: Any) -> None:
    p = _add(commands, "chat", "talk to a checkpoint in the terminal",
             'mm chat runs/quickstart --video clip.mp4 "What does the red ring do?"',
             _lazy("stages.evaluate", "chat"))  # fmt: skip
    p.add_argument("checkpoint", type=Path, help="a model folder, or a run folder (its last model)")
    p.add_argument("question", nargs="?", help="ask once and end; without it, a conversation")
    p.add_argument("--image", action="append", default=[], type=Path)
    p.add_argument("--video", action="append", default=[], type=Path)
    p.add_argument("--max-new-tokens", type=above(0), default=64)
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def _data(commands: Any) -> None:
    from stages import data

    p = commands.add_parser("data", help="make, import, check and look at data",
                            description="Make, import, check and look at data.",
                            epilog="example:  mm data import folder my_clips sources/mine",
                            formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    inner = p.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    data.add(lambda name, help, example, call: _add(inner, name, help, example, call))


def _claim(commands: Any) -> None:
    p = _add(commands, "claim", "repeat a published finding with error bars", "mm claim keye.rope2d --seeds 5",
             _lazy("stages.claims", "main"))  # fmt: skip
    p.add_argument("name", nargs="?", help="which one; without it, a list")
    p.add_argument("--seeds", type=above(0), default=5)
    p.add_argument("--out", type=Path, metavar="DIR", help="where the table and plot go (default runs/claims/NAME)")


def _env(commands: Any) -> None:
    _add(commands, "env", "print what a bug report needs", "mm env",
         _lazy("stages.environment", "show"))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
