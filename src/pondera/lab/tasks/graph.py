"""Node classification by a graph net: 1,797 digits joined to their 5 nearest neighbours, 20 a class labelled; accuracy.

The images are real (scikit-learn's 8x8 digits), the graph is made here: an edge joins two images one of which is among the
5 nearest of the other by pixels. An example is the number of a node; features and edges of all nodes, those of the test
too, are inside the model, so the task is transductive. Training sees 200 labels, the score is accuracy on the 1,597 others.
"""

from functools import cache
from itertools import pairwise

import torch
from torch import nn

settings = {"steps": 150, "batch": 256}
NEIGHBOURS, LABELS = 5, 20
DEPTH, WIDTH = 3, 64


@cache
def graph():
    """Features (pixels from 0 to 1), undirected edges (2, edges) and classes of all nodes."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    x, y = load_digits(return_X_y=True)
    near = kneighbors_graph(x, NEIGHBOURS)
    edges = np.stack(((near + near.T) > 0).nonzero()).astype(np.int64)
    return torch.tensor(x / 16).float(), torch.tensor(edges), torch.tensor(y)


class GraphNet(nn.Module):
    """Plain GCN layers with ReLU between; forward takes numbers of nodes and gives their scores."""

    def __init__(self):
        from torch_geometric.nn import GCNConv

        super().__init__()
        x, edges, y = graph()
        self.register_buffer("x", x)
        self.register_buffer("edges", edges)
        widths = [x.shape[1], *[WIDTH] * (DEPTH - 1), int(y.max()) + 1]
        self.convs, self.act = nn.ModuleList(GCNConv(a, b) for a, b in pairwise(widths)), nn.ReLU()

    def forward(self, nodes):
        h = self.x
        for i, conv in enumerate(self.convs):
            h = conv(self.act(h) if i else h, self.edges)
        return h[nodes]


def build():
    return GraphNet()


def data():
    _, _, y = graph()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    rank = nn.functional.one_hot(y[order]).cumsum(0).gather(1, y[order, None]).squeeze(1)  # 1, 2, ... within a class
    train, test = order[rank <= LABELS], order[rank > LABELS]
    return (train, y[train]), (test, y[test])
