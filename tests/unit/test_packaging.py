"""A wheel holds every module: setuptools is given the packages by name, because kernels/ stands beside sana_jax/."""

import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parents[2]


def packages(folder, prefix=""):
    """Names of the folders that hold modules, `folder` and those in it."""
    return {prefix + ".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / folder).rglob("*.py")}


def test_every_folder_with_modules_is_a_package_of_the_wheel():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(named) == sorted(packages("sana_jax") | packages("kernels", "sana_jax."))
