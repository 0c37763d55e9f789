"""Hugging Face transformers on the same shape, for comparison: the only place besides tests that imports torch.

Its `generate` runs as it does by default: dynamic cache unless a static one is asked for, sdpa attention, greedy; on
the kind of device that JAX runs on and in its dtype, on a CPU with the threads that JAX may use.
"""

import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.peers.images import device
from models.config import TransformerConfig
from models.formats.hf_config import config_to_hf


def is_installed() -> bool:
    """Whether torch, with the kind of device that JAX runs on, and transformers can be imported."""
    return importlib.util.find_spec("transformers") is not None and device() is not None


class HuggingFace:
    """Random weights of a given shape in transformers, ready to be timed (`eval.measure.timing.Timed`)."""

    def __init__(
        self,
        config: TransformerConfig,
        prompt: Sequence[int],
        new_tokens: int,
        dtype: str = "float32",
        static: bool = False,
    ):
        """Builds the model.

        Args:
          config: the shape; its end tokens are ignored, so that every text is as long as asked for.
          prompt: token ids to continue.
          new_tokens: tokens per sample.
          dtype: of its parameters.
          static: generates with a static cache, for which it compiles on a GPU.
        """
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        torch.manual_seed(0)
        settings = config_to_hf(config)
        settings = {key: value for key, value in settings.items() if key not in ("architectures", "eos_token_id")}
        hf_config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        hf_config.eos_token_id = None
        self._torch, self._cache = torch, {"cache_implementation": "static"} if static else {}
        where = torch.device(device() or "cpu")
        options = {"attn_implementation": "sdpa", "dtype": getattr(torch, dtype)}
        with where:  # Made where it runs: a processor takes minutes to draw as many numbers.
            self._model = transformers.AutoModelForCausalLM.from_config(hf_config, **options).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self._prompt = torch.tensor(np.asarray(prompt)[None], device=where)
        self._new_tokens = new_tokens

    def sample(self) -> float:
        """Seconds per token after the first: a text of one token is timed too, and its time taken off."""
        return (self._seconds(self._new_tokens + 1) - self._seconds(1)) / self._new_tokens

    def _seconds(self, new_tokens: int) -> float:
        mask = self._torch.ones_like(self._prompt)
        started = time.perf_counter()
        with self._torch.inference_mode():
            options = {"max_new_tokens": new_tokens, "do_sample": False, **self._cache}
            made = self._model.generate(self._prompt, attention_mask=mask, **options).cpu()
        seconds = time.perf_counter() - started
        if made.shape[1] != self._prompt.shape[1] + new_tokens:
            raise AssertionError(f"asked for {new_tokens} tokens, got {made.shape[1] - self._prompt.shape[1]}")
        return seconds


class Assisted:
    """Two trained models in transformers: plain and assisted greedy generation, with a constant draft length."""

    def __init__(self, target: Path, draft: Path, new_tokens: int, draft_length: int):
        """Loads both in float32.

        Args:
          target: Hugging Face directory.
          draft: Hugging Face directory of the assistant.
          new_tokens: of every text; end tokens are ignored.
          draft_length: candidates per step.
        """
        import torch
        import transformers

        self._torch, self._new_tokens = torch, new_tokens
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

        def load(directory: Path):
            model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
            return model

        self._target, self._draft = load(target), load(draft)
        settings = self._draft.generation_config
        # A confidence threshold would end drafts early, a heuristic schedule change their length.
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = draft_length, "constant"
        settings.assistant_confidence_threshold = 0.0

    def plain(self, prompt: Sequence[int]) -> list[int]:
        """The target alone."""
        return self._generate(prompt)

    def assisted(self, prompt: Sequence[int]) -> list[int]:
        """The target with the assistant."""
        return self._generate(prompt, assistant_model=self._draft)

    def _generate(self, prompt: Sequence[int], **more) -> list[int]:
        tokens = self._torch.tensor(np.asarray(prompt)[None])
        mask = self._torch.ones_like(tokens)
        with self._torch.inference_mode():
            made = self._target.generate(
                tokens, attention_mask=mask, max_new_tokens=self._new_tokens, do_sample=False, **more
            )
        return made[0, len(prompt) :].tolist()
