"""Limits of numbers: the same for options (click, in w4a8/cli) and for files (the schemas of this package).

This module imports nothing, since `--help` loads it.
"""

MOST = 2**31 - 1  # limit of every count that has no limit of its own
MOST_IMAGES = 1_000_000
MOST_STEPS = 100_000
MOST_ITERATIONS = 10_000_000
MOST_SIDE = 65_536  # length of one side of a latent, a layer or a table
MOST_SEED = 2**64 - 1
MOST_GUIDANCE = 100.0
LEAST_SHIFT, MOST_SHIFT = 1e-3, 1e3  # of a sampler's schedule
MOST_RATE = 1e6  # limit of a learning rate, and of a regularizer's weight
MOST_LORA_SCALE = 1000.0
MOST_DECIBELS = 1000.0  # limit of the magnitude, in dB
MOST_SECONDS = 1e9
MOST_THRESHOLD = 1e30  # limit of a range, and of a threshold that ranges are compared with
