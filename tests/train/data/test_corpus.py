"""What a job's data decide about its model."""

from models.formats.tokenizer import Tokenizer
from tests.train.conftest import SHAPE, tiny_job
from train.data.corpus import open_corpus
from train.data.text_building import build
from train.data.text_sources import RawDocument

TEMPLATE = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"


def test_the_data_s_chat_template_goes_to_what_learns_from_it(tmp_path):
    tokenizer = Tokenizer.train(["once upon a time there was text\n"], 262)
    tokenizer.with_chat_template("another").save(tmp_path / "base")
    chat = RawDocument("a", messages=({"role": "user", "content": "once"}, {"role": "assistant", "content": "a time"}))
    splits = {name: [chat] for name in ("train", "valid")}
    build(splits, tokenizer.with_chat_template(TEMPLATE), tmp_path / "data", kind="chat")
    for objective in ({"init_from": str(tmp_path / "base")}, {"model": SHAPE}):
        facts = open_corpus(tiny_job(tmp_path / "data", {"name": "lm", **objective})).facts
        facts.save(tmp_path / "exported")
        assert Tokenizer.load(tmp_path / "exported").chat_template == TEMPLATE
    build({name: [RawDocument("a", "text")] for name in splits}, tokenizer, tmp_path / "texts")
    facts = open_corpus(tiny_job(tmp_path / "texts", {"name": "lm", "init_from": str(tmp_path / "base")})).facts
    assert facts.chat_template == "another"
