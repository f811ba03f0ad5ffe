"""The command ``eas-kit``: a thin shell over ``runner`` and ``doctor``.

Exit codes: 0 all went well; 1 a notebook failed, or the doctor found something missing; 2 the command makes no sense
as given; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .errors import EASError

DESCRIPTION = """\
eas-kit: Effective Attention Skipping for multimodal language models (arXiv 2403.15226).

Runs the notebooks headless and strictly, and checks the installation.
The library itself is `import eas_kit`."""

EXAMPLES = """\
examples:
  eas-kit run                                        every notebook, into runs/<date>-<time>
  eas-kit run --list                                 the notebooks and their parameters
  eas-kit run 01_probe_redundancy -p trials 20       one notebook, one parameter changed
  eas-kit run --out runs/demo --resume               go on with a run that was stopped
  eas-kit run 03 --params notebooks/params/full.yaml the long version of the third
  eas-kit doctor                                     versions, device, memory, what is missing
"""

RUN_EPILOG = """\
parameters:
  -p NAME VALUE sets a parameter in every chosen notebook that has it. VALUE is read as YAML:
  4, 1e-3, true, null, "[0, 2]"; where the notebook's default is a text, it is taken as it stands.
  A parameters file is flat (`seed: 1`) or has sections:

    all: {seed: 1}
    03_train_pia: {steps: 300}

  -p wins over the file. An unknown parameter, a value of another kind than the default's, a notebook without a
  `parameters` cell or an unknown notebook is an error before anything runs.

results:
  DIR/index.html               open this: every notebook, figure and number of the run
  DIR/NN_name.ipynb            the executed copy
  DIR/NN_name/results.json     the notebook's numbers, with versions, seed, device and parameters
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.handler(args)
    except EASError as error:
        print(f"eas-kit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eas-kit: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("eas-kit", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"eas-kit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    run = commands.add_parser(
        "run", help="run notebooks headless", formatter_class=formatter, epilog=RUN_EPILOG,
        description="Run notebooks in reading order and leave executed copies, results and an index page.",
    )  # fmt: skip
    run.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="e.g. 01_probe_redundancy, or 01; all if none")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    run.add_argument("--params", metavar="FILE.yaml", help="parameters from a file, see below")
    run.add_argument("--out", metavar="DIR", help="the run folder (default: runs/<date>-<time>)")
    run.add_argument("--resume", action="store_true", help="keep what is done with the same parameters and source")
    run.add_argument("--keep-going", action="store_true", help="after a failure, run the remaining notebooks")
    run.add_argument("--cell-timeout", type=float, metavar="SECONDS", help="fail a cell that takes longer")
    run.add_argument("--notebooks", dest="folder", metavar="DIR", help="their folder (default: ./notebooks)")
    run.add_argument("--list", action="store_true", help="show the notebooks and their parameters, run nothing")
    run.set_defaults(handler=_run)

    doctor = commands.add_parser("doctor", help="check the installation and the machine")
    doctor.set_defaults(handler=_doctor)
    return parser


def _run(args: argparse.Namespace) -> int:
    from . import notebooks, runner

    if args.list:
        folder = notebooks.find_folder(args.folder)
        print(_listing(notebooks.choose(notebooks.read_notebooks(folder), args.notebooks)))
        return 0
    result = runner.run(
        args.notebooks,
        {name: notebooks.Raw(value) for name, value in args.p},
        args.params,
        out=args.out,
        folder=args.folder,
        resume=args.resume,
        keep_going=args.keep_going,
        cell_timeout=args.cell_timeout,
    )
    if result.interrupted:
        return 130
    return 0 if result.ok else 1


def _listing(chosen: Sequence) -> str:
    lines = []
    for notebook in chosen:
        lines += [f"{notebook.name}: {notebook.title}"]
        for name, default in notebook.defaults.items():
            lines.append(f"    {f'{name} = {default!r}':<34}  {notebook.comments[name]}".rstrip())
        lines.append("")
    return "\n".join(lines)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    findings = examine()
    print(findings.text())
    return 0 if findings.ok else 1


if __name__ == "__main__":
    sys.exit(main())
