"""Data made on the spot, drawn by step number: every rank draws the global batch and takes its
slice, and a resumed run sees the same."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from refusal import Refused

Batches = Callable[[int, int], tuple[Tensor, Tensor]]  # (step, global batch size) → inputs, targets


def temporal_order(seed: int, length: int = 50) -> Batches:
    """Which of A and B came first and second, with distractors between (Pascanu, Mikolov, Bengio
    2013, section 4): 4 classes."""

    def draw(step: int, size: int) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(seed * 1_000_003 + step)
        symbols = torch.randint(2, 6, (size, length), generator=source)
        first, second = torch.randint(0, 2, (2, size), generator=source)
        at = torch.arange(size)
        symbols[at, torch.randint(5, 11, (size,), generator=source)] = first
        symbols[at, torch.randint(25, 31, (size,), generator=source)] = second
        return torch.nn.functional.one_hot(symbols, 6).float(), 2 * first + second

    return draw


def drawn_images(seed: int) -> Batches:
    """28 x 28 images of ten patterns of stripes with noise: no file needed."""
    grid = torch.arange(28) / 28
    rows, columns = grid[:, None].expand(28, 28), grid[None, :].expand(28, 28)
    patterns = torch.stack(
        [torch.sin(6.28 * (1 + k % 5) * (rows if k < 5 else columns)) for k in range(10)]
    )

    def draw(step: int, size: int) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(seed * 1_000_003 + step)
        labels = torch.randint(0, 10, (size,), generator=source)
        return patterns[labels] + torch.randn(size, 28, 28, generator=source), labels

    return draw


def idx_images(folder: str, seed: int) -> Batches:
    """Fashion-MNIST's (or MNIST's) training files from `folder`.

    Raises:
        FileNotFoundError, ValueError: a file is absent or is not in idx format; the text says which
            and where to get it.
    """
    images = read_idx(Path(folder), "train-images-idx3-ubyte").float() / 255
    labels = read_idx(Path(folder), "train-labels-idx1-ubyte").long()
    if images.shape[1:] != (28, 28) or len(images) != len(labels):
        raise ValueError(
            f"{folder}: {tuple(images.shape)} images and {len(labels)} labels; "
            f"expected 28 x 28 images and as many labels"
        )

    def draw(step: int, size: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(
            0,
            len(images),
            (size,),
            generator=torch.Generator().manual_seed(seed * 1_000_003 + step),
        )
        return images[chosen], labels[chosen]

    return draw


def read_idx(folder: Path, name: str) -> Tensor:
    """One idx file of bytes, plain or .gz, as a uint8 tensor."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            break
    else:
        raise FileNotFoundError(
            f"{folder / name}(.gz) is not there; put the four idx files of Fashion-MNIST "
            f"(github.com/zalandoresearch/fashion-mnist) "
            "into data.folder, or leave data.folder empty for images made on the spot"
        )
    dims = data[3] if len(data) > 4 and data[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    body = data[4 + 4 * dims :]
    if not dims or torch.Size(shape).numel() != len(body):
        raise ValueError(
            f"{path} is no idx file of bytes: its header says {shape}, {len(body)} "
            f"bytes follow; fetch it again"
        )
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(shape)


TEXT = (
    "The norm of the gradient is the length of the step that the data ask for. When it is large "
    "the data do not want more, they "
    "only shout louder, and whoever follows each shout will soon stand far from every path. So "
    "measure first, over all that take "
    "part, and agree on one number; then shorten the step, all by the same measure, and go on in "
    "the direction that was meant. "
    "Who measures alone clips alone, and workers that clip alone drift apart without a sound. "
)


def text(seed: int, context: int = 64) -> Batches:
    """Windows of the text above, as bytes; the target is the next byte."""
    codes = torch.tensor(list((TEXT * 4).encode()))

    def draw(step: int, size: int) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(0, len(codes) - context - 1, (size, 1), generator=source)
        window = codes[starts + torch.arange(context + 1)]
        return window[:, :-1], window[:, 1:]

    return draw


def make_data(model: str, name: str, folder: str, seed: int) -> Batches:
    """Refused for data that the model does not read."""
    if {"recurrent": "temporal_order", "lstm": "images", "gpt": "text"}[model] != name:
        raise Refused(
            f"data.name={name!r} does not fit model={model!r}; recurrent reads "
            f"temporal_order, lstm images, gpt text"
        )
    if name == "images":
        try:
            return idx_images(folder, seed) if folder else drawn_images(seed)
        # the last two of a .gz that was cut short
        except (OSError, ValueError, EOFError, zlib.error) as error:
            raise Refused(f"data.folder={folder!r}: {error}") from None
    return (temporal_order if name == "temporal_order" else text)(seed)
