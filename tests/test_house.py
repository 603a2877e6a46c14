"""The house has floors; imports go down only. See docs/architecture.md."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# floor -> top-level names that it must never import
FORBIDDEN = {
    "cache": {"tinyaudio", "pipelines", "torch", "transformers", "datasets", "typer", "soundfile"},
    "tinyaudio": {"cache", "pipelines", "zarr", "datasets", "typer", "jiwer"},
    "pipelines": {"typer"},
}
NOT_IN_THE_WHEEL = {Path("pipelines/space"), Path("pipelines/demo/make")}  # data beside the code; maintainers' tools
STAGES = {"extract", "train", "evaluate"}


def is_roof(module: str) -> bool:
    return module == "tinyaudio.__main__" or module.startswith("tinyaudio.cli")


def source_modules():
    for floor in FORBIDDEN:
        for path in sorted((ROOT / floor).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield pytest.param(module, path, id=module)


def imported_names(path: Path, package: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            base = f"{package}.{base}".rstrip(".") if node.level else base
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("module", "path"), list(source_modules()))
def test_imports_only_go_down(module, path):
    if is_roof(module):
        return
    floor = module.split(".")[0]
    upward = {
        n for n in imported_names(path, module.rpartition(".")[0]) if n.split(".")[0] in FORBIDDEN[floor] or is_roof(n)
    }
    assert not upward, f"{module} imports {sorted(upward)}, which is above it"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_do_not_import_stages(stage):
    others = tuple(f"pipelines.{other}" for other in STAGES - {stage})
    for path in sorted((ROOT / "pipelines" / stage).rglob("*.py")):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        found = {name for name in imported_names(path, package) if name.startswith(others)}
        assert not found, f"{path} imports {sorted(found)}; what two stages share gets a module with a name"


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
    folders = {path.parent.relative_to(ROOT) for package in FORBIDDEN for path in (ROOT / package).rglob("*.py")}
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders - NOT_IN_THE_WHEEL)
    assert "Private :: Do Not Upload" in project["project"]["classifiers"]


def test_required_packages_are_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\[;]", d)[0].strip() for d in project["dependencies"]}
    required = {"torch", "transformers", "datasets", "pyarrow", "zarr", "numcodecs", "typer", "jiwer", "tqdm"}
    assert required <= names


@pytest.mark.parametrize(("module", "path"), list(source_modules()))
def test_every_module_says_what_it_holds_in_ascii(module, path):
    text = path.read_text()
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
    modules = {str(p.relative_to(ROOT)) for package in FORBIDDEN for p in (ROOT / package).rglob("*.py")}
    unnamed = {m for m in modules if m not in named and not m.endswith("__init__.py")}
    assert not unnamed, f"docs/architecture.md does not name {sorted(unnamed)}"


def test_make_help_names_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(makefile.split(".PHONY:")[1].split("\n")[0].split())
    described = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    assert targets == described
