"Every notebook is also a test; plain `pytest` covers them all (nbdev-test runs the same cells). Tutorials: test_tutorials."
import os
import pathlib

import nbdev.test as nt   # not `from nbdev.test import test_nb`: pytest would collect it
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NBS = [p for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if not p.name.startswith(("_", ".")) and not {".ipynb_checkpoints", "tutorials"} & set(p.parts)]


@pytest.mark.parametrize("nb", NBS, ids=lambda p: p.stem)
def test_notebook(nb):
    cwd = pathlib.Path.cwd()
    try: ok, secs = nt.test_nb(nb, skip_flags=["notest", "slow", "gpu"], basepath=ROOT)
    finally: os.chdir(cwd)
    assert ok
