"""The memory that an iteration of stage 3W takes, as a function of the number of samples at once."""

from dataclasses import dataclass

from w4a8.backend.parallel import working_cores

# The peak of an iteration as it was measured on a CPU (benchmarks/peak_memory.py --fit) is that of the first iteration
# that tunes the grids. It counts arrays of the unit's weights in float32 (the weights, floors, α, moments, codes,
# gradients, the state before), arrays (rows, tokens, hidden) of a sample in a block's backward pass, and attention
# scores. A share of a sample's arrays is there once, another share once for each block.
WEIGHT_ARRAYS, TRAINING_TOKEN_ARRAYS, TRAINING_SCORE_ARRAYS = 10, 86, 1.95
ONCE, EACH_BLOCK = 0.37, 0.61
# With 16-bit products, measured on an H200 (benchmarks/rounding_cost.py). Attention keeps no scores there; elsewhere it
# keeps those of a few tokens.
HALF_WEIGHT_ARRAYS, HALF_TOKEN_ARRAYS, HALF_SCORE_ARRAYS = 14, 55, 4
TRAINING_SHARE, MOST_MEMORY = 0.75, 20e9  # share of the device's memory that an iteration may take, and bytes in all
MOST_HALF_MEMORY = 16.2e9


@dataclass(frozen=True)
class IterationBytes:
    """Bytes of a unit's float32 weights, bytes of one sample in one block, the number of blocks, and the products."""

    weights: int
    sample: int
    blocks: int
    half: bool = False  # products have 16 bits

    @classmethod
    def of_shapes(
        cls, weights: int, arrays: int, scores: int, some_scores: int, blocks: int, half: bool
    ) -> "IterationBytes":
        """Return the bytes of a unit.

        weights: number of its weights; arrays and scores: elements of a token array and of all scores of a sample;
        some_scores: of the scores that are in memory at once with 16-bit products; half: products have 16 bits.
        """
        elements = TRAINING_TOKEN_ARRAYS * arrays + TRAINING_SCORE_ARRAYS * scores
        if half:
            elements = HALF_TOKEN_ARRAYS * arrays + HALF_SCORE_ARRAYS * some_scores
        return cls(4 * weights, 4 * int(elements), blocks, half)

    def peak(self, samples: int) -> int:
        """Return the peak in bytes with this number of samples at the same time."""
        arrays = HALF_WEIGHT_ARRAYS if self.half else WEIGHT_ARRAYS
        return int(arrays * self.weights + samples * (ONCE + EACH_BLOCK * self.blocks) * self.sample)

    def fits(self, samples: int, memory: int) -> bool:
        """Return whether this number of samples at the same time leaves room in a memory of so many bytes."""
        most = MOST_HALF_MEMORY if self.half else MOST_MEMORY
        return self.peak(samples) <= min(TRAINING_SHARE * memory, most)

    def micro_batch(self, batch_size: int, memory: int) -> int:
        """Return the largest micro-batch that fits the memory in bytes, at least 1; a CPU's cores share the batch."""
        streams = min(working_cores(), batch_size)
        parts = range(streams, batch_size + 1)  # micro-batches of about the same size
        sizes = (-(-batch_size // count) for count in parts)
        return next((size for size in sizes if self.fits(size * streams, memory)), 1)
