"""Tiny data sets of text and of images, tiny models of both and tiny jobs, shared by the tests of training."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from models.formats import image_models as files
from models.images.config import VARConfig, VQVAEConfig
from models.sharding import make_mesh
from scripts import build_dataset
from tests import image_reference, noise
from tests.noise import noisy
from train import trainer
from train.config import TrainConfig, parse
from train.data import glyphs, images
from train.data.corpus import open_corpus
from train.metrics import Report
from train.objectives import OBJECTIVES
from train.objectives.adversary import Discriminator
from train.objectives.objective import Compute
from train.objectives.vqvae import GANConfig

SHAPE = {"width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 32}

# Sides of 8 pixels, an odd scale, few classes.
VQVAE = VQVAEConfig(vocab_size=24, latent_channels=4, width=4, multipliers=(1, 2), blocks=1, scales=(1, 2, 3, 4))
VAR = VARConfig(
    depth=3, width=12, num_heads=2, num_classes=3, vocab_size=24, latent_channels=4, scales=(1, 2, 3, 4), mlp_ratio=2
)
VAR_SHAPE = {"depth": 2, "width": 12, "num_heads": 2}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Source files with much repetition, so that little training shows."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(12):
        lines = [f"def function_{number}_{k}(x, y):\n    return x + {k} * y\n\n" for k in range(20)]
        (folder / f"file_{number}.py").write_text("".join(lines))
    out = folder / "out"
    arguments = ["--kind", "source", "--src", str(folder), "--glob", "*.py", "--train_tokenizer", "280"]
    build_dataset.main([*arguments, "--valid_documents", "2", "--out", str(out)])
    return out


SMALL_BLOCKS = {"target_layers": (0, 1), "num_layers": 1, "anchors": 32, "loop_prompts": 0}
STUDENT = {**SHAPE, "num_layers": 1, "mlp_width": 16}
SMALL_STUDENT = {"model": STUDENT, "draft": 2, "loop_prompts": 0}
SMALL_SERIAL = {"block": 3, "rank": 4}


def tiny_job(data_set: pathlib.Path, objective: dict[str, Any], **changes: Any) -> TrainConfig:
    """A config of a few short steps, sections updated by `changes`."""
    raw: dict[str, Any] = {
        "objective": objective,
        "data": {"path": str(data_set)},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
        "evaluation": {"every": 100, "batches": 2},
        "checkpoint": {"every": 2},
        "metrics": {"every": 1},
        "steps": 6,
        "batch_size": 4,
        "length": 32,
    }
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return parse(raw, OBJECTIVES)


@pytest.fixture(scope="session")
def target_directory(data_set: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A target that has learnt the data's most frequent turns, so that its greedy choices can be guessed."""
    workdir = tmp_path_factory.mktemp("target")
    trainer.train(tiny_job(data_set, {"name": "lm", "model": SHAPE}, steps=60, checkpoint={"every": 60}), workdir)
    return workdir / "target"


@pytest.fixture
def job(data_set: pathlib.Path, target_directory: pathlib.Path) -> Callable[..., TrainConfig]:
    """`job("lm", steps=3, objective={...})`: a tiny config, sections updated by the arguments."""
    objectives: dict[str, dict[str, Any]] = {
        "lm": {"name": "lm", "model": SHAPE},
        "exits": {"name": "exits", "model": SHAPE},
        "draft_heads": {
            "name": "draft_heads",
            "target": str(target_directory),
            "drafter": "hydra",
            "heads": {"num_heads": 2},
            "loop_prompts": 0,
        },
        "eagle": {"name": "eagle", "target": str(target_directory), "depth": 3, "loop_prompts": 0},
        "eagle3": {"name": "eagle3", "target": str(target_directory), "steps": 3, "loop_prompts": 0},
        "p_eagle": {"name": "p_eagle", "target": str(target_directory), "depth": 3, "loop_prompts": 0},
        "dflash": {**SMALL_BLOCKS, "name": "dflash", "target": str(target_directory), "block": 4},
        "dspark": {**SMALL_BLOCKS, "name": "dspark", "target": str(target_directory), "block": 3, "rank": 4},
        "domino": {
            **SMALL_BLOCKS,
            "name": "domino",
            "target": str(target_directory),
            "block": 3,
            "rank": 4,
            "state": 6,
        },
        "falcon": {"name": "falcon", "target": str(target_directory), "depth": 3, "loop_prompts": 0},
        "early_exit": {"name": "early_exit", "target": str(target_directory), "layers": 1, "loop_prompts": 0},
        "several": {"name": "several", "target": str(target_directory)},
        "distill": {**SMALL_STUDENT, "name": "distill", "target": str(target_directory)},
        "minillm": {**SMALL_STUDENT, "name": "minillm", "new_tokens": 12, "reuse": 2, "target": str(target_directory)},
        "coprocessor": {
            "name": "coprocessor",
            "target": str(target_directory),
            "coprocessor": {"num_latents": 3},
            "places": 5,
            "ahead": 4,
        },
    }

    def make(name: str, objective: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        return tiny_job(data_set, {**objectives[name], **(objective or {})}, **changes)

    return make


@pytest.fixture
def draft_setting(job: Callable[..., TrainConfig]) -> Callable[..., Any]:
    """`draft_setting("eagle", soft=1.0)`: objective, random drafter, frozen target, one batch with labels at random."""

    def make(name: str, **objective: Any) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
        config = job(name, objective=objective)
        corpus = open_corpus(config)
        plan = trainer.make_plan(config, corpus.facts)
        plan.objective.scan_data(corpus.train)
        frozen = plan.objective.load_base(plan.mesh)
        params = drawn(name, plan.objective, frozen, **objective)
        batch = {**next(corpus.batches(config.batch_size, 0))}
        batch["mask"] = np.random.default_rng(0).integers(0, 2, batch["mask"].shape).astype(np.uint8)
        return plan.objective, noisy(params, 0.1), frozen, jax.device_put(batch)

    return make


@pytest.fixture
def as_code() -> Callable[[TrainConfig], str]:
    """A config as Python source, for tests that run in their own process."""

    def write(config: TrainConfig) -> str:
        imports = "from train.config import parse\nfrom train.objectives import OBJECTIVES\n"
        return f"{imports}config = parse({dataclasses.asdict(config)!r}, OBJECTIVES)\n"

    return write


@pytest.fixture(scope="module")
def on_two_devices(run_on_devices: Callable[..., str]) -> Callable[[str], str]:
    """Runs code in a process with two CPU devices, and threads enough for collectives to wait for each other.

    XLA's CPU client runs independent collectives of a program in any order, each blocking a thread until the other
    device arrives; with one thread per core, two of them can wait for ever.
    """

    def run(code: str) -> str:
        __tracebackhide__ = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NPROC", "16")
            return run_on_devices(code, devices=2)

    return run


@pytest.fixture(scope="session")
def image_set(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Glyphs of three classes, 24 to learn from and 7 held out."""
    path = tmp_path_factory.mktemp("images") / "set"
    path.mkdir()

    def drawn(first: int, count: int):
        for i in range(first, first + count):
            yield {"name": f"image {i}", "image": glyphs.glyph(i, size=8, characters="ABC"), "label": i % 3}

    images.write_splits(path, {"train": lambda: drawn(0, 24), "valid": lambda: drawn(24, 7)}, "ABC", 8, "for tests")
    (path / "manifest.json").write_text(json.dumps({"kind": "images", "size": 8}))
    return path


@pytest.fixture(scope="session")
def image_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of a VQ-VAE and of a VAR over its codes, every tensor drawn at random."""
    folder = tmp_path_factory.mktemp("models")
    trees = {"vqvae": (VQVAE, image_reference.random_vqvae(VQVAE)), "var": (VAR, image_reference.random_var(VAR))}
    for name, (config, tree) in trees.items():
        files.save(folder / name, config, jax.device_put(jax.tree.map(np.float32, tree)))
    return {name: str(folder / name) for name in trees}


@pytest.fixture
def image_job(image_set: pathlib.Path, image_models: dict[str, str]) -> Callable[..., TrainConfig]:
    """`image_job("vqvae", steps=3, objective={...})`: a tiny config, sections updated by the arguments."""
    next_scale = {"tokenizer": image_models["vqvae"], "model": VAR_SHAPE}
    objectives: dict[str, dict[str, Any]] = {
        "vqvae": {"name": "vqvae", "model": dataclasses.asdict(VQVAE)},
        "var": {"name": "var", **next_scale},
        "code_refiner": {"name": "code_refiner", **next_scale, "teacher": image_models["var"], "first_scale": 2},
    }

    def make(name: str, objective: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        return tiny_job(image_set, {**objectives[name], **(objective or {})}, **{"length": None, **changes})

    return make


DRAWN: dict[tuple, Any] = {}


def drawn(name: str, objective: Any, base: Any, **config: Any) -> Any:
    """What the objective begins from, as NumPy arrays, drawn once for all sections that begin alike."""
    shapes = jax.eval_shape(objective.init, jax.random.key(3), base)
    alike = (name, str(shapes), *(str(config.get(key)) for key in ("init_from", "gate", "tokenizer", "target")))
    if alike not in DRAWN:
        init = jax.jit(objective.init, compiler_options=trainer.unoptimised())
        DRAWN[alike] = jax.tree.map(np.asarray, init(jax.random.key(3), base))
    return DRAWN[alike]


@functools.cache
def discriminator(config: GANConfig) -> Any:
    """Shapes of the critic of images of eight pixels."""
    seen = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    return jax.eval_shape(Discriminator(config.width, config.layers).lazy_init, jax.random.key(0), seen)["params"]


def image_params(objective: Any, config: TrainConfig, base: Any) -> Any:
    """Parameters that an image objective could have come to, every tensor drawn by NumPy, or those it goes on from."""
    if "init_from" in (base or {}):
        return base["init_from"]
    if isinstance(objective.model, VARConfig):
        tree = image_reference.random_var(objective.model, seed=1)
        layers = jax.tree.map(lambda *leaves: np.stack(leaves), *tree["layers"])
        return jax.device_put(jax.tree.map(np.float32, {**tree, "layers": layers}))
    params = {"vqvae": jax.device_put(jax.tree.map(np.float32, image_reference.random_vqvae(objective.model)))}
    gan = config.objective.gan
    return {**params, "discriminator": noise.drawn(discriminator(gan), 0.3)} if gan.weight else params


@pytest.fixture
def image_setting(image_job: Callable[..., TrainConfig]) -> Callable[..., Any]:
    """`image_setting("var", class_dropout=0.0)`: objective, random parameters, frozen ones, one batch of six."""

    def make(name: str, batch_size: int = 6, **given: Any) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
        config = image_job(name, objective=given, batch_size=batch_size)
        corpus = open_corpus(config)
        # Without a plan, whose state of the optimizer would be traced.
        objective = OBJECTIVES[name](config.objective, corpus.facts)
        objective.prepare(Compute(config.precision))
        base = objective.load_base(make_mesh()) if objective.base is not None else None
        batch = jax.device_put(dict(next(corpus.batches(batch_size, 0))))
        return objective, image_params(objective, config, base), objective.frozen_part(base), batch

    return make


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], contextlib.AbstractContextManager]:
    """`with die_at(5): train(...)`: the process ends while step 5 is on its way, which the block survives."""

    @contextlib.contextmanager
    def dying(step: int) -> Iterator[None]:
        push = Report.push

        def push_and_die(self, at, metrics):
            push(self, at, metrics)
            if at == step:
                raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Report, "push", push_and_die)
            yield

    return dying
