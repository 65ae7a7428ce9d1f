"""The requirements files and the lock agree with the dependencies of pyproject.toml. CPU; milliseconds."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = PROJECT["dependencies"]
EXTRAS = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]


def lines(name: str) -> list[str]:
    """Return the lines of a requirements file without comments, each with the lines that continue it."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def locked(name: str, environment: dict) -> list[str]:
    """Return the lines of the lock that pin a package in an environment."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    found = [line for line in lines("requirements.lock") if line.startswith(f"{key}==")]
    requirements = {line: Requirement(line.split("--hash=")[0]) for line in found}
    return [line for line, r in requirements.items() if r.marker is None or r.marker.evaluate(environment)]


def test_requirements_files_repeat_pyproject():
    assert lines("requirements.txt") == CORE
    assert lines("requirements-extras.txt") == EXTRAS


@pytest.mark.parametrize("minor", range(10, 15))
def test_lock_pins_each_requirement_once(minor):
    environment = {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.0",
                   "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    for requirement in map(Requirement, CORE + EXTRAS):
        pins = locked(requirement.name, environment)
        assert len(pins) == 1, requirement
        version = re.match(r"[^=]+==(\S+)", pins[0])[1]
        assert requirement.specifier.contains(version), f"{requirement}: {version} is locked"


def test_lock_has_hashes_and_no_prereleases():
    for line in lines("requirements.lock"):
        assert "--hash=sha256:" in line
        assert not Requirement(line.split("--hash=")[0]).specifier.prereleases, line.split("--hash=")[0]
