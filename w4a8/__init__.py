"""What the stages compute with. Importing it costs next to nothing; its modules import what they use."""

from w4a8 import blas  # noqa: F401  (before MLX)
