"""The shape of a Llama-family transformer: every number that decides its parameters and its forward.

One frozen, hashable record serves Llama 1-3.x, Vicuna, Mistral, Qwen2, Qwen3, Gemma-2 and encoder-decoders. Families
differ in data here, never in code paths named after them; `models/formats/hf.py` maps Hugging Face's `config.json` to
this record and back.
"""

import dataclasses
import math

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "mu")


_MOST_LAYERS = 1000  # They are made one by one.


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining context.

    `linear` divides every frequency by `factor`. `llama3` divides only wavelengths longer than
    `original_max_position / low_freq_factor`, keeps those shorter than `original_max_position / high_freq_factor`, and
    interpolates between (Llama 3.1).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling must be 'linear' or 'llama3', got {self.kind!r}")
        if not 0 < self.factor < math.inf:
            raise ValueError(f"the factor of rope scaling must be above 0, got {self.factor}")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ValueError(f"rope scaling needs 0 < low_freq_factor < high_freq_factor, got {low} and {high}")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of one transformer.

    Attributes:
      vocab_size: V, rows of the embedding.
      width: H, the residual stream.
      num_layers: number of blocks.
      num_heads: query heads N.
      num_kv_heads: key/value heads K; N must be a multiple.
      head_dim: D of every head; even, because RoPE rotates halves.
      mlp_width: F of the gated MLP.
      max_position: longest sequence the model was trained for, in tokens.
      rope_theta: RoPE base.
      rope_scaling: None, linear or llama3.
      norm_eps: epsilon inside every RMSNorm.
      tied_embeddings: the output head is the transposed embedding.
      qkv_bias: biases on the q, k and v projections (Qwen2; Llama with `attention_bias`).
      output_bias: bias on the attention output projection (Llama with `attention_bias`).
      qk_norm: RMSNorm over D on queries and keys before RoPE (Qwen3).
      windows: per layer, the sliding window in tokens (a query at p sees keys at p-window+1..p) or None for global
        attention; the empty tuple means global everywhere.
      embed_scale: multiply embeddings by sqrt(H), rounded to the parameter dtype (Gemma).
      attention_softcap: cap * tanh(scores / cap) before the mask (Gemma-2).
      logit_softcap: the same on the output logits (Gemma-2).
      post_norms: RMSNorms also after attention and after the MLP (Gemma-2).
      zero_centred_norm: norms multiply by 1 + scale (Gemma).
      activation: the MLP's nonlinearity, `silu` or `gelu_tanh` (Gemma).
      gated_mlp: the MLP is down(act(gate(x)) * up(x)); without, down(act(up(x))).
      mlp_bias: biases on the MLP's maps.
      encoder_layers: of an encoder-decoder (family `mu`), the blocks that read the prompt, in both directions; the
        `num_layers` of the decoder then begin with `bos_id` and attend to what they made of it. 0 is a decoder alone.
      query_scale: factor on q.k; None means 1/sqrt(D).
      family: which `config.json` family an export declares.
      bos_id: token that begins a text, or None.
      eos_ids: tokens that end one.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_position: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    embed_scale: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    post_norms: bool = False
    zero_centred_norm: bool = False
    activation: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    encoder_layers: int = 0
    query_scale: float | None = None
    family: str = "llama"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_layers", "encoder_layers"):
            if getattr(self, name) > _MOST_LAYERS:
                raise ValueError(f"model.{name} must be at most {_MOST_LAYERS}, got {getattr(self, name)}")
        if self.encoder_layers < 0 or (self.encoder_layers > 0) != (self.family == "mu"):
            raise ValueError(
                f"model.encoder_layers must be at least 1 where model.family is 'mu', and 0 elsewhere: it is "
                f"{self.encoder_layers}, and the family {self.family!r}"
            )
        for name in ("windows", "qk_norm", "post_norms", "attention_softcap"):
            if self.encoder_layers and getattr(self, name):
                raise ValueError(f"model.{name} is not for an encoder-decoder, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads ({self.num_heads}) must be a multiple of model.num_kv_heads ({self.num_kv_heads})"
            )
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"model.rope_theta must be above 0, got {self.rope_theta}")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim must be even for RoPE, got {self.head_dim}")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"model.windows must have one entry per layer ({self.num_layers}), got {len(self.windows)}"
            )
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"model.windows must hold numbers of at least 1, or None, got {list(self.windows)}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"model.activation must be 'silu' or 'gelu_tanh', got {self.activation!r}")
        if self.family not in FAMILIES:
            raise ValueError(f"model.family must be one of {', '.join(FAMILIES)}, got {self.family!r}")

    @property
    def encoder(self) -> "TransformerConfig | None":
        """The shape of the encoder's blocks, where there is one."""
        if not self.encoder_layers:
            return None
        return dataclasses.replace(self, family="llama", num_layers=self.encoder_layers, encoder_layers=0)

    def window(self, layer: int) -> int | None:
        """The sliding window of `layer` in tokens, or None."""
        return self.windows[layer] if self.windows else None
