# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The native extension; everything static is in pyproject.toml."""

from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    ext_modules=cythonize(
        Extension(
            "vdpa_bridge._virtqueue",
            sources=["vdpa_bridge/_virtqueue.pyx", *sorted(glob("userspace/src/*.c"))],
            depends=["vdpa_bridge/_virtqueue.pxd", *sorted(glob("userspace/include/*.h"))],
            include_dirs=["userspace/include"],
            define_macros=[("_GNU_SOURCE", "1")],
            extra_compile_args=["-std=c11", "-O2", "-fvisibility=hidden"],
        ),
        build_dir="build",
        language_level=3,
    )
)
