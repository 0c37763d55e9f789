"""The rules of the house, read from the source: who imports whom, what files are called, what must be documented.

Each rule is a function from a file to its violations, so that the last tests can show it a file that breaks it.
"""

import ast
import importlib.util
import pathlib
import re
from collections.abc import Iterator

import ml_collections
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAX_LINES = 500

# What each package may import of ours, itself aside. eval reads data sets through train; nothing points the other way.
MAY_IMPORT = {
    "models": set(),
    "decoding": {"models"},
    "train": {"decoding", "models"},
    "eval": {"train", "decoding", "models"},
    "scripts": {"eval", "train", "decoding", "models", "configs"},
    "configs": set(),
}
DOCUMENTED = ("models", "decoding", "train", "eval", "scripts")
PEERS = {"torch", "transformers"}
PEER_FILES = re.compile(r"(tests/.*|eval/peers/\w+\.py)")
MACHINE_TRACES = re.compile(r"(?<![\w.~-])/(?:work|tmp|root|home|Users)/|\bpypi\.|python[h]osted", re.IGNORECASE)
TEXT_SUFFIXES = {".py", ".sh", ".md", ".txt", ".toml", ".yaml", ".yml", ".json", ".css", ".html", ""}
SKIPPED_FOLDERS = {".git", ".venv", ".cache", ".mypy_cache", ".ruff_cache", ".pytest_cache", "__pycache__", "runs"}


def files(*roots: pathlib.Path) -> Iterator[pathlib.Path]:
    """Every file below the given folders that is not a cache or an environment."""
    for root in roots:
        for path in sorted(root.iterdir()) if root.is_dir() else []:
            if path.name in SKIPPED_FOLDERS or path.suffix == ".egg-info" or (path / "pyvenv.cfg").exists():
                continue
            if path.is_dir():
                yield from files(path)
            else:
                yield path


PYTHON_FILES = [path for path in files(*(ROOT / name for name in (*MAY_IMPORT, "tests"))) if path.suffix == ".py"]
CONFIGS = [path for path in PYTHON_FILES if path.is_relative_to(ROOT / "configs") and path.name != "__init__.py"]


def label(path: pathlib.Path) -> str:
    """A file's path inside the repository, as rules and test names write it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


each_python_file = pytest.mark.parametrize("path", PYTHON_FILES, ids=label)


def imported(source: str, module: str) -> set[str]:
    """Full names of the modules that `source`, the text of `module` (dotted), imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            # `from train import data` names a module too; for anything else the longer name does no harm.
            names |= {prefix} | {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def wrong_imports(source: str, name: str) -> set[str]:
    """Imports in the file `name` that point against the arrows, or at a library that belongs elsewhere."""
    package = name.split("/")[0]
    tops = {full.split(".")[0] for full in imported(source, name.removesuffix(".py").replace("/", "."))}
    wrong = tops & {"tensorflow"}
    if not PEER_FILES.fullmatch(name):
        wrong |= tops & PEERS
    if package in MAY_IMPORT:
        wrong |= (tops & (set(MAY_IMPORT) | {"tests"})) - MAY_IMPORT[package] - {package}
    return wrong


def undocumented(source: str) -> list[str]:
    """Public functions and classes of a module, and the module itself, that have no docstring."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            public = not node.name.startswith("_") and node.name != "main"
            missing += [node.name] if public and not ast.get_docstring(node) else []
    return missing


def config_gaps(source: str, name: str) -> list[str]:
    """What the docstring of the config file `name` fails to tell: its command, how long it takes, what to expect."""
    text = ast.get_docstring(ast.parse(source)) or ""
    wanted = {
        f"a command with --config={name}": f"--config={name}" in text or f"--config {name}" in text,
        "its :smoke variant": ":smoke" in text,
        "how long it takes": re.search(r"\d+ ?(s|min|h|seconds?|minutes?|hours?)\b", text) is not None,
        "what result to expect": re.search(r"(?i)\bexpect", text) is not None,
    }
    return [what for what, told in wanted.items() if not told]


@each_python_file
def test_imports_point_one_way(path: pathlib.Path) -> None:
    assert not wrong_imports(path.read_text(), label(path))


def reads_files(source: str, name: str) -> bool:
    """Whether the file `name` is a network's and imports `models.formats`. models/__init__.py is the way in for all."""
    if not name.startswith("models/") or name.startswith("models/formats/") or name == "models/__init__.py":
        return False
    full = imported(source, name.removesuffix(".py").replace("/", "."))
    return any(f"{module}.".startswith("models.formats.") for module in full)


def test_networks_never_import_formats() -> None:
    assert not [label(path) for path in PYTHON_FILES if reads_files(path.read_text(), label(path))]


@each_python_file
def test_file_is_small_and_well_named(path: pathlib.Path) -> None:
    # The command `python -m eval.tree` needs that file; inside a package it shadows nothing.
    allowed = path.parts[-2:] == ("eval", "tree.py")
    assert allowed or path.name != "tree.py", "tree.py shadows a dependency of TFDS"
    assert path.name != "utils.py", "utils.py says nothing"
    assert len(path.read_text().splitlines()) <= MAX_LINES


@each_python_file
def test_public_names_are_documented(path: pathlib.Path) -> None:
    missing = undocumented(path.read_text())
    if path.relative_to(ROOT).parts[0] not in DOCUMENTED:
        missing = [name for name in missing if name == "the module"]
    assert not missing


@each_python_file
def test_no_pmap(path: pathlib.Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text()))
    assert not [node.lineno for node in nodes if isinstance(node, ast.Attribute) and node.attr == "pmap"]


@pytest.mark.parametrize("path", CONFIGS, ids=label)
def test_config_tells_its_command_and_has_a_smoke_variant(path: pathlib.Path) -> None:
    assert not config_gaps(path.read_text(), label(path))
    spec = importlib.util.spec_from_file_location(f"house_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    full, smoke = module.get_config(), module.get_config("smoke")
    assert isinstance(full, ml_collections.ConfigDict) and isinstance(smoke, ml_collections.ConfigDict)
    assert full.to_dict() != smoke.to_dict()


def test_no_traces_of_a_machine() -> None:
    texts = [path for path in files(ROOT) if path.suffix in TEXT_SUFFIXES and path.stat().st_size < 1_000_000]
    found = []
    for path in texts:
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            found += [f"{label(path)}:{number}: {line.strip()[:100]}"] if MACHINE_TRACES.search(line) else []
    assert not found


def test_readme_names_the_commands_that_exist() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    for command in ("scripts/quickstart.sh", "scripts/test.sh"):
        assert not text or f"bash {command}" in text


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_pages_are_finished_and_their_links_lead_somewhere(page: pathlib.Path) -> None:
    text = page.read_text()
    assert not re.findall(r"\b[A-Z]+_(?:TABLE|RESULT)\b", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


def unsourced_numbers(markdown: str, root: pathlib.Path) -> list[str]:
    """Rows of the tables under a heading with "results" in it that hold a number but name no existing results file."""
    wrong = []
    in_results = False
    for line in markdown.splitlines():
        if line.startswith("#"):
            in_results = "results" in line.lower()
        elif in_results and line.startswith("|") and re.search(r"\d", line):
            sources = re.findall(r"docs/results/[\w./-]+", line)
            wrong += [] if sources and all((root / source).is_file() for source in sources) else [line]
    return wrong


def test_numbers_in_the_readme_have_a_committed_source() -> None:
    readme = ROOT / "README.md"
    assert not unsourced_numbers(readme.read_text() if readme.exists() else "", ROOT)


def test_pins_agree() -> None:
    pins = dict(
        line.split("==")
        for name in ("requirements.txt", "requirements-dev.txt", "requirements-parity.txt")
        for line in (ROOT / name).read_text().splitlines()
        if "==" in line
    )
    hooks = re.findall(r"(ruff)==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks and all(pins[name] == version for name, version in hooks)
    assert pins["jax"] == pins["jaxlib"]


def test_rules_catch_what_they_forbid(tmp_path: pathlib.Path) -> None:
    assert wrong_imports("import train.data.texts", "models/formats/hf.py") == {"train"}
    assert wrong_imports("def f():\n    from eval.main import x", "decoding/loop.py") == {"eval"}
    assert wrong_imports("from ..train import x", "models/llama.py") == {"train"}
    assert wrong_imports("from ..train import x", "models/heads/hydra.py") == set()
    assert wrong_imports("from eval import speed", "train/trainer.py") == {"eval"}
    assert wrong_imports("import torch, tensorflow", "tests/models/formats/test_hf.py") == {"tensorflow"}
    assert wrong_imports("import torch", "eval/main.py") == {"torch"}
    assert wrong_imports("import torch\nfrom . import main", "eval/peers/text.py") == set()
    assert reads_files("from models.formats import hf", "models/images/inception.py")
    assert reads_files("from . import formats", "models/transformer.py")
    assert not reads_files("from models.formats import hf", "models/formats/target.py")
    assert undocumented("def f(): ...\ndef _g(): ...\nclass C:\n    'told'\n") == ["the module", "f"]
    assert len(config_gaps('"""A config."""', "configs/lm.py")) == 4
    assert MACHINE_TRACES.search("see /work" + "/main") and not MACHINE_TRACES.search("~/work/x and ./home/y")
    table = "## Results\n| hydra | 1.9x | docs/results/a.json |\n"
    assert unsourced_numbers(table, tmp_path)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "a.json").write_text("{}")
    assert not unsourced_numbers(table, tmp_path)
