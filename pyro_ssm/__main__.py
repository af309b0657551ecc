"""The command line: ``python -m pyro_ssm info`` and ``python -m pyro_ssm demo``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def _info(args: argparse.Namespace) -> int:
    from pyro_ssm._info import report

    print(report())
    return 0


def _demo(args: argparse.Namespace) -> int:
    from pyro_ssm.demo import run

    run(out=args.out, quick=args.quick)
    return 0


def parser() -> argparse.ArgumentParser:
    """The commands and their options.

    Example:
        >>> from pyro_ssm.__main__ import parser
        >>> args = parser().parse_args(["demo", "--quick"])
        >>> args.quick, str(args.out)
        (True, 'demo_output')
    """
    root = argparse.ArgumentParser(prog="python -m pyro_ssm", description="Deep state-space models in Pyro.")
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="print versions, device, threads and the compiled operators in use")
    info.set_defaults(command=_info)

    demo = commands.add_parser("demo", help="fit a deep state-space model to bundled data with missing values")
    demo.add_argument("--out", type=Path, default=Path("demo_output"), help="folder of results (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a few steps only: shows that everything runs, fits nothing")
    demo.set_defaults(command=_demo)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Args:
        argv: the words after ``python -m pyro_ssm``; those of this process by default.

    Example:
        >>> from pyro_ssm.__main__ import main
        >>> main(["info"])  # doctest: +ELLIPSIS
        pyro_ssm      ...
        0
    """
    args = parser().parse_args(argv)
    return args.command(args)


if __name__ == "__main__":
    sys.exit(main())
