"""The command line: exit codes, messages, help."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from books import make_book

import eas_kit
from eas_kit import doctor
from eas_kit.cli import main
from eas_kit.doctor import check, examine
from eas_kit.errors import RunError


def test_help_and_version(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "eas-kit run" in text
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"eas-kit {eas_kit.__version__}\n"
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "VALUE is read as YAML" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys, eas_kit.cli as c; c.build_parser().format_help();"
        "print([m for m in ('torch', 'papermill', 'plotly', 'IPython', 'ipywidgets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_list_shows_parameters_and_runs_nothing(tmp_path, capsys):
    make_book(tmp_path, "00_a", "1 / 0", title="The first")
    assert main(["run", "--list", "--notebooks", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "00_a: The first" in text
    assert "rate = 0.5" in text
    assert "per step" in text


def test_exit_codes(tmp_path, capsys):
    books = tmp_path / "books"
    make_book(books, "00_a", "assert seed == 3, 'a seed of three'")
    where = ["--notebooks", str(books), "--out", str(tmp_path / "run")]
    assert main(["run", *where]) == 0
    assert (tmp_path / "run" / "index.html").exists()
    assert main(["run", "00_a", "-p", "seed", "4", *where]) == 1
    assert "AssertionError: a seed of three" in capsys.readouterr().out
    assert main(["run", "-p", "sead", "4", *where]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("eas-kit: -p: unknown parameter sead. Valid parameters are:")
    assert streams.out == ""
    assert main(["run", "nope", *where]) == 2
    assert capsys.readouterr().err == "eas-kit: unknown notebook: nope. The notebooks are: 00_a\n"


def test_interrupt_leaves_a_record_and_no_kernel(tmp_path):
    import signal
    import time

    import psutil

    books, out = tmp_path / "books", tmp_path / "run"
    make_book(books, "00_a", "print('up')", "import time; time.sleep(60)")
    make_book(books, "01_b", "pass")
    command = [sys.executable, "-m", "eas_kit.cli", "run", "--notebooks", str(books), "--out", str(out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # tests that run in the background of a shell inherit an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "cell  4/4" in line:
            break
    time.sleep(0.5)
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130, "".join(lines) + rest
    assert re.search(r"^00_a +stopped +\d", rest, re.MULTILINE)
    assert re.search(r"^01_b +not run$", rest, re.MULTILINE)
    assert "IPKernelApp" not in rest  # the kernel process dying is not news
    assert kernels
    assert not psutil.wait_procs(kernels, timeout=10)[1]
    assert (out / "index.html").exists()


def test_doctor(capsys, monkeypatch, tmp_path):
    for name in doctor.WEIGHT_FILES:
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(doctor, "WEIGHTS", tmp_path)
    monkeypatch.setattr(doctor, "free_gb", lambda: 3.0)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "transformers", "device", "memory", "cores", "All well."):
        assert word in text
    check()
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert line.startswith(f"eas_kit {eas_kit.__version__} · torch ")


@pytest.mark.parametrize(
    ("used", "files", "free"),
    [(1.5, 0.0, 0.5), (1.5, 0.4, 0.9), (2.5, 0.0, 0.0), (0.0, 0.0, 2.0)],
    ids=["little", "files are given back", "more than all", "all"],
)
def test_doctor_sees_what_is_free_of_a_containers_memory(monkeypatch, capsys, used, files, free):
    gb = 1 << 30
    there = {"memory.max": str(2 * gb), "memory.current": str(int(used * gb)), "cpu.max": "max 100000"}
    there["memory.stat"] = f"anon 17\ninactive_file {int(files * gb)}\nactive_file 19"
    monkeypatch.setattr(doctor, "_cgroup", there.__getitem__)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * gb, available=32 * gb))
    assert doctor.free_gb() == pytest.approx(free)
    check()
    said = capsys.readouterr().out
    assert f"2.0 GB ({free:.1f} GB free)" in said
    warned = "File, Close and Shut Down Notebook" in said
    assert warned == (free < doctor.LITTLE_GB)
    assert ("little memory is free" in examine().text()) == warned


def test_doctor_says_what_is_wrong_and_what_to_do(capsys, monkeypatch, tmp_path):
    from packaging.requirements import Requirement

    monkeypatch.setattr(doctor, "WEIGHTS", tmp_path)
    monkeypatch.setattr(doctor, "requirements", lambda: [Requirement("numpy>99"), Requirement("no-such-package")])
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "PROBLEM: numpy is " in text
    assert (
        ", wanted >99; no-such-package is missing. Install the tested versions: pip install -c constraints.txt" in text
    )
    assert "PROBLEM: the bundled model lacks config.json, model.safetensors, tokenizer.json" in text
    with pytest.raises(RunError, match="no-such-package is missing"):
        check()


def test_doctor_respects_a_containers_limits(monkeypatch):
    monkeypatch.setattr(doctor, "_cgroup", {"cpu.max": "50000 100000", "memory.max": str(1 << 30)}.__getitem__)
    assert doctor.cores() == 0.5
    assert doctor.memory_gb() == 1.0
    monkeypatch.setattr(doctor, "_cgroup", {"cpu.max": "max 100000", "memory.max": "max"}.__getitem__)
    assert doctor.cores() >= 1
    assert doctor.memory_gb() > 1.0


def test_every_declared_package_is_examined():
    assert {"torch", "transformers", "papermill", "anywidget"} <= set(examine().packages)
