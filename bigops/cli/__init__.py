"""The command `bigops`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Answers a wrong word in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class UserError(ValueError):
    """What the user gave is wrong: one line on stderr, exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    from . import bench, check, doctor, inspect, new, train, words

    parser = Parser(
        prog="bigops", description="Fused kernels for PyTorch: checked, measured, trained with."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (doctor, check, bench, inspect, train, new):
        module.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        if hasattr(args, "ops"):
            args.ops = words.with_plugins(args.ops)
        return int(args.run(args))
    except UserError as error:
        print(f"bigops {args.command}: {error}", file=sys.stderr)
        return 2
