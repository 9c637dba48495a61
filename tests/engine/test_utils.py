import pytest
import torch

from mdistiller.distillers import Vanilla
from mdistiller.engine.metrics import Meters, NonFiniteLossError
from mdistiller.engine.utils import AverageMeter, accuracy, validate
from mdistiller.models import get_model_entry


def test_average_meter_weighs_by_count():
    meter = AverageMeter()
    meter.update(1.0, 3)
    meter.update(torch.tensor(5.0), 1)
    assert (meter.val, meter.sum, meter.count, meter.avg) == (5.0, 8.0, 4, 2.0)
    meter.reset()
    assert meter.avg == 0.0


def test_accuracy_in_percent():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [3, 2, 1, 0], [0, 3, 1, 2]])
    target = torch.tensor([0, 2, 3, 1])
    top1, top2, top9 = accuracy(logits, target, topk=(1, 2, 9))
    assert (top1.item(), top2.item(), top9.item()) == (50.0, 75.0, 100.0)


def test_validate_weighs_samples_not_batches():
    torch.manual_seed(0)
    net = get_model_entry("resnet8", "cifar")(num_classes=3).eval()
    images, targets = torch.randn(7, 3, 32, 32), torch.arange(7) % 3
    with torch.no_grad():
        logits = net(images)[0]
    batches = [(images[:5], targets[:5]), (images[5:], targets[5:])]
    top1, top5, loss = validate(batches, Vanilla(net))
    assert top1 == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert top5 == 100.0  # three classes only
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item())


def test_meters_wait_and_give_the_same_means():
    terms = [{"a": torch.tensor(float(i)), "b": torch.tensor(1.0)} for i in range(5)]
    for interval in (1, 3, 50):
        meters = Meters(interval)
        for i, term in enumerate(terms):
            meters.add(f"step {i}", term, {"top1": torch.tensor(50.0)}, batch_size=2 + i)
        means = meters.averages(torch.device("cpu"))
        want = sum(i * (2 + i) for i in range(5)) / sum(2 + i for i in range(5))
        assert means["a"] == pytest.approx(want)
        assert means["losses"] == pytest.approx(want + 1)
        assert means["top1"] == 50.0


def test_meters_name_the_first_bad_step_even_when_read_late():
    meters = Meters(interval=50)
    for i in range(4):
        bad = float("inf") if i == 2 else 1.0
        meters.add(f"step {i}", {"a": torch.tensor(1.0), "b": torch.tensor(bad)}, {}, 1)
    with pytest.raises(NonFiniteLossError, match="in step 2: a=1, b=inf"):
        meters.flush()
