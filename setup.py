"""Packages sparse_attention.

`python setup.py bdist_wheel` compiles the ops into the wheel, for the minor version of
TensorFlow that it finds here; such a wheel needs no compiler. Without TensorFlow or a
compiler the wheel holds the sources alone, and the first op call compiles them.
"""

import os
import re
import shutil
import sys
import sysconfig

from setuptools import find_packages, setup

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

HERE = os.path.dirname(os.path.abspath(__file__))


class BdistWheelWithOps(bdist_wheel):
    def run(self):
        build_lib = self.get_finalized_command("build").build_lib
        # A file that the package no longer has would go into the wheel, and the libraries
        # are known by the files that they were made of.
        shutil.rmtree(build_lib, ignore_errors=True)
        has_ops = ship_ops(os.path.join(build_lib, "sparse_attention", "prebuilt"))
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


with open(
    os.path.join(HERE, "sparse_attention", "__init__.py"), encoding="utf-8"
) as file:
    version = re.search(r'^__version__ = "(.*)"$', file.read(), re.MULTILINE).group(1)

setup(
    name="sparse_attention",
    version=version,
    description="Block-sparse fused attention for TensorFlow, on CPUs and GPUs",
    author="sparse_attention authors",
    license="MIT",
    packages=find_packages(include=["sparse_attention*"]),
    package_data={"sparse_attention": ["py.typed", "csrc/*/*.*", "csrc/cuda/*/*.*"]},
    python_requires=">=3.7",
    install_requires=["numpy"],
    extras_require={"tf": ["tensorflow>=1.15"]},
    cmdclass={"bdist_wheel": BdistWheelWithOps},
)
