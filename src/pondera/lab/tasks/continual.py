"""Ten tasks in a row by one net: scikit-learn's digits, their pixels in another order in every task; accuracy at each task's end.

No task comes back, so what counts is not what is forgotten but whether the net still learns: one that is trained long at a
high rate learns later tasks less well than the first (loss of plasticity). The score is the accuracy on unseen images
at the end of each task, mean over tasks. Orders of pixels follow the seed, and the rate stays where it is.
"""

import copy
from itertools import pairwise

import torch
from torch import nn

settings = {"steps": 900, "batch": 50, "bounds": [0.0, 1.0]}
TASKS = 10


def build():
    sizes = (64, 48, 48, 48)
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(48, 10))


def data():
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def train(run):
    draw = torch.Generator().manual_seed(run.seed)
    orders = [torch.randperm(64, generator=draw) for _ in range(TASKS)]
    feed, ends, done = run.batches(), [], 0
    for k, order in enumerate(orders):
        until = run.steps * (k + 1) // TASKS
        for _ in range(done, until):
            x, y = next(feed)
            run.optimizer.zero_grad()
            run.loss(nn.functional.cross_entropy(run.model(x[:, order]), y)).backward()
            run.optimizer.step()
        done = until
        ends.append(copy.deepcopy(run.model).eval())

    @torch.no_grad()
    def score(part):
        x, y = part
        right = [(net(x[:, order]).argmax(-1) == y).float().mean() for net, order in zip(ends, orders)]
        return float(torch.stack(right).mean())

    return score
