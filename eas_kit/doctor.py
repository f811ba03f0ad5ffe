"""Is everything here that eas_kit needs, and what machine is this?

from eas_kit.doctor import check
check()                      # one line; the first code cell of every notebook
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from .errors import RunError

WEIGHTS = Path(__file__).parent / "models" / "tiny" / "weights"
WEIGHT_FILES = ("config.json", "model.safetensors", "tokenizer.json")
# what only some uses need: package -> what for
OPTIONAL = {
    "bitsandbytes": "4- and 8-bit base models on a GPU",
    "flash_attn": "FlashAttention on a GPU",
    "playwright": "the browser tests",
    "pytest": "the tests",
    "repo2docker": "the Binder tests",
}


LITTLE_GB = 0.8  # free memory below which a notebook with the bundled model may end in "Kernel died"


@dataclass
class Findings:
    """What the doctor saw. ``problems`` keep eas_kit from working, ``advice`` does not; each says what to do."""

    machine: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    missing_optional: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def line(self) -> str:
        """All of it in one short line."""
        main = " · ".join(f"{name} {self.packages.get(name, 'missing')}" for name in ("torch", "transformers"))
        machine = f"{self.machine['device']}, {self.machine['cores']} cores, {self.machine['memory']}"
        return f"eas_kit {self.machine['eas_kit']} · {main} · {machine} · {'ok' if self.ok else 'NOT OK'}"

    def text(self) -> str:
        """The full report."""
        lines = [f"{name:<14}{value}" for name, value in self.machine.items()]
        lines += ["", "packages"]
        lines += [f"  {name:<18}{version}" for name, version in self.packages.items()]
        if self.missing_optional:
            lines += ["", "not here, needed only for some things"]
            lines += [f"  {name:<18}{use}" for name, use in self.missing_optional.items()]
        lines += ["", *self.advice] if self.advice else []
        lines += ["", *(f"PROBLEM: {problem}" for problem in self.problems), "" if self.problems else "All well."]
        return "\n".join(lines).rstrip()


def check() -> None:
    """Print one line about the installation and the machine.

    Raises:
        RunError: something that eas_kit needs is missing or too old; the message says what to do.
    """
    findings = examine()
    print("\n".join([findings.line(), *findings.advice]))
    if findings.problems:
        raise RunError("\n".join(findings.problems))


def examine() -> Findings:
    """Look at everything; imports torch, and no other large package."""
    findings = Findings()
    _packages(findings)
    _machine(findings)
    _weights(findings)
    for name, use in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            findings.missing_optional[name] = use
    if not chromium():
        findings.missing_optional["chromium"] = "the browser tests"
    return findings


def chromium() -> str | None:
    """A Chromium or Chrome to test with: $CHROMIUM, or one on the path."""
    named = os.environ.get("CHROMIUM")
    return named or shutil.which("chromium") or shutil.which("google-chrome")


def requirements() -> list[Requirement]:
    """What eas_kit depends on, from the installed package or, in a bare checkout, from pyproject.toml."""
    try:
        declared = importlib.metadata.requires("eas_kit") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parents[1] / "pyproject.toml"
        declared = tomllib.loads(project.read_text())["project"]["dependencies"] if project.exists() else []
    return [r for r in map(Requirement, declared) if r.marker is None or r.marker.evaluate({"extra": ""})]


def _packages(findings: Findings) -> None:
    wrong = []
    for requirement in requirements():
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            findings.packages[requirement.name] = "missing"
            wrong.append(f"{requirement.name} is missing")
            continue
        findings.packages[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, wanted {requirement.specifier}")
    if wrong:
        install = "Install the tested versions: pip install -c constraints.txt -e ."
        findings.problems.append(f"{'; '.join(wrong)}. {install}")


def _machine(findings: Findings) -> None:
    from . import __version__

    findings.machine = {
        "eas_kit": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "device": _device(),
        "cores": f"{cores():g}",
        "memory": f"{memory_gb():.1f} GB ({free_gb():.1f} GB free)",
        "disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GB free here",
    }
    if free_gb() < LITTLE_GB:
        findings.advice.append(
            f"little memory is free, {free_gb():.1f} GB: end what else is open, in JupyterLab with "
            "File, Close and Shut Down Notebook, in each notebook that you are done with"
        )


def _device() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown (no torch)"
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        return f"cuda ({torch.cuda.get_device_name()}, {total:.0f} GB)"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def cores() -> float:
    """Cores this process may use: fewer than the machine has in a container or on a shared server."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = _cgroup("cpu.max")
    if re.fullmatch(r"\d+ \d+", quota):
        share, period = map(int, quota.split())
        allowed = min(allowed, share / period)
    return allowed


def memory_gb() -> float:
    """Memory this process may use, GiB. On Binder that is the container's limit, not the machine's memory."""
    total = psutil.virtual_memory().total
    limit = _cgroup("memory.max")
    return (min(total, int(limit)) if limit.isdigit() else total) / 2**30


def free_gb() -> float:
    """Memory that is still free for this process, GiB; in a container, of the container's limit."""
    available = psutil.virtual_memory().available
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit.isdigit() and used.isdigit():
        files = re.search(r"^inactive_file (\d+)$", _cgroup("memory.stat"), re.MULTILINE)  # given back when wanted
        available = min(available, int(limit) - int(used) + (int(files[1]) if files else 0))
    return max(available, 0) / 2**30


def _cgroup(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""


def _weights(findings: Findings) -> None:
    missing = [name for name in WEIGHT_FILES if not (WEIGHTS / name).exists()]
    if missing:
        findings.machine["tiny model"] = "missing"
        findings.problems.append(
            f"the bundled model lacks {', '.join(missing)} in {WEIGHTS}: install the package again, "
            "or make it with `python -m eas_kit.models.tiny --out DIR` and move DIR/weights there"
        )
    else:
        size = (WEIGHTS / "model.safetensors").stat().st_size / 2**20
        findings.machine["tiny model"] = f"bundled, {size:.1f} MB"
