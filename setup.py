"Build `curvtools` from the metadata in settings.ini, the one place where it is kept."
import configparser
import pathlib

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
ini = configparser.ConfigParser(delimiters=["="])
ini.read(here/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
extras = {"gguf": cfg["gguf_requirements"].split(), "accelerate": cfg["accelerate_requirements"].split(), "weightwatcher": cfg["weightwatcher_requirements"].split(), "lm-eval": cfg["lm_eval_requirements"].split(), "docs": cfg["docs_requirements"].split()}
extras["dev"] = cfg["dev_requirements"].split() + extras["gguf"] + extras["accelerate"] + extras["lm-eval"] + extras["docs"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    author=cfg["author"], author_email=cfg["author_email"], license=cfg["license"],
    keywords=cfg["keywords"].split(), url=cfg["git_url"], python_requires=">=" + cfg["min_python"],
    long_description=(here/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["py.typed", "static/*", "static/*/*"]},
    install_requires=cfg["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f'{cfg["lib_path"]} = {cfg["lib_path"]}._modidx:d']},
)
