"""CRD: the loss, the bank, the draw of negatives."""

import crd_processes
import pytest
import textbook_connectors as textbook
import torch
from support import golden_values, run_script

from mdistiller.distillers import Output
from mdistiller.distillers.CRD import CRD, Embed, crd_loss
from mdistiller.distillers.helpers.losses.numerics import unit
from mdistiller.distillers.helpers.training import memory_bank
from mdistiller.distillers.helpers.training.memory_bank import Bank
from mdistiller.distillers.helpers.training.negatives import Negatives, random_below
from mdistiller.engine.cfg import default_config
from mdistiller.registry import UserError


@pytest.fixture
def golden_setup():
    """methods.md section 10: embeddings, bank of 20 rows, contrast rows of four images."""
    embeds = [Embed(12, 16).double(), Embed(14, 16).double()]
    bank = Bank(20, 16, 5, 0.07, 0.5)
    bank.params = bank.params.double()  # float32 rounds the temperature, as the original's does
    with torch.no_grad():
        for embed, seeds in zip(embeds, ((73, 74), (75, 76)), strict=True):
            embed.linear.weight.copy_(golden_values(embed.linear.weight.shape, seeds[0]))
            embed.linear.bias.copy_(golden_values((16,), seeds[1]))
    scale = (3 / 16) ** 0.5
    bank.memory_v1 = scale * golden_values((20, 16), 71)
    bank.memory_v2 = scale * golden_values((20, 16), 72)
    index = torch.tensor([3, 0, 7, 11])
    shifts = 3 * torch.arange(1, 6) + torch.arange(4)[:, None]
    return embeds, bank, index, torch.cat([index[:, None], (index[:, None] + shifts) % 20], dim=1)


def one_step(setup, step):
    """Loss, its gradient norms (student feature, weights), and the bank moved on."""
    (embed_s, embed_t), bank, index, contrast = setup
    student = golden_values((4, 12), 77 + 10 * step).requires_grad_()
    embedded = embed_s(student), embed_t(golden_values((4, 14), 78 + 10 * step))
    loss = crd_loss(*bank(*embedded, contrast), 20)
    bank.update(index, *embedded)
    tensors = (student, embed_s.linear.weight, embed_t.linear.weight)
    return loss.item(), [g.norm().item() for g in torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("dense", [True, False])
def test_two_steps_equal_the_original(golden_setup, monkeypatch, dense):
    if not dense:
        monkeypatch.setattr(memory_bank, "DENSE_BANK", 0)
    loss, gradients = one_step(golden_setup, 1)
    assert loss == pytest.approx(12.6160508, rel=1e-7)
    assert gradients == pytest.approx([2.358437, 2.233345, 2.742881], rel=1e-6)
    loss, gradients = one_step(golden_setup, 2)
    assert loss == pytest.approx(6.7752018, rel=1e-7)
    assert gradients == pytest.approx([2.240511, 2.183304, 2.52262], rel=1e-6)
    bank = golden_setup[1]
    assert bank.params[2:4].tolist() == pytest.approx([21093.5527, 4452.4551], rel=1e-7)
    assert bank.memory_v1[3].sum().item() == pytest.approx(-1.64697679, rel=1e-7)
    assert bank.memory_v2[3].sum().item() == pytest.approx(-0.74792024, rel=1e-7)


def test_loss_equals_the_textbook_on_random_input():
    generator = torch.Generator().manual_seed(0)
    bank = Bank(50, 6, 9, 0.1, 0.5).double()
    student, teacher = (
        torch.randn(3, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in "st"
    )
    contrast = torch.randint(50, (3, 10), generator=generator)
    got = crd_loss(*bank(unit(student), unit(teacher), contrast), 50)
    memories, want = (bank.memory_v2, bank.memory_v1), 0
    for x, memory, z in zip((student, teacher), memories, bank.params[2:4], strict=True):
        v = x / x.norm(dim=1, keepdim=True)
        loss, own_z = textbook.crd_side(v, memory, contrast, bank.params[1], None, 50)
        assert z.item() == pytest.approx(own_z.item(), rel=1e-12)
        want = want + loss
    assert got.item() == pytest.approx(want.item(), rel=1e-10)
    for a, b in zip(
        torch.autograd.grad(got, (student, teacher)),
        torch.autograd.grad(want, (student, teacher)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def tiny_crd(targets=None, num_data=30, **settings):
    torch.manual_seed(0)
    cfg = default_config()
    settings = {"NCE.K": 6, "FEAT.DIM": 8, **settings}
    cfg.merge_from_list([word for k, v in settings.items() for word in (f"CRD.{k}", v)])
    nets = crd_processes.Net(5), crd_processes.Net(7)
    return CRD(*nets, cfg, num_data, targets=targets, image_size=(1, 2)).train()


@pytest.mark.parametrize("kind", ["zeros", "constant", "duplicates", "scaled"])
def test_rough_features_give_finite_losses_and_gradients(kind):
    crd = tiny_crd(torch.arange(30) % 3)
    noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    feature = {
        "zeros": torch.zeros(4, 5),
        "constant": torch.ones(4, 5),
        "duplicates": noise[:1].repeat(4, 1),
        "scaled": 1e4 * noise,
    }[kind].requires_grad_()
    if kind == "zeros":
        torch.nn.init.zeros_(crd.embed_s.linear.bias)
    index = torch.arange(4)
    for _ in range(2):
        outputs = [
            Output(torch.zeros(4, 2), {"pooled_feat": pooled})
            for pooled in (feature, torch.zeros(4, 7))
        ]
        loss = crd.distill(*outputs, index, index=index)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(feature.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in crd.embed_s.parameters())
        assert all(torch.isfinite(buffer).all() for buffer in crd.contrast.buffers())


def test_scores_far_apart_stay_finite():
    scores = torch.tensor([[-200.0, 100.0, 0.0], [100.0, -200.0, -100.0]], requires_grad=True)
    loss = crd_loss(scores, scores, 1000)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


def take_step(crd, seed, contrast=None):
    image = golden_values((4, 3, 1, 2), seed).float()
    index = torch.tensor([2, 9, 11, 25])
    batch = {"image": image, "target": index % 2, "index": index, "epoch": 1}
    return crd(**batch, contrastive_index=contrast)[1]["loss_kd"]


def test_gradient_reaches_student_and_embeddings_only():
    crd = tiny_crd(torch.arange(30) % 3)
    take_step(crd, 1).backward()
    assert all(p.grad is not None for p in [*crd.student.body.parameters()])
    assert all(p.grad is not None for e in (crd.embed_s, crd.embed_t) for p in e.parameters())
    assert all(p.grad is None for p in crd.teacher.parameters())
    assert not any(buffer.requires_grad for buffer in crd.contrast.buffers())


def test_bank_and_z_survive_a_checkpoint(tmp_path):
    contrast = torch.randint(30, (4, 7), generator=torch.Generator().manual_seed(2))
    crd = tiny_crd()
    for seed in (1, 2):
        take_step(crd, seed, contrast)
    torch.save(crd.state_dict(), tmp_path / "file")
    other = tiny_crd()
    take_step(other, 5, contrast)  # has another bank and another Z by now
    state = torch.load(tmp_path / "file", weights_only=True)
    names = {key for key in state if not key.startswith(("student.", "teacher."))}
    assert names == {
        *(f"embed_{net}.linear.{kind}" for net in "st" for kind in ("weight", "bias")),
        *(f"contrast.{name}" for name in ("params", "memory_v1", "memory_v2")),
    }
    other.load_state_dict(state)
    for seed in (3, 4):
        assert take_step(other, seed, contrast).item() == take_step(crd, seed, contrast).item()
    assert all(map(torch.equal, other.contrast.buffers(), crd.contrast.buffers()))


def test_a_bank_saved_before_the_first_batch_sets_its_z_after_loading():
    crd = tiny_crd()
    crd.load_state_dict(tiny_crd().state_dict())
    take_step(crd, 1)
    z = crd.contrast.params[2:4].clone()
    assert (z > 0).all()
    take_step(crd, 2)
    assert torch.equal(crd.contrast.params[2:4], z)


def test_of_an_image_that_comes_twice_the_last_embedding_counts():
    bank = Bank(5, 3, 2, 0.1, 0.0)
    rows = torch.eye(3)
    bank.update(torch.tensor([4, 1, 4]), rows, -rows)
    assert torch.equal(bank.memory_v1[4], rows[2])
    assert torch.equal(bank.memory_v2[4], -rows[2])
    assert torch.equal(bank.memory_v1[1], rows[1])


def test_the_bank_keeps_its_momentum_of_what_it_held():
    bank = Bank(5, 3, 2, 0.1, 0.75)
    before = [bank.memory_v1[2].clone(), bank.memory_v2[2].clone()]
    rows = torch.eye(3)[:1]
    bank.update(torch.tensor([2]), rows, -rows)
    after = bank.memory_v1[2], bank.memory_v2[2]
    for old, new, row in zip(before, after, (rows[0], -rows[0]), strict=True):
        torch.testing.assert_close(new, unit(0.75 * old + 0.25 * row))


@pytest.fixture(params=["_chosen", "_by_keys"])
def form(request, monkeypatch):
    """How distinct negatives are drawn: the CPU's form, and that of other devices."""
    monkeypatch.setattr(Negatives, "_distinct", getattr(Negatives, request.param))


def test_a_draw_repeats_with_torchs_seed(form):
    negatives = Negatives(torch.arange(60) % 4, 60, 25)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(negatives.draw(torch.arange(8)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_negatives_are_distinct_and_of_other_classes(form):
    torch.manual_seed(0)
    targets = torch.randint(4, (60,))
    negatives = Negatives(targets, 60, 25)
    index = torch.arange(60)
    drawn = negatives.draw(index)
    assert drawn.shape == (60, 25)
    assert all(len(set(row.tolist())) == 25 for row in drawn)
    assert (targets[drawn] != targets[:, None]).all()
    assert not torch.equal(drawn, negatives.draw(index))


@pytest.mark.parametrize("k", [3, 40])
def test_negatives_are_uniform(k, form):
    """Chi-square over the 20 images of other classes; k = 40 draws with replacement."""
    torch.manual_seed(1)
    targets = torch.tensor([0] * 8 + [1] * 7 + [2] * 13)
    draws = Negatives(targets, 28, k).draw(torch.zeros(6000, dtype=torch.int64))
    counts = draws.flatten().bincount(minlength=28).double()
    assert not counts[:8].any()
    expected = 6000 * k / 20
    chi_square = ((counts[8:] - expected) ** 2 / expected).sum().item()
    assert 2 < chi_square < 50  # 19 degrees of freedom: a fair draw leaves this once in 10,000
    pairs = (
        draws[:, 0] * 28 + draws[:, 1]
        if k == 40
        else draws.sort(dim=1).values @ torch.tensor([784, 28, 1])
    )
    kinds = len(pairs.unique())
    assert kinds == 20**2 if k == 40 else kinds > 1100  # of 1140 sets


def test_only_classes_with_too_few_others_repeat(form):
    torch.manual_seed(0)
    targets = torch.tensor([0] * 20 + [1] * 5)
    drawn = Negatives(targets, 25, 12).draw(torch.tensor([0, 24]))
    assert set(drawn[0].tolist()) <= set(range(20, 25))
    assert len(set(drawn[1].tolist())) == 12
    assert drawn[1].max() < 20


def test_rows_are_drawn_in_blocks_where_the_set_is_large(monkeypatch):
    monkeypatch.setattr(Negatives, "_distinct", Negatives._by_keys)
    monkeypatch.setattr("mdistiller.distillers.helpers.training.negatives.DRAW_BLOCK", 70)
    drawn = Negatives(torch.arange(30) % 3, 30, 5).draw(torch.arange(7))
    assert drawn.shape == (7, 5)
    assert (drawn % 3 != torch.arange(7)[:, None] % 3).all()


def test_without_classes_only_the_image_itself_is_no_negative(form):
    drawn = Negatives(None, 10, 9).draw(torch.arange(10))
    for own, row in enumerate(drawn):
        assert sorted([own, *row.tolist()]) == list(range(10))


def test_relax_contrasts_with_another_image_of_the_class():
    torch.manual_seed(0)
    targets = torch.tensor([1, 0, 1, 2, 1, 0, 1])
    crd = tiny_crd(targets, 7, MODE="relax", **{"NCE.K": 3})
    index = torch.arange(7).repeat(200)
    positive = crd.draw_contrast(index)[:, 0]
    assert torch.equal(targets[positive], targets[index])
    assert (positive == index).sum() == 200  # class 2 has one image
    seen = positive[index == 0].bincount(minlength=7)
    assert (seen[[2, 4, 6]] > 40).all()
    with pytest.raises(UserError, match="relax needs the classes"):
        tiny_crd(None, 7, MODE="relax").draw_contrast(index)


def test_bad_targets_are_refused():
    with pytest.raises(UserError, match="expected 30 training targets"):
        tiny_crd(torch.arange(4))
    with pytest.raises(UserError, match="at least two classes"):
        tiny_crd(torch.zeros(30, dtype=torch.int64))
    crd = tiny_crd()
    with pytest.raises(UserError, match="samples' numbers"):
        crd(image=torch.zeros(2, 3, 1, 2), target=torch.zeros(2, dtype=torch.int64))


def test_random_below_keeps_its_bound():
    draws = random_below(torch.tensor([1, 2, 1000]).expand(500, 3))
    assert draws.min() == 0
    assert (draws.max(dim=0).values < torch.tensor([1, 2, 1000])).all()
    assert len(draws[:, 2].unique()) > 300


def test_two_processes_equal_one(tmp_path):
    """Nine images split 4 / 5: losses, gradients, bank and Z as in one process."""
    done = run_script(crd_processes.__file__, tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = crd_processes.steps(), torch.load(tmp_path / "two", weights_only=True)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for key, value in one["bank"].items():
        torch.testing.assert_close(two["bank"][key], value, rtol=1e-5, atol=1e-6)
    for got, want in zip(two["gradients"], one["gradients"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
