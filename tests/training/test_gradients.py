"""Gradients of cut and distributed batches against those of one batch in one process, in float64."""

import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from embedloom.training.data import Group, Teaching
from embedloom.training.gradients import GradientPass
from embedloom.training.losses import (
    DISTILLATION,
    LOSSES,
    Distillation,
    Objective,
    Prefixes,
    get_loss,
)

NAMES = [*sorted(LOSSES), "gemini+kl", "infonce+margin_mse"]


class MeanEmbedding(torch.nn.Module):
    """A stand-in for the encoder: mean of token vectors, a layer, dropout, norm 1."""

    def __init__(self, dropout=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = torch.nn.Parameter(torch.randn(40, 6, generator=generator, dtype=torch.float64))
        self.layer = torch.nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64))
        self.dropout = dropout

    def forward(self, groups):
        texts = [group.query for group in groups] + [text for group in groups for text in group.documents]
        means = torch.stack([self.table[torch.tensor(text)].mean(0) for text in texts])
        hidden = torch.nn.functional.dropout(torch.tanh(means @ self.layer), self.dropout)
        vectors = torch.nn.functional.normalize(hidden, dim=-1)
        return vectors[: len(groups)], vectors[len(groups) :].view(len(groups), -1, 6)


class FakeEngine:
    """What GradientPass uses of DeepSpeed: forward, backward, and gradients averaged over workers at the boundary."""

    def __init__(self, module):
        self.module = module
        self.is_boundary = False
        self.forwards = 0

    def __call__(self, groups):
        self.forwards += 1
        return self.module(groups)

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.is_boundary = is_boundary

    def backward(self, loss):
        loss.backward()
        if self.is_boundary and dist.is_initialized():
            for parameter in self.module.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def teaching_of(number):
    """Of groups whose last document may have no score, and whose sources have weights and temperatures of their own."""
    last = float("nan") if number % 3 == 0 else 0.4
    return Teaching(
        [0.9, 0.5 + number / 20, last], temperature=0.1 if number % 2 else 0.5, weight=1.0 + number
    )


def objective_of(name, prefixes=None):
    contrastive, _, taught = name.partition("+")
    distillation = Distillation(DISTILLATION[taught], 0.7) if taught else None
    return Objective(*get_loss(contrastive), 0.1, prefixes, distillation)


def make_batch():
    rng = np.random.default_rng(3)

    def text():
        return rng.integers(0, 40, rng.integers(1, 7)).tolist()

    batch = [Group(f"g{i}", text(), [text() for _ in range(3)], teaching=teaching_of(i)) for i in range(7)]
    batch[5].documents[0] = list(batch[1].documents[0])  # something for the duplicate masks
    return batch


def run(name, micro_batches, counts, rank=0, dropout=0.0, prefixes=None):
    """Losses of this worker and gradients of all parameters."""
    engine = FakeEngine(MeanEmbedding(dropout))
    step = GradientPass(engine, objective_of(name, prefixes), rank, len(counts))
    losses = step.run(micro_batches, counts, make_batch()[:1])
    assert engine.is_boundary
    return losses.tolist(), [p.grad.numpy().copy() for p in engine.module.parameters()], engine.forwards


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_cached_gradients_equal_those_of_one_batch(name):
    batch = make_batch()
    prefixes = Prefixes((6, 2), (1.0, 0.5), normalize=True)
    losses, gradients, _ = run(name, [batch], [7], prefixes=prefixes)
    cut, cut_gradients, forwards = run(name, [batch[:3], [], batch[3:4], batch[4:]], [7], prefixes=prefixes)
    assert cut == pytest.approx(losses, rel=1e-12)
    assert_same(cut_gradients, gradients)
    assert forwards == (4 if name.startswith("infonce") else 8)


@pytest.mark.parametrize(("name", "alone"), [("gemini+kl", "gemini"), ("infonce+margin_mse", "infonce")])
def test_a_teacher_changes_losses_and_gradients(name, alone):
    losses, gradients, _ = run(name, [make_batch()], [7])
    plain, plain_gradients, _ = run(alone, [make_batch()], [7])
    assert min(abs(one - 0.7 * other) for one, other in zip(losses, plain, strict=True)) > 1e-6
    assert abs(gradients[1] - plain_gradients[1]).max() > 1e-4


def test_whole_batch_gradient_is_the_derivative_of_the_mean_loss():
    def mean_loss(module):
        vectors = module(make_batch())
        from embedloom.training.gradients import vector_groups

        groups = vector_groups(make_batch(), *vectors)
        return get_loss("gemini")[0](groups, groups, 0, 0.1).mean()

    _, gradients, _ = run("gemini", [make_batch()], [7])
    module, nudge = MeanEmbedding(), 1e-6
    with torch.no_grad():
        module.layer[2, 3] += nudge
        above = mean_loss(module)
        module.layer[2, 3] -= 2 * nudge
        below = mean_loss(module)
    assert gradients[1][2, 3] == pytest.approx(float(above - below) / (2 * nudge), rel=1e-5)


def test_dropout_of_the_second_pass_is_that_of_the_first():
    batch = make_batch()
    torch.manual_seed(5)
    losses, gradients, _ = run("gecko", [batch[:4], batch[4:]], [7], dropout=0.5)
    # One forward of the same two parts with the same random numbers, and plain autograd.
    torch.manual_seed(5)
    engine = FakeEngine(MeanEmbedding(0.5))
    parts = [engine(batch[:4]), engine(batch[4:])]
    from embedloom.training.gradients import vector_groups

    groups = vector_groups(batch, torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
    own = get_loss("gecko")[0](groups, groups, 0, 0.1)
    engine.backward(own.mean())
    assert losses == pytest.approx(own.tolist(), rel=1e-12)
    assert_same(gradients, [p.grad.numpy() for p in engine.module.parameters()])


SHARES = {
    "one micro-batch each": ([[0, 1, 2, 3]], [[4, 5, 6]]),
    "cut": ([[0, 1], [2, 3]], [[4, 5, 6], []]),
    "a worker without queries": ([[0, 1, 2, 3, 4, 5, 6]], [[]]),
    "cut, a worker without queries": ([[0, 1, 2, 3], [4, 5, 6]], [[], []]),
}


def _worker(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    batch = make_batch()
    for share, plan in SHARES.items():
        counts = [sum(map(len, own)) for own in plan]
        for name in NAMES:
            micro_batches = [[batch[position] for position in part] for part in plan[rank]]
            results.put((rank, share, name, *run(name, micro_batches, counts, rank)[:2]))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_have_the_losses_and_gradients_of_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_worker, args=(rank, port, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = {}
    for _ in range(2 * len(SHARES) * len(NAMES)):
        rank, share, name, losses, gradients = results.get(timeout=120)
        found[rank, share, name] = losses, gradients
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    for name in NAMES:
        losses, gradients, _ = run(name, [make_batch()], [7])
        for share in SHARES:
            both = found[0, share, name][0] + found[1, share, name][0]
            assert both == pytest.approx(losses, rel=1e-12), (share, name)
            assert_same(found[0, share, name][1], gradients)
            assert_same(found[1, share, name][1], gradients)
