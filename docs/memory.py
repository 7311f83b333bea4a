"""What training needs in memory, by the formulas of memory.md: `python docs/memory.py` prints its tables.

Counted, not measured: what a framework keeps besides (CUDA's own gigabyte, fragments, buffers) comes on top.
"""

from typing import NamedTuple

GB = 1e9
RANK = 16


class Shape(NamedTuple):
    """What decides how large a Llama-like model is."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool


SHAPES = (
    Shape("Qwen3-0.6B", 1024, 28, 3072, 16, 8, 128, 151_936, True),
    Shape("Qwen3-1.7B", 2048, 28, 6144, 16, 8, 128, 151_936, True),
    Shape("Qwen3-4B", 2560, 36, 9728, 32, 8, 128, 151_936, True),
    Shape("Qwen3-8B", 4096, 36, 12_288, 32, 8, 128, 151_936, False),
)


def linear_layers(shape: Shape) -> list[tuple[int, int]]:
    """Inputs and outputs of each linear layer of one block: q, k, v, o, gate, up, down."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = [(shape.hidden, queries), (shape.hidden, keys), (shape.hidden, keys), (queries, shape.hidden)]
    return [*attention, *[(shape.hidden, shape.intermediate)] * 2, (shape.intermediate, shape.hidden)]


def num_parameters(shape: Shape) -> int:
    """All weights: embeddings (once if tied), linear layers, norms (two a block, two of a head's size, one last)."""
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.is_tied else 2)
    block = sum(inputs * outputs for inputs, outputs in linear_layers(shape)) + 2 * shape.hidden + 2 * shape.head_dim
    return embeddings + shape.layers * block + shape.hidden


def num_adapter_parameters(shape: Shape, rank: int = RANK) -> int:
    """Of LoRA on every linear layer but the head."""
    return shape.layers * rank * sum(inputs + outputs for inputs, outputs in linear_layers(shape))


def fixed_bytes(shape: Shape, num_adapters: int = 0, num_copies: int = 0) -> int:
    """What stands still: 2 bytes a frozen weight, 16 a trained one (weight, gradient and Adam's two, fp32).

    Args:
        num_adapters: LoRA adapters on one frozen base; 0 trains all weights.
        num_copies: frozen copies of the base beside it, each with an adapter of its own.
    """
    own = 2 * num_parameters(shape) if num_adapters else 16 * num_parameters(shape)
    return (
        own + 2 * num_copies * num_parameters(shape) + 16 * (num_adapters + num_copies) * num_adapter_parameters(shape)
    )


def activation_bytes(shape: Shape, checkpointing: bool = True) -> int:
    """Of one token, bf16, attention without its matrix (SDPA, flash): with checkpointing each block's input alone."""
    if checkpointing:
        return 2 * shape.layers * shape.hidden
    inside = 4 * shape.hidden + (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim + 4 * shape.intermediate
    return 2 * shape.layers * inside


def cache_bytes(shape: Shape) -> int:
    """Keys and values of one token while answers are drawn, bf16."""
    return 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim


def fixed_table() -> str:
    """Fixed memory by model and trainer, GB."""
    kinds = {
        "likelihood, LoRA": (1, 0),
        "game or latent, LoRA": (2, 0),
        "likelihood, all weights": (0, 0),
        "game or latent, all weights": (0, 1),
    }
    rows = [f"| | parameters | one adapter | {' | '.join(kinds)} |", "|---" * (3 + len(kinds)) + "|"]
    for shape in SHAPES:
        cells = [
            f"{num_parameters(shape) / 1e9:.2f} B",
            f"{num_adapter_parameters(shape) / 1e6:.0f} M",
            *(f"{fixed_bytes(shape, *kind) / GB:.1f}" for kind in kinds.values()),
        ]
        rows.append(f"| {shape.name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def token_table() -> str:
    """Memory that grows with tokens, MB per 1 000 of them."""
    rows = ["| | backward, checkpointing | backward, without | cache while drawing |", "|---|---|---|---|"]
    for shape in SHAPES:
        each = (activation_bytes(shape), activation_bytes(shape, False), cache_bytes(shape))
        rows.append(f"| {shape.name} | " + " | ".join(f"{1000 * one / 1e6:.0f}" for one in each) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(fixed_table(), token_table(), sep="\n\n")
