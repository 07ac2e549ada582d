# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""The table of operations against the kernel's own headers, by a compiled probe; and against itself.

What the installed headers are too old for is compared with the numbers in uapi-numbers.json, which are themselves
compared with every header that has them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vdpa_bridge import _ioctl, ops, tap, wire
from vdpa_bridge.backends import vhost_kernel, vhost_net, vhost_vsock
from vdpa_bridge.flags import BackendFeature
from vdpa_bridge.vhost_user.vdpa_mode import HELLO_OP
from vdpa_bridge.wire import ConfigData, ConfigRange, Empty, IotlbPayload, Struct

NUMBERS: dict[str, Any] = json.loads(Path(__file__).with_name("uapi-numbers.json").read_text())
IOCTLS = [op for op in ops.TABLE if op.msgtype is None]

STRUCTS: dict[str, tuple[type[Struct], dict[str, str]]] = {
    "struct vhost_vring_state": (wire.VringState, {}),
    "struct vhost_vring_file": (wire.VringFile, {}),
    "struct vhost_vring_addr": (wire.VringAddr, {"desc": "desc_user_addr", "used": "used_user_addr", "avail": "avail_user_addr", "log": "log_guest_addr"}),
    "struct vhost_vdpa_iova_range": (wire.IovaRange, {}),
    "struct vhost_msg_v2": (wire.IotlbMsg, {**{f: f"iotlb.{f}" for f in ("iova", "size", "uaddr", "perm")}, "msgtype": "iotlb.type"}),
}
"""C struct, our class, and C names of fields where they differ."""

CONSTANTS = {
    "VHOST_ACCESS_RO": wire.RO,
    "VHOST_ACCESS_WO": wire.WO,
    "VHOST_ACCESS_RW": wire.RW,
    "VHOST_IOTLB_MSG_V2": wire.IOTLB_MSG_V2,
    "VHOST_IOTLB_UPDATE": wire.IotlbUpdate.msgtype,
    "VHOST_IOTLB_INVALIDATE": wire.IotlbInvalidate.msgtype,
    "VHOST_IOTLB_BATCH_BEGIN": wire.IotlbBatchBegin.msgtype,
    "VHOST_IOTLB_BATCH_END": wire.IotlbBatchEnd.msgtype,
    "VHOST_VIRTIO": _ioctl.VHOST,
    "VHOST_FILE_UNBIND": -1,
    "VHOST_SET_MEM_TABLE": vhost_kernel.SET_MEM_TABLE,
    "VHOST_NET_SET_BACKEND": vhost_net.NET_SET_BACKEND,
    "VHOST_VSOCK_SET_GUEST_CID": vhost_vsock.VSOCK_SET_GUEST_CID,
    "VHOST_VSOCK_SET_RUNNING": vhost_vsock.VSOCK_SET_RUNNING,
    **{name: getattr(tap, f"_{name}") for name in ("TUNSETIFF", "TUNSETOFFLOAD", "TUNSETVNETHDRSZ", "TUNSETVNETLE", "TUNSETCARRIER")},
    **{name: getattr(tap, f"_{name}") for name in ("IFF_TAP", "IFF_NO_PI", "IFF_VNET_HDR", "IFF_UP")},
    **{f"TUN_{name}": getattr(tap, name) for name in ("F_CSUM", "F_TSO4", "F_TSO6", "F_TSO_ECN")},
}
SIZES = {"struct vhost_vdpa_config": 8, "struct vhost_memory": 8, "struct ifreq": 40}
"""C structs that are no class of ours."""


def offsets(kind: type[Struct]) -> dict[str, int]:
    """Where each field of *kind* begins, as packing it shows."""
    found = {}
    for name in kind.names:
        values = {field: -1 if field == name and _code(kind, field) == "i" else int(field == name) for field in kind.names}
        found[name] = next(at for at, byte in enumerate(kind(**values).pack()) if byte)
    return found


def _code(kind: type[Struct], field: str) -> str:
    return kind.layout.format[1:][kind.names.index(field)]


def probe(tmp_path: Path, *flags: str) -> dict[str, int]:
    """Compile and run a program that prints what the headers define."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc and the kernel's headers: apt install gcc linux-libc-dev")
    lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <sys/ioctl.h>", "#include <sys/socket.h>"]
    lines += [f"#include <linux/{name}.h>" for name in ("types", "vhost", "if", "if_tun")] + ["int main(void) {"]
    names = [name for op in IOCTLS for name in (f"VHOST_{op.name}", f"VHOST_VDPA_{op.name}")]
    names += [f"VHOST_BACKEND_F_{feature.name}" for feature in BackendFeature] + list(CONSTANTS)
    for name in names:
        lines += [f"#ifdef {name}", f'printf("{name} %lld\\n", (long long)({name}));', "#endif"]
    for c_name, (kind, renamed) in STRUCTS.items():
        lines.append(f'printf("{c_name} %zu\\n", sizeof({c_name}));')
        for field in kind.names:
            lines.append(f'printf("{c_name}.{field} %zu\\n", offsetof({c_name}, {renamed.get(field, field)}));')
    lines += [f'printf("{name} %zu\\n", sizeof({name}));' for name in SIZES] + ["return 0; }"]
    source = tmp_path / "probe.c"
    source.write_text("\n".join(lines))
    program = tmp_path / "probe"
    subprocess.run(["gcc", *flags, "-o", str(program), str(source)], check=True, timeout=60)
    text = subprocess.run([str(program)], check=True, capture_output=True, text=True, timeout=10).stdout
    return {name: int(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines())}


def compare(found: dict[str, int]) -> set[str]:
    """Fail where headers and table differ; return the operations and features that the headers do not have."""
    missing = set()
    for op in IOCTLS:
        here = {found[name] for name in (f"VHOST_{op.name}", f"VHOST_VDPA_{op.name}") if name in found}
        assert here <= {op.number}, f"{op.name} is {op.number:#x}, the header says {[hex(n) for n in here]}"
        if not here:
            missing.add(op.name)
    for feature in BackendFeature:
        name = f"VHOST_BACKEND_F_{feature.name}"
        if name in found:
            assert 1 << found[name] == feature
        else:
            missing.add(name)
    for name, value in CONSTANTS.items():
        assert found[name] == value, name
    for c_name, (kind, _) in STRUCTS.items():
        assert found[c_name] == kind.layout.size, c_name
        assert {field: found[f"{c_name}.{field}"] for field in kind.names} == offsets(kind), c_name
    assert {name: found[name] for name in SIZES} == SIZES
    for name, (number, _) in NUMBERS["requests"].items():
        assert name not in found or found[name] == int(number, 16)
    for name, (bit, _) in NUMBERS["backend_features"].items():
        assert name not in found or found[name] == bit
    return missing


def test_installed_headers(tmp_path: Path) -> None:
    """What they lack must be in the file of numbers."""
    missing = compare(probe(tmp_path))
    listed = {name.removeprefix("VHOST_VDPA_") for name in NUMBERS["requests"]} | set(NUMBERS["backend_features"])
    assert missing <= listed, f"neither the header nor uapi-numbers.json has {missing - listed}"


@pytest.mark.peers
def test_headers_of_the_lab_kernel(tmp_path: Path) -> None:
    """They lack nothing."""
    kit = os.environ.get("VDPA_BRIDGE_KERNEL_DIR")
    found = sorted(Path(kit).glob("root/usr/src/linux-headers-*-common/include/uapi")) if kit else []
    if not found:
        pytest.skip('no kernel kit: eval "$(tools/setup kernel)"')
    (tmp_path / "linux").mkdir()
    for name in ("vhost.h", "vhost_types.h"):
        shutil.copy(found[-1] / "linux" / name, tmp_path / "linux")
    (tmp_path / "linux" / "compiler.h").touch()  # the kernel's own, for __user, which user space does without
    assert compare(probe(tmp_path, f"-I{tmp_path}", "-D__user=")) == set()


def test_numbers_of_the_file() -> None:
    for name, (number, since) in NUMBERS["requests"].items():
        op = ops.BY_NAME[name.removeprefix("VHOST_VDPA_")]
        assert op.number == int(number, 16)
        assert op.since == since
    for name, (bit, _) in NUMBERS["backend_features"].items():
        assert BackendFeature[name.removeprefix("VHOST_BACKEND_F_")] == 1 << bit


# The table against itself ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ops.TABLE, ids=lambda op: op.name)
def test_number_says_what_is_carried(op: ops.Op[Any, Any]) -> None:
    """Direction and size in the number, request and reply in the row: they agree."""
    assert _ioctl.kind(op.number) == _ioctl.VHOST
    direction = _ioctl.direction(op.number)
    size = _ioctl.size(op.number)
    if issubclass(op.request, IotlbPayload):
        assert op.number == ops.IOTLB
        assert (direction, size) == (_ioctl.IOC_WRITE, 72)
        assert op.reply is Empty
        return
    assert bool(direction & _ioctl.IOC_READ) == (op.reply is not Empty)
    asks = op.request is not Empty and op.request is not ConfigRange
    assert bool(direction & _ioctl.IOC_WRITE) == asks
    for kind in (op.request, op.reply):
        if kind in (ConfigRange, ConfigData):
            assert size == 8
        elif kind is not Empty:
            assert kind.layout.size == size


def test_rows_are_distinct_and_complete() -> None:
    keys = [(op.number, op.msgtype) for op in ops.TABLE]
    assert len(set(keys)) == len(keys)
    assert HELLO_OP.number not in {op.number for op in ops.TABLE}
    assert list(ops.BY_NAME) == [op.name for op in ops.TABLE]
    for op in ops.TABLE:
        assert op.doc
        assert tuple(map(int, op.since.split("."))) >= (5, 7)
        payload = wire.IotlbMsg(2, 0, wire.Iova(0), 0, 0, 0, op.msgtype).pack() if op.msgtype else b""
        assert ops.by_message(op.number, payload) is op
