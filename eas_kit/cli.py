"""The command ``eas-kit``: a thin shell over ``runner``, ``sweep``, ``doctor`` and the data sets of ``tasks``.

Exit codes: 0 all went well; 1 a notebook or a run of a sweep failed, the doctor found something missing, or a data set
is not whole; 2 the command makes no sense as given; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import contextmanager

from . import __version__
from .errors import EASError, TaskError

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
  eas-kit data check scienceqa ~/data/scienceqa      is a download whole?
  eas-kit sweep GRID.yaml --out runs/mine --workers 2 a grid of runs, in two processes
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


SWEEP_EPILOG = """\
the grid, a YAML file:
  run: arms                        or the name of a notebook
  fixed: {steps: 300}              settings of every run: parameters of the notebook, or, for arms, arm, seed, model,
                                   task, steps, batch_size, skip_rank ... (eas_kit.arm_runs.ArmRun)
  grid: {seed: [0, 1], ...}        every combination of these lists is a run
  include: [{seed: 7}]             runs besides; exclude: [{seed: 1, ...}] takes some away
  A run of arms has `arm: {method: pia, k: 4, chosen_by: bandit}`, or `table: 1` for all rows of that table of the paper
  (`row: EAS8` for one). What is unknown or of a wrong kind is an error before anything runs.

results:
  DIR/results.parquet, results.csv one line a run
  DIR/index.html                   open this
  DIR/runs/NAME/log.txt            what a run printed
  The same command goes on with a sweep that was stopped or killed; failed runs run again, finished ones do not.
"""


DATA_EPILOG = """\
examples:
  eas-kit data list                                  the data sets, their licences and sizes
  eas-kit data check scienceqa DIR                   every record, and 500 of the pictures
  eas-kit data check slake hub: --open all           the usual hub copy, and all of its pictures
  eas-kit data check aid DIR -p train_share 0.5      a setting of the task
  eas-kit data make scienceqa DIR --records 200      a made-up folder in ScienceQA's form, to try things on
  eas-kit data score scienceqa DIR answers.jsonl     accuracy in all columns, from a predictions file, without a model
  eas-kit data export vqav2 DIR answers.jsonl --out results.json
                                                     the file that the owners' own evaluation reads

DIR is the folder with the owner's files, laid out as on the data set's page under data/, or hub:OWNER/NAME for a copy
on the hub (hub: alone for the usual one). A predictions file is what
task.evaluate(model, "test", predictions="answers.jsonl") writes: a line of JSON an example.
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

    sweep = commands.add_parser(
        "sweep", help="run a grid of notebooks or arms", formatter_class=formatter, epilog=SWEEP_EPILOG,
        description="Run a grid in several processes and leave one table of results. Exit code 1 if a run failed.",
    )  # fmt: skip
    sweep.add_argument("grid", metavar="GRID.yaml", help="what runs, see below")
    sweep.add_argument("--out", metavar="DIR", help="the sweep's folder (default: runs/<name of the grid>)")
    sweep.add_argument("--workers", type=int, default=1, metavar="N", help="processes at once (default: 1)")
    sweep.add_argument("--dry-run", action="store_true", help="list the runs, run nothing")
    sweep.add_argument("--notebooks", dest="folder", metavar="DIR", help="their folder (default: ./notebooks)")
    sweep.set_defaults(handler=_sweep)

    _add_data(commands, formatter)
    doctor = commands.add_parser("doctor", help="check the installation and the machine")
    doctor.set_defaults(handler=_doctor)
    return parser


def _add_data(commands, formatter) -> None:
    data = commands.add_parser(
        "data", help="check, score and export real data sets", formatter_class=formatter, epilog=DATA_EPILOG
    )
    verbs = data.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("list", help="the data sets").set_defaults(handler=_data_list)
    check = verbs.add_parser("check", help="is a download whole?")
    score = verbs.add_parser("score", help="the result of a predictions file, without a model")
    export = verbs.add_parser("export", help="predictions in the shape of the owners' evaluation")
    for one in (check, score, export):
        one.add_argument("name", metavar="NAME", help="of the data set, see eas-kit data list")
        one.add_argument("where", metavar="DIR", help="the owner's files, or hub:OWNER/NAME")
        one.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a setting")
    check.add_argument("--open", default="500", metavar="N", help="pictures to open, or all (default: 500)")
    check.set_defaults(handler=_data_check)
    for one, handler in ((score, _data_score), (export, _data_export)):
        one.add_argument("predictions", metavar="FILE.jsonl")
        one.add_argument("--split", default="test", help="train, search, val or test (default)")
        one.set_defaults(handler=handler)
    export.add_argument("--out", required=True, metavar="FILE", help="what to write")
    make = verbs.add_parser("make", help="a made-up folder in a data set's form")
    make.add_argument("name", choices=["scienceqa"])
    make.add_argument("folder", metavar="DIR")
    make.add_argument("--records", type=int, default=200, help="how many (default: 200)")
    make.add_argument("--seed", type=int, default=0)
    make.set_defaults(handler=_data_make)


def _data_list(args: argparse.Namespace) -> int:
    from .tasks import data_sets

    for name, card in data_sets().items():
        sizes = ", ".join(f"{split} {count:,}" for split, count in card.published.items())
        print(f"{name:<14}{card.title:<30}{sizes}".rstrip())
        print(f"{'':<14}{card.page}; {card.licence}; hub copy: {card.hub or 'none'}")
    return 0


def _settings(args: argparse.Namespace, *fixed: str) -> dict:
    """The settings given by -p, read as YAML; `fixed` are those that the command has another way to say, or none."""
    import yaml

    found = {}
    for name, value in args.p:
        if name in ("name", "processor", "data_dir", *fixed):
            raise TaskError(f"-p {name}: this is no setting here; see eas-kit data {args.verb} --help")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise TaskError(f"-p {name}: {value!r} is no valid YAML: {getattr(error, 'problem', error)}") from None
    return found


def _where(args: argparse.Namespace) -> dict:
    if args.where.startswith("hub:"):
        return {"hub": args.where.removeprefix("hub:") or True}
    return {"data_dir": args.where}


@contextmanager
def _writing(path: str):
    try:
        yield
    except OSError as error:
        raise TaskError(f"{path} cannot be written: {error.strerror or error}") from None


def _data_check(args: argparse.Namespace) -> int:
    from .tasks.check import check_data

    if args.open != "all" and not args.open.isdecimal():
        raise TaskError(f"--open is a number of pictures or 'all', not {args.open!r}")
    count = None if args.open == "all" else int(args.open)
    settings = _settings(args, "hub", "open_pictures", "progress")
    settings |= _where(args) | {"open_pictures": count, "progress": sys.stderr.isatty()}
    found = check_data(args.name, **settings)
    print(found.text())
    return 0 if found.ok else 1


def _data_task(args: argparse.Namespace):
    from .tasks import load_task

    settings = _settings(args, "hub", "check_images")  # no picture is needed for scores
    return load_task(args.name, None, check_images=False, **_where(args), **settings)


def _data_score(args: argparse.Namespace) -> int:
    import json

    print(json.dumps(_data_task(args).score_predictions(args.predictions, args.split), indent=1, ensure_ascii=False))
    return 0


def _data_export(args: argparse.Namespace) -> int:
    task = _data_task(args)
    with _writing(args.out):
        count = task.export_predictions(args.predictions, args.out, args.split)
    print(f"{args.out}: {count:,} answers")
    return 0


def _data_make(args: argparse.Namespace) -> int:
    from .tasks.made_up import write_scienceqa

    with _writing(args.folder):
        print(write_scienceqa(args.folder, args.records, args.seed))
    return 0


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


def _sweep(args: argparse.Namespace) -> int:
    from pathlib import Path

    from . import grids, sweep

    grid = grids.read_grid(args.grid, args.folder)
    out = args.out or Path("runs") / Path(args.grid).stem
    if args.dry_run:
        print(sweep.listing(grid, out))
        return 0
    result = sweep.sweep(grid, out, args.workers, args.folder)
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
