"""The data and the configuration of the training program."""

import gzip
import sys
from pathlib import Path

import pytest
import torch

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(autouse=True, scope="module")
def programs():
    """launch/ is a folder of programs, not a package: its modules are found beside the one that is
    started."""
    before = set(sys.modules)
    sys.path.insert(0, str(LAUNCH))
    yield
    sys.path.remove(str(LAUNCH))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(LAUNCH)):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["temporal_order", "drawn_images", "text"])
def test_batches_are_drawn_by_step_and_seed(name):
    import data

    draw, again, other = getattr(data, name)(0), getattr(data, name)(0), getattr(data, name)(1)
    (x, y), (x2, y2) = draw(3, 8), again(3, 8)
    assert torch.equal(x, x2) and torch.equal(y, y2) and len(x) == len(y) == 8
    assert not torch.equal(x, draw(4, 8)[0]) and not torch.equal(x, other(3, 8)[0])


def test_the_classes_of_temporal_order():
    import data

    x, y = data.temporal_order(0)(0, 400)
    symbols = x.argmax(-1)
    marks = [[s for s in row if s < 2] for row in symbols.tolist()]
    assert [2 * first + second for first, second in marks] == y.tolist() and set(y.tolist()) == {
        0,
        1,
        2,
        3,
    }


def idx(shape, values):
    return (
        bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + bytes(values)
    )


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path, packed):
    import data

    images = [i % 251 for i in range(3 * 784)]
    for name, content in (
        ("train-images-idx3-ubyte", idx((3, 28, 28), images)),
        ("train-labels-idx1-ubyte", idx((3,), [7, 1, 4])),
    ):
        (tmp_path / (name + packed * ".gz")).write_bytes(
            gzip.compress(content) if packed else content
        )
    x, y = data.idx_images(str(tmp_path), 0)(0, 64)
    whole = torch.tensor(images).reshape(3, 28, 28) / 255
    assert set(y.tolist()) == {7, 1, 4}
    assert all(
        torch.allclose(image, whole[[7, 1, 4].index(label)]) for image, label in zip(x, y.tolist())
    )


WRONG = {
    "absent": (
        None,
        "train-images-idx3-ubyte(.gz) is not there; put the four idx files of Fashion-MNIST",
    ),
    "not idx": (
        b"<html>not found</html>",
        "is no idx file of bytes: its header says [], 18 bytes follow; fetch it again",
    ),
    "cut short": (
        idx((3, 28, 28), [0] * 100),
        "is no idx file of bytes: its header says [3, 28, 28], 100 bytes follow; fetch it again",
    ),
    "other images": (
        idx((3, 5, 5), [0] * 75),
        "(3, 5, 5) images and 3 labels; expected 28 x 28 images and as many labels",
    ),
}


@pytest.mark.parametrize("content, words", WRONG.values(), ids=WRONG)
def test_idx_files_that_are_no_good(tmp_path, content, words):
    import data

    if content is not None:
        (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx((3,), [7, 1, 4]))
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        data.idx_images(str(tmp_path), 0)
    assert words in str(error.value)


@pytest.mark.parametrize("last", [False, True])
def test_the_command_line_goes_over_the_file(tmp_path, last):
    import config

    (tmp_path / "a.yaml").write_text(
        "model: gpt\ntraining: {lr: 0.5, steps: 7}\ndata: {name: text}\n"
    )
    file, line = (
        ["--config", str(tmp_path / "a.yaml")],
        ["--training.lr", "0.25", "--inject.kind=nan"],
    )
    read = config.read(line + file if last else file + line)
    assert (
        read.model,
        read.training.lr,
        read.training.steps,
        read.inject.kind,
        read.data.name,
    ) == ("gpt", 0.25, 7, "nan", "text")
    assert read.training.batch == 64 and read.clip.threshold is None, "the rest is as it was"


@pytest.mark.parametrize(
    "path", sorted((LAUNCH.parent / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_configuration_can_be_read(path):
    import config

    read = config.read(["--config", str(path)])
    assert read.training.steps > 0


@pytest.mark.parametrize("value", ["many", "1.5"])
def test_a_wrong_type_is_told(value):
    import config

    with pytest.raises(SystemExit, match=f"^training.steps: expected int, got {value}$"):
        config.read(["--training.steps", value])
