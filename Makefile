.PHONY: docs
docs:   ## the site, in _docs/ (pip install -e ".[docs]")
	python nbs/_site/build.py
