"""What a number may be, in an option and in a file: one set of limits, which click (w4a8/cli) and the schemas read.

It imports nothing, since `--help` reads it.
"""

MOST = 2**31 - 1  # of what is counted and has no limit of its own
MOST_IMAGES = 1_000_000
MOST_STEPS = 100_000
MOST_ITERATIONS = 10_000_000
MOST_SIDE = 65_536  # of a latent, a layer, a table
MOST_SEED = 2**64 - 1
MOST_GUIDANCE = 100.0
MOST_RATE = 1e6  # of a learning rate, and of a regularizer's weight
MOST_LORA_SCALE = 1000.0
MOST_DECIBELS = 1000.0  # above and below 0
MOST_SECONDS = 1e9
MOST_THRESHOLD = 1e30  # of a range, and of what ranges are compared with
