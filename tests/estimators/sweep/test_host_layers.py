"""Layers that wait in memory go to a GPU in a stream of their own, ahead of their use."""

import contextlib

import pytest
import torch

from bitknap.estimators.sweep.host_layers import HostLayers

GPU = torch.device("cuda", 0)


class Pretended:
    """A tensor that says what is done with it."""

    nbytes = 8

    def __init__(self, name, events):
        self.name, self.events = name, events

    def _said(self, what):
        self.events.append(f"{what} {self.name}")
        return self

    def pin_memory(self):
        return self._said("pin")

    def to(self, device, *, non_blocking):
        assert (device, non_blocking) == (GPU, True)
        return self._said(f"copy in {Streams.entered}")

    def record_stream(self, stream):
        assert isinstance(stream, Streams)
        self._said(f"used by {stream.name}")


class Streams:
    """torch's streams: the one that computes, and the layers' own."""

    entered = "computing"

    def __init__(self, device, name="own"):
        self.name, self.waits = name, []

    def wait_stream(self, other):
        self.waits.append(other.name)


@pytest.fixture
def computing(monkeypatch):
    @contextlib.contextmanager
    def entered(stream):
        Streams.entered = stream.name
        yield
        Streams.entered = "computing"

    stream = Streams(GPU, "computing")
    monkeypatch.setattr(torch.cuda, "Stream", Streams)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return stream


@pytest.fixture
def free(monkeypatch):
    """Return a list whose last entry is how many bytes are free on the GPU."""
    sizes = [1 << 30]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (sizes[-1], 1 << 30))
    return sizes


def layers_on(keep):
    events: list[str] = []

    def read(place):
        events.append(f"read {place}")
        return {"weight": Pretended(place, events)}

    return HostLayers(GPU, read, keep=keep), events


def test_a_layer_is_read_once_and_sent_ahead(computing, free):
    layers, events = layers_on(keep=True)
    assert not layers.send(0)  # none is read before its turn
    layers.take(0)
    first = ["read 0", "pin 0", "copy in own 0", "used by computing 0"]
    assert events == first
    assert computing.waits == ["own"]
    layers.take(1)
    assert layers.send(0)
    events.clear()
    layers.take(0)
    assert events == ["used by computing 0"]
    assert layers.send(1)
    layers.take(0)  # another one than was expected
    assert events[1:] == ["copy in own 1", "copy in own 0", "used by computing 0"]


def test_layers_that_do_not_fit_in_memory_are_read_each_time(computing):
    layers, events = layers_on(keep=False)
    for _ in range(2):
        layers.take(0)
        assert not layers.send(0)
    assert events == 2 * ["read 0", "copy in own 0", "used by computing 0"]


def test_a_full_device_gets_the_layer_in_its_turn(computing, free):
    layers, events = layers_on(keep=True)
    layers.take(0)
    free.append(7)
    assert layers.send(0)
    layers.take(0)
    assert events[-2:] == ["copy in own 0", "used by computing 0"]
    free.append(8)
    assert layers.send(0)
    assert events[-1] == "copy in own 0"
    layers.take(0)
    free.append(0)  # torch holds on to what it had
    events.clear()
    assert layers.send(0)
    assert events == ["copy in own 0"]
