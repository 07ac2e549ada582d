# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Models in files of users' own: found, loaded, served, and loaded anew while a driver uses them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.homes import connector, socket_path
from tests.support.service import refused, serving
from vdpa_bridge import connect
from vdpa_bridge.device import Device
from vdpa_bridge.drivers import GenericDriver
from vdpa_bridge.models import ModelCode

COUNTER = """
from collections.abc import Mapping

from vdpa_bridge.models import Field, Model


class Counter(Model):
    device_id = 77
    queue_count = 1
    layout = (Field("step", "I"),)

    def __init__(self, step=STEP):
        self.step, self.count = step, 0

    @classmethod
    def from_options(cls, options):
        return cls(int(options["step"])) if "step" in options else cls()

    def process(self, queues, index):
        for chain in queues[index].pop():
            self.count += self.step
            queues[index].push([(chain, chain.write(b"%d" % self.count))])

    def snapshot(self):
        return {"count": self.count}

    def restore(self, state):
        self.count = state["count"]
"""


def write(path: Path, text: str) -> None:
    """As editors do: another file takes the place of the old one."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


@pytest.fixture
def file() -> Iterator[Path]:
    with socket_path() as socket:
        path = Path(socket).with_name("counter.py")
        path.write_text(COUNTER.replace("STEP", "1"))
        yield path


@pytest.mark.parametrize("suffix", ["", ":Counter"])
def test_a_file_is_a_target(file: Path, suffix: str) -> None:
    with connect(f"model:{file}{suffix}?step=5") as device, GenericDriver(device) as driver:
        assert device.identify().device_id == 77
        assert (driver.ask(0, room=8), driver.ask(0, room=8)) == (b"5", b"10")
        assert driver.read_config(4) == (5).to_bytes(4, "little")


def test_a_module_is_a_target() -> None:
    with connect("model:vdpa_bridge.models.rng:RngModel") as device, GenericDriver(device) as driver:
        assert len(driver.ask(0, room=64)) == 64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", r"counter\.py has no single model; there is: none; write .*counter\.py:CLASS"),
        (COUNTER.replace("STEP", "1") + "\n\nclass Other(Counter):\n    pass\n", "no single model; there is: Counter, Other"),
        ("\n\n1 / 0\n", r"counter\.py does not load: ZeroDivisionError: division by zero \(line 3\)"),
        ("\ndef broken(:\n", r"does not load: SyntaxError: .*\(line 2\)"),
        ("from vdpa_bridge.models import Model\nclass Half(Model):\n    device_id = 77\n", "there is: none"),
    ],
)
def test_files_that_are_no_model(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        connect(f"model:{file}")


def test_what_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        connect("model:./nowhere.py")
    with pytest.raises(ValueError, match=r"no_such_module does not load: ModuleNotFoundError"):
        connect("model:no_such_module:Class")
    with pytest.raises(ValueError, match=r"vdpa_bridge\.models\.rng has no model Missing; there is: .*RngModel"):
        connect("model:vdpa_bridge.models.rng:Missing")
    said = refused("model:disk", "--socket-path", "s", status=2)
    assert "unknown model 'disk'" in said
    assert "or FILE.py with a model of your own" in said


def test_options_that_a_model_does_not_take(file: Path) -> None:
    write(file, COUNTER.replace("STEP", "1").replace("from_options", "unused"))
    with pytest.raises(ValueError, match="Counter has no option step"):
        connect(f"model:{file}?step=5")


def test_code_knows_when_its_file_changes(file: Path) -> None:
    code = ModelCode(str(file))
    assert not code.changed, "nothing was loaded yet"
    first = code.load()
    assert not code.changed
    write(file, COUNTER.replace("STEP", "2"))
    assert code.changed
    assert code.load() is not first
    assert not code.changed
    os.unlink(file)
    assert not code.changed, "an editor may be about to put another one there"


def test_code_is_loaded_anew_under_a_driver(file: Path) -> None:
    path = file.with_name("s")
    with serving(f"model:{file}", "--socket-path", str(path), "--reload") as server:
        server.ready()
        with Device(connector(str(path), "77", "require")()) as device, GenericDriver(device) as driver:
            assert (driver.ask(0, room=8), driver.ask(0, room=8)) == (b"1", b"2")
            write(file, COUNTER.replace("STEP", "100"))
            server.logs("reload: .*counter.py was loaded again")
            assert driver.ask(0, room=8) == b"102", "new code, old state"
            assert driver.read_config(4) == (100).to_bytes(4, "little")

            write(file, COUNTER.replace("STEP", "nonsense"))
            server.logs("NameError.*nonsense.*the model is what it was")
            assert driver.ask(0, room=8) == b"202"

            write(file, COUNTER.replace("STEP", "3").replace("queue_count = 1", "queue_count = 2"))
            server.logs("queue_count was 1 and would be 2: that takes a new device; the model is what it was")
            assert driver.ask(0, room=8) == b"302"

            write(file, COUNTER.replace("STEP", "1000"))
            end = time.monotonic() + 10
            while server.log.count("was loaded again") < 2:
                assert time.monotonic() < end, server.log
                time.sleep(0.01)
            assert driver.ask(0, room=8) == b"1302"
        server.end()


def test_without_asking_for_it_code_stays(file: Path) -> None:
    path = file.with_name("s")
    with serving(f"model:{file}", "--socket-path", str(path)) as server:
        server.ready()
        write(file, COUNTER.replace("STEP", "100"))
        time.sleep(1)
        with Device(connector(str(path), "77", "require")()) as device, GenericDriver(device) as driver:
            assert driver.ask(0, room=8) == b"1"
        server.end()
        assert not server.log
