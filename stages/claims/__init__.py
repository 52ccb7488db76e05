"""`mm claim`: published findings as commands that repeat them over seeds and print effect, interval, verdict."""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mm.common.config import nearest
from mm.common.errors import UserError
from stages.claims import merge, rope2d
from stages.claims.claim import Claim
from stages.claims.page import show
from stages.claims.seeds import run

CLAIMS: dict[str, Claim] = {c.name: c for c in (rope2d.CLAIM, merge.CLAIM)}


def main(args: argparse.Namespace) -> None:
    """Without `args.name` the list; else run that claim over `args.seeds` seeds in `args.out` and print it."""
    console = Console()
    if args.name is None:
        console.print(listing())
        return
    if args.name not in CLAIMS:
        raise UserError(f"claim {args.name!r} is not known{nearest(args.name, CLAIMS)}")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: at least 1 (an interval needs 2)")
    claim = replace(CLAIMS[args.name], quiet=getattr(args, "quiet", False))
    folder = args.out or Path("runs") / "claims" / claim.name
    show(claim, run(claim, args.seeds, folder), folder, console)


def listing() -> Table:
    table = Table("claim", "says", "source", "cost", title="mm claim", show_lines=True)
    for c in CLAIMS.values():
        table.add_row(c.name, c.says, c.source, c.cost)
    return table
