from setuptools import find_packages, setup

# Configs, published numbers and the table of methods travel inside the package: an installed
# `mdistiller` needs no clone.
setup(
    packages=[
        *find_packages(include=["mdistiller*"]),
        *("mdistiller.configs", "mdistiller.pages", "mdistiller.results"),
    ],
    package_dir={
        "mdistiller.configs": "configs",
        "mdistiller.pages": "docs",
        "mdistiller.results": "docs/results",
    },
)
