"""Commands and benchmarks ask drafters questions; which drafter it is they do not know. Decoding and training know a
few by name, and ask no drafter which it is."""

import ast
import importlib
import inspect
import pathlib

from decoding.drafter import Drafter
from decoding.drafters.registry import DRAFTERS
from decoding.policies import POLICIES

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The line-up lists what to time, of which the speed table takes a few for other questions; file formats belong to a
# method each, assisted generation is a draft model's, and the accelerator's jobs train the heads that they list.
MAY_NAME = {"eval/measure/lineup.py", "eval/speed.py", "scripts/convert.py", "eval/assisted.py"}
MAY_NAME |= {"scripts/accelerator/smollm2.py", "scripts/accelerator/chat_heads.py", "scripts/accelerator/steps.py"}
FILES = {"decoding.drafters.registry", "decoding.drafters"}
OWN_FILES = {f"decoding.drafters.{path.stem}" for path in (ROOT / "decoding" / "drafters").glob("*.py")}
OWN_FILES -= FILES | {"decoding.drafters.__init__"}
CLASSES = {
    name
    for module in OWN_FILES
    for name, found in inspect.getmembers(importlib.import_module(module), inspect.isclass)
    if issubclass(found, Drafter) and found is not Drafter
}
ASKED = CLASSES | {Drafter.__name__} | {policy.__name__ for policy in POLICIES.values()}
NAMES = set(DRAFTERS) - {"none"}  # Every benchmark compares with no drafter.
# Drafters are told from what is none where a caller might have given anything.
MAY_ASK = {"isinstance of Drafter"}


def names_of_drafters(source: str) -> list[str]:
    """What a module imports from drafters' own files, which of their classes and names it says, and what it asks the
    type of."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("decoding.drafters"):
            found += [node.module or ""] if node.module not in FILES else []
            found += [alias.name for alias in node.names if f"{node.module}.{alias.name}" in OWN_FILES]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in OWN_FILES]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            asked |= {name.attr for name in ast.walk(node.args[1]) if isinstance(name, ast.Attribute)}
            found += [f"isinstance of {name}" for name in sorted(asked & ASKED)]
        elif isinstance(node, ast.Name) and node.id in CLASSES:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and node.attr in CLASSES:
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and node.value in NAMES:
            found.append(repr(node.value))
    return found


def test_commands_and_benchmarks_name_no_drafter() -> None:
    paths = [path for room in ("eval", "scripts") for path in sorted((ROOT / room).rglob("*.py"))]
    names = {path.relative_to(ROOT).as_posix(): names_of_drafters(path.read_text()) for path in paths}
    assert {name: found for name, found in names.items() if found and name not in MAY_NAME} == {}
    assert names["eval/measure/lineup.py"], "nothing is found where there is something to find"
    assert {name: asked for name, found in names.items() if (asked := questions(found))} == {}


def questions(found: list[str]) -> list[str]:
    return [said for said in found if said.startswith("isinstance of ")]


def test_decoding_and_training_ask_no_drafter_which_it_is() -> None:
    rooms = [ROOT / "decoding", ROOT / "train", ROOT / "train" / "data"]
    paths = [path for room in rooms for path in sorted(room.glob("*.py"))]
    asked = {path.name: set(questions(names_of_drafters(path.read_text()))) - MAY_ASK for path in paths}
    assert {name: found for name, found in asked.items() if found} == {}


def test_names_are_found_however_they_come() -> None:
    for source in (
        "from decoding.drafters.medusa import Medusa as M",
        "from decoding.drafters import lookahead",
        "import decoding.drafters.plain",
        "isinstance(drafter, (int, registry.Hydra))",
        "isinstance(drafter.policy, Static)",
        "drafter.__class__ is EarlyExit",
        "record['method'] == 'draft_model'",
    ):
        assert names_of_drafters(source), source
    clean = "from decoding.drafters.registry import load_drafter\nisinstance(x, int)\nlabel = 'Medusa, greedy'"
    assert names_of_drafters(clean) == []
