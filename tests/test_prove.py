"""Test tools/prove.py: its trials really happen, and losses are told; docs/results.md's figures are those of its dated files."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, interruptible

from tools import prove
from tools.prove import Proof

pytestmark = pytest.mark.slow

RESULTS = ROOT / "benchmarks/results"


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    few = {name: prove.STAGES[name] for name in ("1", "2A")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prove, "STAGES", few)
        patch.setattr(prove, "KILLED", list(few))
        made = Proof(tmp_path_factory.mktemp("prove") / "base", seed=1)
        assert list(made.prepare()) == ["1", "2A"]
    return made


def test_kills_are_counted_and_a_loss_is_told(proof):
    tally = proof.tallies["2A"]
    while tally.kills == tally.in_a_file or not tally.in_a_file:
        proof.trial("2A")
    assert tally.lost == []
    name = next(path for path in proof.expected["2A"] if path.endswith("layer_statistics.json"))
    proof.expected["2A"][name] += b" "
    proof.trial("2A")
    assert tally.lost[0][1] == f"1 files differ, {name}"
    proof.expected["2A"][name] = proof.expected["2A"][name][:-1]


def test_two_writers_and_a_full_disk(proof, monkeypatch):
    monkeypatch.setattr(prove, "WRITERS", ("2A",))
    assert proof.two_writers() == [("2A", None)]
    assert proof.full_disk() in (None, [("2A", None)])  # None: nobody may make a disk here
    assert proof.read_only() in (None, [("2A", None)])


def test_an_interrupted_proof_says_what_it_tried(tmp_path):
    command = [sys.executable, "tools/prove.py", "reliability", "--output", str(tmp_path / "proof.json")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    )
    assert process.stderr.readline() == "clean run: 1\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "interrupted; what was tried until then:\n", errors
    written = json.loads((tmp_path / "proof.json").read_bytes())
    assert written["interrupted"] and written["kills"] == 0 and "two writers: not tried" in output


def newest(kind):
    return max(RESULTS.glob(f"*-{kind}.json"), default=None)


def test_the_results_have_the_newest_proofs():
    readme = (ROOT / "docs/results.md").read_text()
    proof = json.loads(newest("reliability").read_bytes())
    assert f"{proof['kills']} kills, {proof['lost']} lost" in readme and newest("reliability").name in readme


@pytest.mark.parametrize("size", ["sd3-emoji", "sd3-medium"])
def test_the_results_have_the_newest_rehearsals(size):
    rehearsal, readme = json.loads(newest(f"rehearsal-{size}").read_bytes()), (ROOT / "docs/results.md").read_text()
    table = readme[readme.index(newest(f"rehearsal-{size}").name) :]
    for row in rehearsal["rows"]:
        script = row["stage"].split()[0]
        found = re.search(rf"\| `{script}` \| ([0-9.]+) s \|", table)
        assert found and float(found[1]) == pytest.approx(row["seconds"], abs=0.06), script
