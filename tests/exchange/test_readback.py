"""Numbers of the host in a message's memory."""

import copy
import math
import struct

import pytest
import torch

from distclip.exchange.readback import HostVector, Readback


def test_numbers_and_tensor_share_their_memory():
    vector = HostVector(3)
    vector.write([1.0, -math.inf, 0.1])
    assert vector.tensor.tolist() == [1.0, -math.inf, 0.1]
    vector.tensor.mul_(2)
    assert vector.read() == [2.0, -math.inf, 0.2]
    vector.write([math.nan, 5e-324, 1e308])
    assert math.isnan(vector.read()[0]) and vector.tensor[1:].tolist() == [5e-324, 1e308]


def test_its_length_is_fixed():
    for numbers in ([1.0, 2.0], [1.0] * 4):
        with pytest.raises(struct.error):
            HostVector(3).write(numbers)


def test_a_copy_has_memory_of_its_own():
    vector = HostVector(2)
    other = copy.deepcopy(vector)
    vector.write([1.0, 2.0])
    other.write([3.0, 4.0])
    assert (vector.tensor.tolist(), other.tensor.tolist()) == ([1.0, 2.0], [3.0, 4.0])
    assert torch.equal(other.tensor, torch.tensor(other.read(), dtype=torch.float64))


def test_what_is_left_to_be_judged_is_not_a_copys():
    readback = Readback()
    readback.enqueue(torch.tensor([1.0, 2.0]), "step 1")
    other = copy.deepcopy(readback)
    assert other.dequeue() is None
    assert readback.dequeue() == ([1.0, 2.0], "step 1")
