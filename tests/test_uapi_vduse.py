# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The numbers and layouts of vduse/uapi.py against <linux/vduse.h>, by a compiled probe."""

from __future__ import annotations

import shutil
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdpa_bridge.vduse import uapi

NUMBERS = {
    "GET_API_VERSION", "SET_API_VERSION", "CREATE_DEV", "DESTROY_DEV", "IOTLB_GET_FD", "DEV_GET_FEATURES", "DEV_SET_CONFIG",
    "DEV_INJECT_CONFIG_IRQ", "VQ_SETUP", "VQ_GET_INFO", "VQ_SETUP_KICKFD", "VQ_INJECT_IRQ",
}  # fmt: skip
CONSTANTS = {
    "VDUSE_NAME_MAX": uapi.NAME_MAX,
    "VDUSE_GET_VQ_STATE": uapi.Message.GET_VQ_STATE,
    "VDUSE_SET_STATUS": uapi.Message.SET_STATUS,
    "VDUSE_UPDATE_IOTLB": uapi.Message.UPDATE_IOTLB,
    "VDUSE_REQ_RESULT_OK": uapi.OK,
    "VDUSE_REQ_RESULT_FAILED": uapi.FAILED,
}
FIELDS: dict[str, tuple[struct.Struct, str]] = {
    "struct vduse_dev_config": (uapi.DEV_CONFIG, "name vendor_id device_id features vq_num vq_align config_size"),
    "struct vduse_iotlb_entry": (uapi.IOTLB_ENTRY, "offset start last perm"),
    "struct vduse_config_data": (uapi.CONFIG_DATA, "offset length"),
    "struct vduse_vq_config": (uapi.VQ_CONFIG, "index max_size"),
    "struct vduse_vq_info": (uapi.VQ_INFO, "index num desc_addr driver_addr device_addr split.avail_index - - - ready"),
    "struct vduse_vq_eventfd": (uapi.VQ_EVENTFD, "index fd"),
    "struct vduse_dev_request": (uapi.REQUEST, "type request_id padding"),
    "struct vduse_dev_response": (uapi.RESPONSE, "request_id result padding"),
    "struct vduse_vq_state": (uapi.VQ_STATE, "index split.avail_index - - -"),
}
"""C struct, our layout, and the C name of each of its values; - where the union's other member goes on."""


def offsets(layout: struct.Struct) -> list[int]:
    """Where each value of *layout* begins, as packing a single one that is not 0 shows."""
    zeros = [b"" if isinstance(value, bytes) else 0 for value in layout.unpack(bytes(layout.size))]
    found = []
    for at, zero in enumerate(zeros):
        values = [*zeros]
        values[at] = b"\1" if zero == b"" else 1
        found.append(layout.pack(*values).index(1))
    return found


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What <linux/vduse.h> says."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc and the kernel's headers: tools/setup base")
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <sys/ioctl.h>", "#include <linux/vduse.h>", "int main(void) {"]
    lines += [f'printf("{name} %lld\\n", (long long){name});' for name in [*CONSTANTS, *(f"VDUSE_{name}" for name in NUMBERS)]]
    for name, (_, fields) in FIELDS.items():
        lines.append(f'printf("{name.replace(" ", "_")} %zu\\n", sizeof({name}));')
        lines += [f'printf("{name.replace(" ", "_")}.{field} %zu\\n", offsetof({name}, {field}));' for field in fields.split() if field != "-"]
    path = tmp_path_factory.mktemp("vduse")
    (path / "probe.c").write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run(["gcc", "-o", str(path / "probe"), str(path / "probe.c")], check=True, timeout=60)
    out = subprocess.run([str(path / "probe")], check=True, capture_output=True, text=True, timeout=10).stdout
    return {name: int(value) for name, value in map(str.split, out.splitlines())}


def test_numbers(header: dict[str, int]) -> None:
    assert {name: header[f"VDUSE_{name}"] for name in NUMBERS} == {name: getattr(uapi, name) for name in NUMBERS}
    assert {name: header[name] for name in CONSTANTS} == CONSTANTS


@pytest.mark.parametrize("name", FIELDS)
def test_layouts(header: dict[str, int], name: str) -> None:
    layout, fields = FIELDS[name]
    word = name.replace(" ", "_")
    assert header[word] == layout.size
    for field, offset in zip(fields.split(), offsets(layout), strict=True):
        assert field == "-" or header[f"{word}.{field}"] == offset, field


@given(st.integers(0, (1 << 32) - 1))
def test_states_of_packed_rings(base: int) -> None:
    """The kernel keeps index and counter apart; a vring base has the counter in bit 15."""
    state = uapi.unpack_state(base)
    assert uapi.pack_state(state) == base
    assert state == (base >> 15 & 1, base & 0x7FFF, base >> 31, base >> 16 & 0x7FFF)

