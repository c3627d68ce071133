"Drift guards: one place of metadata, modules equal to their notebooks, README equal to its notebook."
import configparser
import filecmp
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

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


def cells(path): return [dict(c, source="".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


NUMBERED = sorted((ROOT/"nbs").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_exported_cells_are_short(path):
    "At most 40 lines, directives not counted."
    for c in cells(path):
        if c["cell_type"] != "code" or not re.search(r"^#\|\s*export", c["source"], re.M): continue
        names = re.findall(r"^(?:def|class) (\w+)", c["source"], re.M)
        n = sum(not l.startswith("#|") for l in c["source"].strip("\n").split("\n"))
        assert n <= 40, f"{path.name}: the cell of {', '.join(names)} has {n} lines: split it"


@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_four_cells_in_ten_are_text(path):
    "Share of text cells among all cells: 35 to 50 %."
    kinds = [c["cell_type"] for c in cells(path)]
    share = kinds.count("markdown")/len(kinds)
    assert .35 <= share <= .5, f"{path.name}: {share:.0%} of its cells are text"


def test_versions_agree():
    "One version: settings.ini, the package, the newest numbered section of the changelog, the citation."
    v = settings()["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", v) and curvtools.__version__ == v
    assert re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT/"CHANGELOG.md").read_text(), re.M)[0] == v
    assert re.search(r"^version: (\S+)", (ROOT/"CITATION.cff").read_text(), re.M)[1] == v


def test_the_package_is_typed_and_its_settings_name_it():
    assert (ROOT/"curvtools"/"py.typed").exists() and "py.typed" in (ROOT/"setup.py").read_text()
    for extra in ("docs", "gguf", "weightwatcher", "lm_eval"): assert settings()[f"{extra}_requirements"].split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy, so that nothing is left here."
    pytest.importorskip("setuptools", minversion="77")
    tmp_path = tmp_path_factory.mktemp("wheel")
    for p in ("curvtools", "settings.ini", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff"):
        (shutil.copytree if (ROOT/p).is_dir() else shutil.copy)(ROOT/p, tmp_path/p)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path/"dist", tmp_path], check=True)
    return next((tmp_path/"dist").glob("*.whl"))


def test_the_wheel_holds_what_the_package_needs(wheel):
    "Every module, the bundled models, the Lab's notebook, the mark of a typed package, the command."
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        meta = z.read(next(n for n in names if n.endswith("METADATA"))).decode()
        entry = z.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    want = {str(p.relative_to(ROOT)) for p in (ROOT/"curvtools").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert want <= names and "curvtools/py.typed" in names
    assert not [n for n in names if n.startswith(("tests", "nbs"))]
    assert "curvtools=curvtools.cli:main" in entry.replace(" ", "") and f"Version: {settings()['version']}" in meta
    assert all(f"Provides-Extra: {x}" in meta for x in ("dev", "docs", "gguf", "lm-eval", "weightwatcher"))
    assert wheel.stat().st_size < 16_000_000


ALONE = """
import pathlib, sys, curvtools, curvtools.all
from curvtools.cli import _lab_notebook
assert pathlib.Path(curvtools.__file__).is_relative_to(sys.argv[1]), curvtools.__file__
curvtools.all.playground(), curvtools.all.load_vit()
from curvtools.check import exercises; exercises(1)
print(_lab_notebook("."))
"""


def test_the_wheel_alone_works(wheel, tmp_path):
    "Unpacked and run from an empty folder, without the repository: all modules, both models, the exercises, the Lab's notebook."
    (tmp_path/"empty").mkdir()
    with zipfile.ZipFile(wheel) as z: z.extractall(tmp_path/"site")
    r = subprocess.run([sys.executable, "-c", ALONE, tmp_path/"site"], cwd=tmp_path/"empty", env=dict(os.environ, PYTHONPATH=str(tmp_path/"site")), capture_output=True, text=True)
    assert r.returncode == 0 and "curvtools-lab.ipynb" in r.stdout, r.stderr
