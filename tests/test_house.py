"""Imports point one way, from floor to floor; names, lists and the layout in the docs are those of the tree."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PACKAGES = ("tinyaudio", "cache", "pipelines")
# Data beside the code; maintainers' tools.
NOT_IN_THE_WHEEL = {Path("pipelines/space"), Path("pipelines/demo/make"), Path("pipelines/real")}

STAGES = {"pipelines.extract", "pipelines.train", "pipelines.evaluate"}
GROUND = {"cache", "pipelines.errors", "pipelines.files", "pipelines.processes", "pipelines.scoring"}
PYTHONS_WAY_IN = {"tinyaudio", "tinyaudio.transcribe", "tinyaudio.subtitles", "tinyaudio.page", "tinyaudio.doctor"}
PYTHONS_WAY_IN |= {"tinyaudio.request_queue", "tinyaudio.server"}
SHARED = {"pipelines.recipes", "pipelines.retry", "pipelines.encoders", "pipelines.corpora"}
BY_STAGES = {"pipelines.recipes", "pipelines.files", "cache", "tinyaudio.model"}  # what all of them import
BELOW_THE_CLI = {"tinyaudio.model", "tinyaudio.version"} | GROUND | PYTHONS_WAY_IN | SHARED | STAGES
BELOW_THE_CLI |= {"pipelines.ablate", "pipelines.publish"}

# Room -> the rooms that it may import, itself and pipelines.errors aside. A room is a package or a module; a module
# belongs to the longest name here that it starts with. From the top floor down.
FLOORS = {
    "tinyaudio.cli": BELOW_THE_CLI | {"pipelines.bench"},
    "tinyaudio.__main__": {"tinyaudio.cli"},
    "pipelines.bench": BELOW_THE_CLI,
    "pipelines.ablate": {"pipelines.train", "pipelines.recipes", "pipelines.files", "cache"},
    "pipelines.real": STAGES | BY_STAGES | {"pipelines.corpora"},
    "pipelines.publish": {"pipelines.evaluate", "pipelines.corpora", "pipelines.recipes", "pipelines.files"}
    | {"tinyaudio.model"},
    "pipelines.extract": BY_STAGES
    | {"pipelines.encoders", "pipelines.corpora", "pipelines.retry", "pipelines.processes"},
    "pipelines.train": BY_STAGES | {"pipelines.encoders", "pipelines.processes", "pipelines.scoring"},
    "pipelines.evaluate": BY_STAGES
    | {"pipelines.encoders", "pipelines.corpora", "pipelines.retry", "pipelines.scoring"}
    | {"tinyaudio.version", "tinyaudio.transcribe"},
    "pipelines.corpora": {"pipelines.retry", "pipelines.recipes", "tinyaudio.model"},
    "pipelines.encoders": {"pipelines.retry", "pipelines.processes", "pipelines.recipes"}
    | {"tinyaudio.model", "tinyaudio.transcribe"},
    "pipelines.demo": {"tinyaudio.model"},
    "pipelines.space": PYTHONS_WAY_IN,
    "tinyaudio": {"tinyaudio.model", "tinyaudio.transcribe", "tinyaudio.version"},
    "tinyaudio.server": {"tinyaudio.model", "tinyaudio.request_queue", "tinyaudio.subtitles", "tinyaudio.version"},
    "tinyaudio.page": {"tinyaudio.model", "tinyaudio.request_queue", "tinyaudio.subtitles"},
    "tinyaudio.request_queue": {"tinyaudio.model", "tinyaudio.transcribe"},
    "tinyaudio.doctor": {"tinyaudio.model", "tinyaudio.transcribe"},
    "tinyaudio.transcribe": {"tinyaudio.model", "tinyaudio.version"},
    "tinyaudio.subtitles": {"tinyaudio.model"},
    "tinyaudio.version": set(),
    "tinyaudio.model": set(),
    "pipelines.recipes": set(),
    "pipelines.retry": set(),
    "pipelines.files": set(),
    "pipelines.processes": set(),
    "pipelines.scoring": set(),
    "pipelines.errors": set(),
    "pipelines": set(),
    "cache": set(),
}
# Room -> names of other people's packages that stay out of it.
STRANGERS = {
    "cache": {"torch", "transformers", "datasets", "typer", "soundfile"},
    "tinyaudio": {"zarr", "datasets", "typer", "jiwer"},
    "pipelines": {"typer"},
}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the three packages, by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def room_of(name: str) -> str | None:
    """The room of a dotted name; None if it is not ours."""
    known = [room for room in FLOORS if name == room or name.startswith(f"{room}.")]
    return max(known, key=len) if known else None


def imported_names(source: str, package: str) -> set[str]:
    """Dotted names that a module imports; `package` is what its relative imports start from."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def package_of(module: str) -> str:
    path = modules().get(module)
    return module if path is not None and path.name == "__init__.py" else module.rpartition(".")[0]


def forbidden_imports(module: str, source: str) -> set[str]:
    """What a module imports from a room above or beside its own, or from a stranger."""
    room = room_of(module)
    allowed = FLOORS[room] | {room, "pipelines.errors"}
    names = imported_names(source, package_of(module))
    ours = {name for name in names if room_of(name) is not None and room_of(name) not in allowed}
    strangers = set() if room in ("tinyaudio.cli", "tinyaudio.__main__") else STRANGERS[module.split(".")[0]]
    return ours | {name for name in names if name.split(".")[0] in strangers}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_only_go_down(module: str) -> None:
    found = forbidden_imports(module, modules()[module].read_text())
    assert not found, f"{module} imports {sorted(found)}; see the floors in docs/architecture.md"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("cache.blocks", "from tinyaudio.model.audio import load_audio"),
        ("cache.reader", "import torch"),
        ("tinyaudio.model.loss", "from tinyaudio.transcribe import Transcriber"),
        ("tinyaudio.model.reader", "from ..subtitles import to_srt"),
        ("tinyaudio.doctor", "from tinyaudio.cli.options import say"),
        ("pipelines.train.batches", "from pipelines import extract"),
        ("pipelines.train.trainer", "from pipelines.extract.plan import plan_corpus"),
        ("pipelines.extract.encode", "from pipelines.train.runs import Run"),
        ("pipelines.evaluate.providers.base", "import pipelines.train.runs"),
        ("pipelines.evaluate.providers.ctc", "from ...extract.decode import Decoder"),
        ("pipelines.corpora.parquet", "from pipelines.extract.report import ExtractReport"),
        ("pipelines.recipes.recipe", "from tinyaudio.model.projectors import PROJECTORS"),
        ("pipelines.retry", "from pipelines.corpora import open_corpus"),
        ("pipelines.publish.card", "from pipelines.bench.models import hubert_large"),
    ],
)
def test_an_import_from_above_or_beside_is_caught(module: str, line: str) -> None:
    assert module in modules()
    assert forbidden_imports(module, f"def late():\n    {line}\n")


def test_no_module_imports_itself_through_others() -> None:
    """No circle, imports inside functions counted; those for the type checker only are not."""
    known, graph = modules(), {}
    for module, path in known.items():
        source = path.read_text().split("if TYPE_CHECKING:\n    from tinyaudio")[0]
        names = imported_names(source, package_of(module))
        graph[module] = {n if n in known else n.rpartition(".")[0] for n in names} & (known.keys() - {module})
    tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_what_travels_imports_relatively_and_all_else_absolutely() -> None:
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                is_ours = (node.module or "").split(".")[0] in PACKAGES
                wrong = is_ours if module.startswith("tinyaudio.model") else bool(node.level)
                assert not wrong, f"{module}:{node.lineno} imports {'absolutely' if is_ours else 'relatively'}"


def test_importing_tinyaudio_brings_no_store_and_no_stages():
    script = (
        "import sys, tinyaudio\n"
        "for name in tinyaudio.__all__: getattr(tinyaudio, name)\n"
        "print(sorted(sys.modules.keys() & {'cache', 'pipelines', 'zarr', 'datasets', 'typer'}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_tinyaudio_works_with_zarr_datasets_and_pipelines_absent():
    script = (
        "import sys\n"
        "for name in ('cache', 'pipelines', 'zarr', 'datasets', 'jiwer', 'typer'): sys.modules[name] = None\n"
        "import tinyaudio\n"
        "for name in tinyaudio.__all__: getattr(tinyaudio, name)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_git_ignores_no_source():
    paths = ["cache/__init__.py", "pipelines/__init__.py", "pipelines/demo/corpus/x.parquet"]
    result = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "", f"ignored: {result.stdout}"


def test_packages_are_listed_by_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders - NOT_IN_THE_WHEEL)
    assert "Private :: Do Not Upload" in project["project"]["classifiers"]


def test_required_packages_are_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\[;]", d)[0].strip() for d in project["dependencies"]}
    required = {"torch", "transformers", "datasets", "pyarrow", "zarr", "numcodecs", "typer", "jiwer", "tqdm"}
    assert required <= names


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_module_says_what_it_holds_in_ascii(module: str) -> None:
    text = modules()[module].read_text()
    assert ast.get_docstring(ast.parse(text)), f"{module} has no docstring"
    assert text.isascii(), f"{module} is not ASCII"


def test_the_layout_in_the_docs_is_the_tree():
    """Every path that docs/architecture.md names exists, and it names every module of the three packages."""
    section = (ROOT / "docs" / "architecture.md").read_text().split("## How it is laid out")[1].split("\n## ")[0]
    named, folder = set(), ""
    for line in section.split("```text\n")[1].split("```")[0].splitlines():
        if line.startswith("  "):
            named.add(folder + line.split()[0])
        elif line.strip():
            folder = line.split()[0]
            named.add(folder)
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing, f"docs/architecture.md names what does not exist: {sorted(missing)}"
    modules = {str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    unnamed = {m for m in modules if m not in named and not m.endswith("__init__.py")}
    assert not unnamed, f"docs/architecture.md does not name {sorted(unnamed)}"


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(makefile.split(".PHONY:")[1].split("\n")[0].split())
    described = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    assert targets == described
