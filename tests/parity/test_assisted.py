"""The race against assisted generation: a target that drafts for itself is accepted whole, and all texts are equal."""

import types

import pytest

from eval import assisted
from models.errors import UserError
from tests.eval import tiny

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tiny.write_target(tmp_path_factory.mktemp("assisted") / "target")
    texts = [types.SimpleNamespace(tokens=tuple(range(5, 5 + size))) for size in (6, 9)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assisted, "document_prompts", lambda *_: texts)
        return assisted.run(directory, directory, "data", draft_length=3, prompts=2, new_tokens=13, rounds=1)


def test_everybody_writes_the_same_text(results: dict) -> None:
    assert {name: way["identical"] for name, way in results["ways"].items()} == dict.fromkeys(
        ("plain", "draft_model", "transformers", "transformers_assisted"), 2
    )


def test_acceptance_lengths_and_ratios(results: dict) -> None:
    ways = results["ways"]
    assert ways["plain"]["acceptance_length"] == 1 and ways["draft_model"]["acceptance_length"] == 4
    assert "acceptance_length" not in ways["transformers_assisted"]
    ratio = ways["draft_model"]["tokens_per_s"] / ways["transformers_assisted"]["tokens_per_s"]
    assert results["draft_model_over_assisted"] == pytest.approx(ratio)
    assert f"{ratio:.2f}x" in assisted.describe(results)


@pytest.mark.parametrize("name", ["rounds", "prompts", "new_tokens"])
def test_counts_are_checked_first(name: str, tmp_path) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        assisted.run(tmp_path, tmp_path, "data", **{name: 0})
