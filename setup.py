# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The native extensions; everything static is in pyproject.toml."""

from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

C_FLAGS = ["-std=c11", "-O2", "-fvisibility=hidden"]

setup(
    ext_modules=cythonize(
        [
            Extension(
                "vdpa_bridge._virtqueue",
                sources=["vdpa_bridge/_virtqueue.pyx", *sorted(glob("userspace/src/*.c"))],
                depends=[*sorted(glob("vdpa_bridge/*.px[di]")), *sorted(glob("userspace/include/*.h"))],
                include_dirs=["userspace/include"],
                define_macros=[("_GNU_SOURCE", "1")],
                extra_compile_args=C_FLAGS,
            ),
            Extension("vdpa_bridge.vhost_user.*", sources=["vdpa_bridge/vhost_user/*.pyx"], extra_compile_args=C_FLAGS),
        ],
        build_dir="build",
        language_level=3,
    )
)
