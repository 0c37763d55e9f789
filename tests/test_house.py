"""The rules of the house, read from the source: who imports whom, what files are called, what must be documented.

Each rule is a function from a file to its violations, so that the last test can show it a file that breaks it. A test
of a rule goes through all files and lists what breaks it, file by file.
"""

import ast
import importlib.util
import itertools
import pathlib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator

import ml_collections
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAX_LINES = 500
MAX_FUNCTION_LINES = 80

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
SKIPPED_FOLDERS = {".git", ".venv", ".cache", ".hypothesis", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
SKIPPED_FOLDERS |= {"__pycache__", "runs"}


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


def violations(rule: Callable[[str, str], Iterable[object]], paths: Iterable[pathlib.Path]) -> list[str]:
    """What `rule(source, name)` says of each file, one "file: what" per violation."""
    return [f"{label(path)}: {what}" for path in paths for what in rule(path.read_text(), label(path))]


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


def undocumented(source: str, name: str) -> list[str]:
    """Public functions and classes of a module, and the module itself, that have no docstring; of a test or a config
    only the module."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    if name.split("/")[0] not in DOCUMENTED:
        return missing
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


def reads_files(source: str, name: str) -> set[str]:
    """What a network in the file `name` imports of `models.formats`; models/__init__.py is the way in for all."""
    if not name.startswith("models/") or name.startswith("models/formats/") or name == "models/__init__.py":
        return set()
    full = imported(source, name.removesuffix(".py").replace("/", "."))
    return {module for module in full if f"{module}.".startswith("models.formats.")}


def badly_sized_or_named(source: str, name: str) -> list[str]:
    """Names that say nothing or hide another module, and what is too long: the file `name`, or functions in it."""
    wrong = []
    # The command `python -m eval.tree` needs that file; inside a package it shadows nothing.
    if name.split("/")[-1] == "tree.py" and name != "eval/tree.py":
        wrong.append("tree.py shadows a dependency of TFDS")
    if name.split("/")[-1] == "utils.py":
        wrong.append("utils.py says nothing")
    if (lines := len(source.splitlines())) > MAX_LINES:
        wrong.append(f"{lines} lines, more than {MAX_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            wrong += [f"{node.name} has {lines} lines, more than {MAX_FUNCTION_LINES}"] * (lines > MAX_FUNCTION_LINES)
    return wrong


def pmaps(source: str, name: str) -> list[str]:
    """Lines that name `pmap`, which meshes have replaced."""
    nodes = ast.walk(ast.parse(source))
    return [f"pmap in line {node.lineno}" for node in nodes if isinstance(node, ast.Attribute) and node.attr == "pmap"]


def test_imports_point_one_way() -> None:
    assert not violations(wrong_imports, PYTHON_FILES)


def test_networks_never_import_formats() -> None:
    assert not violations(reads_files, PYTHON_FILES)


def test_files_and_functions_are_small_and_well_named() -> None:
    assert not violations(badly_sized_or_named, PYTHON_FILES)


def test_public_names_are_documented() -> None:
    assert not violations(undocumented, PYTHON_FILES)


def test_no_pmap() -> None:
    assert not violations(pmaps, PYTHON_FILES)


def test_configs_tell_their_command_and_have_a_smoke_variant() -> None:
    assert CONFIGS and not violations(config_gaps, CONFIGS)
    for path in CONFIGS:
        spec = importlib.util.spec_from_file_location(f"house_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        full, smoke = module.get_config(), module.get_config("smoke")
        assert isinstance(full, ml_collections.ConfigDict) and isinstance(smoke, ml_collections.ConfigDict), label(path)
        assert full.to_dict() != smoke.to_dict(), label(path)


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
    assert len(text.splitlines()) <= 130, "five minutes hold no more"


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_pages_are_finished_and_their_links_lead_somewhere(page: pathlib.Path) -> None:
    text = page.read_text()
    assert not re.findall(r"\b[A-Z]+_(?:TABLE|RESULT)\b", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


def unsourced_numbers(markdown: str, folder: pathlib.Path) -> list[str]:
    """Tables with a number, under a heading with "results" in it or below such a heading, that lack a source.

    A source is the paragraph behind the table: it begins with "Source" and names results files, all of which exist
    (paths are relative to `folder`, the page's own). A table is named by its first row that holds a number.
    """

    def kind(line: str) -> str:
        return "table" if line.startswith("|") else "heading" if line.startswith("#") else "text" if line else ""

    text = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    blocks = [(what, list(lines)) for what, lines in itertools.groupby(text.splitlines(), kind) if what]
    wrong, inside = [], 0  # `inside`: the level of the heading with "results", 0 outside.
    for (what, lines), (_, behind) in itertools.pairwise([*blocks, ("", [""])]):
        if what == "heading":
            for heading in lines:
                level = len(heading) - len(heading.lstrip("#"))
                if not 0 < inside < level:
                    inside = level if "results" in heading.lower() else 0
        elif what == "table" and inside:
            numbers = [line for line in lines if re.search(r"\d", line)]
            source = " ".join(behind) if behind[0].startswith("Source") else ""
            names = re.findall(r"[\w./-]*results/[\w./-]*\w", source)
            sourced = names and all((folder / name).is_file() for name in names)
            wrong += [] if sourced else numbers[:1]
    return wrong


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_numbers_on_the_pages_of_results_have_a_committed_source(name: str) -> None:
    page = ROOT / name
    assert not unsourced_numbers(page.read_text(), page.parent)


def pinned(names: Iterable[str], python: str) -> dict[str, str]:
    """Versions by package, as `pip install -r` of the named files gives them to a version of Python."""
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines() if "==" in line]
    wanted = [Requirement(line) for line in lines if not line.startswith("#")]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"python_version": python})]
    found = {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in wanted}
    assert len(found) == len(wanted), f"a package is pinned twice for Python {python}"
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_pins_agree(python: str) -> None:
    pins = pinned(("requirements.txt", "requirements-dev.txt", "requirements-parity.txt"), python)
    hooks = re.findall(r"(ruff)==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks and all(pins[name] == version for name, version in hooks)
    assert pins["jax"] == pins["jaxlib"]
    ranges = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for one in map(Requirement, ranges):
        assert one.specifier.contains(pins[canonicalize_name(one.name)]), f"{one} leaves out what is tested"


def test_rules_catch_what_they_forbid(tmp_path: pathlib.Path) -> None:
    assert wrong_imports("import train.data.texts", "models/formats/hf.py") == {"train"}
    assert wrong_imports("def f():\n    from eval.main import x", "decoding/loop.py") == {"eval"}
    assert wrong_imports("from ..train import x", "models/llama.py") == {"train"}
    assert wrong_imports("from ..train import x", "models/heads/hydra.py") == set()
    assert wrong_imports("from eval import speed", "train/trainer.py") == {"eval"}
    assert wrong_imports("import torch, tensorflow", "tests/models/formats/test_hf.py") == {"tensorflow"}
    assert wrong_imports("import torch", "eval/main.py") == {"torch"}
    assert wrong_imports("import torch\nfrom . import main", "eval/peers/text.py") == set()
    untold = "def f(): ...\ndef _g(): ...\nclass C:\n    'told'\n"
    assert undocumented(untold, "models/llama.py") == ["the module", "f"]
    assert undocumented(untold, "tests/models/test_llama.py") == ["the module"]
    for name, complaints in (("models/tree.py", 1), ("eval/utils.py", 1), ("eval/tree.py", 0), ("tests/tree.py", 1)):
        assert len(badly_sized_or_named("", name)) == complaints, name
    long = "class C:\n    def f(self):\n" + "        pass\n" * (MAX_FUNCTION_LINES - 1)
    assert badly_sized_or_named(long, "models/llama.py") == []
    assert badly_sized_or_named(long + "        pass\n", "models/llama.py") == ["f has 81 lines, more than 80"]
    assert badly_sized_or_named("x = 1\n" * 501, "models/llama.py") == ["501 lines, more than 500"]
    assert pmaps("import jax\njax.pmap(f)", "models/llama.py") == ["pmap in line 2"]
    (tmp_path / "bad.py").write_text("import torch")
    assert violations(wrong_imports, [tmp_path / "bad.py"]) == ["bad.py: torch"]
    assert reads_files("from models.formats import hf", "models/images/inception.py")
    assert reads_files("from . import formats", "models/transformer.py")
    assert not reads_files("from models.formats import hf", "models/formats/target.py")
    assert len(config_gaps('"""A config."""', "configs/lm.py")) == 4
    assert MACHINE_TRACES.search("see /work" + "/main") and not MACHINE_TRACES.search("~/work/x and ./home/y")
    table = "## Results\n\n### Text\n\n| drafter | rate |\n|---|---|\n| hydra | 1.9x |\n| eagle | 2.1x |\n"
    source = "\nSource: [a.json](docs/results/a.json).\n"
    assert unsourced_numbers(table + source, tmp_path) == ["| hydra | 1.9x |"]  # There is no such file yet.
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "a.json").write_text("{}")
    assert not unsourced_numbers(table + source, tmp_path)
    assert unsourced_numbers(table, tmp_path) and unsourced_numbers(table + "\nWords.\n" + source, tmp_path)
    assert unsourced_numbers(table + source.replace(".json)", ".json), [b](docs/results/b.json)"), tmp_path)
    assert unsourced_numbers(table + source + "\n" + table.replace("1.9x", "3x"), tmp_path) == ["| hydra | 3x |"]
    assert not unsourced_numbers("## Commands\n| eval | 10 |\n", tmp_path)
    fenced = "## Results\n```bash\n# a comment\n```\n| hydra | 1.9x |\n"
    assert unsourced_numbers(fenced, tmp_path)
