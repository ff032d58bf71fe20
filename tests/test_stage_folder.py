"""calibration_store/stage_folder.py: the life of a stage, alone and as one of several ranks."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from calibration_store.errors import StoreError
from calibration_store.files import TEMP_SUFFIX, files_matching, write_json
from calibration_store.schema import JsonFormat
from calibration_store.stage_folder import StageFolder

PLAN = JsonFormat(None, dict[str, Any], "x.py")


class Paths:
    """A stage that keeps items beside a plan."""

    def __init__(self, root: Path):
        self.root = root
        self.plan = root / "plan.json"

    def owned_files(self) -> list[Path]:
        return files_matching(self.root, r"plan\.json|done\.json|item_\d\.json")


def stage(root: Path, **flags) -> StageFolder:
    paths = Paths(root)
    return StageFolder(paths, paths.plan, PLAN, lambda path: json.loads(path.read_text()), {"size": "--size"}, **flags)


def fill(folder: StageFolder, plan: dict, items: list[int]) -> list[int]:
    """Go through a stage's life; returns what it made."""
    root = folder.paths.root
    with folder.held():
        folder.check(plan)
        todo = folder.todo(items, lambda item: (root / f"item_{item}.json").exists())
        folder.begin(plan)
        for item in todo:
            write_json(root / f"item_{item}.json", {})
        folder.finish(lambda: write_json(root / "done.json", plan))
    return todo


def test_begins_goes_on_and_starts_over(tmp_path):
    root, plan = tmp_path / "run", {"size": 3}
    assert fill(stage(root), plan, [0, 1]) == [0, 1]
    with pytest.raises(StoreError, match="holds a run already: --resume goes on with it, --force starts over"):
        fill(stage(root), plan, [0, 1, 2])
    assert fill(stage(root, resume=True), plan, [0, 1, 2]) == [2]
    (root / f".item_0.json.abc{TEMP_SUFFIX}").write_text("half")
    assert fill(stage(root, force=True), {"size": 4}, [0]) == [0]
    assert sorted(path.name for path in root.iterdir()) == ["done.json", "item_0.json", "plan.json"]
    assert json.loads((root / "plan.json").read_text()) == {"size": 4}


def test_other_options_are_refused_by_name_unless_they_may_change(tmp_path):
    fill(stage(tmp_path), {"size": 3}, [0])
    with pytest.raises(StoreError, match="has --size 3, not 5; give the same value, use --force"):
        stage(tmp_path, resume=True).check({"size": 5})
    assert stage(tmp_path, resume=True).check({"size": 5}, may_change=("size",)) == {"size": 3}
    assert stage(tmp_path, resume=True).before(size=5) is None
    with pytest.raises(StoreError, match="made from another calibration run"):
        stage(tmp_path, resume=True).check({"size": 3, "calibration_run": "b"})
    (tmp_path / "plan.json").unlink()
    with pytest.raises(StoreError, match=r"files without plan\.json; use --force"):
        stage(tmp_path, resume=True).check({"size": 3})


def test_a_second_run_is_refused_and_a_dry_run_leaves_nothing(tmp_path):
    root = tmp_path / "run"
    with stage(root).held(dry_run=True):
        assert not root.exists()
    with stage(root).held():
        with pytest.raises(StoreError, match="another process is writing here"), stage(root).held():
            pass
        with stage(root).held(dry_run=True):
            pass
    assert not root.exists()  # empty: removed again


def test_ranks_share_a_folder(tmp_path):
    """Rank 0 creates, notes and finishes; the others wait, and find the plan; each does its own items."""
    barrier, plan = threading.Barrier(2), {"size": 4}

    class Rank:
        def __init__(self, rank: int):
            self.rank = rank

        def barrier(self) -> None:
            barrier.wait(10)

    found = {}

    def work(rank: int) -> None:
        folder = stage(tmp_path / "run", ranks=Rank(rank))
        with folder.held():
            if rank == 0:
                folder.check(plan)
            folder.begin(plan)
            found[rank] = json.loads((tmp_path / "run/plan.json").read_text())
            for item in range(rank, 4, 2):
                write_json(tmp_path / f"run/item_{item}.json", {})
            folder.finish(
                lambda: write_json(tmp_path / "run/done.json", {"items": len(folder.paths.owned_files()) - 1})
            )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: plan, 1: plan}
    assert json.loads((tmp_path / "run/done.json").read_text()) == {"items": 4}
