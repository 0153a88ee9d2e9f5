"""constraints.txt pins all that an install of the extras brings: two installs are the same."""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
EXTRAS = ("server", "demo", "bench", "test", "lint")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought_by(name: str, extras: tuple[str, ...], seen: set[tuple[str, tuple[str, ...]]]) -> set[str]:
    """Names of all that an installed distribution requires, at whatever distance, and no ``==`` pins."""
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found: set[str] = set()
    try:
        requirements = distribution(name).requires or []
    except PackageNotFoundError:
        # Of an extra that is not installed here.
        return set()
    for requirement in map(Requirement, requirements):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
            continue
        if not any(one.operator == "==" for one in requirement.specifier):
            found.add(normal(requirement.name))
        found |= brought_by(requirement.name, tuple(sorted(requirement.extras)), seen)
    return found


def test_everything_that_an_install_brings_is_pinned() -> None:
    try:
        distribution("fsa-serve")
    except PackageNotFoundError:
        pytest.skip("the package is not installed here")
    pinned = {normal(line.split("==")[0]) for line in CONSTRAINTS.read_text().split()}
    assert brought_by("fsa-serve", EXTRAS, set()) - pinned - {"fsa-serve"} == set()
