"""Any number of threads, callers and forks; sharding; memory. What is large is read only once."""

import mmap
import os
import select
import sys
import threading
import warnings

import pytest
import torch

from distclip.kernels import pool, tensor_list
from distclip.kernels.pool import POOL
from kernels.native_cases import BLOCK, DTYPES, NO_LIBRARY, NORMS, addresses, layout_of, randn

pytestmark = pytest.mark.skipif(NO_LIBRARY, reason="no compiled library")
SIZES = [3, 40 * BLOCK + 5, 0, 1000, 7 * BLOCK, 64, 20 * BLOCK - 1]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "own pool"])
def asked(request, monkeypatch):
    """Who helps, and how many threads each call asked for."""
    team, calls = pool.torchs_threads(), []
    if request.param == "own pool":
        monkeypatch.setattr(pool, "torchs_threads", lambda: None)
        start = POOL.request_help
        monkeypatch.setattr(
            POOL,
            "request_help",
            lambda helpers, work: (calls.append(helpers + 1), start(helpers, work)),
        )
    elif team is None:
        pytest.skip("torch computes with another runtime than gcc's")
    else:
        monkeypatch.setattr(
            pool, "torchs_threads", lambda: lambda *call: (calls.append(call[2]), team(*call))
        )
    return calls


@pytest.fixture
def mixed():
    return [randn(size, DTYPES[i % 4], seed=i) for i, size in enumerate(SIZES)]


def everything(tensors):
    """Bits of all that a call can answer or write, at each p."""
    layout, pointers = layout_of(tensors), addresses(tensors)
    values = torch.linspace(0.1, 2, len(tensors), dtype=torch.float64)
    answers = [layout.power_sums(pointers, p) for p in NORMS] + [
        layout.clamped_sums(pointers, values, p) for p in (1.0, 2.0)
    ]
    copies = [tensor.clone() for tensor in tensors]
    layout.scale_(addresses(copies), values)
    layout.clamp_(addresses(copies), 0.7)
    return answers + copies


def test_threads_do_not_change_a_bit(threads, mixed, asked):
    threads(1)
    want = everything(mixed)
    assert not asked
    for count in (2, 3, 4):
        threads(count)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(everything(mixed), want, strict=True))
    assert set(asked) == {2, 3, 4}


def test_torchs_threads_are_asked_all(threads, asked):
    """Three blocks for eight threads: a smaller team would end some of torch's threads."""
    threads(8)
    grad = torch.ones(3 * BLOCK)
    assert layout_of([grad]).power_sums(addresses([grad]), 2.0).item() == 3 * BLOCK
    assert asked == [8 if pool.torchs_threads() else 3]


def test_callers_at_once_share_a_layout(threads, mixed, asked):
    threads(2)
    layout, pointers = layout_of(mixed), addresses(mixed)
    others = [randn(tensor.numel(), tensor.dtype, seed=99) for tensor in mixed]
    wants = [layout.power_sums(pointers, 2.0), layout.power_sums(addresses(others), 2.0)]
    assert not torch.equal(*wants)
    wrong, done = [], []

    def call(which):
        mine = [pointers, addresses(others)][which]
        for _ in range(50):
            if not torch.equal(layout.power_sums(mine, 2.0), wants[which]):
                wrong.append(which)
        done.append(which)

    callers = [threading.Thread(target=call, args=(i % 2,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=600)
    assert sorted(done) == [0, 0, 1, 1] and not wrong and set(asked) == {2}


def test_scaling_by_threads_touches_each_element_once(threads, asked):
    threads(4)
    tensors = [torch.ones(size) for size in (5 * BLOCK + 1, 10, 3 * BLOCK, BLOCK, 9 * BLOCK + 7)]
    layout, pointers = layout_of(tensors), addresses(tensors)
    for _ in range(20):
        layout.scale_(pointers, 0.5)
    assert all((tensor == 0.5**20).all() for tensor in tensors) and set(asked) == {4}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_starts_its_own_threads(threads, mixed, asked):
    """The runtime of torch's threads would wait there for threads that did not come along."""
    threads(2)
    want = everything(mixed)
    assert asked
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12: threads are running; they hold nothing
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        answer = b"failed"
        try:
            layout, pointers = layout_of(mixed), addresses(mixed)
            started = POOL._started
            same = all(
                torch.equal(layout.power_sums(pointers, p), w)
                for p, w in zip(NORMS, want, strict=False)
            )
            answer = b"same" if same and started == 0 and POOL._started >= 1 else b"other"
        finally:
            os.write(writer, answer)
            os._exit(0)
    ready, _, _ = select.select([reader], [], [], 600)
    answer = os.read(reader, 10) if ready else b"never came"
    if not ready:
        os.kill(child, 9)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    assert answer == b"same"


@pytest.mark.parametrize("kind", ["normal", "constant", "wide"])
def test_float32_norms_have_the_same_bits_over_shards(kind):
    for seed in range(20):
        grad = randn(3 * BLOCK + 4099 * seed, torch.float32, seed)
        grad = {
            "normal": grad,
            "constant": torch.full_like(grad, 0.1 + seed),
            "wide": grad * 10 ** (5 * grad),
        }[kind]
        norms = set()
        for shards in (1, 2, 4, 8):
            parts = list(grad.chunk(shards))
            norms.add(
                layout_of(parts).power_sums(addresses(parts), 2.0).sum().sqrt().float().item()
            )
        assert len(norms) == 1


def test_a_dense_tensor_in_another_order_of_dimensions():
    image = (
        randn(2 * 3 * 8 * 9, torch.float32)
        .reshape(2, 3, 8, 9)
        .to(memory_format=torch.channels_last)
    )
    turned = randn(600, torch.bfloat16).reshape(20, 30).t()
    gaps = randn(600, torch.float32)[::2]
    tensors = tensor_list.TensorList.of([image, turned, gaps])
    assert list(tensors.fallback) == [2]
    before = [tensor.clone() for tensor in (image, turned, gaps)]
    assert tensors.power_sums(2.0).tolist() == pytest.approx(
        [t.double().square().sum().item() for t in before], rel=1e-6
    )
    tensors.scale_(0.5)
    assert all(
        torch.equal(tensor, old * 0.5)
        for tensor, old in zip((image, turned, gaps), before, strict=True)
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_copies(threads):
    threads(2)

    def status(key):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

    tensors = [torch.ones(1 << 23, dtype=dtype) for dtype in DTYPES] + [
        torch.ones(10) for _ in range(5000)
    ]
    everything([torch.ones(9 * BLOCK)])  # the library and its threads are there
    layout, pointers = layout_of(tensors), addresses(tensors)
    try:
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
    except OSError:
        pytest.skip("the peak cannot be reset here")
    before = status("VmRSS")
    for p in NORMS[1:3]:
        layout.power_sums(pointers, p)
        layout.clamped_sums(pointers, torch.tensor(0.5).double(), p)
    layout.scale_(pointers, 0.5)
    layout.clamp_(pointers, 0.1)
    assert status("VmHWM") - before < (4 << 20) + 32 * len(tensors)


def test_many_elements_are_right_to_the_last_digits(threads):
    threads(2)
    grad = torch.empty(1 << 27)  # 0.5 GiB
    source = torch.Generator().manual_seed(1)
    piece = torch.randn(1 << 20, generator=source)
    for part in grad.split(1 << 20):
        part.copy_(piece)
    grad[-1] = 100.0
    want = 128 * piece.double().square().sum().item() - piece[-1].item() ** 2 + 100.0**2
    assert layout_of([grad]).power_sums(addresses([grad]), 2.0).item() == pytest.approx(
        want, rel=1e-12
    )


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs memory that is not there until it is written"
)
def test_more_elements_than_32_bits_count(threads):
    threads(2)
    count = (1 << 31) + BLOCK + 3
    # never written, all pages are the one zero page: 4 GiB that take no memory
    nothing = mmap.mmap(-1, 2 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    grad = torch.frombuffer(nothing, dtype=torch.bfloat16)
    grad[0], grad[1 << 31], grad[-1] = 3.0, -4.0, 12.0
    layout, pointers = layout_of([grad]), addresses([grad])
    assert layout.power_sums(pointers, 2.0).item() == 169
    assert layout.power_sums(pointers, float("inf")).item() == 12
    del grad
