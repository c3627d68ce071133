"Drift guards: one place of metadata, modules equal to their notebooks, README equal to its notebook."
import configparser
import filecmp
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import curvtools

tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later
ROOT = pathlib.Path(__file__).parents[1]


def settings():
    c = configparser.ConfigParser(delimiters=["="])
    c.read(ROOT/"settings.ini", encoding="utf-8")
    return c["DEFAULT"]


def test_settings_agree():
    t, s = tomllib.loads((ROOT/"pyproject.toml").read_text())["tool"]["nbdev"], settings()
    assert {k: s[k] for k in t} == {k: str(v) for k, v in t.items()}
    assert curvtools.__version__ == s["version"]


def test_modules_match_notebooks(tmp_path):
    for p in ("nbs", "curvtools", "settings.ini", "pyproject.toml"):
        (shutil.copytree if (ROOT/p).is_dir() else shutil.copy)(ROOT/p, tmp_path/p)
    for f in (tmp_path/"curvtools").glob("*.py"):
        if f.name != "__init__.py": f.unlink()   # so that a module without a notebook is found too
    subprocess.run([sys.executable, "-c", "import nbdev; nbdev.nbdev_export()"], cwd=tmp_path, check=True)
    have, made = ({f.name for f in (d/"curvtools").glob("*.py")} for d in (ROOT, tmp_path))
    assert have == made
    for f in have: assert filecmp.cmp(ROOT/"curvtools"/f, tmp_path/"curvtools"/f, shallow=False), f"{f} differs: run nbdev-export"


def test_readme_matches_index():
    made = subprocess.run([sys.executable, ROOT/"nbs"/"_readme.py", "--stdout"], capture_output=True, text=True, check=True).stdout
    assert made == (ROOT/"README.md").read_text(), "README.md differs from nbs/index.ipynb: run python nbs/_readme.py"


def test_the_packaged_lab_notebook_is_the_tutorial():
    own = ROOT/"curvtools"/"static"/"1_see_it_happen.ipynb"
    made = subprocess.run([sys.executable, ROOT/"nbs"/"_lab.py", "--stdout"], capture_output=True, text=True, encoding="utf-8", check=True).stdout
    assert made == own.read_text(encoding="utf-8"), "differs from nbs/tutorials/1_see_it_happen.ipynb: run python nbs/_lab.py"
    assert own.stat().st_size < 20_000


def test_notebooks_are_clean():
    for p in (ROOT/"nbs").rglob("*.ipynb"):
        nb = json.loads(p.read_text())
        assert all(c.get("id") for c in nb["cells"]), f"{p.name}: a cell without an id"
        assert not nb["metadata"].get("widgets"), f"{p.name}: widget state"
        assert p.stat().st_size < 1_500_000, p.name
        for c in nb["cells"]:
            for o in c.get("outputs", []): assert o["output_type"] != "error", f"{p.name}: an error is kept in cell {c['id']}"


def test_exported_code_is_plain():
    for p in (ROOT/"curvtools").glob("*.py"):
        if p.name == "_modidx.py": continue
        s = p.read_text()
        assert not re.search(r"^\s*(from|import) (nbdev|fastcore)", s, re.M), p.name
        assert not re.search(r"import pickle|torch\.load\(|matplotlib\.pyplot|import pyplot", s), p.name
