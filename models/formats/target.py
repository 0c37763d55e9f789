"""A target: the expensive language model, as config, parameters and tokenizer in one handle.

    >>> from models import load_target
    >>> target = load_target(DIR)
    >>> tokens = target.tokenizer.encode("Once upon a time")
    >>> output = target.apply([tokens])
    >>> output.logits.shape == (1, len(tokens), target.config.vocab_size)
    True
    >>> likeliest = int(output.logits[0, -1].argmax())
    >>> text = target.tokenizer.decode([*tokens, likeliest])

`DIR` is a Hugging Face directory; `python -m scripts.convert` makes one from other formats.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from models.config import TransformerConfig
from models.encoder_decoder import beside, encode
from models.errors import UserError
from models.formats.hf import load_config, load_params
from models.formats.tokenizer import Tokenizer
from models.formats.tokenizer_files import holds_tokenizer
from models.layout import Layout
from models.linear import whole_table
from models.pages import in_huge_pages
from models.sharding import param_shardings
from models.transformer import Output, Params, for_decoding, forward, param_shapes


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A language model ready for use.

    Attributes:
      config: the shape of the network.
      params: its parameters, a list of layers; on one device with joined projections
        (`models.transformer.for_decoding`).
      tokenizer: None if its directory holds none.
      path: the directory it was loaded from, if any.
    """

    config: TransformerConfig
    params: Params
    tokenizer: Tokenizer | None = None
    path: Path | None = None

    def apply(
        self,
        tokens: Int[Array, "B T"] | np.ndarray | Sequence[Sequence[int]],
        segments: Int[Array, "B T"] | None = None,
        layers: tuple[int, int] | None = None,
        taps: Sequence[str] = (),
    ) -> Output:
        """The causal forward over whole texts, compiled once per shape; see `models.transformer.forward`.

        Args:
          tokens: ids below `config.vocab_size`, rows of equal length.
          segments: packed documents, 1, 2, ...; rows attend only within equal ids.
          layers: half-open range of layers to run; None means all.
          taps: features to return: `pre_norm`, `post_norm`, `layer:k`.

        Raises:
          UserError: rows of different lengths, ids outside the vocabulary, or an encoder-decoder.
        """
        self.refuse_encoder("scores texts behind their prompts, not texts alone")
        if not isinstance(tokens, jax.Array):
            tokens = self._checked(tokens)
        return _apply(self.config, self.params, tokens, segments, layers, tuple(taps))

    def next_scores(self, prompt: Sequence[int], text: Sequence[int]) -> Float[Array, "V"]:
        """Logits of the token behind a prompt and what was written so far, by a forward over all of it."""
        if not self.config.encoder_layers:
            return self.apply([[*prompt, *text]]).logits[0, -1]
        read, own = self._checked([prompt]), self._checked([[*self.opening(prompt), *text]])
        return _apply_behind(self.config, self.params, read, own)

    def opening(self, prompt: Sequence[int]) -> list[int]:
        """What stands before that which is written: the prompt, or where an encoder reads that the begin token.

        Raises:
          UserError: nothing says what an encoder-decoder's texts begin with.
        """
        if not self.config.encoder_layers:
            return list(prompt)
        if self.config.bos_id is None:
            raise UserError(
                f"{self.path or 'the target'} is an encoder-decoder and names no token that its texts begin with: "
                "config.json needs bos_token_id"
            )
        return [self.config.bos_id]

    def refuse_encoder(self, why: str) -> None:
        """Raises UserError where this is an encoder-decoder, which ... (why)."""
        if self.config.encoder_layers:
            raise UserError(f"{self.path or 'the target'} is an encoder-decoder, which {why}")

    def fingerprint(self) -> dict[str, int | str | None]:
        """What a drafter remembers of its base: sizes, vocabulary, and hashes of the embedding and the tokenizer.

        The embedding is hashed as bfloat16, so that a base loaded in float32 and in bfloat16 is the same base. Where
        several processes share the parameters, all of them must call this.
        """
        embedding = whole_table(self.params["embed"]["embedding"])
        if isinstance(embedding, jax.Array) and not embedding.is_fully_addressable:
            embedding = multihost_utils.process_allgather(embedding, tiled=True)
        embedding = np.asarray(embedding, dtype=jnp.bfloat16)
        return {
            "width": self.config.width,
            "num_layers": self.config.num_layers,
            "vocab_size": self.config.vocab_size,
            "embedding": hashlib.sha256(np.ascontiguousarray(embedding).view(np.uint8)).hexdigest()[:16],
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else None,
        }

    def _checked(self, tokens) -> Array:
        try:
            ids = np.asarray(tokens, np.int32)
        except (TypeError, ValueError, OverflowError):
            raise UserError("tokens must be rows of token ids of equal length") from None
        if ids.ndim != 2:
            raise UserError(f"tokens must be [batch, length], got {ids.ndim} dimension(s)")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            worst = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(f"token id {worst} is outside the vocabulary of {self.config.vocab_size}")
        return jnp.asarray(ids)


@functools.partial(jax.jit, static_argnames=("config", "layers", "taps"))
def _apply(config, params, tokens, segments, layers, taps):
    batch, length = tokens.shape
    return forward(config, params, tokens, Layout.causal(batch, length, segments), layers=layers, taps=taps)


@functools.partial(jax.jit, static_argnames=("config",))
def _apply_behind(config, params, prompt, text):
    memory = encode(config, params, prompt, jnp.full(1, prompt.shape[1], jnp.int32))
    return forward(config, params, text, *beside(memory, Layout.causal(*text.shape))).logits[0, -1]


def load_target(directory: str | Path, dtype=None, mesh: Mesh | None = None) -> Target:
    """Loads a Hugging Face directory.

    Args:
      directory: `config.json`, safetensors and, where there is a tokenizer, `tokenizer.json` or `tokenizer.model`.
      dtype: of the parameters; None means float32 on CPU and bfloat16 on accelerators.
      mesh: shards the parameters over it by `models.sharding.RULES`; None puts them on the default device.

    Raises:
      UserError: a file is missing or damaged, or holds something that is not supported, or the tokenizer's vocabulary
        has more entries than the model.
    """
    directory = Path(directory)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    config = load_config(directory)
    tokenizer = Tokenizer.load(directory) if holds_tokenizer(directory) else None
    if tokenizer is not None:
        check_vocabulary(config, tokenizer, directory)
    shardings = None if mesh is None else param_shardings(mesh, param_shapes(config, dtype))
    params = load_params(config, directory, dtype, shardings)
    return Target(config, in_huge_pages(for_decoding(params, mesh)), tokenizer, directory)


def check_same_tokens(what: str, own: str, other: str, expected: str) -> None:
    """Raises UserError when the tokenizer of `what` is not that of `other`, both by their fingerprints."""
    if own != expected:
        raise UserError(
            f"{what} has another tokenizer ({own}) than {other} ({expected}): their tokens cannot be compared"
        )


def check_vocabulary(config: TransformerConfig, tokenizer: Tokenizer, directory: str | Path) -> None:
    """Raises UserError when the tokenizer's own vocabulary has more entries than the model in `directory` embeddings.

    Tokens that were added to it, such as one for padding, may lie beyond: only texts that use them are refused.
    """
    own = tokenizer.core.get_vocab_size(with_added_tokens=False)
    if own > config.vocab_size:
        raise UserError(
            f"the tokenizer has {own} entries, more than the {config.vocab_size} embeddings of the model in {directory}"
        )
