"""transformers' own suite on our models, in a process of its own; its code is fetched, and kept nowhere here."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.ecosystem.fetch_suite import Unreachable, fetch

ROOT = Path(__file__).parents[2]
MODELS = ("Mamba2Test", "GatedDeltaNetTest", "HybridTest", "TransformerTest")


def test_our_models_pass_transformers_own_tests(tmp_path):
    try:
        suite = fetch()
    except Unreachable as reason:
        if os.environ.get("LOGLINEAR_NETWORK"):  # the gate has one
            raise
        pytest.skip(str(reason))
    paths = os.pathsep.join([str(suite), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/ecosystem/transformers_suite_models.py",
        "-q",
        "-o",
        "addopts=",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
    ]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
    passed: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            passed[case.attrib["classname"].rpartition(".")[2]] += 1
    assert set(passed) >= set(MODELS) and min(passed[name] for name in MODELS) > 70, passed
