"""Sizes of models of the Qwen3 architecture: what they compute, and the same as a configuration to build one from."""

from dataclasses import dataclass

from transformers import Qwen3Config


@dataclass
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False

    @property
    def body(self) -> int:
        """Parameters of the matrices of all layers."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        return self.hidden * self.vocab

    @property
    def total(self) -> int:
        return self.body + self.head * (1 if self.tied else 2)

    def forward(self, lengths: list[int], causal: bool = True) -> float:
        """FLOPs without the head. Attention without a causal kernel computes the upper triangle too."""
        attention = (2 if causal else 4) * self.layers * self.heads * self.head_dim
        return 2 * self.body * sum(lengths) + attention * sum(length**2 for length in lengths)

    def loss(self, tokens: int) -> int:
        """FLOPs: the logits of both, and the gradients of the student's states and head."""
        return 8 * self.head * tokens

    @property
    def layer_activations(self) -> int:
        """Numbers that the backward pass of one layer needs of each token: norms, projections, attention, MLP."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 8 * self.hidden + 8 * q + 3 * kv + 4 * self.intermediate

    @property
    def cache(self) -> int:
        """Bytes of keys and values of a token in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def config(self, **options) -> Qwen3Config:
        """The configuration of such a model."""
        return Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
            **options,
        )


def small(hidden: int, layers: int, vocab: int, tied: bool = True) -> Shape:
    """The models with random weights that benchmarks build: heads of 64 in pairs, an MLP three times as wide."""
    return Shape(hidden, layers, hidden // 64, max(hidden // 128, 1), 64, 3 * hidden, vocab, tied)


QWEN3 = {
    "0.6B": Shape(1024, 28, 16, 8, 128, 3072, 151936, tied=True),
    "1.7B": Shape(2048, 28, 16, 8, 128, 6144, 151936, tied=True),
    "8B": Shape(4096, 36, 32, 8, 128, 12288, 151936),
    "32B": Shape(5120, 64, 64, 8, 128, 25600, 151936),
}

# Of a GPU, where no GPU was measured
ASSUMED = {
    "peak": 989e12,  # FLOP/s of an H100 in bfloat16
    "mfu": 0.4,  # share of it that training reaches
    "memory": 3.35e12,  # bytes/s
    "mbu": 0.6,  # share of it that decoding reaches
    "nvlink": 300e9,  # bytes/s of each GPU within a node of eight, reached
    "network": 40e9,  # and between nodes
    "capacity": 80e9,
}
