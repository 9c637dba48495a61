"""methods: what every method is, uses and needs, as a table."""

from __future__ import annotations

import argparse

from mdistiller.cli.support.command import command_line
from mdistiller.registry import UserError, suggest
from mdistiller.runtime import page_file


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="methods", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="some methods (default all)")
    return parser


def stored() -> tuple[list[str], dict[str, str]]:
    """The two lines of the table's head, and the row of each method, from the page."""
    lines = [line for line in page_file().read_text("utf-8").splitlines() if line[:1] == "|"]
    return lines[:2], {line.split("`")[1]: line for line in lines[2:]}


def methods(args: argparse.Namespace) -> None:
    """Print the stored table, or some rows of it."""
    head, rows = stored()
    for name in args.only or rows:
        if name not in rows:
            raise UserError(
                f"unknown method {name!r}{suggest(name, rows)} (methods: {', '.join(rows)})"
            )
    print(*head, *(rows[name] for name in args.only or rows), sep="\n")


main = command_line(parser, methods)
