"""Run by test_hub.py in a process of its own: stage 1 over a hub cache whose SD3-Medium is tiny."""

import dataclasses
import sys

import diffusion
from benchmarks.random_sd3_medium import SD3_MEDIUM, write_hub_cache

TINY = dataclasses.replace(
    diffusion.HUB_MMDIT_CONFIGS[SD3_MEDIUM], depth_multimodal=2, num_heads=2, max_latent_resolution=64
)

if __name__ == "__main__":
    if sys.argv[1] == "write":
        from pathlib import Path

        write_hub_cache(Path(sys.argv[2]), TINY)
    else:
        import generate_calibration_data

        diffusion.HUB_MMDIT_CONFIGS[SD3_MEDIUM] = TINY
        generate_calibration_data.main()
