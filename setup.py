"""Packages sparse_attention.

`python setup.py bdist_wheel` compiles the ops into the wheel, for the minor version of
TensorFlow that it finds here; such a wheel needs no compiler. Without TensorFlow or a
compiler the wheel holds the sources alone, and the first op call compiles them. With
`--kernels FOLDER` the wheel also ships the CUDA kernels that

    python -m sparse_attention.build --arch sm_80,sm_90a --out FOLDER

put there; they need no NVRTC.
"""

import ast
import os
import re
import shutil
import sys
import sysconfig

import setuptools
from setuptools import find_packages, setup

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

HERE = os.path.dirname(os.path.abspath(__file__))


class BdistWheelWithOps(bdist_wheel):
    user_options = [
        *bdist_wheel.user_options,
        (
            "kernels=",
            None,
            "folder of CUDA kernels to ship, see sparse_attention.build",
        ),
    ]

    def initialize_options(self):
        super().initialize_options()
        self.kernels = None

    def run(self):
        build_lib = self.get_finalized_command("build").build_lib
        # A file that the package no longer has would go into the wheel, and the libraries
        # are known by the files that they were made of.
        shutil.rmtree(build_lib, ignore_errors=True)
        prebuilt = os.path.join(build_lib, "sparse_attention", "prebuilt")
        has_ops = ship_ops(prebuilt)
        if self.kernels is not None:
            shutil.copytree(self.kernels, os.path.join(prebuilt, "kernels"))
        if has_ops and not self.plat_name_supplied:
            # The ops depend on the platform, and on no version of Python.
            self.plat_name, self.plat_name_supplied = sysconfig.get_platform(), True
        super().run()


def ship_ops(folder):
    shutil.rmtree(folder, ignore_errors=True)
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        return False
    sys.path.insert(0, HERE)
    from sparse_attention.native import libraries

    for name in filter(libraries.is_for_tensorflow, libraries.LIBRARIES):
        path = libraries.library(name)
        if path is None and name == "attention_xla":
            continue  # not every TensorFlow ships the headers that it needs
        if path is None:
            return False
        shipped = os.path.join(folder, os.path.basename(libraries.prebuilt(name)))
        os.makedirs(folder, exist_ok=True)
        shutil.copy(path, shipped)
        shutil.copy(path + ".json", shipped + ".json")
    return True


def metadata():
    """What setuptools before 61 does not read from pyproject.toml by itself."""
    if int(setuptools.__version__.split(".")[0]) >= 61:
        return {}
    with open(os.path.join(HERE, "pyproject.toml"), encoding="utf-8") as file:
        tables = dict(x.split("]\n", 1) for x in file.read().split("\n[")[1:])

    def value(key, table="project"):
        line = re.search(f"^{key} = (.*)$", tables[table], re.M).group(1)
        return ast.literal_eval(line)  # such a line of TOML is one of Python

    with open(os.path.join(HERE, value("readme")), encoding="utf-8") as file:
        readme = file.read()
    init = os.path.join(HERE, "sparse_attention", "__init__.py")
    with open(init, encoding="utf-8") as file:
        version = re.search(r'^__version__ = "(.*)"$', file.read(), re.M).group(1)
    return {
        "name": value("name"),
        "version": version,
        "description": value("description"),
        "long_description": readme,
        "long_description_content_type": "text/markdown",
        "python_requires": value("requires-python"),
        "install_requires": value("dependencies"),
        "extras_require": {"tf": value("tf", "project.optional-dependencies")},
    }


setup(
    packages=find_packages(include=["sparse_attention*"]),
    package_data={"sparse_attention": ["py.typed", "csrc/*/*.*", "csrc/cuda/*/*.*"]},
    cmdclass={"bdist_wheel": BdistWheelWithOps},
    **metadata(),
)
