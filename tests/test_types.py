"The annotations are true as far as mypy can tell; what it is not asked for is in pyproject.toml, room by room."
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
pytest.importorskip("mypy")


def test_mypy(tmp_path):
    r = subprocess.run([sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr


def test_a_wrong_call_is_found(tmp_path):
    "So that the settings do not silence everything a user needs."
    (tmp_path/"user.py").write_text("from curvtools.data import windows\nfrom curvtools.kfac import collect, Factors\nx: int = collect(None, None)\ncollect(1)\ncollect(None, None, sed=3)\n")
    r = subprocess.run([sys.executable, "-m", "mypy", "--config-file", ROOT/"pyproject.toml", "--follow-imports=silent", "--cache-dir", tmp_path/"c", tmp_path/"user.py"],
                       cwd=ROOT, capture_output=True, text=True)
    assert all(f"user.py:{n}:" in r.stdout for n in (3, 4, 5)), r.stdout + r.stderr
