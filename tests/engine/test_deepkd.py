"""DeepKD: three momenta against steps written out, KD split in two, the trainer on real digits."""

import json

import pytest
import textbook_relations as textbook
import torch
from support import golden_values, saved_teacher, write_config
from test_distillers import batch, networks

from mdistiller.cli import train as train_command
from mdistiller.dataset import load_data
from mdistiller.distillers import DISTILLERS, get_distiller
from mdistiller.distillers.DKD import dkd_terms
from mdistiller.distillers.helpers.losses.split import Split, split_terms
from mdistiller.distillers.KD import KD, kd_loss
from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import default_config, load_config
from mdistiller.engine.deepkd import ThreeMomenta
from mdistiller.registry import is_builtin
from mdistiller.run.build import build_distiller

STUDENT, TEACHER = 4 * golden_values((8, 10), 1), 6 * golden_values((8, 10), 2)
TARGET = torch.arange(8)
LABELS = TARGET.clone()
LABELS[2] = -100


def terms(split, student=STUDENT, target=TARGET, epoch=1, as_kd=True, temperature=4.0):
    return split_terms(student, TEACHER, target, temperature, split, epoch, as_kd)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_with_each_samples_weight_the_two_terms_add_up_to_kd(temperature):
    tckd, nckd = terms(Split(), temperature=temperature)
    torch.testing.assert_close(tckd + nckd, kd_loss(STUDENT, TEACHER, temperature))
    plain = terms(Split(), as_kd=False, temperature=temperature)
    torch.testing.assert_close(plain, dkd_terms(STUDENT, TEACHER, TARGET, temperature))


@pytest.mark.parametrize("topk", [0, 2, 4, 10])
@pytest.mark.parametrize("batch_weight", [False, True])
def test_the_formula_with_the_teachers_leading_classes(topk, batch_weight):
    student, by_hand = (STUDENT.clone().requires_grad_() for _ in range(2))
    got = terms(Split(topk=topk, batch_weight=batch_weight), student)
    tckd, nckd, own = textbook.split(by_hand, TEACHER, TARGET, 4.0, topk)
    weight = (1 - own).mean() if batch_weight else 1 - own
    want = tckd.mean(), (weight * nckd).mean()
    torch.testing.assert_close(got, want)
    for a, b in zip(got, want, strict=True):
        (slope,) = torch.autograd.grad(a, student, retain_graph=True)
        torch.testing.assert_close(slope, *torch.autograd.grad(b, by_hand, retain_graph=True))


def test_unlabelled_samples_do_not_count_and_k_may_grow():
    kept = LABELS != -100
    for batch_weight in (False, True):
        split = Split(batch_weight=batch_weight)
        alone = split_terms(STUDENT[kept], TEACHER[kept], LABELS[kept], 4.0, split, 1, True)
        torch.testing.assert_close(terms(split, target=LABELS), alone)
    growing = Split(topk=3, grows=True, epochs=8)
    assert [growing.classes(epoch, 10) for epoch in (1, 2, 7, 8)] == [3, 4, 9, 0]
    assert [Split(topk=k).classes(5, 10) for k in (0, 3, 10, 40)] == [0, 3, 0, 0]


def test_finite_where_the_teacher_has_nothing_but_the_target_in_front():
    logits = torch.zeros(2, 10).scatter(1, TARGET[:2, None], 1e30).requires_grad_()
    for topk in (0, 2):
        value = sum(split_terms(-logits, logits.detach(), TARGET[:2], 4.0, Split(topk), 1, True))
        (slope,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(value)
        assert torch.isfinite(slope).all()


def test_dkds_terms_keep_their_weights_and_its_warm_up():
    cfg = default_config()
    cfg.merge_from_list(["DKD.ALPHA", 3.0, "DKD.BETA", 0.5, "DKD.CE_WEIGHT", 0.7])
    distiller = get_distiller("DKD").build(*networks(), cfg, 50).train()
    distiller.split, items = Split(topk=4), batch()  # epoch 2 of 20
    logits, losses = distiller(**items)
    teacher = distiller.teacher(items["image"])[0]
    tckd, nckd, _ = textbook.split(logits.double(), teacher.double(), items["target"], 4.0, 4)
    want = {"loss_tckd": 0.1 * 3 * tckd.mean(), "loss_nckd": 0.1 * 0.5 * nckd.mean()}
    want["loss_ce"] = 0.7 * torch.nn.functional.cross_entropy(logits, items["target"])
    assert set(losses) == set(want)
    for name, value in want.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4), name


def split_views(method, settings, **split):
    """The losses of a method of two views, whole and split; student and teacher logits by view."""
    cfg = default_config()
    cfg.merge_from_list(settings)
    distiller = get_distiller(method).build(*networks(), cfg, 50).double().train()
    distiller.student.eval()  # the same logits at every forward
    given = batch()
    views = given["image"] = given["image"].double(), given["image"].flip(3).double()
    whole = distiller(**given)[1]
    distiller.split = Split(**split)
    logits = [[net(x)[0].detach() for x in views] for net in (distiller.student, distiller.teacher)]
    return whole, distiller(**given)[1], logits, given["target"]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("CRLD", ["CRLD.TAU_W", 0.235, "CRLD.TAU_S", 0.0]),
        ("CRLD", ["CRLD.TAU_W", 0.0, "LSKD.ENABLE", True]),
        ("MLKD", []),
        ("MLKD", ["MLKD.MASK", "per_item", "LSKD.ENABLE", True]),
    ],
)
def test_the_split_of_two_views_adds_up_to_the_whole(method, settings):
    whole, parts, *_ = split_views(method, settings)
    assert set(parts) == {"loss_ce", "loss_tckd", "loss_nckd"}
    torch.testing.assert_close(parts["loss_ce"], whole["loss_ce"])
    torch.testing.assert_close(parts["loss_tckd"] + parts["loss_nckd"], whole["loss_kd"])
    assert 0 < parts["loss_tckd"] < whole["loss_kd"]


def test_crlds_split_by_the_formula():
    settings = ["CRLD.TAU_W", 0.235, "CRLD.TAU_S", 0.0, "CRLD.T", 2.0]
    _, parts, (student, teacher), target = split_views("CRLD", settings, topk=4)
    want = {"loss_tckd": 0.0, "loss_nckd": 0.0}
    for v in (0, 1):
        for z in (0, 1):
            threshold, weight = (0.235, 2.0) if v == z else (0.0, 0.5)
            mask = teacher[0 if v == z else 1].softmax(1).amax(1) >= threshold
            tckd, nckd, own = textbook.split(student[z], teacher[v], target, 2.0, 4)
            want["loss_tckd"] += weight * (mask * tckd).mean()
            want["loss_nckd"] += weight * (mask * (1 - own) * nckd).mean()
    assert {False, True} == set((teacher[0].softmax(1).amax(1) >= 0.235).tolist())
    for name, value in want.items():
        torch.testing.assert_close(parts[name], value, msg=name)


def test_mlkds_split_by_the_formula():
    settings = ["MLKD.TEMPS", [4.0, 2.0], "MLKD.MASK", "per_item"]
    whole, parts, (student, teacher), target = split_views("MLKD", settings)
    highest = teacher[0].softmax(1).amax(1)
    mask, tckd = highest <= highest.median(), 0.0
    for t in (4.0, 2.0):
        weak, strong = (
            textbook.split(z, v, target, t)[0] for z, v in zip(student, teacher, strict=True)
        )
        tckd += 0.9 * ((mask * weak).mean() + strong.mean())
    torch.testing.assert_close(parts["loss_tckd"], tckd)
    torch.testing.assert_close(parts["loss_nckd"], whole["loss_kd"] - tckd)


MOMENTA, DECAY = (0.975, 0.825, 0.95), 0.01


def gradients_of(step):
    """Of the three losses at a fixed point of four parameters."""
    return [golden_values((3,), 10 * step + n) for n in range(3)]


def by_hand(form, steps=4, lr=0.1):
    """A parameter with all three gradients after some steps."""
    w, buffers = golden_values((3,), 99), {}
    for step in range(1, steps + 1):
        momenta, given = dict(zip("tco", MOMENTA, strict=True)), gradients_of(step)
        given = dict(zip("tco", given, strict=True))
        if form == "coded":
            momenta["t"] = MOMENTA[1]
            given["c"] = given["c"] + DECAY * w
        else:
            momenta["d"], given["d"] = 0.9, DECAY * w
        for name, gradient in given.items():
            old = buffers.get(name)
            buffers[name] = gradient if old is None else momenta[name] * old + gradient
        w = w - lr * sum(buffers.values())
    return w


@pytest.mark.parametrize("form", ["coded", "written"])
def test_four_steps_by_hand(form):
    w = torch.nn.Parameter(golden_values((3,), 99))
    optimizer = ThreeMomenta([w], 0.1, MOMENTA, 0.9, DECAY, form)
    for step in range(1, 5):
        task, target, others = gradients_of(step)
        for term, gradient in (("loss_tckd", target), ("loss_nckd", others)):
            w.grad = gradient.clone()
            optimizer.keep(term)
        w.grad = task.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach(), by_hand(form), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["coded", "written"])
def test_a_parameter_without_some_gradients_goes_by_the_others_own_momenta(form):
    w = torch.nn.Parameter(golden_values((3,), 99))
    optimizer, buffer = ThreeMomenta([w], 0.1, MOMENTA, 0.9, 0.0, form), 0
    want = w.detach().clone()
    for step in range(1, 4):
        w.grad = gradients_of(step)[0]
        optimizer.step()
        buffer = MOMENTA[0] * buffer + gradients_of(step)[0]
        want = want - 0.1 * buffer
    torch.testing.assert_close(w.detach(), want)


def config(folder, text="", method="KD", student="resnet8", epochs=2, form="coded", solver=""):
    folder.mkdir(exist_ok=True)
    text = (
        f"SOLVER:\n  TRAINER: deepkd\n  DEEPKD: {{FORM: {form}{text}}}\n"
        f"{solver or '  MOMENTUM: 0.9'}\n"
    )
    teacher = {"TEACHER": "resnet8", "TEACHER_CKPT": str(saved_teacher(folder))}
    return write_config(folder, text, method, student, epochs, **teacher)


def rows(folder, name="run"):
    log = folder / "out" / "toy" / name / "metrics.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def train(path, *words, code=0):
    assert train_command.main(["--cfg", str(path), *map(str, words)]) == code
    return rows(path.parent) if not code else []


@pytest.mark.parametrize("form", ["coded", "written"])
def test_the_settings_reach_the_optimizer_and_the_loss(tmp_path, form):
    deltas = ", TOPK: 4, DELTA_TOG: 0.05, DELTA_TCG: -0.2, DELTA_NCG: 0.01"
    cfg = load_config(config(tmp_path, deltas, epochs=5, form=form, solver="  MOMENTUM: 0.8"))
    data = load_data(cfg, torch.device("cpu"))
    distiller = build_distiller(cfg, data, torch.device("cpu"))
    optimizer = trainer_dict["deepkd"]("x", distiller, data.train, data.val, cfg).optimizer
    assert optimizer.momenta == pytest.approx((0.85, 0.6, 0.81))  # task, target class, others
    assert (optimizer.decay_momentum, optimizer.coded) == (0.8, form == "coded")
    as_coded = form == "coded"
    assert distiller.split == Split(4, grows=not as_coded, batch_weight=as_coded, epochs=5)


def test_without_differences_of_momenta_it_is_sgd_on_the_sum(tmp_path):
    """With per-sample weights the terms add up to KD; decay has SGD's momentum."""
    deltas = ", DELTA_TOG: 0.0, DELTA_TCG: 0.0, DELTA_NCG: 0.0"
    got = train(config(tmp_path / "deep", deltas, form="written", epochs=1))
    path = config(tmp_path / "base", deltas, form="written", epochs=1)
    (path.parent / "toy.yaml").write_text("_BASE_: toy_base.yaml\n")
    plain = train(path)
    for one, two in zip(got, plain, strict=True):
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-3)
        assert one["train_loss_tckd"] + one["train_loss_nckd"] == pytest.approx(
            two["train_loss_kd"], rel=1e-2
        )
    delta = train(config(tmp_path / "delta", form="written", epochs=1))
    assert delta[0]["train_loss"] != pytest.approx(got[0]["train_loss"], rel=1e-6)


def test_a_run_in_two_parts_is_the_whole_run(tmp_path):
    solver = "  AMP: bf16\n  CLIP_GRAD_NORM: 5.0"
    path = config(tmp_path, ", TOPK: 0", form="written", method="DKD", solver=solver)
    for name, *parts in (("whole", []), ("parts", ["SOLVER.EPOCHS", 1], ["--resume"])):
        for words in parts:
            words = [*words, "EXPERIMENT.NAME", name]
            assert train_command.main(["--cfg", str(path), *map(str, words)]) == 0
    files = [tmp_path / "out" / "toy" / n / "student_latest" for n in ("whole", "parts")]
    one, two = (torch.load(file, weights_only=True)["model"] for file in files)
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DISTILLER.TYPE", "KD+AT"], ", not KD+AT"),
        (["DISTILLER.TYPE", "NONE"], ", not NONE"),
        (
            ["SOLVER.DEEPKD.FORM", "paper"],
            "SOLVER.DEEPKD.FORM 'paper' is not one of coded, written",
        ),
        (["SOLVER.DEEPKD.TOPK", 1], "SOLVER.DEEPKD.TOPK must be 0 (all classes) or at least 2"),
        (["SOLVER.DEEPKD.DELTA_NCG", 0.1], "SOLVER.DEEPKD.DELTA_NCG 0.1 must be at least 0 and"),
        (["SOLVER.TYPE", "Adam"], "SOLVER.TRAINER deepkd needs SOLVER.TYPE SGD"),
        (["KD.DIVERGENCE", "reverse_kl"], "KD.DIVERGENCE must be kl where KD is split"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, capsys, words, message):
    train(config(tmp_path), *words, code=2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_class_that_changes_the_loss_cannot_be_split_unless_it_splits_that():
    class Same(KD):
        pass

    class Other(KD):
        def distill(self, student, teacher, target, **batch):
            return student.logits.mean()

    assert [cls.can_split() for cls in (KD, Same, Other, get_distiller("KD+AT"))] == [
        True,
        True,
        False,
        False,
    ]
    ours = {name: cls for name, cls in DISTILLERS.items() if is_builtin(cls)}  # no other test's
    assert {name for name, cls in ours.items() if cls.can_split()} == {
        *("KD", "DKD", "MLKD", "CRLD")
    }


@pytest.mark.parametrize("method", ["MLKD", "CRLD"])
def test_methods_of_two_views_train(tmp_path, method):
    confident = "  MOMENTUM: 0.9\nCRLD: {TAU_W: 0.0, TAU_S: 0.0}"
    (row,) = train(config(tmp_path, ", TOPK: 4", method=method, epochs=1, solver=confident))
    assert row["train_loss_tckd"] > 0
    assert row["train_loss_nckd"] > 0
