"""What setup.py asks for, on every kind of machine."""

import ast
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
TREE = ast.parse((ROOT / "setup.py").read_text())
REQUIRES = [
    Requirement(line)
    for node in TREE.body
    if isinstance(node, ast.Assign) and node.targets[0].id == "INSTALL_REQUIRES"
    for line in ast.literal_eval(node.value)
]


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("x86_64", "tensorflow-cpu"),
        ("AMD64", "tensorflow-cpu"),  # Windows
        ("arm64", "tensorflow"),  # macOS
        ("aarch64", "tensorflow"),  # Linux
    ],
)
def test_the_tensorflow_that_has_a_wheel(machine: str, expected: str):
    found = [
        r.name
        for r in REQUIRES
        if r.name in ("tensorflow", "tensorflow-cpu")
        if r.marker.evaluate({"platform_machine": machine})
    ]
    assert found == [expected]


def test_pythons_that_all_packages_have_wheels_for():
    pythons = next(
        SpecifierSet(ast.literal_eval(node.value))
        for node in ast.walk(TREE)
        if isinstance(node, ast.keyword) and node.arg == "python_requires"
    )
    assert [minor for minor in range(9, 16) if f"3.{minor}.1" in pythons] == [11, 12, 13]
    assert "(3, 11) <= sys.version_info[:2] < (3, 14)" in (ROOT / "Makefile").read_text()


def test_kmeans2_takes_its_generator_by_rng():
    (scipy,) = (r for r in REQUIRES if r.name == "scipy")
    assert "1.14.1" not in scipy.specifier
    assert "1.15.0" in scipy.specifier
