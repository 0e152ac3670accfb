"""The models that the training programs know."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Recurrent(nn.Module):
    """A plain ReLU network that starts as an integrator: sequences [batch, time, inputs] → logits
    [batch, classes]."""

    def __init__(self, inputs: int = 6, hidden: int = 64, classes: int = 4) -> None:
        super().__init__()
        self.rnn = nn.RNN(inputs, hidden, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(hidden, classes)
        with torch.no_grad():
            self.rnn.weight_hh_l0.copy_(torch.eye(hidden))
            self.rnn.weight_ih_l0.normal_(0, 0.1)
            self.head.weight.normal_(0, hidden**-0.5)
            for bias in (self.rnn.bias_hh_l0, self.rnn.bias_ih_l0, self.head.bias):
                bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class RowLSTM(nn.Module):
    """Reads an image row by row: [batch, 28, 28] → logits [batch, classes]."""

    def __init__(self, hidden: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.rnn = nn.LSTM(28, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        # rows of qkv are ordered by head: a tensor-parallel rank that holds a part of them holds
        # whole heads
        q, k, v = (
            self.qkv(self.norm1(x))
            .unflatten(-1, (-1, 3, x.shape[-1] // self.heads))
            .transpose(1, 2)
            .unbind(3)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A small language model on bytes: [batch, time] int64 → logits [batch, time, 256]."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def make_model(name: str, seed: int) -> nn.Module:
    """Equal weights on every rank."""
    torch.manual_seed(seed)
    return {"recurrent": Recurrent, "lstm": RowLSTM, "gpt": GPT}[name]()
