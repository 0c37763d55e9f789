"""Every way a config can be wrong, and the one sentence it gets."""

import ast
import dataclasses
import pathlib
import subprocess
import sys
import typing
from collections.abc import Iterable
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from models import schema
from models.errors import UserError
from train.command_line import load_config, read_flags
from train.config import TrainConfig, fill_in, parse
from train.objectives import OBJECTIVES

ROOT = pathlib.Path(__file__).resolve().parents[2]
LM = str(ROOT / "configs" / "lm.py")


def lm(**changes) -> dict:
    """The smoke config and its defaults as plain data, with dotted changes; a change to `...` removes the key."""
    raw = load_config(f"{LM}:smoke")
    fill_in(raw, OBJECTIVES)
    config = raw.to_dict()
    for place, value in changes.items():
        *sections, key = place.split(".")
        section = config
        for name in sections:
            section = section[name]
        if value is ...:
            del section[key]
        else:
            section[key] = value
    return config


def variants_of(path: pathlib.Path) -> list[str]:
    """As `check_variant` is told them."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "check_variant"]
    return [argument.value for argument in call.args[1:] if isinstance(argument, ast.Constant)]


def test_every_config_file_and_variant_parses():
    for path in (ROOT / "configs").glob("*.py"):
        if path.name == "__init__.py":
            continue
        for variant in ("", *(f":{name}" for name in variants_of(path))):
            config = load_config(f"{path}{variant}")
            sections = [config.objective, *(one.objective for one in config.objective.get("members", {}).values())]
            for section in sections:
                for key in ("init_from", "target", "tokenizer", "teacher"):
                    if key in section and section[key] is None:
                        section[key] = "runs/lm/target"
            parsed = parse(config, OBJECTIVES, path.name)
            assert isinstance(parsed, TrainConfig)
            fill_in(config, OBJECTIVES)
            assert parse(config, OBJECTIVES, path.name) == parsed
            # A key that a file leaves to its default can be given on the command line all the same.
            sections = {**schema.resolved(parsed), "objective": None}
            assert schema.flattened(sections).keys() == schema.flattened({**config.to_dict(), "objective": None}).keys()


@pytest.mark.parametrize(
    ("name", "rate", "warmup_steps", "final_fraction", "weight_decay"),
    [("medusa", 1e-3, 40, 0.0, 0.0), ("hydra", 5e-4, 100, 0.33, 0.1)],
)
def test_the_published_recipes(name, rate, warmup_steps, final_fraction, weight_decay):
    raw = load_config(f"{ROOT}/configs/{name}.py:paper")
    raw.objective.target = "runs/lm/target"
    config = parse(raw, OBJECTIVES)
    rule = config.optimizer
    assert (config.objective.hard, config.objective.soft, rule.name, rule.schedule) == (1.0, 0.0, "adamw", "cosine")
    assert (rule.learning_rate, rule.warmup_steps) == (rate, warmup_steps)
    assert (rule.final_fraction, rule.weight_decay) == (final_fraction, weight_decay)


@pytest.mark.parametrize(
    ("name", "rate", "b2", "final_fraction", "decay"),
    [
        ("dflash", 6e-4, 0.999, 0.0, None),
        ("dspark", 6e-4, 0.999, 0.0, None),
        ("domino", 6e-4, 0.999, 0.0, 1.0),
        ("jetspec", 3e-4, 0.95, 0.1, None),
    ],
)
def test_the_published_recipes_of_blocks(name, rate, b2, final_fraction, decay):
    raw = load_config(f"{ROOT}/configs/{name}.py:paper")
    raw.objective.target = "runs/lm/target"
    config = parse(raw, OBJECTIVES)
    rule, shape = config.optimizer, config.objective
    assert (rule.name, rule.schedule, rule.weight_decay, rule.clip_norm) == ("adamw", "cosine", 0.0, 1.0)
    assert (rule.learning_rate, rule.b2, rule.final_fraction) == (rate, b2, final_fraction)
    assert rule.warmup_steps == 0.04 * config.steps and shape.num_layers == 5
    assert decay is None or shape.decay == decay


def test_values_arrive():
    config = parse(
        lm(**{"optimizer.learning_rate": 1, "objective.model.rope_scaling": {"kind": "linear", "factor": 2}}),
        OBJECTIVES,
    )
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    shape = config.objective.shape(vocab_size=99, bos_id=3, eos_ids=(4,))
    assert (shape.vocab_size, shape.bos_id, shape.eos_ids, shape.width) == (99, 3, (4,), 64)
    assert shape.rope_scaling.factor == 2.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lenght": 3}, ["unknown key lenght", "did you mean 'length'"]),
        ({"optimizer.learning_rat": 3.0}, ["unknown key optimizer.learning_rat", "'learning_rate'"]),
        ({"objective.modle": None}, ["unknown key objective.modle", "'model'"]),
        ({"objective.model.widht": 3}, ["unknown key objective.model.widht", "'width'"]),
        ({"objective.name": "lmm"}, ["no objective 'lmm'", "did you mean 'lm'"]),
        ({"objective": ...}, ["no section objective"]),
        ({"objective": 3}, ["no section objective"]),
        ({"steps": ...}, ["lacks steps (int)"]),
        ({"data": ...}, ["lacks data (a section)"]),
        ({"data": "data/python"}, ["data must be a section, got str 'data/python'"]),
        ({"steps": 2.5}, ["steps must be int, got float 2.5"]),
        ({"steps": True}, ["steps must be int, got bool True"]),
        ({"steps": 2**31}, ["steps must be at least 1, and less than 2^31, got 2147483648"]),
        ({"optimizer.eps": float("inf")}, ["optimizer.eps must be positive, and finite, got inf"]),
        ({"optimizer.weight_decay": float("inf")}, ["optimizer.weight_decay must be 0 or more, and finite, got inf"]),
        ({"steps": None}, ["steps must be int, got nothing"]),
        ({"metrics.tensorboard": 1}, ["metrics.tensorboard must be bool, got int 1"]),
        ({"optimizer.learning_rate": "1e-3"}, ["optimizer.learning_rate must be float, got str '1e-3'"]),
        ({"optimizer.learning_rate": True}, ["optimizer.learning_rate must be float, got bool True"]),
        ({"objective.model.windows": (4, "x")}, ["objective.model.windows[1] must be int or None, got str 'x'"]),
        ({"objective.model.windows": [4, 4]}, ["objective.model.windows must be a tuple of int or None, got list"]),
        ({"metrics.wandb": ""}, ["metrics.wandb must not be empty: give str, or leave it out"]),
        ({"metrics.wandb": 3}, ["metrics.wandb must be str or None, got int 3"]),
        ({"optimizer.schedule": "cosin"}, ["optimizer.schedule must be one of", "did you mean 'cosine'"]),
        ({"optimizer.schedule": "constant"}, ["final_fraction must be 1.0 when", "'constant'"]),
        ({"optimizer.warmup_steps": 40}, ["optimizer.warmup_steps (40) must be smaller than steps (40)"]),
        ({"optimizer.learning_rate": 0.0}, ["optimizer.learning_rate must be positive, got 0.0"]),
        ({"optimizer.b2": 1.0}, ["optimizer.b2 must lie in 0..1"]),
        ({"mesh.data": 0}, ["mesh.data must be at least 1, or -1"]),
        ({"checkpoint.keep": 0}, ["checkpoint.keep must be at least 1"]),
        ({"evaluation.batches": 0}, ["evaluation.batches must be at least 1"]),
        ({"seed": -1}, ["seed must lie in"]),
        ({"length": None}, ["the objective lm reads text: length must be set"]),
        ({"optimizer.ema": 1.0}, ["optimizer.ema must lie in 0..1, 1 excluded, got 1.0"]),
        ({"objective.model": None}, ["either objective.model (a shape) or objective.init_from"]),
        ({"objective.init_from": "runs/lm"}, ["either objective.model (a shape) or objective.init_from"]),
        ({"objective.model.vocab_size": 9}, ["objective.model.vocab_size comes from the data set's tokenizer"]),
        ({"objective.model.head_dim": 31}, ["model.head_dim must be even"]),
        ({"objective.model.windows": (0, 4)}, ["model.windows must hold numbers of at least 1, or None, got [0, 4]"]),
        ({"objective.model.rope_theta": 0.0}, ["model.rope_theta must be above 0, got 0.0"]),
        ({"objective.model.num_heads": "two"}, ["objective.model.num_heads must be int, got str 'two'"]),
    ],
)
def test_a_wrong_file_gets_one_sentence(changes, words):
    with pytest.raises(UserError) as caught:
        parse(lm(**changes), OBJECTIVES, "my.py")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def parse_flags(arguments: list[str]) -> ConfigDict:
    """The command line read into flags of its own, apart from the process's."""
    values, argv = flags.FlagValues(), ["train", *arguments]
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    read_flags(argv, values, lambda config: fill_in(config, OBJECTIVES))
    return holder.value


def test_overrides_arrive(monkeypatch):
    monkeypatch.chdir(ROOT)
    given = ["--config.steps=7", "--config.data.fields=question,answer", "--config.metrics.wandb=tandem"]
    raw = parse_flags(["--config=configs/lm.py:smoke", *given, "--config.optimizer.eps=1"])
    assert raw.is_locked and raw.optimizer.is_locked
    config = parse(raw, OBJECTIVES)
    assert (config.steps, config.data.fields, config.metrics.wandb) == (7, "question,answer", "tandem")
    assert config.optimizer.eps == 1.0


CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")


def defaults_of(kind: type, prefix: str = "", said: Iterable[str] = (), held: Any = None) -> dict[str, Any]:
    """What sections hold where nothing is said, by dotted place; the objective's is `kind`'s business to bring.

    A section that is there by default may hold other values than one of which something is said.
    """
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        place, default = f"{prefix}{field.name}", field.default
        if held is not None:
            default = getattr(held, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(hints[field.name]):
            within = default if dataclasses.is_dataclass(default) else None
            touched = any(key.startswith(f"{place}.") for key in said)
            found |= defaults_of(hints[field.name], f"{place}.", said, None if touched else within)
        elif default is not dataclasses.MISSING:
            found[place] = default
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_only_what_differs_and_a_command_line_may_name_the_rest(path):
    raw = load_config(str(path))
    said = schema.flattened(raw.to_dict())
    kind = OBJECTIVES[raw.objective.name].Config
    defaults = defaults_of(TrainConfig, said=said) | defaults_of(kind, "objective.", said)
    # The sizes of a model are said whole; and where a job must go on from a directory, there is a place to name it.
    own = {key for key in defaults if key.startswith("objective.model")} | {"objective.init_from"}
    # A section that is None by default stands in the file as its keys.
    own |= {key for key in defaults if any(name.startswith(f"{key}.") for name in said)}
    assert [key for key in said.keys() & defaults.keys() - own if said[key] == defaults[key]] == []
    fill_in(raw, OBJECTIVES)
    filled = schema.flattened(raw.to_dict())
    assert {key: filled[key] for key in said} == said
    rest = defaults.keys() - own - said.keys()
    assert {key: filled[key] for key in rest} == {key: defaults[key] for key in rest}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/ml.py"], ["no config file configs/ml.py", "'lm.py'"]),
        (["--config=configs/lm.py:smok"], ["no variant 'smok'", "did you mean 'smoke'"]),
        (["--config=configs/lm.py", "--config.stpes=3"], ["--config.stpes", "no key 'stpes'", "'steps'"]),
        (["--config=configs/lm.py", "--config.optimizer.lr=3"], ["no key 'lr' in the section optimizer"]),
        (["--config=configs/lm.py", "--config.optimiser.eps=3"], ["no key 'optimiser'", "'optimizer'"]),
        (["--config=configs/lm.py", "--config.steps.x=3"], ["steps is 400, not a section"]),
        (["--config=configs/lm.py", "--config.seed=many"], ["--config.seed must be int, got 'many'"]),
        (["--config=configs/lm.py", "--config.mesh.fdsp=2"], ["no key 'fdsp' in the section mesh", "'fsdp'"]),
        (["--config=configs/lm.py", "--config.steps=many"], ["--config.steps must be int, got 'many'"]),
        (["--config=configs/lm.py", "--config.steps=1.5"], ["--config.steps must be int, got '1.5'"]),
        (["--config=configs/lm.py", "--config.steps=5", "--config.steps=x"], ["--config.steps must be int, got 'x'"]),
        (["--config=configs/lm.py", "--config.steps=y", "--config.steps=5"], ["--config.steps must be int, got 'y'"]),
        (["--config=configs/lm.py", "--config.metrics.tensorboard=maybe"], ["must be bool, got 'maybe'"]),
        (["--config.steps=3", "--config=configs/lm.py"], ["before a value for --config"]),
        (["--config.steps=3"], ["needs --config=FILE"]),
        (["--config=configs/lm.py", "--config.=3"], ["the config has no key ''"]),
        (["--config=configs/lm.py", "--config.data..path=3"], ["the config has no key '' in the section data"]),
        (["--confg=configs/lm.py"], ["Unknown command line flag 'confg'"]),
    ],
)
def test_a_wrong_command_line_gets_one_sentence(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        parse_flags(arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_config_must_return_a_config_dict(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("x = 1")
    with pytest.raises(UserError, match="must define get_config"):
        load_config(str(path))
    path.write_text("def get_config(variant=''):\n    return {}")
    with pytest.raises(UserError, match="must define get_config"):
        load_config(str(path))
    path.write_text("def get_config(")
    with pytest.raises(UserError, match="fails with SyntaxError"):
        load_config(str(path))
    path.write_text("def get_config(variant=''):\n    return nothing")
    with pytest.raises(UserError, match="fails with NameError"):
        load_config(str(path))


def test_command_exits_2_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "train.main", "--config=configs/lm.py", "--config.stpes=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config.stpes") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_resolved_and_flattened():
    @dataclasses.dataclass(frozen=True)
    class Section:
        sizes: tuple[int, ...] = (1, 2)

    tree = {"a": schema.resolved(Section()), "b": 3}
    assert schema.flattened(tree) == {"a.sizes": [1, 2], "b": 3}


def test_a_config_dict_is_read_like_a_dict():
    assert parse(ConfigDict(lm()), OBJECTIVES) == parse(lm(), OBJECTIVES)
