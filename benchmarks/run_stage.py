"""Run a stage in this process, then say what it took: python benchmarks/run_stage.py STAGE.py [ARGUMENT]..."""

import importlib
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

started = time.perf_counter()
code = 0
try:
    importlib.import_module(Path(sys.argv[1]).stem).main(sys.argv[2:])
except SystemExit as end:
    code = end.code
resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
mlx = sys.modules.get("mlx.core")  # the analyzers need none
peak = mlx.get_peak_memory() if mlx else 0
print(f"\n[took] {time.perf_counter() - started:.2f} s, {peak} bytes MLX, {resident} bytes resident")
sys.exit(code)
