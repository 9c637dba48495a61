from setuptools import find_packages, setup

# The configs travel inside the package, so that an installed `mdistiller` needs no clone.
setup(
    packages=[*find_packages(include=["mdistiller*"]), "mdistiller.configs"],
    package_dir={"mdistiller.configs": "configs"},
)
