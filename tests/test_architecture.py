"""The rules of the source tree, read from its syntax: import direction, heavy imports, file length, documentation."""

import ast
import functools
import graphlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What of ours each package may import beside itself.
DIRECTION = {
    "main": {"core", "mtl_moe", "vit_distill"},
    "configs": {"core"},  # core.workdir alone, which imports nothing slow: --help reads configs
    "core": set(),
    "input_pipeline": set(),
    "mtl_moe": {"core"},
    "vit_distill": {"core"},
}
# Modules that run a system: the only ones of it that see data sets. The rest is functions over arrays.
RUN_THE_SYSTEM = {
    f"mtl_moe/{name}.py"
    for name in (
        "run", "system", "train", "evaluate", "infer", "predict", "outputs", "provenance", "compress", "ablation",
        "ablation_cell", "painted", "painted_check", "results", "seeds", "training_data",
    )
} | {
    f"vit_distill/{name}.py"
    for name in ("run", "images", "train", "supervised", "probe_command", "segment_command", "table_bench")
}  # fmt: skip
# Where each heavy or optional package may be imported, and whether at module level.
CONFINED = {
    "orbax": {"core/checkpoint.py": True},
    "tensorflow": {"input_pipeline/reader.py": False},
    "tensorflow_datasets": {"input_pipeline/tfds_builder.py": True, "input_pipeline/sources_tfds.py": False},
    "clu": {"core/logs.py": False},
    "sklearn": {"vit_distill/probe.py": False, "input_pipeline/sources_arrays.py": False},
    "huggingface_hub": {"vit_distill/formats/hub.py": False},
    "torch": {"vit_distill/formats/tensors.py": False, "vit_distill/export/other_tools.py": False},
    "timm": {"vit_distill/export/other_tools.py": False},
    "transformers": {"vit_distill/export/other_tools.py": False},
    "onnx": {"vit_distill/export/onnx_file.py": False, "vit_distill/export/onnx_graph.py": False},
    "onnxruntime": {"vit_distill/export/onnx_file.py": False},
    "pydicom": {"input_pipeline/dicom.py": False},
    "nibabel": {"input_pipeline/nifti.py": False},
    "pytest": {},
}
# Of the extras in setup.py: imported only where a user asks for them.
OPTIONAL = ("torch", "timm", "transformers", "onnx", "onnxruntime", "pydicom", "nibabel")
MAX_LINES = 400


def python_files() -> list[str]:
    """All source files relative to the root, without tests, benchmarks and setup.py."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("tests", "benchmarks")]
    files = [ROOT / "main.py", *(file for package in packages for file in package.rglob("*.py"))]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


FILES = python_files()


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), filename=file)


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(full module name, whether at module level) of every import statement, wherever it stands."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: name the package"
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


def violations(file: str, tree: ast.Module) -> list[str]:
    """Imports of `file` against DIRECTION, RUN_THE_SYSTEM and CONFINED."""
    package = Path(file).parts[0].removesuffix(".py")
    allowed = DIRECTION[package] | {package} | ({"input_pipeline"} if file in RUN_THE_SYSTEM else set())
    found = []
    for module, at_top in imports(tree):
        name = module.split(".")[0]
        if name in DIRECTION and name not in allowed:
            found.append(f"{file} imports {module}")
        if name in CONFINED and ((at_top and not CONFINED[name].get(file)) or file not in CONFINED[name]):
            found.append(f"{file} imports {module}{' at module level' if at_top else ''}")
        if module.startswith("input_pipeline.tfds_builder") and at_top:
            found.append(f"{file} imports {module}, and so TensorFlow, at module level")
        if package == "configs" and name not in {"ml_collections", *allowed, *sys.stdlib_module_names}:
            found.append(f"{file} imports {module}")
        if package == "input_pipeline" and name in ("jax", "flax", "optax"):
            found.append(f"{file} imports {module}: the pipeline knows no model")
    return found


def test_every_package_has_a_direction():
    assert {Path(file).parts[0].removesuffix(".py") for file in FILES} == set(DIRECTION)
    assert set(FILES) >= RUN_THE_SYSTEM | {file for files in CONFINED.values() for file in files}


def test_import_direction():
    found = [line for file in FILES for line in violations(file, parse(file))]
    assert not found, "\n".join(found)


def test_no_module_needs_itself():
    """Imports inside functions count: they are there for speed, not to hide a cycle."""
    names = {file.removesuffix(".py").replace("/", "."): file for file in FILES}
    graph = {
        name: {part for module, _ in imports(parse(file)) for part in (module, module.rpartition(".")[0])} & set(names)
        for name, file in names.items()
    }
    assert any(graph.values())
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the modules


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("core/loop.py", "from mtl_moe.run import train"),
        ("core/loop.py", "def f():\n    import input_pipeline.dataset"),
        ("input_pipeline/cache.py", "from core import tree"),
        ("input_pipeline/cache.py", "import jax.numpy as jnp"),
        ("mtl_moe/model.py", "from input_pipeline.dataset import Split"),
        ("mtl_moe/run.py", "from configs import common"),
        ("mtl_moe/train.py", "import main"),
        ("core/loop.py", "import orbax.checkpoint"),
        ("input_pipeline/reader.py", "import tensorflow as tf"),
        ("mtl_moe/train.py", "def f():\n    import tensorflow as tf"),
        ("input_pipeline/dataset.py", "from input_pipeline.tfds_builder import Bmad"),
        ("core/logs.py", "from clu import metric_writers"),
        ("configs/common.py", "import numpy as np"),
    ],
)
def test_a_forbidden_import_is_found(file: str, code: str):
    assert violations(file, ast.parse(code))


def test_every_imported_package_is_declared_in_setup():
    setup = (ROOT / "setup.py").read_text()
    requires = next(
        ast.literal_eval(node.value)
        for node in ast.parse(setup).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "INSTALL_REQUIRES"
    )
    normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in requires}
    distributions = importlib.metadata.packages_distributions()
    for file in FILES:
        for module, _ in imports(parse(file)):
            name = module.split(".")[0]
            if name in sys.stdlib_module_names or name in DIRECTION or name in OPTIONAL:
                continue
            found = {normal(distribution) for distribution in distributions.get(name, [])}
            assert found & declared, f"{file} imports {name}, which setup.py does not require"


def test_files_are_short():
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file in FILES}
    long = {file: length for file, length in lengths.items() if length > MAX_LINES}
    assert not long, f"files of more than {MAX_LINES} lines: {long}"


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Module-level functions and the methods of module-level classes, none with an underscore in front."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method


@functools.cache
def protocol_methods(folder: str) -> set[str]:
    """Methods documented once for all their implementations, in a Protocol of the same folder."""
    names = set()
    for file in FILES:
        if Path(file).parent.as_posix() != folder:
            continue
        for node in parse(file).body:
            if isinstance(node, ast.ClassDef) and "Protocol" in {ast.unparse(base) for base in node.bases}:
                names |= {m.name for m in node.body if isinstance(m, ast.FunctionDef) and ast.get_docstring(m)}
    return names


def undocumented(file: str, tree: ast.Module) -> list[str]:
    """Public functions without docstring or type hints, modules and public classes without docstring."""
    found = [] if ast.get_docstring(tree) else [f"{file}: no module docstring"]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            found.append(f"{file}: class {node.name} has no docstring")
    shared = protocol_methods(Path(file).parent.as_posix())
    for name, function in public_functions(tree):
        is_property = any(ast.unparse(d).endswith("property") for d in function.decorator_list)
        if not ast.get_docstring(function) and not is_property and not ("." in name and function.name in shared):
            found.append(f"{file}: {name} has no docstring")
        every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [argument.arg for argument in every if argument.annotation is None and argument.arg != "self"]
        if function.name == "get_config":  # ml_collections' convention: one string, or nothing
            continue
        if bare or function.returns is None:
            found.append(f"{file}: {name} has no type hints of {[*bare, *(['return'] * (function.returns is None))]}")
    return found


def test_public_functions_have_docstrings_and_type_hints():
    found = [line for file in FILES for line in undocumented(file, parse(file))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        '"""M."""\ndef f(x: int) -> int:\n    return x',
        '"""M."""\ndef f(x) -> int:\n    """Doc."""',
        '"""M."""\ndef f(x: int):\n    """Doc."""',
        '"""M."""\nclass A:\n    """Doc."""\n    def f(self, x: int) -> int:\n        return x',
        '"""M."""\nclass A:\n    pass',
        "x = 1",
    ],
)
def test_a_missing_docstring_or_hint_is_found(code: str):
    assert undocumented("core/loop.py", ast.parse(code))


def test_no_machine_path_in_a_committed_text():
    pattern = re.compile(r"(?<![\w.])/(work|tmp|root|home)/\w")
    texts = [ROOT / file for file in (*FILES, "setup.py", "Makefile", "pyproject.toml", "constraints.txt")]
    texts += sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
    found = [str(path.relative_to(ROOT)) for path in texts if pattern.search(path.read_text())]
    assert not found, f"paths of one machine in {found}"
