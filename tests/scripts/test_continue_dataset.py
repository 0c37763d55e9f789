"""Continuations are the target's own greedy text, marked as such, from the splits they should come from."""

import json
import re
import types

import numpy as np
import pytest

from decoding.generate import generate
from models.formats.target import load_target
from scripts import continue_dataset
from tests.eval.tiny import write_target
from train.data import continuations, self_chat
from train.data.text_building import build
from train.data.text_sources import RawDocument
from train.data.texts import open_split


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continue")
    target = load_target(write_target(folder / "target"))
    text = "def f(x):\n    return x + 1\nonce upon a time there was a small house by the sea\n"
    splits = {
        "train": [RawDocument(f"train{i}", text * (i + 1)) for i in range(3)],
        "valid": [RawDocument("held out", "the sea " + text)],
    }
    build(splits, target.tokenizer, folder / "data")
    return folder, target


def run(folder, out, *arguments):
    continue_dataset.main(
        ["--target", str(folder / "target"), "--data", str(folder / "data"), "--out", str(out), *arguments]
    )


def test_every_document_is_a_window_and_what_the_target_says_next(sources, tmp_path):
    folder, target = sources
    sizes = ["--documents", "5", "--valid_documents", "2", "--prompt_tokens", "8", "--new_tokens", "6", "--rows", "2"]
    run(folder, tmp_path / "out", *sizes)
    originals = {
        d["name"]: d["tokens"].tolist() for split in ("train", "valid") for d in open_split(folder / "data", split)
    }
    for split, count in (("train", 5), ("valid", 2)):
        documents = open_split(tmp_path / "out", split, tokenizer_fingerprint=target.tokenizer.fingerprint)
        assert len(documents) == count
        for document in (documents[i] for i in range(count)):
            name, _, start = document["name"].rpartition("@")
            assert name.startswith("train") == (split == "train")
            prompt = document["tokens"][:8].tolist()
            assert prompt == originals[name][int(start) : int(start) + 8]
            continuation = generate(target, [prompt], max_new_tokens=6).tokens[0]
            assert document["tokens"][8:].tolist() == continuation
            assert document["mask"].tolist() == [0] * 8 + [1] * len(continuation)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "continuations" and manifest["splits"]["train"]["documents"] == 5


def test_every_text_is_drawn_with_a_seed_of_its_own_from_windows_by_their_number(sources, monkeypatch):
    """Whatever batch it is in, and of another run too; documents by how many windows they have."""
    folder, target = sources
    documents, given = open_split(folder / "data", "train"), []

    def decoded(target, prompts, *, seeds, **_):
        given.extend(seeds + row for row in range(len(prompts)))
        return types.SimpleNamespace(tokens=[[1]] * len(prompts), prefill_seconds=1.0, decode_seconds=1.0)

    monkeypatch.setattr(continuations, "generate_together", decoded)
    made = [list(continuations.continuations(target, documents, 999, 8, 2, 1.0, 100, seed)) for seed in (0, 1)]
    assert len(given) == 2 * 999 == len(set(given))
    names = [document["name"].rpartition("@")[0] for document in made[0]]
    windows = {documents[i]["name"]: int(documents.lengths[i]) - 8 for i in range(len(documents))}
    for name, count in windows.items():
        share = count / sum(windows.values())
        assert abs(names.count(name) - 999 * share) < 4 * (999 * share * (1 - share)) ** 0.5
    assert len(set(windows.values())) == 3


def test_windows_differ_and_are_the_same_again(sources, tmp_path):
    folder, _ = sources
    names = []
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(
            folder,
            tmp_path / out,
            "--documents",
            "4",
            "--valid_documents",
            "0",
            "--new_tokens",
            "2",
            "--prompt_tokens",
            "8",
            "--seed",
            seed,
        )
        names.append([open_split(tmp_path / out, "train")[i]["name"] for i in range(4)])
    assert names[0] == names[1] != names[2]
    assert len(set(names[0])) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt_tokens", "5000"], "no document has more than 5000 tokens"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--new_tokens", "1000"], "more than the target's context of 512"),
        (["--data", "tfds:nothing"], "TFDS has no data set 'nothing'"),
        (["--mesh", "tensor"], "mesh 'tensor' is not a list of sizes of data, fsdp, tensor, such as data=2,tensor=4"),
        (["--mesh", "tensor=64"], "mesh data=1, fsdp=1, tensor=64 does not cover the 1 devices present"),
    ],
)
def test_bad_requests_are_one_sentence_and_leave_nothing(sources, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(sources[0], tmp_path / "out", *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_a_mesh_writes_the_same(sources, tmp_path, run_on_devices):
    folder, _ = sources
    sizes = ["--documents", "2", "--valid_documents", "0", "--prompt_tokens", "8", "--new_tokens", "6", "--rows", "2"]
    run(folder, tmp_path / "one", *sizes)
    places = ["--target", str(folder / "target"), "--data", str(folder / "data"), "--out", str(tmp_path / "two")]
    split = [*places, *sizes, "--mesh", "tensor=2"]
    run_on_devices(f"from scripts import continue_dataset\ncontinue_dataset.main({split!r})", devices=2)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_a_drafter_changes_no_text_of_either_form(sources, chatter, tmp_path, capsys):
    few = ["--documents", "4", "--valid_documents", "0"]
    for name, drafter in (("plain", []), ("drafted", ["--drafter", "prompt_lookup:1:3"])):
        run(sources[0], tmp_path / f"data-{name}", *few, "--prompt_tokens", "8", "--new_tokens", "12", *drafter)
        chat(chatter, tmp_path / f"chat-{name}", *few, *drafter)
    for form in ("data", "chat"):
        assert content(tmp_path / f"{form}-drafted") == content(tmp_path / f"{form}-plain")
        manifest = json.loads((tmp_path / f"{form}-drafted" / "manifest.json").read_text())
        assert manifest["source"]["drafter"] == "prompt_lookup:1:3"


def test_text_ends_where_the_target_ends_it(sources, tmp_path, monkeypatch):
    folder, target = sources
    decoded = continuations.generate_together

    def stops_early(*given, **options):
        return decoded(*given, **options, stop=[[token] for token in range(target.config.vocab_size)])

    monkeypatch.setattr(continuations, "generate_together", stops_early)
    run(
        folder,
        tmp_path / "out",
        "--documents",
        "2",
        "--valid_documents",
        "0",
        "--prompt_tokens",
        "8",
        "--new_tokens",
        "6",
    )
    document = open_split(tmp_path / "out", "train")[0]
    assert len(document["tokens"]) == 9 and np.sum(document["mask"]) == 1


# Conversations of its own

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chatter(tmp_path_factory):
    """A target with a chat template that ends a text at any of many tokens."""
    folder = tmp_path_factory.mktemp("chat") / "target"
    write_target(folder)
    load_target(folder).tokenizer.with_chat_template(TEMPLATE).save(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["eos_token_id"] = [1, *range(2, 300, 6)]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def chat(target, out, *arguments):
    sizes = ["--prompt_tokens", "16", "--new_tokens", "24", "--rows", "8", "--temperature", "0.8,1"]
    continue_dataset.main(["--target", str(target), "--out", str(out), *sizes, *arguments])


def content(out, split="train"):
    documents = open_split(out, split)
    return [(documents[i]["tokens"].tolist(), documents[i]["mask"].tolist()) for i in range(len(documents))]


def test_a_chat_model_writes_its_own_conversations(chatter, tmp_path, capsys):
    chat(chatter, tmp_path / "out", "--documents", "12", "--valid_documents", "4")
    target = load_target(chatter)
    made, held_out = content(tmp_path / "out"), content(tmp_path / "out", "valid")
    assert (len(made), len(held_out)) == (12, 4)
    opening, closing = target.tokenizer.encode("<user>", bos=False), "</><assistant>"
    prompts = []
    for tokens, mask in made + held_out:
        context, answer = tokens[: mask.index(1)], tokens[mask.index(1) :]
        assert set(mask[len(context) :]) == {1} and 0 < len(answer) <= 24
        assert answer[-1] in target.config.eos_ids and not set(answer[:-1]) & set(target.config.eos_ids)
        text = target.tokenizer.decode(context)
        assert tokens[: len(opening)] == opening and text.endswith(closing)
        prompts.append(text.removeprefix("<user>").removesuffix(closing).lower())
    assert len(set(prompts)) == len(prompts)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "self-chat" and manifest["chat_template"] == TEMPLATE
    source, counts = manifest["source"], manifest["source"]["counts"]
    assert (source["temperature"], source["prompt_temperature"], source["seed"]) == ([0.8, 1.0], 1.0, 0)
    assert counts["answers kept"] >= 16 and counts["prompts kept"] >= 16 and source["tokens_per_second"] > 0
    assert 0 <= source["repetition"]["mean"] <= 0.3 < source["repetition"]["distinct_1"]
    told = capsys.readouterr().out
    assert "answers kept" in told and "tokens/s; repetition mean" in told
    assert not list(tmp_path.glob(".*"))


def test_every_round_draws_anew_and_rows_take_temperatures_in_turn(chatter, tmp_path, monkeypatch):
    given, decoded = [], self_chat.generate_together

    def watched(target, prompts, **options):
        given.append((options["seeds"].tolist(), [one.temperature for one in options["sampling"]]))
        return decoded(target, prompts, **options)

    monkeypatch.setattr(self_chat, "generate_together", watched)
    chat(chatter, tmp_path / "out", "--documents", "12", "--valid_documents", "4")
    seeds = [seed for of_round, _ in given for seed in of_round]
    assert len(set(seeds)) == len(seeds) == 8 * len(given)
    temperatures = [of_round for _, of_round in given]
    assert [1.0] * 8 in temperatures and [0.8, 1.0] * 4 in temperatures


def test_an_interrupted_run_goes_on_where_it_was(chatter, tmp_path, monkeypatch, capsys):
    arguments = ["--documents", "14", "--valid_documents", "2"]
    chat(chatter, tmp_path / "whole", *arguments)
    calls, decoded = [], self_chat.generate_together

    def interrupted(*given, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decoded(*given, **options)

    monkeypatch.setattr(self_chat, "generate_together", interrupted)
    with pytest.raises(SystemExit):
        chat(chatter, tmp_path / "out", *arguments)
    rounds = tmp_path / ".out.rounds.jsonl"
    # Killed while it wrote, it leaves half a line.
    rounds.write_text(rounds.read_text() + '{"documents": [')
    with pytest.raises(SystemExit):
        chat(chatter, tmp_path / "out", *arguments, "--seed", "5")
    assert "holds an unfinished run with another seed" in capsys.readouterr().err
    chat(chatter, tmp_path / "out", *arguments)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not rounds.exists()


def test_prompts_of_a_person_are_answered(chatter, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"What is {i}?"} for i in range(11)]
    lines.append({"messages": [{"role": r, "content": r} for r in ("user", "assistant", "user")]})
    lines.append({"prompt": "what  is 3?"})
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    short = ["--new_tokens", "3", "--keep_unended"]
    chat(chatter, tmp_path / "out", "--prompts", str(prompts), "--valid_documents", "0", *short)
    target = load_target(chatter)
    answered = content(tmp_path / "out")
    asked = {target.tokenizer.decode(tokens[: mask.index(1)]) for tokens, mask in answered}
    wanted = {f"<user>What is {i}?</><assistant>" for i in range(11)}
    assert asked == wanted | {"<user>user</><assistant>assistant</><user>user</><assistant>"}
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["counts"]
    cut = [sum(mask) for tokens, mask in answered if tokens[-1] not in target.config.eos_ids]
    assert set(cut) == {3} and counts["answers cut"] == len(cut) == 12 - counts["answers kept"]
    assert counts["prompts seen"] == 1, "the same question in other capitals"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["documents"] == 13, "all are asked"
    prompts.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(SystemExit):
        chat(chatter, tmp_path / "again", "--prompts", str(prompts))
    assert "line 2: expected a string 'prompt'" in capsys.readouterr().err


def test_chats_that_cannot_be_written_are_one_sentence(sources, chatter, tmp_path, capsys):
    def complaint(run, *arguments):
        with pytest.raises(SystemExit):
            run(*arguments)
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "has no chat template" in complaint(chat, sources[0] / "target", tmp_path / "out")
    few = ["--documents", "4", "--valid_documents", "400", "--minutes", "0.001"]
    assert "finished, and 400 of them are held out" in complaint(chat, chatter, tmp_path / "out", *few)
    data = ["--target", str(chatter), "--data", "x", "--out", str(tmp_path / "y"), "--minutes", "1"]
    assert "--data has no use for --minutes" in complaint(continue_dataset.main, data)


def test_a_target_whose_texts_are_of_no_use_is_given_up(chatter, tmp_path, monkeypatch, capsys):
    """Its answers do not end, or neither do its prompts, or it writes one prompt for ever."""
    ends = load_target(chatter).config.eos_ids
    rng = np.random.default_rng(0)
    calls = []

    def decoded(target, prompts, *, max_new_tokens, **_):
        calls.append(max_new_tokens[0])
        words = rng.choice([3, 4, 5, 6, 7, 9, 10, 11], (len(prompts), 12)).tolist()
        of_prompts = max_new_tokens[0] == 16
        words = [[7, 7]] * len(words) if of_prompts and case == "one prompt" else words
        ended = of_prompts and case != "prompts"
        return types.SimpleNamespace(
            tokens=[[*text, *ends[:1]] if ended else text for text in words], prefill_seconds=1.0, decode_seconds=1.0
        )

    monkeypatch.setattr(self_chat, "generate_together", decoded)
    for case, message, longest in (
        ("answers", r"16 batches of 8 answers .* none can be used .*128 answers unended, .*: give more --new_tok", 34),
        ("prompts", r"16 batches of 8 prompts .* none can be used \(128 prompts unended\): give more --prompt_t", 16),
        ("one prompt", r"16 batches of 8 prompts .* none can be used \(1 prompts kept, 135 prompts seen\)", 17),
    ):
        calls.clear()
        with pytest.raises(SystemExit):
            chat(chatter, tmp_path / case, "--documents", "4")
        assert re.search(message, capsys.readouterr().err.splitlines()[-1])
        assert 16 <= len(calls) <= longest
    calls.clear()
    with pytest.raises(SystemExit):
        chat(chatter, tmp_path / "long", "--new_tokens", "496")
    assert "--prompt_tokens 16 and --new_tokens 496 leave no room for the chat template in the 512" in (
        capsys.readouterr().err
    )
    assert not calls


def test_repetition_counts_runs_of_four():
    assert self_chat.repetition([1, 2, 3, 4, 5, 6]) == 0
    assert self_chat.repetition([1] * 13) == 0.9
    assert self_chat.repetition([1, 2]) == 0
