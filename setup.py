"""What pyproject.toml cannot say: the shipped weights, which lie beside the package, are installed inside it."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["amsdn*"]), "amsdn.weights"], package_dir={"amsdn.weights": "weights"})
