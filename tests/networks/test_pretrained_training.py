"""Runs whose networks start from released weights; files and a local server stand for downloads."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from support import TOY, command, write_config
from test_training import load, train
from torchvision.models import mnasnet0_5

from mdistiller.cli import eval as eval_command
from mdistiller.cli import train as train_command
from mdistiller.dataset import load_data
from mdistiller.engine.cfg import load_config
from mdistiller.models.normalize import input_norm
from mdistiller.networks.network import build_network

VIT = {"patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 2}
TRAINS_ON = "toy"  # position embeddings belong to a size
NAME = "timm/vit_tiny_patch16_224"  # its images are normalised by 0.5 and 0.5
SOLVER = "SOLVER:\n  TYPE: AdamW\n  LR: 0.002\n"


def released(folder, classes, **facts):
    """A network of timm and the arguments that make its weights the released ones."""
    torch.manual_seed(1)
    net = timm.create_model(NAME[5:], img_size=32, num_classes=classes, **VIT)
    torch.save(net.state_dict(), folder / "released.pth")
    overlay = {"file": str(folder / "released.pth"), **facts}
    return net.eval(), {**VIT, "pretrained": True, "pretrained_cfg_overlay": overlay}


def test_a_pretrained_teacher_needs_no_file_and_sees_its_own_normalisation(tmp_path, capsys):
    net, settings = released(tmp_path, 10, num_classes=10)
    distiller = {"method": "KD", "TEACHER": NAME, "TEACHER_ARGS": settings, "epochs": 1}
    run = train(tmp_path, **distiller)
    data = load_data(load_config(tmp_path / "toy.yaml"), torch.device("cpu"))
    with torch.no_grad():
        hits = [(net((x * 0.4 + 0.3 - 0.5) / 0.5).argmax(1) == y).sum() for x, y in data.val]
    accuracy = 100 * sum(hits).item() / 60
    assert json.loads((run / "summary.json").read_text())["teacher_acc"] == pytest.approx(accuracy)
    state = load(run / "latest")["model"]
    assert all(torch.equal(state[f"teacher.{k}"], v) for k, v in net.state_dict().items())

    capsys.readouterr()
    words = ["-m", NAME, "--cfg", str(tmp_path / "toy.yaml")]
    student_args = ["DISTILLER.STUDENT_ARGS", str(settings)]
    assert eval_command.main([*words, *student_args]) == 0
    assert f"top-1 {accuracy:.2f}" in capsys.readouterr().out


def test_a_pretrained_teacher_of_other_classes_is_refused_with_what_to_do(tmp_path, capsys):
    _, settings = released(tmp_path, 1000)
    path = write_config(tmp_path, method="KD", TEACHER=NAME, TEACHER_ARGS=settings)
    assert train_command.main(["--cfg", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"weights of {NAME} are for 1000 classes, but 10 are wanted: train it on" in error
    assert "STUDENT_ARGS {pretrained: True}" in error
    assert error.count("\n") == 1
    words = ["-m", NAME, "--cfg", str(path), "DISTILLER.STUDENT_ARGS", str(settings)]
    assert eval_command.main(words) == 2
    assert "are for 1000 classes, but 10 are wanted" in capsys.readouterr().err


def test_a_teacher_without_weights_is_told_of_the_released_ones(tmp_path, capsys):
    path = write_config(tmp_path, method="KD", TEACHER=NAME, TEACHER_ARGS=VIT)
    assert train_command.main(["--cfg", str(path)]) == 2
    assert "or TEACHER_ARGS {pretrained: True} for released ones" in capsys.readouterr().err


def test_the_way_from_released_weights_over_fine_tuning_to_a_student(tmp_path, capsys):
    """By TEACHER_CFG and by TEACHER_CKPT; each time the released file is read once, or not."""
    net, settings = released(tmp_path, 1000)
    (tmp_path / "t").mkdir()
    teacher = write_config(
        tmp_path / "t",
        epochs=1,
        student=NAME,
        STUDENT_ARGS=settings,
        text=f"EXPERIMENT:\n  NAME: teacher\n{SOLVER}",
    )
    cfg = load_config(teacher)
    data = load_data(cfg, torch.device("cpu"))
    student = build_network(cfg, "STUDENT", data)
    own, start = net.state_dict(), student.state_dict()
    assert [key for key in own if not torch.equal(own[key], start[key])] == [
        "head.weight",
        "head.bias",
    ]
    assert len(start["head.bias"]) == 10
    image = next(iter(data.val))[0]
    seen = []
    student.net.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    student(image)
    torch.testing.assert_close(seen[0], (image * 0.4 + 0.3 - 0.5) / 0.5, rtol=1e-5, atol=1e-6)

    distiller = {"method": "KD", "TEACHER": NAME, "TEACHER_ARGS": settings, "epochs": 1}
    run = train(tmp_path, TEACHER_CFG=str(teacher), **distiller)
    tuned = run.parent / "teacher"
    trained = json.loads((tuned / "summary.json").read_text())["last_acc"]
    assert json.loads((run / "summary.json").read_text())["teacher_acc"] == trained
    (tmp_path / "released.pth").unlink()
    (tmp_path / "second").mkdir()
    ckpt = str(tuned / "student_latest")
    for args in ({**VIT, "pretrained": True}, VIT):  # the file itself says what it wants
        path = write_config(tmp_path / "second", TEACHER=NAME, TEACHER_ARGS=args)
        net = build_network(load_config(path), "TEACHER", data, ckpt)
        assert input_norm(net) == [[0.5] * 3] * 2
    second = train(tmp_path / "second", TEACHER_CKPT=ckpt, **distiller)
    assert json.loads((second / "summary.json").read_text())["teacher_acc"] == trained


def test_of_two_processes_one_downloads(tmp_path):
    class Handler(SimpleHTTPRequestHandler):
        requests = 0

        def do_GET(self):
            Handler.requests += 1
            super().do_GET()

        def log_message(self, *args):
            pass

    torch.save(mnasnet0_5().state_dict(), tmp_path / "weights.pth")
    handler = partial(Handler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "place.py").write_text(
            "import torch\nfrom torchvision.models import MNASNet0_5_Weights as W\n"
            f"W.DEFAULT.value.url = 'http://127.0.0.1:{server.server_port}/weights.pth'\n"
            f"torch.hub.set_dir({str(tmp_path / 'hub')!r})\n"
        )
        config = write_config(
            tmp_path,
            epochs=1,
            student="torchvision/mnasnet0_5",
            STUDENT_ARGS={"pretrained": True},
            text=f"IMPORTS: [{json.dumps(TOY)}, {json.dumps(str(tmp_path / 'place.py'))}]\n",
        )
        done = command("--cfg", config, processes=2)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert Handler.requests == 1
    assert (tmp_path / "out" / "toy" / "run" / "student_latest").is_file()
