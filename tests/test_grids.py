"""Which runs a grid stands for, and that what makes no sense is refused before anything runs."""

from __future__ import annotations

import itertools

import pytest
from books import make_book

from eas_kit.errors import RunError
from eas_kit.grids import read_grid

BOOK = 'seed = 3  # which draw\nrate = 0.5  # per step\nmodel = "tiny"  # a name\nrun_dir = "runs/manual"  # where'


@pytest.fixture
def books(tmp_path):
    make_book(tmp_path / "books", "01_probe", "pass", parameters=BOOK)
    return tmp_path / "books"


@pytest.fixture
def read(tmp_path, books):
    def read(text):
        path = tmp_path / "grid.yaml"
        path.write_text(text)
        return read_grid(path, books)

    return read


def test_the_product_of_the_lists_less_the_excluded_and_the_included_besides(read):
    grid = read(
        "run: 01_probe\nfixed: {model: small}\ngrid: {seed: [0, 1, 2], rate: [1e-2, 3]}\n"
        "exclude: [{seed: 1, rate: 3}, {seed: 2}]\ninclude: [{seed: 7}, {seed: 8, model: other}]\n"
    )
    wanted = [
        {"model": "small", "seed": seed, "rate": rate}
        for seed, rate in itertools.product([0, 1, 2], [0.01, 3.0])
        if (seed, rate) != (1, 3.0) and seed != 2
    ]
    wanted += [{"model": "small", "seed": 7}, {"model": "other", "seed": 8}]
    assert [dict(job.settings) for job in grid.jobs] == wanted
    assert all(type(job.settings.get("rate", 0.0)) is float for job in grid.jobs)
    assert grid.run == grid.jobs[0].kind == "01_probe"
    assert grid.jobs[0].varied == {"seed": 0, "rate": 0.01}
    assert len({job.name for job in grid.jobs}) == len(grid.jobs)
    assert grid.jobs[0].name.startswith("seed0_rate0.01-")


def test_names_and_keys_follow_the_settings_and_the_notebooks_source(read, books):
    text = "run: 01_probe\ngrid: {seed: [0, 1]}\n"
    first, again = read(text), read("run: 01_pr\ngrid: {seed: [1, 0]}\n")  # order and abbreviation change nothing
    assert {job.name for job in first.jobs} == {job.name for job in again.jobs}
    make_book(books, "01_probe", "print('changed')", parameters=BOOK)
    changed = read(text)
    assert not {job.name for job in first.jobs} & {job.name for job in changed.jobs}
    assert first.jobs[0].key != changed.jobs[0].key


def test_runs_of_arms_and_of_a_table_of_the_paper(read):
    grid = read(
        "run: arms\nfixed: {steps: 5}\ngrid:\n  arm: [{method: full}, {method: pia, k: 4, chosen_by: bandit}]\n"
    )
    assert [job.settings["arm"]["method"] for job in grid.jobs] == ["full", "pia"]
    assert grid.jobs[1].name.startswith("pia_4_bandit-")
    grid = read("run: arms\ngrid: {table: [7], seed: [0, 1]}\n")
    rows = [(job.settings["seed"], job.settings["row"]) for job in grid.jobs]
    assert rows == [(seed, row) for seed in (0, 1) for row in ("0", "4", "8", "12", "16")]
    (one,) = read("run: arms\ninclude: [{table: 1, row: EAS8}]\n").jobs
    assert one.settings == {"table": "1", "row": "EAS8"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("- 1", "holds a list, wanted the keys run, fixed, grid, include, exclude"),
        ("run: 01_probe\ngird: {}", "unknown key gird; a grid has run, fixed, grid"),
        ("grid: {seed: [1]}", "`run` says what runs, 'arms' or a notebook"),
        ("run: 02_nope\ngrid: {seed: [1]}", "unknown notebook: 02_nope. The notebooks are: 01_probe"),
        ("run: 01_probe", "stands for no run: it has neither `grid` nor `include`"),
        ("run: 01_probe\ngrid: {seed: []}", "`grid: seed` is an empty list"),
        ("run: 01_probe\ngrid: {seed: 1}", "`grid: seed` is 1, wanted a list of values"),
        ("run: 01_probe\nfixed: [1]\ngrid: {seed: [1]}", "`fixed` holds a list, wanted `name: value` lines"),
        ("run: 01_probe\nfixed: {seed: 1}\ngrid: {seed: [1]}", "seed stands in `fixed` and in `grid`"),
        ("run: 01_probe\ngrid: {sead: [1]}", "run 1 of 1: unknown parameter sead; 01_probe has seed, rate, model"),
        ("run: 01_probe\ngrid: {seed: [1, x]}", "run 2 of 2: 01_probe: parameter seed is 3 by default"),
        ("run: 01_probe\ngrid: {run_dir: [x]}", "run_dir is set by the sweep; choose the folder with --out"),
        ("run: 01_probe\ngrid: {seed: [1, 1]}", "two runs have the same settings, {'seed': 1}"),
        ("run: 01_probe\ngrid: {seed: [1]}\nexclude: [{seed: 1}]", "stands for no run: everything in"),
        ("run: 01_probe\ngrid: {seed: [1]}\nexclude: [{seed: 2}]", "`exclude: {'seed': 2}` fits no run of the grid"),
        ("run: 01_probe\ngrid: {seed: [1]}\nexclude: [{rate: 2}]", "`exclude` names rate, which is neither in"),
        ("run: 01_probe\ngrid: {seed: [1]}\ninclude: {seed: 2}", "`include` wants a list of"),
        ("run: arms\ngrid: {seed: [0]}", "either an `arm`, or a `table`"),
        ("run: arms\ngrid: {arm: [{method: fll}]}", "Arm.method: wanted one of"),
        ("run: arms\ngrid: {arm: [{method: full, rank: 3}]}", "an arm has method, k, chosen_by"),
        ("run: arms\ngrid: {arm: [full]}", "arm is a dict or null; got 'full', a str"),
        ("run: arms\ngrid: {table: [9]}", "the paper has no table '9' here; there are 1, 2"),
        ("run: arms\ngrid: {table: [1], row: [EAS9]}", "table 1 has no row 'EAS9'; its rows are 'zero-shot'"),
        ("run: arms\nfixed: {stepss: 3}\ngrid: {table: [1]}", "unknown setting stepss; a run of an arm has arm, table"),
        ("run: arms\nfixed: {steps: true}\ngrid: {table: [1]}", "steps is a int; got True, a bool"),
        ("run: arms\nfixed: {search: {update: 3}}\ngrid: {table: [1]}", "search: unknown update; known are batch_size"),
        ("run: arms\nfixed: {search: {updates: -3}}\ngrid: {table: [1]}", "SearchConfig.updates: wanted"),
        ("run: arms\nfixed: {plan: {step: 3}}\ngrid: {table: [1]}", "plan: unknown step; known are"),
        ("run: arms\nfixed: {learning_rates: {ful: 0.1}}\ngrid: {table: [1]}", "learning_rates: unknown ful; known"),
        ("run: arms\nfixed: {skip_rank: 7}\ngrid: {table: [1]}", "EASConfig.skip_rank: wanted a whole number"),
        (f"run: arms\ngrid: {{seed: {[*range(101)]}, steps: {[*range(100)]}}}", "stands for 10100 runs"),
    ],
)  # fmt: skip
def test_poor_grids_are_refused(read, text, message):
    with pytest.raises(RunError) as caught:
        read(text)
    assert message in str(caught.value)


def test_a_missing_grid_is_refused(tmp_path):
    with pytest.raises(RunError, match="nowhere.yaml cannot be read"):
        read_grid(tmp_path / "nowhere.yaml")
