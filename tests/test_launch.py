"""A run from a file: what it leaves, one process and two alike, killed and gone on with, under FSDP, and its errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import captioned
import launched
import pytest
import torch
import toys
import yaml
from launched import KILL, launch, save_model, settings, start, write
from safetensors.torch import load_file

import eas_kit as eas
from eas_kit.errors import ConfigError
from eas_kit.launch import main
from eas_kit.launch_config import LaunchConfig, read_config
from eas_kit.masks import read_mask
from eas_kit.training import History, SearchResult

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "notebooks" / "params" / "launch").glob("*.yaml"))
KILLED = -signal.SIGKILL
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("launched") / "model")


@pytest.fixture(scope="module")
def whole(model) -> Path:
    """A run in one process, without interruption: in this one."""
    return run_here(model, "whole")


@pytest.fixture(scope="module")
def both(model) -> Path:
    """The same run in two processes."""
    folder, config = prepared(model, "both")
    assert start(launch, config, processes=2) == [0, 0]
    return folder


def prepared(model: Path, name: str, **changes) -> tuple[Path, str]:
    """Output folder and file of settings of a run."""
    folder = model.parent / name
    return folder, write(model.parent / f"{name}.yaml", settings(model, folder, **changes))


def run_here(model: Path, name: str, **changes) -> Path:
    folder, config = prepared(model, name, **changes)
    assert main([config]) == 0
    return folder


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapters" / "adapter_model.safetensors")


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def steps(folder: Path, loop: str) -> list[str]:
    return sorted(path.name[-2:] for path in (folder / loop).glob("checkpoint-*"))


def same_run(one: Path, other: Path) -> bool:
    """The same mask, preferences, losses and adapters, bit for bit."""
    searches = [SearchResult.load(folder / "search.json") for folder in (one, other)]
    assert searches[0].history == searches[1].history
    assert searches[0].steps == searches[1].steps
    assert (one / "mask.json").read_text() == (other / "mask.json").read_text()
    first, second = adapters(one), adapters(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    metrics = [results(folder)["metrics"] for folder in (one, other)]
    for found in metrics:
        found["evaluate"].pop("seconds", None)
    return metrics[0] == metrics[1]


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_everything(whole, model):
    found = results(whole)
    search = SearchResult.load(whole / "search.json")
    assert read_mask(whole / "mask.json")["skipped"] == found["metrics"]["mask"] == list(search.skipped)
    assert read_mask(whole / "mask.json")["made_by"] == "search"
    assert len(search.steps) == 9 and len(search.history) == 3
    assert search.preferences.abs().max() > 1e-3
    assert (steps(whole, "search"), steps(whole, "tuning")) == (["08", "09"], ["04", "05"])
    assert found["metrics"]["train"]["steps"] == 5
    assert found["processes"] == 1 and found["sharded"] is False
    assert {name: part["examples"] for name, part in found["splits"].items()} == {"train": 48, "search": 24, "val": 5}
    assert found["parameters"]["search"]["num_skipped"] == 2

    net = eas.load(whole / "adapters", base=eas.load_model(model, attn_implementation="eager")[0])
    assert net.mask == search.skipped
    task = launched.LaunchedTask(None)
    assert task.evaluate(net, "val", limit=5)["loss"] == pytest.approx(found["metrics"]["evaluate"]["loss"], rel=1e-6)
    base = eas.detach(net)
    assert task.evaluate(base, "val", limit=5)["loss"] != pytest.approx(found["metrics"]["evaluate"]["loss"], rel=1e-2)


def test_the_same_command_again_changes_nothing(whole, model):
    before = adapters(whole)
    assert main([str(whole) + ".yaml"]) == 0
    assert all(torch.equal(before[name], value) for name, value in adapters(whole).items())


def test_another_run_is_refused_in_its_folder(whole, capsys):
    config = str(whole) + ".yaml"
    assert main([config, "--set", "train.learning_rate=1e-3", "--set", "eas.skip_rank=8"]) == 2
    said = capsys.readouterr().err
    assert "is of a run with other settings: eas.skip_rank (there 6, now 8); train.learning_rate (there 0.01, " in said
    assert "choose another output_dir" in said
    assert main([config, "--set", "evaluate.limit=3", "--set", "train.keep_checkpoints=1"]) == 0  # evaluated anew
    assert results(whole)["metrics"]["evaluate"]["count"] == 3
    assert main([config]) == 0


def test_interrupted_it_stops_there(model, monkeypatch):
    folder, config = prepared(model, "interrupted", evaluate=None)
    monkeypatch.setattr("eas_kit.launch.fit", lambda *_: History([], interrupted=True))
    assert main([config]) == 130
    assert (folder / "mask.json").exists() and not (folder / "adapters").exists()
    stopped = SearchResult(torch.zeros(5), (), [], interrupted=True)
    monkeypatch.setattr("eas_kit.launch.search", lambda *_: stopped)
    (folder / "mask.json").unlink()
    assert main([config]) == 130
    assert not (folder / "mask.json").exists()


def test_tuning_alone_under_a_given_mask(whole, model):
    folder = run_here(model, "given", search=None, mask=[1, 3], evaluate=None)
    found = results(folder)
    assert found["metrics"]["mask"] == [1, 3]
    assert "search" not in found["metrics"] and not (folder / "search").exists()
    assert set(found["splits"]) == {"train"}
    assert read_mask(folder / "mask.json")["made_by"] == "user"
    by_file = run_here(model, "by_file", search=None, mask=str(folder / "mask.json"), evaluate=None)
    assert all(torch.equal(value, adapters(by_file)[name]) for name, value in adapters(folder).items())


# --------------------------------------------------------------------------------------------- one process and two


@pytest.mark.parametrize("how", ["a whole model each", "sharded"])
def test_two_processes_are_one(whole, both, model, how):
    folder = both
    if how == "sharded":  # as a user would start it, from the command line
        folder, config = prepared(model, "sharded")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
        command += ["--use_fsdp", "--fsdp_version=2", "-m", "eas_kit.training", config]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert results(folder)["processes"] == 2 and results(folder)["sharded"] is (how == "sharded")
    one, two = (SearchResult.load(path / "search.json") for path in (whole, folder))
    assert two.skipped == one.skipped
    assert [record["masks"] for record in two.history] == [record["masks"] for record in one.history]
    torch.testing.assert_close(two.preferences, one.preferences, rtol=1e-4, atol=1e-7)
    assert [step["loss"] for step in two.steps] == pytest.approx([step["loss"] for step in one.steps], rel=1e-5)
    metrics = [results(path)["metrics"] for path in (whole, folder)]
    assert metrics[1]["parameters"] == metrics[0]["parameters"]
    for part, name in (("train", "first_loss"), ("train", "last_loss"), ("evaluate", "loss")):
        assert metrics[1][part][name] == pytest.approx(metrics[0][part][name], rel=1e-4)
    # Adam divides by the size of a gradient, also where that is rounding alone
    for name, weight in adapters(whole).items():
        torch.testing.assert_close(adapters(folder)[name], weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again(whole, both, model, processes):
    folder, config = prepared(model, f"killed{processes}")
    # batches with answers: one a step of the search, three an update, two a step of tuning
    for batch, search_steps, tuning_steps in (
        (3, ["02"], []),  # the third step of the warm-up
        (5, ["02", "04"], []),  # step 5, and the second subnetwork of the first update
        (14 + 6, ["08", "09"], ["02"]),  # after 14 of the search, step 3 of tuning (two batches a step)
    ):
        codes = start(launch, config, processes=processes, **{KILL: str(batch)})
        assert KILLED in codes and 0 not in codes
        assert (steps(folder, "search"), steps(folder, "tuning")) == (search_steps, tuning_steps)
        assert not (folder / "results.json").exists()
    assert start(launch, config, processes=processes) == [0] * processes
    assert same_run(folder, {1: whole, 2: both}[processes])


# ---------------------------------------------------------------------------------------------------------- FSDP


def shared_fit(folder: Path) -> None:
    """One of two processes that share a LLaVA, part of whose base trains; what it saw goes into a file."""
    net, config = llava(), fit_config(folder / "fit")
    net.mask = (1, 3)
    history = eas.fit(net, toys.ToyTask(), config)
    rank = torch.distributed.get_rank()
    frozen = net.base.model.language_model.layers[1].mlp.up_proj.weight
    found = {"losses": history.losses, "frozen": type(frozen.data).__name__, "part": tuple(frozen.to_local().shape)}
    found["trained"] = {type(p.data).__name__ for p in net.parameters() if p.requires_grad}
    found["state"] = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    again = llava()
    again.mask = (1, 3)
    found["again"] = eas.fit(again, toys.ToyTask(), fit_config(folder / "fit", resume=True)).losses
    prompts = toys.make_prompts()
    with torch.inference_mode():  # as evaluations are made; training has to go on after them
        net.eval()(**prompts)
    found["longer"] = eas.fit(net, toys.ToyTask(), fit_config(None)).losses
    net.eval()
    found["tokens"] = net.generate(**prompts, max_new_tokens=4)
    lora = lora_llama()
    found["lora"] = eas.fit(lora, toys.ToyTask(images=False), fit_config(None)).losses
    found["lora tokens"] = lora.eval().generate(**toys.make_prompts(images=None), max_new_tokens=4)
    try:
        eas.fit(toys.make_llama(), toys.ToyTask(images=False), fit_config(None))
    except ConfigError as error:
        found["refused"] = str(error)
    if rank == 0:
        again.save_pretrained(folder / "adapters")
    torch.save(found, folder / f"found-{rank}.pt")
    torch.distributed.destroy_process_group()


def llava() -> eas.EASModel:
    base = toys.make_llava()
    torch.manual_seed(0)
    parts = ("model.multi_modal_projector",)
    return eas.attach(base, eas.EASConfig(skip_rank=6, adapt_rank=4, dropout=0.0, modules_to_save=parts))


def lora_llama() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    base = toys.make_llama()
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))


def fit_config(folder: Path | None, **changes) -> eas.TrainConfig:
    values = {"max_steps": 4, "batch_size": 4, "gradient_accumulation_steps": 2, "progress": False}
    values |= {"gradient_checkpointing": True} if folder else {}
    return eas.TrainConfig(**values | {"output_dir": folder and str(folder), "seed": 2} | changes)


def test_fsdp_shares_what_is_frozen_and_trains_as_one_process(tmp_path):
    assert start(shared_fit, tmp_path, processes=2, **FSDP) == [0, 0]
    net = llava()
    net.mask = (1, 3)
    expected = eas.fit(net, toys.ToyTask(), fit_config(tmp_path / "alone"))
    state = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    longer = eas.fit(net, toys.ToyTask(), fit_config(None)).losses
    tokens = net.generate(**toys.make_prompts(), max_new_tokens=4)
    lora = lora_llama()
    lora_losses = eas.fit(lora, toys.ToyTask(images=False), fit_config(None)).losses
    lora_tokens = lora.eval().generate(**toys.make_prompts(images=None), max_new_tokens=4)
    for rank in range(2):
        found = torch.load(tmp_path / f"found-{rank}.pt", weights_only=True)
        assert found["frozen"] == "DTensor" and found["part"] == ((27, 38), (26, 38))[rank]
        assert found["trained"] == {"Tensor"}
        assert found["losses"] == found["again"] == pytest.approx(expected.losses, rel=1e-4)
        assert found["longer"] == pytest.approx(longer, rel=1e-3)
        assert found["state"].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-3, atol=1e-3)
        assert torch.equal(found["tokens"], tokens)
        assert found["lora"] == pytest.approx(lora_losses, rel=1e-4)
        assert torch.equal(found["lora tokens"], lora_tokens)
        assert "layers of this LlamaForCausalLM have no frozen weights" in found["refused"]
    projector = "base.model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(net.get_parameter(projector), llava().get_parameter(projector))  # it did train
    loaded = eas.load(tmp_path / "adapters", base=toys.make_llava())
    saved = torch.load(tmp_path / "found-0.pt", weights_only=True)["state"]
    assert all(torch.equal(loaded.get_parameter(name).detach(), value) for name, value in saved.items())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, r"set up for FSDP 1.*accelerate launch --use_fsdp --fsdp_version 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params keeps the shards in CPU memory.*leave it out"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing.*gradient_checkpointing=True"),
    ],
)
def test_settings_of_fsdp_that_are_not_there(monkeypatch, environment, message):
    from eas_kit.sharding import sharding_is_asked_for

    assert not sharding_is_asked_for()
    for name, value in (FSDP | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        sharding_is_asked_for()


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_files_of_settings_are_whole(path):
    config = read_config(path)
    assert isinstance(config, LaunchConfig)
    assert path.name in path.read_text()  # the command that runs it stands in it
    if config.model["name"] == "tiny":
        return
    ranks = {"llava_scienceqa": (256, 128), "llava": (128, 128), "lavin": (32, 8), "meter": (144, 0)}
    kind = next(kind for kind in ranks if path.stem.startswith(kind))
    assert (config.eas.skip_rank, config.eas.adapt_rank) == ranks[kind]
    assert (config.eas.groups, config.eas.temperature, config.eas.scale, config.eas.dropout) == (2, 10.0, 1.0, 0.1)
    assert (config.search.num_subnetworks, config.search.train_steps_per_update) == (3, 10)
    assert config.search.reward == "exp" and config.search.warmup_steps > 0
    if path.stem[-1].isdigit() and "eas" in path.stem:
        assert config.search.num_skipped == int(path.stem.partition("eas")[2])


def test_there_is_a_file_for_each_setting_of_the_paper():
    named = {path.stem for path in CONFIGS}
    assert named == {
        *("tiny", "llava_scienceqa_eas8", "llava_scienceqa_eas12", "llava_slake", "llava_aid"),
        *("lavin_scienceqa_eas12", "meter_vqav2", "meter_nlvr2", "meter_flickr30k"),
    }


def test_the_bundled_model_from_its_file(tmp_path):
    changes = ["search.warmup_steps=1", "search.updates=1", "train.max_steps=2", "evaluate.limit=2"]
    changes += ["search.progress=false", "train.progress=false", "search.batch_size=2", "search.reward_batch_size=2"]
    options = [word for change in [*changes, f"output_dir={tmp_path}/tiny"] for word in ("--set", change)]
    assert main([str(ROOT / "notebooks/params/launch/tiny.yaml"), *options]) == 0
    found = results(tmp_path / "tiny")
    assert len(found["metrics"]["mask"]) == 4 and found["metrics"]["num_sites"] == 12
    assert found["metrics"]["evaluate"]["count"] == 2


def test_the_bundled_meter_from_the_file_of_a_real_one(tmp_path):
    images = captioned.records(test=range(17), val=range(17, 36), train=range(36, 96))  # a picture and 15 false texts
    data = captioned.write(tmp_path / "data", images)
    changes = ["model={name: tiny-meter, task: retrieval}", f"task.data_dir={data}", "task.held_out={search: 0.4}"]
    changes += ["search.warmup_steps=1", "search.updates=1", "search.train_steps_per_update=1", "search.batch_size=2"]
    changes += ["search.reward_batch_size=2", "train.batch_size=2", "train.max_steps=2", "evaluate.limit=5"]
    changes += ["search.progress=false", "train.progress=false", f"output_dir={tmp_path}/meter"]
    options = [word for change in changes for word in ("--set", change)]
    assert main([str(ROOT / "notebooks/params/launch/meter_flickr30k.yaml"), *options]) == 0
    found = results(tmp_path / "meter")["metrics"]
    assert len(found["mask"]) == 8 and found["num_sites"] == 24
    assert found["evaluate"]["method"] == "matching" and found["evaluate"]["chance"]
    assert set(found["evaluate"]["columns"]) == {f"{way}@{k}" for way in ("TR", "IR") for k in (1, 5, 10)}


def base_settings(**changes):
    values = {"model": "tiny", "task": "elements", "output_dir": "out", "train": {"max_steps": 1}}
    return {key: value for key, value in (values | changes).items() if value != "left out"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trian": {}}, "there is no setting trian; there are model, task, output_dir"),
        ({"model": "left out"}, "model must be given"),
        ({"task": "elemants"}, "there is no task 'elemants'; choose one of"),
        ({"task": {"name": "elements", "data": 1}}, "task elements: there is no setting data; there are name, "),
        ({"model": {"dtype": "bfloat16"}}, "model: wanted a name, or `name:` and settings"),
        ({"eas": {"rank": 3}}, "eas: there is no setting rank; there are skip_rank"),
        ({"eas": {"skip_rank": 3}}, "eas: EASConfig.skip_rank: wanted a whole number from 1 up, divisible"),
        ({"train": {"epoch": 2}}, "train: there is no setting epoch"),
        ({"train": [1]}, r"train: wanted settings of TrainConfig, got \[1\]"),
        ({"train": {"betas": 3}}, r"train: .* does not fit TrainConfig"),
        ({"train": {"gradient_checkpointing": "often"}}, "gradient_checkpointing is true or false, not 'often'"),
        ({"search": {"output_dir": "x", "resume": True}}, "search: output_dir, resume cannot be set here"),
        ({"search": {"updates": 0}}, "search: SearchConfig.updates: wanted a whole number from 1 up, got 0"),
        ({"mask": [1], "search": {}}, "mask and search: a search finds a mask of its own"),
        ({"mask": 3}, "mask: wanted a list of sites, a mask file, or null, got 3"),
        ({"train": None}, "search, train and evaluate are all null"),
        ({"evaluate": {"slpit": "val"}}, "evaluate: there is no setting slpit; there are split, limit"),
        ({"evaluate": {"split": "dev"}}, "evaluate: split is one of train, search, val, test, not 'dev'"),
        ({"evaluate": True}, "evaluate: wanted settings of task.evaluate, got True"),
        ({"seed": -1}, "seed: wanted a whole number from 0 up, got -1"),
        ({"output_dir": 3}, "LaunchConfig.output_dir: wanted the path of a folder, got 3"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.setattr("eas_kit.launch.load_model", lambda **_: pytest.fail("a model was loaded"))
    path = write(tmp_path / "run.yaml", base_settings(**changes))
    with pytest.raises(eas.EASError, match=message):
        read_config(path)
    assert main([path]) == 2
    assert capsys.readouterr().err.startswith("eas_kit.training: ")


def test_files_and_changes_that_make_no_sense(tmp_path):
    with pytest.raises(ConfigError, match=r"the settings .*missing.yaml cannot be read"):
        read_config(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="wanted lines `name: value`, the file holds a list"):
        read_config(tmp_path / "list.yaml")
    path = write(tmp_path / "run.yaml", base_settings())
    changed = read_config(path, ["train.learning_rate=1e-3", "model.dtype=bfloat16", "search.num_skipped=2", "seed=3"])
    assert changed.train.learning_rate == 1e-3
    assert changed.model == {"name": "tiny", "dtype": "bfloat16"}
    secret = read_config(path, ["model.token=hf_secret"])
    assert secret.model["token"] == "hf_secret"
    assert "hf_secret" not in f"{secret.to_dict()} {secret.identity()}"
    assert (changed.search.seed, changed.train.seed) == (3, 3)
    assert (changed.search.output_dir, changed.train.output_dir) == (str(Path("out/search")), str(Path("out/tuning")))
    for wrong, message in (
        ("seed", "wanted NAME=VALUE"),
        ("seed.x=1", "seed: wanted a whole number"),
        ("output_dir.x=1", "which has nothing inside"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_config(path, [wrong])


def test_a_precision_of_the_launcher_that_the_settings_overrule(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main([write(tmp_path / "run.yaml", base_settings(output_dir=str(tmp_path / "out")))]) == 2
    assert "launched with mixed precision bf16, and train.mixed_precision is 'no'; set it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_predictions_of_a_sharded_model_are_refused(tmp_path, monkeypatch, capsys):
    for name, value in (FSDP | {"WORLD_SIZE": "2", "RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    asked = {"split": "val", "predictions": "answers.jsonl"}
    path = write(tmp_path / "run.yaml", base_settings(evaluate=asked, output_dir=str(tmp_path / "out")))
    assert main([path]) == 2
    assert "evaluate.predictions: a file of answers is written by one process" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr("eas_kit.launch.load_model", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # one process shards nothing, and writes
        main([path])


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "out" / "search").mkdir(parents=True)
    path = write(tmp_path / "run.yaml", base_settings(output_dir=str(tmp_path / "out")))
    assert main([path]) == 2
    assert "holds search/ or tuning/ but no config.json" in capsys.readouterr().err
    file = tmp_path / "file"
    file.write_text("")
    assert main([path, "--set", f"output_dir={file}"]) == 2
    assert f"output_dir {file} is a file; wanted a folder" in capsys.readouterr().err


def test_the_files_hold_nothing_but_settings():
    for path in CONFIGS:
        assert set(yaml.safe_load(path.read_text())) <= set(LaunchConfig.__dataclass_fields__)
