"""Train the network of 14 layers on several processes, each with a part of every batch.

    pip install ".[demo,dask]" distributed
    python bench/dask_training.py                # a LocalCluster of two processes
    python bench/dask_training.py --workers 0    # the same sums in this process alone
    python bench/dask_training.py --scheduler tcp://somewhere:8786

A step gives every part the parameters, and adds up what comes back in the order of the
parts, whichever worker had them and whenever it was done.  So the loss is that of one
process that does the parts in turn, to the last bit where products are formed alike.
"""

import argparse
import contextlib
import functools
import pickle

import dask
import numpy as np
from threadpoolctl import threadpool_limits

from fastrelu import nn
from fastrelu.cli import training


def gradients(pickled, x, labels, share):
    """What a part of a batch adds to the loss and to the gradients of its mean."""
    model = pickle.loads(pickled)
    loss, grad = nn.softmax_cross_entropy(model.forward(x), labels)
    model.backward(grad * np.float32(share))
    return [loss * share, *(p.grad for p in model.parameters)]


def added(parts):
    """The sums over parts, one after another"""
    return [sum(each[1:], start=each[0]) for each in zip(*parts, strict=True)]


def step(model, optimiser, x, labels, parts, give):
    """Learn from a batch; return the loss before that."""
    pickled = give(pickle.dumps(model))
    rows = np.array_split(np.arange(len(x)), parts)
    work = [
        dask.delayed(gradients)(pickled, x[r], labels[r], len(r) / len(x)) for r in rows
    ]
    (loss, *sums), *_ = dask.compute(dask.delayed(added)(work))
    for parameter, grad in zip(model.parameters, sums, strict=True):
        parameter.add_grad(grad)
    optimiser.step()
    return float(loss)


def train(give, activation="relu", steps=100, parts=2, batch=256, seed=0, lr=0.02):
    """Train on scikit-learn's digits; yield the loss of every step.

    `give` has all workers get an object before they are asked to use it.
    """
    rng, digits = np.random.default_rng(seed), training.load_digits(seed)
    model = training.network(activation, rng)
    optimiser = nn.SGD(model.parameters, lr, momentum=0.9)
    for i in range(steps):
        rows = rng.integers(0, len(digits.train_x), batch)
        optimiser.lr = lr * min(1.0, (i + 1) / 20)
        x, labels = digits.train_x[rows], digits.train_y[rows]
        yield step(model, optimiser, x, labels, parts, give)


@contextlib.contextmanager
def cluster(workers, scheduler):
    """Have what is computed meanwhile computed there; give what `train` wants."""
    if not workers and not scheduler:
        # Products on one thread, as in a worker: several may round otherwise.
        with dask.config.set(scheduler="synchronous"), threadpool_limits(1):
            yield dask.delayed
        return
    from distributed import Client, LocalCluster

    with contextlib.ExitStack() as stack:
        if not scheduler:
            options = {"n_workers": workers, "threads_per_worker": 1}
            options |= {"dashboard_address": ":0"}
            scheduler = stack.enter_context(LocalCluster(**options))
        client = stack.enter_context(Client(scheduler))
        yield functools.partial(client.scatter, broadcast=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scheduler", help="of a cluster that is there already")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--parts", type=int, default=2, help="of a batch")
    parser.add_argument("--activation", default="relu", choices=training.ACTIVATIONS)
    args = parser.parse_args()
    with cluster(args.workers, args.scheduler) as give:
        losses = train(give, args.activation, args.steps, args.parts)
        for i, loss in enumerate(losses):
            if i % 10 == 0 or i == args.steps - 1:
                print(f"step {i + 1}: loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
