"""The head of a small DETR, for examples/detr.py: queries that look at the features of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID = (8, 4)  # of the queries' reference points, across and down
WIDTH, HIDDEN, LAYERS = 96, 384, 3
REACH = (0.05, 0.1, 0.2, 0.3)  # how far each head of attention looks at first, of the image's side


class Layer(nn.Module):
    """Queries (B, Q, D) look at each other, then at the image.

    A query looks near a point, as in SMCA-DETR, so that a short training is enough. Where it looked
    on the average is the point of the next layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.look, self.seen = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.drop = nn.Dropout(0.1)
        self.reach = nn.Parameter(torch.tensor(REACH).log())
        self.trust = nn.Parameter(torch.zeros(len(REACH)))

    def forward(
        self, x: Tensor, where: Tensor, points: Tensor, keys: Tensor, values: Tensor, cells: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and their points (B, Q, 2) after this layer.

        `where` (Q, D) tells queries apart. Keys and values are (B, heads, h * w, D / heads), cells
        (h * w, 2) where they are.
        """
        y = self.norms[0](x)
        q, k, v = (_split(part) for part in (self.q(y + where), self.k(y + where), self.v(y)))
        x = x + self.drop(self.out(_join(F.scaled_dot_product_attention(q, k, v))))
        q = _split(self.look(self.norms[1](x) + where))
        # -(distance / reach)^2 / 2, up to what is the same for all cells
        near = points[:, None] @ cells.T - cells.square().sum(-1) / 2
        narrow = self.reach.exp().square().reciprocal()[:, None, None]
        attention = (q @ keys / q.shape[-1] ** 0.5 + near * narrow).softmax(-1)
        x = x + self.drop(self.seen(_join(attention @ values)))
        points = (attention @ cells * self.trust.softmax(0)[:, None, None]).sum(1)
        return x + self.drop(self.down(F.relu(self.up(self.norms[2](x))))), points


def _split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (len(REACH), -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Head(nn.Module):
    """Features (B, F, h, w) -> (B, Q, 4 + C + 1), as examples/detection.py reads it.

    One convolution makes the keys and values of all layers, so that every Linear reads queries.
    """

    def __init__(self, features: int, height: int, width: int, classes: int) -> None:
        super().__init__()
        self.memory = nn.Conv2d(features, 2 * WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(2 * WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.last = nn.LayerNorm(WIDTH)
        self.hidden, self.box = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.kind = nn.Linear(WIDTH, classes + 1)
        across, down = (torch.arange(0.5, n) / n for n in GRID)
        self.points = nn.Parameter(torch.cartesian_prod(across, down).logit())
        self.start, self.where = (
            nn.Parameter(torch.randn(len(self.points), WIDTH)) for _ in range(2)
        )
        self.place = nn.Parameter(torch.randn(WIDTH, height * width) * 0.02)
        y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
        self.register_buffer("cells", torch.cartesian_prod(y, x).flip(1))
        nn.init.constant_(self.box.bias, -1.5)  # a side is a fifth of the image's

    def forward(self, features: Tensor) -> Tensor:
        keys, values = self.norm(self.memory(features)).flatten(2).chunk(2, 1)
        keys, values = (x.unflatten(1, (len(REACH), -1)) for x in (keys + self.place, values))
        values = values.transpose(2, 3).contiguous()
        x = self.start.expand(features.shape[0], -1, -1)
        points = self.points.sigmoid().expand(features.shape[0], -1, -1)
        for layer in self.layers:
            x, points = layer(x, self.where, points, keys, values, self.cells)
        x = self.last(x)
        box = self.box(F.relu(self.hidden(x))) + F.pad(points.logit(), (0, 2))
        return torch.cat([box, self.kind(x)], -1)
