from setuptools import find_packages, setup

# Configs and published numbers travel inside the package: an installed `mdistiller` needs no clone.
setup(
    packages=[*find_packages(include=["mdistiller*"]), "mdistiller.configs", "mdistiller.results"],
    package_dir={"mdistiller.configs": "configs", "mdistiller.results": "docs/results"},
)
