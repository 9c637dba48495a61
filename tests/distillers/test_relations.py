"""Two gloo processes give value and gradient of one process on the same global batch."""

import pytest
import relation_processes
import seed_processes
import torch
from support import run_script

from mdistiller.distillers.helpers.training.gather import gather_batch


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    path = tmp_path_factory.mktemp("relations") / "two"
    done = run_script(relation_processes.__file__, path, processes=2)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", relation_processes.METHODS)
def test_two_processes_equal_one_on_an_uneven_batch(two_processes, name):
    one, two = relation_processes.step(name), two_processes[name]
    assert (one["share"], two["share"]) == (9, 5)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
    assert max(g.abs().max() for g in one["gradients"]) > 0
    torch.testing.assert_close(two["gradients"], one["gradients"], rtol=1e-7, atol=1e-12)


def test_seed_has_one_queue_in_two_processes(two_processes):
    two, one = two_processes["SEED"], seed_processes.steps()
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    torch.testing.assert_close(two["gradients"], one["gradients"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two["queue"], one["queue"], rtol=0, atol=1e-6)


def test_alone_a_batch_stays_as_it_is():
    parts = torch.ones(3, 2), torch.zeros(3, 4, requires_grad=True)
    got = gather_batch(*parts)
    assert got[0] is parts[0]
    assert got[1] is parts[1]
